"""What a layer of GDN learns in place of beta, gamma and the exponents, so that they stay in their domain.

It learns r with beta = max(r, bound) ** 2 - offset ** 2. The published rule for the gradient below the bound keeps it only
where a step would raise r. That depends on the sign of what comes back, so it is no derivative, and forward mode has none
of it. Here the gradient always passes; `towards_bound` then drops what would leave the domain, as a step on the gradients,
and the two together are the published rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import require_float, statistics_dtype
from normjax._leaves import one_of
from normjax.gdn.pool import channel_axis, gdn, igdn

GRADIENTS = ("pass", "block")
OFFSET = 2.0**-18
T = TypeVar("T")


def nonnegative(raw: ArrayLike, minimum: float = 0.0, *, offset: float = OFFSET, gradient: str = "pass") -> jax.Array:
    """The parameter that a learned number stands for: max(raw, bound) ** 2 - offset ** 2, never below `minimum`.

    Args:
      raw: learned numbers of any shape.
      minimum: smallest value; the bound is sqrt(minimum + offset ** 2).
      offset: keeps the slope at value 0 from being 0; the slope there is 2 * offset, so small values learn slowly.
      gradient: what comes back to a raw number below the bound: "pass" (as at the bound; `towards_bound` makes the
        published rule of it) or "block" (nothing, so that it never returns).

    Source: Balle 2018 (efficient nonlinear transforms), section 2; constants of TensorFlow Compression.

    >>> nonnegative(jnp.array([-1.0, 0.0, 2.0]), 0.25).tolist()
    [0.25, 0.25, 4.0]
    >>> [float(jax.grad(lambda r: nonnegative(r, 0.25, gradient=g))(-1.0)) for g in GRADIENTS]
    [1.0, 0.0]
    """
    one_of("gradient", gradient, GRADIENTS)
    raw = require_float(raw, "nonnegative")
    raw = raw.astype(statistics_dtype(raw.dtype))
    bound = jnp.asarray((minimum + offset**2) ** 0.5, raw.dtype)
    below = bound + (raw - lax.stop_gradient(raw)) if gradient == "pass" else jnp.broadcast_to(bound, raw.shape)
    # A select, not a maximum: at the bound, where a gamma of 0 starts, half of a maximum's gradient would be lost.
    return lax.square(jnp.where(raw >= bound, raw, below)) - jnp.asarray(offset**2, raw.dtype)


def to_raw(value: ArrayLike, offset: float = OFFSET) -> jax.Array:
    """The number to learn that stands for a non-negative parameter of any shape: the inverse of `nonnegative`.

    Args:
      value: the parameter, of any shape.
      offset: keeps the slope at value 0 from being 0, as in `nonnegative`.

    Source: Balle 2018 (efficient nonlinear transforms), section 2.

    >>> nonnegative(to_raw(jnp.array([0.0, 0.1]))).round(6).tolist()
    [0.0, 0.10000000149011612]
    """
    value = require_float(value, "to_raw")
    return jnp.sqrt(jnp.maximum(value, 0) + jnp.asarray(offset**2, value.dtype))


def towards_bound(gradient: ArrayLike, raw: ArrayLike, minimum: float = 0.0, *, offset: float = OFFSET) -> jax.Array:
    """The gradient of a raw number, without what would drive it further below its bound (descent is assumed).

    Apply it to the gradients of beta, gamma, alpha and epsilon, with the `minimum` of each (`MINIMA`) and the offset that
    `nonnegative` is given, before the optimizer sees them.

    Source: TensorFlow Compression, its lower bound with the gradient "identity if towards".

    >>> towards_bound(jnp.array([1.0, -1.0, 1.0]), jnp.array([0.0, 0.0, 1.0]), 0.25).tolist()
    [0.0, -1.0, 1.0]
    """
    gradient, raw = jnp.asarray(gradient), jnp.asarray(raw)
    bound = jnp.asarray((minimum + offset**2) ** 0.5, raw.dtype)
    return jnp.where((raw >= bound) | (gradient < 0), gradient, jnp.zeros((), gradient.dtype))


class Raw(NamedTuple, Generic[T]):
    """What a layer learns (arrays, or their shapes or bounds), each in the form that `nonnegative` turns into a parameter.

    Attributes:
      beta: `[c]`.
      gamma: `[c, c]`.
      alpha: scalar; None where the exponent is fixed.
      epsilon: scalar, the exponent of the pool; None where it is fixed.

    Source: Balle 2018 (efficient nonlinear transforms), section 2.

    >>> MINIMA
    Raw(beta=1e-06, gamma=0.0, alpha=1.0, epsilon=1e-06)
    """

    beta: T
    gamma: T
    alpha: T | None = None
    epsilon: T | None = None


MINIMA = Raw(beta=1e-6, gamma=0.0, alpha=1.0, epsilon=1e-6)


def shapes(layout: str, shape: tuple[int | None, ...]) -> Raw[tuple[int | None, ...]]:
    """The shape of everything that can be learned, for an input of this shape, whose lengths beside `c` may be None.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1.

    >>> shapes("n c ...", (8, 3, 5, 5))
    Raw(beta=(3,), gamma=(3, 3), alpha=(), epsilon=())
    """
    size = shape[channel_axis(layout, len(shape))]
    return Raw((size,), (size, size), (), ())


def gdn_of_raw(
    x: ArrayLike,
    raw: Raw[jax.Array],
    layout: str = "n ... c",
    *,
    alpha: float = 2.0,
    epsilon: float = 0.5,
    inverse: bool = False,
    rectify: bool = False,
    beta_min: float = 1e-6,
    offset: float = OFFSET,
    gradient: str = "pass",
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes x by a pool whose parameters are what a layer learns: GDN, or IGDN (`inverse`).

    Args:
      x: floating-point array, axes as named by `layout`, which names `c`.
      raw: what is learned, `[c]`, `[c, c]` and scalars; its exponents replace `alpha` and `epsilon`.
      layout: name of each axis of x; the pool is over c.
      alpha: exponent inside the pool, where none is learned.
      epsilon: exponent of the pool (not a small addend), where none is learned.
      inverse: multiply by the pool.
      rectify: set negative inputs to zero first.
      beta_min: smallest beta. [units of x ** alpha]
      offset: keeps the slope of the stored square root finite at 0, see `nonnegative`.
      gradient: what comes back to a parameter below its bound, "pass" or "block", see `nonnegative`.
      mask: boolean mask or weights that broadcast against x; what is masked is in no pool, and becomes 0.
      dtype: of the output, by default that of x.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1, and 2017 (end-to-end), section 2.

    >>> x = jnp.array([[3.0, -4.0]])
    >>> (1000 * gdn_of_raw(x, Raw(to_raw(jnp.ones(2)), to_raw(0.1 * jnp.eye(2))))).round().tolist()
    [[2176.0, -2481.0]]
    """
    x = require_float(x, "GDN")
    dtype = jnp.dtype(dtype or x.dtype)
    x = jnp.maximum(x, 0) if rectify else x

    def value(name: str, minimum: float | None = None) -> jax.Array:
        least: float = getattr(MINIMA, name) if minimum is None else minimum
        return nonnegative(getattr(raw, name), least, offset=offset, gradient=gradient)

    a = alpha if raw.alpha is None else value("alpha")
    e = epsilon if raw.epsilon is None else value("epsilon")
    f = igdn if inverse else gdn
    work = x.astype(statistics_dtype(x.dtype))
    y = f(work, value("beta", beta_min), value("gamma"), layout, alpha=a, epsilon=e, mask=mask)
    return y.astype(dtype)


@dataclass(frozen=True)
class _Diagonal:
    """An initializer that compares by value, so that layers with it are equal after pickling."""

    size: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jnp.eye(*shape, dtype=dtype) * jnp.asarray(self.size, dtype)


def diagonal(size: float = 0.1) -> Callable[..., jax.Array]:
    """An initializer of gamma, `[c, c]`: each channel is divided by itself alone, with a weight of this size.

    Source: the initial values of TensorFlow Compression.

    >>> diagonal()(jax.random.key(0), (2, 2), jnp.float32).tolist()
    [[0.10000000149011612, 0.0], [0.0, 0.10000000149011612]]
    """
    return _Diagonal(size)
