"""capture: activations and gradients of named layers, against Flax's own and against models written out."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax.linen
import normjax.nnx
from normjax import diagnostics
from normjax.capture import linen_capture, nnx_capture
from tests.refusals import refuses

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
FACTOR = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)), jnp.float32)


def loss(y):
    return jnp.sum(FACTOR * jnp.tanh(y))


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(self.width, name="dense")(x)
        return jnp.tanh(normjax.linen.Norm("batch", name="norm")(x, use_running_average=not train))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(2, name="head")(Block(4, name="block")(x, train))


class NNXBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(3, width, rngs=rngs)
        self.norm = normjax.nnx.Norm(width, "batch", rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.dense(x)))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.block = NNXBlock(4, rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block(x))


@functools.cache
def linen_model():
    return Linen(), jax.jit(Linen().init)(jax.random.key(0), X)


def nnx_model():
    """The nnx model with the linen model's parameters."""
    model, (_, variables) = NNX(nnx.Rngs(0)), linen_model()
    nnx.update(model, jax.tree.map(jnp.asarray, variables["params"]))
    return model


LAYERS = ["block/dense", "block/norm", "block", "head", "."]


@functools.cache
def written_out():
    """The same network as pure functions: activations of each layer, and gradients at zeros that are added to them."""
    params = linen_model()[1]["params"]
    block, last = params["block"], params["head"]

    def run(zeros):
        dense = X @ block["dense"]["kernel"] + block["dense"]["bias"] + zeros["block/dense"]
        norm = (dense - dense.mean(0)) / jnp.sqrt(dense.var(0) + 1e-5) + zeros["block/norm"]
        out = jnp.tanh(norm) + zeros["block"]
        head = out @ last["kernel"] + last["bias"] + zeros["head"] + zeros["."]
        return loss(head), {"block/dense": dense, "block/norm": norm, "block": out, "head": head, ".": head}

    zeros = {name: jnp.zeros((6, 2 if name in ("head", ".") else 4)) for name in LAYERS}
    with jax.numpy_rank_promotion("allow"):
        gradients, layers = jax.jit(jax.grad(run, has_aux=True))(zeros)
    return layers, gradients


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_captured_activations_and_gradients_are_those_of_the_network_written_out(library):
    model, variables = linen_model()
    layers, gradients = written_out()
    found: Any
    if library == "linen":
        probe = linen_capture(model, loss=lambda out: loss(out[0]))
        found = jax.jit(lambda variables, x: probe(variables, x, mutable=["batch_stats"]))(variables, X)
        output, state = found[0]
        assert set(state) == {"batch_stats"}
    else:
        found = nnx.jit(lambda model, x: tuple(nnx_capture(model, loss=loss)(x)))(nnx_model(), X)
        output = found[0]
    assert_equal(found[1], layers)
    assert_equal(found[2], gradients)
    np.testing.assert_allclose(output, layers["head"], rtol=1e-5, atol=1e-6)


def test_nnx_model_is_left_as_it_was():
    model = nnx_model()
    before, classes = nnx.to_pure_dict(nnx.state(model)), [type(m) for _, m in nnx.iter_modules(model)]
    found = nnx_capture(model)(X)
    assert found.gradients == {}
    after = nnx.to_pure_dict(nnx.state(model))
    chex.assert_trees_all_equal(after, before)
    assert [type(m) for _, m in nnx.iter_modules(model)] == classes
    assert not any(hasattr(m, "__captures__") for _, m in nnx.iter_modules(model))
    model(X)
    assert np.abs(np.asarray(model.block.norm.mean[...])).max() > 0  # the call itself does move them
    again = nnx_capture(model, call=lambda model, x: model.block(x))(X)
    assert set(again.activations) == {"block/dense", "block/norm", "block"}
    np.testing.assert_allclose(again.output, found.activations["block"], rtol=1e-6)


def test_linen_captures_what_flax_captures():
    model, variables = linen_model()
    _, state = model.apply(variables, X, train=False, capture_intermediates=True, mutable=["intermediates"])
    found = linen_capture(model)(variables, X, train=False)
    flat = {"/".join(path[:-1]) or ".": value[0] for path, value in _paths(state["intermediates"])}
    assert_equal(found.activations, flat)


def _paths(tree):
    for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda value: isinstance(value, tuple)):
        yield tuple(key.key for key in path), value


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("block", {"block"}),
        ("block/*", {"block/dense", "block/norm"}),
        (["head", "*/norm"], {"head", "block/norm"}),
        ((nn.Dense, nnx.Linear), {"block/dense", "head"}),
        (lambda name, module: "d" in name and name != "head", {"block/dense"}),
    ],
    ids=["name", "pattern", "patterns", "types", "function"],
)
def test_layers_are_chosen_by_name_pattern_type_or_function(layers, names):
    model, variables = linen_model()
    assert set(linen_capture(model, layers=layers)(variables, X, train=False).activations) == names
    assert set(nnx_capture(nnx_model(), layers=layers)(X).activations) == names


def test_inputs_are_what_comes_out_of_the_nonlinearity_before():
    model, variables = linen_model()
    layers, gradients = written_out()
    probes = (
        linen_capture(model, layers="head", at="input", loss=lambda out: loss(out[0])),
        nnx_capture(nnx_model(), layers="head", at="input", loss=loss),
    )
    for probe, args in zip(probes, ((variables, X), (X,)), strict=True):
        options = {"mutable": ["batch_stats"]} if len(args) == 2 else {}
        found = jax.jit(functools.partial(probe, **options))(*args)
        np.testing.assert_allclose(found.activations["head"], layers["block"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.gradients["head"], gradients["block"], rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, name="dense")
        return dense(jnp.sin(dense(x)))


class NNXTwice(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(jnp.sin(self.dense(x)))


def test_every_call_of_a_layer_has_its_own_activations_and_gradient():
    variables = {"params": {"dense": deep_variables()["params"]["layers_0"]["dense"]}}
    model = NNXTwice(nnx.Rngs(0))
    nnx.update(model, variables["params"])
    kernel = np.asarray(variables["params"]["dense"]["kernel"])
    first = np.asarray(X) @ kernel
    second = np.sin(first) @ kernel
    expected = {"dense": first, "dense#2": second}
    slopes = {"dense": np.cos(first) * (np.cos(second) @ kernel.T), "dense#2": np.cos(second)}
    options = {"layers": "dense", "loss": lambda y: jnp.sum(jnp.sin(y))}
    for found in (
        jax.jit(linen_capture(Twice(), **options))(variables, X),
        jax.jit(nnx_capture(model, **options))(X),
    ):
        assert_equal(found.activations, expected)
        assert_equal(found.gradients, slopes)


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class NNXDoubled(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs)


def test_call_of_the_class_above_is_no_second_call():
    kernel = np.ones((3, 3), np.float32)
    model = NNXDoubled(3, 3, use_bias=False, kernel_init=lambda *_: jnp.asarray(kernel), rngs=nnx.Rngs(0))
    linen = linen_capture(Doubled(3, use_bias=False), loss=jnp.sum)({"params": {"kernel": kernel}}, X)
    for found in (linen, nnx_capture(model, loss=jnp.sum)(X)):
        assert_equal(found.activations, {".": 2 * np.asarray(X) @ kernel})
        assert_equal(found.gradients, {".": np.ones((6, 3))})


@pytest.mark.slow
def test_outputs_that_are_trees_are_named_by_place():
    cell = nn.LSTMCell(2)
    carry = cell.initialize_carry(jax.random.key(0), X.shape)
    variables = cell.init(jax.random.key(0), carry, X)
    options = {"layers": ".", "loss": lambda out: jnp.sum(out[1] * FACTOR)}
    found = linen_capture(cell, **options)(variables, carry, X)
    (c, h), y = cell.apply(variables, carry, X)
    assert_equal(found.activations, {".[0][0]": c, ".[0][1]": h, ".[1]": y})
    assert_equal(found.gradients, {".[0][0]": 0 * c, ".[0][1]": 0 * h, ".[1]": FACTOR})
    model = nnx.LSTMCell(3, 2, rngs=nnx.Rngs(0))
    (c, h), y = model(carry, X)
    found = nnx_capture(model, **options)(carry, X)
    assert_equal(found.activations, {".[0][0]": c, ".[0][1]": h, ".[1]": y})
    assert_equal(found.gradients, {".[0][0]": 0 * c, ".[0][1]": 0 * h, ".[1]": FACTOR})


class Deep(nn.Module):
    """Three layers, one after another: as they are, rematerialized, jitted or scanned."""

    lift: str = ""

    @nn.compact
    def __call__(self, x):
        if self.lift == "scan":
            axes: Any = {"params": 0, "intermediates": 0, "capture_zeros": 0}
            layers = nn.scan(Layer, axes, split_rngs={"params": True}, length=3)(name="layers")
            return layers(x, None)[0]
        layer = {"": Layer, "remat": nn.remat(Layer), "jit": nn.jit(Layer)}[self.lift]
        for i in range(3):
            x, _ = layer(name=f"layers_{i}")(x, None)
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(3, name="dense")(x)), None


@functools.cache
def deep_variables():
    kernel, bias = np.random.default_rng(0).normal(size=(3, 3, 3)), np.zeros((3, 3))
    dense = jax.tree.map(jnp.float32, {"kernel": kernel, "bias": bias})
    return {"params": {f"layers_{i}": {"dense": jax.tree.map(lambda a, i=i: a[i], dense)} for i in range(3)}}


@pytest.mark.slow
@pytest.mark.parametrize("lift", ["remat", "jit", "scan"])
def test_layers_inside_lifted_transformations_are_captured(lift):
    variables = deep_variables()
    options = {"layers": nn.Dense, "loss": lambda y: jnp.sum(y**2)}
    plain = jax.jit(linen_capture(Deep(), **options))(variables, X)
    if lift != "scan":
        found = jax.jit(linen_capture(Deep(lift), **options))(variables, X)
        assert_equal(found.activations, plain.activations)
        assert_equal(found.gradients, plain.gradients)
        return
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *(variables["params"][f"layers_{i}"] for i in range(3)))
    found = jax.jit(linen_capture(Deep(lift), **options))({"params": {"layers": stacked}}, X)
    for kind in ("activations", "gradients"):
        expected = jnp.stack([getattr(plain, kind)[f"layers_{i}/dense"] for i in range(3)])
        assert_equal(getattr(found, kind), {"layers/dense": expected})


JITTED = nn.jit(Layer)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JITTED(name="second")(JITTED(name="first")(x, None)[0], None)[0]


@pytest.mark.slow
def test_probes_of_a_model_whose_layers_jit_knows_already_capture_each_its_own():
    layers = deep_variables()["params"]
    variables = {"params": {"first": layers["layers_0"], "second": layers["layers_1"]}}
    Jitted().apply(variables, X, mutable=["intermediates"])
    for names in ({"first/dense"}, {"second/dense"}, {"first/dense", "second/dense"}):
        found = linen_capture(Jitted(), layers=tuple(names), loss=jnp.sum)(variables, X)
        assert set(found.activations) == set(found.gradients) == names


@pytest.mark.slow
def test_report_of_a_probe_has_every_layer_of_both_libraries_alike():
    model, variables = linen_model()
    options: Any = {"layers": "block/*"}
    one = linen_capture(model, **options, loss=lambda out: loss(out[0]))
    two = nnx_capture(nnx_model(), **options, loss=loss)

    @jax.jit
    def reports(variables, x):
        found = one(variables, x, mutable=["batch_stats"]), two(x)
        return [diagnostics.report(each.activations, each.gradients) for each in found]

    first, second = reports(variables, X)
    assert set(first) == {"block/dense", "block/norm"}
    assert float(first["block/norm"]["std"]) == pytest.approx((6 / 5) ** 0.5, rel=1e-3)
    for name, numbers in first.items():
        for key, value in numbers.items():
            assert float(value) == pytest.approx(float(second[name][key]), rel=1e-4, abs=1e-6), (name, key)


@pytest.mark.slow
def test_capture_maps_over_examples_and_keeps_bfloat16():
    probe = linen_capture(Deep(), layers="layers_0/dense", loss=lambda y: jnp.sum(y**2))

    @jax.jit
    def found(variables, x):
        low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (variables, x))
        return probe(variables, x), jax.vmap(probe, (None, 0))(variables, x), probe(*low)

    whole, mapped, low = found(deep_variables(), X)
    assert_equal(mapped.activations, whole.activations)
    assert_equal(mapped.gradients, whole.gradients)
    assert low.gradients["layers_0/dense"].dtype == jnp.bfloat16


def test_error_names_the_layers_that_there_are():
    model, variables = linen_model()
    for probe in (lambda: linen_capture(model, layers="cnv")(variables, X, train=False),
                  lambda: nnx_capture(nnx_model(), layers="cnv", loss=loss)(X)):  # fmt: skip
        with pytest.raises(ValueError, match=r"^no layer that is called matches 'cnv'; found ") as caught:
            probe()
        assert set(str(caught.value).partition("found ")[2].split(", ")) == set(LAYERS)
    with pytest.raises(ValueError, match=r"^at is one of 'output', 'input'; found 'in'$"):
        linen_capture(model, at="in")


def test_probe_of_the_other_library_or_of_no_layers_is_refused():
    model: Any = linen_model()[0]
    other: Any = nnx_model()
    number: Any = 3
    for make, message in (
        (lambda: linen_capture(other), "linen_capture takes a model of flax.linen, found NNX"),
        (lambda: nnx_capture(model), "nnx_capture takes a model of flax.nnx, found Linen"),
        (lambda: linen_capture(model, layers=number),
         "layers are a name, a pattern, a type, several of these or a function; found 3"),
    ):  # fmt: skip
        refuses(make, TypeError, message)
