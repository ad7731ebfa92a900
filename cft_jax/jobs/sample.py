"""Asking a model: draws, a table of them beside the exact probabilities, files of thousands of prompts, a chat."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from cft_jax.ask import Model, load
from cft_jax.ask.histogram import chi_square_pvalue, table
from cft_jax.ask.model import messages_of, new_seed
from cft_jax.ask.questions import Catalogue, Exact, Question, exact_answers, listed_question
from cft_jax.ask.tasks import Prompt
from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically
from cft_jax.common.progress import Progress
from cft_jax.distributions import OutputSpace, Task
from cft_jax.distributions.rows import Row, prompt_messages, read_rows

FORMATS = (".jsonl", ".csv")
# Draws asked for at a time, between two steps of the progress bar.
_DRAWS_AT_ONCE = 50_000
# Prompts whose table is printed.
_TABLES = 4
_TITLE = 100


@dataclass(frozen=True)
class Asked:
    """What the command was asked for; see its flags."""

    model: str
    prompts: Sequence[Prompt]
    values: Sequence[str]
    probabilities: Sequence[str]
    num: int
    output: str
    seed: int | None
    sampling: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Answer:
    """A prompt, its draws and, where its answers are known, what the model says about them."""

    prompt: Prompt
    samples: Sequence[str]
    exact: Exact | None
    seed: int


def start(asked: Asked) -> None:
    """The command: draws, prints, and writes the output whole or not at all.

    Raises:
      UserError: a mistake of the user's, before anything is drawn or written.
    """
    if asked.num < 1:
        raise UserError(f"--num={asked.num} must be at least 1")
    target = _check_output(asked.output)
    model = load(asked.model, **asked.settings)
    questions = _questions(model, asked)
    longest = asked.sampling.get("max_new_tokens") or model.config.eval.max_new_tokens
    for question in questions:
        model.encode(question.prompt, longest)
    seed = new_seed() if asked.seed is None else asked.seed
    answers = list(_answers(model, questions, asked, longest, seed))
    if target is not None:
        write_atomically(target, _csv(answers) if target.suffix == ".csv" else _jsonl(answers))
    else:
        for answer in answers:
            sys.stdout.write("".join(f"{sample}\n" for sample in answer.samples))
    if logging.level_info():
        sys.stdout.write("\n".join(["", *_report(answers, seed, asked.output), ""]))


def chat(what: str, settings: Mapping[str, Any], sampling: Mapping[str, Any]) -> None:
    """An interactive session: a line is the user's message, its answer one draw; ends with the input.

    Raises:
      UserError: the model cannot be loaded, or the conversation outgrows its context.
    """
    model = load(what, **settings)
    sys.stdout.write(f"{model.measured.name}: a line is a message, /new begins anew, Ctrl-D ends\n")
    messages: list[dict[str, str]] = []
    while True:
        sys.stdout.write("> ")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            sys.stdout.write("\n")
            return
        if line.strip() == "/new":
            messages = []
        elif line.strip():
            messages.append({"role": "user", "content": line.rstrip("\n")})
            answer = model.sample(messages, **sampling)[0]
            messages.append({"role": "assistant", "content": answer})
            sys.stdout.write(f"{answer}\n")


def read_prompts(file: str) -> list[Prompt]:
    """Prompts from a file: of a .jsonl the rows' `prompt` or `messages`, elsewhere every line that is not empty.

    Raises:
      UserError: the file cannot be read, holds no prompts, or a row is wrong.
    """
    if file.endswith(".jsonl"):
        return read_rows(file, "--prompts", _prompt)
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts={file} cannot be read ({error}); name a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={file} holds no prompts; write one on each line")
    return [*prompts]


def _prompt(row: Row, _: int) -> Prompt:
    if "prompt" not in row and "messages" not in row:
        raise UserError("must have prompt or messages")
    messages = prompt_messages(row)
    return messages[0]["content"] if "prompt" in row else messages


def _check_output(output: str) -> Path | None:
    """The file to write, which must not be there."""
    if not output:
        return None
    target = Path(output).expanduser()
    if target.suffix not in FORMATS:
        raise UserError(f"--output={output} must end in {' or '.join(FORMATS)}")
    if target.exists():
        raise UserError(f"--output={output} exists; remove it or name another file")
    return target


def _questions(model: Model, asked: Asked) -> list[Question]:
    if asked.probabilities and len(asked.probabilities) != len(asked.values):
        raise UserError(f"--probabilities has {len(asked.probabilities)} numbers for {len(asked.values)} --values")
    if not asked.values:
        catalogue = Catalogue(model)
        return [catalogue.question(prompt) for prompt in asked.prompts]
    if not asked.probabilities:
        return [listed_question(prompt, asked.values) for prompt in asked.prompts]
    try:
        shares = np.array([float(share) for share in asked.probabilities])
    except ValueError:
        raise UserError(f"--probabilities={','.join(asked.probabilities)} must be numbers") from None
    space = OutputSpace(tuple(asked.values), shares)
    return [
        Question(prompt, Task("", "custom", "asked", tuple(messages_of(prompt)), space=space))
        for prompt in asked.prompts
    ]


def _answers(model: Model, questions: Sequence[Question], asked: Asked, longest: int, seed: int) -> Iterator[Answer]:
    """Draws for a few prompts at a time; the first of them find the mistakes in the values."""
    at_once = max(_DRAWS_AT_ONCE // asked.num, 1)
    with Progress("sample", total=len(questions), unit="prompt") as progress:
        for start in range(0, len(questions), at_once):
            some = questions[start : start + at_once]
            exact = exact_answers(model, some)
            # No listed answer may be cut short.
            room = max([longest, *(known.longest for known in exact if known is not None)])
            seeds = [(seed + start + index) % 2**31 for index in range(len(some))]
            options = {**asked.sampling, "max_new_tokens": room, "seed": seeds}
            drawn = model.sample_each([question.prompt for question in some], asked.num, **options)
            for question, samples, known, own in zip(some, drawn, exact, seeds, strict=True):
                yield Answer(question.prompt, samples, known, own)
            progress.advance(len(some))


def _jsonl(answers: Sequence[Answer]) -> str:
    lines = []
    for answer in answers:
        row: dict[str, Any] = {"prompt" if isinstance(answer.prompt, str) else "messages": answer.prompt}
        row |= {"seed": answer.seed, "samples": list(answer.samples)}
        if (exact := answer.exact) is not None:
            row |= {"values": exact.values, "model": exact.model.tolist()}
            row |= {} if exact.target is None else {"target": exact.target.tolist(), "metrics": dict(exact.metrics)}
            row["chi_square_pvalue"] = chi_square_pvalue(answer.samples, exact)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def _csv(answers: Sequence[Answer]) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["prompt", "sample", "answer"])
    for answer in answers:
        text = _text(answer.prompt)
        rows.writerows([text, number, sample] for number, sample in enumerate(answer.samples, start=1))
    return out.getvalue()


def _text(prompt: Prompt) -> str:
    return messages_of(prompt)[-1]["content"]


def _report(answers: Sequence[Answer], seed: int, output: str) -> list[str]:
    """Tables of the first prompts, a line on all, and where the rest is."""
    lines = []
    for answer in answers[:_TABLES]:
        title = " ".join(_text(answer.prompt).split())
        title = title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…"
        lines += [f"{len(answer.samples):,} answers to {title!r}", *table(answer.samples, answer.exact)]
        if answer.exact is not None:
            lines.append(_distances(answer, answer.exact))
        lines.append("")
    if len(answers) > _TABLES:
        known = [a.exact.metrics["total_variation"] for a in answers if a.exact is not None and a.exact.metrics]
        mean = f", mean total variation from the target {sum(known) / len(known):.4f}" if known else ""
        lines.append(f"{len(answers):,} prompts, of which {_TABLES} are shown{mean}")
    where = f"; all answers are in {output}" if output else ""
    return [*lines, f"drawn with --seed={seed}{where}"]


def _distances(answer: Answer, exact: Exact) -> str:
    parts = []
    if exact.metrics:
        names = {"total_variation": "total variation {:.4f}", "kl": "KL {:.4f} nats", "support_mass": "on them {:.4f}"}
        shown = [text.format(exact.metrics[name]) for name, text in names.items() if name in exact.metrics]
        parts.append(f"model from target: {', '.join(shown)}")
    if (pvalue := chi_square_pvalue(answer.samples, exact)) is not None:
        parts.append(f"draws from model: chi-square p = {pvalue:.3g}")
    return "; ".join(parts)
