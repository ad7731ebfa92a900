"""PEFT adapters, in and out: adapter_config.json and adapter_model.safetensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cft_jax.checkpoints import hf_names
from cft_jax.checkpoints.hf_checkpoint import mismatch
from cft_jax.checkpoints.lora_weights import (
    AdapterTensor,
    HostWeights,
    Matrix,
    adapter_tensors,
    as_matrices,
    from_matrices,
)
from cft_jax.checkpoints.tensor_files import StoredTensor, read_header, read_record, write_record, write_tensors
from cft_jax.common import hub
from cft_jax.common.errors import UserError
from cft_jax.common.storage import is_remote
from cft_jax.models.config import LoraSpec
from cft_jax.models.families import is_multimodal
from cft_jax.models.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTORS = ("lora_A", "lora_B")
_ROOT = "base_model.model."
# The published Gemma 3 wrapper holds the language model under another name; adapters are keyed for both.
_WRAPPED = ("model.", "model.language_model.")
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


def _to_peft(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """PEFT's matrices of A [(E,) in, R] and B [(E,) R, out]."""
    a, b = (factor.reshape(-1, *factor.shape[-2:]) for factor in (a, b))
    # PEFT counts (expert, rank) in A's rows and (rank, expert) in B's columns.
    return a.transpose(0, 2, 1).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1)


def _from_peft(a: Matrix, b: Matrix, experts: int) -> tuple[Matrix, Matrix]:
    """The inverse of `_to_peft`, [E, in, R] and [E, R, out], also of a single matrix."""
    a = a.reshape(experts, -1, a.shape[1]).transpose(0, 2, 1)
    return a, b.reshape(b.shape[0], -1, experts).transpose(2, 1, 0)


def write_adapter(model: Transformer, directory: Path | None) -> None:
    """Writes a model's adapter into a directory; without one, only takes part in gathering the weights.

    Raises:
      UserError: the adapter changes nothing.
    """
    source, spec = model.source, model.lora_spec
    assert source is not None and spec is not None
    weights, targets, tensors = HostWeights(model), adapter_tensors(model.config, spec), {}
    for target in targets:
        for factor, matrix in zip(_FACTORS, _to_peft(*weights.factors(target)), strict=True):
            tensors[f"{target.module}.{factor}.weight"] = matrix
    _refuse_identity(list(tensors.values()), "train it before exporting")
    if directory is None:
        return
    multimodal = is_multimodal(source.config)
    written = {
        _ROOT + prefix + name.removeprefix(_WRAPPED[0]): matrix
        for prefix in _WRAPPED[: 1 + multimodal]
        for name, matrix in tensors.items()
    }
    write_tensors(directory / WEIGHTS, written, written.values())
    experts = sorted({target.name.hf.split(".", 3)[3] for target in targets if target.experts})
    modules = sorted({target.module.rpartition(".")[2] for target in targets if not target.experts})
    in_language_model = rf"(?!.*(?:vision_tower|multi_modal_projector)).*\.(?:{'|'.join(modules)})"
    record = {
        # On a store, the directory is a copy that is gone tomorrow, or on another machine.
        "base_model_name_or_path": source.name if source.revision or is_remote(source.name) else source.directory,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        # PEFT refuses dropout on parameters that are no modules; it matters in training alone.
        "lora_dropout": 0.0 if experts else spec.dropout,
        "peft_type": "LORA",
        "r": spec.rank,
        "revision": source.revision or None,
        "target_modules": in_language_model if multimodal else modules,
        **({"target_parameters": experts} if experts else {}),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    write_record(directory / CONFIG, record)


def _refuse_identity(matrices: list[Matrix], fix: str) -> None:
    """Refuses factors, A and B in turn, whose products are all zero."""
    if not any(np.any(a) and np.any(b) for a, b in zip(matrices[::2], matrices[1::2], strict=True)):
        raise UserError(f"the adapter changes nothing (every A or every B is zero); {fix}")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter on disk: its settings, and its tensors by module and factor, as in "model.norm.lora_A"."""

    directory: Path
    base: str
    revision: str
    spec: LoraSpec
    tensors: dict[str, StoredTensor]

    def arrays(
        self, targets: list[AdapterTensor], shapes: Mapping[hf_names.Path, tuple[int, ...]]
    ) -> dict[hf_names.Path, Matrix]:
        """Our arrays `a` and `b` on the host, float32, by path.

        Args:
          targets: the model's adapted tensors.
          shapes: of `a` and `b`, [L, (E,) *in, R] and [L, (E,) R, *out], by path.

        Raises:
          UserError: a weight is missing, unknown or mis-shaped, or the adapter changes nothing.
        """
        needed = {}
        for target in targets:
            a, b = (np.empty(shapes[(*target.path, which)][1:], np.float32) for which in "ab")
            for factor, matrix in zip(_FACTORS, _to_peft(*as_matrices(a, b, target.experts)), strict=True):
                needed[f"{target.module}.{factor}"] = matrix.shape
        if wrong := mismatch(self.tensors, needed):
            raise UserError(
                f"{self.directory}: the adapter does not fit the model: {wrong}; is it an adapter of this checkpoint?"
            )
        matrices = [_read(self.tensors[key]) for key in needed]
        _refuse_identity(matrices, f"give another one than {self.directory}")
        out = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
        for target, a, b in zip(targets, matrices[::2], matrices[1::2], strict=True):
            paths = [(*target.path, which) for which in "ab"]
            one = [shapes[path][1:] for path in paths]
            a, b = _from_peft(a, b, one[0][0] if target.experts else 1)
            factors = from_matrices(a, b, one, target.experts)
            for path, factor in zip(paths, factors, strict=True):
                out[path][target.name.layer] = factor
        return out


def _read(tensor: StoredTensor) -> Matrix:
    return tensor.read().astype(np.float32)


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
    """Reads the settings of an adapter in a directory or on the hub, and the header of its weights.

    Raises:
      UserError: a file is missing or damaged, or the adapter has a feature that is not implemented; names it.
    """
    directory, _ = hub.resolve(path_or_id, revision=revision, local_files_only=local_files_only)
    if not is_adapter(directory):
        raise UserError(f"{directory} has no {CONFIG}; give a PEFT adapter")
    raw = read_record(directory / CONFIG)
    file = adapter_weights(directory)
    _refuse_features(raw)
    tensors = _by_module(file)
    spec = LoraSpec(
        rank=_number(raw, "r", int),
        # Rank-stabilised adapters have the scale alpha / sqrt(r), all others alpha / r.
        alpha=_number(raw, "lora_alpha", float) * (math.sqrt(_number(raw, "r", int)) if raw.get("use_rslora") else 1),
        dropout=_number(raw, "lora_dropout", float) if raw.get("lora_dropout") else 0.0,
        targets=_targets(raw, tensors),
    )
    base, commit = raw.get("base_model_name_or_path") or "", raw.get("revision") or "main"
    return PeftAdapter(directory, base, commit, spec, tensors)


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


def _by_module(file: Path) -> dict[str, StoredTensor]:
    """Tensors by module below the language model and by factor; both key sets of one file must hold the same."""
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in read_header(file).items():
        name = key.removeprefix(_ROOT).removesuffix(".weight")
        if name.startswith(_WRAPPED[1]):
            name = _WRAPPED[0] + name.removeprefix(_WRAPPED[1])
        module, _, factor = name.rpartition(".")
        if not module or factor not in _FACTORS or not key.startswith(_ROOT):
            raise UserError(f"{file}: tensor {key} is no LoRA weight that is known")
        other = tensors.setdefault(name, tensor)
        if other is not tensor and not np.array_equal(_read(other), _read(tensor)):
            raise UserError(f"{file}: {other.name} and {key} contradict each other")
    return tensors


def _targets(raw: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the adapted layers: from the weights, since target_modules may be a pattern."""
    experts = sorted(name.rpartition(".")[2] for name in raw.get("target_parameters") or ())
    modules = {name.rpartition(".")[0] for name in tensors}
    of_experts = {module for module in modules if module.endswith((".experts", ".experts.base_layer"))}
    if bool(of_experts) != bool(experts):
        raise UserError(f"{CONFIG}: target_parameters={raw.get('target_parameters')!r} does not match the weights")
    return (*sorted({module.rpartition(".")[2] for module in modules - of_experts}), *experts)
