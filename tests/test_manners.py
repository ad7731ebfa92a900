"""What the main job says to somebody who asked for quiet, and to somebody who asks twice."""

from pathlib import Path

TINY = Path(__file__).parent / "configs" / "tiny.py"


def test_quiet_leaves_the_final_summary(command, tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--config={TINY}", f"--workdir={workdir}", "--quiet", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    flags += ["--config.train.epochs=1", "--config.eval.num_samples=0", "--config.eval.max_prompts_per_split=1"]
    code, out, err = command("main", *flags)
    assert code == 0, err
    assert err == ""
    titles = [line.split()[0] for line in out.splitlines() if line[:1].isalpha()]
    # The figures, where everything is, and what to run next.
    assert titles[-4:] == ["report", "figures", "weights", "next"]
    assert "before -> after" in out and f"python -m cft_jax.export --workdir={workdir}" in out
    assert "\033" not in out + err  # no colours into a file
    code, out, err = command("main", *flags)
    assert (code, err) == (0, "")
    assert out.startswith(f"{workdir} is finished (step 2)") and "another run" in out
