"""Writes the newest checkpoint of a run in Hugging Face format.

    python -m cft_jax.export --workdir=runs/llama --output=exported --format=merged

`merged` writes full weights (model*.safetensors, config.json, tokenizer files), `adapter` a PEFT adapter
(adapter_model.safetensors, adapter_config.json). OUTPUT must be absent or empty; both may be gs:// addresses.
"""

import sys

import jax
from absl import flags

from cft_jax.checkpoints import save_pretrained
from cft_jax.checkpoints.directories import check_free
from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.common.mirror import local_workdir
from cft_jax.config import from_config_dict, read_config
from cft_jax.evaluate.report.model_card import card_of_run
from cft_jax.evaluate.report.page import STAGES
from cft_jax.evaluate.suites.structured.suite import SUITE, read_results
from cft_jax.runs.trained import load_trained
from cft_jax.sharding import distributed

FORMATS = ("merged", "adapter")


def _main(values: flags.FlagValues) -> None:
    workdir, output, form = (str(values[name].value or "") for name in ("workdir", "output", "format"))
    if not workdir or not output:
        raise UserError("--workdir and --output are needed: the run's directory, and a new one for its weights")
    distributed.start()
    writes = jax.process_index() == 0
    with local_workdir(output, write=writes, flag="--output") as directory, local_workdir(workdir, write=False) as run:
        # Before minutes of loading.
        check_free(directory)
        config = from_config_dict(read_config(run))
        model, step = load_trained(run, config)
        found = {stage: read_results(run / "eval" / SUITE / stage) for stage in STAGES}
        summaries = {stage: result[0] for stage, result in found.items() if result is not None}
        card = card_of_run(config, form=form, base=config.model.checkpoint, summaries=summaries)
        save_pretrained(model, directory, format=form, tokenizer=config.model.tokenizer or None, card=card)
    if writes:
        sys.stdout.write(f"step {step} of {workdir}, {form}: {output} (README.md there says how to load it)\n")


def main() -> None:
    """The command line."""
    values = cli.new_flags(config=False)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    flags.DEFINE_string("output", None, "Directory to write; absent or empty.", flag_values=values)
    flags.DEFINE_enum("format", "merged", FORMATS, "What to write.", flag_values=values)
    cli.run(_main, values, __doc__ or "")


if __name__ == "__main__":
    main()
