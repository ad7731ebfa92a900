"""A training step of this engine beside plain PyTorch, on the same weights, strings and targets.

PyTorch is written as a user would: transformers' model with PEFT, logits of every position, one log-softmax, and the
targets gathered at the steps; every string is a row of its own. Both train LoRA of rank 16 on q, k, v and o with
AdamW, without dropout, so that their losses can be compared. Each side has a process of its own and they take turns,
so that neither sees the other's threads or memory.

- soft: one drawn string per prompt, 32 strings a step, 1,001 bins at five decimals;
- gathered: the same with a thriftier PyTorch, which takes the log-softmax at the steps alone;
- hard: 16 strings of each prompt, 32 strings a step, 16,384 bins; this engine packs a prompt's strings into one row.

Where the device's peak is known, this engine's model FLOP utilisation stands in the last column: operations counted as
in `cft_jax.models.flops`, 4 per parameter and token, the head at the steps alone.

On a CPU: a model of Qwen3's shape with 6 layers of width 256 and the real 151,936 tokens, in float32. On a GPU: the
shapes of Qwen3-0.6B and 1.7B in bfloat16, 256 strings a step.

    CFT_TOKENIZERS=/path/to/tokenizers python benchmarks/train_step.py [--kinds soft gathered hard] [--steps 6]

Takes about five minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 768,
    },
    "0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
    "1.7b": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
    },
}
STRINGS = {"small": 32, "0.6b": 256, "1.7b": 256}
# Bounds of the project: speed and memory against PyTorch's.
FASTER = {("small", "soft"): 4.0, ("small", "hard"): 7.0, ("1.7b", "soft"): 3.0}
SMALLER, PACKED, UTILIZED = 1 / 3, 16, 0.45
KINDS = ("soft", "gathered", "hard")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def write_model(shape: str, directory: Path) -> None:
    """A random model in HF format with an adapter whose B is not zero, in `adapter/`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=151936, tie_word_embeddings=True, **SHAPES[shape])  # type: ignore[arg-type]
    model = Qwen3ForCausalLM(config).to(torch.float32 if shape == "small" else torch.bfloat16)
    model.save_pretrained(directory)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(str(directory / "adapter"))


def dataset(kind: str, strings: int, *, packed: bool, shared: bool):
    """The paper's training split with Qwen3's tokenizer."""
    from cft_jax.config import Config, DataConfig, TrainConfig
    from cft_jax.data.objectives import training_dataset
    from cft_jax.distributions import configured_tasks
    from cft_jax.text import load_tokenizer

    if kind != "hard":
        config = Config(train=TrainConfig(batch_size=strings))
    else:
        train = TrainConfig(
            batch_size=strings,
            samples_per_prompt_per_epoch=PACKED,
            objective="paths" if packed else "path",
            paths_per_prompt=PACKED if packed else 1,
        )
        config = Config(data=DataConfig(target="hard", max_bins=16384), train=train)
    directory = Path(os.environ["CFT_TOKENIZERS"]) / "qwen3"
    tokenizer = load_tokenizer(str(directory), revision="main", local_files_only=True)
    tasks = configured_tasks(config.data)["train"]
    return training_dataset(config, tokenizer, tasks, row_multiple=1, share_prefix=shared)


class Torch:
    """transformers and PEFT."""

    def __init__(self, kind: str, shape: str, directory: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.kind, self.device = kind, "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if shape == "small" else torch.bfloat16
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(self.device)
        self.model = PeftModel.from_pretrained(base, str(directory / "adapter"), is_trainable=True).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.01)
        self.data = dataset(kind, STRINGS[shape], packed=True, shared=False)

    def prepare(self, number: int) -> Any:
        """Rows, one string each: soft keeps the batch as it is, hard takes packed rows apart."""
        import torch

        batch = self.data.batch(number)
        if self.kind != "hard":
            return {name: torch.tensor(x).to(self.device) for name, x in batch._asdict().items()}
        texts = _strings(batch)
        width = max(len(tokens) for tokens, _ in texts)
        ids, labels = np.zeros((len(texts), width), np.int64), np.full((len(texts), width), -100)
        for row, (tokens, prompt) in enumerate(texts):
            ids[row, : len(tokens)] = tokens
            labels[row, prompt : len(tokens)] = tokens[prompt:]
        mask = np.arange(width) < np.array([[len(tokens)] for tokens, _ in texts])
        arrays = {"ids": ids, "labels": labels, "mask": mask.astype(np.int64)}
        return {name: torch.tensor(x).to(self.device) for name, x in arrays.items()}

    def step(self, batch: Any) -> float:
        """One update; the loss before it."""
        self.optimizer.zero_grad()
        loss = self._hard(batch) if self.kind == "hard" else self._soft(batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _soft(self, batch: Any) -> Any:
        import torch

        mask = batch["subtree_end"] > 0
        logits = self.model(input_ids=batch["tokens"].long(), attention_mask=mask.long()).logits
        rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
        step, index, ids = batch["target_position"].long(), batch["target_index"].long(), batch["target_ids"].long()
        q = batch["target_probs"]
        if self.kind == "gathered":
            chosen = torch.log_softmax(logits[rows, index].float(), dim=-1)[rows, step, ids]
        else:
            chosen = torch.log_softmax(logits.float(), dim=-1)[rows, index[rows, step], ids]
        terms = torch.special.xlogy(q, q) - q * chosen
        per_step = torch.zeros_like(batch["target_weight"]).scatter_add(1, step, terms)
        return (per_step * batch["target_weight"]).sum() / batch["row_weight"].sum()

    def _hard(self, batch: Any) -> Any:
        import torch

        logits = self.model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
        flat, labels = logits[:, :-1].float().reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(flat, labels, ignore_index=-100)


def _strings(batch: Any) -> list[tuple[list[int], int]]:
    """Every drawn string of packed rows of hard targets: its tokens with prompt and terminator, the prompt's length."""
    end = int(batch.target_ids[batch.target_probs > 0][-1])
    found = []
    for row in np.flatnonzero(batch.row_weight > 0):
        index, positions = np.arange(batch.tokens.shape[1]), batch.positions[row]
        for step, token, prob in zip(
            batch.target_position[row], batch.target_ids[row], batch.target_probs[row], strict=True
        ):
            if token != end or prob == 0:
                continue
            place = int(batch.target_index[row, step])
            above = (index <= place) & (place < batch.subtree_end[row])
            tokens = [*batch.tokens[row][above].tolist(), end]
            assert positions[place] == len(tokens) - 2
            prompt = int(positions[batch.target_index[row, 0]]) + 1
            count = round(float(prob) * float(batch.target_weight[row, step]))
            found += [(tokens, prompt)] * count
    return found


class Engine:
    """cft_jax."""

    def __init__(self, kind: str, shape: str, directory: Path) -> None:
        import jax.numpy as jnp

        from cft_jax.checkpoints import from_pretrained
        from cft_jax.models.flops import Operations
        from cft_jax.objectives.batch_loss import head_options
        from cft_jax.sharding.mesh import make_mesh
        from cft_jax.train.optimizer import adamw
        from cft_jax.train.state import initial_state, split_model, state_shardings
        from cft_jax.train.step import StepOptions, make_train_step

        mesh = make_mesh(-1, 1, 1)
        dtype = jnp.float32 if shape == "small" else jnp.bfloat16
        model = from_pretrained(directory, adapter=directory / "adapter", dtype=dtype, param_dtype=dtype, mesh=mesh)
        self.data = dataset(kind, STRINGS[shape], packed=True, shared=True)
        self.operations, self.computed = Operations.of(model.config, lora=True), 0
        optimizer = adamw(weight_decay=0.01, max_grad_norm=0.0)
        parts, weights, self.frozen = split_model(model)
        loss = head_options("hard" if kind == "hard" else "soft", tau=1.0, softcap=None, mesh=mesh)
        shared_prefix = tuple(self.data.shared_prefix.tolist())
        options = StepOptions(loss, shared_prefix, 1, 11, optimizer, lambda step: jnp.float32(2e-4))
        self.run = make_train_step(parts, options, state_shardings(weights, optimizer))
        self.state = initial_state(weights, optimizer)

    def prepare(self, number: int) -> Any:
        """The batch on the device."""
        import jax

        from cft_jax.objectives.batch_loss import DeviceBatch

        return jax.block_until_ready(DeviceBatch(*map(jax.numpy.asarray, self.data.batch(number))))

    def step(self, batch: Any) -> float:
        """One update; the loss before it."""
        import jax

        self.state, metrics = self.run(self.state, self.frozen, batch)
        jax.block_until_ready(self.state)
        self.computed = self.operations.count(tokens=int(metrics.tokens), steps=int(metrics.steps))
        return float(metrics.loss)


def serve(side: str, kind: str, shape: str, directory: Path) -> None:
    """A side's process: runs the steps that it is told to on its standard input, and says how long each took."""
    told = sys.stdout
    sys.stdout = sys.stderr
    engine = {"torch": Torch, "engine": Engine}[side](kind, shape, directory)
    before = _memory()
    print(json.dumps({"ready": side}), file=told, flush=True)
    for line in sys.stdin:
        batch = engine.prepare(int(line))
        start = time.perf_counter()
        loss = engine.step(batch)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "loss": loss, "peak": _memory(), "before": before}
        if isinstance(engine, Engine):
            answer["utilization"] = _utilization(engine.computed, seconds)
        print(json.dumps(answer), file=told, flush=True)


def _utilization(operations: int, seconds: float) -> float | None:
    from cft_jax.models.flops import all_devices_peak

    peak = all_devices_peak()
    return None if peak is None else operations / seconds / peak


def _memory() -> float:
    """Peak GiB of this process so far, on the device where it tells, else on the host."""
    device = _device_peak()
    if device is not None:
        return device / 2**30
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20


def _device_peak() -> int | None:
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available() and "cft_jax.train" not in sys.modules:
        return sys.modules["torch"].cuda.max_memory_allocated()
    if "cft_jax.train" in sys.modules:
        stats = sys.modules["jax"].local_devices()[0].memory_stats()
        return None if stats is None else stats["peak_bytes_in_use"]
    return None


class Side:
    """A side's process, as its partner in turns sees it."""

    def __init__(self, side: str, kind: str, shape: str, directory: Path) -> None:
        command = [sys.executable, __file__, "--serve", side, kind, shape, str(directory)]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def step(self, number: int) -> dict[str, Any]:
        """Runs one step and returns its figures."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended: {self.process.wait()}")  # type: ignore[arg-type]
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(kind: str, shape: str, steps: int) -> None:
    """Both sides in turns; prints a row of the table."""
    with tempfile.TemporaryDirectory() as place:
        write_model(shape, Path(place))
        sides = {side: Side(side, kind, shape, Path(place)) for side in ("torch", "engine")}
        # The same first batches, to compile, to warm up and to compare the losses.
        warm = {side: [partner.step(number) for number in range(2)] for side, partner in sides.items()}
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(2, 2 + steps):
            for side, partner in sides.items():
                runs[side].append(partner.step(number))
        for partner in sides.values():
            partner.close()
    seconds = {side: float(np.median([run["seconds"] for run in found])) for side, found in runs.items()}
    peak = {side: found[-1]["peak"] for side, found in runs.items()}
    above = {side: found[-1]["peak"] - found[-1]["before"] for side, found in runs.items()}
    difference = max(
        abs(a["loss"] / b["loss"] - 1)
        for a, b in zip(warm["torch"] + runs["torch"], warm["engine"] + runs["engine"], strict=True)
    )
    ratio, bound = seconds["torch"] / seconds["engine"], FASTER.get((shape, kind))
    used = [run["utilization"] for run in runs["engine"]]
    utilized = "" if used[0] is None else f" | FLOP utilisation {np.median(used):.0%} (wanted {UTILIZED:.0%})"
    rates = {side: STRINGS[shape] / value for side, value in seconds.items()}
    wanted = "" if bound is None else f" (wanted {bound:g})"
    print(
        f"{shape:6}{kind:9} PyTorch {rates['torch']:8.2f} strings/s, {peak['torch']:6.2f} GiB | this engine "
        f"{rates['engine']:8.2f} strings/s, {peak['engine']:6.2f} GiB | {ratio:5.2f} x as fast{wanted}, "
        f"{peak['engine'] / peak['torch']:.2f} of the peak memory (wanted {SMALLER:.2f}), "
        f"{above['engine'] / above['torch']:.2f} of what a step adds | losses differ by {difference:.1e}{utilized}",
        flush=True,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: what the device is for")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        side, kind, shape, directory = arguments.serve
        serve(side, kind, shape, Path(directory))
        return
    import jax

    shapes = arguments.shapes or (["small"] if jax.default_backend() == "cpu" else ["0.6b", "1.7b"])
    for shape in shapes:
        for kind in arguments.kinds:
            compare(kind, shape, arguments.steps)


if __name__ == "__main__":
    main()
