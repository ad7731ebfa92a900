"""What `train.keep` names: files of prompts and of texts, and what is wrong with them."""

import json

import pytest

from cft_jax.common.errors import UserError
from cft_jax.distributions.kept import KeptText, read_prompts, read_texts
from cft_jax.distributions.questions import kept_prompts

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "Hello."}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


def test_prompts(write):
    assert [messages[0]["content"] for messages in read_prompts("")] == kept_prompts()
    found = read_prompts(write({"prompt": "What is 2+2?"}, {"messages": TURNS}))
    assert found == [({"role": "user", "content": "What is 2+2?"},), tuple(TURNS)]


def test_texts(write, tmp_path):
    rows = {"messages": [*TURNS, ANSWER]}, {"prompt": "Hi", "answer": "Hello."}, {"text": "It rains."}
    asked = ({"role": "user", "content": "Hi"},)
    assert read_texts(write(*rows)) == [
        KeptText(tuple(TURNS), "Hello."),
        KeptText(asked, "Hello."),
        KeptText((), "It rains."),
    ]
    (tmp_path / "plain.txt").write_text("It rains.\nAnd snows.\n")
    assert read_texts(str(tmp_path / "plain.txt")) == [KeptText((), "It rains.\nAnd snows.\n")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": ""}, "line 1: text='' must be a text that is not empty"),
        ({"messages": TURNS}, "the assistant last"),
        ({"prompt": "Hi"}, "has prompt; it must have exactly one of messages, prompt with answer, text"),
        ({"text": "a", "prompt": "b"}, "has text, prompt"),
        ({"messages": "Hi"}, "messages must be a list of objects"),
    ],
)
def test_rows_without_a_text_are_refused(write, row, words):
    with pytest.raises(UserError) as error:
        read_texts(write(row))
    assert words in str(error.value) and "train.keep.source=" in str(error.value)


def test_files_without_a_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, words in (
        ("empty.txt", "has no text in it"),
        ("empty.jsonl", "is empty; give it one JSON object per line"),
        ("bytes.txt", "is no text in UTF-8"),
        ("none.txt", "No such file"),
        ("nul\0.txt", "cannot read train.keep.source=.*null"),
        ("nul\0.jsonl", "cannot read train.keep.source=.*null"),
    ):
        with pytest.raises(UserError, match=words):
            read_texts(str(tmp_path / name))


def test_prompts_that_are_wrong(write):
    with pytest.raises(UserError, match="has text; it must have exactly one of prompt, messages"):
        read_prompts(write({"text": "a"}))
    with pytest.raises(UserError, match="the user last"):
        read_prompts(write({"messages": [*TURNS, ANSWER]}))
