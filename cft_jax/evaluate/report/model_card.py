"""The README.md of exported weights: what they are, how they were made, what they reached, how to load them."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from cft_jax.config import Config, KeepConfig
from cft_jax.distributions import configured_tasks
from cft_jax.distributions.splits import TRAIN
from cft_jax.evaluate.report.page import TEMPLATES
from cft_jax.evaluate.report.runs import STAGES, value_at
from cft_jax.evaluate.report.tables import METRICS, shown, split_title
from cft_jax.runs.workdir import git_revision

_OBJECTIVES = {
    "path": "the mean KL from target to model along drawn values",
    "paths": "the mean KL from target to model along several drawn values of a prompt",
    "exact": "the KL from target to model at every prefix, each weighted by its probability",
}


def card_of_run(config: Config, *, form: str, base: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The card of a run's weights in a format, "merged" or "adapter", with a prompt of its data as the example."""
    return model_card(
        dataclasses.replace(config, export=dataclasses.replace(config.export, format=form)),
        base="" if config.model.scratch.enabled else base,
        prompt=configured_tasks(config.data)[TRAIN][0].messages[-1]["content"],
        summaries=summaries,
        revision=git_revision(),
    )


def model_card(
    config: Config, *, base: str, prompt: str, summaries: Mapping[str, Mapping[str, Any]], revision: str
) -> str:
    """The text of the card, with `prompt` as the example.

    `base` is the hub id or directory of the base model, empty for a model made from scratch; `summaries` are those of
    the structured evaluations by stage, `before` and `after`: a missing one is left out.
    """
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith(".")
    # As where checkpoints are looked for, a directory comes first.
    hub_id = base if is_id and not Path(base).is_dir() else ""
    return TEMPLATES.get_template("model_card.txt").render(
        config=config,
        adapter=config.export.format == "adapter",
        hub_id=hub_id,
        name=hub_id or PurePath(base).name,
        # Longer than any in the prompt, which would end the block.
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", prompt)), default=0)),
        prompt=repr(prompt),
        results=_results(summaries),
        training=_training(config, revision),
    )


def _results(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """A table for every split, by its title: rows of texts, first the head."""
    stages = [stage for stage in STAGES if stage in summaries]
    tables = {}
    for split in dict.fromkeys(name for stage in stages for name in summaries[stage]["splits"]):
        rows = [["", *stages]]
        for metric in METRICS:
            values = [value_at(summaries[stage], ("splits", split, *metric.path)) for stage in stages]
            if any(value is not None for value in values):
                rows.append([metric.title, *(shown(value, metric) for value in values)])
        tables[split_title(split)] = rows
    return tables


def _strength(strength: float) -> list[str]:
    return [f"strength: what training added is multiplied by {strength:g} here"] if strength != 1 else []


def _kept(keep: KeepConfig) -> list[str]:
    if keep.weight == 0:
        return []
    if keep.kind == "off_support":
        return [f"kept: the KL from the base among the tokens that no answer has, weight {keep.weight:g}"]
    loss = "the KL from the base on" if keep.kind == "kl" else "the cross-entropy of"
    texts = "the base's own answers to other prompts" if keep.source == "self" else "texts of the user's own"
    return [f"kept: {loss} {texts}, weight {keep.weight:g}, {keep.rows} rows a step"]


def _training(config: Config, revision: str) -> list[str]:
    data, train, lora = config.data, config.train, config.model.lora
    if data.target == "soft":
        target = f"soft targets, {_OBJECTIVES[train.objective]}, tau {train.tau:g}, epsilon {train.epsilon_smoothing:g}"
    else:
        target = f"hard targets, {train.samples_per_prompt_per_epoch} drawn values per prompt and epoch"
    if data.world != "none":
        prompts = f"prompts of the package's small world ({data.world})"
    elif data.custom:
        prompts = "prompts and distributions of the user's own"
    elif data.train_families:
        prompts = f"prompts of {len(data.train_families)} families of distributions ({', '.join(data.train_families)})"
    else:
        prompts = "prompts of the paper's families of distributions"
    space = "every string" if data.space == "full" else f"at most {data.max_bins:,} values"
    adapter = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {', '.join(lora.targets)}"
    steps = f"at most {train.max_steps:,} steps" if train.max_steps else f"{train.epochs} epochs"
    return [
        f"data: {prompts}; answers with {data.num_decimals} decimals, {space}",
        f"objective: {target}",
        f"trained: {adapter if lora.enabled else 'all weights'}",
        *_strength(lora.strength),
        *_kept(train.keep),
        f"optimizer: AdamW, learning rate {train.learning_rate:g}, weight decay {train.weight_decay:g}, cosine with "
        f"{100 * train.warmup_ratio:g} % warm-up, batch {train.batch_size}, {steps}, seed {config.seed}",
        f"made by cft_jax, revision {revision}",
    ]
