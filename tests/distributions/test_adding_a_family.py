"""A family added by the two steps of docs/data.md alone, in a copy of the code, does all that families do."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cft_jax.distributions import HELDOUT_FAMILIES, TRAIN_FAMILIES

ROOT = Path(__file__).parents[2]
USED = """
import json, sys
from cft_jax.distributions import FAMILIES, build_splits, output_space, task_from_spec
from cft_jax.distributions.analytic_space import analytic_space

def families(splits):
    return {name: list(dict.fromkeys(spec.family_id for spec in specs)) for name, specs in splits.items()}

named = build_splits(train_families=("gaussian", "semicircle"))
spec = named["train"][-1]
space = output_space(spec, num_decimals=1, max_bins=101)
json.dump({
    "default": families(build_splits()), "named": families(named),
    "held": families(build_splits(heldout_families=("semicircle",))),
    "prompt": spec.prompt, "ends": [space.values[0], space.values[-1]], "role": FAMILIES["semicircle"].role,
    "analytic": analytic_space(spec, num_decimals=1, quantile=1e-6).num_values,
}, sys.stdout)
"""


def added_to(path, before, row):
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, f"    {row}\n{before}"), encoding="utf-8")


def test_the_documented_steps_are_enough(tmp_path):
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Adding a family")[2]
    row, grids = (" ".join(block.split()) for block in re.findall(r"```\n(.*?)```", section, re.DOTALL))
    shutil.copytree(ROOT / "cft_jax", tmp_path / "cft_jax", ignore=shutil.ignore_patterns("__pycache__"))
    added_to(tmp_path / "cft_jax/distributions/families.py", ")  # fmt: skip\n", row)
    added_to(tmp_path / "cft_jax/distributions/grids.py", "    }\n)\n", grids)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USED], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["default"]["train"] == found["default"]["test_unseen_params"] == list(TRAIN_FAMILIES)
    assert found["default"]["test_ood_family"] == list(HELDOUT_FAMILIES)
    assert found["named"]["train"] == found["named"]["test_unseen_params"] == ["gaussian", "semicircle"]
    assert found["held"]["test_ood_family"] == ["semicircle"]
    assert "from a Semicircle distribution with parameters radius=2.0." in found["prompt"]
    # By hand: the cuts at 0.1 % and 99.9 % of a semicircle of radius 2 lie at 1.96, its support at 2.0.
    assert found["ends"] == ["-1.9", "1.9"] and found["analytic"] == 41
    assert found["role"] == "own"
