"""Which prompts a report shows, and their distributions before and after."""

from collections.abc import Mapping, Sequence

import numpy as np

from cft_jax.evaluate.report.plots import Panel
from cft_jax.evaluate.store import Record

_GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "mu": "μ", "mu1": "μ₁", "mu2": "μ₂", "nu": "ν",
    "sigma": "σ", "x0": "x₀", "xm": "xₘ", "d1": "d₁", "d2": "d₂",
}  # fmt: skip
# Families in the order in which they are worth seeing: shapes that differ come first.
_FAMILY_ORDER = (
    "gaussian", "binomial", "exponential", "triangular", "beta", "poisson", "lognormal", "uniform", "gamma", "skellam",
    "cauchy", "geometric", "weibull", "beta_binomial", "laplace", "truncnorm", "hypergeometric", "gumbel", "maxwell",
)  # fmt: skip
_TITLE_LENGTH = 48

Key = tuple[str, str]


def figure_key(record: Record) -> Key:
    """What tells prompts apart."""
    return record["split"], record["task_id"]


def choose_panels(
    records: Mapping[str, Sequence[Record]], styles: Mapping[str, int], splits: Sequence[str], limit: int
) -> list[tuple[Key, Panel]]:
    """The prompts to show, at most `limit`, with their keys.

    One prompt per family, by splits in turn as they are given; the user's own prompts come before all families.

    Args:
      records: by stage (`before` and `after`) or by run; only those with a `distribution` can be shown.
      styles: by stage or run, as in `Panel`.
      splits: the splits, most interesting first.
      limit: at most so many.
    """
    kept = {
        stage: {figure_key(record): record for record in rows if "distribution" in record}
        for stage, rows in records.items()
    }
    latest = {key: record for rows in kept.values() for key, record in rows.items()}
    queues = [
        sorted((key for key in latest if key[0] == split), key=lambda key: (_rank(latest[key]), key))
        for split in splits
    ]
    chosen, groups = [], set()
    while any(queues) and len(chosen) < limit:
        for queue in queues:
            while queue and len(chosen) < limit:
                key = queue.pop(0)
                if latest[key]["group"] not in groups or latest[key]["group"] == "custom":
                    groups.add(latest[key]["group"])
                    chosen.append(key)
                    break
    return [(key, _panel({stage: rows[key] for stage, rows in kept.items() if key in rows}, styles)) for key in chosen]


def _rank(record: Record) -> int:
    group = record["group"]
    if group == "custom":
        return -1
    return _FAMILY_ORDER.index(group) if group in _FAMILY_ORDER else len(_FAMILY_ORDER)


def _panel(stages: Mapping[str, Record], styles: Mapping[str, int]) -> Panel:
    shown = next(iter(stages.values()))["distribution"]
    models = {stage: np.array(record["distribution"]["model"], np.float64) for stage, record in stages.items()}
    title = shown["title"].strip()
    return Panel(
        title=title if len(title) <= _TITLE_LENGTH else title[: _TITLE_LENGTH - 1].rstrip() + "…",
        subtitle=", ".join(f"{_GREEK.get(name, name)} = {value:.4g}" for name, value in shown["parameters"].items()),
        kind=shown["kind"],
        values=tuple(shown["values"]),
        target=np.array(shown["target"], np.float64),
        models=models,
        styles=styles,
    )
