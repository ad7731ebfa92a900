"""config.json to ModelConfig: published numbers, omitted defaults, both spellings, refusals by name."""

import copy
import math

import pytest
import transformers
from jax.sharding import AbstractMesh

from cft_jax.common.errors import UserError
from cft_jax.models.config import Llama3Scaling, LoraSpec, Rope
from cft_jax.models.families import PUBLISHED, config_from_hf
from cft_jax.models.memory import Batch, estimate_memory, require_memory, variables
from cft_jax.models.rope_spelling import with_both_spellings
from cft_jax.sharding.mesh import AXES

# Parameters of the language models, computed with transformers 5.23 from the published sizes, tied heads once.
COUNTS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 3_880_263_168,
    "google/gemma-3-12b-it": 11_766_034_176,
    "google/gemma-3-27b-it": 27_009_346_304,
    "openai/gpt-oss-20b": 20_914_757_184,
}

# What the hub's files say, written out here from the model cards; fields equal to the class's defaults are left out,
# as they are there.
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}
GEMMA_27B = GEMMA_4B | {
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_published_models(name):
    weights = variables(PUBLISHED[name], None, "float32")
    assert sum(math.prod(weight.shape) for weight in weights) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", LLAMA_1B),
        ("Qwen/Qwen3-8B", QWEN_8B),
        ("google/gemma-3-1b-it", GEMMA_1B),
        ("google/gemma-3-4b-it", GEMMA_4B),
        ("google/gemma-3-27b-it", GEMMA_27B),
        ("openai/gpt-oss-20b", GPT_OSS),
    ],
)
def test_published_files_mean_the_published_numbers(name, raw):
    assert config_from_hf(raw) == PUBLISHED[name]
    assert config_from_hf(with_both_spellings(raw)) == PUBLISHED[name]
    # As transformers 5 writes the same model.
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "gemma3_text": transformers.Gemma3TextConfig,
        "gemma3": transformers.Gemma3Config,
        "gpt_oss": transformers.GptOssConfig,
    }[raw["model_type"]]
    rewritten = config_class(**copy.deepcopy(raw)).to_dict()
    assert config_from_hf(rewritten) == PUBLISHED[name]
    assert config_from_hf(with_both_spellings(rewritten)) == PUBLISHED[name]


def test_omitted_fields_take_the_defaults_of_transformers():
    sizes = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6}
    config = config_from_hf(sizes)
    theirs = transformers.LlamaConfig(**{key: value for key, value in sizes.items() if key != "model_type"})
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (theirs.num_hidden_layers, 6, 8)
    assert (config.vocab_size, config.norm_eps) == (theirs.vocab_size, theirs.rms_norm_eps)
    assert config.layer_pattern[0].rope == Rope(10_000.0)


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (LLAMA_1B, {"model_type": "mamba"}, "model_type='mamba'"),
        (LLAMA_1B, {"model_type": None}, "model_type=None"),
        (LLAMA_1B, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA_1B, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (LLAMA_1B, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA_1B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA_1B, {"sliding_window": 128}, "sliding_window=128"),
        (LLAMA_1B, {"layer_types": ["full_attention"] * 16}, "layer_types"),
        (LLAMA_1B, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (LLAMA_1B, {"rope_scaling": {"rope_type": "linear"}}, "factor=None"),
        (LLAMA_1B, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 3}}, "wobble"),
        (LLAMA_1B, {"rope_scaling": 3.0}, "rope_scaling=3.0"),
        (LLAMA_1B, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "contradict"),
        (LLAMA_1B, {"num_key_value_heads": 5}, "num_kv_heads=5"),
        (LLAMA_1B, {"head_dim": 63}, "head_dim=63"),
        (LLAMA_1B, {"hidden_size": "2048"}, "hidden_size='2048'"),
        (LLAMA_1B, {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        (LLAMA_1B, {"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
        (LLAMA_1B, {"rms_norm_eps": None}, "rms_norm_eps=None"),
        (LLAMA_1B, {"logit_scale": 0.5}, "logit_scale=0.5"),
        (LLAMA_1B, {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "never run"),
        (QWEN_8B, {"use_sliding_window": True, "max_window_layers": 30}, "sliding_window=None"),
        (QWEN_8B, {"layer_types": ["sliding_attention"] * 36}, "use_sliding_window=False"),
        (GEMMA_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (GEMMA_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA_1B, {"layer_types": ["full_attention"] * 25}, "must list 26 times"),
        (GEMMA_1B, {"layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
        (GEMMA_4B, {"text_config": None}, "text_config=None"),
        (GEMMA_4B, {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        (GEMMA_4B, {"text_config": GEMMA_4B["text_config"] | {"final_logit_softcapping": 30.0}}, "final_logit"),
        (GPT_OSS, {"experts_per_token": 2}, "experts_per_token=2"),
        (GPT_OSS, {"hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(raw, changes, message):
    with pytest.raises(UserError, match=message) as error:
        config_from_hf(raw | changes)
    assert "\n" not in str(error.value)


def test_both_spellings_must_agree_and_either_is_enough():
    scaling = LLAMA_1B["rope_scaling"]
    new = {key: value for key, value in LLAMA_1B.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {**scaling, "rope_theta": 5e5}
    expected = Rope(5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    for raw in (LLAMA_1B, new, LLAMA_1B | new):
        assert config_from_hf(raw).layer_pattern[0].rope == expected
    with pytest.raises(UserError, match="contradict"):
        config_from_hf(new | {"rope_theta": 1e4})
    both = with_both_spellings(new)
    assert both["rope_scaling"] == scaling
    assert both["rope_theta"] == 5e5


LORA = LoraSpec(rank=16, alpha=32.0, dropout=0.05, targets=("q_proj", "k_proj", "v_proj", "o_proj"))


def test_memory_follows_the_mesh():
    def estimate(shape, lora=LORA, rows=32, **options):
        options = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "none"} | options
        mesh = AbstractMesh(shape, AXES)
        return estimate_memory(PUBLISHED["Qwen/Qwen3-8B"], lora=lora, mesh=mesh, batch=Batch(rows, 256), **options)

    one = estimate((1, 1, 1))
    assert one.parameters == COUNTS["Qwen/Qwen3-8B"]
    # By hand: rank x (in + out) of q, k, v, o, 36 layers.
    assert one.trainable == 36 * 16 * ((4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096))
    assert one.weights == 2 * one.parameters + 4 * one.trainable
    assert (one.optimizer, one.gradients) == (8 * one.trainable, 4 * one.trainable)
    # Norms and the adapters' ranks are cut by no axis.
    assert 7.9 < one.weights / estimate((1, 4, 2)).weights < 8
    assert estimate((8, 1, 1)).weights == one.weights
    assert estimate((8, 1, 1)).activations == pytest.approx(one.activations / 8, rel=1e-6)
    assert estimate((1, 1, 1), remat="full").activations < estimate((1, 1, 1), remat="dots").activations
    assert estimate((1, 1, 1), remat="dots").activations < one.activations
    full = estimate((1, 1, 1), lora=None, param_dtype="float32")
    assert full.trainable == full.parameters
    assert full.optimizer == 8 * full.parameters


def test_what_cannot_fit_is_refused_in_one_line():
    estimate = estimate_memory(
        PUBLISHED["google/gemma-3-27b-it"],
        lora=LORA,
        dtype="bfloat16",
        param_dtype="bfloat16",
        mesh=AbstractMesh((1, 1, 1), AXES),
        batch=Batch(1, 256),
        remat="full",
    )
    require_memory(estimate, None)
    require_memory(estimate, 80 * 2**30)
    with pytest.raises(UserError, match=r"needs 50\.\d\d GiB per device .* each has 16\.00 GiB") as error:
        require_memory(estimate, 16 * 2**30)
    assert "\n" not in str(error.value)
