"""The norm of a kernel as a learning rate: exact equivalences in float64, and training as a paper has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from normjax import Normalizer, normalize
from normjax.projection import (
    Kernels,
    effective_learning_rates,
    equilibrium_norm,
    norm_schedule,
    norms,
    project,
    scale_by_weight_norm,
)
from tests.kernels import quickly

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


@functools.partial(quickly, static_argnums=(0, 1, 2, 3))
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
    assert apart(free, projected) < 1e-13
    for name, norm in projected[1].items():
        np.testing.assert_allclose(norm, norm[0], rtol=1e-14, err_msg=name)


@pytest.mark.parametrize(
    ("correction", "least", "most"), [("exact", 0, 1e-13), pytest.param("paper", 1e-4, 1, marks=pytest.mark.slow)]
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
    kernel = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    for rule, factor in (("sgd", 0.25), ("sign", 0.5)):
        found = effective_learning_rates({"kernel": 2 * kernel}, 0.1, rule=rule, reference=norms({"kernel": kernel}))
        np.testing.assert_allclose(found["kernel"], 0.1 * factor, rtol=1e-6)
    each = effective_learning_rates({"kernel": kernel}, 0.1, Kernels(field="... i"))["kernel"]
    np.testing.assert_allclose(each, 0.1 / np.sum(kernel**2, 0), rtol=1e-6)


# Random labels drawn anew (Lyle et al. 2024), as a reproduction on a CPU has them: an MLP 64-256-256-10, here on 512 inputs.


@functools.partial(quickly, static_argnums=(0, 1, 2))
def on_random_labels(tx, normalized, tasks, seed=0, steps=240, batch=64):
    """Training accuracy after each task; the norm of each hidden kernel over its first; which units are dead at last."""
    layer = Normalizer("c", "c")
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (512, 64))
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
        labels = jax.random.randint(key, (512,), 0, 10)
        order = jax.random.randint(jax.random.fold_in(key, 1), (steps, batch), 0, 512)
        carry, _ = jax.lax.scan(lambda carry, index: step(carry, index, labels), carry, order)
        out, units = apply(carry[0], x)
        return carry, (jnp.mean(jnp.argmax(out, 1) == labels), norms(carry[0]), jnp.mean(jnp.all(units == 0, 0)))

    first = norms(params)
    _, (accuracy, sizes, dead) = jax.lax.scan(task, (params, tx.init(params)), jax.random.split(keys[4], tasks))
    return accuracy, {name: sizes[name] / first[name] for name in sizes}, dead


@pytest.mark.slow
def test_norms_grow_on_ever_new_random_labels_unless_projected():
    with jax.numpy_dtype_promotion("standard"):  # optax.adam multiplies a count by a float
        free = on_random_labels(optax.adam(3e-3), True, 5)
        held = on_random_labels(optax.chain(optax.adam(3e-3), project(WHOLE)), True, 5)
    for accuracy in (free[0], held[0]):
        assert (accuracy > 0.99).all()
    assert (np.diff([1, *free[1]["hidden_1/kernel"]]) > 0).all()
    assert free[1]["hidden_1/kernel"][-1] > 1.5  # 1.6
    for name in HIDDEN:
        np.testing.assert_allclose(held[1][f"{name}/kernel"], 1, rtol=1e-5)


@pytest.mark.slow
def test_without_a_normalizer_ever_new_random_labels_kill_the_units():
    with jax.numpy_dtype_promotion("standard"):
        accuracy, _, dead = on_random_labels(optax.adam(3e-3), False, 15)
    assert accuracy[0] > 0.99
    assert accuracy[4] > 0.9  # 1.00
    assert accuracy[14] < 0.25  # 0.14, where 0.10 is chance
    assert dead[14] > 0.8  # 0.96
