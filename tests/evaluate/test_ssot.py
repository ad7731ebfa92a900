"""String Seed of Thought: answers as the golden cases read them, prompts by kind of model."""

from importlib import resources

import pytest
from transformers import AutoTokenizer

from cft_jax.distributions import parse_number, strip_thinking
from cft_jax.evaluate.parsing import normalize_answer
from cft_jax.evaluate.prompting import prompt_strategy
from cft_jax.evaluate.ssot import clean_response, extract_answer, native_reasoning, seeded_messages

# What the golden cases' families stand for.
REASONING = {"default": "none", "llama": "none", "gemma": "none", "qwen3": "tags", "gpt_oss": "channels"}
ASK = [{"role": "user", "content": "Name a random city."}]


def test_golden_answers(golden_rows):
    rows = golden_rows("ssot")
    assert len(rows) == 390
    for row in rows:
        reasoning, strict = REASONING[row["model_family"]], row["strict"]
        got = extract_answer(row["raw"], reasoning, strict=strict)
        assert (got.text, got.degraded) == (row["answer_of_raw"], row["degraded_of_raw"]), row
        cleaned = clean_response(row["raw"], reasoning)
        assert cleaned == row["stripped"]
        got = extract_answer(cleaned, reasoning, strict=strict)
        assert (got.text, got.degraded) == (row["answer"], row["degraded"]), row
        number = parse_number(strip_thinking(got.text))
        numeric = row["pif_numeric"]
        assert (number.valid, number.value, number.error_code) == (
            numeric["valid"],
            numeric["value"],
            numeric["error_code"],
        )
        assert normalize_answer(got.text) == row["dag_open_random"]["normalized"]
        assert [m["role"] for m in seeded_messages(ASK, "open", reasoning)] == row["message_roles"]


def test_what_channels_leave_behind():
    # gpt-oss's turns once their special tokens are left out: analysis, then the answer's turn, in one text.
    text = "analysisA string: q8#k. The remainder is 3.assistantfinal<answer>Oslo</answer>"
    assert extract_answer(text, "channels", strict=True).text == "Oslo"
    bare = extract_answer("analysisThe remainder is 3.assistantfinalOslo", "channels", strict=True)
    assert (bare.text, bare.degraded) == ("Oslo", True)


@pytest.mark.parametrize("mode", ["numeric", "open"])
def test_the_prompts_say_what_is_read(mode):
    system = seeded_messages(ASK, mode, "none")[0]["content"]
    for tag in ("random_string", "thinking", "answer"):
        assert f"<{tag}> ... </{tag}>" in system
    developer = seeded_messages(ASK, mode, "channels")[0]["content"]
    assert "<answer>" in developer and "<thinking>" not in developer
    assert seeded_messages(ASK, mode, "none")[1:] == ASK


@pytest.mark.parametrize(
    ("name", "kind", "ending"),
    [
        ("llama3", "none", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma3", "none", "<start_of_turn>model\n"),
        ("qwen3", "tags", "<|im_start|>assistant\n"),
        ("gpt_oss", "channels", "<|start|>assistant"),
    ],
)
def test_real_templates_leave_room_to_reason(tokenizers_dir, configured, name, kind, ending):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers_dir / name)
    assert native_reasoning(tokenizer.get_chat_template()) == kind
    file = resources.files("cft_jax").joinpath("../configs/eval/structured.py")
    config = configured(str(file), "eval.method=ssot", "model.checkpoint=x")
    strategy = prompt_strategy(config, tokenizer, mode="open", max_new_tokens=8)
    text = tokenizer.decode(strategy.encode(ASK))
    assert text.endswith(ending)
    assert "unpredictable" in text and "Name a random city." in text
    assert strategy.max_new_tokens == config.suite.ssot.max_new_tokens == 4096
    direct = prompt_strategy(configured(str(file), "model.checkpoint=x"), tokenizer, mode="open", max_new_tokens=8)
    assert direct.max_new_tokens == 8 and "unpredictable" not in tokenizer.decode(direct.encode(ASK))
