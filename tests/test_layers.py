"""Every described layer in both faces: documents itself, is the same layer in linen and nnx, and keeps what Flax expects."""

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as fl
from flax import nnx as fx
from flax.nnx import bridge

from normjax import linen, nnx
from normjax._layers.describe import Layer
from normjax._layers.statistics import RunningLayer
from normjax.nnx.host import Host

C = 6
X = jnp.asarray(np.random.default_rng(0).normal(2, 3, (8, C)), jnp.float32)

# name: (options, one that differs from its default, as `repr` shows it)
LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "Norm": ({"normalizer": "batch", "momentum": 0.5}, "Norm(normalizer='batch', momentum=0.5)"),
    "BatchRenorm": ({"r_max": 2.0}, "BatchRenorm(r_max=2.0)"),
    "DivisiveNorm": ({"channels": 3, "use_scale": True}, "DivisiveNorm(channels=3, use_scale=True)"),
    "L1BatchNorm": ({"normalized": False}, "L1BatchNorm(normalized=False)"),
    "LpBatchNorm": ({"p": 3}, "LpBatchNorm(p=3)"),
    "TopKBatchNorm": ({"k": 2, "size": 8}, "TopKBatchNorm(k=2, size=8)"),
    "LinfBatchNorm": ({"size": 8}, "LinfBatchNorm(size=8)"),
    "VarianceNorm": ({"use_bias": False}, "VarianceNorm(use_bias=False)"),
    "ExtendedBatchNorm": ({"epsilon": 0.5}, "ExtendedBatchNorm(epsilon=0.5)"),
    "PositionNorm": ({}, "PositionNorm()"),
    "LocalContextNorm": ({"groups": 2}, "LocalContextNorm(groups=2)"),
    "GhostBatchNorm": ({"examples": 4}, "GhostBatchNorm(examples=4)"),
    "RangeBatchNorm": ({"parts": 2, "size": 4}, "RangeBatchNorm(parts=2, size=4)"),
    "GhostTopKBatchNorm": ({"k": 2, "size": 8, "beta": 0.5}, "GhostTopKBatchNorm(k=2, size=8, beta=0.5)"),
    "LocalResponseNorm": ({"size": 3}, "LocalResponseNorm(size=3)"),
    "LocalContrastNorm": ({"shape": "box"}, "LocalContrastNorm(shape='box')"),
    "TLU": ({}, "TLU()"),
    "DyT": ({"alpha_init": 0.3}, "DyT(alpha_init=0.3)"),
    "Derf": ({"shift_init": 0.1}, "Derf(shift_init=0.1)"),
    "EvoNormB0": ({"instance": "c"}, "EvoNormB0(instance='c')"),
    "EvoNormS0": ({"field": "c/2"}, "EvoNormS0(field='c/2')"),
    "GRN": ({"space": "n"}, "GRN(space='n')"),
    "KalmanNorm": ({"gain": 0.5}, "KalmanNorm(gain=0.5)"),
    "SwitchableNorm": ({"momentum": 0.5}, "SwitchableNorm(momentum=0.5)"),
    "VirtualBatchNorm": ({"epsilon": 0.5}, "VirtualBatchNorm(epsilon=0.5)"),
    "FilterResponseNorm": ({"learn_eps": True}, "FilterResponseNorm(learn_eps=True)"),
    "ScaleNorm": ({"epsilon": 0.5}, "ScaleNorm(epsilon=0.5)"),
    "PartialRMSNorm": ({"fraction": 0.5}, "PartialRMSNorm(fraction=0.5)"),
    "QKNorm": ({"kind": "layer"}, "QKNorm(kind='layer')"),
    "AddNorm": ({"activation": "relu"}, "AddNorm(activation='relu')"),
    "GDN": ({"learn_alpha": True}, "GDN(learn_alpha=True)"),
    "AdaIN": ({"unbiased": True}, "AdaIN(unbiased=True)"),
    "ConditionalNorm": ({"num_classes": 4}, "ConditionalNorm(num_classes=4)"),
    "FiLM": ({"normalizer": "batch"}, "FiLM(normalizer='batch')"),
    "AdaLN": ({"around": 0.5}, "AdaLN(around=0.5)"),
    "AdaLNZero": ({"around": 0.5}, "AdaLNZero(around=0.5)"),
    "SPADE": ({"hidden": 3}, "SPADE(hidden=3)"),
    "RevIN": ({"detach": True}, "RevIN(features=6, detach=True)"),
    "AlphaDropout": ({"rate": 0.5, "deterministic": True}, "AlphaDropout(rate=0.5, deterministic=True)"),
}
SPACE = (  # layers of images
    *(
        "DivisiveNorm",
        "LocalContextNorm",
        "LocalContrastNorm",
        "SwitchableNorm",
        "FilterResponseNorm",
        "AdaIN",
        "SPADE",
    ),
    "RevIN",
)
CONDITION = jnp.ones((8, 4), jnp.float32)
MORE = {  # what a call takes after x
    "VirtualBatchNorm": (2 * X,),
    "QKNorm": (2 * X,),
    "AddNorm": (2 * X,),
    "AdaIN": (2 * X.reshape(2, 4, C),),
    "ConditionalNorm": (jnp.arange(8) % 4,),
    **dict.fromkeys(("FiLM", "AdaLN", "AdaLNZero"), (CONDITION,)),
    "SPADE": (CONDITION.reshape(2, 8, 2),),
}
LENGTHS = {  # what nnx is told of these
    **{key: {"condition_features": 4} for key in ("FiLM", "AdaLN", "AdaLNZero")},
    "SPADE": {"label_features": 2, "space": 1},
}
INSIDE = ("ConditionalNorm", "FiLM", "AdaLN", "AdaLNZero", "SPADE")  # the statistics are those of a layer inside
TRAINED = [name for name in LAYERS if issubclass(getattr(linen, name), RunningLayer)]
RUNNING = [name for name in TRAINED if name not in (*INSIDE, "KalmanNorm", "SwitchableNorm")]  # test_running_options.py
QUICK = ("Norm", "EvoNormB0", "DyT", "LocalContrastNorm")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
EACH_RUNNING = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNNING]


def given(name):
    return X.reshape(2, 4, C) if name in SPACE else X


def inputs(name):
    return given(name), *MORE.get(name, ())


def of_linen(name, make: Any = None, /, **options):
    first = (C,) if name == "RevIN" else ()
    return (make or getattr(linen, name))(*first, **LAYERS[name][0], **options)


def of_nnx(name, **options):
    make = getattr(nnx, name)
    if not issubclass(make, Host):
        return make(**LAYERS[name][0], **options)
    return make(C, **LENGTHS.get(name, {}), **LAYERS[name][0], **options, rngs=fx.Rngs(0))


def training(name):
    """Options with which numbers can be compared: batch statistics, and no random first values."""
    options = {"use_running_average": False} if name in TRAINED else {}
    return options | ({"kernel_init": jax.nn.initializers.ones} if name == "SPADE" else {})


def started(name, **options):
    """A linen layer and its variables."""
    layer = of_linen(name, **training(name), **options)
    return layer, layer.init(jax.random.key(0), *inputs(name))


def twin_of(name, **options):
    """The nnx layer with the same options."""
    return of_nnx(name, **training(name), **options)


def values(layer, kind):
    """The variables of an nnx layer, by name."""
    return {str(path[-1]): variable[...] for path, variable in fx.to_flat_state(fx.state(layer, kind))}


def named(variables):
    """The variables of a linen layer, by name."""
    return {path[-1].key: value for path, value in jax.tree_util.tree_leaves_with_path(dict(variables))}


def after(name, **options):
    """The output of a training batch and what was stored, in linen and in nnx."""
    layer, variables = started(name, **options)
    y, changed = layer.apply(variables, *inputs(name), mutable=["batch_stats"])
    twin = twin_of(name, **options)
    z = twin(*inputs(name))
    return (y, named(changed.get("batch_stats", {}))), (z, values(twin, fx.BatchStat))


def close(a, b, atol=1e-5):
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=atol)


def test_every_described_layer_is_in_the_table():
    found = {name for name in linen.__all__ if name[0].isupper() and issubclass(getattr(linen, name), Layer)}
    assert found == set(LAYERS)
    assert found == {name for name in nnx.__all__ if name[0].isupper() and issubclass(getattr(nnx, name), Layer)}


def said_where_declared(layer, option):
    """The options that have a line in the docstrings of the classes that declare this one: the layer, and its bases."""
    owners = [cls.__doc__ or "" for cls in layer.__mro__ if option in inspect.get_annotations(cls)]
    lines = re.findall(r"^ +(\w+(?:, \w+)*): ", "\n".join([layer.__doc__, *owners]), re.MULTILINE)
    return {word for line in lines for word in line.split(", ")}


@pytest.mark.parametrize("name", LAYERS)
def test_both_faces_have_the_documentation_and_the_call_of_the_description(name):
    one, two = getattr(linen, name), getattr(nnx, name)
    assert one.__doc__ == two.__doc__
    assert "Source: " in one.__doc__ or name == "Norm"
    assert ">>> " in one.__doc__
    assert one.__call__.__doc__
    if name != "AlphaDropout":  # whose random keys are Flax's, in each face another argument
        assert one.__call__.__doc__ == two.__call__.__doc__
        assert inspect.signature(one.__call__) == inspect.signature(two.__call__)
    assert (one.__module__, two.__module__) == ("normjax.linen.layers", "normjax.nnx.layers")
    own = [p.name for p in inspect.signature(one).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = [p.name for p in inspect.signature(two.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    first = ["self", *(["features"] if issubclass(two, Host) else []), *LENGTHS.get(name, {})]
    last = ["rngs"] if name == "AlphaDropout" else []
    assert theirs == [*first, *(option for option in own if option != "features"), *last]
    missing = [option for option in own if option not in said_where_declared(one, option) and option != "features"]
    assert not missing, "options without a line of documentation"


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_shows_what_differs_from_the_defaults_and_refuses_what_it_has_not(name):
    assert repr(of_linen(name)) == LAYERS[name][1]
    shown = repr(of_nnx(name))
    assert "_init" not in shown.replace("alpha_init", "").replace("shift_init", "")
    for option in LAYERS[name][0]:
        assert f"{option}=" in shown
    for make in (of_linen, of_nnx):
        with pytest.raises(TypeError, match="momentun"):
            make(name, momentun=0.9)


@pytest.mark.parametrize("name", EACH)
def test_linen_and_nnx_start_alike_and_give_the_same(name):
    (y, stored), (z, kept) = after(name)
    close((y, stored), (z, kept))
    close(named(started(name)[1].get("params", {})), values(twin_of(name), fx.Param))


@pytest.mark.parametrize("name", EACH)
def test_layers_are_pickled_copied_displayed_and_tabulated(name):
    layer, variables = started(name)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), layer.clone()):
        assert twin == layer
        assert hash(twin) == hash(layer)
    mutable = ["batch_stats"]
    y, _ = layer.apply(variables, *inputs(name), mutable=mutable)
    other = twin_of(name)
    for twin in (pickle.loads(pickle.dumps(other)), copy.deepcopy(other), fx.clone(other)):
        close(twin(*inputs(name)), y)
    assert name in layer.tabulate(jax.random.key(0), *inputs(name))
    if name != "KalmanNorm":  # Flax's table has no place for tuples of tuples
        assert name in fx.tabulate(other, *inputs(name))
    fx.display(other)


@pytest.mark.parametrize("name", EACH)
def test_layers_are_lifted_and_bridged(name):
    def stack(lift: Any, **settings):
        class Stack(fl.Module):
            @fl.compact
            def __call__(self, *given):
                return of_linen(name, lift(getattr(linen, name), **settings), **training(name), name="inner")(*given)

        return Stack()

    given, layer = inputs(name), started(name)[0]
    y, _ = layer.apply(layer.init(jax.random.key(0), *given), *given, mutable=["batch_stats"])
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    for module, several in ((stack(fl.remat), False), (stack(fl.jit), False), (stack(fl.vmap, **axes), True)):
        taken = jax.tree.map(lambda a: jnp.stack([a, a]), given) if several else given
        variables = module.init(jax.random.key(0), *taken)
        out = module.apply(variables, *taken, mutable=["batch_stats"])[0]
        close(jax.tree.map(lambda a: a[0], out) if several else out, y)
    inside = bridge.ToNNX(layer, rngs=fx.Rngs(0)).lazy_init(*given)
    close(inside(*given, **({"mutable": ["batch_stats"]} if name in TRAINED else {})), y)

    @fx.vmap(in_axes=0, out_axes=0, axis_size=2)
    def made(key):
        return twin_of(name)

    many = made(jnp.arange(2))
    out = fx.vmap(lambda layer, given: layer(*given), in_axes=(0, None), axis_size=2)(many, given)
    close(jax.tree.map(lambda a: a[1], out), y)


def test_a_second_nnx_layer_made_alike_is_the_same_to_jit_whatever_functions_start_it():
    one = nnx.Norm(C, "batch", scale_init=lambda *a: jnp.ones(*a[1:]), rngs=fx.Rngs(0))
    two = nnx.Norm(C, "batch", scale_init=lambda *a: 2 * jnp.ones(*a[1:]), rngs=fx.Rngs(0))
    assert fx.graphdef(one) == fx.graphdef(two)
    pickle.dumps(one)


def ones_of(key, shape, dtype):
    return jnp.ones(shape, dtype)


def as_they_are(arrays, /, *, dtype=None, inexact=True):
    return arrays


MADE_ALIKE: dict[str, Any] = {
    **{name: lambda rngs, name=name: of_nnx(name) for name in LAYERS},
    **{
        name: lambda rngs, name=name: getattr(nnx, name)(32, promote_dtype=as_they_are, scale_init=ones_of, rngs=rngs)
        for name in ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
    },
    **{
        name: lambda rngs, name=name: nnx.RNN(
            getattr(nnx, name)(3, 4, normalizer="token", promote_dtype=as_they_are, scale_init=ones_of, rngs=rngs)
        )
        for name in ("GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell")
    },
    "Linear": lambda rngs: nnx.Linear(3, 4, promote_dtype=as_they_are, scale_init=ones_of, rngs=rngs),
    "Conv": lambda rngs: nnx.Conv(3, 4, (3,), kernel_init=ones_of, rngs=rngs),
    "WeightNorm": lambda rngs: nnx.WeightNorm(fx.Linear(3, 4, rngs=rngs), promote_dtype=as_they_are, rngs=rngs),
    "SpectralNorm": lambda rngs: nnx.SpectralNorm(fx.Linear(3, 4, rngs=rngs), rngs=rngs),
}


@pytest.mark.parametrize("name", [*EACH, *(name for name in MADE_ALIKE if name not in LAYERS)])
def test_two_layers_made_alike_are_one_to_jit_and_to_tree_map(name):
    one, two = (MADE_ALIKE[name](fx.Rngs(0)) for _ in range(2))
    assert fx.graphdef(one) == fx.graphdef(two)
    assert hash(fx.graphdef(one)) == hash(fx.graphdef(two))
    jax.tree.map(lambda a, b: None, fx.state(one), fx.state(two))
    if "Cell" not in name:  # whose activations are compiled functions of JAX, which cannot be pickled
        assert fx.graphdef(pickle.loads(pickle.dumps(one))) == fx.graphdef(one)
    for option in [option for option in dir(type(one)) if option.endswith("_init") and option[0] != "_"]:
        assert not inspect.ismethod(getattr(one, option, None)), f"{option} is bound"


def test_nnx_classes_show_the_arguments_of_flax_with_their_defaults():
    for name in nnx.__all__:
        if name in ("Moments", "Penalty"):  # variables
            continue
        shown = inspect.signature(getattr(nnx, name)).parameters
        assert not [p.name for p in shown.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)], name
        theirs = inspect.signature(getattr(fx, name).__init__).parameters if hasattr(fx, name) else {}
        for p in list(theirs.values())[1:]:
            mine = shown[p.name]
            assert (mine.kind, mine.default) == (p.kind, p.default) or (name, p.name) in OTHER_DEFAULTS, (name, p.name)
    layer = nnx.DyT(3, rngs=fx.Rngs(0))
    assert list(inspect.signature(layer).parameters) == ["x"]
    assert inspect.signature(nnx.GRUCell.__init__).parameters["normalizer"].default is None


OTHER_DEFAULTS = {("WeightNorm", "scale_init")}  # one function under two names


def test_nnx_takes_features_first_and_says_so():
    for make in (nnx.Norm, nnx.BatchRenorm, nnx.DyT):
        with pytest.raises(
            TypeError, match=r"features, the number of channels, comes first in nnx: \w+\(64, ...\); found"
        ):
            make("batch", 64, rngs=fx.Rngs(0))  # pyright: ignore
    with pytest.raises(ValueError, match="TLU learns no scale that scale_metadata could be of"):
        nnx.TLU(3, scale_metadata={"mine": 1}, rngs=fx.Rngs(0))
    assert nnx.Norm(np.int64(3), "batch", rngs=fx.Rngs(0)).scale.shape == (3,)  # pyright: ignore[reportArgumentType]


def test_subclasses_with_another_base_first_keep_their_own_constructor():
    class Tagged:
        def __init__(self, *args, tag="", **options):
            super().__init__(*args, **options)
            self.tag = tag

    class Mine(Tagged, nnx.DyT):
        pass

    assert Mine(3, rngs=fx.Rngs(0), tag="a").tag == "a"  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nnx.SwitchableNorm(3, normalizers=["layer", "batch"], rngs=fx.Rngs(0)),  # pyright: ignore
        lambda: nnx.FiLM(3, 5, order=["scale", "bias"], rngs=fx.Rngs(0)),  # pyright: ignore
        lambda: nnx.AlphaDropout(0.5, broadcast_dims=[1], rngs=fx.Rngs(0)),
    ],
)
def test_options_given_as_lists_leave_a_layer_hashable_for_jit(make):
    assert hash(fx.graphdef(make())) == hash(fx.graphdef(make()))


def test_what_is_assigned_to_an_nnx_layer_afterwards_counts():
    layer: Any = nnx.DyT(C, use_bias=False, rngs=fx.Rngs(0))
    layer.bias = fx.Param(jnp.full(C, 7.0))
    assert (layer(0 * X) == 7).all()
    layer: Any = nnx.BatchRenorm(C, rngs=fx.Rngs(0))
    layer.mean[...] += 5.0
    layer.renorm = (1.0, 0.0)
    close(layer(X).mean(0), jnp.zeros(C))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nnx.GRN(3, space="%", rngs=fx.Rngs(0)), "cannot read this as axis"),
        (lambda: nnx.EvoNormS0(3, field="%", rngs=fx.Rngs(0)), "cannot read this as axis"),
        (lambda: linen.Norm("l1_batch", unbiased=True), "unbiased=True needs a variance"),
        (lambda: linen.FiLM(l1=0.5), "l1 has no meaning without a normalizer; found l1=0.5"),
        (lambda: linen.FiLM(renorm=(2.0, 1.0)), "renorm has no meaning without a normalizer"),
        (lambda: linen.BatchRenorm("ghost"), "r_max of BatchRenorm is a number; found 'ghost'"),  # pyright: ignore
        (lambda: nnx.SimpleCell(4, 8, place="insde", rngs=fx.Rngs(0)), "place is one of"),
    ],
)
def test_a_constructor_refuses_what_could_not_be_called(make, text):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


def added(name):
    """The option of a layer that is added to its moment, or whose square is; None where the row says it."""
    known = getattr(linen, name).__dataclass_fields__
    named = {"LocalResponseNorm": "k", "GDN": None}.get(name, "sigma" if "sigma" in known else "epsilon")
    return named if named in known else None


@pytest.mark.parametrize(
    ("make", "name"),
    [pytest.param(of_linen, name, id=f"linen-{name}", marks=pytest.mark.slow) for name in LAYERS if added(name)]
    + [
        pytest.param(of_nnx, name, id=f"nnx-{name}", marks=() if name == "EvoNormB0" else pytest.mark.slow)
        for name in (*QUICK, "KalmanNorm", "FilterResponseNorm")
        if added(name)
    ],
)
def test_what_is_added_to_a_moment_may_be_a_scalar_of_numpy_or_jax_or_traced(name, make):
    """The number 0.3, and the slope against finite differences."""

    def y(value):
        options = {**LAYERS[name][0], **training(name), added(name): value}
        if make is of_linen:
            layer = linen.__dict__[name](*([C] if name == "RevIN" else []), **options)
            out = layer.init_with_output(jax.random.key(0), *inputs(name))[0]
        else:
            cls = getattr(nnx, name)
            out = cls(C, **options, rngs=fx.Rngs(0)) if issubclass(cls, Host) else cls(**options)
            out = out(*inputs(name))
        return jax.tree.leaves(out)

    want = y(0.3)
    several = [y(np.float32(0.3)), y(np.array(0.3)), y(jnp.float32(0.3)), jax.jit(y)(0.3)]
    for got in (*several, jax.tree.map(lambda a: a[1], jax.vmap(y)(jnp.array([2.0, 0.3])))):
        close(got, want)
    if name == "BatchRenorm":  # in the paper r and d are constants to a derivative
        return
    up, down = (jnp.concatenate([jnp.ravel(a) for a in y(0.3 + step)]) for step in (0.01, -0.01))
    slope = jnp.concatenate([jnp.ravel(a) for a in jax.jvp(y, (0.3,), (1.0,))[1]])
    close(slope, (up - down) / 0.02, 0.01 * float(jnp.abs(slope).max()) + 1e-3)


# --- the options of every layer with running statistics -------------------------------------------

STORES_NOTHING = ("DivisiveNorm", "PositionNorm", "LocalContextNorm")
STORING = [name for name in RUNNING if name not in STORES_NOTHING]
EACH_STORING = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STORING]
# Options that a layer refuses, and why.
REFUSED = {
    ("VarianceNorm", "renorm"): "neither floor nor keep_mean",
    ("BatchRenorm", "renorm"): "the limits of BatchRenorm are r_max and d_max",
    **{(name, "renorm"): "a row that stores all its moments" for name in STORES_NOTHING},
    **{
        (name, "unbiased"): "unbiased=True needs a variance"
        for name in ("L1BatchNorm", "LpBatchNorm", "TopKBatchNorm", "LinfBatchNorm", "RangeBatchNorm")
    },
    **{(name, "unbiased"): "unbiased=True needs a variance" for name in ("GhostTopKBatchNorm", "ExtendedBatchNorm")},
}


@pytest.mark.parametrize("name", EACH_STORING)
def test_every_layer_with_running_statistics_has_the_same_options(name):
    (_, plain), _ = after(name, **({} if name == "Norm" else {"momentum": 0.5}))
    start = started(name)[1]["batch_stats"]
    for of in after(name, averaging="cumulative"):
        for key in ("mean", "var"):
            if key in plain:  # the first batch itself, twice as far as half of the way
                close(of[1][key] - start[key], 2 * (plain[key] - start[key]))
                assert (of[1][f"{key}_count"] == 1).all()
    for of in after(name, update_running_average=False):
        assert {key: value.tolist() for key, value in of[1].items()} == {k: v.tolist() for k, v in start.items()}
    first = started(name, mean_init=2.0, var_init=3.0)[1]["batch_stats"]
    assert all((first[key] == value).all() for key, value in (("mean", 2.0), ("var", 3.0)) if key in first)
    names = (None,) if name == "ExtendedBatchNorm" else ("model",)
    if name != "ExtendedBatchNorm":
        boxed = started(name, stats_names=names)[1]["batch_stats"]
        assert {box.names for box in jax.tree.leaves(boxed, is_leaf=lambda a: isinstance(a, fl.Partitioned))} == {names}
    twin = of_nnx(name, stats_metadata={"mine": 3})
    assert all(getattr(twin, key).get_metadata("mine") == 3 for key in plain)
    view = fx.view(of_nnx(name), use_running_average=True, update_running_average=False)
    assert (view.use_running_average, view.update_running_average) == (True, False)


@pytest.mark.parametrize("name", EACH_RUNNING)
def test_every_layer_with_running_statistics_leaves_a_penalty_and_a_record(name):
    x = given(name)
    layer, variables = started(name, l1=0.5)
    _, left = layer.apply(variables, x, mutable=["batch_stats", "losses", "moments"])
    assert ("moments" in left) == (name in STORING)
    _, sown = fx.capture(of_nnx(name, l1=0.5), nnx.Penalty)(x)
    if name in STORING or name == "PositionNorm":
        axis = 1 if name == "PositionNorm" else 0
        parts = x.reshape(2, 4, C) if name == "GhostBatchNorm" else x
        axis += name == "GhostBatchNorm"
        close(left["losses"]["l1"], 0.5 * jnp.abs(parts - parts.mean(axis, keepdims=True)).mean())
    close(sown["l1"][...], left["losses"]["l1"])


@pytest.mark.parametrize("name", EACH_STORING)
def test_renorm_within_no_limits_is_inference_and_within_the_narrowest_is_plain(name):
    if (name, "renorm") in REFUSED:
        return
    layer, variables = started(name)
    stored = {k: v + 1.5 if k in ("mean", "var") else v for k, v in variables["batch_stats"].items()}
    variables, x = {**variables, "batch_stats": stored}, given(name)
    kept = ["batch_stats"]
    plain, changed = layer.apply(variables, x, mutable=kept)
    same, _ = layer.apply(variables, x, renorm=(1.0, 0.0), mutable=kept)
    wide, moved = layer.apply(variables, x, renorm=(1e6, 1e6), mutable=kept)
    close(same, plain)
    assert float(jnp.abs(wide - plain).max()) > 0.1
    close(wide, of_linen(name).apply(variables, x, use_running_average=True), 1e-4)
    close(moved, changed)  # the batch's own statistics are stored
    twin = of_nnx(name)
    fx.update(twin, {k: v + 1.5 for k, v in variables["batch_stats"].items() if k in ("mean", "var")})
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(layer.apply(variables, x, renorm=(1.1, 0.1), mutable=kept)[0])))(x)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(("name", "option"), REFUSED)
def test_an_option_without_meaning_is_refused_by_name(name, option):
    value = {"renorm": (3.0, 5.0), "unbiased": True}[option]
    with pytest.raises(ValueError, match=REFUSED[name, option]):
        of_nnx(name, **{option: value})(given(name))


# --- what a checker sees --------------------------------------------------------------------------

PROGRAM = """
import normjax.linen as L
import normjax.nnx as N
from flax import nnx

L.DyT(0.5, alpha_int=1.0)
L.Norm("batch", momentum="a")
L.GhostBatchNorm(exampels=3)
N.DyT(3, alpha_int=1.0, rngs=nnx.Rngs(0))
N.Norm("batch", 3, rngs=nnx.Rngs(0))
N.EvoNormB0(3, averageing="debiased", rngs=nnx.Rngs(0))
N.DyT(3)
L.Norm("batch")(1.0, use_runing_average=True)
N.Norm(3, "batch", rngs=nnx.Rngs(0))(1.0, renorn=(1.0, 0.0))
L.Norm("batch", "n c", momentum=0.9, name="norm").apply({}, 1.0)
N.Norm(3, "batch", averaging="debiased", stats_metadata={}, rngs=nnx.Rngs(0))(1.0, mask=True).sum()
"""


@pytest.mark.slow
def test_a_checker_finds_misspelt_and_mistyped_arguments_in_both_faces(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    lines = {int(line.split(":")[1]) for line in io.StringIO(done.stdout) if " - error: " in line}
    assert lines == set(range(6, 15)), done.stdout
