"""The probe of nnx models: layers of a copy get a class whose call sows what passes."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from normjax._paths import PyTree
from normjax.capture import _probe as probe
from normjax.capture._probe import Call, Calls, Captured, Layers, Leaves, Loss, Matches, Run


class _Activation(nnx.Intermediate):
    """What a layer returned or was given, while `nnx_capture` runs a copy of the model."""


class _Zero(nnx.Perturbation):
    """The zeros that are added to it."""


def nnx_capture(
    model: nnx.Module,
    *,
    layers: Layers[nnx.Module] = None,
    at: str = "output",
    loss: Loss | None = None,
    call: Call | None = None,
) -> Callable[..., Captured]:
    """Makes `probe(*args, **kwargs) -> Captured`, which runs a copy of an nnx model and captures its layers.

    The model stays as it is: its running statistics, random counts and classes. The probe takes its variables as they
    are when it is called; where the model is an argument of a jitted function, make the probe inside. That no layer
    that is called matches is a ValueError.

    Args:
      model: an nnx module.
      layers: a name or a pattern ("encoder/*"), a type of module, several of these, or a function of name and module;
        None is all.
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
            modules = list(nnx.iter_modules(copy))
            names = probe.layer_names(path for path, _ in modules)
            for path, module in modules:
                name = names[path]
                matches.called[name] = None
                if callable(module) and probe.is_meant(layers, name, module):
                    matches.matched[name] = None
                    module.__class__ = _watched(type(module), at)
            if zeros is None:
                output, sown = nnx.capture(forward, _Activation)(copy)
            else:
                output, sown, *_ = nnx.capture(forward, _Activation, _Zero, init=_as_state(zeros, names))(copy)
            return Run(output, _from_sown(sown, names), set(names.values()))

        return probe.capture(run, layers, loss)

    return captured


@functools.cache
def _watched(cls: type, at: str) -> type:
    """The class of a layer, with a call that is watched. Cached, since JAX never forgets a class of nodes."""

    def __call__(self: nnx.Module, *args: PyTree, **kwargs: PyTree) -> PyTree:
        call = functools.partial(cls.__call__, self)
        return probe.pass_through(functools.partial(_keep, self), at, call, args, kwargs)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {"__call__": __call__, **names})


def _keep(layer: nnx.Module, value: PyTree) -> PyTree:
    """Sows what passes a layer, the zeros of this call added to it where there are any."""
    sown = next((var for var in getattr(layer, "__captures__", ()) if type(var) is _Activation), None)
    if sown is None:
        return value
    number = len({key.partition("[")[0] for key in sown.get_value()})

    def pass_on(place: str, leaf: jax.Array) -> jax.Array:
        leaf = layer.perturb(f"zero{number}{place}", leaf, _Zero)  # capture loses one of two of the same name
        layer.sow(_Activation, f"{number}{place}", leaf, lambda _, new: new, lambda: None)
        return leaf

    return probe.map_floating(pass_on, value)


def _as_state(zeros: Calls, names: dict[probe.Path, str]) -> nnx.State:
    """The zeros as nnx stores them: nested by path, one variable for each call and place."""
    flat = {}
    for path, name in names.items():
        for number, leaves in enumerate(zeros.get(name, ())):
            flat |= {(*path, f"zero{number}{place}"): _Zero(leaf) for place, leaf in leaves.items()}
    return nnx.from_flat_state(flat)


def _from_sown(sown: nnx.State, names: dict[probe.Path, str]) -> Calls:
    """What nnx captured, by layer and call."""
    found: dict[str, dict[int, Leaves]] = {}
    for path, variable in nnx.to_flat_state(sown):
        number, bracket, place = str(path[-1]).partition("[")
        calls = found.setdefault(names[path[:-1]], {})
        calls.setdefault(int(number), {})[bracket + place] = variable.get_value()
    return {name: tuple(calls[number] for number in sorted(calls)) for name, calls in found.items()}
