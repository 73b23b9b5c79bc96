"""Flax linen modules: parameters and running statistics around the equation of `theory.py`.

`Norm` is any normalizer as a layer. The presets are classes with the names, arguments, defaults, parameters, collections
and shapes of Flax's own, so that changing the import line keeps a model and its checkpoints:

    from normjax.linen import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider
(`use_fast_variance` is accepted and changes nothing), masks broadcast and never leak, and a masked output is the bias.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from normjax import layer
from normjax.running import Slot

Initializer = Any
Dtype = Any


def _stored(module: nn.Module, name: str, slot: Slot, names: Sequence[str | None] | None) -> Any:
    """A variable of `batch_stats`, with sharding metadata if `names` are given."""
    make = slot.make if names is None else nn.with_partitioning(slot.make, tuple(names))
    return module.variable("batch_stats", name, make)


def _store(module: nn.Module, stored: Mapping[str, Any], out: layer.Applied) -> None:
    """Writes the new running statistics, and sows what the layer saw where `moments` is mutable; never at init."""
    if out.seen is None or module.is_initializing():
        return
    for name, variable in stored.items():
        variable.value = getattr(out.running, name)
    module.sow("moments", "batch", out.seen)
