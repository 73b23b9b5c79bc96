"""Inputs and kernels as large and as small as float32 and bfloat16 hold: as in NumPy float64, or NaN, never zeros."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as fnn
from jax.experimental.jet import jet

from normjax import TABLE, Normalizer, kernels, linen, normalize, top
from normjax.batch_extremes import range_batch
from normjax.conditional import adain
from normjax.diagnostics import gradient_norm
from normjax.gdn import gdn
from normjax.kalman import kalman_normalize
from normjax.projection import Kernels, norms, project
from normjax.propagate import Belief
from normjax.reparametrize import data_dependent_start
from normjax.response import filter_response
from normjax.spectral import spectral_norm
from normjax.tokens import partial_rms, qk
from normjax.units import evonorm_b0, evonorm_s0, grn
from normjax.weights import bounded_weight_norm, centred_weight_norm, norm_bound, weight_norm, weight_standardization
from tests.kernels import each, quickly
from tests.rows import compiled

RNG = np.random.default_rng(0)
X = RNG.normal(0.3, 1.0, (4, 6, 5, 8))
G = RNG.normal(size=X.shape)
MASK = RNG.random(X.shape) < 0.8
GROUP = Normalizer("... c/2", "... c/2")
REST, EACH = (0, 1, 2), (-1,)


def both(f, x, g=G):
    """The output and the gradient, in float64."""

    @quickly
    def run(x, g):
        y, back = jax.vjp(f, x)
        return y, back(g.astype(y.dtype))[0]

    return [np.asarray(a, np.float64) for a in run(x, jnp.asarray(g, jnp.float32))]


def single(x, dtype=jnp.float32):
    return jnp.asarray(np.asarray(x, np.float32), dtype)


def row(n, mask=None):
    return lambda x: normalize(x, n, mask=mask).y


def near(got, want, tolerance):
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), rtol=0, atol=tolerance)


# What float32 statistics cannot hold.

BELIEF = Belief(jnp.full((1, 1, 1, 1), 1e25), jnp.ones((1, 1, 1, 1)))
OVERFLOWS = {
    "batch": (row("batch"), 1e20),
    "layer": (row("layer"), 1e20),
    "token masked": (row("token", MASK), 1e20),
    "group": (row(GROUP), 1e30),
    "rms": (row("rms"), 1e20),
    "divisive": (row("divisive"), 1e20),
    "contrast": (row("contrast"), 1e20),
    "channel window": (row(Normalizer("c:3", "c:3")), 1e30),
    "third moments": (row(Normalizer("n ...", "n ...", order=3, power=1 / 3)), 1e20),
    "L1": (row("l1_batch"), 6e37),
    "the mean alone": (lambda x: jnp.abs(row("mean_only")(jnp.abs(x))), 8e37),
    "gain": (row(Normalizer(None, "c", gain=1e6)), 1e17),
    "kernel": (lambda x: kernels.twin(x, (3,), 1e-5)[0], 1e20),
    "range": (lambda x: range_batch(x, size=120, parts=1).y, 8e37),
    "evonorm b0": (evonorm_b0, 1e20),
    "evonorm s0": (functools.partial(evonorm_s0, field="... c/2"), 1e20),
    "grn": (functools.partial(grn, scale=1.0), 1e20),
    "filter response": (lambda x: filter_response(x).y, 1e20),
    "partial rms": (lambda x: partial_rms(x, fraction=0.5).y, 1e20),
    "qk l2": (lambda x: qk(x, x, kind="l2")[0], 1e20),
    "gdn": (lambda x: gdn(x, jnp.ones(8), jnp.ones((8, 8))), 1e20),
    "kalman": (lambda x: kalman_normalize(x, BELIEF).y, 1.0),
    "style": (lambda x: adain(X.astype(np.float32), x), 1e20),
}


@each(OVERFLOWS, ("token masked", "contrast", "kernel", "gdn"))
def test_what_overflows_is_nan_in_output_and_gradient_and_never_zero(name):
    f, size = OVERFLOWS[name]
    valid = MASK if "masked" in name else np.full(X.shape, fill_value=True)
    y, gradient = both(lambda x: f(x)[0] if name == "evonorm b0" else f(x), single(size * X))
    assert np.isnan(y[valid]).all()
    if name not in ("the mean alone", "range"):
        assert np.isnan(gradient[valid]).all()


def over_channels(order, power):
    return row(Normalizer(None, "c", order=order, power=power))


SPREADS = {  # of each channel, or of all of them
    "squares": over_channels(2, 0.5),
    "cubes": over_channels(3, 1 / 3),
    "roots": over_channels(0.5, 2.0),
    "absolute values": over_channels(1, 1.0),
    "maximum": over_channels(math.inf, 1.0),
    "the largest": over_channels(top(3), 1.0),
    "range": lambda x: range_batch(jnp.swapaxes(x, 0, -1), size=4, parts=1).y,
    "style": lambda x: adain(X.astype(np.float32), x),
    "norm of a gradient": lambda x: x + gradient_norm(x[0]),
}


@each(SPREADS, ("cubes", "range", "style"))
def test_an_element_that_is_nan_is_part_of_its_spread_whatever_the_order(name):
    y = quickly(SPREADS[name])(single(X).at[0, 1, 2, 3].set(jnp.nan))
    shared = {"range": (3, ..., 0), "style": (0, ..., 3), "norm of a gradient": 0}.get(name, (0, 1, 2))
    assert np.isnan(y[shared]).all()


LARGE = {
    "batch": ("batch", None),
    "layer masked": ("layer", MASK),
    "windows": (Normalizer("c:3", "c:3"), None),
    "contrast": ("contrast", None),
    "L1": ("l1_batch", None),
}


@each(LARGE, ("layer masked",))
def test_gradients_of_large_inputs_are_those_of_ordinary_ones_over_their_size(name):
    n, mask = LARGE[name]
    y, gradient = both(row(n, mask), single(1e4 * X))
    for size in (1e15, 3e16) if name != "L1" else (1e15, 1e25):
        large, small = both(row(n, mask), single(size * X))
        near(large, y, 1e-5)
        near(size * small, 1e4 * gradient, 2e-4)


HIGHER = {
    "batch": (Normalizer("n ...", "n ..."), (0, 1, 2)),
    "layer": (Normalizer("... c", "... c"), (1, 2, 3)),
    "token": (Normalizer("c", "c"), (3,)),
    "another power": (Normalizer("... c", "... c", power=0.75), (1, 2, 3)),
}


@each(HIGHER, ("layer", "another power"))
def test_second_and_third_derivatives_pass_by_fields_that_are_masked_whole(name):
    """A field without any element has a denominator of eps alone, of which high powers leave float32."""
    n, axes = HIGHER[name]
    mask, along = MASK.copy(), RNG.normal(size=X.shape)
    mask[1], mask[:, 2, 3], mask[..., 5] = False, False, False  # an example, a pixel of each, a channel

    def written(x):
        count = np.maximum(mask.sum(axes, keepdims=True), 1).astype(x.dtype)
        v = jnp.where(mask, x - jnp.where(mask, x, 0).sum(axes, keepdims=True) / count, 0)
        return v * ((v**2).sum(axes, keepdims=True) / count + 1e-5) ** -n.power

    def derivatives(f, x, t):
        def total(x):
            return jnp.sum(jnp.sin(f(x)))

        def one(f):
            return lambda x: jax.jvp(f, (x,), (t,))[1]

        first, second = one(total), one(one(total))
        series = jet(total, (x,), [[t, jnp.zeros_like(t), jnp.zeros_like(t)]])[1]
        return [first(x), second(x), one(second)(x)], series, jax.grad(first)(x), jax.grad(second)(x)

    run = quickly(derivatives, static_argnums=0)
    got = run(row(n, mask), single(X), single(along))
    with jax.enable_x64(True):
        want = run(written, jnp.asarray(X), jnp.asarray(along))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(got))
    jax.tree.map(lambda a, b: near(np.asarray(a), np.asarray(b), 2e-4), got, want)


@each(dict.fromkeys(("contrast", "divisive", "response", "instance", "filter")), ("contrast",))
def test_third_derivatives_of_windows_and_floors_are_finite_where_an_example_is_masked_whole(name):
    mask = np.arange(len(X))[:, None, None, None] != 1

    def moved(f):
        return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]

    second = moved(moved(lambda x: jnp.sum(jnp.sin(row(TABLE[name], mask)(x)))))
    assert np.isfinite(quickly(jax.grad(second))(single(X))).all()
    assert np.isfinite(quickly(moved(second))(single(X)))


# Rows without eps.

BARE = {
    "batch": Normalizer("n ...", "n ...", eps=0.0),
    "layer": Normalizer("... c", "... c", eps=0.0),
    "group": Normalizer("... c/2", "... c/2", eps=0.0),
    "rms": Normalizer(None, "c", eps=0.0),
    "variance": Normalizer("n ...", "n ...", eps=0.0, keep_mean=True),
    "third moments": Normalizer("n ...", "n ...", eps=0.0, order=3, power=1 / 3),
    "L1": Normalizer("n ...", "n ...", eps=0.0, order=1, power=1.0),
    "maximum": Normalizer("n ...", "n ...", eps=0.0, order=math.inf, power=1.0),
    "the largest": Normalizer("n ...", "n ...", eps=0.0, order=top(3), power=1.0),
    "two fields": Normalizer("n ...", "c", eps=0.0),
    "windows": Normalizer("...:3 c", "...:5 c", eps=0.0),
    "contrast": Normalizer("...:3 c", "...:3 c", eps=0.0, floor="...", window="gaussian"),
}


@each(BARE, ("layer",))
def test_rows_without_eps_take_inputs_of_any_size(name):
    mask = MASK if name in ("batch", "rms", "windows") else None
    f = row(BARE[name], mask)
    y, gradient = both(f, single(X))
    for size in (1e-30, 1e-22, 1e20, 1e34):
        scaled, back = both(f, single(size * X))
        near(scaled, y, 2e-6)
        near(
            size * back, gradient, 2e-6 if size < 1e30 else 2e-2
        )  # there the gradient itself is next to the least float32


@pytest.mark.slow
def test_rows_without_eps_are_numpys_in_float64_for_both_signs_of_the_exponent():
    assert normalize(jnp.array([[1e30, -1e30]]), Normalizer("c", "c", eps=0.0)).y.tolist() == [[1.0, -1.0]]
    assert normalize(jnp.array([[1e-30, -1e-30]]), Normalizer("c", "c", eps=0.0)).y.tolist() == [[1.0, -1.0]]
    sizes = np.array([1e-30, 1.0, 1e30, 3e37])[:, None, None, None]  # one of each example, side by side
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        x = single(sizes * X, dtype)
        wide = np.asarray(x, np.float64)
        v = wide - wide.mean((1, 2, 3), keepdims=True)
        want = v / np.sqrt((v**2).mean((1, 2, 3), keepdims=True))
        got = compiled(x, BARE["layer"])
        near(np.asarray(got.y, np.float64), want, tolerance)
        near(np.asarray(got.stats.mean, np.float64) / sizes, wide.mean((1, 2, 3), keepdims=True) / sizes, 1e-5)
    part = partial_rms(single(1e-30 * X), fraction=0.5, eps=0.0).y
    near(np.asarray(part, np.float64), X / np.sqrt((X[..., :4] ** 2).mean(-1, keepdims=True)), 1e-6)
    zero = both(row(BARE["layer"]), single(0 * X))
    assert all((a == 0).all() for a in zero)


# Kernels.

K = RNG.normal(size=(3, 3, 6, 5)) * np.array([1.0, 1e-3, 1.0, 1.0, 0.0])
INPUTS = (0, 1, 2)


def length(v, p=2.0):
    return (np.abs(v) ** p).sum(INPUTS, keepdims=True) ** (1 / p)


def over(v, d):
    return v / np.where(d > 0, d, 1)


def centred(k):
    return k - k.mean(INPUTS, keepdims=True)


def over_sigma(k):
    return k / np.linalg.svd(k.reshape(-1, 5))[1][0]


WEIGHTS = {
    "weight norm": (weight_norm, lambda k: over(k, length(k))),
    "third": (functools.partial(weight_norm, p=3), lambda k: over(k, length(k, 3))),
    "L1": (functools.partial(weight_norm, p=1), lambda k: over(k, length(k, 1))),
    "largest": (functools.partial(weight_norm, p=math.inf), lambda k: over(k, np.abs(k).max(INPUTS, keepdims=True))),
    "centred": (centred_weight_norm, lambda k: over(centred(k), length(centred(k)))),
    "standardized": (
        functools.partial(weight_standardization, eps=0.0),
        lambda k: over(centred(k), length(centred(k)) / math.sqrt(54)),
    ),
    "bounded": (functools.partial(bounded_weight_norm, rho=3.0), lambda k: 3 * over(k, length(k))),
    "spectral": (lambda k: spectral_norm(k, jnp.ones(5), steps=40).kernel, over_sigma),
}


@each(WEIGHTS, ("weight norm",))
def test_kernels_of_any_size_are_normalized_as_in_float64_with_their_gradients(name):
    f, formula = WEIGHTS[name]
    g = RNG.normal(size=K.shape)
    y, gradient = both(f, single(K), g)
    near(y, formula(np.asarray(single(K), np.float64)), 2e-6)
    sizes = [(1e-22, jnp.float32), (1e22, jnp.float32), (1e33, jnp.float32), (1e-22, jnp.bfloat16), (1e4, jnp.float16)]
    for size, dtype in sizes:
        scaled, back = both(f, single(size * K, dtype), g)
        assert np.isfinite(scaled).all()
        near(scaled, y, 2e-6 if dtype == jnp.float32 else 1e-2)
        near(size * back, gradient, 2e-5 if dtype == jnp.float32 else 3e-2)
    assert all((a == 0).all() for a in both(f, single(0 * K), g)[:1])


@pytest.mark.slow
def test_eps_of_a_kernel_stays_where_its_definition_has_it():
    for size in (1e-22, 1e-6, 1.0, 1e22):
        k = np.asarray(single(size * K), np.float64)
        for rule, d in {
            "moment": np.sqrt(length(k) ** 2 + 1e-12),
            "root": length(k) + 1e-12,
            "floor": np.sqrt(np.maximum(length(k) ** 2, 1e-12)),
        }.items():
            near(np.asarray(weight_norm(single(k), eps=1e-12, eps_rule=rule), np.float64), k / d, 1e-6)


@pytest.mark.slow
def test_spectral_and_weight_norm_of_tiny_kernels_are_one_and_of_ordinary_ones_flax():
    def normed(library, wrapper, kernel, epsilon):
        layer = getattr(library, wrapper)(fnn.Dense(5, use_bias=False), epsilon=epsilon)
        call = {"update_stats": False} if wrapper == "SpectralNorm" else {}
        variables = layer.init(jax.random.key(0), jnp.ones((1, 54)), **call)
        path = jax.tree.map(lambda a: kernel if a.shape == kernel.shape else a, variables["params"])
        return layer.apply({**variables, "params": path}, jnp.eye(54), **call)

    kernel = single(K.reshape(54, 5) + 0.01)
    for wrapper in ("SpectralNorm", "WeightNorm"):
        for epsilon in (1e-12, 1e-3):
            ours, flax = (normed(library, wrapper, kernel, epsilon) for library in (linen, fnn))
            near(np.asarray(ours, np.float64), np.asarray(flax, np.float64), 1e-6)
        near(
            np.asarray(normed(linen, wrapper, 2.0**-60 * kernel, 1e-12), np.float64),
            np.asarray(normed(linen, wrapper, kernel, 1e-12), np.float64),
            1e-6,
        )


def test_tiny_kernels_and_a_tiny_stored_vector_have_spectral_norm_one():
    spectral = quickly(spectral_norm, static_argnames="steps")
    for size in (1e-30, 1e-7, 1e30):
        out = spectral(size * jnp.eye(4), jnp.full(4, 1e-20), steps=2)
        near(np.asarray(out.kernel), np.eye(4), 1e-6)
        assert abs(float(out.sigma) / size - 1) < 1e-6
        assert abs(float(jnp.linalg.norm(out.u)) - 1) < 1e-6
        assert abs(float(spectral(size * jnp.eye(4), 1e-20 * out.u, steps=0).sigma) / size - 1) < 1e-6


@pytest.mark.slow
def test_norms_bounds_and_projections_of_kernels_have_no_size_that_is_too_small_or_too_large():
    k = np.asarray(single(K), np.float64)
    for size in (1e-30, 1.0, 1e30):
        params, features = {"kernel": single(size * K)}, Kernels(output=(), field="... i")
        near(np.asarray(norms(params, features)["kernel"], np.float64) / size, length(k).ravel(), 1e-6)
        near(np.asarray(float(gradient_norm(params["kernel"])) / size), np.linalg.norm(k), 1e-6)
        near(np.asarray(float(norm_bound(params["kernel"])) / size), np.sqrt((length(k) ** 2).mean()), 1e-6)
        tx = project(Kernels(output=()))
        updates: Any = tx.update(params, tx.init(params), params)[0]  # the kernel is doubled, and halved again
        assert np.abs(np.asarray(updates["kernel"], np.float64) / size).max() < 1e-5
        scale, bias = data_dependent_start(single(size * X))
        near(np.asarray(scale, np.float64) * size, 1 / X.std(REST), 1e-5)
        near(np.asarray(bias, np.float64), -X.mean(REST) / X.std(REST), 1e-5)
