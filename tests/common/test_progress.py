"""Progress on a terminal, in a log, and where nobody listens."""

import io

import pytest
from absl import logging

from cft_jax.common.progress import Progress


@pytest.fixture
def informed():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    yield
    logging.set_verbosity(before)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_shows_throughput_and_time_left(monkeypatch, informed):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("train", total=40, unit="step", done=10) as progress:
        for _ in range(20):
            progress.advance(1, loss=0.25)
        progress.advance(10)
    text = terminal.getvalue()
    assert "train" in text and "40/40" in text and "loss=0.25" in text and "steps/s" in text


def test_log_gets_a_line_now_and_then(monkeypatch, informed, caplog):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"), Progress("evaluate", total=100, unit="prompt", done=50) as progress:
        for _ in range(25):
            clock[0] += 4.0
            progress.advance(2, kl=0.5)
    # A line each 32 s (the first advance past 30 s), and one at the end, after 100 s: 50 prompts were done before.
    assert [record.getMessage() for record in caplog.records] == [
        "evaluate: 66/100 prompts, 2.00s/prompt, 01:08 left, kl=0.5",
        "evaluate: 82/100 prompts, 2.00s/prompt, 00:36 left, kl=0.5",
        "evaluate: 98/100 prompts, 2.00s/prompt, 00:04 left, kl=0.5",
        "evaluate: 100/100 prompts, 2.00s/prompt, 00:00 left, kl=0.5",
    ]


def test_the_time_left_follows_the_speed_of_late(monkeypatch, informed, caplog):
    """The first step, which waits for XLA, does not foretell that all steps take as long."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"), Progress("train", total=200, unit="step") as progress:
        for seconds in (60.0, *[1.0] * 60):
            clock[0] += seconds
            progress.advance(1)
    # By hand: 1 step in 60 s; then 30 steps in 30 s, 169 and 139 are left; at the end 61 steps in 120 s.
    assert [record.getMessage() for record in caplog.records] == [
        "train: 1/200 steps, 60.00s/step, 3:19:00 left",
        "train: 31/200 steps, 1.00step/s, 02:49 left",
        "train: 61/200 steps, 1.00step/s, 02:19 left",
    ]


def test_short_work_leaves_no_line(monkeypatch, informed, caplog):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level("INFO", logger="absl"), Progress("build", total=3, unit="trie") as progress:
        progress.advance(3)
    assert not caplog.records


@pytest.mark.parametrize("make", [Terminal, io.StringIO])
def test_quiet_shows_nothing(monkeypatch, make):
    terminal = make()
    monkeypatch.setattr("sys.stderr", terminal)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # what --quiet sets
    try:
        with Progress("train", total=4, unit="step") as progress:
            progress.advance(4, loss=0.5)
    finally:
        logging.set_verbosity(before)
    assert terminal.getvalue() == ""
