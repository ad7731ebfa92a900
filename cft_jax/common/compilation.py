"""How compilers are set up, before JAX meets its devices: the persistent cache, and flags of the TPU's compiler."""

import os

import jax

from cft_jax.common.files import user_cache

# Weights that are cut over devices are gathered once, while others are multiplied. Left to itself the TPU's compiler
# multiplies them piece by piece as they come by, so small that it takes twice the cycles (Qwen3-8B's width on v6e-8).
_TPU_FLAGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def prepare_compilers() -> None:
    """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR already says where (or, empty, not).

    The TPU's compiler reads LIBTPU_INIT_ARGS when it is loaded; what it already says stays.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))
    set_tpu_flags()


def set_tpu_flags() -> None:
    """Flags for every program that the TPU's compiler is given by this process."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    missing = [f"--{name}={value}" for name, value in _TPU_FLAGS.items() if name not in given]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *missing]).strip()
