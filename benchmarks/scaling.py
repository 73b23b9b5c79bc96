"""Cost of normjax against the width of a window (flat is best) and the size of the input (linear), and compile time.

    python -m benchmarks.scaling --out DIR

Width: all widths of one kind of window are contenders of one case, as ratios to width 3. Size: 1 to 256 MB, each size
beside its own copy pass, so that a linear cost is a flat number of floors. Compile time: tracing, lowering and compiling
one function that returns the output and all gradients; the least of several tries, since all else only adds to it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import normjax.linen
from benchmarks import harness, norms, results, windows
from benchmarks.harness import BOTH, FORWARD, Case, Contender
from experiments.common import report
from normjax import TABLE

PEER = norms.PEER
WIDTHS = (3, 5, 7, 15, 31, 63)
MEGABYTES = (1, 4, 16, 64, 256)
# The rows of TABLE that Flax has, as its layers.
FLAX = {
    "batch": lambda: flax.linen.BatchNorm(use_running_average=False, epsilon=norms.EPS),
    "layer": lambda: flax.linen.LayerNorm(reduction_axes=(1, 2, 3), epsilon=norms.EPS),
    "token": lambda: flax.linen.LayerNorm(epsilon=norms.EPS),
    "instance": lambda: flax.linen.InstanceNorm(epsilon=norms.EPS),
    "group": lambda: flax.linen.GroupNorm(32, epsilon=norms.EPS),
    "rms": lambda: flax.linen.RMSNorm(epsilon=norms.EPS),
}
TRIES = 3


@dataclass(frozen=True)
class Options(harness.Options):
    """What is timed.

    Attributes:
      parts: width, size, compile.
      megabytes: sizes of the input.
    """

    parts: tuple[str, ...] = ("width", "size", "compile")
    megabytes: tuple[int, ...] = MEGABYTES


def widths(options: Options) -> Iterator[Case]:
    """A case for each kind of window and mode; its contenders are the widths."""
    for kind, normalizer in windows.KINDS.items():
        shape = windows.shape(kind, 64, options.smoke)
        x, g = (harness.normal(shape, jnp.float32, seed) for seed in (0, 1))
        for mode in (FORWARD, BOTH):
            some = [windows.ours(f"k = {k}", mode, normalizer(k), x, g, other=True) for k in WIDTHS]
            yield Case(kind, mode, x, some, "k = 3", {FORWARD: 2, BOTH: 5}[mode])


def sizes(options: Options) -> Iterator[Case]:
    """A case for each row, size and mode: normjax against Flax, and a window, which Flax lacks."""
    for row in ("layer", "batch", "group", "divisive"):
        for mb in options.megabytes:
            rows = mb * 2**20 // 4096
            shape = (rows, 1024) if row == "layer" else (rows // 64, 32, 32, 64)
            if options.smoke:
                shape = (mb, 16) if row == "layer" else (mb, 4, 4, 64)
            x, g = (harness.normal(shape, jnp.float32, seed) for seed in (0, 1))
            for mode in (FORWARD, BOTH):
                passes = {FORWARD: 3, BOTH: 8} if row == "batch" else {FORWARD: 2, BOTH: 5}
                if row == "divisive":
                    some, peer = [windows.ours("normjax.linen", mode, TABLE["divisive"], x, g)], "normjax.linen"
                else:
                    both = (normjax.linen, flax.linen)
                    params = norms.parameters(row, x)
                    some, peer = [
                        norms.timed(lib.__name__, mode, norms.linen(lib, row, x), x, g, params, norms.statistics(row, x))
                        for lib in both
                    ], PEER  # fmt: skip
                yield Case(row, mode, x, some, peer, passes[mode])


# --- compiling ------------------------------------------------------------------------------------


def compile_seconds(module: Any, x: jax.ShapeDtypeStruct) -> float:
    """Seconds to compile a linen module's output and gradients, nothing cached."""
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = variables.get("params", {})

    def both(x, params, stats, g):
        def call(x, params):
            return module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

        y, pull, new = jax.vjp(call, x, params, has_aux=True)
        return y, pull(g), new

    jax.clear_caches()
    running = harness.Running(Contender("", both, (x, params, variables.get("batch_stats", {}), x)))
    assert running.compile_seconds is not None
    return running.compile_seconds


def compiling(options: Options) -> list[dict[str, Any]]:
    """For each row of TABLE: seconds with normjax, and with Flax where it has the row, in turns."""
    x = jax.ShapeDtypeStruct((8, 4, 4, 64) if options.smoke else (32, 32, 32, 64), jnp.float32)
    names = ["rms", "response"] if options.smoke else list(TABLE)
    found = []
    for name in names:
        ours, theirs = math.inf, math.inf
        for _ in range(1 if options.smoke else TRIES):
            ours = min(ours, compile_seconds(normjax.linen.Norm(name, use_running_average=False), x))
            theirs = min(theirs, compile_seconds(FLAX[name](), x)) if name in FLAX else theirs
        found.append({"row": name, "normjax": ours, "flax": theirs if name in FLAX else None})
    return found


def compile_table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each row of TABLE."""
    body = [
        [f["row"], f"{f['normjax']:.2f}", *(["", ""] if f["flax"] is None else
         [f"{f['flax']:.2f}", f"{f['normjax'] / f['flax']:.2f}"])] for f in found
    ]  # fmt: skip
    heading = "seconds to compile the output and all gradients"
    return f"{heading}\n\n{report.table(['row', 'normjax', PEER, 'ratio'], body)}"


# --- results --------------------------------------------------------------------------------------


def plot(width: Sequence[harness.Row], size: Sequence[harness.Row]) -> Figure:
    """Ratio to width 3 against width, and milliseconds against size; a panel for each that was measured."""
    draws = [draw for draw, rows in ((partial(_widths, rows=width), width), (partial(_sizes, rows=size), size)) if rows]
    figure = Figure(figsize=(1 + 5 * max(1, len(draws)), 4.2), layout="constrained")
    for k, draw in enumerate(draws):
        ax = figure.add_subplot(1, len(draws), k + 1)
        draw(ax)
        ax.minorticks_off()
        results.plain(ax.yaxis)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def _widths(ax: Axes, rows: Sequence[harness.Row]) -> None:
    for k, kind in enumerate(dict.fromkeys(r.case for r in rows)):
        for mode, style in ((FORWARD, "o--"), (BOTH, "D-")):
            some = [r for r in rows if (r.case, r.mode) == (kind, mode) and r.contender != "copy"]
            label = kind if mode == BOTH else None
            ax.plot(WIDTHS, [r.ratio for r in some], style, color=f"C{k}", label=label)
    ax.set(title="dashed: forward; solid: forward+backward", xlabel="width of window", ylabel="time / time at width 3")
    ax.set(xscale="log", yscale="log", xticks=WIDTHS, xticklabels=WIDTHS)


def _sizes(ax: Axes, rows: Sequence[harness.Row]) -> None:
    some = [r for r in rows if r.mode == BOTH and r.contender != "copy"]
    colours = {case: f"C{k}" for k, case in enumerate(dict.fromkeys(r.case for r in some))}
    for case, contender in dict.fromkeys((r.case, r.contender) for r in some):
        mine = [r for r in some if (r.case, r.contender) == (case, contender)]
        at, ms = [results.size(r) / 2**20 for r in mine], [1e3 * r.seconds for r in mine]
        style = "D-" if contender.startswith("normjax") else "o:"
        ax.plot(at, ms, style, color=colours[case], label=f"{case}, {contender}")
    ax.set(title=BOTH, xlabel="MB of input", ylabel="milliseconds", xscale="log", yscale="log")
    results.plain(ax.xaxis)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables; returns what is written as JSON."""
    options = results.start(Options, argv, __file__, __doc__)
    width = harness.compare(widths(options), options) if "width" in options.parts else []
    size = harness.compare(sizes(options), options) if "size" in options.parts else []
    compiled = compiling(options) if "compile" in options.parts else []
    text = [results.tables(width, ["ratio", "floors"]), results.tables(size, ["milliseconds", "floors"])]
    text += [compile_table(compiled)] if compiled else []
    result = results.Result([*width, *size], "\n\n".join(filter(None, text)), plot(width, size), {"compile": compiled})
    return results.finish(result, options, argv, __file__)


if __name__ == "__main__":
    main()
