"""Sampling and exact evaluation beside `transformers` `generate`, on the same weights.

Ten prompts of the paper's kind, 1,000 samples each at temperature 1 from the whole vocabulary, on a small model of
Qwen3's shape (151,936 tokens, float32), with two sets of weights:

- trained: the same model after some steps of training on the ten prompts. Its answers are numbers, which share most of
  their beginnings, as those of every model that one wants to measure do.
- random: nearly uniform over the vocabulary. No two samples share more than the prompt, no text ends by itself, and
  every one takes --max_new_tokens tokens: the worst case.

`generate` runs in batches of 16 (the paper's) and of 250, on as many samples of the first prompt as --hf_samples says,
rounded up to whole batches; its speed does not depend on the prompt. Exact evaluation is `score_trie` on the paper's
1,001 values: of all ten prompts in one call, as our samples are drawn, and of one prompt after another, as `generate`
draws. Everything is run once before it is timed, to compile.

    CFT_TOKENIZERS=/path/to/tokenizers python benchmarks/generate.py

Takes some ten minutes on two cores, most of them `generate`'s.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cft_jax.checkpoints import from_pretrained, save_pretrained
from cft_jax.distributions import PromptSpec, build_splits, output_space
from cft_jax.generate import Sampler, TrieScorer
from cft_jax.models.transformer import Transformer
from cft_jax.objectives.fused_loss import position_losses
from cft_jax.objectives.head import HeadOptions, Targets
from cft_jax.text import build_trie, encode_chat, load_tokenizer
from cft_jax.text.trie import Trie

NUM_PROMPTS, NUM_SAMPLES = 10, 1000
FAMILIES = ("gaussian", "beta", "gamma", "logistic", "uniform")
# Bounds of the project.
BOUNDS = {"16": 12.0, "250": 8.0, "exact of own": 0.5, "exact over 16": 30.0}


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def write_model(directory: Path, width: int) -> None:
    """A random model of Qwen3's shape, in HF format."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936, hidden_size=width, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=3 * width, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
        eos_token_id=151645,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)


def choose_prompts(tokenizer) -> tuple[list[list[int]], list[Trie]]:
    """Ten prompts of the paper's training split and the tries of their answers."""
    specs: list[PromptSpec] = []
    for family in FAMILIES:
        of_family = [spec for spec in build_splits()["train"] if spec.family_id == family]
        specs += [of_family[i] for i in np.linspace(0, len(of_family) - 1, NUM_PROMPTS // len(FAMILIES), dtype=int)]
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": spec.prompt}]) for spec in specs]
    spaces = [output_space(spec, num_decimals=5, max_bins=1001) for spec in specs]
    return prompts, [build_trie(tokenizer, space, tokenizer.eos_token_id) for space in spaces]


def strings_of(trie: Trie, rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[list[int]]]:
    """Drawn strings, and the prefixes on the path of each."""
    leaves = trie.leaf_prefix[rng.choice(trie.leaf_prefix.size, count, p=trie.leaf_probs)]
    paths = []
    for leaf in leaves.tolist():
        path = [leaf]
        while path[-1]:
            path.append(int(trie.parent[path[-1]]))
        paths.append(path[::-1])
    return leaves, paths


def train(model: Transformer, prompts: list[list[int]], tries: list[Trie], steps: int, paths: int) -> None:
    """Soft targets on drawn paths of all prompts, Adam; enough to make the answers numbers of the right shape."""
    depth, longest = max(trie.max_depth for trie in tries) + 1, max(map(len, prompts))
    fanout = max(trie.max_children for trie in tries)
    graphdef, weights = nnx.split(model)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    options = HeadOptions(tau=1.0, softcap=None, entropy=True, mesh=None)

    @jax.jit
    def step(weights, moments, tokens, positions, subtree_end, index, ids, probs, weight):
        def loss(weights):
            model = nnx.merge(graphdef, weights)
            hidden, _ = model.hidden(tokens, positions, subtree_end)
            hidden = jnp.take_along_axis(hidden, index[:, :, None], axis=1)
            entry_position = jnp.broadcast_to(jnp.repeat(jnp.arange(depth), fanout), ids.shape)
            losses = position_losses(hidden, model.head_kernel(), Targets(entry_position, ids, probs), options)
            return jnp.sum(losses * weight) / jnp.sum(weight)

        value, gradient = jax.value_and_grad(loss)(weights)
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments, value

    moments, rng = optimizer.init(weights), np.random.default_rng(0)
    for number in range(steps):
        batch = _batch(prompts, tries, rng, paths, (longest, depth, fanout))
        weights, moments, value = step(weights, moments, *batch)
        if number % 50 == 0 or number == steps - 1:
            print(f"training step {number}: path KL {float(value):.3f}", flush=True)
    nnx.update(model, weights)


def _batch(prompts, tries, rng, paths, sizes):
    longest, depth, fanout = sizes
    count, width = len(prompts) * paths, longest + depth
    tokens, positions, subtree_end = (np.zeros((count, width), np.int32) for _ in range(3))
    index, weight = np.zeros((count, depth), np.int32), np.zeros((count, depth), np.float32)
    ids, probs = np.zeros((count, depth, fanout), np.int32), np.zeros((count, depth, fanout), np.float32)
    row = 0
    for prompt, trie in zip(prompts, tries, strict=True):
        for path in strings_of(trie, rng, paths)[1]:
            text = [*prompt, *trie.token[path[1:]].tolist()]
            tokens[row, : len(text)], positions[row] = text, np.arange(width)
            subtree_end[row, : len(text)] = len(text)
            for place, prefix in enumerate(path):
                entries = slice(*trie.child_offsets[prefix : prefix + 2])
                size = entries.stop - entries.start
                ids[row, place, :size], probs[row, place, :size] = trie.child_ids[entries], trie.child_probs[entries]
                index[row, place], weight[row, place] = len(prompt) - 1 + place, 1
            row += 1
    return tokens, positions, subtree_end, index, ids.reshape(count, -1), probs.reshape(count, -1), weight


def samples_per_second(model: Transformer, tokenizer, prompts, max_new_tokens: int) -> tuple[float, float]:
    """Of our sampler over all prompts, and the tokens of a sample."""
    sampler = Sampler(model, tokenizer)
    options = {"num_samples": NUM_SAMPLES, "max_new_tokens": max_new_tokens}
    drawn = sampler.complete(prompts, seed=1, **options)
    length = float(np.mean([len(item.tokens) + (item.reason == "stop") for items in drawn for item in items]))
    took = seconds(lambda: sampler.sample(prompts, seed=2, **options))
    return len(prompts) * NUM_SAMPLES / took, length


def hf_samples_per_second(directory: Path, tokenizer, prompt, max_new_tokens: int, batch: int, samples: int) -> float:
    """Of `generate`, from the first prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([prompt]).repeat(batch, 1)
    options = {
        "attention_mask": torch.ones_like(ids), "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "max_new_tokens": max_new_tokens, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0,
    }  # fmt: skip
    batches = -(-samples // batch)
    with torch.no_grad():
        model.generate(ids, **options)
        took = seconds(lambda: [model.generate(ids, **options) for _ in range(batches)])
    return batches * batch / took


def exact_seconds(model: Transformer, prompts, tries, at_a_time: int) -> float:
    """Of one prompt, on average over all, so many in one call."""
    scorer = TrieScorer(model)

    def run() -> None:
        for start in range(0, len(prompts), at_a_time):
            scorer.score(prompts[start : start + at_a_time], tries[start : start + at_a_time])

    run()
    return seconds(run) / len(prompts)


def measure(kind: str, directory: Path, model, tokenizer, prompts, tries, args) -> dict[str, Any]:
    """All figures of one set of weights."""
    limit = args.max_new_tokens if kind == "random" else 16
    ours, length = samples_per_second(model, tokenizer, prompts, limit)
    theirs = {
        str(batch): hf_samples_per_second(directory, tokenizer, prompts[0], limit, batch, args.hf_samples)
        for batch in (16, 250)
    }
    together, alone = (exact_seconds(model, prompts, tries, count) for count in (len(prompts), 1))
    figures = {
        "weights": kind, "tokens per sample": length, "ours, samples/s": ours,
        **{f"generate in batches of {batch}, samples/s": rate for batch, rate in theirs.items()},
        "exact evaluation of a prompt among ten, s": together,
        "exact evaluation of a prompt alone, s": alone,
        "prefixes of a prompt": float(np.mean([trie.num_prefixes for trie in tries])),
        "16": ours / theirs["16"], "250": ours / theirs["250"],
        "exact of own": together * ours / NUM_SAMPLES, "exact over 16": NUM_SAMPLES / theirs["16"] / alone,
    }  # fmt: skip
    print(json.dumps(figures), flush=True)
    return figures


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    names = {
        "16": f"ours over generate in batches of 16 (at least {BOUNDS['16']:g})",
        "250": f"ours over generate in batches of 250 (at least {BOUNDS['250']:g})",
        "exact of own": f"exact evaluation, in times of our 1,000 samples (at most {BOUNDS['exact of own']:g})",
        "exact over 16": f"exact evaluation over 1,000 samples in batches of 16 (at least {BOUNDS['exact over 16']:g})",
    }
    rows = [
        f"| {names.get(name, name)} | " + " | ".join(f"{result[name]:.3g}" for result in results) + " |"
        for name in results[0]
        if name != "weights"
    ]
    head = "| | " + " | ".join(result["weights"] for result in results) + " |"
    return "\n".join([head, "|---" * (len(results) + 1) + "|", *rows])


def main() -> None:
    """Measures both sets of weights and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="width of the model")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the trained weights")
    parser.add_argument("--paths", type=int, default=4, help="paths per prompt in a training step")
    parser.add_argument("--max_new_tokens", type=int, default=9, help="length of the samples from random weights")
    parser.add_argument("--hf_samples", type=int, default=250, help="samples to time `generate` on")
    args = parser.parse_args()
    tokenizer = load_tokenizer(
        str(Path(os.environ["CFT_TOKENIZERS"]) / "qwen3"), revision="main", local_files_only=True
    )
    prompts, tries = choose_prompts(tokenizer)
    results = []
    with tempfile.TemporaryDirectory() as root:
        random, trained = Path(root) / "random", Path(root) / "trained"
        write_model(random, args.width)
        tokenizer.save_pretrained(random)
        model = from_pretrained(str(random), dtype="float32", param_dtype="float32")
        results.append(measure("random", random, model, tokenizer, prompts, tries, args))
        train(model, prompts, tries, args.steps, args.paths)
        save_pretrained(model, str(trained), format="merged")
        results.append(measure("trained", trained, model, tokenizer, prompts, tries, args))
    print(f"\n{jax.devices()[0].device_kind}, {os.cpu_count()} cores, width {args.width}\n\n{table(results)}")


if __name__ == "__main__":
    main()
