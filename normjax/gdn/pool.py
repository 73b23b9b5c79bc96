"""The pool of GDN: what divides, what multiplies, and the exact inverse."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import Weights, as_weights, require_float, statistics_dtype, zero_masked
from normjax._expect.binding import axes
from normjax._leaves import Whole, as_python, nan_if_infinite
from normjax.field import FieldError


def gdn(
    x: ArrayLike,
    beta: ArrayLike,
    gamma: ArrayLike,
    layout: str = "n ... c",
    *,
    alpha: ArrayLike = 2.0,
    epsilon: ArrayLike = 0.5,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Divides each channel by a pool of all channels of its position, y = x / (beta + gamma |x| ** alpha) ** epsilon.

    alpha = 2 and epsilon = 1/2 are the paper's for images; alpha = epsilon = 1 is the cheaper form of Johnston et al. 2019.
    y has no units where alpha * epsilon = 1. Inside `shard_map` the pool has no collective: a shard holds all channels.

    Args:
      x: floating-point array, axes as named by `layout`, which names `c`. [units u]
      layout: name of each axis of x.
      beta: `[c]`, positive. [u ** alpha]
      gamma: `[c, c]`, non-negative; row i weighs the pool of channel i (TensorFlow Compression keeps the transpose).
      alpha: exponent inside the pool, a positive number or a scalar array.
      epsilon: exponent of the pool (not a small addend), a positive number or a scalar array.
      mask: boolean mask or weights that broadcast against x; a masked channel is in no pool, and its y is 0.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1, with one alpha and epsilon for all channels.

    >>> x = jnp.array([[3.0, 4.0]])
    >>> (10 * gdn(x, jnp.zeros(2), jnp.ones((2, 2)))).round().tolist()      # the direction of x
    [[6.0, 8.0]]
    >>> gdn(x, jnp.ones(2), jnp.ones((2, 2)), alpha=1, epsilon=1).tolist()
    [[0.375, 0.5]]
    """
    x, work, q = _start(x, beta, gamma, layout, alpha, epsilon, mask, "gdn")
    # Not q ** -epsilon, whose derivative underflows where q is large.
    divides = q != 0
    d = jnp.where(divides, 1 / jnp.where(divides, _power(nan_if_infinite(q), epsilon), 1), 0)
    return (work * d.astype(work.dtype)).astype(x.dtype)


def igdn(
    y: ArrayLike,
    beta: ArrayLike,
    gamma: ArrayLike,
    layout: str = "n ... c",
    *,
    alpha: ArrayLike = 2.0,
    epsilon: ArrayLike = 0.5,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Multiplies by the pool where `gdn` divides: the approximate inverse of the paper's decoders, cheap and learned.

    It is one step, from y, of the iteration by which `inverse` inverts a GDN of these parameters; decoders learn their own.

    Args:
      y: floating-point array, axes as named by `layout`, which names `c`. [units u]
      layout: name of each axis of y.
      beta: `[c]`, positive. [u ** alpha]
      gamma: `[c, c]`, non-negative; row i holds the weights of the pool that multiplies channel i.
      alpha: exponent inside the pool, a positive number or a scalar array.
      epsilon: exponent of the pool (not a small addend), a positive number or a scalar array.
      mask: boolean mask or weights that broadcast against y; a masked channel is in no pool, and becomes 0.

    Source: Balle, Laparra & Simoncelli 2017 (end-to-end optimized image compression), section 2.

    >>> igdn(jnp.array([[3.0, 4.0]]), jnp.zeros(2), jnp.ones((2, 2))).tolist()
    [[15.0, 20.0]]
    """
    y, work, q = _start(y, beta, gamma, layout, alpha, epsilon, mask, "igdn")
    return (work * _power(q, epsilon).astype(work.dtype)).astype(y.dtype)


def inverse(
    y: ArrayLike,
    beta: ArrayLike,
    gamma: ArrayLike,
    layout: str = "n ... c",
    *,
    alpha: ArrayLike = 2.0,
    epsilon: ArrayLike = 0.5,
    steps: int | None = None,
) -> jax.Array:
    """Finds the x with gdn(x) = y.

    Without `steps`, and alpha * epsilon = 1: w = |x| ** alpha solves the linear system w = |y| ** alpha * (beta + gamma w),
    one for each position, which is exact. A y that no x gives (the system's spectral radius is 1 or more) becomes NaN.

    With `steps`: x <- y * q(x) ** epsilon, starting from x = 0. |x| only grows and stays below the solution, so that it
    converges, to infinity where there is none. One step multiplies the largest error of log |x| by at most
    alpha * epsilon * (1 - beta / q), which is close to 1 where the channels are far above sqrt(beta).

    Args:
      y: floating-point array, axes as named by `layout`, which names `c`.
      layout: name of each axis of y.
      beta: `[c]`, positive, of the GDN.
      gamma: `[c, c]`, non-negative, of the GDN; row i holds the weights of the pool that divided channel i.
      alpha: exponent inside the pool, a positive number or a scalar array.
      epsilon: exponent of the pool (not a small addend), a positive number or a scalar array.
      steps: number of iterations; each keeps an array of the size of y for the gradient. None solves the linear system.

    Raises:
      ValueError: alpha * epsilon is above 1; or without `steps` is not 1, or not known as a number.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.2 (the iteration); the system is our own.

    >>> x, beta, gamma = jnp.array([[3.0, -4.0]]), jnp.ones(2), jnp.array([[0.1, 0.2], [0.0, 0.3]])
    >>> inverse(gdn(x, beta, gamma), beta, gamma).round(4).tolist()
    [[3.0, -4.0]]
    >>> inverse(gdn(x, beta, gamma), beta, gamma, steps=100).round(4).tolist()
    [[3.0, -4.0]]
    >>> inverse(jnp.array([[5.0, 5.0]]), beta, gamma).tolist()              # |gdn(x)| stays below 1 / sqrt(0.1)
    [[nan, nan]]
    """
    numbers = _number(alpha), _number(epsilon)
    product = None if None in numbers else math.prod(n for n in numbers if n is not None)
    if product is not None and product > 1 + 1e-6:
        raise ValueError(f"GDN has one inverse for alpha * epsilon <= 1; found {alpha} * {epsilon}")
    if steps is None and (product is None or product < 1 - 1e-6):
        given = "an exponent that is an array" if product is None else f"{alpha} * {epsilon}"
        raise ValueError(f"the inverse without steps needs alpha * epsilon = 1; found {given}; give steps=")
    y = require_float(y, "inverse")
    work = y.astype(statistics_dtype(y.dtype))
    beta, gamma, axis = _parameters(beta, gamma, layout, work, alpha, epsilon)
    if steps is not None:
        steps = Whole(0)("steps", steps)

        def step(_: int, x: jax.Array) -> jax.Array:
            return work * _power(_pool(x, beta, gamma, axis, alpha), epsilon).astype(work.dtype)

        return lax.fori_loop(0, steps, step, jnp.zeros_like(work)).astype(y.dtype)
    a = jnp.moveaxis(_size(work, alpha), axis, -1)[..., None]
    beta_, gamma_ = (p.reshape((1,) * (a.ndim - 2) + shape) for p, shape in ((beta, (-1, 1)), (gamma, gamma.shape)))
    identity = jnp.eye(gamma.shape[0], dtype=a.dtype).reshape(gamma_.shape)
    w = jnp.linalg.solve(identity - a * gamma_, a * beta_)[..., 0]
    q = _weigh(jnp.moveaxis(w, -1, axis), beta, gamma, axis)
    # For positive beta, a solution is positive if and only if the spectral radius is below 1 (M-matrices).
    exists = jnp.all(q > 0, axis, keepdims=True)
    x = work * _power(jnp.where(exists, q, 1), epsilon).astype(work.dtype)
    return jnp.where(exists, x, jnp.full((), jnp.nan, x.dtype)).astype(y.dtype)


def channel_axis(layout: str, ndim: int) -> int:
    """The position of the axis `c`, over which GDN pools, in an array of `ndim` axes.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1: the pool is over channels.

    >>> channel_axis("n c ...", 4)
    1
    """
    where = axes(layout, ndim)
    if "c" not in where:
        raise FieldError(f"GDN pools over the axis 'c', which layout \"{layout}\" does not name")
    return where["c"][0]


def _number(value: ArrayLike) -> float | None:
    """The value, if it is a plain number: its power may have a quick form."""
    value = as_python(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _parameters(
    beta: ArrayLike, gamma: ArrayLike, layout: str, x: jax.Array, alpha: ArrayLike, epsilon: ArrayLike
) -> tuple[jax.Array, jax.Array, int]:
    """The parameters in the real dtype of the work, and the axis of the channels."""
    for name, value in (("alpha", alpha), ("epsilon", epsilon)):
        number = _number(value)
        if jnp.ndim(value) or (number is not None and not number > 0):
            raise ValueError(f"{name} is a positive number or a scalar array; found {value}")
    axis, real = channel_axis(layout, x.ndim), jnp.finfo(x.dtype).dtype
    beta, gamma, size = jnp.asarray(beta), jnp.asarray(gamma), x.shape[axis]
    for name, value, want in (("beta", beta, (size,)), ("gamma", gamma, (size, size))):
        if value.shape != want:
            channels = f'{size} channels (layout "{layout}", shape {x.shape})'
            raise FieldError(f"{name} has shape {value.shape}, but {channels} need {want}")
    return beta.astype(real), gamma.astype(real), axis


def _start(x, beta, gamma, layout: str, alpha: ArrayLike, epsilon: ArrayLike, mask, caller: str):
    """The input, the input in the dtype of the work with its masked elements at zero, and the pool."""
    x = require_float(x, caller)
    work = x.astype(statistics_dtype(x.dtype))
    weights = as_weights(mask, work)
    work = zero_masked(work, weights)
    beta, gamma, axis = _parameters(beta, gamma, layout, work, alpha, epsilon)
    return x, work, _pool(work, beta, gamma, axis, alpha, weights)


def _pool(x, beta, gamma, axis: int, alpha: ArrayLike, weights: Weights | None = None) -> jax.Array:
    a = _size(x, alpha)
    return _weigh(a if weights is None else a * weights.value, beta, gamma, axis)


def _weigh(a: jax.Array, beta: jax.Array, gamma: jax.Array, axis: int) -> jax.Array:
    # The default precision of accelerators would round the squares to 8 or 10 bits.
    pooled = lax.dot_general(a, gamma, (((axis,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(pooled, -1, axis) + beta.reshape([-1 if i == axis else 1 for i in range(a.ndim)])


def _size(x: jax.Array, alpha: ArrayLike) -> jax.Array:
    """|x| ** alpha. TensorFlow Compression leaves out the absolute value for other exponents than 1 and 2."""
    if _number(alpha) == 2:
        return lax.square(x) if not jnp.iscomplexobj(x) else lax.square(x.real) + lax.square(x.imag)
    return _power(jnp.abs(x), alpha)


def _power(q: jax.Array, power: ArrayLike) -> jax.Array:
    """The power of q >= 0, with value and derivatives 0 where q is 0."""
    if _number(power) == 1:
        return q
    nonzero = (q > 0) | jnp.isnan(q)
    safe = jnp.where(nonzero, q, 1)
    raised = lax.sqrt(safe) if _number(power) == 0.5 else safe ** jnp.asarray(power).astype(q.dtype)
    return jnp.where(nonzero, raised, 0)
