"""Averages over a bound field, one linear step per axis, in the dtype of the argument: float32 or wider.

A field is a product of spans, so the order of the steps is free: whole axes first (they shrink the array), then
collectives over mapped axes, blocks, and windows last, of one element a block. Each average is a weighted sum over a sum of
weights, and the sums are combined across devices before the one division. The tests compare with one averaging matrix per
axis.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import Weights
from normjax._expect.binding import Plan, pooled_and_windowed
from normjax._expect.sharding import axis_size, local_blocks, partitioned, shards_behind, with_halo
from normjax._expect.sizes import as_number, is_known
from normjax._expect.window import slide
from normjax._expect.xla import barrier, reduction_order
from normjax.field import Span


def average(x: jax.Array, plan: Plan, weights: Weights | None = None) -> tuple[jax.Array, ArrayLike]:
    """E_F[x] and the sum of weights behind it, both broadcasting against x. Zero where there is no weight.

    x is zero at masked positions already (`zero_masked`), of the bound shape or of length 1 on axes outside the field.
    """
    if weights is None:
        count = counts(plan, x.dtype)
        safe = (np if isinstance(count, np.ndarray) else jnp).where(count > 0, count, 1)
        return total(x, plan) / safe.astype(x.dtype), count

    def divided(sums: jax.Array, weight: jax.Array) -> jax.Array:
        filled = weight > 0
        return jnp.where(filled, sums / jnp.where(filled, weight, 1).astype(x.dtype), 0)

    w, named = weights.value, {axis for axis, _ in plan.bound.spans}
    w = jnp.broadcast_to(w, [x.shape[i] if i in named else n for i, n in enumerate(w.shape)])
    if plan.border == "zero" and not plan.bound.pooled:
        # A masked element counts as a zero, like one past the edge: average what is pooled, then box it.
        pooled, windows = pooled_and_windowed(plan)
        weight = total(w, pooled)
        boxed = total(divided(total(x * w.astype(x.dtype), pooled), weight), windows)
        return boxed / counts(windows, x.dtype).astype(x.dtype), total(weight, windows)
    weight = total(w, plan)
    return divided(total(x * w.astype(x.dtype), plan), weight), weight


def total(x: jax.Array, plan: Plan) -> jax.Array:
    """The sum of x over the field around each element; axes summed whole keep length 1."""
    bound = plan.bound
    if bound.whole:
        for axes in reduction_order(bound.whole, x.shape):
            x = barrier(jnp.sum(x, axes, keepdims=True))
    for name, groups in bound.collectives:
        axis_size(name)
        x = lax.psum(x, name, axis_index_groups=groups and [list(g) for g in groups])
    rest = functools.partial(_window_total, spans=tuple(bound.by("window")), plan=plan)
    for axis, span in bound.by("blocks"):
        rest = functools.partial(by_blocks, jnp.sum, axis=axis, blocks=local_blocks(bound, axis, span), inside=rest)
    return rest(x)


def counts(plan: Plan, dtype: DTypeLike) -> np.ndarray | jax.Array:
    """What `total` of an array of ones is (under border "zero": as if ones stood past the edge too)."""
    bound = plan.bound
    real = np.finfo(dtype).dtype
    count, sizes, computed = np.ones((1,) * len(bound.shape)), [shards_behind(bound)], []
    for axis, span in bound.spans:
        length = 1 if axis is None else bound.shape[axis]
        if axis is None or not span.window:
            sizes.append(length // local_blocks(bound, axis, span) if axis is not None and span.blocks else length)
            continue
        taps = plan.taps(span)
        if plan.border == "zero":
            count = count * taps.sum()
        elif span.mapped is not None:  # a truncated window that crosses shards: known only to the collective
            return total(jnp.ones(bound.shape, real), plan)
        else:
            along = [length if i == axis else 1 for i in range(len(bound.shape))]
            if is_known(length):
                padded = np.pad(np.ones(length), plan.extent(span))
                count = count * np.reshape([(padded[i : i + len(taps)] * taps).sum() for i in range(length)], along)
            else:
                computed.append(_window_total(jnp.ones(along, real), [(axis, span)], plan))
    symbols = [size for size in sizes if not is_known(size)]
    if symbols:
        computed.append(as_number(symbols, real))
    return math.prod(computed, start=(count * math.prod(filter(is_known, sizes))).astype(real))


def by_blocks(
    reduce: Callable[..., jax.Array], x: jax.Array, axis: int, blocks: int, inside: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Reduces each block of an axis to one element, applies `inside`, and repeats each element over its block."""
    if x.shape[axis] == 0:
        return x

    def apply(x):
        length = x.shape[axis] // blocks
        split = x.reshape(*x.shape[:axis], blocks, length, *x.shape[axis + 1 :])
        small = jnp.expand_dims(inside(reduce(split, axis=axis + 1)), axis + 1)
        wide = (*small.shape[: axis + 1], length, *small.shape[axis + 2 :])
        return jnp.broadcast_to(small, wide).reshape(x.shape)

    return partitioned(apply, x, (axis,))


def _window_total(x: jax.Array, spans: Sequence[tuple[int, Span]], plan: Plan) -> jax.Array:
    """The (weighted) sum over a window along each of these axes, with zeros past the edge."""
    windows = []
    for axis, span in spans:
        (before, after), taps, length = plan.extent(span), plan.taps(span), x.shape[axis]
        if length == 0:
            continue
        if span.mapped is not None:
            x, left, right = with_halo(x, axis, before, after, span), 0, 0
        elif not is_known(length):
            left, right = before, after
        else:
            # A window is never wider than the axis on either side: what lies further is zero.
            left, right = min(before, length - 1), min(after, length - 1)
            taps = taps[before - left : len(taps) - (after - right)]
        weights = tuple(taps.tolist()) if plan.window == "gaussian" else len(taps)
        windows.append((axis, weights, (left, right)))
    return partitioned(lambda x: slide(x, *windows), x, tuple(axis for axis, _ in spans)) if windows else x
