"""The protocol of TinyBenchmarks against its golden values; tests/golden/RETENTION.md says what every field is."""

import json
import pickle

import numpy as np
import pytest

from cft_jax.common.errors import UserError
from cft_jax.evaluate.suites.retention.convert_items import PUBLISHED_BLOB, convert
from cft_jax.evaluate.suites.retention.item_response import ItemParameters
from cft_jax.evaluate.suites.retention.tiny_benchmarks import (
    TASKS,
    Example,
    aggregate,
    choice_row,
    clean_response,
    normal_form,
    response_rows,
    score_choices,
    score_response,
)


def test_rows_become_the_golden_examples(golden_rows):
    rows = golden_rows("retention_examples")
    assert len(rows) == 60
    for row in rows:
        task = TASKS[row["task_name"]]
        found = task.example(row["row"], row["row_index"])
        assert set(row["row"]) == task.columns
        assert found.example_id == row["example_id"] and found.prompt == row["prompt"]
        if row["task_name"] == "tiny_gsm8k":
            assert found.target_answer == row["target_answer"]
            continue
        assert task.metric == row["metric_name"]
        assert list(found.choices) == row["choices"], row["note"]
        assert list(found.continuations) == row["continuations"], row["note"]
        assert list(found.contexts) == (row["choice_contexts"] or []), row["note"]
        assert found.correct == row["correct_choice_index"]
        assert list(found.target_scores) == (row["target_scores"] or [])


def example_of(row):
    return Example(
        row["example_id"],
        row["prompt"],
        tuple(row["choices"]),
        tuple(row["continuations"]),
        tuple(row["choice_contexts"] or ()),
        row["correct_choice_index"],
        tuple(row["target_scores"] or ()),
    )


def test_scores_of_choices(golden_rows):
    records = {}
    for row in golden_rows("retention_scoring", "example"):
        found = score_choices(example_of(row), row["metric_name"], row["logprobs"])
        for name, value in found.items():
            exact = not isinstance(value, float | list)
            assert value == (row[name] if exact else pytest.approx(row[name], abs=1e-9)), (name, row["note"])
        records[row["example_id"]] = found
    assert len(records) == 80
    for row in golden_rows("retention_scoring", "summary"):
        expected = row["summary_row"]
        found = choice_row(TASKS[expected["task_name"]], [records[name] for name in row["example_ids"]])
        assert found == pytest.approx(expected, abs=1e-9)


def test_aggregates(golden_rows):
    for row in golden_rows("retention_scoring", "aggregate"):
        assert aggregate(row["task_rows"]) == pytest.approx(row["aggregate"], abs=1e-9), row["note"]


def test_answers_of_responses(golden_rows):
    found = {"qwen3": [], "other": []}
    for row in golden_rows("retention_gsm8k", "response"):
        response = clean_response(row["decoded_text"], thinks=row["family"] == "qwen3")
        assert response == row["raw_response"], row["note"]
        scores = score_response(response, row["target_answer"])
        assert scores == {name: row[name] for name in scores}, row["note"]
        found[row["family"]].append(scores)
    for row in golden_rows("retention_gsm8k", "summary"):
        expected = row["summary_row"]
        rows = {one["task_name"]: one for one in response_rows(found[row["family"]])}
        assert rows[expected["task_name"]] == pytest.approx(expected, abs=1e-9)
    for row in golden_rows("retention_gsm8k", "normalize"):
        assert normal_form(row["text"]) == row["value"], row["text"]


@pytest.fixture(scope="module")
def published(golden):
    """The golden item parameters in the form of the published pickle."""
    arrays = np.load(golden / "retention_irt.npz", allow_pickle=False)
    found = {}
    for bundle, about in json.loads((golden / "retention_irt.json").read_text())["bundles"].items():
        scenarios = {scenario["name"]: scenario for scenario in about["scenarios"]}
        found[bundle] = {
            "seen_examples": arrays[f"{bundle}.seen_examples"].tolist(),
            "irt_parameters": {"A": arrays[f"{bundle}.A"], "B": arrays[f"{bundle}.B"]},
            "optimal_lambdas": {name: np.float64(s["optimal_lambda"]) for name, s in scenarios.items()},
            "examples_weights": {name: arrays[f"{bundle}.weights.{name}"] for name in scenarios},
            "scenarios_position": {name: arrays[f"{bundle}.positions.{name}"].tolist() for name in scenarios},
            "subscenarios_position": {
                name: {part: arrays[f"{bundle}.subpositions.{name}.{part}"] for part in s["subscenarios"]}
                for name, s in scenarios.items()
            },
        }
    return found


def git_blob(content):
    import hashlib

    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_estimates_from_converted_parameters(golden, published, protocol, tmp_path):
    content = pickle.dumps(published, protocol=protocol)
    (tmp_path / "items.pkl").write_bytes(content)
    convert(tmp_path / "items.pkl", tmp_path / "items.npz", blob=git_blob(content))
    items = ItemParameters.load(tmp_path / "items.npz")
    cases = json.loads((golden / "retention_irt.json").read_text())["cases"]
    scores = np.load(golden / "retention_irt.npz", allow_pickle=False)["y"]
    assert len(cases) == 48
    for case in cases if protocol == 4 else cases[::16]:
        found = items.estimate(case["benchmark"], scores[case["index"]])
        for name in ("irt", "pirt", "gpirt"):
            assert getattr(found, name) == pytest.approx(case[name], abs=1e-6), (case["index"], name)
        np.testing.assert_allclose(found.theta, case["theta"], rtol=0, atol=1e-5)


def test_only_the_published_pickle_is_read(published, tmp_path):
    content = pickle.dumps(published)
    (tmp_path / "items.pkl").write_bytes(content)
    with pytest.raises(UserError, match=f"not that of the published file, {PUBLISHED_BLOB}"):
        convert(tmp_path / "items.pkl", tmp_path / "items.npz", blob=PUBLISHED_BLOB)
    with pytest.raises(UserError, match=r"none\.pkl cannot be read \(No such file.*get it with `curl -LO https"):
        convert(tmp_path / "none.pkl", tmp_path / "items.npz", blob=PUBLISHED_BLOB)


class Harm:
    def __reduce__(self):
        return print, ("harm done",)


def test_a_pickle_that_would_run_something_is_refused(published, tmp_path, capsys):
    content = pickle.dumps(published | {"lb": Harm()})
    (tmp_path / "items.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"builtins\.print, which is no plain data"):
        convert(tmp_path / "items.pkl", tmp_path / "items.npz", blob=git_blob(content))
    assert "harm" not in capsys.readouterr().out
    assert not (tmp_path / "items.npz").exists()


def test_item_parameters_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*curl -LO.*retention\.convert_items"):
        ItemParameters.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="damaged"):
        ItemParameters.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    with pytest.raises(UserError, match=r"lacks lb\.A"):
        ItemParameters.load(tmp_path / "other.npz")


def test_data_sets_of_another_form_are_refused(golden_rows):
    rows = [row["row"] for row in golden_rows("retention_examples") if row["task_name"] == "tiny_mmlu"]
    task = TASKS["tiny_mmlu"]
    with pytest.raises(
        UserError,
        match=r"here has 12 rows; tiny_mmlu has exactly 100; get it anew with `hf",
    ):
        task.examples(rows, "here")
    with pytest.raises(UserError, match=r"here has the columns.*takes"):
        task.examples([rows[0] | {"more": 1}] * 100, "here")
    with pytest.raises(UserError, match=r"row 7 cannot be read.*answer 9 of 4"):
        task.examples([*rows[:1] * 7, rows[0] | {"answer": 9}, *rows[:1] * 92], "here")
