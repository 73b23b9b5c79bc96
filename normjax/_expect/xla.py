"""What is said to the compiler: every line that changes no number and is there for XLA.

Most of it is for XLA:CPU, which computes a reduction and what follows from it in one pass over x, held in cache, but
writes out every array of the size of x that two such passes share, such as x - mean. So what takes a pass of its own
also takes its own copy of the small statistics (`distinct_copy`), and shares nothing but x itself with the others. The
copies have names, by the pass that they are for:

    FOR_GRADIENT  the gradient of x: v in E[v dx], whose transpose is a term of that gradient
    FOR_SCALE     the gradient of the scale, a sum of g v
    FOR_Y         the output
    FOR_SUMS      the sums of g v that windows then slide over (divisive norm)
    FOR_ROUNDING  the sum of v: what rounding left of the mean
    FOR_MEAN      the gradient that goes through the mean, where windows slide over the sums

Two more notes stand where they act: in `window.py`, and in `inverse_power`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from normjax._expect.sharding import along_one_shard
from normjax._expect.sizes import at_least

FOR_GRADIENT, FOR_SCALE, FOR_Y, FOR_SUMS, FOR_ROUNDING, FOR_MEAN = 1, 2, 3, 4, 5, 6


def on_cpu() -> bool:
    """Whether programs are compiled for a CPU by default."""
    return jax.default_backend() == "cpu"


def distinct_copy(statistic: jax.Array, use: int) -> jax.Array:
    """An exact copy of a small statistic that XLA:CPU takes for another value: other arithmetic where it is NaN."""
    if not on_cpu():
        return statistic
    return jnp.where(statistic != statistic, statistic + statistic.dtype.type(use), statistic)


def barrier(x: jax.Array) -> jax.Array:
    """Keeps XLA:CPU from merging two steps into one."""
    return lax.optimization_barrier(x) if on_cpu() else x


def reduction_order(axes: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Steps of a sum: XLA:CPU sums axes between others on one thread if the last axis is short; the innermost goes first."""
    kept = [i for i in range(len(shape)) if i not in axes]
    between = len(axes) > 1 and kept and kept[0] < min(axes) and kept[-1] > max(axes)
    short = between and not at_least(math.prod(shape[max(axes) + 1 :]), 256, unknown=False)
    if not on_cpu() or not short or not at_least(shape[kept[0]], 2, unknown=True):
        return [axes]
    return [(max(axes),), tuple(sorted(axes)[:-1])]


def broadcast_in_order(small: jax.Array, x: jax.Array) -> jax.Array:
    """A small array broadcast against x, in the steps in which x is summed: the transpose is such a sum."""
    small = small.reshape((1,) * (x.ndim - small.ndim) + small.shape)
    long = tuple(axis for axis, (n, m) in enumerate(zip(small.shape, x.shape, strict=True)) if n == 1 != m)
    if not along_one_shard(x, long):
        return small
    for axes in reversed(reduction_order(long, x.shape)):
        small = jnp.broadcast_to(barrier(small), [x.shape[i] if i in axes else n for i, n in enumerate(small.shape)])
    return small
