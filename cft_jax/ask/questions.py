"""What is known of the answers to a prompt, and what a model says about them: exact probabilities beside the target."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from cft_jax.ask.model import Model, messages_of
from cft_jax.ask.tasks import Prompt
from cft_jax.common.errors import UserError
from cft_jax.distributions import OutputSpace, Task, read_tasks, task_from_spec
from cft_jax.distributions.splits import spec_of_prompt
from cft_jax.evaluate.metrics.exact import as_numbers, distances
from cft_jax.evaluate.suites.structured.exact_metrics import ListedPlan
from cft_jax.evaluate.suites.structured.plan import plan_of
from cft_jax.evaluate.suites.structured.prompt_metrics import finite
from cft_jax.evaluate.suites.structured.settings import structured_settings
from cft_jax.text.values import check_strings


@dataclass(frozen=True)
class Question:
    """A prompt and what is known of its answers: a task, or None.

    Without `has_target` the task lists answers only, and its probabilities mean nothing.
    """

    prompt: Prompt
    task: Task | None = None
    has_target: bool = True


def listed_question(prompt: Prompt, values: Sequence[str]) -> Question:
    """A prompt of which the answers are known, and not how probable they should be.

    Raises:
      UserError: a value occurs twice.
    """
    space = OutputSpace(tuple(values), np.full(len(values), 1 / max(len(values), 1)))
    return Question(prompt, Task("", "custom", "asked", (), space=space), has_target=False)


class Catalogue:
    """Knows prompts: by the families' wording, or as rows that the model was trained on."""

    def __init__(self, model: Model) -> None:
        tasks: list[Task] = []
        with contextlib.suppress(UserError):  # the file may be gone since
            tasks = read_tasks(model.config.data.custom) if model.config.data.custom else []
        self._trained = {_key(task.messages): task for task in tasks}

    def question(self, prompt: Prompt) -> Question:
        """The prompt with what is known of it."""
        messages = messages_of(prompt)
        spec = spec_of_prompt(messages[-1]["content"]) if len(messages) == 1 else None
        return Question(prompt, task_from_spec(spec) if spec else self._trained.get(_key(messages)))


def _key(messages: Sequence[Mapping[str, str]]) -> str:
    return json.dumps([dict(message) for message in messages])


@dataclass(frozen=True, eq=False)
class Exact:
    """The model's probabilities of the answers to a prompt.

    Attributes:
      values: the answers; where they are too many to list, the middles of bins.
      is_listed: whether they are the answers themselves.
      model: their probabilities, with any token behind them that ends a text; not renormalised.
      target: what they should be; None where that is not known.
      metrics: the structured suite's distances between target and model; empty without a target.
      longest: tokens of the longest answer, the one that ends it included.
    """

    values: tuple[str, ...]
    is_listed: bool
    model: Float64[np.ndarray, "N"]
    target: Float64[np.ndarray, "N"] | None
    metrics: Mapping[str, float]
    longest: int


def exact_answers(model: Model, questions: Sequence[Question]) -> list[Exact | None]:
    """What the model says about the answers to each question; None where they are not known.

    Raises:
      UserError: a prompt with its longest answer does not fit the context, or a value is no answer of the model.
    """
    known = [(index, question.task) for index, question in enumerate(questions) if question.task is not None]
    for _, task in known:
        if task.space is not None:
            check_strings(model.measured.tokenizer, task.space.values, "answers")
    resolution = structured_settings(model.config).resolution
    plans = [plan_of(task, model.codec, resolution, seed=0) for _, task in known]
    longest = [plan.trie.max_depth + 1 for plan in plans]
    prompts = [model.encode(questions[index].prompt, room) for (index, _), room in zip(known, longest, strict=True)]
    scores = model.measured.backend.score(prompts, [plan.trie for plan in plans], prefixes=None)
    found: list[Exact | None] = [None] * len(questions)
    for (index, _), plan, score, length in zip(known, plans, scores, longest, strict=True):
        if isinstance(plan, ListedPlan):
            log_probs = np.logaddexp(score.string_log_probs, score.other_stop_log_probs)
            values, probabilities, target = plan.space.values, np.exp(log_probs), plan.space.probabilities
            metrics = finite(distances(target, log_probs, as_numbers(values)))
        else:
            sections = plan.sections(score, model.codec.text_of, keep_distribution=True)
            values, probabilities, target = (sections["distribution"][name] for name in ("values", "model", "target"))
            metrics = sections["exact_cells"] | sections["exact"]
        if not questions[index].has_target:
            target, metrics = None, {}
        arrays = np.array(probabilities), None if target is None else np.array(target)
        found[index] = Exact(tuple(values), isinstance(plan, ListedPlan), *arrays, metrics, length)
    return found
