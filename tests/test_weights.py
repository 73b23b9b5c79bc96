"""Normalized kernels: formulas in NumPy float64, the authors' code, Flax, PyTorch, and every transformation of JAX."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from normjax import FieldError
from normjax.gain import RELU_GAIN, activation_gain
from normjax.reparametrize import data_dependent_start, matching_scale, reparametrize
from normjax.spectral import spectral_norm
from normjax.weights import (
    bounded_weight_norm,
    centred_weight_norm,
    norm_bound,
    scaled_weight_standardization,
    weight_centring,
    weight_norm,
    weight_standardization,
)

INF = math.inf
SILU_GAIN = 1.0 / math.sqrt(
    integrate.quad(lambda z: (z / (1 + math.exp(-z))) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -30, 30)[0]
    - integrate.quad(lambda z: z / (1 + math.exp(-z)) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -30, 30)[0] ** 2
)


# Formulas, for v [fan-in, outputs] and where it is valid; they share nothing with the package.


def power_sum(v, p):
    return np.abs(v).max(0) if p == INF else (np.abs(v) ** p).sum(0)


def spread(v, valid):
    count = valid.sum(0)
    mean = np.where(valid, v, 0).sum(0) / count
    c = np.where(valid, v - mean, 0)
    return c, (c**2).sum(0) / count, count


def norm(v, valid, p: float = 2, eps=0.0, root=0.0, floor=0.0):
    v = np.where(valid, v, 0)
    m = np.maximum(power_sum(v, p) + eps, floor)
    return v / ((m if p == INF else m ** (1 / p)) + root)


def standard(v, valid, eps=0.0, root=0.0, floor=0.0, ddof=0, factor=None):
    c, var, count = spread(v, valid)
    d = np.sqrt(np.maximum(var * count / (count - ddof) + eps, floor)) + root
    return c / d * (1.0 if factor is None else factor / np.sqrt(count))


def centred_norm(v, valid, eps=0.0):
    c = spread(v, valid)[0]
    return c / np.sqrt((c**2).sum(0) + eps)


class Case(NamedTuple):
    """A function of `normjax.weights`, and its formula without the scale."""

    ours: Callable[..., Any]
    formula: Callable[..., Any]


def case(function, formula, formula_options=None, **options):
    return Case(functools.partial(function, **options), functools.partial(formula, **(formula_options or {})))


CASES = {
    "centring": Case(weight_centring, lambda v, valid: spread(v, valid)[0]),
    "norm": Case(weight_norm, norm),
    "norm eps": case(weight_norm, norm, {"eps": 0.3}, eps=0.3),
    "norm root": case(weight_norm, norm, {"root": 0.3}, eps=0.3, eps_rule="root"),
    "norm floor": case(weight_norm, norm, {"floor": 1.5}, eps=1.5, eps_rule="floor"),
    "norm p=1": case(weight_norm, norm, {"p": 1, "eps": 0.3}, p=1, eps=0.3),
    "norm p=3 root": case(weight_norm, norm, {"p": 3, "root": 0.3}, p=3, eps=0.3, eps_rule="root"),
    "norm p=inf": case(weight_norm, norm, {"p": INF}, p=INF),
    "norm p=inf root": case(weight_norm, norm, {"p": INF, "root": 0.3}, p=INF, eps=0.3, eps_rule="root"),
    "centred": Case(centred_weight_norm, centred_norm),
    "centred eps": case(centred_weight_norm, centred_norm, {"eps": 0.3}, eps=0.3),
    "standard": case(weight_standardization, standard, {"eps": 1e-10}),
    "standard root": case(weight_standardization, standard, {"root": 0.3}, eps=0.3, eps_rule="root"),
    "standard floor": case(weight_standardization, standard, {"floor": 0.5}, eps=0.5, eps_rule="floor"),
    "scaled": case(
        scaled_weight_standardization, standard, {"eps": 1e-10, "factor": math.sqrt(2 * math.pi / (math.pi - 1))}
    ),
    "scaled silu": case(scaled_weight_standardization, standard, {"factor": SILU_GAIN}, gain=jax.nn.silu, eps=0.0),
}
QUICK = ("norm p=3 root", "centred", "scaled")
SHAPES = {"dense": (6, 3), "conv": (3, 1, 2, 3)}


def each(names, quick=None):
    return pytest.mark.parametrize(
        "name", [n if quick is None or n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
    )


# Compiled without XLA's optimizer, which is half of the time of these tests.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(f, *arrays, **options):
    """f(*arrays, **options) in one compilation: operation by operation it would be many."""
    return quickly(functools.partial(f, **options))(*arrays)


def draw(shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0.2, 1, shape) * scale


def formula(name, v, g=None, valid=None):
    """The formula on a kernel of any rank, outputs last."""
    flat = v.reshape(-1, v.shape[-1]).astype(np.float64)
    valid = np.ones(v.shape, bool) if valid is None else np.broadcast_to(valid, v.shape)
    w = CASES[name].formula(flat, valid.reshape(flat.shape)) * (1.0 if g is None else g)
    return np.where(valid, w.reshape(v.shape), 0)


def close(ours, exact, bound=2e-6):
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert ours.shape == exact.shape
    np.testing.assert_allclose(ours, exact, rtol=0, atol=bound * max(np.abs(exact).max(), 1e-30))


# Values.


@each(CASES, QUICK)
def test_kernels_of_dense_and_conv_equal_the_formula_in_float64(name):
    inputs = {k: (draw(s, 1).astype(np.float32), draw(s[-1:], 2).astype(np.float32)) for k, s in SHAPES.items()}
    valid = np.random.default_rng(3).random(SHAPES["conv"]) < 0.7
    valid[:2] = True
    hidden = np.where(valid, inputs["conv"][0], np.nan)

    @quickly
    def run(inputs, hidden):
        f = CASES[name].ours
        v, g = inputs["conv"]
        return {
            "dense": f(*inputs["dense"]),
            "conv": f(v, g),
            "no scale": f(v),
            "torch": f(v.transpose(3, 2, 0, 1), g, layout="o i ..."),
            "mask": f(hidden, g, mask=valid),
            "gradient behind the mask": jax.grad(lambda v: f(v, g, mask=valid).sum())(hidden),
            "bfloat16": f(v.astype(jnp.bfloat16), g),
        }

    out = run(inputs, hidden)
    (d, dg), (v, g) = inputs["dense"], inputs["conv"]
    close(out["dense"], formula(name, d, dg))
    close(out["conv"], formula(name, v, g))
    close(out["no scale"], formula(name, v))
    close(out["torch"], formula(name, v, g).transpose(3, 2, 0, 1))
    close(out["mask"], formula(name, v, g, valid))
    assert np.isfinite(out["gradient behind the mask"]).all()
    assert (np.asarray(out["gradient behind the mask"])[~valid] == 0).all()
    assert out["conv"].dtype == np.float32
    assert out["bfloat16"].dtype == jnp.bfloat16
    close(out["bfloat16"], formula(name, np.asarray(v.astype(jnp.bfloat16), np.float64), g), 2**-8)


def test_the_whole_kernel_or_several_axes_can_share_a_norm():
    v = draw((3, 4, 5), 4).astype(np.float32)
    close(run(weight_norm, v, field="... i o"), v / np.sqrt((v.astype(float) ** 2).sum()))
    close(run(weight_norm, v, np.full((1, 1, 5), 2, np.float32)), run(weight_norm, v, 2.0))
    close(run(weight_norm, v, 3.0, field="... i o"), 3 * v / np.sqrt((v.astype(float) ** 2).sum()))
    g = draw((4, 5), 5).astype(np.float32)  # a kernel of attention: inputs, heads, features
    close(run(weight_norm, v, g, layout="i h d", field="i"), g * v / np.sqrt((v.astype(float) ** 2).sum(0)))
    depthwise = draw((3, 3, 1, 4), 6).astype(np.float32)
    close(run(weight_norm, depthwise), formula("norm", depthwise))


@pytest.mark.slow
def test_outputs_of_zeros_stay_zero_and_lose_no_derivative_elsewhere():
    v = jnp.asarray(draw((4, 2), 7), jnp.float32).at[:, 0].set(0)
    dw = jnp.asarray(draw((4, 2), 8), jnp.float32)

    @quickly
    def run(v):
        out = {}
        for name, case in CASES.items():

            def f(v, case=case):
                return jnp.sum(case.ours(v, jnp.array([2.0, 3.0])) * dw)

            second = jax.jvp(jax.grad(f), (v,), (dw,))
            out[name] = (case.ours(v), *second)
        return out

    for name, (w, gradient, second) in run(v).items():
        assert (w[:, 0] == 0).all(), name
        assert np.isfinite(gradient).all(), name
        assert np.isfinite(second).all(), name
        assert np.abs(gradient[:, 1]).max() > 0, name


def test_eps_inside_of_the_root_and_beside_the_norm_are_two_numbers():
    v = np.full((4, 1), 1e-3, np.float32)
    norm = 2e-3
    close(run(weight_norm, v, eps=1e-5), v / math.sqrt(norm**2 + 1e-5))
    close(run(weight_norm, v, eps=1e-5, eps_rule="root"), v / (norm + 1e-5))
    close(run(weight_norm, v, eps=1e-5, eps_rule="floor"), v / math.sqrt(1e-5))


# Weight norm with a bound (Hoffer et al. 2018).


def test_the_bound_is_the_frobenius_norm_over_the_root_of_the_outputs_or_the_mean_norm():
    v = draw((3, 2, 7), 9).astype(np.float32)
    norms = np.linalg.norm(v.reshape(-1, 7).astype(float), axis=0)
    close(run(norm_bound, v), np.linalg.norm(v.astype(float)) / math.sqrt(7))
    close(run(norm_bound, v, rule="mean"), norms.mean())
    close(run(norm_bound, v, rule="mean", p=1), np.abs(v).astype(float).sum((0, 1)).mean())
    close(run(norm_bound, v, p=INF), np.sqrt((np.abs(v).max((0, 1)).astype(float) ** 2).mean()))
    assert run(norm_bound, v.astype(jnp.bfloat16)).dtype == np.float32
    assert run(norm_bound, np.zeros((3, 2), np.float32)) == 0


def test_bounded_weight_norm_keeps_every_norm_and_its_gradient_is_tangent():
    v, dw = draw((3, 2, 5), 10).astype(np.float32), draw((3, 2, 5), 11).astype(np.float32)

    @quickly
    def both(v, dw):
        rho = norm_bound(v)
        f = functools.partial(bounded_weight_norm, rho=rho)
        w, back = jax.vjp(f, v)
        return rho, w, back(dw)[0], jax.vjp(f, 2 * v)[1](dw)[0]

    rho, w, dv, at_twice = both(v, dw)
    close(np.linalg.norm(np.reshape(w, (6, 5)), axis=0), np.full(5, float(rho)))
    norms = np.linalg.norm(v.reshape(6, 5).astype(float), axis=0)
    u = v / norms
    close(dv, float(rho) / norms * (dw - u * (u * dw).sum((0, 1))))
    assert np.abs((np.asarray(dv) * v).sum((0, 1))).max() < 1e-6
    close(at_twice, np.asarray(dv) / 2)  # scale invariance: a kernel twice as long has half the gradient


def test_a_learned_scale_is_bounded_as_a_whole():
    v, g = draw((6, 5), 12).astype(np.float32), draw((5,), 13).astype(np.float32)

    @quickly
    def both(v, g):
        rho = norm_bound(v)
        return bounded_weight_norm(v, g, rho=rho), bounded_weight_norm(
            v, matching_scale(v, bounded_weight_norm), rho=rho
        )

    w, start = both(v, g)
    close(np.linalg.norm(w), np.linalg.norm(v))
    close(np.linalg.norm(w, axis=0), np.abs(g) * np.linalg.norm(v) / np.linalg.norm(g))
    close(start, v)


@each(["norm", "norm p=3 root", "norm p=1", "scaled silu", "centring"], ("norm", "scaled silu"))
def test_the_matching_scale_is_the_nearest(name):
    v = draw(SHAPES["conv"], 14).astype(np.float32)
    w = formula(name, v).reshape(-1, 3)
    got = quickly(lambda v: matching_scale(v, CASES[name].ours))(v)
    close(got, (w * v.reshape(-1, 3)).sum(0) / (w * w).sum(0), 1e-5)


def test_a_data_dependent_start_gives_the_first_batch_mean_0_and_variance_1():
    x, v = draw((50, 6), 44).astype(np.float32), draw((6, 4), 45).astype(np.float32)

    @quickly
    def first(x, v):
        g, b = data_dependent_start(x @ weight_norm(v))
        return x @ weight_norm(v, g) + b[None]

    y = np.asarray(first(x, v), float)
    close(y.std(0), np.ones(4), 1e-5)
    assert np.abs(y.mean(0)).max() < 1e-5


# The authors' code, run by PyTorch in float64 on these arrays, laid out "o i ...": w, dv and dg for a cotangent. It is the
# layer_defs.py of Lubana et al. 2021 (whose torch.linalg.norm of three axes is vector_norm today), bwn.py, bwn_alt.py and
# weight_norm of Hoffer et al. 2018, the convolution of Qiao et al. 2019 and that of NFNets, once with tiny weights.


def golden_arrays():
    rng = np.random.default_rng(7)
    v, g, dw = rng.normal(0, 0.3, (2, 2, 1, 2)), np.array([0.5, 2.0]), rng.normal(size=(2, 2, 1, 2))
    v[0, 0, 0, 1] = -0.9  # the largest weight is not the largest magnitude
    return v.astype(np.float32), g.astype(np.float32), dw.astype(np.float32)


# fmt: off
GOLDEN: dict[str, tuple[list[float], list[float], list[float] | None]] = {
    "WN_self": (
        [0.000195796, -0.477491, -0.0436328, -0.14175, -0.525886, -1.14697, 0.0695639, 1.55013],
        [-0.261231, -0.101988, 0.280645, 0.256793, 1.46458, -1.27948, -0.252752, -0.438407],
        [0.448426, 1.04378]),
    "ScaledStdConv2d": (
        [0.379356, -0.713177, 0.279114, 0.0547073, -0.878066, -1.94197, 0.141926, 2.67811],
        [-0.775174, -0.18607, 0.484802, 0.476443, 2.724, -1.97835, -0.215995, -0.529655],
        [0.824066, 1.78616]),
    "WCConv2d": (
        [0.312632, -0.587738, 0.230021, 0.0450849, -0.132954, -0.294047, 0.02149, 0.405511],
        [-0.425718, -0.553987, 0.55633, 0.423375, 0.145165, -0.890717, 0.0104988, 0.735054],
        None),
    "bwn.py": (
        [0.00010217, -0.249165, -0.0227685, -0.073968, -0.274421, -0.598517, 0.0363002, 0.808899],
        [-0.136316, -0.053218, 0.146447, 0.134, 0.764265, -0.667644, -0.131894, -0.228803],
        [0.0920756, -0.0230189]),
    "bwn.py inf": (
        [9.80324e-05, -0.239074, -0.0218464, -0.0709724, -0.324425, -0.707578, 0.0429148, 0.956295],
        [-0.130748, -0.0400874, 0.13012, 0.0948026, 0.250724, -2.21308, -0.0695743, -1.54931],
        [0.0598036, -0.0149509]),
    "bwn_alt.py": (
        [0.000286091, -0.697696, -0.0637549, -0.207121, -0.192104, -0.418982, 0.0254114, 0.566257],
        [-0.381703, -0.149018, 0.410071, 0.375219, 0.535012, -0.467374, -0.09233, -0.16017],
        None),
    "bwn_alt.py l1": (
        [0.000411918, -1.00455, -0.0917953, -0.298215, -0.276594, -0.603257, 0.0365877, 0.815305],
        [-0.549582, -0.214558, 0.590426, 0.540246, 0.770318, -0.672932, -0.132938, -0.230615],
        None),
    "weight_norm l3": (
        [0.000203218, -0.495591, -0.0452868, -0.147123, -0.600263, -1.30919, 0.0794024, 1.76937],
        [-0.271037, -0.0898792, 0.271837, 0.218712, 0.936182, -1.84813, -0.136993, -1.04371],
        [0.465425, 1.1914]),
    "WS": (
        [0.767216, -1.44234, 0.564485, 0.110641, -0.443955, -0.981868, 0.0717583, 1.35406],
        [-1.56773, -0.376308, 0.980471, 0.963565, 1.37727, -1.00025, -0.109209, -0.26781],
        None),
    "NFNets": (
        [0.221481, -0.416378, 0.162957, 0.0319401, -0.512652, -1.1338, 0.0828621, 1.56359],
        [-0.452579, -0.108627, 0.283042, 0.278164, 1.59042, -1.15496, -0.126113, -0.309356],
        [0.481119, 1.04284]),
    "NFNets tiny": (
        [0.0312632, -0.0587738, 0.0230021, 0.00450849, -0.0531817, -0.117619, 0.00859599, 0.162205],
        [-21.2859, -27.6993, 27.8165, 21.1688, 29.033, -178.143, 2.09976, 147.011],
        [0.0679123, 0.108182]),
}
# fmt: on


def golden_functions(v):
    first = functools.partial(norm_bound, v, layout="o i ...")
    floor: dict[str, Any] = {"gain": 1.0, "eps": 1e-4 / 4, "eps_rule": "floor"}
    return {
        "WN_self": functools.partial(weight_norm, eps=1e-5, eps_rule="root"),
        "ScaledStdConv2d": functools.partial(scaled_weight_standardization, eps=1e-5, eps_rule="root"),
        "WCConv2d": weight_centring,
        "bwn.py": functools.partial(bounded_weight_norm, rho=first()),
        "bwn.py inf": functools.partial(bounded_weight_norm, p=INF, rho=first(p=INF)),
        "bwn_alt.py": functools.partial(bounded_weight_norm, rho=first(rule="mean")),
        "bwn_alt.py l1": functools.partial(bounded_weight_norm, rho=first(rule="mean", p=1)),
        "weight_norm l3": functools.partial(weight_norm, p=3),
        "WS": functools.partial(weight_standardization, eps=1e-5, eps_rule="root", unbiased=True),
        "NFNets": functools.partial(scaled_weight_standardization, **floor),
        "NFNets tiny": functools.partial(scaled_weight_standardization, **floor),
    }


def test_values_and_gradients_of_the_authors_code():
    v, g, dw = golden_arrays()

    @quickly
    def run(v, g, dw):
        out = {}
        for name, f in golden_functions(v).items():
            at = v * 0.002 if name == "NFNets tiny" else v
            if GOLDEN[name][2] is None:
                w, back = jax.vjp(lambda v, f=f: f(v, layout="o i ..."), at)
            else:
                w, back = jax.vjp(lambda v, g, f=f: f(v, g, layout="o i ..."), at, g)
            out[name] = (w, *back(dw))
        return out

    out = run(v, g, dw)
    assert out.keys() == GOLDEN.keys()
    for name, got in out.items():
        want = [a for a in GOLDEN[name] if a is not None]
        for ours, theirs in zip(got, want, strict=True):
            close(np.ravel(ours), theirs, 1e-5)


# Standardization and gains.


def test_standardized_weights_have_mean_zero_and_the_variance_that_is_asked_for():
    v = draw((3, 3, 8, 4), 15, 0.02).astype(np.float32)
    w = np.asarray(run(weight_standardization, v), float).reshape(72, 4)
    close(w.var(0), np.ones(4), 1e-5)
    assert np.abs(w.mean(0)).max() < 1e-6
    close(
        np.asarray(run(weight_standardization, v, unbiased=True), float).reshape(72, 4).var(0, ddof=1), np.ones(4), 1e-5
    )
    w = np.asarray(run(scaled_weight_standardization, v, gain=1.0), float).reshape(72, 4)
    close((w**2).sum(0), np.ones(4), 1e-5)


@pytest.mark.slow
def test_scaled_standardization_keeps_the_variance_through_relu():
    key = jax.random.key(0)
    x = jax.random.normal(key, (2000, 400))
    w = scaled_weight_standardization(jax.random.normal(jax.random.fold_in(key, 1), (400, 400)) + 0.3)
    for _ in range(3):
        y = jax.nn.relu(x) @ w
        x = y
    close(jnp.var(x, axis=0).mean(), 1.0, 0.05)


def test_the_gain_of_relu_is_the_closed_form_and_the_published_constant_is_not():
    # The mean of relu(z) is 1 / sqrt(2 pi), its second moment 1/2: the scaled relu of Arpit et al. 2016.
    assert RELU_GAIN == pytest.approx(1 / math.sqrt(0.5 - 1 / (2 * math.pi)), rel=1e-15)
    assert RELU_GAIN == pytest.approx(1.7128585504, abs=5e-11)
    assert activation_gain(jax.nn.relu) == RELU_GAIN
    assert activation_gain(lambda x: jnp.maximum(x, 0)) == pytest.approx(RELU_GAIN, rel=1e-7)
    assert pytest.approx(6.4e-4, rel=0.01) == 1.7139588594 / RELU_GAIN - 1


def leaky(z):
    return max(z, 0.01 * z)


# Exact by quadrature; and what the code of NFNets has, which its authors measured on samples.
GAINS: dict[str, tuple[Any, Callable[[float], float], float | None]] = {
    "identity": (lambda x: x, lambda z: z, 1.0),
    "tanh": (jnp.tanh, math.tanh, 1.5939117670059204),
    "sigmoid": (jax.nn.sigmoid, lambda z: 1 / (1 + math.exp(-z)), 4.803835391998291),
    "silu": (jax.nn.silu, lambda z: z / (1 + math.exp(-z)), 1.7881293296813965),
    "gelu": (
        functools.partial(jax.nn.gelu, approximate=False),
        lambda z: z * 0.5 * math.erfc(-z / math.sqrt(2)),
        1.7015043497085571,
    ),
    "elu": (jax.nn.elu, lambda z: z if z > 0 else math.expm1(z), 1.2716004848480225),
    "leaky_relu": (jax.nn.leaky_relu, leaky, 1.70590341091156),
    "relu": (lambda x: jnp.maximum(x, 0), lambda z: max(z, 0), 1.7139588594436646),
    "relu6": (jax.nn.relu6, lambda z: min(max(z, 0), 6), 1.7131484746932983),
    "softplus": (jax.nn.softplus, lambda z: math.log1p(math.exp(z)), 1.9203323125839233),
    "hard_tanh": (jax.nn.hard_tanh, lambda z: min(max(z, -1), 1), None),
    "sign": (jnp.sign, lambda z: math.copysign(1, z), None),
}


@each(GAINS, ("tanh", "silu", "relu6"))
def test_gains_equal_adaptive_quadrature_and_the_constants_of_nfnets(name):
    activation, exact, published = GAINS[name]

    def mean(f):
        parts = [(-12, -1), (-1, 0), (0, 1), (1, 6), (6, 12)]
        density = 1 / math.sqrt(2 * math.pi)
        return sum(integrate.quad(lambda z: f(z) * density * math.exp(-z * z / 2), *p)[0] for p in parts)

    first = mean(exact)
    gain = 1 / math.sqrt(mean(lambda z: (exact(z) - first) ** 2))
    assert activation_gain(activation) == pytest.approx(gain, rel=2e-6)
    assert published is None or activation_gain(activation) == pytest.approx(published, rel=2e-3)
    with jax.enable_x64(True):
        assert activation_gain(activation) == pytest.approx(gain, rel=1e-9)


def test_a_gain_is_a_number_inside_of_jit_and_of_grad():
    v = draw((4, 2), 16).astype(np.float32)
    inside = []

    def f(v):
        inside.append(activation_gain(lambda x: jax.nn.silu(x)))
        return jnp.sum(scaled_weight_standardization(v, gain=jax.nn.silu) ** 3)

    jax.jit(jax.grad(f))(v)
    assert inside == [pytest.approx(SILU_GAIN, rel=1e-6)] * len(inside)
    assert inside


# Transformations, in float64 against differences of the formulas.


@each(CASES, ("norm p=3 root",))
def test_every_transformation_agrees_with_differences_of_the_formula(name):
    shape = (2, 2, 3)
    v, t, dw, g = draw(shape, 17), draw(shape, 18), draw(shape, 19), draw((3,), 20)
    with jax.enable_x64(True):
        ours = CASES[name].ours

        def loss(v, g):
            return jnp.sum(ours(v, g) * dw)

        @quickly
        def run(v, g, t):
            value, along = jax.jvp(lambda v: ours(v, g), (v,), (t,))
            gradient = jax.grad(loss, (0, 1))(v, g)
            two = jnp.stack([v, 2 * v - t])
            return {
                "value": value,
                "jvp": along,
                "grad": gradient,
                "grad of grad": jax.jvp(jax.grad(loss), (v, g), (t, jnp.zeros_like(g)))[1],
                "reverse over reverse": jax.grad(lambda v: jnp.vdot(jax.grad(loss)(v, g), t))(v),
                "checkpoint": jax.grad(jax.checkpoint(loss), (0, 1))(v, g),
                "vmap": jax.vmap(jax.grad(loss), (0, None))(two, g)[0],
                "vmap alone": (jax.vmap(ours)(two)[1], ours(two[1])),
                "scan": jax.lax.scan(lambda c, v: (c, jax.grad(loss)(v, g)), 0, two)[1][0],
            }

        out = run(jnp.asarray(v), jnp.asarray(g), jnp.asarray(t))
        assert out["value"].dtype == np.float64

    def along(h):
        return formula(name, v + h * t, g)

    h = 1e-4
    close(out["value"], along(0), 1e-12)
    close(out["jvp"], (along(h) - along(-h)) / (2 * h), 1e-6)
    basis = np.eye(v.size).reshape(-1, *shape)
    difference = [np.sum((formula(name, v + h * e, g) - formula(name, v - h * e, g)) * dw) / (2 * h) for e in basis]
    close(out["grad"][0], np.reshape(difference, shape), 1e-6)
    close(out["grad"][1], (formula(name, v) * dw).sum((0, 1)), 1e-12)
    second = np.sum((along(h) - 2 * along(0) + along(-h)) * dw) / h**2
    np.testing.assert_allclose(np.vdot(out["grad of grad"], t), second, rtol=1e-5, atol=1e-6)
    close(out["reverse over reverse"], out["grad of grad"], 1e-10)
    close(out["vmap alone"][0], out["vmap alone"][1], 1e-12)
    for kind in ("checkpoint", "vmap", "scan"):
        got = out[kind][0] if kind == "checkpoint" else out[kind]
        close(got, out["grad"][0], 1e-12)


@each(CASES, ("norm", "scaled"))
def test_inputs_spread_over_a_mapped_axis_are_one_field(name):
    v, g = draw((4, 2, 3), 21).astype(np.float32), draw((3,), 22).astype(np.float32)
    f = functools.partial(CASES[name].ours, layout="i o", field="i@model")
    spread = jax.jit(jax.vmap(f, in_axes=(0, None), axis_name="model"))(v, g)
    close(spread, formula(name, v, g))


@pytest.mark.slow
def test_the_bound_sees_inputs_and_outputs_on_a_mesh():
    v = draw((4, 6), 23).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    spec = jax.sharding.PartitionSpec("data", "model")

    def f(v, g):
        fields: Any = {"field": "i@data", "layout": "i o", "outputs": "o@model"}
        rho = norm_bound(v, **fields)
        return bounded_weight_norm(v, g, rho=rho, **fields)

    g = draw((6,), 24).astype(np.float32)
    specs = (spec, jax.sharding.PartitionSpec("model"))
    w = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=spec))(v, g)
    close(w, bounded_weight_norm(v, g, rho=norm_bound(v)))


# Spectral norm.


def power_iteration(m, u, steps):
    """The iteration and the gradient of sum(W / sigma * dw), in float64."""
    v = m @ u / np.linalg.norm(m @ u)
    for _ in range(steps):
        v = m @ u / np.linalg.norm(m @ u)
        u = v @ m / np.linalg.norm(v @ m)
    return v, u, v @ m @ u


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_spectral_norm_is_the_iteration_and_its_gradient_that_of_the_paper(steps):
    k, u, dw = (draw(s, i) for i, s in ((25, (2, 3, 4)), (26, (1, 4)), (27, (2, 3, 4))))
    with jax.enable_x64(True):
        out, back = jax.vjp(lambda k: spectral_norm(k, u, steps=steps).kernel, k)
        after = spectral_norm(k, u, steps=steps)
        gradient = back(jnp.asarray(dw))[0]
    v, exact_u, sigma = power_iteration(k.reshape(6, 4), u[0], steps)
    close(out, k / sigma, 1e-9)
    close(after.u, exact_u[None], 1e-9)
    close(after.sigma, sigma, 1e-9)
    # Equation 12: the singular vectors are constants.
    flat = dw.reshape(6, 4)
    exact = (flat - np.sum(flat * k.reshape(6, 4)) / sigma * np.outer(v, exact_u)) / sigma
    close(gradient, exact.reshape(k.shape), 1e-9)


@pytest.mark.slow
def test_many_iterations_find_the_largest_singular_value():
    k = draw((3, 3, 2, 5), 28).astype(np.float32)
    out = run(spectral_norm, k, np.ones(5, np.float32), steps=60)
    close(out.sigma, np.linalg.svd(k.reshape(18, 5).astype(float))[1][0], 1e-5)
    close(np.linalg.svd(np.asarray(out.kernel, float).reshape(18, 5))[1][0], 1.0, 1e-5)
    torch_s = run(spectral_norm, k.transpose(3, 2, 0, 1), np.ones(5, np.float32), steps=60, layout="o i ...")
    close(torch_s.kernel, np.asarray(out.kernel).transpose(3, 2, 0, 1), 1e-5)
    low = run(spectral_norm, k.astype(jnp.bfloat16), np.ones(5, np.float32), steps=60)
    assert (low.kernel.dtype, low.u.dtype, low.sigma.dtype) == (jnp.bfloat16, np.float32, np.float32)
    close(low.sigma, np.linalg.svd(np.asarray(k.astype(jnp.bfloat16), float).reshape(18, 5))[1][0], 1e-5)


def test_spectral_norm_under_every_transformation():
    k, u, t = (jnp.asarray(draw(s, i), jnp.float32) for i, s in ((29, (6, 4)), (30, (4,)), (31, (6, 4))))

    def loss(k):
        out = spectral_norm(k, u, steps=2)
        return jnp.sum(out.kernel * jnp.sin(out.kernel))

    @quickly
    def run(k):
        two = jnp.stack([k, t])
        gradient = jax.grad(loss)(k)
        return {
            "plain": gradient,
            "checkpoint": jax.grad(jax.checkpoint(loss))(k),
            "vmap": jax.vmap(jax.grad(loss))(two)[0],
            "scan": jax.lax.scan(lambda c, k: (c, jax.grad(loss)(k)), 0, two)[1][0],
            "jvp": (jax.jvp(loss, (k,), (t,))[1], jnp.vdot(gradient, t)),
            "second": (
                jnp.vdot(jax.jvp(jax.grad(loss), (k,), (t,))[1], t),
                jnp.vdot(jax.grad(lambda k: jnp.vdot(jax.grad(loss)(k), t))(k), t),
            ),
            "zero": jax.grad(loss)(jnp.zeros_like(k)),
        }

    out = run(k)
    for kind in ("checkpoint", "vmap", "scan"):
        close(out[kind], out["plain"], 1e-5)
    close(out["jvp"][0], out["jvp"][1], 1e-5)
    close(out["second"][0], out["second"][1], 1e-4)
    assert (out["zero"] == 0).all()


@pytest.mark.slow
def test_spectral_norm_in_evaluation_is_that_of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 5, 2), n_power_iterations=1)
    layer.eval()
    p = layer.parametrizations.weight
    k, u = p.original.detach().numpy(), p[0]._u.numpy()
    ours = spectral_norm(k, u, steps=0, layout="o i ...")
    # Torch keeps v beside u: after its step u = W v, it takes v = W u, which is where zero steps start.
    close(ours.kernel, layer.weight.detach().numpy(), 1e-5)


@pytest.mark.slow
def test_weight_norm_is_that_of_torch_with_its_gradients():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 5, 2))
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    dw = torch.randn(5, 3, 2, 2)
    (layer.weight * dw).sum().backward()
    arrays = [a.detach().numpy() for a in (v, g)]
    w, back = jax.vjp(lambda v, g: weight_norm(v, g, layout="o i ..."), *arrays)
    close(w, layer.weight.detach().numpy())
    for ours, theirs in zip(back(dw.numpy()), (v.grad, g.grad), strict=True):
        close(ours, theirs.numpy(), 1e-5)
    close(
        matching_scale(arrays[0], functools.partial(weight_norm, layout="o i ..."), layout="o i ..."), arrays[1].ravel()
    )


# Refusals.

V = np.ones((2, 3), np.float32)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: weight_norm(np.ones((2, 3), np.int32)),
        TypeError,
        "a reparametrization takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)",
    ),
    "rule": (
        lambda: weight_norm(V, eps_rule="std"),
        ValueError,
        "eps_rule is one of 'moment', 'root', 'floor'; found 'std'",
    ),
    "p": (lambda: weight_norm(V, p=0), ValueError, "p, the order of a norm, is a positive number or inf; found 0"),
    "scale": (
        lambda: weight_norm(V, np.ones(2, np.float32)),
        FieldError,
        "a scale is a scalar, has the shape (3,) of the outputs, or the rank of the kernel: found shape (2,), kernel "
        '(2, 3), layout "... i o", field "... i"',
    ),
    "unbiased": (
        lambda: weight_standardization(V, unbiased=True, mask=V),
        ValueError,
        "unbiased=True divides by fan-in - 1, which a mask makes another number for each output",
    ),
    "bound": (lambda: norm_bound(V, rule="max"), ValueError, "rule is one of 'rms', 'mean'; found 'max'"),
    "path": (
        lambda: reparametrize({"a": {"kernel": V}}, {"b/*": weight_norm}),
        ValueError,
        "no parameter has a path like 'b/*'; the paths are 'a/kernel'",
    ),
    "u": (
        lambda: spectral_norm(V, np.ones(2, np.float32)),
        FieldError,
        'u of shape (2,) does not fit 3 outputs: kernel of shape (2, 3), layout "... i o", outputs "o"',
    ),
    "outputs": (
        lambda: spectral_norm(V, np.ones(3, np.float32), outputs="c"),
        FieldError,
        'outputs are names of axes of layout "... i o"; found "c"',
    ),
    "steps": (
        lambda: spectral_norm(V, np.ones(3, np.float32), steps=-1),
        ValueError,
        "steps is a number of power iterations, at least 0; found -1",
    ),
    "complex": (
        lambda: spectral_norm(V.astype(np.complex64), V[0]),
        TypeError,
        "spectral_norm takes real arrays, found complex64",
    ),
}


@each(REFUSED)
def test_refusals_name_what_was_found_and_what_is_accepted(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def test_a_field_of_one_weight_is_not_centred_and_a_constant_has_no_gain():
    for f in (weight_centring, centred_weight_norm, weight_standardization, scaled_weight_standardization):
        with pytest.raises(FieldError, match="holds a single element"):
            f(np.ones((1, 1, 3), np.float32))
    with pytest.raises(ValueError, match="no gain makes that 1"):
        activation_gain(jnp.zeros_like)
