"""Measures a model: a hub id, a directory in Hugging Face format (with or without an adapter), or a run's directory.

    python -m cft_jax.evaluate --config=configs/eval/structured.py --workdir=eval/base --config.model.checkpoint=WHAT
    python -m cft_jax.evaluate --config=configs/eval/structured.py:runs/llama --workdir=eval/llama

One suite leaves its files in --workdir itself, several (configs/eval/all.py) in a directory each and a table of all;
one that lacks something, a data set say, is named there and does not keep the others from running.

The second form takes the data settings of a run of cft_jax.main and measures its newest checkpoint. The same command
on the same --workdir resumes where a killed evaluation stopped. `--config.backend=hf` runs the model by transformers;
of a run it then measures the weights in `export/`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from cft_jax.common import cli
from cft_jax.config import Config, config_name, config_of


def run(config: Config, workdir: Path) -> Mapping[str, Any]:
    """One evaluation in one process; see `cft_jax.jobs.evaluate.run`."""
    from cft_jax.common.storage import Workdir
    from cft_jax.jobs import evaluate

    return evaluate.run(config, Workdir(workdir))


def _main(values: flags.FlagValues) -> None:
    config = config_of(values, example="configs/eval/structured.py with --config.model.checkpoint=WHAT")
    from cft_jax.jobs import evaluate

    evaluate.start(config, values["workdir"].value or f"runs/eval-{config_name(values)}")


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=True)
    flags.DEFINE_string("workdir", None, "Directory of the results.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
