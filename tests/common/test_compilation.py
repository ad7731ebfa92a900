"""What JAX's compilers are told before they are loaded."""

import os

from cft_jax.common.compilation import set_tpu_flags


def test_the_users_own_flags_stay(monkeypatch):
    name = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    set_tpu_flags()
    set_tpu_flags()
    assert os.environ["LIBTPU_INIT_ARGS"] == f"--{name}=1000000"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_other=1 --{name}=5")
    set_tpu_flags()
    assert os.environ["LIBTPU_INIT_ARGS"] == f"--xla_other=1 --{name}=5"
