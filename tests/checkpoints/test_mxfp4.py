"""MXFP4 files: the values transformers dequantises them to, in and out again as bfloat16."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cft_jax.checkpoints import from_pretrained, save_pretrained
from cft_jax.checkpoints.mxfp4 import dequantize
from cft_jax.common.errors import UserError

IDS = np.random.default_rng(1).integers(0, 100, (2, 23))


def test_every_code_and_scale_equals_transformers():
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(256, axis=1)
    scales = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(16, axis=2)
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).view(torch.uint16).numpy()
    got = dequantize(blocks, scales).swapaxes(1, 2).view(np.uint16)
    np.testing.assert_array_equal(got, expected)


def quantise(directory):
    """Puts random MXFP4 blocks in place of the experts' matrices, as gpt-oss is published."""
    rng = np.random.default_rng(0)
    index = directory / "model.safetensors.index.json"
    weight_map = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored = load_file(file)
        for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, width, out = stored.pop(name).shape
            blocks = rng.integers(0, 256, (experts, out, width // 32, 16), np.uint8)
            scales = rng.integers(120, 125, (experts, out, width // 32)).astype(np.uint8)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = torch.tensor(blocks), torch.tensor(scales)
        save_file(stored, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file.name)
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, write_hf, hf_config):
    directory = tmp_path_factory.mktemp("mxfp4")
    config = hf_config("gpt_oss", hidden_size=96, num_attention_heads=12, intermediate_size=64)
    write_hf(directory, config, dtype="bfloat16", max_shard_size="200KB")
    quantise(directory)
    return directory


def test_logits_and_export_equal_transformers(tmp_path, quantised):
    theirs = AutoModelForCausalLM.from_pretrained(
        quantised, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    assert np.std(expected) > 1
    model = from_pretrained(quantised, dtype="float32", param_dtype="bfloat16")
    np.testing.assert_allclose(model(IDS), expected, atol=1e-4, rtol=0)
    save_pretrained(model, tmp_path / "out", format="merged")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in stored)
        after |= stored
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for name, tensor in theirs.state_dict().items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name].float(), tensor), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    np.testing.assert_array_equal(
        from_pretrained(tmp_path / "out", dtype="float32", param_dtype="bfloat16")(IDS), model(IDS)
    )


def test_blocks_without_scales_are_refused(tmp_path, quantised):
    import shutil

    shutil.copytree(quantised, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors.index.json").unlink()
    stored = {}
    for file in sorted((tmp_path / "copy").glob("*.safetensors")):
        stored |= load_file(file)
        file.unlink()
    del stored["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(stored, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(UserError, match=r"no .*down_proj_scales beside it"):
        from_pretrained(tmp_path / "copy", dtype="float32", param_dtype="bfloat16")
