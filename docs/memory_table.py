"""The tables of scaling.md: which mesh each of the paper's models takes on which machine, computed from shapes.

python docs/memory_table.py            # print them
python docs/memory_table.py --write    # put them into docs/scaling.md
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import AbstractMesh

from cft_jax.config import Config
from cft_jax.models.config import LoraSpec
from cft_jax.models.families import PUBLISHED
from cft_jax.models.memory import Batch, MemoryEstimate, estimate_memory
from cft_jax.sharding.mesh import AXES

PAGE = Path(__file__).with_name("scaling.md")
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# The paper's batch, in rows as long as its longest prompt with an answer.
BATCH = Batch(rows=Config().train.batch_size, length=96)
# Left for the head's tiles, collectives and what the compiler wants besides.
USABLE = 0.85


@dataclass(frozen=True)
class Machine:
    """Devices of one kind: how many, and how much memory each has, in GiB."""

    name: str
    devices: int
    memory: float


MACHINES = (
    Machine("v5e-1", 1, 16),
    Machine("v5e-8", 8, 16),
    Machine("v6e-8", 8, 32),
    Machine("v5p-8 (4 chips)", 4, 95),
    Machine("8×H100", 8, 80),
)


def estimate(model: str, sizes: tuple[int, int, int], *, full: bool, remat: str) -> MemoryEstimate:
    """Memory per device of one model on a mesh (data, fsdp, tensor), by LoRA or with all weights trained."""
    lora = Config().model.lora
    return estimate_memory(
        PUBLISHED[model],
        lora=None if full else LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.targets),
        dtype="bfloat16",
        param_dtype="float32" if full else "bfloat16",
        mesh=AbstractMesh(sizes, AXES),
        batch=BATCH,
        remat=remat,
    )


def choice(model: str, machine: Machine, *, full: bool) -> str:
    """The first that fits: all devices along `data`, along `fsdp`, the latter with recomputed activations."""
    count = machine.devices
    tried = [("data", "none"), *([("fsdp", "none")] if count > 1 else []), ("fsdp" if count > 1 else "data", "full")]
    for axis, remat in tried:
        sizes = (count, 1, 1) if axis == "data" else (1, count, 1)
        gib = estimate(model, sizes, full=full, remat=remat).total / 2**30
        if gib <= USABLE * machine.memory:
            return f"{axis}={count}{', remat' if remat == 'full' else ''}: {gib:.1f}"
    return "–"


def table(*, full: bool) -> Iterator[str]:
    """The rows of a table in Markdown."""
    yield f"| model | parameters | {' | '.join(machine.name for machine in MACHINES)} |"
    yield f"|---|---|{'---|' * len(MACHINES)}"
    for model in PUBLISHED:
        count = estimate(model, (1, 1, 1), full=full, remat="none").parameters
        cells = [choice(model, machine, full=full) for machine in MACHINES]
        yield f"| {model.split('/')[1]} | {count / 1e9:.2f} B | {' | '.join(cells)} |"


def page(text: str) -> str:
    """The page with its tables computed anew."""
    return MARK.sub(lambda found: found[1] + "\n".join(table(full=found[2] == "full")) + "\n" + found[3], text)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for name in ("lora", "full"):
            sys.stdout.write("\n".join([name, *table(full=name == "full"), ""]))
