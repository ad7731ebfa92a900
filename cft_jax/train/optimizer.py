"""AdamW as PyTorch's, and the warm-up and cosine schedule as Hugging Face's."""

import math

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def adamw(*, weight_decay: float, max_grad_norm: float) -> optax.GradientTransformation:
    """AdamW up to the learning rate: updates are to be multiplied by it and subtracted from the weights.

    As torch.optim.AdamW with its defaults (beta 0.9 and 0.999, epsilon 1e-8 outside the root): the decay is decoupled
    and falls on every trained weight.

    Args:
      weight_decay: per step, before the learning rate.
      max_grad_norm: the gradient is scaled down to this global norm first; 0 leaves it alone.
    """
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm > 0 else []
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0)
    return optax.chain(*clip, adam, optax.add_decayed_weights(weight_decay))


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """int(ratio · steps), as the paper's trainer counts them."""
    return int(warmup_ratio * total_steps)


def warmup_cosine(
    step: Int[Array, ""] | int, *, peak: float, warmup_ratio: float, total_steps: int
) -> Float[Array, ""]:
    """Learning rate of an update: linear from 0 over the warm-up, then a cosine down to 0 at `total_steps`.

    As transformers.get_cosine_schedule_with_warmup: with a warm-up, the first update (step 0) has rate 0.

    Args:
      step: number of updates done before this one.
      peak: the rate at the end of the warm-up.
      warmup_ratio: share of the steps that are warm-up.
      total_steps: of the whole run.
    """
    warmup = warmup_steps(warmup_ratio, total_steps)
    at = jnp.asarray(step, jnp.float32)
    rising = at / max(warmup, 1)
    progress = (at - warmup) / max(total_steps - warmup, 1)
    falling = jnp.maximum(0.5 * (1 + jnp.cos(math.pi * progress)), 0.0)
    return peak * jnp.where(at < warmup, rising, falling)
