"""Estimates of a whole benchmark's accuracy from 100 of its items, by item response theory (arXiv 2402.14992).

The item parameters are published as a pickle; `convert_items` turns it into the safe file that is read here.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy import optimize

from cft_jax.common.errors import UserError

DOWNLOAD = (
    "get it with `curl -LO https://github.com/felipemaiapolo/tinyBenchmarks/raw/main/tinyBenchmarks/tinyBenchmarks.pkl`"
)
HOW_TO_GET = (
    f"{DOWNLOAD} and `python -m cft_jax.evaluate.suites.retention.convert_items --input=tinyBenchmarks.pkl "
    "--output=tinyBenchmarks.npz`, then set config.suite.retention.item_parameters=tinyBenchmarks.npz"
)
NUM_SCORES = 100
# Benchmarks that share one model of all items; `mmlu` has a model of its own.
BUNDLES = ("lb", "mmlu")
_MAX_TERM = 30.0
_TINY = 1e-10


@dataclass(frozen=True, eq=False)
class Estimate:
    """The model's ability, and three estimates of its accuracy on the whole benchmark."""

    theta: Float64[np.ndarray, "D"]
    irt: float
    pirt: float
    gpirt: float


@dataclass(frozen=True, eq=False)
class ItemParameters:
    """Published parameters of the items of several benchmarks.

    Attributes:
      arrays: as `convert_items` writes them: for every bundle A and B [1, D, N], `seen_examples`, `scenarios`
        (names in the order of the seen examples), `lambdas`, and by scenario `weights`, `positions` and, by part,
        `subpositions`.
    """

    arrays: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> "ItemParameters":
        """Reads a file without running anything in it; `UserError` if it is not what the converter writes."""
        if not path.is_file():
            raise UserError(f"config.suite.retention.item_parameters={str(path)!r}: no such file; {HOW_TO_GET}")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged or no .npz of arrays ({error}); {HOW_TO_GET}") from error
        missing = [f"{bundle}.{name}" for bundle in BUNDLES for name in ("A", "B") if f"{bundle}.{name}" not in arrays]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; {HOW_TO_GET}")
        return cls(arrays)

    def estimate(self, benchmark: str, scores: Float64[np.ndarray, "S"]) -> Estimate:
        """Estimates from the 100 scores, in [0, 1], of a benchmark's seen items, in their order."""
        if scores.shape != (NUM_SCORES,):
            raise ValueError(f"{scores.shape} scores; estimates need {NUM_SCORES}")
        prefix = "mmlu." if benchmark == "mmlu" else "lb."
        arrays = {name.removeprefix(prefix): own for name, own in self.arrays.items() if name.startswith(prefix)}
        index = arrays["scenarios"].tolist().index(benchmark)
        seen, items = arrays["seen_examples"], arrays[f"positions.{benchmark}"]
        if benchmark != "mmlu":
            seen = seen[index * NUM_SCORES : (index + 1) * NUM_SCORES]
        slopes, offsets = arrays["A"][0], arrays["B"][0]
        # Parts of a benchmark weigh alike, however many items they have.
        balance = np.ones(slopes.shape[1])
        parts = [members for name, members in arrays.items() if name.startswith(f"subpositions.{benchmark}.")]
        for members in parts:
            balance[members] = items.size / (len(parts) * members.size)
        theta = _ability(slopes[:, seen], offsets[:, seen], scores)
        unseen = np.setdiff1d(items, seen)
        guesses = balance[unseen] * _curves(slopes, offsets, theta)[unseen]
        share, guessed = NUM_SCORES / items.size, float(np.mean(guesses)) if unseen.size else 0.0
        pirt = share * float(np.mean(balance[seen] * scores)) + (1 - share) * guessed
        irt, weight = float(arrays[f"weights.{benchmark}"] @ scores), float(arrays["lambdas"][index])
        return Estimate(theta, irt, pirt, weight * irt + (1 - weight) * pirt)


def _curves(
    slopes: Float64[np.ndarray, "D N"], offsets: Float64[np.ndarray, "D N"], theta: Float64[np.ndarray, "D"]
) -> Float64[np.ndarray, "N"]:
    """Probability of a right answer to every item; terms are clipped before they are added, as in the reference."""
    terms = np.clip(slopes * theta[:, None] - offsets, -_MAX_TERM, _MAX_TERM)
    return 1 / (1 + np.exp(-terms.sum(axis=0)))


def _ability(
    slopes: Float64[np.ndarray, "D S"], offsets: Float64[np.ndarray, "D S"], scores: Float64[np.ndarray, "S"]
) -> Float64[np.ndarray, "D"]:
    """The maximum-likelihood ability, from zero, without a prior; scores may be fractions."""

    def loss(theta: Float64[np.ndarray, "D"]) -> float:
        curves = _curves(slopes, offsets, theta)
        return -float(np.sum(scores * np.log(curves + _TINY) + (1 - scores) * np.log(1 - curves + _TINY)))

    return optimize.minimize(loss, np.zeros(slopes.shape[0]), method="BFGS").x
