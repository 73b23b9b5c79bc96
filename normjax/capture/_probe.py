"""What the probes of both libraries share: which layers are meant, what passes through them, and gradients at zeros."""

import fnmatch
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax._leaves import one_of
from normjax._paths import PyTree

SOWN = "intermediates"  # the collection of linen that activations are sown into

Module = TypeVar("Module")
Layers: TypeAlias = str | type | Sequence[str | type] | Callable[[str, Module], bool] | None
Loss: TypeAlias = Callable[[PyTree], ArrayLike]
Call: TypeAlias = Callable[..., PyTree]
Args: TypeAlias = tuple[PyTree, ...]
Kwargs: TypeAlias = dict[str, PyTree]
Leaves: TypeAlias = dict[str, jax.Array]  # the arrays of one call, by their place in its output
Path: TypeAlias = tuple[Hashable, ...]  # of a layer: attributes and numbers
Calls: TypeAlias = dict[str, tuple[Leaves, ...]]  # those of each layer, call after call


class Captured(NamedTuple):
    """What a probe found.

    Attributes:
      output: what the model returned.
      activations: {layer: activations}.
      gradients: {layer: gradient of the loss there}, of the same shapes; empty without a loss.

    >>> Captured(None, {"conv1": jnp.ones((4, 3))}, {}).activations["conv1"].shape
    (4, 3)
    """

    output: PyTree
    activations: dict[str, jax.Array]
    gradients: dict[str, jax.Array]


class Run(NamedTuple):
    """One run of a model."""

    output: PyTree
    calls: Calls  # the arrays that passed each layer that is meant
    reached: set[str]  # all layers that zeros were added in, and perhaps others of which nothing was kept


class Matches(NamedTuple):
    """Names of the layers that runs have met, of all and of those that are meant, in order, for errors."""

    called: dict[str, None]
    matched: dict[str, None]


def check_arguments(library: str, model: object, kind: type, layers: object, at: str) -> None:
    """Raises for arguments that no probe can be made of."""
    if not isinstance(model, kind):
        raise TypeError(f"{library}_capture takes a model of flax.{library}, found {type(model).__name__}")
    if not (layers is None or callable(layers) or isinstance(layers, str | Sequence)):
        raise TypeError(f"layers are a name, a pattern, a type, several of these or a function; found {layers!r}")
    one_of("at", at, ("output", "input"))


def is_meant(layers: Layers[Module], name: str, module: Module) -> bool:
    """Whether a layer is among those that a probe is made for."""
    if layers is None:
        return True
    if isinstance(layers, str):
        return fnmatch.fnmatchcase(name, layers)
    if isinstance(layers, type):
        return isinstance(module, layers)
    if callable(layers):
        return bool(layers(name, module))
    return any(is_meant(layer, name, module) for layer in layers)


def layer_name(path: Iterable[Hashable]) -> str:
    """The name of the layer at a path of attributes and numbers; "." for the model itself."""
    return "/".join(map(str, path)) or "."


def layer_names(paths: Iterable[Path]) -> dict[Path, str]:
    """The names of layers by path, each another: where a slash in a name makes two alike, that one is quoted."""
    names: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: any("/" in str(part) for part in path)):  # in order but for these
        plain = layer_name(path)
        names["/".join(map(repr, path)) if plain in names else plain] = path
    return {path: name for name, path in names.items()}


def pass_through(keep: Callable[[PyTree], PyTree], at: str, call: Call, args: Args, kwargs: Kwargs) -> PyTree:
    """A call whose output, or whose first argument, passes through `keep`."""
    if at == "output":
        return keep(call(*args, **kwargs))
    return call(keep(args[0]), *args[1:], **kwargs) if args else call(**kwargs)


def map_floating(function: Callable[[str, jax.Array], jax.Array], value: PyTree) -> PyTree:
    """Applies a function of place and array to the floating arrays of a tree."""

    def apply(path: jax.tree_util.KeyPath, leaf: PyTree) -> PyTree:
        floating = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return function(jax.tree_util.keystr(path), leaf) if floating else leaf

    return jax.tree_util.tree_map_with_path(apply, value)


def capture(run: Callable[[Calls | None, Matches], Run], layers: Layers[Module], loss: Loss | None) -> Captured:
    """Runs a model, with a loss twice: the first time abstractly, for the shapes of the zeros that are added."""
    matches = Matches({}, {})
    if loss is None:
        output, calls, _ = run(None, matches)
        return Captured(output, _captured(calls, layers, matches), {})
    shapes, reached = jax.eval_shape(lambda: run(None, matches).calls), set()
    _captured(shapes, layers, matches)

    def objective(zeros: Calls) -> tuple[ArrayLike, tuple[PyTree, Calls]]:
        output, calls, names = run(zeros, matches)
        reached.update(names)
        return loss(output), (output, calls)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    gradients, (output, calls) = jax.grad(objective, has_aux=True)(zeros)
    return Captured(output, _flat(calls), _flat({name: each for name, each in gradients.items() if name in reached}))


def _flat(calls: Calls) -> dict[str, jax.Array]:
    """The arrays by name, number of the call and place."""
    numbered = {name + (f"#{i + 1}" if i else ""): ls for name, each in calls.items() for i, ls in enumerate(each)}
    return {name + place: leaf for name, leaves in numbered.items() for place, leaf in leaves.items()}


def _captured(calls: Calls, layers: object, matches: Matches) -> dict[str, jax.Array]:
    """The arrays by name; refuses none at all."""
    found = _flat(calls)
    if not found and matches.matched:
        through = f'does not let the collection "{SOWN}" through: add it to its variable_axes'
        names = ", ".join(matches.matched)
        raise ValueError(f"nothing floating passes {names}, or a lifted transformation around them {through}")
    if not found:
        raise ValueError(f"no layer that is called matches {layers!r}; found {', '.join(matches.called)}")
    return found
