"""Training: optimizer, the jitted step, and the loop around it."""

from cft_jax.train.loop import NonFiniteLossError, TrainResult, train

__all__ = ["NonFiniteLossError", "TrainResult", "train"]
