"""Calibration fine-tuning, end to end: data, training, evaluation before and after, export, report."""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cft_jax.checkpoints import save_pretrained
from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.errors import UserError
from cft_jax.common.files import write_json
from cft_jax.common.storage import Workdir, opened
from cft_jax.config import Config, validate
from cft_jax.data.dataset import Dataset
from cft_jax.data.objectives import training_dataset
from cft_jax.data.render import render_example
from cft_jax.distributions import Task, configured_tasks
from cft_jax.distributions.splits import TRAIN
from cft_jax.distributions.tasks import digest_of_tasks
from cft_jax.evaluate.report.model_card import card_of_run
from cft_jax.evaluate.report.page import write_report
from cft_jax.evaluate.suites.runner import check_stages, evaluate_stage
from cft_jax.evaluate.suites.structured.settings import evaluation_tasks
from cft_jax.evaluate.suites.structured.suite import SUITE
from cft_jax.generate.stops import end_at
from cft_jax.models.memory import device_memory
from cft_jax.models.transformer import Transformer
from cft_jax.plan.programs import work_of_data
from cft_jax.plan.start import check_step
from cft_jax.runs.base import (
    BASE,
    architecture,
    base_checkpoint,
    base_config,
    base_tokenizer,
    check_memory,
    check_vocabulary,
    load_model,
)
from cft_jax.runs.kept import encode_kept, load_kept, read_kept
from cft_jax.runs.workdir import check_workdir, setting_up
from cft_jax.sharding import distributed
from cft_jax.sharding.mesh import make_mesh, platform
from cft_jax.train.loop import train

# 128 + SIGTERM, as a shell reports a process that the signal ended.
PREEMPTED = 143
# Written last: a run that has it is finished.
SUMMARY = "summary.json"


def start(config: Config, place: str) -> None:
    """The command: joins the run's other processes, if any, and does the job in `place`, a directory or address."""
    distributed.start()
    prepare_compilers()
    with opened(place, write=jax.process_index() == 0) as workdir:
        run(config, workdir)


def run(config: Config, workdir: Workdir) -> Mapping[str, Any]:
    """The whole job; returns what `summary.json` holds, or what it held if the run was finished.

    Raises:
      UserError: a mistake of the user's, before anything is overwritten.
      SystemExit: after SIGTERM, with the state saved.
    """
    start = time.monotonic()
    validate(config)
    _check_trains(config)
    if config.eval.enabled:
        check_stages(config, workdir.path)
    check_workdir(workdir, config)
    finished, writes = _finished(workdir.path, config), jax.process_index() == 0
    if finished is not None:
        if writes:
            sys.stdout.write(
                f"{workdir} is finished (step {finished['step']}): {workdir}/report.html\n"
                "raise config.train.max_steps where it was set, or name a new --workdir for another run\n"
            )
        return finished
    tasks = configured_tasks(config.data)
    trained = digest_of_tasks(tasks[TRAIN])
    with setting_up(workdir, config, devices=_devices(), write=writes, tasks=trained):
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        named = read_kept(config)  # a mistake in it is told before a base is trained
        base = _base(config, tasks, workdir)
        tokenizer = base_tokenizer(config.model, base)
        _announce(config, workdir, mesh, base, tasks)
        row_multiple = mesh.shape["data"] * mesh.shape["fsdp"] * max(config.train.grad_accum_steps, 1)
        read = encode_kept(config, named, tokenizer)
        dataset = training_dataset(config, tokenizer, tasks[TRAIN], row_multiple=row_multiple, share_prefix=True)
        batch = dataset.batch(0)
        seen = (dataset.shared_prefix, batch.tokens, batch.target_ids, *map(np.asarray, read or ()))
        check_vocabulary(config.model, base, highest_id=max(int(ids.max(initial=0)) for ids in seen))
        logging.info("%s", render_example(tokenizer, batch, dataset.shared_prefix))
        _say_memory(config, base, mesh, dataset)
        model = load_model(config, base, mesh, workdir)
        kept = load_kept(config, read, model, tokenizer, workdir, row_multiple=row_multiple)
        end_at(model, tokenizer, config.data.terminator)
    summaries: dict[str, Any] = {}
    if config.eval.enabled:
        summaries["before"] = evaluate_stage(config, model, tokenizer, workdir.path, stage="before", checkpoint=base)
    result = train(
        model,
        dataset,
        target=config.data.target,
        seed=config.seed,
        train=config.train,
        checkpoint=config.checkpoint,
        log=config.log,
        workdir=workdir,
        identity={"seed": config.seed, "tasks": trained},
        kept=kept,
    )
    if result.preempted:
        logging.warning("stopped after step %d of %d; the same command resumes there", result.step, result.stop)
        raise SystemExit(PREEMPTED)
    if config.eval.enabled:
        name = f"{workdir}, step {result.step}"
        summaries["after"] = evaluate_stage(config, model, tokenizer, workdir.path, stage="after", checkpoint=name)
    if writes:
        write_report(workdir.path)  # before the export, which may be refused
    if config.export.enabled:
        _export(config, model, workdir.path, summaries, base)
    summary = {
        "checkpoint": base,
        "step": result.step,
        "total_steps": dataset.steps_per_epoch * config.train.epochs,
        "skipped_steps": result.skipped,
        "seconds": round(time.monotonic() - start, 1),
        "evaluations": _by_suite(summaries),
    }
    if writes:
        write_json(workdir.path / SUMMARY, summary)
        sys.stdout.write(last_words(str(workdir), summary["evaluations"], exported=config.export.enabled))
    return summary


def _base(config: Config, tasks: Mapping[str, Sequence[Task]], workdir: Workdir) -> str:
    """Directory or hub id of the base model; where a run of its own makes it, that is done first, or its rest."""
    if config.model.base:
        made, settings = workdir.inner(BASE), base_config(config)
        # Also where it is finished: it may be there from a run with another base.
        check_workdir(made, settings)
        if not (made.path / SUMMARY).exists():
            logging.info("first the base model, by %s in %s", config.model.base, made)
            run(settings, made)
            workdir.publish()
        multihost_utils.sync_global_devices("base run")
        if jax.process_index() > 0:
            workdir.fetch(BASE)
    return base_checkpoint(config, tasks, workdir)


def _check_trains(config: Config) -> None:
    """Refuses what is no setting of a training.

    Raises:
      UserError: there is such a one.
    """
    if (strength := config.model.lora.strength) != 1:
        raise UserError(
            f"config.model.lora.strength={strength} is of trained adapters, for cft_jax.evaluate and cft_jax.export; "
            "set config.model.lora.alpha to train with another scale"
        )


def _announce(config: Config, workdir: Workdir, mesh: Mesh, base: str, tasks: Mapping[str, Sequence[Task]]) -> None:
    """The first words of a run: where it happens, with what."""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    logging.info("run in %s on %s, mesh %s", workdir, _devices(), sizes)
    logging.info("base model %s", base)
    tested = Counter(task.split for task in evaluation_tasks(config, tasks)) if config.eval.enabled else {}
    evaluated = ", ".join(f"{count:,} of {split}" for split, count in tested.items()) or "none"
    logging.info("%s prompts to train on; to evaluate on: %s", f"{len(tasks[TRAIN]):,}", evaluated)


def _say_memory(config: Config, base: str, mesh: Mesh, dataset: Dataset) -> None:
    """What training takes on each device, before the weights are loaded: estimated, and then by the compiler.

    The CPU's compiler is not asked: its memory is the machine's. What another compiles, training finds in JAX's cache;
    of several hosts only the first writes there, so that others compile twice unless they share its directory.

    Raises:
      UserError: it cannot fit.
    """
    rows, length, _, _ = max(dataset.shapes, key=lambda shape: shape[0] * shape[1])
    logging.info("%s", check_memory(config, base, mesh, rows=rows, length=length))
    if platform(mesh) != "cpu":
        work = work_of_data(config, architecture(config.model, base), dataset)
        logging.info("%s", check_step(work, config, mesh, available=device_memory()))


def _finished(workdir: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a run that has done all the steps it is asked for."""
    path = workdir / SUMMARY
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        step, total = summary["step"], summary["total_steps"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it and repeat the command") from None
    wanted = min(total, config.train.max_steps) if config.train.max_steps else total
    return summary if step >= wanted else None


def _export(config: Config, model: Transformer, workdir: Path, summaries: Mapping[str, Any], base: str) -> None:
    """Writes the trained weights in HF format, in place of what an earlier part of this run exported."""
    directory = workdir / "export"
    if jax.process_index() == 0:
        for left in (directory, *workdir.glob(".export.*.tmp")):  # the latter by a run killed while it exported
            shutil.rmtree(left, ignore_errors=True)
    multihost_utils.sync_global_devices("export")
    structured = {stage: summary[SUITE] for stage, summary in summaries.items() if "splits" in summary.get(SUITE, {})}
    form = config.export.format
    card = card_of_run(config, form=form, base=base, summaries=structured)
    save_pretrained(model, directory, format=form, tokenizer=config.model.tokenizer or None, card=card)


def _by_suite(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stage → suite → summary, as suite → stage → figures (of structured those by split)."""
    suites: dict[str, dict[str, Any]] = {}
    for stage, by_suite in summaries.items():
        for suite, summary in by_suite.items():
            figures = {name: summary[name] for name in summary if name not in ("suite", "checkpoint", "settings")}
            is_split = suite == SUITE and "splits" in summary
            suites.setdefault(suite, {})[stage] = summary["splits"] if is_split else figures
    return suites


def last_words(workdir: str, evaluations: Mapping[str, Any], *, exported: bool) -> str:
    """What a finished run says: its headline metrics, where everything is, what to do next."""
    lines = ["", *_headline(evaluations.get(SUITE, {})), f"report      {workdir}/report.html"]
    lines.append(f"metrics     {workdir}/summary.json")
    if exported:
        lines.append(f"weights     {workdir}/export (Hugging Face format; README.md there says how to load them)")
    lines.append(f"next        python -m cft_jax.export --workdir={workdir} --output=DIR --format=merged|adapter")
    if evaluations:
        lines.append(f"            python -m cft_jax.compare --output=FILE.html {workdir} [OTHER RUNS]")
    return "\n".join([*lines, ""])


def _headline(stages: Mapping[str, Any]) -> list[str]:
    figures = (
        ("exact", "kl", "KL, nats"),
        ("exact", "total_variation", "total var."),
        ("sampled", "valid_rate", "valid"),
    )
    # A suite that could not run is named in the log.
    stages = {stage: splits for stage, splits in stages.items() if "missing" not in splits}
    lines = []
    for split in dict.fromkeys(name for splits in stages.values() for name in splits):
        for section, name, title in figures:
            values = [splits.get(split, {}).get(section, {}).get(name) for splits in stages.values()]
            if None not in values:
                lines.append(f"{split:20} {title:11} " + " -> ".join(f"{value:.3f}" for value in values))
    return [f"{'':33}" + " -> ".join(stages), *lines, ""] if lines else []


def _devices() -> str:
    devices, processes = jax.devices(), jax.process_count()
    kind, platform = devices[0].device_kind, devices[0].platform
    where = f" ({platform})" if platform != kind else ""
    return f"{len(devices)} x {kind}{where}" + (f" in {processes} processes" if processes > 1 else "")
