"""What normalization does to a network: numbers of a layer's activations and of the loss's gradient there.

Units are the channels, axis `c` of the layout; every other axis counts as samples of them. Examples are axis `n`; all
that an example holds is one vector. Most numbers here are inner products of such vectors at length one, so they are the
equation's own rows: centred and divided over the samples, units give their correlations; divided over all of an example,
examples give their cosines.

    z = activations of one layer, after the nonlinearity or before
    correlation(z), mutual_information(z), joint_histogram(z[..., 0], z[..., 1])    Ren et al. 2017
    activation_size(z), cosine_similarity(z), stable_rank(z), gradient_norm(dz)     Lubana et al. 2021
    dead_units(z), effective_learning_rate(eta, norms)                              Lyle et al. 2024
    report({"conv1": z, ...}, {"conv1": dz, ...})                                   all of them, by layer

Everything is a pure function of arrays that jit compiles, in float32 or wider. `normjax.capture` takes the arrays from a
model. Where a statistic is of samples or examples, `axis_name` names the mapped axes over which they are spread.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax import moments, running
from normjax.field import FieldError
from normjax.information import (
    UNITS,
    Names,
    bound_names,
    information,
    joint_histogram,
    mean_where,
    mutual_information,
    mutual_information_matrix,
    real_of,
)
from normjax.selection import by_path
from normjax.similarity import (
    all_but,
    correlation,
    correlation_matrix,
    cosine_similarity,
    over_devices,
    peak_of,
    stable_rank,
    vectors_of,
)
from normjax.theory import Stats

__all__ = [
    "UnitMoments", "activation_size", "correlation", "correlation_matrix", "cosine_similarity", "dead_units",
    "effective_learning_rate", "gradient_norm", "information", "joint_histogram", "mutual_information",
    "mutual_information_matrix", "report", "stable_rank", "unit_moments", "weight_norms",
]  # fmt: skip


class UnitMoments(NamedTuple):
    """Moments of each unit over its samples, float32 or wider, `[c]`; zero where a unit has none.

    Attributes:
      mean: [u]
      std: standard deviation. [u]
      skew: mean of the cubes of the standardized values; 0 for a Gaussian.
      kurtosis: mean of their fourth powers; 3 for a Gaussian.
    """

    mean: jax.Array
    std: jax.Array
    skew: jax.Array
    kurtosis: jax.Array


def _root(square: jax.Array) -> jax.Array:
    """The square root, with slope 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


# --- units ----------------------------------------------------------------------------------------


def activation_size(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    unbiased: bool = True,
    mask: ArrayLike | None = None,
    axis_name: Names = (),
) -> jax.Array:
    """Averages the variance of the units: mean_c Var_c over examples and positions.

    Args:
      x: activations. [units u]
      layout: name of each axis; `c` are the units.
      unbiased: divide by the number of samples less one, as the published code does.
      mask: boolean mask or weights that broadcast against x.
      axis_name: mapped axes over which the samples are spread.

    Returns:
      A float32 (or wider) scalar [u ** 2]; NaN where no unit has samples enough.

    Raises:
      FieldError: the layout names no axis c, or mask or mapped axes do not fit.
      TypeError: x does not hold real floating-point numbers.

    Source: Lubana et al. 2021, the activation prober of the published code, which calls this variance a norm.

    >>> jax.jit(activation_size)(jnp.array([[0.0, 1.0], [2.0, 1.0]]))         # of 2 and 0
    Array(1., dtype=float32)
    """
    vectors = vectors_of(x, layout, mask, "activation_size", True, bound_names(axis_name))
    stats = Stats(None, vectors.var, None, vectors.weight)
    stats = running.unbiased(stats) if unbiased else stats
    return mean_where(vectors.kept(stats.var), vectors.kept(stats.var_weight) > 0)


def unit_moments(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    unbiased: bool = True,
    mask: ArrayLike | None = None,
    axis_name: Names = (),
) -> UnitMoments:
    """The first four moments of each unit over its samples: is a pre-activation centred, of size one, Gaussian?

    Args as for `activation_size`; `unbiased` concerns the standard deviation alone.

    Returns:
      UnitMoments, each `[c]`.

    Source: Lubana et al. 2021, the convolution prober of the published code (`std`, whose mean over units it takes).

    >>> found = jax.jit(lambda x: unit_moments(x, unbiased=False))(jnp.array([[1.0], [1.0], [1.0], [5.0]]))
    >>> [round(float(moment[0]), 3) for moment in found]
    [2.0, 1.732, 1.155, 2.333]
    """
    vectors = vectors_of(x, layout, mask, "unit_moments", True, bound_names(axis_name))
    _, field = all_but(UNITS, "units", layout, vectors.y.ndim, bound_names(axis_name))

    def mean(power: int) -> jax.Array:
        return vectors.kept(moments.expect(vectors.y**power, field, layout, mask=mask))

    stats = Stats(None, vectors.var, None, vectors.weight)
    var = vectors.kept((running.unbiased(stats) if unbiased else stats).var)
    return UnitMoments(vectors.kept(vectors.mean), _root(var), mean(3), mean(4))


def dead_units(
    x: ArrayLike, layout: str = "n ... c", *, mask: ArrayLike | None = None, axis_name: Names = ()
) -> jax.Array:
    """The fraction of units that are zero in every sample: rectified units that nothing switches on.

    Args:
      x: activations after the nonlinearity.
      layout: name of each axis; `c` are the units.
      mask: boolean mask or weights that broadcast against x; a unit that is masked whole does not count.
      axis_name: mapped axes over which the samples are spread.

    Returns:
      A float32 (or wider) scalar in 0..1, without a gradient; NaN where nothing counts.

    Raises:
      FieldError: the layout names no axis c, or mask or mapped axes do not fit.
      TypeError: x does not hold real floating-point numbers.

    Source: Lyle et al. 2024, the dead units of networks trained on labels that change.

    >>> float(jax.jit(dead_units)(jax.nn.relu(jnp.array([[1.0, -1.0], [-3.0, -2.0]]))))
    0.5
    """
    x, names = real_of(x, "dead_units"), bound_names(axis_name)
    number, _ = all_but(UNITS, "units", layout, x.ndim)
    over = tuple(i for i in range(x.ndim) if i != number)
    weights = moments.weigh(mask, x)
    valid = jnp.ones(x.shape, bool) if weights is None else jnp.broadcast_to(weights.valid, x.shape)
    on = moments.silence(lax.stop_gradient(x), weights) != 0
    awake, counted = (over_devices(jnp.sum(flag, over, dtype=jnp.int32), names) > 0 for flag in (on, valid))
    return mean_where(1 - awake.astype(x.dtype), counted)


# --- gradients and weights ------------------------------------------------------------------------


def gradient_norm(gradient: ArrayLike, *, mask: ArrayLike | None = None, axis_name: Names = ()) -> jax.Array:
    """The Frobenius norm of the loss's gradient in a layer's pre-activation, over the whole batch.

    Args:
      gradient: dL/dz of one layer; `normjax.capture` takes it from a model. The norm depends on whether L sums or
        averages over the batch; the published code averages. [v]
      mask: boolean mask or weights that broadcast against it; weights multiply the squares.
      axis_name: mapped axes over which the batch is spread.

    Returns:
      A float32 (or wider) scalar [v]; its own derivative is 0 at a gradient of zero.

    Raises:
      FieldError: mask or mapped axes do not fit.
      TypeError: the gradient does not hold real floating-point numbers.

    Source: Lubana et al. 2021, the convolution prober of the published code.

    >>> round(float(jax.jit(gradient_norm)(jnp.array([[3e-30, 0.0], [0.0, 4e-30]])) / 1e-30), 4)
    5.0
    """
    g, names = real_of(gradient, "gradient_norm"), bound_names(axis_name)
    weights = moments.weigh(mask, g)
    g = moments.silence(g, weights)
    peak = peak_of(g, tuple(range(g.ndim)), names)
    squares = jnp.square(g / peak)
    squares = squares if weights is None else squares * weights.value
    return jnp.squeeze(peak) * _root(over_devices(jnp.sum(squares), names))


def weight_norms(params: Any) -> dict[str, jax.Array]:
    """The Frobenius norm of every floating array of a tree of parameters, float32 or wider.

    Args:
      params: a pytree, such as linen's `params` or the `nnx.Param` state of an nnx model.

    Returns:
      {path, joined by "/": norm}. [units of the weights]

    >>> weight_norms({"dense": {"kernel": jnp.array([[3.0, 4.0]])}})
    {'dense/kernel': Array(5., dtype=float32)}
    """
    floating = {name: a for name, a in by_path(params).items() if jnp.issubdtype(a.dtype, jnp.inexact)}
    return {name: gradient_norm(jnp.abs(a)) for name, a in floating.items()}


def effective_learning_rate(
    eta: ArrayLike, norm: ArrayLike, reference: ArrayLike = 1.0, *, order: float = 2
) -> jax.Array:
    """The learning rate that would move weights of the reference norm as eta moves those of this norm.

    eta * (reference / norm) ** order. A normalizer makes a layer blind to the scale of its weights: f(c w) = f(w), so the
    gradient at c w is 1 / c of that at w, and a step eta there turns w as eta / c ** 2 would at norm one.

    Args:
      eta: the learning rate, a scalar or one for each time.
      norm: the norm of the weights, broadcasting against eta.
      reference: the norm that is compared with, such as the initial one.
      order: 2 for steps that are proportional to the gradient; 1 for steps of a fixed size, as Adam's or of the sign.

    Returns:
      float32 or wider, of the shapes broadcast; infinite where the norm is 0.

    Source: Lyle et al. 2024, section on effective learning rates; Hoffer et al. 2018, section 3 (order 2, reference 1).

    >>> effective_learning_rate(0.1, jnp.array([1.0, 2.0])), effective_learning_rate(0.1, 2.0, order=1)
    (Array([0.1  , 0.025], dtype=float32), Array(0.05, dtype=float32))
    """
    eta, norm, reference = (jnp.asarray(value, moments.wide(jnp.result_type(value, jnp.float32)))
                            for value in (eta, norm, reference))  # fmt: skip
    dtype = jnp.promote_types(jnp.promote_types(eta.dtype, norm.dtype), reference.dtype)
    shape = jnp.broadcast_shapes(eta.shape, norm.shape, reference.shape)
    eta, norm, reference = (jnp.broadcast_to(value.astype(dtype), shape) for value in (eta, norm, reference))
    some = norm > 0
    return jnp.where(some, eta * (reference / jnp.where(some, norm, 1)) ** order, jnp.inf)


# --- all of it, by layer --------------------------------------------------------------------------


def report(
    activations: Mapping[str, ArrayLike],
    gradients: Mapping[str, ArrayLike] | None = None,
    *,
    layout: str | Mapping[str, str] = "n ... c",
    mask: Mapping[str, ArrayLike] | ArrayLike | None = None,
    bins: int | None = None,
    axis_name: Names = (),
) -> dict[str, dict[str, jax.Array]]:
    """Every number of every layer.

    Args:
      activations: {layer: activations}, as `normjax.capture` gives them.
      gradients: {layer: dL/dz}, for layers that have one.
      layout: of all layers, or {layer: layout} with "n ... c" for the others.
      mask: of all layers, or {layer: mask}.
      bins: number of bins of the mutual information, which is slow on many units; None leaves it out.
      axis_name: mapped axes over which the batch is spread.

    Returns:
      {layer: {name: scalar}}: `mean` (of |mean| over units), `std` (mean over units), `activation_size`, `correlation`,
      `cosine_similarity`, `stable_rank`, `dead_units`; with bins `mutual_information`; with gradients `gradient_norm`.

    Raises:
      FieldError, TypeError: as the functions do, with the layer's name in a note.

    >>> found = jax.jit(report)({"dense": jnp.array([[1.0, -1.0], [2.0, -2.0]])}, {"dense": jnp.ones((2, 2))})
    >>> {name: round(float(value), 3) for name, value in found["dense"].items()}  # doctest: +NORMALIZE_WHITESPACE
    {'activation_size': 0.5, 'correlation': 1.0, 'cosine_similarity': 1.0, 'dead_units': 0.0, 'gradient_norm': 2.0,
     'mean': 1.5, 'stable_rank': 1.0, 'std': 0.707}
    """
    found: dict[str, dict[str, jax.Array]] = {}
    for name, x in activations.items():
        where = layout if isinstance(layout, str) else layout.get(name, "n ... c")
        masked: Any = mask.get(name) if isinstance(mask, Mapping) else mask
        shared: Any = {"mask": masked, "axis_name": axis_name}
        try:
            units = unit_moments(x, where, **shared)
            numbers = {"mean": jnp.mean(jnp.abs(units.mean)), "std": jnp.mean(units.std)}
            for measure in (activation_size, correlation, cosine_similarity, stable_rank, dead_units):
                numbers[measure.__name__] = measure(x, where, **shared)
            if bins is not None:
                numbers["mutual_information"] = mutual_information(x, where, bins=bins, **shared)
            if gradients is not None and name in gradients:
                numbers["gradient_norm"] = gradient_norm(gradients[name], **shared)
        except (FieldError, TypeError) as error:
            error.add_note(f'while measuring layer {name!r}, shape {jnp.shape(x)}, layout "{where}"')
            raise
        found[name] = numbers
    return found
