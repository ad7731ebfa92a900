"""Tasks of EleutherAI's lm-eval, through an adapter that makes any backend one of its models.

lm-eval brings the tasks, prompts and metrics. They differ from those of `suite.py`, and the two are never mixed. The
adapter needs no torch. In a run of several processes each one asks the same questions and computes its share of the
answers, so lm-eval must not spread the work itself: `world_size` stays 1.
"""

import functools
import importlib.metadata
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import logging
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config.suites import LmEvalConfig
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.results import fingerprint_of
from cft_jax.evaluate.store import Record, ResultStore, run_resumable
from cft_jax.evaluate.suites.protocol import SuiteContext, Summary
from cft_jax.evaluate.suites.retention.suite import SUITE, VERSION
from cft_jax.text import ChatOptions
from cft_jax.text.chat import render_chats
from cft_jax.text.tokenizer import fingerprint as tokenizer_fingerprint

# Requests handed to the backend at once, always the same ones together; a killed run repeats at most these.
_REQUESTS_AT_ONCE = 256
_LARGEST_SEED = 2**31
_SAMPLING = {"do_sample", "temperature", "top_p"}
_BOOTSTRAP_ITERATIONS = 1000
# The name of an answer in the store, and what is asked.
_Question = tuple[str, Any]


class BackendModel(TemplateLM):
    """A backend as lm-eval sees a model; tokens and cuts as in lm-eval's own class for transformers.

    Args:
      backend: the model.
      tokenizer: of the model.
      store: keeps every answer, so that a killed run resumes where it stopped.
      max_length: tokens of a row at most; longer contexts lose their beginning.
      options: of the chat template, where lm-eval is told to use it.
      seed: of samples, where a task draws them.
    """

    max_gen_toks = 256  # where the task does not say

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        store: ResultStore,
        *,
        max_length: int,
        options: ChatOptions,
        seed: int,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self._backend, self._store = backend, store
        self.max_length, self._options, self._seed = max_length, options, seed

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with special tokens as the tokenizer has it unless the text brings its own BOS."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; the date of templates that print one is the configured one."""
        if add_generation_prompt:
            return render_chats(self.tokenizer, [chat_history], self._options)[0]
        text = self.tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True)
        assert isinstance(text, str)
        return text

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once, in windows of `max_length`."""
        by_text = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            by_text.append([(("", ""), *make_disjoint_window(pair)) for pair in pairs])
        answers = iter(self._loglikelihood_tokens([window for windows in by_text for window in windows]))
        return [sum(next(answers)[0] for _ in windows) for windows in by_text]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        questions = []
        for (_, continuation), before, after in requests:
            if not after or len(after) > self.max_length:
                raise UserError(
                    f"the continuation {continuation[:40]!r} has {len(after)} tokens; lm-eval's rows take 1 to "
                    f"config.suite.lm_eval.max_length={self.max_length}"
                )
            kept = [*before, *after][-(self.max_length + 1) :]
            asked = (kept[: -len(after)], after)
            questions.append((fingerprint_of(asked), asked))

        def ask(chunk: Sequence[_Question]) -> Iterable[dict[str, Any]]:
            return map(asdict, self._backend.log_likelihoods([asked for _, asked in chunk]))

        return [(answer["log_prob"], answer["greedy"]) for answer in self._answers("log_likelihood", questions, ask)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers cut at the task's stop strings; greedy unless the task samples."""
        questions = []
        repeats = Counter[str]()
        for request in requests:
            arguments: Any = request.args
            context, given = arguments
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            stop = handle_stop_sequences(wanted.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id]))
            length = wanted.pop("max_gen_toks")
            if unknown := set(wanted) - _SAMPLING:
                raise UserError(f"{request.task_name} asks for {', '.join(sorted(unknown))}, which the sampler lacks")
            if length >= self.max_length:
                raise UserError(
                    f"{request.task_name} writes up to {length} tokens; set config.suite.lm_eval.max_length above that"
                )
            tokens = self.tok_encode(context)[-(self.max_length - length) :]
            temperature = float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0
            settings = (length, temperature, float(wanted.get("top_p", 1.0)), tuple(text for text in stop if text))
            key = fingerprint_of(tokens, settings)
            # Repeated requests for samples are draws of their own.
            questions.append((f"{key} {repeats[key]}", (tokens, settings)))
            repeats[key] += 1
        return [answer["text"] for answer in self._answers("generate", questions, self._generate)]

    def _generate(self, questions: Sequence[_Question]) -> list[dict[str, Any]]:
        """The texts of some questions, those with the same settings drawn together."""
        texts: dict[str, str] = {}
        for settings in dict.fromkeys(settings for _, (_, settings) in questions):
            prompts = {name: tokens for name, (tokens, own) in questions if own == settings}
            length, temperature, top_p, stop = settings
            drawn = self._backend.sample(
                list(prompts.values()),
                seeds=[(self._seed + zlib.crc32(name.encode())) % _LARGEST_SEED for name in prompts],
                num_samples=1,
                max_new_tokens=length,
                temperature=temperature,
                top_p=top_p,
                stop=stop,
            )
            texts |= {name: text for name, (text,) in zip(prompts, drawn, strict=True)}
        return [{"text": texts[name]} for name, _ in questions]

    def _answers(self, kind: str, questions: Sequence[_Question], ask: Callable[..., Iterable[Record]]) -> list[Record]:
        """The answers to named questions, of which those with the same name are one."""
        run_resumable(
            self._store,
            list(dict(questions).items()),
            lambda question: (kind, question[0]),
            lambda chunk: [
                {"split": kind, "task_id": name} | answer for (name, _), answer in zip(chunk, ask(chunk), strict=True)
            ],
            at_once=_REQUESTS_AT_ONCE,
            what=f"lm-eval, {kind}",
            unit="request",
        )
        return [self._store[kind, name] for name, _ in questions]


@functools.cache
def task_manager(include_path: str) -> TaskManager:
    """lm-eval's index of its tasks, and of those below a directory; it reads thousands of files, so one is enough."""
    return TaskManager(include_path=include_path or None)


def load_tasks(names: Sequence[str], settings: LmEvalConfig) -> list[Any]:
    """Tasks and groups of lm-eval by name, with their data; `UserError` where there is no such task or data."""
    if settings.include_path and not Path(settings.include_path).expanduser().is_dir():
        raise UserError(f"config.suite.lm_eval.include_path={settings.include_path!r}: no such directory")
    manager = task_manager(settings.include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"config.tasks has {', '.join(unknown)}, which lm-eval does not know; `lm-eval ls tasks` lists its tasks, "
            "and config.suite.lm_eval.include_path names a directory with more"
        )
    try:
        loaded: Any = manager.load(list(names))
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data of {', '.join(names)} cannot be had: {first}; run the command once with network, which leaves "
            "it in HF_HOME"
        ) from error
    groups = [group for name, group in loaded["groups"].items() if name in names]
    # Members come with their groups.
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in grouped)]


def run_lm_eval(context: SuiteContext) -> Summary:
    """Runs the tasks that `config.tasks` names; `per_prompt.csv` has a row per document, the samples the answers.

    Raises:
      UserError: there is no such task, its data cannot be had, or it asks for what the sampler lacks.
    """
    config, names, settings = context.config, list(context.config.tasks), context.config.suite.lm_eval
    chat, version = ChatOptions.from_config(config.data), importlib.metadata.version("lm-eval")
    asked = [names, asdict(settings), asdict(chat), config.seed, version]
    weights, tokens = context.backend.fingerprint, tokenizer_fingerprint(context.tokenizer)
    fingerprint = fingerprint_of(SUITE, VERSION, "lm-eval", weights, tokens, asked)
    tasks = load_tasks(names, settings)
    # lm-eval would fork for its bootstrap, and a fork of JAX's threads can hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with context.results.store(fingerprint) as store:
        model = BackendModel(
            context.backend, context.tokenizer, store, max_length=settings.max_length, options=chat, seed=config.seed
        )
        found: Any = simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=settings.num_fewshot if settings.num_fewshot >= 0 else None,
            limit=settings.limit or None,
            apply_chat_template=settings.apply_chat_template,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            task_manager=task_manager(settings.include_path),
            # Nothing draws by torch, which need not be there.
            torch_random_seed=None,  # type: ignore[arg-type]
        )
    rows, samples = _documents(found["samples"])
    by_task = {name: _numbers(values) for name, values in (found["results"] | found.get("groups", {})).items()}
    for name, values in by_task.items():
        logging.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    used = asdict(settings) | {"tasks": names}
    metrics = {"lm_eval": {"version": version, "tasks": by_task, "higher_is_better": found["higher_is_better"]}}
    return context.results.finish(SUITE, fingerprint, used, metrics, rows=rows, samples=samples)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task; lm-eval writes "N/A" where there is none."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _documents(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row of metrics, and a line with the answers, for every document of every task."""
    rows, lines = [], []
    for name, members in samples.items():
        for sample in sorted(members, key=lambda sample: (sample["doc_id"], str(sample.get("filter", "")))):
            named = {"task": name, "doc_id": sample["doc_id"], "filter": sample.get("filter", "none")}
            metrics = {metric: sample[metric] for metric in sample.get("metrics", ())}
            rows.append(named | {key: value for key, value in metrics.items() if isinstance(value, int | float)})
            answers = {"target": sample["target"], "responses": sample["resps"]}
            lines.append(named | json.loads(json.dumps(answers, default=str)))
    return rows, lines
