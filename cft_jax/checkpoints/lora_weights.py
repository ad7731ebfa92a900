"""A model's adapters on the host: per tensor of the checkpoint, as factors in PEFT's layout or as an update."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Shaped

from cft_jax.checkpoints import hf_names
from cft_jax.models.config import LoraSpec, ModelConfig
from cft_jax.models.transformer import Transformer

Matrix = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class AdapterTensor:
    """Where the adapter of one tensor of the checkpoint belongs.

    Attributes:
      name: the tensor that is adapted.
      module: PEFT's name of the adapted module, below the model.
      path: of our Lora module; `a` and `b` lie below it.
      experts: whether there is a matrix per expert.
    """

    name: hf_names.Name
    module: str
    path: hf_names.Path
    experts: bool


def adapter_tensors(config: ModelConfig, spec: LoraSpec) -> list[AdapterTensor]:
    """The adapted tensors of a model, in the order of `hf_names.tensor_names`."""
    adapted = []
    for name in hf_names.tensor_names(config):
        if name.path[-1] == "kernel" and name.path[-2] in spec.targets:
            module, _, last = name.hf.rpartition(".")
            # For experts PEFT puts one wrapper per parameter around the module that holds them, in the order in which
            # the module declares them, so that gate_up_proj's is the inner one.
            module += ".base_layer" if last == "gate_up_proj" and "down_proj" in spec.targets else ""
            adapted.append(AdapterTensor(name, module, (*name.path[:-1], "lora"), ".experts." in name.hf))
    return adapted


def as_matrices(a: Matrix, b: Matrix, experts: bool) -> tuple[Matrix, Matrix]:
    """One layer's A [*in, R] and B [R, *out] as matrices [in, R] and [R, out].

    Those of experts, [E, in, R] and [E, R, P, out], become [E, in, R] and [E, R, out * P]: the file interleaves the
    outputs of an expert's P matrices.
    """
    if experts:
        return a, b.swapaxes(-1, -2).reshape(*b.shape[:2], -1)
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def from_matrices(a: Matrix, b: Matrix, shapes: Sequence[tuple[int, ...]], experts: bool) -> tuple[Matrix, Matrix]:
    """The inverse of `as_matrices`: A and B of the given shapes."""
    if experts:
        E, R, parts, out = shapes[1]
        return a, b.reshape(E, R, out, parts).swapaxes(-1, -2)
    return a.reshape(shapes[0]), b.reshape(shapes[1])


class HostWeights:
    """Reads a model's weights layer by layer; with several processes all must ask for the same in the same order."""

    def __init__(self, model: Transformer) -> None:
        self._values = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        self._spec = model.lora_spec

    def base(self, name: hf_names.Name) -> Shaped[np.ndarray, "..."]:
        """A base weight in the file's layout and the model's dtype."""
        return name.layout.to_file(_to_host(self._values[name.path], name.layer))

    def factors(self, target: AdapterTensor) -> tuple[Matrix, Matrix]:
        """A and B of one adapted tensor, float32: [in, R] and [R, out], for experts with a leading axis E."""
        a, b = (_to_host(self._values[(*target.path, which)], target.name.layer) for which in ("a", "b"))
        return as_matrices(a, b, target.experts)

    def update(self, target: AdapterTensor) -> Matrix:
        """The update scale * BA in the file's layout, float32."""
        assert self._spec is not None
        a, b = self.factors(target)
        update = np.matmul(a, b) * np.float32(self._spec.scale)
        return update if target.experts else update.T


def _to_host(array: Array, layer: int | None) -> Shaped[np.ndarray, "..."]:
    """One layer of a weight, or all of it, gathered from all devices."""
    part = array if layer is None else _take(array, jnp.int32(layer))
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


@jax.jit
def _take(array: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
