"""The paper's grid: twelve models, soft and hard targets, any further settings; what is done of it, with its figures.

    python launch/sweep.py                                  # the table of what is done, and the figures so far
    python launch/sweep.py --print                          # one command a run, for xargs or a scheduler of your own
    python launch/sweep.py --run --only='qwen3-0.6b*'       # here, one after another
    python launch/sweep.py --submit='launch/slurm.sh --nodes 2 --name {name} --'
    python launch/sweep.py --submit='launch/gke.sh start --name {name} --image IMAGE --gpu nvidia-h100-80gb/8 --'
    python launch/sweep.py --set=seed=11,12 --set=data.space=grid,full --print

Every run has a directory of its own under --root, named after its model, target and settings; those that are finished
are left alone, so the same line resumes where it stopped. What follows -- is handed to every run as it stands.
"""

import argparse
import fnmatch
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from cft_jax.common.errors import UserError
from cft_jax.config import Config
from cft_jax.config.records import read_override

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("qwen3", "llama", "gemma3", "gpt_oss")
TARGETS = ("soft", "hard")
# Split, section and figure of a run's summary.json, with the column's heading.
FIGURES = (
    ("test_unseen_params", "exact", "kl", "KL unseen"),
    ("test_unseen_params", "exact", "total_variation", "TV unseen"),
    ("test_ood_family", "exact", "kl", "KL new family"),
    ("test_ood_family", "exact", "total_variation", "TV new family"),
)
DONE, STARTED, TO_DO = "done", "started", "to do"


@dataclass(frozen=True)
class Run:
    """One run of the grid: its name, and its flags for `cft_jax.main`."""

    name: str
    flags: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The command that does it here."""
        return [sys.executable, "-m", "cft_jax.main", *self.flags]


def grid(root: str, settings: Sequence[tuple[str, Sequence[str]]], more: Sequence[str]) -> Iterator[Run]:
    """The runs, models from small to large within each family.

    Args:
      root: directory or gs:// address under which each run has its own.
      settings: config fields with the values that each is to take; every combination is a run.
      more: further flags of every run.
    """
    combinations = list(itertools.product(*([(field, value) for value in values] for field, values in settings)))
    for family in FAMILIES:
        for size, target, chosen in itertools.product(_sizes(family), TARGETS, combinations):
            parts = [
                family.replace("_", "-"),
                size,
                target,
                *(f"{name.split('.')[-1]}={value}" for name, value in chosen),
            ]
            name = re.sub(r"[^a-z0-9.=-]+", "-", "-".join(parts).lower())
            flags = (
                f"--config=configs/{family}.py:{size}{'-hard' if target == 'hard' else ''}",
                f"--workdir={root.rstrip('/')}/{name}",
                *(f"--config.{field}={value}" for field, value in chosen),
                *more,
            )
            yield Run(name, flags)


def _sizes(family: str) -> list[str]:
    """The sizes that a config file knows."""
    spec = importlib.util.spec_from_file_location(f"configs_{family}", ROOT / "configs" / f"{family}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.CHECKPOINTS)


def status(root: str, run: Run) -> tuple[str, Mapping[str, Any]]:
    """How far a run is, and what its `summary.json` holds (empty where it has none)."""
    directory = epath.Path(root) / run.name
    try:
        summary = json.loads((directory / "summary.json").read_text())
        return (DONE if summary["step"] >= summary["total_steps"] else STARTED), summary
    except FileNotFoundError:
        return (STARTED if (directory / "config.json").exists() else TO_DO), {}
    except (ValueError, KeyError, TypeError):
        return STARTED, {}


def last_step(root: str, run: Run) -> int:
    """The step of the last line of a run's metrics; 0 where there is none."""
    try:
        lines = (epath.Path(root) / run.name / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines[:-1] or lines), default=0)
    except (FileNotFoundError, ValueError):
        return 0


def table(root: str, runs: Sequence[Run]) -> str:
    """What is done, with each figure before and after training."""
    width = max(len(run.name) for run in runs)
    headings = [title for *_, title in FIGURES]
    lines = [f"{'run':{width}}  {'state':8} {'step':>7}  " + "  ".join(f"{title:>15}" for title in headings)]
    counts = dict.fromkeys((DONE, STARTED, TO_DO), 0)
    for run in runs:
        state, summary = status(root, run)
        counts[state] += 1
        step = summary.get("step") or last_step(root, run)
        lines.append(f"{run.name:{width}}  {state:8} {step or '':>7}  " + "  ".join(_figures(summary)))
    lines.append(", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(line.rstrip() for line in lines)


def _figures(summary: Mapping[str, Any]) -> Iterator[str]:
    stages = summary.get("evaluations", {}).get("structured", {})
    for split, section, name, _ in FIGURES:
        found = [stages.get(stage, {}).get(split, {}).get(section, {}).get(name) for stage in ("before", "after")]
        yield f"{' > '.join('' if value is None else f'{value:.3f}' for value in found) if any(found) else '':>15}"


def perform(root: str, runs: Sequence[Run], *, submit: str) -> int:
    """Runs what is not done, here or by a launcher; one that fails does not keep the others from running.

    Args:
      root: as in `grid`.
      runs: of the grid.
      submit: the launcher's command line, in which {name} stands for the run's name; empty to run here.

    Returns:
      0 if all went well, else 1.
    """
    failed = []
    for run in runs:
        if status(root, run)[0] == DONE:
            continue
        # Launchers want names of jobs, without dots and other signs.
        job = re.sub(r"[^a-z0-9]+", "-", run.name)
        command = [*shlex.split(submit.replace("{name}", job)), *run.flags] if submit else run.command
        sys.stderr.write(f"{shlex.join(command)}\n")
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(run.name)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}; the same command tries them again\n")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="launch/sweep.py"
    )
    parser.add_argument("--root", default="runs/paper", help="where the runs' directories are (default: %(default)s)")
    parser.add_argument("--only", default="*", help="pattern of names, as in 'llama-*-soft'")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=A,B", help="a further axis of the grid; may be repeated"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print the commands of what is to do")
    what.add_argument("--run", action="store_true", help="run here what is to do, one after another")
    what.add_argument("--submit", default="", metavar="COMMAND", help="hand each run to a launcher")
    given = parser.parse_args(words)
    if bad := [text for text in given.set if not re.fullmatch(r"[a-z_.]+=.+", text)]:
        parser.error(f"--set={bad[0]} must be FIELD=VALUE,VALUE, as in --set=data.space=grid,full")
    # Commands run in the checkout, wherever this one was started.
    root = given.root if "://" in given.root or Path.cwd() == ROOT else str(Path(given.root).resolve())
    settings = [(field, values.split(",")) for field, _, values in (text.partition("=") for text in given.set)]
    try:
        for field, values in settings:
            _ = [read_override(Config(), f"{field}={value}") for value in values]
    except UserError as error:
        parser.error(str(error))
    runs = [run for run in grid(root, settings, more) if fnmatch.fnmatch(run.name, given.only)]
    if not runs:
        parser.error(f"--only={given.only} fits no run; without it the table names them all")
    if given.run or given.submit:
        return perform(root, runs, submit=given.submit)
    if given.print:
        commands = [run.command for run in runs if status(root, run)[0] != DONE]
        sys.stdout.writelines(f"{shlex.join(['python', *command[1:]])}\n" for command in commands)
    else:
        sys.stdout.write(f"{table(root, runs)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
