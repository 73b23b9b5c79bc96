"""Sizes and numbers that layers, fields and functions take: NumPy's like Python's; what is none is refused by name."""

# Integers and arrays of NumPy stand where the types say int: that is what is tested.
# pyright: reportArgumentType=false

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fx

from normjax import (
    TABLE,
    Normalizer,
    Span,
    Stats,
    batch,
    batch_extremes,
    diagnostics,
    gaussian,
    gdn,
    kernels,
    linen,
    nnx,
    propagate,
    recurrent,
    reparametrize,
    response,
    running,
    selu,
    spade,
    spectral,
    tokens,
    top,
    unbiased,
)
from normjax._layers.describe import _ranges
from normjax._leaves import Whole
from normjax.nnx.host import Host
from tests.test_layers import EACH, LAYERS, LENGTHS, MORE, C, X, given, of_linen, of_nnx, twin_of

KEY, NAN = jax.random.key(0), float("nan")
CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")

# Every option that is an integer, by hand: what the types of the options say is held against this.
INTEGERS: dict[str, tuple[str, ...]] = {
    "DivisiveNorm": ("window", "channels"),
    "TopKBatchNorm": ("k", "size"),
    "LinfBatchNorm": ("size",),
    "GhostBatchNorm": ("examples",),
    "RangeBatchNorm": ("parts", "size"),
    "GhostTopKBatchNorm": ("k", "size"),
    "LocalContextNorm": ("window", "groups"),
    "LocalResponseNorm": ("size",),
    "LocalContrastNorm": ("window",),
    "QKNorm": ("length",),
    "ConditionalNorm": ("num_classes",),
    "SPADE": ("hidden", "kernel_size"),
    **dict.fromkeys(CELLS, ("max_steps",)),
}
OF_NNX = {  # and what nnx is told beside
    **dict.fromkeys(("FiLM", "AdaLN", "AdaLNZero"), ("condition_features",)),
    "SPADE": ("label_features", "space"),
}
RUNNING = {"momentum": (-0.1, 1.1, NAN), "l1": (-1.0, NAN), "mean_init": (NAN,), "var_init": (-1.0, NAN)}
NUMBERS: dict[str, dict[str, tuple[Any, ...]]] = {  # what an option must not be
    "Norm": {**RUNNING, "sigma_init": (-2.0, NAN), "momentum": (-0.1, 1.1, NAN, "a", None, True)},
    "DivisiveNorm": {**RUNNING, "sigma": (-1.0, NAN, float("inf")), "sigma_init": (-2.0,)},
    "BatchRenorm": {**RUNNING, "r_max": (0.5, NAN), "d_max": (-1.0, NAN), "epsilon": (NAN,)},
    "EvoNormB0": {**RUNNING, "epsilon": (-1.0, NAN)},
    "KalmanNorm": {**RUNNING, "gain": (-0.1, 1.5, NAN), "guard": (-1.0, NAN)},
    "SwitchableNorm": {**RUNNING, "epsilon": (-1.0, NAN)},
    "ConditionalNorm": {"momentum": (1.5,), "l1": (-1.0,)},
    "FiLM": {"around": (NAN,)},
    "GhostTopKBatchNorm": {"beta": (-0.1, 1.1, NAN), "epsilon": (-1.0,)},
    "LpBatchNorm": {"p": (0.5, NAN), "epsilon": (-1.0,)},
    "LocalResponseNorm": {"alpha": (-1.0, NAN), "beta": (-1.0, NAN), "k": (-1.0, NAN)},
    "AlphaDropout": {"rate": (-0.1, 1.1, NAN), "mean": (NAN,), "var": (-1.0,)},
    "GDN": {"alpha": (-1.0, NAN), "epsilon": (NAN,), "beta_min": (-1.0,), "offset": (NAN,)},
    "GRN": {"epsilon": (-1.0, NAN)},
    "FilterResponseNorm": {"epsilon": (-1.0, NAN)},
    "RevIN": {"slack": (-1.0, NAN)},
    "DyT": {"alpha_init": (NAN,)},
    **{key: {"momentum": (1.5, NAN), "l1": (-1.0, NAN), "sigma_init": (-1.0,)} for key in CELLS},
}


def made(face, name, **options):
    """A layer or a cell of one face."""
    if name in CELLS:
        first = (8,) if face is linen else (4, 8)
        return getattr(face, name)(*first, **{"normalizer": "batch", **options}, **({} if face is linen else RNGS()))
    return (of_linen if face is linen else of_nnx)(name, **options)


def values_of(parameter) -> str:
    """The name behind a parameter of a test, which may be marked slow."""
    return parameter if isinstance(parameter, str) else str(parameter.values[0])


def RNGS():
    return {"rngs": fx.Rngs(0)}


@pytest.fixture
def free(monkeypatch):
    """Makes a layer with options that the table of layers gives already."""

    def make(face, name, **options):
        if name in LAYERS:
            monkeypatch.setitem(LAYERS, name, ({**LAYERS[name][0], **options}, ""))
            beside = {k: v for k, v in options.items() if k in LENGTHS.get(name, {})}
            if beside:
                monkeypatch.setitem(LENGTHS, name, {**LENGTHS[name], **beside})
                monkeypatch.setitem(LAYERS, name, ({k: v for k, v in LAYERS[name][0].items() if k not in beside}, ""))
            return made(face, name)
        return made(face, name, **options)

    return make


def test_every_option_that_is_a_number_says_which_numbers_it_takes():
    for name in (*LAYERS, *CELLS):
        for face in (linen, nnx):
            cls = getattr(face, name)
            plain = {
                option
                for base in cls.__mro__
                if base.__module__.startswith("normjax._layers")
                for option, kind in inspect.get_annotations(base).items()
                if kind in (int, float, int | None, float | None)
            }
            assert plain <= {"r_max", "d_max", "normalizer"}, name  # limits are checked beside each other
            found = {option for option, (numbers, _) in _ranges(cls).items() if isinstance(numbers, Whole)}
            assert found == {*INTEGERS.get(name, ()), *(OF_NNX.get(name, ()) if face is nnx else ())}, name


PAIRS = [(name, option) for name, options in INTEGERS.items() for option in options]


EVERY = [*PAIRS, *((name, option) for name, options in OF_NNX.items() for option in options)]
QUICK = (("DivisiveNorm", "window"), ("GhostBatchNorm", "examples"), ("LocalResponseNorm", "size"))


@pytest.mark.parametrize(
    ("name", "option"), [p if p in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in EVERY]
)
def test_integers_of_numpy_are_those_of_python_and_nothing_else_is_an_integer(free, name, option):
    faces = (nnx,) if (name, option) not in PAIRS else (linen, nnx)
    value = 1 if option == "space" else 3
    for face in faces:
        layer = free(face, name, **{option: value})
        for same in (np.int32(value), np.int64(value), np.array(value), jnp.array(value), np.prod([1, value])):
            other = free(face, name, **{option: same})
            assert type(getattr(other, option)) is int
            assert repr(other) == repr(layer)
            if face is nnx:
                assert fx.graphdef(other) == fx.graphdef(layer)
            else:
                assert other == layer
                assert hash(other) == hash(layer)
        wrong = (True, 2.0, np.float32(3), "3", np.array([3]))
        for bad, kind in (*((b, TypeError) for b in wrong), (-1, ValueError)):
            with pytest.raises(kind, match=f"^{option}( of {name})? is (an integer|at least 1)"):
                free(face, name, **{option: bad})


BOUNDED = [(name, option) for name, options in NUMBERS.items() for option in options]
AT_ONCE = ("Norm", "DivisiveNorm", "AlphaDropout", "LocalResponseNorm")


@pytest.mark.parametrize(
    ("name", "option"), [p if p[0] in AT_ONCE else pytest.param(*p, marks=pytest.mark.slow) for p in BOUNDED]
)
def test_numbers_beyond_their_range_are_refused_where_they_are_known(free, name, option):
    for face in (linen, nnx):
        for bad in NUMBERS[name][option]:
            with pytest.raises((ValueError, TypeError), match=f"^{option}( of {name})? (is|lies) .*; found {bad!r}"):
                free(face, name, **{option: bad})


def test_the_ends_of_a_range_are_taken_and_traced_numbers_pass():
    for momentum in (0, 1, 0.0, 1.0, np.float32(1), jnp.float32(0.5), np.array(0.5)):
        layer = nnx.Norm(C, "batch", momentum=momentum, **RNGS())
        layer(X)
        want = (1 - float(momentum)) * np.asarray(X, np.float64).mean(0)
        np.testing.assert_allclose(layer.mean[...], want, rtol=1e-5, atol=1e-6)

    @jax.jit
    def moved(momentum):
        return running.update(STORED, SEEN, momentum).mean

    np.testing.assert_allclose(moved(2.0), -X.mean(0), rtol=1e-5)  # 2 * 0 - 1 * the mean
    assert jnp.isnan(jax.jit(lambda l1: recurrent.normalize_site(X, TABLE["token"], l1=1.0).penalty * l1)(NAN))


STORED = running.Running(jnp.zeros(C))
SEEN = Stats(mean=X.mean(0), mean_weight=jnp.full(C, 8.0))


@pytest.mark.parametrize("name", [name for name in EACH if issubclass(getattr(nnx, values_of(name)), Host)])
def test_features_of_another_number_are_refused_at_the_call(name):
    layer, x = twin_of(name), given(name)
    wrong = jnp.concatenate([x, x], -1)
    more = MORE.get(name, ())
    more = (wrong,) if name in ("VirtualBatchNorm", "QKNorm", "AddNorm") else more
    with pytest.raises(ValueError, match=rf"^a layer made for {C} features cannot take an input of shape .* {2 * C}\)"):
        layer(wrong, *more)


@pytest.mark.parametrize("features", [np.int32(C), np.prod([2, 3]), np.array(C), jnp.array(C), [8, C]])
def test_features_of_numpy_make_the_layer_of_python_s(features):
    want = nnx.Norm((8, C) if isinstance(features, list) else C, "batch", **RNGS())
    layer = nnx.Norm(features, "batch", **RNGS())
    assert fx.graphdef(layer) == fx.graphdef(want)
    np.testing.assert_allclose(layer(X), want(X))
    for cell in CELLS[3:]:
        sizes = (np.int64(4), features) if np.ndim(features) == 0 else (4, C)
        assert getattr(nnx, cell)(*sizes, **RNGS()).hidden_features == C
        if np.ndim(features) == 0:
            assert getattr(linen, cell)(features) == getattr(linen, cell)(C)


def n(k: int):
    return np.int64(k)


# name: (a call with integers of NumPy, the same with those of Python)
FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "Span": (lambda: Span("c", window=n(3)), lambda: Span("c", window=3)),
    "Span of blocks": (lambda: Span("c", blocks=np.array(3)), lambda: Span("c", blocks=3)),
    "groups": (
        lambda: Span(None, mapped="n", groups=((n(0), n(1)),)),
        lambda: Span(None, mapped="n", groups=((0, 1),)),
    ),
    "top": (lambda: repr(Normalizer("n", "n", order=top(n(2)))), lambda: repr(Normalizer("n", "n", order=top(2)))),
    "gain": (
        lambda: repr(Normalizer("n", "n", gain=n(2), eps=np.array(1.0))),
        lambda: "Normalizer('n', 'n', eps=1.0, gain=2)",
    ),
    "ghost_batch": (lambda: batch.ghost_batch(n(8)), lambda: TABLE["ghost"]),
    "ghost_row": (lambda: batch.ghost_row((64, 3), "n c", n(8)), lambda: TABLE["ghost"]),
    "top_batch": (lambda: batch_extremes.top_batch(n(3), n(20)), lambda: batch_extremes.top_batch(3, 20)),
    "range_row": (lambda: batch_extremes.range_row(n(20)), lambda: batch_extremes.range_row(20)),
    "mean_range": (
        lambda: batch_extremes.mean_range(X, "n c", parts=n(2)).var,
        lambda: batch_extremes.mean_range(X, "n c", parts=2).var,
    ),
    "gaussian_largest": (lambda: gaussian.gaussian_largest(n(9), n(2)), lambda: gaussian.gaussian_largest(9, 2)),
    "bounds_constant": (lambda: gaussian.bounds_constant(n(9)), lambda: gaussian.bounds_constant(9)),
    "lrn_alexnet": (lambda: response.lrn_alexnet(n(5)), lambda: TABLE["response"]),
    "lrn_torch": (lambda: response.lrn_torch(n(3)), lambda: response.lrn_torch(3)),
    "lrn_tensorflow": (lambda: response.lrn_tensorflow(n(2)), lambda: response.lrn_tensorflow(2)),
    "lrn_onnx": (lambda: response.lrn_onnx(n(3)), lambda: response.lrn_onnx(3)),
    "local_contrast": (lambda: response.local_contrast(n(9)), lambda: TABLE["contrast"]),
    "local_context": (lambda: response.local_context(n(9), n(8)), lambda: TABLE["local_context"]),
    "l2": (lambda: tokens.l2(n(3)), lambda: tokens.l2(3)),
    "qk_scale": (lambda: tokens.qk_scale(n(64)), lambda: tokens.qk_scale(64)),
    "with_ddof": (
        lambda: unbiased.with_ddof(TABLE["batch"], n(9), n(1)),
        lambda: unbiased.with_ddof(TABLE["batch"], 9),
    ),
    "unbiased_group": (lambda: unbiased.unbiased_group(n(2), n(5)), lambda: unbiased.unbiased_group(2, 5)),
    "kernel_shapes": (
        lambda: spade.kernel_shapes(n(6), n(2), n(2), n(4), n(3)),
        lambda: spade.kernel_shapes(6, 2, 2, 4, 3),
    ),
    "spectral_norm": (
        lambda: spectral.spectral_norm(X, X[0], steps=n(2)).sigma,
        lambda: spectral.spectral_norm(X, X[0], steps=2).sigma,
    ),
    "by_number": (lambda: reparametrize.by_number(3, n(-1)), lambda: reparametrize.by_number(3, -1)),
    "by_number of several": (
        lambda: reparametrize.by_number(3, np.array([0, -1])),
        lambda: reparametrize.by_number(3, (0, -1)),
    ),
    "inverse": (
        lambda: gdn.inverse(X / 99, X[0] ** 2, jnp.eye(C), steps=n(3)),
        lambda: gdn.inverse(X / 99, X[0] ** 2, jnp.eye(C), steps=3),
    ),
    "exponents": (
        lambda: gdn.inverse(X / 99, X[0] ** 2, jnp.eye(C), alpha=n(2)),
        lambda: gdn.inverse(X / 99, X[0] ** 2, jnp.eye(C), alpha=2),
    ),
    "sites": (
        lambda: recurrent.sites("lstm", n(8), recurrent.Places()),
        lambda: recurrent.sites("lstm", 8, recurrent.Places()),
    ),
    "site_slots": (
        lambda: recurrent.site_slots(TABLE["batch"], n(4), n(3)),
        lambda: recurrent.site_slots(TABLE["batch"], 4, 3),
    ),
    "cooijmans2017": (lambda: type(recurrent.cooijmans2017(n(8))["max_steps"]), lambda: int),
    "ren2017": (lambda: type(recurrent.ren2017("bn", "lstm", max_steps=n(8))["max_steps"]), lambda: int),
    "alpha_dropout": (
        lambda: selu.alpha_dropout(KEY, X, 0.5, broadcast_dims=n(-1)),
        lambda: selu.alpha_dropout(KEY, X, 0.5, broadcast_dims=(1,)),
    ),
    "selu_init": (lambda: selu.selu_init(n(-2), n(-1))(KEY, (3, 4)), lambda: selu.selu_init()(KEY, (3, 4))),
    "mutual_information": (
        lambda: diagnostics.mutual_information(X, bins=np.uint8(2)),
        lambda: diagnostics.mutual_information(X, bins=2),
    ),
    "activate": (lambda: propagate.activate(BELIEF, jnp.tanh, n(8)), lambda: propagate.activate(BELIEF, jnp.tanh, 8)),
    "predict": (lambda: predicted(n(1), n(2), n(2)), lambda: predicted(1, 2, 2)),
    "kernels": (lambda: kernels.normalize(X, (n(1),), 0.0)[0], lambda: kernels.normalize(X, (1,), 0.0)[0]),
    "linen.Conv": (lambda: convolved(linen, n(4), n(3), n(2)), lambda: convolved(linen, 4, 3, 2)),
    "nnx.Conv": (lambda: convolved(nnx, n(4), n(3), n(2)), lambda: convolved(nnx, 4, 3, 2)),
    "linen.WeightNorm": (lambda: wrapped(linen, n(-1)), lambda: wrapped(linen, -1)),
    "nnx.WeightNorm": (lambda: wrapped(nnx, n(-1)), lambda: wrapped(nnx, -1)),
    "linen.GroupNorm": (lambda: grouped(linen, np.gcd(32, 6)), lambda: grouped(linen, 2)),
    "nnx.GroupNorm": (lambda: grouped(nnx, np.gcd(32, 6)), lambda: grouped(nnx, 2)),
    "axes": (
        lambda: linen.LayerNorm(reduction_axes=np.array(-1)).init_with_output(KEY, X),
        lambda: linen.LayerNorm().init_with_output(KEY, X),
    ),
}
BELIEF = propagate.Belief(jnp.zeros((1, 4)), jnp.ones((1, 4)))


def predicted(groups, strides, padding):
    state = propagate.Filtered(BELIEF, BELIEF)
    kernel = jnp.arange(24.0).reshape(3, 4, 2)
    given: dict[str, Any] = {"size": (n(5),) if isinstance(groups, np.integer) else (5,), "padding": padding}
    return propagate.predict(
        state, kernel, "monte_carlo", groups=groups, strides=strides, key=KEY, samples=groups, **given
    )


def convolved(face, features, width, stride):
    x = X.reshape(2, 4, C)
    if face is linen:
        return linen.Conv(features, width, stride).init_with_output(KEY, x)[0]
    return nnx.Conv(C, features, width, stride, rngs=fx.Rngs(0))(x)


def wrapped(face, axes):
    if face is linen:
        return linen.WeightNorm(linen.Dense(4), feature_axes=axes).init_with_output(KEY, X)[0]
    return nnx.WeightNorm(nnx.Linear(C, 4, **RNGS()), feature_axes=axes, **RNGS())(X)


def grouped(face, groups):
    if face is linen:
        return linen.GroupNorm(groups).init_with_output(KEY, X)[0]
    return nnx.GroupNorm(C, groups, **RNGS())(X)


COMPILED = (  # and so slow
    *(
        "mean_range",
        "spectral_norm",
        "inverse",
        "exponents",
        "alpha_dropout",
        "selu_init",
        "mutual_information",
        "activate",
    ),
    *("predict", "kernels", "linen.Conv", "nnx.Conv", "linen.WeightNorm", "nnx.WeightNorm", "linen.GroupNorm", "axes"),
)


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow) if k in COMPILED else k for k in FUNCTIONS])
def test_functions_take_integers_of_numpy_for_those_of_python(name):
    ours, theirs = (call() for call in FUNCTIONS[name])
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert str(ours) == str(theirs)
    jax.tree.map(lambda a, b: isinstance(a, jax.Array) and np.testing.assert_array_equal(a, b), ours, theirs)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"])
def test_an_epsilon_of_flax_is_refused_under_its_own_name(name):
    groups = {"num_groups": 2} if name == "GroupNorm" else {}
    train = {"use_running_average": False} if name == "BatchNorm" else {}
    for epsilon in (-1.0, NAN, np.float32(-1.0), jnp.float32(NAN)):
        with pytest.raises(ValueError, match="epsilon is a finite number of at least 0; found"):
            getattr(linen, name)(epsilon=epsilon, **groups, **train).init(jax.random.key(0), X)
        with pytest.raises(ValueError, match="epsilon is a finite number of at least 0; found"):
            getattr(nnx, name)(C, epsilon=epsilon, **groups, **train, rngs=fx.Rngs(0))(X)
