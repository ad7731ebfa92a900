"""The forward pass against transformers in float32, for every family and every option of its config.

Expected values: transformers and torch on CPU, computed here; logits of order one, tolerance 1e-4.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cft_jax.checkpoints import from_pretrained

FAMILIES = ("llama", "qwen3", "gemma3_text", "gemma3", "gpt_oss")
LENGTH = 37  # more than twice every window and every original length of the scaled ropes


def tokens(config, rows=2, length=LENGTH):
    vocabulary = config.get_text_config().vocab_size
    # The last ids are left out: one of them stands for images in the multimodal Gemma 3.
    return np.random.default_rng(0).integers(0, vocabulary - 3, (rows, length))


def torch_logits(model, ids, mask=None):
    with torch.no_grad():
        arguments = {}
        if mask is not None:
            mask = torch.tensor(mask).long()
            arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return model(input_ids=torch.tensor(ids), **arguments).logits.numpy()


def load(directory):
    return from_pretrained(directory, dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_torch(tmp_path, write_hf, hf_config, family):
    config = hf_config(family)
    theirs = write_hf(tmp_path, config)
    ids = tokens(config)
    expected = torch_logits(theirs, ids)
    assert np.std(expected) > 1
    np.testing.assert_allclose(load(tmp_path)(ids), expected, atol=1e-4, rtol=0)


SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "rope_theta": 90.0, "factor": 5.0, "original_max_position_embeddings": 12}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "rms_norm_eps": 0.05, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": YARN, "num_key_value_heads": 10}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 60.0, "factor": 3.0}, "head_dim": None}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "attention_bias": True}),
        ("gemma3_text", {"final_logit_softcapping": 2.0, "layer_types": [FULL, SLIDING, FULL, *[SLIDING] * 2]}),
        ("gpt_oss", {"swiglu_limit": 0.5, "swiglu_alpha": 0.9, "attention_bias": False, "layer_types": [FULL] * 3}),
    ],
)
def test_options_act_as_in_transformers(tmp_path, write_hf, hf_config, family, options):
    config = hf_config(family, **options)
    theirs = write_hf(tmp_path, config)
    for module in theirs.modules():
        if hasattr(module, "limit"):  # up to 5.17 the experts have 1.702 and 7 whatever the config says
            module.alpha, module.limit = config.swiglu_alpha, config.swiglu_limit
    ids = tokens(config)
    np.testing.assert_allclose(load(tmp_path)(ids), torch_logits(theirs, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss"])
def test_padding_changes_nothing(tmp_path, write_hf, hf_config, family, side):
    config = hf_config(family)
    theirs = write_hf(tmp_path, config)
    ids = tokens(config)
    mask = np.ones(ids.shape, bool)
    mask[1, :9] = False
    if side == "right":
        mask = mask[:, ::-1].copy()
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(np.asarray(load(tmp_path)(ids, mask=mask))[mask], expected[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_bfloat16_is_no_rougher_than_torch(tmp_path, write_hf, hf_config, family):
    """Median errors of bfloat16 logits, against float32 arithmetic on the same bfloat16 weights.

    Medians, because a token near a tie may take another expert than in float32.
    """
    config = hf_config(family)
    theirs = write_hf(tmp_path, config, dtype="bfloat16")
    ids = tokens(config)
    exact = torch_logits(theirs, ids)
    in_bfloat16 = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.no_grad():
        of_torch = in_bfloat16(input_ids=torch.tensor(ids)).logits.float().numpy()
    ours = from_pretrained(tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(ids)
    allowed = np.median(np.abs(of_torch - exact))
    assert 0.001 < allowed < 0.1
    assert np.median(np.abs(np.asarray(ours) - exact)) < 1.1 * allowed
