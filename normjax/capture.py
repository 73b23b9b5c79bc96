"""Activations of the named layers of any linen or nnx model, and the loss's gradient at each, the model left as it is.

    probe = linen_capture(model, layers=nn.Conv, loss=lambda logits: cross_entropy(logits, labels))
    found = jax.jit(probe)(variables, images)                  # nnx: nnx_capture(model, ...)(images)
    found.activations["conv1"], found.gradients["conv1"]
    normjax.diagnostics.report(found.activations, found.gradients)

A layer is a module, its activations what its `__call__` returns, or what it is given (`at="input"`): what comes out of a
nonlinearity that is a plain function is the input of the next layer. Its name is its path, `"block/conv"`; the model itself
is `"."`. A second call of the same module adds `#2`, an output that is a tuple or another tree the place in it: `"cell[0]"`.

Gradients are taken at zeros that are added to the activations, so nothing of the model is differentiated but what lies
between them and the loss. These zeros take the memory of all that is captured: choose `layers` in large models.
"""

import fnmatch
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core.scope import union_filters

from normjax._leaves import one_of

Layers = None | str | type | Sequence[str | type] | Callable[[str, Any], bool]
Loss = Callable[[Any], Any]
Leaves = dict[str, Any]  # the arrays of one call, by their place in its output
Calls = dict[str, tuple[Leaves, ...]]  # those of each layer, call after call

PLACES = ("output", "input")
SOWN, ZEROS = "intermediates", "capture_zeros"
_SLOT, _REACHED = "__captured__", "__captured_with_zeros__"
_count = itertools.count()


class Captured(NamedTuple):
    """What a probe found.

    Attributes:
      output: what the model returned.
      activations: {layer: activations}.
      gradients: {layer: gradient of the loss there}, of the same shapes; empty without a loss.
    """

    output: Any
    activations: dict[str, jax.Array]
    gradients: dict[str, jax.Array]


class _Seen:
    """What one run met, for errors: names of the layers that were called, and of those that matched."""

    def __init__(self):
        self.called: dict[str, None] = {}
        self.matched: dict[str, None] = {}


def linen_capture(
    model: nn.Module, *, layers: Layers = None, at: str = "output", loss: Loss | None = None
) -> Callable[..., Captured]:
    """Makes a function that runs a linen model and captures its layers.

    Layers inside a lifted `nn.scan` or `nn.vmap` are captured, stacked along its axis, where its `variable_axes` let the
    collection "intermediates" through, and their gradients where they let "capture_zeros" through; else they are left
    out. `nn.remat` and `nn.jit` let everything through.

    Args:
      model: a linen module.
      layers: which: a name or a pattern ("encoder/*", as of file names), a type of module, several of these, or a function
        of name and module, which is asked once for layers that share an `nn.jit`; None is all.
      at: "output", or "input" for the first positional argument.
      loss: function of the model's output to a scalar, for gradients.

    Returns:
      `probe(variables, *args, **kwargs) -> Captured`; arguments as of `model.apply` (`train=`, `rngs=`, `mutable=`,
      `method=`), and so is the output. Pure: jit, vmap and grad apply.

    Raises:
      TypeError: the model is no linen module, or `layers` none of the above.
      ValueError: from the probe, if no layer that is called matches; `at` is neither place.

    >>> model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    >>> x = jnp.ones((4, 5))
    >>> found = linen_capture(model, layers=nn.Dense, loss=jnp.sum)(model.init(jax.random.key(0), x), x)
    >>> {name: z.shape for name, z in found.activations.items()}
    {'layers_0': (4, 3), 'layers_2': (4, 2)}
    >>> found.gradients["layers_2"].tolist()[0]
    [1.0, 1.0]
    """
    _refuse(model, nn.Module, layers, at)
    # nn.jit runs the Python of one of several alike modules alone. It knows a module by what that may change, so a
    # collection of this name keeps probes apart; and names are looked at afterwards.
    by_name = isinstance(layers, str) or (isinstance(layers, Sequence) and all(isinstance(la, str) for la in layers))
    sown = (SOWN, f"capture_{next(_count)}")

    def probe(variables: Mapping[str, Any], /, *args: Any, mutable: Any = False, **kwargs: Any) -> Captured:
        given = {name: value for name, value in variables.items() if name not in (SOWN, ZEROS)}

        def run(zeros: Calls | None, seen: _Seen) -> tuple[Any, Calls, set[str]]:
            open_calls: list[Any] = []

            def watch(call: Callable, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
                module, scope = context.module, context.module.scope
                if context.method_name != "__call__" or scope is None:
                    return call(*call_args, **call_kwargs)
                name = _name(module.path)

                def keep(value: Any) -> Any:
                    number = sum(len(scope.get_variable(SOWN, slot, ())) for slot in (_SLOT, _REACHED))
                    added = scope.get_variable(ZEROS, f"{_SLOT}{number}")
                    if added is not None:
                        value = _map_leaves(lambda place, leaf: leaf + added[place], value)
                    # Said by name, not by a flag: nn.jit may know a call already, and then runs no Python.
                    module.sow(SOWN, _SLOT if added is None else _REACHED, _leaves(value))
                    return value

                # A lifted class, or a call of super(), calls a module of the same path again: the outer one counts.
                outer = not open_calls or open_calls[-1] != module.path
                seen.called[name] = None
                open_calls.append(module.path)
                try:
                    wanted = _matches(layers, name, module)
                    seen.matched |= {name: None} if wanted else {}
                    if not outer or not (wanted or by_name):
                        return call(*call_args, **call_kwargs)
                    return _around(call, call_args, call_kwargs, at, keep)
                finally:
                    open_calls.pop()

            with_zeros = given if zeros is None else {**given, ZEROS: _as_collection(zeros)}
            with nn.intercept_methods(watch):
                applied: Any = model.apply(with_zeros, *args, mutable=union_filters(mutable, sown), **kwargs)
            output, state = applied
            calls, reached, rest = _from_collection(state.get(SOWN, {}))
            calls = {name: each for name, each in calls.items() if not by_name or _matches(layers, name, None)}
            if mutable is not False:
                kept = {name: value for name, value in state.items() if name not in (SOWN, ZEROS)}
                output = (output, {**kept, SOWN: rest} if rest else kept)
            return output, calls, reached

        return _capture(run, layers, loss)

    return probe


class Activation(nnx.Intermediate):
    """What a layer returned or was given, while `nnx_capture` runs a copy of the model."""


class Zero(nnx.Perturbation):
    """The zeros that are added to it."""


def nnx_capture(
    model: nnx.Module, *, layers: Layers = None, at: str = "output", loss: Loss | None = None, call: Any = None
) -> Callable[..., Captured]:
    """Makes a function that runs a copy of an nnx model and captures its layers.

    The model stays as it is: its running statistics, its random counts and its classes.

    Args:
      model: an nnx module.
      layers: as for `linen_capture`.
      at: "output", or "input" for the first positional argument.
      loss: function of the model's output to a scalar, for gradients.
      call: what is run instead of the model's `__call__`: `call(model, *args, **kwargs)`.

    Returns:
      `probe(*args, **kwargs) -> Captured`, which takes the model's variables as they are when it is called. Where the
      model is an argument of a jitted function, make the probe inside.

    Raises:
      TypeError: the model is no nnx module, or `layers` none of the above.
      ValueError: from the probe, if no layer that is called matches; `at` is neither place.

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(5, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 2, rngs=rngs))
    >>> found = nnx_capture(model, layers=nnx.Linear, loss=jnp.sum)(jnp.ones((4, 5)))
    >>> {name: z.shape for name, z in found.activations.items()}
    {'layers/0': (4, 3), 'layers/2': (4, 2)}
    >>> found.gradients["layers/2"].tolist()[0]
    [1.0, 1.0]
    """
    _refuse(model, nnx.Module, layers, at)

    def probe(*args: Any, **kwargs: Any) -> Captured:
        def run(zeros: Calls | None, seen: _Seen) -> tuple[Any, Calls, set[str]]:
            copy, paths = nnx.clone(model), {}
            for path, module in list(nnx.iter_modules(copy)):
                name = _name(path)
                paths[path] = name
                seen.called[name] = None
                if callable(module) and _matches(layers, name, module):
                    seen.matched[name] = None
                    module.__class__ = _watched(type(module), at)

            def forward(copy: Any) -> Any:
                for _, module in nnx.iter_modules(copy):
                    if isinstance(module, nnx.List):  # numbers beside this name cannot be sorted, as nnx.remat does
                        delattr(module, "__captures__")
                return copy(*args, **kwargs) if call is None else call(copy, *args, **kwargs)

            if zeros is None:
                captured: Any = nnx.capture(forward, Activation)(copy)
            else:
                init: dict = {}
                for path, name in paths.items():
                    inner = init
                    for key in path if name in zeros else ():
                        inner = inner.setdefault(key, {})
                    for number, leaves in enumerate(zeros.get(name, ())):
                        inner |= {f"zero{number}{place}": Zero(leaf) for place, leaf in leaves.items()}
                captured = nnx.capture(forward, Activation, Zero, init=nnx.State(init))(copy)
            output, sown, *_ = captured
            return output, _from_sown(sown), set(paths.values())

        return _capture(run, layers, loss)

    return probe


@functools.cache
def _watched(cls: type, at: str) -> type:
    """The class of a layer, with a call that keeps what passes. Cached, since JAX never forgets a class of nodes."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        def keep(value: Any) -> Any:
            sown = next((var for var in getattr(self, "__captures__", ()) if type(var) is Activation), None)
            if sown is None:
                return value
            number = len({key.partition("[")[0] for key in sown.get_value()})

            def pass_on(place: str, leaf: Any) -> Any:
                leaf = self.perturb(f"zero{number}{place}", leaf, Zero)  # capture loses one of two of the same name
                self.sow(Activation, f"{number}{place}", leaf, lambda _, new: new, lambda: None)
                return leaf

            return _map_leaves(pass_on, value)

        return _around(functools.partial(cls.__call__, self), args, kwargs, at, keep)

    names = {
        "__call__": __call__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(cls.__name__, (cls,), names)


# --- shared ---------------------------------------------------------------------------------------


def _refuse(model: Any, kind: type, layers: Layers, at: str) -> None:
    """Raises for arguments that no probe can be made of."""
    if not isinstance(model, kind):
        library = "linen" if kind is nn.Module else "nnx"
        raise TypeError(f"{library}_capture takes a model of flax.{library}, found {type(model).__name__}")
    if not (layers is None or callable(layers) or isinstance(layers, str | Sequence)):
        raise TypeError(f"layers are a name, a pattern, a type, several of these or a function; found {layers!r}")
    one_of("at", at, PLACES)


def _capture(run: Callable[[Any, _Seen], tuple[Any, Calls, set[str]]], layers: Layers, loss: Loss | None) -> Captured:
    """Runs a model, with a loss twice: the first time abstractly, for the shapes of the zeros."""
    seen = _Seen()
    if loss is None:
        output, calls, _ = run(None, seen)
        return Captured(output, _checked(calls, layers, seen), {})
    shapes = jax.eval_shape(lambda: run(None, seen)[1])
    _checked(shapes, layers, seen)

    reached: set[str] = set()

    def objective(zeros: Calls) -> tuple[Any, tuple[Any, Calls]]:
        output, calls, names = run(zeros, seen)
        reached.update(names)
        return loss(output), (output, calls)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    gradients, (output, calls) = jax.grad(objective, has_aux=True)(zeros)
    return Captured(output, _flat(calls), _flat({n: g for n, g in gradients.items() if n in reached}))


def _around(call: Callable, args: tuple, kwargs: dict, at: str, keep: Callable[[Any], Any]) -> Any:
    """A call whose first argument or whose output passes through `keep`."""
    if at == "output":
        return keep(call(*args, **kwargs))
    return call(keep(args[0]), *args[1:], **kwargs) if args else call(**kwargs)


def _matches(layers: Layers, name: str, module: Any) -> bool:
    if layers is None:
        return True
    if isinstance(layers, str):
        return fnmatch.fnmatchcase(name, layers)
    if isinstance(layers, type):
        return isinstance(module, layers)
    if callable(layers):
        return bool(layers(name, module))
    return any(_matches(layer, name, module) for layer in layers)


def _name(path: tuple) -> str:
    return "/".join(map(str, path)) or "."


def _map_leaves(function: Callable[[str, Any], Any], value: Any) -> Any:
    """Applies a function of place and leaf to the floating arrays of a tree."""

    def apply(path: Any, leaf: Any) -> Any:
        floating = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return function(jax.tree_util.keystr(path), leaf) if floating else leaf

    return jax.tree_util.tree_map_with_path(apply, value)


def _leaves(value: Any) -> Leaves:
    found: Leaves = {}
    _map_leaves(lambda place, leaf: found.setdefault(place, leaf), value)
    return found


def _as_collection(zeros: Calls) -> dict:
    """The zeros as linen stores them: nested by path, one variable for each call."""
    collection: dict = {}
    for name, calls in zeros.items():
        inner = collection
        for key in () if name == "." else name.split("/"):
            inner = inner.setdefault(key, {})
        inner |= {f"{_SLOT}{number}": leaves for number, leaves in enumerate(calls)}
    return collection


def _from_collection(
    collection: Mapping[str, Any], path: tuple[str, ...] = ()
) -> tuple[Calls, set[str], dict[str, Any]]:
    """What was sown here by layer, the layers that zeros reached, and what the model itself had sown."""
    calls: Calls = {}
    reached: set[str] = set()
    rest: dict = {}
    for key, value in collection.items():
        if key in (_SLOT, _REACHED):
            calls[_name(path)] = tuple(dict(leaves) for leaves in value)
            reached |= {_name(path)} if key == _REACHED else set()
        elif isinstance(value, Mapping):
            inner, names, others = _from_collection(value, (*path, key))
            calls |= inner
            reached |= names
            rest |= {key: others} if others else {}
        else:
            rest[key] = value
    return calls, reached, rest


def _from_sown(sown: Any) -> Calls:
    """What nnx captured, by layer and call."""
    found: dict[str, dict[int, Leaves]] = {}
    for path, variable in nnx.to_flat_state(sown):
        number, bracket, place = str(path[-1]).partition("[")
        found.setdefault(_name(path[:-1]), {}).setdefault(int(number), {})[bracket + place] = variable.get_value()
    return {name: tuple(calls[number] for number in sorted(calls)) for name, calls in found.items()}


def _flat(calls: Calls) -> dict[str, Any]:
    """The arrays by name, number of the call and place."""
    found = {}
    for name, each in calls.items():
        for number, leaves in enumerate(each):
            found |= {f"{name}{f'#{number + 1}' if number else ''}{place}": leaf for place, leaf in leaves.items()}
    return found


def _checked(calls: Calls, layers: Layers, seen: _Seen) -> dict[str, Any]:
    found = _flat(calls)
    if not found and seen.matched:
        raise ValueError(
            f"nothing floating passes {', '.join(seen.matched)}, or a lifted transformation around them does not let "
            f'the collection "{SOWN}" through: add it to its variable_axes'
        )
    if not found:
        raise ValueError(f"no layer that is called matches {layers!r}; found {', '.join(seen.called)}")
    return found
