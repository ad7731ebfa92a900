"""Tables and numbers of the report, as HTML. Pure."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

Stages = Mapping[str, Mapping[str, Any]]
"""Figures of a split (or of a family) by stage, `before` and `after`; either may be missing."""

_TITLES = {
    "test_unseen_params": "Unseen parameters",
    "test_ood_family": "Unseen families",
    "train": "Training prompts",
}
_BLANK = '<th class="group"></th>'
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Section, name, heading and whether it is a share, of the columns that compare before and after.
_COLUMNS = (
    ("exact", "kl", "exact KL, nats", False),
    ("exact", "total_variation", "total variation", False),
    ("exact", "wasserstein_1", "Wasserstein-1", False),
    ("sampled", "valid_rate", "valid", True),
)
# Name, heading, and for rates what a perfect sampler gets.
_SAMPLED = (
    ("valid_rate", "valid answers", 1.0),
    ("support_violation_rate", "outside the support", 0.0),
    ("mean_error", "error of the mean", None),
    ("variance_error", "error of the variance", None),
    ("wasserstein_1", "Wasserstein-1", None),
)
_TESTS = (
    ("ks_randomised", "Kolmogorov–Smirnov, ties randomised"),
    ("anderson_darling", "Anderson–Darling, requested parameters"),
    ("chi_square_pooled", "chi-square, cells pooled"),
    ("paper_ks", "paper: Kolmogorov–Smirnov"),
    ("paper_chi_square", "paper: chi-square, cells not pooled"),
    ("paper_anderson", "paper: Anderson–Darling, fitted parameters"),
)


def split_title(split: str) -> str:
    """A split's name for readers."""
    return _TITLES.get(split, split)


def number(value: float | int | None) -> str:
    """Three significant digits; powers of ten where they are many; counts whole; a dash for what does not exist."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    magnitude = int(exponent)
    if magnitude >= 5 or magnitude < -3:
        return f"{float(mantissa):.1f}·10{str(magnitude).translate(_SUPERSCRIPTS)}"
    return f"{value:,.{max(0, 2 - magnitude)}f}"


def percent(value: float | int | None) -> str:
    """A share in percent, with a decimal where it is not near whole."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if 0 < value < 1 else f"{100 * value:.0f} %"


def total_variation(figures: Mapping[str, Any]) -> float | None:
    """The total variation of a prompt's record, of a family or of a split."""
    return _figure(figures, "exact", "total_variation")


def cards(stages: Stages, title: str) -> str:
    """The headline figures of a split: large what is now, small what was."""
    return (
        '<div class="cards">'
        f"{_card(stages, 'exact', 'kl', f'Exact KL, {title.lower()}', number, ' nats')}"
        f"{_card(stages, 'exact', 'total_variation', 'Total variation', number, '')}"
        f"{_card(stages, 'sampled', 'valid_rate', 'Valid answers', percent, '')}"
        f"{_card(stages, 'exact_scaled', 'wasserstein_1_over_iqr', 'Wasserstein-1 / IQR', number, '')}"
        "</div>"
    )


def split_table(splits: Mapping[str, Stages]) -> str:
    """Before and after of every split."""
    rows = "".join(
        f"<tr><td>{html.escape(split_title(split))}</td><td>{_prompts(stages)}</td>{_pairs(stages)}</tr>"
        for split, stages in splits.items()
    )
    return _pair_table("", rows, "")


def families_table(splits: Mapping[str, Stages]) -> str:
    """Before and after of every family in every split, with bars of the total variation."""
    rows = []
    for split, stages in splits.items():
        rows.append(f'<tr class="head"><td colspan="11">{html.escape(split_title(split))}</td></tr>')
        for family in dict.fromkeys(name for figures in stages.values() for name in figures["families"]):
            of_family = {
                s: figures["families"][family] for s, figures in stages.items() if family in figures["families"]
            }
            rows.append(
                f"<tr><td>{html.escape(family.replace('_', ' '))}</td><td>{_prompts(of_family)}</td>"
                f"{_pairs(of_family)}<td>{_bar(of_family)}</td></tr>"
            )
    return _pair_table("family", "".join(rows), "total variation, 0 to 1")


def sampled_table(title: str, stages: Stages) -> str:
    """The sampled figures of a split with their intervals and an ideal sampler's; empty without samples."""
    rows = ""
    for name, heading, perfect in _SAMPLED:
        show = number if perfect is None else percent
        cells = [_with_interval(figures, name, show) for figures in stages.values()]
        if all(cell is None for cell in cells):
            continue
        medians = [figures.get("medians", {}).get("sampled", {}).get(name) for figures in stages.values()]
        ideals = [figures.get("ideal", {}).get(name, perfect) for figures in stages.values()]
        rows += f"<tr><td>{heading}</td>"
        rows += "".join(f'<td class="{stage[0]}">{cell or "–"}</td>' for stage, cell in zip(stages, cells, strict=True))
        rows += "".join(f"<td>{show(median)}</td>" for median in medians)
        rows += f"<td>{show(ideals[-1])}</td></tr>"
    if not rows:
        return ""
    heads = "".join(f"<th>{stage}</th>" for stage in stages)
    medians = "".join(f"<th>median {stage}</th>" for stage in stages)
    return _table(f"<th>{html.escape(title)}</th>{heads}{medians}<th>ideal sampler</th>", rows)


def tests_table(splits: Mapping[str, Stages]) -> str:
    """How often each test of goodness of fit rejects; empty where nothing was tested."""
    rows = ""
    for name, heading in _TESTS:
        cells = [figures["tests"].get(name) for stages in splits.values() for figures in stages.values()]
        if any(cell is not None for cell in cells):
            shown = "".join(f"<td>{percent(cell and cell['rejected_at_5pct'])}</td>" for cell in cells)
            rows += f"<tr><td>{heading}</td>{shown}</tr>"
    if not rows:
        return ""
    groups = "".join(
        f'<th class="group" colspan="{len(stages)}">{html.escape(title)}</th>' for title, stages in splits.items()
    )
    heads = "".join(f'<th class="{stage[0]}">{stage}</th>' for stages in splits.values() for stage in stages)
    note = (
        '<p class="note" style="margin-top:1.4rem">Share of prompts whose samples a test rejects at the 5 % level: a '
        "perfect sampler is rejected in 5 %. The paper's own tests, for comparison, are not exact.</p>"
    )
    return note + _table(f"{_BLANK}{groups}</tr><tr><th>test</th>{heads}", rows)


def config_table(run: Mapping[str, Any]) -> str:
    """The run's configuration, versions and devices, a line each."""
    flat = {
        **_flat(run.get("config", {}), ""),
        **_flat(run.get("versions", {}), "version of "),
        **{name: run[name] for name in ("revision", "devices") if name in run},
    }
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td><code>{html.escape(_shown(value))}</code></td></tr>"
        for name, value in flat.items()
    )
    return f"<table>{rows}</table>" if rows else "<p class='note'>Not recorded.</p>"


def definitions() -> str:
    """What the figures mean, as a list."""
    entries = (
        (
            "Exact KL",
            "Σ p ln(p/q) in nats, from the target p to the model q over the listed answers; terminator included.",
        ),
        (
            "Total variation",
            "½(Σ|p − q| + 1 − Σq): the share of probability in the wrong place, impossible answers included.",
        ),
        ("Mass on the support", "Σq: the probability that the model gives any of the listed answers."),
        (
            "Wasserstein-1",
            "How far probability has to travel on the number line: exactly between p and q/Σq, or from samples.",
        ),
        (
            "Full resolution",
            "Where every string of the given decimals counts, KL is over strings; other exact figures are over cells, "
            "sets of strings with a common beginning: total variation and mass are then bounds, from below and above.",
        ),
        ("Path KL", "The paper's estimate: four drawn answers per prompt, mean over their steps."),
        (
            "Valid",
            "The share of sampled answers that the paper's parser reads as a number (or as one of the listed answers).",
        ),
        (
            "IQR",
            "The target's interquartile range, a scale every family has; other errors are in the values' own units.",
        ),
        ("Averages", "Families weigh alike, however many prompts they have."),
    )
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in entries) + "</dl>"


def _card(stages: Stages, section: str, name: str, heading: str, show: Any, unit: str) -> str:
    now = _figure(stages.get("after") or stages.get("before") or {}, section, name)
    if now is None:
        return ""
    was = _figure(stages.get("before", {}), section, name) if "after" in stages else None
    line = f'<div class="from">from {show(was)}{_change(was, now)}</div>' if was is not None else ""
    return (
        f'<div class="card"><div class="name">{html.escape(heading)}</div>'
        f'<div class="value">{show(now)}<small>{unit}</small></div>{line}</div>'
    )


def _change(was: float, now: float) -> str:
    """How much of an error is gone; only said where most of it is."""
    if was <= 0 or now > 0.5 * was:
        return ""
    return f' <span class="change">(−{100 * (1 - now / was):.{1 if now < 0.1 * was else 0}f} %)</span>'


def _figure(figures: Mapping[str, Any], section: str, name: str) -> float | None:
    """A figure; of a space too large to list the one over its cells, where there is none over strings."""
    cells = figures.get(section.replace("exact", "exact_cells"), {}).get(name)
    return figures.get(section, {}).get(name, cells)


def _prompts(stages: Stages) -> str:
    return f"{max(figures['num_prompts'] for figures in stages.values()):,}"


def _pair_table(first: str, rows: str, last: str) -> str:
    """A table whose columns come in pairs, before and after, under a common heading."""
    groups = "".join(f'<th class="group" colspan="2">{heading}</th>' for _, _, heading, _ in _COLUMNS)
    heads = '<th class="b">before</th><th class="a">after</th>' * len(_COLUMNS)
    tail = f"<th>{last}</th>" if last else ""
    span = _BLANK if last else ""
    return _table(f"{_BLANK}{_BLANK}{groups}{span}</tr><tr><th>{first}</th><th>prompts</th>{heads}{tail}", rows)


def _pairs(stages: Stages) -> str:
    cells = ""
    for section, name, _, is_share in _COLUMNS:
        show = percent if is_share else number
        for stage in ("before", "after"):
            cells += f'<td class="{stage[0]}">{show(_figure(stages.get(stage, {}), section, name))}</td>'
    return cells


def _bar(stages: Stages) -> str:
    found = ((stage, _figure(figures, "exact", "total_variation")) for stage, figures in stages.items())
    inner = "".join(f'<i class="{stage[0]}" style="width:{100 * v:.1f}%"></i>' for stage, v in found if v is not None)
    return f'<span class="bar">{inner}</span>'


def _with_interval(figures: Mapping[str, Any], name: str, show: Any) -> str | None:
    value = _figure(figures, "sampled", name)
    if value is None:
        return None
    interval = figures.get("intervals", {}).get(name)
    return show(value) + (f" <small>[{show(interval[0])}, {show(interval[1])}]</small>" if interval else "")


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
