"""Training losses: pure functions of logits, or of hidden states and the head, in nats."""

from cft_jax.objectives.reference import hard_target_loss, soft_target_loss

__all__ = ["hard_target_loss", "soft_target_loss"]
