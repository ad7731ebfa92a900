"""The multiple-choice suite: the model writes questions with options A to D; does it put the answer at random?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.metrics import answer_frequencies, mcq_summary
from cft_jax.evaluate.parsing import parse_mcq
from cft_jax.evaluate.prompting import (
    PromptStrategy,
    SamplingConfig,
    draw,
    prompt_strategy,
    prompt_text,
    sampling_config,
    settings_of,
)
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.store import Record, run_resumable
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary

SUITE = "mcq"
VERSION = 1  # part of every fingerprint: raise it when the same inputs come to other records
# Questions drawn at once; a killed run repeats at most these.
_QUESTIONS_AT_ONCE = 250


def check(config: Config, _: Path) -> None:
    """See `Suite.check`."""
    read_prompt(config.suite.mcq.prompt)
    sampling_config(config, config.suite.mcq.num_samples)


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`; where no question can be read, what questions would tell is absent."""
    config, settings = context.config, context.config.suite.mcq
    strategy = prompt_strategy(config, context.tokenizer, mode="open", max_new_tokens=settings.max_new_tokens)
    sampling, prompt = sampling_config(config, settings.num_samples), read_prompt(settings.prompt)
    used = settings_of(strategy, sampling)
    fingerprint = fingerprint_of(SUITE, VERSION, context.backend.fingerprint, strategy.name, used, prompt)
    tokens = strategy.encode([{"role": "user", "content": prompt}])
    with context.results.store(fingerprint) as store:
        records = run_resumable(
            store,
            [(seed, first) for seed in sampling.seeds for first in range(0, sampling.num_samples, _QUESTIONS_AT_ONCE)],
            lambda part: (SUITE, _part_name(*part)),
            lambda parts: [_part(context.backend, strategy, tokens, sampling, *part) for part in parts],
            at_once=1,
            what="evaluate mcq",
            unit="part",
        )
    questions = [
        {"seed": record["seed"], "index": record["first"] + index, "text": text, "answer": strategy.read(text).text}
        for record in records
        for index, text in enumerate(record["samples"])
    ]
    parsed = [parse_mcq(question["answer"]) for question in questions]
    metrics = mcq_summary(parsed)
    errors = Counter(name for question in parsed for name in question.format_errors)
    rows = [
        {"seed": question["seed"], "index": question["index"]}
        | {n: " ".join(v) if isinstance(v, tuple) else v for n, v in asdict(mcq).items()}
        for question, mcq in zip(questions, parsed, strict=True)
    ]
    samples = [{name: record[name] for name in ("seed", "first", "samples")} for record in records]
    metrics |= {"answers": answer_frequencies(metrics), "format_errors": dict(errors)}
    used |= {"prompt": prompt}
    return context.results.finish(SUITE, fingerprint, used, metrics, rows=rows, samples=samples)


def read_prompt(path: str) -> str:
    """The prompt in a text file; the package's own for an empty path.

    Raises:
      UserError: there is no such file, or nothing in it.
    """
    text = prompt_text(path, "mcq.txt", field="suite.mcq.prompt").strip()
    if not text:
        raise UserError(f"config.suite.mcq.prompt={path} is empty")
    return text


def _part_name(seed: int, first: int) -> str:
    return f"seed {seed}, from {first}"


def _part(
    backend: Backend, strategy: PromptStrategy, tokens: Sequence[int], sampling: SamplingConfig, seed: int, first: int
) -> Record:
    part = replace(sampling, seeds=(seed,), num_samples=min(_QUESTIONS_AT_ONCE, sampling.num_samples - first))
    name = _part_name(seed, first)
    (drawn,) = draw(backend, strategy, part, [tokens], [f"{SUITE}/{name}"])
    return {"split": SUITE, "task_id": name, "seed": seed, "first": first, "samples": drawn[str(seed)]}
