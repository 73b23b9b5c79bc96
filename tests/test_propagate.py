"""Beliefs: what a kernel makes of means and variances, against integrals, NumPy float64 and samples."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from normjax import FieldError
from normjax.kalman import kalman_normalize
from normjax.propagate import Belief, Filtered, activate, join, linear, predict
from tests.beliefs import X, belief_of, blocks_of, close, draw, quick
from tests.refusals import refuses

STATES = [(0.0, 1.0), (1.5, 0.25), (-1.0, 4.0), (-4.0, 1.0), (6.0, 2.0), (100.0, 1e-4), (-50.0, 1.0), (0.3, 0.0)]


@pytest.mark.parametrize(
    ("activation", "f", "rtol"),
    [("relu", lambda z: np.maximum(z, 0), 2e-5), pytest.param(jnp.tanh, np.tanh, 2e-4, marks=pytest.mark.slow)],
    ids=["relu", "tanh"],
)
def test_activation_of_a_gaussian_has_the_moments_of_an_integral(activation, f, rtol):
    mean, var = np.array(STATES, np.float32).T
    z, dz = np.linspace(-12, 12, 200_001, retstep=True)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * dz
    values = f(mean[:, None].astype(float) + np.sqrt(var[:, None].astype(float)) * z)
    first = (values * density).sum(1)
    second = ((values - first[:, None]) ** 2 * density).sum(1)
    found = quick(functools.partial(activate, activation=activation))(Belief(jnp.asarray(mean), jnp.asarray(var)))
    close(found, Belief(first, second), rtol, 1e-7)


@pytest.mark.slow
def test_quadrature_of_a_kink_is_off_by_one_part_in_as_many_as_there_are_nodes():
    belief = Belief(jnp.linspace(-2, 2, 41), jnp.ones(41))
    found, exact = activate(belief, jax.nn.relu), activate(belief)
    assert max(np.abs(a - b).max() for a, b in zip(found, exact, strict=True)) < 1 / 64


@pytest.mark.slow
def test_derivatives_of_a_rectified_gaussian_are_finite_at_no_spread_and_far_from_the_kink():
    points = [(0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (1e20, 1.0), (-1e20, 1.0), (1.0, 1e-30), (0.0, 1e-12), (3.0, 1e30)]
    mean, var = jnp.asarray(np.array(points, np.float32).T)

    def total(mean, var):
        out = activate(Belief(mean, var))
        return jnp.sum(out.mean) + jnp.sum(out.var)

    gradient = jax.grad(total, (0, 1))
    first, second = quick(lambda *at: jax.jvp(gradient, at, tuple(jnp.ones_like(s) for s in at)))(mean, var)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((first, second)))
    assert [float(first[0][i]) for i in (1, 2, 3, 4)] == [1, 0, 1, 0]


GEOMETRIES = {
    "strided": ((6, 5), (3, 3), 2, "SAME", 1),
    "number": ((5, 4), (3, 3), 1, 1, 1),
    "even valid": ((5, 5), (2, 4), 1, "VALID", 1),
    "grouped pairs": ((3, 4), (3, 3), 1, [(2, 1), (0, 2)], 2),
    "beyond": ((2, 1), (5, 3), 1, "SAME", 1),
}


def numpy_geometry(x, w, stride, pads, groups):
    """A convolution in NumPy float64, output position by output position."""
    x, w = np.pad(np.asarray(x, np.float64), [(0, 0), *pads, (0, 0)]), np.asarray(w, np.float64)
    high, wide, inputs, outputs = w.shape
    each = outputs // groups
    rows = []
    for i in range(0, x.shape[1] - high + 1, stride):
        for j in range(0, x.shape[2] - wide + 1, stride):
            seen = x[:, i : i + high, j : j + wide]
            parts = [
                (seen[..., g * inputs : (g + 1) * inputs], w[..., g * each : (g + 1) * each]) for g in range(groups)
            ]
            rows.append([np.einsum("bhwi,hwio->bo", *part) for part in parts])
    return np.stack([np.concatenate(row, -1) for row in rows])


@pytest.mark.parametrize(
    "name", [name if name == "strided" else pytest.param(name, marks=pytest.mark.slow) for name in GEOMETRIES]
)
def test_prediction_through_a_kernel_is_that_of_maps_of_means_and_variances(name):
    size, window, stride, padding, groups = GEOMETRIES[name]
    w = jnp.asarray(draw(0, *window, 4 // groups, 6), jnp.float32)
    mean, var = (jnp.asarray(a, jnp.float32) for a in (draw(1, 3, 1, 1, 4), np.abs(draw(2, 3, 1, 1, 4))))
    state = Filtered(Belief(mean, var), Belief(mean, var))
    how = {"activation": None, "size": size, "strides": stride, "padding": padding, "groups": groups}
    found = quick(functools.partial(predict, **how))(state, w)
    pads = lax.padtype_to_pads(size, window, (stride, stride), padding) if isinstance(padding, str) else padding
    pads = [(1, 1), (1, 1)] if pads == 1 else pads
    means, variances = (numpy_geometry(np.broadcast_to(a, (3, *size, 4)), f, stride, pads, groups)
                        for a, f in ((mean, w), (var, np.square(w))))  # fmt: skip
    wanted = Belief(means.mean(0), variances.mean(0) + means.var(0))
    close(found, jax.tree.map(lambda s: s[:, None, None], wanted), 2e-5)


@pytest.mark.slow
def test_prediction_without_a_size_is_that_of_a_wide_map_and_a_bias_moves_its_mean_alone():
    state = Filtered(*[Belief(jnp.full((1, 1, 1, 2), 0.3), jnp.ones((1, 1, 1, 2)))] * 2)
    w = jnp.asarray(draw(0, 3, 3, 2, 3), jnp.float32)
    far = quick(predict)(state, w)
    bias = jnp.arange(3.0)
    wide, small = (quick(functools.partial(predict, size=size, bias=bias))(state, w) for size in ((5000, 5000), (4, 4)))
    close(wide, Belief(far.mean + bias.reshape(1, 1, 1, 3), far.var), 2e-3)
    assert np.abs(np.asarray(far.var) / np.asarray(small.var) - 1).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("size", [(6, 5), ()], ids=["convolution", "dense"])
def test_many_samples_are_the_analytic_prediction(size):
    mean, var = (jnp.asarray(a, jnp.float32).reshape(2, *(1,) * len(size), 3)
                 for a in (draw(0, 2, 3), np.abs(draw(1, 2, 3))))  # fmt: skip
    state = Filtered(Belief(mean + 9.0, var), Belief(mean, var))
    w = jnp.asarray(draw(2, *(3,) * len(size), 3, 4), jnp.float32)
    activation = "relu" if size else jnp.tanh
    analytic = functools.partial(predict, state, w, activation=activation, size=size)
    sampled = functools.partial(analytic, "monte_carlo", samples=1500 if size else 40_000)
    close(quick(lambda key: sampled(key=key))(jax.random.key(0)), quick(analytic)(), 0.05, 0.05)


@pytest.mark.slow
def test_released_transition_starts_from_what_has_not_been_normalized():
    far, near = (Belief(jnp.full((1, 3), m), jnp.full((1, 3), v)) for m, v in ((9.0, 4.0), (0.0, 1.0)))
    w = jnp.asarray(draw(2, 3, 2), jnp.float32)
    sampled = functools.partial(predict, Filtered(far, near), w, "released", samples=40_000)
    close(quick(lambda key: sampled(key=key))(jax.random.key(0)), quick(predict)(Filtered(near, far), w), 0.05, 0.05)


@pytest.mark.slow
def test_released_transition_of_a_layer_row_gives_its_one_number_to_every_channel():
    state = kalman_normalize(X, normalizer="layer").filtered
    each = state._replace(input=Belief(*(jnp.broadcast_to(s, (4, 1, 1, 6)) for s in state.input)))
    w = jnp.asarray(draw(0, 3, 3, 6, 2), jnp.float32)
    step = quick(functools.partial(predict, transition="released", size=(3, 2), key=jax.random.key(0)))
    assert state.input.mean.shape == (4, 1, 1, 1)
    close(step(state, w), step(each, w))


@pytest.mark.slow
def test_prediction_of_bfloat16_beliefs_and_in_another_layout_is_the_same():
    state = jax.tree.map(lambda s: s.astype(jnp.bfloat16), kalman_normalize(X, normalizer=blocks_of(2)).filtered)
    w = jnp.asarray(draw(0, 3, 3, 6, 2), jnp.float32)
    wanted = predict(jax.tree.map(lambda s: s.astype(np.float32), state), w)
    first = predict(jax.tree.map(lambda s: jnp.moveaxis(s, -1, 1), state), w, layout="n c ...")
    close(predict(state, w), wanted)
    sampled = functools.partial(predict, kernel=w, transition="monte_carlo", size=(3, 2), key=jax.random.key(0))
    close(sampled(state), sampled(jax.tree.map(lambda s: s.astype(np.float32), state)))
    close(jax.tree.map(lambda s: jnp.moveaxis(s, 1, -1), first), wanted)


def test_linear_transition_and_sum_move_mean_and_variance():
    belief = belief_of()
    out = linear(belief, jnp.full(6, 2.0), 0.5, jnp.arange(6.0))
    close(out, Belief(2 * belief.mean + 0.5, 4 * belief.var + jnp.arange(6.0).reshape(1, 1, 1, 6)))
    close(join(belief, out), Belief(belief.mean + out.mean, belief.var + out.var))


STATE = Filtered(*[belief_of((np.zeros(6), np.ones(6)))] * 2)
KERNEL = jnp.ones((3, 3, 6, 2))
KEY = jax.random.key(0)
MAP = Belief(jnp.ones((1, 2, 1, 6)), jnp.ones((1, 2, 1, 6)))
REFUSED = [
    (lambda: predict(cast(Any, STATE.input), KERNEL), TypeError,
     "predict takes the Filtered that a layer returned, found Belief"),
    (lambda: join(STATE.input, cast(Any, STATE)), TypeError,
     "join takes beliefs, such as the `input` of a layer's Filtered; found Filtered"),
    (lambda: predict(STATE, jnp.ones((3, 3, 5, 2))), FieldError,
     "a kernel has the axes (*space, inputs / groups, outputs); found shape (3, 3, 5, 2), groups 1, for a belief of 6 "
     "channels"),
    (lambda: predict(STATE, KERNEL, size=(3,)), FieldError,
     "size and strides have one number for each of the kernel's 2 axes of space; found (3,) and (1, 1)"),
    (lambda: predict(STATE, KERNEL, size=(3, 3), padding=[1]), FieldError,
     "padding has one number or pair for each of the kernel's 2 axes of space; found [1]"),
    (lambda: predict(STATE, KERNEL, size=(2, 3), padding="VALID"), FieldError,
     "a kernel of window (3, 3) does not fit into size (2, 3) with padding ((0, 0), (0, 0))"),
    (lambda: predict(STATE, KERNEL, bias=jnp.ones(3)), FieldError,
     "a layer's bias has shape (2,), that of its outputs; found (3,)"),
    (lambda: predict(STATE, KERNEL, "mc"), ValueError,
     "transition is one of 'analytic', 'monte_carlo', 'released'; found 'mc'"),
    (lambda: predict(STATE, KERNEL, "released", size=(3, 3)), ValueError,
     "transition='released' draws a sample and needs a key"),
    (lambda: predict(STATE, KERNEL, "monte_carlo", key=KEY), ValueError,
     "a sample needs the size of the array in space: size=(height, width)"),
    (lambda: predict(STATE, jnp.ones((6, 2)), "monte_carlo", key=KEY), ValueError,
     "the variance of a single number is 0: give samples of at least 2"),
    (lambda: predict(STATE, KERNEL, padding="CIRCULAR", size=(3, 3)), ValueError,
     "padding is one of 'SAME', 'VALID'; found 'CIRCULAR'"),
    (lambda: predict(STATE, KERNEL, activation="gelu"), ValueError,
     "activation is one of 'relu', None; found 'gelu'"),
    (lambda: predict(Filtered(MAP, MAP), KERNEL), FieldError,
     'a belief varies along n and c alone; found shape (1, 2, 1, 6), layout "n ... c"'),
]  # fmt: skip


def test_refusal_names_what_was_found_and_what_is_accepted():
    for case in REFUSED:
        refuses(*case)
