"""The head and the loss in one: losses of target positions from hidden states, without logits of the whole vocabulary.

With z_v = h·W_v the scores of a position (soft-capped and divided by tau), its loss is Σ_c q_c (ln q_c − z_c + log_z),
log_z = log Σ_v exp z_v, and its gradient to h is Σ_v p_v W_v − Σ_c q_c W_c. Both sums over the vocabulary are those of
attention with the rows of W as keys and values, so one pass over blocks of W with a running maximum (as in
FlashAttention, arXiv 2205.14135) gives loss and gradient: two matrix products in all, against three when the backward
pass has to make the scores again. The gradient to W, where someone asks for it, takes a pass of its own.

Near its target a model's p and q agree to a few thousandths, which is what bfloat16 rounds away. The weights of all
that can cancel are therefore multiplied as a sum of two bfloat16 numbers: those of the targets, and those of the blocks
that hold a target of the batch. Where answers are numbers these are few; where all blocks do (answers of words), that
is a third matrix product. Subtracting q in float32 first would do too, by a scatter of all targets into every block.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cft_jax.models.layers import einsum
from cft_jax.objectives.reference import target_divergence
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


def position_losses(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    targets: Targets,
    options: HeadOptions,
    *,
    max_scores: int = MAX_SCORES,
) -> Float[Array, "B P"]:
    """Loss of every target position against the softmax over the whole vocabulary, in nats, float32.

    It is 0 where a position has no entries. Differentiable in `hidden`, states after the final norm, and in `kernel`,
    one row per token. Matrix products are of the operands' dtype with float32 sums; at most `max_scores` scores exist
    at a time.
    """
    kernel = kernel.astype(hidden.dtype)
    positions, vocab = hidden.shape[0] * hidden.shape[1], kernel.shape[0]
    shards = num_shards("vocab", options.mesh)
    shards = shards if vocab % shards == 0 else 1
    count = num_blocks(positions, vocab, max_scores, shards)
    if count == 1:
        return _plain(hidden, kernel, targets, options)
    blocks = _VocabBlocks(options, count, shards, vocab)
    if blocks.padded != vocab:
        kernel = jnp.pad(kernel, ((0, blocks.padded - vocab), (0, 0)))
    return _blocked(hidden, kernel, targets, blocks)


def num_blocks(positions: int, vocab: int, max_scores: int, shards: int = 1) -> int:
    """Into how many blocks the vocabulary is cut: few, and dividing a shard if a number near the fewest does."""
    fewest = min(-(-positions * vocab // max_scores), max(vocab // MIN_BLOCK, 1))
    dividing = (n for n in range(fewest, 2 * fewest + 1) if vocab % (n * shards) == 0)
    return next(dividing, fewest)


def _plain(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], targets: Targets, options: HeadOptions
) -> Float[Array, "B P"]:
    scores = _scores(hidden, kernel, options)[0]
    scores = constrain(scores, ("batch", None, "vocab"), options.mesh)
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    chosen = jax.vmap(lambda row, position, token: row[position, token])(log_probs, targets.position, targets.ids)
    terms = _entry_losses(chosen, targets.probs, options)
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=hidden.shape[1]))(terms, targets.position)


def _entry_losses(log_probs: Float[Array, "*S"], probs: Float[Array, "*S"], options: HeadOptions) -> Float[Array, "*S"]:
    if options.entropy:
        return target_divergence(log_probs, probs)
    return jnp.where(probs > 0, -probs * jnp.where(probs > 0, log_probs, 0.0), 0.0)


def _scores(
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
class _VocabBlocks:
    """Block j holds the j-th of `count` stretches of each shard of the vocabulary.

    So every block spreads over all devices that share the head, and tokens with ids close together, as digits have,
    share a block.
    """

    options: HeadOptions
    count: int
    shards: int
    vocab: int

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
        """As `_scores`, with -inf at the rows that pad the kernel."""
        scores, slope = _scores(hidden, rows, self.options)
        if self.padded != self.vocab:
            shard, offset = jnp.divmod(jnp.arange(rows.shape[0]), self.stretch)
            token = (shard * self.count + block) * self.stretch + offset
            scores = jnp.where(token[None, None] < self.vocab, scores, -jnp.inf)
        return constrain(scores, ("batch", None, "vocab"), self.options.mesh), slope


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], targets: Targets, blocks: _VocabBlocks
) -> Float[Array, "B P"]:
    return _blocked_forward(hidden, kernel, targets, blocks)[0]


def _blocked_forward(hidden, kernel, targets, blocks):
    log_z, under_model = _over_vocabulary(hidden, kernel, blocks.with_targets(targets), blocks)
    losses, total, under_target = _over_targets(hidden, kernel, targets, log_z, blocks)
    direction = total[..., None] * under_model - under_target
    return losses, (hidden, kernel, targets, log_z, total, direction)


def _blocked_backward(blocks, kept, gradient):
    hidden, kernel, targets, log_z, total, direction = kept
    to_hidden = (gradient[..., None] * direction).astype(hidden.dtype)

    def of_block(_, block):
        """Σ over positions of gradient (total p_v − q_v) (dz_v/d(h·W_v)) h."""
        rows = blocks.rows(kernel, block)
        scores, slope = blocks.scores(hidden, rows, block)
        error = total[..., None] * jnp.exp(scores - log_z[..., None])
        column = jnp.where(blocks.block_of(targets.ids) == block, blocks.row_of(targets.ids), rows.shape[0])
        take = jax.vmap(lambda row, position, at, probs: row.at[position, at].add(-probs, mode="drop"))
        error = take(error, targets.position, column, targets.probs) * slope * gradient[..., None]
        return None, _weighted_rows("BPW,BPD->WD", error, hidden)

    # A pass of its own that nothing else needs: XLA drops it when the kernel is frozen.
    to_kernel = blocks.joined(jax.lax.scan(of_block, None, jnp.arange(blocks.count))[1])
    return to_hidden, to_kernel.astype(kernel.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _over_vocabulary(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], has_targets: Bool[Array, "N"], blocks: _VocabBlocks
) -> tuple[Float[Array, "B P"], Float[Array, "B P D"]]:
    """log_z and Σ_v p_v (dz_v/d(h·W_v)) W_v of the positions; XLA drops what the caller does not use."""

    def add_block(carry, block_and_targets):
        block, targets_here = block_and_targets
        max_logit, sum_exp, mean = carry
        rows = blocks.rows(kernel, block)
        scores, slope = blocks.scores(hidden, rows, block)
        higher = jnp.maximum(max_logit, jnp.max(scores, axis=-1))
        shrink = jnp.exp(max_logit - higher)
        sum_exp = sum_exp * shrink + jnp.sum(jnp.exp(scores - higher[..., None]), axis=-1)

        def product(parts):
            # From the scores, lest the branches be handed float32 weights beside them.
            weights = jnp.exp(scores - higher[..., None]) * slope
            return _weighted_rows("BPW,WD->BPD", weights, rows, parts=parts)

        exact = rows.dtype == jnp.float32
        block_mean = product(1) if exact else jax.lax.cond(targets_here, partial(product, 2), partial(product, 1))
        return (higher, sum_exp, mean * shrink[..., None] + block_mean), None

    lowest = jnp.full(hidden.shape[:2], jnp.finfo(jnp.float32).min)
    start = (lowest, jnp.zeros(hidden.shape[:2], jnp.float32), jnp.zeros(hidden.shape, jnp.float32))
    (max_logit, sum_exp, mean), _ = jax.lax.scan(add_block, start, (jnp.arange(blocks.count), has_targets))
    return max_logit + jnp.log(sum_exp), mean / sum_exp[..., None]


def _weighted_rows(
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
    return product + _weighted_rows(equation, weights - first, rows, parts=parts - 1)


def _over_targets(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    targets: Targets,
    log_z: Float[Array, "B P"],
    blocks: _VocabBlocks,
) -> tuple[Float[Array, "B P"], Float[Array, "B P"], Float[Array, "B P D"]]:
    """The positions' losses, Σ_c q_c and Σ_c q_c (dz_c/d(h·W_c)) W_c.

    Entries go by chunks; a chunk's scores are made for all positions of its row and the wrong ones masked. That costs
    K / V of the pass over the vocabulary and needs no scattered addition, which is slow and, on GPUs, not reproducible.
    """
    (B, P, _), K = hidden.shape, targets.ids.shape[1]
    width = min(K, blocks.shards * blocks.stretch)
    chunks = -(-K // width)
    padding = ((0, 0), (0, chunks * width - K))
    entries = Targets(*(jnp.moveaxis(jnp.pad(x, padding).reshape(B, chunks, width), 1, 0) for x in targets))

    def add_chunk(carry, chunk):
        losses, total, mean = carry
        rows = constrain(kernel[chunk.ids], ("batch", None, "act_embed"), blocks.options.mesh)
        scores, slope = _scores(hidden, rows, blocks.options)
        own = chunk.position[:, None, :] == jnp.arange(P)[None, :, None]
        weights = jnp.where(own, chunk.probs[:, None, :], 0.0)
        losses = losses + jnp.sum(_entry_losses(scores - log_z[..., None], weights, blocks.options), axis=-1)
        total = total + jnp.sum(weights, axis=-1)
        mean = mean + _weighted_rows("BPW,BWD->BPD", weights * slope, rows, parts=2)
        return (losses, total, mean), None

    zeros = jnp.zeros((B, P), jnp.float32)
    return jax.lax.scan(add_chunk, (zeros, zeros, jnp.zeros(hidden.shape, jnp.float32)), entries)[0]
