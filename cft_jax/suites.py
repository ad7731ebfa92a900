"""The evaluation suites by name: how each is run and what it needs; used by the evaluate command and the main job."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.distributions import configured_tasks, spread
from cft_jax.evaluate.asking import asking_of, drawing_of
from cft_jax.evaluate.backend import Backend
from cft_jax.evaluate.jax_backend import JaxBackend
from cft_jax.evaluate.mcq import read_prompt, run_mcq
from cft_jax.evaluate.noveltybench import Generations, IncompleteError, generate, judge
from cft_jax.evaluate.noveltybench_sources import (
    NoveltyPrompt,
    find_classifier,
    find_reward_model,
    read_novelty_prompts,
)
from cft_jax.evaluate.open_random import OpenPrompt, read_prompts, run_open_random
from cft_jax.evaluate.perplexity import find_files, run_perplexity
from cft_jax.evaluate.retention import PromptText, load_examples, load_items, run_retention
from cft_jax.evaluate.structured import run_structured
from cft_jax.evaluation import evaluation_tasks, prompt_codec, structured_settings
from cft_jax.models.transformer import Transformer
from cft_jax.text import ChatOptions

Summary = dict[str, Any]


class Runner(Protocol):
    """Runs one suite: measures `backend` as `config` says and leaves its files in `directory`.

    Returns the summary, as written; `write` is true in the process that writes. A killed run goes on where it stopped.

    Raises:
      UserError: something the suite needs is missing: what, where it was looked for, and how to get it.
    """

    def __call__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        directory: Path,
        *,
        checkpoint: str,
        write: bool,
    ) -> Summary: ...


def _structured(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    directory: Path,
    *,
    checkpoint: str,
    write: bool,
) -> Summary:
    return run_structured(
        backend,
        prompt_codec(tokenizer, config.data),
        evaluation_tasks(config, configured_tasks(config.data)),
        structured_settings(config),
        directory,
        checkpoint=checkpoint,
        write=write,
        asking=None
        if config.eval.method == "direct"
        else asking_of(config, tokenizer, mode="numeric", max_new_tokens=0),
    )


def _perplexity(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    directory: Path,
    *,
    checkpoint: str,
    write: bool,
) -> Summary:
    return run_perplexity(backend, tokenizer, config.suite.perplexity, directory, checkpoint=checkpoint, write=write)


def _open_random(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    directory: Path,
    *,
    checkpoint: str,
    write: bool,
) -> Summary:
    suite = config.suite.open_random
    return run_open_random(
        backend,
        asking_of(config, tokenizer, mode="open", max_new_tokens=suite.max_new_tokens),
        _open_prompts(config),
        drawing_of(config, suite.num_samples),
        directory,
        checkpoint=checkpoint,
        write=write,
    )


def _open_prompts(config: Config) -> list[OpenPrompt]:
    prompts = read_prompts(config.suite.open_random.prompts)
    limit = config.eval.max_prompts_per_split
    return spread(prompts, limit, lambda prompt: "") if limit else prompts


def _mcq(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    directory: Path,
    *,
    checkpoint: str,
    write: bool,
) -> Summary:
    suite = config.suite.mcq
    return run_mcq(
        backend,
        asking_of(config, tokenizer, mode="open", max_new_tokens=suite.max_new_tokens),
        read_prompt(suite.prompt),
        drawing_of(config, suite.num_samples),
        directory,
        checkpoint=checkpoint,
        write=write,
    )


def _retention(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    directory: Path,
    *,
    checkpoint: str,
    write: bool,
) -> Summary:
    settings, options = config.suite.retention, ChatOptions.from_config(config.data)
    if config.tasks:
        return _lm_eval().run_lm_eval(
            backend,
            tokenizer,
            config.tasks,
            config.suite.lm_eval,
            options,
            directory,
            seed=config.seed,
            checkpoint=checkpoint,
            write=write,
        )
    return run_retention(
        backend,
        PromptText.of(tokenizer, options, duplicate_bos=settings.duplicate_bos),
        settings,
        directory,
        seed=config.seed,
        checkpoint=checkpoint,
        write=write,
    )


def _lm_eval() -> Any:
    """The adapter, whose library is an extra."""
    try:
        from cft_jax.evaluate import lm_eval_tasks
    except ImportError as error:
        raise UserError(f"config.tasks needs lm-eval ({error}): pip install 'cft_jax[eval]'") from error
    return lm_eval_tasks


def _check_retention(config: Config) -> None:
    if config.tasks:
        _lm_eval()
        return
    load_examples(config.suite.retention)
    load_items(config.suite.retention)


def _noveltybench(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    directory: Path,
    *,
    checkpoint: str,
    write: bool,
) -> Summary:
    suite = config.suite.noveltybench
    found = (
        generate(
            backend,
            asking_of(config, tokenizer, mode="open", max_new_tokens=suite.max_new_tokens),
            _novelty_prompts(config),
            drawing_of(config, suite.num_samples),
            directory,
            checkpoint=checkpoint,
            write=write,
        )
        if "generate" in suite.stages
        else Generations.read(directory)
    )
    return judge(found, suite, directory, local_files_only=config.model.local_files_only, write=write)


def _novelty_prompts(config: Config) -> list[NoveltyPrompt]:
    prompts = read_novelty_prompts(config.suite.noveltybench)
    limit = config.eval.max_prompts_per_split
    if not limit:
        return prompts
    splits = dict.fromkeys(prompt.split for prompt in prompts)
    return [
        prompt
        for split in splits
        for prompt in spread(
            [prompt for prompt in prompts if prompt.split == split], limit, lambda prompt: prompt.split
        )
    ]


def _check_noveltybench(config: Config) -> None:
    suite, local = config.suite.noveltybench, config.model.local_files_only
    if "generate" in suite.stages:
        read_novelty_prompts(suite)
    if "partition" in suite.stages:
        find_classifier(suite, local_files_only=local)
    if "score" in suite.stages:
        find_reward_model(suite, local_files_only=local)


RUNNERS: Mapping[str, Runner] = {
    "structured": _structured,
    "open_random": _open_random,
    "mcq": _mcq,
    "noveltybench": _noveltybench,
    "perplexity": _perplexity,
    "retention": _retention,
}
# What a suite can tell without a model, before any work: its check raises the UserError that its run would.
CHECKS: Mapping[str, Callable[[Config], object]] = {
    "perplexity": lambda config: find_files(config.suite.perplexity),
    "retention": _check_retention,
    "structured": lambda config: evaluation_tasks(config, configured_tasks(config.data)),
    "open_random": _open_prompts,
    "mcq": lambda config: read_prompt(config.suite.mcq.prompt),
    "noveltybench": _check_noveltybench,
}


def check_suites(config: Config) -> None:
    """Refuses suites that lack something, before the work of hours.

    Raises:
      UserError: for the first suite with a problem.
    """
    if not config.eval.suites:
        raise UserError("config.eval.suites is empty; name at least one suite")
    for name in config.eval.suites:
        if name not in RUNNERS:
            raise UserError(f"config.eval.suites has {name!r}; it takes {', '.join(RUNNERS)}")
        if name in CHECKS:
            CHECKS[name](config)


def generations_to_judge(config: Config, directory: Path) -> Generations | None:
    """What the scorers of NoveltyBench are to judge, where no model is asked for anything; None where one is.

    Raises:
      UserError: there is nothing to judge.
    """
    if config.eval.suites != ("noveltybench",) or "generate" in config.suite.noveltybench.stages:
        return None
    return Generations.read(directory)


def run_suites(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    directories: Mapping[str, Path],
    *,
    checkpoint: str,
    write: bool,
) -> dict[str, Summary]:
    """Runs several suites; one that lacks something does not keep the others from running.

    Args are those of a `Runner`, but for `directories`, one for each suite.

    Returns:
      By suite its summary, with the reason as `incomplete` where a part is missing, or
      `{"suite": name, "missing": reason}`.
    """
    found = {}
    for name, directory in directories.items():
        logging.info("suite %s, into %s", name, directory)
        try:
            found[name] = RUNNERS[name](backend, tokenizer, config, directory, checkpoint=checkpoint, write=write)
        except IncompleteError as error:
            logging.warning("suite %s is incomplete: %s", name, error)
            found[name] = {**error.summary, "incomplete": str(error)}
        except UserError as error:
            logging.warning("suite %s is left out: %s", name, error)
            found[name] = {"suite": name, "missing": str(error)}
    return found


def evaluate_stage(
    config: Config,
    model: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Path,
    *,
    stage: str,
    checkpoint: str,
) -> dict[str, Summary]:
    """Runs the suites of a run on its model, into `eval/<suite>/<stage>`; a killed one goes on where it stopped.

    Args:
      config: of the run.
      model: as it is at this stage; it must not change meanwhile.
      tokenizer: of the model.
      workdir: of the run.
      stage: "before" or "after".
      checkpoint: name of what is measured.

    Returns:
      As `run_suites`.
    """
    logging.info("evaluating %s training", stage)
    return run_suites(
        JaxBackend(model, tokenizer),
        tokenizer,
        config,
        {name: workdir / "eval" / name / stage for name in config.eval.suites},
        checkpoint=checkpoint,
        write=jax.process_index() == 0,
    )
