"""The paper's whole training split as data: time, memory and speed, tokenizer by tokenizer.

- soft: 1,988 prompts at five decimals and 1,001 bins. Seconds to build the tries of all (cold) and to find them in the
  cache (warm), after imports and the tokenizer's loading; then how fast batches of 32 come.
- hard: the same prompts at 16,384 bins, 16 samples per prompt and epoch. Seconds to the first batch of 32 after the
  tokenizer's loading, examples per second over the first epoch, single and 16 to a row.

Memory is the peak of a process of its own that does nothing else, imports included.

    CFT_TOKENIZERS=/path/to/tokenizers python benchmarks/data.py

Takes about two minutes on two cores.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENIZERS = ("qwen3", "llama3", "gemma3", "gpt_oss")
KINDS = ("soft cold", "soft warm", "paths", "exact", "hard", "hard packed")
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "soft cold": ({}, {}),
    "soft warm": ({}, {}),
    "paths": ({}, {"objective": "paths", "paths_per_prompt": 8}),
    "exact": ({}, {"objective": "exact"}),
    "hard": ({"target": "hard", "max_bins": 16384}, {"samples_per_prompt_per_epoch": 16}),
    "hard packed": (
        {"target": "hard", "max_bins": 16384},
        {"samples_per_prompt_per_epoch": 16, "objective": "paths", "paths_per_prompt": 16},
    ),
}
MAX_STEPS = 1000
# Bounds of the project: seconds by kind and tokenizer, and GiB.
BOUNDS = {("soft cold", "qwen3"): 20.0, ("soft cold", "llama3"): 15.0, "soft warm": 2.0, "hard": 5.0}


def measure(kind: str, tokenizer_name: str, cache: str) -> dict[str, Any]:
    """One measurement, in this process."""
    from cft_jax.config import Config, DataConfig, TrainConfig
    from cft_jax.data.batch import padding_fraction
    from cft_jax.data.objectives import training_dataset
    from cft_jax.data.prepared import prepare
    from cft_jax.distributions import configured_tasks
    from cft_jax.text import load_tokenizer

    data, train = SETTINGS[kind]
    config = Config(data=DataConfig(cache_dir=cache, **data), train=TrainConfig(**train))
    directory = Path(os.environ["CFT_TOKENIZERS"]) / tokenizer_name
    tokenizer = load_tokenizer(str(directory), revision="main", local_files_only=True)
    figures: dict[str, Any] = {"kind": kind, "tokenizer": tokenizer_name}
    start = time.perf_counter()
    tasks = configured_tasks(config.data)["train"]
    if kind.startswith("soft"):
        figures.update(prepare(tokenizer, tasks, config.data).statistics())
        figures["seconds"] = time.perf_counter() - start
    dataset = training_dataset(config, tokenizer, tasks, row_multiple=1, share_prefix=False)
    dataset.batch(0)
    figures.setdefault("seconds", time.perf_counter() - start)
    steps = min(dataset.steps_per_epoch, MAX_STEPS)
    padding, shapes = 0.0, set()
    start = time.perf_counter()
    for step in range(1, steps):
        batch = dataset.batch(step)
        padding += padding_fraction(batch) / (steps - 1)
        shapes.add((*batch.tokens.shape, batch.target_index.shape[1], batch.target_ids.shape[1]))
    figures["milliseconds"] = (time.perf_counter() - start) / (steps - 1) * 1e3
    figures["examples_per_second"] = config.train.batch_size / figures["milliseconds"] * 1e3
    figures["padding"], figures["shapes"] = padding, len(shapes)
    figures["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return figures


def measured_apart(kind: str, tokenizer: str, cache: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, kind, tokenizer, cache]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    print("kind         tokenizer  seconds  (bound)  peak GiB  ms/batch  examples/s  padding  shapes", end="")
    print("  prefixes  largest fan-out  MB")
    for tokenizer in TOKENIZERS:
        with tempfile.TemporaryDirectory() as cache:
            for kind in KINDS:
                found = measured_apart(kind, tokenizer, cache)
                bound = BOUNDS.get(kind, BOUNDS.get((kind, tokenizer)))
                line = (
                    f"{kind:12} {tokenizer:9} {found['seconds']:8.2f}  {'' if bound is None else f'({bound:g})':>7}"
                    f"  {found['gigabytes']:8.2f}  {found['milliseconds']:8.2f}  {found['examples_per_second']:10,.0f}"
                    f"  {found['padding']:7.2f}  {found['shapes']:6}"
                )
                if "prefixes" in found:
                    line += f"  {found['prefixes']:8,}  {found['max_children']:15,}  {found['bytes'] / 1e6:.0f}"
                print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
