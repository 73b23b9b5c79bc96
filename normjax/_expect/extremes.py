"""Moments that are not means of a power: the largest |v| of a field, and the mean of the k largest (Hoffer et al. 2018).

A maximum goes axis by axis like a sum; the k largest need all elements of a field side by side, so windows are refused.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.jet import jet_rules

from normjax._expect.arrays import Weights
from normjax._expect.average import by_blocks, total
from normjax._expect.binding import Plan, pooled_and_windowed
from normjax._expect.sharding import axis_size, local_blocks, partitioned, shards_behind, with_halo
from normjax._expect.sizes import as_number, at_least, is_known, min_dim
from normjax.field import FieldError, Span


def _top_k_in_taylor_mode(primals, series, **params):
    """The rule that JAX lacks: the terms of the largest lie where they lie."""
    values, places = lax.top_k_p.bind(*primals, **params)
    terms = [jnp.take_along_axis(term, places, params["axis"]) for term in series[0]]
    return [values, places], [terms, [jnp.zeros_like(places)] * len(terms)]


jet_rules.setdefault(lax.top_k_p, _top_k_in_taylor_mode)


def largest(a: jax.Array, plan: Plan) -> jax.Array:
    """The maximum over the field of a non-negative array: the moment of order infinity.

    Its gradient is shared by the elements that hold the maximum, to rounding: compilers may compute `a` twice, so that no
    copy of it equals the maximum to the last bit.
    """
    pooled, windows = pooled_and_windowed(plan)
    if pooled.bound.spans:
        most = lax.stop_gradient(pooled_maximum(lax.stop_gradient(a), pooled))
        winner = (a >= most * (1 - 4 * jnp.finfo(a.dtype).eps)).astype(a.dtype)
        mean = total(a * (winner / jnp.maximum(total(winner, pooled), 1)), pooled)
        a = most + jnp.where(jnp.isfinite(mean), mean - lax.stop_gradient(mean), 0)
    for axis, span in windows.bound.by("window"):
        a = _window_maximum(a, axis, span, plan)
    return a


def pooled_maximum(a: jax.Array, plan: Plan) -> jax.Array:
    """The maximum over a field of whole axes and blocks; JAX does not differentiate it over mapped axes."""
    bound = plan.bound
    if bound.whole:
        a = jnp.max(a, bound.whole, keepdims=True, initial=0)
    for name, groups in bound.collectives:
        axis_size(name)
        a = lax.pmax(a, name, axis_index_groups=groups and [list(g) for g in groups])
    for axis, span in bound.by("blocks"):
        a = by_blocks(jnp.max, a, axis, local_blocks(bound, axis, span), lambda most: most)
    return a


def _window_maximum(a: jax.Array, axis: int, span: Span, plan: Plan) -> jax.Array:
    """The maximum over a window: of two, of four, of eight neighbours ...

    Not `reduce_window`: the compiler partitions its derivative (select_and_scatter) wrongly where the axis is sharded.
    """
    (before, after), length = plan.extent(span), a.shape[axis]
    if length == 0:
        return a
    if span.mapped is not None:
        a, padding = with_halo(a, axis, before, after, span), (0, 0)
    else:
        if is_known(length):
            before, after = min(before, length - 1), min(after, length - 1)
        padding = before, after

    def slide(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [padding if i == axis else (0, 0) for i in range(a.ndim)])
        held, width = 1, before + 1 + after
        while held < width:
            step = min(held, width - held)
            n = a.shape[axis]
            a = jnp.maximum(lax.slice_in_dim(a, 0, n - step, axis=axis), lax.slice_in_dim(a, step, n, axis=axis))
            held += step
        return a

    return slide(a) if span.mapped is not None else partitioned(slide, a, (axis,))


def mean_of_largest(a: jax.Array, k: int, plan: Plan, weights: Weights | None) -> jax.Array:
    """The mean of the k largest elements of the field, of a non-negative array."""
    bound = plan.bound
    if a.size == 0:
        return largest(a, plan)
    if not bound.pooled:
        raise FieldError(f'order=top({k}) takes whole axes and blocks; field "{bound.field}" has windows')
    size = bound.reach() * shards_behind(bound)
    if not at_least(size, k, unknown=True):
        holds = f'field "{bound.field}" holds {size} of shape {bound.shape}'
        raise FieldError(f"order=top({k}) needs {k} elements; {holds}")
    named = tuple(axis for axis, _ in bound.spans if axis is not None)
    mean = partitioned(functools.partial(_mean_of_largest, k=k, plan=plan), a, named, bound.whole)
    if weights is None:
        return mean
    number = total(jnp.broadcast_to(weights.valid, bound.shape).astype(a.dtype), plan)
    return jnp.where(number > 0, mean * k / jnp.clip(number, 1, k), 0)


def _mean_of_largest(a: jax.Array, k: int, plan: Plan) -> jax.Array:
    bound = plan.bound
    blocks = {axis: local_blocks(bound, axis, span) for axis, span in bound.by("blocks")}
    split, inner, inside = [], [], []  # a block axis becomes two: its blocks, and the inside of a block
    for axis, length in enumerate(a.shape):
        if axis in blocks:
            inside.append(len(split) + 1)
            split += [blocks[axis], length // blocks[axis]]
        else:
            split.append(length)
        if axis in blocks or axis in bound.whole:
            inner.append(len(split) - 1)
    parts = jnp.moveaxis(a.reshape(split), inner, range(-len(inner), 0))
    flat = parts.reshape(*parts.shape[: parts.ndim - len(inner)], -1)
    if not at_least(flat.shape[-1], k, unknown=False) and not is_known(flat.shape[-1]):
        flat = jnp.concatenate([flat, jnp.zeros((*flat.shape[:-1], k), flat.dtype)], -1)  # there may be fewer than k
    best = lax.top_k(flat, k if at_least(flat.shape[-1], k, unknown=False) else flat.shape[-1])[0]
    for name, groups in bound.collectives:
        if groups:
            raise FieldError("order=top(k) does not combine index groups of a mapped axis")
        # Each shard writes its own row and the sum gathers them: a gather whose result is the same on every shard.
        rows = jnp.zeros((axis_size(name), *best.shape), best.dtype).at[lax.axis_index(name)].set(best)
        rows = jnp.moveaxis(lax.psum(rows, name), 0, -2).reshape(*best.shape[:-1], -1)
        best = lax.top_k(rows, min(k, rows.shape[-1]))[0]
    number = min_dim(bound.reach() * shards_behind(bound), k)
    mean = jnp.expand_dims(jnp.sum(best, -1) / (k if is_known(number) else as_number([number], a.dtype)), inner)
    repeated = [split[i] if i in inside else n for i, n in enumerate(mean.shape)]
    return jnp.broadcast_to(mean, repeated).reshape([1 if i in bound.whole else n for i, n in enumerate(a.shape)])
