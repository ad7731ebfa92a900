"""The main job on checkpoints that transformers wrote: what it exports is, in transformers and peft, the trained model.

Expected logits: transformers and peft in float32 on CPU, computed here; tolerance 1e-4.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cft_jax import export
from cft_jax.checkpoints import save_pretrained
from cft_jax.checkpoints.generation_config import named_stop_ids
from cft_jax.common.errors import UserError
from cft_jax.common.storage import Workdir
from cft_jax.common.writer import read_metrics
from cft_jax.config import Config, MeshConfig, changed, from_config_dict, read_config
from cft_jax.distributions import configured_tasks
from cft_jax.evaluate.backends.load import load_measured_model
from cft_jax.main import run
from cft_jax.models.strength import set_alpha
from cft_jax.runs.scratch import scratch_tokenizer
from cft_jax.runs.trained import load_trained
from cft_jax.text.chat import encode_chat, terminator_id
from cft_jax.text.scratch import USER

LLAMA = Path(__file__).parents[1] / "configs" / "llama.py"
EVAL = LLAMA.parent / "eval" / "structured.py"
FEW_PROMPTS = (
    "model.dtype=float32",
    "data.train_families=geometric,exponential",
    "data.heldout_families=poisson",
    "data.grid_points=3",
    "train.learning_rate=0.02",
    "train.batch_size=4",
    "train.max_steps=4",
    "eval.max_prompts_per_split=1",
    "eval.num_samples=8",
)
# Rank, alpha and targets other than the paper's, to see that they travel.
LORA = ("model.lora.rank=5", "model.lora.alpha=7.0", "model.lora.targets=q_proj,v_proj,down_proj")
pytestmark = pytest.mark.usefixtures("program_cache")


# Llama 3's has 128,256 tokens, and all that is computed, written and read grows with them.
@pytest.fixture(scope="module", params=["scratch", pytest.param("llama3", marks=pytest.mark.slow)])
def tokenizer(request, configured):
    """One made for the prompts, or Llama 3's."""
    if request.param == "llama3":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("tokenizers_dir") / "llama3")
    tasks = configured_tasks(configured(LLAMA, *FEW_PROMPTS).data)
    return scratch_tokenizer(task for split in tasks.values() for task in split)


@pytest.fixture(scope="module")
def write_base(write_hf, hf_config, tokenizer):
    """Writes a small Llama with scaled rope in shards, with its tokenizer; returns the directory."""

    def write(directory, **changes):
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "max_position_embeddings": 512,
        }
        # Its files name another end of a text than its tokenizer does.
        write_hf(directory, hf_config("llama", **sizes, eos_token_id=0, **changes), max_shard_size="40KB")
        tokenizer.save_pretrained(directory)
        assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
        return directory

    return write


@pytest.fixture(scope="module")
def end(tokenizer):
    """A token that neither the base checkpoint, the tokenizer nor the chat template names as the end of a text."""
    return "<|eom_id|>" if "<|eom_id|>" in tokenizer.get_vocab() else USER


@pytest.fixture(scope="module")
def soft(tmp_path_factory, write_base, configured, end):
    """A finished run on soft targets with a terminator of its own; the head is tied."""
    place = tmp_path_factory.mktemp("soft")
    base = write_base(place / "base", tie_word_embeddings=True)
    summary = run(
        configured(LLAMA, f"model.checkpoint={base}", f"data.terminator={end}", *FEW_PROMPTS, *LORA), place / "run"
    )
    return place, summary


def text_ids(tokenizer):
    """A prompt, and text beyond the rope's original length."""
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "Output ONLY the number."}])
    return np.array([(prompt + [7] * 64)[:64], np.random.default_rng(0).integers(0, len(tokenizer), 64)])


def jax_logits(workdir, ids):
    """Of the newest orbax checkpoint."""
    model, *_ = load_trained(Workdir(workdir), from_config_dict(read_config(workdir)))
    return np.asarray(model(ids))


def torch_logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits.numpy()


def plain(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def with_adapter(base, adapter):
    return PeftModel.from_pretrained(plain(base), adapter)


@pytest.fixture(autouse=True)
def quietly(log_restored):
    """The command sets up logging."""


def export_command(workdir, output, form, *more):
    arguments = ["export", f"--workdir={workdir}", f"--output={output}", f"--format={form}", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        export.main()


def test_the_adapter_is_the_trained_model_in_peft(soft, tokenizer):
    place, summary = soft
    ids = text_ids(tokenizer)
    ours = jax_logits(place / "run", ids)
    theirs = torch_logits(with_adapter(place / "base", place / "run" / "export"), ids)
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)
    assert np.abs(torch_logits(plain(place / "base"), ids) - ours).max() > 1e-2, "training changed the model"
    assert summary["checkpoint"] == str(place / "base")
    stages = summary["evaluations"]["structured"]
    before, after = (stages[stage]["test_unseen_params"]["exact"]["kl"] for stage in ("before", "after"))
    assert after < before


def test_the_adapter_says_what_it_is(soft):
    place, _ = soft
    written = json.loads((place / "run" / "export" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (5, 7, 0.05)
    assert set(written["target_modules"]) == {"q_proj", "v_proj", "down_proj"}
    assert written["base_model_name_or_path"] == str(place / "base")
    names = {path.name for path in (place / "run" / "export").iterdir()}
    assert names >= {"adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert not [name for name in names if name.startswith("model") or name == "config.json"]


def test_the_terminator_of_training_ends_texts_everywhere(soft, tokenizer, end, configured, tmp_path):
    place, _ = soft
    token, named = tokenizer.get_vocab()[end], named_stop_ids(place / "base")
    own = {token, terminator_id(tokenizer, "tokenizer_eos"), terminator_id(tokenizer, "auto")}
    for form in ("adapter", "merged"):
        model, *_ = load_trained(Workdir(place / "run"), from_config_dict(read_config(place / "run")))
        save_pretrained(model, tmp_path / form, format=form)
        assert GenerationConfig.from_pretrained(tmp_path / form).eos_token_id == [*named, *sorted(own)] != named

    def stop_ids(what, *options):
        config = configured(EVAL, f"model.checkpoint={what}", "model.dtype=float32", *options)
        return set(load_measured_model(config).backend.stop_ids)

    assert stop_ids(place / "run") == stop_ids(tmp_path / "merged") == {*named, *own}
    assert stop_ids(tmp_path / "adapter", "backend=hf") == stop_ids(place / "base", f"data.terminator={end}")
    assert stop_ids(place / "base") < {*named, *own}


def test_the_export_command_writes_both_forms(soft, tokenizer, tmp_path, capsys):
    place, _ = soft
    ids = text_ids(tokenizer)
    for form in ("adapter", "merged"):
        export_command(place / "run", tmp_path / form, form)
    again = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / again).read_bytes() == (place / "run" / "export" / again).read_bytes()
    np.testing.assert_allclose(
        torch_logits(plain(tmp_path / "merged"), ids), jax_logits(place / "run", ids), atol=1e-4, rtol=0
    )
    base = {file.name for file in (place / "base").glob("model*")}
    assert base == {file.name for file in (tmp_path / "merged").glob("model*")}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert "## Metrics" in (tmp_path / "merged" / "README.md").read_text()
    assert str(tmp_path / "merged") in capsys.readouterr().out


def test_a_strength_is_written_into_alpha_and_merged_weights(soft, tokenizer, tmp_path):
    place, _ = soft
    ids, strength = text_ids(tokenizer), "--config.model.lora.strength=0.4"
    for form in ("adapter", "merged"):
        export_command(place / "run", tmp_path / form, form, strength)
        card = (tmp_path / form / "README.md").read_text()
        assert "## Metrics" not in card and "what training added is multiplied by 0.4" in card
    config = from_config_dict(read_config(place / "run"))
    model, *_ = load_trained(Workdir(place / "run"), config)
    trained = np.asarray(model(ids))
    set_alpha(model, 0.4 * config.model.lora.alpha)
    weaker = np.asarray(model(ids))
    assert np.abs(weaker - trained).max() > 1e-2
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(2.8)
    for exported in (with_adapter(place / "base", tmp_path / "adapter"), plain(tmp_path / "merged")):
        np.testing.assert_allclose(torch_logits(exported, ids), weaker, atol=1e-4, rtol=0)
    export_command(place / "run", tmp_path / "base", "merged", "--config.model.lora.strength=0.0")
    np.testing.assert_allclose(
        torch_logits(plain(tmp_path / "base"), ids), torch_logits(plain(place / "base"), ids), atol=1e-6, rtol=0
    )


def test_an_adapter_that_training_started_from_may_be_gone(soft, tokenizer):
    workdir = soft[0] / "run"
    config = from_config_dict(read_config(workdir))
    started = replace(config, model=replace(config.model, adapter="/gone"))
    ids = text_ids(tokenizer)
    np.testing.assert_array_equal(load_trained(Workdir(workdir), started)[0](ids), jax_logits(workdir, ids))


def test_a_run_is_asked_on_the_mesh_and_in_the_dtype_that_are_said(soft):
    def loaded(**changes):
        config = changed(Config(), {"model": {"checkpoint": str(soft[0] / "run"), "dtype": "float32"}, **changes})
        return load_measured_model(config).backend

    def model(**options):
        workdir = soft[0] / "run"
        return load_trained(Workdir(workdir), replace(from_config_dict(read_config(workdir)), **options))[0]

    plain, half = loaded(), loaded(model={"checkpoint": str(soft[0] / "run"), "dtype": "bfloat16"})
    assert plain.fingerprint == loaded(mesh={"fsdp": 2}).fingerprint
    assert plain.fingerprint != half.fingerprint
    with pytest.raises(UserError, match="8 devices cannot be cut into 3"):
        loaded(mesh={"fsdp": 3})
    assert dict(model().mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert model(mesh=MeshConfig(fsdp=2)).mesh.shape["fsdp"] == 2, "the run's own"
    assert model(mesh=MeshConfig(data=16)).mesh.shape["data"] == 8, "which these devices lack"


def test_exports_overwrite_nothing(soft, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for output, words in ((tmp_path, "not empty"), ("", "--output")):
        with pytest.raises(SystemExit) as stopped:
            export_command(soft[0] / "run", output, "merged")
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_base_is_refused(soft, tmp_path, capsys):
    """Its weights and the adapter do not belong together; without its shard it cannot be loaded at all."""
    place, _ = soft
    shard = sorted((place / "base").glob("*.safetensors"))[-1]
    before = shard.read_bytes()
    try:
        for after, words in ((before[:-4] + b"\0\0\0\0", "other base weights"), (before[:-4], "half-written")):
            shard.write_bytes(after)
            with pytest.raises(SystemExit) as stopped:
                export_command(place / "run", tmp_path / "out", "merged")
            assert stopped.value.code == 2
            assert words in capsys.readouterr().err.splitlines()[-1]
    finally:
        shard.write_bytes(before)
    assert not (tmp_path / "out").exists()


def test_a_base_made_on_the_spot_is_never_made_twice(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "base")
    with pytest.raises(SystemExit) as stopped:
        export_command(tmp_path / "run", tmp_path / "out", "merged")
    assert stopped.value.code == 2
    assert "is gone" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "base").exists()


@pytest.mark.slow
def test_hard_targets_with_a_head_of_its_own(tmp_path, write_base, configured, tokenizer):
    base = write_base(tmp_path / "base", tie_word_embeddings=False)
    overrides = (f"model.checkpoint={base}", *FEW_PROMPTS, "eval.enabled=False", "export.format=merged")
    run(configured(f"{LLAMA}:1b-hard", *overrides), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    ids = text_ids(tokenizer)
    merged = torch_logits(plain(tmp_path / "run" / "export"), ids)
    np.testing.assert_allclose(merged, jax_logits(tmp_path / "run", ids), atol=1e-4, rtol=0)
    before, after = (
        {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for directory in (base, tmp_path / "run" / "export")
    )
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    export_command(tmp_path / "run", tmp_path / "adapter", "adapter")
    np.testing.assert_allclose(torch_logits(with_adapter(base, tmp_path / "adapter"), ids), merged, atol=1e-4, rtol=0)
