"""Loading a checkpoint in HF format straight onto the devices."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cft_jax.checkpoints import hf_names, hub, placement
from cft_jax.checkpoints.hf_checkpoint import match_shapes, read_checkpoint
from cft_jax.models.config import LoraSpec, ModelConfig
from cft_jax.models.layers import LoraParam
from cft_jax.models.source import Source
from cft_jax.models.transformer import Transformer


def from_pretrained(
    path_or_id: str | Path,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    mesh: Mesh | None = None,
    lora: LoraSpec | None = None,
    adapter: str | Path | None = None,
    revision: str = "main",
    local_files_only: bool = False,
    remat: str = "none",
    seed: int = 0,
    piece_bytes: int = placement.PIECE_BYTES,
) -> Transformer:
    """A model from a checkpoint in HF format, its weights read straight into the shards of the mesh.

    Args:
      path_or_id: a directory, or a hub id.
      dtype: of activations and matrix products.
      param_dtype: of the stored weights.
      mesh: to shard over; None for one device.
      lora: adapters to add: A uniform as in PEFT and drawn from `seed`, B zero.
      adapter: directory or hub id of a PEFT adapter to load.
      revision: branch, tag or commit of a hub id.
      local_files_only: take a hub id from the local cache alone.
      remat: what the backward pass computes again; see `Transformer`.
      seed: of the adapters' start.
      piece_bytes: of a tensor that may be in host memory at a time.

    Raises:
      UserError: the checkpoint is missing, damaged, of an unknown architecture, or its tensors are not those of its
        config.json.
    """
    directory, commit = hub.resolve(str(path_or_id), revision=revision, local_files_only=local_files_only)
    checkpoint = read_checkpoint(directory)
    build = functools.partial(
        _build,
        config=checkpoint.config,
        lora=lora,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        mesh=mesh,
        seed=seed,
    )
    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat: dict[Any, Any] = dict(nnx.to_flat_state(state))
    base = {path: variable for path, variable in flat.items() if not isinstance(variable, LoraParam)}
    match_shapes(checkpoint, {path: variable.shape for path, variable in base.items()})
    values: dict[hf_names.Path, jax.Array] = {}
    for path, names in hf_names.group_by_path(hf_names.tensor_names(checkpoint.config)).items():
        variable = base[path]
        values[path] = placement.place_stack(
            [checkpoint.tensors[name.hf] for name in names],
            names[0].layout,
            variable.shape,
            np.dtype(variable.dtype),
            placement.weight_sharding(variable.shape, variable.get_metadata("axes"), mesh),
            stacked=names[0].layer is not None,
            piece_bytes=piece_bytes,
        )
    values |= _fresh_adapters(build, flat, mesh)
    for path, variable in flat.items():
        variable.set_value(values[path])
    model = nnx.merge(graphdef, nnx.from_flat_state(flat.items()))
    model.source = Source(str(directory), str(path_or_id), commit, checkpoint.config_json)
    return model


def _build(*, config: ModelConfig, seed: int, **options: Any) -> Transformer:
    return Transformer(config, **options, rngs=nnx.Rngs(seed))


def _fresh_adapters(build: Any, flat: Mapping[Any, Any], mesh: Mesh | None) -> dict[hf_names.Path, jax.Array]:
    """The adapters as the model's constructor draws them, without drawing the base weights."""
    where = {
        path: placement.weight_sharding(variable.shape, variable.get_metadata("axes"), mesh)
        for path, variable in flat.items()
        if isinstance(variable, LoraParam)
    }
    if not where:
        return {}

    def adapters() -> dict[str, jax.Array]:
        drawn = dict(nnx.to_flat_state(nnx.state(build(), LoraParam)))
        return {"/".join(map(str, path)): drawn[path].get_value() for path in where}

    shardings = {"/".join(map(str, path)): s for path, s in where.items()}
    drawn = jax.jit(adapters, out_shardings=shardings)()
    return {path: drawn["/".join(map(str, path))] for path in where}
