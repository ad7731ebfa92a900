"""Puts evaluations side by side, as tables and plots in one HTML file; differences are to the first.

    python -m cft_jax.compare --output=comparison.html eval/base eval/soft eval/hard

A RUN is the --workdir of cft_jax.evaluate, or of cft_jax.main, which holds an evaluation before and one after training.
All of them may be gs:// addresses.
"""

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError


def _main(values: flags.FlagValues) -> None:
    output, places = values["output"].value, values["args"].value
    if not output or not places:
        raise UserError("--output=FILE.html and at least one RUN are needed; see --help")
    from cft_jax.jobs import compare

    compare.start(output, places)


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("output", None, "The HTML file to write.", flag_values=values)
    runs = "RUN [RUN ...]: directories of evaluations or of runs, the one to compare with first."
    flags.DEFINE_list("args", [], runs, flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
