"""The multiple-choice suite: the model writes questions with options A to D; does it put the answer at random?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.evaluate import prompting
from cft_jax.evaluate.metrics import answer_frequencies, mcq_summary
from cft_jax.evaluate.parsing import parse_mcq
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
    prompting.sampling_config(config, config.suite.mcq.num_samples)


def run(context: SuiteContext) -> Summary:
    """See `Suite.run`; where no question can be read, what questions would tell is absent."""
    config, settings, backend = context.config, context.config.suite.mcq, context.backend
    strategy = prompting.prompt_strategy(config, context.tokenizer, mode="open", max_new_tokens=settings.max_new_tokens)
    sampling, prompt = prompting.sampling_config(config, settings.num_samples), read_prompt(settings.prompt)
    used = prompting.settings_of(strategy, sampling)
    fingerprint = fingerprint_of(SUITE, VERSION, backend.fingerprint, strategy.name, used, prompt)
    tokens = strategy.encode([{"role": "user", "content": prompt}])

    def measure(parts: Sequence[Record]) -> list[Record]:
        (part,) = parts
        count = min(_QUESTIONS_AT_ONCE, sampling.num_samples - part["first"])
        some = replace(sampling, seeds=(part["seed"],), num_samples=count)
        (drawn,) = prompting.draw(backend, strategy, some, [tokens], [f"{SUITE}/{part['task_id']}"])
        return [part | {"samples": drawn[str(part["seed"])]}]

    with context.results.store(fingerprint) as store:
        records = run_resumable(
            store,
            [
                {"split": SUITE, "task_id": f"seed {seed}, from {first}", "seed": seed, "first": first}
                for seed in sampling.seeds
                for first in range(0, sampling.num_samples, _QUESTIONS_AT_ONCE)
            ],
            lambda part: (SUITE, part["task_id"]),
            measure,
            at_once=1,
            what="evaluate mcq",
            unit="part",
        )
    questions = [
        ({"seed": record["seed"], "index": record["first"] + index}, parse_mcq(strategy.read(text).text))
        for record in records
        for index, text in enumerate(record["samples"])
    ]
    metrics = mcq_summary([mcq for _, mcq in questions])
    errors = Counter(name for _, mcq in questions for name in mcq.format_errors)
    metrics |= {"answers": answer_frequencies(metrics), "format_errors": dict(errors)}
    rows = [name | asdict(mcq) | {"format_errors": " ".join(mcq.format_errors)} for name, mcq in questions]
    samples = [{name: record[name] for name in ("seed", "first", "samples")} for record in records]
    return context.results.finish(SUITE, fingerprint, used | {"prompt": prompt}, metrics, rows=rows, samples=samples)


def read_prompt(path: str) -> str:
    """The prompt in a text file; the package's own for an empty path.

    Raises:
      UserError: there is no such file, or nothing in it.
    """
    text = prompting.prompt_text(path, "mcq.txt", field="suite.mcq.prompt").strip()
    if not text:
        raise UserError(f"config.suite.mcq.prompt={path} is empty")
    return text
