"""Projection: the closed forms in NumPy, every transformation, trees and devices, and the mistakes."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from normjax.projection import (
    Kernels,
    bounded_norm,
    effective_learning_rates,
    norm_schedule,
    norms,
    project,
    project_affine,
    pull_affine,
    scale_by_weight_norm,
)
from tests.kernels import quickly
from tests.refusals import refuses
from tests.test_selection import LISTED, TREE

WHOLE = Kernels(output="head")


def start(tx, params) -> Any:
    return tx.init(params)


def update(tx, updates, state, params, **extra) -> tuple[Any, Any]:
    return tx.update(updates, state, params, **extra)


# Closed forms: what one update leaves of (kernel, update), written out in NumPy.


def size(w, axes=None):
    return np.sqrt(np.sum(w**2, axes, keepdims=True))


def by_blocks(w):
    return np.repeat(size(w.reshape(4, 2, 3), (0, 2)).reshape(1, 2), 3, 1)


RECORD = {"kernel": np.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], np.float32)}
ONE: Any = np.float32(1.0)
ALL, FEATURES = Kernels(output=()), Kernels(output=(), field="... i")
FORMS = {
    "whole": (project(ALL), lambda p, u: (p + u) * size(p) / size(p + u)),
    "features": (project(FEATURES), lambda p, u: (p + u) * size(p, 0) / size(p + u, 0)),
    "blocks": (project(Kernels(output=(), field="... i o/2")), lambda p, u: (p + u) * by_blocks(p) / by_blocks(p + u)),
    "unit": (project(FEATURES, rho=ONE), lambda p, u: (p + u) / size(p + u, 0)),
    "bounded": (bounded_norm(ALL), lambda p, u: (p + u) * size(p) / 6**0.5 / size(p + u, 0)),
    "bounded_mean": (bounded_norm(ALL, rho="mean"), lambda p, u: (p + u) * size(p, 0).mean() / size(p + u, 0)),
    "not_yet": (project(ALL, every=2), lambda p, u: p + u),
    "schedule": (norm_schedule(lambda t: 3.0 * t, FEATURES), lambda p, u: (p + u) * 3 * size(p, 0) / size(p + u, 0)),
    "recorded": (
        norm_schedule(lambda t: 3.0 * t, FEATURES, recorded=RECORD),
        lambda p, u: (p + u) * 3 * RECORD["kernel"][1] / size(p + u, 0),
    ),
    "paper": (
        scale_by_weight_norm(RECORD, FEATURES, correction="paper"),
        lambda p, u: p + u * (size(p, 0) / RECORD["kernel"][0]) ** 2,
    ),
    "exact": (
        scale_by_weight_norm(RECORD, FEATURES, learning_rate=lambda t: 0.5 + t, weight_decay=0.4),
        lambda p, u: p + u * (size(p, 0) / RECORD["kernel"][0]) ** 2 / 0.8,
    ),
}


TARGET = np.array([[0.0], [0.0], [1.0], [1.0]])
FORMS |= {
    "affine": (project_affine(), lambda p, u: (p + u) * size(p) / size(p + u)),
    "pull": (pull_affine(0.3), lambda p, u: p + u + 0.3 * (p - TARGET)),
}


def one_step(tx, p, u):
    """One update of a kernel, or of a bias and a scale that lie one upon the other."""
    names = ("bias", "scale") if tx in (FORMS["affine"][0], FORMS["pull"][0]) else ("kernel",)
    params, updates = (dict(zip(names, jnp.split(a, len(names)), strict=True)) for a in (p, u))
    updates, _ = update(tx, updates, start(tx, params), params)
    return p + jnp.concatenate([updates[name] for name in names])


def a_pair(shape=(4, 6), dtype: type = np.float32):
    random = np.random.default_rng(2)
    return random.normal(size=shape).astype(dtype), 0.3 * random.normal(size=shape).astype(dtype)


def most(few):
    return [pytest.param(name, marks=() if name in few else pytest.mark.slow) for name in FORMS]


@functools.cache
def after_one_step(dtype):
    """What every form leaves, in one compilation."""
    p, u = (a.astype(dtype) for a in a_pair(dtype=np.float64))
    return quickly(lambda p, u: {name: one_step(tx, p, u) for name, (tx, _) in FORMS.items()})(p, u)


@pytest.mark.parametrize("name", FORMS)
def test_update_leaves_the_closed_form_in_float32_bfloat16_and_float64(name):
    expected = FORMS[name][1](*a_pair(dtype=np.float64))
    np.testing.assert_allclose(after_one_step(np.float32)[name], expected, rtol=1e-6, atol=3e-6)
    low = after_one_step(jnp.bfloat16)[name]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), expected, rtol=0.02, atol=0.06)
    with jax.enable_x64(True):
        np.testing.assert_allclose(after_one_step(np.float64)[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", most({"bounded"}))
def test_every_transformation_gives_the_closed_form_and_its_derivatives(name):
    tx, form = FORMS[name]
    p, u = a_pair()
    q = p[::-1].copy()

    @quickly
    def everything(p, u, q):
        step = functools.partial(one_step, tx)

        def along(eps):  # the weights move, and their norm with them
            return jnp.sum(jnp.sin(jax.checkpoint(step)(p + eps * q, u)))

        def scanned(carry, _):
            return step(carry, u), None

        zero = jnp.zeros(())
        return {
            "scan": jax.lax.scan(scanned, p, None, 2)[0],
            "seeds": jax.vmap(step)(jnp.stack([p, 2 * p]), jnp.stack([u, u])),
            "first": (jax.grad(along)(zero), jax.jvp(along, (zero,), (zero + 1,))[1]),
            "second": (jax.grad(jax.grad(along))(zero), jax.jvp(jax.grad(along), (zero,), (zero + 1,))[1]),
        }

    out = everything(p, u, q)
    p, u, q = (a.astype(np.float64) for a in (p, u, q))
    np.testing.assert_allclose(out["scan"], form(form(p, u), u), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out["seeds"], [form(p, u), form(2 * p, u)], rtol=1e-5, atol=1e-5)

    def along(eps):
        return np.sin(form(p + eps * q, u)).sum()

    h = 1e-3
    slope = (along(h) - along(-h)) / (2 * h)
    bend = (along(h) - 2 * along(0) + along(-h)) / h**2
    for derivative, number in ((out["first"], slope), (out["second"], bend)):
        np.testing.assert_allclose(derivative, number, rtol=1e-3, atol=1e-3)


def test_output_features_may_come_first():
    p, u = a_pair((3, 2, 4, 6))
    last, first = bounded_norm(ALL), bounded_norm(Kernels(output=(), layout="o i ..."))
    turned = quickly(functools.partial(one_step, first))(*(np.moveaxis(a, (3, 2), (0, 1)) for a in (p, u)))
    expected = quickly(functools.partial(one_step, last))(p, u)
    np.testing.assert_allclose(np.moveaxis(turned, (0, 1), (3, 2)), expected, rtol=2e-6, atol=2e-6)


def test_zero_and_infinite_norms_let_the_update_pass():
    p, u = a_pair()
    p[:, 2] = 0  # a feature that starts at zero, seen under jit
    u[:, 3] = -p[:, 3]  # one that the step takes to zero
    u[:, 4] = np.inf
    after = quickly(functools.partial(one_step, project(FEATURES)))(p, u)
    np.testing.assert_array_equal(after[:, 2:5], (p + u)[:, 2:5])
    np.testing.assert_allclose(size(np.asarray(after[:, :2]), 0), size(p[:, :2], 0), rtol=1e-6)
    u[:, 4] = 1
    grad = quickly(jax.grad(lambda p: jnp.sum(one_step(project(FEATURES), p, u))))(p)
    assert jnp.isfinite(grad).all()


def test_record_of_zero_or_nan_stops_the_feature():
    p, u = a_pair()
    record = {"kernel": jnp.array([0.0, jnp.nan, 1e-30, 1.0, 1.0, 1.0])}
    after = one_step(scale_by_weight_norm(record, FEATURES, correction="paper"), p, u)
    np.testing.assert_array_equal(after[:, :3], p[:, :3])
    assert (after[:, 3:] != p[:, 3:]).all()


def test_records_by_epoch_hold_for_their_updates_and_the_last_stays():
    p, u = a_pair()
    tx = scale_by_weight_norm(RECORD, FEATURES, correction="paper", record_every=2)
    state, seen = start(tx, {"kernel": p}), []
    for _ in range(5):
        updates, state = update(tx, {"kernel": u}, state, {"kernel": p})
        seen.append(np.sqrt(size(p, 0)[0] ** 2 / (updates["kernel"] / u)[0]))
    np.testing.assert_allclose(seen, RECORD["kernel"][[0, 0, 1, 1, 1]], rtol=1e-5)


def test_projection_comes_back_every_so_many_steps():
    params = {"kernel": a_pair()[0]}
    tx = project(ALL, every=3)
    state, seen = start(tx, params), []
    for _ in range(6):
        updates, state = update(tx, {"kernel": jnp.ones((4, 6))}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(norms(params)["kernel"] / state.norms["kernel"]))
    np.testing.assert_allclose([seen[2], seen[5]], 1, rtol=1e-6)
    assert min(seen[0], seen[1], seen[3], seen[4]) > 1.01


# Scale and bias of normalizers.


def test_scale_and_bias_return_to_their_joint_norm():
    random = np.random.default_rng(3)
    params = {
        "norm": {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)},
        "rms": {"scale": 2 * np.ones(9, np.float32)},
        "dense": {"kernel": np.ones((3, 3), np.float32), "bias": np.ones(3, np.float32)},
    }
    updates = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
    tx = project_affine()
    state = start(tx, params)
    assert {name: float(norm) for name, norm in state.norms.items()} == {
        "norm": 4.0,
        "rms": 6.0,
    }  # sqrt(d), not sqrt(2)
    new, _ = quickly(functools.partial(update, tx))(updates, state, params)
    after = jax.tree.map(np.add, params, new)
    free = jax.tree.map(np.add, params, updates)
    joint = np.sqrt(np.sum(free["norm"]["scale"] ** 2) + np.sum(free["norm"]["bias"] ** 2))
    for part in ("scale", "bias"):
        np.testing.assert_allclose(after["norm"][part], free["norm"][part] * 4 / joint, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(after["rms"]["scale"]), 6, rtol=1e-6)
    chex.assert_trees_all_equal(new["dense"], updates["dense"])
    only = start(project_affine("norm"), params)
    assert list(only.norms) == ["norm"]


def test_the_scale_of_weight_norm_is_no_normalizer_s_unless_it_is_named():
    params = {
        "dense": {
            "kernel": np.ones((3, 3), np.float32),
            "scale": np.ones(3, np.float32),
            "bias": np.ones(3, np.float32),
        },
        "wrapped": {"kernel": np.ones((3, 3), np.float32), "kernel/scale": np.ones(3, np.float32)},  # as linen has it
        "norm": {"scale": np.ones(4, np.float32)},
    }
    assert list(start(project_affine(), params).norms) == ["norm"]
    updates, _ = update(pull_affine(1.0), params, optax.EmptyState(), params)
    chex.assert_trees_all_equal(updates["dense"], params["dense"])
    assert list(start(project_affine("dense/*"), params).norms) == ["dense"]


# Trees and devices.


class Tree(nnx.Module):
    """An nnx module that holds these parameters."""

    def __init__(self, tree):
        for name, value in tree.items():
            setattr(self, name, Tree(value) if isinstance(value, dict) else nnx.Param(jnp.asarray(value)))


def test_nnx_parameters_are_projected_as_linen_dictionaries_are():
    random = np.random.default_rng(5)
    shapes = {
        "hidden": {"kernel": (4, 6), "bias": (6,)},
        "norm": {"scale": (6,), "bias": (6,)},
        "head": {"kernel": (6, 2)},
    }
    params, grads = (
        {
            k: {name: random.normal(size=shape).astype(np.float32) for name, shape in v.items()}
            for k, v in shapes.items()
        }
        for _ in range(2)
    )
    model = Tree(params)
    state = nnx.state(model, nnx.Param)
    assert norms(state).keys() == norms(params).keys() == norms(model).keys() == {"hidden/kernel", "head/kernel"}
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), project(WHOLE), project_affine())
    updates, _ = update(tx, grads, start(tx, params), params)
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, nnx.state(Tree(grads), nnx.Param))
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(found, optax.apply_updates(params, updates))
    np.testing.assert_allclose(norms(model, WHOLE)["hidden/kernel"], size(params["hidden"]["kernel"])[0, 0], rtol=1e-6)
    assert abs(norms(model)["head/kernel"] - norms(params)["head/kernel"]) > 1e-2


def test_boxed_and_sharded_kernels_are_projected_as_wholes():
    mesh = jax.make_mesh((8,), ("model",))
    p, u = a_pair((8, 16))
    spread = [jax.device_put(a, NamedSharding(mesh, P("model", None))) for a in (p, u)]
    for kernels in (ALL, FEATURES):
        step = quickly(functools.partial(one_step, project(kernels)))
        expected = step(p, u)
        np.testing.assert_allclose(step(*spread), expected, rtol=1e-6, atol=1e-6)
        reaching = Kernels(output=(), field=str(kernels.field).replace("i", "i@model"))
        mapped = jax.shard_map(
            functools.partial(one_step, project(reaching)), mesh=mesh, in_specs=P("model"), out_specs=P("model")
        )
        np.testing.assert_allclose(quickly(mapped)(*spread), expected, rtol=1e-6, atol=1e-6)
    boxed = {"kernel": nn.Partitioned(jnp.asarray(p), (None, "model"))}
    assert norms(boxed)["kernel"] == norms({"kernel": p})["kernel"]
    tx = project(ALL)
    updates, _ = update(tx, jax.tree.map(lambda _: u, boxed), start(tx, boxed), boxed)
    np.testing.assert_allclose(p + updates["kernel"].value, one_step(tx, p, u), rtol=1e-6, atol=1e-6)


def test_state_goes_through_optax():
    params = {name: {"kernel": a_pair()[0]} for name in ("hidden", "head")}
    tx = optax.chain(optax.trace(0.9), project(WHOLE))
    state = start(tx, params)
    marked: Any = optax.tree.map_params(tx, lambda _: "param", state, transform_non_params=lambda _: "rest")
    assert marked[0].trace["head"]["kernel"] == "param"
    assert marked[1] == ("rest", "rest")
    updates, _ = update(tx, params, state, params, value=1.0)  # extra arguments are accepted
    np.testing.assert_array_equal(updates["head"]["kernel"], params["head"]["kernel"])
    unused = optax.partition(
        {True: project(WHOLE), False: optax.identity()}, lambda params: {name: False for name in params}
    )
    updates, _ = update(unused, params, start(unused, params), params)
    chex.assert_trees_all_equal(updates, params)


ZERO = {"kernel": np.zeros((2, 3), np.float32)}
SOME = {"kernel": np.array([[0, 1, 0], [0, 1, 1]], np.float32)}
WITHOUT = "cannot read off the parameters which kernel is the output layer's, which no normalizer follows: " \
    "Kernels(output='Dense_2') leaves it free, Kernels(output=()) takes it too"  # fmt: skip
MISTAKES = {
    "pattern": (
        lambda: project(Kernels("a/kernl")).init(TREE),
        f"project: 'a/kernl' matches no parameter; did you mean 'a/kernel'? {LISTED}",
    ),
    "nothing": (
        lambda: bounded_norm(Kernels("a", output="a")).init(TREE),
        f"bounded_norm: no parameter is left to work on. {LISTED}",
    ),
    "unsaid": (lambda: project(Kernels()), f"project {WITHOUT}"),
    "unsaid_schedule": (lambda: norm_schedule(lambda t: 1.0, Kernels()), f"norm_schedule {WITHOUT}"),
    "rho": (lambda: project(ALL, rho=0.0), "project: rho is 'initial', 'rms', 'mean' or a number above 0; found 0.0"),
    "infinite": (
        lambda: project(ALL, rho=float("inf")),
        "project: rho is 'initial', 'rms', 'mean' or a number above 0; found inf",
    ),
    "text": (
        lambda: bounded_norm("Dense_2"),  # pyright: ignore[reportArgumentType]
        "bounded_norm takes Kernels, such as Kernels(output='Dense_2'); found 'Dense_2'",
    ),
    "every": (lambda: project(ALL, every=0), "project: every is an integer of at least 1; found 0"),
    "zero": (
        lambda: project(ALL).init(ZERO),
        "project: 'kernel' starts with norm 0, to which nothing can be projected; leave it out, or start it elsewhere",
    ),
    "zero_feature": (
        lambda: project(FEATURES).init(SOME),
        "project: 'kernel' starts with norm 0 in 1 of 3 places, to which nothing can be projected; leave it out, or start "
        "it elsewhere",
    ),
    "params": (
        lambda: project(ALL).update(SOME, project(ALL).init(SOME)),
        "project needs the parameters: tx.update(updates, state, params)",
    ),
    "other_state": (
        lambda: project(ALL).update(SOME, project(ALL).init({"a": SOME}), SOME),
        "project: the state holds a norm of 'a/kernel', which is no parameter. The parameters are kernel (2, 3)",
    ),
    "other_updates": (
        lambda: pull_affine(1.0).update({}, optax.EmptyState(), TREE),
        "pull_affine: there are 5 parameters but 0 updates",
    ),
    "unrecorded": (
        lambda: scale_by_weight_norm({"a/kernel": 1.0}, Kernels("b/kernel"), correction="paper").init(TREE),
        "scale_by_weight_norm: norms of 'b/kernel' are not among those given: a/kernel",
    ),
    "record": (
        lambda: norm_schedule(lambda t: 1.0, FEATURES, recorded={"kernel": np.ones((7, 2))}).init(SOME),
        "norm_schedule: norms of 'kernel' have shape (3,), or that behind an axis of time; found (7, 2)",
    ),
    "correction": (
        lambda: scale_by_weight_norm({}, ALL, correction="none"),
        "correction is one of 'exact', 'paper'; found 'none'",
    ),
    "numbers": (
        lambda: scale_by_weight_norm({}, ALL, learning_rate=0.1),
        "scale_by_weight_norm: correction='exact' needs learning_rate and weight_decay; 'paper' goes without",
    ),
    "rule": (lambda: effective_learning_rates(TREE, 0.1, rule="adam"), "rule is one of 'sgd', 'sign'; found 'adam'"),
    "reference": (
        lambda: effective_learning_rates(TREE, 0.1, Kernels("b"), reference={"a/kernel": 1.0}),
        "effective_learning_rates: norms of 'b/c/kernel' are not among those given: a/kernel",
    ),
    "affine": (
        lambda: project_affine().init(TREE),
        f"project_affine: nothing here is called 'scale', as a normalizer's factor is. {LISTED}",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    attempt, message = MISTAKES[name]
    refuses(attempt, (ValueError, TypeError), message)


INJECTED = {
    "project": (optax.inject_hyperparams(project), {"rho": 2.0}, None),
    "a schedule": (optax.inject_hyperparams(project), {"rho": lambda count: 2.0}, None),
    "bounded_norm": (optax.inject_hyperparams(bounded_norm), {"rho": 2.0}, (0,)),
    "an array": (project, {"rho": np.array(2)}, None),
}


@pytest.mark.parametrize("name", INJECTED)
def test_the_norm_may_be_an_array_or_a_hyperparameter(name):
    make, options, axes = INJECTED[name]
    params = {"kernel": jnp.arange(6.0).reshape(3, 2) + 1}
    tx = optax.chain(optax.sgd(0.1), make(Kernels(output=()), **options))
    updates, _ = quickly(tx.update)({"kernel": jnp.ones((3, 2))}, tx.init(params), params)
    after = np.asarray(optax.apply_updates(params, updates)["kernel"], float)
    np.testing.assert_allclose(np.linalg.norm(after, axis=None if axes is None else 0), 2.0, rtol=1e-6)


def test_hidden_output_layers_and_masks_are_named():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    hidden = optax.masked(project(Kernels(output="head")), {"a": True, "head": False})
    with pytest.raises(ValueError, match=r"optax.masked or optax.partition hides .* say output=\(\)"):
        hidden.init(params)
    with pytest.raises(ValueError, match="a mask says True or False for every parameter"):
        project(Kernels(where={"a": True})).init(params)
