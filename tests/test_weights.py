"""Normalized kernels: formulas in NumPy float64, PyTorch, and every transformation of JAX."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import FieldError
from normjax.reparametrize import data_dependent_start, initial_bound, matching_scale, reparametrize
from normjax.weights import (
    bounded_weight_norm,
    centred_weight_norm,
    norm_bound,
    scaled_weight_standardization,
    weight_centring,
    weight_norm,
    weight_standardization,
)
from tests.kernels import CASES, INF, SHAPES, close, draw, each, formula, quickly, run
from tests.refusals import refuses

QUICK = ("norm p=3 root", "centred", "scaled")

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


def test_norms_beyond_the_range_of_float16_are_no_trouble():
    v = np.full((300, 1), 60000, np.float16)
    close(run(weight_norm, v), np.full((300, 1), 300**-0.5), 2e-3)


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


def test_the_bound_leaves_masked_weights_out_and_is_of_the_norm_that_the_weight_takes():
    v, valid = draw((6, 4), 46).astype(np.float32), np.random.default_rng(47).random((6, 4)) < 0.6
    hidden, kept = np.where(valid, v, np.nan), np.where(valid, v, 0).astype(float)
    norms = np.abs(kept).sum(0)
    one = functools.partial(bounded_weight_norm, p=1)

    @quickly
    def start(v):
        rho, g = initial_bound(v, one, mask=valid), matching_scale(v, one, mask=valid)
        transposed = functools.partial(one, layout="o i ...")
        turned = initial_bound(v.T, transposed, "mean"), matching_scale(v.T, transposed, mask=valid.T)
        return rho, g, one(v, g, rho=rho, mask=valid), norm_bound(v, mask=valid), turned

    rho, g, w, frobenius, (mean, turned) = start(hidden)
    close(rho, np.sqrt((norms**2).mean()))
    close(g, norms)
    close(w, kept)  # nothing changes at first
    close(frobenius, np.linalg.norm(kept) / 2)
    close(turned, norms)
    close(start(v)[-1][0], np.abs(v.astype(float)).sum(0).mean())
    assert np.isnan(mean)  # nobody masked it


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
    x, v = draw((2000, 400), 48) - 0.2, draw((400, 400), 49)

    @quickly
    def variance(x, v):
        w = scaled_weight_standardization(v)
        for _ in range(3):
            x = jax.nn.relu(x) @ w
        return jnp.var(x, axis=0).mean()

    close(variance(x.astype(np.float32), v.astype(np.float32)), 1.0, 0.05)


# Transformations, in float64 against differences of the formulas.


# Their twins without eps, or with another number for the gain, have the same derivatives.
@each([name for name in CASES if name not in ("norm eps", "centred eps", "scaled silu")], ("norm p=3 root",))
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
    "gain": (
        lambda: scaled_weight_standardization(V, gain="relu"),  # pyright: ignore[reportArgumentType]
        TypeError,
        "gain is a number or the activation itself, as in gain=jax.nn.relu; found 'relu'",
    ),
    "outputs": (
        lambda: norm_bound(np.ones((2, 3, 4), np.float32), layout="i h d", field="i", outputs="d"),
        FieldError,
        'one bound is asked for: outputs "d" beside field "i" leave 3 numbers of a kernel of shape (2, 3, 4), layout '
        '"i h d"',
    ),
    "bound": (lambda: norm_bound(V, rule="max"), ValueError, "rule is one of 'rms', 'mean'; found 'max'"),
    "path": (
        lambda: reparametrize({"a": {"kernel": V}}, {"b/*": weight_norm}),
        ValueError,
        "no parameter has a path like 'b/*'; the paths are 'a/kernel'",
    ),
}


@each(REFUSED)
def test_refusals_name_what_was_found_and_what_is_accepted(name):
    refuses(*REFUSED[name])


def test_a_field_of_one_weight_is_not_centred():
    for f in (weight_centring, centred_weight_norm, weight_standardization, scaled_weight_standardization):
        with pytest.raises(FieldError, match="holds a single element"):
            f(np.ones((1, 1, 3), np.float32))
