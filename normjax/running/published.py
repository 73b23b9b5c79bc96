"""Running statistics as published code keeps them: first values, weight of the old value, and what is averaged."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from normjax._leaves import one_of
from normjax.running import averaging, state
from normjax.running.averaging import _together
from normjax.running.state import Running
from normjax.theory import Normalizer, Stats, row


class PublishedAveraging(NamedTuple):
    """How a published code averages.

    Attributes:
      momentum: weight of the old value.
      mean, var: first values of the mean and of the moment.
      eps: the row's number, which is added to the moment.
      inverse: whether 1 / d is averaged in place of the moment.
      unbiased: whether the variance that is averaged is the unbiased one.

    >>> PUBLISHED_AVERAGING["hoffer"].momentum
    0.1
    """

    momentum: float
    mean: float
    var: float
    eps: float
    inverse: bool = False
    unbiased: bool = False


PUBLISHED_AVERAGING: Mapping[str, PublishedAveraging] = MappingProxyType(
    {
        "flax": PublishedAveraging(0.99, 0.0, 1.0, 1e-5),
        # PyTorch's batch norm, whose momentum of 0.1 is the weight of the new value
        "torch": PublishedAveraging(0.9, 0.0, 1.0, 1e-5, unbiased=True),
        # Ren et al. 2017, the word models: as `recurrent.ren2017` has it, whose smoothed rows have eps 1 instead
        "ren": PublishedAveraging(0.9, 0.0, 1.0, 1e-4),
        # Wang et al. 2018: what is stored is of the first block of examples, see `KalmanNorm`
        "kalman": PublishedAveraging(0.9, 0.0, 1.0, 1e-5),
        # Lubana et al. 2021: batch norm starts its mean at 1
        "lubana": PublishedAveraging(0.9, 1.0, 1.0, 1e-5),
        # Hoffer et al. 2018, mean_bn.py: nine tenths are the newest batch's; no eps
        "hoffer": PublishedAveraging(0.1, 0.0, 0.0, 0.0),
        # Hoffer et al. 2018, lp_norm.py: what is averaged is 1 / d, from 0 on, which is a moment of inf
        "hoffer_lp": PublishedAveraging(0.1, 0.0, math.inf, 1e-5, True),
    }
)


def published_start(
    normalizer: Normalizer | str, layout: str, shape: tuple[int, ...], dialect: str = "flax"
) -> Running:
    """The statistics before the first batch, by the convention of one published code: `initial` with other first values.

    `dialect` is a name in PUBLISHED_AVERAGING. A layer starts so with `mean_init` and `var_init`; but not with "hoffer_lp",
    whose updates are `published_update`'s.

    Args:
      normalizer: the row that stores them, or its name in TABLE.
      layout: name of each axis of the array.
      shape: of the array, axes as named by `layout`.
      dialect: a name in PUBLISHED_AVERAGING.

    Source: the published code of Lubana et al. 2021, Hoffer et al. 2018, Ren et al. 2017 and Wang et al. 2018; PyTorch.

    >>> from normjax import TABLE
    >>> published_start(TABLE["batch"], "n c", (8, 2), "lubana").mean
    Array([1., 1.], dtype=float32)
    """
    one_of("dialect", dialect, tuple(PUBLISHED_AVERAGING))
    first = state.initial(normalizer, layout, shape)
    way = PUBLISHED_AVERAGING[dialect]
    mean, var = (s if s is None else jnp.full_like(s, v) for s, v in ((first.mean, way.mean), (first.var, way.var)))
    return first._replace(mean=mean, var=var)


def published_update(running: Running, batch: Stats, normalizer: Normalizer | str, dialect: str = "flax") -> Running:
    """Moves the statistics towards those of a batch (`observe`), by the convention of one published code.

    `dialect` is a name in PUBLISHED_AVERAGING. Averages of 1 / d favour the batches of small spread, and are wrong by
    Jensen's inequality; they are here to read what such code has trained. A layer can infer with them, for the moment that
    gives their average of 1 / d is what is stored here; but trained further it averages moments, and no inverses: only this
    function goes on as that code does.

    Args:
      running: what is stored.
      batch: the statistics of a batch, from `observe`.
      normalizer: the row that stores them, or its name in TABLE.
      dialect: a name in PUBLISHED_AVERAGING.

    Source: the published code of Lubana et al. 2021, Hoffer et al. 2018, Ren et al. 2017 and Wang et al. 2018; PyTorch.

    >>> from normjax import TABLE
    >>> batch = Stats(jnp.array([4.0]), jnp.array([1.0]), jnp.array([8.0]), jnp.array([8.0]))
    >>> published_update(Running(jnp.zeros(1), jnp.zeros(1)), batch, TABLE["batch"], "hoffer").mean.round(2).tolist()
    [3.5999999046325684]
    """
    one_of("dialect", dialect, tuple(PUBLISHED_AVERAGING))
    way, normalizer = PUBLISHED_AVERAGING[dialect], row(normalizer)
    if way.unbiased:
        averaging.require_unbiased(normalizer)
        batch = averaging.unbiased(batch)
    if not way.inverse:
        return averaging.update(running, batch, way.momentum)
    if running.var is None or batch.var is None or not normalizer.power or not normalizer.gain:
        raise ValueError(f"dialect={dialect!r} averages 1 / d, which {normalizer} does not store")
    n = normalizer
    old, new = (jnp.where(v < jnp.inf, (n.eps + n.gain * v) ** -n.power, 0) for v in (running.var, batch.var))
    mixed = (way.momentum * old + (1 - way.momentum) * new).astype(new.dtype)
    var = (mixed ** (-1 / n.power) - n.eps) / n.gain
    finite = jnp.isfinite(batch.var) & jnp.isfinite(var)
    if batch.mean is not None:  # no mean is stored without its moment
        mean_too, finite = _together(jnp.isfinite(batch.mean), finite)
        batch = batch._replace(mean=jnp.where(jnp.asarray(mean_too), batch.mean, jnp.nan))
    mean = averaging.update(running._replace(var=None), batch, way.momentum).mean
    valid = jnp.asarray(finite) & (jnp.asarray(batch.var_weight) > 0)
    return running._replace(mean=mean, var=lax.stop_gradient(jnp.where(valid, var, running.var)))
