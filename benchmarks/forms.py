"""What is compiled ahead of time: the rows that a peer has, and two networks; with normjax's layers and with the peer's.

Batch, layer, RMS, group and instance norm have Flax's layers as peers. Windows and weights have none: there the peer is the
equation written by hand, windows one axis after the other, in float32 throughout, differentiated by JAX.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen
import jax
import jax.numpy as jnp
from jax import lax

import normjax.linen
from benchmarks import chips, norms
from benchmarks.chips import Spec
from normjax import TABLE, Normalizer, normalize
from normjax.weights import weight_standardization

Mode = Literal["forward", "train"]
MODES: tuple[Mode, ...] = ("forward", "train")
DTYPES = ("float32", "bfloat16")
OURS, FLAX, BY_HAND = "normjax", "flax", "by hand"

# Shapes inside of the fast memory of a TPU v5e (128 MB, for x and what else is held), and beyond it.
TOKENS = ((8192, 1024), (32768, 4096))
IMAGES = ((32, 56, 56, 128), (256, 56, 56, 256))
KERNELS = ((3, 3, 256, 256), (3, 3, 1024, 1024))  # no network has a kernel beyond it
SHAPES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "layer": TOKENS,
    "rms": TOKENS,
    "batch": IMAGES,
    "group": IMAGES,
    "instance": IMAGES,
    "divisive": IMAGES,
    "divisive of each channel": IMAGES,
    "response": IMAGES,
    "weight standardization": KERNELS,
    "network of layer norms": ((32, 512, 1024), (128, 512, 1024)),
    "network of batch norms": ((64, 56, 56, 128), (512, 56, 56, 128)),
}
ROWS = tuple(SHAPES)
NETWORKS = ROWS[-2:]
WINDOWS: Mapping[str, Normalizer] = {
    "divisive": TABLE["divisive"],
    "divisive of each channel": Normalizer("...:5", "...:5", eps=1.0),
    "response": TABLE["response"],
}

# A layer as a function: (x, params) to (y, others), whose others have no gradient.
Layer = Callable[..., tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Program:
    """A function to be compiled, and what it takes.

    Attributes:
      call: the function.
      specs: the shapes of its arguments.
      x: the array whose bytes are one pass.
    """

    call: Callable[..., Any]
    specs: tuple[Any, ...]
    x: Spec

    def on(self, chip: str) -> chips.Account:
        """What the compiler of a chip says about it."""
        return chips.passes(self.call, *self.specs, chip=chip, size_of=self.x)


def programs(row: str, shape: tuple[int, ...], dtype: str, mode: Mode) -> dict[str, Program]:
    """The programs of a row, by name: normjax and its peer.

    >>> {name: program.x.shape for name, program in programs("rms", (8, 128), "bfloat16", "train").items()}
    {'normjax': (8, 128), 'flax': (8, 128)}
    """
    x = Spec(shape, jnp.dtype(dtype))
    trained = stepped if row in NETWORKS else pulled
    form = trained if mode == "train" else Program
    return {name: form(layer, (x, params), x) for name, layer, params in layers(row, x)}


def pulled(layer: Layer, specs: tuple[Any, ...], x: Spec) -> Program:
    """A layer as it is trained: the gradient of its output is known only after the output is written."""
    y, _ = jax.eval_shape(layer, *specs)
    return Program(chips.train(layer, has_aux=True), (Spec(y.shape, y.dtype), *specs), x)


def stepped(layer: Layer, specs: tuple[Any, ...], x: Spec) -> Program:
    """All gradients of a network, whose loss is the mean square of its output."""

    def loss(x, params):
        y, new = layer(x, params)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), new

    return Program(jax.grad(loss, (0, 1), has_aux=True), specs, x)


def layers(row: str, x: Spec) -> Iterator[tuple[str, Layer, Any]]:
    """Name, layer and parameters of normjax and of the peer."""
    if row not in SHAPES:
        raise ValueError(f"row is {row!r}; accepted are {', '.join(ROWS)}")
    if row in WINDOWS:
        for name, form in ((OURS, normalized), (BY_HAND, by_hand)):
            yield name, functools.partial(form, WINDOWS[row]), {}
    elif row == "weight standardization":
        yield OURS, lambda w, params: (weight_standardization(w), None), {}
        yield BY_HAND, standardized, {}
    else:
        for name, library in ((OURS, normjax.linen), (FLAX, flax.linen)):
            if row in NETWORKS:
                yield name, *network(row, library, x)
            else:
                stats = norms.statistics(row, x)
                yield name, functools.partial(_applied, norms.linen(library, row, x), stats), norms.parameters(row, x)


def _applied(layer: norms.Layer, stats: Any, x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    return layer(x, params, stats)


# --- windows and weights --------------------------------------------------------------------------


def normalized(n: Normalizer, x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """By `normjax.normalize`."""
    return normalize(x, n).y, None


def by_hand(n: Normalizer, x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """The same equation with plain sums, windows one axis after the other."""
    z = x.astype(jnp.float32)
    if n.mean is not None:
        z = z - _average(n, z)
    return (z * (n.eps + n.gain * _average(n, z * z)) ** -n.power).astype(x.dtype), None


def _average(n: Normalizer, x: jax.Array) -> jax.Array:
    """The average over the field of the variance, of [n, h, w, c]."""
    width, (channels, positions) = 5, (n is WINDOWS["divisive"], n.mean is not None)
    x = x.mean(-1, keepdims=True) if channels else x
    for axis in (1, 2) if positions else (3,):
        window = tuple(width if k == axis else 1 for k in range(4))
        ones = jnp.ones([m if k == axis else 1 for k, m in enumerate(x.shape)], x.dtype)
        total, count = (lax.reduce_window(a, 0.0, lax.add, window, (1,) * 4, "SAME") for a in (x, ones))
        x = total / (width if n.border == "zero" else count)
    return x


def standardized(w: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """Weights of each output at mean 0 and variance 1, written by hand."""
    v = w.astype(jnp.float32)
    v = v - v.mean((0, 1, 2), keepdims=True)
    return (v * lax.rsqrt((v * v).mean((0, 1, 2), keepdims=True) + 1e-10)).astype(w.dtype), None


# --- networks -------------------------------------------------------------------------------------


class Tokens(flax.linen.Module):
    """Four times x + Dense(gelu(LayerNorm(x))).

    Attributes:
      layers: the module whose layer norm it is.
      dtype: of what is computed.
    """

    layers: Any
    dtype: Any

    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """An array like x, [..., c]."""
        for _ in range(4):
            y = flax.linen.gelu(self.layers.LayerNorm(dtype=self.dtype)(x))
            x = x + flax.linen.Dense(x.shape[-1], dtype=self.dtype)(y)
        return x


class Images(flax.linen.Module):
    """Twice relu(BatchNorm(Conv(x))), the convolutions of 3 x 3 without bias.

    Attributes:
      layers: the module whose batch norm it is.
      dtype: of what is computed.
    """

    layers: Any
    dtype: Any

    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """An array like x, [n, h, w, c]."""
        for _ in range(2):
            x = flax.linen.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = flax.linen.relu(self.layers.BatchNorm(use_running_average=False, dtype=self.dtype)(x))
        return x


def network(row: str, library: Any, x: Spec) -> tuple[Layer, Any]:
    """A network as a function of (x, params) to (y, new running statistics), and its parameters."""
    module = (Tokens if row == NETWORKS[0] else Images)(library, x.dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    stats = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables.get("batch_stats", {}))

    def call(x, params):
        y, new = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return y, new.get("batch_stats", {})

    return call, variables["params"]
