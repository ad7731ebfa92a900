"""The open-random suite: asked for a random word, city or name, how many different ones does the model give?

For every prompt: the metrics of sampled answers, and from the model's whole next-token distribution after the prompt
the size of the smallest set of tokens that holds a given mass, computed exactly.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.distributions import spread
from cft_jax.evaluate import prompting
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.metrics import TOP_P_THRESHOLDS, open_random_counts, top_p_sizes
from cft_jax.evaluate.parsing import has_thinking_tags, normalize_answer
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.ssot import ReadAnswer
from cft_jax.evaluate.store import Record, run_resumable
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary

SUITE = "open_random"
VERSION = 1  # part of every fingerprint: raise it when the same inputs come to other records
_PROMPTS_AT_ONCE = 8
_METRICS = ("num_unique", "unique_fraction", "entropy", "empty_rate", "degraded_rate", "thinking_rate")


@dataclass(frozen=True)
class OpenPrompt:
    """A request, and a name for it that tells it from all others."""

    task_id: str
    text: str


def check(config: Config, _: Path) -> None:
    """See `Suite.check`."""
    read_prompts(config.suite.open_random.prompts)
    prompting.sampling_config(config, config.suite.open_random.num_samples)


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`. Support sizes are of the direct prompt's next token, and absent with another method."""
    config, settings = context.config, context.config.suite.open_random
    strategy = prompting.prompt_strategy(config, context.tokenizer, mode="open", max_new_tokens=settings.max_new_tokens)
    sampling = prompting.sampling_config(config, settings.num_samples)
    used = prompting.settings_of(strategy, sampling)
    fingerprint = fingerprint_of(SUITE, VERSION, context.backend.fingerprint, strategy.name, used)
    prompts = read_prompts(settings.prompts)
    with context.results.store(fingerprint) as store:
        records = run_resumable(
            store,
            spread(prompts, config.eval.max_prompts_per_split or len(prompts), lambda _: ""),
            lambda prompt: (SUITE, prompt.task_id),
            lambda chunk: _measure(context.backend, strategy, chunk, sampling),
            at_once=_PROMPTS_AT_ONCE,
            what="evaluate open_random",
            unit="prompt",
        )
    rows, samples = [], []
    for record in records:
        name = {"task_id": record["task_id"], "prompt": record["prompt"]}
        sizes = {f"support_size_{p}": size for p, size in record.get("support_sizes", {}).items()}
        rows.append(name | record["metrics"] | sizes)
        for seed, texts in record["samples"].items():
            samples.append(name | {"seed": int(seed), "samples": texts, "answers": record["answers"][seed]})
    return context.results.finish(SUITE, fingerprint, used, _summarise(records), rows=rows, samples=samples)


def read_prompts(path: str) -> list[OpenPrompt]:
    """The prompts of a JSON file, a list of texts; those of the package for an empty path.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    text = prompting.prompt_text(path, "open_random.txt", field="suite.open_random.prompts")
    try:
        found = json.loads(text) if path else _own_prompts(text)
    except ValueError as error:
        raise UserError(f"config.suite.open_random.prompts={path} is no JSON ({error})") from None
    if not isinstance(found, list) or not found or not all(isinstance(item, str) and item.strip() for item in found):
        raise UserError(f"config.suite.open_random.prompts={path} must hold a list of texts, at least one, none empty")
    # The text is part of the name: a list that has grown keeps the results of the prompts it had.
    return [
        OpenPrompt(f"{index:03d}-{hashlib.sha256(item.encode()).hexdigest()[:8]}", item)
        for index, item in enumerate(found)
    ]


def _own_prompts(text: str) -> list[str]:
    """Of four wordings, a line each, and the things to ask for, separated by commas: the wordings take turns."""
    *wordings, things = text.split("\n", 4)
    prompts = map(str.format, itertools.cycle(wordings), " ".join(things.split()).split(", "))
    return [re.sub(r"\ba (?=[aeiou])", "an ", prompt) for prompt in prompts]


def support_sizes(log_probs: Float32[np.ndarray, "V"]) -> dict[str, int]:
    """Sizes of the smallest sets of next tokens that hold each of the paper's 21 masses, by mass."""
    probs = np.exp(log_probs.astype(np.float64)).astype(np.float32).astype(np.float64)
    sizes = top_p_sizes(probs, TOP_P_THRESHOLDS)
    return {f"{p:.2f}": int(size) for p, size in zip(TOP_P_THRESHOLDS, sizes, strict=True)}


def _summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Means over prompts; `left_out` counts the prompts that a metric does not exist for."""
    summary: dict[str, Any] = {"num_prompts": len(records)}
    left_out = {}
    for name in _METRICS:
        values = [record["metrics"][name] for record in records if name in record["metrics"]]
        if values:
            summary[f"mean_{name}"] = math.fsum(values) / len(values)
        if len(values) < len(records):
            left_out[name] = len(records) - len(values)
    sized = [record["support_sizes"] for record in records if "support_sizes" in record]
    if sized:
        for name, average in (("mean_support_sizes", np.mean), ("median_support_sizes", np.median)):
            summary[name] = {p: float(average([sizes[p] for sizes in sized])) for p in sized[0]}
    return summary | ({"left_out": left_out} if left_out else {})


def _measure(
    backend: Backend,
    strategy: prompting.PromptStrategy,
    prompts: Sequence[OpenPrompt],
    sampling: prompting.SamplingConfig,
) -> list[Record]:
    tokens = [strategy.encode([{"role": "user", "content": prompt.text}]) for prompt in prompts]
    drawn = prompting.draw(backend, strategy, sampling, tokens, [f"{SUITE}/{prompt.task_id}" for prompt in prompts])
    records: list[Record] = []
    for prompt, samples in zip(prompts, drawn, strict=True):
        read = {seed: [strategy.read(text) for text in texts] for seed, texts in samples.items()}
        per_seed = [_answer_metrics(answers) for answers in read.values()]
        # A metric that one seed lacks (there is no answer) would be an average over others.
        common = [name for name in per_seed[0] if all(name in metrics for metrics in per_seed)]
        records.append(
            {
                "split": SUITE,
                "task_id": prompt.task_id,
                "prompt": prompt.text,
                "metrics": {name: math.fsum(each[name] for each in per_seed) / len(per_seed) for name in common},
                "samples": samples,
                "answers": {seed: [normalize_answer(a.text) for a in answers] for seed, answers in read.items()},
            }
        )
    if strategy.method == "direct":
        for record, log_probs in zip(records, backend.next_token_log_probs(tokens), strict=True):
            record["support_sizes"] = support_sizes(log_probs)
    return records


def _answer_metrics(answers: Sequence[ReadAnswer]) -> dict[str, float]:
    texts = [normalize_answer(answer.text) for answer in answers]
    counts = open_random_counts(texts)
    return {name: float(value) for name, value in counts.items() if isinstance(value, int | float)} | {
        "empty_rate": texts.count("") / len(texts),
        "degraded_rate": sum(answer.degraded for answer in answers) / len(texts),
        "thinking_rate": sum(has_thinking_tags(answer.text) for answer in answers) / len(texts),
    }
