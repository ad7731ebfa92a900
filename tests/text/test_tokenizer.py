"""Loading tokenizers: what is wrong with a directory is said in one line."""

import json

import pytest

from cft_jax.common.errors import UserError
from cft_jax.text.scratch import END, PAD, save_tokenizer, train_tokenizer
from cft_jax.text.tokenizer import encode_strings, fingerprint, load_tokenizer


def load(path):
    return load_tokenizer(str(path), revision="main", local_files_only=True)


def test_a_saved_tokenizer_loads_and_has_the_same_fingerprint(small_tokenizer, tmp_path):
    small_tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert encode_strings(loaded, ["0.12", ""]) == encode_strings(small_tokenizer, ["0.12", ""])
    assert fingerprint(loaded) == fingerprint(load(tmp_path))


def test_a_tokenizer_of_our_own_names_a_class_that_transformers_4_has(tmp_path):
    tokenizer = train_tokenizer(["Draw one number: 1, 2.5", "-3"])
    save_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Else transformers 4.57 adds token_type_ids, which `generate(**inputs)` refuses.
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    loaded = load(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == (END, PAD, len(tokenizer))


def test_the_fingerprint_sees_the_template_and_the_special_tokens(small_tokenizer):
    before = fingerprint(small_tokenizer)
    small_tokenizer.chat_template += " "
    template = fingerprint(small_tokenizer)
    small_tokenizer.eos_token = "<s>"
    assert len({before, template, fingerprint(small_tokenizer)}) == 3


def test_bad_directories_are_named(small_tokenizer, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load(tmp_path / "missing")
    with pytest.raises(UserError, match="holds none of"):
        load(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="is a file"):
        load(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"tokenizer\.json.*half-written"):
        load(tmp_path)


def test_a_hub_id_without_network_is_one_line():
    with pytest.raises(UserError, match="some/tokenizer") as caught:
        load("some/tokenizer")
    assert "\n" not in str(caught.value)


def test_the_fingerprint_does_not_depend_on_calls_before(small_tokenizer):
    before = fingerprint(small_tokenizer)
    small_tokenizer.pad_token = small_tokenizer.eos_token
    named = fingerprint(small_tokenizer)
    small_tokenizer(["a", "abc"], padding=True, truncation=True, max_length=8)
    assert fingerprint(small_tokenizer) == named != before
