"""Models with random weights, made without compiling anything."""

import zlib

import numpy as np
import pytest


def _draw(path, variable):
    rng = np.random.default_rng(zlib.crc32("/".join(map(str, path)).encode()))
    std = 1.3 * variable.shape[-2] ** -0.5 if len(variable.shape) > 2 else 0.7
    return rng.normal(0, std, variable.shape)


@pytest.fixture(scope="session")
def random_model():
    """A model of a config; its weights are decided by path and shape alone, or taken from another model.

    Adapters' B are random too, as after training.
    """

    def make(config, *, weights=None, **options):
        import jax.numpy as jnp
        from flax import nnx

        from cft_jax.models.transformer import Transformer

        options = {"dtype": jnp.float32, "param_dtype": jnp.float32} | options
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, **options, rngs=nnx.Rngs(0))))
        drawn = {}
        for path, variable in nnx.to_flat_state(state):
            value = _draw(path, variable) if weights is None else weights[path]
            drawn[path] = variable.replace(jnp.asarray(np.asarray(value, np.float32), variable.dtype))
        return nnx.merge(graphdef, nnx.from_flat_state(drawn.items()))

    return make
