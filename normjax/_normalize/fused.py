"""The equation by a fused kernel, where one is used and fits: the axes of a normalizer, as the kernels are told them."""

from typing import NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from normjax import kernels
from normjax._expect.expectation import OverFields
from normjax._normalize.tangents import Parts
from normjax.theory import Normalizer


class Given(Protocol):
    """What came with x, as arrays that broadcast against it; None where nothing did."""

    @property
    def eps(self) -> jax.Array | None: ...
    @property
    def scale(self) -> jax.Array | None: ...
    @property
    def bias(self) -> jax.Array | None: ...


class Axes(NamedTuple):
    """The axes that are averaged whole, and the blocks of the last one; no blocks where it is one of the axes."""

    whole: tuple[int, ...]
    groups: int


def axes(x: jax.Array, n: Normalizer, E: OverFields, given: Given) -> Axes | None:
    """The axes for a kernel that is used and evaluates the equation: order 2 over one field of this array; else None."""
    if kernels.used() == "xla" or E.weights is not None or n.var is None or n.mean not in (None, n.var):
        return None
    if n.order != 2 or n.floor is not None or n.keep_mean:
        return None
    bound, last = E.plan(n.var).bound, x.ndim - 1
    if not bound.pooled or not all(axis is not None and not span.mapped for axis, span in bound.spans):
        return None
    blocks = dict(bound.by("blocks"))
    if blocks.keys() - {last}:
        return None
    groups = blocks[last].blocks if blocks else 0 if not bound.whole or max(bound.whole) == last else x.shape[-1]
    scale, bias, eps = (None if p is None else p.shape for p in (given.scale, given.bias, given.eps))
    taken = kernels.fits(
        x.shape, bound.whole, scale, bias, x.dtype, eps or (), jax.typeof(x).sharding.spec, groups or 0
    )
    return Axes(bound.whole, groups or 0) if taken else None


def normalized(x: jax.Array, n: Normalizer, at: Axes, given: Given, dtype: DTypeLike) -> Parts:
    """The parts of `normalize`, by a kernel."""
    y, _, mean, var = _evaluated(x, None, n, at, given, dtype, None)
    v = x.astype(var.dtype)
    return y, v if mean is None else v - mean, mean, var


def added(
    x: jax.Array,
    residual: jax.Array | None,
    n: Normalizer,
    at: Axes,
    given: Given,
    dtype: DTypeLike,
    activation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The output for x + residual, through an activation, and the sum, by a kernel; groups are given the sum."""
    if at.groups:
        x, residual = kernels.sum_of(x, residual), None
    y, total, *_ = _evaluated(x, residual, n, at, given, dtype, activation)
    return y, total


def _evaluated(
    x: jax.Array,
    residual: jax.Array | None,
    n: Normalizer,
    at: Axes,
    given: Given,
    dtype: DTypeLike,
    activation: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    return kernels.add_and_normalize(
        x,
        residual,
        at.whole,
        n.eps if given.eps is None else given.eps,
        given.scale,
        given.bias,
        centre=n.mean is not None,
        gain=n.gain,
        power=n.power,
        dtype=dtype,
        activation=activation,
        groups=at.groups,
    )
