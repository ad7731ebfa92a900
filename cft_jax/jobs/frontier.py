"""Calibration against what is kept, along the strength of a run's adapters."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.errors import UserError
from cft_jax.common.files import write_atomically, write_json
from cft_jax.common.storage import opened
from cft_jax.config import Config, from_config_dict, read_config
from cft_jax.evaluate.backends.jax_backend import JaxBackend
from cft_jax.evaluate.backends.protocol import MeasuredModel
from cft_jax.evaluate.report.frontier import frontier_figure
from cft_jax.evaluate.report.plots import png
from cft_jax.evaluate.suites import questions
from cft_jax.evaluate.suites.runner import run_suite
from cft_jax.evaluate.suites.structured import suite as structured
from cft_jax.models.strength import set_alpha
from cft_jax.runs.trained import load_trained
from cft_jax.sharding import distributed

RECORD, PICTURE = "frontier.json", "frontier.png"
_SUITES = (structured.SUITE, questions.SUITE)


def start(workdir: str, strengths: Sequence[float], output: str) -> None:
    """The command, from directories or addresses.

    Raises:
      UserError: the run has no adapters or no checkpoint.
    """
    distributed.start()
    prepare_compilers()
    writes = jax.process_index() == 0
    with opened(workdir, write=False) as run, opened(output, write=writes, flag="--output") as target:
        config = from_config_dict(read_config(run.path))
        if not config.model.lora.enabled:
            raise UserError(f"--workdir={workdir} is of a run without adapters, whose strength cannot be set")
        points = measure(config, run, strengths, target.path)
        if writes:
            write_json(target.path / RECORD, {"run": workdir, "points": points})
            write_atomically(target.path / PICTURE, png(frontier_figure(points), 150))
    sys.stdout.write("".join(f"{_in_words(point)}\n" for point in points) + f"{output}/{RECORD}\n{output}/{PICTURE}\n")


def measure(config: Config, run: Any, strengths: Sequence[float], directory: Path) -> list[dict[str, Any]]:
    """A point for each strength, measured by the run's own settings but without samples.

    Returns:
      For each `strength`; `splits`, by split `kl` and `total_variation`; and `halves`, by half of the questions
      `accuracy`, `probability` and `nats_per_token`.

    Raises:
      UserError: the run has no checkpoint, or a suite lacks something.
    """
    # However the run's own samples were asked for, exact metrics are of single answers.
    settings = dataclasses.replace(
        config.eval, num_samples=0, suites=_SUITES, numbers_per_completion=1, method="direct"
    )
    config = dataclasses.replace(config, eval=settings)
    model, tokenizer, step = load_trained(run, config)
    assert model.lora_spec is not None
    alpha, points = model.lora_spec.alpha, []
    for strength in strengths:
        set_alpha(model, strength * alpha)
        measured = MeasuredModel(JaxBackend(model, tokenizer), tokenizer, f"{run}, step {step}, strength {strength:g}")
        places = {suite: directory / f"strength-{strength:g}" / suite for suite in _SUITES}
        found = {suite: run_suite(suite, config, measured, place) for suite, place in places.items()}
        splits = {name: _exact(split) for name, split in found[structured.SUITE]["splits"].items()}
        points.append({"strength": strength, "splits": splits, "halves": found[questions.SUITE]["halves"]})
    return points


def _exact(split: Mapping[str, Any]) -> dict[str, float]:
    section = split.get("exact_cells", {}) | split["exact"]
    return {name: section[name] for name in ("kl", "total_variation")}


def _in_words(point: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{name} KL {split['kl']:.3f}" for name, split in point["splits"].items())
    halves = ", ".join(f"{name} {100 * half['accuracy']:.1f} % right" for name, half in point["halves"].items())
    return f"strength {point['strength']:<5g} {splits}; questions: {halves}"
