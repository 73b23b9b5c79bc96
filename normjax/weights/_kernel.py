"""The equation on a kernel, evaluated; scales, masks and fields of kernels."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import as_weights, require_float, statistics_dtype
from normjax._expect.binding import bind
from normjax._expect.expectation import OverFields
from normjax._expect.ranges import scale_of
from normjax._expect.sharding import shards_of
from normjax._leaves import inverse_power, one_of, split_eps
from normjax._normalize.balance import exponent
from normjax._normalize.evaluate import normalize
from normjax.field import Field, FieldError
from normjax.theory import Normalizer

KERNEL, INPUTS, OUTPUTS = "... i o", "... i", "o"
EPS_RULES = ("moment", "root", "floor")

AnyField = Field | str


def evaluate(
    kernel: jax.Array,
    n: Normalizer,
    layout: str,
    scale: ArrayLike | None,
    mask: ArrayLike | None,
    eps_rule: str = "moment",
    eps: ArrayLike = 0.0,
) -> jax.Array:
    """The row n on a kernel with this eps in place of its own.

    With a rule other than "moment", what is added to the moment is another number for each output, which the moment gives.
    """
    one_of("eps_rule", eps_rule, EPS_RULES)
    number, traced = split_eps(eps)
    n, eps = dataclasses.replace(n, eps=number), number if traced is None else traced
    field = n.mean if n.var is None else n.var
    assert field is not None
    work = statistics_dtype(kernel.dtype)
    scale = None if scale is None else align_kernel_scale(scale, kernel, layout, field, work)
    mask = None if mask is None else valid_weights(kernel, mask)
    if n.var is not None and traced is None and not number:
        return normalize(kernel, n, layout, scale=scale, mask=mask).y
    dtype, kernel = kernel.dtype, kernel.astype(work if kernel.dtype == jnp.float16 else kernel.dtype)
    s, eps = _near_one(kernel if mask is None else jnp.where(mask, kernel, 0), n, eps, layout, field, eps_rule)
    kernel = kernel * s.astype(kernel.dtype)
    if n.var is None:
        back = 1 / s.astype(work)
        return normalize(kernel, n, layout, scale=back if scale is None else back * scale, mask=mask).y.astype(dtype)
    if eps_rule == "moment":
        return normalize(kernel, n, layout, scale=scale, mask=mask, eps=eps).y.astype(dtype)
    stats = normalize(kernel, n, layout, mask=mask).stats
    m = n.gain * stats.var
    if eps_rule == "floor":
        eps = jnp.maximum(eps - m, 0)
    elif n.power == 0.5:  # (sqrt(m) + eps) ** 2 = m + ...
        eps = eps**2 + 2 * eps * root(m, 0.5)
    elif n.power != 1:
        eps = (eps + root(m, n.power)) ** (1 / n.power) - m
    return normalize(kernel, n, layout, stats=stats, scale=scale, mask=mask, eps=eps).y.astype(dtype)


def _near_one(
    kernel: jax.Array, n: Normalizer, eps: ArrayLike, layout: str, field: AnyField, eps_rule: str
) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings the largest weight of each output near one, and the eps of the kernel times it.

    The scaled eps is at most about 1: a kernel that is small beside its eps stays small.
    """
    E = OverFields(layout, kernel.shape)
    s = scale_of(kernel, Field.parse(field), E)
    p = 1.0 if eps_rule == "root" else exponent(n)
    eps = jnp.asarray(eps).astype(s.dtype)
    steps = jnp.clip(jnp.floor(-jnp.log2(eps) / p), -126, 126).astype(np.int32)  # 126 for an eps of zero
    s = jnp.minimum(s, jnp.ldexp(jnp.ones((), s.dtype), steps))
    return s, eps * s**p


def lp_norm(kernel: jax.Array, p: float, layout: str, field: AnyField) -> Normalizer:
    """The Lp norm over a field, as a row."""
    if not p > 0:
        raise ValueError(f"p, the order of a norm, is a positive number or inf; found {p!r}")
    gain, power = (1.0, 1.0) if p == math.inf else (fan_in(kernel, layout, field), 1 / p)
    return Normalizer(None, field, eps=0.0, gain=gain, power=power, order=p)


def fan_in(kernel: jax.Array, layout: str, field: AnyField) -> float:
    """How many weights the field holds, over all shards: what makes a sum of its average."""
    bound = bind(Field.parse(field), layout, kernel.shape)
    return float(bound.reach() * math.prod(shards_of(span) for _, span in bound.spans))


def root(m: jax.Array, power: float) -> jax.Array:
    """The root m ** power, with derivative zero at zero."""
    return inverse_power(m, -power)


floating_kernel = functools.partial(require_float, caller="a reparametrization")  # integers are refused


def valid_weights(kernel: jax.Array, mask: ArrayLike) -> jax.Array:
    """The mask as booleans of the shape of the kernel."""
    weights = as_weights(mask, kernel.astype(statistics_dtype(kernel.dtype)))
    assert weights is not None
    return jnp.broadcast_to(weights.valid, kernel.shape)


def zero_masked_kernel(kernel: ArrayLike, mask: ArrayLike | None) -> jax.Array:
    """The kernel with zeros where masked, which are nothing to a sum."""
    kernel = floating_kernel(kernel)
    return kernel if mask is None else jnp.where(valid_weights(kernel, mask), kernel, jnp.zeros((), kernel.dtype))


def named_axes(kernel: jax.Array, layout: str, field: AnyField) -> set[int]:
    """The axes of the kernel that the field names."""
    return {axis for axis, _ in bind(Field.parse(field), layout, kernel.shape).spans if axis is not None}


def rows_shape(kernel: jax.Array, layout: str, field: AnyField) -> tuple[int, ...]:
    """The shape of one number for each output, at the rank of the kernel."""
    named = named_axes(kernel, layout, field)
    return tuple(1 if axis in named else size for axis, size in enumerate(kernel.shape))


def align_kernel_scale(
    scale: ArrayLike, kernel: jax.Array, layout: str, field: AnyField, dtype: DTypeLike
) -> jax.Array:
    """The scale, laid along the axes that the field does not name."""
    scale = jnp.asarray(scale)
    given, named = scale.shape, named_axes(kernel, layout, field)
    outputs = tuple(size for axis, size in enumerate(kernel.shape) if axis not in named)
    if given and given == outputs:
        scale = scale.reshape(rows_shape(kernel, layout, field))
    fits = scale.ndim in (0, kernel.ndim) and all(a in (1, b) for a, b in zip(scale.shape, kernel.shape, strict=False))
    if not fits:
        raise FieldError(
            f"a scale is a scalar, has the shape {outputs} of the outputs, or the rank of the kernel: found "
            f'shape {given}, kernel {kernel.shape}, layout "{layout}", field "{field}"'
        )
    return scale.astype(dtype)
