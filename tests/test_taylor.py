"""Taylor mode: `jet` of every row and layer is nested forward mode, to third order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fx
from jax.experimental.jet import jet

from normjax import Normalizer, Stats, normalize
from tests.rows import CHANNELS, ROWS, jit
from tests.test_layers import LAYERS, QUICK, inputs, started, twin_of

# Rows that take a path of their own without a mask.
PLAIN = ("batch", "layer", "divisive", "response", "contrast", "filter", "mean_only")


def nested(f, x, terms):
    """The derivatives at 0 of f along the path x + t s + t^2/2 s' + t^3/6 s'', by three tangents within each other."""

    def along(t):
        return f(x + t * terms[0] + t**2 / 2 * terms[1] + t**3 / 6 * terms[2])

    def derived(g):
        return lambda t: jax.jvp(g, (t,), (jnp.ones_like(t),))[1]

    first = derived(along)
    return [g(jnp.zeros((), x.dtype)) for g in (first, derived(first), derived(derived(first)))]


def compare(f, x):
    """Holds the terms of `jet` against nested tangents; f is of an array, to an array."""
    terms = list(np.random.default_rng(1).normal(size=(3, *x.shape)))
    value, got = jit(lambda x: jet(f, (x,), (terms,)))(x)
    want = jit(lambda x: [f(x), *nested(f, x, terms)])(x)
    for one, other in zip([value, *got], want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9 * max(1, np.abs(other).max()))


@pytest.mark.parametrize(
    ("name", "masked"),
    [("divisive", True)]
    + [pytest.param(name, True, marks=pytest.mark.slow) for name in ROWS if name != "divisive"]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in PLAIN],
)
def test_taylor_mode_of_a_row_is_nested_forward_mode(name, masked):
    rng = np.random.default_rng(0)
    mask = rng.random((8, 4, 3, 1)) > 0.3 if masked else None
    with jax.enable_x64(True):
        x = rng.normal(0.3, 1.5, (8, 4, 3, CHANNELS.get(name, 16)))
        compare(lambda x: normalize(x, ROWS[name], mask=mask).y, x)


def gradient(name):
    return lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(normalize(x, ROWS[name]).y)))(x)


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda x: gradient("divisive")(x.reshape(1, 2, 2, 2)), marks=pytest.mark.slow),
        pytest.param(gradient("layer"), marks=pytest.mark.slow),
        jax.vmap(lambda x: normalize(x, "token", "c").y),
        jax.jit(lambda x: normalize(x, "token").y),
        lambda scale: normalize(np.arange(8.0).reshape(2, 4), "layer", scale=scale).y,
    ],
    ids=("gradient of windows", "gradient", "vmap", "jit", "scale"),
)
def test_taylor_mode_goes_around_other_transformations(f):
    with jax.enable_x64(True):
        compare(f, np.random.default_rng(0).normal(size=(2, 4)))


def test_taylor_mode_of_a_mean_around_which_windows_slide():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4)))  # here, or it would be in Taylor mode itself
        n = Normalizer("c:3", "c:3")
        compare(lambda mean: normalize(x, n, stats=Stats(mean)).y, np.random.default_rng(0).normal(size=(2, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_taylor_mode_of_a_layer_is_nested_forward_mode(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, *more = (
            a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in map(np.asarray, inputs(name))
        )
        layer, variables = started(name)
        compare(lambda x: jax.tree.leaves(layer.apply(variables, x, *more, mutable=["batch_stats"])[0])[0], x)
        if name in QUICK:
            graph, state = fx.split(twin_of(name))
            compare(lambda x: jax.tree.leaves(fx.merge(graph, state, copy=True)(x, *more))[0], x)
