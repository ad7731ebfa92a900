"""Measures calibration against what is kept, along the strength of a run's adapters, and draws the frontier.

    python -m cft_jax.frontier --workdir=runs/llama --strengths=0,0.25,0.5,0.75,1,1.25 --output=frontier

Nothing is trained: the newest checkpoint's adapters are scaled, 0 for the base alone. OUTPUT gets `frontier.json`,
`frontier.png`, and a directory with both evaluations (`structured`, exact metrics alone, and `questions`) for each
strength; the same command resumes. `cft_jax.export` writes the strength that you choose into an adapter or merges it.
"""

from absl import flags

from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.config import LoraConfig, broken_rules

_STRENGTHS = "0,0.25,0.5,0.75,1,1.25"


def _main(values: flags.FlagValues) -> None:
    workdir, output, text = (str(values[name].value or "") for name in ("workdir", "output", "strengths"))
    if not workdir or not output:
        raise UserError("--workdir and --output are needed: the run's directory, and one for the results")
    strengths = _read(text)
    from cft_jax.jobs import frontier

    frontier.start(workdir, strengths, output)


def _read(text: str) -> list[float]:
    try:
        strengths = sorted({float(item) for item in text.split(",")})
    except ValueError:
        raise UserError(f"--strengths={text} must be numbers with commas between, as in {_STRENGTHS}") from None
    for strength in strengths:
        for problem in broken_rules(LoraConfig(strength=strength), "config.model.lora"):
            raise UserError(f"--strengths={text}: {problem}")
    return strengths


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("workdir", None, "Directory of the run, which has adapters.", flag_values=values)
    flags.DEFINE_string("strengths", _STRENGTHS, "Numbers from 0 to 1.5 with commas between.", flag_values=values)
    flags.DEFINE_string("output", None, "Directory of the results.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
