"""Our layers in the place of Flax's in an nnx model that somebody else wrote."""

from typing import Any, TypeVar

import jax
from flax import nnx

from normjax.nnx import flax_names, weights
from normjax.nnx._by_path import ByPath

Model = TypeVar("Model", bound=nnx.Module)

OURS: dict[type, type] = {
    nnx.BatchNorm: flax_names.BatchNorm,
    nnx.GroupNorm: flax_names.GroupNorm,
    nnx.InstanceNorm: flax_names.InstanceNorm,
    nnx.LayerNorm: flax_names.LayerNorm,
    nnx.RMSNorm: flax_names.RMSNorm,
    nnx.SpectralNorm: weights.SpectralNorm,
    nnx.WeightNorm: weights.WeightNorm,
}


def swap_layers(model: Model) -> Model:
    """Makes Flax's normalization layers in the model ours, where they stand, and returns the model.

    The layers are `BatchNorm`, `GroupNorm`, `InstanceNorm`, `LayerNorm`, `RMSNorm`, `SpectralNorm` and `WeightNorm`,
    wherever the model has them: in lists, in dicts, shared. They keep their variables, so that checkpoints load before and
    after, and references to them hold; only the scales of a `WeightNorm`, which in Flax are bare arrays, become
    `nnx.Param`s, and what the last two keep of a parameter is found under its path as text. Subclasses of these layers stay
    what they are. Call it before the model is split, or an optimizer made of it; `swap_layers(nnx.clone(model))` leaves the
    model as it is.

    Args:
      model: any nnx module.

    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(1)))
    >>> type(swap_layers(model).layers[1]).__module__
    'normjax.nnx.flax_names'
    """
    for _, node in list(nnx.iter_graph(model)):
        if ours := OURS.get(type(node)):
            object.__setattr__(node, "__class__", ours)
            _take_over(node)
    return model


def _take_over(node: object) -> None:
    """Keeps what a wrapper of Flax's has as ours do: its scales trained, its variables by text, our options as defaults."""
    if isinstance(node, weights.WeightNorm):
        node.scale_init = None
        held = {path: nnx.Param(s) if isinstance(s, jax.Array) else s for path, s in (node.scales or {}).items()}
        node.scales = nnx.data(ByPath(held) if node.use_scale else None)
    elif isinstance(node, weights.SpectralNorm):
        node.feature_axes = -1
        held_by_flax: Any = node.batch_stats  # under tuples
        node.batch_stats = nnx.data(ByPath(held_by_flax))
