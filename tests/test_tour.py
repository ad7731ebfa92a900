"""The tour, its cells in order in one process, with fewer steps of training."""

import json
from pathlib import Path

import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_saved_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path, monkeypatch, program_cache, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    namespace: dict = {}
    for index, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {index}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            namespace |= {"WORKDIR": str(tmp_path / "tour"), "STEPS": 40}
    before, after = (
        namespace["run"].summary["evaluations"]["structured"][stage]["train"]["exact"] for stage in ("before", "after")
    )
    assert after["total_variation"] < 0.5 < before["total_variation"]
    assert namespace["metrics"]["exact"] == pytest.approx(after, rel=1e-3)
    # The last cell prints how far the export is from the run.
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
