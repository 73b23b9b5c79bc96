"""Units that normalize as they bend, against NumPy float64, and outputs and gradients of published code."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax import lax

import normjax.linen.layers as linen
import normjax.nnx.layers as nnx
from normjax import FieldError, selu, units
from normjax.gain import RELU_GAIN
from normjax.running import Running, as_stats, merge_into
from normjax.selu import alpha_dropout
from normjax.theory import Stats
from tests.refusals import refuses
from tests.test_selu import close, jit, plain_selu, quadrature

SHAPE = (4, 3, 2, 6)  # n h w c
RNG = np.random.default_rng(0)
X, DX, COTANGENT = RNG.normal(0.3, 1.5, SHAPE), RNG.normal(size=SHAPE), RNG.normal(size=SHAPE)
P = {
    "v": RNG.normal(1.0, 0.5, 6),
    "scale": RNG.normal(1.0, 0.5, 6),
    "bias": RNG.normal(size=6),
    "tau": RNG.normal(size=6),
    "alpha": np.array(0.7),
    "shift": np.array(-0.2),
}
DP = {name: RNG.normal(size=p.shape) for name, p in P.items()}
MASK = RNG.uniform(size=(4, 3, 2, 1)) < 0.6
MASK[1] = False  # an example that is masked whole


# The obvious form, in NumPy float64.


def variance(x, w, axes, ddof=0):
    """Over the axes, of the elements with weight; 0 where there are no more than ddof."""
    count = np.broadcast_to(w, x.shape).sum(axes, keepdims=True)
    mean = (x * w).sum(axes, keepdims=True) / np.maximum(count, 1)
    squares = (w * (x - mean) ** 2).sum(axes, keepdims=True)
    return np.where(count > ddof, squares / np.maximum(count - ddof, 1), 0)


def plain_b0(x, p, w: Any = 1.0, ddof=0, var: Any = None):
    w = np.broadcast_to(np.asarray(w, float), x.shape)
    var = variance(x, w, (0, 1, 2)) if var is None else var
    d = np.maximum(np.sqrt(var + 1e-5), p["v"] * x + np.sqrt(variance(x, w, (1, 2), ddof) + 1e-5))
    return np.where(w > 0, x / d, 0) * p["scale"] + p["bias"]


def plain_s0(x, p, w: Any = 1.0, ddof=0, groups=2):
    w = np.broadcast_to(np.asarray(w, float), x.shape)
    split = (*x.shape[:-1], groups, x.shape[-1] // groups)
    var = variance(x.reshape(split), w.reshape(split), (1, 2, 4), ddof)
    std = np.broadcast_to(np.sqrt(var + 1e-5), split).reshape(x.shape)
    return np.where(w > 0, x / (1 + np.exp(-p["v"] * x)) / std, 0) * p["scale"] + p["bias"]


def plain_grn(x, p, w: Any = 1.0):
    w = np.broadcast_to(np.asarray(w, float), x.shape)
    g = np.sqrt((w * x**2).sum((1, 2), keepdims=True))
    return np.where(w > 0, x * g / (g.mean(-1, keepdims=True) + 1e-6) * p["scale"] + x, 0) + p["bias"]


def plain_pointwise(x, p):
    erf = np.vectorize(math.erf)
    dyt = np.tanh(p["alpha"] * x) * p["scale"] + p["bias"]
    derf = erf(p["alpha"] * x + p["shift"]) * p["scale"] + p["bias"]
    relu = math.sqrt(2 * math.pi / (math.pi - 1)) * (np.maximum(x, 0) - 1 / math.sqrt(2 * math.pi))
    return 2 * plain_selu(x) + 3 * relu + 5 * np.maximum(x, p["tau"]) + 7 * dyt + 11 * derf


def pointwise(x, p, layout="n ... c", **_):
    both: Any = {"layout": layout, "scale": p["scale"], "bias": p["bias"]}
    dyt, derf = units.dyt(x, p["alpha"], **both), units.derf(x, p["alpha"], p["shift"], **both)
    return 2 * selu.selu(x) + 3 * units.scaled_relu(x) + 5 * units.tlu(x, p["tau"], layout) + 7 * dyt + 11 * derf


def b0(x, p, layout="n ... c", **kw):
    return units.evonorm_b0(x, p["v"], layout, scale=p["scale"], bias=p["bias"], **kw).y


def s0(x, p, layout="n ... c", field="... c/2", **kw):
    return units.evonorm_s0(x, p["v"], layout, field=field, scale=p["scale"], bias=p["bias"], **kw)


def grn(x, p, layout="n ... c", **kw):
    return units.grn(x, p["scale"], p["bias"], layout, **kw)


CASES = {
    "pointwise": (pointwise, plain_pointwise),
    "evonorm_b0": (b0, plain_b0),
    "evonorm_s0": (s0, plain_s0),
    "grn": (grn, plain_grn),
}
STATISTICS = ("evonorm_b0", "evonorm_s0", "grn")


def quick(names, *default):
    """The names as parameters, all but the default ones slow."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


def moved(h):
    return X + h * DX, {name: p + h * DP[name] for name, p in P.items()}


@pytest.mark.parametrize("name", quick(CASES, "grn"))
def test_unit_under_every_transformation_against_numpy_and_its_differences(name):
    f, plain = CASES[name]

    def loss(z, f=f):
        return jnp.sum(jnp.sin(f(*z)) * COTANGENT)

    @jit
    def everything(z, dz):
        x, p = z
        grad = jax.grad(loss)
        return {
            "y": f(x, p),
            "channels first": jnp.moveaxis(f(jnp.moveaxis(x, -1, 1), p, "n c ..."), 1, -1),
            "grad": grad(z),
            "jvp": jax.jvp(f, z, dz)[1],
            "forward over reverse": jax.jvp(grad, (z,), (dz,))[1],
            "reverse over reverse": jax.grad(lambda z: jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, grad(z), dz)))(
                z
            ),
            "vmap": jax.vmap(lambda a: f(a * x, p))(jnp.array([1.0, 2.0]))[1],
            "checkpoint": jax.grad(lambda z: loss(z, jax.checkpoint(f)))(z),
            "scan": lax.scan(lambda carry, _: (f(carry, p), None), x, length=2)[0],
        }

    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, everything((X, P), (DX, DP)))
    y = plain(X, P)

    def at(h):
        return float(np.sum(np.sin(plain(*moved(h))) * COTANGENT))

    def along(tree):
        dx, dp = tree
        return float(np.sum(dx * DX) + sum(np.sum(dp[k] * DP[k]) for k in P))

    close(found["y"], y)
    close(found["channels first"], y)
    close(found["vmap"], plain(2 * X, P))
    close(found["scan"], plain(y, P), 1e-8, 1e-8)
    slope = (plain(*moved(1e-6)) - plain(*moved(-1e-6))) / 2e-6
    close(found["jvp"], slope, 1e-6, 1e-6)
    close(along(found["grad"]), (at(1e-6) - at(-1e-6)) / 2e-6, 1e-6)
    curvature = (at(1e-4) - 2 * at(0.0) + at(-1e-4)) / 1e-8
    close(along(found["forward over reverse"]), curvature, 1e-4, 1e-4)
    jax.tree.map(close, found["reverse over reverse"], found["forward over reverse"])
    jax.tree.map(close, found["checkpoint"], found["grad"])


@pytest.mark.parametrize("name", quick(CASES, "evonorm_s0"))
def test_bfloat16_is_the_float32_result_rounded_once(name):
    f = CASES[name][0]
    x, p = jnp.asarray(X, jnp.bfloat16), jax.tree.map(jnp.float32, P)

    def apart(x):  # a sum of rounded terms would be rounded again
        return [selu.selu(x), units.scaled_relu(x), units.dyt(x, p["alpha"]), units.derf(x, p["alpha"], p["shift"])]

    both = jit(lambda x: jax.tree.leaves(apart(x) if name == "pointwise" else f(x, p)))
    for narrow, wide in zip(both(x), both(x.astype(jnp.float32)), strict=True):
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", quick(STATISTICS, "grn"))
def test_mask_leaves_elements_out_and_no_nan_behind_it_reaches_anything(name):
    f, plain = CASES[name]
    behind = np.where(MASK, X, np.nan)
    with jax.enable_x64(True):
        y, pull = jit(lambda x, p: jax.vjp(lambda x, p: f(x, p, mask=MASK), x, p))(behind, P)
        dx, dp = jax.tree.map(np.asarray, jit(pull)(jnp.asarray(COTANGENT)))
    close(y, plain(np.where(MASK, X, 0), P, MASK))
    assert (dx[~np.broadcast_to(MASK, SHAPE)] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((dx, dp)))


@pytest.mark.slow
def test_a_channel_that_is_masked_whole_does_not_count_in_the_mean_response():
    mask = np.broadcast_to(np.arange(6) < 4, SHAPE)
    with jax.enable_x64(True):
        got = jit(lambda x: units.grn(x, 1.0, 0.0, mask=mask))(X)
    one: Any = {"scale": np.ones(4), "bias": np.zeros(4)}
    close(got[..., :4], plain_grn(X[..., :4], one))
    assert (np.asarray(got[..., 4:]) == 0).all()


MAPPED = {  # fields, and the axis that is cut: examples, or rows of space
    "evonorm_b0": ({"batch": "@b n ..."}, 0),
    "evonorm_s0": ({"field": "@b ... c/2"}, 1),
    "grn": ({"space": "@b ..."}, 1),
}


@pytest.mark.parametrize("name", quick(STATISTICS, "evonorm_s0"))
def test_mapped_axis_gives_the_statistics_of_the_whole_array_with_unequal_counts(name):
    f, plain = CASES[name]
    fields, axis = MAPPED[name]

    def cut(a):  # the mapped axis stands where it is
        return jnp.asarray(a.reshape(2, 2, *a.shape[1:]) if axis == 0 else a[:, :, None])

    def one(x, mask):
        return f(x, P, "n ... c", mask=mask, **fields)

    with jax.enable_x64(True):
        y = jit(jax.vmap(one, axis, axis, axis_name="b"))(cut(X), cut(MASK))
    close(np.reshape(y, SHAPE), plain(X, P, MASK))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", [False, True])
def test_evonorm_in_both_dialects(dialect):

    @jit
    def run(x):
        whole = [f(x, P, unbiased=dialect) for f in (b0, s0)]
        masked = [f(x, P, unbiased=dialect, mask=MASK) for f in (b0, s0)]
        return whole, masked, [f(x, P, nonlinear=False) for f in (b0, s0)]

    with jax.enable_x64(True):
        whole, masked, affine = run(X)
    for found, weights in ((whole, 1.0), (masked, MASK)):
        close(found[0], plain_b0(X, P, weights, dialect))
        close(found[1], plain_s0(X, P, weights, dialect))
    for y in affine:
        close(y, X * P["scale"] + P["bias"])


# Outputs and gradients of the published PyTorch classes (Lubana et al. 2021; ConvNeXt V2), run in float64 on a sine, n c h w
# (GRN: n h w c), under a loss that is the sum of y times a cosine. The classes keep 0.9 of the moving variance.

GOLDEN_P = {"v": [0.5, 1.0, 2.0, -1.0], "scale": [1.0, 0.5, -2.0, 1.5], "bias": [0.0, 0.1, -0.2, 0.3]}
GOLDEN_X = 1.5 * np.sin(1.7 * np.arange(16) + 0.3) + 0.2
# fmt: off
GOLDEN: dict[str, dict[str, Any]] = {
    "B0": {
        "y": [0.66136406, 1.0913868, -0.36042474, -0.64251662, -1.1442198, -1.1337734, -0.70398413, -0.25523299,
              0.94977377, 0.32950375, -0.90612381, 0.22918542, -0.89497216, 0.81974793, -0.31466935, 2.1569862],
        "x": [1.5036895, -0.61848432, -0.18849809, -0.34286149, -0.34867637, 0.24353576, 0.045451011, 1.9122576,
              0.00065853337, -0.0030114794, -0.052316515, -1.1979739, -0.1966806, -1.2907067, 0.29104874, 0.89753821],
        "v": [-1.700151, 0.029679195, -0.53858214, -0.67824342],
        "scale": [1.8373284, 3.1554747, -0.91950572, -0.46795893],
        "bias": [1.9864171, -2.9315957, -0.65428778, 3.2289068],
        "moving_var": [0.93182278, 0.94171453, 0.96042112, 0.98305629],
    },
    "B0 in evaluation": {
        "y": [0.66136406, 1.0913868, -0.19737562, -0.37957097, -1.1442198, -1.1337734, -0.70398413, -0.26826877,
              0.94977377, 0.32950375, -0.54982757, 0.22918542, -0.89497216, 0.36049884, -0.31466935, 4.1557741],
        "x": [1.5036895, -0.61848432, -0.11360048, -0.45203381, -0.24227817, 0.29089327, -0.5323542, 1.7667791,
              0.00065853337, -0.0030114794, -0.50496377, -0.1511362, 0.0048797434, -0.89562441, 3.8651043, 3.727445],
        "v": [-1.700151, 0.029679195, -0.53858214, -6.7899537],
        "scale": [1.8373284, 1.9566763, -0.7708017, 0.31609856],
        "bias": [1.9864171, -2.9315957, -0.65428778, 3.2289068],
    },
    "B0 on single pixels": {
        "y": [1.978703, 0.59899105, 4.3329497, -1.1950708, 1.9902683, 0.59853671, 8.3326593, -1.1860695],
        "x": [6.119017, 0.0004002118, -6.6242628, -0.0046308983, -3.0497736, -0.00028546431, 3.5185509, 0.040905322],
        "v": [3.5522105, -0.20477001, 0, -0.12485013],
        "scale": [0.19391318, 0.41017673, -2.1928612, -0.089471721],
        "bias": [0.10324158, 0.41081417, 0.40749078, 0.095786494],
    },
    "S0": {
        "y": [0.32188785, 0.92618044, 0.0087390642, -0.014681892, -2.2855843, -1.8738512, -0.79750301, 0.044025917,
              0.95071452, 0.16236383, -0.014664104, 0.20578575, -2.6773231, -0.0066600222, -0.65563922, 0.62388149],
        "x": [0.44621058, 0.10299163, 0.17090891, 0.25175428, 1.368781, 0.13063359, 1.2226631, 1.0453599,
              0.2663071, -0.12770965, 0.19869094, -0.27582984, 0.37005095, -0.16636451, 1.0736201, 0.050879003],
        "v": [0.65452909, -0.20233354, 0.20320001, 0.65398292],
        "scale": [1.4364365, 0.26965112, -1.4148652, -1.1432869],
        "bias": [1.9864171, -2.9315957, -0.65428778, 3.2289068],
    },
    "TLU": {
        "y": [0.64328031, 1.5639461, 0, 0, 1.2934536, 1.0773758, 1, 1,
              1.6580113, 0.36163048, 0, 0.42481581, 1.6417291, 0.5, 1, 1.1282525],
        "x": [1, 0.62160997, 0, 0, -0.89675842, -0.2107958, 0, 0,
              0.60835131, -0.24354415, 0, -0.88919115, -0.19432991, 0, 0, 0.59492066],
        "tau": [0, -2.0424045, 0.64759634, 2.6339861],
    },
    "scaled ReLU": {
        "y": [0.41851648, 1.9954868, -0.6833317, -0.6833317, 1.5321713, 1.1620606, -0.6833317, -0.6833317],
        "x": [1.7128586, 1.0647299, 0, 0, -1.5360203, -0.36106339, 0, 0],
    },
    "GRN": {
        "y": [1.303725, 2.7193952, 0.27696964, -1.6987781, 2.6214199, 1.9044566, 0.69783026, -0.40299531,
              4.3397222, 0.52887823, 1.5544313, 1.2573436, 4.2971048, -0.37003455, 1.268788, 2.8425733],
        "x": [1.737881, 1.0274317, -0.069524458, -2.1514237, -2.3981426, -0.36247777, -0.98284939, 1.9895646,
              1.7852256, -0.50859329, 1.4911401, -1.9690927, -0.31762778, 1.0088706, -1.1304833, 1.4329583],
        "scale": [0.58498322, 0.8774115, -0.40482062, 0.62812782],
        "bias": [0.51726299, 0.81486635, 0.4957951, -0.19848399],
    },
}
# fmt: on


def published(name, x, tau, p):
    tall, first = x.reshape(2, 4, -1, 1), "n c ..."
    if name == "TLU":
        return units.tlu(tall, tau, first)
    if name == "scaled ReLU":
        return units.scaled_relu(x)
    if name == "S0":
        return s0(tall, p, first, unbiased=True)
    if name == "GRN":
        return grn(x.reshape(2, 2, 1, 4), p)
    stored = Stats(var=jnp.array([0.5, 1.0, 2.0, 0.1]).reshape(1, 4, 1, 1)) if name == "B0 in evaluation" else None
    return b0(tall, p, first, unbiased=True, stats=stored)


@pytest.mark.parametrize("name", quick(GOLDEN, "B0", "B0 on single pixels", "S0", "TLU", "scaled ReLU", "GRN"))
def test_published_code_gives_these_outputs_and_gradients(name):
    want = GOLDEN[name]
    x, tau = jnp.asarray(GOLDEN_X[: len(want["y"])], jnp.float32), jnp.array([-0.5, 0.0, 0.5, 1.0])
    p = {k: jnp.array(a) for k, a in GOLDEN_P.items()}
    cotangent = np.float32(np.cos(0.9 * np.arange(x.size)))

    @jit
    def run(*z):
        y, pull = jax.vjp(lambda *z: published(name, *z).ravel(), *z)
        var = units.evonorm_b0(z[0].reshape(2, 4, -1, 1), layout="n c ...").stats.var if "moving_var" in want else 0.0
        return y, *pull(cotangent), 0.9 + 0.1 * jnp.ravel(var)

    y, dx, dtau, dp, moving_var = run(x, tau, p)
    found = {"y": y, "x": dx, "tau": dtau, "moving_var": moving_var, **dp}
    for k, values in want.items():
        close(found[k], values, 1e-5, 1e-5 * np.abs(values).max())


def test_scaled_relu_standardizes_a_gaussian():
    # The gain is not 1.7139588594, which NFNets' table has and many copied: a Gaussian would leave with variance 1.0013.
    mean, var = quadrature(0, 1, lambda z: np.asarray(RELU_GAIN * (np.maximum(z, 0) - units.RELU_MEAN)))
    assert (mean, var) == pytest.approx((0, 1), abs=1e-8)


@pytest.mark.slow
def test_constant_input_has_finite_derivatives_without_epsilon():
    p: Any = {"v": jnp.ones(4), "scale": jnp.ones(4), "bias": jnp.zeros(4)}

    def loss(x):
        return sum(jnp.sum(jnp.sin(f(x, p, eps=0.0))) for f in (b0, s0, grn))

    run = jit(lambda x: (*jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),)), b0(x, p), s0(x, p)))
    for value in (0.0, 3.0, 1e6):
        first, second, *_ = run(jnp.full((2, 2, 2, 4), value))
        assert np.isfinite(np.asarray(first)).all()
        assert np.isfinite(np.asarray(second)).all()
    huge = jnp.full((2, 2, 2, 4), 1e25).at[:, 0].set(-1e25)  # squares overflow, and what they divide is not known
    assert all(jnp.isnan(y).all() for y in run(huge)[2:])


# Modules.

MODULES: dict[str, tuple[Any, Any, Any]] = {
    "TLU": (linen.TLU, nnx.TLU, {}),
    "DyT": (linen.DyT, nnx.DyT, {}),
    "Derf": (linen.Derf, nnx.Derf, {}),
    "EvoNormB0": (linen.EvoNormB0, nnx.EvoNormB0, {"use_running_average": False}),
    "EvoNormS0": (linen.EvoNormS0, nnx.EvoNormS0, {"field": "... c/3"}),
    "EvoNormB0 affine": (linen.EvoNormB0, nnx.EvoNormB0, {"nonlinear": False}),
    "EvoNormS0 published": (linen.EvoNormS0, nnx.EvoNormS0, {"field": "... c/2", "unbiased": True, "use_bias": False}),
    "GRN": (linen.GRN, nnx.GRN, {}),
}


@flax_nnx.jit
def twin_and_gradients(module, x):
    def loss(module):
        y = module(x)
        return jnp.sum(y**2), y

    grads, y = flax_nnx.grad(loss, has_aux=True)(module)
    return y, grads


@pytest.mark.parametrize("name", quick(MODULES, "EvoNormB0"))
def test_linen_and_nnx_agree_on_the_same_parameters_and_with_the_function(name):
    make, make_nnx, arguments = MODULES[name]
    x = jnp.asarray(np.moveaxis(X, -1, 1), jnp.float32)
    one = make(layout="n c ...", **arguments)
    variables = jit(one.init)(jax.random.key(0), x)
    twin = make_nnx(6, layout="n c ...", rngs=flax_nnx.Rngs(0), **arguments)
    state = flax_nnx.to_pure_dict(flax_nnx.state(twin))
    assert jax.tree.map(jnp.shape, state) == {k: v.shape for part in variables.values() for k, v in part.items()}
    for k, value in variables.get("params", {}).items():
        np.testing.assert_array_equal(state[k], value)  # they start alike
    params: Any = {k: jnp.asarray(P[k], jnp.float32) for k in variables["params"]}
    for k, value in params.items():
        getattr(twin, k)[...] = value
    y, _ = jit(lambda v, x: one.apply(v, x, mutable=["batch_stats"]))({**variables, "params": params}, x)
    again, grads = twin_and_gradients(twin, x)
    close(again, y, 1e-6, 1e-6)
    f: Any = {
        "TLU": lambda x: units.tlu(x, params["tau"], "n c ..."),
        "DyT": lambda x: units.dyt(x, layout="n c ...", **params),
        "Derf": lambda x: units.derf(x, layout="n c ...", **params),
        "EvoNormB0": lambda x: units.evonorm_b0(x, layout="n c ...", **params).y,
        "EvoNormS0": lambda x: units.evonorm_s0(x, layout="n c ...", field="... c/3", **params),
        "EvoNormB0 affine": lambda x: x * params["scale"][:, None, None][None] + params["bias"][:, None, None][None],
        "EvoNormS0 published": lambda x: units.evonorm_s0(
            x, layout="n c ...", field="... c/2", unbiased=True, **params
        ),
        "GRN": lambda x: units.grn(x, layout="n c ...", **params),
    }[name]
    close(y, jit(f)(x), 1e-6, 1e-6)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    if name != "TLU":
        narrow = make(layout="n c ...", dtype=jnp.bfloat16, **arguments)
        assert jax.eval_shape(lambda v: narrow.apply(v, x, mutable=True), variables)[0].dtype == jnp.bfloat16


def test_evonorm_b0_keeps_nine_tenths_of_the_running_variance_and_infers_with_it():
    x = jnp.asarray(X, jnp.float32)
    one: Any = linen.EvoNormB0()
    twin: Any = nnx.EvoNormB0(6, rngs=flax_nnx.Rngs(0))
    variables = jit(lambda x: one.init(jax.random.key(0), x, False))(x)
    train = jit(lambda v, x, mask: one.apply(v, x, False, mask=mask, mutable=["batch_stats"])[1])
    step = flax_nnx.jit(lambda module, x, mask: module(x, mask=mask))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(6))
    want = np.ones(6)
    for factor, mask in ((1, np.ones_like(MASK)), (2, MASK), (1, np.zeros_like(MASK))):
        variables = {**variables, **train(variables, factor * x, mask)}
        step(twin, factor * x, mask)
        if mask.any():
            want = 0.9 * want + 0.1 * variance(factor * X, mask, (0, 1, 2)).ravel()
    close(variables["batch_stats"]["var"], want, 1e-5)
    close(twin.var[...], want, 1e-5)
    y = plain_b0(X, {"v": 1.0, "scale": 1.0, "bias": 0.0}, var=want)
    close(jit(lambda v, x: one.apply(v, x, True))(variables, x), y, 1e-4, 1e-5)
    assert flax_nnx.view(twin, use_running_average=True).use_running_average
    twin.eval()
    close(step(twin, x, np.ones_like(MASK)), y, 1e-4, 1e-5)
    close(twin.var[...], want, 1e-5)


@pytest.mark.slow
def test_evonorm_b0_stores_several_batches_as_one_and_maps_examples():
    x = jnp.asarray(X, jnp.float32)
    one: Any = linen.EvoNormB0(use_running_average=False)
    variables = jit(lambda x: one.init(jax.random.key(0), x))(x)
    run = jit(lambda x: one.apply(variables, x, mutable=["batch_stats", "moments"]))
    want, left = run(x)
    whole = left["batch_stats"]["var"]
    seen = [run(part)[1]["moments"]["batch"][0] for part in (x[:2], x[2:])]
    merged = merge_into(Running(var=jnp.ones(6)), jax.tree.map(lambda *parts: jnp.stack(parts), *seen))
    close(merged.var, whole, 1e-5)
    mapped: Any = linen.EvoNormB0("@b ...", layout="... c", use_running_average=False)
    single = jit(lambda x: mapped.init(jax.random.key(0), x))(x[0])  # outside of the mapped axis
    y, changed = jit(jax.vmap(lambda x: mapped.apply(single, x, mutable=["batch_stats"]), axis_name="b"))(x)
    close(y, want, 1e-5, 1e-6)
    close(changed["batch_stats"]["var"][0], whole, 1e-5)


@pytest.mark.slow
def test_units_work_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        x = jax.device_put(jnp.asarray(X, jnp.float32), spec)
        run = jit(lambda x: units.evonorm_b0(alpha_dropout(jax.random.key(0), x, 0.5)).y)
        y = run(x)
        assert jax.typeof(y).sharding.spec[0] == "data"
    close(y, run(jnp.asarray(X, jnp.float32)), 1e-5, 1e-6)


X32 = jnp.ones((2, 3, 3, 6))
REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "integers": (
        lambda: units.evonorm_b0(jnp.ones((2, 2, 2), int)),
        TypeError,
        "evonorm_b0 takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)",
    ),
    "groups": (
        lambda: units.evonorm_s0(X32, field="... c/4"),
        FieldError,
        "cannot split axis 'c' of length 6 into 4 equal groups",
    ),
    "threshold": (
        lambda: units.tlu(X32, jnp.ones(5)),
        FieldError,
        'tau of shape (5,) does not broadcast against shape (2, 3, 3, 6), layout "n ... c"',
    ),
    "unbound axis": (
        lambda: units.evonorm_b0(X32, batch="@data n ..."),
        FieldError,
        "mapped axis '@data' is not bound here; call this inside jax.vmap(..., axis_name=\"data\"), or inside "
        'jax.shard_map or jax.pmap over a mesh axis "data"',
    ),
    "no space": (
        lambda: units.grn(jnp.ones((2, 6))),
        FieldError,
        'field "..." matches no axis of an array of shape (2, 6), layout "n ... c"',
    ),
    "stored variance": (
        lambda: as_stats(Running(var=jnp.ones(5)), units.evonorm_row("n ..."), "n ... c", X32.shape),
        FieldError,
        'the stored var has shape (5,), but field "n ..." on an array of shape (2, 3, 3, 6), layout "n ... c", needs (6,)',
    ),
    "kept axes": (
        lambda: nnx.EvoNormB0(6, batch="n", rngs=flax_nnx.Rngs(0)),
        FieldError,
        'EvoNormB0 stores one variance a channel, but field "n" keeps other axes of layout "n ... c"',
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_thing_what_was_found_and_what_is_accepted(name):
    refuses(*REFUSALS[name])
