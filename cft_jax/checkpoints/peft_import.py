"""Reading PEFT adapters: adapter_config.json into a `LoraSpec`, adapter_model.safetensors onto the devices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from cft_jax.checkpoints import hf_names
from cft_jax.checkpoints.lora_weights import AdapterTensor
from cft_jax.checkpoints.peft_export import CONFIG, ROOT, WEIGHTS, WRAPPED
from cft_jax.checkpoints.tensor_files import StoredTensor, read_header, read_record
from cft_jax.common import hub
from cft_jax.common.errors import UserError
from cft_jax.models.config import LoraSpec

# What leaves the effect of a finished adapter alone.
_INERT = frozenset(
    """
    arrow_config auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode init_lora_weights lora_ga_config loftq_config megatron_core peft_version qalora_group_size revision
    runtime_config target_modules target_parameters task_type
    """.split()
)
_READ = frozenset({"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"})
# Starts that put the adapter's first value into the base weights, which are then not those of the base checkpoint.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter on disk: its settings, and its tensors by module and factor ("lora_A" or "lora_B")."""

    directory: Path
    base: str
    revision: str
    spec: LoraSpec
    tensors: dict[tuple[str, str], StoredTensor]

    def factors(self, target: AdapterTensor, experts: int) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """A [in, R] and B [R, out] of one adapted tensor in float32, for experts with a leading axis E."""
        a, b = (_read(self.tensors[target.module, which]) for which in ("lora_A", "lora_B"))
        if not target.experts:
            return a.T, b.T
        # PEFT counts (expert, rank) in A's rows and (rank, expert) in B's columns.
        return a.reshape(experts, -1, a.shape[1]).transpose(0, 2, 1), b.reshape(b.shape[0], -1, experts).transpose(
            2, 1, 0
        )


def _read(tensor: StoredTensor) -> Float[np.ndarray, "..."]:
    return tensor.read(0, tensor.shape[0]).astype(np.float32)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / CONFIG).is_file()


def adapter_weights(directory: Path) -> Path:
    """The file with an adapter's weights.

    Raises:
      UserError: there is none.
    """
    file = directory / WEIGHTS
    if not file.is_file():
        raise UserError(f"{directory} has no {WEIGHTS}; pickled adapters (.bin) are never loaded")
    return file


def read_adapter(path_or_id: str, *, revision: str, local_files_only: bool) -> PeftAdapter:
    """Reads an adapter's settings and the header of its weights.

    Args:
      path_or_id: directory or hub id.
      revision: of a hub id.
      local_files_only: take a hub id from the local cache alone.

    Raises:
      UserError: a file is missing or damaged, or the adapter has a feature that is not implemented; names it.
    """
    directory, _ = hub.resolve(path_or_id, revision=revision, local_files_only=local_files_only)
    if not is_adapter(directory):
        raise UserError(f"{directory} has no {CONFIG}; give a PEFT adapter")
    raw = read_record(directory / CONFIG)
    weights = adapter_weights(directory)
    _refuse_features(raw)
    tensors = _by_module(read_header(weights), directory)
    spec = LoraSpec(
        rank=_number(raw, "r", int),
        alpha=_alpha(raw),
        dropout=_number(raw, "lora_dropout", float) if raw.get("lora_dropout") else 0.0,
        targets=_targets(raw, tensors),
    )
    return PeftAdapter(
        directory, raw.get("base_model_name_or_path") or "", raw.get("revision") or "main", spec, tensors
    )


def _refuse_features(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{CONFIG}: peft_type={raw.get('peft_type')!r} is not implemented; supported: LORA")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{CONFIG}: bias={raw['bias']!r} is not implemented; supported: none")
    if raw.get("init_lora_weights") not in _PLAIN_STARTS:
        raise UserError(
            f"{CONFIG}: init_lora_weights={raw['init_lora_weights']!r} changes the base weights and is not implemented"
        )
    for name, value in raw.items():
        # Everything else switches a feature on; PEFT writes None, False or an empty record where it is off.
        if name not in _INERT | _READ and value:
            raise UserError(f"{CONFIG}: {name}={value!r} is not implemented; supported: plain LoRA")


def _number(raw: Mapping[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or value <= 0:
        raise UserError(f"{CONFIG}: {name}={value!r} must be a positive {kind.__name__}")
    return kind(value)


def _alpha(raw: Mapping[str, Any]) -> float:
    """The alpha of the scale alpha / r; rank-stabilised adapters have the scale alpha / sqrt(r)."""
    alpha = _number(raw, "lora_alpha", float)
    return alpha * math.sqrt(_number(raw, "r", int)) if raw.get("use_rslora") else alpha


def _by_module(tensors: Mapping[str, StoredTensor], directory: Path) -> dict[tuple[str, str], StoredTensor]:
    """Tensors by module below the language model and by factor; both key sets of one file must hold the same."""
    found: dict[tuple[str, str], StoredTensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(ROOT)
        for prefix in reversed(WRAPPED):
            if name.startswith(prefix):
                name = "model." + name.removeprefix(prefix)
                break
        module, dot, factor = name.removesuffix(".weight").rpartition(".")
        if not dot or factor not in ("lora_A", "lora_B") or not key.startswith(ROOT):
            raise UserError(f"{directory / WEIGHTS}: tensor {key} is no LoRA weight that is known")
        other = found.setdefault((module, factor), tensor)
        if other is not tensor and not np.array_equal(_read(other), _read(tensor)):
            raise UserError(f"{directory / WEIGHTS}: {other.name} and {key} contradict each other")
    return found


def _targets(raw: Mapping[str, Any], tensors: Mapping[tuple[str, str], Any]) -> tuple[str, ...]:
    """Names of the adapted layers: from the weights, since target_modules may be a pattern."""
    experts = sorted(name.rpartition(".")[2] for name in raw.get("target_parameters") or ())
    modules = {module for module, _ in tensors}
    plain = {module.rpartition(".")[2] for module in modules if not _in_experts(module)}
    if any(_in_experts(module) for module in modules) != bool(experts):
        raise UserError(f"{CONFIG}: target_parameters={raw.get('target_parameters')!r} does not match the weights")
    return (*sorted(plain), *experts)


def _in_experts(module: str) -> bool:
    return module.endswith((".experts", ".experts.base_layer"))


def check_matches(
    adapter: PeftAdapter, targets: list[AdapterTensor], shapes: Mapping[hf_names.Path, tuple[int, ...]]
) -> None:
    """Checks that the adapter's weights are those that the model has places for.

    Args:
      adapter: as read.
      targets: the model's adapted tensors.
      shapes: of our `a` and `b`, layer axis included, by path.

    Raises:
      UserError: a weight is missing, unknown or mis-shaped, or the adapter changes nothing.
    """
    expected: dict[tuple[str, str], tuple[int, int]] = {}
    for target in targets:
        # [L, (E,) *in, R] and [L, (E,) R, *out]
        a, b = (shapes[(*target.path, which)][1:] for which in ("a", "b"))
        lead, rank = int(target.experts), a[-1]
        rows = rank * (a[0] if target.experts else 1)
        expected[target.module, "lora_A"] = (rows, math.prod(a[lead:-1]))
        expected[target.module, "lora_B"] = (math.prod(b[lead + 1 :]), rows)
    problems = [f"missing {'.'.join(key)}" for key in sorted(expected.keys() - adapter.tensors.keys())]
    problems += [f"unknown {'.'.join(key)}" for key in sorted(adapter.tensors.keys() - expected.keys())]
    for key in sorted(expected.keys() & adapter.tensors.keys()):
        shape = adapter.tensors[key].shape
        if shape != expected[key]:
            problems.append(f"{'.'.join(key)} has shape {list(shape)}, the model needs {list(expected[key])}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{adapter.directory}: the adapter does not fit the model: {'; '.join(problems[:5])}{more}; "
            "is it an adapter of this checkpoint?"
        )
    zero = {
        which: all(not np.any(_read(t)) for (_, f), t in adapter.tensors.items() if f == which)
        for which in ("lora_A", "lora_B")
    }
    if zero["lora_A"] or zero["lora_B"]:
        raise UserError(f"{adapter.directory}: the adapter changes nothing (every A or every B is zero)")


def stack(
    adapter: PeftAdapter, targets: list[AdapterTensor], shapes: Mapping[hf_names.Path, tuple[int, ...]]
) -> dict[hf_names.Path, Shaped[np.ndarray, "..."]]:
    """Our arrays `a` and `b` on the host, float32, by path."""
    out = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for target in targets:
        a_path, b_path = (*target.path, "a"), (*target.path, "b")
        experts = shapes[a_path][1] if target.experts else 1
        a, b = adapter.factors(target, experts)
        out[a_path][target.name.layer] = a.reshape(shapes[a_path][1:])
        out[b_path][target.name.layer] = b.reshape(shapes[b_path][1:])
    return out
