"""All numbers of all layers."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax.diagnostics._shared import Axes, Mask
from normjax.diagnostics.histograms import mutual_information
from normjax.diagnostics.norms import gradient_norm
from normjax.diagnostics.similarity import correlation, cosine_similarity, stable_rank
from normjax.diagnostics.units import activation_size, dead_units, unit_moments
from normjax.field import FieldError


def report(
    activations: Mapping[str, ArrayLike],
    gradients: Mapping[str, ArrayLike] | None = None,
    *,
    layout: str | Mapping[str, str] = "n ... c",
    mask: Mapping[str, ArrayLike] | Mask = None,
    bins: int | None = None,
    axis_name: Axes = (),
) -> dict[str, dict[str, jax.Array]]:
    """Every number of every layer: {layer: {name: scalar}}, float32 or wider.

    The names are `mean` (of |mean| over units) [u], `std` (mean over units) [u], `activation_size` [u ** 2], `correlation`,
    `cosine_similarity`, `stable_rank`, `dead_units`; with bins `mutual_information` [nats]; with gradients `gradient_norm`
    [v]. Errors carry a note that names the layer.

    Args:
      activations: {layer: activations}, axes as named by `layout`, as `normjax.capture` gives them. [units u]
      gradients: {layer: dL/dz}, of the shape of the activations, for layers that have one. [units v]
      layout: of all layers, or {layer: layout} with "n ... c" for the others.
      mask: boolean mask or weights that broadcast against the activations of all layers, or {layer: mask}.
      bins: number of bins of the mutual information, which is slow on many units; None leaves it out.
      axis_name: mapped axes over which the batch is spread.

    Source: Ren et al. 2017, Lubana et al. 2021 and Lyle et al. 2024, as each of the functions says.

    >>> found = jax.jit(report)({"dense": jnp.array([[1.0, -1.0], [2.0, -2.0]])}, {"dense": jnp.ones((2, 2))})
    >>> {name: round(float(value), 3) for name, value in found["dense"].items()}  # doctest: +NORMALIZE_WHITESPACE
    {'activation_size': 0.5, 'correlation': 1.0, 'cosine_similarity': 1.0, 'dead_units': 0.0, 'gradient_norm': 2.0,
     'mean': 1.5, 'stable_rank': 1.0, 'std': 0.707}
    """
    if not isinstance(activations, Mapping):
        raise TypeError(
            f"report takes activations by layer, {{name: array}}, as normjax.capture gives them; found "
            f"{type(activations).__name__}"
        )
    layers = {}
    for name, x in activations.items():
        where = layout if isinstance(layout, str) else layout.get(name, "n ... c")
        masked = mask.get(name) if isinstance(mask, Mapping) else mask
        gradient = None if gradients is None else gradients.get(name)
        try:
            units = unit_moments(x, where, mask=masked, axis_name=axis_name)
            numbers = layers[name] = {"mean": jnp.mean(jnp.abs(units.mean)), "std": jnp.mean(units.std)}
            for measure in (activation_size, correlation, cosine_similarity, stable_rank, dead_units):
                numbers[measure.__name__] = measure(x, where, mask=masked, axis_name=axis_name)
            if bins is not None:
                information = mutual_information(x, where, bins=bins, mask=masked, axis_name=axis_name)
                numbers["mutual_information"] = information
            if gradient is not None:
                numbers["gradient_norm"] = gradient_norm(gradient, mask=masked, axis_name=axis_name)
        except (FieldError, TypeError) as error:
            error.add_note(f'while measuring layer {name!r}, shape {jnp.shape(x)}, layout "{where}"')
            raise
    return layers
