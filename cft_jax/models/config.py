"""What distinguishes one decoder-only transformer from another, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """RoPE frequencies divided by a factor (HF `linear`)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by a factor, high ones kept, a ramp between (HF `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) as HF computes it (`yarn`); cos and sin are multiplied by `attention_factor`."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_length: int
    truncate: bool
    attention_factor: float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angle = position * theta^(-2i/H), rescaled by `scaling`."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What varies by layer: `window` keys are visible (the query's own included), all of them if None."""

    window: int | None
    rope: Rope


@dataclass(frozen=True)
class GatedMlp:
    """down(act(gate(x)) * up(x)); `activation` is "silu" or "gelu_tanh"."""

    hidden_dim: int
    activation: str


@dataclass(frozen=True)
class Moe:
    """Mixture of experts with gpt-oss's clamped, shifted swiglu (HF modeling_gpt_oss.py, GptOssExperts)."""

    hidden_dim: int
    num_experts: int
    num_experts_per_token: int
    swiglu_limit: float
    swiglu_alpha: float


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the transformer; every field changes its mathematics.

    The layer at index i follows `layer_pattern[i % len(layer_pattern)]`. `norm_offset` is added to a norm's stored
    weight (1 for Gemma), `embed_scale` multiplies embeddings, `attn_scale` the attention logits; soft-caps c apply
    c*tanh(x/c).
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    layer_pattern: tuple[LayerSpec, ...]
    mlp: GatedMlp | Moe
    norm_eps: float
    attn_scale: float
    tie_head: bool
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    attn_bias: bool = False
    attn_sinks: bool = False
    attn_softcap: float | None = None
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")

    @property
    def stacks(self) -> tuple[tuple[int, tuple[LayerSpec, ...]], ...]:
        """(repeats, pattern) of the scanned stacks: the whole periods, then what is left of one period."""
        period = len(self.layer_pattern)
        repeats, rest = divmod(self.num_layers, period)
        whole = ((repeats, self.layer_pattern),) if repeats else ()
        return whole + (((1, self.layer_pattern[:rest]),) if rest else ())

    def layer_index(self, stack: int, repeat: int, position: int) -> int:
        """Index, from 0, of the layer that stands at `position` of the pattern in the given repeat of a stack."""
        before = sum(repeats * len(pattern) for repeats, pattern in self.stacks[:stack])
        return before + repeat * len(self.stacks[stack][1]) + position


@dataclass(frozen=True)
class LoraSpec:
    """Adapters on the linear layers named by `targets` (HF names); the update is scaled by alpha / rank.

    They are float32 and multiplied in the model's dtype with float32 sums, or in float32 throughout.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    float32: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
