"""What a server is held against: prompts of a run, and what its model says about every step of their answers."""

import dataclasses
import datetime
import functools
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from cft_jax.ask.model import settings_of
from cft_jax.common.errors import UserError
from cft_jax.common.storage import CHECKPOINTS, opened, reaching
from cft_jax.config import Config, from_config_dict, read_config
from cft_jax.distributions import Task, configured_tasks, spread
from cft_jax.evaluate.backends.load import load_measured_model
from cft_jax.evaluate.backends.protocol import MeasuredModel
from cft_jax.evaluate.suites.structured.plan import plan_of
from cft_jax.evaluate.suites.structured.settings import prompt_codec, structured_settings
from cft_jax.generate import TrieScore
from cft_jax.runs.base import base_of_run
from cft_jax.serving.client import Reply
from cft_jax.serving.draws import AnswerPath, Layout, Reports, StepProbs, path_of
from cft_jax.serving.prompts import wrong_prompts
from cft_jax.text import ChatOptions
from cft_jax.text.tokenizer import backend, encode_strings
from cft_jax.text.trie import Trie

# Prompts that are scored for every one that is asked, and the least probability that the model answers one with any of
# its values: of the best, and of the others beside it.
_CANDIDATES, _LEAST_MASS, _OF_BEST = 3, 0.5, 0.9
# Tokens of an answer beyond the longest value's: the terminator, and what shows that it is missing.
_MORE_TOKENS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class AskedPrompt:
    """A prompt to ask: its task, its tokens, the trie of its values and what the model says about them."""

    task: Task
    tokens: Sequence[int]
    trie: Trie
    score: TrieScore


class Reference:
    """Prompts of a run, and what its model says about their answers.

    Args:
      run: directory or address of a run, whose newest checkpoint is taken; or other weights, with prompts by default.
      num_prompts: at most so many, of all splits and families, that the model answers with their values.

    Attributes:
      prompts: to ask.
      layout: of their tries.
      model: what the model says when it is asked as it was trained.
      variants: what it says under mistakes in the prompt, by their names.
      max_tokens: of an answer; no value has so many.

    Raises:
      UserError: there is no such model, or it answers no prompt with its values.
    """

    def __init__(self, run: str, num_prompts: int) -> None:
        self._run, self._config = run, settings_of(run, {})
        self._measured: MeasuredModel | None = load_measured_model(self._config)
        self._tokenizer = self._measured.tokenizer
        self.prompts = _chosen(self._config, self._measured, num_prompts)
        self.layout = Layout([prompt.trie for prompt in self.prompts])
        self.model = StepProbs.of(self.layout, [prompt.score for prompt in self.prompts])
        wrong = wrong_prompts(
            self._tokenizer,
            ChatOptions.from_config(self._config.data),
            [prompt.task.messages for prompt in self.prompts],
            today=datetime.date.today(),
        )
        self.variants = {name: self._says(self._measured, tokens) for name, tokens in wrong.items()}
        longest = max(trie.max_depth for trie in self.layout.tries)
        self.max_tokens = max(longest + _MORE_TOKENS, self._config.eval.max_new_tokens)

    @functools.cached_property
    def base(self) -> StepProbs | None:
        """What the model says that training began with; None where what is checked is no run, or its base is gone."""
        with reaching(self._run, "--run"):
            if not (epath.Path(self._run).expanduser() / CHECKPOINTS).is_dir():
                return None
        self._measured = None  # two models may be more than the memory holds
        with opened(self._run, write=False, flag="--run") as workdir:
            try:
                base = base_of_run(from_config_dict(read_config(workdir.path)), workdir)
                settings = dataclasses.replace(self._config.model, checkpoint=base, adapter="")
                measured = load_measured_model(dataclasses.replace(self._config, model=settings))
            except UserError as error:
                logging.warning("whether the base model answers is left open: %s", error)
                return None
        return self._says(measured, [prompt.tokens for prompt in self.prompts])

    def paths(self, replies: Sequence[Sequence[Reply]]) -> list[list[list[AnswerPath]]]:
        """The path of every answer, by prompt and reply."""
        texts = list({answer.text for own in replies for reply in own for answer in reply.answers})
        tokens = dict(zip(texts, encode_strings(self._tokenizer, texts), strict=True))
        return [
            [[path_of(trie, tokens[answer.text], ended=not answer.is_cut) for answer in reply.answers] for reply in own]
            for trie, own in zip(self.layout.tries, replies, strict=True)
        ]

    def reported(
        self, replies: Sequence[Sequence[Reply]], paths: Sequence[Sequence[Sequence[AnswerPath]]]
    ) -> Float[np.ndarray, "C"] | None:
        """The log-probabilities by the server, NaN where it says nothing; None where it gives none at all."""
        rust = backend(self._tokenizer)
        reports = Reports(self.layout, lambda token: rust.decode([token], skip_special_tokens=False))
        for index, own in enumerate(replies):
            for reply, found in zip(own, paths[index], strict=True):
                for answer, path in zip(reply.answers, found, strict=True):
                    said = [(token.text, {**token.alternatives, token.text: token.log_prob}) for token in answer.tokens]
                    reports.add(index, path, said)
        return None if np.isnan(reports.log_probs).all() else reports.log_probs

    def _says(self, measured: MeasuredModel, prompts: Sequence[Sequence[int]]) -> StepProbs:
        return StepProbs.of(self.layout, measured.backend.score(prompts, self.layout.tries, prefixes=None))


def _chosen(config: Config, measured: MeasuredModel, num: int) -> list[AskedPrompt]:
    tasks = [task for split in configured_tasks(config.data).values() for task in split]
    tasks = spread(tasks, _CANDIDATES * num, lambda task: task.group)
    codec, resolution = prompt_codec(measured.tokenizer, config.data), structured_settings(config).resolution
    tries = [plan_of(task, codec, resolution, config.eval.seeds[0]).trie for task in tasks]
    tokens = [codec.encode(task.messages) for task in tasks]
    scores = measured.backend.score(tokens, tries, prefixes=None)
    layout = Layout(tries)
    masses = [float(cells.sum()) for cells in StepProbs.of(layout, scores).cells(layout)]
    if max(masses) < _LEAST_MASS:
        raise UserError(
            f"the model answers its own prompts with a value in at most {100 * max(masses):.0f} % of draws, too few to "
            "compare; train it further, or name the directory of its run as --run"
        )
    found = [
        AskedPrompt(task, ids, trie, score)
        for task, ids, trie, score, mass in zip(tasks, tokens, tries, scores, masses, strict=True)
        if mass >= _OF_BEST * max(masses)
    ]
    return spread(found, num, lambda prompt: prompt.task.group)
