"""Prompts against the golden ids of the reference implementation, and the options that it has not."""

import gzip
import json

import pytest

from cft_jax.common.errors import UserError
from cft_jax.config import DataConfig
from cft_jax.text.chat import ChatOptions, encode_chat, encode_chats, terminator_id
from cft_jax.text.tokenizer import load_tokenizer

FOLDERS = {"qwen3": "qwen3", "gemma3": "gemma3", "llama3_2": "llama3"}
MESSAGES = [{"role": "user", "content": "Draw one number."}]


def load(tokenizers_dir, name):
    return load_tokenizer(str(tokenizers_dir / name), revision="main", local_files_only=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_equal_the_golden_ids(golden, tokenizers_dir, name):
    tokenizer = load(tokenizers_dir, FOLDERS[name])
    with gzip.open(golden / "prompts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["tokenizer"] == name]
    assert len(rows) == 10
    for row in rows:
        key = "ids_fixed_date_add_special" if row["date_string"] else "ids_add_special"
        messages = [{"role": "user", "content": row["prompt_text"]}]
        for duplicate, suffix in ((False, "false"), (True, "true")):
            ids = encode_chat(tokenizer, messages, enable_thinking=False, date="2024-07-26", duplicate_bos=duplicate)
            assert ids == row[f"{key}_{suffix}"]


def test_gpt_oss_pins_the_date_and_opens_the_final_channel(tokenizers_dir):
    tokenizer = load(tokenizers_dir, "gpt_oss")
    # Text by hand from chat_template.jinja as published.
    expected = (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-01-31\n\nReasoning: low\n\n# Valid channels: analysis, "
        "commentary, final. Channel must be included for every message.<|end|><|start|>user<|message|>"
        "Draw one number.<|end|><|start|>assistant"
    )
    ids = encode_chat(tokenizer, MESSAGES, date="2025-01-31")
    assert tokenizer.decode(ids) == expected + "<|channel|>final<|message|>"
    assert tokenizer.decode(encode_chat(tokenizer, MESSAGES, date="2025-01-31", generation_prefix="")) == expected
    high = tokenizer.decode(encode_chat(tokenizer, MESSAGES, reasoning_effort="high", enable_thinking=True))
    assert "Reasoning: high" in high and high.endswith("<|start|>assistant")


def test_thinking_is_qwens_choice_alone(tokenizers_dir):
    tokenizer = load(tokenizers_dir, "qwen3")
    assert tokenizer.decode(encode_chat(tokenizer, MESSAGES)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(encode_chat(tokenizer, MESSAGES, enable_thinking=True)).endswith("assistant\n")


# Ids from the table of special tokens in the model cards' generation_config.json files.
@pytest.mark.parametrize(
    ("name", "auto", "eos"),
    [("llama3", 128009, 128009), ("qwen3", 151645, 151645), ("gemma3", 106, 1), ("gpt_oss", 200002, 200002)],
)
def test_terminators_of_the_published_tokenizers(tokenizers_dir, name, auto, eos):
    tokenizer = load(tokenizers_dir, name)
    assert terminator_id(tokenizer, "auto") == auto
    assert terminator_id(tokenizer, "tokenizer_eos") == eos


def test_llamas_date_follows_the_config(tokenizers_dir):
    tokenizer = load(tokenizers_dir, "llama3")
    assert "Today Date: 05 Mar 2023\n" in tokenizer.decode(encode_chat(tokenizer, MESSAGES, date="2023-03-05"))


def test_one_batch_equals_single_calls(small_tokenizer):
    conversations = [[{"role": "user", "content": text}] for text in ("a b", "0.12345", "a longer one")]
    options = ChatOptions()
    assert encode_chats(small_tokenizer, conversations, options) == [
        encode_chat(small_tokenizer, messages) for messages in conversations
    ]
    assert encode_chats(small_tokenizer, [], options) == []


def test_options_come_from_the_config():
    assert ChatOptions.from_config(DataConfig()) == ChatOptions()
    assert ChatOptions.from_config(DataConfig(duplicate_bos=True)).duplicate_bos


def test_dates_are_pinned_in_the_format_a_template_asks_for(small_tokenizer):
    small_tokenizer.chat_template = "{{ strftime_now('%Y/%m') }}{{ messages[0].content }}"
    ids = encode_chat(small_tokenizer, [{"role": "user", "content": "x"}], date="2031-02-03", generation_prefix="")
    assert small_tokenizer.decode(ids) == "2031/02x"
    small_tokenizer.chat_template = "{{ date_string }}"
    ids = encode_chat(small_tokenizer, [{"role": "user", "content": "x"}], date="2031-02-03", generation_prefix="")
    assert small_tokenizer.decode(ids) == "03 Feb 2031"


def test_a_date_that_cannot_be_pinned_is_an_error(small_tokenizer):
    small_tokenizer.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}"
    with pytest.raises(UserError, match="strftime_now"):
        encode_chat(small_tokenizer, MESSAGES)


def test_errors_name_the_cure(small_tokenizer):
    with pytest.raises(UserError, match=r"data\.chat\.date='26 Jul 2024'"):
        encode_chat(small_tokenizer, MESSAGES, date="26 Jul 2024")
    with pytest.raises(UserError, match=r"data\.terminator='<nothing>'"):
        terminator_id(small_tokenizer, "<nothing>")
    assert terminator_id(small_tokenizer, "a") == small_tokenizer.convert_tokens_to_ids("a")
    small_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        encode_chat(small_tokenizer, MESSAGES, generation_prefix="")
    small_tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="assistant's turn"):
        terminator_id(small_tokenizer, "auto")
    small_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} ab{% endfor %}"
    with pytest.raises(UserError, match=r"' ab'.*data\.terminator"):
        terminator_id(small_tokenizer, "auto")
    small_tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_chat(small_tokenizer, MESSAGES)
    small_tokenizer.eos_token = None
    with pytest.raises(UserError, match="names no end-of-sequence"):
        terminator_id(small_tokenizer, "tokenizer_eos")
