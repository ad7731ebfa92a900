"""The persistent cache of compiled programs."""

import os

import jax

from cft_jax.common.files import user_cache


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR already says where (or, empty, not)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))
