"""What does keeping cost, and what does it keep? Calibrations of the small world's base by every means, several seeds.

A base with habits is made once (configs/world.py). For each seed it is calibrated as the demo does it
(configs/demo.py), but with rank 16 and in three epochs: without keeping, with the base's own texts at several weights,
off the support, by replay; and the adapters of the first are weakened. Then, without keeping, come ways of raising
transfer. Of each: the exact KL on unseen parameters, on families and on lists that were never trained, right answers to
questions of the kept half and of the other one, and the time of a step: the lower fifth of those logged, as a shared
machine adds to others. Prints a table of means over seeds, and draws one picture.

    python benchmarks/keep.py [--seeds 3] [--workdir keep] [--plot keep.png] [--steps 0] [--only NAME,NAME]

Runs that are finished in the workdir are read, not repeated. `--steps` stops each calibration early, to try it out.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cft_jax.common.compilation import prepare_compilers
from cft_jax.common.storage import Workdir
from cft_jax.common.writer import read_metrics
from cft_jax.config import Config, load_config
from cft_jax.distributions.splits import OOD, OOD_LISTS, UNSEEN
from cft_jax.jobs.frontier import measure
from cft_jax.main import run

# Three of the demo's eight epochs, and adapters of twice its rank, which forget more.
SHORT = ("train.epochs=3", "model.lora.rank=16", "model.lora.alpha=32.0")
NO_KEEPING = ("train.keep.weight=0",)
KEEPING: dict[str, tuple[str, ...]] = {
    "none": NO_KEEPING,
    **{f"kl {weight:g}": (f"train.keep.weight={weight}",) for weight in (0.03, 0.1, 0.3, 1.0)},
    "off support 1": ("train.keep.weight=1.0", "train.keep.kind=off_support"),
    "replay 0.1": ("train.keep.weight=0.1", "train.keep.kind=replay"),
}
MORE_FAMILIES = "uniform,binomial,gamma,triangular,weibull,maxwell,lognormal,poisson"
# In about as many steps of about the same size.
TRANSFER: dict[str, tuple[str, ...]] = {
    "12 families": (f"data.train_families=gaussian,laplace,gumbel,exponential,{MORE_FAMILIES}", "train.epochs=1"),
    "attention only": ("model.lora.targets=q_proj,k_proj,v_proj,o_proj",),
    "rank 4": ("model.lora.rank=4", "model.lora.alpha=8.0"),
    "rank 64": ("model.lora.rank=64", "model.lora.alpha=128.0"),
    "path": (
        *("train.objective=path", "train.paths_per_prompt=1", "train.batch_size=64"),
        *("train.samples_per_prompt_per_epoch=4", "train.epochs=1"),
    ),
}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
COLUMNS = ("KL unseen", "KL families", "KL lists", "right kept", "right others", "step, ms")
Row = Mapping[str, float]


def config_of(name: str, seed: int, overrides: Sequence[str]) -> Config:
    """A shipped configuration with a seed, measured afterwards alone."""
    return load_config(name, [f"seed={seed}", "eval.enabled=False", "export.enabled=False", *overrides])


def row_of(point: Mapping[str, Any], milliseconds: float) -> Row:
    """The columns of a calibration, from what was measured at a strength."""
    kls = [point["splits"][split]["kl"] for split in (UNSEEN, OOD, OOD_LISTS)]
    right = [point["halves"][half]["accuracy"] for half in ("kept", "others")]
    return dict(zip(COLUMNS, (*kls, *right, milliseconds), strict=True))


def calibrated(name: str, overrides: Sequence[str], base: Path, seed: int, place: Path, steps: int) -> dict[str, Row]:
    """The row of a variant, and without keeping also those of the adapters' strengths."""
    workdir = place / f"{name.replace(' ', '-')}-{seed}"
    begin = ("model.base=", f"model.checkpoint={base}", f"train.max_steps={steps}", "log.every_steps=5")
    config = config_of("demo", seed, [*begin, *SHORT, *overrides])
    run(config, workdir)
    speed = 1000 * float(np.quantile([row["step_seconds"] for row in read_metrics(workdir / "metrics.jsonl")], 0.2))
    strengths = STRENGTHS if name == "none" else (1.0,)
    points = {point["strength"]: point for point in measure(config, Workdir(workdir), strengths, workdir / "strength")}
    rows = {name: row_of(points[1.0], speed)}
    if name == "none":
        rows |= {f"strength {strength:g}": row_of(points[strength], speed) for strength in STRENGTHS}
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("keep"))
    parser.add_argument("--plot", type=Path, default=Path("keep.png"))
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--only", default="", help="names of variants, with commas between")
    arguments = parser.parse_args()
    prepare_compilers()
    run(config_of("world", 11, ["export.enabled=True"]), arguments.workdir / "base")
    base = arguments.workdir / "base" / "export"
    variants = KEEPING | {name: (*NO_KEEPING, *overrides) for name, overrides in TRANSFER.items()}
    chosen = arguments.only.split(",") if arguments.only else list(variants)
    rows: dict[str, list[Row]] = defaultdict(list)
    for seed in range(arguments.seeds):
        for name in chosen:
            found = calibrated(name, variants[name], base, seed, arguments.workdir, arguments.steps)
            for label, row in found.items():
                rows[label].append(row)
                print(f"{label:16}" + "".join(f"{row[column]:14.3f}" for column in COLUMNS), flush=True)
    means = {
        name: {column: float(np.mean([row[column] for row in of])) for column in COLUMNS} for name, of in rows.items()
    }
    arguments.workdir.joinpath("keep.json").write_text(json.dumps({"means": means, "rows": rows}, indent=2) + "\n")
    print(f"\nmeans of {arguments.seeds} seeds")
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
    for name, marker in zip((name for name in means if name in KEEPING), "osD^v<>P", strict=False):
        axes.plot(means[name]["right others"], means[name]["KL unseen"], marker, label=name)
    axes.set(yscale="log", xlabel="right answers to questions that were not kept", ylabel="exact KL, nats")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
