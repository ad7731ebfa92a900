"""Freed memory that is kept costs no page faults when it is taken again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from cft_jax.common.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def fill():
    np.full(2**24, 1.0)  # 128 MiB, 32768 pages
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_pages_are_not_mapped_again():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # Huge pages make fewer faults of the same memory: 64 of 2 MiB.
    assert faults("returned") >= 32
    assert faults("kept") < 16
