"""The cases of tests/test_accelerators.py, what is compiled for each, and the counts of tests/passes.md.

    python -m tests.passes          # writes passes.md anew: after a change of a program, or of a compiler's version

A count is that of `benchmarks.accelerators`: bytes that the compiled program moves over the bytes of x. A star marks what
moves more than its peer.
"""

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

from benchmarks import chips, forms
from experiments.common import files, report

TABLE = Path(__file__).with_suffix(".md")
CHIPS: tuple[str, ...] = ("v5e", "h200")
HEAD = ["row", "shape", "dtype", *(f"{chip} {mode}" for chip in CHIPS for mode in forms.MODES)]


class Case(NamedTuple):
    """One program of normjax, and that of its peer."""

    row: str
    shape: tuple[int, ...]
    dtype: str
    chip: str
    mode: forms.Mode

    @property
    def line(self) -> tuple[str, str, str]:
        return self.row, "x".join(map(str, self.shape)), self.dtype

    @property
    def column(self) -> str:
        return f"{self.chip} {self.mode}"

    @property
    def name(self) -> str:
        return " ".join([self.chip, *self.line, self.mode])


def cases() -> list[Case]:
    """Every row at its two shapes, both dtypes, both chips, forward and train; networks are trained only."""
    found = []
    for row, shapes in forms.SHAPES.items():
        for shape, dtype, chip, mode in itertools.product(shapes, forms.DTYPES, CHIPS, forms.MODES):
            if mode == "train" or row not in forms.NETWORKS:
                found.append(Case(row, shape, dtype, chip, mode))
    return found


@functools.cache
def accounts(case: Case) -> tuple[chips.Account, chips.Account]:
    """What the compiler says about normjax and about the peer."""
    ours, peer = forms.programs(case.row, case.shape, case.dtype, case.mode).values()
    return ours.on(case.chip), peer.on(case.chip)


def misses(ours: float, peer: float) -> bool:
    """Whether a count is above that of the peer, beyond what small arrays and roundings make."""
    return ours > 1.02 * peer + 0.05


@functools.cache
def stored() -> dict[tuple[str, ...], tuple[float, bool]]:
    """The counts of passes.md and whether they are starred, by row, shape, dtype and column."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLE.read_text().splitlines()
        if line[:1] == "|"
    ]
    head, _, *body = lines
    return {
        (*line[:3], column): (float(cell.rstrip("*")), cell.endswith("*"))
        for line in body
        for column, cell in zip(head[3:], line[3:], strict=True)
        if cell
    }


def main() -> None:
    """Compiles everything, and writes the counts."""
    chips.alone()
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for case in cases():
        print(case.name, flush=True)
        ours, peer = (account.passes for account in accounts(case))
        lines.setdefault(case.line, {})[case.column] = f"{ours:.2f}{'*' * misses(ours, peer)}"
    body = [[*line, *(cells.get(column, "") for column in HEAD[3:])] for line, cells in lines.items()]
    about = (
        f"Passes of normjax, by the compilers of the extra `aot`; written by `python -m tests.{Path(__file__).stem}`."
    )
    files.write(TABLE, f"{about}\n\n{report.table(HEAD, body)}\n")


if __name__ == "__main__":
    main()
