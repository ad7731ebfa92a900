"""The documentation: commands that run, configs that validate, tables that are true, links that lead somewhere.

A code block runs here unless an HTML comment before it says what it needs. Commands of marked blocks are not run, but
their configs are read, with all overrides, and validated.
"""

import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cft_jax.config import Config, validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The checks around the tests run these two, and nothing else does: they install the package and run all its tests.
SET_UP = (
    "pip install -e . && python -m cft_jax.main --config=configs/demo.py",
    'pip install -e ".[test]" && python -m pytest',
)
# A model and an evaluation of seconds instead of minutes; the same commands otherwise.
SMALL_MODEL = ("model.scratch.num_layers=1", "model.scratch.embed_dim=32", "model.scratch.hidden_dim=48")
SMALL_DATA = ("data.train_families=uniform,",)
SHORT_TRAINING = ("train.max_steps=1", "train.batch_size=2", "eval.enabled=False")
# The demo's base, which it makes first.
SMALL_BASE = (f"model.base={ROOT / 'tests' / 'configs' / 'tiny.py'}", "train.batch_size=16", "train.keep.weight=0")
# A first step moves one half of an adapter alone, and its export would be refused.
SMALL_BASE += ("train.max_steps=2",)
SHORT_EVALUATION = ("eval.max_prompts_per_split=1", "eval.num_samples=2", "data.max_bins=21", "data.num_decimals=1")
# What stands for the reader's own in commands.
PLACEHOLDERS = {"WHAT": "exported", "runs/llama": "runs/demo"}


@dataclass(frozen=True)
class Block:
    """A code block: its page, language, text, and what the comment before it says it needs."""

    page: Path
    language: str
    text: str
    needs: str


def blocks():
    """All code blocks of all pages."""
    pattern = r"(?:<!-- (?P<needs>(?:needs|run by)[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    for page in PAGES:
        for found in re.finditer(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            yield Block(page, found["language"], found["text"], found["needs"] or "")


def commands(block):
    """The words of each command of a bash block, comments and continued lines resolved."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and line not in SET_UP:
            yield [replaced(word) for word in words]


def replaced(word):
    for name, own in PLACEHOLDERS.items():
        word = re.sub(rf"(?<![\w/]){name}(?![\w/])", own, word)
    return word


BASH = [block for block in blocks() if block.language == "bash"]
FREE = [words for block in BASH if not block.needs for words in commands(block)]
CONFIGURED = [
    words
    for block in BASH
    for part in commands(block)
    for words in [part[part.index("--") + 1 :] if "--" in part else part]
    if any(word.startswith("--config=configs/") for word in words)
]


def title(words):
    return " ".join(words)[:100]


@pytest.fixture(scope="module")
def place(tmp_path_factory, program_cache):
    """A directory that looks like a checkout, and what a command leaves in it is seen by the next one."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "launch"):
        (directory / name).symlink_to(ROOT / name)
    return directory


@pytest.fixture
def here(place, monkeypatch, log_restored):
    monkeypatch.chdir(place)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    return place


def run(words):
    """Runs `python -m cft_jax.<name>` in this process, which has imported and compiled before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[2:])
        try:
            runpy.run_module(words[2], run_name="__main__", alter_sys=False)
        except SystemExit as ended:
            assert not ended.code, words


def shortened(words):
    """The command with overrides that make it short."""
    fields = {"main": SMALL_MODEL + SHORT_TRAINING, "prepare": SMALL_DATA, "evaluate": SHORT_EVALUATION}
    extra = fields.get(words[2].partition(".")[2], ())
    return [*words, *(f"--config.{field}" for field in extra)]


@pytest.fixture(scope="module")
def demo(place):
    """`runs/demo`, as the README's first command leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        words = shlex.split(SET_UP[0].partition("&& ")[2])
        run([*shortened(words), *(f"--config.{field}" for field in SMALL_DATA + SMALL_BASE)])
    return place / "runs" / "demo"


def test_the_readme_begins_with_the_two_set_up_commands():
    assert [block.text.strip() for block in BASH if block.page == ROOT / "README.md"][:2] == list(SET_UP)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")
@pytest.mark.parametrize("words", list(dict.fromkeys(map(tuple, FREE))), ids=title)
def test_commands_run(here, demo, words):
    if words[:2] == ("python", "-m"):
        if words[2] == "cft_jax.evaluate" and "structured" not in words[3]:
            pytest.skip("validated below; its suite's own tests run it")
        output = next((word.partition("=")[2] for word in words if word.startswith("--output=")), "")
        if words[2] == "cft_jax.export" and (here / output).exists():
            return  # the same command on another page
        run(shortened(list(words)))
        assert not output or (here / output).exists()
        return
    assert words[:2] == ("python", "launch/sweep.py"), f"mark the block with what {words} needs"
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "qwen3" in done.stdout, done.stderr


@pytest.mark.parametrize("words", list(dict.fromkeys(map(tuple, CONFIGURED))), ids=title)
def test_configs_are_valid(configured, monkeypatch, words):
    monkeypatch.chdir(ROOT)
    file = next(word.removeprefix("--config=") for word in words if word.startswith("--config="))
    if file.partition(":")[2].startswith("runs/"):
        pytest.skip("takes its settings from a run")
    overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.") and "$" not in word]
    validate(configured(file, *overrides))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_python_blocks_run(here, demo, capsys):
    if not (here / "exported").exists():
        run(["python", "-m", "cft_jax.export", f"--workdir={demo}", "--output=exported", "--format=merged"])
    free = [block for block in blocks() if block.language == "python" and not block.needs]
    assert {block.page.name for block in free} == {"README.md", "export.md", "python.md"}
    for block in free:
        exec(compile(block.text, str(block.page), "exec"), {})
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("[")  # export.md prints five answers


def test_json_blocks_are_custom_data(tmp_path):
    from cft_jax.distributions.custom import read_tasks

    (block,) = [block for block in blocks() if block.language == "json"]
    file = tmp_path / "rows.jsonl"
    file.write_text(block.text)
    assert len(read_tasks(file)) == len(block.text.splitlines())


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT)})" in text, page.name


def test_every_config_field_is_explained():
    def fields(record, path=""):
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if dataclasses.is_dataclass(value):
                yield from fields(value, f"{path}{field.name}.")
            else:
                yield f"{path}{field.name}", repr(value)

    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.+) \|$", (ROOT / "docs" / "config.md").read_text(), re.MULTILINE)
    assert {name: default for name, default, _ in rows} == dict(fields(Config()))
    assert len({name for name, *_ in rows}) == len(rows) and all(text.strip() for *_, text in rows)


def load(name):
    return runpy.run_path(str(ROOT / "docs" / name))


def test_the_tables_of_plans_are_what_the_data_says():
    module = load("plans.py")
    for page in module["PAGES"]:
        text = page.read_text(encoding="utf-8")
        assert module["page"](text) == text, "python docs/plans.py --write"
    from cft_jax.models.families import PUBLISHED

    assert list(module["CONFIGS"]) == [name.partition("/")[2] for name in PUBLISHED]


def test_the_configs_meshes_fit_a_v5e_8():
    """What configs take for granted about memory is what the compiler said."""
    asked = [(config, of[0]) for (config, topology), of in load("plans.py")["entries"]().items() if topology == "v5e-8"]
    assert asked and all(as_configured["fits"] for _, as_configured in asked), asked


def test_the_picture_is_drawn_from_the_trie(tmp_path):
    module = load("trie_image.py")
    module["main"](tmp_path / "trie.png")
    assert (tmp_path / "trie.png").read_bytes()[:4] == b"\x89PNG"
