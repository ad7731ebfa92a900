"""A model as jitted functions take it."""

from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from cft_jax.models.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitModel:
    """A `Transformer` taken apart once: its graph is static under jit, its weights are arguments.

    Attributes:
      graphdef: nnx.GraphDef.
      state: nnx.State of all weights.
    """

    graphdef: Any = field(metadata={"static": True})
    state: Any

    @classmethod
    def of(cls, model: Transformer) -> "SplitModel":
        return cls(*nnx.split(model))

    def merge(self) -> Transformer:
        """The model again, for use inside a jitted function."""
        return nnx.merge(self.graphdef, self.state)
