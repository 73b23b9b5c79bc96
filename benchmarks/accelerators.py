"""TPU and GPU without either: what their compilers say that normjax and its peers move.

    python -m benchmarks.accelerators --out DIR
    python -m benchmarks.accelerators --rows layer batch --chips v5e

Each row of normalizers that a peer has, forward and as it is trained, inside of the fast memory of a TPU v5e and beyond it,
and two networks, are compiled ahead of time; nothing runs. A figure in *passes* is the bytes that the kernels of the
compiled program read and write, over the bytes of x: a copy takes 2. "train" of a layer is the output and all gradients,
where the gradient of the output is known only after the output is written, as in a network; of a network, all gradients of
the mean square of its output.

The figures are the same on every machine, for these versions of the compilers. They are no times: they count neither
arithmetic nor the time that it takes to start a kernel, and let the second cache of a GPU save nothing. Where a program has
a conditional they take its cheapest branch, and the worst case stands beside them.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import chips, forms, results
from benchmarks.forms import MODES, OURS, ROWS, SHAPES
from benchmarks.harness import Output
from experiments.common import cli, report

SMOKE = {2: (16, 128), 3: (2, 8, 128), 4: (2, 6, 8, 128)}  # by the rank of a row's shapes


@dataclass(frozen=True)
class Options(Output):
    """What is compiled.

    Attributes:
      rows: which normalizers and networks.
      chips: for which chips.
      dtypes: of the input.
      modes: forward, train or both.
    """

    rows: tuple[str, ...] = ROWS
    chips: tuple[str, ...] = ("v5e", "h200")
    dtypes: tuple[str, ...] = forms.DTYPES
    modes: tuple[forms.Mode, ...] = MODES


@dataclass(frozen=True)
class Row:
    """One program, as its compiler has it.

    Attributes:
      case: name of the row.
      contender: "normjax", or the peer.
      chip: what it is compiled for.
      mode: "forward" or "train".
      dtype: of x.
      shape: of x.
      passes: bytes moved over the bytes of x.
      worst: the same, where every conditional takes its costliest branch.
      kernels: how many are started.
      temporary: bytes of temporary memory over the bytes of x.
    """

    case: str
    contender: str
    chip: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    passes: float
    worst: float
    kernels: int
    temporary: float


def rows(options: Options) -> Iterator[Row]:
    """Compiles one program after the other."""
    for case in options.rows:
        for shape in [SMOKE[len(SHAPES[case][0])]] if options.smoke else SHAPES[case]:
            for dtype in options.dtypes:
                for mode in options.modes:
                    print(results.label(f"{case} {mode}", shape, dtype), file=sys.stderr, flush=True)
                    for name, program in forms.programs(case, shape, dtype, mode).items():
                        for chip in options.chips:
                            a = program.on(chip)
                            figures = (a.passes, a.worst, a.kernels, a.temporary)
                            yield Row(case, name, chip, mode, dtype, shape, *figures)


def tables(found: Sequence[Row]) -> str:
    """Markdown: a table for each chip and mode; in each cell normjax first, then the peer."""
    parts = []
    for chip, mode in dict.fromkeys((r.chip, r.mode) for r in found):
        cases: dict[str, list[Row]] = {}
        for r in found:
            if (r.chip, r.mode) == (chip, mode):
                cases.setdefault(results.label(r.case, r.shape, r.dtype), []).append(r)
        body = [[label, *line(*sorted(pair, key=lambda r: r.contender != OURS))] for label, pair in cases.items()]
        head = ["case", "normjax", "peer", "its passes", "ratio", "worst", "kernels", "temporaries"]
        parts.append(f"{chip}, {mode}: passes\n\n{report.table(head, body)}")
    return "\n\n".join(parts)


def line(ours: Row, peer: Row) -> list[str]:
    """The cells of a case."""
    both = (ours, peer)
    worst = f"{ours.worst:.2f}" if ours.worst > 1.001 * ours.passes else ""
    return [
        f"{ours.passes:.2f}",
        peer.contender,
        f"{peer.passes:.2f}",
        f"{ours.passes / peer.passes:.2f}",
        worst,
        ", ".join(str(r.kernels) for r in both),
        ", ".join(f"{r.temporary:.2f}" for r in both),
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables; returns what is written as JSON."""
    about = (__doc__ or "").partition("\n")
    options = cli.parse(Options, argv, prog="python -m benchmarks.accelerators", description=about[0])
    for row in options.rows:
        cli.pick(row, ROWS, "row")
    for chip in options.chips:
        if why := chips.missing(cli.pick(chip, chips.CHIPS, "chip")):
            cli.fail(why)
    chips.alone()
    found = list(rows(options))
    what = about[2].partition("\n\n")[2].strip()
    text = f"{what}\n\n{tables(found)}"
    return results.finish(results.Result(found, text), options, argv, __file__)


if __name__ == "__main__":
    main()
