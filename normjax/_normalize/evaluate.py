"""The equation of `theory.py`, evaluated: everything is laid beside x once, then the plain form, the rule or a kernel runs.

`normalize` is for users, and refuses what leaves no number to be right; `equation` is for layers that accept what Flax
accepts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import kernels
from normjax._expect.arrays import (
    align_eps,
    align_parameter,
    align_statistic,
    as_weights,
    require_float,
    statistics_dtype,
)
from normjax._expect.binding import axes, bind
from normjax._expect.expectation import OverFields
from normjax._expect.sharding import shards_of
from normjax._normalize import derivative
from normjax._normalize.tangents import Parts
from normjax.field import FieldError
from normjax.theory import Normalizer, Stats, output, row, scale_and_shift, statistics


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

    Numerical decisions: statistics accumulate in float32 or wider, windows too. The moment is taken of the centred v
    (two passes), so it cannot be negative or cancel. Where the denominator is zero (eps = 0 and v = 0), y and its gradient
    are zero. Masked elements are selected away before any arithmetic, so a NaN there reaches nothing.

    Arrays that are sharded over devices under `jit` are normalized as wholes. Inside `shard_map`, `pmap` and `vmap` an
    array is one shard or one example; a field reaches beyond it along the axes that it maps: `"@data n ..."`, `"h:5@rows"`.

    Args:
      x: array of a real or complex floating dtype, axes as named by `layout`. [units u]
      normalizer: a Normalizer, or the name of a row of TABLE.
      layout: name of each axis of x; `...` matches any number of axes.
      stats: moments to use instead of those of x (inference); one that is None is computed from x, around the given
        mean. Each has the rank of x and broadcasts against it.
      scale: factor of y: a scalar; one number a channel (axis c of the layout), `[c]`; one for each example and
        channel, `[n, c]`; or an array of the rank of x that broadcasts against it.
      bias: added to scale * y; a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or non-negative weights that broadcast against x. At weight zero, x is left out of every
        statistic and y is 0, so that the output is the bias.
      eps: replaces the row's number, for a learned sigma: a scalar or an array that broadcasts. [units u ** order]

    Returns:
      `(y, centered, stats)`; y has the dtype of x.

    Raises:
      FieldError: field, layout, shapes or mapped axes do not fit, or A holds a single element.
      TypeError: x holds integers.
      ValueError: no row has this name.

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
        if size > 1 or padded:
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
    """The equation itself, without the refusals of `normalize`: for layers that accept what Flax accepts.

    Args:
      x: array of a real or complex floating dtype, axes as named by `layout`. [units u]
      normalizer: the two fields and the few numbers.
      layout: name of each axis of x; `...` matches any number of axes.
      stats: moments to use instead of those of x; one that is None is computed from x, around the given mean.
      scale: factor of y: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: added to scale * y: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or non-negative weights that broadcast against x; y is 0 where it is zero.
      eps: replaces the row's number: a scalar or an array that broadcasts. [units u ** order]
      dtype: of y, by default that of x.

    Returns:
      `(y, centered, stats)`.

    Raises:
      FieldError: field, layout, shapes or mapped axes do not fit.

    >>> equation(jnp.ones((3, 1)), Normalizer("c", "c")).y.tolist()
    [[0.0], [0.0], [0.0]]
    """
    n, work = normalizer, statistics_dtype(x.dtype)
    given = _operands(x, n, layout, stats, eps, scale, bias)
    afresh = given.mean is None and given.moment is None
    recentred = n.keep_mean and n.mean == n.var and given.mean is None
    E = OverFields(layout, x.shape, n.border, n.window, n.lean, as_weights(mask, x.astype(work)), recentred)
    dtype = jnp.dtype(dtype or x.dtype)
    if afresh and kernels.used() != "xla" and _is_for_kernels(x, n, E, given):
        y, v, mean, moment = _by_kernel(x, n, E, given, dtype)
    elif afresh and derivative.has_rule(n, E, x):
        y, v, mean, moment = derivative.ruled(n, E, dtype, x, given.eps, given.scale, given.bias)
    else:
        y, v, mean, moment = _plain(x, n, E, given, dtype)
    return Normalized(y, v, Stats(mean, moment, *_weights_behind(n, E, given, stats, work)))


def _operands(
    x: jax.Array,
    n: Normalizer,
    layout: str,
    stats: Stats | None,
    eps: ArrayLike | None,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
) -> Operands:
    work = statistics_dtype(x.dtype)
    real = jnp.finfo(work).dtype
    mean, moment = (stats.mean, stats.var) if stats else (None, None)
    scale, bias = _parameters(scale, bias, x, layout, work)
    return Operands(
        mean=None if mean is None or n.mean is None else align_statistic(mean, x, "mean", work),
        moment=None if moment is None or n.var is None else align_statistic(moment, x, "var", real),
        eps=None if eps is None else align_eps(eps, x, real),
        scale=scale,
        bias=bias,
    )


def _parameters(
    scale: ArrayLike | None, bias: ArrayLike | None, x: jax.Array, layout: str, dtype: DTypeLike
) -> list[jax.Array | None]:
    named = (("scale", scale), ("bias", bias))
    return [None if p is None else align_parameter(p, x, layout, name, dtype) for name, p in named]


def _weights_behind(
    n: Normalizer, E: OverFields, given: Operands, stats: Stats | None, dtype: DTypeLike
) -> list[ArrayLike | None]:
    """The weight behind the mean and the moment; of one that was given, the weight that came with it."""
    came = (stats.mean_weight, stats.var_weight) if stats else (None, None)
    statistics_given = (given.mean is not None, given.moment is not None)
    return [
        weight if is_given else None if field is None else E.weight(field, dtype)
        for field, is_given, weight in zip((n.mean, n.var), statistics_given, came, strict=True)
    ]


def _plain(x: jax.Array, n: Normalizer, E: OverFields, given: Operands, dtype: DTypeLike) -> Parts:
    """The equation as it stands; JAX differentiates it."""
    x = E.only(x.astype(statistics_dtype(x.dtype)))
    v, mean, moment = statistics(x, n, E, given.mean, given.moment)
    y = scale_and_shift(output(x, v, moment, n, E, given.eps), given.scale, given.bias)
    return y.astype(dtype), v, mean, moment


def _is_for_kernels(x: jax.Array, n: Normalizer, E: OverFields, given: Operands) -> bool:
    """Whether a fused kernel evaluates the equation: order 2 over whole trailing axes of this array."""
    if E.weights is not None or n.var is None or n.mean not in (None, n.var):
        return False
    if n.order != 2 or n.floor is not None or n.keep_mean:
        return False
    bound = E.plan(n.var).bound
    if not all(axis is not None and span.whole and not span.mapped for axis, span in bound.spans):
        return False
    scale, bias, eps = (None if p is None else p.shape for p in (given.scale, given.bias, given.eps))
    return kernels.fits(x.shape, bound.whole, scale, bias, x.dtype, eps or (), jax.typeof(x).sharding.spec)


def _by_kernel(x: jax.Array, n: Normalizer, E: OverFields, given: Operands, dtype: DTypeLike) -> Parts:
    """What `_plain` returns, from the kernels that the user switched on."""
    assert n.var is not None
    y, mean, var = kernels.normalize(
        x,
        E.plan(n.var).bound.whole,
        n.eps if given.eps is None else given.eps,
        given.scale,
        given.bias,
        centre=n.mean is not None,
        gain=n.gain,
        power=n.power,
        dtype=dtype,
    )
    v = x.astype(var.dtype)
    return y, v if mean is None else v - mean, mean, var


def affine(y: jax.Array, layout: str, scale: ArrayLike | None = None, bias: ArrayLike | None = None) -> jax.Array:
    """The last line of the equation alone, scale * y + bias, for scale and bias as `normalize` takes them.

    Args:
      y: array of a floating dtype, axes as named by `layout`.
      layout: name of each axis of y.
      scale: a scalar, `[c]`, `[n, c]`, or of the rank of y; None for 1.
      bias: a scalar, `[c]`, `[n, c]`, or of the rank of y; None for 0.

    Returns:
      An array of the shape and dtype of y.

    >>> affine(jnp.ones((1, 2)), "n c", jnp.array([2.0, 3.0]), 1.0).tolist()
    [[3.0, 4.0]]
    """
    return scale_and_shift(y, *_parameters(scale, bias, y, layout, y.dtype))
