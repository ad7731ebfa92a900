"""Which prompts a page shows, and their distributions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cft_jax.evaluate.report.runs import Run
from cft_jax.evaluate.store import Record

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "mu": "μ", "mu1": "μ₁", "mu2": "μ₂", "nu": "ν",
    "sigma": "σ", "x0": "x₀", "xm": "xₘ", "d1": "d₁", "d2": "d₂",
}  # fmt: skip
# The user's own prompts, then families in the order in which they are worth seeing: shapes that differ come first.
_ORDER = (
    "custom", "gaussian", "binomial", "exponential", "triangular", "beta", "poisson", "lognormal", "uniform", "gamma",
    "skellam", "cauchy", "geometric", "weibull", "beta_binomial", "laplace", "truncnorm", "hypergeometric", "gumbel",
    "maxwell",
)  # fmt: skip
_TITLE_LENGTH = 48
Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Panel:
    """One prompt's distributions over its values, under its family or beginning and its parameters.

    `kind` is `continuous`, `discrete` (integers or listed numbers) or `text`; `models` are the models' probabilities,
    not renormalised, by their styles: the last matters most.
    """

    title: str
    subtitle: str
    kind: str
    values: tuple[str, ...]
    target: Float[np.ndarray, "N"]
    models: Mapping[int, Float[np.ndarray, "N"]]


def record_key(record: Record) -> Key:
    """What tells prompts apart."""
    return record["split"], record["task_id"]


def choose_panels(runs: Sequence[Run], splits: Sequence[str], limit: int) -> list[tuple[Key, Panel]]:
    """The prompts to show, with their keys: one per family, by splits in turn, and the user's own before all families.

    Runs are of the structured suite; only prompts whose records have a `distribution` can be shown.
    """
    shown: dict[Key, dict[int, Record]] = {}
    for run in runs:
        for record in (record for record in run.records if "distribution" in record):
            shown.setdefault(record_key(record), {})[run.style] = record
    groups = {key: next(iter(records.values()))["group"] for key, records in shown.items()}
    rank = {group: _ORDER.index(group) if group in _ORDER else len(_ORDER) for group in groups.values()}
    queues = [sorted((key for key in shown if key[0] == s), key=lambda key: (rank[groups[key]], key)) for s in splits]
    chosen: list[Key] = []
    while any(queues) and len(chosen) < limit:
        for queue in queues:
            taken = {groups[key] for key in chosen} - {"custom"}
            queue[:] = [key for key in queue if groups[key] not in taken]
            chosen += [queue.pop(0)] if queue and len(chosen) < limit else []
    return [(key, _panel(shown[key])) for key in chosen]


def _panel(records: Mapping[int, Record]) -> Panel:
    shown = next(iter(records.values()))["distribution"]
    title = shown["title"].strip()
    return Panel(
        title=title if len(title) <= _TITLE_LENGTH else title[: _TITLE_LENGTH - 1].rstrip() + "…",
        subtitle=", ".join(f"{GREEK.get(name, name)} = {value:.4g}" for name, value in shown["parameters"].items()),
        kind=shown["kind"],
        values=tuple(shown["values"]),
        target=np.array(shown["target"], np.float64),
        models={style: np.array(r["distribution"]["model"], np.float64) for style, r in records.items()},
    )
