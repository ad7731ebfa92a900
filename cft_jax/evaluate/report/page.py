"""`report.html`: one self-contained page about evaluations of any number of models."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from cft_jax.common.files import write_atomically
from cft_jax.evaluate.report.runs import Run, Training, read_training
from cft_jax.evaluate.report.tables import split_title

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("cft_jax.evaluate.report"),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters["split_title"] = split_title


def write_report(workdir: Path) -> Path:
    """Writes `report.html` of a run of the main job from what its directory holds by now; returns its path.

    Raises:
      UserError: one of the files is damaged.
    """
    path = workdir / "report.html"
    write_atomically(path, render_page(*read_training(workdir)))
    return path


def render_page(runs: Sequence[Run], training: Training | None = None) -> str:
    """The page of runs, or of a run of the main job and its stages; the same runs give the same bytes.

    The runs are columns in this order; the first is the base of all differences.
    """
    # Here, since it takes a second to import matplotlib, and most processes that import this module draw nothing.
    from cft_jax.evaluate.report.sections import page_sections

    return TEMPLATES.get_template("page.html").render(page_sections(runs, training))
