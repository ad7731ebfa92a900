"""Looking into the transformer layer by layer, to find where two implementations part."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from cft_jax.models.transformer import Transformer


def layer_outputs(
    model: Transformer, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], subtree_end: Int[Array, "B T"]
) -> list[Float[Array, "B T D"]]:
    """The embeddings, the activations after every layer, and those after the final norm.

    As `output_hidden_states` of transformers, whose last entry is normed and stands for the last two here. Layers run
    one by one instead of scanned; arguments as `Transformer.hidden`.
    """
    x, visible, ropes = model.begin(tokens, positions, subtree_end)
    outputs = [x]
    for blocks, (repeats, pattern) in zip(model.stacks, model.config.stacks, strict=True):
        graphdef, state = nnx.split(blocks)
        for repeat in range(repeats):
            layers = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=repeat: leaf[i], state))
            for block, spec in zip(layers, pattern, strict=True):
                x, _ = block(x, spec, ropes[spec.rope], positions, visible, (), key=None, mesh=model.mesh)
                outputs.append(x)
    return [*outputs, model.final_norm(x)]
