"""What a run that trains from scratch starts from: a small random Llama, and a tokenizer fitted to its tasks."""

from collections.abc import Iterable
from pathlib import Path

from absl import logging
from transformers import PreTrainedTokenizerFast

from cft_jax.checkpoints import write_random_llama
from cft_jax.config import Config, ScratchConfig
from cft_jax.distributions import Task
from cft_jax.models.config import GatedMlp, LayerSpec, ModelConfig, Rope
from cft_jax.text import terminator_id
from cft_jax.text.scratch import save_tokenizer, train_tokenizer

# Written last, so that a directory that has it is whole.
LAST_FILE = "tokenizer.json"


def make_base(directory: Path, config: Config, tasks: Iterable[Task]) -> None:
    """Writes a randomly initialised model with a tokenizer fitted to the tasks of all splits, in Hugging Face format.

    Its architecture is Llama's, with a tied head. `directory` must be absent.
    """
    tokenizer = scratch_tokenizer(tasks)
    model = scratch_model(config.model.scratch, vocab_size=len(tokenizer))
    write_random_llama(
        directory,
        config=model,
        seed=config.seed,
        dtype="float32",
        eos_token_id=terminator_id(tokenizer, "tokenizer_eos"),
        max_length=max(config.data.max_length, config.eval.max_new_tokens),
    )
    save_tokenizer(tokenizer, directory)
    logging.info("made a model with a vocabulary of %d in %s", model.vocab_size, directory)


def scratch_model(scratch: ScratchConfig, *, vocab_size: int) -> ModelConfig:
    """The architecture of a model trained from scratch."""
    return ModelConfig(
        num_layers=scratch.num_layers,
        embed_dim=scratch.embed_dim,
        num_heads=scratch.num_heads,
        num_kv_heads=scratch.num_kv_heads,
        head_dim=scratch.head_dim,
        vocab_size=vocab_size,
        layer_pattern=(LayerSpec(None, Rope(10_000.0)),),
        mlp=GatedMlp(scratch.hidden_dim, "silu"),
        norm_eps=1e-5,
        attn_scale=scratch.head_dim**-0.5,
        tie_head=True,
    )


def scratch_tokenizer(tasks: Iterable[Task]) -> PreTrainedTokenizerFast:
    """The tokenizer of a model trained from scratch, fitted to the tasks' prompts and listed values."""
    texts = []
    for task in tasks:
        texts += [message["content"] for message in task.messages]
        texts += [] if task.space is None else task.space.values
    return train_tokenizer(texts)
