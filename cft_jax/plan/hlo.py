"""What a compiled program costs, read off its HLO text: loop bodies count as often as they run.

XLA's own `cost_analysis` counts a loop's body once, and its `optimal_seconds` mean nothing for loops. The TPU's
compiler writes its estimate of each instruction's cycles into the text, and so it does the number of a loop's rounds.
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
# What stands for cycles where the compiler has no estimate (scatters that the sparse cores of v6e do).
_NO_ESTIMATE = 2**63 - 1
# Kernels of ours have no estimate in the text. By the compiler's final schedules of them on v6e (one bundle a cycle;
# rows of 96 tokens, 16 heads of 128: 2,262, 5,014, 1,378 and 2,034 bundles a row) they do so many of the operations
# that they state a cycle; what copies in and out take beyond that is left out, and other chips are taken to be alike.
_KERNEL_RATES = {
    "tree_attention": 44_500,
    "tree_attention_backward": 50_200,
    "head_rotation": 1_710,
    "head_rotation_backward": 2_320,
}
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_BITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: its result's type, what it does, the names of its operands, and the rest."""

    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> tuple[str, ...]:
        """Names of the computations that it calls under these attributes."""
        found = []
        for key, one, many in _CALLED.findall(self.attributes):
            if key in keys:
                found += [one] if one else [name.strip().removeprefix("%") for name in many.split(",")]
        return tuple(found)


@dataclass(frozen=True)
class Module:
    """The computations of a compiled program, by name; instructions by name."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that one device takes part in: how many, and the bytes that they span on it."""

    count: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """What running a computation takes on one device.

    Attributes:
      cycles: the compiler's estimate; 0 where it makes none. Kernels of ours count by their schedules.
      flops: additions and multiplications of matrix products and convolutions, of kernels what they say of themselves.
      collectives: by kind.
    """

    cycles: int = 0
    flops: int = 0
    collectives: Mapping[str, Traffic] = field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        kinds = {
            kind: Traffic(one.count + two.count, one.bytes + two.bytes)
            for kind in sorted(self.collectives.keys() | other.collectives.keys())
            for one, two in [(self.collectives.get(kind, Traffic()), other.collectives.get(kind, Traffic()))]
        }
        return Cost(self.cycles + other.cycles, self.flops + other.flops, kinds)

    def times(self, count: int) -> "Cost":
        """Of so many rounds."""
        kinds = {kind: Traffic(one.count * count, one.bytes * count) for kind, one in self.collectives.items()}
        return Cost(self.cycles * count, self.flops * count, kinds)


def cost_of(text: str) -> Cost:
    """The cost of a compiled program, from its HLO text (`jax.stages.Compiled.as_text()`).

    A loop whose number of rounds depends on data counts once; of a conditional the branch with the most cycles, or the
    most operations where the compiler gives no cycles.
    """
    module = parse(text)
    repeated = _repeated(module)

    @functools.cache
    def of_computation(name: str) -> Cost:
        instructions = module.computations.get(name, {})
        return sum((of_instruction(one, instructions) for one in instructions.values()), Cost())

    def of_instruction(one: Instruction, others: Mapping[str, Instruction]) -> Cost:
        found = _CYCLES.search(one.attributes)
        cycles = int(found[1]) if found and int(found[1]) != _NO_ESTIMATE else _kernel_cycles(one.attributes)
        own = Cost(cycles, _flops(one, others), {} if id(one) in repeated else _traffic(one, others))
        if one.opcode == "while":
            trips = _trip_count(one, module)
            rounds = sum(map(of_computation, one.called("body", "condition")), Cost()).times(trips or 1)
            return own + rounds
        if one.opcode == "conditional":
            branches = one.called("branch_computations", "true_computation", "false_computation")
            return own + max(map(of_computation, branches), key=lambda cost: (cost.cycles, cost.flops), default=Cost())
        if one.opcode in ("call", "fusion") or one.opcode.endswith("-start"):
            inner = sum(map(of_computation, one.called("calls", "to_apply")), Cost())
            # A fusion is estimated as a whole.
            return own + (Cost(0, inner.flops, inner.collectives) if cycles else inner)
        return own

    return of_computation(module.entry)


def _repeated(module: Module) -> set[int]:
    """Collectives, by `id`, that carry on with what another has begun.

    The compiler strings the pieces of one collective through several fusions, each of which names it whole.
    """
    seen, repeated = set(), set()
    for computation in module.computations.values():
        for one in computation.values():
            channel = _CHANNEL.search(one.attributes) if "chain_id=" in one.attributes else None
            if channel and channel[1] in seen:
                repeated.add(id(one))
            elif channel:
                seen.add(channel[1])
    return repeated


def parse(text: str) -> Module:
    """The computations of an HLO text.

    Raises:
      ValueError: it has no entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, None
    for line in text.splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found[3], is_root=bool(found[1]))
    if entry is None:
        raise ValueError("the HLO text has no ENTRY computation")
    return Module(computations, entry)


def _instruction(text: str, *, is_root: bool) -> Instruction:
    """What stands right of the equals sign: type, opcode(operands), attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    open_ = text.index("(", end)
    close = _closing(text, open_)
    inside = text[open_ + 1 : close]
    opcode = text[end:open_].strip()
    return Instruction(text[:end], opcode, tuple(_OPERAND.findall(inside)), inside, text[close + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _trip_count(loop: Instruction, module: Module) -> int | None:
    """How often a loop's body runs: as the compiler notes it, or by a condition that compares with a constant."""
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called("condition")[0]]
    root = next((one for one in condition.values() if one.is_root), None)
    if root is None or root.opcode != "compare":
        return None
    limits = [condition[name] for name in root.operands if name in condition]
    constants = [int(one.arguments) for one in limits if one.opcode == "constant" and one.arguments.isdigit()]
    return constants[0] if constants else None


def arrays(type_: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Element type and shape of each array of a type."""
    for kind, sizes in _ARRAY.findall(type_):
        yield kind, tuple(int(size) for size in sizes.split(",") if size)


def _bytes(type_: str) -> int:
    def bits(kind: str) -> int:
        found = _BITS.search(kind)
        return 8 if kind == "pred" or found is None else int(found[1])

    return sum(math.prod(shape) * bits(kind) for kind, shape in arrays(type_)) // 8


def _traffic(one: Instruction, others: Mapping[str, Instruction]) -> dict[str, Traffic]:
    """The bytes of a collective: of its operands or its result on this device, whichever are more."""
    kind = one.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return {}
    operands = sum(_bytes(others[name].type) for name in one.operands if name in others)
    # The result of a start names the operands too.
    result = _bytes(one.type) - (operands if one.opcode.endswith("-start") and one.type.startswith("(") else 0)
    return {kind: Traffic(1, max(operands, result))}


def _flops(one: Instruction, others: Mapping[str, Instruction]) -> int:
    if one.opcode == "dot":
        left = _shape(one.operands[0], others)
        contracted = math.prod(left[dim] for dim in _dims(one.attributes, "lhs_contracting_dims"))
        return 2 * contracted * _elements(one.type)
    if one.opcode == "convolution":
        return _convolution_flops(one, others)
    if one.opcode == "custom-call":
        return _kernel_flops(one.attributes)
    return 0


def _shape(name: str, others: Mapping[str, Instruction]) -> tuple[int, ...]:
    return next(arrays(others[name].type))[1]


def _elements(type_: str) -> int:
    return math.prod(next(arrays(type_))[1])


def _dims(attributes: str, key: str) -> tuple[int, ...]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", attributes)
    return tuple(int(dim) for dim in found[1].split(",") if dim) if found else ()


def _kernel_flops(attributes: str) -> int:
    """The operations that a Pallas kernel's author gives (`pl.CostEstimate`)."""
    found = re.search(r'"cost_estimate":(\{[^{}]*\})', attributes)
    return int(json.loads(found[1]).get("flops", 0)) if found else 0


def _kernel_cycles(attributes: str) -> int:
    name = re.search(r'op_name="[^"]*?(\w+)/pallas_call', attributes)
    rate = _KERNEL_RATES.get(name[1]) if name else None
    return 0 if rate is None else math.ceil(_kernel_flops(attributes) / rate)


def _convolution_flops(one: Instruction, others: Mapping[str, Instruction]) -> int:
    """As XLA counts them (HloCostAnalysis): positions of the window that fall on padding or between elements are none.

    The TPU's compiler writes matrix products as convolutions, batches of them as windows that meet each other once.
    """
    found = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert found is not None, one.attributes
    left, right, out = found.groups()
    left_shape, right_shape = (_shape(name, others) for name in one.operands[:2])
    out_shape = next(arrays(one.type))[1]
    window = dict(re.findall(r"(\w+)=([\w\-x_]+)", (re.search(r"\bwindow=\{([^}]*)\}", one.attributes) or [""] * 2)[1]))
    groups = {
        key: int(found[1]) if (found := re.search(rf"\b{key}=(\d+)", one.attributes)) else 1
        for key in ("feature_group_count", "batch_group_count")
    }
    features = left_shape[left.index("f")] // groups["feature_group_count"]
    batch = left_shape[left.index("b")] // groups["batch_group_count"]
    positions = 1
    spatial = sorted(label for label in right if label.isdigit())
    for index, label in enumerate(spatial):
        sizes = (left_shape[left.index(label)], right_shape[right.index(label)], out_shape[out.index(label)])
        values = {key: value.split("x")[index] for key, value in window.items()}
        positions *= _valid_positions(*sizes, values)
    return 2 * features * batch * right_shape[right.index("o")] * positions


def _valid_positions(size: int, kernel: int, out: int, window: Mapping[str, str]) -> int:
    """Pairs of an output and a window's element along one dimension that meet an element of the input."""
    stride, between, apart = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * apart - before
    return int(np.sum((at >= 0) & (at < (size - 1) * between + 1) & (at % between == 0)))
