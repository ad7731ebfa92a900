"""Writing the newest checkpoint of a run in Hugging Face format."""

import sys

import jax

from cft_jax.checkpoints import save_pretrained
from cft_jax.checkpoints.directories import check_free
from cft_jax.common.errors import UserError
from cft_jax.common.storage import opened
from cft_jax.config import changed, from_config_dict, read_config
from cft_jax.evaluate.report.model_card import card_of_run
from cft_jax.evaluate.report.runs import STAGES
from cft_jax.evaluate.suites.structured.suite import SUITE, read_results
from cft_jax.models.strength import set_strength
from cft_jax.runs.base import base_of_run
from cft_jax.runs.trained import load_trained
from cft_jax.sharding import distributed


def start(workdir: str, output: str, form: str, dtype: str | None, strength: float) -> None:
    """The command, from directories or addresses.

    `dtype` is of merged weights, None for the base checkpoint's; `strength` is of the adapters.

    Raises:
      UserError: `output` is taken, or the run has nothing to export.
    """
    if strength == 0 and form == "adapter":
        raise UserError("config.model.lora.strength=0.0 leaves nothing of an adapter; give --format=merged")
    distributed.start()
    writes = jax.process_index() == 0
    with opened(output, write=writes, flag="--output") as target, opened(workdir, write=False) as run:
        # Before minutes of loading.
        check_free(target.path)
        config = from_config_dict(read_config(run.path))
        model, _, step = load_trained(run, config)
        set_strength(model, strength, name=workdir)
        # What a run measured is of the adapters as they were trained.
        measured = STAGES if strength == 1 else ()
        config = changed(config, {"model": {"lora": {"strength": strength}}})
        found = {stage: read_results(run.path / "eval" / SUITE / stage) for stage in measured}
        summaries = {stage: result[0] for stage, result in found.items() if result is not None}
        card = card_of_run(config, form=form, base=base_of_run(config, run), summaries=summaries)
        tokenizer = config.model.tokenizer or None
        save_pretrained(model, target.path, format=form, dtype=dtype, tokenizer=tokenizer, card=card)
    if writes:
        sys.stdout.write(f"step {step} of {workdir}, {form}: {output} (README.md there says how to load it)\n")
