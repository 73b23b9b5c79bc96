"""What the speed benchmarks share besides measuring: command line, heap, tables, plots, and what is written.

Heap: the allocator of Linux gives large buffers back to the kernel after each call, and the page faults of getting them
anew then rule the times of large arrays. `--heap kept` (the default) starts the process again with memory kept.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.harness import Options, Output, Row
from experiments.common import cli, files, report

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "16000000000", "MALLOC_ARENA_MAX": "1"}
LIBRARIES = (
    "normjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "equinox",
    "dm-haiku",
    "torch",
    "libtpu",
    "jax-cuda12-pjrt",
)

AnyOptions = TypeVar("AnyOptions", bound=Options)


def start(options: type[AnyOptions], argv: Sequence[str] | None, script: str, description: str | None) -> AnyOptions:
    """Reads the command line; a process of its own (`argv` None) is started again if its heap is not as asked."""
    prog = f"python -m benchmarks.{Path(script).stem}"
    parsed = cli.parse(options, argv, prog=prog, description=(description or "").partition("\n")[0])
    if argv is None and sys.platform == "linux" and heap() != parsed.heap:
        environment = {k: v for k, v in os.environ.items() if k not in KEPT}
        os.execve(sys.executable, sys.orig_argv, environment | (KEPT if parsed.heap == "kept" else {}))
    if argv is None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # JAX leaves PyTorch some of a GPU's memory
    return parsed


def heap() -> str:
    """The heap of this process: "kept" or "stock"."""
    return "kept" if all(os.environ.get(name) == value for name, value in KEPT.items()) else "stock"


def environment() -> dict[str, Any]:
    """What a time depends on besides the code: device, platform, cores, versions, heap, and the date."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu" and Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        kind = models[0].partition(":")[2].strip() if models else kind
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if _installed(name)}
    return {
        "device": f"{device.platform}: {kind}",
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions | {"python": platform.python_version()},
        "heap": heap(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


# What a table can show: its heading, and how a row's number is written.
Shown = tuple[str, Callable[[Row], str]]
SHOWN: Mapping[str, Shown] = {
    "ratio": ("time, as a ratio to {peer}", lambda r: f"{r.ratio:.2f}"),
    "floors": ("time, in multiples of the bandwidth floor", lambda r: "" if r.floors is None else f"{r.floors:.1f}"),
    "milliseconds": ("milliseconds", lambda r: f"{1e3 * r.seconds:.3g}"),
    "temporary": (
        "temporary memory, in multiples of the input",
        lambda r: "" if r.temporary is None else f"{r.temporary:.2f}",
    ),
    "megabytes": (
        "temporary memory, MB",
        lambda r: "" if r.temporary is None else f"{r.temporary * size(r) / 1e6:.3g}",
    ),
    "error": (
        "largest difference from the first, relative to the largest value",
        lambda r: "" if r.error is None else f"{r.error:.0e}",
    ),
    "compile": ("seconds to compile", lambda r: "" if r.compile_seconds is None else f"{r.compile_seconds:.2f}"),
}


def size(row: Row) -> int:
    """Bytes of the input."""
    return math.prod(row.shape) * jnp.dtype(row.dtype).itemsize


def tables(rows: Sequence[Row], shown: Sequence[str | Shown]) -> str:
    """Markdown: for each mode and each number shown, a table of cases by contenders."""
    parts = []
    for mode in dict.fromkeys(r.mode for r in rows):
        for what in shown:
            heading, write = SHOWN[what] if isinstance(what, str) else what
            some = [r for r in rows if r.mode == mode]
            names = sorted(dict.fromkeys(r.contender for r in some), key="copy".__eq__)
            lines: dict[tuple, dict[str, str]] = {}
            for r in some:
                lines.setdefault((r.case, r.shape, r.dtype), {})[r.contender] = write(r)
            head = ["case", *names]
            body = [[label(*key), *(cells.get(name, "") for name in names)] for key, cells in lines.items()]
            parts.append(f"{mode}: {heading.format(peer=some[0].peer)}\n\n{report.table(head, body)}")
    return "\n\n".join(parts)


def label(case: str, shape: Sequence[int], dtype: str) -> str:
    """A row's name: case, shape, dtype if it is not the usual one.

    >>> label("layer", (8, 16), "bfloat16")
    'layer 8x16 bfloat16'
    """
    return " ".join([case, "x".join(map(str, shape)), *([] if dtype == "float32" else [dtype])])


def plot(rows: Sequence[Row], value: Literal["floors", "ratio"]) -> Figure:
    """A panel for each mode, a line for each case, a mark for each contender at its median."""
    modes = list(dict.fromkeys(r.mode for r in rows))
    names = list(dict.fromkeys(r.contender for r in rows if r.contender != "copy"))
    labels = list(dict.fromkeys(label(r.case, r.shape, r.dtype) for r in rows))
    figure = Figure(figsize=(1.5 + 5.5 * len(modes), 1.6 + 0.3 * len(labels)), layout="constrained")
    for ax, mode in zip(np.atleast_1d(figure.subplots(1, len(modes), sharey=True)), modes, strict=True):
        for k, name in enumerate(names):
            some = [r for r in rows if (r.mode, r.contender) == (mode, name) and getattr(r, value) is not None]
            at = [labels.index(label(r.case, r.shape, r.dtype)) for r in some]
            ours = name.startswith("normjax")
            marks = ax.plot(
                [getattr(r, value) for r in some], at, "D" if ours else "o", label=name, color=f"C{k}", ms=5
            )
            marks[0].set_zorder(3 if ours else 2)
        heading = SHOWN[value][0].format(peer=rows[0].peer)
        ax.set(title=mode, xlabel=heading, xscale="log", yticks=range(len(labels)), yticklabels=labels)
        ax.axvline(1, color="0.5", lw=1)
        ax.grid(alpha=0.3)
        plain(ax.xaxis)
    figure.axes[0].invert_yaxis()
    legend(figure)
    return figure


def legend(figure: Figure) -> None:
    """A legend of the first panel, beside all panels."""
    where: Any = "outside right"  # newer than matplotlib's own type of it
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc=where, fontsize=8)


def plain(axis: Axis) -> None:
    """Marks a logarithmic axis with 1, 2, 5, 10 rather than with powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


@dataclass
class Result:
    """What a benchmark leaves: rows (dataclasses), and whatever else it measured, to be shown and written."""

    rows: Sequence[Any]
    text: str
    figure: Figure | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def finish(result: Result, options: Output, argv: Sequence[str] | None, script: str) -> dict[str, Any]:
    """Prints the tables under the command that made them; writes JSON, tables and plot into --out. Returns the JSON."""
    name = Path(script).stem
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)])
    facts = {"command": command, **environment()}
    about = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    text = (
        f"`{command}`\n\n{facts['device']}, {facts['cores']} cores, heap {facts['heap']}, {facts['date'][:10]}; {about}\n\n"
        f"{result.text}\n"
    )
    print(text)
    content = facts | result.extra | {"rows": [asdict(row) for row in result.rows]}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        files.write(options.out / f"{name}.json", json.dumps(content, indent=1) + "\n")
        files.write(options.out / f"{name}.md", text)
        if result.figure:
            report.save(result.figure, options.out / f"{name}.png")
    return content
