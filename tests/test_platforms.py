"""What each platform's program computes: the forms of the moments, their bounds, and the derivatives that go with them.

The programs of a GPU and of a TPU run here on the CPU: a fixture has the CPU lower the primitives as these do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

from normjax import TABLE, normalize
from normjax._expect import xla
from normjax._normalize import moments
from tests.rows import EXTRA, example, jit, slow_but

EPS = float(np.finfo(np.float32).eps)
FORMS = {
    "two passes": (functools.partial(moments.two_passes, corrected=False), 2),
    "corrected": (functools.partial(moments.two_passes, corrected=True), 1),
    "pivoted": (moments.pivoted, 4),
    "guarded": (moments.guarded, 1),
}
ON = {"gpu": moments._on_gpu, "tpu": moments._on_tpu}


@pytest.fixture(params=list(ON))
def elsewhere(request, monkeypatch):
    """The CPU runs the program of another platform; on a TPU, that of an array beyond its fast memory."""
    monkeypatch.setattr(moments, "FAST_MEMORY", 0)
    register(mlir.lower_fun(ON[request.param], multiple_results=True), lambda x, *, use: x, lambda again, known: known)
    yield request.param
    register(moments._lower_on_cpu, xla._say, lambda again, known: again)


def register(of_moments, of_copies, of_pairs):
    mlir.register_lowering(moments.moments_p, of_moments, platform="cpu")
    for primitive, form in ((xla._said_p, of_copies), (xla._again_p, of_pairs)):
        mlir.register_lowering(primitive, mlir.lower_fun(form, multiple_results=False), platform="cpu")
    jax.clear_caches()


def inputs(n):
    """Rows of n elements: means, outliers, steps and combs where a pivot is taken, heavy tails, nearly constant."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((16, n))
    for ratio in (0, 2, 4, 1e2, 1e3, 1e4, 1e5):
        yield f"mean {ratio:g} deviations", z + ratio
    yield "outlier", np.where(np.arange(n) == 0, 1e6, z)
    for width in (1, 16, 128, max(n // 16, 2)):
        yield f"step of {width}", z + 1e3 * (np.arange(n) < width)
        yield f"comb of {width}", z + 1e3 * (np.arange(n) % (16 * width) < width)
    yield "heavy tails", rng.standard_cauchy((16, n))
    yield "nearly constant", 1 + 1e-6 * z
    yield "constant", np.full((16, n), 3.3)
    yield "zero", np.zeros((16, n))


@pytest.mark.parametrize("axes", [(0,), (1,), (1, 2)], ids=str)
@pytest.mark.parametrize("n", [8, 48, 1024, 4800])
def test_every_form_of_the_moments_is_within_its_bound_of_float64(n, axes, monkeypatch):
    monkeypatch.setattr(moments, "COLUMNS", 64)  # few fields between other axes are summed in pieces

    @functools.partial(jax.jit, static_argnums=0)
    def normalized(form, x):
        mean, rest, m = form(x, axes)
        return ((x - mean) - rest) * jax.lax.rsqrt(m + 1e-5)

    for name, z in inputs(n):
        x = (z if axes == (1,) else z.T if axes == (0,) else z.T.reshape(1, n // 8, 8, 16)).astype(np.float32)
        exact = x.astype(np.float64)
        mean, std = exact.mean(axes, keepdims=True), np.sqrt(exact.var(axes, keepdims=True) + 1e-5)
        y = (exact - mean) / std
        allowed = 4 * EPS * (np.abs(y) + 1 + np.abs(mean) / std)
        for said, (form, bound) in FORMS.items():
            assert np.max(np.abs(normalized(form, x) - y) / allowed) <= bound, (said, name)


@pytest.mark.parametrize("n", [5, 16, 33])
def test_pivot_of_a_small_field_is_as_exact_as_two_passes(n):
    """Among many fields there is one whose first element lies far from its mean."""
    x = np.random.default_rng(0).standard_normal((n, 4096)).astype(np.float32)
    exact = x.astype(np.float64)
    var = exact.var(0) + 1e-5
    y = (exact - exact.mean(0)) / np.sqrt(var)
    mean, rest, m = jax.jit(lambda x: moments.pivoted(x, (0,)))(x)
    found = ((x - mean) - rest) * jax.lax.rsqrt(m + 1e-5)
    assert np.max(np.abs(found - y) / (4 * EPS * (np.abs(y) + 1))) <= 0.5


ROWS = ("batch", "token", "layer", "instance", "group", "variance", "keep_mean_token", "ghost", "extended")


@pytest.mark.parametrize("name", slow_but(ROWS, "token", "group"))
def test_values_and_derivatives_are_those_of_the_equation(elsewhere, name):
    """The equation as it stands is what a mask of ones makes of it."""
    n, x = {**TABLE, **EXTRA}[name], example(name, dtype=np.float64)[:, :3, :2] + 3
    rng = np.random.default_rng(1)
    scale, bias = rng.normal(1, 0.1, (2, x.shape[-1]))
    dx, ct, ones = *rng.normal(size=(2, *x.shape)), np.ones(x.shape, bool)

    def everything(x, dx, ct, scale, bias, mask=None):
        def f(x, scale, bias):
            out = normalize(x, n, scale=scale, bias=bias, mask=mask)
            return jnp.vdot(out.y, ct) + 0.1 * jnp.sum(jnp.sin(out.centered)) + jnp.sum(jnp.cos(out.stats.var))

        first = jax.grad(f, (0, 1, 2))
        second = jax.jvp(lambda x: first(x, scale, bias), (x,), (dx,))[1]
        return (
            normalize(x, n).y,
            first(x, scale, bias),
            second,
            jax.vmap(jax.grad(f), (0, None, None))(x[None], scale, bias),
        )

    with jax.enable_x64(True):
        got = jit(everything)(x, dx, ct, scale, bias)
        want = jit(functools.partial(everything, mask=ones))(x, dx, ct, scale, bias)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), got, want)


def test_second_derivatives_of_a_loop_are_those_of_its_steps_written_out(elsewhere):
    """JAX takes the derivative rule apart in a loop that is differentiated twice: the moments have a rule of their own."""
    x = np.random.default_rng(3).normal(3, 1, (4, 6))

    def step(z, _):
        return jnp.sin(normalize(z, "token", "n c").y + normalize(z, "batch", "n c").y + 3 * z), None

    def of_squares(loss):
        return jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2)))(x)

    with jax.enable_x64(True):
        got = of_squares(lambda x: jnp.sum(jax.lax.scan(step, x, length=2)[0] ** 3))
        want = of_squares(lambda x: jnp.sum(step(step(x, None)[0], None)[0] ** 3))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
