"""The arguments of nnx classes as `inspect.signature` and `help` show them, and the one that all of them need.

The metaclass of nnx takes anything, and constructors hand Flax's arguments on to Flax by `**`; neither tells a reader.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx

from normjax import kernels


class Constructor:
    """The `__signature__` of a class and of its subclasses: the arguments of whatever constructor each has."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:  # a layer is a callable, whose signature is that of its call
            raise AttributeError("__signature__")
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def require_rngs(rngs: object, made: str) -> None:
    """Raises TypeError unless a layer of this name is given Flax's streams of random keys.

    >>> require_rngs(0, "Norm")
    Traceback (most recent call last):
    ...
    TypeError: rngs of Norm is an nnx.Rngs, as in rngs=nnx.Rngs(0); found 0
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs of {made} is an nnx.Rngs, as in rngs=nnx.Rngs(0); found {rngs!r}")


def spelled_out(
    init: Callable[..., None], flax: Callable[..., None], fields: Iterable[dataclasses.Field[Any]] = ()
) -> Callable[..., None]:
    """A constructor that hands its `**` on to Flax's: it shows Flax's arguments, its own, and fields, in place of the `**`.

    An argument that both have is the constructor's own.
    """
    own = inspect.signature(init).parameters
    known = {name: p for name, p in own.items() if p.kind is not p.VAR_KEYWORD}
    for f in fields:
        known[f.name] = inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
    merged = {**inspect.signature(flax).parameters, **known}

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "rngs" in kwargs:
            require_rngs(kwargs["rngs"], type(self).__name__)
        init(self, *args, **kwargs)

    ordered = sorted(merged.values(), key=lambda p: (p.kind, p.kind is p.KEYWORD_ONLY and p.name == "rngs"))
    __init__.__signature__ = inspect.Signature(ordered)  # pyright: ignore[reportAttributeAccessIssue]
    return __init__


def with_kernel(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor of Flax's with one more argument, `kernel`, which the instance keeps where it is given."""
    signature = inspect.signature(init)
    own = inspect.Parameter("kernel", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=bool | None)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, kernel: bool | None = None, **kwargs: Any) -> None:
        kernels.asked(kernel)  # refuses what is no choice
        init(self, *args, **kwargs)
        if kernel is not None:
            self.kernel = kernel

    made = signature.replace(parameters=[*signature.parameters.values(), own])
    __init__.__signature__ = made  # pyright: ignore[reportAttributeAccessIssue]
    return __init__
