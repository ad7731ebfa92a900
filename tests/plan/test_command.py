"""The command: its mistakes in one line each, and, where libtpu is installed, what the TPU's compiler says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from cft_jax.plan import __main__ as command_line

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.py"
LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason='needs the TPU\'s compiler: pip install -e ".[plan]"')


@pytest.fixture
def attempt(monkeypatch, capsys, log_restored, tmp_path):
    """Runs the command in this process; returns its exit code, stdout and the last line of stderr."""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments, config=TINY):
        words = ["plan", f"--config={config}", f"--config.data.cache_dir={tmp_path / 'data'}", *arguments]
        monkeypatch.setattr(sys, "argv", words)
        try:
            command_line.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out, (err.splitlines() or [""])[-1]

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--topology is missing"),
        (("--topology=v5litpod-16",), "--topology=v5litpod-16 is unknown; the nearest is v5litepod-16"),
        (("--topology=h100-8", "--output={here}"), "exists; name a file that does not"),
        (("--topology=h100-8", "--output={here}/file/plan.json"), "file is a file; name another file"),
        (("--topology=h100-8", "--config.mesh.tensor=3"), "tensor=3, and 8 devices cannot be cut into 3"),
        (("--topology=h100-8", "--programs=trian"), "--programs=trian is unknown; there are train, "),
    ],
)
def test_mistakes(attempt, tmp_path, arguments, words):
    (tmp_path / "file").touch()
    code, out, error = attempt(*(argument.format(here=tmp_path) for argument in arguments))
    assert code == 2 and not out
    assert error.startswith("error: ") and words in error


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_libtpu(attempt):
    code, out, error = attempt("--topology=v6e-8")
    assert code == 2 and not out
    assert 'libtpu, which is absent: pip install -e ".[plan]"' in error


def test_a_gpu_that_is_not_there_is_estimated(attempt, tmp_path):
    code, out, _ = attempt("--topology=8xH100", f"--output={tmp_path / 'plan.json'}")
    assert code == 0 and "train 8x24x4x64" in out
    (program,) = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert program["topology"] == "8xH100" and program["fits"] and program["ideal_flops"] > 0
    assert program["bytes"]["arguments"] < program["bytes"]["total"] < program["bytes"]["available"]
    assert "cycles" not in program and "flops" not in program


def test_what_fits_nowhere(attempt, tmp_path):
    # By hand: 3 x 2 layers x 32 x 3e7 numbers, with gradients and moments 16 bytes each: 86 GiB.
    huge = ("--config.model.scratch.hidden_dim=30000000",)
    code, out, error = attempt("--topology=l4-1", *huge, f"--output={tmp_path / 'plan.json'}")
    assert code == 2 and not out and not (tmp_path / "plan.json").exists()
    assert "fits into none of l4-1 (at least" in error and "l4-" in error.partition(";")[2]


@pytest.fixture
def plan(attempt, tmp_path):
    """Runs the command, which must succeed; returns what it wrote and printed."""

    def run(*arguments, **options):
        file = tmp_path / "plan.json"
        code, out, error = attempt(*arguments, f"--output={file}", **options)
        assert code == 0, error
        return json.loads(file.read_text()), out

    return run


@pytest.mark.tpu
@needs_libtpu
def test_every_program_of_a_run_on_two_kinds_of_tpu(plan):
    figures, out = plan("--topology=v5e-4,v5litepod-1", "--config.model.scratch.embed_dim=128")
    assert [one["topology"] for one in figures["programs"]] == ["v5e-4"] * 5 + ["v5litepod-1"] * 5
    names = [one["name"].split()[0] for one in figures["programs"][:5]]
    assert names == ["train", "prefill", "decode", "score", "likelihood"]
    for one in figures["programs"]:
        assert one["fits"] and one["name"] in out
        # Small programs have all their temporaries in the chip's own memory.
        assert 0 <= one["bytes"]["temporaries"] <= one["bytes"]["total"] < one["bytes"]["available"]
        assert one["cycles"] > 0 and 0 < one["estimated_utilization"] < 1
        # Attention's scores and blocks that are not full come on top of what the method asks for.
        assert one["flops"] > 0.9 * one["ideal_flops"]
        assert one["topology"] == "v5e-4" or one["collectives"] == {}
    assert figures["programs"][0]["collectives"]["all-reduce"]["bytes"] > 0
    assert figures["found"] == [] and figures["versions"]["libtpu"]


@pytest.mark.tpu
@needs_libtpu
def test_what_does_not_fit_is_searched_for(plan):
    # By hand: 2^15 rows of 24 tokens keep more than 16 GiB in two layers of width 256 and 4,096 columns.
    wide = ("--config.model.scratch.embed_dim=256", "--config.model.scratch.hidden_dim=8192")
    figures, out = plan("--topology=v5e-1", "--programs=train", "--config.train.batch_size=32768", *wide)
    (own,), (found,) = figures["programs"], figures["found"]
    assert not own["fits"] and own["bytes"]["total"] > own["bytes"]["available"]
    assert found["fits"] and "--config.model.remat=full" in found["settings"] and found["settings"] in out


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_narrow_models_of_all_families_with_their_weights_cut(plan, hf_config, tmp_path, family):
    """Weights are gathered once forward and once backward, whole; activations and tokens are not."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1024}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    hf_config(family, **sizes).save_pretrained(tmp_path / "model")
    cut = ("--config.mesh.data=1", "--config.mesh.fsdp=-1", f"--config.model.checkpoint={tmp_path / 'model'}")
    figures, _ = plan("--topology=v5e-4", "--programs=train", *cut, config=ROOT / "configs" / "llama.py:1b")
    (one,) = figures["programs"]
    assert one["fits"] and one["cycles"] > 0 and 0.9 < one["flops"] / one["ideal_flops"] < 2
    moved = one["collectives"]
    assert "collective-permute" not in moved and "reduce-scatter" not in moved
    # By hand: 128 rows of 96 tokens are 6 MiB of activations a layer, more than all weights.
    weights = one["bytes"]["weights"] * one["devices"]
    assert moved["all-gather"]["bytes"] < 2.1 * weights and moved["all-reduce"]["bytes"] < 0.5 * weights
