"""The gain of an activation: the factor that gives f(z) variance 1 for a Gaussian z, for any f."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# Of relu, whose variance for z ~ N(0, 1) is (1 - 1 / pi) / 2: 1.7128585504. The 1.7139588594 in the code of NFNets, 0.06 per
# cent too large, was measured on samples, as were the other constants there, which are off by up to 1e-3.
RELU_GAIN = math.sqrt(2 * math.pi / (math.pi - 1))


def activation_gain(activation: Callable[[jax.Array], jax.Array]) -> float:
    """Computes 1 / std[f(z)] for z ~ N(0, 1) and an elementwise f: a Python float, inside of `jit` too.

    The integral is a Gauss-Legendre rule on eighths of [-12, 12], so that an activation with kinks or steps at multiples
    of 1/8 is integrated as well as a smooth one: to about 1e-7 in float32, 1e-12 where 64-bit numbers are enabled. Relu's
    is `RELU_GAIN` = sqrt(2 pi / (pi - 1)), in closed form. A constant activation is refused.

    Source: Brock et al. 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets".

    >>> round(activation_gain(jax.nn.relu), 10), round(activation_gain(jnp.tanh), 4)
    (1.7128585504, 1.5925)
    """
    if activation is jax.nn.relu:
        return RELU_GAIN
    try:
        hash(activation)
    except TypeError:
        return _integrated(activation, jnp.result_type(float))
    return _remembered(activation, jnp.result_type(float))


def _integrated(activation: Callable[[jax.Array], jax.Array], dtype: DTypeLike) -> float:
    """The gain of an activation by the rule, its values in this dtype."""
    (nodes, weights), edges = np.polynomial.legendre.leggauss(8), np.arange(-12, 12, 1 / 8)
    z = (edges[:, None] + (nodes + 1) / 16).ravel()
    density = np.tile(weights / 16, len(edges)) * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    with jax.ensure_compile_time_eval():
        f = np.asarray(activation(jnp.asarray(z, dtype)), np.float64)
    variance = float(density @ (f - density @ f) ** 2)
    if not 1e-12 < variance < math.inf:
        raise ValueError(f"{activation} of a standard Gaussian has variance {variance:.3g}; no gain makes that 1")
    return variance**-0.5


# An eager layer asks at every call.
_remembered = functools.lru_cache(maxsize=64)(_integrated)
