"""Runs the suites that a configuration names: for the evaluate command, and before and after training."""

from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.evaluate.backends.jax_backend import JaxBackend
from cft_jax.evaluate.backends.protocol import MeasuredModel
from cft_jax.evaluate.results import ALL, Results
from cft_jax.evaluate.suites.protocol import Suite, SuiteContext, Summary
from cft_jax.evaluate.suites.registry import SUITES
from cft_jax.models.transformer import Transformer


def selected_suites(config: Config) -> dict[str, Suite]:
    """The suites that `config.eval.suites` names, in its order; `all` stands for every suite there is.

    Raises:
      UserError: it names none, or one that there is not.
    """
    names = config.eval.suites
    if unknown := [name for name in names if name not in (*SUITES, ALL)]:
        raise UserError(f"config.eval.suites has {unknown[0]!r}; suites are {', '.join(SUITES)}, and {ALL}")
    if not names:
        raise UserError(f"config.eval.suites is empty; name some of {', '.join(SUITES)}, or {ALL}")
    return dict(SUITES) if ALL in names else {name: SUITES[name] for name in names}


def check_stages(config: Config, workdir: Path) -> None:
    """Refuses, before the work of hours, suites of a run that lack something.

    Raises:
      UserError: for the first suite with a problem.
    """
    for name, suite in selected_suites(config).items():
        suite.check(config, stage_directory(workdir, name, "before"))


def evaluate_stage(
    config: Config,
    model: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Path,
    *,
    stage: str,
    checkpoint: str,
) -> dict[str, Summary]:
    """Runs the suites of a run on its model, into `eval/<suite>/<stage>`; killed ones resume where they stopped.

    The stage is "before" or "after", the checkpoint a name of what is measured. The model must not change meanwhile.
    """
    logging.info("evaluating %s training", stage)
    measured = MeasuredModel(JaxBackend(model, tokenizer), tokenizer, checkpoint)
    directories = {name: stage_directory(workdir, name, stage) for name in selected_suites(config)}
    return run_suites(config, measured, directories)


def stage_directory(workdir: Path, suite: str, stage: str) -> Path:
    """Where a run keeps the results of a suite before or after training."""
    return workdir / "eval" / suite / stage


def run_suites(config: Config, model: MeasuredModel | None, directories: Mapping[str, Path]) -> dict[str, Summary]:
    """Runs suites into their directories; one that lacks something does not keep the others from running.

    Returns:
      By suite its summary, or `{"suite": name, "missing": reason}`.
    """
    summaries = {}
    for name, directory in directories.items():
        logging.info("suite %s, into %s", name, directory)
        try:
            summaries[name] = run_suite(name, config, model, directory)
        except UserError as error:
            summaries[name] = {"suite": name, "missing": str(error)}
        for problem in ("missing", "incomplete"):
            if problem in summaries[name]:
                logging.warning("suite %s is %s: %s", name, problem, summaries[name][problem])
    return summaries


def run_suite(name: str, config: Config, model: MeasuredModel | None, directory: Path) -> Summary:
    """Runs one suite, into a directory of its own, and returns its summary.

    Raises:
      UserError: the suite lacks something.
    """
    results = Results(directory, "" if model is None else model.name, write=jax.process_index() == 0)
    return SUITES[name].run(SuiteContext(config, results, model))
