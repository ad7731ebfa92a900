"""The configuration of a run: frozen records, their defaults, and the one place that checks them.

The defaults are the settings of the paper (arXiv 2605.11845, soft targets). `configs/*.py` start from
`default_config_dict()`, change what they must, and return the locked ConfigDict; commands turn it into a `Config`
with `from_config_dict` and call `validate` before any other work.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from cft_jax.common.errors import UserError
from cft_jax.config.suites import EvalConfig, SuiteConfig, eval_problems, suite_problems

_T = TypeVar("_T")
# The file in a run's directory that holds its configuration.
RECORD = "config.json"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; with `enabled=False` every weight is trained."""

    enabled: bool = True
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class ScratchConfig:
    """A small Llama-architecture model with a tokenizer of its own, made on the spot instead of a checkpoint."""

    enabled: bool = False
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden_dim: int = 384


@dataclass(frozen=True)
class ModelSettings:
    """Which weights and tokenizer to start from, and how to hold them."""

    checkpoint: str = ""
    tokenizer: str = ""
    revision: str = "main"
    dtype: str = "bfloat16"
    local_files_only: bool = False
    remat: str = "none"
    adapter: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)


@dataclass(frozen=True)
class ChatConfig:
    """Options of the chat templates; a template that has no such option ignores it."""

    enable_thinking: bool = False
    reasoning_effort: str = "low"
    generation_prefix: str = "auto"
    date: str = "2024-07-26"


@dataclass(frozen=True)
class DataConfig:
    """Prompts, output spaces and their tokens; empty lists of families stand for the paper's 24 and 6."""

    target: str = "soft"
    space: str = "grid"
    terminator: str = "auto"
    num_decimals: int = 5
    max_bins: int = 1001
    quantile_low: float = 0.001
    quantile_high: float = 0.999
    tail_policy: str = "clip_to_edge_bin"
    full_quantile: float = 1e-6
    eval_prompt_selection: str = "full_grid"
    train_families: tuple[str, ...] = ()
    heldout_families: tuple[str, ...] = ()
    unseen: str = "outside"
    custom: str = ""
    duplicate_bos: bool = False
    readable_parameters: bool = False
    parameter_digits: int = 6
    grid_points: int = 0
    max_length: int = 256
    cache_dir: str = ""
    chat: ChatConfig = field(default_factory=ChatConfig)


@dataclass(frozen=True)
class TrainConfig:
    """Objective, optimizer and schedule.

    `exact_max_nodes` bounds the trie prefixes in one block of `exact`; a longer trie becomes several. `exact` packs
    blocks of several prompts into rows of `row_tokens` (at least the longest block); the other objectives give each
    block a row of its own unless `row_tokens` is set.
    """

    objective: str = "path"
    weighting: str = "mean_over_steps"
    batch_size: int = 32
    epochs: int = 3
    max_steps: int = 0
    samples_per_prompt_per_epoch: int = 1
    paths_per_prompt: int = 1
    exact_max_nodes: int = 2048
    row_tokens: int = 0
    grad_accum_steps: int = 1
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    max_grad_norm: float = 0.0
    tau: float = 1.0
    epsilon_smoothing: float = 1e-8
    on_nonfinite: str = "stop"


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes all devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run; `every_steps=0` saves at the end of every epoch."""

    every_steps: int = 0
    keep: int = 2
    on_preemption: bool = True


@dataclass(frozen=True)
class ExportConfig:
    """What is written for the Hugging Face world at the end."""

    enabled: bool = True
    format: str = "adapter"


@dataclass(frozen=True)
class LogConfig:
    """Logs; `profile` is a window of steps `first:last`, empty for none."""

    every_steps: int = 10
    tensorboard: bool = False
    wandb: bool = False
    profile: str = ""


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run.

    `backend` is what the evaluate command runs the model with; `tasks` are lm-eval's, of the suite `retention`.
    """

    seed: int = 11
    backend: str = "jax"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    tasks: tuple[str, ...] = ()
    export: ExportConfig = field(default_factory=ExportConfig)
    log: LogConfig = field(default_factory=LogConfig)


def default_config_dict() -> ConfigDict:
    """The defaults as a locked ConfigDict, which refuses unknown fields and other types."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def paper_config_dict(checkpoints: Mapping[str, str], argument: str) -> ConfigDict:
    """The paper's settings for one of a family's models.

    Args:
      checkpoints: hub ids by size, the default size first.
      argument: a size, `-hard` behind it for hard targets (16384 bins, 2 epochs of 16 samples per prompt); empty for
        the first size with soft targets.

    Raises:
      ValueError: the argument names no such model.
    """
    size, _, target = argument.partition("-")
    size = size or next(iter(checkpoints))
    if size not in checkpoints or target not in ("", "soft", "hard"):
        raise ValueError(f"{argument!r} names none of {', '.join(checkpoints)}, each with or without -hard behind it")
    config: Any = default_config_dict()
    config.model.checkpoint = checkpoints[size]
    if target == "hard":
        config.data.target = "hard"
        config.data.max_bins = 16384
        config.train.epochs = 2
        config.train.samples_per_prompt_per_epoch = 16
    return config


def eval_config_dict(suites: Sequence[str], run: str) -> ConfigDict:
    """The settings of an evaluation.

    Args:
      suites: to run.
      run: the directory of a run, whose data settings are taken and whose newest checkpoint is measured; empty for the
        defaults, which leave `model.checkpoint` to be set.

    Raises:
      UserError: the directory holds no run.
    """
    config: Any = default_config_dict()
    if run:
        config = ConfigDict(dataclasses.asdict(from_config_dict(read_config(Path(run)))))
        config.model.checkpoint = run
        config.model.scratch.enabled = False
    config.eval.suites = tuple(suites)
    config.export.enabled = False
    return config


def read_config(workdir: Path) -> dict[str, Any]:
    """The configuration that a run's directory records.

    Raises:
      UserError: there is none, or it is damaged.
    """
    record = workdir / RECORD
    try:
        values = json.loads(record.read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no config.json; it is not the directory of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error}); start in a new --workdir") from None
    if not isinstance(values, dict):
        raise UserError(f"{record} is damaged (its config is no record); start in a new --workdir")
    return values


def from_config_dict(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or the mapping of a saved config.json) into a `Config`.

    Raises:
      UserError: a field is unknown (the message names the nearest known one) or of a wrong type.
    """
    plain = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    return _record(Config, plain, "config")


def _record(cls: type[_T], values: Mapping[str, Any], path: str) -> _T:
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {path}.{near[0]}?" if near else f"known fields: {', '.join(known)}"
            raise UserError(f"unknown field {path}.{name}; {hint}")
    default = cls()
    return cls(**{name: _value(getattr(default, name), value, f"{path}.{name}") for name, value in values.items()})


def _value(default: Any, value: Any, path: str) -> Any:
    """`value` in the type of `default`; the one conversion allowed is from int to float and from list to tuple."""
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r} must be a record with fields")
        return _record(type(default), value, path)
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={value!r} must be a tuple such as {default!r}")
        items = tuple(value)
        if len(items) == 1 and isinstance(items[0], str):  # --config.x=a,b arrives as one string
            items = tuple(item.strip() for item in items[0].split(",") if item.strip())
        kind = type(default[0]) if default else str
        if not all(type(item) is kind for item in items):
            raise UserError(f"{path}={value!r} must hold only {kind.__name__} values")
        return items
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{path}={value!r} is of type {type(value).__name__}; it takes {type(default).__name__}")
    return value


def validate(config: Config) -> None:
    """Checks values and combinations, before any device work.

    Raises:
      UserError: with every problem found, separated by semicolons.
    """
    problems = [
        *_choices(config),
        *_ranges(config),
        *eval_problems(config.eval),
        *suite_problems(config.suite),
        *_combinations(config),
    ]
    if problems:
        raise UserError("; ".join(problems))


def _choices(config: Config) -> list[str]:
    data, train, model = config.data, config.train, config.model
    allowed: list[tuple[str, Any, tuple[str, ...]]] = [
        ("backend", config.backend, ("jax", "hf")),
        ("model.dtype", model.dtype, ("bfloat16", "float32", "float16")),
        ("model.remat", model.remat, ("none", "full", "dots")),
        ("data.target", data.target, ("soft", "hard")),
        ("data.space", data.space, ("grid", "full")),
        ("data.eval_prompt_selection", data.eval_prompt_selection, ("full_grid", "paper_selected")),
        ("data.unseen", data.unseen, ("outside", "inside")),
        ("data.chat.reasoning_effort", data.chat.reasoning_effort, ("low", "medium", "high")),
        ("train.objective", train.objective, ("path", "paths", "exact")),
        ("train.weighting", train.weighting, ("mean_over_steps", "sequence")),
        ("train.on_nonfinite", train.on_nonfinite, ("stop", "skip")),
        ("export.format", config.export.format, ("adapter", "merged")),
    ]
    return [f"config.{name}={got!r} must be one of {', '.join(ok)}" for name, got, ok in allowed if got not in ok]


def _ranges(config: Config) -> list[str]:
    train, data, lora = config.train, config.data, config.model.lora
    at_least: list[tuple[str, float, float]] = [
        ("seed", config.seed, 0),
        ("model.lora.rank", lora.rank, 1),
        ("data.num_decimals", data.num_decimals, 0),
        ("data.max_bins", data.max_bins, 2),
        ("data.parameter_digits", data.parameter_digits, 1),
        ("data.grid_points", data.grid_points, 0),
        ("data.max_length", data.max_length, 8),
        ("train.batch_size", train.batch_size, 1),
        ("train.epochs", train.epochs, 1),
        ("train.max_steps", train.max_steps, 0),
        ("train.samples_per_prompt_per_epoch", train.samples_per_prompt_per_epoch, 1),
        ("train.paths_per_prompt", train.paths_per_prompt, 1),
        ("train.exact_max_nodes", train.exact_max_nodes, 2),
        ("train.row_tokens", train.row_tokens, 0),
        ("train.grad_accum_steps", train.grad_accum_steps, 1),
        ("train.weight_decay", train.weight_decay, 0),
        ("train.max_grad_norm", train.max_grad_norm, 0),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 0),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("log.every_steps", config.log.every_steps, 1),
    ]
    found = [f"config.{name}={got} must be at least {low}" for name, got, low in at_least if not got >= low]
    positive = [
        ("train.learning_rate", train.learning_rate),
        ("train.tau", train.tau),
        ("model.lora.alpha", lora.alpha),
    ]
    found += [f"config.{name}={got} must be greater than 0" for name, got in positive if not got > 0]
    fractions = [
        ("model.lora.dropout", lora.dropout),
        ("train.warmup_ratio", train.warmup_ratio),
        ("train.epsilon_smoothing", train.epsilon_smoothing),
    ]
    found += [f"config.{name}={got} must be in [0, 1)" for name, got in fractions if not 0 <= got < 1]
    if not 0 < data.quantile_low < data.quantile_high < 1:
        found.append(
            f"config.data.quantile_low={data.quantile_low} and quantile_high={data.quantile_high} "
            "must satisfy 0 < low < high < 1"
        )
    if config.log.profile and profile_window(config.log.profile) is None:
        found.append(f"config.log.profile={config.log.profile!r} must be first:last, two step numbers, as in 5:8")
    return found


def profile_window(text: str) -> tuple[int, int] | None:
    """The first and the last step of `log.profile`; None where it cannot be read."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        return None
    return int(found[1]), int(found[2])


def _combinations(config: Config) -> list[str]:
    found = []
    model, train, data = config.model, config.train, config.data
    if model.scratch.enabled and model.checkpoint:
        found.append("config.model.scratch.enabled makes a model of its own; leave config.model.checkpoint empty")
    if not model.scratch.enabled and not model.checkpoint:
        found.append("config.model.checkpoint is empty; set it to a hub id or a directory in HF format")
    if model.scratch.enabled and model.lora.enabled:
        found.append("a model made from scratch needs all its weights trained; set config.model.lora.enabled=False")
    if not model.lora.enabled and config.export.format == "adapter" and config.export.enabled:
        found.append("without LoRA there is no adapter to export; set config.export.format=merged")
    if train.batch_size % train.grad_accum_steps:
        found.append(
            f"config.train.batch_size={train.batch_size} is not divisible by "
            f"config.train.grad_accum_steps={train.grad_accum_steps}"
        )
    if data.target == "hard" and train.objective == "exact":
        found.append("config.train.objective=exact is an objective for soft targets; set config.data.target=soft")
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if sum(size == -1 for size in sizes) > 1 or any(size < 1 and size != -1 for size in sizes):
        found.append(f"config.mesh={sizes} (data, fsdp, tensor) takes positive sizes and at most one -1")
    return found
