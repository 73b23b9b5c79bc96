"""SELU: a nonlinearity whose layers drive mean and variance to a fixed point, and the dropout and weights that keep it.

Of a sum of many inputs of mean m and variance s, with weights that sum to omega and whose squares sum to tau, SELU makes
new ones: `selu_moments` is that map, (0, 1) its fixed point for omega = 0 and tau = 1. No statistic is ever taken.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jax.typing import ArrayLike, DTypeLike
from numpy.lib.array_utils import normalize_axis_tuple

from normjax._expect.arrays import require_real, statistics_dtype
from normjax._leaves import integers

ALPHA = 1.6732632423543772848170429916717
SCALE = 1.0507009873554804934193349852946  # lambda in the paper
LOW = -1.7580993408473768599402175208123  # -SCALE * ALPHA, the value far below zero; what alpha dropout drops to


def selu(x: ArrayLike, alpha: ArrayLike = ALPHA, scale: ArrayLike = SCALE, dtype: DTypeLike | None = None) -> jax.Array:
    """Computes scale * x above zero, scale * alpha * (exp(x) - 1) below.

    Args:
      x: real array of any shape. [units of its own fixed point: standardized]
      alpha: scalar; `selu_parameters` gives those of other fixed points.
      scale: scalar, lambda in the paper.
      dtype: of the output, by default that of x.

    Source: Klambauer et al. 2017, equation 2.

    >>> selu(jnp.array([-200.0, 0.0, 2.0]))
    Array([-1.7580993,  0.       ,  2.101402 ], dtype=float32)
    """
    x = require_real(x, "selu")
    # In bfloat16 the rounded constants alone would move the variance by 0.8 per cent a layer.
    work = x.astype(statistics_dtype(x.dtype))
    alpha, scale = jnp.asarray(alpha, work.dtype), jnp.asarray(scale, work.dtype)
    above = work > 0
    # The argument is clamped, or exp overflows where it is not selected and the gradient is inf * 0; by a select, since
    # the slope of a minimum would be halved at 0.
    below = jnp.expm1(jnp.where(above, 0, work))
    return (scale * jnp.where(above, work, alpha * below)).astype(dtype or x.dtype)


def selu_parameters(mean: float = 0.0, var: float = 1.0, omega: float = 0.0, tau: float = 1.0) -> tuple[float, float]:
    """The `(alpha, scale)` of the SELU with this fixed point, in closed form; for (0, 1) the paper's.

    Args:
      mean: mean of the inputs and of the outputs.
      var: variance of the inputs and of the outputs.
      omega: sum of the weights of a unit: 0 for weights around zero; the authors' notebook takes 1, which changes the
        numbers unless the mean is 0.
      tau: sum of the squares of the weights of a unit.

    Raises:
      ValueError: no SELU with positive alpha and scale has this fixed point.

    Source: Klambauer et al. 2017, section 2 and appendix A1; the authors' notebook getSELUparameters.

    >>> [round(number, 12) for number in selu_parameters()] == [round(ALPHA, 12), round(SCALE, 12)]
    True
    >>> [round(number, 10) for number in selu_parameters(-0.1, 2.0, omega=1.0)]
    [1.9769021954, 1.0738512396]
    """
    # With p = scale and q = scale * alpha, the mean is linear in p and q, and the second moment p ** 2 E[z ** 2; z > 0] +
    # q ** 2 E[(1 - exp z) ** 2; z < 0]: a quadratic equation.
    z, s2 = mean * omega, var * tau
    if not (0 < s2 < 300 and abs(z) < 300):
        raise ValueError(f"var * tau lies above 0, and it and |mean * omega| below 300; found {s2} and {z}")
    s = math.sqrt(s2)
    r = z / s
    density, high = math.exp(-(r**2) / 2) / math.sqrt(2 * math.pi), math.erfc(-r / math.sqrt(2)) / 2
    low = [math.exp(k * z + k * k * s2 / 2) * math.erfc((r + k * s) / math.sqrt(2)) / 2 for k in range(3)]
    first, second = z * high + s * density, (z * z + s2) * high + z * s * density  # E[z; z > 0], E[z ** 2; z > 0]
    fall, square = low[0] - low[1], low[0] - 2 * low[1] + low[2]  # E[1 - exp z; z < 0] and of its square
    target = var + mean**2
    # q = (first * p - mean) / fall, put into p ** 2 * second + q ** 2 * square = target
    a, b = second + square * (first / fall) ** 2, square * first * mean / fall**2
    root = b * b - a * (square * (mean / fall) ** 2 - target)
    p = (b + math.sqrt(root)) / a if root >= 0 else -1.0
    q = (first * p - mean) / fall
    if p <= 0 or q <= 0:
        raise ValueError(f"no SELU keeps mean {mean} and variance {var} with omega {omega} and tau {tau}")
    return q / p, p


def selu_moments(
    mean: ArrayLike,
    var: ArrayLike,
    omega: ArrayLike = 0.0,
    tau: ArrayLike = 1.0,
    *,
    alpha: ArrayLike = ALPHA,
    scale: ArrayLike = SCALE,
) -> tuple[jax.Array, jax.Array]:
    """The `(mean, var)` that a layer makes of those of its inputs, for a Gaussian sum, float32 or wider.

    Args:
      mean: mean of the inputs, a scalar or an array; all arguments are scalars, or arrays of one shape.
      var: variance of the inputs; below 1e-12 it counts as that.
      omega: sum of the weights of a unit.
      tau: sum of the squares of the weights of a unit.
      alpha: factor of the SELU below zero.
      scale: factor of the SELU, lambda in the paper.

    Source: Klambauer et al. 2017, equations 4 and 5.

    >>> mean, var = selu_moments(0.0, 10.0)                       # on the way back to (0, 1)
    >>> round(float(mean), 2), round(float(var), 2)
    (0.65, 6.11)
    """
    arguments = (mean, var, omega, tau, alpha, scale)
    typed = [require_real(a, "selu_moments").dtype for a in arguments if not isinstance(a, int | float)]
    work = functools.reduce(np.promote_types, map(statistics_dtype, typed)) if typed else jnp.asarray(0.0).dtype
    mean, var, omega, tau, alpha, scale = (jnp.asarray(a, work) for a in arguments)
    z, s2 = mean * omega, jnp.maximum(var * tau, 1e-12)
    s = jnp.sqrt(s2)
    r = z / s
    density, high = jnp.exp(-0.5 * r * r) / math.sqrt(2 * math.pi), ndtr(r)
    low = [ndtr(-r), _exponential_below(1, z, s), _exponential_below(2, z, s)]
    first = scale * (z * high + s * density + alpha * (low[1] - low[0]))
    below = jnp.square(alpha) * (low[2] - 2 * low[1] + low[0])
    second = jnp.square(scale) * ((z * z + s2) * high + z * s * density + below)
    return first, jnp.maximum(second - jnp.square(first), 0)


def _exponential_below(k: int, z: jax.Array, s: jax.Array) -> jax.Array:
    """E[exp(k y); y < 0] of a Gaussian y of mean z and standard deviation s, by its logarithm, which does not overflow."""
    r = z / s
    u = r + k * s
    cut = 8.0 if jnp.finfo(u.dtype).bits == 32 else 20.0
    far = u > cut
    near = k * z + 0.5 * (k * s) ** 2 + log_ndtr(-jnp.where(far, 0, u))
    inverse = jnp.square(1 / jnp.where(far, u, cut))  # the tail's asymptotic series; its next term is 10395 / u ** 12
    series = -inverse * (1 - inverse * (3 - inverse * (15 - inverse * (105 - inverse * 945))))
    tail = -0.5 * r * r + 0.5 * jnp.log(inverse) - 0.5 * math.log(2 * math.pi) + jnp.log1p(series)
    return jnp.exp(jnp.where(far, tail, near))


def alpha_dropout_affine(rate: float, mean: float = 0.0, var: float = 1.0, low: float = LOW) -> tuple[float, float]:
    """The factor and addend `(a, b)` that restore mean and variance after units were set to `low`; (0, mean) at rate 1.

    Args:
      rate: probability of dropping. (Not of keeping, which the paper calls q.)
      mean: mean of the inputs, restored.
      var: variance of the inputs, restored.
      low: what units are dropped to, -scale * alpha of the SELU.

    Source: Klambauer et al. 2017, section 3, "New dropout technique"; other fixed points: the authors' selu.py.

    >>> [round(number, 9) for number in alpha_dropout_affine(0.1)]
    [0.921284516, 0.16197097]
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is the probability of dropping, between 0 and 1; found {rate}")
    if not var > 0:
        raise ValueError(f"the variance to restore is above 0; found {var}")
    if rate == 1:
        return 0.0, mean
    keep = 1.0 - rate
    a = math.sqrt(var / (keep * (rate * (low - mean) ** 2 + var)))
    return a, mean - a * (keep * mean + rate * low)


def alpha_dropout(
    key: jax.Array,
    x: ArrayLike,
    rate: float,
    *,
    mean: float = 0.0,
    var: float = 1.0,
    low: float = LOW,
    broadcast_dims: Sequence[int] = (),
) -> jax.Array:
    """Drops elements to SELU's value far below zero, and restores mean and variance.

    Args:
      key: random key.
      x: real array of any shape, outputs of SELU.
      rate: probability of dropping, a Python number.
      mean: mean of x, restored.
      var: variance of x, restored.
      low: what elements are dropped to, -scale * alpha of the SELU.
      broadcast_dims: axes along which elements are dropped together.

    Source: Klambauer et al. 2017, section 3; in evaluation it is the identity.

    >>> alpha_dropout(jax.random.key(0), jnp.zeros(4), 0.5)                           # a * low + b, or b
    Array([-0.77919394, -0.77919394,  0.77919394,  0.77919394], dtype=float32)
    >>> alpha_dropout(jax.random.key(0), jnp.zeros(2), 0.0).tolist()
    [0.0, 0.0]
    """
    x = require_real(x, "alpha_dropout")
    a, b = alpha_dropout_affine(rate, mean, var, low)
    if rate == 0:
        return x
    shared = normalize_axis_tuple(
        integers("broadcast_dims", broadcast_dims), x.ndim, "broadcast_dims", allow_duplicate=True
    )
    shape = tuple(1 if axis in shared else n for axis, n in enumerate(x.shape))
    sharding = jax.typeof(x).sharding  # on a mesh with explicit axes, draw as x lies
    spec = jax.sharding.PartitionSpec(*(None if axis in shared else name for axis, name in enumerate(sharding.spec)))
    out_sharding = None if sharding.mesh.empty else jax.sharding.NamedSharding(sharding.mesh, spec)
    survives = jax.random.bernoulli(key, 1.0 - rate, shape, out_sharding=out_sharding)
    work = x.astype(statistics_dtype(x.dtype))
    return jnp.where(jnp.broadcast_to(survives, x.shape), a * work + b, a * low + b).astype(x.dtype)


def selu_init(
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    batch_axis: Sequence[int] = (),
    dtype: DTypeLike = jnp.float32,
) -> Callable[..., jax.Array]:
    """An initializer of weights N(0, 1 / fan_in), as the paper's networks start; biases start at zero.

    `lecun_normal` of JAX and Flax has the same mean and variance but is truncated: no weight beyond 2.27 / sqrt(fan_in).

    Args:
      in_axis: axis or axes of the inputs of a kernel.
      out_axis: axis or axes of its outputs; all others are the receptive field.
      batch_axis: axes of independent kernels.
      dtype: dtype of the weights, where the call names none.

    Source: Klambauer et al. 2017, section 2, "Initialization".

    >>> w = selu_init()(jax.random.key(0), (400, 500))
    >>> round(float(400 * jnp.var(w)), 2), bool(jnp.max(jnp.abs(w)) > 2.3 / 20)
    (1.0, True)
    """
    axes = {"in_axis": in_axis, "out_axis": out_axis, "batch_axis": batch_axis}
    numbers = {name: integers(name, given) for name, given in axes.items()}
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", **numbers, dtype=dtype)
