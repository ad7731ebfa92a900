"""Estimates of a whole benchmark's accuracy from 100 of its items, by item response theory (arXiv 2402.14992).

The item parameters are published as a pickle; `convert_items` turns it into the safe file that is read here.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy import optimize

from cft_jax.common.errors import UserError

NUM_SCORES = 100
# Benchmarks that share one model of all items; `mmlu` has a model of its own.
_LB, _MMLU = "lb", "mmlu"
BUNDLES = (_LB, _MMLU)
_MAX_TERM = 30.0
_TINY = 1e-10


@dataclass(frozen=True, eq=False)
class Scenario:
    """One benchmark's items.

    Attributes:
      positions: of its items in the bundle.
      balance: weight of every item of the bundle: parts of the benchmark weigh alike.
      seen: the items whose scores are given, in the order of the scores.
      weights: of these in `irt`.
      optimal_lambda: weight of `irt` in `gpirt`.
    """

    positions: Int64[np.ndarray, "_"]
    balance: Float64[np.ndarray, "N"]
    seen: Int64[np.ndarray, "S"]
    weights: Float64[np.ndarray, "S"]
    optimal_lambda: float


@dataclass(frozen=True, eq=False)
class Estimate:
    """The model's ability, and three estimates of its accuracy on the whole benchmark."""

    theta: Float64[np.ndarray, "D"]
    irt: float
    pirt: float
    gpirt: float


class ItemParameters:
    """Published parameters of the items of several benchmarks.

    Args:
      arrays: as `convert_items` writes them: for every bundle A and B [1, D, N], `seen_examples`, `scenarios`
        (names in the order of the seen examples), `lambdas`, and by scenario `weights`, `positions` and, by part,
        `subpositions`.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays

    @classmethod
    def load(cls, path: Path) -> "ItemParameters":
        """Reads a file without running anything in it.

        Raises:
          UserError: there is no such file, or it is not what the converter writes.
        """
        if not path.is_file():
            raise UserError(f"config.suite.retention.item_parameters={str(path)!r}: no such file; {HOW_TO_GET}")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged or no .npz of arrays ({error}); {HOW_TO_GET}") from error
        found = cls(arrays)
        missing = [f"{bundle}.{name}" for bundle in BUNDLES for name in ("A", "B") if f"{bundle}.{name}" not in arrays]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; {HOW_TO_GET}")
        return found

    def estimate(self, benchmark: str, scores: Float64[np.ndarray, "S"]) -> Estimate:
        """Estimates from the scores, in [0, 1], of a benchmark's seen items.

        Raises:
          ValueError: there are not 100 scores, or no such benchmark.
        """
        if scores.shape != (NUM_SCORES,):
            raise ValueError(f"{scores.shape} scores; estimates need {NUM_SCORES}")
        bundle = _MMLU if benchmark == "mmlu" else _LB
        scenario = self.scenario(bundle, benchmark)
        slopes, offsets = self._arrays[f"{bundle}.A"][0], self._arrays[f"{bundle}.B"][0]
        theta = _ability(slopes[:, scenario.seen], offsets[:, scenario.seen], scores)
        curves = _curves(slopes, offsets, theta)
        unseen = np.setdiff1d(scenario.positions, scenario.seen)
        share = NUM_SCORES / scenario.positions.size
        known = float(np.mean(scenario.balance[scenario.seen] * scores))
        guessed = float(np.mean(scenario.balance[unseen] * curves[unseen])) if unseen.size else 0.0
        irt = float(scenario.weights @ scores)
        pirt = share * known + (1 - share) * guessed
        return Estimate(theta, irt, pirt, scenario.optimal_lambda * irt + (1 - scenario.optimal_lambda) * pirt)

    def scenario(self, bundle: str, name: str) -> Scenario:
        """A benchmark's items."""
        names = self._arrays[f"{bundle}.scenarios"].tolist()
        place = names.index(name)
        positions = {other: self._arrays[f"{bundle}.positions.{other}"] for other in names}
        balance = np.ones(1 + max(int(members.max()) for members in positions.values()))
        prefix = f"{bundle}.subpositions.{name}."
        parts = [members for key, members in self._arrays.items() if key.startswith(prefix)]
        for members in parts:
            balance[members] = positions[name].size / (len(parts) * members.size)
        seen = self._arrays[f"{bundle}.seen_examples"]
        if bundle == _LB:
            seen = seen[place * NUM_SCORES : (place + 1) * NUM_SCORES]
        weights = self._arrays[f"{bundle}.weights.{name}"]
        return Scenario(positions[name], balance, seen, weights, float(self._arrays[f"{bundle}.lambdas"][place]))


DOWNLOAD = (
    "get it with `curl -LO https://github.com/felipemaiapolo/tinyBenchmarks/raw/main/tinyBenchmarks/tinyBenchmarks.pkl`"
)
HOW_TO_GET = (
    f"{DOWNLOAD} and `python -m cft_jax.evaluate.suites.retention.convert_items --input=tinyBenchmarks.pkl "
    "--output=tinyBenchmarks.npz`, then set config.suite.retention.item_parameters=tinyBenchmarks.npz"
)


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
