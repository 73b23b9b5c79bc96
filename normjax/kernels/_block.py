"""The arithmetic of a block of rows, in plain JAX: each row is normalized over its length, and its gradient taken.

The kernels run these functions on the blocks that they load; on a whole array `[rows, length]` they are the plain twin.
With s = x + residual, v = s - mean, q = eps + gain E[v ** 2] and r = q ** -power, the output is y = act(z), z = scale v r +
bias. For cotangents g of y and gsum of s, and h = g act'(z) scale:

    dq = -power (r / q) sum(h v)        k = 2 gain dq / length        u = h r + k v        dx = gsum + u - E[u]

dx is the gradient of the residual too; E[u] only where rows are centred. E[v] is in there: it is what rounding left of the
mean.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from normjax import _leaves
from normjax._leaves import nan_if_infinite

Given = jax.Array | None  # None where there is none
inverse_power = functools.partial(_leaves.inverse_power, inverse_root=lax.rsqrt)


@jax.custom_jvp
def _exact_gelu(z: jax.Array) -> jax.Array:
    return z * _normal_cdf(z)


@_exact_gelu.defjvp
def _exact_gelu_tangent(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (z,), (dz,) = primals, tangents
    density = jnp.exp(-0.5 * z * z) * np.float32(1 / math.sqrt(2 * math.pi))
    return _exact_gelu(z), dz * (_normal_cdf(z) + z * density)


def _normal_cdf(z: jax.Array) -> jax.Array:
    """To 1e-7, by exponentials: Triton has no error function. Abramowitz & Stegun 1964, equation 7.1.26."""
    t = 1 / (1 + np.float32(0.3275911 / math.sqrt(2)) * jnp.abs(z))
    coefficients = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    tail = (
        0.5 * functools.reduce(lambda sums, a: (sums + np.float32(a)) * t, coefficients, t * 0) * jnp.exp(-0.5 * z * z)
    )
    return jnp.where(z < 0, tail, 1 - tail)


ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda z: z,
    "relu": lambda z: jnp.where(z <= 0, jnp.zeros_like(z), z),  # Taylor mode cannot see through that of JAX
    "gelu": jax.nn.gelu,
    "exact_gelu": _exact_gelu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class How:
    """All that is static about one call."""

    centre: bool  # whether the mean is subtracted
    gain: float
    power: float
    dtype: DTypeLike  # of y
    biased: bool = False
    added: DTypeLike | None = None  # of x + residual; None without a residual
    run: str = (
        "pallas"  # the kernel of the platform; "interpret" and "interpret tpu": those of a GPU and TPU, interpreted
    )
    activation: str | None = None  # what y goes through, by its name in ACTIVATIONS
    groups: int = 0  # blocks of channels of an example, which `_group.py` takes; 0 for rows

    def activated(self, z: jax.Array) -> jax.Array:
        """The output."""
        return ACTIVATIONS[self.activation](z)

    def pulled(self, z: jax.Array, g: jax.Array) -> jax.Array:
        """The cotangent of z, for one of the output: g act'(z)."""
        return jax.jvp(self.activated, (z,), (g,))[1]


def forward(
    how: How,
    x: jax.Array,
    residual: Given,
    eps: jax.Array,
    scale: Given,
    bias: Given,
    *,
    length: int | None = None,
    valid: Given = None,
) -> tuple[jax.Array, Given, None, None]:
    """`(y, sum, None, None)`: y like x in `how.dtype`, the sum None without a residual; rows keep no statistics.

    x and the residual are `[rows, length]`, eps `[1, 1]` and scale and bias `[1, length]` float32. Where x is wider than
    `length`, it is 0 in the columns that are not `valid`, `[1, width]`.
    """
    added = None if residual is None else _sum(x, residual, how.added)
    v, _, var = statistics(how, x if added is None else added, length, valid)
    y = how.activated(affine(v * inverse_power(eps + how.gain * var, how.power), scale, bias))
    return y.astype(how.dtype), added, None, None


def statistics(
    how: How, x: jax.Array, length: int | None = None, valid: Given = None
) -> tuple[jax.Array, Given, jax.Array]:
    """`(v, mean, var)` of rows, all float32; the mean is None where rows are not centred."""
    length = length or x.shape[1]
    x = x.astype(jnp.float32)
    mean = _total(x) / length if how.centre else None
    v = x if mean is None else x - mean
    v = v if mean is None or valid is None else jnp.where(valid, v, 0)
    return v, mean, nan_if_infinite(_total(v * v) / length, how.gain)


def backward(
    how: How,
    x: jax.Array,
    _mean: Given,
    _var: Given,
    eps: jax.Array,
    scale: Given,
    bias: Given,
    g: jax.Array,
    gsum: Given,
    *,
    length: int | None = None,
    valid: Given = None,
) -> tuple[jax.Array, jax.Array, Given, Given]:
    """The gradient of `forward` without a residual: `(dx, deps, dscale, dbias)`, dx like x, the others summed, float32.

    g and gsum are the cotangents of y and of x itself, like x, and 0 where x is not `valid`. The statistics are taken again:
    a number a row would be padded to 128 on a TPU. The bias is read where there is an activation.
    """
    length = length or x.shape[1]
    v, _, var = statistics(how, x, length, valid)
    q = eps + how.gain * var
    r = inverse_power(q, how.power)
    g = g.astype(jnp.float32)
    g = g if how.activation is None else how.pulled(affine(v * r, scale, bias), g)
    h = g if scale is None else g * scale
    dq = inverse_power(q, 1.0) * (-how.power * r * _total(h * v))  # r / q alone would underflow
    k = (2 / length) * how.gain * dq
    dx = h * r + v * k
    if how.centre:
        dx = dx - (_total(h) * r + _total(v) * k) / length
    if gsum is not None:
        dx = dx + gsum.astype(jnp.float32)
    dscale = None if scale is None else jnp.sum(g * (v * r), 0, keepdims=True)
    dbias = jnp.sum(g, 0, keepdims=True) if how.biased else None
    return dx.astype(x.dtype), jnp.sum(dq, 0, keepdims=True), dscale, dbias


def affine(y: jax.Array, scale: Given, bias: Given) -> jax.Array:
    """The value scale * y + bias; None leaves either out."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _sum(x: jax.Array, residual: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(dtype)


def _total(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows, 1, keepdims=True)
