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

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cft_jax.objectives.head import MAX_SCORES, HeadOptions, Targets, VocabBlocks, scores_of, weighted_rows
from cft_jax.objectives.reference import target_divergence
from cft_jax.sharding.rules import constrain


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
    blocks = VocabBlocks.of(options, hidden.shape[0] * hidden.shape[1], kernel.shape[0], max_scores)
    if blocks.count == 1:
        return _plain(hidden, kernel, targets, options)
    return _blocked(hidden, blocks.fitting(kernel), targets, blocks)


def _plain(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], targets: Targets, options: HeadOptions
) -> Float[Array, "B P"]:
    scores = scores_of(hidden, kernel, options)[0]
    scores = constrain(scores, ("batch", None, "vocab"), options.mesh)
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    chosen = jax.vmap(lambda row, position, token: row[position, token])(log_probs, targets.position, targets.ids)
    terms = _entry_losses(chosen, targets.probs, options)
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=hidden.shape[1]))(terms, targets.position)


def _entry_losses(log_probs: Float[Array, "*S"], probs: Float[Array, "*S"], options: HeadOptions) -> Float[Array, "*S"]:
    if options.entropy:
        return target_divergence(log_probs, probs)
    return jnp.where(probs > 0, -probs * jnp.where(probs > 0, log_probs, 0.0), 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], targets: Targets, blocks: VocabBlocks
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
        return None, weighted_rows("BPW,BPD->WD", error, hidden)

    # A pass of its own that nothing else needs: XLA drops it when the kernel is frozen.
    to_kernel = blocks.joined(jax.lax.scan(of_block, None, jnp.arange(blocks.count))[1])
    return to_hidden, to_kernel.astype(kernel.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _over_vocabulary(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], has_targets: Bool[Array, "N"], blocks: VocabBlocks
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
            return weighted_rows("BPW,WD->BPD", weights, rows, parts=parts)

        exact = rows.dtype == jnp.float32
        block_mean = product(1) if exact else jax.lax.cond(targets_here, partial(product, 2), partial(product, 1))
        return (higher, sum_exp, mean * shrink[..., None] + block_mean), None

    lowest = jnp.full(hidden.shape[:2], jnp.finfo(jnp.float32).min)
    start = (lowest, jnp.zeros(hidden.shape[:2], jnp.float32), jnp.zeros(hidden.shape, jnp.float32))
    (max_logit, sum_exp, mean), _ = jax.lax.scan(add_block, start, (jnp.arange(blocks.count), has_targets))
    return max_logit + jnp.log(sum_exp), mean / sum_exp[..., None]


def _over_targets(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    targets: Targets,
    log_z: Float[Array, "B P"],
    blocks: VocabBlocks,
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
        scores, slope = scores_of(hidden, rows, blocks.options)
        own = chunk.position[:, None, :] == jnp.arange(P)[None, :, None]
        weights = jnp.where(own, chunk.probs[:, None, :], 0.0)
        losses = losses + jnp.sum(_entry_losses(scores - log_z[..., None], weights, blocks.options), axis=-1)
        total = total + jnp.sum(weights, axis=-1)
        mean = mean + weighted_rows("BPW,BWD->BPD", weights * slope, rows, parts=2)
        return (losses, total, mean), None

    zeros = jnp.zeros((B, P), jnp.float32)
    return jax.lax.scan(add_chunk, (zeros, zeros, jnp.zeros(hidden.shape, jnp.float32)), entries)[0]
