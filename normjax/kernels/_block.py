"""The arithmetic of a block of rows, in plain JAX: each row is normalized over its length, and its gradient taken.

The kernels run these functions on the blocks that they load; on a whole array `[rows, length]` they are the plain twin.
With v = x - mean, q = eps + gain E[v ** 2] and r = q ** -power, the output is y = scale v r + bias. For a cotangent g
of y, and h = g scale:

    dq = -power (r / q) sum(h v)        k = 2 (gain dq + gvar) / length        dx = u - E[u] + gmean / length, u = h r + k v

E[u] and gmean only where rows are centred. E[v] is in there: it is what rounding left of the mean.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from normjax._leaves import inverse_power, nan_if_infinite

Given = jax.Array | None  # None where there is none
_inverse_power = functools.partial(inverse_power, inverse_root=lax.rsqrt)


@dataclass(frozen=True)
class How:
    """All that is static about one call."""

    centre: bool  # whether the mean is subtracted
    gain: float
    power: float
    dtype: DTypeLike  # of y
    biased: bool = False
    run: str = (
        "pallas"  # the kernel of the platform; "interpret" and "interpret tpu": those of a GPU and TPU, interpreted
    )


def forward(
    how: How, x: jax.Array, eps: jax.Array, scale: Given, bias: Given, *, length: int | None = None, valid: Given = None
) -> tuple[jax.Array, Given, jax.Array]:
    """`(y, mean, var)`: y like x in `how.dtype`; mean (None where rows are not centred) and var `[rows, 1]` float32.

    x is `[rows, length]`, eps `[1, 1]` and scale and bias `[1, length]` float32. Where x is wider than `length`, it is 0 in
    the columns that are not `valid`, `[1, width]`.
    """
    length = length or x.shape[1]
    x = x.astype(jnp.float32)
    mean = _total(x) / length if how.centre else None
    v = _deviations(x, mean, valid)
    var = nan_if_infinite(_total(v * v) / length, how.gain)
    y = v * _inverse_power(eps + how.gain * var, how.power)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.astype(how.dtype), mean, var


def backward(
    how: How,
    x: jax.Array,
    mean: Given,
    var: jax.Array,
    eps: jax.Array,
    scale: Given,
    g: jax.Array,
    gmean: Given,
    gvar: Given,
    *,
    length: int | None = None,
    valid: Given = None,
) -> tuple[jax.Array, jax.Array, Given, Given]:
    """The gradient of `forward`: `(dx, deps, dscale, dbias)`, dx like x, the others summed over the rows, float32.

    g is the cotangent of y, like x, and 0 where x is not `valid`; gmean and gvar `[rows, 1]` float32, or None for zero.
    """
    length = length or x.shape[1]
    v = _deviations(x.astype(jnp.float32), mean, valid)
    g = g.astype(jnp.float32)
    h = g if scale is None else g * scale
    q = eps + how.gain * var
    r = _inverse_power(q, how.power)
    dq = _inverse_power(q, 1.0) * (-how.power * r * _total(h * v))  # r / q alone would underflow
    dvar = how.gain * dq if gvar is None else how.gain * dq + gvar
    k = (2 / length) * dvar
    dx = h * r + v * k
    if how.centre:
        dx = dx - (_total(h) * r + _total(v) * k) / length
    if gmean is not None:
        dx = dx + gmean / length
    dscale = None if scale is None else jnp.sum(g * (v * r), 0, keepdims=True)
    dbias = jnp.sum(g, 0, keepdims=True) if how.biased else None
    return dx.astype(x.dtype), jnp.sum(dq, 0, keepdims=True), dscale, dbias


def _total(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows, 1, keepdims=True)


def _deviations(x: jax.Array, mean: Given, valid: Given) -> jax.Array:
    if mean is None:
        return x
    return x - mean if valid is None else jnp.where(valid, x - mean, 0)
