"""Putting evaluations side by side in one HTML file."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically
from cft_jax.common.storage import is_remote, opened, reaching
from cft_jax.evaluate.report.page import render_page
from cft_jax.evaluate.report.runs import read_runs


def start(output: str, places: Sequence[str]) -> None:
    """The command; `places` are directories or addresses of evaluations or of runs, the one to compare with first.

    Raises:
      UserError: one of them holds no evaluation, or `output` cannot be written.
    """
    file = epath.Path(output)
    if not is_remote(output) and file.is_dir():
        raise UserError(f"--output={output} is a directory; name a file in it, as in {output}/comparison.html")
    with contextlib.ExitStack() as mirrors:
        runs = [mirrors.enter_context(opened(place, write=False, flag="RUN")).path for place in places]
        page = render_page(read_runs(runs))
    if is_remote(output):
        with reaching(output, "--output"):
            file.write_text(page)
    else:
        try:
            write_atomically(Path(output), page)
        except OSError as error:
            raise UserError(f"cannot write --output={output}: {error.strerror or error}; name another file") from error
    sys.stdout.write(f"{output}\n")
