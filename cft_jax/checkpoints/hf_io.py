"""Loading a checkpoint in HF format straight onto the devices."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cft_jax.checkpoints import hf_names, placement
from cft_jax.checkpoints.generation_config import named_stop_ids
from cft_jax.checkpoints.hf_checkpoint import HfCheckpoint, match_shapes, read_checkpoint, read_config
from cft_jax.checkpoints.lora_weights import adapter_tensors
from cft_jax.checkpoints.peft_files import PeftAdapter, is_adapter, read_adapter
from cft_jax.common import hub
from cft_jax.common.errors import UserError
from cft_jax.common.progress import Progress
from cft_jax.models.config import LoraSpec, ModelConfig
from cft_jax.models.families import PUBLISHED, config_from_hf
from cft_jax.models.layers import LoraParam
from cft_jax.models.source import Source
from cft_jax.models.transformer import Transformer

_Wanted = dict[hf_names.Path, jax.ShapeDtypeStruct]
_Weights = dict[hf_names.Path, jax.Array]


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
      path_or_id: a directory, or a hub id; of a checkpoint, or of a PEFT adapter, which names its base.
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
    directory, name, commit, peft = _locate(str(path_or_id), adapter, revision, local_files_only)
    checkpoint = read_checkpoint(directory)
    stop_ids = {*named_stop_ids(directory), *([] if peft is None else named_stop_ids(peft.directory))}
    source = Source(str(directory), name, commit, json.dumps(checkpoint.raw), tuple(sorted(stop_ids)))
    _compare_with_published(name, checkpoint.config)
    lora = _adapters(checkpoint.config, lora, peft)

    def build() -> Transformer:
        options = {"lora": lora, "dtype": dtype, "param_dtype": param_dtype, "remat": remat, "mesh": mesh}
        return Transformer(checkpoint.config, **options, rngs=nnx.Rngs(seed))

    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat: dict[Any, Any] = dict(nnx.to_flat_state(state))
    base: _Wanted = {
        path: placement.abstract_weight(variable.shape, variable.dtype, variable.get_metadata("axes"), mesh)
        for path, variable in flat.items()
    }
    adapters = {path: base.pop(path) for path, variable in flat.items() if isinstance(variable, LoraParam)}
    values = _base_weights(checkpoint, base, piece_bytes)
    if peft is not None:
        values |= _adapter_weights(peft, checkpoint.config, adapters)
    elif adapters:
        values |= _fresh_adapters(build, adapters)
    for path, variable in flat.items():
        variable.set_value(values[path])
    model = nnx.merge(graphdef, nnx.from_flat_state(flat.items()))
    model.source = source
    return model


def model_config(path_or_id: str, *, revision: str, local_files_only: bool) -> ModelConfig:
    """Sizes of a checkpoint's model without its weights: known by a published name, else from its config.json.

    Raises:
      UserError: the checkpoint is missing, or its config.json damaged or of an unknown architecture.
    """
    if path_or_id in PUBLISHED:
        return PUBLISHED[path_or_id]
    return config_from_hf(read_config(_locate(path_or_id, None, revision, local_files_only)[0]))


def _locate(
    name: str, adapter: str | Path | None, revision: str, local_files_only: bool
) -> tuple[Path, str, str, PeftAdapter | None]:
    """The base checkpoint's directory, name and commit, and the adapter: given beside it, or what `name` stands for."""
    directory, commit = hub.resolve(name, revision=revision, local_files_only=local_files_only)
    peft = None
    if adapter is not None:
        peft = read_adapter(str(adapter), revision="main", local_files_only=local_files_only)
    elif is_adapter(directory):
        peft = read_adapter(str(directory), revision="", local_files_only=True)
        if not (directory / "config.json").is_file():
            if not peft.base:
                raise UserError(f"{directory} is an adapter that names no base model; give the base and model.adapter")
            name = peft.base
            directory, commit = hub.resolve(name, revision=peft.revision, local_files_only=local_files_only)
    return directory, name, commit, peft


def _compare_with_published(name: str, config: ModelConfig) -> None:
    """Tells where a checkpoint of a published name has other numbers; its own config.json decides."""
    published = PUBLISHED.get(name, config)
    for field in dataclasses.fields(config):
        own, known = getattr(config, field.name), getattr(published, field.name)
        if own != known:
            logging.warning("config.json of %s has %s=%s, published was %s", name, field.name, own, known)


def _adapters(config: ModelConfig, lora: LoraSpec | None, peft: PeftAdapter | None) -> LoraSpec | None:
    """The adapters to make: those asked for, those loaded, or the loaded ones with the dropout asked for.

    Raises:
      UserError: the two differ, or a target names no layer of the model.
    """
    if peft is not None:
        if lora is not None and (lora.rank, lora.alpha) != (peft.spec.rank, peft.spec.alpha):
            raise UserError(
                f"{peft.directory} has rank {peft.spec.rank} and alpha {peft.spec.alpha:g}, config.model.lora has rank "
                f"{lora.rank} and alpha {lora.alpha:g}; set them alike"
            )
        if lora is not None and set(lora.targets) != set(peft.spec.targets):
            raise UserError(
                f"{peft.directory} adapts {', '.join(peft.spec.targets)}, config.model.lora.targets has "
                f"{', '.join(lora.targets)}; set them alike"
            )
        lora = peft.spec if lora is None else dataclasses.replace(peft.spec, dropout=lora.dropout)
    if lora is not None:
        known = hf_names.linear_layers(config)
        unknown = [target for target in lora.targets if target not in known]
        if unknown or not lora.targets:
            raise UserError(
                f"config.model.lora.targets={', '.join(lora.targets)!r}: the model's linear layers are "
                f"{', '.join(known)}"
            )
    return lora


def _base_weights(checkpoint: HfCheckpoint, wanted: _Wanted, piece_bytes: int) -> _Weights:
    match_shapes(checkpoint, {path: array.shape for path, array in wanted.items()})
    values: _Weights = {}
    names = hf_names.tensor_names(checkpoint.config)
    with Progress("load weights", total=len(names), unit="tensor") as progress:
        for path, same in itertools.groupby(names, lambda name: name.path):
            layers = list(same)
            tensors = [checkpoint.tensors[name.hf] for name in layers]
            values[path] = placement.place_stack(tensors, layers[0], wanted[path], piece_bytes=piece_bytes)
            progress.advance(len(tensors))
    return values


def _adapter_weights(peft: PeftAdapter, config: ModelConfig, wanted: _Wanted) -> _Weights:
    arrays = peft.arrays(adapter_tensors(config, peft.spec), {path: array.shape for path, array in wanted.items()})
    return {
        path: jax.make_array_from_callback(array.shape, array.sharding, arrays[path].__getitem__)
        for path, array in wanted.items()
    }


def _fresh_adapters(build: Callable[[], Transformer], wanted: _Wanted) -> _Weights:
    """The adapters as the model's constructor draws them, without drawing the base weights."""

    def drawn() -> list[jax.Array]:
        fresh = dict(nnx.to_flat_state(nnx.state(build(), LoraParam)))
        return [fresh[path].get_value() for path in wanted]

    values = jax.jit(drawn, out_shardings=[array.sharding for array in wanted.values()])()
    return dict(zip(wanted, values, strict=True))
