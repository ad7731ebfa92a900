"""Loading checkpoints made by transformers: files of every kind, onto every mesh."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cft_jax.checkpoints import from_pretrained
from cft_jax.common.errors import UserError
from cft_jax.models.config import LoraSpec
from cft_jax.sharding.mesh import make_mesh

IDS = np.random.default_rng(0).integers(0, 85, (8, 37))
# Float32 in another order of summation, on any CPU: a hundred units in the last place of numbers up to 16.
ROUNDING = 1e-4


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.numpy()


def load(directory, **options):
    return from_pretrained(directory, **({"dtype": jnp.float32, "param_dtype": jnp.float32} | options))


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_sharded_files(tmp_path, write_hf, hf_config, changes):
    theirs = write_hf(tmp_path, hf_config("llama", **changes), max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    np.testing.assert_allclose(load(tmp_path)(IDS), torch_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_half_precision_load_exactly(tmp_path, write_hf, hf_config, dtype):
    theirs = write_hf(tmp_path, hf_config("llama"), dtype=dtype)
    np.testing.assert_allclose(load(tmp_path)(IDS), torch_logits(theirs), atol=1e-4, rtol=0)


def test_each_tensor_has_a_dtype_of_its_own(tmp_path, write_hf, hf_config):
    theirs = write_hf(tmp_path, hf_config("llama"), dtype="bfloat16")
    file = tmp_path / "model.safetensors"
    tensors = {
        name: tensor.half() if "mlp" in name else tensor.float() if "norm" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    theirs.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    np.testing.assert_allclose(load(tmp_path)(IDS), torch_logits(theirs), atol=1e-4, rtol=0)


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_meshes_give_the_logits_of_one_device(tmp_path, write_hf, hf_config, family):
    # Dimensions that the axes divide, and key/value heads that some do not.
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 64}
    write_hf(tmp_path, hf_config(family, **sizes), max_shard_size="30KB")
    expected = load(tmp_path)(IDS)
    for shape in MESHES:
        model = load(tmp_path, mesh=make_mesh(*shape))
        np.testing.assert_allclose(model(IDS), expected, atol=ROUNDING, rtol=0, err_msg=f"mesh {shape}")


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 1, 8)])
def test_loading_piece_by_piece_gives_the_same_weights(tmp_path, write_hf, hf_config, shape):
    from flax import nnx

    write_hf(tmp_path, hf_config("gpt_oss", num_hidden_layers=4), dtype="bfloat16")
    whole = nnx.to_flat_state(nnx.state(load(tmp_path)))
    mesh = None if shape is None else make_mesh(*shape)
    pieces = dict(nnx.to_flat_state(nnx.state(load(tmp_path, mesh=mesh, piece_bytes=900))))
    for path, variable in whole:
        np.testing.assert_array_equal(variable.get_value(), pieces[path].get_value(), err_msg=str(path))


def test_fresh_adapters_follow_the_seed_alone(tmp_path, write_hf, hf_config):
    write_hf(tmp_path, hf_config("llama"))
    lora = LoraSpec(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj",))
    one = load(tmp_path, lora=lora, seed=5)
    other = load(tmp_path, lora=lora, seed=5, mesh=make_mesh(1, 2, 4))
    last = load(tmp_path, lora=lora, seed=6)
    a, b, c = (np.asarray(m.stacks[0][0].attn.q_proj.lora.a[...]) for m in (one, other, last))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.01
    # PEFT: kaiming_uniform(a=sqrt(5)) is uniform within 1/sqrt(fan_in).
    assert 0.9 / 60**0.5 < np.abs(a).max() <= 1 / 60**0.5
    assert not np.any(one.stacks[0][0].attn.q_proj.lora.b[...])


def rewrite(edit):
    def damage(directory):
        file = directory / "model.safetensors"
        save_file(edit(load_file(file)), file)

    return damage


def cut(name, length):
    def damage(directory):
        file = directory / name
        file.write_bytes(file.read_bytes()[:length])

    return damage


def edit_config(**changes):
    def damage(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("model.safetensors", 5), "damaged or half-written"),
        (cut("model.safetensors", 300), "damaged or half-written"),
        (cut("model.safetensors", 20_000), "its header describes"),
        (cut("config.json", 50), "damaged or half-written"),
        (lambda directory: (directory / "config.json").unlink(), "no config.json"),
        (lambda directory: (directory / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled weights .*never loaded"),
        (rewrite(lambda t: {name: value for name, value in t.items() if name != Q}), f"missing {Q}"),
        (rewrite(lambda t: t | {"model.extra.weight": torch.zeros(2)}), "unknown model.extra.weight"),
        (rewrite(lambda t: t | {Q: t[Q][:-1].clone()}), r"q_proj.weight has shape \[79, 60\], .* \[80, 60\]"),
        (rewrite(lambda t: t | {Q: t[Q].to(torch.int32)}), "dtype int32"),
        (rewrite(lambda t: t | {Q: t[Q].to(torch.float8_e4m3fn)}), "dtype F8_E4M3, which is not known"),
        (edit_config(model_type="mamba"), "model_type='mamba'"),
        (edit_config(quantization_config={"quant_method": "gptq"}), "quant_method='gptq'"),
    ],
)
def test_damaged_checkpoints_end_in_one_line(tmp_path, write_hf, hf_config, damage, message):
    write_hf(tmp_path, hf_config("llama", num_hidden_layers=1))
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: next(iter(sorted(d.glob("model-*")))).unlink(), "lacks model-00001-of"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "but no model.safetensors.index.json"),
        (cut("model.safetensors.index.json", 90), "damaged or half-written"),
        (
            lambda d: shutil.copy(sorted(d.glob("model-*"))[0], sorted(d.glob("model-*"))[1]),
            "is in both",
        ),
    ],
)
def test_damaged_shards_end_in_one_line(tmp_path, write_hf, hf_config, damage, message):
    write_hf(tmp_path, hf_config("llama", num_hidden_layers=1), max_shard_size="30KB")
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_cannot_lead_out_of_its_directory(tmp_path, write_hf, hf_config):
    write_hf(tmp_path / "base", hf_config("llama", num_hidden_layers=1), max_shard_size="30KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../base/model-00001"))
    with pytest.raises(UserError, match="outside the directory"):
        load(tmp_path / "base")
