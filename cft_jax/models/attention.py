"""Grouped-query attention over any number of key/value segments, visible by position.

Every mask is one array: query i of a row sees key j of the same row iff `j <= i < subtree_end[j]`. Causal text, padding
(`subtree_end = 0`), packed sequences and trees in depth-first order are all of this form. Keys computed earlier (a
prompt shared by many rows, a decode cache) come as further segments.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cft_jax.models.config import ModelConfig
from cft_jax.models.dropout import Noise
from cft_jax.models.layers import Linear, RmsNorm, WeightInit, einsum, low_rank
from cft_jax.models.rope import rotate
from cft_jax.sharding.mesh import platform
from cft_jax.sharding.rules import constrain, num_shards

# Added nowhere, put in place of masked logits: finite, so that a row that sees nothing stays finite too.
MASKED = -1e30
# What the TPU kernels take: rows longer than decoding's single tokens, and whose keys a core's vector memory holds
# (per head, in numbers); it is too small for them before the fifth generation.
MIN_QUERIES, MAX_KEY_NUMBERS = 16, 8192 * 128
_WITHOUT_KERNELS = ("TPU v2", "TPU v3", "TPU v4")


class Segment(NamedTuple):
    """Keys and values of one layer, with who may see them.

    A segment may have fewer rows than the queries, R of B with R | B: row r then serves the queries' rows
    r*B/R ... (r+1)*B/R - 1 without being copied for each.
    """

    keys: Float[Array, "R S K H"]
    values: Float[Array, "R S K H"]
    visible: Bool[Array, "R #Q S"]


class Leaders(NamedTuple):
    """Rows that others continue: B rows are `groups` of equal size, whose first row leads.

    All rows of a group but the leader see its first `length` tokens, as they see earlier segments. So what many rows
    begin with goes through the model once, and along with them.
    """

    groups: int
    length: int

    def segment(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> tuple[Segment, Int[Array, "R S"]]:
        """The leaders' keys and values, visible to each query of the other rows, and their positions."""

        def first(x: Array) -> Array:
            return x.reshape(self.groups, -1, *x.shape[1:])[:, 0, : self.length]

        rows, length = positions.shape
        follows = jnp.arange(rows // self.groups * length) >= length
        visible = jnp.broadcast_to(follows[None, :, None], (self.groups, follows.size, self.length))
        return Segment(first(keys), first(values), visible), first(positions)


class Surroundings(NamedTuple):
    """What one layer's tokens attend to, and from where.

    Attributes:
      window: how many keys back they see, by position; None for all.
      cos_sin: of the layer's rope at `positions`.
      positions: of the tokens.
      subtree_end: of the tokens.
      visible: which of its row's own tokens each sees, the window aside.
      context: earlier segments with the positions of their keys.
      leaders: see `Leaders`; None where no row leads.
    """

    window: int | None
    cos_sin: tuple[Float[Array, "B T h"], Float[Array, "B T h"]]
    positions: Int[Array, "B T"]
    subtree_end: Int[Array, "B T"]
    visible: Bool[Array, "B T T"]
    context: tuple[tuple[Segment, Int[Array, "_ _"]], ...]
    leaders: "Leaders | None" = None


def tree_visible(subtree_end: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """visible[b, i, j] = j <= i < subtree_end[b, j]."""
    index = jnp.arange(subtree_end.shape[1])
    return (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < subtree_end[:, None, :])


def within_window(
    window: int | None, query_positions: Int[Array, "B T"], key_positions: Int[Array, "R S"]
) -> Bool[Array, "#R #Q #S"]:
    """Whether a key lies within the window of each query, by position (never by array index); [R, B/R*T, S]."""
    if window is None:
        return jnp.ones((1, 1, 1), bool)
    queries = query_positions.reshape(key_positions.shape[0], -1)
    return queries[:, :, None] - key_positions[:, None, :] < window


def attend(
    q: Float[Array, "B T N H"],
    segments: tuple[Segment, ...],
    *,
    scale: float,
    softcap: float | None,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of rotated queries over the union of the segments; logits, softmax and sums are float32.

    `softcap` is c in c*tanh(logit/c). `sinks` holds one more logit per query head, which takes mass and gives no value
    (gpt-oss).
    """
    B, T, N, H = q.shape
    parts = [_partial(q, segment, scale, softcap) for segment in segments]
    if sinks is not None:
        K, G = parts[0][0].shape[2:]
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(K, G), (B, T, K, G))
        parts.append((sink, jnp.ones_like(sink), jnp.zeros((B, T, K, G, H), jnp.float32)))
    top = jnp.max(jnp.stack([part[0] for part in parts]), axis=0)
    weights = [jnp.exp(part[0] - top) for part in parts]
    total = sum((w * part[1] for w, part in zip(weights, parts, strict=True)), jnp.zeros_like(top))
    out = sum((w[..., None] * part[2] for w, part in zip(weights, parts, strict=True)), jnp.zeros((), jnp.float32))
    return (out / total[..., None]).reshape(B, T, N, H).astype(q.dtype)


def _partial(
    q: Float[Array, "B T N H"], segment: Segment, scale: float, softcap: float | None
) -> tuple[Float[Array, "B T K G"], Float[Array, "B T K G"], Float[Array, "B T K G H"]]:
    """Largest logit, sum of exp(logit - largest) and weighted sum of values of one segment, float32."""
    B, T, N, H = q.shape
    R, _, K, _ = segment.keys.shape
    grouped = q.reshape(R, B // R * T, K, N // K, H)
    logits = einsum("RQKGH,RSKH->RKGQS", grouped, segment.keys, out_dtype=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(segment.visible[:, None, None], logits, MASKED)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    probs = jnp.exp(logits - top[..., None])
    out = einsum("RKGQS,RSKH->RQKGH", probs.astype(segment.values.dtype), segment.values, out_dtype=jnp.float32)
    shape = (B, T, K, N // K)
    moved = [jnp.transpose(x, (0, 3, 1, 2)).reshape(shape) for x in (top, jnp.sum(probs, axis=-1))]
    return moved[0], moved[1], out.reshape(*shape, H)


class Attention(nnx.Module):
    """Projections, per-head norms and rotary embeddings around `attend`; weights carry a leading layer axis."""

    def __init__(self, config: ModelConfig, init: WeightInit) -> None:
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        linear = functools.partial(Linear, init=init, bias=config.attn_bias)
        self.q_proj = linear("q_proj", "BTD,DNH->BTNH", (D, N, H), ("embed", "heads", "head_dim"))
        self.k_proj = linear("k_proj", "BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"))
        self.v_proj = linear("v_proj", "BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"))
        self.o_proj = linear("o_proj", "BTNH,NHD->BTD", (N, H, D), ("heads", "head_dim", "embed"))
        norm = functools.partial(RmsNorm, config, H, init.layers, init.dtype)
        self.q_norm, self.k_norm = (norm(), norm()) if config.qk_norm else (None, None)
        self.sinks = init.zeros((N,), ("heads",)) if config.attn_sinks else None
        self.scale, self.softcap = config.attn_scale, config.attn_softcap

    def __call__(
        self, x: Float[Array, "B T D"], surroundings: Surroundings, *, noise: Noise | None, mesh: Mesh | None
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        """Applies one layer's slice to normed activations; also returns the new keys (rotated) and values.

        `noise` is for the adapters' dropout, which None switches off.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x, low) for layer, low in zip(layers, low_rank(x, noise, "attention", *layers), strict=True))
        q = normed_and_rotated(q, self.q_norm, surroundings.cos_sin, mesh)
        k = normed_and_rotated(k, self.k_norm, surroundings.cos_sin, mesh)
        q = constrain(q, ("batch", "length", "heads", "head_dim"), mesh)
        k = constrain(k, ("batch", "length", "kv_heads", "head_dim"), mesh)
        v = constrain(v, ("batch", "length", "kv_heads", "head_dim"), mesh)
        attention = _by_kernel if _suits_kernel(q, k, surroundings, mesh) else _by_einsum
        sinks = None if self.sinks is None else self.sinks[...]
        out = attention(q, k, v, surroundings, scale=self.scale, softcap=self.softcap, sinks=sinks, mesh=mesh)
        return self.o_proj(out, *low_rank(out, noise, "o_proj", self.o_proj)), (k, v)


def normed_and_rotated(
    x: Float[Array, "B T N H"],
    norm: RmsNorm | None,
    cos_sin: tuple[Float[Array, "B T H"], Float[Array, "B T H"]],
    mesh: Mesh | None,
) -> Float[Array, "B T N H"]:
    """`x` after its heads' norm, if any, and rotation; in the dtype of `x`."""
    if mesh is None or not _has_kernels(mesh) or x.shape[1] == 1 or x.shape[3] % 128:
        return rotate(x if norm is None else norm(x), *cos_sin)
    from cft_jax.models.head_rotation import Factors, by_kernel

    scale = None if norm is None else (norm.offset + norm.scale[...].astype(jnp.float32))[None]
    eps = 0.0 if norm is None else norm.eps
    return jnp.swapaxes(by_kernel(jnp.swapaxes(x, 1, 2), Factors(*cos_sin, scale), eps, mesh), 1, 2)


def _by_einsum(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    surroundings: Surroundings,
    *,
    mesh: Mesh | None,
    **rule: Any,
) -> Float[Array, "B T N H"]:
    window, _, positions, _, visible, context, leaders = surroundings
    context = context if leaders is None else (*context, leaders.segment(k, v, positions))
    own = Segment(k, v, visible & within_window(window, positions, positions))
    earlier = tuple(
        segment._replace(visible=segment.visible & within_window(window, positions, at)) for segment, at in context
    )
    return attend(q, (*earlier, own), **rule)


def _by_kernel(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    surroundings: Surroundings,
    *,
    mesh: Mesh | None,
    **rule: Any,
) -> Float[Array, "B T N H"]:
    # Pallas takes 0.3 s to import, which only those who compile for a TPU need spend.
    from cft_jax.models.tree_attention import EVERY, Keys, tree_attention

    window, _, positions, subtree_end, _, context, leaders = surroundings
    segments = [Keys(keys, values, jnp.where(visible[:, 0], EVERY, 0), at) for (keys, values, visible), at in context]
    if leaders is not None:
        (keys, values, _), at = leaders.segment(k, v, positions)
        follows = jnp.arange(q.shape[0]) % (q.shape[0] // leaders.groups) > 0
        end = jnp.broadcast_to(jnp.where(follows, EVERY, 0)[:, None], (q.shape[0], leaders.length))
        segments.append(Keys(keys, values, end, at))
    segments.append(Keys(k, v, subtree_end, positions))
    return tree_attention(q, tuple(segments), positions, window=window, mesh=mesh, **rule)


def _suits_kernel(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], surroundings: Surroundings, mesh: Mesh | None
) -> bool:
    """Whether the TPU kernels run."""
    if mesh is None or not _has_kernels(mesh):
        return False
    segments, leaders = [segment for segment, _ in surroundings.context], surroundings.leaders
    keys = k.shape[1] + sum(segment.keys.shape[1] for segment in segments)
    rows = [segment.keys.shape[0] for segment in segments] + ([] if leaders is None else [leaders.groups])
    return (
        q.shape[1] >= MIN_QUERIES
        and keys * max(k.shape[3], 128) <= MAX_KEY_NUMBERS
        and all(segment.visible.shape[1] == 1 for segment in segments)
        and can_cut(q.shape[0], k.shape[2], tuple(rows), mesh)
    )


def _has_kernels(mesh: Mesh) -> bool:
    """Whether programs on a mesh may have kernels; its devices say what is compiled for, also where there is no TPU."""
    return platform(mesh) == "tpu" and not mesh.devices.flat[0].device_kind.startswith(_WITHOUT_KERNELS)


def can_cut(rows: int, kv_heads: int, segment_rows: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether each device of a mesh can run the kernels on its own rows and heads."""
    batch = num_shards("batch", mesh)
    return kv_heads % num_shards("kv_heads", mesh) == 0 and (
        rows % batch != 0 or all(count == 1 or count % batch == 0 for count in segment_rows)
    )
