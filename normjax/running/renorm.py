"""Batch renormalization: a training batch is normalized with what is stored, as far as limits allow (Ioffe 2017).

With the batch's own statistics, y = (x - mean) / sigma. With r = sigma / sigma_stored and d = (mean - mean_stored) /
sigma_stored, r * y + d is y as inference would give it. Both are constants within limits, which a schedule widens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from normjax._leaves import inverse_power, known_numbers
from normjax.running.state import Running, as_stats, stores
from normjax.theory import Normalizer, Stats, row


def corrections(
    stats: Stats,
    running: Running,
    normalizer: Normalizer | str,
    layout: str,
    shape: tuple[int, ...],
    limits: tuple[ArrayLike, ArrayLike] = (3.0, 5.0),
    eps: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The corrections r and d of batch renormalization: r * y + d is y as the stored statistics would give it.

    They are float32 or wider and broadcast against the batch; no gradient flows into them; 1 and 0 where a field holds no
    weight. The row stores all its moments, and has neither floor nor keep_mean; complex numbers are refused.

    Args:
      stats: statistics that normalized a batch of this shape, which broadcast against it.
      running: the stored statistics, from before the batch.
      normalizer: a row that stores both moments, or its name in TABLE.
      layout: name of each axis of the batch.
      shape: that of the batch.
      limits: r_max and d_max: r lies within [1 / r_max, r_max], d within [-d_max, d_max]; (1, 0) is batch norm.
      eps: replaces the row's number: a scalar, or an array that broadcasts against the batch. [units of x ** order]

    Source: Ioffe 2017, algorithm 1.

    >>> from normjax import TABLE, normalize
    >>> x = jnp.array([[2.0], [4.0]])
    >>> n, stored = TABLE["batch"], Running(jnp.array([1.0]), jnp.array([4.0]))
    >>> r, d = corrections(normalize(x, n).stats, stored, n, "n c", x.shape)
    >>> (10 * (r * normalize(x, n).y + d)).round().tolist()                 # (x - 1) / 2
    [[5.0], [15.0]]
    """
    n = row(normalizer)
    require_renormalizable(n, limits)
    if jnp.iscomplexobj(stats.mean) or jnp.iscomplexobj(running.mean):
        raise TypeError("batch renormalization keeps a shift within limits, which complex numbers have not")
    stats, running = jax.lax.stop_gradient((stats, running))
    work = stats.var.dtype
    stored = Stats(*(None if s is None else s.astype(work) for s in as_stats(running, n, layout, shape)[:2]))
    eps, r_max, d_max = (jnp.asarray(value).astype(work) for value in (n.eps if eps is None else eps, *limits))
    before, now = (inverse_power(eps + n.gain * s.var, n.power) for s in (stored, stats))  # 0 for a spread of 0
    weighted = (jnp.asarray(stats.var_weight) > 0) & (now > 0)
    r = jnp.where(before > 0, before / jnp.where(weighted, now, 1), jnp.inf)
    r = jnp.where(weighted, jnp.clip(r, 1 / r_max, r_max), 1)
    d = jnp.zeros((), work)
    if n.mean is not None:
        d = jnp.where(weighted, jnp.clip((stats.mean - stored.mean) * before, -d_max, d_max), 0)
    return jax.lax.stop_gradient((r, d))  # eps may be learned


def require_renormalizable(normalizer: Normalizer | str, limits: tuple[ArrayLike, ArrayLike]) -> None:
    """Raises ValueError for limits (r_max, d_max) below (1, 0), and for rows that `corrections` refuses.

    >>> from normjax import TABLE
    >>> require_renormalizable(TABLE["batch"], (0.5, 5.0))
    Traceback (most recent call last):
    ...
    ValueError: r_max is at least 1; found 0.5
    """
    n = row(normalizer)
    if not isinstance(limits, tuple | list) or len(limits) != 2:
        raise ValueError(f"renorm is a pair of limits (r_max, d_max); found {limits!r}")
    for name, limit, least in zip(("r_max", "d_max"), limits, (1, 0), strict=True):
        found = known_numbers(limit)
        if found is not None and not np.all(found >= least):
            raise ValueError(f"{name} is at least {least}; found {limit!r}")
    if stores(n) != (n.mean is not None, True) or n.floor is not None or n.keep_mean:
        raise ValueError(
            f"batch renormalization needs a row that stores all its moments, a variance among them, and has neither floor "
            f"nor keep_mean; found {n}"
        )


def limits_at(step: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The paper's limits r_max and d_max after so many updates: batch norm for 5000, then 3 from 40,000, 5 from 25,000.

    Args:
      step: number of updates made, a number or an array, of whose shape both limits are.

    Source: Ioffe 2017, section 4.1.

    >>> [float(limit) for limit in limits_at(15_000)]
    [1.5714285373687744, 2.5]
    """
    step = jnp.asarray(step, np.float32)
    return 1 + 2 * jnp.clip((step - 5_000) / 35_000, 0, 1), 5 * jnp.clip((step - 5_000) / 20_000, 0, 1)


def renormalized(
    stats: Stats, r: jax.Array, d: jax.Array, normalizer: Normalizer | str, eps: ArrayLike | None = None
) -> Stats:
    """The statistics with which a layer gives r * y + d: sigma / r in place of sigma, and mean - d * sigma / r of the mean.

    For layers that do more with the statistics of a batch than to centre and divide; r and d are those of `corrections`.

    Args:
      stats: moments with their weights, each broadcasting against the array.
      r: factor from `corrections`.
      d: shift from `corrections`.
      normalizer: the row whose statistics they are, or its name in TABLE.
      eps: replaces the row's number. [units of x ** order]

    Source: Ioffe 2017, algorithm 1, solved for the statistics.

    >>> from normjax import TABLE, normalize
    >>> x, n = jnp.array([[2.0], [4.0]]), TABLE["batch"]
    >>> stats = renormalized(normalize(x, n).stats, jnp.array([[0.5]]), jnp.array([[1.0]]), n)
    >>> (10 * normalize(x, n, stats=stats).y).round().tolist()                 # from -1 and 1
    [[5.0], [15.0]]
    """
    n = row(normalizer)
    smoothing = jnp.asarray(n.eps if eps is None else eps).astype(stats.var.dtype)
    # Written so that r = 1 leaves the variance as it is, to the bit.
    var = stats.var + (smoothing / n.gain + stats.var) * (r ** (-1 / n.power) - 1)
    if n.mean is None or stats.mean is None:
        return stats._replace(var=var)
    q = smoothing + n.gain * var
    sigma = q if n.power == 1 else q * inverse_power(q, 1 - n.power)
    return stats._replace(mean=stats.mean - d * sigma, var=var)
