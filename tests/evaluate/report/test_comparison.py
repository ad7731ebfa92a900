"""The comparison page: every run in its place, differences to the first, and clear errors."""

import json
import subprocess
import sys

import pytest

from cft_jax.common.errors import UserError
from cft_jax.distributions import SpaceSettings, build_splits, task_from_spec
from cft_jax.evaluate.report.page import render_page
from cft_jax.evaluate.report.runs import Run, read_runs
from cft_jax.evaluate.results import Results
from cft_jax.evaluate.suites.structured.plan import Resolution
from cft_jax.evaluate.suites.structured.settings import StructuredSettings
from cft_jax.evaluate.suites.structured.suite import run_structured

SETTINGS = StructuredSettings(
    Resolution(SpaceSettings(num_decimals=1, max_bins=61), 0.0, 1e-8), 50, (11,), 8, 1.0, 1.0, 1
)


@pytest.fixture(scope="module")
def root(tmp_path_factory, character_model, character_codec):
    """Evaluations of three models, the last two under a run of the main job."""
    root = tmp_path_factory.mktemp("evaluations")
    specs = build_splits(train_families=("gaussian", "binomial"), unseen="inside", grid_points=2)["test_unseen_params"]
    tasks = [task_from_spec(spec) for spec in specs]
    spaces = {tuple(character_codec.encode(t.messages)): t.output_space(SETTINGS.resolution.grid) for t in tasks}
    for name, off in (("base<1>", 0.8), ("soft/eval/structured/before", 0.8), ("soft/eval/structured/after", 0.1)):
        model = character_model(spaces, off=off, tilt=0.0)
        run_structured(model, character_codec, tasks, SETTINGS, Results(root / name, name, write=True))
    return root


def test_runs_of_the_main_job_come_with_both_stages(root):
    runs = read_runs([root / "base<1>", root / "soft"])
    assert [run.name for run in runs] == ["base<1>", "soft before", "soft after"]
    assert [run.name for run in read_runs([root / "soft/eval/structured/after"])] == ["soft after"]
    again = read_runs([root / "base<1>", root / "base<1>"])
    assert [run.name for run in again] == ["base<1> (1)", "base<1> (2)"]


def test_metrics_and_differences(root):
    page = render_page(read_runs([root / "base<1>", root / "soft/eval/structured/after"]))
    row = page[page.index("<td>total variation</td>") :].partition("</tr>")[0]
    # A share `off` of the mass is off the support: 0.8 and 0.1.
    assert "0.800" in row and "<b>0.100</b>" in row and "−0.700" in row
    assert "base&lt;1&gt;" in page and "base<1>" not in page
    # Two plots of the runs and one of their differences; the gallery's outlines aside.
    assert page.count("<svg") - page.count('<svg class="outline"') == 2 + 1
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page == render_page(read_runs([root / "base<1>", root / "soft/eval/structured/after"]))


def test_one_run_and_other_suites(root, tmp_path):
    assert "differences to" not in render_page(read_runs([root / "base<1>"]))
    (tmp_path / "summary.json").write_text(json.dumps({"suite": "mcq", "parse_rate": 0.75, "more": {"x": 0.25}}))
    page = render_page(read_runs([root / "base<1>", tmp_path]))
    assert "more x" in page and "75.0 %" in page and "not run" in page


def test_only_runs_measured_alike_have_a_best():
    def mcq(style, name, num_samples, parse_rate, **settings):
        settings = {"num_samples": num_samples, "seeds": [11], **settings}
        return Run(name, {"suite": "mcq", "settings": settings, "parse_rate": parse_rate}, (), style)

    few, fewer_right, many = mcq(0, "a<b", 100, 0.75), mcq(1, "c", 100, 0.5), mcq(2, "d", 1000, 0.875)
    page = render_page([few, fewer_right, many])
    row = page[page.index("<td>parsed</td>") :].partition("</tr>")[0]
    # Of the two that were asked alike the better one; the third has nobody to be better than.
    assert "<b>75.0 %</b>" in row and row.count("<b>") == 1 and "+12.5 points" in row
    assert "num_samples is 100 (a&lt;b, c), 1000 (d). The best is bold only among those that were." in page
    assert "seeds" not in page.partition("Every metric")[0]
    # An older summary says less, which is not the same.
    assert "tau is not recorded (a&lt;b), 1 (e)" in render_page([few, mcq(1, "e", 100, 0.75, tau=1)])
    assert "measured alike" not in render_page([few, fewer_right])


def test_other_prompts_are_other_conditions():
    def structured(style, name, *prompts):
        metrics = {"num_prompts": len(prompts), "exact": {"kl": 1.0 + style}}
        summary = {"suite": "structured", "protocol": "independent", "splits": {"train": metrics}}
        records = [{"split": "train", "task_id": prompt, "group": "custom"} for prompt in prompts]
        return Run(name, summary, records, style)

    alike = [structured(0, "a", "x", "y"), structured(1, "b", "y", "x")]
    for runs, best in ((alike, 1), ([alike[0], structured(1, "b", "x", "z")], 0)):
        page = render_page(runs)
        row = page[page.index("<td>exact KL, nats</td>") :].partition("</tr>")[0]
        assert row.count("<b>") == best and ("list of prompts is " in page) == (not best)
        # Nor do the headlines speak of progress then.
        assert page.count("from 1.00") == best


def test_what_is_no_evaluation(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(UserError, match="no finished evaluation"):
        read_runs([tmp_path])
    for content in ("{", "[]", "{}"):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(UserError, match=r"summary\.json"):
            read_runs([tmp_path])


@pytest.mark.slow
def test_the_command(root, tmp_path):
    command = [sys.executable, "-m", "cft_jax.compare"]
    output = tmp_path / "new/page.html"
    subprocess.run([*command, f"--output={output}", str(root / "soft")], check=True, capture_output=True)
    assert "soft after" in output.read_text(encoding="utf-8")
    failed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert failed.returncode == 2 and "--output" in failed.stderr and "Traceback" not in failed.stderr
