"""Writing PEFT adapters: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cft_jax.checkpoints.lora_weights import AdapterTensor, HostWeights, adapter_tensors
from cft_jax.checkpoints.tensor_files import Entry, raw_bytes, write_tensors
from cft_jax.models.families import is_multimodal
from cft_jax.models.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FLOAT32 = np.dtype(np.float32)
ROOT = "base_model.model."
# The published Gemma 3 wrapper holds the language model under another name; adapters are keyed for both.
WRAPPED = ("model.", "model.language_model.")


class Exporter:
    """A model's adapter in PEFT's files."""

    def __init__(self, model: Transformer) -> None:
        if model.source is None or model.lora_spec is None:
            raise ValueError("only a model with a source and adapters can be exported as an adapter")
        self.source, self.spec = model.source, model.lora_spec
        self.weights, self.targets = HostWeights(model), adapter_tensors(model.config, self.spec)
        self.multimodal = is_multimodal(model.source.config)

    def write(self, place: Path | None) -> None:
        """Writes both files; without a place, only takes part in gathering the weights."""
        tensors = {key: value for target in self.targets for key, value in self._tensors(target)}
        if place is None:
            return
        if self.multimodal:
            inside = dict(tensors)
            tensors = {
                key.replace(ROOT + WRAPPED[0], ROOT + prefix, 1): value
                for prefix in WRAPPED
                for key, value in inside.items()
            }
        with (place / WEIGHTS).open("wb") as file:
            write_tensors(file, [Entry(k, _FLOAT32, v.shape, (raw_bytes(v),)) for k, v in tensors.items()])
        text = json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n"
        (place / CONFIG).write_text(text, encoding="utf-8")

    def _tensors(self, target: AdapterTensor) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        a, b = self.weights.factors(target)
        if target.experts:
            # PEFT counts (expert, rank) in A's rows and (rank, expert) in B's columns.
            a, b = a.transpose(0, 2, 1).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1)
        else:
            a, b = a.T, b.T
        yield f"{ROOT}{target.module}.lora_A.weight", np.ascontiguousarray(a)
        yield f"{ROOT}{target.module}.lora_B.weight", np.ascontiguousarray(b)

    def _config(self) -> dict[str, Any]:
        alpha = self.spec.alpha
        experts = sorted({target.name.hf.split(".", 3)[3] for target in self.targets if target.experts})
        modules = sorted({target.module.rpartition(".")[2] for target in self.targets if not target.experts})
        pattern = rf"(?!.*(?:vision_tower|multi_modal_projector)).*\.(?:{'|'.join(modules)})"
        return {
            "alpha_pattern": {},
            "base_model_name_or_path": self.source.name if self.source.revision else self.source.directory,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            # PEFT refuses dropout on parameters that are no modules; it matters in training alone.
            "lora_dropout": 0.0 if experts else self.spec.dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.spec.rank,
            "rank_pattern": {},
            "revision": self.source.revision or None,
            "target_modules": pattern if self.multimodal else modules,
            **({"target_parameters": experts} if experts else {}),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }
