"""A model to ask: draws, exact probabilities of answers, and tasks made in Python."""

from cft_jax.ask.model import Model as Model
from cft_jax.ask.model import load as load
from cft_jax.ask.tasks import Task as Task
