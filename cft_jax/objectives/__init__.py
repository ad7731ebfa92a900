"""What training minimises, in nats, as pure functions.

`batch_loss` sums over a batch what `fused_loss` makes of hidden states and the head; `reference` has the paper's
formulas of logits, which are public and which training never calls.
"""

from cft_jax.objectives.reference import hard_target_loss as hard_target_loss
from cft_jax.objectives.reference import soft_target_loss as soft_target_loss
