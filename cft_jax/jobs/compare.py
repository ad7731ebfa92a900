"""Putting evaluations side by side in one HTML file."""

import contextlib
import sys
from collections.abc import Sequence

from cft_jax.common.storage import check_file, opened, write_file
from cft_jax.evaluate.report.page import render_page
from cft_jax.evaluate.report.runs import read_runs


def start(output: str, places: Sequence[str]) -> None:
    """The command; `places` are directories or addresses of evaluations or of runs, the one to compare with first.

    Raises:
      UserError: one of them holds no evaluation, or `output` cannot be written.
    """
    check_file(output, "comparison.html")
    with contextlib.ExitStack() as mirrors:
        runs = [mirrors.enter_context(opened(place, write=False, flag="RUN")).path for place in places]
        page = render_page(read_runs(runs))
    write_file(output, page)
    sys.stdout.write(f"{output}\n")
