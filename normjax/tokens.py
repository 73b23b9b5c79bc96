"""Normalizers of a token or a head: vectors of channels by their length, or by that of a part of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights, require_float, statistics_dtype, zero_masked
from normjax._expect.binding import axes
from normjax._expect.ranges import towards_one
from normjax._leaves import COUNT, one_of, split_eps
from normjax._normalize.evaluate import Normalized, equation, normalize
from normjax.field import Field, FieldError
from normjax.theory import TABLE, Normalizer, Stats, is_positive


def l2(features: int, field: Field | str = "c", *, eps: float = 1e-10) -> Normalizer:
    """Length one, x / sqrt(||x|| ** 2 + eps), over fields of so many elements; ScaleNorm has one learned factor behind it.

    Args:
      features: number of elements of the field.
      field: field whose elements have length one together.
      eps: added to the squared length; ScaleNorm's code divides by max(||x||, 1e-5) instead. [units of x squared]

    Source: Nguyen & Salazar 2019, equation 7.

    >>> from normjax import normalize
    >>> normalize(jnp.array([[3.0, 4.0]]), l2(2)).y.round(6).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    return Normalizer(None, field, eps=eps, gain=float(COUNT("features", features)))


def partial_rms(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    fraction: float = 0.0625,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
) -> Normalized:
    """pRMSNorm: x divided by the root mean square of its first channels.

    Args:
      x: floating-point array, axes as named by `layout`. [units u]
      layout: name of each axis of x.
      fraction: part of the channels, rounded up (the paper; its code rounds down).
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      eps: added to the mean square (the code adds 1e-8 to its root). [u ** 2]
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.

    Source: Zhang & Sennrich 2019, section 3.2.

    >>> partial_rms(jnp.array([[2.0, 6.0]]), fraction=0.5, eps=0.0).y.tolist()
    [[1.0, 3.0]]
    """
    x = require_float(x, "partial_rms")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is more than 0 and at most 1; found {fraction!r}")
    number, eps = split_eps(eps)
    n = dataclasses.replace(TABLE["rms"], eps=number)
    axis = axes(layout, x.ndim).get("c", (None,))[0]
    if axis is None:
        raise FieldError(f"partial_rms takes the first channels, axis 'c', which layout \"{layout}\" does not name")
    first = max(1, math.ceil(fraction * x.shape[axis] - 1e-9))
    weights = as_weights(mask, x.astype(statistics_dtype(x.dtype)))
    value = None if weights is None else weights.value
    if value is not None and value.shape[axis] != 1:
        value = lax.slice_in_dim(value, 0, first, axis=axis)
    part = lax.slice_in_dim(x, 0, first, axis=axis)
    if eps is None and not is_positive(n):  # the squares alone divide, so that they must be floats
        s = towards_one(jnp.max(jnp.abs(zero_masked(part, as_weights(value, part))), axis, keepdims=True))
        x, part = x * s.astype(x.dtype), part * s.astype(x.dtype)
    var = equation(part, n, layout, mask=value).stats.var
    return normalize(x, n, layout, stats=Stats(var=var), scale=scale, bias=bias, mask=mask, eps=eps)


QK_KINDS = ("rms", "layer", "l2")


def qk(
    query: ArrayLike,
    key: ArrayLike,
    layout: str = "... c",
    *,
    kind: str = "rms",
    query_scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    eps: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """QK-norm: query and key, each normalized over the axis of a head, before their product.

    Args:
      query: floating-point array `[..., heads, head_dim]`, or axes as named by `layout`.
      key: floating-point array `[..., heads, head_dim]`, or axes as named by `layout`; it may have fewer heads.
      layout: name of each axis of both, where c is the axis of a head.
      kind: "rms"; "layer", layer norm without an addend (Dehghani et al. 2023); "l2", length 1 (Henry et al. 2020).
      query_scale: factor, `[c]` or a scalar; with "l2", `qk_scale` before training, in place of the division by
        sqrt(head_dim): an attention that divides needs sqrt(head_dim) times as much.
      key_scale: factor of the key, `[c]` or a scalar.
      eps: added to the moment, by default 1e-6; or to the squared length for "l2", by default 1e-10. [units of x squared]

    Source: Henry et al. 2020, section 3; Dehghani et al. 2023, section 2.1.

    >>> q, k = qk(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, -2.0]]), kind="l2")
    >>> round(float(jnp.vdot(q, k)), 4)
    -0.8
    """
    one_of("kind", kind, QK_KINDS)
    (number, eps), out = split_eps(eps), []
    for name, x, scale in (("query", query, query_scale), ("key", key, key_scale)):
        x = require_float(x, f"qk, for the {name},")
        where = axes(layout, x.ndim).get("c")
        if where is None:
            raise FieldError(f"qk normalizes over the axis of a head, 'c', which layout \"{layout}\" does not name")
        n = l2(x.shape[where[0]]) if kind == "l2" else Normalizer("c" if kind == "layer" else None, "c", eps=1e-6)
        n = n if number is None else dataclasses.replace(n, eps=number)
        out.append(normalize(x, n, layout, scale=scale, eps=eps).y)
    return out[0], out[1]


def qk_scale(length: int | None) -> float:
    """Where the learned factor of "l2" attention starts: log2(L ** 2 - L), L the 97.5th percentile of training lengths.

    Args:
      length: L, the 97.5th percentile of the lengths of training sequences.

    Source: Henry et al. 2020, section 3.2.

    >>> round(qk_scale(64), 4)
    11.9773
    """
    length = None if length is None else COUNT("length", length)
    if length is None or length < 2:
        raise ValueError(f'kind "l2" starts from the length of sequences, at least 2; found length={length}')
    return math.log2(length**2 - length)
