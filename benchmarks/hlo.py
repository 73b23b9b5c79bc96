"""Reads the text of a compiled program (HLO, as `compiled.as_text()` gives it) into instructions and arrays."""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

SECTOR = 32  # bytes that a GPU fetches together
BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}

INSTRUCTION = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = ")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
TILE = re.compile(r"T\(([\d,]*)\)")
SPACE = re.compile(r"S\((\d+)\)")
NAMED = re.compile(r"%([\w.-]+)")


class Array(NamedTuple):
    """An array of a program: bits an element, sizes, axes from the fastest to the slowest, tile, and which memory."""

    bits: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.sizes)

    def cover(self, taken: Iterable[range] | None = None) -> float:
        """Bytes of the tiles (TPU) or sectors (GPU) that hold the elements taken, by default all of the array.

        The taken part of an array in a fast memory of a TPU counts as much as if it lay outside.
        """
        ranges = [range(n) for n in self.sizes] if taken is None else list(taken)
        tile = self.tile
        if not tile and taken is not None:
            tile = (max(1, SECTOR * 8 // max(self.bits, 1)),)
        units = dict(zip(self.order, reversed(tile), strict=False))
        found = math.prod(_touched(ranges[axis], units.get(axis, 1)) for axis in range(len(ranges))) * self.bits / 8
        return found if taken is None else min(found, self.cover())

    @property
    def outside(self) -> float:
        """Bytes in the memory outside of the chip: none, where the array lies in a fast memory."""
        return 0.0 if self.space else self.cover()


def _touched(taken: range, unit: int) -> int:
    """Elements of those units of an axis of which some element is taken."""
    if taken.step >= unit:
        return len(taken) * unit
    return (taken[-1] // unit - taken[0] // unit + 1) * unit if taken else 0


def arrays(text: str) -> list[Array]:
    """The arrays of a shape as HLO writes it.

    >>> pair = arrays("(bf16[5,200]{1,0:T(8,128)(2,1)}, f32[3]{0:T(1024)S(1)})")
    >>> [array.outside for array in pair]  # rows fill up to 8, columns to 256; the second lies in fast memory
    [4096.0, 0.0]
    """
    return [_array(*found) for found in ARRAY.findall(text)]


def _array(dtype: str, sizes: str, layout: str) -> Array:
    digits = re.search(r"\d+", dtype)
    bits = BITS[dtype] if dtype in BITS else int(digits[0]) if digits else 8
    dims = tuple(int(n) for n in sizes.split(",") if n)
    order = tuple(int(a) for a in layout.partition(":")[0].split(",") if a) or tuple(reversed(range(len(dims))))
    tile, space = TILE.search(layout), SPACE.search(layout)
    tiles = tuple(int(t) for t in tile[1].split(",") if t) if tile else ()
    return Array(bits, dims, order, tiles, int(space[1]) if space else 0)


@dataclass(frozen=True)
class Instruction:
    """A line of HLO: `name = shape opcode(operands), attributes`."""

    name: str
    opcode: str
    arrays: list[Array]
    operands: list[str]
    attributes: str
    root: bool

    def called(self, key: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.-]+)", self.attributes)
        return NAMED.findall(found[1]) if found else []

    @property
    def target(self) -> str:
        """What a custom call calls, "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation(dict[str, Instruction]):
    """The instructions of a computation by name, in the order of the program."""

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction that makes the result, or the tuple of results."""
        return next(one for one in self.values() if one.root)

    @functools.cached_property
    def results(self) -> list[Instruction]:
        """The instructions that make the results."""
        return [self[name] for name in self.root.operands] if self.root.opcode == "tuple" else [self.root]

    @functools.cached_property
    def users(self) -> Mapping[str, list[tuple[Instruction, int]]]:
        """For each instruction who uses it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self}
        for user in self.values():
            for k, operand in enumerate(user.operands):
                found[operand].append((user, k))
        return found

    def parameter(self, k: int) -> Instruction:
        """The parameter that stands for operand k."""
        return next(one for one in self.values() if one.opcode == "parameter" and one.attributes == str(k))

    def behind(self, name: str) -> Instruction:
        """The instruction that a name is a view of."""
        while self[name].opcode == "bitcast":
            name = self[name].operands[0]
        return self[name]


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for k in range(start, len(text)):
        depth += (text[k] == "(") - (text[k] == ")")
        if not depth:
            return k
    raise ValueError(f"no bracket closes the one in {text[start : start + 80]!r}")


def _instruction(line: str) -> Instruction | None:
    head = INSTRUCTION.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    opcode, inside = line[end:opening].strip(), line[opening + 1 : closing]
    given = opcode in ("constant", "parameter")
    attributes = inside if given else line[closing + 1 :]
    operands = [] if given else NAMED.findall(inside)
    return Instruction(head["name"], opcode, arrays(line[start:end]), operands, attributes, bool(head["root"]))


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one where it starts."""
    found: dict[str, Computation] = {}
    entry, here = "", Computation()
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            here = found.setdefault(head[2], Computation())
            entry = head[2] if head[1] else entry
        elif line.startswith(" ") and (one := _instruction(line)):
            here[one.name] = one
    if not entry:
        raise ValueError("no computation of this text is called ENTRY; pass what compiled.as_text() gives")
    return found, entry
