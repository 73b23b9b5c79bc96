"""Every row under every transformation of JAX, against the equation on averaging matrices, which JAX differentiates itself.

Most of it in float64, so that a forgotten term of any size shows.
"""

import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import PartitionSpec

from normjax import TABLE, Field, Normalizer, normalize, top
from normjax._normalize import derivative
from tests import reference
from tests.rows import ROWS, example

SHAPE = (2, 6, 2, 8)
SIZE, CHANNELS = math.prod(SHAPE), SHAPE[-1]
MORE = {
    "top_batch": Normalizer("n ...", "n ...", order=top(3), power=1.0),
    "max_window": Normalizer("c", "c:3", order=math.inf, power=1.0),
    "order_below_two": Normalizer("... c", "... c", order=1.5, power=1 / 1.5),
    "power_of_its_own": Normalizer("c", "n ...", gain=0.7, power=0.4),
}


@pytest.fixture(autouse=True)
def _as_large_arrays(monkeypatch):
    """Here rows take the form of the rule that is for large arrays; elsewhere, the one for small ones."""
    monkeypatch.setattr(derivative, "LARGE", 0)


def halved(field):
    """The field in blocks of a half, which a small array splits into."""
    return None if field is None else re.sub(r"/\d+", "/2", str(field))


CASES = {
    name: replace(n, mean=halved(n.mean), var=halved(n.var), floor=halved(n.floor))
    for name, n in {**ROWS, **MORE}.items()
}
# One row for each way through the code.
PATHS = ("batch", "response", "contrast", "local_context", "order_3", "max_batch", "top_batch", "variance")


def rows(names, quick):
    return pytest.mark.parametrize(
        "name", [k if k in quick else pytest.param(k, marks=pytest.mark.slow) for k in names]
    )


def jit(n, f):
    """Compiled without XLA's optimizer, which is half of the time of these tests.

    jaxlib 0.10 compiles the batched second derivative of a maximum wrongly then, so such rows keep it.
    """
    options: dict = {} if n.order == math.inf else {"xla_backend_optimization_level": 0}
    return jax.jit(f, compiler_options=options)


# The obvious form.


def matrices(field, n):
    """E_F[a] = second @ (first @ (w a) / first @ w) for the flattened a and weights w; `second` may be None."""
    if field is None:
        return None
    spans = {span.axis: span for span in Field.parse(field).spans}
    pooled, windows, padded = np.ones((3, 1, 1))
    for name, length in zip(reference.where("n ... c", 4), SHAPE, strict=True):
        m, count, identity = np.eye(length), np.ones(length), np.eye(length)
        if name in spans:
            m, count = reference.matrix(spans[name], length, n.border, n.window, n.lean)
        slides = name in spans and spans[name].window
        pooled = np.kron(pooled, identity if slides else m)
        windows = np.kron(windows, m if slides else identity)
        padded = np.kron(padded, m / count[:, None] if slides else identity)
    return (pooled, padded) if n.border == "zero" else (windows @ pooled, None)


def plain(x, fields, n, weights, eps):
    """The equation on flat arrays; the fields are `matrices`, n has the numbers."""

    def average(a, field):
        first, second = field
        total = first @ weights
        mean = first @ (a * weights) / jnp.where(total > 0, total, 1)
        return mean if second is None else second @ mean

    a, b, floor = fields
    valid = weights > 0
    x = jnp.where(valid, x, 0)
    v = x if a is None else jnp.where(valid, x - average(x, a), 0)
    y = x if n.keep_mean else v
    if b is None:
        return y
    if n.order == math.inf:
        m = jnp.max(jnp.where(b[0] > 0, jnp.abs(v), 0), 1)
    elif isinstance(n.order, top):
        largest = jnp.sort(jnp.where(b[0] > 0, jnp.abs(v), 0), 1)[:, -n.order.k :]
        m = largest.sum(1) / jnp.clip(jnp.sum((b[0] > 0) & valid[None], 1), 1, n.order.k).astype(x.dtype)
    else:
        m = average(v * v if n.order == 2 else jnp.abs(v) ** n.order, b)
    d = (eps + n.gain * m) ** n.power
    if floor is not None:
        d = jnp.maximum(d, average(jnp.where(valid, d, 0), floor))
    return y / d


# What everything is differentiated by is one flat array: x, then scale, bias and eps.


def parts(z):
    x, scale, bias, eps = jnp.split(z, [SIZE, SIZE + CHANNELS, SIZE + 2 * CHANNELS])
    return x, scale, bias, eps[0]


def point(seed):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0.3, 1.5, SIZE), rng.uniform(0.5, 2, CHANNELS), rng.normal(size=CHANNELS), [0.4]])


Z, OTHER = point(0), point(1)
DZ, DY = np.random.default_rng(7).normal(size=Z.size), np.random.default_rng(8).normal(size=SIZE)
WEIGHTS = np.random.default_rng(9).choice([0.0, 1.0, 0.5], SHAPE, p=[0.3, 0.6, 0.1])
BEHIND = np.concatenate([WEIGHTS.ravel() == 0, np.zeros(Z.size - SIZE, bool)])


def scalar(y):
    """A curved function of the output, for gradients and second derivatives."""
    return jnp.vdot(jnp.asarray(DY, y.dtype), jnp.sin(y))


def layer(n, mask=None):
    """The row as a function of one flat array, to a flat array."""

    def f(z):
        x, scale, bias, eps = parts(z)
        return normalize(x.reshape(SHAPE), n, scale=scale, bias=bias, eps=eps, mask=mask).y.ravel()

    return f


@functools.partial(jax.jit, static_argnums=2)
def _obvious(z, fields, n, weights):
    def f(z):
        x, scale, bias, eps = parts(z)
        repeat = SIZE // CHANNELS
        return plain(x, fields, n, weights, eps) * jnp.tile(scale, repeat) + jnp.tile(bias, repeat)

    def g(z):
        return scalar(f(z))

    return f(z), jax.jacrev(f)(z), jax.grad(g)(z), jax.jacfwd(jax.grad(g))(z)


def obvious(n, z, weights=None):
    """Output, Jacobian, gradient and Hessian of the equation written out."""
    fields = tuple(matrices(field, n) for field in (n.mean, n.var, n.floor))
    # Fields and eps are arguments, so that rows with the same numbers compile once.
    numbers = Normalizer(None, None, gain=n.gain, power=n.power, order=n.order, keep_mean=n.keep_mean)
    weights = np.ones(SIZE) if weights is None else weights.ravel()
    return [np.asarray(a) for a in _obvious(z, fields, numbers, weights)]


def agree(got, want, rtol):
    """Every entry of `want`, to within a fraction of its largest number."""
    for kind in want:
        np.testing.assert_allclose(
            got[kind], want[kind], rtol=0, atol=rtol * np.abs(want[kind]).max(initial=1e-3), err_msg=kind
        )


def at_once(f, x, dx):
    """Output, tangent, gradient and Hessian times dx, by one forward over reverse."""

    def g(x):
        y = f(x)
        return scalar(y), y

    ((_, y), gradient), ((_, dy), second) = jax.jvp(jax.value_and_grad(g, has_aux=True), (x,), (dx,))
    return {"value": y, "jvp": dy, "gradient": gradient, "forward over reverse": second}


def derivatives(f, z, dz, dy):
    """Every way that JAX has to a first and second derivative, at the first column of z; the gradient at all columns."""
    zs, z = z, z[:, 0]

    def g(z):
        return scalar(f(z))

    _, linear = jax.linearize(f, z)
    return at_once(jax.checkpoint(f), z, dz) | {
        "linearize": linear(dz),
        "transpose of linearize": jax.linear_transpose(linear, z)(dy)[0],
        "vjp": jax.vjp(f, z)[1](dy)[0],
        "reverse over reverse": jax.grad(lambda z: jnp.vdot(jax.grad(g)(z), dz))(z),
        "reverse over forward": jax.grad(lambda z: jax.jvp(g, (z,), (dz,))[1])(z),
        "hessian": jax.hessian(g)(z),
        "vmap of gradient": jax.vmap(jax.grad(g), in_axes=1, out_axes=1)(zs),
    }


def expected(n, z, weights=None):
    value, jacobian, gradient, hessian = obvious(n, z, weights)
    return {
        "value": value,
        **dict.fromkeys(("jvp", "linearize"), jacobian @ DZ),
        **dict.fromkeys(("transpose of linearize", "vjp"), DY @ jacobian),
        "gradient": gradient,
        **dict.fromkeys(("forward over reverse", "reverse over reverse", "reverse over forward"), hessian @ DZ),
        "hessian": hessian,
    }


@rows(CASES, ("batch", "divisive"))
def test_every_derivative_is_that_of_the_equation_written_out(name):
    n = CASES[name]
    with jax.enable_x64(True):
        got = jit(n, functools.partial(derivatives, layer(n)))(np.stack([Z, OTHER], 1), DZ, DY)
        want = expected(n, Z)
        want["vmap of gradient"] = np.stack([want["gradient"], obvious(n, OTHER)[2]], 1)
        agree(got, want, 1e-11)


@rows(CASES, ("batch",))
def test_every_derivative_with_weights_is_that_of_the_equation_and_nan_behind_them_reaches_none(name):
    n = CASES[name]
    with jax.enable_x64(True):
        got = jit(n, functools.partial(derivatives, layer(n, WEIGHTS)))(np.where(BEHIND, np.nan, Z)[:, None], DZ, DY)
        agree(got, expected(n, np.where(BEHIND, 0, Z), WEIGHTS), 1e-11)
    assert (np.asarray(got["hessian"])[BEHIND] == 0).all()


@rows(CASES, ("batch",))
def test_rows_within_scan_give_the_numbers_of_single_calls(name):
    n, f = CASES[name], layer(CASES[name])

    def scanned(zs):
        return lax.scan(lambda total, z: (total + scalar(f(z)), f(z)), 0 * zs[0, 0], zs)

    with jax.enable_x64(True):
        gradient, values = jit(n, jax.grad(scanned, has_aux=True))(np.stack([Z, OTHER]))
        want = [np.stack(a) for a in zip(obvious(n, Z), obvious(n, OTHER), strict=True)]
    agree({"value": values, "gradient": gradient}, {"value": want[0], "gradient": want[2]}, 1e-11)


@rows(CASES, ("batch",))
def test_checkify_raises_no_false_alarm_and_finds_a_true_one(name):
    n = CASES[name]

    def check(x):
        return checkify.checkify(
            jax.value_and_grad(lambda x: scalar(normalize(x, n).y.ravel())), errors=checkify.float_checks
        )(x)

    checked = jit(n, check)
    x = Z[:SIZE].reshape(SHAPE).astype(np.float32)
    for harmless in (x, 0 * x, 1 + 0 * x):
        error, (_, gradient) = checked(harmless)
        assert error.get() is None
        assert jnp.isfinite(gradient).all()
    assert checked(np.where(x == x.max(), np.inf, x))[0].get() is not None


@rows(CASES, ("batch",))
def test_without_jit_the_numbers_are_the_same_and_debug_nans_finds_none(name):
    n, f = CASES[name], layer(CASES[name])
    with jax.enable_x64(True), jax.debug_nans(True):
        with jax.disable_jit():
            gradient, value = jax.grad(lambda z: (scalar(f(z)), f(z)), has_aux=True)(jnp.asarray(Z))
        want = obvious(n, Z)
    agree({"value": value, "gradient": gradient}, {"value": want[0], "gradient": want[2]}, 1e-11)


@rows(ROWS, ("group", "divisive"))
def test_in_float64_a_row_is_exact_to_twelve_digits(name):
    with jax.enable_x64(True):
        x = example(name, dtype=np.float64)
        got = jit(ROWS[name], lambda x: normalize(x, ROWS[name]))(x)
        want = reference.normalize(x, ROWS[name])
        agree(got._asdict(), {"y": want[0], "centered": want[1]}, 1e-12)


# Every axis that can be, sharded at once.

AXES = ("n", "h", "w", "c")
SHARDED = {"n": "data", "h": "rows", "c": "model"}
SPEC = PartitionSpec(*map(SHARDED.get, AXES))


def over_shards(field):
    """The field with the mapped axis of each sharded axis: "...:5 c" becomes "h:5@rows w:5 c@model"."""
    if field is None:
        return None
    atoms = [atom.replace("...", axis) for atom in str(field).split() for axis in ("hw" if "..." in atom else " ")]
    return " ".join(atom + ("@" + SHARDED[atom[0]] if atom[0] in SHARDED else "") for atom in atoms)


def sharded(n):
    return replace(n, mean=over_shards(n.mean), var=over_shards(n.var), floor=over_shards(n.floor))


def by_shard_map(n, check_vma):
    mesh = jax.make_mesh(
        (2, 2, 2), tuple(SHARDED.values()), (jax.sharding.AxisType.Auto,) * 3, devices=jax.devices("cpu")[:8]
    )

    def one(x, weights):
        return normalize(x, sharded(n), "n h w c", mask=weights).y

    f = jax.shard_map(one, mesh=mesh, in_specs=(SPEC, SPEC), out_specs=SPEC, check_vma=check_vma)
    return lambda x, weights: f(x.reshape(SHAPE), weights).ravel()


def by_vmap(n):
    def one(x, weights):
        return normalize(x, sharded(n), "n h w c", mask=weights).y

    for name in SHARDED.values():
        one = jax.vmap(one, axis_name=name)

    def split(a):  # [c, h, n] of shards in front, the innermost vmap last
        a = a.reshape(2, 1, 2, 3, 2, 2, 4)
        return a.transpose(5, 2, 0, 1, 3, 4, 6)

    def f(x, weights):
        y = one(split(x.reshape(SHAPE)), None if weights is None else split(weights))
        return y.transpose(2, 3, 1, 4, 5, 0, 6).ravel()

    return f


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        pytest.param(name, masked, marks=() if name in ("batch", "divisive") and not masked else pytest.mark.slow)
        for masked in (False, True)
        for name in (PATHS if masked else CASES)
    ],
)
def test_rows_over_three_mapped_axes_are_rows_of_one_array_with_all_their_derivatives(name, masked):
    n = CASES[name]
    ways = {"shard_map": by_shard_map(n, True)}
    if not masked:
        ways["vmap"] = by_vmap(n)
        if name in PATHS:
            ways["unchecked shard_map"] = by_shard_map(n, False)
    weights, behind = (WEIGHTS, BEHIND[:SIZE]) if masked else (None, np.zeros(SIZE, bool))
    dx, rest = DZ[:SIZE], np.concatenate([np.ones(CHANNELS), np.zeros(CHANNELS), [n.eps]])
    with jax.enable_x64(True):
        run = jit(n, lambda x, dx: {way: at_once(lambda x, f=f: f(x, weights), x, dx) for way, f in ways.items()})
        got = run(np.where(behind, np.nan, Z[:SIZE]), dx)
        z = np.concatenate([np.where(behind, 0, Z[:SIZE]), rest])
        value, jacobian, gradient, hessian = obvious(n, z, weights)
    want = {
        "value": value,
        "jvp": jacobian[:, :SIZE] @ dx,
        "gradient": gradient[:SIZE],
        "forward over reverse": hessian[:SIZE, :SIZE] @ dx,
    }
    for found in got.values():
        agree(found, want, 1e-11)


# Low precision and nothing at all.


@rows(CASES, ("group",))
def test_bfloat16_derivatives_are_the_float64_ones_rounded_once(name):
    n = CASES[name]
    x, dx, dy = (jnp.asarray(a[:SIZE], jnp.bfloat16) for a in (Z, DZ, DY))

    def f(x):
        return normalize(x.reshape(SHAPE), n).y.ravel()

    def both(x, dx, dy):
        y, back = jax.vjp(f, x)
        return {"value": y, "gradient": back(dy)[0], "jvp": jax.jvp(f, (x,), (dx,))[1]}

    got = jit(n, both)(x, dx, dy)
    with jax.enable_x64(True):
        exact = np.concatenate([np.asarray(x, float), np.ones(CHANNELS), np.zeros(CHANNELS), [n.eps]])
        value, jacobian, *_ = obvious(n, exact)
    jacobian = jacobian[:, :SIZE]
    want = {"value": value, "gradient": np.asarray(dy, float) @ jacobian, "jvp": jacobian @ np.asarray(dx, float)}
    for kind in want:
        assert got[kind].dtype == jnp.bfloat16
        bound = 2**-8 * np.abs(want[kind]) + 2e-6 * np.abs(want[kind]).max()
        assert (np.abs(np.asarray(got[kind], float) - want[kind]) <= bound).all(), kind


@rows(CASES, ("batch", "divisive", "top_batch"))
@pytest.mark.parametrize("shape", [(0, 6, 2, 8), (2, 0, 2, 8), (2, 6, 2, 0)], ids=str)
def test_axes_without_elements_give_finite_statistics_and_zero_gradients(name, shape):
    n = CASES[name]
    x, scale, bias = jnp.zeros(shape), jnp.ones(shape[-1]), jnp.ones(shape[-1])

    def f(x, scale, bias):
        out = normalize(x, n, scale=scale, bias=bias)
        return jnp.sum(out.y), out

    gradient, out = jit(n, jax.grad(f, (0, 1, 2), has_aux=True))(x, scale, bias)
    assert out.y.shape == gradient[0].shape == shape
    assert all((g == 0).all() for g in gradient)
    assert all(jnp.isfinite(s).all() for s in out.stats if s is not None)


def test_the_matrix_has_every_row_of_the_table():
    assert set(TABLE) <= set(CASES)


EPS_SHAPES = {"of each example": (2, 1, 1, 1), "of each channel": (1, 1, 1, 32), "of each element": (2, 4, 4, 32)}


@pytest.mark.parametrize("large", [True, pytest.param(False, marks=pytest.mark.slow)])
@rows(("token", "layer", "batch", "divisive"), quick=("token",))
def test_gradient_with_an_array_of_eps_is_that_of_plain_differentiation(name, large, monkeypatch):
    monkeypatch.setattr(derivative, "LARGE", 0 if large else 2**20)
    n = CASES[name] if name != "divisive" else Normalizer("...:3 c", "...:3 c")
    rng = np.random.default_rng(0)
    x, scale, g = (rng.normal(size=(2, 4, 4, 32)).astype(np.float32) for _ in range(3))
    given = [(x, rng.uniform(0.2, 1, shape).astype(np.float32), scale) for shape in EPS_SHAPES.values()]

    def gradients(*args):
        return jax.grad(lambda x, eps, scale: jnp.vdot(g, normalize(x, n, eps=eps, scale=scale).y), (0, 1, 2))(*args)

    found = jit(n, lambda given: [gradients(*args) for args in given])(given)
    monkeypatch.setattr(derivative, "has_rule", lambda *_: False)
    expected = jit(n, lambda given: [gradients(*args) for args in given])(given)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, atol=2e-5)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_gradient_of_pooled_windows_is_as_exact_as_plain_differentiation(mean, monkeypatch):
    n, rng = Normalizer("...:5 c", "...:5 c"), np.random.default_rng(0)
    x = (mean + rng.normal(size=(2, 8, 8, 64))).astype(np.float32)
    scale, g = (rng.normal(size=shape).astype(np.float32) for shape in ((64,), x.shape))

    def gradient(dtype):
        given = [jnp.asarray(a, dtype) for a in (x, scale, g)]
        f = jit(n, lambda x, scale, g: jax.grad(lambda x: jnp.vdot(normalize(x, n, scale=scale).y, g))(x))
        return np.asarray(f(*given), np.float64)

    ruled = gradient(np.float32)
    monkeypatch.setattr(derivative, "has_rule", lambda *_: False)
    plain = gradient(np.float32)
    with jax.enable_x64(True):
        exact = gradient(np.float64)
    size = np.abs(exact).max()
    assert np.abs(ruled - exact).max() <= 1.5 * np.abs(plain - exact).max() + 2e-7 * size
