"""What a layer is, told without Flax: a dataclass of options that says what it learns, and whose call asks a host for it.

    description     options, docstring, `_learns`, `__call__`            `_layers/`, this folder
    host            variables, random keys, "am I initializing?"         `linen/host.py`, `nnx/host.py`
    face            `class DyT(units.DyT, Host)`                         `linen/layers.py`, `nnx/layers.py`

What a description asks of its host, and what a host asks of a description, starts with an underscore: Flax's modules have
methods of many names (`apply`, `init`, `param`), and `nnx.tabulate` traces those that look public.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, dataclass_transform, get_args, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.binding import as_layout, axes
from normjax._layers.pickling import Portable
from normjax._leaves import AMOUNT, COUNT, INTEGER, SHARE, Whole, Within, as_integer
from normjax.field import Field, FieldError

Shape = tuple[int | None, ...]  # lengths are None where they are not known yet
Initializer = Callable[..., jax.Array]  # of a random key, a shape and a dtype
T = TypeVar("T", bound=type)

# The types of options that are numbers. They say which numbers are taken, and `hold_to_ranges` holds a layer to them.
# A number may be an array, and traced. What is static decides what is computed, and is known when the layer is made.
Integer = Annotated[int, INTEGER]
Count = Annotated[int, COUNT]
Share = Annotated[ArrayLike, SHARE]
Amount = Annotated[ArrayLike, AMOUNT]
Number = Annotated[ArrayLike, Within()]
StaticShare = Annotated[float, SHARE]
StaticAmount = Annotated[float, AMOUNT]
StaticNumber = Annotated[float, Within()]

ones: Initializer = jax.nn.initializers.ones
zeros: Initializer = jax.nn.initializers.zeros


@overload
def description(cls: T, /) -> T: ...
@overload
def description(*, kw_only: bool = False) -> Callable[[T], T]: ...
@dataclass_transform(eq_default=False, field_specifiers=(dataclasses.field,))
def description(cls: T | None = None, /, *, kw_only: bool = False) -> T | Callable[[T], T]:
    """Makes a class a description: a dataclass without an equality, hash or repr of its own, which are the host's."""

    def made(cls: T) -> T:
        return dataclasses.dataclass(eq=False, repr=False, kw_only=kw_only)(cls)

    return made if cls is None else made(cls)


class Parameter(NamedTuple):
    """One learned array: its shape, and an initializer or the number that fills it, for which no random key is drawn."""

    shape: Shape
    init: Initializer | ArrayLike


class Layer(Portable):
    """What every description is. A host replaces `_learned`, `_part` and `_starting`.

    Attributes:
      layout: name of each axis of the input.
      dtype, param_dtype: of the output, by default that of the input; of the parameters.
    """

    layout: str
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    def _starting(self) -> bool:
        """Whether the layer is being initialized, perhaps on a single element, and where no axis is mapped yet."""
        return False

    def _check(self) -> None:
        """Raises where options contradict each other; called when the layer is made."""

    def _learns(self, *shapes: Any, **kwargs: Any) -> Mapping[str, Parameter | None]:
        """What is learned, by name, for inputs of these shapes, each a `Shape`; None says that the options go without."""
        return {}

    def _learned(self, *shapes: tuple[int, ...], **given: ArrayLike | None) -> dict[str, Any]:
        """The values of what is learned, by name; what is given at the call (not None) stands in their place."""
        raise NotImplementedError("a description holds no variables: take the layer from normjax.linen or normjax.nnx")

    def _parts(self) -> "Mapping[str, Layer | None]":
        """Layers inside, by name, as descriptions; None says that the options go without."""
        return {}

    def _part(self, name: str) -> Any:
        """A layer inside, to be called."""
        raise NotImplementedError("a description holds no layers: take the layer from normjax.linen or normjax.nnx")

    def _changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name, in the order of the call."""
        found = {}
        for field in sorted(dataclasses.fields(self), key=lambda field: field.kw_only):  # pyright: ignore
            value = vars(self).get(field.name, field.default)
            if field.init and not (value is field.default or _alike(value, field.default)):
                found[field.name] = value
        return found


def hold_to_ranges(layer: Any, static: Callable[[Any], Any] = lambda value: value) -> None:
    """Raises where an option is not among the numbers that its type tells; integers of NumPy become Python's.

    What replaces an option is set as `static` makes it: nnx takes an array of NumPy for data, and its attribute stays so.
    """
    for name, (numbers, optional) in _ranges(type(layer)).items():
        value = getattr(layer, name)
        if value is None and optional:
            continue
        taken = numbers(f"{name} of {type(layer).__name__}", value)
        if taken is not value:
            setattr(layer, name, static(taken))


@functools.cache
def _ranges(made: type) -> dict[str, tuple[Within, bool]]:
    """The numbers that each option of a class takes, and whether it may be None."""
    found = {}
    for cls in reversed(made.__mro__):
        for name, kind in inspect.get_annotations(cls).items():
            found.pop(name, None)
            for part in (kind, *get_args(kind)):
                for numbers in getattr(part, "__metadata__", ()):
                    if isinstance(numbers, Within):
                        found[name] = numbers, NoneType in get_args(kind)
    return found


def _alike(a: object, b: object) -> bool:
    return type(a) is type(b) and not isinstance(a, jax.Array) and bool(a == b)


def field_here(layer: Layer, field: Field | str) -> Field:
    """The field; while the layer is being initialized without its mapped axes, which need not exist yet."""
    field = Field.parse(field)
    return (field.local() or Field(())) if layer._starting() else field


class Affine(Protocol):
    """The options behind a learned scale and bias."""

    layout: str
    use_scale: bool
    use_bias: bool
    scale_init: Initializer
    bias_init: Initializer


def scale_and_bias(layer: Affine, shape: Shape) -> dict[str, Parameter | None]:
    """The learned scale and bias `[c]` of a layer with these options, for inputs of this shape."""
    return {
        "scale": Parameter(channel_shape(layer.layout, shape), layer.scale_init) if layer.use_scale else None,
        "bias": Parameter(channel_shape(layer.layout, shape), layer.bias_init) if layer.use_bias else None,
    }


def channel_shape(layout: str, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shape of a learned scale or bias, `[c]`; FieldError where the layout names no channels."""
    where = axes(layout, len(shape))
    if "c" not in where:
        raise FieldError(
            f"a learned scale or bias lies along axis 'c', which layout \"{layout}\" does not name; "
            "use_scale=False, use_bias=False goes without"
        )
    return (shape[where["c"][0]],)


def as_features(features: Any, made: str) -> Any:
    """The argument `features` of a layer of this name: a number of channels, or the shape of an input."""
    number = as_integer(features)
    if number is not None and number >= 0:
        return number
    if not isinstance(features, Iterable) or isinstance(features, str) or getattr(features, "ndim", 1) == 0:
        raise TypeError(
            f"features of {made} is the number of channels, an integer, or the whole shape of an input; found {features!r}"
        )
    return tuple(None if length is None else INTEGER(f"features of {made}", length) for length in features)


def require_channels(layer: Layer, features: int | Sequence[int | None], shape: tuple[int, ...]) -> None:
    """Raises FieldError where a layer made for these features would take an input with another number of channels."""
    where, made = axes(layer.layout, len(shape)), features
    if not isinstance(features, int):
        made = features[axes(layer.layout, len(features)).get("c", (0,))[0]]
    if "c" not in where or made is None or made == shape[where["c"][0]]:
        return
    options = [field.name for field in dataclasses.fields(layer) if not field.kw_only]  # pyright: ignore
    second = options[options.index("features") + 1]
    counted = second in _ranges(type(layer)) and isinstance(_ranges(type(layer))[second][0], Whole)
    called = f"{type(layer).__name__}({shape[where['c'][0]]}, {second}=...)"
    hint = f"; features comes first, then {second}: {called}" if counted else ""
    raise FieldError(f"a layer made for {features} features cannot take an input of shape {shape}{hint}")


def whole_shape(features: int | Sequence[int | None], layout: str) -> Shape:
    """The shape of an input as far as `features` tells it: all of it, or the number of channels."""
    if not isinstance(features, int):
        return tuple(features)
    return tuple(features if name == "c" else None for name in as_layout(layout).split())


def promoted(x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """The array in a dtype wide enough for an output of this dtype; None leaves it."""
    with jax.numpy_dtype_promotion("standard"):
        return x if dtype is None else x.astype(jnp.promote_types(x.dtype, dtype))
