"""Batch, layer, group, instance and RMS norm: normjax against flax.linen, flax.nnx, equinox, haiku and torch.

    python -m benchmarks.norms --out DIR
    python -m benchmarks.norms --rows layer rms --dtypes float32

Every layer has a scale (and a bias, RMS norm but) in float32 and epsilon 1e-5, and gives an output of the dtype of its
input. "forward" is one function that returns the output, and batch norm's new running statistics; "forward+backward"
one function that returns the gradients of the input, the scale and the bias beside them. Equinox is vmapped over
examples laid out channels first, as its users do; torch is eager, on channels first and on its channels_last.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

import normjax.linen
import normjax.nnx
from benchmarks import harness, results
from benchmarks.harness import BOTH, FORWARD, Case, Contender, has, normal

EPS = 1e-5
PEER = "flax.linen"
CLASSES = {
    "layer": "LayerNorm",
    "rms": "RMSNorm",
    "batch": "BatchNorm",
    "group": "GroupNorm",
    "instance": "InstanceNorm",
}
IMAGES = ("batch", "group", "instance")
SHAPES = {  # of tokens, of images
    "cpu": ([(8192, 1024), (64, 512, 768)], [(128, 32, 32, 64), (32, 56, 56, 256)]),
    "accelerator": ([(32768, 4096), (64, 2048, 1024)], [(256, 32, 32, 256), (128, 56, 56, 256)]),
    "smoke": ([(16, 32)], [(4, 5, 6, 64)]),
}
# Relative to the largest value. In bfloat16 haiku and torch also sum the gradients of scale and bias in it.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
LOOSE = {"float32": {}, "bfloat16": {"scale": 1.0, "bias": 1.0}}

# An array, or its shape and dtype.
Shaped = jax.Array | jax.ShapeDtypeStruct
# A layer as a function: (x, params, stats) to (y, new stats); params are {"scale": [c], "bias": [c]}.
Layer = Callable[[jax.Array, dict[str, jax.Array], Any], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Options(harness.Options):
    """What is timed.

    Attributes:
      rows: which norms.
      dtypes: of the input.
      modes: forward, forward+backward or both.
    """

    rows: tuple[str, ...] = tuple(CLASSES)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = (FORWARD, BOTH)


# --- the libraries --------------------------------------------------------------------------------


def linen(library: Any, row: str, x: Shaped) -> Layer:
    """A layer of flax.linen or normjax.linen."""
    more = {"use_running_average": False} if row == "batch" else {}
    module = getattr(library, CLASSES[row])(epsilon=EPS, dtype=x.dtype, **more)

    def call(x, params, stats):
        y, new = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return y, new.get("batch_stats", {})

    return call


def nnx(library: Any, row: str, x: jax.Array) -> Layer:
    """A layer of flax.nnx or normjax.nnx, as a function: split outside, merged inside."""
    module = getattr(library, CLASSES[row])(x.shape[-1], epsilon=EPS, dtype=x.dtype, rngs=flax.nnx.Rngs(0))
    split: Any = flax.nnx.split(module)
    graph, variables = split

    def call(x, params, stats):
        given = {name: variables[name].replace(value) for name, value in {**params, **stats}.items()}
        module = flax.nnx.merge(graph, flax.nnx.State(given))
        y = module(x)
        return y, {name: getattr(module, name)[...] for name in stats}

    return call


def haiku(row: str, x: jax.Array) -> tuple[Layer, Any]:
    """A layer of Haiku, and its running statistics."""
    import haiku as hk

    make = {
        "layer": lambda: hk.LayerNorm(-1, True, True, eps=EPS),
        "rms": lambda: hk.RMSNorm(-1, eps=EPS),
        "batch": lambda: functools.partial(hk.BatchNorm(True, True, 0.99, eps=EPS), is_training=True),
        "group": lambda: hk.GroupNorm(32, eps=EPS),
        "instance": lambda: hk.InstanceNorm(True, True, eps=EPS),
    }[row]
    module = hk.transform_with_state(lambda x: make()(x))
    shapes, stats = jax.eval_shape(module.init, jax.random.key(0), x)
    names = {"scale": "scale", "offset": "bias"}

    def call(x, params, stats):
        theirs = {
            layer: {name: params[names[name]].reshape(s.shape).astype(s.dtype) for name, s in part.items()}
            for layer, part in shapes.items()
        }
        return module.apply(theirs, stats, None, x)

    return call, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)


def equinox(row: str, x: jax.Array) -> tuple[Layer, Any]:
    """A layer of Equinox for images laid out channels first, and its running statistics."""
    import equinox as eqx

    c, stats = x.shape[-1], None
    if row == "batch":
        module, stats = eqx.nn.make_with_state(eqx.nn.BatchNorm)(c, axis_name="n", eps=EPS, mode="batch")
    elif row == "layer":
        module = eqx.nn.LayerNorm(c, eps=EPS)
    elif row == "rms":
        module = eqx.nn.RMSNorm(c, eps=EPS, use_bias=False)
    else:
        module = eqx.nn.GroupNorm(32 if row == "group" else c, c, eps=EPS)

    def call(x, params, stats):
        layer = eqx.tree_at(lambda m: m.weight, module, params["scale"])
        if "bias" in params:
            layer = eqx.tree_at(lambda m: m.bias, layer, params["bias"])
        if row == "batch":
            y, stats = jax.vmap(layer, axis_name="n", in_axes=(0, None), out_axes=(0, None))(x, stats)
            return y.astype(x.dtype), stats
        for _ in range(1 if row in IMAGES else x.ndim - 1):
            layer = jax.vmap(layer)
        return layer(x), stats

    return call, stats


# --- contenders -----------------------------------------------------------------------------------


def last(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Images among the arrays, [n, c, h, w], laid out [n, h, w, c]."""
    arrays = {name: harness.array(value) for name, value in result.items()}
    return {name: np.moveaxis(a, 1, -1) if a.ndim == 4 else a for name, a in arrays.items()}


def parameters(row: str, x: Shaped) -> dict[str, jax.Array]:
    """A scale and, RMS norm but, a bias."""
    names = ("scale",) if row == "rms" else ("scale", "bias")
    return {name: normal(x.shape[-1:], jnp.float32, seed) for seed, name in enumerate(names, 2)}


def statistics(row: str, x: Shaped) -> dict[str, jax.Array]:
    """The running statistics of batch norm."""
    return {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])} if row == "batch" else {}


def timed(
    name: str, mode: str, layer: Layer, x: jax.Array, g: jax.Array, params: Any, stats: Any, flip=False
) -> Contender:
    """A JAX layer as a contender: one function of all arrays that returns all results."""

    def forward(x, params, stats):
        y, new = layer(x, params, stats)
        return {"y": y}, new

    def both(x, params, stats, g):
        y, pull, new = jax.vjp(lambda x, params: layer(x, params, stats), x, params, has_aux=True)
        dx, dparams = pull(g)
        return {"y": y, "x": dx, **dparams}, new

    args = (x, params, stats) if mode == FORWARD else (x, params, stats, g)
    return Contender(name, forward if mode == FORWARD else both, args, lambda out: last(out[0]) if flip else out[0])


def torch_contenders(row: str, mode: str, x: jax.Array, g: jax.Array, params: Any) -> Iterator[Contender]:
    """Eager PyTorch: channels first and, for images, channels_last; compiled too on a GPU."""
    torch = harness.torch()

    device = "cpu" if harness.on_cpu() else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("note: this torch has no CUDA and is left out", file=sys.stderr)
        return

    def tensor(a: jax.Array) -> Any:
        return torch.from_numpy(np.array(a.astype(jnp.float32))).to(device, getattr(torch, str(a.dtype)))

    c = x.shape[-1]
    module = {
        "layer": lambda: torch.nn.LayerNorm(c, EPS),
        "rms": lambda: torch.nn.RMSNorm(c, EPS),
        "batch": lambda: torch.nn.BatchNorm2d(c, EPS, 0.01),
        "group": lambda: torch.nn.GroupNorm(32, c, EPS),
        "instance": lambda: torch.nn.InstanceNorm2d(c, EPS, affine=True),
    }[row]().to(device)
    if row == "rms":  # its fast form wants the scale in the dtype of x
        module = module.to(getattr(torch, str(x.dtype)))
    leaves = {name: getattr(module, {"scale": "weight", "bias": "bias"}[name]) for name in params}
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(tensor(params[name]))

    def call(module, x, g):
        if mode == FORWARD:
            with torch.no_grad():
                return {"y": module(x)}
        y = module(x)
        dx, *dparams = torch.autograd.grad(y, (x, *leaves.values()), g)
        return {"y": y.detach(), "x": dx, **dict(zip(leaves, dparams, strict=True))}

    formats, read = {"torch": torch.contiguous_format}, dict
    arrays = [tensor(x), tensor(g)]
    if row in IMAGES:
        formats["torch channels_last"], read = torch.channels_last, last
        arrays = [a.permute(0, 3, 1, 2) for a in arrays]
    for name, format in formats.items():
        a, b = (array.contiguous(memory_format=format) for array in arrays)
        args = (a.requires_grad_(mode == BOTH), b)
        yield Contender(name, functools.partial(call, module), args, read, torch=True)
        if device == "cuda":
            yield Contender(f"{name} compiled", functools.partial(call, torch.compile(module)), args, read, torch=True)


def contenders(row: str, mode: str, x: jax.Array, g: jax.Array) -> Iterator[Contender]:
    """Every library's way to normalize x [..., c]; g is the gradient of the output."""
    params, stats = parameters(row, x), statistics(row, x)
    for name, wrap in (("linen", linen), ("nnx", nnx)):
        for library in (getattr(normjax, name), getattr(flax, name)):
            yield timed(f"{library.__name__}", mode, wrap(library, row, x), x, g, params, stats)
    if has("haiku"):
        layer, theirs = haiku(row, x)
        yield timed("haiku", mode, layer, x, g, params, theirs)
    if has("equinox"):
        layer, theirs = equinox(row, x)
        flip = row in IMAGES
        a, b = (jnp.moveaxis(v, -1, 1) if flip else v for v in (x, g))
        yield timed("equinox", mode, layer, a, b, params, theirs, flip)
    if has("torch"):
        yield from torch_contenders(row, mode, x, g, params)


def cases(options: Options) -> Iterator[Case]:
    """One case at a time, so that the arrays of one are gone before the next is made."""
    tokens, images = SHAPES["smoke" if options.smoke else "cpu" if harness.on_cpu() else "accelerator"]
    for row in options.rows:
        passes = {FORWARD: 3, BOTH: 8} if row == "batch" else {FORWARD: 2, BOTH: 5}
        for shape in images if row in IMAGES else tokens:
            for dtype in options.dtypes:
                x, g = normal(shape, dtype, 0), normal(shape, dtype, 1, mean=0.0)
                for mode in options.modes:
                    some = tuple(contenders(row, mode, x, g))
                    yield Case(row, mode, x, some, PEER, passes[mode], TOLERANCE[dtype], LOOSE[dtype])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables; returns what is written as JSON."""
    options = results.start(Options, argv, __file__, __doc__)
    rows = harness.compare(cases(options), options)
    text = results.tables(rows, ("ratio", "floors", "temporary", "error"))
    return results.finish(results.Result(rows, text, results.plot(rows, "floors")), options, argv, __file__)


if __name__ == "__main__":
    main()
