"""The README.md of exported weights: what they are, how they were made, what they reached, how to load them."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from cft_jax.config import Config
from cft_jax.distributions import configured_tasks
from cft_jax.distributions.splits import TRAIN
from cft_jax.evaluate.report.tables import number, percent, split_title
from cft_jax.runs.workdir import git_revision

_FIGURES = (
    ("exact", "kl", "exact KL, nats"),
    ("exact", "total_variation", "total variation"),
    ("exact", "support_mass", "mass on the support"),
    ("exact", "wasserstein_1", "Wasserstein-1, exact"),
    ("path", "logit_kl", "path KL of the paper, nats"),
    ("sampled", "valid_rate", "valid answers"),
    ("sampled", "wasserstein_1", "Wasserstein-1, sampled"),
)
_SHARES = ("support_mass", "valid_rate")
_OBJECTIVES = {
    "path": "the mean KL from target to model along drawn values",
    "paths": "the mean KL from target to model along several drawn values of a prompt",
    "exact": "the KL from target to model at every prefix, each weighted by its probability",
}

_LIMITS = """## Limits

The model was trained to answer prompts like the one above. Draws are pseudorandom numbers of the sampler, shaped by \
the model; they suit simulation and measurement, never cryptography or lotteries. How far the skill carries to other \
wordings, parameters and families is for the figures above to say."""
_LOAD_ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```"""
_LOAD_MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```"""
_ASK = """{fence}python
prompt = {prompt!r}
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": prompt}}], add_generation_prompt=True, return_tensors="pt", return_dict=True{options}
)
output = model.generate(**inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens={tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
{fence}"""


def card_of_run(config: Config, *, form: str, base: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The card of a run's weights in one format, with a prompt of its training data as the example.

    Args:
      config: of the run.
      form: "merged" or "adapter".
      base: hub id or directory that the run started from.
      summaries: of the structured evaluations, by stage.
    """
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
    """The text of the card.

    Args:
      config: of the run.
      base: hub id or directory of the base model; empty for a model made from scratch.
      prompt: one of the run's prompts, as an example.
      summaries: of the structured evaluations by stage, `before` and `after`; a missing one is left out.
      revision: of the code.
    """
    adapter = config.export.format == "adapter"
    hub_id = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith(".") else ""
    name = hub_id or PurePath(base).name
    sections = [
        _front_matter(hub_id, adapter),
        "# Calibration Fine-Tuning" + (f" of {name}" if name else ""),
        _introduction(f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else name, adapter),
        "## Use\n\n" + (_LOAD_ADAPTER if adapter else _LOAD_MERGED).format(place="path/to/this/directory"),
        _ask(config, prompt),
        _results(summaries),
        _training(config, revision),
        _LIMITS,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(hub_id: str, adapter: bool) -> str:
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if hub_id:
        lines += [f"base_model: {hub_id}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    lines += ["tags:", "- calibration", "- random-sampling"] + (["- lora"] if adapter else []) + ["---"]
    return "\n".join(lines)


def _introduction(base: str, adapter: bool) -> str:
    return (
        f"{'This LoRA adapter' if adapter else 'This model'} makes {base or 'a small language model'} sample from the "
        "distribution it is asked for: a prompt names a distribution, and the answers, at temperature 1, follow it. It "
        "was trained with Calibration Fine-Tuning (arXiv 2605.11845), which matches the model's next-token "
        "probabilities to those that the named distribution implies."
    )


def _ask(config: Config, prompt: str) -> str:
    options = "" if config.data.chat.enable_thinking else ",\n    enable_thinking=False"
    # Longer than any in the prompt, which would end the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", prompt)), default=0))
    text = _ASK.format(fence=fence, prompt=prompt, options=options, tokens=config.eval.max_new_tokens)
    return (
        f"{text}\n\nSample at temperature 1 without top-p or top-k: any other setting changes the distribution. "
        f"Chat templates that print a date were given {config.data.chat.date} in training."
    )


def _results(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    stages = [stage for stage in ("before", "after") if stage in summaries]
    if not stages:
        return ""
    parts = [
        "## Figures",
        "Averages over families with equal weight. Exact figures are computed from the model's probabilities of every "
        "possible answer, without sampling.",
    ]
    for split in dict.fromkeys(name for stage in stages for name in summaries[stage]["splits"]):
        found = {stage: summaries[stage]["splits"].get(split, {}) for stage in stages}
        prompts = max(figures.get("num_prompts", 0) for figures in found.values())
        rows = [f"| {split_title(split)}, {prompts} prompts | {' | '.join(stages)} |", f"|---|{'---:|' * len(stages)}"]
        for section, name, heading in _FIGURES:
            values = [found[stage].get(section, {}).get(name) for stage in stages]
            if any(value is not None for value in values):
                show = percent if name in _SHARES else number
                rows.append(f"| {heading} | {' | '.join(show(value) for value in values)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _training(config: Config, revision: str) -> str:
    data, train, lora = config.data, config.train, config.model.lora
    if data.target == "soft":
        target = f"soft targets, {_OBJECTIVES[train.objective]}, tau {train.tau:g}, epsilon {train.epsilon_smoothing:g}"
    else:
        target = f"hard targets, {train.samples_per_prompt_per_epoch} drawn values per prompt and epoch"
    if data.custom:
        prompts = "prompts and distributions of the user's own"
    elif data.train_families:
        prompts = f"prompts of {len(data.train_families)} families of distributions ({', '.join(data.train_families)})"
    else:
        prompts = "prompts of the paper's families of distributions"
    space = "every string" if data.space == "full" else f"at most {data.max_bins:,} values"
    weights = "all weights"
    if lora.enabled:
        weights = (
            f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {', '.join(lora.targets)}"
        )
    steps = f"at most {train.max_steps:,} steps" if train.max_steps else f"{train.epochs} epochs"
    lines = [
        f"data: {prompts}; answers with {data.num_decimals} decimals, {space}",
        f"objective: {target}",
        f"trained: {weights}",
        f"optimizer: AdamW, learning rate {train.learning_rate:g}, weight decay {train.weight_decay:g}, cosine with "
        f"{100 * train.warmup_ratio:g} % warm-up, batch {train.batch_size}, {steps}, seed {config.seed}",
        f"made by cft_jax, revision {revision}",
    ]
    return "## Training\n\n" + "\n".join(f"- {line}" for line in lines)
