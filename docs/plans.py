"""The tables of scaling.md and performance.md: what the TPU's compiler said, kept with its version in data/plans.json.

python docs/plans.py --write                       # put the tables into the pages
python docs/plans.py --measure CONFIG TOPOLOGIES   # ask the compiler again: qwen3.py:8b v6e-8,v6e-256

Every entry is the train step of one of the paper's models with LoRA of rank 16 on q, k, v and o, in bfloat16, for the
paper's strings of 96 tokens after 20 that all share, 32 strings for each chip.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "plans.json"
PAGES = [Path(__file__).with_name(name) for name in ("scaling.md", "performance.md")]
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
CONFIGS = {
    "Qwen3-0.6B": "qwen3.py:0.6b",
    "Qwen3-1.7B": "qwen3.py:1.7b",
    "Qwen3-4B": "qwen3.py:4b",
    "Qwen3-8B": "qwen3.py:8b",
    "Qwen3-14B": "qwen3.py:14b",
    "Llama-3.2-1B-Instruct": "llama.py:1b",
    "Llama-3.2-3B-Instruct": "llama.py:3b",
    "gemma-3-1b-it": "gemma3.py:1b",
    "gemma-3-4b-it": "gemma3.py:4b",
    "gemma-3-12b-it": "gemma3.py:12b",
    "gemma-3-27b-it": "gemma3.py:27b",
    "gpt-oss-20b": "gpt_oss.py:20b",
}
CHIPS = ("v5e-8", "v6e-8")
STRINGS = 32
AXES = ("data", "fsdp", "tensor")
_GIB = 2**30
Entry = Mapping[str, Any]


def entries() -> dict[tuple[str, str], list[Entry]]:
    """By config and topology: the step as configured and, where that does not fit, the one that was found."""
    return {(entry["config"], entry["topology"]): entry["programs"] for entry in json.loads(DATA.read_text("utf-8"))}


def fitting(config: str, topology: str) -> Entry | None:
    """The step that fits, as configured or found; None where none does or none was asked for."""
    return next((one for one in entries().get((config, topology), ()) if one["fits"]), None)


def measure(config: str, topologies: Sequence[str]) -> None:
    """Asks the compiler and keeps what it says, in place of what it said before."""
    for topology in topologies:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "plan.json"
            words = [f"--config={Path(__file__).parents[1] / 'configs' / config}", f"--topology={topology}"]
            words += ["--programs=train", f"--rows_per_device={STRINGS}", f"--output={file}"]
            subprocess.run([sys.executable, "-m", "cft_jax.plan", *words], check=False)
            if not file.exists():
                continue
            found = json.loads(file.read_text("utf-8"))
        versions = {name: found["versions"][name] for name in ("jax", "libtpu")}
        kept = json.loads(DATA.read_text("utf-8")) if DATA.exists() else []
        kept = [entry for entry in kept if (entry["config"], entry["topology"]) != (config, topology)]
        programs = found["programs"] + found["found"]
        kept.append({"config": config, "topology": topology, "versions": versions, "programs": programs})
        kept.sort(key=lambda entry: (list(CONFIGS.values()).index(entry["config"]), entry["topology"]))
        DATA.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


def settings(program: Entry) -> str:
    """Mesh, recomputation and microbatches of a program, those that are not left to themselves."""
    flags = dict(word.removeprefix("--config.").split("=") for word in program["settings"].split())
    devices = program["devices"]
    sizes = {axis: devices if flags[f"mesh.{axis}"] == "-1" else int(flags[f"mesh.{axis}"]) for axis in AXES}
    words = [f"{axis}={size}" for axis, size in sizes.items() if size > 1] or ["data=1"]
    if flags["model.remat"] == "full":
        words.append("remat=full")
    if int(flags["train.grad_accum_steps"]) > 1:
        words.append(f"{flags['train.grad_accum_steps']} parts")
    return ", ".join(words)


def memory_table() -> Iterator[str]:
    """GiB of each chip that the step takes, by model and kind of chip."""
    yield f"| model | {' | '.join(CHIPS)} |"
    yield f"|---|{'---|' * len(CHIPS)}"
    for model, config in CONFIGS.items():
        cells = []
        for topology in CHIPS:
            found = fitting(config, topology)
            missing = "–" if (config, topology) in entries() else "not asked"
            cells.append(missing if found is None else f"{settings(found)}: {found['bytes']['total'] / _GIB:.1f}")
        yield f"| {model} | {' | '.join(cells)} |"


def step_table() -> Iterator[str]:
    """What the step takes on v6e, by model."""
    headings = (
        "model, v6e-8",
        "settings",
        "Mcycles",
        "ms",
        "share of peak",
        "temporaries, GiB",
        "operations over the method's",
        "compile, s",
    )
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for model, config in CONFIGS.items():
        if (found := fitting(config, "v6e-8")) is not None:
            yield f"| {model} | {settings(found)} | {' | '.join(_figures(found))} |"


def scale_table() -> Iterator[str]:
    """How the step moves from few chips to many, at the same number of strings for each."""
    headings = ("model", "chips", "settings", "GiB", "Mcycles", "collectives of a step: number, MiB on a chip")
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for model, config in CONFIGS.items():
        topologies = [topology for name, topology in entries() if name == config]
        kinds = {topology.partition("-")[0] for topology in topologies if int(topology.partition("-")[2]) > 8}
        for topology in sorted((t for t in topologies if t.partition("-")[0] in kinds), key=_order):
            if (one := fitting(config, topology)) is not None:
                traffic = ", ".join(
                    f"{kind} {found['count']} ({found['bytes'] / 2**20:,.0f})"
                    for kind, found in one["collectives"].items()
                )
                cells = (f"{one['bytes']['total'] / _GIB:.1f}", f"{one['cycles'] / 1e6:.1f}", traffic)
                yield f"| {model} | {topology} | {settings(one)} | {' | '.join(cells)} |"


def _order(topology: str) -> tuple[str, int]:
    kind, _, count = topology.partition("-")
    return kind, int(count)


def _figures(program: Entry) -> tuple[str, ...]:
    return (
        f"{program['cycles'] / 1e6:.1f}",
        f"{1000 * program['step_seconds']:.1f}",
        f"{program['estimated_utilization']:.0%}".replace("%", " %"),
        f"{program['bytes']['temporaries'] / _GIB:.2f}",
        f"{program['flops'] / program['ideal_flops']:.2f}",
        f"{program['compile_seconds']:.0f}",
    )


TABLES = {"memory": memory_table, "steps": step_table, "scale": scale_table}


def page(text: str) -> str:
    """The page with its tables made anew."""
    return MARK.sub(lambda found: found[1] + "\n".join(TABLES[found[2]]()) + "\n" + found[3], text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3].split(","))
    elif sys.argv[1:] == ["--write"]:
        for file in PAGES:
            file.write_text(page(file.read_text("utf-8")), "utf-8")
    else:
        sys.exit(__doc__)
