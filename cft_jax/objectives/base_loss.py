"""How far a model has gone from its base: the KL of their next-token distributions, from the hidden states of both.

With p the model's softmax over the vocabulary and q the base's, the loss of a position is KL(q ‖ p), and its gradient
to the scores is p − q. As in `fused_loss`, the scores exist by blocks of the vocabulary. A first pass over these finds
both normalisers, a second one the loss and the gradient: five matrix products in all. One pass would do with four and
differences of large sums; here p − q is taken in float32 before anything is rounded, since where little was forgotten
it is all there is. The loss is summed as Σ_v q_v (e^-d_v − 1 + d_v) with d = ln q − ln p, whose terms are not negative
and of second order in d; they differ from q_v d_v by p_v − q_v, which sum to zero.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cft_jax.objectives.head import MAX_SCORES, HeadOptions, Targets, VocabBlocks, weighted_rows

# Below this, e^-d − 1 + d is computed by expm1; above it nothing cancels, and e^-d might overflow.
_SMALL = 1.0


class Base(NamedTuple):
    """What a model is compared with, which gets no gradient.

    Attributes:
      hidden: its hidden states of the same positions.
      kernel: its head, one row per token.
    """

    hidden: Float[Array, "B P D"]
    kernel: Float[Array, "V D"]


def base_divergences(
    hidden: Float[Array, "B P D"],
    kernel: Float[Array, "V D"],
    base: Base,
    options: HeadOptions,
    *,
    without: Targets | None = None,
    max_scores: int = MAX_SCORES,
) -> Float[Array, "B P"]:
    """KL(base ‖ model) of every position over the whole vocabulary, in nats, float32.

    Differentiable in `hidden`, states after the final norm, and in `kernel`. At most `max_scores` scores of each of the
    two exist at a time.

    Args:
      hidden: the model's.
      kernel: the model's head.
      base: what it is compared with.
      options: of the scores; `entropy` does not matter.
      without: tokens that are left out of both distributions, which are then renormalised: those of a position that
        have a probability here (arXiv 2605.29498). At least one token must be left.
      max_scores: see above.
    """
    blocks = VocabBlocks.of(options, hidden.shape[0] * hidden.shape[1], kernel.shape[0], max_scores)
    fixed = jax.lax.stop_gradient(Base(base.hidden, blocks.fitting(base.kernel.astype(base.hidden.dtype))))
    return _divergences(hidden, blocks.fitting(kernel.astype(hidden.dtype)), fixed, without, blocks)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _divergences(
    hidden: Float[Array, "B P D"], kernel: Float[Array, "V D"], base: Base, without: Targets | None, blocks: VocabBlocks
) -> Float[Array, "B P"]:
    return _forward(hidden, kernel, base, without, blocks)[0]


def _forward(hidden, kernel, base, without, blocks):
    log_z = _normalisers(hidden, kernel, base, without, blocks)

    def add_block(carry, block):
        losses, direction = carry
        rows, log_probs, slope = _log_probs(hidden, kernel, base, without, blocks, log_z, block)
        error = _errors(log_probs) * slope
        direction = direction + weighted_rows("BPW,WD->BPD", error, rows)
        return (losses + jnp.sum(_terms(log_probs), axis=-1), direction), None

    start = (jnp.zeros(hidden.shape[:2], jnp.float32), jnp.zeros(hidden.shape, jnp.float32))
    (losses, direction), _ = jax.lax.scan(add_block, start, jnp.arange(blocks.count))
    return losses, (hidden, kernel, base, without, log_z, direction)


def _backward(blocks, kept, gradient):
    hidden, kernel, base, without, log_z, direction = kept
    to_hidden = (gradient[..., None] * direction).astype(hidden.dtype)

    def of_block(_, block):
        _, log_probs, slope = _log_probs(hidden, kernel, base, without, blocks, log_z, block)
        return None, weighted_rows("BPW,BPD->WD", _errors(log_probs) * slope * gradient[..., None], hidden)

    # A pass of its own that nothing else needs: XLA drops it when the kernel is frozen.
    to_kernel = blocks.joined(jax.lax.scan(of_block, None, jnp.arange(blocks.count))[1])
    return to_hidden, to_kernel.astype(kernel.dtype), None, None


_divergences.defvjp(_forward, _backward)


class _Pair(NamedTuple):
    """The same of the model and of its base."""

    model: Float[Array, "..."]
    base: Float[Array, "..."]


def _normalisers(hidden, kernel, base, without, blocks) -> _Pair:
    """The logarithms of the sums of exp of the scores, [B, P] each."""

    def add_block(carry, block):
        _, scores, _ = _scores(hidden, kernel, base, without, blocks, block)
        return jax.tree.map(lambda so_far, s: jnp.logaddexp(so_far, jax.nn.logsumexp(s, axis=-1)), carry, scores), None

    nothing = jnp.full(hidden.shape[:2], -jnp.inf)
    return jax.lax.scan(add_block, _Pair(nothing, nothing), jnp.arange(blocks.count))[0]


def _log_probs(hidden, kernel, base, without, blocks, log_z, block):
    """The model's rows of a block, the log-probabilities of both, and the slope of the model's scores."""
    rows, scores, slope = _scores(hidden, kernel, base, without, blocks, block)
    return rows, jax.tree.map(lambda s, z: s - z[..., None], scores, log_z), slope


def _scores(hidden, kernel, base, without, blocks, block):
    rows = blocks.rows(kernel, block)
    of_model, slope = blocks.scores(hidden, rows, block)
    of_base, _ = blocks.scores(base.hidden, blocks.rows(base.kernel, block), block)
    if without is not None:
        left_out = _held(without, of_model.shape, blocks, block)
        of_model, of_base = (jnp.where(left_out, -jnp.inf, s) for s in (of_model, of_base))
    return rows, _Pair(of_model, of_base), slope


def _held(targets: Targets, shape: tuple[int, ...], blocks: VocabBlocks, block: Int[Array, ""]) -> Bool[Array, "B P W"]:
    """Which tokens of a block are entries of which positions."""
    here = (targets.probs > 0) & (blocks.block_of(targets.ids) == block)
    column = jnp.where(here, blocks.row_of(targets.ids), shape[-1])
    mark = jax.vmap(lambda position, at: jnp.zeros(shape[1:], bool).at[position, at].set(True, mode="drop"))
    return mark(targets.position, column)


def _errors(log_probs: _Pair) -> Float[Array, "B P W"]:
    return jnp.exp(log_probs.model) - jnp.exp(log_probs.base)


def _terms(log_probs: _Pair) -> Float[Array, "B P W"]:
    """The loss of every token, q (e^-d − 1 + d); 0 where there is none."""
    there = jnp.isfinite(log_probs.base)
    p, q = jnp.exp(log_probs.model), jnp.exp(log_probs.base)
    d = jnp.where(there, log_probs.base - log_probs.model, 0.0)
    is_small = jnp.abs(d) < _SMALL
    near = jnp.where(is_small, d, 0.0)
    return jnp.where(is_small, q * (jnp.expm1(-near) + near), q * d + p - q)
