"""What the pages of several evaluations share: the runs, and tables of them with differences to the first."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cft_jax.evaluate.report import plots
from cft_jax.evaluate.report.tables import number, percent
from cft_jax.evaluate.store import Record


@dataclass(frozen=True)
class Run:
    """One suite's evaluation of one model.

    Attributes:
      name: of the model, on the page.
      summary: `summary.json`; of a suite that could not run, `suite` and the reason, `missing`.
      records: of its prompts (structured only).
    """

    name: str
    summary: Mapping[str, Any]
    records: Sequence[Record]


def head_row(runs: Sequence[Run], first: str, styles: Mapping[str, int]) -> str:
    """The heads of a table with a column per run, in the runs' colours."""
    cells = "".join(
        f'<th style="color:var(--{plots.colour_variable(styles[run.name])})">{html.escape(run.name)}</th>'
        for run in runs
    )
    return f"<tr><th>{first}</th>{cells}</tr>"


def value_cells(
    values: Sequence[float | int | None],
    is_share: bool,
    better: int,
    intervals: Sequence[Sequence[float] | None] | None = None,
) -> str:
    """The values of a row, the best in bold, each but the first with its difference to the first.

    Args:
      values: one per run; None for one that does not exist.
      is_share: shown in percent.
      better: -1 where less is better, 1 where more is, 0 where neither.
      intervals: shown beside the values.
    """
    show = percent if is_share else number
    known = [value for value in values if value is not None]
    best = (max(known) if better > 0 else min(known)) if len(set(known)) > 1 and better else None
    cells = ""
    for index, value in enumerate(values):
        text = show(value)
        if value is not None and value == best:
            text = f"<b>{text}</b>"
        interval = intervals[index] if intervals is not None else None
        if interval is not None:
            text += f" <small>[{show(interval[0])}, {show(interval[1])}]</small>"
        base = values[0]
        # Numbers of prompts and the like need no word where they are the same.
        if index and value is not None and base is not None and (better or value != base):
            text += f"<br><small>{_difference(value - base, is_share)}</small>"
        cells += f"<td>{text}</td>"
    return cells


def table(head: str, rows: str) -> str:
    """A table that scrolls where it is too wide."""
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def legend(runs: Sequence[Run], styles: Mapping[str, int], *, target: bool) -> str:
    """The runs' colours, with the target's grey where plots show one."""
    entries = '<span class="t">target</span>' if target else ""
    for run in runs:
        colour = plots.colour_variable(styles[run.name])
        entries += f'<span><i style="border-color:var(--{colour})"></i>{html.escape(run.name)}</span>'
    return f'<div class="legend runs">{entries}</div>'


def figure_of(summary: Mapping[str, Any], path: Sequence[str]) -> float | int | None:
    """The number at a path of a summary; None where there is none."""
    found: Any = summary
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def _difference(value: float | int, is_share: bool) -> str:
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return f"{sign}{100 * abs(value):.1f} points" if is_share else f"{sign}{number(abs(value))}"
