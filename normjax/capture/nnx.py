"""The probe of nnx models: layers of a copy get a class whose call sows what passes."""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import jax
from flax import nnx

from normjax._paths import PyTree
from normjax.capture import _probe as probe
from normjax.capture._probe import Calls, Captured, Layers, Leaves, Loss, Matches, Run


class Activation(nnx.Intermediate):
    """What a layer returned or was given, while `nnx_capture` runs a copy of the model.

    >>> Activation({"0": jnp.ones(2)}).get_value()
    {'0': Array([1., 1.], dtype=float32)}
    """


class Zero(nnx.Perturbation):
    """The zeros that are added to what a layer returned or was given.

    >>> Zero(jnp.zeros(2))[...]
    Array([0., 0.], dtype=float32)
    """


def nnx_capture(
    model: nnx.Module,
    *,
    layers: Layers[nnx.Module] = None,
    at: str = "output",
    loss: Loss | None = None,
    call: Callable[..., PyTree] | None = None,
) -> Callable[..., Captured]:
    """Makes `probe(*args, **kwargs) -> Captured`, which runs a copy of an nnx model and captures its layers.

    The model stays as it is: its running statistics, its random counts and its classes. The probe takes its variables as
    they are when it is called; where the model is an argument of a jitted function, make the probe inside. It is a
    ValueError if no layer that is called matches.

    Args:
      model: an nnx module.
      layers: which: a name or a pattern ("encoder/*", as of file names), a type of module, several of these, or a function
        of name and module; None is all.
      at: "output", or "input" for the first positional argument.
      loss: function of the model's output to a scalar, for gradients.
      call: what is run instead of the model's `__call__`: `call(model, *args, **kwargs)`.

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(5, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 2, rngs=rngs))
    >>> found = nnx_capture(model, layers=nnx.Linear, loss=jnp.sum)(jnp.ones((4, 5)))
    >>> {name: z.shape for name, z in found.activations.items()}
    {'layers/0': (4, 3), 'layers/2': (4, 2)}
    >>> found.gradients["layers/2"].tolist()[0]
    [1.0, 1.0]
    """
    probe.check_arguments("nnx", model, nnx.Module, layers, at)

    def captured(*args: PyTree, **kwargs: PyTree) -> Captured:
        def forward(copy: nnx.Module) -> PyTree:
            for _, module in nnx.iter_modules(copy):
                if isinstance(module, nnx.List):  # numbers beside this name cannot be sorted, as nnx.remat does
                    delattr(module, "__captures__")
            return copy(*args, **kwargs) if call is None else call(copy, *args, **kwargs)

        def run(zeros: Calls | None, matches: Matches) -> Run:
            copy = nnx.clone(model)
            paths = _watch_layers(copy, layers, at, matches)
            if zeros is None:
                output, sown = nnx.capture(forward, Activation)(copy)
            else:
                output, sown, *_ = nnx.capture(forward, Activation, Zero, init=_as_state(zeros, paths))(copy)
            return Run(output, _from_sown(sown), set(paths))

        return probe.capture(run, layers, loss)

    return captured


def _watch_layers(
    model: nnx.Module, layers: Layers[nnx.Module], at: str, matches: Matches
) -> dict[str, tuple[Hashable, ...]]:
    """Gives the layers that are meant a class that is watched; returns the paths of all modules by name."""
    paths = {}
    for path, module in list(nnx.iter_modules(model)):
        name = probe.layer_name(path)
        paths[name] = path
        matches.called[name] = None
        if callable(module) and probe.is_meant(layers, name, module):
            matches.matched[name] = None
            module.__class__ = _watched(type(module), at)
    return paths


@functools.cache
def _watched(cls: type, at: str) -> type:
    """The class of a layer, with a call that is watched. Cached, since JAX never forgets a class of nodes."""
    recorder = _Recorder(cls, at)

    def __call__(self: nnx.Module, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return recorder.watch(self, *args, **kwargs)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {"__call__": __call__, **names})


@dataclass(frozen=True)
class _Recorder:
    """Watches the calls of the layers of a class, `cls` as it was, and keeps what passes."""

    cls: type
    at: str

    def watch(self, layer: nnx.Module, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """A call of a layer."""
        call = functools.partial(self.cls.__call__, layer)
        return probe.pass_through(functools.partial(self.keep, layer), self.at, call, args, kwargs)

    def keep(self, layer: nnx.Module, value: PyTree) -> PyTree:
        """Sows what passes a layer, the zeros of this call added to it where there are any."""
        sown = next((var for var in getattr(layer, "__captures__", ()) if type(var) is Activation), None)
        if sown is None:
            return value
        number = len({key.partition("[")[0] for key in sown.get_value()})

        def pass_on(place: str, leaf: jax.Array) -> jax.Array:
            leaf = layer.perturb(f"zero{number}{place}", leaf, Zero)  # capture loses one of two of the same name
            layer.sow(Activation, f"{number}{place}", leaf, lambda _, new: new, lambda: None)
            return leaf

        return probe.map_floating(pass_on, value)


def _as_state(zeros: Calls, paths: dict[str, tuple[Hashable, ...]]) -> nnx.State:
    """The zeros as nnx stores them: nested by path, one variable for each call and place."""
    init: dict[Hashable, PyTree] = {}
    for name, path in paths.items():
        inner = init
        for key in path if name in zeros else ():
            inner = inner.setdefault(key, {})
        for number, leaves in enumerate(zeros.get(name, ())):
            inner |= {f"zero{number}{place}": Zero(leaf) for place, leaf in leaves.items()}
    return nnx.State(init)


def _from_sown(sown: nnx.State) -> Calls:
    """What nnx captured, by layer and call."""
    found: dict[str, dict[int, Leaves]] = {}
    for path, variable in nnx.to_flat_state(sown):
        number, bracket, place = str(path[-1]).partition("[")
        calls = found.setdefault(probe.layer_name(path[:-1]), {})
        calls.setdefault(int(number), {})[bracket + place] = variable.get_value()
    return {name: tuple(calls[number] for number in sorted(calls)) for name, calls in found.items()}
