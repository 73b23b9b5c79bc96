"""The equation: every row against its obvious form, its invariances, its derivatives, its precision."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx import Rngs
from jax.test_util import check_grads

import normjax
from normjax import TABLE, Normalizer, explain, linen, nnx, normalize, top
from normjax._normalize.evaluate import equation
from tests import reference
from tests.rows import CHANNELS, DIFFERENTIABLE, ROWS, compiled, example, jit, slow_but, with_eps

rows = pytest.mark.parametrize("name", ROWS)
QUICK = ("batch", "divisive", "group")
PATHS = (*QUICK, "layer", "rms", "contrast", "l1_batch", "zero_border", "keep_mean_token")


@rows
def test_row_equals_the_equation_in_float64(name):
    x = example(name)
    got, want = compiled(x, ROWS[name]), reference.normalize(x, ROWS[name])
    np.testing.assert_allclose(got.y, want[0], atol=1e-5)
    np.testing.assert_allclose(got.centered, want[1], atol=1e-5)
    for mine, theirs in zip(got.stats[:2], want[2:], strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            np.testing.assert_allclose(np.broadcast_to(mine, x.shape), theirs, rtol=1e-5, atol=1e-5)


@rows
def test_row_with_a_mask_equals_the_equation_in_float64(name):
    x = example(name)
    mask = np.random.default_rng(1).uniform(size=x.shape) > 0.3
    if ROWS[name].order == math.inf:
        want = reference.normalize(np.where(mask, x, 0), Normalizer("n ...", None), mask=mask)[1]
        largest = np.abs(want).max((0, 1, 2), keepdims=True)
        np.testing.assert_allclose(compiled(x, ROWS[name], mask=mask).y, want / (1e-5 + largest), atol=5e-6)
        return
    got = compiled(np.where(mask, x, np.nan), ROWS[name], mask=mask)
    np.testing.assert_allclose(got.y, reference.normalize(x, ROWS[name], mask=mask)[0], atol=3e-5)
    assert (np.asarray(got.y)[~mask] == 0).all()


@pytest.mark.parametrize("name", slow_but(ROWS, *PATHS))
def test_every_layout_gives_the_same_numbers(name):
    x = example(name)
    want = np.moveaxis(compiled(x, ROWS[name]).y, -1, 1)
    np.testing.assert_allclose(compiled(np.moveaxis(x, -1, 1), ROWS[name], "n c ...").y, want, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(ROWS, *QUICK))
def test_more_leading_axes_change_nothing(name):
    x = example(name)
    named = compiled(x[None], ROWS[name], "batch n ... c").y[0]
    np.testing.assert_allclose(named, compiled(x, ROWS[name]).y, atol=1e-5)


@rows
def test_bfloat16_in_bfloat16_out_with_float32_statistics(name):
    x = jnp.asarray(example(name), jnp.bfloat16)
    got = compiled(x, ROWS[name])
    assert got.y.dtype == jnp.bfloat16
    assert got.centered.dtype == jnp.float32
    assert all(s is None or s.dtype == jnp.float32 for s in got.stats[:2])
    want = reference.normalize(np.asarray(x, np.float64), ROWS[name])[0]
    np.testing.assert_allclose(np.asarray(got.y, np.float64), want, rtol=0.004, atol=1e-4)


def plain(x, n, **kwargs):
    """The equation without its derivative rule, written out."""

    def average(a, field):
        return normjax.expect(a, field, border=n.border, window=n.window, lean=n.lean)

    v = x if n.mean is None else x - average(x, n.mean)
    y = x if n.keep_mean else v
    if n.var is None:
        return y
    a = jnp.abs(v)
    m = jnp.max(a, (0, 1, 2), keepdims=True) if n.order == math.inf else average(a**n.order, n.var)
    d = (n.eps + n.gain * m) ** n.power
    if n.floor is not None:
        d = jnp.maximum(d, average(jnp.broadcast_to(d, x.shape), n.floor))
    return y / d


def probe(f, shape):
    weights = jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)
    return lambda x: jnp.vdot(f(x), weights)


@pytest.mark.parametrize("name", slow_but(ROWS, *PATHS))
def test_gradient_equals_that_of_the_equation_written_out(name):
    x, n = jnp.asarray(example(name)), ROWS[name]
    mine = jit(jax.grad(probe(lambda x: normalize(x, n).y, x.shape)))(x)
    want = jit(jax.grad(probe(lambda x: plain(x, n), x.shape)))(x)
    np.testing.assert_allclose(mine, want, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    "name", slow_but(["batch", "group", "rms", "divisive", "contrast", "variance"], "batch", "divisive")
)
def test_gradients_of_scale_bias_and_eps_are_right(name):
    n = ROWS[name]
    x = jnp.asarray(example(name)[:4, :4, :4])
    c = x.shape[-1]
    scale, bias, eps = jnp.linspace(0.5, 1.5, c), jnp.linspace(-1.0, 1.0, c), jnp.asarray(0.5)
    # The row's own reverse against its own forward mode, and the sum written out.
    f = jax.jit(lambda x, s, b, e: jnp.sin(normalize(x, n, scale=s, bias=b, eps=e).y).sum())
    check_grads(f, (x, scale, bias, eps), 1, modes=["fwd", "rev"], atol=0.05, rtol=0.05, eps=1e-2)
    y = np.asarray(compiled(x, n, eps=eps).y)
    dout = np.cos(y * np.asarray(scale) + np.asarray(bias))
    got = jit(jax.grad(f, (1, 2)))(x, scale, bias, eps)
    np.testing.assert_allclose(got[0], (dout * y).sum((0, 1, 2)), rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], dout.sum((0, 1, 2)), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", slow_but(ROWS, *PATHS))
@pytest.mark.parametrize("eps", [0.0, pytest.param(None, marks=pytest.mark.slow)])
def test_constant_input_gives_finite_values_and_gradients(name, eps):
    n = ROWS[name] if eps is None else with_eps(ROWS[name], eps)
    f = jit(jax.value_and_grad(lambda x: jnp.sum(normalize(x, n).y ** 2)))
    for value in (0.0, 1.0, 0.1):
        y, gradient = f(np.full(example(name).shape, value, np.float32))
        assert np.isfinite(y)
        assert np.isfinite(gradient).all()


CENTRED = [k for k, n in ROWS.items() if n.mean is not None and n.border == "truncate" and not n.keep_mean]


@pytest.mark.parametrize("name", CENTRED)
def test_shift_and_scale_do_not_change_output(name):
    n, x = with_eps(ROWS[name], 0.0), example(name)
    if n.var is None:
        np.testing.assert_allclose(compiled(x + 3, n).y, compiled(x, n).y, atol=1e-5)
    else:
        np.testing.assert_allclose(compiled(4 * x + 3, n).y, compiled(x, n).y, atol=2e-5)


@pytest.mark.parametrize("name", [k for k, n in ROWS.items() if not any(f.mixes_examples for f in n.fields)])
def test_rows_that_do_not_mix_examples_commute_with_vmap(name):
    x = example(name)
    alone = jit(jax.vmap(lambda x: normalize(x, ROWS[name], "... c").y))(x)
    np.testing.assert_allclose(alone, compiled(x, ROWS[name]).y, atol=1e-5)


# Mean / std of float32 data; ramps and means in the narrow dtypes, as far as the true y fits the dtype.
HARD = {
    **{f"float32, mean {mean:g}": (np.float32, "normal", mean) for mean in (0, 1e2, 1e3, 1e4, 1e5)},
    **{f"{np.dtype(t)}, ramp": (t, "ramp", 2100.0) for t in (jnp.bfloat16, np.float16)},
    **{f"{np.dtype(t)}, mean {mean:g}": (t, "normal", mean) for t in (jnp.bfloat16, np.float16) for mean in (0, 1e3)},
}


@pytest.mark.parametrize("name", slow_but(ROWS, *QUICK))
def test_error_against_float64_is_a_few_units_of_the_last_place(name):
    n, shape = ROWS[name], (16, 14, 13, CHANNELS.get(name, 16))
    for what, (dtype, kind, size) in HARD.items():
        ramp = np.broadcast_to(np.linspace(0, size, shape[-1]), shape)  # along the channels
        x = (
            (ramp if kind == "ramp" else np.random.default_rng(1).normal(size, 1, shape))
            .astype(np.float32)
            .astype(dtype)
        )
        y, _, mean, m = reference.normalize(np.asarray(x, np.float64), n)
        bound = 4 * float(jnp.finfo(dtype).eps) * (np.abs(y) + 1)
        if mean is not None:
            spread = 1.0 if m is None else np.maximum(m if n.order != 2 else np.sqrt(m), 1e-6)
            bound = bound + 4 * np.finfo(np.float32).eps * np.abs(mean) / spread
        fits = np.abs(y) < float(jnp.finfo(dtype).max)
        error = np.abs(np.asarray(compiled(x, n).y, np.float64) - y)
        assert (error[fits] <= bound[fits]).all(), f"{what}: {np.max(error[fits] / bound[fits]):.2f} of the bound"


def test_moments_of_order_inf_and_top_k_by_hand():
    def moment(field, order, mask=None):
        return compiled(x, Normalizer(None, field, order=order, eps=0.0, power=1.0), mask=mask).stats.var.tolist()

    x = np.array([[1.0, -2.0, 4.0, -3.0]], np.float32)
    assert moment("c", math.inf) == [[4.0]]
    assert moment("c", top(2)) == [[3.5]]
    assert moment("c/2", top(1)) == [[2.0, 2.0, 4.0, 4.0]]
    assert moment("c:3", math.inf) == [[2.0, 4.0, 4.0, 4.0]]
    assert moment("c", top(2), mask=np.array([1, 1, 0, 0])) == [[1.5]]


@pytest.mark.parametrize("name", slow_but(DIFFERENTIABLE, *PATHS))
def test_nan_behind_a_mask_reaches_nothing(name):
    x = example(name)
    mask = np.random.default_rng(3).uniform(size=x.shape) > 0.4
    poisoned = np.where(mask, x, np.nan)

    def value(x, bias):
        out = normalize(x, ROWS[name], mask=mask, bias=bias)
        return jnp.sum(out.y**2), out

    found = jit(jax.value_and_grad(value, has_aux=True))(poisoned, np.float32(0.5))
    (total, out), gradient = jax.tree.map(np.asarray, found)
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()
    assert (gradient[~mask] == 0).all()
    assert (out.y[~mask] == 0.5).all()
    assert all(s is None or np.isfinite(s).all() for s in out.stats[:2])


def test_a_field_without_weight_gives_the_bias():
    x, mask = example("layer"), np.ones((8, 1, 1, 1), bool)
    mask[2] = False
    out = compiled(x, "layer", mask=mask, bias=1.5)
    assert (out.y[2] == 1.5).all()
    assert out.stats.mean_weight[2] == 0
    np.testing.assert_allclose(out.y[3], compiled(x, "layer", bias=1.5).y[3], atol=1e-6)


def test_statistics_can_be_given():
    x = example("batch")
    y, _, stats = compiled(x, "batch")
    np.testing.assert_allclose(compiled(x[:1], "batch", stats=stats).y, y[:1], atol=1e-6)
    afresh = compiled(x, ROWS["extended"], stats=normjax.Stats(stats.mean, None))
    np.testing.assert_allclose(afresh.y, compiled(x, ROWS["extended"]).y, atol=1e-6)


def test_numbers_of_numpy_become_numbers_of_python():
    n = Normalizer("c", "c", eps=cast(Any, np.float32(0.25)), order=cast(Any, np.int64(2)))
    assert repr(n) == "Normalizer('c', 'c', eps=0.25)"
    assert n == Normalizer("c", "c", eps=0.25)


def test_axis_index_groups_average_within_each_group():
    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    span = normjax.Span(None, mapped="d", groups=((0, 1), (2, 3)))
    n = Normalizer(normjax.Field((normjax.Span("n"), span)), normjax.Field((normjax.Span("n"), span)))
    got = jax.pmap(lambda x: normalize(x, n).y, axis_name="d")(x) if jax.device_count() >= 4 else None
    if got is None:
        pytest.skip("needs 4 devices")
    want = np.concatenate([normalize(part.reshape(12, 3), "batch").y.reshape(2, 6, 3) for part in (x[:2], x[2:])])
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("token", (4096, 1024)), ("rms", (2048, 512)), ("batch", (64, 32, 32, 64)), ("group", (64, 32, 32, 64))],
)
def test_temporaries_of_forward_and_backward_are_a_fiftieth_of_x(name, shape):
    if jax.default_backend() != "cpu":
        pytest.skip("what XLA keeps is measured on a CPU")

    def both(x, scale, bias, g):
        y, back = jax.vjp(lambda x, s, b: normalize(x, name, scale=s, bias=b).y, x, scale, bias)
        return y, *back(g)

    x, p = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(shape[-1:], np.float32)
    memory = jax.jit(both).lower(x, p, p, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 0.02 * 4 * math.prod(shape)


def test_zero_size_arrays_pass_through():
    for name in ("instance",):
        for shape in ((0, 4, 4, 8), (2, 0, 4, 8)):
            assert normalize(jnp.zeros(shape), name).y.shape == shape


@rows
def test_repr_evaluates_back(name):
    assert eval(repr(ROWS[name]), {"Normalizer": Normalizer, "top": top}) == ROWS[name]
    hash(ROWS[name])


def test_the_table_pickles_and_copies_and_refuses_writes():
    for twin in (pickle.loads(pickle.dumps(TABLE)), copy.deepcopy(TABLE), copy.copy(TABLE)):
        assert twin == TABLE
        assert list(twin) == list(TABLE)
    table: Any = TABLE
    with pytest.raises(TypeError):
        table["batch"] = TABLE["layer"]
    with pytest.raises(TypeError):
        del table["batch"]
    assert eval(repr(TABLE), {"Frozen": dict, "Normalizer": Normalizer}) == TABLE


def test_fields_are_parsed_and_stay_fields_when_copied():
    n = Normalizer("n ...", None, floor="c")
    assert isinstance(n.mean, normjax.Field)
    assert n.var is None
    for twin in (pickle.loads(pickle.dumps(n)), copy.deepcopy(n), replace(n, mean=normjax.Field.parse("n ..."))):
        assert twin == n
        assert hash(twin) == hash(n)
    with pytest.raises(FrozenInstanceError):
        setattr(n, "mean", "c")  # noqa: B010 (what a checker refuses)
    with pytest.raises(TypeError, match="var"):
        cast(Any, Normalizer)("c")


@rows
def test_explain_speaks_of_every_row(name):
    text = explain(ROWS[name], example(name).shape)
    assert "centre" in text
    assert "divide" in text


def test_explain_counts_right():
    text = explain("batch", (8, 32, 32, 64))
    assert "mean of 8192 elements: all 8 of axis 'n', all 32 x 32 of axis '...'" in text
    assert "64 means, one for each of: 64 of axis 'c'" in text


def test_complex_input_is_divided_by_its_absolute_spread():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(16, 4)) + 1j * rng.normal(size=(16, 4))).astype(np.complex64)
    out = normalize(x, "batch")
    np.testing.assert_allclose(out.y, reference.normalize(x, TABLE["batch"])[0], atol=1e-6)
    assert out.stats.var.dtype == jnp.float32


def test_equation_refuses_nothing_where_flax_does_not():
    assert equation(jnp.ones((1, 4)), TABLE["batch"]).y.tolist() == [[0.0] * 4]


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(example("token", dtype=np.float64))
        out = normalize(x, "token")
        assert out.y.dtype == jnp.float64
        np.testing.assert_allclose(out.y, reference.normalize(x, TABLE["token"])[0], atol=1e-13)


PRESETS = {
    "DivisiveNorm": ((), {"window": 3, "sigma": 0.5, "border": "zero"}),
    "LocalResponseNorm": ((4,), {"alpha": 0.1, "k": 2.0}),
    "LocalContrastNorm": ((5,), {"shape": "box"}),
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", ["n ... c", "n c ..."])
def test_presets_that_flax_lacks_are_the_same_in_linen_and_nnx(name, layout):
    args, kwargs = PRESETS[name]
    x = example("token")[:2]
    one = jit(getattr(linen, name)(*args, **kwargs, layout=layout).apply)({}, x)
    if name == "DivisiveNorm":
        features = x.shape[-1] if layout == "n ... c" else x.shape[1]
        two = jit(nnx.DivisiveNorm(features, **kwargs, layout=layout, rngs=Rngs(0)))(x)
    else:
        two = jit(getattr(nnx, name)(*args, **kwargs, layout=layout))(x)
    np.testing.assert_array_equal(one, two)
    row = {
        "DivisiveNorm": Normalizer("...:3 c", "...:3 c", eps=0.25, border="zero"),
        "LocalResponseNorm": Normalizer(None, "c:4", eps=2.0, gain=0.1, power=0.75, border="zero", lean="before"),
        "LocalContrastNorm": Normalizer("...:5 c", "...:5 c", floor="..."),
    }[name]
    np.testing.assert_allclose(one, reference.normalize(x, row, layout)[0], atol=1e-5)
