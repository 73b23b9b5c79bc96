"""Batch norm by extreme values: the mean of the k largest |v|, and the range of parts of the batch.

Their statistics need a step beside `normalize`: a range is measured by parts of the batch and averaged (Banner et al. 2018),
the k largest are averaged over batches (Hoffer et al. 2018).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import require_float
from normjax._leaves import COUNT, SHARE
from normjax._normalize.evaluate import Normalized, equation, normalize
from normjax.batch import BATCH
from normjax.field import Field
from normjax.gaussian import bounds_constant, gaussian_largest
from normjax.running import Running, as_stats, observe, update
from normjax.theory import Normalizer, Stats, top


def top_batch(
    k: int, size: int | None, field: Field | str = BATCH, *, eps: float = 1e-5, calibrated: bool = False
) -> Normalizer:
    """Top-k batch norm: v / (eps + C * mean of the k largest |v|); L-infinity batch norm for k = 1.

    Args:
      k: how many of the largest |v| are averaged.
      size: number n of elements behind each statistic in training, examples * positions (all shards'), on which C depends.
      field: both fields, A and B.
      eps: added to C times the mean of the largest. [units of x]
      calibrated: C = 1 / E[mean of the k largest of n]. The paper's C(n) gives 1.42 standard deviations for k = 1 and
        1.19 for k = 10 of n = 1024.

    Source: Hoffer et al. 2018, section 4.

    >>> top_batch(1, 1024).order, top_batch(10, 1024).order
    (inf, top(k=10))
    """
    if size is None:
        raise ValueError("top-k batch norm needs size, the number of elements behind each statistic in training")
    k, among = COUNT("k", k), COUNT("size", size)
    if k > among:
        raise ValueError(f"k is within 1 and size={size}; found {k}")
    gain = 1 / gaussian_largest(among, k) if calibrated else bounds_constant(among)
    return Normalizer(field, field, eps=eps, gain=gain, power=1.0, order=math.inf if k == 1 else top(k))


def range_row(
    size: int | None, field: Field | str = BATCH, *, eps: float = 1e-5, calibrated: bool = False
) -> Normalizer:
    """The row of range batch norm, v / (eps + C * m), with m by `mean_range` (alone, it takes the largest |v|).

    Args:
      size: number of elements of a part in training, on which C depends.
      field: field A, over which the parts' ranges are averaged too.
      eps: added to C times the range. [units of x]
      calibrated: C is one over the expected range of Gaussian data; else the code's 0.35 * `bounds_constant`, half of
        that of the maximum and a factor from experiments, which gives .81 to .98 standard deviations.

    Source: Banner et al. 2018, section 3, and the code of its authors.

    >>> round(range_row(64).gain, 4), round(range_row(64, calibrated=True).gain, 4)
    (0.1873, 0.2133)
    """
    size = None if size is None else COUNT("size", size)
    if size is None or size < 2:
        said = "range batch norm needs size, the number of elements of a part in training, at least 2"
        raise ValueError(f"{said}; found {size!r}")
    gain = 0.5 / gaussian_largest(size, signed=True) if calibrated else 0.35 * bounds_constant(size)
    return Normalizer(field, field, eps=eps, gain=gain, power=1.0, order=math.inf)


def mean_range(
    x: ArrayLike, layout: str, field: Field | str = BATCH, *, parts: int = 16, mask: ArrayLike | None = None
) -> Stats:
    """The mean over parts of the batch of max x - min x, as the `var` of statistics, which broadcasts against x.

    There is no mean, and the weight is the number of examples in parts that count.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      field: field of the batch; parts lie within one shard of a mapped axis.
      parts: number of equal parts of the examples.
      mask: boolean mask or weights that broadcast against x; a part that is masked whole does not count.

    Source: Banner et al. 2018, section 3.

    >>> mean_range(jnp.array([[0.0], [4.0], [1.0], [3.0]]), "n c", parts=2).var.tolist()
    [[3.0]]
    """
    x = require_float(x, "mean_range")
    if jnp.iscomplexobj(x):
        raise TypeError(f"a range orders real numbers, found {x.dtype}")
    field = Field.parse(field)
    here, parts = field.local() or Field(()), COUNT("parts", parts)
    if parts > 1:
        here = Field(tuple(dataclasses.replace(s, blocks=parts) if s.axis == "n" else s for s in here.spans))
    u = equation(x, Normalizer(here, None), layout, mask=mask).centered  # a range is the same around any centre
    peak = Normalizer(None, here, power=1.0, order=math.inf)
    above, below = (equation(jnp.where(s * u <= 0, 0, s * u), peak, layout, mask=mask).stats for s in (1, -1))
    each = above.var + below.var
    some = jnp.broadcast_to(jnp.asarray(above.var_weight) > 0, each.shape)
    return equation(each, Normalizer(None, field, order=1), layout, mask=some).stats


def range_batch(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    size: int,
    parts: int = 16,
    field: Field | str = BATCH,
    eps: float = 1e-5,
    calibrated: bool = False,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Normalized:
    """Range batch norm: v / (eps + C * mean over parts of the batch of max v - min v).

    Args:
      x: real array, axes as named by `layout`. [units u]
      layout: name of each axis of x.
      size: number of elements of a part in training, on which C depends.
      parts: number of equal parts of the examples.
      field: field A, over which the parts' ranges are averaged too.
      eps: added to C times the range, which is the `var` of the statistics. [u]
      calibrated: whether C makes unit variance of Gaussian data; else it is the published code's.
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or weights that broadcast against x; a part that is masked whole does not count.

    Source: Banner et al. 2018, section 3.

    >>> x = jnp.array([[0.0], [4.0], [1.0], [3.0]])
    >>> out = range_batch(x, size=2, parts=2, eps=0.0, calibrated=True)              # C = sqrt(pi) / 2, the range is 3
    >>> (1000 * out.y).round().ravel().tolist(), out.stats.var.item()
    ([-752.0, 752.0, -376.0, 376.0], 3.0)
    """
    row = range_row(size, field, eps=eps, calibrated=calibrated)
    stats = mean_range(x, layout, field, parts=parts, mask=mask)
    return normalize(x, row, layout, stats=stats, scale=scale, bias=bias, mask=mask)


def moving_top(
    x: ArrayLike,
    previous: ArrayLike,
    row: Normalizer,
    layout: str = "n ... c",
    *,
    beta: float = 0.75,
    mask: ArrayLike | None = None,
) -> Stats:
    """Statistics of a batch whose `var` is a moving average, beta * previous + (1 - beta) * the moment of the batch.

    Args:
      x: floating-point array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      previous: the average before, which broadcasts against x; 0 at first. No gradient goes through it. [u]
      row: the row, from `top_batch`.
      beta: weight of the average before.
      mask: boolean mask or weights that broadcast against x; 0 leaves an element out.

    Source: Hoffer et al. 2018, their code.

    >>> moving_top(jnp.array([[-1.0], [1.0]]), 5.0, Normalizer("n", "n", order=1), beta=0.5).var.tolist()
    [[3.0]]
    """
    beta = SHARE("beta", beta)
    batch = equation(require_float(x, "moving_top"), row, layout, mask=mask).stats
    previous = lax.stop_gradient(jnp.asarray(previous, batch.var.dtype))
    return batch._replace(var=beta * previous + (1 - beta) * batch.var)


def stored_top(
    x: ArrayLike, previous: ArrayLike, row: Normalizer, layout: str, *, beta: float, mask: ArrayLike | None = None
) -> tuple[Stats, jax.Array]:
    """The statistics of `moving_top`, and the average for a layer to store, in the shape of a running statistic.

    Args:
      x: floating-point array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      previous: the stored average, `[c]` for the default fields; 0 at first. [u]
      row: the row, from `top_batch`.
      beta: weight of the average before.
      mask: boolean mask or weights that broadcast against x; 0 leaves an element out.

    Source: Hoffer et al. 2018, their code.

    >>> row = Normalizer("n", "n", order=1)
    >>> stats, average = stored_top(jnp.array([[-1.0], [1.0]]), jnp.array([5.0]), row, "n c", beta=0.5)
    >>> stats.var.tolist(), average.tolist()
    ([[3.0]], [3.0])
    """
    shape, running = jnp.shape(x), Running(var=jnp.asarray(previous))
    stats = moving_top(x, as_stats(running, row, layout, shape).var, row, layout, beta=beta, mask=mask)
    average = update(running, observe(stats, row, layout, shape), 0.0).var
    assert average is not None  # a row of `top_batch` divides
    return stats, average


def ghost_top(
    x: ArrayLike,
    previous: ArrayLike,
    row: Normalizer,
    layout: str = "n ... c",
    *,
    beta: float = 0.75,
    published: bool = False,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Normalized, jax.Array]:
    """Top-k batch norm by a moving average of the moment, in training too; also returns the average to pass on.

    Args:
      x: floating-point array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      previous: the average before, as it was returned; 0 at first. No gradient goes through it. [u]
      row: the row, from `top_batch`.
      beta: weight of the average before.
      published: the authors' code keeps C(n) times the average, so that C(n) enters anew at each step.
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.

    Source: Hoffer et al. 2018, their code.

    >>> row = Normalizer("n", "n", eps=0.0, power=1.0, order=float("inf"))
    >>> out, average = ghost_top(jnp.array([[-1.0], [1.0]]), 7.0, row, beta=0.5)
    >>> out.y.tolist(), average.tolist()
    ([[-0.25], [0.25]], [[4.0]])
    """
    stats = moving_top(x, previous, row, layout, beta=beta, mask=mask)
    out = normalize(x, row, layout, stats=stats, scale=scale, bias=bias, mask=mask)
    return out, lax.stop_gradient(row.gain * stats.var if published else stats.var)
