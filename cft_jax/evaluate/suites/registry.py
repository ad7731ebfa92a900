"""The evaluation suites by name: how each is run and what it needs; used by the evaluate command and the main job."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.distributions import Task, configured_tasks, spread
from cft_jax.evaluate.backends.jax_backend import JaxBackend
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.prompting import prompt_strategy, sampling_config
from cft_jax.evaluate.results import Results
from cft_jax.evaluate.suites.mcq import read_prompt, run_mcq
from cft_jax.evaluate.suites.noveltybench.sources import (
    NoveltyPrompt,
    find_classifier,
    find_reward_model,
    read_novelty_prompts,
)
from cft_jax.evaluate.suites.noveltybench.suite import Generations, IncompleteError, check_processes, generate, judge
from cft_jax.evaluate.suites.open_random import OpenPrompt, read_prompts, run_open_random
from cft_jax.evaluate.suites.perplexity import find_files, run_perplexity
from cft_jax.evaluate.suites.retention.suite import PromptText, load_examples, load_items, run_retention
from cft_jax.evaluate.suites.structured.settings import evaluation_tasks, prompt_codec, structured_settings
from cft_jax.evaluate.suites.structured.suite import run_structured
from cft_jax.models.transformer import Transformer
from cft_jax.text import ChatOptions

Summary = dict[str, Any]


# Runs one suite: measures the model as the configuration says, leaves its files where results go, returns the summary.
# Raises a UserError where something that the suite needs is missing: what, where it was looked for, how to get it.
Runner = Callable[[Backend, PreTrainedTokenizerBase, Config, Results], Summary]


def _structured(backend: Backend, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> Summary:
    strategy = None
    if config.eval.method != "direct":
        strategy = prompt_strategy(config, tokenizer, mode="numeric", max_new_tokens=0)
    codec, settings = prompt_codec(tokenizer, config.data), structured_settings(config)
    return run_structured(backend, codec, _structured_tasks(config), settings, results, strategy)


def _structured_tasks(config: Config) -> list[Task]:
    return evaluation_tasks(config, configured_tasks(config.data))


def _perplexity(backend: Backend, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> Summary:
    return run_perplexity(backend, tokenizer, config.suite.perplexity, results)


def _open_random(backend: Backend, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> Summary:
    suite = config.suite.open_random
    strategy = prompt_strategy(config, tokenizer, mode="open", max_new_tokens=suite.max_new_tokens)
    return run_open_random(
        backend, strategy, _open_prompts(config), sampling_config(config, suite.num_samples), results
    )


def _open_prompts(config: Config) -> list[OpenPrompt]:
    prompts = read_prompts(config.suite.open_random.prompts)
    limit = config.eval.max_prompts_per_split
    return spread(prompts, limit, lambda prompt: "") if limit else prompts


def _mcq(backend: Backend, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> Summary:
    suite = config.suite.mcq
    strategy = prompt_strategy(config, tokenizer, mode="open", max_new_tokens=suite.max_new_tokens)
    return run_mcq(backend, strategy, read_prompt(suite.prompt), sampling_config(config, suite.num_samples), results)


def _retention(backend: Backend, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> Summary:
    settings, options = config.suite.retention, ChatOptions.from_config(config.data)
    if config.tasks:
        run = _lm_eval().run_lm_eval
        return run(backend, tokenizer, config.tasks, config.suite.lm_eval, options, results, seed=config.seed)
    prompts = PromptText.of(tokenizer, options, duplicate_bos=settings.duplicate_bos)
    return run_retention(backend, prompts, settings, results, seed=config.seed)


def _lm_eval() -> Any:
    """The adapter, whose library is an extra."""
    try:
        from cft_jax.evaluate.suites.retention import lm_eval_tasks
    except ImportError as error:
        raise UserError(f"config.tasks needs lm-eval ({error}): pip install -e '.[eval]'") from error
    return lm_eval_tasks


def _check_retention(config: Config) -> None:
    if config.tasks:
        _lm_eval()
        return
    load_examples(config.suite.retention)
    load_items(config.suite.retention)


def _noveltybench(backend: Backend, tokenizer: PreTrainedTokenizerBase, config: Config, results: Results) -> Summary:
    suite, directory = config.suite.noveltybench, results.directory
    if "generate" in suite.stages:
        strategy = prompt_strategy(config, tokenizer, mode="open", max_new_tokens=suite.max_new_tokens)
        sampling = sampling_config(config, suite.num_samples)
        found = generate(backend, strategy, _novelty_prompts(config), sampling, results)
    else:
        found = Generations.read(directory)
    return judge(found, suite, directory, local_files_only=config.model.local_files_only, write=results.write)


def _novelty_prompts(config: Config) -> list[NoveltyPrompt]:
    prompts = read_novelty_prompts(config.suite.noveltybench)
    limit = config.eval.max_prompts_per_split
    if not limit:
        return prompts
    by_split: dict[str, list[NoveltyPrompt]] = {}
    for prompt in prompts:
        by_split.setdefault(prompt.split, []).append(prompt)
    return [prompt for members in by_split.values() for prompt in spread(members, limit, lambda prompt: prompt.split)]


def _check_noveltybench(config: Config) -> None:
    suite, local = config.suite.noveltybench, config.model.local_files_only
    check_processes(suite)
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
    "structured": _structured_tasks,
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

    Args:
      backend: the model.
      tokenizer: of the model.
      config: of the run.
      directories: where the files of each suite go, by its name.
      checkpoint: name of what is measured, recorded.
      write: whether this process writes; process 0 does.

    Returns:
      By suite its summary, with the reason as `incomplete` where a part is missing, or
      `{"suite": name, "missing": reason}`.
    """
    found = {}
    for name, directory in directories.items():
        logging.info("suite %s, into %s", name, directory)
        try:
            found[name] = RUNNERS[name](backend, tokenizer, config, Results(directory, checkpoint, write))
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
