"""Wang et al. 2018: their published code written out in NumPy, and what they and we claim of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from normjax.kalman import kalman_normalize
from normjax.propagate import Belief, Filtered, activate, join, predict
from tests.beliefs import EPS, blocks_of, close, conv, draw, quick

# In NumPy: `splits` blocks of examples as more channels, fixed p = 1 - q, one sample of the state.


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


@pytest.mark.slow
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


# --- what it is for --------------------------------------------------------------------------------


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
    return jnp.stack(ratios), jnp.stack(spreads)


@pytest.mark.slow
def test_published_transition_drifts_in_a_residual_network_and_the_analytic_one_does_not():
    """The published numbers are one draw's; here the median of eight, and what holds of each."""

    def images(key):  # smooth as images are: pooling keeps the variance of the skip connection's belief
        return jax.image.resize(jax.random.normal(key, (8, 8, 8, 3)), (8, 32, 32, 3), "cubic")

    def measured(transition):
        run = quick(lambda key: residual_network(images(jax.random.fold_in(key, 1)), key, transition))
        return map(np.stack, zip(*(run(jax.random.key(seed)) for seed in range(8)), strict=True))

    ratio, spread = measured("analytic")
    assert ratio.shape == (8, 18)
    assert 0.6 < np.median(ratio.min(1)) < np.median(ratio.max(1)) < 1.3
    assert 0.6 < ratio.min() < ratio.max() < 1.6
    assert 0.6 < spread.min() < spread.max() < 1.6
    ratio, spread = measured("released")
    assert ratio.min(1).max() < 0.21
    assert np.median(ratio.max(1)) > 20
    assert spread[:, :3].max(1).min() > 3.2
    assert np.median(spread.min(1)) < 0.08
