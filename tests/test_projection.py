"""Projection: exact equivalences in float64, the closed forms in NumPy, every transformation, and the mistakes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from normjax import Normalizer, normalize
from normjax.projection import (
    Kernels,
    bounded_norm,
    effective_learning_rate,
    equilibrium_norm,
    norm_schedule,
    norms,
    project,
    project_affine,
    pull_affine,
    scale_by_weight_norm,
)

WHOLE = Kernels(output="head")
EACH = Kernels(output="head", field="... i")
LAYER, BATCH = Normalizer("c", "c", eps=0.0), Normalizer("n", "n", eps=0.0)
HIDDEN = ("hidden_0", "hidden_1")


def parameters(seed=0, dtype: type = np.float64):
    random = np.random.default_rng(seed)
    sizes = {"hidden_0": (6, 8), "hidden_1": (8, 8), "head": (8, 3)}
    return {name: {"kernel": random.normal(0, size[0] ** -0.5, size).astype(dtype)} for name, size in sizes.items()}


def forward(params, x, row):
    """A network that is blind to the scale of its hidden kernels (of each feature, for batch norm)."""
    for name in HIDDEN:
        x = jnp.tanh(normalize(x @ params[name]["kernel"], row, "n c").y)
    return x @ params["head"]["kernel"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), compiler_options={"xla_backend_optimization_level": 0})
def train(tx, row, steps, kernels, params, x, target):
    """Outputs, norms and squared gradients before each step."""

    def loss(params):
        out = forward(params, x, row)
        return jnp.mean(jnp.square(out - target)), out

    def step(carry, _):
        params, state = carry
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)
        return (optax.apply_updates(params, updates), state), (out, norms(params, kernels), squares)

    return jax.lax.scan(step, (params, tx.init(params)), None, steps)[1]


def run(tx, row, steps, kernels=WHOLE):
    random = np.random.default_rng(1)
    x = random.normal(size=(32, 6))
    target = np.tanh(x @ random.normal(size=(6, 3)))
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, train(tx, row, steps, kernels, parameters(), x, target))


def start(tx, params) -> Any:
    return tx.init(params)


def update(tx, updates, state, params, **extra) -> tuple[Any, Any]:
    return tx.update(updates, state, params, **extra)


def on_head(params):
    return {name: {"kernel": name == "head"} for name in params}


def beside_head(hidden, head):
    """One transformation for the hidden kernels, another for the head."""
    return optax.partition({True: head, False: hidden}, on_head)


@functools.cache
def plain():
    return run(optax.sgd(0.15), LAYER, 200)


@functools.cache
def decayed():
    return run(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.02)), BATCH, 300, EACH)


def apart(a, b):
    return np.abs(a[0] - b[0]).max()


# Equivalences, in float64 and with eps = 0, where scale invariance is exact.


def test_gradient_steps_add_their_squares_to_the_squared_norm():
    _, sizes, squares = plain()
    for name in HIDDEN:
        norm, grad = sizes[f"{name}/kernel"], squares[name]["kernel"]
        expected = norm[:-1] ** 2 + 0.15**2 * grad[:-1]
        np.testing.assert_allclose(norm[1:] ** 2, expected, rtol=1e-14)
        assert norm[-1] > 1.001 * norm[0]


def test_projected_sgd_with_the_rates_of_the_free_run_is_the_free_run():
    free = plain()
    tx = optax.chain(scale_by_weight_norm(free[1], WHOLE, correction="paper"), optax.scale(-0.15), project(WHOLE))
    projected = run(tx, LAYER, 200)
    assert apart(free, projected) < 1e-12
    for name, norm in projected[1].items():
        np.testing.assert_allclose(norm, norm[0], rtol=1e-14, err_msg=name)


@pytest.mark.parametrize(
    ("correction", "least", "most"), [("exact", 0, 1e-12), pytest.param("paper", 1e-4, 1, marks=pytest.mark.slow)]
)
def test_rate_correction_replaces_weight_decay(correction, least, most):
    weighed = decayed()
    tx = optax.chain(
        optax.add_decayed_weights(0.1, on_head),
        scale_by_weight_norm(weighed[1], EACH, learning_rate=0.02, weight_decay=0.1, correction=correction),
        optax.scale(-0.02),
    )
    free = run(tx, BATCH, 300, EACH)
    assert least <= apart(weighed, free) < most
    assert (free[1]["hidden_1/kernel"][-1] > 1.5 * weighed[1]["hidden_1/kernel"][-1]).all()


@pytest.mark.slow
def test_norm_schedule_is_a_learning_rate_schedule():
    def growth(step):
        return 1.01 ** step.astype(np.float64)

    longer = optax.chain(optax.scale(-0.1), norm_schedule(growth, Kernels(output=())))
    rates = optax.chain(optax.scale_by_schedule(lambda step: -0.1 / growth(step) ** 2), project(Kernels(output=())))
    scheduled, projected = (run(beside_head(hidden, optax.sgd(0.1)), LAYER, 50) for hidden in (longer, rates))
    assert apart(scheduled, projected) < 1e-12
    norm = scheduled[1]["hidden_0/kernel"]
    np.testing.assert_allclose(norm, norm[0] * 1.01 ** np.arange(50), rtol=1e-12)


@pytest.mark.slow
def test_weight_decay_before_a_projection_is_a_factor_of_the_learning_rate():
    tx = optax.chain(optax.add_decayed_weights(0.05), optax.scale(-0.3), project(Kernels(output=())))
    faster = optax.chain(optax.scale(-0.3 / (1 - 0.3 * 0.05)), project(Kernels(output=())))
    a, b = (run(beside_head(hidden, optax.sgd(0.3)), LAYER, 50) for hidden in (tx, faster))
    assert apart(a, b) < 1e-12


@pytest.mark.slow
def test_sign_steps_turn_by_the_first_power_of_the_norm():
    sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    free = run(optax.chain(sign, optax.scale(-0.01)), LAYER, 20)
    for rule, least, most in (("sign", 0, 1e-12), ("sgd", 1e-4, 1)):
        scaled = scale_by_weight_norm(free[1], WHOLE, correction="paper", rule=rule)
        assert (
            least <= apart(free, run(optax.chain(sign, scaled, optax.scale(-0.01), project(WHOLE)), LAYER, 20)) < most
        )


def test_equilibrium_norm_is_where_decayed_steps_stay():
    eta, decay, square = 0.5, 0.1, 0.3
    w = np.array([1.0, 0.0])
    for _ in range(2000):
        grad = np.sqrt(square) * np.array([-w[1], w[0]]) / (w @ w)  # orthogonal to w, of squared norm G / |w| ** 2
        w = (1 - eta * decay) * w - eta * grad
    with jax.enable_x64(True):
        assert abs(float(equilibrium_norm(eta, decay, square)) - np.sqrt(w @ w)) < 1e-12
        np.testing.assert_allclose(
            equilibrium_norm(eta, decay, square, first_order=True) ** 4, eta * square / (2 * decay)
        )


def test_effective_learning_rate_is_relative_to_the_reference():
    kernel = a_pair()[0]
    for rule, factor in (("sgd", 0.25), ("sign", 0.5)):
        found = effective_learning_rate({"kernel": 2 * kernel}, 0.1, rule=rule, reference=norms({"kernel": kernel}))
        np.testing.assert_allclose(found["kernel"], 0.1 * factor, rtol=1e-6)
    each = effective_learning_rate({"kernel": kernel}, 0.1, FEATURES)["kernel"]
    np.testing.assert_allclose(each, 0.1 / np.sum(kernel**2, 0), rtol=1e-6)


# Closed forms: what one update leaves of (kernel, update), written out in NumPy.


def size(w, axes=None):
    return np.sqrt(np.sum(w**2, axes, keepdims=True))


def by_blocks(w):
    return np.repeat(size(w.reshape(4, 2, 3), (0, 2)).reshape(1, 2), 3, 1)


RECORD = {"kernel": np.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], np.float32)}
ALL, FEATURES = Kernels(output=()), Kernels(output=(), field="... i")
FORMS = {
    "whole": (project(ALL), lambda p, u: (p + u) * size(p) / size(p + u)),
    "features": (project(FEATURES), lambda p, u: (p + u) * size(p, 0) / size(p + u, 0)),
    "blocks": (project(Kernels(output=(), field="... i o/2")), lambda p, u: (p + u) * by_blocks(p) / by_blocks(p + u)),
    "unit": (project(FEATURES, rho=1.0), lambda p, u: (p + u) / size(p + u, 0)),
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


@pytest.mark.parametrize("name", FORMS)
def test_update_leaves_the_closed_form(name):
    p, u = a_pair()
    tx, form = FORMS[name]
    np.testing.assert_allclose(one_step(tx, jnp.asarray(p), jnp.asarray(u)), form(p, u), rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("name", most({"exact"}))
def test_update_leaves_the_closed_form_in_float64_and_bfloat16(name):
    tx, form = FORMS[name]
    p, u = a_pair(dtype=np.float64)
    expected = form(p, u)
    with jax.enable_x64(True):
        np.testing.assert_allclose(one_step(tx, jnp.asarray(p), jnp.asarray(u)), expected, rtol=1e-12, atol=1e-12)
    after = one_step(tx, jnp.asarray(p, jnp.bfloat16), jnp.asarray(u, jnp.bfloat16))
    assert after.dtype == jnp.bfloat16
    np.testing.assert_allclose(after.astype(np.float32), expected, rtol=0.02, atol=0.06)


@pytest.mark.parametrize("name", most({"bounded", "exact"}))
def test_every_transformation_gives_the_closed_form_and_its_derivatives(name):
    tx, form = FORMS[name]
    p, u = a_pair()
    q = p[::-1].copy()

    @jax.jit
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
    turned = one_step(first, *(jnp.moveaxis(a, (3, 2), (0, 1)) for a in (p, u)))
    np.testing.assert_allclose(jnp.moveaxis(turned, (0, 1), (3, 2)), one_step(last, p, u), rtol=2e-6, atol=2e-6)


def test_zero_and_infinite_norms_let_the_update_pass():
    p, u = a_pair()
    p[:, 2] = 0  # a feature that starts at zero, seen under jit
    u[:, 3] = -p[:, 3]  # one that the step takes to zero
    u[:, 4] = np.inf
    after = jax.jit(functools.partial(one_step, project(FEATURES)))(p, u)
    np.testing.assert_array_equal(after[:, 2:5], (p + u)[:, 2:5])
    np.testing.assert_allclose(size(np.asarray(after[:, :2]), 0), size(p[:, :2], 0), rtol=1e-6)
    u[:, 4] = 1
    grad = jax.jit(jax.grad(lambda p: jnp.sum(one_step(project(FEATURES), p, u))))(p)
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
    new, _ = jax.jit(update, static_argnums=0)(tx, updates, state, params)
    after = jax.tree.map(np.add, params, new)
    free = jax.tree.map(np.add, params, updates)
    joint = np.sqrt(np.sum(free["norm"]["scale"] ** 2) + np.sum(free["norm"]["bias"] ** 2))
    for part in ("scale", "bias"):
        np.testing.assert_allclose(after["norm"][part], free["norm"][part] * 4 / joint, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(after["rms"]["scale"]), 6, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new["dense"], updates["dense"])
    only = start(project_affine("norm"), params)
    assert list(only.norms) == ["norm"]


def test_pull_is_the_gradient_of_its_penalty():
    random = np.random.default_rng(4)
    params = {"norm": {"scale": random.normal(size=5), "bias": random.normal(size=5)}, "dense": {"bias": np.ones(5)}}
    params = jax.tree.map(lambda p: p.astype(np.float32), params)
    tx = pull_affine(0.3)

    def penalty(params):
        norm = params["norm"]
        return 0.15 * (jnp.sum(jnp.square(norm["scale"] - 1)) + jnp.sum(jnp.square(norm["bias"])))

    found, _ = update(tx, jax.tree.map(jnp.zeros_like, params), start(tx, params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, jax.grad(penalty)(params))


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
    jax.tree.map(np.testing.assert_array_equal, found, optax.apply_updates(params, updates))
    np.testing.assert_allclose(norms(model, WHOLE)["hidden/kernel"], size(params["hidden"]["kernel"])[0, 0], rtol=1e-6)
    assert abs(norms(model)["head/kernel"] - norms(params)["head/kernel"]) > 1e-2


def test_boxed_and_sharded_kernels_are_projected_as_wholes():
    mesh = jax.make_mesh((8,), ("model",))
    p, u = a_pair((8, 16))
    spread = [jax.device_put(a, NamedSharding(mesh, P("model", None))) for a in (p, u)]
    for kernels in (ALL, FEATURES):
        step = jax.jit(functools.partial(one_step, project(kernels)))
        expected = step(p, u)
        np.testing.assert_allclose(step(*spread), expected, rtol=1e-6, atol=1e-6)
        reaching = Kernels(output=(), field=str(kernels.field).replace("i", "i@model"))
        mapped = jax.shard_map(
            functools.partial(one_step, project(reaching)), mesh=mesh, in_specs=P("model"), out_specs=P("model")
        )
        np.testing.assert_allclose(jax.jit(mapped)(*spread), expected, rtol=1e-6, atol=1e-6)
    boxed = {"kernel": nn.Partitioned(jnp.asarray(p), (None, "model"))}
    assert norms(boxed)["kernel"] == norms({"kernel": p})["kernel"]
    tx = project(ALL)
    updates, _ = update(tx, jax.tree.map(lambda _: u, boxed), start(tx, boxed), boxed)
    np.testing.assert_allclose(p + updates["kernel"].value, one_step(tx, p, u), rtol=1e-6, atol=1e-6)


def test_state_goes_through_optax():
    params = parameters(dtype=np.float32)
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
    jax.tree.map(np.testing.assert_array_equal, updates, params)


CHOICES = [
    (Kernels(output=()), {"a/kernel", "b/kernel", "b/c/kernel"}),
    (Kernels(output="b"), {"a/kernel"}),
    (Kernels(output=("a/*", "b/c")), {"b/kernel"}),
    (Kernels("b"), {"b/kernel", "b/c/kernel", "b/weight"}),
    (Kernels("*kernel", output="a"), {"b/kernel", "b/c/kernel"}),
    (Kernels(["a", "b/weight"]), {"a/kernel", "b/weight"}),
    (Kernels({"a": {"kernel": True, "bias": False}, "b": False}), {"a/kernel"}),
    (Kernels(lambda params: jax.tree.map(lambda p: p.ndim == 3, params)), {"b/c/kernel"}),
    (Kernels(layout="o i", field="i"), {"a/kernel", "b/kernel"}),
    (Kernels("a/bias", layout="c", field="c"), {"a/bias"}),
]


@pytest.mark.parametrize(("kernels", "expected"), CHOICES, ids=[str(i) for i in range(len(CHOICES))])
def test_patterns_and_masks_choose_parameters(kernels, expected):
    assert set(kernels.select(TREE, "a test")) == expected


TREE = {
    "a": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)},
    "b": {
        "kernel": np.ones((3, 3), np.float32),
        "weight": np.ones((3, 2), np.float32),
        "c": {"kernel": np.ones((2, 3, 2), np.float32)},
    },
}
LISTED = "The parameters are a/bias (3,), a/kernel (2, 3), b/c/kernel (2, 3, 2), b/kernel (3, 3), b/weight (3, 2)"
ZERO = {"kernel": np.zeros((2, 3), np.float32)}
SOME = {"kernel": np.array([[0, 1, 0], [0, 1, 1]], np.float32)}
WITHOUT = "cannot read off the parameters which kernel is the output layer's, which no normalizer follows: " \
    "Kernels(output='Dense_2') leaves it free, Kernels(output=()) takes it too"  # fmt: skip
MISTAKES = {
    "pattern": (
        lambda: project(Kernels("a/kernl")).init(TREE),
        f"project: 'a/kernl' matches no parameter; did you mean 'a/kernel'? {LISTED}",
    ),
    "output": (lambda: norms(TREE, Kernels(output="zzz")), f"norms: 'zzz' matches no parameter. {LISTED}"),
    "rank": (
        lambda: norms(TREE, Kernels("a/bias")),
        f"norms: 'a/bias' matches only what layout \"... i o\" does not fit. {LISTED}",
    ),
    "nothing": (
        lambda: bounded_norm(Kernels("a", output="a")).init(TREE),
        f"bounded_norm: no parameter is left to work on. {LISTED}",
    ),
    "mask_rank": (
        lambda: norms(TREE, Kernels({"a": True, "b": False})),
        "norms: layout \"... i o\" does not fit 'a/bias', which has shape (3,)",
    ),
    "mask": (lambda: norms(TREE, Kernels({"a": 1, "b": False})), "norms: a mask is made of booleans, found int"),
    "integers": (
        lambda: norms({"kernel": np.ones((2, 2), np.int32)}),
        "norms: the norm of 'kernel' is asked for, which has dtype int32",
    ),
    "window": (lambda: Kernels(field="i:3"), 'a norm is taken over whole axes and blocks; field "i:3" has a window'),
    "unsaid": (lambda: project(Kernels()), f"project {WITHOUT}"),
    "unsaid_schedule": (lambda: norm_schedule(lambda t: 1.0, Kernels()), f"norm_schedule {WITHOUT}"),
    "rho": (lambda: project(ALL, rho=0.0), "project: rho is 'initial', 'rms', 'mean' or a number above 0; found 0.0"),
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
    "rule": (lambda: effective_learning_rate(TREE, 0.1, rule="adam"), "rule is one of 'sgd', 'sign'; found 'adam'"),
    "reference": (
        lambda: effective_learning_rate(TREE, 0.1, Kernels("b"), reference={"a/kernel": 1.0}),
        "effective_learning_rate: norms of 'b/c/kernel' are not among those given: a/kernel",
    ),
    "affine": (
        lambda: project_affine().init(TREE),
        f"project_affine: nothing here is called 'scale', as a normalizer's factor is. {LISTED}",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    attempt, message = MISTAKES[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        attempt()
    assert str(caught.value) == message


# Random labels drawn anew (Lyle et al. 2024), as a reproduction on a CPU has them: an MLP 64-256-256-10 on 2,048 inputs.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def on_random_labels(tx, normalized, tasks, seed=0, steps=600, batch=128):
    """Training accuracy after each task; the norm of each hidden kernel over its first; which units are dead at last."""
    layer = Normalizer("c", "c")
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (2048, 64))
    sizes = {"hidden_0": (64, 256), "hidden_1": (256, 256), "head": (256, 10)}
    params = {
        name: {"kernel": jax.random.normal(key, size) * (2 / size[0]) ** 0.5, "bias": jnp.zeros(size[1])}
        for key, (name, size) in zip(keys[1:4], sizes.items(), strict=True)
    }

    def apply(params, x):
        for name in HIDDEN:
            x = x @ params[name]["kernel"] + params[name]["bias"][None]
            x = jax.nn.relu(normalize(x, layer, "n c").y if normalized else x)
        return x @ params["head"]["kernel"] + params["head"]["bias"][None], x

    def loss(params, index, labels):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x[index])[0], labels[index]).mean()

    def step(carry, index, labels):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, index, labels), state, params)
        return (optax.apply_updates(params, updates), state), None

    def task(carry, key):
        labels = jax.random.randint(key, (2048,), 0, 10)
        order = jax.random.randint(jax.random.fold_in(key, 1), (steps, batch), 0, 2048)
        carry, _ = jax.lax.scan(lambda carry, index: step(carry, index, labels), carry, order)
        out, units = apply(carry[0], x)
        return carry, (jnp.mean(jnp.argmax(out, 1) == labels), norms(carry[0]), jnp.mean(jnp.all(units == 0, 0)))

    first = norms(params)
    _, (accuracy, sizes, dead) = jax.lax.scan(task, (params, tx.init(params)), jax.random.split(keys[4], tasks))
    return accuracy, {name: sizes[name] / first[name] for name in sizes}, dead


@pytest.mark.slow
def test_norms_grow_on_ever_new_random_labels_unless_projected():
    with jax.numpy_dtype_promotion("standard"):  # optax.adam multiplies a count by a float
        free = on_random_labels(optax.adam(3e-3), True, 8)
        held = on_random_labels(optax.chain(optax.adam(3e-3), project(WHOLE)), True, 8)
        bare = on_random_labels(optax.adam(1e-3), False, 10)
    assert min(free[0].min(), held[0].min()) > 0.98
    assert (np.diff([1, *free[1]["hidden_1/kernel"]]) > 0).all()
    assert free[1]["hidden_1/kernel"][-1] > 2  # 5.5 after 30 tasks
    for name in HIDDEN:
        np.testing.assert_allclose(held[1][f"{name}/kernel"], 1, rtol=1e-5)
    assert bare[0][0] > 0.98
    assert bare[0][-1] < 0.6  # and at last a tenth, with all units dead
    assert bare[2][-1] > 0.3
