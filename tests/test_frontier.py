"""The frontier between calibration and what is kept: strength 0 is the base, and a repetition finds the same points."""

import json
from pathlib import Path

import pytest

from cft_jax.common.errors import UserError
from cft_jax.jobs import frontier
from cft_jax.main import run

TINY = Path(__file__).parent / "configs" / "tiny.py"
ADAPTERS = ("model.scratch.enabled=False", "model.lora.enabled=True", "train.max_steps=3", "eval.enabled=False")


@pytest.mark.slow
def test_strength_0_is_the_base_and_points_are_found_again(tiny_run, configured, tmp_path):
    base, _ = tiny_run
    workdir, output = tmp_path / "run", tmp_path / "frontier"
    # Its own samples are several to an answer, of which nothing exact can be measured.
    asked = ("suite.questions.num_questions=14", "eval.numbers_per_completion=2")
    config = configured(TINY, *ADAPTERS, f"model.checkpoint={base / 'base'}", *asked)
    run(config, workdir)
    frontier.start(str(workdir), [0.0, 1.0], str(output))
    points = json.loads((output / "frontier.json").read_text())["points"]
    assert [point["strength"] for point in points] == [0.0, 1.0]
    before = json.loads((base / "eval" / "structured" / "before" / "summary.json").read_text())["splits"]
    for split, metrics in points[0]["splits"].items():
        assert metrics["kl"] == pytest.approx(before[split]["exact"]["kl"], abs=1e-5)
        assert metrics["kl"] != pytest.approx(points[1]["splits"][split]["kl"], abs=1e-3)
    assert set(points[0]["halves"]) == {"kept", "others"}
    assert (output / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    frontier.start(str(workdir), [1.0], str(output))
    assert json.loads((output / "frontier.json").read_text())["points"] == points[1:]


def test_a_run_without_adapters_has_no_strength(tiny_run, tmp_path):
    with pytest.raises(UserError, match="is of a run without adapters, whose strength cannot be set"):
        frontier.start(str(tiny_run[0]), [1.0], str(tmp_path / "frontier"))
