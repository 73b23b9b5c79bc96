"""Reversible instance normalization (RevIN): normalize a series, let a model forecast it, and undo it on the forecast.

    y = scale * (x - E[x]) / d + bias              what the model sees, d = sqrt(eps + Var[x]) over the time of a series
    x = (y - bias) / scale * d + E[x]              the inverse, for anything that the model answers in the units of y

The statistics travel from the one to the other as a value, `Stats`: the same layer can be used for several series at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import as_weights, require_float, statistics_dtype, zero_masked
from normjax._expect.binding import bind
from normjax._leaves import AMOUNT, one_of
from normjax._normalize.evaluate import affine, equation, normalize
from normjax.conditional import denominator
from normjax.field import FieldError
from normjax.theory import Normalizer, Stats, row

CENTRES = ("mean", "last")
SERIES = Normalizer("...", "...", eps=1e-5)  # the row "instance": time, the axes between examples and channels


class Reversible(NamedTuple):
    """A normalized array, and what undoes it.

    Attributes:
      y: the normalized array, in the shape and dtype of x.
      stats: what was subtracted and the variance, float32 or wider; length 1 along the axes that were averaged.

    Source: Kim et al. 2022, equations 1 and 2.
    """

    y: jax.Array
    stats: Stats


def revin(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    normalizer: Normalizer | str = SERIES,
    centre: str = "mean",
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    detach: bool = False,
    dtype: DTypeLike | None = None,
) -> Reversible:
    """Normalizes each series by its own mean and deviation.

    Args:
      x: floating-point array, axes as named by `layout`; `...` is time. [units u]
      layout: name of each axis of x.
      normalizer: a Normalizer or the name of a row; its fields are whole axes, and it has no floor.
      centre: what is subtracted: "mean", or "last", the last value that is not masked. The variance is around the mean.
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.
      eps: added to the variance, by default the row's number. [u ** 2]
      detach: whether gradients to x stop at mean and variance (not at the last value), as in the authors' code; no other
        gradient changes.
      dtype: of y, by default that of x.

    Source: Kim et al. 2022, equations 1 and 2.

    >>> y, stats = revin(jnp.array([[[2.0], [4.0]]]), eps=0.0)
    >>> y.tolist(), denormalize(jnp.array([[[3.0]]]), stats, eps=0.0).tolist()
    ([[[-1.0], [1.0]]], [[[6.0]]])
    >>> revin(jnp.array([[[2.0], [4.0]]]), centre="last", eps=0.0).y.tolist()
    [[[-2.0], [0.0]]]
    """
    one_of("centre", centre, CENTRES)
    n = _undoable(normalizer)
    x = require_float(x, "revin")
    work = x.astype(statistics_dtype(x.dtype))
    stats = normalize(work, n, layout, mask=mask).stats
    if detach:
        stats = stats._replace(**lax.stop_gradient({"mean": stats.mean, "var": stats.var}))
    if centre == "last":
        stats = stats._replace(mean=_last(work, n, layout, mask))
    dtype = dtype or x.dtype
    out = equation(work, n, layout, stats=stats, scale=scale, bias=bias, mask=mask, eps=eps, dtype=dtype)
    return Reversible(out.y, stats)


def denormalize(
    y: ArrayLike,
    stats: Stats,
    layout: str = "n ... c",
    *,
    normalizer: Normalizer | str = SERIES,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    slack: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Undoes `revin`: with the same arguments, exactly up to rounding.

    Args:
      y: floating-point array, what the model answers in the units of `revin`'s y; its length along time is free.
      stats: the statistics that `revin` returned, which broadcast against y.
      layout: name of each axis of y.
      normalizer: the row that `revin` was given.
      scale: the factor that `revin` was given; where it is zero, nothing is left of x, and the answer is the mean.
      bias: the addend that `revin` was given.
      eps: the number that `revin` was given. [u ** 2]
      slack: added to the scale before the division; the authors' code has eps ** 2, which makes the answer inexact.
      dtype: of the result, by default that of y.

    Source: Kim et al. 2022, equation 3.

    >>> denormalize(jnp.array([[[3.0]]]), Stats(jnp.array([[[1.0]]]), jnp.array([[[4.0]]])), eps=0.0).tolist()
    [[[7.0]]]
    """
    n = _undoable(normalizer)
    y = require_float(y, "denormalize")
    dtype = jnp.dtype(dtype or y.dtype)
    y = y.astype(statistics_dtype(y.dtype))
    for s in stats[:2]:
        if s is not None and (s.ndim != y.ndim or any(a not in (1, b) for a, b in zip(s.shape, y.shape, strict=True))):
            found = f"found shapes {s.shape} and {y.shape}"
            raise FieldError(f"the statistics have the rank of y and broadcast against it: {found}")
    if bias is not None:
        y = affine(y, layout, None, -jnp.asarray(bias))
    if scale is not None:
        scale = jnp.asarray(scale).astype(y.dtype) + jnp.asarray(AMOUNT("slack", slack)).astype(y.dtype)
        y = affine(y, layout, jnp.where(scale != 0, 1 / jnp.where(scale != 0, scale, 1), 0), None)
    if stats.var is not None:
        y = affine(y, layout, denominator(stats.var, n, layout, eps), None)
    return (y if stats.mean is None else affine(y, layout, None, stats.mean)).astype(dtype)


def _undoable(normalizer: Normalizer | str) -> Normalizer:
    n = row(normalizer)
    if n.floor is not None or n.keep_mean or not all(span.whole for field in n.fields for span in field.spans):
        raise ValueError(f"only a row of whole axes, without floor and keep_mean, can be undone; found {n}")
    return n


def _last(x: jax.Array, n: Normalizer, layout: str, mask: ArrayLike | None) -> jax.Array:
    """The last element, or the last with weight, along the one axis that the row averages; zero where there is none."""
    field = n.mean
    if field is None:
        raise ValueError(f'"last" takes the place of a mean; found {n}, which has none')
    bound = bind(field, layout, x.shape)
    if len(bound.whole) != 1 or bound.collectives:
        averaged = f'field "{field}" averages {len(bound.whole)} axes of an array of shape {x.shape}, layout "{layout}"'
        raise FieldError(f'"last" needs one axis of time; {averaged}')
    (axis,) = bound.whole
    weights = as_weights(mask, x)
    if weights is None:
        return lax.slice_in_dim(x, x.shape[axis] - 1, x.shape[axis], axis=axis)
    valid = jnp.broadcast_to(weights.valid, x.shape)
    place = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    last = jnp.max(jnp.where(valid, place, -1), axis, keepdims=True)
    return jnp.sum(jnp.where(place == last, zero_masked(x, weights), 0), axis, keepdims=True)
