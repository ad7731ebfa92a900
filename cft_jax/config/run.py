"""The configuration of a run: frozen records, their defaults, and the one place that checks them.

The defaults are the settings of the paper (arXiv 2605.11845, soft targets). `configs/*.py` start from
`default_config_dict()`, change what they must, and return the locked ConfigDict; commands turn it into a `Config`
with `from_config_dict` and call `validate` before any other work.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cft_jax.common.errors import UserError
from cft_jax.config.records import at_least, broken_rules, fraction, one_of, positive, record_of, ruled
from cft_jax.config.suites import EvalConfig, LmEvalConfig, SuiteConfig

# The file in a run's directory that holds its configuration.
RECORD = "config.json"
_WINDOW = "first:last, two step numbers, as in 5:8"


def profile_window(text: str) -> tuple[int, int] | None:
    """The first and the last step of `log.profile`; None where it cannot be read."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        return None
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; with `enabled=False` every weight is trained.

    `strength` multiplies what trained adapters add, in evaluations and exports; `float32` multiplies them in float32.
    """

    enabled: bool = True
    rank: int = at_least(1, 16)
    alpha: float = positive(32.0)
    dropout: float = fraction(0.05)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    strength: float = ruled(1.0, lambda value: 0 <= value <= 1.5, "from 0 to 1.5")
    float32: bool = False


@dataclass(frozen=True)
class ScratchConfig:
    """A small Llama-architecture model with a tokenizer of its own, randomly initialised in place of a checkpoint."""

    enabled: bool = False
    num_layers: int = at_least(1, 4)
    embed_dim: int = at_least(1, 128)
    num_heads: int = at_least(1, 4)
    num_kv_heads: int = at_least(1, 2)
    # Its dimensions are rotated in pairs.
    head_dim: int = ruled(32, lambda size: size >= 2 and size % 2 == 0, "an even number of at least 2")
    hidden_dim: int = at_least(1, 384)


@dataclass(frozen=True)
class ModelSettings:
    """Which weights and tokenizer to start from, and how to hold them.

    They are those of `checkpoint`, or what the run makes first: `base`, the export of a run of another config, or
    `scratch`.
    """

    checkpoint: str = ""
    base: str = ""
    tokenizer: str = ""
    revision: str = "main"
    dtype: str = one_of("bfloat16", "float32", "float16")
    local_files_only: bool = False
    remat: str = one_of("auto", "none", "dots", "full")
    adapter: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)


@dataclass(frozen=True)
class ChatConfig:
    """Options of the chat templates; a template that has no such option ignores it."""

    enable_thinking: bool = False
    reasoning_effort: str = one_of("low", "medium", "high")
    generation_prefix: str = "auto"
    date: str = "2024-07-26"


@dataclass(frozen=True)
class DataConfig:
    """Prompts, output spaces and their tokens; empty lists of families stand for the paper's 24 and 6."""

    target: str = one_of("soft", "hard")
    space: str = one_of("grid", "full")
    terminator: str = "auto"
    num_decimals: int = at_least(0, 5)
    max_bins: int = at_least(2, 1001)
    quantile_low: float = 0.001
    quantile_high: float = 0.999
    tail_policy: str = one_of("clip_to_edge_bin", "drop")
    full_quantile: float = 1e-6
    eval_prompt_selection: str = one_of("full_grid", "paper_selected")
    train_families: tuple[str, ...] = ()
    heldout_families: tuple[str, ...] = ()
    unseen: str = one_of("outside", "inside")
    custom: str = ""
    world: str = one_of("none", "habits", "fair")
    duplicate_bos: bool = False
    readable_parameters: bool = False
    parameter_digits: int = at_least(1, 6)
    grid_points: int = at_least(0, 0)
    max_length: int = at_least(8, 256)
    cache_dir: str = ""
    chat: ChatConfig = field(default_factory=ChatConfig)


@dataclass(frozen=True)
class KeepConfig:
    """What training keeps of what the base model does elsewhere; with `weight=0` nothing.

    `source` is `self`, the base's own answers to `prompts` (a JSONL file; empty for the package's own), or a file of
    texts; a step takes `rows` of them, each `data.max_length` tokens long.
    """

    weight: float = at_least(0, 0.0)
    source: str = ruled("self", bool, "self or a file")
    kind: str = one_of("kl", "off_support", "replay")
    rows: int = at_least(0, 1)
    prompts: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """Objective, optimizer and schedule.

    `exact_max_nodes` bounds the trie prefixes in one example of `exact`; a longer trie becomes several. `exact` packs
    examples of several prompts into rows of `row_tokens` (at least the longest); the other objectives give each
    example a row of its own unless `row_tokens` is set. `grad_accum_steps=0` leaves the number to the device.
    """

    objective: str = one_of("path", "paths", "exact")
    weighting: str = one_of("mean_over_steps", "sequence")
    batch_size: int = at_least(1, 32)
    epochs: int = at_least(1, 3)
    max_steps: int = at_least(0, 0)
    samples_per_prompt_per_epoch: int = at_least(1, 1)
    paths_per_prompt: int = at_least(1, 1)
    exact_max_nodes: int = at_least(2, 2048)
    row_tokens: int = at_least(0, 0)
    grad_accum_steps: int = at_least(0, 0)
    learning_rate: float = positive(2e-4)
    weight_decay: float = at_least(0, 0.01)
    warmup_ratio: float = fraction(0.03)
    max_grad_norm: float = at_least(0, 0.0)
    tau: float = positive(1.0)
    epsilon_smoothing: float = fraction(1e-8)
    on_nonfinite: str = one_of("stop", "skip")
    keep: KeepConfig = field(default_factory=KeepConfig)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes all devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run; `every_steps=0` saves at the end of every epoch."""

    every_steps: int = at_least(0, 0)
    keep: int = at_least(1, 2)
    on_preemption: bool = True


@dataclass(frozen=True)
class ExportConfig:
    """What is written for the Hugging Face world at the end."""

    enabled: bool = True
    format: str = one_of("adapter", "merged")


@dataclass(frozen=True)
class LogConfig:
    """Logs; `profile` is a window of steps `first:last`, empty for none."""

    every_steps: int = at_least(1, 10)
    tensorboard: bool = False
    wandb: bool = False
    profile: str = ruled("", lambda text: not text or bool(profile_window(text)), _WINDOW)


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run.

    `backend` is what the evaluate command runs the model with; `tasks` are lm-eval's, of the suite `retention`.
    """

    seed: int = at_least(0, 11)
    backend: str = one_of("jax", "hf")
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
        config.data.update(target="hard", max_bins=16384)
        config.train.update(epochs=2, samples_per_prompt_per_epoch=16)
    return config


def eval_config_dict(suites: Sequence[str], run: str) -> ConfigDict:
    """The settings of an evaluation by these suites.

    `run` is the directory of a run, whose data settings are taken and whose newest checkpoint is measured; empty for
    the defaults, which leave `model.checkpoint` to be set.

    Raises:
      UserError: the directory holds no run.
    """
    config: Any = default_config_dict()
    if run:
        config = ConfigDict(dataclasses.asdict(from_config_dict(read_config(Path(run)))))
        config.model.checkpoint = run
        config.model.base = ""
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
        if not isinstance(values, dict):
            raise TypeError("its config is no record")
        return values
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no config.json; it is not the directory of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error}); start in a new --workdir") from None


def from_config_dict(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or the mapping of a saved config.json) into a `Config`.

    Raises:
      UserError: a field is unknown (the message names the nearest known one) or of a wrong type.
    """
    return record_of(Config, values.to_dict() if isinstance(values, ConfigDict) else values)


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with other values for some fields, nested as in a config file: {"train": {"epochs": 2}}.

    Raises:
      UserError: a field is unknown or of a wrong type.
    """

    def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        nested = {name for name, value in new.items() if isinstance(value, Mapping) and isinstance(old.get(name), dict)}
        return {**old, **new, **{name: merged(old[name], new[name]) for name in nested}}

    return from_config_dict(merged(dataclasses.asdict(config), settings))


def validate(config: Config) -> None:
    """Checks values and combinations, before any device work.

    Raises:
      UserError: with every problem found, separated by semicolons.
    """
    problems = [*broken_rules(config), *_of_model(config), *_of_keep(config), *_of_the_rest(config), *_ignored(config)]
    if problems:
        raise UserError("; ".join(problems))


def _of_model(config: Config) -> Iterator[str]:
    model = config.model
    if model.scratch.enabled and model.lora.enabled:
        yield "a model made from scratch needs all its weights trained; set config.model.lora.enabled=False"
    if model.scratch.enabled and model.scratch.num_heads % max(model.scratch.num_kv_heads, 1):
        heads = f"config.model.scratch.num_heads={model.scratch.num_heads}"
        yield f"config.model.scratch.num_kv_heads={model.scratch.num_kv_heads} must divide {heads}"
    if not model.lora.enabled and config.export.format == "adapter" and config.export.enabled:
        yield "without LoRA there is no adapter to export; set config.export.format=merged"
    if not model.scratch.enabled and not model.base and not model.checkpoint:
        yield "config.model.checkpoint is empty; set it to a hub id or a directory in HF format"
    if model.base and model.checkpoint:
        yield (
            f"config.model.base={model.base} and config.model.checkpoint={model.checkpoint} are two models to start "
            "from; leave one of them empty"
        )
    for name in ("checkpoint", "base", "tokenizer", "adapter") if model.scratch.enabled else ():
        if getattr(model, name):
            yield f"config.model.scratch.enabled makes a model and a tokenizer; leave config.model.{name} empty"


def _of_keep(config: Config) -> Iterator[str]:
    keep = config.train.keep
    if keep.weight == 0:
        return
    named = f"config.train.keep.weight={keep.weight}"
    if config.model.scratch.enabled:
        yield "config.train.keep: a randomly initialised model has nothing to keep; set config.train.keep.weight=0"
    if keep.kind != "off_support" and keep.rows == 0:
        yield f"{named} with config.train.keep.rows=0 keeps nothing; take at least one row a step"
    if keep.kind == "off_support" and not config.model.lora.enabled:
        yield "config.train.keep.kind=off_support needs the model without adapters; set config.model.lora.enabled=True"
    if keep.kind == "off_support" and config.data.target == "hard":
        yield "config.train.keep.kind=off_support needs all answers of a prompt; set config.data.target=soft"


def _of_the_rest(config: Config) -> Iterator[str]:
    data, train, mesh, windows = config.data, config.train, config.mesh, config.suite.perplexity
    low, high = data.quantile_low, data.quantile_high
    if not 0 < low < high < 1:
        yield f"config.data.quantile_low={low} and quantile_high={high} must satisfy 0 < low < high < 1"
    if train.batch_size % max(1, parts := train.grad_accum_steps):
        yield f"config.train.batch_size={train.batch_size} is not divisible by config.train.grad_accum_steps={parts}"
    if data.target == "hard" and train.objective == "exact":
        yield "config.train.objective=exact is an objective for soft targets; set config.data.target=soft"
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if sizes.count(-1) > 1 or any(size < 1 for size in sizes if size != -1):
        yield f"config.mesh={sizes} (data, fsdp, tensor) takes positive sizes and at most one -1"
    if data.world != "none" and data.custom:
        yield f"config.data.world={data.world} and config.data.custom are two sources of prompts; give one of them"
    if config.eval.method == "ssot" and config.eval.numbers_per_completion > 1:
        yield "config.eval.method=ssot asks for one answer; set config.eval.numbers_per_completion=1"
    if windows.stride > windows.context_length:
        yield f"config.suite.perplexity.stride={windows.stride} must be at most context_length"


def _ignored(config: Config) -> Iterator[str]:
    # Settings that change nothing as the others stand, where whoever makes them will believe that they do.
    data, train = config.data, config.train
    soft = (data.target == "soft", "config.data.target=soft")
    exact = (train.objective == "exact", "config.train.objective=exact")
    several = train.objective == "paths" or (train.objective == "exact" and data.space == "full")
    counts = {
        "data.full_quantile": (data.space == "full", "config.data.space=full"),
        "data.parameter_digits": (data.readable_parameters, "config.data.readable_parameters=True"),
        "train.weighting": soft,
        "train.tau": soft,
        "train.exact_max_nodes": exact,
        "train.samples_per_prompt_per_epoch": (not exact[0], "config.train.objective=path or paths"),
        "train.paths_per_prompt": (several, "config.train.objective=paths, or exact and config.data.space=full"),
        "tasks": (not {"retention", "all"}.isdisjoint(config.eval.suites), "retention in config.eval.suites"),
    }
    keep = train.keep
    on = (keep.weight > 0, "config.train.keep.weight above 0")
    texts = (keep.weight > 0 and keep.kind != "off_support", f"{on[1]} and config.train.keep.kind=kl or replay")
    asked = (texts[0] and keep.source == "self", f"{texts[1]} and config.train.keep.source=self")
    counts |= {
        f"train.keep.{name}": where
        for name, where in (("kind", on), ("source", texts), ("rows", texts), ("prompts", asked))
    }
    grids = ("grid_points", "unseen", "readable_parameters", "eval_prompt_selection")
    counts |= {f"data.{name}": (data.world == "none", "config.data.world=none") for name in grids}
    counts |= {f"suite.lm_eval.{item.name}": (bool(config.tasks), "config.tasks") for item in fields(LmEvalConfig)}
    defaults = Config()
    for path, (counted, where) in counts.items():
        value, default = attrgetter(path)(config), attrgetter(path)(defaults)
        if value != default and not counted:
            yield f"config.{path}={value!r} counts only with {where}; set that, or leave it at {default!r}"
