"""Plots of evaluations: the target against the models, calibration, bars of metrics, the loss.

Functions draw on given axes and know nothing of files; `svg` and `png` turn a figure into bytes. Colours are the same
everywhere (target grey, the first model orange, the second blue: told apart by colour-blind readers too), and the first
is dashed, so that a grey print still tells them apart.
"""

import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from cft_jax.evaluate.metrics.exact import as_numbers
from cft_jax.evaluate.report.panels import Panel

# Each colour stands for a CSS variable of the page, which has a light and a dark value of it.
INK, MUTED, GRID, TARGET = "#1b1f29", "#667085", "#e4e7ed", "#d3d8e0"
# Colour, dashes and dot by number of a style; style.html has the same colours in the same order.
COLOURS = BEFORE, AFTER, *_ = ("#d9730d", "#1f6feb", "#0f8a5f", "#8b46c8", "#cf3341", "#0e8ea8")
_DASHES = ((0, (3.2, 1.6)), "solid", (0, (6, 1.5, 1.2, 1.5)), (0, (1.2, 1.2)), (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = ("D", "o", "s", "^", "v", "P")
_CSS_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", TARGET: "target"} | {
    colour: f"run{style}" for style, colour in enumerate(COLOURS)
}
_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True, "font.size": 8.5, "svg.fonttype": "none",
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "axes.axisbelow": True, "axes.edgecolor": MUTED, "axes.linewidth": 0.8, "axes.xmargin": 0.02,
    "axes.labelcolor": MUTED, "axes.labelsize": 8.5,
    "axes.titlecolor": INK, "axes.titlelocation": "left", "axes.titlesize": 9.5,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 8.5, "legend.labelcolor": INK,
    "xtick.color": MUTED, "xtick.major.size": 3, "ytick.color": MUTED, "ytick.major.size": 0,
}  # fmt: skip
_CAPTION: dict[str, Any] = {"fontsize": 8, "color": MUTED, "pad": 4}
_MAX_BARS = 45
_DENSITY_BINS = 44
_MAX_STEPS = 160
# Labels below a plot are slanted where they have more characters than this in all.
_LABEL_CHARACTERS = 80
# Where continuous targets are cut in plots: a heavy tail would leave nothing to see of the middle.
_SHOWN_QUANTILES = (0.01, 0.99)


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure in the common style and its axes, row by row; sizes in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def panel_figure(panel: Panel) -> Figure:
    """One prompt: probabilities beside their cumulative sums; text values have no order, so only the former."""
    figure, axes = new_figure(5.6, 1.95, 1, 1 if panel.kind == "text" else 2)
    draw_probabilities(axes[0], panel)
    axes[0].set_title("density" if _is_dense(panel) else "probability", **_CAPTION)
    if panel.kind != "text":
        draw_cumulative(axes[1], panel)
        axes[1].set_title("cumulative probability", **_CAPTION)
    return figure


def gallery_figure(panels: Sequence[Panel], columns: int) -> Figure:
    """Several prompts in a grid, probabilities only, under one legend: the picture of a result."""
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(3.5 * columns, 2.35 * rows + 0.4, rows, columns)
    for ax, panel in zip(axes, panels, strict=False):
        draw_probabilities(ax, panel)
        ax.set_title(panel.title, loc="left", color=INK, fontweight="bold", pad=16)
        ax.text(0, 1.03, panel.subtitle, transform=ax.transAxes, color=MUTED, fontsize=8, va="bottom")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [Patch(facecolor=TARGET), *(Line2D([], [], **_line(style)) for style in (0, 1))]
    with matplotlib.rc_context(_STYLE):
        figure.legend(handles, ["target", "before training", "after training"], loc="outside upper right", ncols=3)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.14)
    return figure


def draw_probabilities(ax: Axes, panel: Panel) -> None:
    """Bars of probabilities for texts and a few discrete values, densities for many and for continuous ones."""
    (_draw_density if _is_dense(panel) else _draw_bars)(ax, panel)
    ax.yaxis.set_major_locator(MaxNLocator(4))


def draw_cumulative(ax: Axes, panel: Panel) -> None:
    """Cumulative probabilities; a model's ends at its mass on the listed values."""
    numbers, target, models = _sorted(panel)
    low, high = _shown_range(numbers, target, panel.kind)
    # Thousands of steps would only weigh down the page.
    inside = np.flatnonzero((numbers >= low) & (numbers <= high))
    taken = inside[np.unique(np.linspace(0, inside.size - 1, _MAX_STEPS).astype(int))]
    edges = np.concatenate([[low], numbers[taken], [high]])

    def heights(masses: np.ndarray) -> np.ndarray:
        cumulative = np.append(0.0, np.cumsum(masses))
        return cumulative[np.concatenate([[taken[0]], taken + 1, [taken[-1] + 1]])]

    ax.fill_between(edges, heights(target), step="post", color=TARGET, linewidth=0)
    for style, q in models.items():
        ax.step(edges, heights(q), where="post", **_line(style))
    ax.set(xlim=(low, high), ylim=(0, 1.02), yticks=[0, 0.25, 0.5, 0.75, 1.0])
    if panel.kind == "discrete":
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def calibration_figure(curves: Mapping[int, Mapping[str, Sequence[float]]]) -> Figure:
    """The model's share below the target's quantiles: by a model's style, a split's section `calibration`."""
    figure, (ax,) = new_figure(4.1, 3.6, 1, 1)
    levels = np.linspace(0, 1, len(next(iter(curves.values()))["model"]) + 1)
    ax.plot([0, 1], [0, 1], color=TARGET, linewidth=5, solid_capstyle="round")
    for style, curve in curves.items():
        low, high = (np.append(0.0, curve[key]) for key in ("cumulative_p10", "cumulative_p90"))
        ax.fill_between(levels, low, high, color=_line(style)["color"], alpha=0.16, linewidth=0)
        ax.plot(levels, np.append(0.0, np.cumsum(curve["model"])), **_line(style))
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="target's share", ylabel="model's share", aspect="equal")
    ax.grid(True, axis="both")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def loss_figure(steps: Sequence[int], losses: Sequence[float]) -> Figure:
    """The training loss, with a running mean where steps are many; logarithmic where it falls far."""
    figure, (ax,) = new_figure(5.6, 3.6, 1, 1)
    values = np.asarray(losses, np.float64)
    window = max(1, len(values) // 40)
    ax.plot(steps, values, color=AFTER, linewidth=0.9 if window > 1 else 1.6, alpha=0.35 if window > 1 else 1.0)
    if window > 1:
        padded = np.pad(values, (window // 2, (window - 1) // 2), mode="edge")
        ax.plot(steps, np.convolve(padded, np.ones(window) / window, "valid"), color=AFTER, linewidth=1.8)
    if values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1000 * values.min() else (1,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=0)
    ax.set(xlabel="step", ylabel="loss")
    return figure


def bars_figure(
    labels: Sequence[str], heights: Mapping[int, Float[np.ndarray, "G"]], *, percent: bool, uniform: bool
) -> Figure:
    """Groups of bars, a bar per model by its style, none where it is NaN; logarithmic where they differ much.

    Heights are shares if `percent`; if `uniform`, a dotted line is drawn where all groups would be alike.
    """
    figure, (ax,) = new_figure(5.6, 2.6, 1, 1)
    width = 0.8 / len(heights)
    for index, (style, values) in enumerate(heights.items()):
        centres = np.arange(len(labels)) - 0.4 + (index + 0.5) * width
        ax.bar(centres, values, 0.92 * width, color=_line(style)["color"], linewidth=0)
    if uniform:
        ax.axhline(1 / len(labels), color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    least, most = (extreme([*heights.values()]) for extreme in (np.nanmin, np.nanmax))
    if least > 0 and most > 50 * least:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.yaxis.set_minor_locator(NullLocator())
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label_bars(ax, labels)
    return figure


def svg(figure: Figure, name: str, description: str) -> str:
    """An <svg> element for an HTML page: its text in the page's font, its colours from CSS variables.

    `name` keeps its ids apart from those of other figures on the page; `description` is for those who do not see it.
    """
    element = _saved(figure, name, format="svg", transparent=True, metadata={"Date": None}).decode()
    element = element[element.index("<svg") :]
    for left_out in (
        r"(?s)<metadata>.*?</metadata>",
        r"(?s)<style type.*?</style>",
        r' id="(figure|axes|patch|matplotlib|xtick|ytick|line2d|text|legend)[^"]*"',
        r"font-family: [^;\"]*;? ?",
    ):
        element = re.sub(left_out, "", element)
    label = f'role="img" aria-label="{html.escape(description)}"'
    element = re.sub(r'(?<=<svg )([^>]*?)width="[^"]*" height="[^"]*"', lambda m: m[1] + label, element, count=1)
    for colour, variable in _CSS_VARIABLES.items():
        element = element.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", element)


def png(figure: Figure, dots_per_inch: int) -> bytes:
    """The figure as a PNG file on white."""
    return _saved(figure, "", format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})


def _saved(figure: Figure, name: str, **options: Any) -> bytes:
    data = io.BytesIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # A browser has the characters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(data, **options)
    return data.getvalue()


def _line(style: int) -> dict[str, Any]:
    """How matplotlib draws a model's line."""
    style %= len(COLOURS)
    return {"color": COLOURS[style], "linestyle": _DASHES[style], "linewidth": 1.7 if style else 1.5}


def _dot(style: int) -> dict[str, Any]:
    style %= len(COLOURS)
    size = {"markersize": 3.8} if style else {"markersize": 3.2, "fillstyle": "none", "markeredgewidth": 1.1}
    return {"color": COLOURS[style], "marker": _MARKERS[style], "linestyle": "none", **size}


def _label_bars(ax: Axes, labels: Sequence[str]) -> None:
    fits = sum(len(label) + 2 for label in labels) < _LABEL_CHARACTERS
    slant: dict[str, Any] = {} if fits else {"rotation": 40, "ha": "right"}
    ax.set_xticks(range(len(labels)), labels, parse_math=False, **slant)


def _is_dense(panel: Panel) -> bool:
    return panel.kind == "continuous" or (panel.kind == "discrete" and len(panel.values) > _MAX_BARS)


def _sorted(panel: Panel) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    numbers = as_numbers(panel.values)
    assert numbers is not None
    order = np.argsort(numbers, kind="stable")
    return numbers[order], panel.target[order], {style: q[order] for style, q in panel.models.items()}


def _shown_range(numbers: np.ndarray, target: np.ndarray, kind: str) -> tuple[float, float]:
    """The range of a plot: where the target is, without its far tails."""
    low, high = np.searchsorted(np.cumsum(target), _SHOWN_QUANTILES)
    first, last = numbers[low], numbers[min(high, numbers.size - 1)]
    if kind == "discrete":
        return float(first) - 0.55, float(last) + 0.55
    # Short of the tails all is shown, up to the ends of a bounded support.
    if numbers[-1] - numbers[0] < 1.6 * (last - first):
        first, last = numbers[0], numbers[-1]
    margin = 0.02 * (last - first) or 0.5
    return float(first - margin), float(last + margin)


def _draw_density(ax: Axes, panel: Panel) -> None:
    numbers, target, models = _sorted(panel)
    edges = _edges(numbers)
    low, high = _shown_range(numbers, target, panel.kind)
    inside = np.flatnonzero((edges[1:] > low) & (edges[:-1] < high))
    # Bins of the plot are whole bins of the space, so that no mass is shared out.
    starts = np.arange(inside[0], inside[-1] + 1, max(1, -(-inside.size // _DENSITY_BINS)))
    end = inside[-1] + 1
    bounds = np.append(edges[starts], edges[end])

    def density(masses: np.ndarray) -> np.ndarray:
        return np.add.reduceat(masses[:end], starts) / np.diff(bounds)

    ax.stairs(density(target), bounds, fill=True, color=TARGET, linewidth=0)
    for style, q in models.items():
        ax.stairs(density(q), bounds, baseline=None, **_line(style))
    _limit_height(ax, density(target), [density(q) for q in models.values()])
    ax.set_xlim(low, high)


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Edges of the bins that sorted numbers stand for: half-way between neighbours."""
    if numbers.size == 1:
        return np.array([numbers[0] - 0.5, numbers[0] + 0.5])
    middle = (numbers[1:] + numbers[:-1]) / 2
    return np.concatenate([[2 * numbers[0] - middle[0]], middle, [2 * numbers[-1] - middle[-1]]])


def _limit_height(ax: Axes, target: np.ndarray, models: Sequence[np.ndarray]) -> None:
    """Cuts off what towers over the target, but for the last model, so that the rest can be seen."""
    heights = [float(q.max()) for q in models]
    wanted = max([float(target.max()), *heights[-1:]])
    ax.set_ylim(0, 1.12 * max(wanted, min(max(heights, default=0.0), 1.6 * wanted)))


def _draw_bars(ax: Axes, panel: Panel) -> None:
    if panel.kind == "text":
        order = np.argsort(-panel.target, kind="stable")[:_MAX_BARS]
        centres, target = np.arange(order.size, dtype=np.float64), panel.target[order]
        models = {style: q[order] for style, q in panel.models.items()}
        _label_bars(ax, [panel.values[i] for i in order])
    else:
        centres, target, models = _sorted(panel)
        ax.set_xlim(*_shown_range(centres, target, panel.kind))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    width = 0.8 * float(np.diff(centres).min()) if centres.size > 1 else 0.8
    ax.bar(centres, target, width, color=TARGET, linewidth=0)
    for style, q in models.items():
        ax.plot(centres, q, **_dot(style))
    _limit_height(ax, target, list(models.values()))
