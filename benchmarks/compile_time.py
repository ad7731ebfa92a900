"""How long the training step takes to compile, by depth: layers are scanned, so depth should hardly matter.

    python benchmarks/compile_time.py [--layers 8 48] [--repeats 3] [--families qwen3]

Prints seconds of tracing and compiling per family and depth, and the ratio to the first depth.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cft_jax.models.config import LoraSpec, ModelConfig
from cft_jax.models.families import PUBLISHED
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.batch_loss import DeviceBatch
from cft_jax.objectives.head import HeadOptions
from cft_jax.train.optimizer import adamw, warmup_cosine
from cft_jax.train.state import initial_state, split_model, state_shardings
from cft_jax.train.step import StepOptions, make_train_step

# Narrow versions of the published shapes: compile time does not depend on widths.
NARROW = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 512}
FAMILIES = {
    "llama": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gemma3": "google/gemma-3-4b-it",
    "gpt_oss": "openai/gpt-oss-20b",
}
ROWS, LENGTH, STEPS, TARGETS = 4, 64, 8, 32


def narrow(name: str, layers: int) -> ModelConfig:
    """A published architecture with small sizes and the given depth."""
    config = PUBLISHED[FAMILIES[name]]
    mlp = dataclasses.replace(config.mlp, hidden_dim=96)
    return dataclasses.replace(config, num_layers=layers, mlp=mlp, **NARROW)


def batch() -> DeviceBatch:
    """Zeros in the shapes of a batch."""
    fields = {
        "tokens": ((ROWS, LENGTH), np.int32),
        "positions": ((ROWS, LENGTH), np.int32),
        "subtree_end": ((ROWS, LENGTH), np.int32),
        "target_index": ((ROWS, STEPS), np.int32),
        "target_weight": ((ROWS, STEPS), np.float32),
        "target_position": ((ROWS, TARGETS), np.int32),
        "target_ids": ((ROWS, TARGETS), np.int32),
        "target_probs": ((ROWS, TARGETS), np.float32),
        "row_weight": ((ROWS,), np.float32),
    }
    return DeviceBatch(**{name: jnp.zeros(shape, dtype) for name, (shape, dtype) in fields.items()})


def seconds(config: ModelConfig) -> float:
    """CPU seconds of tracing and compiling one training step from nothing."""
    lora = LoraSpec(rank=16, alpha=32.0, dropout=0.05, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    model = nnx.jit(lambda: Transformer(config, lora=lora, rngs=nnx.Rngs(0)))()
    parts, weights, frozen = split_model(model)
    optimizer = adamw(weight_decay=0.01, max_grad_norm=0.0)
    options = StepOptions(
        loss=HeadOptions(tau=1.0, softcap=config.final_softcap, entropy=True, mesh=None),
        shared_prefix=(),
        micro_batches=1,
        seed=0,
        optimizer=optimizer,
        learning_rate=functools.partial(warmup_cosine, peak=1e-4, warmup_ratio=0.03, total_steps=100),
    )
    state = initial_state(weights, optimizer)
    step = make_train_step(parts, options, state_shardings(weights, optimizer))
    jax.clear_caches()
    start = time.process_time()
    step.lower(state, frozen, batch()).compile()  # type: ignore[attr-defined]
    return time.process_time() - start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    arguments = parser.parse_args()
    for name in arguments.families:
        times = [min(seconds(narrow(name, depth)) for _ in range(arguments.repeats)) for depth in arguments.layers]
        figures = ", ".join(f"{depth} layers {t:.2f} s" for depth, t in zip(arguments.layers, times, strict=True))
        print(f"{name:8} {figures}; ratio {times[-1] / times[0]:.2f}")


if __name__ == "__main__":
    main()
