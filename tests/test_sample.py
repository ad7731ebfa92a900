"""Asking a model from the command line: answers, tables, files, a chat, and a user's mistakes."""

import csv
import io
import json
import sys

import numpy as np
import pytest

import cft_jax
from cft_jax import sample
from cft_jax.ask.histogram import table
from cft_jax.ask.questions import Exact
from cft_jax.distributions.splits import build_splits, spec_of_prompt
from cft_jax.jobs.sample import read_prompts

pytestmark = pytest.mark.usefixtures("program_cache", "log_restored")
GEOMETRIC = (
    "Generate exactly ONE random number from a Geometric distribution with parameters p=0.5. Output ONLY the number."
)


@pytest.fixture
def ask(tiny_run, monkeypatch, capsys):
    """Runs the command in this process on the tiny run; returns exit code, stdout and stderr."""

    def run(*arguments, model=tiny_run[0]):
        monkeypatch.setattr(sys, "argv", ["sample", f"--model={model}", *arguments])
        code = 0
        try:
            sample.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_prompts_name_their_distribution():
    """Prompts of all families, as the paper prints numbers and in readable ones."""
    for readable in (False, True):
        for specs in build_splits(readable_parameters=readable, grid_points=2).values():
            for spec in specs[::7]:
                found = spec_of_prompt(spec.prompt)
                assert found is not None and found.family_id == spec.family_id
                assert dict(found.parameters) == dict(spec.parameters)
    for text in ("Roll a die.", GEOMETRIC.replace("0.5", "1.5"), GEOMETRIC.replace("0.5", "x"), GEOMETRIC[:-1]):
        assert spec_of_prompt(text) is None
    assert spec_of_prompt(GEOMETRIC.replace("Geometric", "Geometrical")) is None


def test_a_family_is_shown_with_target_and_distance(ask, tiny_run, tmp_path):
    code, out, _ = ask(f"--prompt={GEOMETRIC}", "--num=300", "--seed=5", f"--output={tmp_path}/answers.jsonl")
    assert code == 0 and "drawn" in out and "exact   target" in out and "with --seed=5" in out
    (row,) = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    model = cft_jax.load(tiny_run[0])
    assert row["samples"] == model.sample(GEOMETRIC, 300, seed=5) and row["prompt"] == GEOMETRIC
    np.testing.assert_allclose(row["model"], model.distribution(GEOMETRIC, row["values"]), rtol=1e-4)
    by_hand = 0.5 * (np.abs(np.subtract(row["target"], row["model"])).sum() + 1 - sum(row["model"]))
    assert row["metrics"]["total_variation"] == pytest.approx(by_hand) and row["target"][0] == pytest.approx(0.5, 1e-3)
    assert f"total variation {by_hand:.4f}" in out
    share = row["samples"].count("1") / 300
    (line,) = [line.split() for line in out.splitlines() if line.startswith("1 ")]
    assert [float(line[1]), float(line[-2])] == pytest.approx([share, row["model"][0]], abs=5e-5)


def test_a_family_too_large_to_list_is_shown_in_bins(ask):
    prompt = GEOMETRIC.replace("Geometric", "Exponential").replace("p=0.5", "lambda=1.0")
    code, out, err = ask(f"--prompt={prompt}", "--num=3", "--seed=1", "--config.data.space=full")
    assert code == 0, err
    assert " to " in out and "exact   target" in out and "total variation" in out


def test_quietly_the_answers_alone(ask, tiny_run):
    assert ask("--prompt=Hi", "--num=7", "--seed=1", "--quiet", "--max_new_tokens=3") == (
        0,
        "".join(f"{text}\n" for text in cft_jax.load(tiny_run[0]).sample("Hi", 7, seed=1, max_new_tokens=3)),
        "",
    )


def test_many_prompts_from_files(ask, tmp_path):
    lines = ["Hi", "", GEOMETRIC, "Hi"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    rows = [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": GEOMETRIC}]}, {"prompt": "Hi"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for kind in ("txt", "jsonl"):
        output = tmp_path / f"{kind}.csv"
        options = ("--num=5", "--seed=2", "--values=1,2", "--probabilities=0.5,0.5", f"--output={output}")
        code, out, _ = ask(f"--prompts={tmp_path}/prompts.{kind}", *options)
        assert code == 0 and out.count("total variation") == 3
        found.append(list(csv.reader(io.StringIO(output.read_text()))))
    assert found[0] == found[1] and found[0][0] == ["prompt", "sample", "answer"]
    answers = {number: [row[2] for row in found[0][1:]][5 * number : 5 * number + 5] for number in range(3)}
    assert [row[0] for row in found[0][1::5]] == ["Hi", GEOMETRIC, "Hi"]
    assert answers[0] != answers[2], "the same prompt again gets draws of its own"


def test_a_prompt_may_hold_any_character_that_breaks_lines(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a\u2028b", "id": 7}, ensure_ascii=False) + "\n")
    assert read_prompts(str(tmp_path / "prompts.jsonl")) == ["a\u2028b"]


def test_a_chat(ask, tiny_run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAgain\n/new\nHi\n"))
    code, out, _ = ask("--chat", "--temperature=0", "--max_new_tokens=3")
    first, second, _, again = out.split("> ")[1:5]
    assert code == 0 and first == again
    model, messages = cft_jax.load(tiny_run[0]), [{"role": "user", "content": "Hi"}]
    answer = model.sample(messages, temperature=0.0, max_new_tokens=3)[0]
    assert first == f"{answer}\n"
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Again"}]
    assert second == f"{model.sample(messages, temperature=0.0, max_new_tokens=3)[0]}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one of --prompt=TEXT, --prompts=FILE and --chat"),
        (("--prompt=Hi", "--chat"), "give one of"),
        (("--prompt=Hi", "--num=0"), "--num=0 must be at least 1"),
        (("--prompt=" + "3, " * 400,), "more than the 256 of the context"),
        (("--prompt=Hi", "--values=a,b<|end|>"), "the value 'b<|end|>' becomes 'b'"),
        (("--prompt=Hi", "--values=a,a"), "'a' occurs more than once"),
        (("--prompt=Hi", "--values=a,b", "--probabilities=1"), "--probabilities has 1 numbers for 2 --values"),
        (("--prompt=Hi", "--values=a,b", "--probabilities=1,1"), "probabilities sum to 2"),
        (("--prompt=Hi", "--output={place}/taken.csv"), "taken.csv exists"),
        (("--prompt=Hi", "--output={place}/answers.txt"), "must end in .jsonl or .csv"),
        (("--prompts={place}/nowhere.txt",), "--prompts={place}/nowhere.txt cannot be read"),
        (("--prompts={place}/taken.csv",), "holds no prompts"),
        (("--prompts={place}/wrong.jsonl",), "1 of 2 lines of --prompts='{place}/wrong.jsonl' are wrong: line 2"),
        (("--prompts={place}/five.jsonl",), "messages[0].content=5 must be a text that is not empty"),
        (("--prompt=Hi", "--config.data.num_decimal=1"), "did you mean config.data.num_decimals?"),
    ],
    ids=lambda value: "",
)
def test_mistakes(ask, tmp_path, arguments, words):
    (tmp_path / "taken.csv").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "Hi"}\n{"promt": "Hi"}\n')
    (tmp_path / "five.jsonl").write_text('{"messages": [{"role": "user", "content": 5}]}\n')
    before = sorted(tmp_path.iterdir())
    code, out, err = ask(*(argument.format(place=tmp_path) for argument in arguments))
    assert (code, out) == (2, "") and words.format(place=tmp_path) in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ") and sorted(tmp_path.iterdir()) == before


def test_tables_of_any_answers():
    """By hand: four draws of two listed answers, of many numbers, and of texts of which nothing is known."""
    known = Exact(("heads", "tails"), True, np.array([0.5, 0.25]), np.array([0.5, 0.5]), {}, 2)
    lines = [line.split() for line in table(["heads", "heads", "tails", "edge"], known)]
    assert lines[0] == ["drawn", "exact", "target"]
    assert [(line[0], line[-2], line[-1]) for line in lines[1:3]] == [
        ("heads", "0.5000", "0.5000"),
        ("tails", "0.2500", "0.5000"),
    ]
    assert lines[3][:3] == ["other", "answers", "0.2500"] and lines[3][-2:] == ["0.2500", "0.0000"]
    numbers = tuple(f"{value / 10:.1f}" for value in range(101))
    uniform = Exact(numbers, True, np.full(101, 1 / 101), None, {}, 4)
    binned = table(["0.0", "5.0", "10.0", "x"], uniform)
    assert len(binned) == 22 and sum(float(line.split()[3]) for line in binned[1:-1]) == pytest.approx(0.75)
    assert [line.split()[:2] for line in table(["b", "a", "b"], None)[1:]] == [["b", "0.6667"], ["a", "0.3333"]]
