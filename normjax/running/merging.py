"""The statistics of several batches as those of one: merged means and moments (Chan et al. 1983)."""

import jax
import jax.numpy as jnp

from normjax._expect.arrays import statistics_dtype
from normjax._leaves import SHARE, nan_if_infinite
from normjax.running.state import _require_kinds
from normjax.theory import Stats


def merge(a: Stats, b: Stats, order: float = 2) -> Stats:
    """The statistics of two batches together, from those of each as `observe` gives them; their weights are the sums.

    Right for rows whose A and B are the same field, and for moments around zero (A = None); other orders than 2 are refused.

    Args:
      a: the statistics of one batch, with their weights.
      b: those of another, in the same shapes.
      order: of the row; others than 2 are refused.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.

    >>> low, high = jnp.array([0.0, 2.0]), jnp.array([10.0, 14.0])
    >>> one = Stats(jnp.array(1.0), jnp.array(1.0), jnp.array(2.0), jnp.array(2.0))
    >>> other = Stats(jnp.array(12.0), jnp.array(4.0), jnp.array(2.0), jnp.array(2.0))
    >>> merge(one, other).var == jnp.var(jnp.concatenate([low, high]))
    Array(True, dtype=bool)
    """
    _require_kinds(batch=a)
    _require_kinds(batch=b)
    if order != 2 and a.var is not None:
        raise ValueError(f"moments of order {order!r} cannot be merged, only those of order 2")
    pairs = zip(a, b, strict=True)
    return merge_stacked(Stats(*(None if p is None else jnp.stack([jnp.asarray(p), jnp.asarray(q)]) for p, q in pairs)))


def merge_stacked(stats: Stats, mergeable: bool = True) -> Stats:
    """The statistics of many batches together, without the first axis; their weights are the sums.

    Args:
      stats: statistics with their weights, as `observe` gives them, batches along a first axis.
      mergeable: False takes the weighted mean of the moments, for rows whose statistics do not merge exactly.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.

    >>> parts = Stats(jnp.array([1.0, 12.0]), jnp.array([1.0, 4.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0]))
    >>> merge_stacked(parts)[:2]
    (Array(6.5, dtype=float32), Array(32.75, dtype=float32))
    """
    for name, value, weight in zip(("mean", "var"), stats[:2], stats[2:], strict=True):
        if value is not None and weight is None:
            raise ValueError(f"statistics merge by their weights; these lack {name}_weight, which `observe` gives")

    def mean_of(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Around the first value: a mean large beside its spread keeps its digits.
        weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
        total = jnp.sum(weights, 0, keepdims=True)
        real = jnp.finfo(values.dtype).dtype
        share = (weights.astype(real) / jnp.where(total > 0, total, 1).astype(real)).astype(values.dtype)
        first = jnp.where(jnp.isfinite(values[:1]), values[:1], 0)
        shifted = jnp.where(weights > 0, values - first, jnp.zeros((), values.dtype))
        return jnp.where(total > 0, first + jnp.sum(share * shifted, 0, keepdims=True), 0), total

    mean = mean_weight = var = var_weight = None
    moments = stats.var
    if stats.mean is not None:
        mean, mean_weight = mean_of(stats.mean, stats.mean_weight)
        if mergeable and moments is not None:
            moments = nan_if_infinite(moments + jnp.abs(stats.mean - mean) ** 2)  # around the merged mean
    if moments is not None:
        var, var_weight = mean_of(moments, stats.var_weight)
    return Stats(*(None if s is None else s[0] for s in (mean, var, mean_weight, var_weight)))


def merge_averages(mean: jax.Array, var: jax.Array, momentum: float) -> tuple[jax.Array, jax.Array]:
    """The running mean and variance after one update with several batches of one size, of those after each alone.

    Each batch has moved the stored values by itself, all from the same start, to `momentum * old + (1 - momentum) * new`.
    Their average lacks the spread of the means of the batches, which is read off the running means.

    Args:
      mean: running means, batches along a first axis.
      var: running variances, batches along a first axis.
      momentum: weight of the old value; of 1 nothing moves.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.

    >>> half = 0.5                                                  # old mean 0, var 1; batches of [0, 2] and [10, 14]
    >>> mean, var = merge_averages(jnp.array([0.5, 6.0]), jnp.array([1.0, 2.5]), half)
    >>> mean == half * 6.5, var == half * 1 + half * jnp.var(jnp.array([0.0, 2.0, 10.0, 14.0]))
    (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    momentum = SHARE("momentum", momentum)
    wide = mean.astype(statistics_dtype(mean.dtype))
    first = wide[:1]  # around it, a mean large beside its spread keeps its digits
    middle = jnp.mean(wide - first, 0, keepdims=True)
    spread = jnp.mean(jnp.abs(wide - first - middle) ** 2, 0)
    both = mean_of_parts(var).astype(spread.dtype) + (spread / (1 - momentum) if momentum < 1 else 0)
    return (first + middle)[0].astype(mean.dtype), both.astype(var.dtype)


def mean_of_parts(values: jax.Array) -> jax.Array:
    """The mean over the first axis; where all are equal, their value to the last bit.

    >>> mean_of_parts(jnp.array([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]])) - jnp.array([2.0, 0.1])
    Array([0., 0.], dtype=float32)
    """
    return jnp.where(jnp.all(values == values[:1], 0), values[0], jnp.mean(values, 0).astype(values.dtype))
