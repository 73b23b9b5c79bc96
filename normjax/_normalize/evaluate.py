"""The equation of `theory.py`, evaluated: all is laid beside x once, then the plain form, the rule or a kernel runs."""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import kernels
from normjax._expect.arrays import (
    align_parameter,
    align_statistic,
    as_weights,
    require_float,
    require_stats,
    statistics_dtype,
)
from normjax._expect.binding import axes, bind
from normjax._expect.expectation import OverFields
from normjax._expect.sharding import shards_of
from normjax._expect.sizes import at_least
from normjax._leaves import refuse_unless
from normjax._normalize import balance, derivative, fused, windows
from normjax._normalize.tangents import Parts
from normjax.field import FieldError
from normjax.theory import Normalizer, Stats, is_positive, output, row, scale_and_shift, statistics


class Normalized(NamedTuple):
    """What `normalize` returns.

    Attributes:
      y: the normalized array, in the dtype of x.
      centered: v = x - E_A[x], float32 or wider, 0 where masked; the L1 penalty takes its mean absolute value.
      stats: the moments used.
    """

    y: jax.Array
    centered: jax.Array
    stats: Stats


def normalize(
    x: ArrayLike,
    normalizer: Normalizer | str,
    layout: str = "n ... c",
    *,
    stats: Stats | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
) -> Normalized:
    """Normalizes x: centres each element over A, divides it by the spread over B.

    Statistics accumulate in float32 or wider, windows too. The moment is taken of the centred v (two passes), so it
    cannot be negative or cancel. Where the denominator is zero (eps = 0 and v = 0), y and its gradient are zero. Masked
    elements are selected away before any arithmetic, so a NaN there reaches nothing.

    Where a statistic, or what the row makes of it, is too large for its dtype, y and the gradients are NaN, never zero.
    Squares of float32 and bfloat16 add up to at most 3e38: keep |v| * sqrt(n) of n elements below 1.8e19, and below 1e17 for
    gradients to all digits. `jax.config.update("jax_debug_nans", True)` finds the place; scaling x, and eps with it, is the
    cure. A row whose own eps is 0 takes v of any size, large and small, at the cost of one more pass over x.

    Arrays that are sharded over devices under `jit` are normalized as wholes. Inside `shard_map`, `pmap` and `vmap` an
    array is one shard or one example; a field reaches beyond it along the axes that it maps: `"@data n ..."`, `"h:5@rows"`.

    Args:
      x: array of a real or complex floating dtype, axes as named by `layout`. [units u]
      normalizer: a Normalizer, or the name of a row of TABLE.
      layout: name of each axis of x; `...` matches any number of axes.
      stats: moments to use instead of those of x (inference), each of the rank of x and broadcasting against it; one that
        is None is computed from x, around the given mean.
      scale: factor of y: a scalar, `[c]` (one number a channel), `[n, c]`, or of the rank of x and broadcasting.
      bias: added to scale * y; a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or non-negative weights that broadcast against x. At weight zero, x is left out of every
        statistic and y is 0, so that the output is the bias.
      eps: replaces the row's number, for a learned sigma: a scalar or an array that broadcasts. [units u ** order]

    Raises:
      FieldError: field, layout, shapes or mapped axes do not fit, or A holds a single element.
      TypeError: x holds integers, to whose dtype y would be rounded. (Layers with Flax's names take them as float32, as
        Flax's do; no other layer does.)
      ValueError: no row has this name; eps or a given var is negative, or a mask is negative or not finite (seen where the
        numbers are known: outside of `jit`, and not on an accelerator).

    Source: Ren et al. 2017, equations 4 to 6; the other rows as named in TABLE.

    >>> x = jnp.array([[1.0, 3.0], [5.0, 7.0]])
    >>> normalize(x, Normalizer("c", "c", eps=0.0)).y.tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    >>> normalize(x, "batch").stats.mean.tolist()                   # each channel over the examples
    [[3.0, 5.0]]
    >>> normalize(x, Normalizer("n", None), bias=jnp.array([0.0, 1.0])).y.tolist()
    [[-2.0, -1.0], [2.0, 3.0]]
    >>> image = jnp.ones((2, 32, 32, 3), jnp.bfloat16)
    >>> normalize(image, Normalizer("...:7 c", "...:5 c", eps=0.25)).y.dtype
    dtype(bfloat16)
    """
    normalizer = row(normalizer)
    x = require_float(x, "normalize")
    require_stats(stats)
    if eps is not None:
        refuse_unless("eps", "is a number of at least 0", eps, lambda numbers: numbers >= 0)
    if stats is not None and stats.var is not None:
        refuse_unless("the var of statistics", "is at least 0", stats.var, lambda numbers: ~(numbers < 0))
    try:
        if mask is None and (stats is None or stats.mean is None):
            _refuse_single_element(normalizer, layout, x.shape)
        return equation(x, normalizer, layout, stats=stats, scale=scale, bias=bias, mask=mask, eps=eps)
    except FieldError as error:
        error.add_note(f'while normalizing shape {x.shape}, layout "{layout}", with {normalizer}')
        raise


def _refuse_single_element(normalizer: Normalizer, layout: str, shape: tuple[int, ...]) -> None:
    """Raises FieldError where centring would leave nothing but zeros."""
    field = normalizer.mean
    if field is None or 0 in shape:
        return
    where = axes(layout, len(shape))
    if any(s.axis is None or where.get(s.axis) or s.axis != "..." for s in field.spans):
        bound = bind(field, layout, shape)
        size = bound.reach() * math.prod(shards_of(span) for _, span in bound.spans)
        padded = normalizer.border == "zero" and any(s.window and s.window > 1 for _, s in bound.spans)
        if padded or at_least(size, 2, unknown=True):
            return
    raise FieldError(f'field "{field}" holds a single element of an array of shape {shape}, so centring leaves zero')


class Operands(NamedTuple):
    """What came with x, as arrays in the dtype of statistics that broadcast against it; None where nothing did."""

    mean: jax.Array | None
    moment: jax.Array | None
    eps: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None


def equation(
    x: jax.Array,
    normalizer: Normalizer,
    layout: str = "n ... c",
    *,
    stats: Stats | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Normalized:
    """`normalize` without its refusals, for layers that accept what Flax accepts; y has this dtype, by default that of x."""
    n, work = normalizer, statistics_dtype(x.dtype)
    mean, moment = (stats.mean, stats.var) if stats else (None, None)
    given = Operands(
        None if mean is None or n.mean is None else align_statistic(mean, x, "mean", work),
        None if moment is None or n.var is None else align_statistic(moment, x, "var", jnp.finfo(work).dtype),
        None if eps is None else align_statistic(eps, x, "eps", jnp.finfo(work).dtype),
        *_parameters(scale, bias, x, layout, work),
    )
    recentred = n.keep_mean and n.mean == n.var and given.mean is None
    E = OverFields(layout, x.shape, n.border, n.window, n.lean, as_weights(mask, x.astype(work)), recentred)
    parts = _scaled if _unprotected(x, n, given) else _parts
    y, v, mean, moment = parts(x, n, E, given, jnp.dtype(dtype or x.dtype))
    came = (stats.mean_weight, stats.var_weight) if stats else (None, None)
    weights = [  # behind the mean and the moment; of one that was given, what came with it
        weight if statistic is not None else None if field is None else E.weight(field, work)
        for field, statistic, weight in zip((n.mean, n.var), given[:2], came, strict=True)
    ]
    return Normalized(y, v, Stats(mean, moment, *weights))


def add_and_normalize(
    x: jax.Array,
    residual: jax.Array | None,
    n: Normalizer,
    layout: str,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    activation: str | None = None,
    refused: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The output act(scale * normalized sum + bias), and the sum x + residual; by one kernel where it is used and fits.

    The output has this dtype, by default that of x; the sum the wider one of x and the residual. Without a residual the
    sum is x. With `refused` a field that holds a single element is, as by `normalize`.
    """
    if refused and mask is None:
        _refuse_single_element(n, layout, x.shape)
    work, dtype = statistics_dtype(x.dtype), jnp.dtype(dtype or x.dtype)
    eps = None if eps is None else align_statistic(eps, x, "eps", jnp.finfo(work).dtype)
    given = Operands(None, None, eps, *_parameters(scale, bias, x, layout, work))
    E = OverFields(layout, x.shape, n.border, n.window, n.lean, as_weights(mask, x.astype(work)))
    at = None if _unprotected(x, n, given) else fused.axes(x, n, E, given)
    if at:
        return fused.added(x, residual, n, at, given, dtype, activation)
    total = kernels.sum_of(x, residual)
    y = equation(total, n, layout, scale=scale, bias=bias, mask=mask, eps=eps, dtype=dtype).y
    return kernels.ACTIVATIONS[activation](y), total


def _parameters(
    scale: ArrayLike | None, bias: ArrayLike | None, x: jax.Array, layout: str, dtype: DTypeLike
) -> list[jax.Array | None]:
    named = {"scale": scale, "bias": bias}
    return [None if p is None else align_parameter(p, x, layout, name, dtype) for name, p in named.items()]


def _parts(x: jax.Array, n: Normalizer, E: OverFields, given: Operands, dtype: DTypeLike) -> Parts:
    """The equation by a kernel, by the derivative rule, or as it stands."""
    afresh = given.mean is None and given.moment is None
    if afresh and (at := fused.axes(x, n, E, given)):
        return fused.normalized(x, n, at, given, dtype)
    if afresh and derivative.has_rule(n, E, x, given.eps, given.scale, given.bias):
        return derivative.ruled(n, E, dtype, x, given.eps, given.scale, given.bias)
    return _plain(x, n, E, given, dtype)


def _plain(x: jax.Array, n: Normalizer, E: OverFields, given: Operands, dtype: DTypeLike) -> Parts:
    """The equation as it stands; JAX differentiates it."""
    if windows.has_rule(n, E, x, given.moment, given.mean, *given[2:]):
        return windows.ruled(n, E, dtype, x, given.mean, *given[2:])
    x = E.only(x.astype(statistics_dtype(x.dtype)))
    v, mean, moment = statistics(x, n, E, given.mean, given.moment)
    if moment is None:
        return scale_and_shift(output(x, v, None, n, E), given.scale, given.bias).astype(dtype), v, mean, None
    n, m, eps, scale = balance.balanced(n, moment, given.eps, given.scale, v.dtype)
    return scale_and_shift(output(x, v, m, n, E, eps), scale, given.bias).astype(dtype), v, mean, moment


def _unprotected(x: jax.Array, n: Normalizer, given: Operands) -> bool:
    """Whether nothing but v, taken of x, is in the denominator; squares of float16 are always in the range of float32."""
    afresh = n.var is not None and given.moment is None and given.eps is None
    return afresh and not is_positive(n) and x.dtype != jnp.float16


def _scaled(x: jax.Array, n: Normalizer, E: OverFields, given: Operands, dtype: DTypeLike) -> Parts:
    """The equation without an eps, for v of any size."""
    if given.mean is None and balance.scales_alike(n, E):
        s, eps, back = balance.scaled_to_one(x, n, E)
        scale = given.scale if back is None else back if given.scale is None else given.scale * back
        y, v, mean, moment = _parts(x * s.astype(x.dtype), n, E, given._replace(eps=eps, scale=scale), dtype)
        assert moment is not None
        of_v = s.astype(v.dtype)
        return y, v / of_v, None if mean is None else mean / of_v, balance.unscaled(moment, n, s)
    if n.order != 2:
        y, v, mean, moment = _plain(x, n, E, given._replace(scale=None, bias=None), statistics_dtype(x.dtype))
        assert moment is not None
        y = balance.unknown_where_lost(y, v, moment)
    else:
        x = E.only(x.astype(statistics_dtype(x.dtype)))
        v, mean, _ = statistics(x, replace(n, var=None), E, given.mean)
        y, moment = balance.output_of_squares(x, v, n, E)
    return scale_and_shift(y, given.scale, given.bias).astype(dtype), v, mean, moment


def affine(y: jax.Array, layout: str, scale: ArrayLike | None = None, bias: ArrayLike | None = None) -> jax.Array:
    """The last line of the equation alone, scale * y + bias, for scale and bias as `normalize` takes them."""
    return scale_and_shift(y, *_parameters(scale, bias, y, layout, y.dtype))
