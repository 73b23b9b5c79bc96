"""Mean and central moment over whole axes, in the passes over x that suit each platform, as accurate as two everywhere.

Beside the mean comes its rest, what rounding left of it in E[x - mean]: with v = (x - mean) - rest, no digit of v is lost
where the mean is large, and E[v] is zero. Three forms, chosen when a program is lowered for its platform:

    two passes  The mean, then the moment m around it and, off the CPU, the rest e = E[x - mean], with m less e ** 2.
    pivoted     One pass around p, the mean of every 16th element or so: e = E[x - p], mean = p + e, m = E[(x - p) ** 2] -
                e ** 2. With k of n elements in p, (p - mean) ** 2 <= (n / k) m by Cauchy-Schwarz, so that sums of relative
                error d make a relative error of m of at most 3 d (1 + n / k), whatever the data.
    guarded     One pass, m = E[x ** 2] - mean ** 2, where mean ** 2 <= 4 m in every field: then E[x ** 2] <= 5 m, and the
                error of m is at most 15 d. Where it fails in one field, a second pass over x.

XLA computes the sums of one pass together, and on a TPU with the product of matrices that makes x.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from normjax._expect.arrays import statistics_dtype
from normjax._expect.average import by_blocks
from normjax._expect.expectation import OverFields
from normjax._expect.sharding import along_one_shard, local_blocks
from normjax._expect.sizes import as_number, at_least, is_known
from normjax._expect.xla import FOR_ROUNDING, GPUS, barrier, distinct_copy, is_for_one_device, reduction_order
from normjax.theory import Normalizer

FAST_MEMORY = 7 * 2**24  # bytes, 7/8 of what a TPU v5e keeps on the chip: a second pass over no more costs no traffic
SPLIT = 2**11  # elements from which it pays on a CPU to sum x and its squares beside each other, and to look at both
COLUMNS = 2**13  # sums that a GPU takes side by side
SHARE = 16  # one in so many elements makes the pivot, but
LEAST = 16  # no fewer than these, if there are as many: one alone may lie three deviations from the mean

moments_p = Primitive("moments")
moments_p.multiple_results = True
Statistics = tuple[jax.Array | None, jax.Array | None, jax.Array]  # mean, rest, moment


def of_field(x: jax.Array, n: Normalizer, E: OverFields, differentiated: bool) -> Statistics:
    """Mean, rest and moment of a row of order 2, which is `differentiated` with these statistics or not.

    None for a rest that nothing is computed for, or that is nothing beside the rounding of an x of 16 bits. The moment is
    infinite where it has overflowed.
    """
    assert n.var is not None
    bound = E.plan(n.var).bound
    if n.mean != n.var or not bound.whole or not bound.pooled or bound.collectives or 0 in x.shape:
        x = x.astype(statistics_dtype(x.dtype))
        mean = None if n.mean is None else E(x, n.mean)
        return mean, None, E(x if mean is None else x - mean, n.var, 2)
    mean, rest, moment = moments_p.bind(x, axes=bound.whole, differentiated=differentiated, exact=n.keep_mean)
    for axis, span in bound.by("blocks"):  # of a group from those of its channels
        blocks = local_blocks(bound, axis, span)
        average = functools.partial(by_blocks, jnp.mean, axis=axis, blocks=blocks, inside=lambda of_block: of_block)
        centre = average(mean)
        apart = (mean - centre) + rest
        mean, rest = centre, average(apart)
        moment = average(moment) + average((apart - rest) ** 2)
    return mean, rest if x.dtype.itemsize > 2 else None, moment


def over_last(axes: tuple[int, ...], ndim: int) -> bool:
    """Whether the average is over the last axis alone, where the CPU leaves the rest to those who average x again."""
    return axes == (ndim - 1,)


def two_passes(x: jax.Array, axes: tuple[int, ...], corrected: bool, mean: jax.Array | None = None) -> list[jax.Array]:
    """The mean, unless it is known, then the moment around it; `corrected` by what rounding left of the mean."""
    x = x.astype(statistics_dtype(x.dtype))
    mean = _mean(x, axes) if mean is None else mean
    v = x - mean
    m = _mean(v * v, axes)
    if not corrected:
        return [mean, jnp.zeros_like(mean), m]
    rest = _mean(x - distinct_copy(mean, FOR_ROUNDING), axes)
    return [mean, rest, jnp.maximum(m - rest * rest, 0)]


def pivoted(x: jax.Array, axes: tuple[int, ...]) -> list[jax.Array]:
    """Both moments in one pass around a pivot; the part that makes it is cut out before it is cast."""
    work = statistics_dtype(x.dtype)
    pivot = _mean(_part(x, axes).astype(work), axes)
    u = x.astype(work) - pivot
    rest, square = _side_by_side([u, u * u], axes)
    mean = pivot + rest
    return [mean, (pivot - mean) + rest, jnp.maximum(square - rest * rest, 0)]


def guarded(x: jax.Array, axes: tuple[int, ...], flat: bool = False) -> list[jax.Array]:
    """Both moments in one pass around zero; in a second one where a mean is beyond two deviations.

    `flat` sums neighbouring axes as one.
    """
    z = x.astype(statistics_dtype(x.dtype))
    expect = _mean_of_rows if flat else _mean
    mean = expect(z, axes)
    m = expect(z * z, axes) - mean * mean
    near = jnp.all((mean * mean <= 4 * m) & (m < jnp.inf))
    again = functools.partial(two_passes, x, axes, True, mean)
    return lax.cond(near, lambda: [mean, jnp.zeros_like(mean), m], again)


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    size = as_number([x.shape[axis] for axis in axes], x.dtype)
    for step in reduction_order(axes, x.shape):
        x = barrier(jnp.sum(x, step, keepdims=True))
    return x / size


def _mean_of_rows(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over neighbouring axes as over one: XLA:CPU takes a tenth less time for that."""
    first, last = axes[0], axes[-1]
    if axes != tuple(range(first, last + 1)) or not along_one_shard(x, axes):
        return _mean(x, axes)
    size = math.prod(x.shape[axis] for axis in axes)
    rows = x.reshape(*x.shape[:first], size, *x.shape[last + 1 :])
    return jnp.expand_dims(jnp.sum(rows, first) / as_number([size], x.dtype), axes)


def _side_by_side(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Means for a GPU, of pieces first where few fields between other axes would leave it idle: XLA writes x out then."""
    shape, first, last = arrays[0].shape, axes[0], axes[-1]
    size = math.prod(shape[axis] for axis in axes)
    between = axes == tuple(range(first, last + 1)) and 0 < first and last < len(shape) - 1
    if between and all(map(is_known, shape)) and along_one_shard(arrays[0], axes):
        fields = math.prod(shape) // max(size, 1)
        pieces = next((n for n in range(2, 65) if size % n == 0 and fields * n >= COLUMNS), 1)
        if fields < COLUMNS and pieces > 1 and size >= 64 * pieces:
            split = (*shape[:first], pieces, size // pieces, *shape[last + 1 :])
            sums = lax.optimization_barrier([jnp.sum(a.reshape(split), first + 1) for a in arrays])
            return [jnp.expand_dims(jnp.sum(a, first), axes) / size for a in sums]
    return [_mean(a, axes) for a in arrays]


def _part(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """One in SHARE elements of each field, spread evenly; along the last axis in pieces, as a memory is read."""
    size, steps, last = math.prod(x.shape[axis] for axis in axes), [1] * x.ndim, x.ndim - 1
    left = max(1, min(SHARE, size // LEAST)) if is_known(size) else SHARE
    for axis in sorted(axes, key=lambda axis: (axis == last, axis == 0)):  # last the rows, and what devices share
        if left > 1 and is_known(x.shape[axis]) and along_one_shard(x, (axis,)):
            if axis == last and left == SHARE and x.shape[axis] % (SHARE * SHARE) == 0:
                return x.reshape(*x.shape[:last], -1, SHARE * SHARE)[..., :SHARE].reshape(*x.shape[:last], -1)
            steps[axis] = min(left, x.shape[axis])
            left //= steps[axis]
    return lax.slice(x, [0] * x.ndim, x.shape, steps)


def _moments(x: ShapedArray, *, axes: tuple[int, ...], differentiated: bool, exact: bool) -> list[ShapedArray]:
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    spec = PartitionSpec(*(None if axis in axes else name for axis, name in enumerate(x.sharding.spec)))
    small = x.update(
        shape=shape, dtype=statistics_dtype(x.dtype), weak_type=False, sharding=x.sharding.update(spec=spec)
    )
    return [small] * 3


def _batch(args: tuple[jax.Array], dims: tuple[int], *, axes: tuple[int, ...], **params: bool) -> tuple[list, list]:
    (x,), (dim,) = args, dims
    axes = tuple(axis + (dim <= axis) for axis in axes)
    return moments_p.bind(x, axes=axes, **params), [dim] * 3


def _tangent(primals: tuple, tangents: tuple, *, axes: tuple[int, ...], **params: bool) -> tuple[list, list]:
    """For JAX where it has taken the derivative rule of the equation apart, as around Taylor mode."""
    (x,), (dx,) = primals, tangents
    mean, rest, m = moments_p.bind(x, axes=axes, **params)
    if type(dx) is ad.Zero:
        return [mean, rest, m], [ad.Zero(statistic.aval) for statistic in (mean, rest, m)]
    u, dx = x.astype(m.dtype) - mean, dx.astype(m.dtype)
    dm = 2 * _mean((u - _mean(u, axes)) * dx, axes)
    return [mean, rest, m], [_mean(dx, axes), ad.Zero(rest.aval), dm]


_bind = jax.jit(lambda x, **params: moments_p.bind(x, **params), static_argnames=("axes", "differentiated", "exact"))


def _compiled(x: jax.Array, **params: Any) -> list[jax.Array]:
    """Outside of `jit` the moments are a program of their own, of the form of the platform where x lies."""
    with jax.disable_jit(False):
        return _bind(x, **params)


def _on_cpu(x: jax.Array, *, axes: tuple[int, ...], differentiated: bool, exact: bool, alone: bool) -> list[jax.Array]:
    """Over the last axis XLA has statistics and output in one pass; else sums that need no other run beside each other."""
    if over_last(axes, x.ndim):
        return two_passes(x, axes, exact)
    return guarded(x, axes, alone) if at_least(x.size, SPLIT, unknown=False) else two_passes(x, axes, True)


def _lower_on_cpu(context: mlir.LoweringRuleContext, x: Any, **params: Any) -> Any:
    form = functools.partial(_on_cpu, alone=is_for_one_device(context))
    return mlir.lower_fun(form, multiple_results=True)(context, x, **params)


def _on_gpu(x: jax.Array, *, axes: tuple[int, ...], differentiated: bool, exact: bool) -> list[jax.Array]:
    """Over the last axes XLA has one kernel for statistics and output, which rereads what it holds."""
    trailing = axes == tuple(range(x.ndim - len(axes), x.ndim))
    return two_passes(x, axes, False) if trailing and not differentiated and not exact else pivoted(x, axes)


def _on_tpu(x: jax.Array, *, axes: tuple[int, ...], differentiated: bool, exact: bool) -> list[jax.Array]:
    beyond = at_least(x.size * x.dtype.itemsize, FAST_MEMORY, unknown=False)
    return guarded(x, axes) if beyond else two_passes(x, axes, True)


moments_p.def_impl(_compiled)
moments_p.def_abstract_eval(_moments)
batching.primitive_batchers[moments_p] = _batch
ad.primitive_jvps[moments_p] = _tangent
mlir.register_lowering(moments_p, _lower_on_cpu, platform="cpu")
for _platform, _form in (*((gpu, _on_gpu) for gpu in GPUS), ("tpu", _on_tpu)):
    mlir.register_lowering(moments_p, mlir.lower_fun(_form, multiple_results=True), platform=_platform)
