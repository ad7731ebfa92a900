"""The user's own tasks: what rows give, and that nothing wrong passes in silence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cft_jax.common.errors import UserError
from cft_jax.distributions.custom import read_tasks
from cft_jax.distributions.tasks import SpaceSettings

SETTINGS = SpaceSettings(num_decimals=2, max_bins=101)


@pytest.fixture
def read(tmp_path):
    """Writes rows (objects, text or bytes) to a file, one per line, and reads it."""

    def read_rows(*rows):
        lines = [row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else dump(row) for row in rows]
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        return read_tasks(path)

    return read_rows


def dump(row):
    return json.dumps(row, ensure_ascii=False).encode()


def test_values_are_exact(read):
    values = ["A", "AB", "yes", "yes, but\nlater", " ñ ", "n\u0303", "\u2028", "{}"]
    row = {"prompt": "Pick one.", "values": values, "probabilities": [0.125] * 8}
    (task,) = read(row)
    assert task.space is not None and task.space.values == tuple(values)
    np.testing.assert_array_equal(task.output_space(SETTINGS).probabilities, [0.125] * 8)
    assert task.messages == ({"role": "user", "content": "Pick one."},)
    assert (task.split, task.group, task.task_id, task.weight, task.spec) == ("train", "custom", "custom_1", 1.0, None)


def test_counts_and_samples(read):
    counted, sampled = read(
        {"prompt": "?", "counts": {"often": 3, "never": 0, "once": 1}, "split": "test_unseen_params", "weight": 2},
        {"prompt": "?", "samples": [6, "6", "b", 1, "b", "b", "b", 6]},
    )
    assert counted.space.values == ("often", "never", "once")
    np.testing.assert_array_equal(counted.space.probabilities, [0.75, 0, 0.25])
    assert (counted.split, counted.weight) == ("test_unseen_params", 2.0)
    assert sampled.space.values == ("6", "b", "1")
    np.testing.assert_array_equal(sampled.space.probabilities, [3 / 8, 4 / 8, 1 / 8])


def test_distribution(read):
    row = {"prompt": "A height?", "distribution": {"family": "gaussian", "parameters": {"sigma": 7, "mu": 170.5}}}
    (task,) = read(row)
    assert task.group == "gaussian" and task.space is None
    assert list(task.spec.parameters.items()) == [("mu", 170.5), ("sigma", 7.0)]
    assert task.spec.distribution_id == "gaussian_mu_170p5_sigma_7"
    assert len(task.output_space(SETTINGS).values) == 101


def test_messages(read):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Heads or tails?"},
        {"role": "assistant", "content": "heads"},
        {"role": "user", "content": "Again."},
    ]
    (task,) = read({"messages": messages, "counts": {"heads": 1, "tails": 1}})
    assert list(task.messages) == messages


def test_rounding_of_probabilities_is_mended(read):
    (task,) = read({"prompt": "?", "values": ["a", "b", "c"], "probabilities": [0.3333333, 0.3333333, 0.3333333]})
    np.testing.assert_allclose(task.space.probabilities, 1 / 3, rtol=1e-15)


@given(values=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=8, unique=True))
def test_any_text_survives(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("custom") / "rows.jsonl"
    path.write_bytes(dump({"prompt": "?", "values": values, "probabilities": [1 / len(values)] * len(values)}))
    assert read_tasks(path)[0].space.values == tuple(values)


GOOD = {"prompt": "?", "counts": {"a": 1}}
ANSWER = {"counts": {"a": 1}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "?", "values": ["a", "b"], "probabilities": [0.5, 0.4]}, "probabilities sum to 0.9;"),
        ({"prompt": "?", "values": ["a", "a"], "probabilities": [0.5, 0.5]}, "value 'a' occurs more than once"),
        ({"prompt": "?", "values": [1, "1"], "probabilities": [0.5, 0.5]}, "value '1' occurs more than once"),
        ({"prompt": "?", "values": [], "probabilities": []}, "at least one value"),
        ({"prompt": "?", "values": [""], "probabilities": [1]}, "values[0]='' must be a text that is not empty"),
        ({"prompt": "?", "values": ["a"], "probabilities": [0.5, 0.5]}, "1 values need as many probabilities"),
        ({"prompt": "?", "values": ["a"], "probabilities": [float("nan")]}, "probabilities[0]=nan must be a finite"),
        ({"prompt": "?", "values": ["a"], "probabilities": ["1"]}, "probabilities[0]='1' must be a number"),
        ({"prompt": "?", "values": ["a"], "probabilities": [True]}, "probabilities[0]=True must be a number"),
        ({"prompt": "?", "values": ["a", "b"], "probabilities": [2, -1]}, "probability -1.0 of 'b' must be finite"),
        ({"prompt": "?", "values": [0.5], "probabilities": [1]}, "values[0]=0.5 must be quoted"),
        ({"prompt": "?", "values": [True], "probabilities": [1]}, "values[0]=True must be a text"),
        ({"prompt": "?", "values": "ab", "probabilities": [1]}, "values must be a list"),
        ({"prompt": "?", "values": ["a"]}, "values and probabilities come together"),
        ({"prompt": "?", "probabilities": [1], **ANSWER}, "values and probabilities come together"),
        ({"prompt": "?"}, "needs exactly one of values, distribution, counts, samples, not none"),
        ({"prompt": "?", "samples": ["a"], **ANSWER}, "not counts and samples"),
        (ANSWER, "needs exactly one of prompt, messages, not none"),
        ({"prompt": "?", "messages": [], **ANSWER}, "not prompt and messages"),
        ({"prompt": "", **ANSWER}, "prompt='' must be a text that is not empty"),
        ({"prompt": 5, **ANSWER}, "prompt=5 must be a text"),
        ({"promt": "?", **ANSWER}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"prompt": "?", "counts": {}}, "nothing was counted"),
        ({"prompt": "?", "counts": {"a": 0}}, "nothing was counted"),
        ({"prompt": "?", "counts": {"a": 1.5}}, "count 1.5 of 'a' must be a whole number of at least 0"),
        ({"prompt": "?", "counts": {"a": -1}}, "count -1 of 'a'"),
        ({"prompt": "?", "counts": ["a"]}, "counts must be an object"),
        ({"prompt": "?", "samples": []}, "nothing was counted"),
        ({"prompt": "?", "samples": [None]}, "samples[0]=None must be a text"),
        ({"prompt": "?", "split": "valid", **ANSWER}, "split='valid' must be one of train, test_unseen_params, test_"),
        ({"prompt": "?", "weight": 0, **ANSWER}, "weight=0.0 must be greater than 0"),
        ({"prompt": "?", "weight": float("inf"), **ANSWER}, "weight=inf must be a finite number"),
        ({"prompt": "?", "distribution": "gaussian"}, "distribution must be an object"),
        ({"prompt": "?", "distribution": {"family": "gausian", "parameters": {}}}, "did you mean gaussian?"),
        (
            {"prompt": "?", "distribution": {"family": "gaussian", "parameters": {"mu": 0, "sigma": -1}}},
            "gaussian: sigma=-1.0 must be greater than 0",
        ),
        ({"messages": [], **ANSWER}, "messages must be a list of objects"),
        ({"messages": [{"role": "user"}], **ANSWER}, "messages[0] must be an object with exactly role and content"),
        ({"messages": [{"role": "tool", "content": "x"}], **ANSWER}, "user and assistant in turn, the user last"),
        ({"messages": [{"role": "system", "content": "x"}], **ANSWER}, "user and assistant in turn, the user last"),
        ([1], "must be a JSON object, not [1]"),
        ("{'prompt': 1}", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[" * 100_000, "is not JSON that can be read"),
        ("", "is empty; delete it"),
        (b'{"prompt": "\xe9", "counts": {"a": 1}}', "byte 13 is not UTF-8"),
        ('{"prompt": "?", "counts": {"a": 1, "a": 2}}', "'a' occurs more than once in one object"),
        ('{"prompt": "\\ud800", "counts": {"a": 1}}', "half of a character"),
    ],
)
def test_bad_rows(read, row, message):
    with pytest.raises(UserError) as error:
        read(GOOD, row, GOOD)
    assert "1 of 3 lines of data.custom=" in str(error.value)
    assert "line 2: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and "line 1:" not in str(error.value)


def test_all_bad_rows_are_reported_together(read):
    bad = {"prompt": "?", "counts": {"a": -1}}
    with pytest.raises(UserError) as error:
        read(*[bad] * 12, GOOD, bad)
    text = str(error.value)
    assert text.startswith("13 of 14 lines of data.custom=")
    assert all(f"line {number}: count -1" in text for number in range(1, 11))
    assert text.endswith("and lines 11, 12, 14")


def test_all_problems_of_a_row(read):
    with pytest.raises(UserError) as error:
        read({"prompt": "", "counts": {"a": -1}, "split": "x", "weight": -1})
    for part in ("prompt=''", "count -1", "split='x'", "weight=-1.0"):
        assert part in str(error.value)


def test_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + dump(GOOD) + b"\r\n" + dump(GOOD) + b"\r\n")
    assert len(read_tasks(path)) == 2


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read data.custom='.*none.jsonl': No such file"):
        read_tasks(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty; give it one JSON object per line"):
        read_tasks(tmp_path / "empty.jsonl")
