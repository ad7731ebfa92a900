"""Every prompt of a page can be opened: by keyboard, without network, in a real browser; and the page stays small."""

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from cft_jax.evaluate.report.gallery import MAX_PROMPTS, gallery_of
from cft_jax.evaluate.report.page import render_page
from cft_jax.evaluate.report.runs import Run
from cft_jax.evaluate.suites.structured.outline import MAX_BARS, outline, wrong_prefixes
from cft_jax.text.trie import grow_forest, token_matrix

END = 0


def text_of(tokens):
    return "".join(map(chr, tokens))


def test_the_most_wrong_prefixes_by_hand():
    values, target = ("0.1", "0.5", "3"), np.array([0.6, 0.2, 0.2])
    tokens, lengths = token_matrix([[ord(character) for character in value] for value in values])
    groups = np.zeros(3, np.int64)
    trie = grow_forest(tokens, lengths, groups, target, terminator_id=END, describe=str).trie(0)
    model = trie.child_probs.copy()
    # The target comes to "0." in 80 % and goes on with 1 in three quarters of them; the model halves that and gives
    # most of the rest to the 5. After "3" it ends in half of all cases only.
    first = trie.child_offsets[trie.find([ord("0"), ord(".")])]
    model[first : first + 2] = [0.375, 0.6]
    model[trie.child_offsets[trie.find([ord("3")])]] = 0.5
    found = wrong_prefixes(trie, np.log(model), text_of)
    assert found == [["0.", "1", 0.75, 0.375], ["3", "", 1.0, 0.5]]
    # At the beginning 0.75 is left for what no answer has there, more than the 0 misses.
    model[trie.child_offsets[0] : trie.child_offsets[1]] = [0.1, 0.15]
    assert wrong_prefixes(trie, np.log(model), text_of)[0] == ["", None, 0.0, 0.75]


def test_the_outline_of_a_uniform_is_flat():
    """49 values in 40 bins of equal width would show some bins twice as high as others."""
    numbers, target = np.arange(19, 68) / 10, np.full(49, 1 / 49)
    found = outline([f"{x:.1f}" for x in numbers], numbers, target, target)["target"]
    assert len(found) > MAX_BARS // 2 and len(set(found[:-1])) == 1


def test_outlines_are_small_and_keep_the_mass():
    numbers = np.arange(1000) / 10
    target = np.exp(-(((numbers - 50) / 10) ** 2))
    target /= target.sum()
    found = outline([f"{x:.1f}" for x in numbers], numbers, target, 0.5 * target)
    assert MAX_BARS // 2 < len(found["target"]) <= MAX_BARS and len(json.dumps(found)) < 1000
    # All but the two tails, which hold 0.2 % each.
    assert sum(found["target"]) == pytest.approx(1, abs=0.006)
    assert sum(found["model"]) == pytest.approx(sum(found["target"]) / 2, rel=0.01)
    few = outline(["heads", "tails"], None, np.array([0.25, 0.75]), np.array([0.5, 0.5]))
    assert few == {"values": ["tails", "heads"], "target": [0.75, 0.25], "model": [0.5, 0.5]}


def runs_of(count):
    """Two stages of so many prompts of two families."""

    def record(index, stage):
        values = [f"{x}.0" for x in range(MAX_BARS)]
        masses = np.full(MAX_BARS, 1 / MAX_BARS)
        model = masses * (1 + 0.5 * stage * np.cos(np.arange(MAX_BARS)))
        return {
            "split": "test_unseen_params", "task_id": f"task_{index}", "group": ("gaussian", "poisson")[index % 2],
            "weight": 1.0, "exact": {"total_variation": 0.25 * stage},
            "outline": {
                "title": "Gaussian", "parameters": {"mu": index}, "prompt": "One number? " * 20, "values": values,
                "target": masses.round(4).tolist(), "model": model.round(4).tolist(),
            },
            "wrong_prefixes": [[f"{x}.", "5", 0.31, 0.1] for x in range(5)],
            "samples": {"11": [f"{x % 17}.123" for x in range(100)]},
        }  # fmt: skip

    split = {"num_prompts": count, "exact": {"total_variation": 0.25}}
    summary = {"suite": "structured", "splits": {"test_unseen_params": split}}
    return [
        Run(name, summary, [record(index, stage) for index in range(count)], style)
        for style, (name, stage) in enumerate((("before", 1), ("after", 0.1)))
    ]


def test_the_page_stays_small():
    sizes = {count: len(render_page(runs_of(count)).encode()) for count in (20, MAX_PROMPTS, 3 * MAX_PROMPTS)}
    assert (sizes[MAX_PROMPTS] - sizes[20]) / (MAX_PROMPTS - 20) < 5000  # bytes per prompt of two models
    assert sizes[3 * MAX_PROMPTS] - sizes[MAX_PROMPTS] < 1000
    gallery = gallery_of(runs_of(3 * MAX_PROMPTS), ["test_unseen_params"])
    assert (gallery.num_shown, gallery.num_prompts) == (MAX_PROMPTS, 3 * MAX_PROMPTS)
    (families,) = gallery.splits.values()
    assert {family: len(views) for family, views in families.items()} == {"gaussian": 100, "poisson": 100}


def test_plots_show_the_masses():
    gallery = gallery_of(runs_of(2), ["test_unseen_params"])
    view = gallery.splits["Unseen parameters"]["gaussian"][0]
    heights = [float(part.partition("h")[0]) for part in view.plot.models[0].split("V")[1:]]
    cosine = 1 + 0.5 * np.cos(np.arange(MAX_BARS))
    # Height 0 is the top, 5 % above what the target and the last model have; what is higher is cut off.
    np.testing.assert_allclose(heights, 100 - np.minimum(100, 100 * cosine / (1.05 * 1.05)), atol=1)
    assert view.plot.ends == ("0.0", "39.0")
    assert view.wrong[1][0] == "after “0.” the model gives “5” 10.0 % instead of 31.0 %"
    assert view.samples[0][0] == "0.123 ×6"
    assert gallery_of([Run("old", {}, [{"split": "s", "task_id": "t"}])], ["s"]) is None


class Browser:
    """A headless Chromium, spoken to over its debugging pipe."""

    def __init__(self, program, directory):
        (read_here, write_there), (read_there, write_here) = os.pipe(), os.pipe()
        as_it_wants = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
        arguments = (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={directory}",
        )  # fmt: skip
        start = [sys.executable, "-c", as_it_wants + "os.execv(sys.argv[3], sys.argv[3:])"]
        self.process = subprocess.Popen(
            [*start, str(read_there), str(write_there), program, *arguments],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self.read, self.write, self.left, self.numbers, self.session = (
            read_here,
            write_here,
            b"",
            itertools.count(1),
            {},
        )

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 120
        while True:
            while b"\0" in self.left:
                message, _, self.left = self.left.partition(b"\0")
                answer = json.loads(message)
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    return answer["result"]
            ready, _, _ = select.select([self.read], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"the browser does not answer {method}"
            content = os.read(self.read, 1 << 16)
            assert content, "the browser has ended"
            self.left += content

    def open(self, path):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Network.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.call("Page.navigate", url=path.as_uri())
        while not self.value("document.readyState === 'complete' && location.protocol === 'file:'"):
            time.sleep(0.05)

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key, code, text=""):
        for kind in ("keyDown", "keyUp"):
            of_key = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **of_key, **({"text": text} if kind == "keyDown" else {}))


@pytest.fixture
def browser(tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()


def test_a_prompt_is_opened_by_keyboard_in_a_browser(browser, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render_page(runs_of(6)), encoding="utf-8")
    browser.open(page)
    assert browser.value("document.querySelectorAll('.prompt').length") == 6
    seen, shown = (f"document.querySelector('{what}').checkVisibility()" for what in (".prompt", ".prompt .outline"))
    assert not browser.value(seen) and not browser.value(shown)
    for of, visible in (("family", seen), ("prompt", shown)):
        for _ in range(30):
            browser.press("Tab", 9)
            if browser.value(f"document.activeElement.matches('.{of} > summary')"):
                break
        browser.press("Enter", 13, "\r")
        assert browser.value(f"document.querySelector('.{of}').open") and browser.value(visible)
    text = browser.value("document.querySelector('.prompt').innerText")
    assert "after “0.” the model gives “5” 10.0 % instead of 31.0 %" in text and "0.123 ×6" in text
    # The paths are drawn in the models' colours.
    strokes = "[...document.querySelectorAll('.prompt .outline path')].slice(1, 3).map(p => getComputedStyle(p).stroke)"
    assert len(set(browser.value(strokes))) == 2
    assert browser.value("performance.getEntriesByType('resource').length") == 0
    browser.press("Enter", 13, "\r")
    assert not browser.value("document.querySelector('.prompt').open")
