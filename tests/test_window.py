"""The window sum in both of its forms, and as one linear operation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax._expect import window
from tests.rows import jit

CASES = [
    (length, width, padding)
    for length, width in itertools.product((2, 12, 40), (1, 2, 10, 31, 70))
    for padding in {((width - 1) // 2, width // 2), (width // 2, (width - 1) // 2), (0, 0), (width - 1, width - 1)}
    if length + sum(padding) >= width
]


def obvious(x, taps, padding):
    padded = np.pad(x.astype(np.float64), ((0, 0), padding, (0, 0)))
    taps = np.ones(taps) if isinstance(taps, int) else np.asarray(taps)
    n = padded.shape[1] - len(taps) + 1
    return np.stack([np.einsum("nlc,l->nc", padded[:, i : i + len(taps)], taps) for i in range(n)], 1)


@pytest.mark.parametrize("form", [window.reduced, window.in_two_steps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cases", [CASES[::4], pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_each_form_is_the_sum_over_each_window(form, cases):
    x = np.random.default_rng(0).normal(size=(2, 40, 3)).astype(np.float32)
    found = jit(lambda x: [form(x[:, :length], axis=1, taps=width, padding=p) for length, width, p in cases])(x)
    for got, (length, width, padding) in zip(found, cases, strict=True):
        want = obvious(x[:, :length], width, padding)
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=f"{length, width, padding}")


@pytest.mark.parametrize("padding", [(15, 15), (-1, 30), *(pytest.param(p, marks=pytest.mark.slow)
                                                           for p in ((0, 0), (30, 30), (10, 20)))])  # fmt: skip
@pytest.mark.parametrize("taps", [31, tuple(np.linspace(0.5, 2, 31).tolist())], ids=["box", "weighted"])
def test_derivatives_transposes_and_batches_are_those_of_a_linear_operation(taps, padding):
    rng = np.random.default_rng(1)
    x, dx = (jnp.asarray(rng.normal(size=(2, 40, 3)), jnp.float32) for _ in range(2))

    def f(x):
        return window.slide(x, (1, taps, padding))

    if min(padding) >= 0:
        np.testing.assert_allclose(jit(f)(x), obvious(np.asarray(x), taps, padding), atol=5e-5)
    y, dy = jit(lambda x, dx: jax.jvp(f, (x,), (dx,)))(x, dx)
    np.testing.assert_array_equal(dy, jit(f)(dx))
    g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    transpose = jit(jax.linear_transpose(f, x))
    np.testing.assert_allclose(np.vdot(transpose(g)[0], x), np.vdot(g, y), rtol=1e-4)
    np.testing.assert_allclose(jit(jax.grad(lambda x: jnp.vdot(f(x), f(x))))(x), 2 * transpose(y)[0], rtol=1e-5)
    pairs = [np.stack([x, dx], axis) for axis in range(4)]
    stacked = jit(lambda pairs: [jax.vmap(f, axis, axis)(pair) for axis, pair in enumerate(pairs)])(pairs)
    for axis, found in enumerate(stacked):
        np.testing.assert_allclose(found, np.stack([y, dy], axis), atol=5e-5)


def test_a_wide_window_of_a_long_axis_keeps_its_digits():
    x = (100 + np.random.default_rng(0).normal(size=(1, 65536, 1))).astype(np.float32)
    got = jax.jit(lambda x: window.in_two_steps(x, axis=1, taps=31, padding=(15, 15)))(x)
    error = np.abs(np.asarray(got, np.float64) - obvious(x, 31, (15, 15))) / 31
    assert error.max() < 1e-4
