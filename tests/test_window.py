"""The window sum in both of its forms, and as one linear operation."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import TABLE, Normalizer, normalize
from normjax._expect import window
from normjax._normalize import windows
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


@pytest.mark.parametrize("form", [window.jointly, window.shifted], ids=lambda f: f.__name__)
def test_windows_of_several_axes_are_those_of_one_after_the_other(form):
    x = np.random.default_rng(2).normal(size=(2, 12, 9)).astype(np.float32)
    lists = [
        ((1, 5, (2, 2)), (2, 3, (1, 1))),
        ((1, 4, (1, 2)), (2, 5, (0, 4))),
        ((2, 3, (1, 1)), (1, (0.5, 1.0, 2.0), (1, 1))),  # weighted: one by one
        ((1, 15, (7, 7)), (2, 3, (1, 1))),  # wider than the axis is long, nearly
        ((2, 5, (2, 2)),),
    ]
    found = jit(lambda x: [form(x, windows=several) for several in lists])(x)
    for got, several in zip(found, lists, strict=True):
        want = x
        for axis, taps, padding in several:
            want = np.moveaxis(obvious(np.moveaxis(want, axis, 1), taps, padding), 1, axis)
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=str(several))


RULED = {
    "response": TABLE["response"],
    "each channel": Normalizer("...:3", "...:5", eps=0.5),
    "features": Normalizer("c:4", "c:4", eps=1.0, lean="before"),
}


@pytest.mark.parametrize("name", RULED)
def test_the_rule_of_windows_is_the_derivative_of_the_plain_form(name, monkeypatch):
    n = RULED[name]
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x, dx, g = (jnp.asarray(rng.normal(0.3, 1.5, (2, 6, 5, 8))) for _ in range(3))
        scale, bias, eps = (jnp.asarray(rng.uniform(0.5, 2, shape)) for shape in ((8,), (8,), ()))

        def loss(x, scale, bias, eps):
            out = normalize(x, n, scale=scale, bias=bias, eps=eps)
            return jnp.vdot(out.y, g) + jnp.sum(out.stats.var**2)

        def derivatives(x, *beside):
            gradient = jax.grad(loss, (0, 1, 2, 3))
            return gradient(x, *beside), jax.jvp(lambda x: gradient(x, *beside), (x,), (dx,))[1]

        def everything():
            one = derivatives(x, scale, bias, eps)
            each = jax.vmap(derivatives, (0, None, None, None))(jnp.stack([x, g]), scale, bias, eps)
            return jax.tree.leaves((one, each))

        found = jit(everything)()
        monkeypatch.setattr(windows, "has_rule", lambda *_: False)
        wanted = jit(lambda: everything())()
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


def test_gradient_of_16_bits_through_windows_is_rounded_once():
    rng = np.random.default_rng(0)
    x, ct = (jnp.asarray(z, jnp.bfloat16) for z in (10 * rng.normal(size=(16, 16, 64)), rng.normal(size=(16, 16, 64))))

    @jit
    def gradient(x, ct):
        return jax.vjp(lambda x: normalize(x, Normalizer(None, "c:5", eps=2.0)).y, x)[1](ct)[0]

    got, want = (np.asarray(gradient(x.astype(t), ct.astype(t)), np.float64) for t in (jnp.bfloat16, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=1e-6)


def test_each_platform_is_told_what_serves_it_wherever_a_program_is_traced():
    x = jnp.ones((2, 16, 16, 8))
    program = jax.jit(lambda x, g: jax.vjp(lambda x: normalize(x, Normalizer("...:5", "...:5", eps=1.0)).y, x)[1](g))
    said = {name: program.trace(x, x).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    sums = {name: text.count("stablehlo.reduce_window") for name, text in said.items()}
    assert sums["cuda"] * 2 == sums["cpu"] == sums["tpu"]
    afresh = {name: text.count("stablehlo.optimization_barrier") for name, text in said.items()}
    assert afresh["cuda"] > 0 == afresh["cpu"] == afresh["tpu"]


def test_windows_of_groups_slide_over_one_element_a_group():
    program = str(jax.make_jaxpr(lambda x: normalize(x, "local_context").y)(jnp.ones((2, 9, 9, 32))))
    slides = re.findall(r":f32\[([\d,]*)\] = slide", program)
    assert set(slides) == {"2,9,9,8"}


def test_a_wide_window_of_a_long_axis_keeps_its_digits():
    x = (100 + np.random.default_rng(0).normal(size=(1, 65536, 1))).astype(np.float32)
    got = jax.jit(lambda x: window.in_two_steps(x, axis=1, taps=31, padding=(15, 15)))(x)
    error = np.abs(np.asarray(got, np.float64) - obvious(x, 31, (15, 15))) / 31
    assert error.max() < 1e-4
