"""What happens around the calls of a linen model in a step: what layers leave, statistics, streams of random numbers."""

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeAlias

import jax
from flax import errors, nnx
from flax import linen as nn

from normjax._paths import PyTree
from normjax.linen import BatchNorm
from normjax.linen import recurrent as cells
from normjax.linen.host import Keeping
from normjax.train._forward import PENALTY, RECORD, Leaving, Left
from normjax.train._objective import own_momentum
from normjax.train._report import named_key

LEAVING = (Keeping, BatchNorm, cells.Host)  # the layers that leave penalties or records
Call: TypeAlias = Callable[..., PyTree]


def watch(
    stored: bool | None,
    leaving: Leaving,
    met: set[Left],
    call: Call,
    args: PyTree,
    kwargs: PyTree,
    context: nn.module.InterceptorContext,
) -> PyTree:
    """Every call of a method of a module: which layers leave something, and which statistics they normalize with."""
    module = context.module
    if context.method_name == "__call__" and module.scope is not None:
        for what, option, nothing in ((PENALTY, "l1", 0.0), (RECORD, "_leaves_records", False)):
            if getattr(module, option, nothing) and isinstance(module, LEAVING):
                met.add((module.path, what))
                if (module.path, what) in leaving.silent:
                    object.__setattr__(module, option, nothing)  # the layer is bound afresh at every apply
        if stored is not None and hasattr(module, "use_running_average"):
            args, kwargs = _told(module, stored, context.orig_method, args, kwargs)
    return call(*args, **kwargs)


def _told(module: PyTree, stored: bool, method: Call, args: PyTree, kwargs: PyTree) -> tuple[PyTree, PyTree]:
    """The arguments of a call in which a module normalizes with stored statistics, or not, whatever the model asks of it.

    `method` is what is called, of the module's class or, by `super()`, of a base class.
    """
    name, signature = "use_running_average", inspect.signature(method)
    takes, built = name in signature.parameters, module.use_running_average is not None
    hands_on = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())
    bound = signature.bind(*args, **kwargs) if takes else None
    given = kwargs.get(name) if bound is None else bound.arguments.get(name)
    if given is not None or built or not (takes or hands_on):
        # Said once, at the call where it is an argument there; the layer is bound afresh at every apply.
        object.__setattr__(module, name, stored if given is None else None)
    if given is None and (built or not takes):
        return args, kwargs
    if bound is None:
        return args, {**kwargs, name: stored}
    bound.arguments[name] = stored
    return bound.args, bound.kwargs


def note_momentum(
    momenta: dict[tuple[str, ...], float],
    call: Call,
    args: PyTree,
    kwargs: PyTree,
    context: nn.module.InterceptorContext,
) -> PyTree:
    """Notes how layers average, where they leave no record: Flax's own batch norms, and ours in a branch or a loop.

    Under a mask their parts do not weigh alike.
    """
    module = context.module
    if isinstance(module, nn.BatchNorm | Keeping) and context.method_name == "__call__":
        masked = kwargs.get("mask") is not None or (module.path in momenta and math.isnan(momenta[module.path]))
        momenta[module.path] = math.nan if masked else own_momentum(module)
    return call(*args, **kwargs)


@contextlib.contextmanager
def made_by_init() -> Iterator[None]:
    """Says what to do about variables that a model asks for in a step and that its init did not make."""
    try:
        yield
    except (errors.ScopeCollectionNotFound, errors.ScopeVariableNotFoundError, errors.ScopeParamNotFoundError) as error:
        said = str(error).split(" (https:")[0]
        raise ValueError(f"{said} `linen_init` makes every variable: give it the arguments of training") from error


def collections(mutable: bool | str | Collection[str] | nn.DenyList) -> tuple[str, ...]:
    """The names of collections that a loss asks the model to change beside those that a step carries."""
    if isinstance(mutable, str):
        return (mutable,)
    if mutable is True or isinstance(mutable, nn.DenyList):
        raise TypeError(
            "`call` of a step changes what the step carries by itself; mutable= names further collections, such as "
            f"['intermediates']; found {mutable!r}"
        )
    return tuple(mutable or ())


def require_linen(model: nn.Module, maker: str) -> None:
    """Raises TypeError unless this is a linen module."""
    if not isinstance(model, nn.Module):
        of_nnx = isinstance(model, nnx.Module | nnx.GraphDef)
        hint = f": of nnx, take `{maker.replace('linen', 'nnx')}`" if of_nnx else ""
        raise TypeError(f"{maker} takes a linen module first; found {type(model).__name__}{hint}")


def streams(key: jax.Array, names: str | Iterable[str]) -> dict[str, jax.Array]:
    """A key for each stream of random numbers; Flax takes that of `params` for those that have none."""
    names = (names,) if isinstance(names, str) else tuple(names)
    return {name: key if name == "dropout" else named_key(key, name) for name in ("params", *names)}
