"""Kalman normalization against NumPy float64 written from its formulas, and against what it is for: better estimates."""

import functools
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from normjax import Field, FieldError, Normalizer, Span, Stats, normalize, running
from normjax.belief import Belief, Filtered, activate, join, linear, predict
from normjax.kalman import kalman_normalize, logit, update
from normjax.linen.kalman import KalmanNorm
from normjax.nnx.kalman import KalmanNorm as NNXKalmanNorm
from normjax.nnx.norms import Moments

pytestmark = pytest.mark.slow  # together they would take the default tier past its five minutes

EPS = 1e-5
BATCH = Normalizer("n ...", "n ...")


# Compiled without XLA's optimizer, which is most of the time of these tests.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def blocks_of(count):
    return Normalizer(f"n/{count} ...", f"n/{count} ...")


def close(found, wanted, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, wanted)


def draw(seed, *shape, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, shape)


def conv(x, w, stride=1, padding="SAME", groups=1):
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=names, feature_group_count=groups, precision="highest"
    )


# The published code, in NumPy: `splits` blocks of examples as more channels, fixed p = 1 - q, one sample of the state.


def numpy_conv(x, w):
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    h, v = x.shape[1:3]
    return sum(padded[:, i : i + h, j : j + v] @ w[i, j] for i in range(3) for j in range(3))


def split(x, splits):
    return np.concatenate(np.split(x, splits, 0), -1)


def merge(x, splits):
    return np.concatenate(np.split(x, splits, -1), 0)


def numpy_kalman(x, prior, gamma, beta, splits, p):
    folded = split(x, splits)
    m, v = folded.mean((0, 1, 2)), folded.var((0, 1, 2))
    if prior is None:
        used, count = v, np.prod(folded.shape[:3])
        v = v * count / (count - 1)  # the fused operation hands on the unbiased variance and divides by the biased one
    else:
        before, v_before = prior
        if np.mean(v_before / v) < 100:
            m, v = p * before + (1 - p) * m, p * v_before + (1 - p) * v + p * (1 - p) * (m - before) ** 2
        used = v
    y = (folded - m) / np.sqrt(used + EPS) * np.tile(gamma, splits) + np.tile(beta, splits)
    return merge(y, splits), (m, v)


def numpy_sample(state, noise, w):
    splits = len(noise)
    m, v = state
    drawn = np.maximum(split(noise, splits) * np.sqrt(v) + m, 0)
    folded = split(numpy_conv(merge(drawn, splits), w), splits)
    return folded.mean((0, 1, 2)), folded.var((0, 1, 2))


def numpy_block(p, noise, splits):
    y, state = numpy_kalman(p["x"], None, p["g0"], p["b0"], splits, 0.9)
    skip = np.maximum(y, 0)
    inner, filtered = numpy_kalman(
        numpy_conv(skip, p["w1"]), numpy_sample(state, noise[0], p["w1"]), p["g1"], p["b1"], splits, 0.9
    )
    m3, v3 = numpy_sample(filtered, noise[1], p["w2"])
    total = skip + numpy_conv(np.maximum(inner, 0), p["w2"])
    return numpy_kalman(total, (state[0] + m3, state[1] + v3), p["g2"], p["b2"], splits, 0.9)


def released_block(p, keys, splits):
    """The same with normjax: the published code's transition, guard, first variance, and skip connection."""
    norm = functools.partial(kalman_normalize, normalizer=blocks_of(splits), gain=0.1, guard=100, unbiased=True)
    step = functools.partial(predict, transition="released", size=p["x"].shape[1:3])
    first = norm(p["x"], None, scale=p["g0"], bias=p["b0"])
    skip = jax.nn.relu(first.y)
    prior = step(first.filtered, p["w1"], key=keys[0])
    inner = norm(conv(skip, p["w1"]), prior, scale=p["g1"], bias=p["b1"])
    branch = step(inner.filtered, p["w2"], key=keys[1])
    total = skip + conv(jax.nn.relu(inner.y), p["w2"])
    last = norm(total, join(first.filtered.input, branch), scale=p["g2"], bias=p["b2"])
    return last.y, last.filtered.input


def test_published_block_and_its_gradient_match_numpy_float64():
    splits, shape = 2, (4, 3, 4, 2)
    p = {
        "x": draw(0, *shape, scale=2, shift=0.5),
        "w1": draw(1, 3, 3, 2, 2, scale=0.4),
        "w2": draw(2, 3, 3, 2, 2, scale=0.4),
    }
    p |= {f"g{i}": np.abs(draw(3 + i, 2, shift=1, scale=0.2)) for i in range(3)}
    p |= {f"b{i}": draw(6 + i, 2, scale=0.3) for i in range(3)}
    dy = draw(9, *shape)

    def loss(y, m, v):
        return (y * dy).sum() + m.sum() + 0.5 * v.sum()

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 2)
        noise = [np.asarray(jax.random.normal(k, (splits, *shape[1:]), np.float64)) for k in keys]

        def ours(p):
            y, belief = released_block(p, keys, splits)
            return loss(y, belief.mean, belief.var), (y, belief)

        (_, (y, belief)), grads = quick(jax.value_and_grad(ours, has_aux=True))(jax.tree.map(jnp.asarray, p))
    wanted, (m, v) = numpy_block(p, noise, splits)
    close(y, wanted, 1e-9, 1e-9)
    close((belief.mean.ravel(), belief.var.ravel()), (m, v), 1e-9, 1e-9)
    for name, value in p.items():
        slope = np.zeros(value.size)
        for i in range(value.size):
            for sign in (-1, 1):
                moved = value.copy()
                moved.flat[i] += sign * 1e-6
                y, (m, v) = numpy_block({**p, name: moved}, noise, splits)
                slope[i] += sign * loss(y, m, v) / 2e-6
        close(grads[name].ravel(), slope, 1e-5, 1e-6)


def test_update_is_the_moments_of_both_samples_together():
    a, b = draw(0, 30, 3), draw(1, 10, 3, scale=2, shift=1)
    both = np.concatenate([a, b])
    prior, batch = (Belief(*(jnp.asarray(s, jnp.float32) for s in (x.mean(0), x.var(0)))) for x in (a, b))
    close(update(prior, batch, 0.25), Belief(both.mean(0), both.var(0)))
    close(update(prior, batch, 0.0), prior)
    close(update(prior, batch, 1.0), batch)


# Prediction.

STATES = [(0.0, 1.0), (1.5, 0.25), (-1.0, 4.0), (-4.0, 1.0), (6.0, 2.0), (100.0, 1e-4), (-50.0, 1.0), (0.3, 0.0)]


@pytest.mark.parametrize(
    ("activation", "f", "rtol"), [("relu", lambda z: np.maximum(z, 0), 2e-5), (jnp.tanh, np.tanh, 2e-4)]
)
def test_activation_of_a_gaussian_has_the_moments_of_an_integral(activation, f, rtol):
    mean, var = np.array(STATES, np.float32).T
    z, dz = np.linspace(-12, 12, 200_001, retstep=True)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * dz
    values = f(mean[:, None].astype(float) + np.sqrt(var[:, None].astype(float)) * z)
    first = (values * density).sum(1)
    second = ((values - first[:, None]) ** 2 * density).sum(1)
    close(activate(Belief(jnp.asarray(mean), jnp.asarray(var)), activation), Belief(first, second), rtol, 1e-7)


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
    "same": ((5, 4), (3, 3), 1, "SAME", 1),
    "strided": ((6, 5), (3, 3), 2, "SAME", 1),
    "even": ((4, 4), (2, 4), 1, "SAME", 1),
    "valid": ((5, 5), (3, 2), 1, "VALID", 1),
    "pairs": ((3, 4), (3, 3), 1, [(2, 1), (0, 2)], 1),
    "grouped": ((4, 4), (3, 3), 2, "SAME", 2),
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
    "name",
    [pytest.param(k, marks=() if k in ("strided", "pairs", "grouped") else pytest.mark.slow) for k in GEOMETRIES],
)
def test_prediction_through_a_kernel_is_that_of_maps_of_means_and_variances(name):
    size, window, stride, padding, groups = GEOMETRIES[name]
    w = jnp.asarray(draw(0, *window, 4 // groups, 6), jnp.float32)
    mean, var = (jnp.asarray(a, jnp.float32) for a in (draw(1, 3, 1, 1, 4), np.abs(draw(2, 3, 1, 1, 4))))
    state = Filtered(Belief(mean, var), Belief(mean, var))
    how = {"activation": None, "size": size, "strides": stride, "padding": padding, "groups": groups}
    found = quick(functools.partial(predict, **how))(state, w)
    pads = lax.padtype_to_pads(size, window, (stride, stride), padding) if isinstance(padding, str) else padding
    means, variances = (numpy_geometry(np.broadcast_to(a, (3, *size, 4)), f, stride, pads, groups)
                        for a, f in ((mean, w), (var, np.square(w))))  # fmt: skip
    wanted = Belief(means.mean(0), variances.mean(0) + means.var(0))
    close(found, jax.tree.map(lambda s: s[:, None, None], wanted), 2e-5)


def test_prediction_without_a_size_is_that_of_a_wide_map_and_a_bias_moves_its_mean_alone():
    state = Filtered(*[Belief(jnp.full((1, 1, 1, 2), 0.3), jnp.ones((1, 1, 1, 2)))] * 2)
    w = jnp.asarray(draw(0, 3, 3, 2, 3), jnp.float32)
    far = quick(predict)(state, w)
    bias = jnp.arange(3.0)
    wide, small = (quick(functools.partial(predict, size=size, bias=bias))(state, w) for size in ((5000, 5000), (4, 4)))
    close(wide, Belief(far.mean + bias.reshape(1, 1, 1, 3), far.var), 2e-3)
    assert np.abs(np.asarray(far.var) / np.asarray(small.var) - 1).max() > 0.05


@pytest.mark.parametrize("size", [pytest.param((6, 5), marks=pytest.mark.slow), ()], ids=["convolution", "dense"])
def test_many_samples_are_the_analytic_prediction(size):
    mean, var = (jnp.asarray(a, jnp.float32).reshape(2, *(1,) * len(size), 3)
                 for a in (draw(0, 2, 3), np.abs(draw(1, 2, 3))))  # fmt: skip
    state = Filtered(Belief(mean + 9.0, var), Belief(mean, var))
    w = jnp.asarray(draw(2, *(3,) * len(size), 3, 4), jnp.float32)
    activation = "relu" if size else jnp.tanh
    analytic = functools.partial(predict, state, w, activation=activation, size=size)
    sampled = functools.partial(analytic, "monte_carlo", samples=1500 if size else 40_000)
    close(quick(lambda key: sampled(key=key))(jax.random.key(0)), quick(analytic)(), 0.05, 0.05)


def test_released_transition_starts_from_what_has_not_been_normalized():
    far, near = (Belief(jnp.full((1, 3), m), jnp.full((1, 3), v)) for m, v in ((9.0, 4.0), (0.0, 1.0)))
    w = jnp.asarray(draw(2, 3, 2), jnp.float32)
    sampled = functools.partial(predict, Filtered(far, near), w, "released", samples=40_000)
    close(quick(lambda key: sampled(key=key))(jax.random.key(0)), quick(predict)(Filtered(near, far), w), 0.05, 0.05)


def test_output_is_believed_to_have_the_moments_of_the_affine_but_a_constant_channel_has_no_spread():
    x = jnp.asarray(draw(0, 6, 5, 2) * [1.0, 0.0], jnp.float32)
    out = quick(functools.partial(kalman_normalize, scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.5, -1.0])))(x)
    close(out.filtered.output, Belief(np.array([[[0.5, -1.0]]]), np.array([[[4.0, 0.0]]])), 1e-4)
    close(out.filtered.output.var[0, 0, 0], np.var(np.asarray(out.y[..., 0])), 1e-4)


# What it is for.


def test_two_samples_and_a_prediction_tell_the_variance_better_than_two_samples():
    w = jnp.asarray(draw(0, 12, 16, scale=0.4), jnp.float32)
    state = Filtered(*[Belief(jnp.zeros((1, 12)), jnp.ones((1, 12)))] * 2)
    prior = quick(predict)(state, w)
    z = jnp.asarray(draw(1, 20_000, 12), jnp.float32)
    truth = np.var(np.asarray(jax.nn.relu(z) @ w), 0)
    x = (jax.nn.relu(z) @ w).reshape(10_000, 2, 16)
    out = quick(jax.vmap(lambda x: kalman_normalize(x, prior, gain=0.1)))(x)
    plain, mixed = (np.mean((np.asarray(v)[:, 0] / truth - 1) ** 2) for v in (out.stats.var, out.filtered.input.var))
    assert mixed < 0.05 < 0.5 < plain


def residual_network(x, key, transition, units=3, gain=0.1):
    """A pre-activation ResNet at its first weights: the mean over channels of predicted / batch variance at each prior.

    Also the variance of each layer's output, mean over channels.
    """
    keys, released = iter(jax.random.split(key, 99)), transition == "released"
    norm = functools.partial(kalman_normalize, gain=gain, guard=100 if released else None, unbiased=released)
    ratios, spreads = [], []

    def layer(x, prior):
        out = norm(x, prior)
        ratios.append(jnp.mean(prior.var / out.stats.var))
        spreads.append(jnp.mean(jnp.var(out.y, (0, 1, 2))))
        return jax.nn.relu(out.y), out.filtered

    def through(h, state, width, stride=1):
        w = jax.random.normal(next(keys), (3, 3, h.shape[-1], width)) * np.float32(np.sqrt(2 / (9 * width)))
        prior = predict(state, w, transition, size=h.shape[1:3], strides=stride, key=next(keys))
        return conv(h, w, stride), prior

    def widen(s):
        return jnp.pad(s, [(0, 0)] * 3 + [(s.shape[-1] // 2,) * 2])

    stem = jax.random.normal(next(keys), (3, 3, 3, 16)) * np.float32(np.sqrt(2 / (9 * 16)))
    first = norm(conv(x, stem))
    h = skip = jax.nn.relu(first.y)
    state = first.filtered
    belief = state.input if released else activate(state.output)
    for unit in range(3 * units):
        stride = 2 if unit and unit % units == 0 else 1
        if unit:
            h, state = layer(skip, belief)
        c, prior = through(h, state, h.shape[-1] * stride, stride)
        h, state = layer(c, prior)
        c, prior = through(h, state, h.shape[-1])
        if stride == 2:
            skip = widen(lax.reduce_window(skip, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4)
            belief = jax.tree.map(widen, belief)
        skip, belief = skip + c, join(belief, prior)
    layer(skip, belief)
    return np.array(jnp.stack(ratios)), np.array(jnp.stack(spreads))


@pytest.mark.slow
def test_published_transition_drifts_in_a_residual_network_and_the_analytic_one_does_not():
    # Smooth as images are: pooling keeps the variance of the skip connection's belief.
    x = jax.image.resize(jax.random.normal(jax.random.key(5), (8, 8, 8, 3)), (8, 32, 32, 3), "cubic")
    ratio, spread = residual_network(x, jax.random.key(0), "analytic")
    assert len(ratio) == 18
    assert 0.6 < ratio.min() < ratio.max() < 1.26
    assert 0.6 < spread.min() < spread.max() < 1.5
    ratio, spread = residual_network(x, jax.random.key(0), "released")  # published: 0.21 to 22, and 3.2 to 0.08
    assert ratio.min() < 0.3 < 10 < ratio.max()
    assert spread[:3].max() > 2.4
    assert spread.min() < 0.15


# Normalization with a prior.


def expected(x, prior, q, mask=None, count=1, group=1):
    """NumPy float64, channels last: y, mean and var of each block of examples or each group of channels."""
    x, w = np.asarray(x, np.float64), np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape).astype(float)
    y = np.zeros(x.shape)
    found = []
    for rows in np.split(np.arange(len(x)), count):
        m = np.zeros((2, x.shape[-1]))
        for columns in np.split(np.arange(x.shape[-1]), x.shape[-1] // group):
            at = np.ix_(rows, *map(np.arange, x.shape[1:-1]), columns)
            axes = None if group > 1 else tuple(range(x.ndim - 1))
            part, weight = np.where(w[at] > 0, x[at], 0), w[at]
            total = weight.sum(axes)
            m[0, columns] = (part * weight).sum(axes) / total
            m[1, columns] = ((part - m[0, columns]) ** 2 * weight).sum(axes) / total
            p, s = prior[0][columns], prior[1][columns]
            if group > 1:
                p, s = p.mean(), (s + (p - p.mean()) ** 2).mean()
            apart = m[0, columns] - p
            m[:, columns] = p + q * apart, s + q * (m[1, columns] - s) + q * (1 - q) * apart**2
        found.append(m)
        y[rows] = np.where(w[rows] > 0, (x[rows] - m[0]) / np.sqrt(m[1] + EPS), 0)
    return y, np.stack(found, 1)


X = draw(10, 4, 3, 2, 6, scale=1.5, shift=0.4).astype(np.float32)
PRIOR = (draw(11, 6), np.abs(draw(12, 6, shift=1)))
MASK = draw(13, 4, 3, 2, 1) > -0.8
MASK[0] = True
BEHIND = np.where(MASK, X, np.nan)
ROWS = {"batch": (BATCH, 1, 1), "blocks": (blocks_of(2), 2, 1), "group": (Normalizer("... c/2", "... c/2"), 4, 3),
        "layer": (Normalizer("... c", "... c"), 4, 6)}  # fmt: skip


def belief_like(layout, prior=PRIOR):
    shape = (1, 6, 1, 1) if layout == "n c ..." else (1, 1, 1, 6)
    return Belief(*(jnp.asarray(s, jnp.float32).reshape(shape) for s in prior))


CASES = [(name, layout, True) for name in ROWS for layout in ("n ... c", "n c ...")]
CASES += [("batch", "n h w c", False), ("group", "n ... c", False)]


@pytest.mark.parametrize(("name", "layout", "masked"), CASES)
def test_normalization_with_a_prior_matches_numpy_float64(name, layout, masked):
    n, count, group = ROWS[name]

    def turn(x):
        return np.moveaxis(x, -1, 1) if layout == "n c ..." else x

    if layout == "n h w c":
        n = Normalizer(*[str(n.mean).replace("...", "h w")] * 2)
    mask = turn(MASK) if masked else None
    out = quick(lambda x, prior: kalman_normalize(x, prior, n, layout, gain=0.3, mask=mask))(
        turn(BEHIND if masked else X), belief_like(layout)
    )
    y, (mean, var) = expected(X, PRIOR, 0.3, MASK if masked else None, count, group)
    close(out.y, turn(y), 1e-4, 1e-5)
    for s, wanted in zip(out.filtered.input, (mean, var), strict=True):
        s = np.moveaxis(s, 1, -1) if layout == "n c ..." else s
        close(np.broadcast_to(s, (count, 1, 1, 6)).reshape(count, 6), wanted, 1e-5, 1e-5)


def test_without_a_prior_it_is_plain_normalization_and_a_prior_of_full_gain_too():
    for prior in (None, belief_like("n ... c")):
        out = quick(functools.partial(kalman_normalize, gain=1.0, scale=2.0))(X, prior)
        close(out.y, quick(lambda x: normalize(x, "batch", scale=2.0).y)(X), 1e-5, 1e-5)


def test_prior_of_each_example_is_pooled_where_examples_share_statistics():
    each = tuple(draw(20 + i, 4, 6) ** 2 for i in range(2))
    prior = Belief(*(jnp.asarray(s, jnp.float32).reshape(4, 1, 1, 6) for s in each))
    pooled = each[0].mean(0), (each[1] + (each[0] - each[0].mean(0)) ** 2).mean(0)
    close(kalman_normalize(X, prior).filtered.input, kalman_normalize(X, belief_like("", pooled)).filtered.input)
    scale = jnp.asarray(draw(22, 4, 6), jnp.float32)  # a factor for each example: beliefs of each
    out = kalman_normalize(X, scale=scale).filtered
    close(out.output.var, scale.reshape(4, 1, 1, 6) ** 2, 1e-3)
    assert out.input.var.shape == (1, 1, 1, 6)


def test_where_all_is_masked_the_prior_stands_and_nothing_is_nan():
    mask = np.ones((1, 1, 1, 6), bool)
    mask[..., 0] = False

    def loss(x, prior):
        out = kalman_normalize(x, prior, mask=mask, guard=1e3, scale=2.0, bias=0.5)
        return jnp.sum(jnp.sin(out.y)), (out.y, out.filtered)

    x = np.where(mask, X, np.nan)
    grads, (y, filtered) = quick(jax.grad(loss, (0, 1), has_aux=True))(x, belief_like(""))
    close(y[..., 0], np.full((4, 3, 2), 0.5))
    close([s[..., 0].item() for s in filtered.input], [PRIOR[0][0], PRIOR[1][0]])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not np.any(grads[0][..., 0])


def test_guard_takes_the_batch_alone_where_the_prior_is_a_hundred_times_too_wide():
    var, guarded = np.var(X, (0, 1, 2)), quick(functools.partial(kalman_normalize, guard=100))
    for factor, same in ((99.0, False), (101.0, True)):
        prior = Belief(jnp.zeros((1, 1, 1, 6)), jnp.asarray(factor * var).reshape(1, 1, 1, 6))
        out = guarded(X, prior)
        assert np.allclose(out.filtered.input.var.ravel(), var, rtol=1e-4) == same
        assert not np.allclose(quick(kalman_normalize)(X, prior).filtered.input.var.ravel(), var, rtol=1e-4)
    constant = jnp.ones((4, 2))
    out = guarded(constant, Belief(jnp.zeros((1, 2)), jnp.ones((1, 2))))
    close(out.filtered.input, Belief(np.ones((1, 2)), np.zeros((1, 2))))


@pytest.mark.parametrize("name", ["batch", pytest.param("group", marks=pytest.mark.slow)])
def test_mapped_examples_and_shards_have_the_statistics_of_the_whole(name):
    whole = quick(lambda x, m: kalman_normalize(x, belief_like(""), ROWS[name][0], mask=m))(X, MASK)
    field = "@n ..." if name == "batch" else "... c/2"
    example = Belief(*(s[0] for s in belief_like("")))

    def one(x, mask):
        return kalman_normalize(x, example, Normalizer(field, field), "... c", mask=mask)

    mapped = quick(jax.vmap(one, axis_name="n"))(X, MASK)
    close(mapped.y, whole.y, 1e-4, 1e-5)
    n = ROWS[name][0] if name == "group" else Normalizer("n@data ...", "n@data ...")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    shard = jax.shard_map(lambda x, m: kalman_normalize(x, belief_like(""), n, mask=m).y, mesh=mesh, in_specs=rows,
                          out_specs=rows)  # fmt: skip
    close(quick(shard)(X, MASK), whole.y, 1e-4, 1e-5)


# Transformations.


def two_layers(z, mask=None, n=BATCH):
    """A layer, the prediction through a kernel, and the next layer: a function of a dictionary of arrays."""
    first = kalman_normalize(z["x"], None, n, mask=mask, scale=z["scale"], bias=z["bias"])
    w = z["w"].astype(first.y.dtype)
    if w.ndim == 2:
        prior, y = predict(first.filtered, w), jnp.einsum("...i,io->...o", jax.nn.relu(first.y), w)
    else:
        prior, y = predict(first.filtered, w, size=(3, 2)), conv(jax.nn.relu(first.y), w)
    return kalman_normalize(y, prior, n, gain=jax.nn.sigmoid(z["logit"]), mask=mask)


def point(seed=0, dtype: type = np.float32):
    x, w, scale, bias = (
        draw(seed, 4, 3, 2, 3),
        draw(1, 3, 3, 3, 3),
        draw(2, 3, shift=1, scale=0.2),
        draw(3, 3, scale=0.3),
    )
    z = {"x": x, "w": w, "scale": scale, "bias": bias, "logit": np.float64(-1.0)}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), z)


def curved(z, mask=None, n=BATCH):
    out = two_layers(z, mask, n)
    return jnp.sum(jnp.sin(out.y + 1)) + jnp.sum(lax.square(out.filtered.input.var))


def test_derivative_is_that_of_differences():
    with jax.enable_x64(True):
        z, dz = point(0, np.float64), point(7, np.float64)
        z["w"], dz["w"] = z["w"][1, 1], dz["w"][0, 1]
        f = quick(lambda t: curved(jax.tree.map(lambda a, b: a + t * b, z, dz), MASK))
        gradient = quick(jax.value_and_grad(lambda z: curved(z, MASK)))(z)[1]
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(a, b), gradient, dz)))
        close(slope, (float(f(1e-5)) - float(f(-1e-5))) / 2e-5, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["masked", "batch", "blocks"])
def test_derivatives_of_every_kind_agree_with_differences(row):
    n = blocks_of(2) if row == "blocks" else BATCH
    mask = MASK if row == "masked" else None
    with jax.enable_x64(True):
        z, dz = point(0, np.float64), point(7, np.float64)
        z["w"], dz["w"] = z["w"][1, 1], dz["w"][0, 1]
        f = functools.partial(curved, mask=mask, n=n)

        @quick
        def all_of(z, dz):
            slope = jax.jvp(f, (z,), (dz,))[1]
            grad = jax.grad(f)(z)
            again = jax.grad(jax.checkpoint(f))(z)
            forward = jax.jvp(jax.grad(f), (z,), (dz,))[1]
            reverse = jax.grad(lambda z: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(f)(z), dz))))(z)
            return f(z), slope, grad, again, forward, reverse

        def moved(by):
            return all_of(jax.tree.map(lambda a, b: a + by * b, z, dz), dz)

        at, ahead, behind = jax.tree.map(np.asarray, (all_of(z, dz), moved(1e-5), moved(-1e-5)))
    _, slope, grad, again, forward, reverse = at
    close(slope, (ahead[0] - behind[0]) / 2e-5, 1e-6)
    close(sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(a, b), grad, dz))), slope, 1e-9)
    close(again, grad, 1e-9, 1e-9)
    close(forward, jax.tree.map(lambda a, b: (a - b) / 2e-5, ahead[2], behind[2]), 1e-4, 1e-4)
    close(reverse, forward, 1e-7, 1e-7)


def test_jit_vmap_and_half_precision_give_the_same():
    z, other = point(0), point(5)
    for p in (z, other):
        p["w"] = p["w"][1, 1]
    layers = quick(two_layers)
    wanted = [layers(z), layers(other)]
    both = jax.tree.map(lambda *a: jnp.stack(a), z, other)
    mapped = quick(jax.vmap(two_layers))(both)
    close(mapped.y, jnp.stack([w.y for w in wanted]), 1e-4, 1e-5)
    close(mapped.filtered, jax.tree.map(lambda *a: jnp.stack(a), *(w.filtered for w in wanted)), 1e-4, 1e-5)
    half = layers(jax.tree.map(lambda a: a.astype(jnp.bfloat16), z))
    assert half.y.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(half.filtered))
    close(half.y.astype(jnp.float32), wanted[0].y, 0.1, 0.1)
    assert wanted[0].y.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = layers(jax.tree.map(lambda a: a.astype(np.float64), z))
        assert {s.dtype for s in jax.tree.leaves((wide.y, wide.filtered))} == {np.dtype(np.float64)}
        close(wide.y, wanted[0].y, 1e-4, 1e-5)


def test_belief_is_the_carry_of_a_scan_over_layers():
    kernels = jnp.asarray(draw(4, 3, 3, 3, 3, 3), jnp.float32)

    def layer(carry, w):
        x, state = carry
        prior = predict(state, w, size=(3, 2))
        out = kalman_normalize(conv(jax.nn.relu(x), w), prior)
        return (out.y, out.filtered), out.filtered.input.var

    start = quick(kalman_normalize)(point()["x"])
    carry, _ = quick(lambda k: lax.scan(layer, (start.y, start.filtered), k))(kernels)
    looped, one = (start.y, start.filtered), quick(layer)
    for w in kernels:
        looped, _ = one(looped, w)
    close(carry, looped, 1e-4, 1e-4)


# Layers.


class Stack(nn.Module):
    """Two layers with everything learned."""

    average: bool = False

    @nn.compact
    def __call__(self, x):
        h, state = KalmanNorm(blocks_of(2), use_running_average=self.average)(x)
        conv = nn.Conv(3, (3, 3))
        h = conv(nn.relu(h))
        p = conv.variables["params"]
        prior = predict(state, p["kernel"], bias=p["bias"], size=h.shape[1:3])
        return KalmanNorm(blocks_of(2), gain=0.2, learn_gain=True, learn_transition=True,
                          use_running_average=self.average)(h, prior)  # fmt: skip


class NNXStack(nnx.Module):
    def __init__(self, rngs):
        self.conv: Any = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.first: Any = NNXKalmanNorm(blocks_of(2), 2, rngs=rngs)
        self.last: Any = NNXKalmanNorm(blocks_of(2), 3, gain=0.2, learn_gain=True, learn_transition=True, rngs=rngs)

    def __call__(self, x):
        h, state = self.first(x)
        h = self.conv(nnx.relu(h))
        prior = predict(state, self.conv.kernel[...], bias=self.conv.bias[...], size=h.shape[1:3])
        return self.last(h, prior)


@pytest.mark.slow
def test_linen_and_nnx_stacks_agree_and_gradients_reach_every_parameter():
    x = jnp.asarray(draw(0, 4, 4, 3, 2), jnp.float32)
    variables = Stack().init(jax.random.key(0), x)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), variables["params"])
    assert {k: v.shape for k, v in params["KalmanNorm_1"].items()} == {
        "scale": (3,), "bias": (3,), "gain_logit": (), "a": (3,), "u": (3,), "r": (3,)}  # fmt: skip

    def run(params):
        (y, state), changed = Stack().apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y + jnp.arange(3.0).reshape(1, 1, 1, 3))), (y, state, changed["batch_stats"])

    (_, (y, state, stored)), grads = quick(jax.value_and_grad(run, has_aux=True))(params)
    assert [jax.tree_util.keystr(at) for at, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)] == []
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    model = NNXStack(nnx.Rngs(0))
    layers = {"KalmanNorm_0": model.first, "KalmanNorm_1": model.last, "Conv_0": model.conv}
    for layer, values in params.items():
        for name, value in values.items():
            getattr(layers[layer], name)[...] = value

    def same(model, wanted):
        graph, state = nnx.split(model)

        def apply(state, x):
            merged = nnx.merge(graph, state)
            return merged(x), nnx.state(merged, nnx.BatchStat)

        out, stats = quick(apply)(state, x)
        close(out, wanted)
        nnx.update(model, stats)

    same(model, (y, state))
    for layer, values in stored.items():
        close({name: getattr(layers[layer], name)[...] for name in values}, values)
    model.eval()
    same(model, quick(Stack(average=True).apply)({"params": params, "batch_stats": stored}, x))


@pytest.mark.parametrize("source", ["filtered", "batch", "first_block"])
def test_running_average_keeps_nine_tenths_of_what_is_named_and_inference_is_plain(source):
    n, q, prior = blocks_of(2), 0.3, belief_like("")
    layer = KalmanNorm(n, gain=q, stored=source, momentum=0.9)
    variables = layer.init(jax.random.key(0), X, prior, use_running_average=False)
    out, changed = layer.apply(variables, X, prior, use_running_average=False, mutable=["batch_stats"])
    _, kept = expected(X, PRIOR, 1.0 if source == "batch" else q, count=2)
    mean, var = kept[:, 0] if source == "first_block" else kept.mean(1)
    close(changed["batch_stats"], {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var})
    other = NNXKalmanNorm(n, 6, gain=q, stored=source, rngs=nnx.Rngs(0))
    capture: Any = nnx.capture(other, Moments)
    same, sown = capture(X, prior)
    close(same, out)
    close({"mean": other.mean[...], "var": other.var[...]}, changed["batch_stats"])
    close(sown["batch"].get_value()[0].stats.var, var)
    y, state = cast(Any, layer.apply({**variables, **changed}, X, prior, use_running_average=True))
    mean, var = (cast(Any, changed["batch_stats"][name]) for name in ("mean", "var"))
    close(y, (X - np.asarray(mean)) / np.sqrt(np.asarray(var) + EPS), 1e-5, 1e-5)
    close(state.input, Belief(mean.reshape(1, 1, 1, 6), var.reshape(1, 1, 1, 6)))


def test_first_variance_is_unbiased_where_asked_and_stored_so():
    count = X.size // 6
    layer = KalmanNorm(unbiased=True, momentum=0.0)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    (y, state), changed = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    close(changed["batch_stats"]["var"], X.var((0, 1, 2), ddof=1))
    close(state.input.var.ravel(), X.var((0, 1, 2)) * count / (count - 1))
    close(y, normalize(X, "batch").y, 1e-5, 1e-5)


def test_group_layer_stores_nothing_and_uses_its_prior_at_inference_too():
    layer = KalmanNorm(Normalizer("... c/2", "... c/2"), gain=0.3)
    variables = layer.init(jax.random.key(0), X, belief_like(""))
    assert set(variables) == {"params"}
    y, _ = layer.apply(variables, X, belief_like(""), use_running_average=True)
    close(y, expected(X, PRIOR, 0.3, None, 4, 3)[0], 1e-4, 1e-5)


def test_frozen_statistics_stay_and_a_masked_batch_stores_nothing():
    layer = NNXKalmanNorm("batch", 6, rngs=nnx.Rngs(0))
    layer(X, belief_like(""), mask=jnp.zeros((1, 1, 1, 1), bool))
    nnx.view(layer, update_running_average=False)(X)
    close((layer.mean[...], layer.var[...]), (np.zeros(6), np.ones(6)))


def test_linear_transition_moves_mean_and_variance():
    belief = belief_like("")
    out = linear(belief, jnp.full(6, 2.0), 0.5, jnp.arange(6.0))
    close(out, Belief(2 * belief.mean + 0.5, 4 * belief.var + jnp.arange(6.0).reshape(1, 1, 1, 6)))
    assert abs(1 / (1 + np.exp(-logit(0.95))) - 0.95) < 1e-12


def test_stored_filtered_statistics_are_those_that_running_observes():
    out = kalman_normalize(X, belief_like(""), BATCH)
    stats = Stats(*out.filtered.input, out.stats.mean_weight, out.stats.var_weight)
    observed = running.observe(stats, BATCH, "n ... c", X.shape)
    close((observed.mean, observed.var), tuple(s.ravel() for s in out.filtered.input))


STATE = Filtered(*[Belief(jnp.zeros((1, 1, 1, 6)), jnp.ones((1, 1, 1, 6)))] * 2)
KERNEL = jnp.ones((3, 3, 6, 2))
KEY = jax.random.key(0)
REFUSED = [
    (lambda: kalman_normalize(X, cast(Any, STATE)), TypeError, "a prior is a Belief, as `predict` gives it; found Filtered"),
    (lambda: predict(cast(Any, STATE.input), KERNEL), TypeError, "takes the Filtered that a layer returned, found Belief"),
    (lambda: kalman_normalize(np.ones((2, 3), int)), TypeError, "found int"),
    (lambda: kalman_normalize(jnp.ones((2, 3), jnp.complex64)), TypeError, "takes real arrays, found complex64"),
    (lambda: kalman_normalize(X, gain=1.5), ValueError, "gain lies between 0 and 1; found 1.5"),
    (lambda: logit(1.0), ValueError, "a learned gain starts strictly between 0 and 1; found 1.0"),
    (lambda: kalman_normalize(X, normalizer="rms"), ValueError, "needs a mean and a variance: A = B, order 2, .*found N"),
    (lambda: kalman_normalize(X, normalizer="divisive"), ValueError, "without windows"),
    (lambda: kalman_normalize(X, Belief(jnp.zeros((1, 6)), jnp.ones((1, 6)))), FieldError, r"found shape \(1, 6\)"),
    (lambda: kalman_normalize(X, Belief(jnp.zeros((2, 1, 1, 6)), jnp.ones(()))), FieldError, "length 1 or 1 along n"),
    (lambda: predict(STATE, jnp.ones((3, 3, 5, 2))), FieldError, r"found shape \(3, 3, 5, 2\), groups 1, for a belief of 6"),
    (lambda: predict(STATE, KERNEL, size=(3,)), FieldError, r"2 axes of space; found \(3,\)"),
    (lambda: predict(STATE, KERNEL, "mc"), ValueError, "transition is one of 'analytic', 'monte_carlo', 'released'"),
    (lambda: predict(STATE, KERNEL, "released", size=(3, 3)), ValueError, "transition='released' draws a sample and needs"),
    (lambda: predict(STATE, KERNEL, "monte_carlo", key=KEY), ValueError, "a sample needs the size"),
    (lambda: predict(STATE, jnp.ones((6, 2)), "monte_carlo", key=KEY), ValueError, "give samples of at least 2"),
    (lambda: predict(STATE, KERNEL, padding="CIRCULAR", size=(3, 3)), ValueError, "padding is one of 'SAME', 'VALID'"),
    (lambda: predict(STATE, KERNEL, activation="gelu"), ValueError, "activation is one of 'relu', None; found 'gelu'"),
    (lambda: predict(Filtered(*[Belief(jnp.ones((1, 2, 1, 6)), jnp.ones((1, 2, 1, 6)))] * 2), KERNEL), FieldError,
     "varies along n and c alone"),
    (lambda: KalmanNorm(stored="last").init(KEY, X, None, False), ValueError, "stored is one of 'filtered', 'batch', 'fi"),
    (lambda: NNXKalmanNorm("batch", 6, use_running_average=None, rngs=nnx.Rngs(0))(X), ValueError, "No `use_running_aver"),
    (lambda: NNXKalmanNorm(Normalizer("n", "n"), 6, rngs=nnx.Rngs(0)), FieldError, "give the whole shape of an input"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refusal_names_what_was_found_and_what_is_accepted(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert re.search(message, str(raised.value))


def test_spans_given_by_hand_are_read_as_fields():
    n = Field((Span("n"), Span("...")))
    close(kalman_normalize(X, belief_like(""), Normalizer(n, n)).y, kalman_normalize(X, belief_like("")).y)
