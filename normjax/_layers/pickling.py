"""Layers that pickle and copy: what Python cannot pickle by itself is kept by the name under which it is found again."""

import dataclasses
import functools
import importlib
import types
from typing import Any, NamedTuple


class _Named(NamedTuple):
    """A function by the module and the name under which it is found, such as `jax.nn.sigmoid`, which is jitted."""

    module: str
    name: str


class _Default(NamedTuple):
    """An option at the default of its class, such as an initializer of Flax, which is a function without a name."""

    name: str


class _Inside(NamedTuple):
    """A module of Flax that is an option, by its class and what it holds, since it cannot be pickled as it stands."""

    cls: type
    state: dict[str, Any]


class Portable:
    """A layer that pickles and deep-copies where its options do: jitted functions and the defaults of its class always do.

    Python pickles functions by name, and refuses those that `jax.jit` or `jax.custom_jvp` made, as `jax.nn.sigmoid` and
    `jax.numpy.tanh` are, and those that were defined within another function, as all initializers with a number are.
    """

    __slots__ = ()  # so that a layer of Flax's may become one of ours where it stands

    def __getstate__(self) -> dict[str, Any]:
        return {name: _portable(type(self), name, value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _restored(type(self), value) for name, value in state.items()})


def _portable(cls: type, name: str, value: Any) -> Any:
    """An attribute as it is pickled: itself, or the name of a function."""
    if not callable(value) or isinstance(value, type):
        return value
    if dataclasses.is_dataclass(value) and hasattr(value, "apply") and not isinstance(value, Portable):
        inside = type(value)
        return _Inside(inside, {key: _portable(inside, key, held) for key, held in vars(value).items()})
    if getattr(cls, name, None) is value and "<locals>" in getattr(value, "__qualname__", ""):
        return _Default(name)
    module, called = (getattr(value, part, None) for part in ("__module__", "__qualname__"))
    if isinstance(value, types.FunctionType) or not isinstance(module, str) or not isinstance(called, str):
        return value
    found = _Named(module, called)
    return found if _find(found) is value else value


def _restored(cls: type, value: Any) -> Any:
    """What `_portable` was given."""
    if isinstance(value, _Inside):
        module = object.__new__(value.cls)
        vars(module).update({key: _restored(value.cls, held) for key, held in value.state.items()})
        return module
    if isinstance(value, _Default):
        return getattr(cls, value.name)
    return _find(value) if isinstance(value, _Named) else value


def _find(named: _Named) -> Any:
    """The function of this name; None where there is none."""
    try:
        return functools.reduce(getattr, named.name.split("."), importlib.import_module(named.module))
    except (ImportError, AttributeError):
        return None
