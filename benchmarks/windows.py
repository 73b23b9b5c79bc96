"""Windowed fields, k = 3 ... 63: normjax against average pooling, convolution and torch.

    python -m benchmarks.windows --out DIR
    python -m benchmarks.windows --kinds pooled --widths 5 15

Four kinds of window: over k x k positions with all channels pooled (divisive norm), over k x k positions of each channel
alone, along k channels (local response norm), along k features of a token. Every contender evaluates the same equation,
borders included; they differ in how they take the average over a window:

  normjax         `normjax.normalize`
  avg_pool        `flax.linen.avg_pool` over the whole window at once
  avg_pool axes   the same one axis after the other, which the average allows: the strong form
  conv            convolution with ones
  torch           `avg_pool`, or `LocalResponseNorm`; eager, channels first

A contender that takes longer than `--limit` has one turn, and is left out at larger widths.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

from benchmarks import harness, results
from benchmarks.harness import BOTH, FORWARD, Case, Contender, has, normal
from benchmarks.norms import last
from normjax import Normalizer, normalize

PEER = "avg_pool axes"
KINDS = {
    "pooled": lambda k: Normalizer(f"...:{k} c", f"...:{k} c", eps=1.0),
    "per channel": lambda k: Normalizer(f"...:{k}", f"...:{k}", eps=1.0),
    "along channels": lambda k: Normalizer(None, f"c:{k}", eps=2.0, gain=5e-4, power=0.75, border="zero"),
    "along features": lambda k: Normalizer(f"c:{k}", f"c:{k}", eps=1.0),
}
Average = Callable[[Any], Any]


@dataclass(frozen=True)
class Options(harness.Options):
    """What is timed.

    Attributes:
      kinds: which windows.
      widths: odd numbers.
      image: height and width of the images; at 32, a window of 63 is the whole image.
      modes: forward, forward+backward or both.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    widths: tuple[int, ...] = (3, 5, 7, 15, 31, 63)
    modes: tuple[str, ...] = (FORWARD, BOTH)
    image: int = 64


def equation(kind: str, average: Average, x: Any) -> Any:
    """The rows of KINDS written out; x may be an array of JAX or of PyTorch."""
    if kind == "along channels":
        return x / (2.0 + 5e-4 * average(x * x)) ** 0.75
    v = x - average(x)
    return v / (1.0 + average(v * v)) ** 0.5


# --- averages over windows ------------------------------------------------------------------------


def pooled(kind: str, k: int, by_axis: bool) -> Average:
    """`flax.linen.avg_pool`: over the positions of [n, h, w, c], or over the last axis."""
    zeros_count = kind == "along channels"

    def pool(x, window):
        return nn.avg_pool(x, window, padding="SAME", count_include_pad=zeros_count)

    def positions(x):
        return pool(pool(x, (k, 1)), (1, k)) if by_axis else pool(x, (k, k))

    def features(x):
        return pool(x[..., None], (1,) * (x.ndim - 2) + (k,))[..., 0]

    if kind == "pooled":
        return lambda x: positions(x.mean(-1, keepdims=True))
    return positions if kind == "per channel" else features


def convolved(kind: str, k: int) -> Average:
    """`lax.conv_general_dilated` with a kernel of ones, divided by how many elements each window has."""

    def ones(x, window, c):
        dims = ("NHWC", "HWIO", "NHWC")
        kernel = jnp.ones((*window, 1, c), x.dtype)
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=c, precision="highest"
        )

    def average(x, window):
        h, w, c = x.shape[1:]
        counts = ones(jnp.ones((1, h, w, 1), x.dtype), window, 1)
        return ones(x, window, c) / (np.prod(window) if kind == "along channels" else counts)

    def features(x):
        rows = x.reshape(-1, 1, x.shape[-1], 1)
        return average(rows, (1, k)).reshape(x.shape)

    if kind == "pooled":
        return lambda x: average(x.mean(-1, keepdims=True), (k, k))
    return (lambda x: average(x, (k, k))) if kind == "per channel" else features


def torch_layer(kind: str, k: int) -> Callable[[Any], Any]:
    """The equation in PyTorch: images [n, c, h, w], or [n, c]."""
    torch = harness.torch()
    avg_pool1d, avg_pool2d = torch.nn.functional.avg_pool1d, torch.nn.functional.avg_pool2d

    if kind == "along channels":
        return torch.nn.LocalResponseNorm(k, alpha=5e-4, beta=0.75, k=2.0)

    def average(x):
        if kind == "along features":
            return avg_pool1d(x[:, None], k, 1, k // 2, count_include_pad=False)[:, 0]
        x = x.mean(1, keepdim=True) if kind == "pooled" else x
        return avg_pool2d(x, k, 1, k // 2, count_include_pad=False)

    return functools.partial(equation, kind, average)


# --- contenders -----------------------------------------------------------------------------------


def timed(
    name: str, mode: str, call: Callable[[jax.Array], jax.Array], x: jax.Array, g: jax.Array, other=False
) -> Contender:
    """A JAX function of x as a contender."""

    def both(x, g):
        y, pull = jax.vjp(call, x)
        return {"y": y, "x": pull(g)[0]}

    if mode == FORWARD:
        return Contender(name, lambda x: {"y": call(x)}, (x,), other=other)
    return Contender(name, both, (x, g), other=other)


def ours(name: str, mode: str, normalizer: Normalizer, x: jax.Array, g: jax.Array, other: bool = False) -> Contender:
    """`normjax.normalize` as a contender."""
    return timed(name, mode, lambda x: normalize(x, normalizer).y, x, g, other)


def torch_contenders(kind: str, k: int, mode: str, x: jax.Array, g: jax.Array) -> Iterator[Contender]:
    """Eager PyTorch; compiled too on a GPU."""
    torch = harness.torch()

    device = "cpu" if harness.on_cpu() else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("note: this torch has no CUDA and is left out", file=sys.stderr)
        return
    arrays = [torch.from_numpy(np.array(a)).to(device) for a in (x, g)]
    if x.ndim == 4:
        arrays = [a.permute(0, 3, 1, 2).contiguous() for a in arrays]
    args = (arrays[0].requires_grad_(mode == BOTH), arrays[1])

    def call(layer, x, g):
        if mode == FORWARD:
            with torch.no_grad():
                return {"y": layer(x)}
        y = layer(x)
        return {"y": y.detach(), "x": torch.autograd.grad(y, x, g)[0]}

    layer = torch_layer(kind, k)
    forms = {"torch": layer} | ({"torch compiled": torch.compile(layer)} if device == "cuda" else {})
    for name, form in forms.items():
        yield Contender(name, functools.partial(call, form), args, last, torch=True)


def contenders(kind: str, k: int, mode: str, x: jax.Array, g: jax.Array) -> Iterator[Contender]:
    """Every way to take the average over windows of width k."""
    yield ours("normjax", mode, KINDS[kind](k), x, g)
    ways = {PEER: pooled(kind, k, by_axis=True), "conv": convolved(kind, k)}
    if not kind.startswith("along"):
        ways["avg_pool"] = pooled(kind, k, by_axis=False)
    for name, average in ways.items():
        yield timed(name, mode, functools.partial(equation, kind, average), x, g)
    if has("torch"):
        yield from torch_contenders(kind, k, mode, x, g)


def shape(kind: str, image: int, smoke: bool) -> tuple[int, ...]:
    """Of the input: 32 MB on a CPU, 256 MB (features: 512 MB) on an accelerator."""
    if kind == "along features":
        return (4, 16) if smoke else (8192, 1024) if harness.on_cpu() else (32768, 4096)
    if smoke:
        return 2, 6, 5, 8
    positions, c = (2**17, 64) if harness.on_cpu() else (2**19, 128)
    return positions // image**2, image, image, c


def cases(options: Options) -> Iterator[Case]:
    """One case at a time, widths ascending."""
    for kind in options.kinds:
        x, g = (normal(shape(kind, options.image, options.smoke), jnp.float32, seed) for seed in (0, 1))
        for mode in options.modes:
            for k in sorted(options.widths):
                passes = {FORWARD: 2, BOTH: 5}[mode]
                some = tuple(contenders(kind, k, mode, x, g))
                yield Case(f"{kind} {k}", mode, x, some, PEER, passes, group=kind)


def plot(rows: Sequence[harness.Row]) -> Figure:
    """Time against width: a row of panels for each mode, a panel for each kind."""
    kinds = list(dict.fromkeys(r.case.rpartition(" ")[0] for r in rows))
    modes = list(dict.fromkeys(r.mode for r in rows))
    names = list(dict.fromkeys(r.contender for r in rows if r.contender != "copy"))
    figure = Figure(figsize=(1 + 3.5 * len(kinds), 3.3 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(kinds), sharex=True, squeeze=False)
    for i, mode in enumerate(modes):
        for j, kind in enumerate(kinds):
            ax = panels[i, j]
            for n, name in enumerate(names):
                key = (mode, kind, name)
                some = [r for r in rows if (r.mode, r.case.rpartition(" ")[0], r.contender) == key]
                widths = [int(r.case.rpartition(" ")[2]) for r in some]
                ax.plot(
                    widths, [r.floors for r in some], "D-" if name == "normjax" else "o-", color=f"C{n}", label=name
                )
            ax.set(
                title=f"{kind}, {mode}", xscale="log", yscale="log", xticks=widths_of(rows), xlabel="width of window"
            )
            ax.set_xticklabels(widths_of(rows))
            ax.minorticks_off()
            results.plain(ax.yaxis)
            ax.grid(alpha=0.3)
        panels[i, 0].set_ylabel("time / bandwidth floor")
    results.legend(figure)
    return figure


def widths_of(rows: Sequence[harness.Row]) -> list[int]:
    return sorted({int(r.case.rpartition(" ")[2]) for r in rows})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables; returns what is written as JSON."""
    options = results.start(Options, argv, __file__, __doc__)
    rows = harness.compare(cases(options), options)
    text = results.tables(rows, ("ratio", "floors", "temporary"))
    return results.finish(results.Result(rows, text, plot(rows)), options, argv, __file__)


if __name__ == "__main__":
    main()
