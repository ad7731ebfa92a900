"""The report: whole, self-contained, safe with any text, and its plots show the masses they are given."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cft_jax.distributions import OutputSpace, SpaceSettings, Task, build_splits, task_from_spec
from cft_jax.evaluate.report import plots
from cft_jax.evaluate.report.page import render_page, write_report
from cft_jax.evaluate.report.panels import Panel, choose_panels
from cft_jax.evaluate.report.runs import STAGES, Run, Training, read_training
from cft_jax.evaluate.report.tables import number, percent
from cft_jax.evaluate.results import Results
from cft_jax.evaluate.suites.structured.plan import Resolution
from cft_jax.evaluate.suites.structured.settings import StructuredSettings
from cft_jax.evaluate.suites.structured.suite import run_structured

SETTINGS = StructuredSettings(
    Resolution(SpaceSettings(num_decimals=1, max_bins=61), 0.0, 1e-8), 50, (11,), 8, 1.0, 1.0, 1
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(HTMLParser):
    """Every tag is closed in order, and nothing is fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith("#"), (tag, name, value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, character_model, character_codec):
    """A run's directory, with a faulty model before and a good one after."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    splits = build_splits(
        train_families=("gaussian", "binomial", "exponential"),
        heldout_families=("poisson", "cauchy"),
        unseen="inside",
        grid_points=2,
        max_prompts_per_split=4,
    )
    tasks = [task_from_spec(spec) for name in ("test_unseen_params", "test_ood_family") for spec in splits[name]]
    space = OutputSpace(("<b>a & b</b>", "$1 and $2", "ätsch"), np.array([0.5, 0.3, 0.2]))
    prompt = ({"role": "user", "content": "Pick <script>alert(1)</script> one of \\1"},)
    tasks.append(Task("test_unseen_params", "custom", "custom_1", prompt, space=space))
    spaces = {tuple(character_codec.encode(t.messages)): t.output_space(SETTINGS.resolution.grid) for t in tasks}
    for stage, off in (("before", 0.9), ("after", 0.05)):
        model = character_model(spaces, off=off, tilt=0.0)
        path = directory / "eval/structured" / stage
        run_structured(model, character_codec, tasks, SETTINGS, Results(path, stage, write=True))
    rows = [{"step": 10 * k, "loss": 5.0 / k} for k in range(1, 90)] + [{"step": 900, "loss": None}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.json").write_text(json.dumps({"config": {"model": {"checkpoint": "org/<model>"}}}))
    return directory


def test_the_page_is_whole(workdir):
    page = checked(write_report(workdir).read_text(encoding="utf-8"))
    text = " ".join(page.text)
    prompts = len(read_training(workdir)[0][0].records)
    # Distributions, curves, and an outline of every prompt but the one of texts.
    assert page.tags.count("svg") == 6 + 3 + prompts - 1
    assert "org/<model>" in text
    for heading in ("What the model would answer", "Metrics", "By family", "Calibration and training"):
        assert heading in text
    # Exact metrics of the two models: a share `off` of the mass is off the support.
    assert re.search(r"total variation\s+0\.900\s+→\s+0\.0500", text)
    assert "5.00 %" not in text and "95.0 %" in text
    assert "script" not in page.tags and "alert(1)" in text
    assert "url(http" not in page.rawdata


def test_the_same_data_give_the_same_bytes(workdir):
    assert render_page(*read_training(workdir)) == render_page(*read_training(workdir))


@pytest.mark.parametrize("stages", [(), ("before",), ("after",)])
def test_missing_stages(workdir, stages):
    runs, training = read_training(workdir)
    part = Training("part", training.metrics[:1], {})
    text = " ".join(checked(render_page([run for run in runs if run.name in stages], part)).text)
    assert ("No evaluation has finished" in text) == (not stages)
    assert "NaN" not in text and "None" not in text


NAME = """<script>alert("&'")</script>"""


def test_names_out_of_files_stay_text():
    """Whatever a summary, a record or a configuration calls its parts, the page has them as text."""
    sampled = {"num_prompts": 1, "sampled": {"valid_rate": 0.5}, "exact": {"total_variation": 0.5}}
    split = sampled | {"left_out": {NAME: {NAME: 1}}, "lenient_parses": {NAME: 2}, "families": {NAME: sampled}}
    curve = {"target": [1.0], "model": [0.5], "cumulative_p10": [0.5], "cumulative_p90": [0.5]}
    shown = {"title": NAME, "parameters": {NAME: 1.0}, "kind": "text", "values": [NAME], "target": [1], "model": [1]}
    record = {"split": NAME, "task_id": NAME, "group": NAME, "distribution": shown}
    head = {"checkpoint": NAME, "fingerprint": NAME, "settings": {NAME: NAME}}
    lm_eval = {"tasks": {NAME: {"acc": 0.5}}, "higher_is_better": {NAME: {"acc": True}}}
    summaries = [
        {"suite": "structured", "splits": {NAME: split | {"calibration": curve}}},
        {"suite": "retention", "lm_eval": lm_eval},
        {"suite": "perplexity", "slices": {NAME: {"covering": {"bits_per_byte": 1.0}}}},
        {"suite": "noveltybench", "missing": NAME},
        {"suite": NAME, NAME: 1.0},
    ]
    runs = [Run(f"{NAME} {style}", head | s, [record], style) for style in (0, 1) for s in summaries]
    config = {"config": {NAME: NAME, "model": {"checkpoint": NAME}}, "revision": NAME, "devices": NAME}
    for page in (render_page(runs), render_page(runs[:5]), render_page(runs, Training(NAME, [], config))):
        checker = checked(page)
        assert "script" not in checker.tags
        for section in ("What the model would answer", "By family", "Calibration", "All suites", "What was left out"):
            assert section in " ".join(checker.text)


def test_an_empty_directory_has_a_page(tmp_path):
    checked(write_report(tmp_path).read_text(encoding="utf-8"))


def test_panels_show_every_family_once_and_custom_first(workdir):
    runs, _ = read_training(workdir)
    chosen = choose_panels(runs, ["test_unseen_params", "test_ood_family"], 10)
    titles = [panel.title for _, panel in chosen]
    assert titles[0].startswith("Pick <script>")
    assert sorted(titles[1:]) == ["Binomial", "Cauchy", "Exponential", "Gaussian", "Poisson"]
    assert len(choose_panels(runs, ["test_unseen_params", "test_ood_family"], 3)) == 3
    gaussian = next(panel for _, panel in chosen if panel.title == "Gaussian")
    assert gaussian.subtitle.startswith("μ = ") and gaussian.kind == "continuous"
    assert list(gaussian.models) == [0, 1]
    assert gaussian.models[0].sum() == pytest.approx(0.1, abs=1e-4)


def panel(kind, values, target, **models):
    arrays = {STAGES.index(name): np.array(q) for name, q in models.items()}
    return Panel("Title", "", kind, tuple(map(str, values)), np.array(target), arrays)


def drawn(shown):
    _, (ax,) = plots.new_figure(3.0, 2.0, 1, 1)
    plots.draw_probabilities(ax, shown)
    return ax


def test_densities_hold_the_mass():
    numbers = np.round(np.arange(-3, 3.05, 0.1), 1)
    target = np.exp(-(numbers**2) / 2)
    target /= target.sum()
    ax = drawn(panel("continuous", numbers, target, after=0.5 * target))
    areas = [float(patch.get_data().values @ np.diff(patch.get_data().edges)) for patch in ax.patches]
    assert areas == [pytest.approx(1), pytest.approx(0.5)]


def test_density_of_uneven_bins_is_mass_by_width():
    # Values 0, 1, 3: bins [-0.5, 0.5], [0.5, 2], [2, 4].
    ax = drawn(panel("continuous", [3, 0, 1], [0.4, 0.3, 0.3]))
    data = ax.patches[0].get_data()
    assert data.edges.tolist() == [-0.5, 0.5, 2, 4]
    assert data.values == pytest.approx([0.3, 0.2, 0.2])


def test_bars_and_dots():
    ax = drawn(panel("discrete", [0, 1, 2], [0.2, 0.5, 0.3], before=[0.9, 0.0, 0.0], after=[0.1, 0.6, 0.2]))
    assert [bar.get_height() for bar in ax.patches] == [0.2, 0.5, 0.3]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.9, 0.0, 0.0], [0.1, 0.6, 0.2]]
    # The tower before training is cut off, what matters is not.
    assert 0.6 < ax.get_ylim()[1] < 1.2


def test_cumulative_ends_at_the_mass_on_the_values():
    _, (ax,) = plots.new_figure(3.0, 2.0, 1, 1)
    plots.draw_cumulative(ax, panel("discrete", [2, 0, 1], [0.3, 0.2, 0.5], after=[0.1, 0.3, 0.2]))
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0, 0.3, 0.5, 0.6, 0.6])


def test_heavy_tails_do_not_hide_the_middle():
    numbers = np.linspace(-300, 300, 1001)
    target = 1 / (1 + numbers**2)
    low, high = drawn(panel("continuous", numbers, target / target.sum())).get_xlim()
    assert -80 < low < -10 and 10 < high < 80


def test_degenerate_and_long_panels_draw():
    plots.svg(plots.panel_figure(panel("continuous", [1.5], [1.0], after=[0.5])), "one", "one value")
    many = np.full(500, 1 / 500)
    plots.svg(plots.panel_figure(panel("discrete", range(500), many, before=many, after=many)), "many", "many values")


def test_gallery_is_a_png(workdir):
    panels = [panel for _, panel in choose_panels(read_training(workdir)[0], ["test_unseen_params"], 4)]
    assert plots.png(plots.gallery_figure(panels, 3), 40).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (0.99962, "1.00"), (0.0302, "0.0302"), (12.345, "12.3"), (1234.5, "1,234"),
        (1.234e7, "1.2·10⁷"), (0.00012, "1.2·10⁻⁴"), (-0.5, "-0.500"), (9.999e-4, "0.00100"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0, "0 %"), (1, "100 %"), (0.9712, "97.1 %")])
def test_percents(value, text):
    assert percent(value) == text
