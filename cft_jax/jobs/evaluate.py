"""Measuring a model by one suite or several."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically, write_json
from cft_jax.common.storage import Workdir, opened
from cft_jax.config import Config, validate
from cft_jax.evaluate.backends.load import load_measured_model
from cft_jax.evaluate.backends.protocol import MeasuredModel
from cft_jax.evaluate.report.overview import all_summary, headline_metrics
from cft_jax.evaluate.report.page import render_page
from cft_jax.evaluate.report.runs import read_runs
from cft_jax.evaluate.results import SUMMARY
from cft_jax.evaluate.suites.runner import run_suite, run_suites, selected_suites
from cft_jax.runs.workdir import setting_up
from cft_jax.sharding import distributed


def start(config: Config, place: str) -> None:
    """The command: joins the other processes, if any, measures, and leaves the results in `place`."""
    distributed.start()
    prepare_compilers()
    with opened(place, write=jax.process_index() == 0) as workdir:
        summary = run(config, workdir)
    suites = summary.get("suites", {summary["suite"]: {"figures": headline_metrics(summary)}})
    for suite, entry in suites.items():
        shown = ", ".join(f"{title} {value:.4g}" for title, value in entry.get("figures", {}).items())
        logging.info("%s: %s", suite, entry.get("missing", shown))
    sys.stdout.write(f"{place}/{SUMMARY}\n{place}/report.html\n")


def run(config: Config, place: Workdir, model: MeasuredModel | None = None) -> Mapping[str, Any]:
    """Measures what `config` names, or a model that is loaded, and returns the summary, as written.

    Raises:
      UserError: a mistake of the user's; before anything is overwritten, unless it only shows after hours of work.
    """
    validate(config)
    for name in ("scratch",) * config.model.scratch.enabled + ("base",) * bool(config.model.base):
        raise UserError(f"config.model.{name} makes a model to train; name one to measure by config.model.checkpoint")
    writes, workdir = jax.process_index() == 0, place.path
    with setting_up(place, config, devices=f"{len(jax.devices())} x {jax.devices()[0].device_kind}", write=writes):
        suites = selected_suites(config)
        # Of several, those that lack something are named and left out.
        alone = next(iter(suites)) if len(suites) == 1 else None
        if alone:
            suites[alone].check(config, workdir)
        needed = any(suite.needs_model(config) for suite in suites.values())
        model = load_measured_model(config) if needed and model is None else model
    if alone:
        summary = run_suite(alone, config, model, workdir)
    else:
        summaries = run_suites(config, model, {name: workdir / name for name in suites})
        summary = all_summary(summaries, checkpoint=config.model.checkpoint if model is None else model.name)
        if writes:
            write_json(workdir / SUMMARY, summary)
    if writes:
        write_atomically(workdir / "report.html", render_page(read_runs([workdir])))
    if "incomplete" in summary:
        raise UserError(summary["incomplete"])
    return summary
