"""Where NoveltyBench (arXiv 2504.05228) takes its prompts and its judges from: local files, or the hub."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cft_jax.common import hub
from cft_jax.common.errors import UserError
from cft_jax.config.suites import NoveltyBenchConfig
from cft_jax.evaluate.suites.data_sets import data_set_rows, json_lines

_FIELD = "config.suite.noveltybench.data"
_GET = "hf download yimingzhang/novelty-bench --repo-type dataset --local-dir novelty-bench"


@dataclass(frozen=True)
class NoveltyPrompt:
    """A prompt of a split, with its id there."""

    split: str
    task_id: str
    text: str


def read_novelty_prompts(settings: NoveltyBenchConfig) -> list[NoveltyPrompt]:
    """The prompts that `data` names.

    A JSONL file has rows with `id` and `prompt`, and `split` where it holds several; without it the file's name is the
    split. A directory has a file `<split>.jsonl` for each of the `splits`, or is a download of the hub's data set.

    Raises:
      UserError: there are none: what is missing, where it was looked for, and how to get it.
    """
    if not settings.data:
        raise UserError(f"{_FIELD} is empty; name a JSONL file with id and prompt, or get the data with `{_GET}`")
    prompts: dict[tuple[str, str], NoveltyPrompt] = {}
    for place, split, row in _rows(settings):
        if not isinstance(row, Mapping) or "id" not in row or not isinstance(row.get("prompt"), str):
            raise UserError(f"{place}: a row needs `id` and a text `prompt`")
        prompt = NoveltyPrompt(str(row.get("split", split)), str(row["id"]), row["prompt"])
        key = prompt.split, prompt.task_id
        if key in prompts:
            raise UserError(f"{_FIELD}={settings.data} has the id {prompt.task_id!r} twice in split {prompt.split}")
        prompts[key] = prompt
    if not prompts:
        raise UserError(f"{_FIELD}={settings.data} holds no prompts")
    return list(prompts.values())


def _rows(settings: NoveltyBenchConfig) -> Iterator[tuple[str, str, Any]]:
    """Where each row stands, the split that it belongs to if it does not say, and the row."""
    path = Path(settings.data).expanduser()
    if path.is_file() or (path.is_dir() and any(path.glob("*.jsonl"))):
        for file in [path] if path.is_file() else [path / f"{split}.jsonl" for split in settings.splits]:
            if not file.is_file():
                raise UserError(f"{_FIELD}={settings.data} holds no {file.name}; set config.suite.noveltybench.splits")
            for number, row in json_lines(file):
                yield f"{file}, line {number}", file.stem, row
        return
    if not path.is_dir() and (path.suffix in (".jsonl", ".json") or settings.data.startswith((".", "/", "~"))):
        raise UserError(f"{_FIELD}={settings.data}: no such file or directory; get the data with `{_GET}`")
    source = str(path) if path.is_dir() else settings.data
    fix = f"run `{_GET}` where there is one and set {_FIELD} to that directory"
    for split in settings.splits:
        for number, row in enumerate(data_set_rows(source, None, split, fix=fix), 1):
            yield f"{source}, split {split}, row {number}", split, row


@dataclass(frozen=True)
class Judge:
    """A judge of answers that is at hand, but loaded only when it is needed.

    `identify` tells its weights, tokenizer and arithmetic from all others, as part of the results' fingerprint.
    """

    identify: Callable[[], str]
    load: Callable[[], Any]


def find_classifier(settings: NoveltyBenchConfig, *, local_files_only: bool) -> Judge:
    """The classifier of equivalent answers, downloaded if need be, with the tokenizer it was trained with.

    Raises:
      UserError: there is none: where it was looked for, and how to get it.
    """
    judges = _judges()
    directory = _resolve("classifier", settings.classifier, local_files_only)
    tokenizer = directory
    if not judges.has_tokenizer(directory):
        tokenizer = _resolve("classifier_tokenizer", settings.classifier_tokenizer, local_files_only)
    judges.check_files(directory, tokenizer)
    dtype, batch = settings.classifier_dtype, settings.scorer_batch
    return Judge(
        lambda: f"{judges.checkpoint_identity(directory)} {judges.checkpoint_identity(tokenizer)} {dtype}",
        lambda: judges.Classifier(directory, tokenizer, dtype=dtype, batch=batch),
    )


def find_reward_model(settings: NoveltyBenchConfig, *, local_files_only: bool) -> Judge:
    """The reward model, as `find_classifier`."""
    judges = _judges()
    directory = _resolve("reward_model", settings.reward_model, local_files_only)
    judges.check_files(directory, directory)
    dtype, batch = settings.reward_dtype, settings.scorer_batch
    return Judge(
        lambda: f"{judges.checkpoint_identity(directory)} {dtype}",
        lambda: judges.RewardModel(directory, dtype=dtype, batch=batch),
    )


def _judges() -> Any:
    """The module of the judges, whose libraries are extras."""
    try:
        from cft_jax.evaluate.suites.noveltybench import judges
    except ImportError as error:
        raise UserError(f"NoveltyBench's judges need torch ({error}): pip install -e '.[eval]'") from error
    return judges


def _resolve(field: str, path_or_id: str, local_files_only: bool) -> Path:
    try:
        return hub.resolve(path_or_id, revision="main", local_files_only=local_files_only)[0]
    except UserError as error:
        raise UserError(
            f"config.suite.noveltybench.{field}={path_or_id}: {error}. Get it with `hf download {path_or_id}` where "
            "there is a network, or run the stages that need no judge: --config.suite.noveltybench.stages=generate"
        ) from error
