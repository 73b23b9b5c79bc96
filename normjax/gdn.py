"""Generalized divisive normalization: the suppression field has learned weights, and the transformation has an inverse.

    q_i = beta_i + sum_j gamma_ij |x_j| ** alpha          the pool, over the channels of one position
    y_i = x_i / q_i ** epsilon                            GDN
    x_i = y_i * q_i(y) ** epsilon                         IGDN, with beta and gamma of its own

Weights that are equal, or equal within a window, make it a row of the equation (`theory.py`): "rms", "response".

alpha and epsilon are exponents here, as in the papers: *epsilon is not the small number `eps`* that other families add to a
moment; in GDN beta takes its place.

beta and gamma stay in their domain by what is learned in their place, r with beta = max(r, bound) ** 2 - offset ** 2. The
published rule for the gradient below the bound keeps it only where a step would raise r. That depends on the sign of
what comes back, so it is no derivative, and forward mode has none of it. Here the gradient always passes; `towards_bound`
then drops what would leave the domain, as a step on the gradients, and the two together are the published rule.
"""

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import Weights, as_weights, require_float, statistics_dtype, zero_masked
from normjax._expect.binding import axes
from normjax._leaves import inverse_power, one_of
from normjax.field import FieldError

GRADIENTS = ("pass", "block")
OFFSET = 2.0**-18
T = TypeVar("T")


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
    """Divides each channel by a pool of all channels of its position.

    Args:
      x: floating-point array, axes as named by `layout`, which names `c`. [units u]
      beta: `[c]`, positive. [u ** alpha]
      gamma: `[c, c]`, non-negative; row i holds the weights of the pool that divides channel i. TensorFlow Compression
        keeps the transpose.
      layout: name of each axis of x.
      alpha: exponent inside the pool, a positive number or a scalar array.
      epsilon: exponent of the pool (not a small addend), a positive number or a scalar array. alpha = 2 and epsilon = 1/2
        are the paper's for images; alpha = epsilon = 1 is the cheaper form of Johnston et al. 2019. y has no units where
        alpha * epsilon = 1.
      mask: boolean mask or weights that broadcast against x; a masked channel is in no pool, and its y is 0.

    Returns:
      An array of the shape and dtype of x. The pool is float32 or wider.

    Raises:
      FieldError: beta or gamma has another shape than the channels need (as have those of all channels beside one shard
        of them inside `shard_map`: there the pool has no collective), or the layout names no `c`.
      TypeError: x holds integers.
      ValueError: alpha or epsilon is not positive.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1, without its linear map; here one
    alpha and one epsilon serve all channels.

    >>> x = jnp.array([[3.0, 4.0]])
    >>> (10 * gdn(x, jnp.zeros(2), jnp.ones((2, 2)))).round().tolist()      # the direction of x
    [[6.0, 8.0]]
    >>> gdn(x, jnp.ones(2), jnp.ones((2, 2)), alpha=1, epsilon=1).tolist()
    [[0.375, 0.5]]
    """
    x, work, q = _start(x, beta, gamma, layout, alpha, epsilon, mask, "gdn")
    number = _number(epsilon)
    d = _power(q, -jnp.asarray(epsilon)) if number is None else inverse_power(q, number)
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

    It is one step of the fixed-point iteration that inverts GDN, from y, where the parameters are those of the GDN;
    decoders learn their own. For the inverse itself see `inverse`.

    Args:
      y: floating-point array, axes as named by `layout`, which names `c`. [units u]
      beta: `[c]`, positive. [u ** alpha]
      gamma: `[c, c]`, non-negative; row i holds the weights of the pool that multiplies channel i.
      layout: name of each axis of y.
      alpha: exponent inside the pool, a positive number or a scalar array.
      epsilon: exponent of the pool (not a small addend), a positive number or a scalar array.
      mask: boolean mask or weights that broadcast against y; a masked channel is in no pool, and becomes 0.

    Returns:
      An array of the shape and dtype of y.

    Raises:
      FieldError: beta or gamma has another shape than the channels need, or the layout names no `c`.
      TypeError: y holds integers.
      ValueError: alpha or epsilon is not positive.

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
    alpha * epsilon * (1 - beta / q), its largest value over the channels at the solution; this is below 1 for
    alpha * epsilon <= 1, and close to 1 where the channels are far above sqrt(beta). The paper starts from the solution for
    beta = 0 and a diagonal gamma, which exists for alpha * epsilon < 1 alone.

    Args:
      y: floating-point array, axes as named by `layout`, which names `c`.
      beta: `[c]`, positive, of the GDN.
      gamma: `[c, c]`, non-negative, of the GDN; row i holds the weights of the pool that divided channel i.
      layout: name of each axis of y.
      alpha: exponent inside the pool, a positive number or a scalar array.
      epsilon: exponent of the pool (not a small addend), a positive number or a scalar array.
      steps: number of iterations; each keeps an array of the size of y for the gradient. None solves the linear system.

    Returns:
      An array of the shape and dtype of y, which can be differentiated, in the second form through all the steps.

    Raises:
      FieldError: beta or gamma has another shape than the channels need, or the layout names no `c`.
      TypeError: y holds integers.
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


def nonnegative(raw: ArrayLike, minimum: float = 0.0, *, offset: float = OFFSET, gradient: str = "pass") -> jax.Array:
    """The parameter that a learned number stands for: max(raw, bound) ** 2 - offset ** 2, never below `minimum`.

    Args:
      raw: learned numbers of any shape.
      minimum: smallest value; the bound is sqrt(minimum + offset ** 2).
      offset: keeps the slope at value 0 from being 0; the slope there is 2 * offset, so small values learn slowly.
      gradient: what comes back to a raw number below the bound: "pass" (as at the bound) or "block" (nothing, so
        that it never returns). `towards_bound` makes the published rule out of the first.

    Returns:
      An array of the shape of raw, float32 or wider.

    Raises:
      TypeError: raw holds integers.
      ValueError: no gradient has this name.

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
    """The number to learn that stands for a parameter: the inverse of `nonnegative`.

    Args:
      value: the parameter, an array of any shape, non-negative.
      offset: the offset that `nonnegative` is given.

    Returns:
      An array of the shape and dtype of value.

    Raises:
      TypeError: value holds integers.

    Source: Balle 2018 (efficient nonlinear transforms), section 2.

    >>> nonnegative(to_raw(jnp.array([0.0, 0.1]))).round(6).tolist()
    [0.0, 0.10000000149011612]
    """
    value = require_float(value, "to_raw")
    return jnp.sqrt(jnp.maximum(value, 0) + jnp.asarray(offset**2, value.dtype))


def towards_bound(gradient: ArrayLike, raw: ArrayLike, minimum: float = 0.0, *, offset: float = OFFSET) -> jax.Array:
    """The gradient of a raw number, without what would drive it further below its bound (descent is assumed).

    Apply it to the gradients of beta, gamma, alpha and epsilon before the optimizer sees them.

    Args:
      gradient: array of the shape of raw.
      raw: the learned number.
      minimum: smallest value of the parameter that it stands for, see `MINIMA`.
      offset: the offset that `nonnegative` is given.

    Returns:
      An array of the shape and dtype of the gradient.

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
    """The shape of everything that can be learned, for an input of this shape.

    Args:
      layout: name of each axis of the input, which names `c`.
      shape: shape of the input; lengths other than that of `c` may be None.

    Raises:
      FieldError: the layout names no channels.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1.

    >>> shapes("n c ...", (8, 3, 5, 5))
    Raw(beta=(3,), gamma=(3, 3), alpha=(), epsilon=())
    """
    size = shape[_channels(layout, len(shape))]
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

    Returns:
      An array of the shape of x.

    Raises:
      FieldError: the layout names no channels, or shapes do not fit.
      TypeError: integer input.

    Source: Balle, Laparra & Simoncelli 2016 (density modeling), section 3.1, and 2017 (end-to-end), section 2.

    >>> x = jnp.array([[3.0, -4.0]])
    >>> (1000 * gdn_of_raw(x, Raw(to_raw(jnp.ones(2)), to_raw(0.1 * jnp.eye(2))))).round().tolist()
    [[2176.0, -2481.0]]
    """
    x = require_float(x, "GDN")
    dtype = jnp.dtype(dtype or x.dtype)
    x = jnp.maximum(x, 0) if rectify else x

    def value(name: str, minimum: float) -> jax.Array:
        return nonnegative(getattr(raw, name), minimum, offset=offset, gradient=gradient)

    a = alpha if raw.alpha is None else value("alpha", MINIMA.alpha)
    e = epsilon if raw.epsilon is None else value("epsilon", MINIMA.epsilon)
    f = igdn if inverse else gdn
    work = x.astype(statistics_dtype(x.dtype))
    y = f(work, value("beta", beta_min), value("gamma", MINIMA.gamma), layout, alpha=a, epsilon=e, mask=mask)
    return y.astype(dtype)


def diagonal(size: float = 0.1) -> Callable[..., jax.Array]:
    """An initializer of gamma: each channel is divided by itself alone.

    Args:
      size: the weight of the channel itself.

    Returns:
      A function of a random key, a shape `[c, c]` and a dtype.

    Source: the initial values of TensorFlow Compression.

    >>> diagonal()(jax.random.key(0), (2, 2), jnp.float32).tolist()
    [[0.10000000149011612, 0.0], [0.0, 0.10000000149011612]]
    """
    return lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype) * jnp.asarray(size, dtype)


def _channels(layout: str, ndim: int) -> int:
    where = axes(layout, ndim)
    if "c" not in where:
        raise FieldError(f"GDN pools over the axis 'c', which layout \"{layout}\" does not name")
    return where["c"][0]


def _number(value: ArrayLike) -> float | None:
    """The value, if it is a plain number: its power may have a quick form."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _parameters(
    beta: ArrayLike, gamma: ArrayLike, layout: str, x: jax.Array, alpha: ArrayLike, epsilon: ArrayLike
) -> tuple[jax.Array, jax.Array, int]:
    """The parameters in the real dtype of the work, and the axis of the channels."""
    for name, value in (("alpha", alpha), ("epsilon", epsilon)):
        number = _number(value)
        if jnp.ndim(value) or (number is not None and not number > 0):
            raise ValueError(f"{name} is a positive number or a scalar array; found {value}")
    axis, real = _channels(layout, x.ndim), jnp.finfo(x.dtype).dtype
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
