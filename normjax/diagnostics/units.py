"""Moments of the units of a layer, and which of them are dead."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights, zero_masked
from normjax._expect.expectation import expect
from normjax._leaves import safe_root
from normjax.diagnostics import _shared as shared
from normjax.diagnostics._shared import UNITS, Axes, Mask
from normjax.running import unbiased as without_bias
from normjax.theory import Stats


class UnitMoments(NamedTuple):
    """Moments of each unit over its samples, float32 or wider, `[c]`; zero where a unit has none.

    Attributes:
      mean: [u]
      std: standard deviation. [u]
      skew: mean of the cubes of the standardized values; 0 for a Gaussian.
      kurtosis: mean of their fourth powers; 3 for a Gaussian.

    Source: the moments of a pre-activation that Lubana et al. 2021 follow through layers.

    >>> unit_moments(jnp.array([[1.0], [1.0], [1.0], [5.0]])).mean
    Array([2.], dtype=float32)
    """

    mean: jax.Array
    std: jax.Array
    skew: jax.Array
    kurtosis: jax.Array


def activation_size(
    x: ArrayLike, layout: str = "n ... c", *, unbiased: bool = True, mask: Mask = None, axis_name: Axes = ()
) -> jax.Array:
    """Averages the variance of the units, mean_c Var_c [u ** 2], over examples and positions; NaN without samples enough.

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider. [units u]
      layout: name of each axis; `c` are the units, all other axes samples.
      unbiased: divide by the number of samples less one, as the published code does.
      mask: boolean mask or weights that broadcast against x.
      axis_name: mapped axes over which the samples are spread.

    Source: Lubana et al. 2021, the activation prober of the published code, which calls this variance a norm.

    >>> jax.jit(activation_size)(jnp.array([[0.0, 1.0], [2.0, 1.0]]))         # of 2 and 0
    Array(1., dtype=float32)
    """
    units = shared.vectors_along(UNITS, x, layout, mask, "activation_size", shared.mapped_axes(axis_name))
    stats = Stats(None, units.var, None, units.weight)
    stats = without_bias(stats) if unbiased else stats
    return shared.mean_where(units.for_each(stats.var), units.for_each(stats.var_weight) > 0)


def unit_moments(
    x: ArrayLike, layout: str = "n ... c", *, unbiased: bool = True, mask: Mask = None, axis_name: Axes = ()
) -> UnitMoments:
    """The first four moments of each unit over its samples, `[c]`: is a pre-activation centred, of size one, Gaussian?

    Args:
      x: activations, axes as named by `layout`; results are float32 or wider. [units u]
      layout: name of each axis; `c` are the units, all other axes samples.
      unbiased: take the standard deviation from the sum of squares over the number of samples less one.
      mask: boolean mask or weights that broadcast against x.
      axis_name: mapped axes over which the samples are spread.

    Source: Lubana et al. 2021, the convolution prober of the published code (`std`, whose mean over units it takes).

    >>> found = jax.jit(lambda x: unit_moments(x, unbiased=False))(jnp.array([[1.0], [1.0], [1.0], [5.0]]))
    >>> [round(float(moment[0]), 3) for moment in found]
    [2.0, 1.732, 1.155, 2.333]
    """
    mapped = shared.mapped_axes(axis_name)
    units = shared.vectors_along(UNITS, x, layout, mask, "unit_moments", mapped)
    samples = shared.field_of_others(UNITS, layout, units.y.ndim, mapped)

    def mean(power: int) -> jax.Array:
        return units.for_each(expect(units.y**power, samples, layout, mask=mask))

    stats = Stats(None, units.var, None, units.weight)
    var = units.for_each((without_bias(stats) if unbiased else stats).var)
    return UnitMoments(units.for_each(units.mean), safe_root(var), mean(3), mean(4))


def dead_units(x: ArrayLike, layout: str = "n ... c", *, mask: Mask = None, axis_name: Axes = ()) -> jax.Array:
    """The fraction of units that are zero in every sample: rectified units that nothing switches on. It has no gradient.

    Args:
      x: activations after the nonlinearity, axes as named by `layout`; the result is float32 or wider.
      layout: name of each axis; `c` are the units, all other axes samples.
      mask: boolean mask or weights that broadcast against x; a unit that is masked whole does not count, NaN if all are.
      axis_name: mapped axes over which the samples are spread.

    Source: Lyle et al. 2024, the dead units of networks trained on labels that change.

    >>> float(jax.jit(dead_units)(jax.nn.relu(jnp.array([[1.0, -1.0], [-3.0, -2.0]]))))
    0.5
    """
    x, mapped = shared.require_real(x, "dead_units"), shared.mapped_axes(axis_name)
    number = shared.axis_number(UNITS, layout, x.ndim)
    over = tuple(i for i in range(x.ndim) if i != number)
    weights = as_weights(mask, x)
    valid = jnp.ones(x.shape, bool) if weights is None else jnp.broadcast_to(weights.valid, x.shape)
    on = zero_masked(lax.stop_gradient(x), weights) != 0
    awake, counted = (shared.sum_over_devices(jnp.sum(flag, over, dtype=jnp.int32), mapped) > 0 for flag in (on, valid))
    return shared.mean_where(1 - awake.astype(x.dtype), counted)
