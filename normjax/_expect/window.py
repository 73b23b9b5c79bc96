"""The sum over a sliding window along one axis or several, as one linear operation with its own transpose.

A sum of shifted copies is a fast way to a wide window, and JAX's transpose of it a slow one: it pads and adds every
shift. But the transpose of a window sum is the window sum that leans the other way. So `slide` is a primitive that JAX
differentiates, transposes and batches as a whole, and that is written out only when it is compiled, for the platform.
Nothing here is a difference of running sums: that would cancel.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.experimental.jet import jet_rules, linear_prop
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax._expect.sizes import at_least
from normjax._expect.xla import GPUS, is_for_one_device

JOINT = 25  # elements of a window up to which a GPU takes its axes at once
DIRECT = 9  # widths up to this: `reduce_window` costs little more than a copy, and is the shortest to compile
Taps = int | tuple[float, ...]  # the weights of a window; a number is so many ones

Window = tuple[int, Taps, tuple[int, int]]  # axis, taps, padding

slide_p = Primitive("slide")


def slide(x: jax.Array, *windows: Window) -> jax.Array:
    """The sum over a window along each axis: of one, element i is the sum of taps[t] * x[i - padding[0] + t].

    Past the edges are zeros. Negative padding cuts.
    """
    return slide_p.bind(x, windows=windows)


def at_once(widths: Sequence[int]) -> bool:
    """Whether a GPU sums windows of these widths, one an axis, without an array in between."""
    return len(widths) == 1 or math.prod(widths) <= JOINT


def _width(taps: Taps) -> int:
    return taps if isinstance(taps, int) else len(taps)


def _abstract(x: ShapedArray, *, windows: tuple[Window, ...]) -> ShapedArray:
    shape = list(x.shape)
    for axis, taps, padding in windows:
        shape[axis] += sum(padding) - _width(taps) + 1
    return x.update(shape=tuple(shape), weak_type=False)


def _transpose(ct: jax.Array, x: object, *, windows: tuple[Window, ...]) -> list[jax.Array]:
    return [slide(ct, *(_turned(*window) for window in reversed(windows)))]


def _turned(axis: int, taps: Taps, padding: tuple[int, int]) -> Window:
    over = _width(taps) - 1
    return axis, taps if isinstance(taps, int) else taps[::-1], (over - padding[0], over - padding[1])


def _batch(args: tuple[jax.Array], dims: tuple[int], *, windows: tuple[Window, ...]) -> tuple[jax.Array, int]:
    (x,), (dim,) = args, dims
    return slide(x, *((axis + (dim <= axis), taps, padding) for axis, taps, padding in windows)), dim


def _one_by_one(form: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The form of one window, for all."""

    def apply(x: jax.Array, *, windows: tuple[Window, ...]) -> jax.Array:
        for axis, taps, padding in windows:
            x = form(x, axis=axis, taps=taps, padding=padding)
        return x

    return apply


def jointly(x: jax.Array, *, windows: tuple[Window, ...]) -> jax.Array:
    """For a GPU: small windows over all axes at once, since an array that is written and read costs more than additions."""
    box = all(
        isinstance(taps, int) and at_least(2 * x.shape[axis], 3 * taps, unknown=True) for axis, taps, _ in windows
    )
    if len(windows) == 1 or not box or not at_once([_width(taps) for _, taps, _ in windows]):
        return _one_by_one(reduced)(x, windows=windows)
    dims, pads = [1] * x.ndim, [(0, 0)] * x.ndim
    for axis, taps, padding in windows:
        dims[axis], pads[axis] = _width(taps), padding
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, dims, [1] * x.ndim, pads)


def shifted(x: jax.Array, *, windows: tuple[Window, ...]) -> jax.Array:
    """For a TPU: a small window as shifted copies, which it computes with what follows; a `reduce_window` stands alone."""
    (axis, taps, padding), *others = windows
    if others or not isinstance(taps, int) or taps > DIRECT:
        return _one_by_one(reduced)(x, windows=windows)
    return _shifted(_pad(x, axis, padding), axis, (1.0,) * taps, 1)


def reduced(x: jax.Array, *, axis: int, taps: Taps, padding: tuple[int, int]) -> jax.Array:
    """The form that the compiler can partition where the axis is sharded: it asks the neighbours for what it needs."""
    if not isinstance(taps, int):
        return _shifted(_pad(x, axis, padding), axis, taps, 1)
    before, after = padding
    if 0 < before < taps - 1 and 0 < after and not at_least(2 * x.shape[axis], 3 * taps, unknown=True):
        # In two parts, up to the element and behind it: for so wide a window the compiler would gather the axis.
        near = _direct(x, axis, before + 1, (before, after + before + 1 - taps))
        return near + _direct(x, axis, taps - before - 1, (-1, after))
    return _direct(x, axis, taps, padding)


def _direct(x: jax.Array, axis: int, taps: int, padding: tuple[int, int]) -> jax.Array:
    if taps == 1:  # XLA's simplifier forgets the padding of a window of one
        return _pad(x, axis, padding)
    dims, pads = [1] * x.ndim, [(0, 0)] * x.ndim
    dims[axis], pads[axis] = taps, padding
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, dims, [1] * x.ndim, pads)


def in_two_steps(x: jax.Array, *, axis: int, taps: Taps, padding: tuple[int, int]) -> jax.Array:
    """For one CPU: sums over m elements, and of every m-th of these; m + width / m additions instead of width."""
    if not isinstance(taps, int):
        return reduced(x, axis=axis, taps=taps, padding=padding)
    if taps <= DIRECT:
        return _direct(x, axis, taps, padding)
    length = x.shape[axis] + sum(padding) - taps + 1
    everything = at_least(taps, x.shape[axis] + max(padding), unknown=False)  # every window sees all of the axis
    if padding[0] >= 0 <= padding[1] and everything:
        whole = [length if i == axis else n for i, n in enumerate(x.shape)]
        return jnp.broadcast_to(jnp.sum(x, axis, keepdims=True), whole)
    m = min(range(2, DIRECT + 1), key=lambda m: m + taps // m + (3 + taps % m if taps % m else 0))
    many, rest = divmod(taps, m)
    before, after = padding
    near = lax.optimization_barrier(_direct(x, axis, m, (before, after - rest)))
    y = _shifted(near, axis, (1.0,) * many, m)
    if rest:
        y = y + _direct(x, axis, rest, (before - m * many, after))
    return y


def _pad(x: jax.Array, axis: int, padding: tuple[int, int]) -> jax.Array:
    return lax.pad(x, np.zeros((), x.dtype), [(*padding, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])


def _shifted(x: jax.Array, axis: int, taps: tuple[float, ...], step: int) -> jax.Array:
    """The weighted sum of shifted copies: of every element, the next at a distance of `step`, and so on."""
    length = x.shape[axis] - step * (len(taps) - 1)
    parts = [lax.slice_in_dim(x, step * i, step * i + length, axis=axis) for i in range(len(taps))]
    parts = [part if tap == 1 else x.dtype.type(tap) * part for part, tap in zip(parts, taps, strict=True)]
    return functools.reduce(jnp.add, parts)


def _lower_on_cpu(context: mlir.LoweringRuleContext, x: Any, **params: Any) -> Any:
    """Two steps for a program of one device; where an axis may be sharded, the form that can be partitioned."""
    form = _one_by_one(in_two_steps if is_for_one_device(context) else reduced)
    return mlir.lower_fun(form, multiple_results=False)(context, x, **params)


slide_p.def_impl(_one_by_one(reduced))
slide_p.def_abstract_eval(_abstract)
ad.deflinear2(slide_p, _transpose)
batching.primitive_batchers[slide_p] = _batch
jet_rules[slide_p] = functools.partial(linear_prop, slide_p)
mlir.register_lowering(slide_p, mlir.lower_fun(_one_by_one(reduced), multiple_results=False))
for platform in GPUS:
    mlir.register_lowering(slide_p, mlir.lower_fun(jointly, multiple_results=False), platform=platform)
mlir.register_lowering(slide_p, mlir.lower_fun(shifted, multiple_results=False), platform="tpu")
mlir.register_lowering(slide_p, _lower_on_cpu, platform="cpu")
