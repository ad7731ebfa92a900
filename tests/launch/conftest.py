"""Stand-ins for the clusters' programs: they record how they were called and answer as they are told."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each appends its arguments to a log and then runs the shell code that the test gave for it.
_STAND_IN = """#!{python}
import json, os, subprocess, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
sys.exit(subprocess.run(["bash", "-c", {answer!r}, {name!r}, *sys.argv[1:]]).returncode)
"""


class StandIns:
    """A directory of programs that comes first on the PATH of the scripts under test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._log = directory / "calls"
        self.bin = directory / "bin"
        self.bin.mkdir()

    def answer(self, name: str, answer: str = "") -> None:
        """Makes a program that runs `answer`, bash code that sees the arguments."""
        file = self.bin / name
        file.write_text(_STAND_IN.format(python=sys.executable, log=str(self._log), name=name, answer=answer))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def calls(self) -> list[list[str]]:
        """What was called since this was last asked, with its arguments."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs one of the launchers."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        # The scripts' own temporary files are counted afterwards.
        temporary = self.directory / "tmp"
        temporary.mkdir(exist_ok=True)
        return subprocess.run(
            [str(ROOT / "launch" / script), *arguments],
            env={**os.environ, "HF_TOKEN": "", "PATH": path, "TMPDIR": str(temporary), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture
def stand_ins(tmp_path):
    return StandIns(tmp_path)
