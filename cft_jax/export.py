"""Writes the newest checkpoint of a run in Hugging Face format.

    python -m cft_jax.export --workdir=runs/llama --output=exported --format=merged

`merged` writes full weights (model*.safetensors, config.json, tokenizer files), `adapter` a PEFT adapter
(adapter_model.safetensors, adapter_config.json). OUTPUT must be absent or empty; both may be gs:// addresses.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from cft_jax.base import base_of_run, load_model
from cft_jax.checkpoints import save_pretrained
from cft_jax.checkpoints.directories import check_free
from cft_jax.checkpoints.fingerprint import fingerprint
from cft_jax.checkpoints.orbax_io import Checkpoints
from cft_jax.common import cli
from cft_jax.common.errors import UserError
from cft_jax.common.mirror import checkpoint_directory, local_workdir
from cft_jax.common.workdir import git_revision, read_config
from cft_jax.config import Config, from_config_dict
from cft_jax.distributions import configured_tasks
from cft_jax.distributions.splits import TRAIN
from cft_jax.evaluate.model_card import model_card
from cft_jax.evaluate.report import STAGES
from cft_jax.evaluate.structured import SUITE, read_results
from cft_jax.models.transformer import Transformer
from cft_jax.sharding import distributed
from cft_jax.sharding.mesh import make_mesh
from cft_jax.train.optimizer import adamw
from cft_jax.train.state import abstract_state, split_model

FORMATS = ("merged", "adapter")


def load_trained(workdir: Path, config: Config) -> tuple[Transformer, int]:
    """The model of a run with the weights of its newest whole checkpoint, and that checkpoint's step.

    Raises:
      UserError: the run has no checkpoint, or its base model is gone or another one.
    """
    directory = checkpoint_directory(workdir)
    if not directory.is_dir():
        raise UserError(f"{workdir} has no checkpoints yet; train first with cft_jax.main")
    base = base_of_run(config, workdir)
    model = load_model(config, base, make_mesh())
    parts, weights, frozen = split_model(model)

    def check(metadata: Mapping[str, Any]) -> None:
        if metadata["base_weights"] != fingerprint(frozen):
            raise UserError(f"{base} holds other weights than those that {workdir} was trained on; bring them back")

    optimizer = adamw(weight_decay=config.train.weight_decay, max_grad_norm=config.train.max_grad_norm)
    with Checkpoints(directory, keep=config.checkpoint.keep, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract_state(weights, optimizer), check)
    if restored is None:
        raise UserError(f"{workdir} has no complete checkpoint yet; train first with cft_jax.main")
    parts.update(model, restored.state.weights)
    return model, restored.step


def export_model(
    config: Config, model: Transformer, directory: Path, *, form: str, base: str, summaries: Mapping[str, Any]
) -> None:
    """Writes a run's model with its tokenizer and a card.

    Args:
      config: of the run.
      model: with the trained weights.
      directory: absent or empty.
      form: "merged" or "adapter".
      base: hub id or directory that the run started from.
      summaries: of the structured evaluations, by stage.

    Raises:
      UserError: see `save_pretrained`.
    """
    as_written = dataclasses.replace(config, export=dataclasses.replace(config.export, format=form))
    card = model_card(
        as_written,
        base="" if config.model.scratch.enabled else base,
        prompt=configured_tasks(config.data)[TRAIN][0].messages[-1]["content"],
        summaries=summaries,
        revision=git_revision(),
    )
    save_pretrained(model, directory, format=form, tokenizer=config.model.tokenizer or None, card=card)


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
        export_model(config, model, directory, form=form, base=config.model.checkpoint, summaries=summaries)
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
