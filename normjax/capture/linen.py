"""The probe of linen models: calls are intercepted, what passes is sown."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flax import linen as nn
from flax.core.scope import CollectionFilter, union_filters
from flax.traverse_util import flatten_dict, unflatten_dict

from normjax._paths import PyTree
from normjax.capture import _probe as probe
from normjax.capture._probe import SOWN, Args, Call, Calls, Captured, Kwargs, Layers, Leaves, Loss, Matches, Run

ZEROS = "capture_zeros"
# The name under which a call is sown says whether zeros were added, not a flag: nn.jit that knows the call runs no Python.
_KEPT, _KEPT_WITH_ZEROS = "__captured__", "__captured_with_zeros__"
_probes = itertools.count()


def linen_capture(
    model: nn.Module, *, layers: Layers[nn.Module] = None, at: str = "output", loss: Loss | None = None
) -> Callable[..., Captured]:
    """Makes `probe(variables, *args, **kwargs) -> Captured`, which runs a linen model and captures its layers.

    The probe takes what `model.apply` takes (`train=`, `rngs=`, `mutable=`, `method=`), and returns its output too. It
    is pure: jit, vmap and grad apply. That no layer that is called matches is a ValueError.

    Layers inside a lifted `nn.scan` or `nn.vmap` are captured, stacked along its axis, where its `variable_axes` let the
    collection "intermediates" through, and their gradients where they let "capture_zeros" through; else they are left
    out. `nn.remat` and `nn.jit` let everything through.

    Args:
      model: a linen module.
      layers: a name or a pattern ("encoder/*"), a type of module, several of these, or a function of name and module,
        which is asked once for layers that share an `nn.jit`; None is all.
      at: "output", or "input" for the first positional argument.
      loss: function of the model's output to a scalar, for gradients.

    >>> model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    >>> x = jnp.ones((4, 5))
    >>> found = linen_capture(model, layers=nn.Dense, loss=jnp.sum)(model.init(jax.random.key(0), x), x)
    >>> {name: z.shape for name, z in found.activations.items()}
    {'layers_0': (4, 3), 'layers_2': (4, 2)}
    >>> found.gradients["layers_2"].tolist()[0]
    [1.0, 1.0]
    """
    probe.check_arguments("linen", model, nn.Module, layers, at)
    # nn.jit runs the Python of one of several alike modules alone. It knows a module by what that may change, so a
    # collection of this name keeps probes apart; and names are looked at afterwards.
    by_name = isinstance(layers, str) or (isinstance(layers, Sequence) and all(isinstance(la, str) for la in layers))
    sown = (SOWN, f"capture_{next(_probes)}")

    def captured(
        variables: Mapping[str, PyTree], /, *args: PyTree, mutable: CollectionFilter = False, **kwargs: PyTree
    ) -> Captured:
        places: dict[str, probe.Path] = {}  # of the layers, by name
        given = {name: value for name, value in variables.items() if name not in (SOWN, ZEROS)}

        def run(zeros: Calls | None, matches: Matches) -> Run:
            with_zeros = given if zeros is None else {**given, ZEROS: _as_collection(zeros, places)}
            with nn.intercept_methods(_Recorder(layers, at, by_name, matches).watch):
                output, state = model.apply(with_zeros, *args, mutable=union_filters(mutable, sown), **kwargs)
            met, reached, rest = _from_collection(state.get(SOWN) or {}, places)
            plain = {name: probe.layer_name(places[name]) for name in met}
            calls = {
                name: each for name, each in met.items() if not by_name or probe.is_meant(layers, plain[name], model)
            }
            if mutable is not False:
                kept = {name: value for name, value in state.items() if name not in (SOWN, ZEROS)}
                output = (output, {**kept, SOWN: rest} if rest else kept)
            return Run(output, calls, reached)

        return probe.capture(run, layers, loss)

    return captured


@dataclass
class _Recorder:
    """Watches one run of a model, and keeps what passes its layers."""

    layers: Layers[nn.Module]
    at: str
    by_name: bool  # names are looked at after the run, and every layer is kept here
    matches: Matches
    open: list[tuple[str, ...]] = field(default_factory=list)  # modules whose calls have begun and not ended

    def watch(self, call: Call, args: Args, kwargs: Kwargs, context: nn.module.InterceptorContext) -> PyTree:
        """Every call of a method of a module, as `nn.intercept_methods` hands it on."""
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        name = probe.layer_name(module.path)
        # A lifted class, or a call of super(), calls a module of the same path again: the outer one counts.
        outer = self.open[-1:] != [module.path]
        self.matches.called[name] = None
        self.open.append(module.path)
        try:
            if meant := probe.is_meant(self.layers, name, module):
                self.matches.matched[name] = None
            if outer and (meant or self.by_name):
                return probe.pass_through(functools.partial(self.keep, module), self.at, call, args, kwargs)
            return call(*args, **kwargs)
        finally:
            self.open.pop()

    def keep(self, module: nn.Module, value: PyTree) -> PyTree:
        """Sows what passes a layer, the zeros of this call added to it where there are any."""
        scope = module.scope
        assert scope is not None  # the module is being called
        number = sum(len(scope.get_variable(SOWN, slot, ())) for slot in (_KEPT, _KEPT_WITH_ZEROS))
        added = scope.get_variable(ZEROS, f"{_KEPT}{number}")
        if added is not None:
            value = probe.map_floating(lambda place, leaf: leaf + added[place], value)
        leaves: Leaves = {}
        probe.map_floating(leaves.setdefault, value)
        module.sow(SOWN, _KEPT if added is None else _KEPT_WITH_ZEROS, leaves)
        return value


def _as_collection(zeros: Calls, places: Mapping[str, probe.Path]) -> dict[str, PyTree]:
    """The zeros as linen stores them: nested by path, one variable for each call."""
    flat = {}
    for name, calls in zeros.items():
        flat |= {(*places[name], f"{_KEPT}{number}"): leaves for number, leaves in enumerate(calls)}
    return unflatten_dict(flat)


def _from_collection(
    collection: Mapping[str, PyTree], places: dict[str, probe.Path]
) -> tuple[Calls, set[str], dict[str, PyTree]]:
    """What was sown: here by layer, the layers that zeros reached, and what the model itself had sown."""
    calls, reached, rest = {}, set(), {}
    flat: dict[tuple[str, ...], PyTree] = flatten_dict(collection)
    names = probe.layer_names(dict.fromkeys(path[:-1] for path in flat if path[-1] in (_KEPT, _KEPT_WITH_ZEROS)))
    places.update((name, path) for path, name in names.items())
    for (*path, key), value in flat.items():
        if key in (_KEPT, _KEPT_WITH_ZEROS):
            name = names[tuple(path)]
            calls[name] = tuple(dict(leaves) for leaves in value)
            reached |= {name} if key == _KEPT_WITH_ZEROS else set()
        else:
            rest[(*path, key)] = value
    return calls, reached, unflatten_dict(rest)
