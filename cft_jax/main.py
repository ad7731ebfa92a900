"""Calibration fine-tuning, end to end: data, training, evaluation before and after, export, report.

    python -m cft_jax.main --config=configs/demo.py
    python -m cft_jax.main --config=configs/llama.py:3b --workdir=runs/llama-3b [--config.train.max_steps=100 ...]

The same command on the same workdir resumes an interrupted run; a finished one says so and does nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from cft_jax.common import cli
from cft_jax.config import Config, config_name, config_of


def run(config: Config, workdir: Path) -> Mapping[str, Any]:
    """The whole job in one process; see `cft_jax.jobs.calibrate.run`."""
    from cft_jax.common.storage import Workdir
    from cft_jax.jobs import calibrate

    return calibrate.run(config, Workdir(workdir))


def _main(values: flags.FlagValues) -> None:
    config = config_of(values)
    from cft_jax.jobs import calibrate

    calibrate.start(config, values["workdir"].value or f"runs/{config_name(values)}")


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=True)
    directory = "Directory of the run; runs/<name of the config> by default."
    flags.DEFINE_string("workdir", None, directory, flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
