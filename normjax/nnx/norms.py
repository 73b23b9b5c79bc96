"""Flax nnx modules: parameters and running statistics around the equation of `theory.py`.

`Norm` is any normalizer as a layer. The presets have the names, arguments, defaults, attributes and shapes of Flax's own,
so that changing the import line keeps a model and its checkpoints:

    from normjax.nnx import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

What differs from Flax is what is right here: statistics are always two-pass and float32 or wider (`use_fast_variance` is
accepted and changes nothing; running statistics are never rounded to `dtype`), extra leading axes and masks broadcast,
masked elements never leak, and a masked output is the bias.

The L1 penalty is captured: `y, sown = nnx.capture(model, Penalty)(x)`; outside a capture nothing is sown or stored.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx
from flax.nnx.nn import initializers

from normjax import layer
from normjax.nnx.host import Moments

Dtype = Any
Initializer = Any
Metadata = Mapping[str, Any]
_NO_METADATA: Metadata = MappingProxyType({})
_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


def _parameter(
    make: Initializer,
    use: bool,
    shape: tuple[int, ...],
    dtype: Dtype,
    rngs: nnx.Rngs,
    metadata: Metadata = _NO_METADATA,
) -> Any:
    return nnx.Param(make(rngs.params(), shape, dtype), **metadata) if use else nnx.data(None)


def _value(variable: Any) -> Any:
    return None if variable is None else variable[...]


def _flag(call: bool | None, constructed: bool | None, name: str) -> bool:
    """use_running_average from the call, or else from the constructor."""
    flag = constructed if call is None else call
    if flag is None:
        raise ValueError(
            f"No `use_running_average` argument was provided to {name}. Pass it to the constructor or to the call, or "
            "set it on the whole model: nnx.view(model, use_running_average=True) or False."
        )
    return flag


def _store(module: Any, out: layer.Applied) -> None:
    """Writes the new running statistics; the batch's own go to a capture that asks for Moments."""
    if out.seen is None:
        return
    for name, value in out.running._asdict().items():
        if value is None:
            continue
        variable = getattr(module, name)
        if value.dtype == variable.dtype:
            variable[...] = value
        else:  # the first complex mean replaces a real one
            variable.set_value(value)
    if hasattr(module, "__captures__"):
        module.sow(Moments, "batch", out.seen)
