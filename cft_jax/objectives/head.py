"""The head's scores of hidden states, by blocks of the vocabulary: what the fused losses are made of."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cft_jax.models.layers import einsum
from cft_jax.sharding.rules import constrain, num_shards

# Up to this many scores (32 MiB of float32) take the plain form; a block of the blocked form is at most as large.
MAX_SCORES = 1 << 23
# Narrower blocks make the matrix products too thin to be efficient.
MIN_BLOCK = 1024


@dataclass(frozen=True)
class HeadOptions:
    """What shapes the scores and the loss.

    Attributes:
      tau: temperature of the model's softmax.
      softcap: c in c*tanh(score/c) before the temperature, or None.
      entropy: whether the loss is KL(q ‖ p), which has the targets' entropy taken off, or the cross-entropy.
      mesh: for sharding constraints; None on one device.
    """

    tau: float
    softcap: float | None
    entropy: bool
    mesh: Mesh | None


class Targets(NamedTuple):
    """The target distributions of B rows as lists of K entries.

    Attributes:
      position: the target position of its row that an entry belongs to.
      ids: the entry's token; no token twice at one position.
      probs: the entry's probability q; 0 at padding. They sum to 1 over each position's entries.
    """

    position: Int[Array, "B K"]
    ids: Int[Array, "B K"]
    probs: Float[Array, "B K"]


def num_blocks(positions: int, vocab: int, max_scores: int, shards: int = 1) -> int:
    """Into how many blocks the vocabulary is cut: few, and dividing a shard if a number near the fewest does."""
    fewest = min(-(-positions * vocab // max_scores), max(vocab // MIN_BLOCK, 1))
    dividing = (n for n in range(fewest, 2 * fewest + 1) if vocab % (n * shards) == 0)
    return next(dividing, fewest)


def scores_of(
    hidden: Float[Array, "B P D"], rows: Float[Array, "... D"], options: HeadOptions
) -> tuple[Float[Array, "B P W"], Float[Array, "B P W"] | float]:
    """Scores of the kernel's rows ([W, D], or [B, W, D]), and the derivative of each with respect to h·W."""
    equation = "BPD,WD->BPW" if rows.ndim == 2 else "BPD,BWD->BPW"
    raw = einsum(equation, hidden, rows, out_dtype=jnp.float32)
    if options.softcap is None:
        return raw / options.tau, 1 / options.tau
    bent: Array = jnp.tanh(raw / options.softcap)
    return bent * (options.softcap / options.tau), (1 - bent**2) / options.tau


@dataclass(frozen=True)
class VocabBlocks:
    """Block j holds the j-th of `count` stretches of each shard of the vocabulary.

    So every block spreads over all devices that share the head, and tokens with ids close together, as digits have,
    share a block.
    """

    options: HeadOptions
    count: int
    shards: int
    vocab: int

    @classmethod
    def of(cls, options: HeadOptions, positions: int, vocab: int, max_scores: int) -> "VocabBlocks":
        """As few as keep the scores of so many positions to a number."""
        shards = num_shards("vocab", options.mesh)
        shards = shards if vocab % shards == 0 else 1
        return cls(options, num_blocks(positions, vocab, max_scores, shards), shards, vocab)

    @property
    def stretch(self) -> int:
        """Tokens of a block on one shard."""
        return -(-self.vocab // (self.shards * self.count))

    @property
    def padded(self) -> int:
        """Tokens of all blocks, the rows that pad the kernel included."""
        return self.shards * self.count * self.stretch

    def block_of(self, token: Int[Array, "*S"]) -> Int[Array, "*S"]:
        return token // self.stretch % self.count

    def row_of(self, token: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Where in its block a token is."""
        return token // (self.count * self.stretch) * self.stretch + token % self.stretch

    def with_targets(self, targets: Targets) -> Bool[Array, "N"]:
        """Whether a token of each of the N blocks is a target."""
        block = jnp.where(targets.probs > 0, self.block_of(targets.ids), -1)
        return jnp.any(block[None] == jnp.arange(self.count)[:, None, None], axis=(1, 2))

    def fitting(self, kernel: Float[Array, "V D"]) -> Float[Array, "W D"]:
        """The kernel with rows of zeros behind it, where the blocks have more."""
        return jnp.pad(kernel, ((0, self.padded - self.vocab), (0, 0))) if self.padded != self.vocab else kernel

    def rows(self, kernel: Float[Array, "V D"], block: Int[Array, ""]) -> Float[Array, "W D"]:
        shape, dim = (self.shards, self.count, self.stretch), kernel.shape[1]
        rows = jax.lax.dynamic_index_in_dim(kernel.reshape(*shape, dim), block, axis=1, keepdims=False)
        return constrain(rows.reshape(self.shards * self.stretch, dim), ("vocab", "act_embed"), self.options.mesh)

    def joined(self, rows: Float[Array, "N W D"]) -> Float[Array, "V D"]:
        """The rows of all blocks in the order of the tokens."""
        parts = rows.reshape(self.count, self.shards, self.stretch, rows.shape[-1])
        return jnp.moveaxis(parts, 0, 1).reshape(self.padded, rows.shape[-1])

    def scores(
        self, hidden: Float[Array, "B P D"], rows: Float[Array, "W D"], block: Int[Array, ""]
    ) -> tuple[Float[Array, "B P W"], Float[Array, "B P W"] | float]:
        """As `scores_of`, with -inf at the rows that pad the kernel."""
        scores, slope = scores_of(hidden, rows, self.options)
        if self.padded != self.vocab:
            shard, offset = jnp.divmod(jnp.arange(rows.shape[0]), self.stretch)
            token = (shard * self.count + block) * self.stretch + offset
            scores = jnp.where(token[None, None] < self.vocab, scores, -jnp.inf)
        return constrain(scores, ("batch", None, "vocab"), self.options.mesh), slope


def weighted_rows(
    equation: str, weights: Float[Array, "..."], rows: Float[Array, "..."], *, parts: int = 1
) -> Float[Array, "..."]:
    """Weights times rows, sums in float32; the weights are the sum of so many numbers of the rows' dtype.

    One part, as in attention, is off by up to 2^-9 of a weight in bfloat16, two by 2^-18. float32 needs one.
    """
    # Unlike a conversion there and back, which XLA may take for none at all.
    info = jnp.finfo(rows.dtype)
    first = jax.lax.reduce_precision(weights, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    product = einsum(equation, first.astype(rows.dtype), rows, out_dtype=jnp.float32)
    if parts == 1 or rows.dtype == jnp.float32:
        return product
    return product + weighted_rows(equation, weights - first, rows, parts=parts - 1)
