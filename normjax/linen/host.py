"""The hosts of Flax linen: they make and hold the variables that the descriptions of `normjax/_layers` ask for.

A face is a description and a host, in that order:

    class DyT(units.DyT, Host): ...                 # parameters
    class Norm(norm.Norm, Keeping): ...             # and running statistics
    class RevIN(reversible.RevIN, Early): ...       # parameters that several methods share

The face has the docstring of the description and its methods, of which `__call__` is compact (with `Early`, `setup` makes
the parameters).
Parameters are in `params`, running statistics in `batch_stats`. `moments` takes what a training batch showed, only where
it is asked for by name (`mutable=["batch_stats", "moments"]`, or in the `variable_axes` of a lifted layer), so that
`mutable=True` returns the collections that Flax's layers have; `losses` takes the penalties of layers with `l1`, where it
is mutable.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import in_filter
from flax.linen import initializers
from jax.typing import ArrayLike

from normjax._layers.describe import (
    Layer,
    Parameter,
    as_features,
    hold_to_ranges,
    require_channels,
    whole_shape,
)
from normjax._layers.statistics import RunningLayer, as_held
from normjax.running import BatchRecord, Slot


class Host(Layer, nn.Module, kw_only=True):
    """A layer with parameters."""

    _faces: ClassVar[dict[type, type]] = {}  # the face of each description
    _compact: ClassVar[bool] = True

    def __init_subclass__(cls, kw_only: bool = False, **kwargs: Any):
        described = cls.__bases__[0]
        if issubclass(described, Layer) and not issubclass(described, nn.Module):  # a face
            cls.__doc__ = cls.__doc__ or described.__doc__
            for name in dir(described):
                if (name == "__call__" or name[0] != "_") and inspect.isfunction(method := getattr(described, name)):
                    # Flax wraps the methods that it finds in the class itself.
                    if name not in vars(cls):
                        setattr(cls, name, nn.compact(method) if name == "__call__" and cls._compact else method)
            Host._faces.setdefault(described, cls)
        # A class without options of its own takes `parent` and `name` by keyword alone: they would be the next
        # positional arguments after a description's.
        super().__init_subclass__(kw_only=kw_only or not inspect.get_annotations(cls), **kwargs)

    def __post_init__(self):
        hold_to_ranges(self)
        self._check()
        super().__post_init__()

    @nn.nowrap
    def __repr__(self) -> str:
        """The layer as it was made: the options that differ from their defaults."""
        shown = {name: value for name, value in self._changed().items() if name not in ("parent", "name")}
        shown |= {} if self.name is None else {"name": self.name}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @nn.nowrap
    def _starting(self) -> bool:
        return self.is_initializing()

    @nn.nowrap
    def _learned(self, *shapes: tuple[int, ...], **given: ArrayLike | None) -> dict[str, Any]:
        found = {name: value for name, value in given.items() if value is not None}
        for name, parameter in self._learns(*shapes).items():
            if name not in found and parameter is not None:
                found[name] = self._parameter(name, parameter)
        return found

    @nn.nowrap
    def _parameter(self, name: str, parameter: Parameter) -> jax.Array:
        init = parameter.init if callable(parameter.init) else initializers.constant(parameter.init)
        return self.param(name, init, parameter.shape, self.param_dtype)

    @nn.nowrap
    def _part(self, name: str) -> Any:
        described = self._parts()[name]
        if described is None:
            return None
        options = {f.name: getattr(described, f.name) for f in dataclasses.fields(described) if f.init}  # pyright: ignore
        face, others = self._faces[type(described)], ("use_running_average", "stats_names")
        known = {key: getattr(self, key) for key in others if hasattr(self, key) and key in face.__dataclass_fields__}
        return face(**options, **known, name=name)


class Early(Host):
    """A layer whose parameters are made for so many channels before any input is seen, so that all its methods have them."""

    features: int | Sequence[int]  # number of channels; or the whole shape of an input
    _compact: ClassVar[bool] = False

    def __post_init__(self):
        self.features = as_features(self.features, type(self).__name__)
        super().__post_init__()

    def setup(self) -> None:
        """Makes the parameters."""
        self._made = super()._learned(whole_shape(self.features, self.layout))  # pyright: ignore

    @nn.nowrap
    def _learned(self, *shapes: tuple[int, ...], **given: ArrayLike | None) -> dict[str, Any]:
        require_channels(self, self.features, shapes[0])
        return {**self._made, **{name: value for name, value in given.items() if value is not None}}


class Keeping(RunningLayer, Host, kw_only=True):
    """A layer with running statistics, in the collection `batch_stats`; its options are those of `Norm`."""

    use_running_average: bool | None = None
    stats_names: tuple[str | None, ...] | None = None
    _leaves_records: ClassVar[bool] = True

    @nn.nowrap
    def _uses_running(self, at_call: bool | None) -> bool:
        return bool(nn.merge_param("use_running_average", self.use_running_average, at_call))

    @nn.nowrap
    def _stored(self, name: str, slot: Slot) -> jax.Array:
        make = slot.make if self.stats_names is None else nn.with_partitioning(slot.make, tuple(self.stats_names))
        found: Any = self.variable("batch_stats", name, make)
        return found.value

    @nn.nowrap
    def _store(self, name: str, value: jax.Array) -> None:
        assert self.scope is not None
        variable = nn.Variable(self.scope, "batch_stats", name, unbox=True)
        variable.value = as_held(value, variable.value.dtype)

    @nn.nowrap
    def _leave(self, seen: BatchRecord) -> None:
        _leave_record(self, seen)

    @nn.nowrap
    def _penalize(self, value: Callable[[], jax.Array]) -> None:
        term = value()
        self.sow("losses", "l1", term, lambda old, new: old + new.astype(old.dtype), lambda: jnp.zeros((), term.dtype))


def _leave_record(layer: nn.Module, seen: BatchRecord) -> None:
    """Sows what a layer saw of a batch into `moments`, where that is asked for by name: Flax's leave no such thing."""
    assert layer.scope is not None
    asked = layer.scope.mutable
    by_name = isinstance(asked, str | Collection) and in_filter(asked, "moments")  # not by `True`, nor by a DenyList
    if by_name and getattr(layer, "_leaves_records", False):
        layer.sow("moments", "batch", seen)
