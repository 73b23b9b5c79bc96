"""Layers with normalized kernels: linen, nnx and the functions on their kernels, and models of them under nnx and scan."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normjax.linen.weights as linen_weights
import normjax.nnx.weights as nnx_weights
from normjax.reparametrize import reparametrize
from normjax.weights import (
    bounded_weight_norm,
    norm_bound,
    scaled_weight_standardization,
    weight_norm,
    weight_standardization,
)
from tests.kernels import close, draw, each, formula, quickly

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
    chex.assert_trees_all_equal(reparametrize(pure, rules), exact)

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
    for options in ({}, {"weight": bounded_weight_norm}, {"weight": functools.partial(bounded_weight_norm, p=1)}):
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


def test_the_bound_of_a_layer_is_found_by_the_rule_that_it_was_given():
    options: dict[str, Any] = {"weight": bounded_weight_norm, "use_scale": False}
    kernel = np.arange(20.0, dtype=np.float32).reshape(5, 4)
    norms = np.linalg.norm(kernel.astype(float), axis=0)
    options["kernel_init"] = lambda key, shape, dtype, **_: jnp.asarray(kernel)
    for bound, exact in (("rms", np.sqrt((norms**2).mean())), ("mean", norms.mean())):
        variables = linen_weights.Dense(4, bound=bound, **options).init(jax.random.key(0), X)
        twin: Any = nnx_weights.Linear(5, 4, bound=bound, rngs=nnx.Rngs(0), **options)
        close(variables["batch_stats"]["rho"], exact)
        close(twin.rho[...], exact)


@pytest.mark.slow
def test_the_bound_of_a_masked_convolution_is_that_of_the_weights_it_leaves():
    mask = (np.random.default_rng(48).random((3, 3, 3, 4)) < 0.6).astype(np.float32)
    options: dict[str, Any] = {"mask": mask, "weight": bounded_weight_norm, "use_scale": False}
    layer: Any = nnx_weights.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)
    close(layer.rho[...], np.linalg.norm(np.asarray(layer.kernel[...], float) * mask) / 2)
    variables = linen_weights.Conv(4, (3, 3), **options).init(jax.random.key(0), IMAGE)
    close(variables["batch_stats"]["rho"], np.linalg.norm(np.asarray(variables["params"]["kernel"]) * mask) / 2)


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


class Stack(nnx.Module):
    """Every nnx layer of this room, one upon the other."""

    def __init__(self, rngs):
        self.spectral = nnx_weights.SpectralNorm(nnx.Linear(5, 6, rngs=rngs), rngs=rngs)
        self.weight = nnx_weights.WeightNorm(nnx.Linear(6, 6, rngs=rngs), rngs=rngs)
        self.linear = nnx_weights.Linear(6, 2, rngs=rngs)
        self.bounded = nnx_weights.Linear(2, 2, weight=bounded_weight_norm, use_scale=False, rngs=rngs)

    def __call__(self, x):
        return self.bounded(self.linear(self.weight(self.spectral(x))))


@pytest.mark.slow
def test_nnx_layers_train_under_nnx_jit_with_an_optimizer():
    model: Any = Stack(nnx.Rngs(0))
    u, rho = model.spectral.batch_stats[("kernel", "u")][...], float(model.bounded.rho[...])
    scales = model.linear.scale[...], model.weight.scales[("kernel",)][...]
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean(jnp.square(model(X) - 1)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert np.abs(model.spectral.batch_stats[("kernel", "u")][...] - u).max() > 1e-3
    assert model.bounded.rho[...] == rho
    for before, after in zip(scales, (model.linear.scale[...], model.weight.scales[("kernel",)][...]), strict=True):
        assert np.abs(after - before).max() > 1e-3


@pytest.mark.slow
def test_layers_stack_under_vmap_and_scan_as_one_after_the_other():
    def make(key):
        rngs = nnx.Rngs(key)
        return nnx_weights.SpectralNorm(nnx_weights.Linear(5, 5, rngs=rngs), rngs=rngs, update_stats=False)

    keys = jax.random.split(jax.random.key(0), 3)
    stacked = nnx.vmap(make)(keys)
    scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, stacked)
    y = X
    for key in keys:
        y = make(key)(y)
    close(scanned, y, 1e-5)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return linen_weights.WeightNorm(linen_weights.Dense(5, scale_init=None))(x), None

    deep: Any = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = deep.init(jax.random.key(0), X, None)
    y = X
    for k in range(3):
        y = Block().apply(jax.tree.map(lambda p, k=k: p[k], variables), y, None)[0]
    close(deep.apply(variables, X, None)[0], y, 1e-5)
