"""What a suite is to the commands and reports that run and show it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cft_jax.config import Config
from cft_jax.evaluate.backends.protocol import Backend, MeasuredModel
from cft_jax.evaluate.results import Results

# The contents of a suite's `summary.json`; with `incomplete`, the reason, where a part of it could not be measured.
Summary = dict[str, Any]


@dataclass(frozen=True)
class Headline:
    """A metric worth a row in the table of all suites, by its path in the suite's summary.

    `better` is -1 where less is better, 1 where more is; a share is shown in percent.
    """

    title: str
    path: tuple[str, ...]
    better: int
    is_share: bool = False


@dataclass(frozen=True)
class SuiteContext:
    """What a suite runs with; no model only where the suite needs none with this configuration."""

    config: Config
    results: Results
    model: MeasuredModel | None

    @property
    def backend(self) -> Backend:
        assert self.model is not None
        return self.model.backend

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.model is not None
        return self.model.tokenizer


@dataclass(frozen=True)
class Suite:
    """A suite of the evaluation.

    Attributes:
      title: on pages.
      check: raises, without a model and before any work, the `UserError` that `run` would: what is missing, where it
        was looked for, how to get it. It is given the configuration and the directory of the results.
      run: measures the model as the configuration says, leaves its files where the results go, returns the summary.
      headlines: its metrics in the table of all suites.
      needs_model: whether `run` asks a model at all with this configuration.
    """

    title: str
    check: Callable[[Config, Path], object]
    run: Callable[[SuiteContext], Summary]
    headlines: tuple[Headline, ...]
    needs_model: Callable[[Config], bool] = lambda _: True
