"""What a compiled program moves between a chip and its memory, read off the text of its HLO.

A kernel reads its operands and writes its results. That is counted, in bytes, and nothing else: no time, no arithmetic.

* An operand counts once a kernel, by the part that the kernel reads: a slice counts the tiles (TPU) or the sectors of 32
  bytes (GPU) that it touches, a gather what it gathers, an update in place only what it overwrites.
* The body of a loop counts as often as it runs. Of the branches of a conditional one runs: `low` takes the cheapest, `high`
  the costliest.
* A custom call (a convolution of cuDNN, a product of cuBLAS, a kernel of Triton or Mosaic) counts operands and results.
* Arrays in the fast memory of a TPU (`S(1)` in a layout) are free, and a copy into or out of it counts once. The rows and
  columns that fill up a tile of a TPU count.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.hlo import Array, Computation, Instruction, computations

# Names, views and buffers: no kernel.
FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
    | {"opt-barrier", "add-dependency", "AllocateBuffer", "ConcatBitcast", "SliceBitcast", "Sharding"}
)
ENDS = ("-done", "-update")  # of what was started, and counted, elsewhere
# Read all of an operand, whatever part of their result is used.
WHOLE = frozenset(
    {"dot", "convolution", "reduce-window", "sort", "scatter", "dynamic-update-slice", "concatenate", "custom-call"}
)
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update
BRANCHES = ("branch_computations", "true_computation", "false_computation")
RANGE = re.compile(r"\[(\d+):(\d+)(?::(\d+))?\]")


@dataclass(frozen=True)
class Traffic:
    """What a program moves, and what it starts.

    Attributes:
      low: bytes, if every conditional takes its cheapest branch.
      high: bytes, if every conditional takes its costliest branch.
      kernels: with the cheapest branches, loops unrolled; copies between two memories of a chip are none.
      parts: bytes by instruction; a loop or a conditional is one of them.
    """

    low: float = 0.0
    high: float = 0.0
    kernels: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)

    def times(self, n: int) -> "Traffic":
        """What n runs move."""
        return Traffic(n * self.low, n * self.high, n * self.kernels)


def traffic(text: str) -> Traffic:
    """What a program moves, from the text that `compiled.as_text()` gives."""
    program, entry = computations(text)
    return Counting(program).run(entry)


class Counting:
    """Counts what the computations of one program move."""

    def __init__(self, program: Mapping[str, Computation]):
        self.program = program
        self.known: dict[tuple[int, str], float] = {}

    # --- programs -------------------------------------------------------------------------------------

    def run(self, name: str) -> Traffic:
        """A computation whose instructions are kernels, loops and conditionals."""
        here = self.program[name]
        found = {one.name: self.step(one, here) for one in here.values()}
        low, high = sum(t.low for t in found.values()), sum(t.high for t in found.values())
        parts = {name: t.low for name, t in found.items() if t.high}
        return Traffic(low, high, sum(t.kernels for t in found.values()), parts)

    def step(self, one: Instruction, here: Computation) -> Traffic:
        """One instruction of such a computation."""
        if one.opcode in FREE or one.target in FREE or one.opcode.endswith(ENDS):
            return Traffic()
        if one.opcode == "while":
            return self.run(one.called("body")[0]).times(self.trips(one))
        if one.opcode == "conditional":
            branches = [self.run(name) for key in BRANCHES for name in one.called(key)]
            cheapest = min(branches, key=lambda branch: branch.low)
            return Traffic(cheapest.low, max(branch.high for branch in branches), cheapest.kernels)
        if one.opcode in ("call", "async-start"):
            return self.run((one.called("to_apply") or one.called("calls"))[0])
        if one.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):  # results: from and to, in either order
            source, copy = here[one.operands[0]].arrays[0], one.arrays[0 if one.opcode == "copy-start" else 1]
            part = 1.0 if one.opcode == "copy-start" else _sliced(one, copy, source)
            moved = part * source.outside + copy.outside
            return Traffic(moved, moved)
        if one.opcode.endswith("-start"):
            raise ValueError(f"what {one.opcode} moves is not known: {one.name}")
        moved = self.reads(one, here) + self.writes(one, here)
        touched = [*one.arrays, *(array for operand in one.operands for array in here[operand].arrays)]
        return Traffic(moved, moved, int(any(array.elements > 1 for array in touched)))

    def trips(self, one: Instruction) -> int:
        """How often a loop runs: what the compiler notes, or the constant that the counter is compared with."""
        noted = re.search(r'known_trip_count"?:\{"n":"(\d+)"', one.attributes)
        condition = self.program[one.called("condition")[0]]
        constants = [i.attributes for i in condition.values() if i.opcode == "constant"]
        if not noted and not (len(constants) == 1 and constants[0].isdigit()):
            raise ValueError(f"how often {one.name} runs is not known: its condition has the constants {constants}")
        return int(noted[1] if noted else constants[0])

    # --- kernels --------------------------------------------------------------------------------------

    def reads(self, one: Instruction, here: Computation) -> float:
        """Bytes that a kernel reads. An array that is given twice is read once."""
        parts: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for k, operand in enumerate(one.operands):
            source = here.behind(operand).name
            parts[source] = parts.get(source, 0.0) + self.part(one, k, here)
            sizes[source] = sum(array.outside for array in here[operand].arrays)
        return sum(min(part, 1.0) * sizes[source] for source, part in parts.items())

    def part(self, user: Instruction, k: int, here: Computation) -> float:
        """The part of its operand k that an instruction reads to make all of its result."""
        if user.opcode == "fusion":
            inside = self.program[user.called("calls")[0]]
            return self.needed(inside.parameter(k), inside)
        if k == 0 and user.opcode in ("slice", "dynamic-slice", "gather"):
            return _sliced(user, user.arrays[0], here[user.operands[0]].arrays[0])
        return 0.0 if k == 0 and user.opcode in UPDATES else 1.0

    def needed(self, one: Instruction, inside: Computation) -> float:
        """The part of a value inside a fusion that its users read, all together."""
        key = id(inside), one.name
        if key not in self.known:
            parts = [self.used(user, k, inside) for user, k in inside.users[one.name]]
            self.known[key] = 1.0 if one.root else min(sum(parts), 1.0)
        return self.known[key]

    def used(self, user: Instruction, k: int, inside: Computation) -> float:
        """The part of its operand k that an instruction inside a fusion reads."""
        if k == 0 and user.opcode in UPDATES:
            return 0.0 if _in_place(user, inside) else 1.0
        return 1.0 if user.opcode in WHOLE else self.part(user, k, inside) * self.needed(user, inside)

    def writes(self, one: Instruction, here: Computation) -> float:
        """Bytes that a kernel writes; what is updated in place counts by the update."""
        if one.opcode == "custom-call":  # the workspace of a library's routine, in bytes, is no result
            return sum(a.outside for a in one.arrays if a.bits > 8 or not one.target.startswith("__cu"))
        if one.opcode != "fusion":
            return sum(_written(one, here, a) if one.opcode in UPDATES else a.outside for a in one.arrays)
        inside = self.program[one.called("calls")[0]]
        total = 0.0
        for result, array in zip(inside.results, one.arrays, strict=True):
            made = inside.behind(result.name)
            total += _written(made, inside, array) if _in_place(made, inside) else array.outside
        return total


def _sliced(user: Instruction, result: Array, array: Array) -> float:
    """The part of an array that a slice touches."""
    if user.opcode == "gather":
        return min(1.0, result.elements / array.elements)
    ranges = [range(int(a), int(b), int(step or 1)) for a, b, step in RANGE.findall(user.attributes)]
    taken = ranges if user.opcode.startswith("slice") else [range(n) for n in result.sizes]
    return array.cover(taken) / array.cover()


def _in_place(one: Instruction, inside: Computation) -> bool:
    """Whether an instruction of a fusion overwrites a part of a parameter, and is a result."""
    if one.opcode not in UPDATES or inside.behind(one.operands[0]).opcode != "parameter":
        return False
    return any(inside.behind(result.name) is one for result in inside.results)


def _written(update: Instruction, here: Computation, array: Array) -> float:
    """Bytes that an update in place writes."""
    given = here[update.operands[UPDATES[update.opcode]]].arrays[0]
    return min(given._replace(space=array.space).outside, array.outside)
