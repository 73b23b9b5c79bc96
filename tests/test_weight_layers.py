"""Layers with normalized kernels: linen, nnx and the functions on their kernels; Flax's wrappers on Flax's variables."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax.linen.weights as linen_weights
import normjax.nnx as our_nnx
import normjax.nnx.weights as nnx_weights
from normjax.reparametrize import reparametrize
from normjax.weights import (
    bounded_weight_norm,
    norm_bound,
    scaled_weight_standardization,
    weight_norm,
    weight_standardization,
)
from tests.test_weights import close, draw, each, formula, quickly

# Kernels by path.


@pytest.mark.slow
def test_rules_replace_kernels_of_linen_and_nnx_by_path():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
            self.head = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.layers[1](self.layers[0](x)))

    model, x = Model(nnx.Rngs(0)), jnp.ones((2, 3))
    structure, params = nnx.split(model, nnx.Param)
    rules = {"layers/1/*": lambda k: k if k.ndim == 1 else weight_standardization(k), "*kernel": weight_norm}
    pure = nnx.to_pure_dict(params)
    exact = {
        "layers": {
            0: {"bias": pure["layers"][0]["bias"], "kernel": weight_norm(pure["layers"][0]["kernel"])},
            1: {"bias": pure["layers"][1]["bias"], "kernel": weight_standardization(pure["layers"][1]["kernel"])},
        },
        "head": {"bias": pure["head"]["bias"], "kernel": weight_norm(pure["head"]["kernel"])},
    }
    jax.tree.map(np.testing.assert_array_equal, reparametrize(pure, rules), exact)

    @quickly
    def both(params):
        loss = jax.grad(lambda p: jnp.sum(nnx.merge(structure, reparametrize(p, rules))(x) ** 2))
        return reparametrize(params, rules), loss(params)

    changed, gradient = (nnx.to_pure_dict(state) for state in both(params))
    jax.tree.map(close, changed, exact)
    # What was normalized has a gradient that is tangent to it.
    head = np.asarray(gradient["head"]["kernel"])
    assert np.abs((head * pure["head"]["kernel"]).sum(0)).max() < 1e-5 * np.abs(head).max()


# Layers.

X: Any = draw((4, 5), 40).astype(np.float32)
IMAGE: Any = draw((2, 5, 6, 3), 41).astype(np.float32)
LAYERS: dict[str, dict[str, Any]] = {
    "weight norm": {},
    "from the norms": {"scale_init": None},
    "silu": {"weight": functools.partial(scaled_weight_standardization, gain=jax.nn.silu)},
    "standard": {"weight": weight_standardization, "use_scale": False},
    "bounded": {"weight": bounded_weight_norm, "use_scale": False},
    "bounded mean": {"weight": bounded_weight_norm, "use_scale": False, "bound": "mean"},
    "bounded scale": {"weight": functools.partial(bounded_weight_norm, p=1), "scale_init": None},
    "own": {"weight": jnp.sin, "use_scale": False},
}


@each(LAYERS, ("weight norm",))
def test_linen_and_nnx_layers_are_the_function_on_the_kernel(name):
    options = LAYERS[name]
    weight = options.get("weight", weight_norm)
    dense, conv = linen_weights.Dense(4, **options), linen_weights.Conv(4, (3, 3), **options)
    linear = nnx_weights.Linear(5, 4, rngs=nnx.Rngs(0), **options)
    nnx_conv = nnx_weights.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)
    for layer, twin, flax, x in ((dense, linear, nn.Dense(4), X), (conv, nnx_conv, nn.Conv(4, (3, 3)), IMAGE)):
        structure, params, stats = nnx.split(twin, nnx.Param, ...)
        variables = {"params": nnx.to_pure_dict(params)}
        if stats:
            variables["batch_stats"] = nnx.to_pure_dict(stats)
        made = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert jax.tree.structure(made) == jax.tree.structure(variables)
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
        if "scale" in variables["params"] and options.get("scale_init", 1) is not None:
            variables["params"]["scale"] = draw((4,), 42).astype(np.float32)
            nnx.replace_by_pure_dict(params, variables["params"])

        def linen_loss(params, layer: Any = layer, x=x, variables=variables):
            y = layer.apply({**variables, "params": params}, x)
            return jnp.sum(jnp.sin(y)), y

        def nnx_loss(params, structure=structure, stats=stats, x=x):
            y = nnx.merge(structure, params, stats)(x)
            return jnp.sum(jnp.sin(y)), y

        def by_hand(params, flax: Any = flax, x=x, variables=variables):
            extra = {"rho": variables["batch_stats"]["rho"]} if "batch_stats" in variables else {}
            g = (params["scale"],) if "scale" in params else ()
            kernel = weight(params["kernel"], *g, **extra)
            y = flax.apply({"params": {"kernel": kernel, "bias": params["bias"]}}, x)
            return jnp.sum(jnp.sin(y)), y

        @quickly
        def run(pure, state, losses=(linen_loss, by_hand, nnx_loss)):
            first, second = (jax.grad(f, has_aux=True)(pure) for f in losses[:2])
            return first, second, jax.grad(losses[2], has_aux=True)(state)

        (gradient, y), (exact_gradient, exact), (nnx_gradient, nnx_y) = run(variables["params"], params)
        close(y, exact)
        close(nnx_y, exact)
        for key, value in exact_gradient.items():
            close(gradient[key], value, 1e-5)
            close(nnx_gradient[key][...], value, 1e-5)


@pytest.mark.slow
def test_a_scale_from_the_norms_leaves_a_new_layer_as_flax_makes_it():
    options: Any
    for options in ({}, {"weight": bounded_weight_norm}):
        ours = linen_weights.Dense(4, scale_init=None, **options)
        y, variables = ours.init_with_output(jax.random.key(0), X)
        exact, flax = nn.Dense(4).init_with_output(jax.random.key(0), X)
        close(y, exact)
        np.testing.assert_array_equal(variables["params"]["kernel"], flax["params"]["kernel"])
        close(
            nnx_weights.Linear(5, 4, scale_init=None, rngs=nnx.Rngs(0), **options)(X),
            nnx.Linear(5, 4, rngs=nnx.Rngs(0))(X),
        )


@pytest.mark.slow
def test_the_bound_of_a_layer_does_not_move_when_its_kernel_does():
    layer = linen_weights.Dense(4, weight=bounded_weight_norm, use_scale=False)
    variables: Any = layer.init(jax.random.key(0), X)
    close(variables["batch_stats"]["rho"], norm_bound(variables["params"]["kernel"]))
    moved = {**variables, "params": jax.tree.map(lambda p: 3 * p, variables["params"])}
    y, after = layer.apply(moved, X, mutable=["batch_stats"])
    close(after["batch_stats"]["rho"], variables["batch_stats"]["rho"])
    close(y, layer.apply(variables, X))  # the bias is 0 at the start
    twin: Any = nnx_weights.Linear(5, 4, weight=bounded_weight_norm, use_scale=False, rngs=nnx.Rngs(0))
    rho, y = float(twin.rho[...]), twin(X)
    twin.kernel[...] = 3 * twin.kernel[...]
    close(twin(X), y)
    assert float(twin.rho[...]) == rho


@pytest.mark.slow
def test_masked_convolutions_leave_masked_weights_out_of_the_statistics():
    mask = (np.random.default_rng(43).random((3, 3, 3, 4)) < 0.6).astype(np.float32)
    options: dict[str, Any] = {"mask": mask, "weight": weight_standardization, "use_scale": False}
    layer = nnx_weights.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)
    kernel = np.asarray(layer.kernel[...])
    exact = nn.Conv(4, (3, 3)).apply(
        {"params": {"kernel": formula("standard", kernel, valid=mask > 0), "bias": np.zeros(4, np.float32)}}, IMAGE
    )
    close(layer(IMAGE), exact)
    params = {"kernel": kernel, "bias": np.zeros(4, np.float32)}
    close(linen_weights.Conv(4, (3, 3), **options).apply({"params": params}, IMAGE), exact)


@pytest.mark.slow
def test_a_layer_may_be_called_inside_of_a_transformation_that_closes_over_it():
    for layer in (
        nnx_weights.Linear(5, 4, rngs=nnx.Rngs(0)),
        nnx_weights.WeightNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        nnx_weights.SpectralNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0), update_stats=False),
    ):
        inside, mapped = quickly(lambda x, layer=layer: (layer(x), jax.vmap(layer)(x)))(X)
        close(inside, layer(X))
        close(mapped, layer(X))


# Wrappers with Flax's names.


class Inner(nn.Module):
    """Two layers, one below another."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(nn.Dense(3, bias_init=nn.initializers.normal())(x))


def linen_wrapper(library, row):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return library.WeightNorm(Inner(), **row)(nn.Dense(6)(x))

    return Model()


WRAPPED: dict[str, dict[str, Any]] = {
    "default": {},
    "all variables": {"variable_filter": None, "scale_init": nn.initializers.normal()},
    "one layer": {"variable_filter": {"last"}, "use_scale": False},
    "one norm": {"feature_axes": None, "epsilon": 0.1, "scale_init": nn.initializers.normal()},
    "inputs": {"feature_axes": 0, "scale_init": nn.initializers.normal()},
    "none averaged": {"feature_axes": (0, -1), "epsilon": 0.1},
}


@each(WRAPPED, ())
def test_linen_weight_norm_takes_flax_s_variables_and_gives_its_numbers(name):
    row = WRAPPED[name]
    ours, flax = linen_wrapper(linen_weights, row), linen_wrapper(nn, row)
    variables = flax.init(jax.random.key(0), X)
    mine = ours.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, variables)

    def everything(model):
        def loss(variables):
            y = model.apply(variables, X)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)

    for inputs in (variables, mine):
        got, want = quickly(lambda v: (everything(ours)(v), everything(flax)(v)))(inputs)
        # A bias by itself is a sign times its scale, and its gradient 0.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.slow
def test_linen_wrappers_store_the_kernels_that_the_layer_made():
    wrapper: Any
    options: Any
    for wrapper, options in ((linen_weights.WeightNorm, {}), (linen_weights.SpectralNorm, {"update_stats": True})):
        layer: Any = wrapper(nn.Dense(4, kernel_init=nn.initializers.constant(3.0)))
        variables = layer.init(jax.random.key(0), X, **options)
        assert (variables["params"]["layer_instance"]["kernel"] == 3).all()
        _, after = layer.apply(variables, X, mutable=True, **options)
        jax.tree.map(np.testing.assert_array_equal, after["params"], variables["params"])


class Normed(nn.Module):
    """A layer with running statistics of two axes, which are no parameters."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        mean = self.variable("batch_stats", "kernel", jnp.zeros, (2, 4))
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            mean.value = mean.value + jnp.mean(x, 0)[None]
        return x + mean.value[:1]


@pytest.mark.slow
def test_linen_wrappers_leave_the_statistics_of_the_layer_alone():
    wrapper: Any
    options: Any
    for wrapper, options in ((linen_weights.WeightNorm, {}), (linen_weights.SpectralNorm, {"update_stats": True})):
        layer = wrapper(Normed())
        variables = layer.init(jax.random.key(0), X, **options)
        bare = {"params": variables["params"]["layer_instance"]}
        _, after = layer.apply(variables, X, mutable=["batch_stats"], **options)
        stored = after["batch_stats"]["layer_instance"]["kernel"]
        kernel = np.asarray(bare["params"]["Dense_0"]["kernel"], float)
        scale = (
            np.sqrt((kernel**2).sum(0)) if not options else after["batch_stats"]["layer_instance/Dense_0/kernel/sigma"]
        )
        close(stored, np.broadcast_to((X @ (kernel / scale)).mean(0), (2, 4)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_linen_spectral_norm_takes_flax_s_variables_and_gives_its_numbers(steps):
    ours, flax = (library.SpectralNorm(Inner(), n_steps=steps) for library in (linen_weights, nn))
    variables = flax.init(jax.random.key(0), X, update_stats=False)
    mine = ours.init(jax.random.key(0), X, update_stats=False)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, variables)

    def everything(model):
        def loss(params, update):
            rest = {"batch_stats": variables["batch_stats"]}
            y, after = model.apply({"params": params, **rest}, X, update_stats=update, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, after)

        return [jax.grad(loss, has_aux=True)(variables["params"], update) for update in (True, False)]

    got, want = quickly(lambda: (everything(ours), everything(flax)))()
    jax.tree.map(functools.partial(close, bound=1e-5), got, want)
    kept = got[1][1][1]["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, kept, variables["batch_stats"])


def as_flax(state):
    """A pure dictionary, keys as text: Flax keeps its scales as bare arrays."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


@each(["default", "one norm", "inputs", "no scale"], ("default",))
def test_nnx_weight_norm_gives_flax_s_numbers_and_learns_its_scale(name):
    row = {"no scale": {"use_scale": False}, **WRAPPED}[name]
    row = {k: v for k, v in row.items() if k != "scale_init"}
    ours, flax = (
        lib.WeightNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1), **row) for lib in (nnx_weights, nnx)
    )
    before = nnx.to_pure_dict(nnx.state(ours))
    assert as_flax(before).keys() == as_flax(nnx.to_pure_dict(nnx.state(flax))).keys()
    structure, params = nnx.split(ours, nnx.Param)

    def loss(params):
        y = nnx.merge(structure, params)(X)
        return jnp.sum(jnp.sin(y)), y

    gradient, y = jax.grad(loss, has_aux=True)(params)
    close(y, flax(X), 1e-5)
    close(ours(X), y)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours)), before)
    if row.get("use_scale", True):
        assert np.abs(gradient["scales"][("kernel",)][...]).max() > 1e-3


def test_an_nnx_checkpoint_of_flax_loads():
    flax: Any = nnx.WeightNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(3)), rngs=nnx.Rngs(1))
    flax.scales[("kernel",)] = jnp.arange(1.0, 5.0)
    saved = nnx.to_pure_dict(nnx.state(flax))
    ours = nnx_weights.WeightNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    state = nnx.state(ours)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(ours, state)
    close(ours(X), flax(X), 1e-5)


@pytest.mark.slow
def test_nnx_spectral_norm_gives_flax_s_first_numbers_and_changes_no_kernel():
    made = [
        lib.SpectralNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), n_steps=2, rngs=nnx.Rngs(1)) for lib in (nnx_weights, nnx)
    ]
    ours, flax = made
    assert as_flax(nnx.to_pure_dict(nnx.state(ours))).keys() == as_flax(nnx.to_pure_dict(nnx.state(flax))).keys()
    kernel, u = ours.layer_instance.kernel[...], ours.batch_stats[("kernel", "u")][...]
    ours.eval()
    y = ours(X)
    np.testing.assert_array_equal(ours.batch_stats[("kernel", "u")][...], u)
    np.testing.assert_array_equal(ours.layer_instance.kernel[...], kernel)
    ours.train()
    close(ours(X), y)
    close(flax(X), y, 1e-5)
    for name in ("u", "sigma"):
        close(ours.batch_stats[("kernel", name)][...], flax.batch_stats[("kernel", name)][...], 1e-5)
    for _ in range(30):
        ours(X)
    np.testing.assert_array_equal(ours.layer_instance.kernel[...], kernel)
    close(ours.batch_stats[("kernel", "sigma")][...], np.linalg.svd(np.asarray(kernel, float))[1][0], 1e-4)
    matrix = nnx_weights.SpectralNorm(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), n_steps=0, rngs=nnx.Rngs(0))
    close(matrix(X), matrix.layer_instance(X))


@pytest.mark.slow
def test_nnx_wrappers_let_the_layer_update_and_be_captured():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 4, rngs=rngs)
            self.norm = our_nnx.Norm("batch", 4, l1=0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    for wrapper in (nnx_weights.WeightNorm, nnx_weights.SpectralNorm):
        model: Any = wrapper(Block(nnx.Rngs(0)), rngs=nnx.Rngs(1))
        before = model.layer_instance.norm.mean[...]
        captured: Any = nnx.capture(model, our_nnx.Penalty)(X)
        sown = captured[1]
        assert np.abs(model.layer_instance.norm.mean[...] - before).max() > 1e-4
        assert float(sown["layer_instance"]["norm"]["l1"][...]) > 0
