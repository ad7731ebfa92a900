"""The head and the loss in one: per-step losses from hidden states, without logits of the whole vocabulary.

With z_v = h·W_v the scores of a step (soft-capped and divided by tau), a step's loss is Σ_c q_c (ln q_c − z_c + lse),
lse = log Σ_v exp z_v, and its gradient to h is Σ_v p_v W_v − Σ_c q_c W_c. Both sums over the vocabulary are those of
attention with the rows of W as keys and values, so one pass over blocks of W with a running maximum (as in
FlashAttention, arXiv 2205.14135) gives loss and gradient: two matrix products in all, against three when the backward
pass has to make the scores again. The gradient to W, where someone asks for it, takes a pass of its own.

Near its target a model's p and q agree to a few thousandths, which is what bfloat16 rounds away. The weights of all
that can cancel are therefore multiplied as a sum of two bfloat16 numbers: those of the targets, and those of the blocks
that hold a target of the batch. Where answers are numbers these are few; where all blocks do (answers of words), that
is a third matrix product. Subtracting q in float32 first would do too, by a scatter of all targets into every block.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cft_jax.models.layers import einsum
from cft_jax.objectives.reference import target_divergence
from cft_jax.sharding.rules import RULES, constrain

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


def step_losses(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    target_step: Int[Array, "B K"],
    target_ids: Int[Array, "B K"],
    target_probs: Float[Array, "B K"],
    options: HeadOptions,
    *,
    max_scores: int = MAX_SCORES,
) -> Float[Array, "B P"]:
    """Loss of every step against the softmax over the whole vocabulary, in nats, float32.

    Differentiable in `hidden` and `kernel`. Matrix products are of the operands' dtype with float32 sums.

    Args:
      hidden: states that predict the steps, after the final norm.
      kernel: one row per token.
      target_step: the step of its row that an entry belongs to.
      target_ids: the entry's token; no token twice in one step.
      target_probs: the entry's probability q; 0 at padding. They sum to 1 over each step's entries.
      options: see `HeadOptions`.
      max_scores: how many scores may exist at a time.

    Returns:
      The losses; 0 where a step has no entries.
    """
    kernel = kernel.astype(hidden.dtype)
    steps, vocab = hidden.shape[0] * hidden.shape[1], kernel.shape[0]
    shards = 1 if options.mesh is None else math.prod(options.mesh.shape[axis] for axis in RULES["vocab"])
    shards = shards if vocab % shards == 0 else 1
    count = num_blocks(steps, vocab, max_scores, shards)
    if count == 1:
        return _plain(hidden, kernel, target_step, target_ids, target_probs, options)
    blocks = _VocabBlocks(options, count, shards, vocab)
    if blocks.padded != vocab:
        kernel = jnp.pad(kernel, ((0, blocks.padded - vocab), (0, 0)))
    return _blocked(hidden, kernel, target_step, target_ids, target_probs, blocks)


def num_blocks(steps: int, vocab: int, max_scores: int, shards: int = 1) -> int:
    """Into how many blocks the vocabulary is cut: few, and dividing a shard if a number near the fewest does."""
    fewest = min(-(-steps * vocab // max_scores), max(vocab // MIN_BLOCK, 1))
    dividing = [n for n in range(fewest, 2 * fewest + 1) if vocab % (n * shards) == 0]
    return dividing[0] if dividing else fewest


def _plain(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    target_step: Int[Array, "B K"],
    target_ids: Int[Array, "B K"],
    target_probs: Float[Array, "B K"],
    options: HeadOptions,
) -> Float[Array, "B P"]:
    scores = _scores(hidden, kernel, options)[0]
    scores = constrain(scores, ("batch", None, "vocab"), options.mesh)
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    chosen = jax.vmap(lambda row, step, token: row[step, token])(log_probs, target_step, target_ids)
    terms = _entry_losses(chosen, target_probs, options)
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=hidden.shape[1]))(terms, target_step)


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
        """The block of a token."""
        return token // self.stretch % self.count

    def row_of(self, token: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Where in its block a token is."""
        return token // (self.count * self.stretch) * self.stretch + token % self.stretch

    def rows(self, kernel: Float[Array, "V D"], block: Int[Array, ""]) -> Float[Array, "W D"]:
        shape, dim = (self.shards, self.count, self.stretch), kernel.shape[1]
        rows = jax.lax.dynamic_index_in_dim(kernel.reshape(*shape, dim), block, axis=1, keepdims=False)
        return constrain(rows.reshape(self.shards * self.stretch, dim), ("vocab", "act_embed"), self.options.mesh)

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


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    target_step: Int[Array, "B K"],
    target_ids: Int[Array, "B K"],
    target_probs: Float[Array, "B K"],
    blocks: _VocabBlocks,
) -> Float[Array, "B P"]:
    return _blocked_forward(hidden, kernel, target_step, target_ids, target_probs, blocks)[0]


def _blocked_forward(hidden, kernel, target_step, target_ids, target_probs, blocks):
    in_block = jnp.where(target_probs > 0, blocks.block_of(target_ids), -1)
    has_targets = jnp.any(in_block[None] == jnp.arange(blocks.count)[:, None, None], axis=(1, 2))
    normaliser, under_model = _over_vocabulary(hidden, kernel, has_targets, blocks)
    losses, mass, under_target = _over_targets(
        hidden, kernel, target_step, target_ids, target_probs, normaliser, blocks
    )
    direction = mass[..., None] * under_model - under_target
    return losses, (hidden, kernel, target_step, target_ids, target_probs, normaliser, mass, direction)


def _blocked_backward(blocks, kept, gradient):
    hidden, kernel, target_step, target_ids, target_probs, normaliser, mass, direction = kept
    to_hidden = (gradient[..., None] * direction).astype(hidden.dtype)
    # A pass of its own that nothing else needs: XLA drops it when the kernel is frozen.
    to_kernel = _kernel_gradient(
        hidden, kernel, target_step, target_ids, target_probs, normaliser, mass, gradient, blocks
    )
    return to_hidden, to_kernel.astype(kernel.dtype), None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _over_vocabulary(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], has_targets: Bool[Array, "N"], blocks: _VocabBlocks
) -> tuple[Float[Array, "B P"], Float[Array, "B P D"]]:
    """The steps' log Σ_v exp z_v and Σ_v p_v (dz_v/d(h·W_v)) W_v; XLA drops what the caller does not use.

    `has_targets` says of each of the N blocks whether a token in it is a target.
    """

    def add_block(carry, block_and_targets):
        block, targets_here = block_and_targets
        peak, mass, mean = carry
        rows = blocks.rows(kernel, block)
        scores, slope = blocks.scores(hidden, rows, block)
        higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
        shrink = jnp.exp(peak - higher)
        weights = jnp.exp(scores - higher[..., None])
        mass = mass * shrink + jnp.sum(weights, axis=-1)

        def product(parts):
            # From the scores, lest the branches be handed float32 weights beside them.
            return _weighted_rows("BPW,WD->BPD", jnp.exp(scores - higher[..., None]) * slope, rows, parts=parts)

        exact = rows.dtype == jnp.float32
        block_mean = product(1) if exact else jax.lax.cond(targets_here, partial(product, 2), partial(product, 1))
        return (higher, mass, mean * shrink[..., None] + block_mean), None

    lowest = jnp.full(hidden.shape[:2], jnp.finfo(jnp.float32).min)
    start = (lowest, jnp.zeros(hidden.shape[:2], jnp.float32), jnp.zeros(hidden.shape, jnp.float32))
    (peak, mass, mean), _ = jax.lax.scan(add_block, start, (jnp.arange(blocks.count), has_targets))
    return peak + jnp.log(mass), mean / mass[..., None]


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
    target_step: Int[Array, "B K"],
    target_ids: Int[Array, "B K"],
    target_probs: Float[Array, "B K"],
    normaliser: Float[Array, "B P"],
    blocks: _VocabBlocks,
) -> tuple[Float[Array, "B P"], Float[Array, "B P"], Float[Array, "B P D"]]:
    """The steps' losses, Σ_c q_c and Σ_c q_c (dz_c/d(h·W_c)) W_c.

    Entries go by chunks; a chunk's scores are made for all steps of its row and the wrong ones masked. That costs
    K / V of the pass over the vocabulary and needs no scattered addition, which is slow and, on GPUs, not reproducible.
    """
    (B, P, _), K = hidden.shape, target_ids.shape[1]
    width = min(K, blocks.shards * blocks.stretch)
    chunks = -(-K // width)
    spare = chunks * width - K
    entries = [
        jnp.moveaxis(jnp.pad(x, ((0, 0), (0, spare))).reshape(B, chunks, width), 1, 0)
        for x in (target_step, target_ids, target_probs)
    ]
    options = blocks.options

    def add_chunk(carry, chunk):
        losses, mass, mean = carry
        step, token, probs = chunk
        rows = constrain(kernel[token], ("batch", None, "act_embed"), options.mesh)
        scores, slope = _scores(hidden, rows, options)
        own = step[:, None, :] == jnp.arange(P)[None, :, None]
        weights = jnp.where(own, probs[:, None, :], 0.0)
        losses = losses + jnp.sum(_entry_losses(scores - normaliser[..., None], weights, options), axis=-1)
        mass = mass + jnp.sum(weights, axis=-1)
        mean = mean + _weighted_rows("BPW,BWD->BPD", weights * slope, rows, parts=2)
        return (losses, mass, mean), None

    zeros = jnp.zeros((B, P), jnp.float32)
    start = (zeros, zeros, jnp.zeros(hidden.shape, jnp.float32))
    return jax.lax.scan(add_chunk, start, tuple(entries))[0]


def _kernel_gradient(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    target_step: Int[Array, "B K"],
    target_ids: Int[Array, "B K"],
    target_probs: Float[Array, "B K"],
    normaliser: Float[Array, "B P"],
    mass: Float[Array, "B P"],
    gradient: Float[Array, "B P"],
    blocks: _VocabBlocks,
) -> Float[Array, "V D"]:
    """Σ over steps of gradient (mass p_v − q_v) (dz_v/d(h·W_v)) h, block by block."""

    def of_block(_, block):
        rows = blocks.rows(kernel, block)
        scores, slope = blocks.scores(hidden, rows, block)
        error = mass[..., None] * jnp.exp(scores - normaliser[..., None])
        column = jnp.where(blocks.block_of(target_ids) == block, blocks.row_of(target_ids), rows.shape[0])
        take = jax.vmap(lambda row, step, at, probs: row.at[step, at].add(-probs, mode="drop"))
        error = take(error, target_step, column, target_probs) * slope * gradient[..., None]
        return None, _weighted_rows("BPW,BPD->WD", error, hidden)

    _, stacked = jax.lax.scan(of_block, None, jnp.arange(blocks.count))
    return jnp.moveaxis(stacked.reshape(blocks.count, blocks.shards, blocks.stretch, -1), 0, 1).reshape(kernel.shape)
