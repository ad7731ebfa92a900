"""A training run in a process of its own, slow enough to be killed: `train_and_wait.py WORKDIR CACHE DATA,FSDP,TENSOR`.

Run by test_processes.py; prints the number of steps and the weights' digest when it is done.
"""

import hashlib
import sys
import time
from pathlib import Path

import jax
from conftest import TinyBatches, run_training

from cft_jax.sharding import distributed


def slowly(step, batch):
    time.sleep(0.1)
    return batch


def main():
    workdir, cache, mesh = sys.argv[1:]
    distributed.start()
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    shape = tuple(int(size) for size in mesh.split(","))
    result, weights = run_training(Path(workdir), TinyBatches(slowly), mesh=shape, every_steps=2)
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].tobytes())
    sys.stdout.write(f"{result.step} {digest.hexdigest()}\n")


if __name__ == "__main__":
    main()
