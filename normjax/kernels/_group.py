"""The arithmetic of groups of channels, in plain JAX: each is normalized over its positions, and its gradient taken.

An array is `[examples, positions, channels]`; its channels are in equal blocks, each normalized over all positions of an
example. A *part* is some whole blocks of one example, `[positions, width]`. Its arithmetic is two kinds of steps: sums over
the positions, which `pooled` adds up to sums of blocks, one number a channel; and maps over the elements. So a kernel goes
through a part in chunks (`_pallas_group.py`), and on a whole array the same functions are the plain twin. Symbols as in
`_block.py`, with E over the elements of a block.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from normjax._leaves import nan_if_infinite
from normjax.kernels._block import Given, How, affine, inverse_power

TPU_BYTES = 12 << 20  # of blocks in flight, in the 16 MB of fast memory that a program has without asking for more
TPU_CHUNK = 32768  # elements of a TPU's step
GPU_BYTES = 128 << 10  # of a share of x; the running programs read their shares again from the second-level cache
GPU_ROW = 32  # bytes that a GPU reads at once, which a row of a share has where there are as many channels
GPU_CHUNK = 8192  # elements of a GPU's step
PADDED = 1.15  # lanes over channels: XLA lays narrow arrays out otherwise, and would copy them for the kernel
WIDEST = 1024  # channels of a part: the sums of blocks take a square of so many


class Part(Protocol):
    """Whole blocks of channels of one example, and what lies beside each element."""

    @property
    def count(self) -> int:
        """Elements of a block."""
        ...

    def sums(self, f: Callable[..., tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
        """Each of what f gives for the elements, summed over the positions: `[1, width]` float32."""
        ...

    def pooled(self, sums: jax.Array) -> jax.Array:
        """The sums of the blocks, of those of their channels; each channel has that of its block."""
        ...

    def mapped(self, f: Callable[..., jax.Array]) -> jax.Array | None:
        """What f gives for the elements; None where it has been stored."""
        ...


def normalized(how: How, part: Part, eps: jax.Array, scale: Given, bias: Given) -> tuple[Given, Given, jax.Array]:
    """`(y, mean, var)` of a part of x; the statistics are `[1, width]`, the mean None where rows are not centred."""
    mean = part.pooled(*part.sums(lambda x: (x,))) / part.count if how.centre else None
    squares = part.pooled(*part.sums(lambda x: (jnp.square(_deviations(x, mean)),)))
    var = nan_if_infinite(squares / part.count, how.gain)
    r = inverse_power(eps + how.gain * var, how.power)
    y = part.mapped(lambda x: how.activated(affine(_deviations(x, mean) * r, scale, bias)).astype(how.dtype))
    return y, mean, var


def gradient(
    how: How,
    part: Part,
    mean: Given,
    var: jax.Array,
    eps: jax.Array,
    scale: Given,
    bias: Given,
    gmean: Given,
    gvar: Given,
) -> tuple[Given, jax.Array, jax.Array, jax.Array]:
    """`(dx, deps, dscale, dbias)` of a part of x, of the cotangent of y and, where there is one, that of x itself."""
    q = eps + how.gain * var
    r = inverse_power(q, how.power)

    def pulled(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        v = _deviations(x, mean)
        return (g if how.activation is None else how.pulled(affine(v * r, scale, bias), g)), v

    def products(x: jax.Array, g: jax.Array, *_: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        g, v = pulled(x, g)
        return g * v, g, v

    gv, g1, v1 = part.sums(products)
    dq = inverse_power(q, 1.0) * (-how.power * r * part.pooled(affine(gv, scale, None)))
    dvar = how.gain * dq if gvar is None else how.gain * dq + part.pooled(gvar)
    k = (2 / part.count) * dvar
    shift = jnp.zeros_like(r) if gmean is None else -part.pooled(gmean)
    if how.centre:
        shift = shift + part.pooled(affine(g1, scale, None)) * r + part.pooled(v1) * k

    def dx(x: jax.Array, g: jax.Array, *gsum: jax.Array) -> jax.Array:
        g, v = pulled(x, g)
        out = affine(g, scale, None) * r + v * k - shift / part.count
        return out + gsum[0] if gsum else out

    return part.mapped(dx), dq, gv * r, g1


def _deviations(x: jax.Array, mean: Given) -> jax.Array:
    return x if mean is None else x - mean


@dataclass(frozen=True)
class _Whole:
    """An example, all at once."""

    arrays: tuple[jax.Array, ...]  # [positions, channels] float32
    groups: int

    @property
    def count(self) -> int:
        return self.arrays[0].size // self.groups

    def sums(self, f: Callable[..., tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(a, 0, keepdims=True) for a in f(*self.arrays))

    def pooled(self, sums: jax.Array) -> jax.Array:
        blocks = jnp.sum(sums.reshape(self.groups, -1), 1, keepdims=True)
        return jnp.broadcast_to(blocks, (self.groups, sums.size // self.groups)).reshape(1, -1)

    def mapped(self, f: Callable[..., jax.Array]) -> jax.Array:
        return f(*self.arrays)


def forward(
    how: How, x: jax.Array, residual: Given, eps: jax.Array, scale: Given, bias: Given
) -> tuple[Given, None, Given, jax.Array]:
    """`(y, None, mean, var)` of x `[examples, positions, channels]`; the statistics are `[examples, 1, channels]`."""

    def one(x: jax.Array) -> tuple[Given, Given, jax.Array]:
        return normalized(how, _Whole((x.astype(jnp.float32),), how.groups), eps, scale, bias)

    y, mean, var = jax.vmap(one)(x)
    return y, None, mean, var


def backward(
    how: How,
    x: jax.Array,
    mean: Given,
    var: jax.Array,
    eps: jax.Array,
    scale: Given,
    bias: Given,
    g: jax.Array,
    gsum: Given,
    *statistics: Given,
) -> tuple[jax.Array, jax.Array, Given, Given]:
    """The gradient of `forward`: `(dx, deps, dscale, dbias)`, dx like x, the others summed over the examples, float32."""
    gmean, gvar = of_statistics(how, statistics)

    def one(x: jax.Array, mean: Given, var: jax.Array, gmean: Given, gvar: Given, *others: jax.Array) -> tuple:
        part = _Whole(tuple(a.astype(jnp.float32) for a in (x, *others)), how.groups)
        return gradient(how, part, mean, var, eps, scale, bias, gmean, gvar)

    dx, *parts = jax.vmap(one)(x, mean, var, gmean, gvar, g, *(() if gsum is None else (gsum,)))
    return dx.astype(x.dtype), *summed(how, parts, x.shape[2], scale is not None)


def summed(how: How, parts: list[jax.Array], channels: int, scaled: bool) -> tuple[jax.Array, Given, Given]:
    """`(deps, dscale, dbias)` of `[examples, 1, channels]` each; deps has each block as often as it has channels."""
    deps, dscale, dbias = (jnp.sum(p, 0) for p in parts)
    deps = jnp.sum(deps, 1, keepdims=True) * (how.groups / channels)
    return deps, dscale if scaled else None, dbias if how.biased else None


def of_statistics(how: How, given: Sequence[Given]) -> tuple[Given, Given]:
    """The cotangents of the mean and the variance; there is no mean where rows are not centred."""
    return (given[0], given[1]) if how.centre else (None, given[0])


@dataclass(frozen=True)
class Cut:
    """How an array `[examples, positions, channels]` is cut: a program takes `width` channels of `tall` examples."""

    tall: int  # examples, one after the other
    width: int  # whole blocks of channels
    chunk: int  # positions of a step


@functools.cache
def cut(target: str, shape: tuple[int, int, int], groups: int, itemsize: int) -> Cut | None:
    """The cut for a "gpu" or a "tpu"; None where its fast memory does not hold a part."""
    examples, positions, channels = shape
    size = channels // groups
    if target == "gpu":
        blocks = max(1, min(groups, GPU_ROW // (size * itemsize)))
        width = blocks * size
        if positions * width * itemsize > GPU_BYTES or width > WIDEST:
            return None
        wide, long = _power_of_2(width), _power_of_2(positions)
        return Cut(1, width, min(max(1, GPU_CHUNK // wide), long))
    fitting = [w for w in range(size, channels + 1, size) if channels % w == 0 and (w % 128 == 0 or w == channels)]
    width = fitting[0]
    lanes, rows = -(-width // 128) * 128, -(-positions // 16) * 16
    held = 6 * rows * lanes * itemsize  # backward: x, g and dx, each one being moved and one being worked on
    if held > TPU_BYTES or width > WIDEST or lanes > PADDED * width:
        return None
    few = [n for n in range(1, examples + 1) if examples % n == 0 and n * held <= TPU_BYTES // 4]
    return Cut(max(few, default=1), width, max(16, TPU_CHUNK // lanes // 16 * 16))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
