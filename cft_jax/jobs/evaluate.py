"""Measuring a model by one suite or several."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from cft_jax.common.compilation import use_compilation_cache
from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically, write_json
from cft_jax.common.mirror import local_workdir
from cft_jax.config import Config, validate
from cft_jax.evaluate.backends.load import load_backend
from cft_jax.evaluate.backends.protocol import Backend
from cft_jax.evaluate.report.comparison import read_runs, render_comparison
from cft_jax.evaluate.report.overview import all_summary, headline_figures
from cft_jax.evaluate.results import SUMMARY, Results
from cft_jax.evaluate.suites.noveltybench.suite import judge
from cft_jax.evaluate.suites.registry import RUNNERS, check_suites, generations_to_judge, run_suites
from cft_jax.runs.workdir import setting_up
from cft_jax.sharding import distributed


def start(config: Config, place: str) -> None:
    """The command: joins the other processes, if any, measures, and leaves the results in `place`.

    Raises:
      UserError: see `run` and `distributed.start`.
    """
    distributed.start()
    use_compilation_cache()
    with local_workdir(place, write=jax.process_index() == 0) as workdir:
        summary = run(config, workdir)
    suites = summary.get("suites", {summary["suite"]: {"figures": headline_figures(summary)}})
    for suite, found in suites.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.get("figures", {}).items())
        logging.info("%s: %s", suite, found.get("missing", shown))
    sys.stdout.write(f"{place}/{SUMMARY}\n{place}/report.html\n")


def run(config: Config, workdir: Path) -> Mapping[str, Any]:
    """Measures what `config` names and returns the summary, as written.

    Raises:
      UserError: a mistake of the user's; before anything is overwritten, unless it only shows after hours of work.
    """
    validate(config)
    if config.model.scratch.enabled:
        raise UserError("config.model.scratch makes a model to train; name one to measure by config.model.checkpoint")
    writes = jax.process_index() == 0
    with setting_up(workdir, config, devices=f"{len(jax.devices())} x {jax.devices()[0].device_kind}", write=writes):
        if len(config.eval.suites) == 1:
            check_suites(config)
        generations = generations_to_judge(config, workdir)
        loaded = load_backend(config) if generations is None else None
    if loaded is None:
        assert generations is not None
        local = config.model.local_files_only
        summary = judge(generations, config.suite.noveltybench, workdir, local_files_only=local, write=writes)
    else:
        summary = _measure(loaded, config, workdir, write=writes)
    if writes:
        write_atomically(workdir / "report.html", render_comparison(read_runs([workdir])))
    return summary


def _measure(
    loaded: tuple[Backend, PreTrainedTokenizerBase, str], config: Config, workdir: Path, *, write: bool
) -> Mapping[str, Any]:
    backend, tokenizer, name = loaded
    if len(config.eval.suites) == 1:
        return RUNNERS[config.eval.suites[0]](backend, tokenizer, config, Results(workdir, name, write))
    directories = {suite: workdir / suite for suite in config.eval.suites}
    found = run_suites(backend, tokenizer, config, directories, checkpoint=name, write=write)
    summary = all_summary(found, checkpoint=name)
    if write:
        write_json(workdir / SUMMARY, summary)
    return summary
