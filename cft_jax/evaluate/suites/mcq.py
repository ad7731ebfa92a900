"""The multiple-choice suite: the model writes questions with options A to D; does it put the answer at random?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
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
    sampling_config,
    settings_of,
)
from cft_jax.evaluate.results import Results, fingerprint_of
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
    """See `Suite.run`."""
    config, settings = context.config, context.config.suite.mcq
    strategy = prompt_strategy(config, context.tokenizer, mode="open", max_new_tokens=settings.max_new_tokens)
    sampling = sampling_config(config, settings.num_samples)
    return run_mcq(context.backend, strategy, read_prompt(settings.prompt), sampling, context.results)


def read_prompt(path: str) -> str:
    """The prompt in a text file; the package's own for an empty path.

    Raises:
      UserError: there is no such file, or nothing in it.
    """
    if not path:
        return (
            resources.files("cft_jax.evaluate.suites").joinpath("prompts/mcq.txt").read_text(encoding="utf-8").strip()
        )
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config.suite.mcq.prompt={path} cannot be read ({error}); name a text file with the prompt, "
            "or leave it empty for the package's own"
        ) from None
    if not text:
        raise UserError(f"config.suite.mcq.prompt={path} is empty")
    return text


def run_mcq(
    backend: Backend, strategy: PromptStrategy, prompt: str, sampling: SamplingConfig, results: Results
) -> Summary:
    """Has the questions written and returns the summary; a killed run resumes where it stopped.

    Where no question can be read, what questions would tell is absent.

    Args:
      backend: the model.
      strategy: how it is asked.
      prompt: what it is asked.
      sampling: how many questions for each seed, and how.
      results: where the files go.
    """
    settings = settings_of(strategy, sampling)
    fingerprint = fingerprint_of(SUITE, VERSION, backend.fingerprint, strategy.name, settings, prompt)
    tokens = strategy.encode([{"role": "user", "content": prompt}])
    with results.store(fingerprint) as store:
        records = run_resumable(
            store,
            [(seed, first) for seed in sampling.seeds for first in range(0, sampling.num_samples, _QUESTIONS_AT_ONCE)],
            lambda part: (SUITE, _part_name(*part)),
            lambda parts: [_part(backend, strategy, tokens, sampling, *part) for part in parts],
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
    figures = mcq_summary(parsed)
    errors = Counter(name for question in parsed for name in question.format_errors)
    rows = [
        {"seed": question["seed"], "index": question["index"]}
        | {n: " ".join(v) if isinstance(v, tuple) else v for n, v in asdict(mcq).items()}
        for question, mcq in zip(questions, parsed, strict=True)
    ]
    samples = [{name: record[name] for name in ("seed", "first", "samples")} for record in records]
    figures |= {"answers": answer_frequencies(figures), "format_errors": dict(errors)}
    return results.finish(SUITE, fingerprint, settings, figures, rows=rows, samples=samples)


def _part_name(seed: int, first: int) -> str:
    return f"seed {seed}, from {first}"


def _part(
    backend: Backend, strategy: PromptStrategy, tokens: Sequence[int], sampling: SamplingConfig, seed: int, first: int
) -> Record:
    part = replace(sampling, seeds=(seed,), num_samples=min(_QUESTIONS_AT_ONCE, sampling.num_samples - first))
    name = _part_name(seed, first)
    (drawn,) = draw(backend, strategy, part, [tokens], [f"{SUITE}/{name}"])
    return {"split": SUITE, "task_id": name, "seed": seed, "first": first, "samples": drawn[str(seed)]}
