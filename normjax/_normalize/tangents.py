"""The tangent of the equation in the forms that `derivative.py` chooses among, by what is small beside x.

Whatever takes a pass of its own over x takes its own copy of the small statistics, by name: `_expect/xla.py` has the
legend. Everything is linear in the tangents of the arguments, so that JAX can transpose it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from normjax._expect import xla
from normjax._expect.average import counts, total
from normjax._expect.binding import pooled_and_windowed
from normjax._expect.expectation import OverFields
from normjax._expect.sharding import along_one_shard
from normjax._expect.sizes import as_number
from normjax._expect.xla import FOR_GRADIENT, FOR_MEAN, FOR_ROUNDING, FOR_SCALE, FOR_SUMS, distinct_copy
from normjax._leaves import inverse_power, nan_if_infinite
from normjax._normalize.moments import over_last
from normjax.field import Field
from normjax.theory import Normalizer, is_positive, smoothed


class Known(NamedTuple):
    """What the tangent is computed from: x, and what is small; None where there is none."""

    x: jax.Array
    mean: jax.Array | None
    rest: jax.Array | None
    moment: jax.Array
    eps: jax.Array | None = None
    scale: jax.Array | None = None

    def around(self, use: int | None = None, wide: Callable[[jax.Array], jax.Array] = lambda s: s) -> jax.Array:
        """The array around its mean as rounded, or around a copy for a use of its own; `wide` broadcasts against x."""
        return self.x if self.mean is None else self.x - wide(_copy(self.mean, use))

    def centred(self, use: int | None = None, wide: Callable[[jax.Array], jax.Array] = lambda s: s) -> jax.Array:
        """The array around its mean and the rest of it."""
        return self.around(use, wide) if self.rest is None else self.around(use, wide) - wide(self.rest)


def _copy(statistic: jax.Array, use: int | None) -> jax.Array:
    return statistic if use is None else distinct_copy(statistic, use)


class Tangents(NamedTuple):
    """The tangents of the arguments; None where there is no such argument."""

    x: jax.Array
    eps: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None


Parts = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]  # y, v, mean, moment
Outputs = tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array]  # y, mean, rest, moment, or their tangents


def divisor(n: Normalizer) -> Field:
    """The field B, which everything that has the rule has."""
    assert n.var is not None
    return n.var


def pooled(n: Normalizer, E: OverFields, dtype: DTypeLike, known: Known, d: Tangents) -> Outputs:
    """Tangents of (y, mean, rest, moment), linear in those of the arguments: dy = alpha dx + gamma v + beta."""
    moment, positive, exact = known.moment, is_positive(n, known.eps), known.x.dtype.itemsize > 2
    known, dx = known._replace(x=known.x.astype(moment.dtype)), d.x.astype(moment.dtype)
    x = known.x
    dmean, dm = _moments_of(n, E, known, dx, known.around(FOR_GRADIENT), known.around(FOR_ROUNDING) if exact else None)
    q, dq = smoothed(moment, n, known.eps), _smoothed_tangent(n, dm, d.eps)
    r = inverse_power(q, n.power, positive)
    alpha = r if known.scale is None else r * known.scale
    gamma = alpha * _relative(n, q, dq, positive)
    along = functools.partial(xla.broadcast_in_order, x=x)
    beta = None if dmean is None or n.keep_mean else -alpha * dmean
    if dmean is not None and beta is not None and not exact and d.bias is not None and d.bias.shape == beta.shape:
        dx, beta = dx - along(dmean), None  # XLA joins this to what makes dx, for 16 bits and means of a batch alone
    if n.keep_mean:
        dy = along(alpha) * dx + along(gamma) * x
        if d.scale is not None:
            dy = dy + along(r * d.scale) * x
    else:
        if d.scale is not None:
            gamma = gamma + r * d.scale
        # The rest goes with what is small: two differences of the size of x are too much for what XLA fuses into a sum.
        dy = along(alpha) * dx + along(gamma) * known.around(FOR_SCALE)
        if beta is not None and known.rest is not None:
            beta = beta - gamma * known.rest
    if d.bias is not None:
        beta = d.bias if beta is None else beta + d.bias
    if beta is not None:
        dy = dy + along(beta)
    return dy.astype(dtype), dmean, _still(known.rest), dm


def _still(rest: jax.Array | None) -> jax.Array | None:
    """The tangent of the rest; that of the mean is exact."""
    return None if rest is None else jnp.zeros_like(rest)


def _smoothed_tangent(n: Normalizer, dm: jax.Array, deps: jax.Array | None) -> jax.Array:
    """The tangent of q = eps + gain * m."""
    return n.gain * dm if deps is None else n.gain * dm + deps


def _relative(n: Normalizer, q: jax.Array, dq: jax.Array, positive: bool) -> jax.Array:
    """The relative change of q ** -power. It is multiplied by dq first: q ** (-power - 1) would underflow for large x."""
    return _slope(n, q, positive) * dq


def _slope(n: Normalizer, q: jax.Array, positive: bool) -> jax.Array:
    """The derivative of log(q ** -power), -power / q."""
    return -n.power * (1 / q if positive else inverse_power(q, 1.0))


def rowwise(n: Normalizer, E: OverFields, dtype: DTypeLike, known: Known, d: Tangents, *, large: bool) -> Outputs:
    """The tangents of `pooled`, where the products with scale are of the size of x.

    Without copies where x is not large: in a CPU's caches, what is shared costs less than what is computed twice.
    """
    copy = distinct_copy if large else lambda statistic, _: statistic
    exact = known.x.dtype.itemsize > 2
    known, d = known._replace(x=known.x.astype(known.moment.dtype)), d._replace(x=d.x.astype(known.moment.dtype))
    use = FOR_GRADIENT if large else None
    u, v = known.around(use), known.centred(use)
    dmean, dm = _moments_of(n, E, known, d.x, u, u if exact else None)
    m = copy(known.moment, FOR_GRADIENT)
    dy = _rowwise_output(n, known, d, v, m, dmean, dm, copy, lambda statistic: statistic)
    return dy.astype(dtype), dmean, _still(known.rest), dm


def rowwise_bare(n: Normalizer, E: OverFields, dtype: DTypeLike, known: Known, d: Tangents) -> Outputs:
    """The tangents of `rowwise` for large arrays: reshapes of the statistics would break the one pass of XLA:CPU."""
    shape, whole = known.x.shape, E.plan(divisor(n)).bound.whole
    kept = tuple(i for i in range(len(shape)) if i not in whole)

    def narrow(statistic: jax.Array | None) -> jax.Array | None:
        return None if statistic is None else statistic.reshape([shape[i] for i in kept])

    def wide(statistic: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(statistic, shape, kept)

    def average(z: jax.Array) -> jax.Array:
        return jnp.sum(z, whole) / as_number([shape[i] for i in whole], z.dtype)

    def restored(statistic: jax.Array) -> jax.Array:
        return statistic.reshape([1 if i in whole else n for i, n in enumerate(shape)])

    x, dx = known.x.astype(known.moment.dtype), d.x.astype(known.moment.dtype)
    moment = known.moment.reshape([shape[i] for i in kept])
    bare = known._replace(x=x, mean=narrow(known.mean), rest=narrow(known.rest), moment=moment)
    v = bare.around(FOR_GRADIENT, wide)
    if n.mean is not None:
        left = average(v)
        v = v - wide(xla.computed_again(left, jnp.zeros_like(left) if bare.rest is None else bare.rest))
    dmean = None if n.mean is None else average(dx)
    dm = 2 * average(v * dx)
    # The moment once more, from v: XLA:CPU then has the whole gradient of x in one pass.
    m = xla.computed_again(nan_if_infinite(average(v * v), n.gain), distinct_copy(moment, FOR_GRADIENT))
    dy = _rowwise_output(n, bare, d._replace(x=dx), v, m, dmean, dm, distinct_copy, wide)
    return dy.astype(dtype), None if dmean is None else restored(dmean), _still(known.rest), restored(dm)


def _rowwise_output(
    n: Normalizer,
    known: Known,
    d: Tangents,
    v: jax.Array,
    m: jax.Array,
    dmean: jax.Array | None,
    dm: jax.Array,
    copy: Callable[[jax.Array, int], jax.Array],
    wide: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The tangent of y, given v, the moment m and the tangents of both statistics; `wide` broadcasts against x."""
    power = functools.partial(inverse_power, positive=is_positive(n, known.eps))
    q, dq = smoothed(m, n, known.eps), _smoothed_tangent(n, dm, d.eps)
    r = power(q, n.power)
    # Signs go with what is small, so that no copy of the cotangent is made for them.
    dy = wide(r) * d.x + (known.x if n.keep_mean else v) * wide(r * _relative(n, q, dq, is_positive(n, known.eps)))
    if dmean is not None and not n.keep_mean:
        dy = dy + wide(-r * dmean)
    if known.scale is not None:
        dy = dy * copy(known.scale, FOR_GRADIENT)
    if d.scale is not None:
        r = power(smoothed(copy(known.moment, FOR_SCALE), n, known.eps), n.power)
        around = known.x if n.keep_mean else known.centred(FOR_SCALE if copy is distinct_copy else None, wide)
        dy = dy + around * wide(r) * d.scale
    if d.bias is not None:
        dy = dy + d.bias
    return jnp.broadcast_to(dy, known.x.shape)


def windowed(n: Normalizer, E: OverFields, dtype: DTypeLike, known: Known, d: Tangents) -> Outputs:
    """The tangents of `pooled`, where the array is pooled first and the windows are windows of small maps.

    The windows stand between the sums over x and the gradient of x, so that each sum has its own copies. What is small is
    multiplied before it meets a sum, and copied, so that no sum is written out in one pass with constants of its size.
    """
    plan = E.plan(divisor(n))
    mean, moment, scale, whole = known.mean, known.moment, known.scale, plan.bound.whole
    pool, slide = (functools.partial(total, plan=part) for part in pooled_and_windowed(plan))
    count = counts(plan, moment.dtype).astype(moment.dtype)
    known, dx = known._replace(x=known.x.astype(moment.dtype)), d.x.astype(moment.dtype)
    x = known.x
    q, positive = smoothed(moment, n, known.eps), is_positive(n, known.eps)
    r = inverse_power(q, n.power, positive)
    slope = _slope(n, q, positive)

    def divided(use: int) -> jax.Array:
        return x if n.keep_mean else known.centred(use)

    def scaled(term: jax.Array, use: int) -> jax.Array:
        return term if scale is None else term * distinct_copy(scale, use)

    seen = pool(known.centred(FOR_GRADIENT) * dx)
    around = None if mean is None else slide(pool(dx))
    dmean = None if around is None else around / count
    if mean is not None and around is not None:
        # The sum of v from that of x, which the mean has taken already: as exact as the mean.
        v = pool(x) - as_number([x.shape[i] for i in whole], mean.dtype) * mean
        seen = seen - around * distinct_copy(v / count, FOR_GRADIENT)
    within = slide(seen)
    dm = 2 * within / count
    inner = distinct_copy(2 * n.gain * slope / count, FOR_GRADIENT) * within
    inner = distinct_copy(r, FOR_GRADIENT) * (inner if d.eps is None else inner + slope * d.eps)
    dy = scaled(dx, FOR_GRADIENT) * r + scaled(divided(FOR_SUMS), FOR_SUMS) * inner
    if around is not None and not n.keep_mean:
        row = None if scale is None else distinct_copy(scale, FOR_MEAN)
        dy = dy + _outer(distinct_copy(-r / count, FOR_MEAN) * around, row, x, whole)
    if d.scale is not None:
        dy = dy + divided(FOR_SCALE) * distinct_copy(r, FOR_SCALE) * d.scale
    if d.bias is not None:
        dy = dy + d.bias
    return dy.astype(dtype), dmean, None, dm


def _outer(small: jax.Array, scale: jax.Array | None, x: jax.Array, whole: tuple[int, ...]) -> jax.Array:
    """The product small * scale, in the shape of x.

    By rows and columns where that can be: the transpose, a sum over the last axes, takes XLA:CPU twice as long otherwise.
    """
    kept = x.ndim - len(whole)
    rows = math.prod(x.shape[:kept])
    flat = whole == tuple(range(kept, x.ndim)) and along_one_shard(x, tuple(range(x.ndim))) and small.size == rows
    if scale is None or not flat or math.prod(scale.shape[:kept]) != 1:
        return jnp.broadcast_to(small if scale is None else small * scale, x.shape)
    row = jnp.broadcast_to(scale, (1,) * kept + x.shape[kept:]).reshape(1, -1)
    return (lax.broadcast_in_dim(small.reshape(-1), (rows, row.size), (0,)) * row).reshape(x.shape)


def _moments_of(
    n: Normalizer, E: OverFields, known: Known, dx: jax.Array, u: jax.Array, same: jax.Array | None
) -> tuple[jax.Array | None, jax.Array]:
    """Tangents of the mean and of the moment; u is the array around its mean, `same` another copy, None for 16 bits."""
    a, b = n.mean, divisor(n)
    if a is None:
        return None, 2 * E(u * dx, b)
    dmean = E(dx, a)
    if a != b:
        return dmean, 2 * E(u * (dx - dmean), b)
    dm = E(u * dx, b)
    if same is not None:
        # E[v dv] without a chained reduction. E[u] is what rounding left of the mean: not small beside the v of a small
        # field, or where the mean is large.
        rest = known.rest
        if rest is None:
            rest = E(same, b)
        elif over_last(E.plan(b).bound.whole, u.ndim):
            rest = xla.computed_again(E(same, b), rest)
        dm = dm - rest * dmean
    return dmean, 2 * dm
