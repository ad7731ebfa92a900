"""What is remembered of a base whose weights are all trained: its hidden states of the kept texts, and its head."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cft_jax.data.kept import KeptTexts
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.rules import sharding
from cft_jax.train.keep import BASE_HEAD, DeviceKept, KeepOptions
from cft_jax.train.prefetch import put_kept


def remember_base(
    model: Transformer, frozen: dict[str, Array], kept: KeptTexts, options: KeepOptions | None
) -> tuple[dict[str, Array], KeptTexts]:
    """The frozen weights with the base's head, and the texts with its hidden states, where the loss asks for them.

    Both are in the model's dtype. The model still has the base's weights; a run that resumes begins with the same and
    makes the same again.
    """
    assert model.mesh is not None and options is not None
    if not options.needs_remembering:
        return frozen, kept
    count, at_once = len(kept.rows.tokens), -(-kept.per_step // kept.row_multiple) * kept.row_multiple
    found = []
    for start in range(0, count, at_once):
        numbers = np.arange(start, min(start + at_once, count))
        rows = put_kept(kept.chosen(numbers, at_once), model.mesh)
        hidden = multihost_utils.process_allgather(_hidden(model, rows), tiled=True)
        found.append(np.asarray(hidden)[: numbers.size])
    head = jax.jit(lambda kernel: kernel.astype(model.dtype).copy())(model.head_kernel())
    return {**frozen, BASE_HEAD: head}, kept.with_base(np.concatenate(found))


def abstract_kept(
    model: Transformer, frozen: dict[str, Array], keep: KeepOptions | None, *, rows: int, length: int
) -> tuple[dict[str, Array], DeviceKept | None]:
    """As shapes, the frozen weights and the batch of kept texts that a step is given; see `remember_base`."""
    if keep is None or keep.kind == "off_support":
        return frozen, None
    mesh, head = model.mesh, model.head_kernel()
    assert mesh is not None

    def abstract(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(shape, ("batch", *[None] * (len(shape) - 1)), mesh))

    dtypes = [np.float32 if name == "weight" else np.int32 for name in DeviceKept._fields[:-1]]
    kept: Any = DeviceKept(*(abstract(dtype, rows, length) for dtype in dtypes))  # type: ignore[arg-type]
    if keep.needs_remembering:
        kept = kept._replace(base_hidden=abstract(model.dtype, rows, length, head.shape[1]))
        frozen = {**frozen, BASE_HEAD: jax.ShapeDtypeStruct(head.shape, model.dtype, sharding=head.sharding)}  # type: ignore[dict-item]
    return frozen, kept


@nnx.jit
def _hidden(model: Transformer, rows: DeviceKept) -> Float[Array, "B T D"]:
    return model.hidden(rows.tokens, rows.positions, rows.subtree_end)[0]
