"""What is remembered of a base whose weights are all trained: its hidden states of the kept texts, and its head."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cft_jax.common.errors import UserError
from cft_jax.data.kept import KeptTexts
from cft_jax.models.memory import host_memory
from cft_jax.models.transformer import Transformer
from cft_jax.sharding.rules import sharding
from cft_jax.train.keep import BASE_HEAD, DeviceKept, KeepOptions
from cft_jax.train.prefetch import put_kept


def remember_base(
    model: Transformer, frozen: dict[str, Array], kept: KeptTexts, options: KeepOptions | None, *, steps: int
) -> tuple[dict[str, Array], KeptTexts]:
    """The frozen weights with the base's head, and the texts with its hidden states, where the loss asks for them.

    Both are in the model's dtype; the hidden states are of the rows that the first `steps` steps see. The model still
    has the base's weights; a run that resumes begins with the same and makes the same again.

    Raises:
      UserError: the hidden states would take more than half of the host's memory.
    """
    assert model.mesh is not None and options is not None
    if not options.needs_remembering:
        return frozen, kept
    reached, (count, length) = kept.reached(steps), kept.rows.tokens.shape
    shape = (reached.size, length, model.config.embed_dim)
    _require_memory(math.prod(shape) * model.dtype.itemsize, rows=reached.size, available=host_memory())
    found, at_once = np.empty(shape, model.dtype), -(-kept.per_step // kept.row_multiple) * kept.row_multiple
    for start in range(0, count, at_once):
        # Always the same rows together, or a run that goes on for longer might not make the same bits again.
        numbers = np.arange(start, min(start + at_once, count))
        wanted = np.isin(numbers, reached)
        if wanted.any():
            rows = put_kept(kept.chosen(numbers, at_once), model.mesh)
            hidden = multihost_utils.process_allgather(_hidden(model, rows), tiled=True)
            found[np.searchsorted(reached, numbers[wanted])] = np.asarray(hidden)[: numbers.size][wanted]
    head = jax.jit(lambda kernel: kernel.astype(model.dtype).copy())(model.head_kernel())
    return {**frozen, BASE_HEAD: head}, kept.with_base(reached, found)


def _require_memory(needed: int, *, rows: int, available: int | None) -> None:
    if available is not None and needed > available / 2:
        raise UserError(
            f"what the base says of {rows:,} rows of kept texts takes {needed / 2**30:.1f} GiB of every host, more "
            f"than half of its {available / 2**30:.1f}; keep fewer texts, lower config.train.keep.rows, or train "
            "adapters, beside which nothing is remembered"
        )


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
