"""SELU, its moments, dropout and initializer, against quadrature, PyTorch and the numbers of the paper."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from flax.nnx.nn import initializers
from jax import lax

import normjax.linen as linen
import normjax.nnx as nnx
from normjax import selu, units
from normjax.selu import (
    ALPHA,
    LOW,
    SCALE,
    alpha_dropout,
    alpha_dropout_affine,
    selu_init,
    selu_moments,
    selu_parameters,
)
from tests.refusals import refuses

SHAPE = (4, 3, 2, 6)
X = np.random.default_rng(0).normal(0.3, 1.5, SHAPE).astype(np.float32)


def plain_selu(x):
    return SCALE * np.where(x > 0, x, ALPHA * (np.exp(np.minimum(x, 0)) - 1))


def jit(f):
    """Compiled without XLA's optimizer, which is most of the time of these tests."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def close(got, want, rtol=1e-9, atol=1e-9):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol)


def quadrature(mean, var, f=plain_selu):
    """Mean and variance of f of a Gaussian, by a fine sum on either side of the kink."""
    s = math.sqrt(var)
    below, above = (np.linspace(*ends, 200_001) for ends in ((min(mean - 12 * s, -1), 0), (0, max(mean + 12 * s, 1))))
    total = np.zeros(3)
    for z in (below, above):
        w = np.exp(-((z - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)
        y = f(z)
        total += [np.trapezoid(w * y**k, z) for k in range(3)]
    return total[1], total[2] - total[1] ** 2


def test_constants_of_selu_are_those_of_the_closed_form_and_of_the_published_code():
    q, r = math.sqrt(math.e) * math.erfc(1 / math.sqrt(2)), math.e**2 * math.erfc(math.sqrt(2))
    assert pytest.approx(-math.sqrt(2 / math.pi) / (q - 1), rel=1e-14) == ALPHA
    inside = math.pi * q**2 - 2 * (2 + math.pi) * q + 2 * r + math.pi + 2
    assert pytest.approx((1 - q) * math.sqrt(2 * math.pi / inside), rel=1e-14) == SCALE
    assert pytest.approx(-1.7580993408473766, rel=1e-15) == LOW
    assert selu_parameters() == pytest.approx((ALPHA, SCALE), rel=1e-13)


FIXED_POINTS = {  # mean, var, omega, tau: alpha, scale of the authors' notebook
    (-0.1, 2.0, 1.0, 1.0): (1.9769021954242014, 1.073851239616046),
    (-0.1, 2.0, 0.0, 1.0): None,
    (0.2, 0.7, 0.1, 1.1): None,
    (0.0, 4.0, 0.0, 0.5): None,
}


@pytest.mark.parametrize("point", FIXED_POINTS)
def test_parameters_of_other_fixed_points_keep_them(point):
    mean, var, omega, tau = point
    alpha, scale = selu_parameters(*point)
    if FIXED_POINTS[point]:
        assert (alpha, scale) == pytest.approx(FIXED_POINTS[point], rel=1e-12)

    def unit(z):
        return scale * np.where(z > 0, z, alpha * (np.exp(np.minimum(z, 0)) - 1))

    assert quadrature(mean * omega, var * tau, unit) == pytest.approx((mean, var), rel=1e-7, abs=1e-8)


GAUSSIANS = [(0.0, 1.0), (1.0, 0.3), (-2.0, 1.5), (0.5, 20.0), (-3.0, 400.0), (5.0, 0.5), (-40.0, 900.0), (0.3, 1e-6)]


def test_moment_map_is_the_integral_in_float64_and_float32():
    means, variances = (np.array(a) for a in zip(*GAUSSIANS, strict=True))
    want = np.array([quadrature(m, v) for m, v in GAUSSIANS]).T
    run = jit(lambda m, v: jnp.stack(selu_moments(m, v, 1.0)))
    with jax.enable_x64(True):
        close(run(means, variances), want, 1e-7, 1e-9)
    got = run(np.float32(means), np.float32(variances))
    assert got.dtype == jnp.float32
    close(got[:, :-1], want[:, :-1], 2e-5, 2e-6)
    close(got[:, -1], want[:, -1], 1e-6, 1e-6)  # its variance of 1e-6 is lost beside the mean's square


@pytest.mark.slow
def test_moment_map_has_finite_derivatives_where_the_variance_vanishes_or_is_huge():
    def both(m, v):
        return sum(selu_moments(m, v, 1.0))

    m, v = (a.ravel() for a in jnp.meshgrid(jnp.array([-1e3, -1.0, 0.0, 1.0, 1e3]), jnp.array([0.0, 1e-6, 1.0, 1e6])))
    one = jnp.ones_like(m)
    run = jit(lambda m, v, dm, dv: jax.jvp(jax.vmap(jax.grad(both, (0, 1))), (m, v), (dm, dv)))
    for direction in ((one, 0 * one), (0 * one, one)):
        assert all(np.isfinite(np.asarray(part)).all() for part in jax.tree.leaves(run(m, v, *direction)))


BOXES = {  # mu, nu, omega, tau
    "theorem 1": ((-0.1, 0.1), (0.8, 1.5), (-0.1, 0.1), (0.95, 1.1)),
    "theorem 2": ((-1.0, 1.0), (3.0, 16.0), (-0.1, 0.1), (0.8, 1.25)),
    "theorem 3, narrow": ((-0.1, 0.1), (0.02, 0.16), (-0.1, 0.1), (0.8, 1.25)),
    "theorem 3, wide": ((-0.1, 0.1), (0.02, 0.24), (-0.1, 0.1), (0.9, 1.25)),
}


@pytest.mark.slow
def test_moment_map_holds_the_theorems_on_a_grid_of_their_boxes():
    with jax.enable_x64(True):
        boxes = [np.meshgrid(*(np.linspace(*ends, 7) for ends in box), indexing="ij") for box in BOXES.values()]
        points = np.stack([[axis.ravel() for axis in box] for box in boxes])

        @jit
        def run(points):
            slope = jax.jacfwd(lambda m, v, o, t: jnp.stack(selu_moments(m, v, o, t)), (0, 1))
            jacobian = jax.vmap(lambda *point: jnp.stack(slope(*point), -1))
            return selu_moments(*points), jacobian(*points[:, 0]), jacobian(*jnp.array([[0.0], [1.0], [0.0], [1.0]]))

        (mean, var), jacobian, fixed = run(jnp.asarray(points.transpose(1, 0, 2)))
    mean, var, nu = np.asarray(mean), np.asarray(var), points[:, 1]
    assert (mean[0].min(), mean[0].max()) == pytest.approx((-0.0310605, 0.0677251), abs=6e-8)
    assert (var[0].min(), var[0].max()) == pytest.approx((0.803712, 1.48157), abs=6e-6)
    assert np.linalg.norm(jacobian, 2, (1, 2)).max() == pytest.approx(0.897608, abs=6e-7)
    assert (var - nu)[1].max() == pytest.approx(-0.119744, abs=6e-7)
    assert (var - nu)[2].min() == pytest.approx(0.00773618, abs=2e-7)  # 0.00773608 here, at the corner
    assert (var - nu)[3].min() == pytest.approx(0.0110293, abs=6e-8)
    close(fixed[0], [[0.0, 0.088834755], [0.0, 0.78264788]], 0, 6e-9)
    assert np.linalg.norm(fixed[0], 2) == pytest.approx(0.78767336, abs=6e-9)


def forward(key, x, layers, width, init=None, rate=0.0):
    """Moments of the activations after each of many layers of SELU."""
    init = init or selu_init()

    def step(x, key):
        a, b = jax.random.split(key)
        x = alpha_dropout(b, selu.selu(x @ init(a, (width, width))), rate)
        return x, (jnp.mean(x), jnp.var(x))

    return lax.scan(step, x, jax.random.split(key, layers))[1]


@pytest.mark.slow
def test_a_hundred_layers_keep_mean_and_variance():
    key = jax.random.key(0)
    x = jax.random.normal(key, (256, 256))
    mean, var = jax.jit(lambda x: forward(key, x, 100, 256))(x)
    # One run gave 0.032, 0.934 and 1.073; seven others up to 0.036, 0.927 and 1.082.
    assert np.abs(mean).max() < 0.04
    assert 0.92 < np.min(var) < np.max(var) < 1.09


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_hundred_wide_layers_keep_mean_and_variance(rate):
    key = jax.random.key(1)
    x = jax.random.normal(key, (256, 1024))
    mean, var = jax.jit(lambda x: forward(key, x, 100, 1024, rate=rate))(x)
    # One run gave 0.010, 0.982 and 1.025.
    assert np.abs(mean).max() < 0.015
    assert 0.97 < np.min(var) < np.max(var) < 1.04


@pytest.mark.slow
@pytest.mark.parametrize(("start", "init"), [(0.05, selu_init()), (10.0, nn.initializers.lecun_normal())])
def test_thirty_layers_bring_any_variance_back(start, init):
    key = jax.random.key(2)
    x = math.sqrt(start) * jax.random.normal(key, (256, 1024))
    _, var = jax.jit(lambda x: forward(key, x, 30, 1024, init))(x)
    assert float(var[-1]) == pytest.approx(1.01, abs=0.03)


def test_selu_and_scaled_relu_have_safe_slopes_at_zero_and_far_out():
    x = jnp.array([-3e38, -100.0, -0.0, 0.0, 100.0, 3e38])
    first = jax.grad(selu.selu)
    slope, bend = jit(jax.vmap(lambda x: (first(x), jax.grad(first)(x))))(x)
    close(slope, [0, 0, -LOW, -LOW, SCALE, SCALE], 1e-6)
    close(bend, [0, 0, -LOW, -LOW, 0, 0], 1e-6)
    fs = (units.scaled_relu, units.dyt, units.derf, selu.selu)
    run = jit(lambda *xs: [jax.jvp(f, (x,), (jnp.ones_like(x),)) for f in fs for x in xs])
    for y, dy in run(x[:, None], x[:, None].astype(jnp.bfloat16)):
        assert not np.isnan(np.asarray(y, np.float32)).any()
        assert np.isfinite(np.asarray(dy, np.float32)).all()


@pytest.mark.slow
def test_selu_and_its_gradient_are_pytorchs():
    torch = pytest.importorskip("torch")
    x = np.array([-90, -3, -1e-4, 0, 1e-4, 2, 90], np.float32)
    leaf = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.selu(leaf)
    y.sum().backward()
    got, slope = jit(jax.vmap(jax.value_and_grad(selu.selu)))(x)
    close(got, y.detach().numpy(), 1e-6, 1e-9)
    close(slope, leaf.grad.numpy(), 1e-6)


# Alpha dropout.

AFFINE = {0.05: (0.954844476, 0.083935572), 0.1: (0.921284516, 0.161970970), 0.5: (0.886404895, 0.779193931)}


@pytest.mark.parametrize("rate", AFFINE)
def test_alpha_dropout_has_the_constants_of_the_paper(rate):
    a, b = alpha_dropout_affine(rate)
    assert (a, b) == pytest.approx(AFFINE[rate], abs=6e-10)
    q = 1 - rate
    assert a == pytest.approx((q + LOW**2 * q * rate) ** -0.5)
    assert b == pytest.approx(-a * rate * LOW)


@pytest.mark.slow
def test_alpha_dropout_has_the_constants_of_pytorch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for rate, (a, b) in AFFINE.items():
        theirs = torch.nn.functional.alpha_dropout(torch.ones(512), rate, training=True).numpy()
        ours = alpha_dropout(jax.random.key(0), jnp.ones(512), rate)
        for y in (ours, theirs):
            close(np.unique(np.round(y, 5)), [a * LOW + b, a + b], 0, 2e-5)


@pytest.mark.slow
def test_alpha_dropout_restores_any_mean_and_variance():
    key, rate = jax.random.key(0), 0.3
    for mean, var, low in ((0.0, 1.0, LOW), (-0.1, 2.0, -1.9769021954 * 1.0738512396)):
        x = mean + math.sqrt(var) * jax.random.normal(key, (400_000,))
        y = alpha_dropout(jax.random.key(1), x, rate, mean=mean, var=var, low=low)
        assert float(jnp.mean(y)) == pytest.approx(mean, abs=0.01)
        assert float(jnp.var(y)) == pytest.approx(var, rel=0.01)
        a, b = alpha_dropout_affine(rate, mean, var, low)
        assert float(jnp.mean(jnp.abs(y - (a * low + b)) < 1e-6)) == pytest.approx(rate, abs=0.004)


def test_alpha_dropout_at_the_ends_of_its_rate_and_along_shared_axes():
    key, x = jax.random.key(0), X

    @jit
    def run(x):
        value, slope = jax.value_and_grad(lambda x: jnp.sum(alpha_dropout(key, x, 1.0, mean=0.25)))(x)
        shared = alpha_dropout(key, jnp.zeros(SHAPE, jnp.bfloat16), 0.5, broadcast_dims=(1, -2))
        return alpha_dropout(key, x, 0.0), value, slope, shared

    same, value, slope, shared = run(x)
    np.testing.assert_array_equal(same, x)
    assert value == 0.25 * X.size
    assert (np.asarray(slope) == 0).all()
    assert shared.dtype == jnp.bfloat16
    assert (np.asarray(shared) == np.asarray(shared[:, :1, :1])).all()
    assert len(np.unique(np.asarray(shared[:, 0, 0], np.float32))) == 2


@pytest.mark.slow
def test_alpha_dropout_modules_drop_what_flax_drops_and_pass_evaluation():
    x, rngs = X, {"dropout": jax.random.key(3)}
    a, b = alpha_dropout_affine(0.4)
    pairs: list[Any] = [
        (linen.AlphaDropout(0.4).apply({}, x, False, rngs=rngs), nn.Dropout(0.4).apply({}, x, False, rngs=rngs)),
        (nnx.AlphaDropout(0.4, rngs=flax_nnx.Rngs(7))(x), flax_nnx.Dropout(0.4, rngs=flax_nnx.Rngs(7))(x)),
    ]
    for ours, flax in pairs:
        close(ours, np.where(np.asarray(flax) != 0, a * X + b, a * LOW + b), 1e-5, 1e-6)
    module: Any = nnx.AlphaDropout(0.4, rngs=flax_nnx.Rngs(dropout=7))
    assert bool((module(x) != module(x)).any())  # the stream moves on
    module.eval()
    np.testing.assert_array_equal(module(x), x)
    np.testing.assert_array_equal(flax_nnx.view(module, deterministic=True)(x), x)
    np.testing.assert_array_equal(linen.AlphaDropout(0.4, deterministic=True).apply({}, x), x)


def test_selu_init_is_gaussian_and_flaxs_lecun_normal_is_cut():
    both = jit(lambda key: [f(key, (100, 2000)) for f in (selu_init(), initializers.lecun_normal())])
    ours, flax = (np.asarray(w) * 10 for w in both(jax.random.key(0)))
    for w in (ours, flax):
        assert (w.mean(), w.var()) == pytest.approx((0, 1), abs=0.02)
    assert np.mean(ours**4) == pytest.approx(3, abs=0.1)
    assert np.abs(flax).max() < 2.28 < 4 < np.abs(ours).max()


REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "complex": (
        lambda: selu.selu(jnp.ones(2, complex)),
        TypeError,
        "selu takes real floating-point arrays, found complex64",
    ),
    "rate": (
        lambda: alpha_dropout_affine(1.5),
        ValueError,
        "rate is the probability of dropping, between 0 and 1; found 1.5",
    ),
    "variance": (
        lambda: alpha_dropout_affine(0.5, var=0.0),
        ValueError,
        "the variance to restore is above 0; found 0.0",
    ),
    "fixed point": (
        lambda: selu_parameters(5.0, 0.1),
        ValueError,
        "no SELU keeps mean 5.0 and variance 0.1 with omega 0.0 and tau 1.0",
    ),
    "spread": (
        lambda: selu_parameters(0.0, 0.0),
        ValueError,
        "var * tau lies above 0, and it and |mean * omega| below 300; found 0.0 and 0.0",
    ),
    "deterministic": (
        lambda: nnx.AlphaDropout(0.5, deterministic=None)(X),
        ValueError,
        "No `deterministic` argument was provided to AlphaDropout: pass it to the constructor or to the call, or set it on "
        "the whole model with .train(), .eval() or nnx.view",
    ),
    "keys": (
        lambda: nnx.AlphaDropout(0.5)(X),
        ValueError,
        "AlphaDropout is not deterministic but has no `rngs`: pass them to the constructor or the call",
    ),
    "axis": (
        lambda: alpha_dropout(jax.random.key(0), jnp.ones((2, 3)), 0.5, broadcast_dims=(2,)),
        ValueError,
        "broadcast_dims: axis 2 is out of bounds for array of dimension 2",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_thing_what_was_found_and_what_is_accepted(name):
    refuses(*REFUSALS[name])
