"""Which objective learns fastest? Exact KL on unseen parameters against training time, on the data of four families.

`path`, `paths`, `exact` and hard targets train from the same weights for the same time, each on its own schedule over
exactly the steps that it gets done in that time; making the batches counts, compiling does not. A step of `path` has
128 strings of as many prompts; of `paths` and hard 16 strings of each of 16 prompts, packed; of `exact` all strings of
16 prompts. Several seeds; prints the medians and writes a plot with the range over seeds.

    python benchmarks/objectives.py [--seconds 60] [--seeds 3] [--plot objectives.png]

Takes about seconds x seeds x 5 in all on two cores.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cft_jax.common.storage import Workdir
from cft_jax.config import Config, changed
from cft_jax.data.dataset import Dataset
from cft_jax.data.objectives import training_dataset
from cft_jax.distributions import Task, configured_tasks, space_settings
from cft_jax.distributions.splits import UNSEEN
from cft_jax.evaluate.metrics import exact
from cft_jax.evaluate.suites.structured.settings import evaluation_tasks, prompt_codec
from cft_jax.generate import TrieScorer
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.batch_loss import DeviceBatch, head_options
from cft_jax.runs.base import base_checkpoint, base_tokenizer, load_model
from cft_jax.sharding.mesh import make_mesh
from cft_jax.text.trie import Trie
from cft_jax.train.optimizer import adamw, warmup_cosine
from cft_jax.train.state import initial_state, split_model, state_shardings
from cft_jax.train.step import StepOptions, make_train_step

PACKED = {"objective": "paths", "batch_size": 256, "paths_per_prompt": 16, "samples_per_prompt_per_epoch": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "path": {"objective": "path", "batch_size": 128},
    "paths": PACKED,
    "exact": {"objective": "exact", "batch_size": 16},
    "hard": PACKED,
}
# Shares of the time after which the model is measured, and steps that tell how fast an objective is.
MEASURED = (0.1, 0.25, 0.5, 0.75, 1.0)
CALIBRATION = 8


def config_of(objective: str, seed: int) -> Config:
    """Four families of short numbers, asked of a small model that is trained from scratch."""
    target = "hard" if objective == "hard" else "soft"
    return changed(
        Config(),
        {
            "seed": seed,
            "model": {"dtype": "float32", "lora": {"enabled": False}, "scratch": {"enabled": True}},
            "data": {
                "target": target,
                "num_decimals": 1,
                "quantile_low": 0.005,
                "quantile_high": 0.995,
                "train_families": ("uniform", "gaussian", "laplace", "gumbel"),
                "heldout_families": ("poisson",),
                "unseen": "inside",
                "grid_points": 20,
                "readable_parameters": True,
                "parameter_digits": 3,
            },
            "train": {"learning_rate": 3e-3, "max_grad_norm": 1.0, **OBJECTIVES[objective]},
            "eval": {"max_prompts_per_split": 24},
        },
    )


class Run:
    """Training with one objective and seed."""

    def __init__(self, config: Config, dataset: Dataset, model: Transformer) -> None:
        self.dataset, self.model, self.config = dataset, model, config
        self.optimizer = adamw(weight_decay=config.train.weight_decay, max_grad_norm=config.train.max_grad_norm)
        self.parts, weights, self.frozen = split_model(model)
        self.weights = jax.tree.map(jnp.copy, weights)
        self.seen: set[Any] = set()
        self.times: list[float] = []

    def start(self, total: int) -> None:
        """From the first weights, on a schedule over `total` steps."""
        mesh = self.model.mesh
        assert mesh is not None
        train = self.config.train
        rate = functools.partial(
            warmup_cosine, peak=train.learning_rate, warmup_ratio=train.warmup_ratio, total_steps=total
        )
        loss = head_options(self.config.data.target, tau=train.tau, softcap=None, mesh=mesh)
        options = StepOptions(
            loss, tuple(self.dataset.shared_prefix.tolist()), 1, self.config.seed, self.optimizer, rate
        )
        self.run = make_train_step(self.parts, options, state_shardings(self.weights, self.optimizer))
        self.state = initial_state(jax.tree.map(jnp.copy, self.weights), self.optimizer)
        self.seen.clear()
        self.times.clear()

    def step(self, number: int) -> None:
        """One step; the first of a shape, which compiles, counts as long as the others take."""
        begin = time.perf_counter()
        batch = DeviceBatch(*map(jnp.asarray, self.dataset.batch(number)))
        self.state, _ = jax.block_until_ready(self.run(self.state, self.frozen, batch))
        if batch.tokens.shape + batch.target_ids.shape + batch.target_index.shape in self.seen:
            self.times.append(time.perf_counter() - begin)
        self.seen.add(batch.tokens.shape + batch.target_ids.shape + batch.target_index.shape)

    def trained(self) -> Transformer:
        """The model with the present weights."""
        return self.parts.merge(jax.tree.map(jnp.copy, self.state.weights), self.frozen)


def mean_kl(model: Transformer, prompts: Sequence[list[int]], tries: Sequence[Trie], tasks: Sequence[Task]) -> float:
    """Exact KL in nats, mean over prompts."""
    scores = TrieScorer(model, stop_ids=(tries[0].terminator_id,)).score(prompts, tries, prefixes=None)
    spaces = [task.output_space(SETTINGS) for task in tasks]
    found = [
        exact.exact_figures(space.probabilities, score.string_log_probs, space.values)["kl"]
        for space, score in zip(spaces, scores, strict=True)
    ]
    return float(np.mean(found))


SETTINGS = space_settings(config_of("exact", 0).data)


def curve(objective: str, seed: int, seconds: float, place: Path) -> list[float]:
    """KL after each of the `MEASURED` shares of the time."""
    config = config_of(objective, seed)
    tasks = configured_tasks(config.data)
    base = base_checkpoint(config, tasks, Workdir(place / str(seed)))
    tokenizer = base_tokenizer(config.model, base)
    dataset = training_dataset(config, tokenizer, tasks["train"], row_multiple=1, share_prefix=True)
    run = Run(config, dataset, load_model(config, base, make_mesh(1, 1, 1)))
    asked = [task for task in evaluation_tasks(config, tasks) if task.split == UNSEEN]
    codec = prompt_codec(tokenizer, config.data)
    prompts = [codec.encode(task.messages) for task in asked]
    tries = [codec.build_trie(task.output_space(SETTINGS)) for task in asked]

    run.start(1000)
    number = 0
    while len(run.times) < CALIBRATION:
        run.step(number)
        number += 1
    total = max(int(seconds / np.median(run.times)), len(MEASURED))
    run.start(total)
    ends = [max(1, round(share * total)) for share in MEASURED]
    found = []
    for number in range(total):
        run.step(number)
        if number + 1 in ends:
            found += [mean_kl(run.trained(), prompts, tries, asked)] * ends.count(number + 1)
    took = total * float(np.mean(run.times))
    print(f"{objective:6} seed {seed}: {total} steps in {took:.0f} s, KL {', '.join(f'{kl:.3f}' for kl in found)}")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("objectives.png"))
    arguments = parser.parse_args()
    curves: dict[str, list[list[float]]] = {name: [] for name in OBJECTIVES}
    with tempfile.TemporaryDirectory() as place:
        # Seed by seed, so that what else the machine does falls on all alike.
        for seed in range(arguments.seeds):
            for name in OBJECTIVES:
                curves[name].append(curve(name, seed, arguments.seconds, Path(place)))
    print(f"\nmedian KL over {arguments.seeds} seeds after seconds of training")
    print(f"{'':8}" + "".join(f"{share * arguments.seconds:9.0f}" for share in MEASURED))
    for name, found in curves.items():
        print(f"{name:8}" + "".join(f"{kl:9.3f}" for kl in np.median(found, axis=0)))
    draw(curves, arguments.seconds, arguments.plot)


def draw(curves: dict[str, list[list[float]]], seconds: float, path: Path) -> None:
    """KL against time: the median and the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    times = [share * seconds for share in MEASURED]
    for (name, found), marker in zip(curves.items(), "osD^", strict=True):
        (line,) = axes.plot(times, np.median(found, axis=0), marker=marker, label=name)
        axes.fill_between(times, np.min(found, axis=0), np.max(found, axis=0), alpha=0.15, color=line.get_color())
    axes.set(yscale="log", xlabel="seconds of training", ylabel="exact KL on unseen parameters, nats")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
