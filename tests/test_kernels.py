"""The fused rows: interpreted on a CPU they are right, and they lower for GPUs and TPUs without one.

The kernels are made to cut small arrays into several programs, several blocks each, with a ragged end.
"""

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as fl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx import Rngs
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from scipy import special

from normjax import Normalizer, Stats, kernels, linen, nnx, normalize
from normjax.kernels import _group as group
from normjax.kernels import _pallas as pallas

P = jax.sharding.PartitionSpec
TARGETS = ("interpret", "interpret tpu")


class Case(NamedTuple):
    """A call of `kernels.normalize`."""

    shape: tuple
    axes: tuple
    scale: tuple | None = None
    bias: tuple | None = None
    centre: bool = True
    gain: float = 1.0
    power: float = 0.5
    dtype: type = jnp.float32

    @property
    def options(self):
        return {"centre": self.centre, "gain": self.gain, "power": self.power}


CASES = {
    "token": Case((13, 22), (1,), (1, 22), (1, 22)),
    "rms": Case((3, 6, 11), (2,), (1, 1, 11), centre=False),
    "layer": Case((5, 3, 2, 5), (1, 2, 3), (1, 1, 1, 5), (1, 1, 1, 5)),
    "channels_first": Case((4, 3, 5, 4), (2, 3)),
    "one_row": Case((1, 130), (1,), (1, 130), None, gain=2.0, power=0.75),
    "whole_array": Case((6, 7), (0, 1), (), (6, 7), power=1.0),
    "power_of_two": Case((8, 16), (1,), None, (1, 16), power=0.3),
    "one_column": Case((5, 1), (1,), (), None, centre=False),
    "bfloat16": Case((19, 20), (1,), (1, 20), (1, 20), dtype=jnp.bfloat16),
    "float16": Case((19, 20), (1,), None, (1, 20), dtype=jnp.float16),
}
QUICK = {
    ("token", "interpret"),
    ("layer", "interpret"),
    ("one_row", "interpret"),
    ("bfloat16", "interpret"),
    ("rms", "interpret tpu"),
}  # the other cases are slow


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(pallas, "PROGRAMS", 2)
    monkeypatch.setattr(pallas, "SMALL", 64)
    monkeypatch.setattr(pallas, "LARGE", 64)
    monkeypatch.setattr(pallas, "TPU_BLOCK", 16 * 128)


@pytest.fixture
def _interpreted():
    with kernels.using("interpret"):
        yield


def running(mode):
    """The mode; also "interpret tpu", which is for tests alone."""
    return kernels._choice(mode)


def operands(case, seed=0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(0.7, 1.5, case.shape), case.dtype)
    scale, bias = (
        None if s is None else jnp.asarray(rng.normal(1, 1, s), jnp.float32) for s in (case.scale, case.bias)
    )
    small = tuple(1 if i in case.axes else n for i, n in enumerate(case.shape))
    g = jnp.asarray(rng.normal(size=case.shape), case.dtype)
    gmean, gvar = (jnp.asarray(rng.normal(size=small), jnp.float32) for _ in range(2))
    return (x, jnp.float32(0.3), scale, bias), (g, gmean if case.centre else None, gvar)


def in_float64(case, *given: Any) -> Any:
    x, eps, scale, bias = given
    mean = x.mean(case.axes, keepdims=True) if case.centre else None
    v = x if mean is None else x - mean
    var = (v * v).mean(case.axes, keepdims=True)
    y = v / (eps + case.gain * var) ** case.power * (1 if scale is None else scale) + (0 if bias is None else bias)
    return y, mean, var


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def slopes(f, x, step=1e-5):
    """The gradient of f at x by central differences."""
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index], down[index] = up[index] + step, down[index] - step
        out[index] = (f(up) - f(down)) / (2 * step)
    return out


def close(found, expected, tolerance):
    """All of a tree, relative to the largest element of each leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for f, e in zip(jax.tree.leaves(wide(found)), jax.tree.leaves(wide(expected)), strict=True):
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * max(np.abs(e).max(), 1e-3))


def summed(case, evaluate=kernels.normalize, seed=0):
    """A scalar of everything that comes out, as a function of everything that goes in."""
    _, cotangents = operands(case, seed)

    def f(x, eps, scale, bias):
        out = evaluate(x, case.axes, eps, scale, bias, **case.options)
        products = jax.tree.map(lambda o, c: jnp.sum(o.astype(jnp.float32) * c.astype(jnp.float32)), out, cotangents)
        return sum(jax.tree.leaves(products))

    return f


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("name", "run"),
    [
        pytest.param(name, run, marks=() if (name, run) in QUICK else pytest.mark.slow)
        for run in TARGETS
        for name in CASES
    ],
)
def test_output_statistics_and_all_gradients_are_those_of_float64(name, run):
    case = CASES[name]
    given, cotangents = operands(case)

    @jax.jit
    def both(given, cotangents):
        evaluate = functools.partial(kernels.normalize, **case.options)
        out, pull = jax.vjp(lambda x, eps, scale, bias: evaluate(x, case.axes, eps, scale, bias), *given)
        return out, pull(cotangents)

    with running(run):
        out, gradients = both(given, cotangents)
    exact = wide(given)
    low = jnp.finfo(case.dtype).eps
    close(out[0], in_float64(case, *exact)[0], 2e-6 if case.dtype == jnp.float32 else low)
    close(out[1:], in_float64(case, *exact)[1:], 1e-6)
    assert out[0].dtype == case.dtype
    assert gradients[0].dtype == case.dtype

    def scalar(i, value):
        out = in_float64(case, *exact[:i], value, *exact[i + 1 :])
        return sum(np.sum(o * c) for o, c in zip(out, wide(cotangents), strict=True) if o is not None)

    expected = [None if p is None else slopes(functools.partial(scalar, i), p) for i, p in enumerate(exact)]
    close(gradients[0], expected[0], 2e-5 if case.dtype == jnp.float32 else low)
    close(gradients[1:], tuple(expected[1:]), 2e-5)


def test_forward_mode_works_where_the_kernels_are_off():
    x, t = jnp.arange(6.0).reshape(2, 3) ** 2, jnp.ones((2, 3)).at[0, 1].set(2.0)
    _, tangent = jax.jvp(lambda x: kernels.normalize(x, (1,), 0.1)[0], (x,), (t,))
    case = Case((2, 3), (1,))
    up, down = (in_float64(case, *wide((x + step * t, 0.1)), None, None)[0] for step in (1e-2, -1e-2))
    close(tangent, (up - down) / 2e-2, 1e-3)


@pytest.mark.usefixtures("_interpreted")
def test_variance_keeps_its_digits_at_a_mean_of_ten_thousand():
    x = np.random.default_rng(0).normal(1e4, 1, (8, 1000)).astype(np.float32)
    y, mean, var = kernels.normalize(x, (1,), 0.0)
    assert mean is not None
    v = x.astype(np.float64) - x.mean(1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(mean, x.mean(1, keepdims=True, dtype=np.float64), rtol=5e-7)
    np.testing.assert_allclose(var, (v * v).mean(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(y, v / v.std(1, keepdims=True), atol=5e-3)


@pytest.mark.usefixtures("_interpreted")
def test_gradient_over_a_row_sums_to_zero_at_a_large_mean():
    x = np.random.default_rng(0).normal(1e4, 0.01, (8, 1000)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(kernels.normalize(x, (1,), 1e-5)[0] ** 3)))(x)
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-4 * float(jnp.abs(gradient).sum(1).max()))


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("power", [0.5, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.75, 1.0, 0.3))])
def test_constant_row_without_eps_gives_the_bias_and_no_gradient(power):
    @jax.jit
    def both(x, eps, scale):
        out, pull = jax.vjp(
            lambda x, eps, scale: kernels.normalize(x, (1,), eps, scale, 2.0, power=power)[0], x, eps, scale
        )
        return out, pull(jnp.ones_like(x))

    out, gradients = both(jnp.array([[0.0] * 5, [3.0] * 5]), 0.0, jnp.ones((1, 5)))
    np.testing.assert_array_equal(out, 2.0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_interpreted")
def test_nan_stays_in_its_row():
    x = jnp.arange(36.0).reshape(4, 9).at[1, 2].set(jnp.nan)
    loss = jax.value_and_grad(lambda x: (jnp.sum((y := kernels.normalize(x, (1,), 0.1)[0]) ** 2), y), has_aux=True)
    (_, y), gradient = jax.jit(loss)(x)
    for rows_of_nan in (y, gradient):
        assert np.isnan(rows_of_nan).any(1).tolist() == [False, True, False, False]


@pytest.mark.slow
@pytest.mark.usefixtures("_interpreted", "_small_blocks")
def test_vmapped_gradient_is_the_twins():
    case = CASES["token"]
    (x, eps, scale, bias), _ = operands(case)
    xs, scales = jnp.stack([x, 2 * x + 1, -x]), jnp.stack([scale, 2 * scale, -scale])
    found, expected = (
        jax.jit(jax.vmap(jax.grad(summed(case, evaluate), (0, 1, 2, 3)), (0, None, 0, None)))(xs, eps, scales, bias)
        for evaluate in (kernels.normalize, kernels.twin)
    )
    close(found, expected, 2e-5)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradient_through_scan_and_remat_is_the_twins(remat):
    case = CASES["token"]
    (x, _, scale, _), _ = operands(case)

    def loss(evaluate, x, scales):
        def layer(x, scale):
            return x + jnp.tanh(evaluate(x, case.axes, 0.1, scale)[0]), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, scales)[0] ** 2)

    scales = jnp.stack([scale, 0.5 * scale])
    expected = jax.jit(jax.grad(functools.partial(loss, kernels.twin), (0, 1)))(x, scales)
    with kernels.using("interpret"):
        close(jax.jit(jax.grad(functools.partial(loss, kernels.normalize), (0, 1)))(x, scales), expected, 1e-5)


FORWARD = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jit_jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "jvp_jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "grad_jvp": lambda f, x: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1])(x),
}


@pytest.mark.parametrize(
    "mode", ["jit_jvp", *(pytest.param(name, marks=pytest.mark.slow) for name in FORWARD if name != "jit_jvp")]
)
def test_forward_mode_is_that_of_the_twin(mode):
    def found(x):
        return FORWARD[mode](lambda x: jnp.tanh(kernels.normalize(x, (1,), 0.1)[0]).sum(), x)

    x = jnp.arange(6.0).reshape(2, 3) ** 2
    expected = found(x)
    with kernels.using("interpret"):
        close(found(x), expected, 1e-4)  # along x itself most of it cancels


SECOND = {
    "reverse_over_reverse": lambda f, x, t: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), t))(x),
    "forward_over_reverse": lambda f, x, t: jax.jvp(jax.grad(f), (x,), (t,))[1],
}


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("mode", [pytest.param("forward_over_reverse", marks=pytest.mark.slow), "reverse_over_reverse"])
def test_second_derivatives_over_reverse_mode_are_the_twins(mode):
    case = CASES["layer"]
    (x, *given), _ = operands(case)
    t = jnp.cos(x)
    found, expected = (
        jax.jit(functools.partial(SECOND[mode], lambda x, f=f: jnp.tanh(summed(case, f)(x, *given))))(x, t)
        for f in (kernels.normalize, kernels.twin)
    )
    close(found, expected, 1e-5)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("used", "read"), [((0,), (True, False)), ((0, 1), (True, True)), ((0, 3), (True, True))])
def test_cotangent_of_a_sum_that_nothing_uses_is_not_read(used, read, monkeypatch):
    seen = []
    kernel = pallas.backward

    def spy(*args):
        seen.append(tuple(c is not None for c in args[-2:]))
        return kernel(*args)

    monkeypatch.setattr(pallas, "backward", spy)

    def loss(x):
        out: Any = kernels.add_and_normalize(x, x, (1,), 0.1)
        return sum(jnp.sum(out[i] ** 2) for i in used)

    jax.eval_shape(jax.grad(loss), jnp.ones((2, 3)))
    assert seen == [read]


@pytest.mark.usefixtures("_interpreted")
def test_gradient_of_the_variance_alone_is_the_twins():
    x = jnp.arange(6.0).reshape(2, 3) ** 2
    found, expected = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x, (1,), 0.1)[2] ** 2)))(x) for f in (kernels.normalize, kernels.twin)
    )
    close(found, expected, 1e-6)


def spread(evaluate, mesh, check):
    """The gradient of a scale that every device has, and of x in shards."""

    def loss(scale, x):
        def shard(scale, x):
            return jax.lax.psum(jnp.sum(evaluate(x, (1,), 0.1, scale)[0] ** 3), "rows")

        return jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P(), check_vma=check)(scale, x)

    return jax.jit(jax.grad(loss, (0, 1)))


@pytest.fixture
def mesh():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    return jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


@pytest.mark.slow
@pytest.mark.usefixtures("_interpreted", "_small_blocks")
def test_gradient_inside_shard_map_is_the_twins(mesh):
    (x, _, scale, _), _ = operands(Case((38, 20), (1,), (1, 20)))
    close(spread(kernels.normalize, mesh, False)(scale, x), spread(kernels.twin, mesh, False)(scale, x), 1e-5)


# With a residual and an activation, and in groups.

ACT = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "exact_gelu": lambda z: z * special.ndtr(z),
    "silu": lambda z: z * special.expit(z),
}
ADDED = {
    "gelu": ("gelu", True, True, jnp.float32),
    "relu rms": ("relu", False, True, jnp.float32),
    "silu bfloat16": ("silu", True, True, jnp.bfloat16),
    "exact gelu alone": ("exact_gelu", True, False, jnp.float32),
    "no activation": (None, True, True, jnp.float32),
}
QUICK_ADDED = {("gelu", "interpret"), ("silu bfloat16", "interpret tpu")}


def near_float64(found, formula, given, cotangents, dtype):
    """Outputs, and gradients by central differences, of a formula in float64."""
    exact, low = wide(given), jnp.finfo(dtype).eps
    outputs, gradients = found
    expected = formula(*exact)
    for f, e in zip(outputs, expected, strict=True):
        close(f, e, max(4e-6, low))

    def scalar(i, value):
        return sum(np.sum(o * c) for o, c in zip(formula(*exact[:i], value, *exact[i + 1 :]), cotangents, strict=True))

    for i, (p, gradient) in enumerate(zip(exact, gradients, strict=True)):
        close(gradient, slopes(functools.partial(scalar, i), p), max(4e-5, 2 * low))


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("name", "run"),
    [pytest.param(n, r, marks=() if (n, r) in QUICK_ADDED else pytest.mark.slow) for n in ADDED for r in TARGETS],
)
def test_sum_output_and_gradients_with_an_activation_are_those_of_float64(name, run):
    activation, centre, residual, dtype = ADDED[name]
    rng = np.random.default_rng(3)
    x, r = (jnp.asarray(rng.normal(0.3, 1.5, (7, 10)), dtype) for _ in range(2))
    given = (x, *((r,) if residual else ()), *(jnp.asarray(rng.normal(1, 1, (1, 10)), jnp.float32) for _ in range(2)))
    cotangents = tuple(rng.normal(size=x.shape) for _ in range(2))

    def ours(x, *rest):
        r, scale, bias = rest if residual else (None, *rest)
        return kernels.add_and_normalize(x, r, (1,), 0.3, scale, bias, centre=centre, activation=activation)[:2]

    def formula(x, *rest):
        r, scale, bias = rest if residual else (0, *rest)
        added = x + r
        v = added - added.mean(1, keepdims=True) if centre else added
        return ACT[activation](v / np.sqrt(0.3 + (v * v).mean(1, keepdims=True)) * scale + bias), added

    if dtype == jnp.bfloat16:  # the kernels normalize the sum as they store it
        given = (x, jnp.zeros_like(x), *given[2:])

    @jax.jit
    def both(*given):
        out, pull = jax.vjp(ours, *given)
        return out, pull(tuple(jnp.asarray(c, dtype) for c in cotangents))

    with running(run):
        assert has_kernel(ours, *given)
        near_float64(both(*given), formula, given, cotangents, dtype)


GROUPS = {  # the shape, the groups, and what comes after
    "group": ((3, 41, 6), 3, None),
    "instance": ((2, 40, 5), 5, "relu"),
    "one group": ((2, 3, 7), 1, None),
    "several parts": ((4, 9, 256), 128, "silu"),
}
QUICK_GROUPS = {("group", "interpret"), ("instance", "interpret tpu")}


@pytest.fixture
def _small_groups(monkeypatch):
    for name, value in {"GPU_CHUNK": 64, "TPU_CHUNK": 16 * 128, "PADDED": 1000}.items():
        monkeypatch.setattr(group, name, value)
    group.cut.cache_clear()
    yield
    group.cut.cache_clear()


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize(
    ("name", "run"),
    [pytest.param(n, r, marks=() if (n, r) in QUICK_GROUPS else pytest.mark.slow) for n in GROUPS for r in TARGETS],
)
def test_groups_and_their_gradients_are_those_of_float64(name, run):
    shape, groups, activation = GROUPS[name]
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(0.3, 1.5, shape), jnp.float32)
    given = (x, *(jnp.asarray(rng.normal(1, 1, (1, 1, shape[-1])), jnp.float32) for _ in range(2)))

    def ours(x, scale, bias):
        out: Any = kernels.normalize(x, (1,), 0.3, scale, bias, activation=activation, groups=groups)
        return out

    def formula(x, scale, bias):
        z = x.reshape(*shape[:2], groups, -1)
        mean = z.mean((1, 3), keepdims=True)
        var = np.square(z - mean).mean((1, 3), keepdims=True)
        y = ((z - mean) / np.sqrt(0.3 + var)).reshape(shape)
        return ACT[activation](y * scale + bias), *(
            np.repeat(m[:, :, :, 0], shape[-1] // groups, 2) for m in (mean, var)
        )

    cotangents = tuple(rng.normal(size=o.shape) for o in formula(*wide(given)))

    @jax.jit
    def both(*given):
        out, pull = jax.vjp(ours, *given)
        return out, pull(tuple(jnp.asarray(c, jnp.float32) for c in cotangents))

    with running(run):
        assert has_kernel(ours, *given)
        found = both(*given)
    if x.size < 2000:
        return near_float64(found, formula, given, cotangents, jnp.float32)
    close(found[0], formula(*wide(given)), 4e-6)
    close(found, both(*given), 2e-5)  # of the twin


@pytest.mark.slow
@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap", "hessian"])
def test_groups_and_added_rows_transform_as_their_twins(order):
    x, r = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 2, 4, 6)), jnp.float32) for i in range(2))
    scale = jnp.linspace(0.5, 2, 6).reshape(1, 1, 6)

    def f(x, r, scale):
        y, total, *_ = kernels.add_and_normalize(x, r, (2,), 0.1, scale, activation="gelu")
        return jnp.sum(total * kernels.normalize(y, (1,), 0.1, scale, groups=2)[0])

    def run():
        if order == "hessian":
            return jax.jit(jax.hessian(lambda x: f(x, r[0], scale)))(x[0])
        if order == "vmap of grad":
            return jax.jit(jax.vmap(jax.grad(f, (0, 1, 2)), (0, 0, None)))(x, r, scale)
        return jax.jit(jax.grad(lambda *a: jnp.sum(jax.vmap(f, (0, 0, None))(*a)), (0, 1, 2)))(x, r, scale)

    expected = run()
    with kernels.using("interpret"):
        close(run(), expected, 2e-5)


WRONG: Any = {"kernel": "pallas"}
REFUSED = {
    "a residual has the shape of x, (2, 3); found (3,)": lambda x: kernels.add_and_normalize(x, x[0], (1,), 0.1),
    "activation is one of None, 'relu', 'gelu', 'exact_gelu', 'silu'; found 'tanh'": lambda x: kernels.normalize(
        x, (1,), 0.1, activation="tanh"
    ),
    "groups take no residual: their kernel has no memory for it; add it before": lambda x: kernels.add_and_normalize(
        x, x, (0,), 0.1, groups=3
    ),
    "kernel is one of None, False, True; found 'pallas'": lambda _: nnx.RMSNorm(3, **WRONG, rngs=Rngs(0)),
    "AddNorm takes a row that stores no statistics; found 'batch'": lambda _: linen.AddNorm("batch"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_case_is_refused(said):
    with pytest.raises(ValueError, match=rf"^{re.escape(said)}$"):
        REFUSED[said](jnp.ones((2, 3)))


# Layers.

SPACE = jnp.arange(96.0).reshape(2, 3, 4, 4) ** 2 % 7
OPTION = {  # a layer, and what it is called with
    "LayerNorm": ((), {}),
    "RMSNorm": ((), {}),
    "GroupNorm": ((), {"num_groups": 2}),
    "InstanceNorm": ((), {}),
    "Norm": (("rms",), {"use_bias": False}),
    "AddNorm": (("token",), {"activation": "silu"}),
}


@pytest.mark.parametrize("name", OPTION)
def test_layers_have_a_kernel_where_their_option_says_so(name):
    args, options = OPTION[name]
    for kernel in (True, False):
        layer = getattr(linen, name)(*args, **options, kernel=kernel)
        variables = jax.eval_shape(layer.init, jax.random.key(0), SPACE)
        assert has_kernel(layer.apply, variables, SPACE) == kernel
        assert has_kernel(getattr(nnx, name)(4, *args, **options, kernel=kernel, rngs=Rngs(0)), SPACE) == kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTION)
def test_layers_with_a_kernel_are_those_without(name):
    args, options = OPTION[name]
    inputs = (SPACE, SPACE[::-1]) if name == "AddNorm" else (SPACE,)

    def run(kernel):
        layer = getattr(linen, name)(*args, **options, kernel=kernel)
        variables = layer.init(jax.random.key(0), *inputs)
        twin = getattr(nnx, name)(4, *args, **options, kernel=kernel, rngs=Rngs(0))
        close(twin(*inputs), layer.apply(variables, *inputs), 1e-6)

        def loss(variables, *inputs):
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(layer.apply(variables, *inputs)))

        return jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs) + 1))))(variables, *inputs)

    with kernels.using("interpret"):
        close(run(None), run(False), 2e-5)
    close(run(True), run(False), 2e-5)  # on a platform without kernels


def test_add_norm_leaves_masks_to_xla_and_does_without_a_residual():
    layer, x = linen.AddNorm(activation="relu", use_scale=False, use_bias=False, kernel=True), SPACE
    mask = jnp.arange(4) < 3
    y, total = layer.apply({}, x, x, mask=mask)
    expected = normalize(2 * x, Normalizer("c", "c"), mask=mask).y
    close((y, total), (jnp.maximum(expected, 0), 2 * x), 1e-6)
    assert not has_kernel(functools.partial(layer.apply, {}, mask=mask), x, x)
    np.testing.assert_array_equal(layer.apply({}, x)[1], x)


# Lowering for a platform that is not here.
CALLS = {"cuda": "triton", "rocm": "triton", "tpu": "tpu_custom_call"}
SHAPES = [((8192, 768), jnp.bfloat16), ((1000, 1030), jnp.float32)]
MORE = [((3, 5), jnp.float16), ((7, kernels.LONGEST), jnp.float32), ((1, 1), jnp.float32), ((513, 128), jnp.bfloat16)]


@functools.cache
def needs_kernels_for(platform):
    """Skips the test where this jaxlib has no Pallas compiler for the platform."""

    def copy(source, target):
        target[...] = source[...]

    x = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    try:
        params = None if platform == "tpu" else triton.CompilerParams()
        copied = jax.jit(pl.pallas_call(copy, out_shape=x, compiler_params=params))
        copied.trace(x).lower(lowering_platforms=(platform,))
    except (ImportError, NotImplementedError, ValueError) as error:
        if isinstance(error, ValueError) and "Cannot lower pallas_call on platform" not in str(error):
            raise
        pytest.skip(f"this jaxlib lowers no Pallas kernel for {platform}: {error}")


def lowered(f, platform, *args):
    """The text that the compiler of a platform would be given."""
    needs_kernels_for(platform)
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def _pallas():
    with kernels.using("pallas"):
        yield


def kernels_in(text, platform):
    return text.count(f"custom_call @{CALLS[platform]}") + text.count(f"xla.gpu.{CALLS[platform]}")


@pytest.mark.usefixtures("_pallas")
@pytest.mark.parametrize(
    ("platform", "shape", "dtype"),
    [(platform, *case) for platform in ("cuda", "tpu") for case in SHAPES]
    + [pytest.param(platform, *case, marks=pytest.mark.slow) for platform in CALLS for case in MORE],
)
def test_gradient_lowers_to_two_kernels(platform, shape, dtype):
    def loss(x, scale, bias):
        return jnp.sum(kernels.normalize(x, (1,), 1e-5, scale, bias)[0].astype(jnp.float32) ** 2)

    row = jax.ShapeDtypeStruct((1, shape[1]), jnp.float32)
    text = lowered(jax.grad(loss, (0, 1, 2)), platform, jax.ShapeDtypeStruct(shape, dtype), row, row)
    assert kernels_in(text, platform) == 2


LOWER = [("cuda", True, 0.3), ("tpu", False, 0.75)]
LOWER_MORE = [(platform, centre, power) for platform in CALLS for centre in (True, False) for power in (0.5, 1.0)]


@pytest.mark.usefixtures("_pallas")
@pytest.mark.parametrize(
    ("platform", "centre", "power"), LOWER + [pytest.param(*case, marks=pytest.mark.slow) for case in LOWER_MORE]
)
def test_every_power_and_the_cotangents_of_statistics_lower_under_vmap(platform, centre, power):
    case = Case((37, 70), (1,), (1, 70), (1, 70), centre=centre, power=power)
    given, _ = operands(case)
    each = jax.vmap(jax.value_and_grad(summed(case), (0, 1, 2, 3)), (0, None, None, None))
    assert kernels_in(lowered(each, platform, jnp.stack([given[0]] * 3), *given[1:]), platform) == 2


@pytest.mark.usefixtures("_pallas")
@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow)])
def test_gradient_lowers_inside_shard_map_that_checks_what_varies(platform, mesh):
    (x, _, scale, _), _ = operands(Case((38, 20), (1,), (1, 20)))
    needs_kernels_for(platform)
    text = spread(kernels.normalize, mesh, True).trace(scale, x).lower(lowering_platforms=(platform,)).as_text()
    assert kernels_in(text, platform) == 2


@pytest.mark.parametrize("wrap", [pytest.param(lambda f: f, marks=pytest.mark.slow), jax.jit], ids=["eager", "jit"])
def test_platform_without_kernels_runs_the_twin(wrap):
    if jax.default_backend() != "cpu":
        pytest.skip("this platform has kernels")
    x = jnp.arange(6.0).reshape(2, 3) ** 2
    both = wrap(jax.value_and_grad(lambda x: jnp.sum(kernels.normalize(x, (1,), 0.1)[0] ** 3)))
    expected = both(x)
    with kernels.using("pallas"):
        close(both(x), expected, 1e-5)


@pytest.mark.parametrize("target", ["gpu", "tpu"])
@pytest.mark.parametrize("backward", [False, True])
def test_blocks_cover_the_array_and_keep_the_rules_of_the_target(target, backward):
    for height in (1, 2, 15, 64, 1000, 8192, 100_003):
        for length in (1, 3, 64, 70, 768, 1030, 4096, kernels.LONGEST):
            cut = pallas.tiling(target, height, length, backward)
            tall = cut.height * cut.steps
            assert (cut.programs - 1) * tall < height <= cut.programs * tall
            if target == "tpu":
                assert cut.width == length
                assert cut.height == height or cut.height % 16 == 0
                assert cut.height * -(-length // 128) * 128 <= max(pallas.TPU_BLOCK, 16 * kernels.LONGEST)
            else:
                assert cut.width < 2 * length
                assert all(n and n & (n - 1) == 0 for n in (cut.height, cut.width, cut.warps))
                assert cut.height == 1 or cut.height * cut.width <= pallas.LARGE
                assert not backward or cut.programs <= pallas.PROGRAMS


X = (8, 128, 768)


@pytest.mark.parametrize(("fits", "args", "more"), [
    (True,  (X, (2,), None, None, jnp.float32), {}),
    (True,  (X, (2,), (1, 1, 768), (), jnp.bfloat16), {"spec": (None, None, None)}),
    (True,  ((8, 16, 768), (1, 2), (1, 1, 768), (1, 16, 1), jnp.float16), {}),
    (True,  ((8, kernels.LONGEST), (1,), None, None, np.dtype("float32")), {}),
    (False, ((8, kernels.LONGEST + 1), (1,), None, None, jnp.float32), {}),
    (False, (X, (1,), None, None, jnp.float32), {}),
    (False, (X, (0, 2), None, None, jnp.float32), {}),
    (False, (X, (), None, None, jnp.float32), {}),
    (False, (X, (2,), (8, 1, 768), None, jnp.float32), {}),
    (False, (X, (2,), None, (1, 128, 1), jnp.float32), {}),
    (False, (X, (2,), None, None, np.dtype("float64")), {}),
    (False, (X, (2,), None, None, jnp.complex64), {}),
    (False, ((0, 768), (1,), None, None, jnp.float32), {}),
    (False, ((8, 0), (1,), None, None, jnp.float32), {}),
    (False, (X, (2,), None, None, jnp.float32), {"eps_shape": (1, 1, 768)}),
    (False, (X, (2,), None, None, jnp.float32), {"spec": ("data", None, None)}),
])  # fmt: skip
def test_fits(fits, args, more):
    assert kernels.fits(*args, **more) is fits


# The switch.


def test_choice_is_part_of_the_key_of_compiled_functions_and_clears_none_of_them():
    traced = []

    @jax.jit
    def f(x):
        traced.append(kernels.used())
        return x

    for mode in ("xla", "interpret", "interpret", "xla"):
        with kernels.using(mode):
            f(1.0)
    with kernels.use("interpret"), kernels.use("pallas"):  # of the process
        f(1.0)
        with kernels.using("xla"):
            f(1.0)
    assert kernels.used() == "xla"
    f(1.0)
    assert traced == ["xla", "interpret", "pallas"]


def test_switch_refuses_a_mode_that_is_none_and_stays_as_it_was():
    with pytest.raises(ValueError, match=r"^the kernels are one of 'xla', 'pallas', 'interpret'; found 'triton'$"):
        kernels.use("triton")
    with pytest.raises(ValueError, match=r"^the kernels are one of"):
        kernels.using("triton")
    assert kernels.used() == "xla"


def test_environment_refuses_a_mode_that_is_none(monkeypatch):
    monkeypatch.setenv("NORMJAX_KERNELS", "on")
    with pytest.raises(ValueError, match=r"^NORMJAX_KERNELS is one of 'xla', 'pallas', 'interpret'; found 'on'$"):
        kernels._from_environment()
    assert kernels.used() == "xla"


def test_an_environment_that_is_exported_empty_is_not_set(monkeypatch):
    monkeypatch.setenv("NORMJAX_KERNELS", "")
    assert kernels._from_environment() == "xla"


def test_environment_chooses_the_mode_and_importing_the_kernels_does_not_import_pallas():
    code = "import sys; from normjax import kernels; print(kernels.used(), 'jax.experimental.pallas' in sys.modules)"
    environment = {"NORMJAX_KERNELS": "pallas", "PATH": "", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["pallas", "False"]


# The rows of the table that the kernels take, in the layout of some array, and what they leave to XLA.
TAKEN = {
    "token": (Normalizer("c", "c"), "n t c", (2, 5, 7)),
    "layer": (Normalizer("... c", "... c"), "n ... c", (3, 2, 4, 5)),
    "rms": (Normalizer(None, "c"), "n c", (4, 9)),
    "instance_channels_first": (Normalizer("...", "..."), "n c ...", (2, 3, 4, 5)),
    "gain_and_power": (Normalizer("c", "c", eps=0.3, gain=2.0, power=0.75), "n c", (4, 9)),
    "instance": (Normalizer("...", "..."), "n ... c", (2, 3, 4, 5)),
    "group": (Normalizer("... c/3", "... c/3"), "n ... c", (2, 3, 5, 6)),
}
LEFT = {
    "not_the_last_axes": (Normalizer("n ...", "n ..."), "n t ... c", (2, 3, 4, 5)),
    "group_channels_first": (Normalizer("... c/2", "... c/2"), "n c ...", (2, 4, 3, 5)),
    "other_fields": (Normalizer("... c", "c"), "n ... c", (2, 3, 4)),
    "keep_mean": (Normalizer("c", "c", keep_mean=True), "n c", (4, 9)),
    "absolute": (Normalizer("c", "c", order=1), "n c", (4, 9)),
    "blocks": (Normalizer("c/3", "c/3"), "n c", (4, 9)),
    "window": (Normalizer("c:3", "c:3"), "n c", (4, 9)),
    "floor": (Normalizer("c", "c", floor="n"), "n c", (4, 9)),
    "mean_only": (Normalizer("c", None), "n c", (4, 9)),
}


def through_theory(normalizer, layout, x, scale, bias):
    def loss(x, scale, bias):
        out = normalize(x, normalizer, layout, scale=scale, bias=bias)
        return jnp.sum(jnp.sin(out.y)) + jnp.mean(jnp.abs(out.centered)) + jnp.sum(out.stats.var), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)


def has_kernel(f, *args):
    return "pallas_call" in str(jax.make_jaxpr(f)(*args))


@pytest.mark.parametrize("name", ["token", *(pytest.param(n, marks=pytest.mark.slow) for n in TAKEN if n != "token")])
def test_normalize_with_the_kernels_returns_what_it_returns_without(name):
    normalizer, layout, shape = TAKEN[name]
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, shape), jnp.float32)
    beside = (shape[-1],) if layout.endswith("c") else ()
    scale, bias = jnp.full(beside, 1.5), jnp.full(beside, 0.5)
    run = functools.partial(through_theory, normalizer, layout)
    expected = jax.jit(run)(x, scale, bias)
    assert not has_kernel(run, x, scale, bias)
    with kernels.using("interpret"):
        assert has_kernel(run, x, scale, bias)
        close(jax.jit(run)(x, scale, bias), expected, 1e-5)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("name", LEFT)
def test_normalize_leaves_the_other_rows_to_xla(name):
    normalizer, layout, shape = LEFT[name]
    assert not has_kernel(functools.partial(normalize, normalizer=normalizer, layout=layout), jnp.ones(shape))


@pytest.mark.usefixtures("_interpreted")
def test_normalize_leaves_masks_given_statistics_and_a_scale_of_the_examples_to_xla():
    x = jnp.ones((4, 9))
    given = ({"mask": jnp.ones((4, 9), bool)}, {"scale": jnp.ones((4, 9))}, {"eps": jnp.ones((4, 1))},
             {"stats": Stats(jnp.zeros((4, 1)), jnp.ones((4, 1)))})  # fmt: skip
    assert [has_kernel(functools.partial(normalize, normalizer="token", **more), x) for more in given] == [False] * 4
    assert has_kernel(functools.partial(normalize, normalizer="token", eps=jnp.float32(1), scale=jnp.ones(9)), x)


@pytest.mark.usefixtures("_interpreted")
def test_flax_layers_run_on_the_kernels():
    layer, x = linen.LayerNorm(), jnp.arange(12.0).reshape(3, 4) ** 2
    variables = layer.init(jax.random.key(0), x)
    assert has_kernel(layer.apply, variables, x)
    close(layer.apply(variables, x), fl.LayerNorm().apply(variables, x), 1e-5)
