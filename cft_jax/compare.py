"""Puts evaluations side by side, as tables and plots in one HTML file; differences are to the first.

    python -m cft_jax.compare --output=comparison.html eval/base eval/soft eval/hard

A RUN is the --workdir of cft_jax.evaluate, or of cft_jax.main, which holds an evaluation before and one after training.
All of them may be gs:// addresses.
"""

import contextlib
import sys
from pathlib import Path

from absl import flags
from etils import epath

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically
from cft_jax.common.mirror import local_workdir
from cft_jax.common.stores import is_remote, reaching
from cft_jax.evaluate.report.comparison import read_runs, render_comparison


def _main(values: flags.FlagValues) -> None:
    output, places = values["output"].value, values["args"].value
    if not output or not places:
        raise UserError("--output=FILE.html and at least one RUN are needed; see --help")
    file = epath.Path(output)
    if not is_remote(output) and file.is_dir():
        raise UserError(f"--output={output} is a directory; name a file in it, as in {output}/comparison.html")
    with contextlib.ExitStack() as mirrors:
        runs = [mirrors.enter_context(local_workdir(place, write=False, flag="RUN")) for place in places]
        page = render_comparison(read_runs(runs))
    if is_remote(output):
        with reaching(output, "--output"):
            file.write_text(page)
    else:
        try:
            write_atomically(Path(output), page)
        except OSError as error:
            raise UserError(f"cannot write --output={output}: {error.strerror or error}; name another file") from error
    sys.stdout.write(f"{output}\n")


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("output", None, "The HTML file to write.", flag_values=values)
    flags.DEFINE_list(
        "args",
        [],
        "RUN [RUN ...]: directories of evaluations or of runs, the one to compare with first.",
        flag_values=values,
    )
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
