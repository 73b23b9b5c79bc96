"""The mixture of a prediction and a batch, by a gain."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax._leaves import known_numbers, nan_if_infinite
from normjax.propagate import Belief


def mix_beliefs(prior: Belief, batch: Belief, gain: ArrayLike) -> Belief:
    """The belief after a batch: mean and variance of a mixture, of 1 - gain parts prior and gain parts batch.

    Args:
      prior: the prediction.
      batch: the batch's mean and (biased) variance, of shapes that broadcast against the prior's.
      gain: q, between 0 and 1, a scalar or an array that broadcasts against the prior's.

    Source: Wang et al. 2018, the update step; its published code writes it with p = 1 - q.

    >>> mix_beliefs(Belief(jnp.array(0.0), jnp.array(1.0)), Belief(jnp.array(2.0), jnp.array(3.0)), 0.5)
    Belief(mean=Array(1., dtype=float32), var=Array(3., dtype=float32))
    """
    q = jnp.asarray(gain).astype(prior.mean.dtype)
    apart = batch.mean - prior.mean
    mean = prior.mean + q * apart
    var = prior.var + q * (batch.var - prior.var) + q * (1 - q) * lax.square(apart)
    return Belief(mean, nan_if_infinite(jnp.asarray(var)))


def logit(gain: float) -> float:
    """The number whose sigmoid is the gain, strictly between 0 and 1: where a learned gain starts.

    >>> round(logit(0.1), 4)
    -2.1972
    """
    if not 0 < gain < 1:
        raise ValueError(f"a learned gain starts strictly between 0 and 1; found {gain!r}")
    return float(np.log(gain) - np.log1p(-gain))


def require_gain(gain: ArrayLike) -> None:
    """Raises ValueError for a gain, the weight of the batch, that is a number outside of 0 and 1.

    >>> require_gain(1.5)
    Traceback (most recent call last):
    ...
    ValueError: gain lies between 0 and 1; found 1.5
    """
    found = known_numbers(gain)
    if found is not None and not np.all((found >= 0) & (found <= 1)):
        raise ValueError(f"gain lies between 0 and 1; found {gain!r}")
