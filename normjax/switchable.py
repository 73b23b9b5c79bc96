"""Switchable norm: a learned mixture of rows of the table, mixed in their statistics.

    mean = sum_k w_k E_Ak[x]        var = sum_k w'_k Var_k[x]        y = scale * (x - mean) / sqrt(eps + var) + bias

Where a row averages what another has averaged already (layer and batch norm do, of instance norm), its statistics come from
the other's, and x is read once: the mean of the means, and the mean variance plus the variance of the means. This form
has no difference of squares, which the authors' code has. `blend` mixes outputs instead of statistics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._expect import average
from normjax._expect.arrays import Weights, require_float, statistics_dtype, zero_masked
from normjax._expect.binding import Plan, bind
from normjax._leaves import nan_if_infinite
from normjax._normalize.evaluate import equation, normalize
from normjax.field import FieldError
from normjax.running import require_unbiased, stores
from normjax.running import unbiased as with_unbiased_variance
from normjax.theory import Normalizer, Stats, row

ROWS = ("instance", "layer", "batch")  # the order of the authors' weights


class Mixed(NamedTuple):
    """What `mix` returns: y; v = x - mean, float32 or wider, 0 where masked; the mixed statistics and those of each row.

    >>> out = mix(jnp.array([[1.0, 3.0], [5.0, 7.0]]), ("token", "batch"))
    >>> out.stats.mean.shape, [part.mean.shape for part in out.parts]
    ((2, 2), [(2, 1), (1, 2)])
    """

    y: jax.Array
    centered: jax.Array
    stats: Stats
    parts: tuple[Stats, ...]


def mix(
    x: ArrayLike,
    normalizers: Sequence[Normalizer | str] = ROWS,
    mean_weight: ArrayLike | None = None,
    var_weight: ArrayLike | None = None,
    layout: str = "n ... c",
    *,
    stats: Sequence[Stats | None] | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike = 1e-5,
    unbiased: bool = False,
    refuse: bool = True,
    dtype: DTypeLike | None = None,
) -> Mixed:
    """Normalizes x with a weighted sum of the statistics of several rows.

    Args:
      x: floating-point array, axes as named by `layout`.
      normalizers: rows of order 2 that divide, without floor; their eps, gain and power are not used. Without A, the mean
        is zero.
      mean_weight: weight of each row's mean, `[rows]`; equal weights by default. The authors' are a softmax.
      var_weight: weight of each row's variance, `[rows]`.
      layout: name of each axis of x.
      stats: for each row, statistics to use instead of those of x (inference); None computes them.
      scale: factor of y: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: added to scale * y, in the shapes of `scale`.
      mask: boolean mask or weights that broadcast against x; where 0, x counts in no statistic and the output is the bias.
      eps: added to the mixed variance. [units of x squared]
      unbiased: variances divide by one less than the number of elements before they are pooled or mixed, as in the
        authors' code; the paper divides by the number.
      refuse: whether a field over a single element is an error, as it is for `normjax.normalize`.
      dtype: of y, by default that of x.

    Source: Luo et al. 2019 (differentiable learning to normalize), equation 3; pooled statistics: equation 4.

    >>> x = jnp.array([[1.0, 3.0], [5.0, 7.0]])
    >>> mix(x, ("token", "batch")).stats.mean.tolist()                  # half of 2 and 6, half of 3 and 5
    [[2.5, 3.5], [4.5, 5.5]]
    """
    rows = require_mixable(normalizers)
    x = require_float(x, "mix")
    work = x.astype(statistics_dtype(x.dtype))
    given = [None for _ in rows] if stats is None else list(stats)
    if len(given) != len(rows):
        raise ValueError(f"statistics are one for each of the {len(rows)} rows; found {len(given)}")
    parts = _parts(work, rows, layout, given, mask, unbiased, refuse)
    real = jnp.finfo(work.dtype).dtype
    weights = [_one_for_each_row(name, w, len(rows), real) for name, w in (("mean", mean_weight), ("var", var_weight))]
    means = [jnp.zeros((1,) * x.ndim, work.dtype) if p.mean is None else p.mean for p in parts]
    none = jnp.zeros((), work.dtype)
    mean = sum((w.astype(work.dtype) * m for w, m in zip(weights[0], means, strict=True)), start=none)
    var = sum((w * p.var for w, p in zip(weights[1], parts, strict=True)), start=jnp.zeros((), real))
    centred = next((n for n in rows if n.mean is not None), None)
    final = Normalizer(None if centred is None else centred.mean, rows[0].var)
    used = Stats(None if centred is None else mean, var)
    out = equation(work, final, layout, stats=used, scale=scale, bias=bias, mask=mask, eps=eps, dtype=dtype or x.dtype)
    return Mixed(out.y, out.centered, used, tuple(parts))


def blend(
    x: ArrayLike,
    normalizers: Sequence[Normalizer | str],
    weight: ArrayLike,
    layout: str = "n ... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """A weighted sum of what several rows, of any kind, make of x, in its dtype.

    Args:
      x: floating-point array, axes as named by `layout`.
      normalizers: the rows.
      weight: of each row, `[rows]`, or of each row and channel, `[rows, c]`; batch-instance norm has (rho, 1 - rho) for
        ("batch", "instance").
      layout: name of each axis of x.
      scale: factor of the sum: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: added to it, in the shapes of `scale`.
      mask: boolean mask or weights that broadcast against x; where 0, x counts in no statistic and the output is the bias.

    Source: Nam & Kim 2018 (batch-instance normalization), equation 3.

    >>> blend(jnp.array([[1.0, 3.0], [1.0, 3.0]]), ("token", "batch"), jnp.array([0.5, 0.5])).round(3).tolist()
    [[-0.5, 0.5], [-0.5, 0.5]]
    """
    x, weight = require_float(x, "blend"), jnp.asarray(weight)
    if weight.ndim not in (1, 2) or weight.shape[0] != len(normalizers):
        raise ValueError(f"weights are [rows] or [rows, c] for {len(normalizers)} rows; found shape {weight.shape}")
    work = x.astype(statistics_dtype(x.dtype))
    total = jnp.zeros_like(work)
    for w, n in zip(weight, normalizers, strict=True):
        total = total + normalize(work, n, layout, scale=w, mask=mask).y
    return equation(total, Normalizer(None, None), layout, scale=scale, bias=bias, dtype=x.dtype).y


def weights_of(logits: ArrayLike) -> jax.Array:
    """The weights `[rows]` from the logits `[rows]` that are learned: a softmax, as the authors', float32 or wider.

    >>> weights_of(jnp.zeros(2))
    Array([0.5, 0.5], dtype=float32)
    """
    logits = require_float(logits, "SwitchableNorm")
    return jax.nn.softmax(logits.astype(statistics_dtype(logits.dtype)))


def storing(normalizers: Sequence[Normalizer | str]) -> int | None:
    """Which row of a mix stores statistics; None if none does. Two are refused.

    >>> storing(("instance", "layer", "batch"))
    2
    """
    found = [k for k, n in enumerate(normalizers) if any(stores(row(n)))]
    if len(found) > 1:
        names = ", ".join(str(normalizers[k]) for k in found)
        raise ValueError(f"one row of a mix may store statistics; found {names}")
    return found[0] if found else None


def require_mixable(normalizers: Sequence[Normalizer | str]) -> list[Normalizer]:
    """The rows; ValueError where there is none, or one does not divide, has another order than 2, a floor or keep_mean.

    >>> require_mixable(("token", "batch"))
    [Normalizer('c', 'c'), Normalizer('n ...', 'n ...')]
    """
    rows = [row(n) for n in normalizers]
    if not rows:
        raise ValueError("a mix needs at least one row")
    for n in rows:
        if n.var is None or n.order != 2 or n.floor is not None or n.keep_mean:
            raise ValueError(f"a mix takes rows that divide, of order 2, without floor and keep_mean; found {n}")
    return rows


def _one_for_each_row(name: str, weight: ArrayLike | None, count: int, dtype: DTypeLike) -> jax.Array:
    """The weights `[rows]` of means or variances, in this dtype; None gives equal ones."""
    weight = jnp.full(count, 1 / count, dtype) if weight is None else jnp.asarray(weight)
    if weight.shape != (count,):
        raise ValueError(f"{name} weights are one for each of the {count} rows; found shape {weight.shape}")
    return weight.astype(dtype)


def _parts(
    x: jax.Array,
    rows: Sequence[Normalizer],
    layout: str,
    given: Sequence[Stats | None],
    mask: ArrayLike | None,
    unbiased: bool,
    refuse: bool,
) -> list[Stats]:
    """The statistics of each row; those of a row that averages over more than an earlier one from the earlier one's."""
    parts: list[Stats] = []
    for k, n in enumerate(rows):
        stats, below = given[k], next((j for j in range(k) if given[j] is None and _nested(rows[j], n)), None)
        if stats is None and below is not None:
            stats = pool(parts[below], n, layout)
        elif stats is None:
            stats = (normalize if refuse else equation)(x, n, layout, mask=mask).stats
            if unbiased:
                require_unbiased(n)
                stats = with_unbiased_variance(stats)
        parts.append(stats)
    return parts


def _nested(small: Normalizer, large: Normalizer) -> bool:
    """Whether the large row's statistics follow from the small one's: whole axes, and more of them."""
    a, b = small.var, large.var
    if a is None or b is None or small.mean != a or large.mean != b:
        return False
    return a != b and all(span.whole and span in b.spans for span in a.spans) and not any(s.window for s in b.spans)


def pool(stats: Stats, normalizer: Normalizer | str, layout: str = "n ... c") -> Stats:
    """The statistics of a row that averages over all that another has averaged over, and more, from the other's.

    The given ones are means, variances and the weights behind them, of a row of whole axes; the row has A = B, no windows.

    Args:
      stats: means and variances of the other row, with their weights, each broadcasting against the array.
      normalizer: the row whose statistics are wanted, or its name in TABLE.
      layout: name of each axis of the array.

    Source: the law of total variance; Luo et al. 2019, equation 4, has it as a difference of squares.

    >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])
    >>> pool(normalize(x, "instance").stats, "layer").var == jnp.var(x)
    Array([[[ True]]], dtype=bool)
    """
    n = row(normalizer)
    field = n.var
    if field is None or stats.mean is None or stats.var is None or stats.mean_weight is None:
        raise FieldError(f"pooling needs means, variances and their weights, and a row that divides; found {n}")
    mean, var = stats.mean, stats.var
    plan = Plan(bind(field, layout, mean.shape))
    weight = jnp.broadcast_to(jnp.asarray(stats.mean_weight).astype(var.dtype), mean.shape)
    weights = Weights(weight, weight > 0)
    centre, total = average.average(mean, plan, weights)
    spread = nan_if_infinite(var + jnp.square(jnp.abs(zero_masked(mean - centre, weights))))
    both = average.average(spread, plan, weights)[0]
    return Stats(centre, both, total, total)
