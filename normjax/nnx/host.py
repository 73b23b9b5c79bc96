"""The hosts of Flax nnx: they make and hold the variables that the descriptions of `normjax/_layers` ask for.

A face is a description and a host, in that order:

    class DyT(units.DyT, Host): ...                 # parameters
    class Norm(norm.Norm, Keeping): ...             # and running statistics
    class AdaIN(conditional.AdaIN, Bare): ...       # neither: no features, no random keys

The face has the docstring of the description and its methods, and becomes a dataclass as it is declared: `features` comes
first, then the options of the description, and `rngs` by keyword. The penalty is captured,
`y, sown = nnx.capture(model, Penalty)(x)`; outside a capture nothing is sown or stored.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import reprlib
from jax.typing import ArrayLike

from normjax._layers.describe import (
    Layer,
    Parameter,
    Shape,
    as_features,
    hold_to_ranges,
    require_channels,
    whole_shape,
)
from normjax._layers.statistics import RunningLayer, as_held
from normjax.field import FieldError
from normjax.nnx._signature import Constructor, require_rngs
from normjax.running import BatchRecord, Running, Slot
from normjax.theory import Normalizer

Metadata = Mapping[str, Any]
NO_METADATA: Metadata = MappingProxyType({})


class Penalty(nnx.Intermediate):
    """The L1 term of a layer, alpha * mean |v|, as `nnx.capture(model, Penalty)` finds it."""


class Moments(nnx.Intermediate):
    """What a layer saw of the batch (`normjax.running.BatchRecord`), as `nnx.capture(model, Moments)` finds it."""


class Copied(nnx.Module):
    """A module whose deep copy has variables of its own, and shares what is none.

    Flax's copies functions too, of which jitted ones, such as `jax.nn.sigmoid`, do not equal their copies: to jit, and to
    `jax.tree.map`, the copy would be another model.
    """

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        structure, state = nnx.split(self)
        return nnx.merge(structure, copy.deepcopy(state, memo))


class _Spent:
    """An initializer as an attribute: a layer has none, since it has done its work.

    A class has this object, with the default; `nnx.tabulate` would take a function for a method, and replace it.
    """

    def __init__(self, default: Any):
        self.default = default

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        raise AttributeError("an initializer is not kept: its layer has been made")


@dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
@dataclasses.dataclass(eq=False, repr=False)
class Bare(Layer, Copied):
    """A layer without variables."""

    _faces: ClassVar[dict[type, type]] = {}  # the face of each description
    __signature__ = Constructor()

    def __init_subclass__(cls, **kwargs: Any):
        described = cls.__bases__[0]
        if issubclass(described, Layer) and not issubclass(described, nnx.Module):  # a face
            cls.__doc__ = cls.__doc__ or described.__doc__
            Bare._faces.setdefault(described, cls)
            dataclasses.dataclass(eq=False, repr=False)(cls)
            for field in dataclasses.fields(cls):
                if field.name.endswith("_init") and callable(field.default):
                    setattr(cls, field.name, _Spent(field.default))
        super().__init_subclass__(**kwargs)

    def __post_init__(self):
        self._freeze()
        hold_to_ranges(self, nnx.static)
        self._check()

    def _freeze(self) -> None:
        """Makes tuples of options that are lists, so that jit takes the layer for the same each time."""
        for field in dataclasses.fields(self):
            if isinstance(value := vars(self).get(field.name), list):
                setattr(self, field.name, tuple(value))

    if TYPE_CHECKING:  # variables are attributes, which no annotation knows

        def __getattr__(self, name: str) -> Any: ...

    def _learned(self, *shapes: tuple[int, ...], **given: ArrayLike | None) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value is not None}

    def __nnx_repr__(self):
        """The layer as it was made, and its variables: options that are the defaults are not shown."""
        options, changed = {field.name for field in dataclasses.fields(self)}, self._changed()
        for part in super().__nnx_repr__():
            name = getattr(part, "key", None)
            if isinstance(part, reprlib.Object) or name in changed or (name not in options and part.value is not None):
                yield part


def _replace(variable: nnx.Variable[jax.Array], value: jax.Array) -> None:
    """Replaces the value of a variable, in the dtype that it has."""
    value = as_held(value, variable.dtype)
    if value.dtype == variable.dtype:
        variable[...] = value
    else:  # the first complex mean replaces a real one
        variable.set_value(value)


@dataclasses.dataclass(eq=False, repr=False)
class Host(Bare):
    """A layer with parameters."""

    features: int | Sequence[int]  # channels; or the whole shape of an input, for statistics along other axes
    _: dataclasses.KW_ONLY
    rngs: InitVar[nnx.Rngs]
    scale_metadata: InitVar[Metadata] = NO_METADATA  # such as sharding names
    bias_metadata: InitVar[Metadata] = NO_METADATA

    def __post_init__(self, rngs: nnx.Rngs, scale_metadata: Metadata, bias_metadata: Metadata):
        self._make(rngs, {"scale": scale_metadata, "bias": bias_metadata})

    def _make(self, rngs: nnx.Rngs, metadata: Mapping[str, Metadata], **others: Any) -> None:
        """Makes the parameters, and the layers inside, which take `others`."""
        if isinstance(self.features, str | Normalizer):
            raise TypeError(
                f"features, the number of channels, comes first in nnx: {type(self).__name__}(64, ...); "
                f"found features={self.features!r}"
            )
        require_rngs(rngs, type(self).__name__)
        self.features = nnx.static(as_features(self.features, type(self).__name__))
        self._freeze()
        hold_to_ranges(self, nnx.static)
        self._check()
        learns = self._learns(*self._shapes())
        if unknown := [name for name, given in metadata.items() if given and name not in learns]:
            raise ValueError(f"{type(self).__name__} learns no {unknown[0]} that {unknown[0]}_metadata could be of")
        for name, parameter in learns.items():
            if parameter is not None:
                made = self._parameter(parameter, rngs, metadata.get(name, NO_METADATA))
                setattr(self, name, nnx.data(made))  # said to be data: an option may have had the name
            elif name not in vars(self):
                setattr(self, name, nnx.data(None))
        self._names = tuple(learns)
        for name, inside in self._parts().items():
            setattr(self, name, nnx.data(None) if inside is None else self._inside(inside, rngs=rngs, **others))
        for field in dataclasses.fields(self):
            # Initializers have done their work; a layer made by other functions is the same to jit and to pickle.
            if field.name.endswith("_init") and callable(vars(self).get(field.name)):
                delattr(self, field.name)

    def _shapes(self) -> tuple[Shape, ...]:
        """The shapes of the inputs, as far as they are known when the layer is made."""
        return (whole_shape(self.features, self.layout),)

    def _parameter(self, parameter: Parameter, rngs: nnx.Rngs, metadata: Metadata) -> nnx.Param:
        shape, init = parameter
        made = (
            init(rngs.params(), shape, self.param_dtype) if callable(init) else jnp.full(shape, init, self.param_dtype)
        )
        return nnx.Param(made, **metadata)

    def _inside(self, described: Layer, **others: Any) -> nnx.Module:
        """A layer inside; `others` are options of hosts, for a layer that has them."""
        options = {f.name: getattr(described, f.name) for f in dataclasses.fields(described) if f.init}  # pyright: ignore
        face = self._faces[type(described)]
        known = {name: value for name, value in others.items() if name in face.__dataclass_fields__}
        return face(self.features, **options, **known)

    def _learned(self, *shapes: tuple[int, ...], **given: ArrayLike | None) -> dict[str, Any]:
        if shapes:
            require_channels(self, self.features, shapes[0])
        mine = {name: getattr(self, name) for name in self._names}
        found = {name: variable[...] for name, variable in mine.items() if isinstance(variable, nnx.Variable)}
        return {**found, **super()._learned(**given)}

    def _part(self, name: str) -> Any:
        return getattr(self, name)


@dataclasses.dataclass(eq=False, repr=False)
class Keeping(RunningLayer, Host):
    """A layer with running statistics, each a `BatchStat`; its options are those that the docstring of `Norm` tells."""

    _: dataclasses.KW_ONLY
    use_running_average: bool | None = False
    stats_metadata: InitVar[Metadata] = NO_METADATA

    def __post_init__(
        self, rngs: nnx.Rngs, scale_metadata: Metadata, bias_metadata: Metadata, stats_metadata: Metadata
    ):
        average = self.use_running_average
        metadata = {"scale": scale_metadata, "bias": bias_metadata}
        self._make(rngs, metadata, use_running_average=average, stats_metadata=stats_metadata)
        keeps = self._keeps(self._shapes()[0])
        if any(None in slot.shape for slot in keeps.values()):
            raise FieldError(
                f"{self._row()} stores statistics along other axes than the channels: give the whole shape of an "
                f"input as `features`, found {self.features!r}"
            )
        for name in dict.fromkeys((*Running._fields, *keeps)):
            stat = nnx.BatchStat(keeps[name].make(), **stats_metadata) if name in keeps else nnx.data(None)
            setattr(self, name, stat)

    def set_view(self, use_running_average: bool | None = None, update_running_average: bool | None = None):
        """Called by `nnx.view`; `nnx.view_info` reads this docstring.

        Args:
          use_running_average: whether to normalize with the stored statistics.
          update_running_average: whether the batch's statistics, where they are used, update the stored ones.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_running_average is not None:
            self.update_running_average = update_running_average

    def _uses_running(self, at_call: bool | None) -> bool:
        flag = self.use_running_average if at_call is None else at_call
        if flag is None:
            raise ValueError(
                f"No `use_running_average` argument was provided to {type(self).__name__}. Pass it to the constructor or "
                "to the call, or set it on the whole model: nnx.view(model, use_running_average=True) or False."
            )
        return flag

    def _stored(self, name: str, slot: Slot) -> jax.Array:
        return getattr(self, name)[...]

    def _store(self, name: str, value: jax.Array) -> None:
        _replace(getattr(self, name), value)

    def _leave(self, seen: BatchRecord) -> None:
        if hasattr(self, "__captures__"):
            self.sow(Moments, "batch", seen)

    def _penalize(self, value: Callable[[], jax.Array]) -> None:
        if hasattr(self, "__captures__"):
            term = value()
            self.sow(Penalty, "l1", term, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros((), term.dtype))
