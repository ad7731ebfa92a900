"""The evaluate command, killed half-way: `evaluate_and_die.py STORE RECORDS [flags of cft_jax.evaluate]`.

Run by test_killed.py. The process ends by SIGKILL as soon as so many records stand in that store, a path within the
workdir, and leaves half a line behind them, as a crash in the middle of a write does.
"""

import os
import signal
import sys
from pathlib import Path

from cft_jax.evaluate import __main__ as evaluate
from cft_jax.evaluate import results
from cft_jax.evaluate.store import ResultStore


class DyingStore(ResultStore):
    def __init__(self, path, *, write, **options):
        self.path, self.dies = path, write and path.as_posix().endswith(STORE)
        super().__init__(path, write=write, **options)

    def append(self, record):
        super().append(record)
        if self.dies and len(self) >= RECORDS:
            with self.path.open("a") as file:
                file.write('{"fingerprint": "')
            os.kill(os.getpid(), signal.SIGKILL)


STORE, RECORDS = sys.argv[1], int(sys.argv[2])
sys.argv = [str(Path(evaluate.__file__)), *sys.argv[3:]]
# Its place, where every suite opens its store.
results.ResultStore = DyingStore  # type: ignore[misc]
evaluate.main()
