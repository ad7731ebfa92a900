"""Training losses: pure functions of logits, or of hidden states and the head, in nats."""

from cft_jax.objectives.hard_target import hard_target_loss
from cft_jax.objectives.soft_target import soft_target_loss

__all__ = ["hard_target_loss", "soft_target_loss"]
