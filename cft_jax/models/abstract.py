"""A model of shapes: what its programs are compiled from where its weights are not to be had."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from cft_jax.models.config import LoraSpec, ModelConfig
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.rules import sharding


def abstract_model(
    config: ModelConfig,
    *,
    lora: LoraSpec | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    mesh: Mesh | AbstractMesh,
    remat: str,
) -> Transformer:
    """A `Transformer` whose weights are `jax.ShapeDtypeStruct`s with their shardings on the mesh."""
    options = {"lora": lora, "dtype": dtype, "param_dtype": param_dtype, "remat": remat, "mesh": mesh}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, **options, rngs=nnx.Rngs(0))))
    flat: dict[Any, Any] = dict(nnx.to_flat_state(state))
    for variable in flat.values():
        where = sharding(variable.shape, variable.get_metadata("axes"), mesh)
        variable.set_value(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=where))
    return nnx.merge(graphdef, nnx.from_flat_state(flat.items()))
