"""One table between our weights and the tensors of a checkpoint: names and layouts.

A layout such as "NH,D->DNH" reads: the file's tensor has the axes N*H and D, ours (without the layer axis) D, N, H.
Weights are transposed and reshaped, never scaled or permuted, so that export is the exact inverse.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from cft_jax.models.config import ModelConfig, Moe

Path = tuple[str | int, ...]

# Of a block: which ones have it, our path in it, the name in the file, the layout.
_BLOCK = (
    ("all", "attn q_proj kernel", "self_attn.q_proj.weight", "NH,D->DNH"),
    ("all", "attn k_proj kernel", "self_attn.k_proj.weight", "KH,D->DKH"),
    ("all", "attn v_proj kernel", "self_attn.v_proj.weight", "KH,D->DKH"),
    ("all", "attn o_proj kernel", "self_attn.o_proj.weight", "D,NH->NHD"),
    ("dense", "mlp gate_proj kernel", "mlp.gate_proj.weight", "F,D->DF"),
    ("dense", "mlp up_proj kernel", "mlp.up_proj.weight", "F,D->DF"),
    ("dense", "mlp down_proj kernel", "mlp.down_proj.weight", "D,F->FD"),
    ("pre_norms", "attn_norm scale", "input_layernorm.weight", "D->D"),
    ("pre_norms", "mlp_norm scale", "post_attention_layernorm.weight", "D->D"),
    ("sandwich_norms", "attn_norm scale", "input_layernorm.weight", "D->D"),
    ("sandwich_norms", "post_attn_norm scale", "post_attention_layernorm.weight", "D->D"),
    ("sandwich_norms", "mlp_norm scale", "pre_feedforward_layernorm.weight", "D->D"),
    ("sandwich_norms", "post_mlp_norm scale", "post_feedforward_layernorm.weight", "D->D"),
    ("attn_bias", "attn q_proj bias", "self_attn.q_proj.bias", "NH->NH"),
    ("attn_bias", "attn k_proj bias", "self_attn.k_proj.bias", "KH->KH"),
    ("attn_bias", "attn v_proj bias", "self_attn.v_proj.bias", "KH->KH"),
    ("attn_bias", "attn o_proj bias", "self_attn.o_proj.bias", "D->D"),
    ("qk_norm", "attn q_norm scale", "self_attn.q_norm.weight", "H->H"),
    ("qk_norm", "attn k_norm scale", "self_attn.k_norm.weight", "H->H"),
    ("attn_sinks", "attn sinks", "self_attn.sinks", "N->N"),
    ("moe", "mlp router_kernel", "mlp.router.weight", "E,D->DE"),
    ("moe", "mlp router_bias", "mlp.router.bias", "E->E"),
    # P counts gate and up, which the file interleaves; of down there is one.
    ("moe", "mlp gate_up_proj kernel", "mlp.experts.gate_up_proj", "E,D,FP->PEDF"),
    ("moe", "mlp gate_up_proj bias", "mlp.experts.gate_up_proj_bias", "E,FP->EPF"),
    ("moe", "mlp down_proj kernel", "mlp.experts.down_proj", "E,F,DP->PEFD"),
    ("moe", "mlp down_proj bias", "mlp.experts.down_proj_bias", "E,DP->EPD"),
)


@dataclass(frozen=True)
class Layout:
    """How a tensor of the file becomes one of ours, and back."""

    text: str

    @property
    def file_axes(self) -> list[str]:
        return self.text.split("->")[0].split(",")

    @property
    def file_letters(self) -> str:
        return "".join(self.file_axes)

    @property
    def our_letters(self) -> str:
        return self.text.split("->")[1]

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The file's shape of a tensor that has this shape with us."""
        sizes = dict(zip(self.our_letters, shape, strict=True))
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.file_axes)

    def split_axis(self) -> int:
        """Our axis along which rows of the file's first axis can be told apart."""
        return self.our_letters.index(self.file_axes[0][0])

    def permutation(self) -> tuple[int, ...]:
        """For each of our axes, its index among the letters of the file's axes."""
        return tuple(map(self.file_letters.index, self.our_letters))

    def to_ours(self, rows: Shaped[np.ndarray, "..."], shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        """Some rows of the file's tensor in our layout; a view.

        Args:
          rows: whole blocks of the first axis's first letter.
          shape: of the whole tensor with us.
        """
        sizes = dict(zip(self.our_letters, shape, strict=True))
        full = rows.reshape(-1, *(sizes[letter] for letter in self.file_letters[1:]))
        return full.transpose(self.permutation())

    def to_file(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """A tensor of ours in the file's layout."""
        moved = ours.transpose([self.our_letters.index(letter) for letter in self.file_letters])
        return moved.reshape(self.file_shape(ours.shape))


@dataclass(frozen=True)
class Name:
    """One tensor of the file: `layer` is its index along our leading axis (None: the array has no such axis)."""

    hf: str
    path: Path
    layer: int | None
    layout: Layout


def tensor_names(config: ModelConfig) -> list[Name]:
    """All tensors of the language model, under the names of `*ForCausalLM`; those of one array in its layers' order."""
    names = [Name("model.embed_tokens.weight", ("embed",), None, Layout("V,D->VD"))]
    moe = isinstance(config.mlp, Moe)
    kinds = {"all", "moe" if moe else "dense", "sandwich_norms" if config.post_norms else "pre_norms"}
    kinds |= {kind for kind in ("attn_bias", "qk_norm", "attn_sinks") if getattr(config, kind)}
    block = [(path.split(), hf, Layout(layout)) for kind, path, hf, layout in _BLOCK if kind in kinds]
    names += [
        Name(f"model.layers.{config.layer_index(s, repeat, p)}.{hf}", ("stacks", s, p, *path), repeat, layout)
        for s, (repeats, pattern) in enumerate(config.stacks)
        for p in range(len(pattern))
        for path, hf, layout in block
        for repeat in range(repeats)
    ]
    names.append(Name("model.norm.weight", ("final_norm", "scale"), None, Layout("D->D")))
    if not config.tie_head:
        names.append(Name("lm_head.weight", ("head",), None, Layout("V,D->VD")))
    return names


def linear_layers(config: ModelConfig) -> list[str]:
    """HF's names of the layers that adapters can be put on."""
    return sorted({str(name.path[-2]) for name in tensor_names(config) if name.path[-1] == "kernel"})
