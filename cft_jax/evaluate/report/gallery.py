"""Every prompt of a page, folded up: its distributions in outline, samples, prefixes where a model goes wrong."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cft_jax.distributions import spread
from cft_jax.evaluate.metrics.exact import as_numbers
from cft_jax.evaluate.report.panels import GREEK, Key, record_key
from cft_jax.evaluate.report.runs import Run, value_at
from cft_jax.evaluate.report.tables import METRICS, at, number, percent, split_title
from cft_jax.evaluate.store import Record

# About 3 kB each of two models: 0.6 MB in all.
MAX_PROMPTS = 200
_MAX_ROWS, _MAX_SAMPLES, _LONGEST_SAMPLE, _LONGEST_TITLE = 10, 12, 40, 70
# Units of a plot: width of a bin, height of the plot.
_WIDTH, _HEIGHT = 10, 100


@dataclass(frozen=True)
class Plot:
    """Outlines of the masses as SVG paths, `_WIDTH` a bin and `_HEIGHT` high, and what the two ends stand for."""

    width: int
    target: str
    models: Mapping[int, str]
    ends: tuple[str, str]


@dataclass(frozen=True)
class PromptView:
    """What is shown of a prompt; mappings are by a model's style.

    Attributes:
      title, subtitle: its name: family and parameters, or the beginning of the text.
      prompt: the text itself.
      variations: total variation from the target.
      plot: of numbers.
      rows: of texts: value, target's probability, the models' probabilities.
      wrong: sentences about the prefixes after which the model goes most wrong.
      samples: the most frequent answers, with how often they came.
    """

    title: str
    subtitle: str
    prompt: str
    variations: Mapping[int, str]
    plot: Plot | None
    rows: Sequence[tuple[str, str, Mapping[int, str]]]
    wrong: Mapping[int, Sequence[str]]
    samples: Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class Gallery:
    """Prompts by split and family, of `num_prompts` in all."""

    splits: Mapping[str, Mapping[str, Sequence[PromptView]]]
    num_shown: int
    num_prompts: int


def gallery_of(runs: Sequence[Run], splits: Sequence[str], limit: int = MAX_PROMPTS) -> Gallery | None:
    """The gallery of runs of the structured suite, of at most so many prompts; None where no record has an outline."""
    prompts: dict[Key, dict[int, Record]] = {}
    for run in runs:
        for record in (record for record in run.records if "outline" in record):
            prompts.setdefault(record_key(record), {})[run.style] = record
    keys = sorted(prompts, key=lambda key: splits.index(key[0]))
    groups = {key: next(iter(records.values()))["group"] for key, records in prompts.items()}
    shown = spread(keys, limit, lambda key: f"{key[0]} {groups[key]}")
    if not shown:
        return None
    found: dict[str, dict[str, list[PromptView]]] = {}
    for key in shown:
        family = groups[key].replace("_", " ")
        found.setdefault(split_title(key[0]), {}).setdefault(family, []).append(_view(prompts[key]))
    return Gallery(found, len(shown), len(keys))


def _view(records: Mapping[int, Record]) -> PromptView:
    first = next(iter(records.values()))["outline"]
    models = {style: record["outline"]["model"] for style, record in records.items()}
    variation = next(metric for metric in METRICS if metric.title == "total variation")
    path = at(records.values(), (), variation).path
    is_text = "values" in first and as_numbers(first["values"]) is None
    return PromptView(
        title=first["title"].strip()[:_LONGEST_TITLE],
        subtitle=", ".join(f"{GREEK.get(name, name)} = {value:.4g}" for name, value in first["parameters"].items()),
        prompt=first["prompt"],
        variations={style: number(value_at(record, path)) for style, record in records.items()},
        plot=None if is_text else _plot(first, models),
        rows=[
            (value, percent(target), {style: percent(model[index]) for style, model in models.items()})
            for index, (value, target) in enumerate(zip(first["values"], first["target"], strict=True))
        ][:_MAX_ROWS]
        if is_text
        else [],
        wrong={style: [_sentence(*found) for found in record["wrong_prefixes"]] for style, record in records.items()},
        samples={style: samples for style, record in records.items() if (samples := _samples(record))},
    )


def _plot(shown: Mapping[str, Any], models: Mapping[int, Sequence[float]]) -> Plot:
    ends = (shown["values"][0], shown["values"][-1]) if "values" in shown else [f"{x:.4g}" for x in shown["range"]]
    # What towers over the target, but for the last model, is cut off, so that the rest can be seen.
    top = 1.05 * max(*shown["target"], *list(models.values())[-1], 1e-9)
    all_masses = (shown["target"], *models.values())
    target, *others = ([_HEIGHT - round(_HEIGHT * min(mass / top, 1)) for mass in masses] for masses in all_masses)
    return Plot(
        width=_WIDTH * len(target),
        target="".join([f"M0 {_HEIGHT}", *(f"V{y}h{_WIDTH}" for y in target), f"V{_HEIGHT}z"]),
        models={
            style: f"M0 {heights[0]}" + "".join(f"V{y}h{_WIDTH}" for y in heights)
            for style, heights in zip(models, others, strict=True)
        },
        ends=(ends[0], ends[1]),
    )


def _sentence(prefix: str, child: str | None, target: float, model: float) -> str:
    where = f"after “{prefix}”" if prefix else "at the beginning"
    what = "what no answer has there" if child is None else f"“{child}”" if child else "the end of the answer"
    return f"{where} the model gives {what} {percent(model)} instead of {percent(target)}"


def _samples(record: Record) -> list[str]:
    texts = Counter(text for drawn in record.get("samples", {}).values() for text in drawn)
    return [
        f"{text[:_LONGEST_SAMPLE]} ×{count}" if count > 1 else text[:_LONGEST_SAMPLE]
        for text, count in texts.most_common(_MAX_SAMPLES)
    ]
