"""What does keeping cost, and what does it keep? Calibrations of the small world's base by every means, several seeds.

For each seed a base with habits is made (configs/world.py) and calibrated: without keeping, with the base's own texts
at several weights, off the support, by replay; and the adapters of the first are weakened. Of each: the exact KL on
unseen parameters, on families and on lists that were never trained, right answers to the questions of the kept half and
of the other one, and the time of a step. Prints a table of means over seeds, and draws one picture.

    python benchmarks/keep.py [--seeds 3] [--workdir keep] [--plot keep.png] [--steps 0]

Runs that are finished in the workdir are read, not repeated. `--steps` stops each calibration early, to try it out.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cft_jax.common.storage import Workdir
from cft_jax.common.writer import read_metrics
from cft_jax.config import Config, load_config
from cft_jax.distributions.splits import OOD, OOD_LISTS, UNSEEN
from cft_jax.jobs.frontier import measure
from cft_jax.main import run

WORLD = Path(__file__).parents[1] / "configs" / "world.py"
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": (),
    **{f"kl {weight:g}": (f"train.keep.weight={weight}",) for weight in (0.03, 0.1, 0.3, 1.0)},
    "off support 0.1": ("train.keep.weight=0.1", "train.keep.kind=off_support"),
    "off support 1": ("train.keep.weight=1.0", "train.keep.kind=off_support"),
    "replay 0.1": ("train.keep.weight=0.1", "train.keep.kind=replay"),
}
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
COLUMNS = ("KL unseen", "KL families", "KL lists", "right kept", "right others", "step, ms")
Row = Mapping[str, float]


def config_of(argument: str, seed: int, *overrides: str) -> Config:
    """The world's configuration with a seed, measured without samples."""
    return load_config(f"{WORLD}{argument}", [f"seed={seed}", "eval.num_samples=0", *overrides])


def row_of(splits: Mapping[str, Any], halves: Mapping[str, Any], milliseconds: float) -> Row:
    """The columns of a calibration, from its evaluations."""
    kls = [splits[split].get("exact", splits[split])["kl"] for split in (UNSEEN, OOD, OOD_LISTS)]
    return dict(
        zip(COLUMNS, (*kls, *(halves[half]["accuracy"] for half in ("kept", "others")), milliseconds), strict=True)
    )


def calibrations(seed: int, place: Path, steps: int) -> dict[str, Row]:
    """A row for every variant and strength."""
    run(config_of("", seed, "eval.enabled=False"), place / f"base-{seed}")
    base = f"model.checkpoint={place / f'base-{seed}' / 'export'}"
    rows: dict[str, Row] = {}
    for name, overrides in VARIANTS.items():
        workdir = place / f"{name.replace(' ', '-')}-{seed}"
        config = config_of(":fair", seed, base, f"train.max_steps={steps}", *overrides)
        found = run(config, workdir)["evaluations"]
        # Half of the steps: those before hold the compilations.
        times = [row["step_seconds"] for row in read_metrics(workdir / "metrics.jsonl")]
        after = {suite: stages["after"] for suite, stages in found.items()}
        speed = 1000 * float(np.median(times[len(times) // 2 :]))
        rows[name] = row_of(after["structured"], after["questions"]["halves"], speed)
        if name == "none":
            stages = found["structured"]["before"], found["questions"]["before"]["halves"]
            rows["base"] = row_of(*stages, 0.0)
            points = measure(config, Workdir(workdir), STRENGTHS, place / f"strength-{seed}")
            for point in points:
                rows[f"strength {point['strength']:g}"] = row_of(point["splits"], point["halves"], speed)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("keep"))
    parser.add_argument("--plot", type=Path, default=Path("keep.png"))
    parser.add_argument("--steps", type=int, default=0)
    arguments = parser.parse_args()
    rows: dict[str, list[Row]] = defaultdict(list)
    for seed in range(arguments.seeds):
        for name, row in calibrations(seed, arguments.workdir, arguments.steps).items():
            rows[name].append(row)
    means = {
        name: {column: float(np.mean([row[column] for row in of])) for column in COLUMNS} for name, of in rows.items()
    }
    arguments.workdir.joinpath("keep.json").write_text(json.dumps({"means": means, "rows": rows}, indent=2) + "\n")
    print(f"{'':16}" + "".join(f"{column:>14}" for column in COLUMNS))
    for name, row in means.items():
        print(f"{name:16}" + "".join(f"{row[column]:14.3f}" for column in COLUMNS))
    draw(means, arguments.plot)


def draw(means: Mapping[str, Row], path: Path) -> None:
    """KL on unseen parameters against right answers that were not kept; the strengths are joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    dial = [row for name, row in means.items() if name.startswith("strength")]
    axes.plot([row["right others"] for row in dial], [row["KL unseen"] for row in dial], marker=".", label="strength")
    for name, row in means.items():
        if not name.startswith("strength"):
            axes.plot(row["right others"], row["KL unseen"], "o", label=name)
    axes.set(yscale="log", xlabel="right answers to questions that were not kept", ylabel="exact KL, nats")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
