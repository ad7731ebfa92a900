"""Several suites at once: each in its directory, one table, missing ones named; comparisons of such runs."""

import json
import shutil
from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.evaluate.__main__ import run
from cft_jax.evaluate.report.overview import all_summary, headline_metrics
from cft_jax.evaluate.report.page import render_page
from cft_jax.evaluate.report.runs import Run, read_runs
from cft_jax.evaluate.suites.registry import SUITES
from cft_jax.main import run as train

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
LITTLE = (
    "model.dtype=float32",
    "model.local_files_only=True",
    "eval.max_prompts_per_split=2",
    "eval.num_samples=5",
    "eval.max_new_tokens=4",
    "suite.open_random.num_samples=5",
    "suite.questions.num_questions=14",
    "suite.open_random.max_new_tokens=4",
    "suite.mcq.max_new_tokens=4",
    "data.max_bins=31",
    "data.train_families=binomial",
    "data.heldout_families=poisson",
)


@pytest.fixture(scope="module")
def measured(small_checkpoint, configured, program_cache, tmp_path_factory):
    """An evaluation of all suites, of which no data set is at hand for three, and a copy of it."""
    root = tmp_path_factory.mktemp("all")
    run(configured(CONFIGS / "eval/all.py", f"model.checkpoint={small_checkpoint}", *LITTLE), root / "base")
    shutil.copytree(root / "base", root / "soft")
    return root


@pytest.mark.slow
def test_those_that_lack_something_are_named(measured):
    summary = json.loads((measured / "base/summary.json").read_text())
    assert summary["suite"] == "all" and set(summary["suites"]) == set(SUITES)
    there = {name for name, found in summary["suites"].items() if "figures" in found}
    assert there == {"structured", "open_random", "mcq", "questions"}
    for name in set(SUITES) - there:
        assert not (measured / "base" / name / "summary.json").exists()
    assert "suite.perplexity.data" in summary["suites"]["perplexity"]["missing"]
    assert "suite.noveltybench.data" in summary["suites"]["noveltybench"]["missing"]
    for name in there:
        whole = json.loads((measured / "base" / name / "summary.json").read_text())
        assert summary["suites"][name]["figures"] == headline_metrics(whole) != {}
    page = (measured / "base/report.html").read_text(encoding="utf-8")
    assert "suite.perplexity.data" in page and "unique answers" in page and "missing" in page


@pytest.mark.slow
def test_compared(measured):
    page = render_page(read_runs([measured / "base", measured / "soft"]))
    table = page[page.index("All suites") :].partition("</table>")[0]
    assert table.count('<tr class="head">') == 7 and table.count(">missing</td>") == 6
    assert table.count(">base</th>") == table.count(">soft</th>") == 1
    # A reason is given once, for both.
    assert page.count("config.suite.perplexity.data is empty") == 1 and "(base, soft)" in page
    # The same weights twice: no differences anywhere.
    assert "±0" in page and "+" not in "".join(page[page.index("<body>") :].split("±")[1:3])
    assert page == render_page(read_runs([measured / "base", measured / "soft"]))
    # Directories of single suites make the same rows.
    single = render_page(read_runs([measured / "base/open_random", measured / "soft/open_random"]))
    assert "unique answers" in single and "All suites" not in single and single.count("<svg") == 1


def test_a_table_without_a_model_by_hand():
    summaries = {
        "mcq": {"suite": "mcq", "tv_distance_from_uniform": 0.25, "parse_rate": True},
        "perplexity": {"suite": "perplexity", "missing": "no data"},
    }
    assert all_summary(summaries, checkpoint="x")["suites"] == {
        "mcq": {"figures": {"total variation": 0.25}},
        "perplexity": {"missing": "no data"},
    }


def test_tasks_of_lm_eval_have_rows_too():
    def run_of(name, style, **tasks):
        better = {"arc": {"acc": True, "alias": None}, "wiki": {"bits": False}}
        section = {"version": "0", "tasks": tasks, "higher_is_better": better}
        summary = {"suite": "retention", "settings": {"tasks": ["arc", "wiki"]}, "lm_eval": section}
        return [Run(name, summary, (), style), Run(name, {"suite": "mcq", "missing": "no prompt"}, (), style)]

    base = run_of("base", 0, arc={"acc,none": 0.5, "acc_stderr,none": 0.1}, wiki={"bits,none": 2.0})
    soft = run_of("soft", 1, arc={"acc,none": 0.25, "acc_stderr,none": 0.1})
    assert headline_metrics(base[0].summary) == {"arc, acc": 0.5, "wiki, bits": 2.0}
    page = render_page([*base, *soft])
    table = page[page.index("All suites") :].partition("</table>")[0]
    assert "<td>arc, acc</td><td><b>50.0 %</b></td><td>25.0 %<br><small>−25.0 points</small></td>" in table
    assert "wiki, bits" in table and "stderr" not in table and "TinyBenchmarks" not in page
    # The section of the suite has the rows again, and bars of what is a share.
    assert page.count("<td>arc, acc</td>") == 2 and page.count("<svg") == 1


@pytest.mark.slow
def test_the_main_job_runs_other_suites(configured, program_cache, tmp_path):
    few = ("train.max_steps=1", "eval.num_samples=3", "suite.mcq.max_new_tokens=4", "export.enabled=False")
    summary = train(configured(TINY, *few, "eval.suites=mcq"), tmp_path / "run")
    for stage in ("before", "after"):
        found = json.loads((tmp_path / f"run/eval/mcq/{stage}/summary.json").read_text())
        assert summary["evaluations"]["mcq"][stage]["parse_rate"] == found["parse_rate"] == 0
    assert [run.name for run in read_runs([tmp_path / "run"])] == ["run before", "run after"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "Multiple choice" in page
    with pytest.raises(UserError, match=r"suite\.perplexity\.data"):
        train(configured(TINY, *few, "eval.suites=mcq,perplexity"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
