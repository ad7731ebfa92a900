"""The model card says what was done and what came of it, and nothing that was not measured."""

import ast
import dataclasses
import re

import pytest

from cft_jax.config import Config, DataConfig, ExportConfig, KeepConfig, LoraConfig, ModelSettings, TrainConfig
from cft_jax.evaluate.report.model_card import model_card

SUMMARY = {
    "splits": {
        "test_unseen_params": {
            "num_prompts": 24,
            "exact": {"kl": 0.0302, "total_variation": 0.08, "support_mass": 0.991},
            "sampled": {"valid_rate": 0.99},
        }
    }
}


def card(config=None, **changes):
    arguments = {"base": "org/model", "prompt": "Ask 'me'", "summaries": {"after": SUMMARY}, "revision": "abc"}
    return model_card(config or Config(), **{**arguments, **changes})


def test_adapter_and_merged_say_how_to_load():
    adapter = card()
    assert "library_name: peft" in adapter and "base_model: org/model" in adapter
    assert "AutoPeftModelForCausalLM" in adapter and "rank 16, alpha 32, dropout 0.05" in adapter
    merged = card(Config(export=ExportConfig(format="merged"), model=ModelSettings(lora=LoraConfig(enabled=False))))
    assert "library_name: transformers" in merged and "AutoPeft" not in merged and "all weights" in merged
    for text in (adapter, merged):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            ast.parse(block)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_one_line_each_says_how_to_sample_as_trained(form):
    text = card(Config(export=ExportConfig(format=form)))
    rows = dict(re.findall(r"^\| ([\w.]+) \| (`.*) \|$", text, re.MULTILINE))
    assert list(rows) == ["transformers", "vLLM", "SGLang", "llama.cpp"]
    # By the file's settings where they are read; what would not be asked for anyway is said.
    needs_file = form == "adapter"
    assert ("generation_config" in rows["transformers"]) == ("--generation-config" in rows["vLLM"]) == needs_file
    assert ("org/model" in rows["vLLM"]) == ("org/model" in rows["SGLang"]) == needs_file
    assert "--sampling-defaults openai" in rows["SGLang"]
    assert "--temp 1 --top-k 0 --top-p 1 --min-p 0" in rows["llama.cpp"]


@pytest.mark.parametrize("prompt", ["Write ``` and `one`", "````\nfour\n````", "none"])
def test_a_prompt_with_fences_stays_inside_its_block(prompt):
    fence, block = re.findall(r"^(`{3,})python\n(prompt = .*?)^\1$", card(prompt=prompt), re.DOTALL | re.MULTILINE)[0]
    assert fence not in block
    assert ast.literal_eval(ast.parse(block).body[0].value) == prompt


def test_metrics_are_those_measured():
    text = card(summaries={"before": {"splits": {}}, "after": SUMMARY})
    assert "| exact KL, nats | – | 0.0302 |" in text
    assert "| valid answers | – | 99.0 % |" in text
    assert "Wasserstein" not in text
    assert "## Metrics" not in card(summaries={})


def test_a_model_from_scratch_names_no_base():
    text = card(base="")
    assert "base_model" not in text and "huggingface.co" not in text and "a small language model" in text


def test_a_directory_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card(base="checkpoints/llama")


def test_what_is_kept_and_the_strength_are_said():
    config = Config(train=TrainConfig(keep=KeepConfig(weight=0.1)), model=ModelSettings(lora=LoraConfig(strength=0.5)))
    text = card(config)
    assert "- kept: the KL from the base on the base's own answers to other prompts, weight 0.1, 1 rows a step" in text
    assert "- strength: what training added is multiplied by 0.5 here" in text
    assert "kept:" not in card() and "strength:" not in card()


@pytest.mark.parametrize("base", ["/data/models/llama", "./llama", "models/of/llama"])
def test_a_local_base_is_not_linked(base):
    text = card(base=base)
    assert "base_model" not in text and "huggingface.co" not in text and "makes llama sample" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": "hard"}, "hard targets, 1 drawn values"),
        ({"custom": "mine.jsonl"}, "prompts and distributions of the user's own"),
        ({"train_families": ("gaussian", "cauchy")}, "2 families of distributions (gaussian, cauchy)"),
        ({"space": "full"}, "every string"),
        ({"world": "fair"}, "prompts of the package's small world (fair)"),
    ],
)
def test_data_is_described(change, text):
    assert text in card(dataclasses.replace(Config(), data=DataConfig(**change)))
