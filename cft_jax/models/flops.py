"""How much a training step computes, worked out from shapes, and how much the devices could."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cft_jax.models.config import ModelConfig, Moe
from cft_jax.models.memory import variables

# Dense bfloat16 operations per second of one JAX device (half a chip of TPU v2, v3 and v7), from the makers' data
# sheets: cloud.google.com/tpu/docs/system-architecture-tpu-vm, nvidia.com/en-us/data-center. The first name that the
# device's kind begins with counts.
_PEAKS = {
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4 lite": 138e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6": 918e12, "TPU7x": 1153.5e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12,
    "NVIDIA GH200": 989.4e12, "NVIDIA B200": 2250e12, "NVIDIA A100": 312e12, "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12, "NVIDIA A10G": 70e12,
}  # fmt: skip
# A multiplication and an addition for each parameter, forwards and for the activations' gradient; as many again for
# the gradient of a weight that is trained.
_FORWARD, _FROZEN, _TRAINED = 2, 4, 6


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations per second of a device, by `jax.Device.device_kind`; None where it is not known."""
    return next((peak for name, peak in _PEAKS.items() if device_kind.startswith(name)), None)


@dataclass(frozen=True)
class Operations:
    """Operations of a program: those that the method asks for, whatever the engine computes again or for nothing.

    Per parameter and token 2 forwards; in training 4 where the weights are frozen and 6 where they are trained. The
    products of attention's scores, the adapters and the embedding's look-up are left out.

    Attributes:
      per_token: in the layers; a mixture of experts counts those that a token reaches.
      per_step: in the head, of a step whose loss is taken; positions without a loss have no head.
    """

    per_token: int
    per_step: int

    @classmethod
    def of(cls, config: ModelConfig, *, lora: bool) -> "Operations":
        """Of a step of training with LoRA or in full."""
        return cls._of(config, _FROZEN if lora else _TRAINED)

    @classmethod
    def forward(cls, config: ModelConfig) -> "Operations":
        """Of sampling and scoring."""
        return cls._of(config, _FORWARD)

    @classmethod
    def _of(cls, config: ModelConfig, each: int) -> "Operations":
        moe, in_layers = config.mlp if isinstance(config.mlp, Moe) else None, 0
        for variable in variables(config, None, jnp.float32):
            axes, size = variable.get_metadata("axes"), math.prod(variable.shape)
            of_expert = axes[:2] == ("layers", "experts") and len(axes) > 2
            if moe is not None and (of_expert or axes[:3] == ("layers", "parts", "experts")):
                size = size * moe.num_experts_per_token // moe.num_experts
            in_layers += size if "layers" in axes else 0
        return cls(each * in_layers, each * config.vocab_size * config.embed_dim)

    def count(self, *, tokens: int, steps: int) -> int:
        """Of so many tokens, padding aside, and so many steps."""
        return self.per_token * tokens + self.per_step * steps


def all_devices_peak() -> float | None:
    """bfloat16 operations per second of all devices of the run together; None where it is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
