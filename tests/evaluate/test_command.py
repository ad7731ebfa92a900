"""The evaluate command on what the main job leaves: its newest checkpoint and its export, by both backends."""

from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.evaluate.__main__ import run

EVAL = Path(__file__).parents[2] / "configs" / "eval" / "structured.py"
FEW = ("eval.max_prompts_per_split=2", "eval.num_samples=200", "eval.max_new_tokens=8")
pytestmark = pytest.mark.usefixtures("program_cache")


@pytest.fixture
def trained(tiny_run):
    """The directory of a finished run."""
    return tiny_run[0]


@pytest.mark.slow
def test_checkpoint_export_and_both_backends_agree(trained, configured, tmp_path):
    of_run = configured(f"{EVAL}:{trained}", *FEW)
    assert of_run.data.num_decimals == 1 and of_run.model.checkpoint == str(trained)
    export = f"model.checkpoint={trained / 'export'}"
    configs = {
        "checkpoint": of_run,
        "export": configured(f"{EVAL}:{trained}", *FEW, export),
        "transformers": configured(f"{EVAL}:{trained}", *FEW, "backend=hf"),
    }
    summaries = {name: run(config, tmp_path / name) for name, config in configs.items()}
    expected = summaries["checkpoint"]["splits"]
    assert set(expected) == {"test_unseen_params", "test_ood_family"}
    for name, summary in summaries.items():
        for split, figures in summary["splits"].items():
            # The two backends compute in float32, in different orders.
            assert figures["exact"] == pytest.approx(expected[split]["exact"], abs=1e-4), name
            low, high = expected[split]["intervals"]["valid_rate"]
            assert low - 0.1 <= figures["sampled"]["valid_rate"] <= high + 0.1
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"config.json", "summary.json", "per_prompt.csv", "samples.jsonl.gz", "report.html"} <= files
    # Equal weights give equal text: the sampler does not care where they came from.
    same = [(tmp_path / name / "samples.jsonl.gz").read_bytes() for name in ("checkpoint", "export")]
    assert same[0] == same[1]


def test_a_workdir_of_other_settings_is_refused(trained, configured, tmp_path):
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run(configured(f"{EVAL}:{trained}", *FEW), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_what_cannot_be_measured(trained, configured, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        run(configured(EVAL, "model.checkpoint=/no/where"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"model\.checkpoint is empty"):
        run(configured(EVAL), tmp_path / "new")


def test_a_config_argument_that_is_no_run_is_one_line(command, tmp_path):
    code, _, errors = command("evaluate", f"--config={EVAL}:{tmp_path}")
    assert code == 2
    assert errors.strip().splitlines()[-1].endswith("holds no config.json; it is not the directory of a run")
    assert "Traceback" not in errors
