"""A user's mistakes with the main job: one line that says what to do, exit code 2, nothing left or changed."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from cft_jax import main
from cft_jax.config import Config
from cft_jax.text.scratch import train_tokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "configs" / "tiny.py"
SCRATCH_OFF = ("model.scratch.enabled=False", "model.lora.enabled=True", "export.format=adapter", "eval.enabled=False")


@pytest.fixture
def attempt(monkeypatch, capsys, tmp_path, program_cache, log_restored):
    """Runs the command in this process; returns the last line of stderr after checking that it is the only error."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(program_cache))

    def run(*arguments, config=TINY, workdir=tmp_path / "run"):
        argv = ["main", f"--config={config}", f"--workdir={workdir}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
        monkeypatch.setattr(sys, "argv", argv + list(arguments))
        with pytest.raises(SystemExit) as stopped:
            main.main()
        err = capsys.readouterr().err
        assert stopped.value.code == 2, err
        *before, last = err.splitlines()
        assert last.startswith("error: ") and "Traceback" not in err
        assert not [line for line in before if "error" in line.lower()], before
        return last

    return run


@pytest.fixture(scope="module")
def whole_base(tmp_path_factory, write_hf, hf_config):
    """A checkpoint in three or more shards, with a tokenizer."""
    tokenizer = train_tokenizer(["Generate exactly ONE random number from a Poisson distribution with parameters"])
    directory = tmp_path_factory.mktemp("base")
    config = hf_config("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    write_hf(directory, config, max_shard_size="30KB")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def base(whole_base, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(whole_base, tmp_path / "base")


def overrides(*assignments):
    return [f"--config.{assignment}" for assignment in assignments]


def truncate(base):
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name, "copy or download it again"


def lose_a_shard(base):
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    return shard.name, "copy or download them again"


def break_config(base):
    file = base / "config.json"
    file.write_text(file.read_text()[:200])
    return "config.json", "half-written", "copy it again"


def lose_config(base):
    (base / "config.json").unlink()
    return "config.json", "HF format"


def pickle_only(base):
    for file in base.glob("model*"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"weights")
    return ".bin", "convert them to safetensors"


def change_json(file, change):
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def unknown_architecture(base):
    change_json(base / "config.json", lambda r: r.update(architectures=["MambaForCausalLM"], model_type="mamba"))
    return "mamba", "llama"


def other_shapes(base):
    change_json(base / "config.json", lambda r: r.update(intermediate_size=48))
    return ("mlp", "shape")


def no_chat_template(base):
    (base / "chat_template.jinja").unlink()
    return "chat template", "config.model.tokenizer"


def no_tokenizer(base):
    for file in (*base.glob("tokenizer*"), base / "chat_template.jinja"):
        file.unlink()
    return "tokenizer", "config.model.tokenizer"


def half_a_tokenizer(base):
    file = base / "tokenizer.json"
    file.write_text(file.read_text()[:1000])
    return "tokenizer.json", "copy it again"


def no_terminator(base):
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "\\n"))
    return "ends an assistant's turn", "config.data.terminator"


def too_large(base):
    """Refused by its sizes, before any weight is looked at."""
    change_json(base / "config.json", lambda r: r.update(hidden_size=10 * 2**14, intermediate_size=2**24))
    return "GiB per device", "config.mesh.fsdp"


@pytest.mark.parametrize(
    "spoil",
    [
        too_large,
        truncate,
        lose_a_shard,
        break_config,
        lose_config,
        pickle_only,
        unknown_architecture,
        other_shapes,
        no_chat_template,
        no_tokenizer,
        half_a_tokenizer,
        no_terminator,
    ],
)
def test_damaged_checkpoints(attempt, base, tmp_path, spoil):
    words = spoil(base)
    line = attempt(*overrides(*SCRATCH_OFF, f"model.checkpoint={base}"))
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


CUSTOM = """{"prompt": "Draw.", "values": ["1", "2"], "probabilities": [0.5, 0.5]}
{"prompt": "Draw.", "values": ["1", "2"], "probabilities": [0.5, 0.6]}
{"prompt": "Draw.", "values": ["1", "2"]
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.max_stesp=3"], ["config.train.max_stesp", "max_steps"]),
        (["trian.max_steps=3"], ["trian", "train"]),
        (["train.batch_size=2.5"], ["config.train.batch_size='2.5'", "whole number"]),
        (["train.batch_size=many"], ["config.train.batch_size='many'", "whole number"]),
        (["train.tau=hot"], ["config.train.tau='hot'", "a number"]),
        (["eval.enabled=perhaps"], ["config.eval.enabled='perhaps'", "True or False"]),
        (["model=3"], ["config.model='3'", "field by field"]),
        (["eval.seeds=a,b"], ["config.eval.seeds=", "int"]),
        (["data.tail_policy=clip"], ["data.tail_policy='clip'", "clip_to_edge_bin, drop"]),
        (["data.target=softly"], ["data.target='softly'", "soft, hard"]),
        (["train.batch_size=0", "data.max_bins=1"], ["train.batch_size=0", "data.max_bins=1"]),
        (["log.profile=3-5"], ["log.profile='3-5'", "5:8"]),
        (["eval.suites=structured,mqc"], ["mqc", "structured"]),
        (["data.train_families=geometrical"], ["geometrical", "geometric"]),
        (["data.max_length=9"], ["data.max_length=9", "19 tokens", "8 of 8 tasks", "raise it"]),
        (["data.custom={place}/rows.jsonl"], ["lines of", "rows.jsonl", "2:", "3:", "JSON"]),
        (["data.custom={place}/nowhere.jsonl"], ["nowhere.jsonl"]),
        (["data.terminator=<|stop|>"], ["data.terminator='<|stop|>'", "tokenizer_eos"]),
        (["data.chat.date=26.7.2024"], ["data.chat.date='26.7.2024'", "2024-07-26"]),
        (["mesh.tensor=3"], ["tensor=3", "8 devices", "divide"]),
        (["mesh.data=2"], ["data=2", "8", "-1"]),
        (["mesh.data=0"], ["mesh", "at most one -1"]),
        (["train.objective=paths", "train.paths_per_prompt=3"], ["batch_size=4", "paths_per_prompt=3"]),
        ([*SCRATCH_OFF, "model.checkpoint={place}/nowhere"], ["checkpoint", "nowhere", "no such directory"]),
        ([*SCRATCH_OFF, "model.checkpoint=no-such/model"], ["no-such/model", "does not answer", "give a directory"]),
        ([*SCRATCH_OFF], ["model.checkpoint is empty"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_impossible_configs(attempt, tmp_path, arguments, words):
    (tmp_path / "rows.jsonl").write_text(CUSTOM)
    line = attempt(*overrides(*(argument.format(place=tmp_path) for argument in arguments)))
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


def test_lora_targets_that_the_model_lacks(attempt, base, tmp_path):
    line = attempt(*overrides(*SCRATCH_OFF, f"model.checkpoint={base}", "model.lora.targets=c_attn"))
    assert "c_attn" in line and "q_proj" in line
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_of_another_model(attempt, base, tmp_path):
    other = tmp_path / "other"
    # Of more text, so of more tokens; those that mark the turns come last.
    train_tokenizer(["Generate exactly ONE random number", "Output ONLY the number."]).save_pretrained(other)
    line = attempt(*overrides(*SCRATCH_OFF, f"model.checkpoint={base}", f"model.tokenizer={other}"))
    assert f"config.model.tokenizer={other} writes token 2" in line and "belongs to the model" in line
    assert not (tmp_path / "run").exists()


def test_workdirs_of_others(attempt, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert "is not empty and holds no run" in attempt(workdir=other)
    assert "is a file" in attempt(workdir=other / "thesis.tex")
    assert [(path.name, path.read_text()) for path in other.iterdir()] == [("thesis.tex", "x")]


def test_a_run_of_another_config(attempt, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    cache = json.loads((workdir / "config.json").read_text())["config"]["data"]["cache_dir"]
    line = attempt("--config.seed=12", "--config.train.tau=2.0", f"--config.data.cache_dir={cache}")
    for word in ("seed was 11 and is 12", "train.tau was 1.0 and is 2.0", "Name a new --workdir"):
        assert word in line
    # A mistake in what may change leaves the record of the run as it was, too.
    attempt("--config.mesh.data=3", f"--config.data.cache_dir={cache}")
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    shutil.rmtree(workdir / "base")
    (workdir / "summary.json").write_text("{")
    assert "summary.json is damaged" in attempt(f"--config.data.cache_dir={cache}")


@pytest.fixture
def places(tmp_path):
    """What is there when a command is mistyped: an empty directory, a run that has no checkpoint, a taken place."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text(json.dumps({"config": dataclasses.asdict(Config())}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    return {"place": tmp_path, "configs": ROOT / "configs", "tiny": TINY}


EXPORT = ("--workdir={place}/begun", "--output={place}/out")
STRUCTURED = ("--config={configs}/eval/structured.py", "--workdir={place}/out")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("main", (), "--config is missing; try --config=configs/demo.py"),
        ("main", ("{configs}/demo.py",), "did you mean --config={configs}/demo.py?"),
        ("main", ("--config={configs}/dmeo.py",), "{configs}/demo.py"),
        ("main", ("--config={configs}/llama.py:9b",), "'9b' names none of 1b, 3b"),
        (
            "main",
            ("--config={tiny}", "--workdir={place}/taken/file/run"),
            "cannot write to --workdir={place}/taken/file",
        ),
        ("export", (), "--workdir and --output are needed"),
        ("export", ("--workdir={place}/nowhere", EXPORT[1]), "{place}/nowhere holds no config.json"),
        ("export", ("--workdir={place}/empty", EXPORT[1]), "{place}/empty holds no config.json"),
        ("export", EXPORT, "{place}/begun has no checkpoints yet; train first"),
        ("export", (EXPORT[0], "--output={place}/taken"), "{place}/taken exists and is not empty"),
        ("export", (EXPORT[0], "--output={place}/taken/file"), "{place}/taken/file exists and is not empty"),
        ("export", (*EXPORT, "--format=gguf"), "--format=gguf: value should be one of <merged|adapter>"),
        ("evaluate", (), "--config is missing; try --config=configs/eval/structured.py"),
        ("evaluate", ("--config={configs}/eval/mmlu.py",), "there are {configs}/eval/all.py, "),
        ("evaluate", STRUCTURED, "config.model.checkpoint is empty"),
        ("evaluate", (*STRUCTURED, "--config.model.checkpoint={place}/empty"), "{place}/empty"),
        ("evaluate", (*STRUCTURED, "--config.model.checkpoint={place}/nowhere"), "no such directory"),
        ("compare", ("{place}/empty",), "--output=FILE.html and at least one RUN are needed"),
        ("compare", ("--output={place}/c.html", "{place}/empty"), "{place}/empty holds no finished evaluation"),
        ("compare", ("--output={place}", "{place}/empty"), "is a directory; name a file in it"),
        ("prepare", ("--config={tiny}",), "--output is missing"),
        ("prepare", ("--config={tiny}", "--output={place}/taken/file"), "cannot write --output={place}/taken/file"),
    ],
    ids=lambda value: value if isinstance(value, str) and "{" not in value else "",
)
def test_mistyped_commands(places, monkeypatch, capsys, log_restored, name, arguments, words):
    before = sorted(places["place"].rglob("*"))
    command = importlib.import_module("cft_jax.evaluate.__main__" if name == "evaluate" else f"cft_jax.{name}")
    monkeypatch.setattr(sys, "argv", [name, *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert words.format(**places) in err
    assert sorted(places["place"].rglob("*")) == before, "nothing is left or changed"


@pytest.mark.slow
def test_in_a_process_of_its_own(command, tmp_path):
    """What stands before the error, if anything, is the log of the work up to there."""
    for arguments, words, lines in (
        ([], "--config is missing", 1),
        ([f"--config={TINY}", "--config.data.max_length=9"], "config.data.max_length=9", 5),
    ):
        code, out, err = command("main", *arguments, f"--workdir={tmp_path / 'run'}")
        assert code == 2 and out == "", err
        assert words in err.splitlines()[-1] and len(err.splitlines()) == lines, err
        assert not (tmp_path / "run").exists()
