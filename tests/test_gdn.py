"""Generalized divisive normalization, against the formula in NumPy float64, PyTorch's gradients, and rows of the table."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree

import normjax.linen
import normjax.nnx
from normjax import FieldError, Normalizer, normalize
from normjax.gdn import (
    GRADIENTS,
    MINIMA,
    OFFSET,
    Raw,
    diagonal,
    gdn,
    gdn_of_raw,
    igdn,
    inverse,
    nonnegative,
    to_raw,
    towards_bound,
)
from tests.refusals import refuses

EXPONENTS = [(2.0, 0.5), (1.0, 1.0), (2.0, 0.75), (1.5, 2 / 3), (3.0, 0.2), (0.5, 1.0)]


def numbers(channels=3, shape=(2, 4), seed=0):
    """x, beta, gamma in float64."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(0, 2, (*shape, channels)),
        rng.uniform(0.2, 1, channels),
        rng.uniform(0, 0.4, (channels, channels)),
    )


def pooled(x, beta, gamma, alpha):
    return beta + np.abs(x) ** alpha @ gamma.T


def single(*arrays) -> Any:
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def quick(f):
    """Compiled without XLA's optimizer, which is most of the time of these tests."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def assert_same_derivatives(f, reference, args, rtol=1e-8):
    """Derivatives of f, taken in all of JAX's ways, are those of its obvious form; in float64, compiled at once."""
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), args))
        u = jnp.sin(1.0 + 7 * jnp.arange(flat.size, dtype=flat.dtype))
        two = jnp.stack([flat, flat + 0.01 * u])

        def functions(f):
            def g(flat):
                return ravel_pytree(f(*unravel(flat)))[0]

            def loss(flat):
                y = g(flat)
                return jnp.vdot(jnp.cos(jnp.arange(y.size, dtype=y.dtype)), y + jnp.square(y))

            return g, loss, lambda flat: jax.jvp(jax.grad(loss), (flat,), (u,))[1]

        def ways(flat, two):
            g, loss, product = functions(f)
            kept = jax.checkpoint(loss)
            return {
                "value": g(flat),
                "gradient": jax.grad(loss)(flat),
                "jvp": jax.jvp(g, (flat,), (u,))[1],
                "reverse over checkpointed reverse": jax.grad(lambda a: jnp.vdot(jax.grad(kept)(a), u))(flat),
                "reverse over forward": jax.grad(lambda a: jax.jvp(loss, (a,), (u,))[1])(flat),
                "forward over reverse, vmap": jax.vmap(product)(two),
                "gradient, scan": lax.scan(lambda carry, a: (carry, jax.grad(loss)(a)), 0.0, two)[1],
            }

        def once(two):
            g, loss, product = functions(reference)
            tangents = jax.jvp(g, (two[0],), (u,))
            return *tangents, jnp.stack([jax.grad(loss)(a) for a in two]), jnp.stack([product(a) for a in two])

        got = quick(ways)(flat, two)
        value, jvp, gradient, product = quick(once)(two)
    want = {
        "value": value, "gradient": gradient[0], "jvp": jvp, "reverse over checkpointed reverse": product[0],
        "reverse over forward": product[0], "forward over reverse, vmap": product, "gradient, scan": gradient,
    }  # fmt: skip
    assert got["value"].dtype == np.float64
    for name, value in want.items():
        size = np.abs(value).max()
        assert size > 1e-3
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=rtol * size, err_msg=name)


def test_gdn_and_igdn_are_the_formula_in_both_layouts():
    x, beta, gamma = numbers()

    def ours(x, b, g):
        for alpha, epsilon in EXPONENTS:
            for f in (gdn, igdn):
                turned = f(jnp.moveaxis(x, -1, 1), b, g, "n c ...", alpha=jnp.array(alpha), epsilon=jnp.array(epsilon))
                yield f(x, b, g, alpha=alpha, epsilon=epsilon), jnp.moveaxis(turned, 1, -1)

    found = iter(quick(lambda *args: list(ours(*args)))(*single(x, beta, gamma)))
    for alpha, epsilon in EXPONENTS:
        q = pooled(x, beta, gamma, alpha)
        for want in (x / q**epsilon, x * q**epsilon):
            for got in next(found):
                np.testing.assert_allclose(got, want, rtol=3e-6)


def test_gdn_with_equal_weights_is_a_row_of_the_table():
    x, _, _ = numbers(6)
    (x,) = single(x)
    band = jnp.asarray(np.abs(np.subtract.outer(np.arange(6), np.arange(6))) <= 2, jnp.float32)

    @quick
    def both(x):
        uniform = (
            gdn(x, jnp.full(6, 0.3), jnp.full((6, 6), 0.5)),
            normalize(x, Normalizer(None, "c", eps=0.3, gain=3.0)).y,
        )
        return uniform, (gdn(x, jnp.full(6, 2.0), band * 1e-4, epsilon=0.75), normalize(x, "response").y)

    for got, want in both(x):
        np.testing.assert_allclose(got, want, rtol=2e-6)


def test_rows_of_gamma_are_the_pools_of_the_outputs():
    gamma = jnp.array([[0.0, 1.0], [0.0, 0.0]])  # channel 0 is divided by channel 1 alone
    y = quick(gdn)(jnp.array([[1.0, 3.0]]), jnp.full(2, 1e-12), gamma)
    assert float(y[0, 0]) == pytest.approx(1 / 3)


def test_learned_exponents_of_negative_inputs_are_finite_unlike_tensorflow_compression():
    x, beta, gamma = single(*numbers())
    y = quick(gdn)(x, beta, gamma, alpha=jnp.array(1.3))
    assert bool(jnp.isfinite(y).all())
    assert bool((jnp.sign(y) == jnp.sign(x)).all())


@pytest.mark.parametrize("inverted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layer_has_outputs_and_gradients_of_the_published_code_written_in_torch(inverted):
    torch = pytest.importorskip("torch")

    class Bound(torch.autograd.Function):  # the published rule, of the gradient itself
        @staticmethod
        def forward(ctx, value, bound):
            ctx.save_for_backward(value, bound)
            return torch.maximum(value, bound)

        @staticmethod
        def backward(ctx, *grads):
            value, bound = ctx.saved_tensors
            return torch.where((value >= bound) | (grads[0] < 0), grads[0], torch.zeros_like(grads[0])), None

    def parameter(raw, minimum):
        bound = torch.tensor((minimum + OFFSET**2) ** 0.5, dtype=raw.dtype)
        return Bound.apply(raw, bound) ** 2 - OFFSET**2

    x, _, _ = numbers(4, (3, 5), seed=1)
    rng = np.random.default_rng(2)
    raw = rng.normal(0.4, 0.5, 4), rng.normal(0.1, 0.4, (4, 4))  # some of them below their bounds
    weight = rng.normal(size=x.shape)
    assert (raw[0] < 0).any()
    assert (raw[1] < 0).any()
    t = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, *raw)]
    q = torch.nn.functional.linear(t[0] ** 2, parameter(t[2], 0.0), parameter(t[1], 0.01))
    y = t[0] * (q.sqrt() if inverted else q.rsqrt())
    (y * torch.tensor(weight)).sum().backward()

    def loss(x, beta, gamma):
        out = gdn_of_raw(x, Raw(beta, gamma), inverse=inverted, beta_min=0.01)
        return jnp.sum(out * jnp.asarray(weight, jnp.float32)), out

    (_, got), grads = quick(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*single(x, *raw))
    b, g = single(*raw)
    rules = (grads[0], towards_bound(grads[1], b, 0.01), towards_bound(grads[2], g))
    np.testing.assert_allclose(got, y.detach().numpy(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(rules, t, strict=True):
        np.testing.assert_allclose(mine, theirs.grad.numpy(), rtol=1e-5, atol=1e-5)
    assert (np.asarray(rules[2]) != np.asarray(grads[2])).any()  # the rule did something


def test_reparametrization_stays_in_the_domain_and_keeps_the_whole_gradient_at_the_bound():
    value = jnp.array([1e-6, 0.1, 1.0, 7.0])
    np.testing.assert_allclose(nonnegative(to_raw(value), 1e-6), value, rtol=1e-5)
    raw = jnp.array([-3.0, 0.0, OFFSET, 0.5])
    assert nonnegative(raw).min() == 0
    assert nonnegative(raw, 0.25).min() == pytest.approx(0.25)
    assert float(to_raw(jnp.array(0.0))) == OFFSET

    def slopes_of(kind):
        return quick(jax.grad(lambda r: jnp.sum(nonnegative(r, gradient=kind))))(raw)

    slopes = {kind: slopes_of(kind) for kind in GRADIENTS}
    bound = 2 * OFFSET
    np.testing.assert_allclose(slopes["pass"], [bound, bound, bound, 1.0], rtol=1e-6)
    np.testing.assert_allclose(slopes["block"], [0.0, 0.0, bound, 1.0], rtol=1e-6)


@pytest.mark.slow
def test_training_with_towards_keeps_what_is_learned_out_of_the_forbidden_side():
    raw, target = jnp.array([0.3, 0.3]), jnp.array([-1.0, 0.5])  # the first target lies outside of the domain

    @quick
    def step(raw):
        grad = jax.grad(lambda r: jnp.sum(jnp.square(nonnegative(r, 0.04) - target)))(raw)
        return raw - 0.05 * towards_bound(grad, raw, 0.04), raw - 0.05 * grad

    free = raw
    for _ in range(200):
        (raw, _), (_, free) = step(raw), step(free)
    np.testing.assert_allclose(nonnegative(raw, 0.04), [0.04, 0.5], rtol=1e-4)
    assert raw[0] > 0  # it stopped below the bound of 0.2, one step away
    assert free[0] < -1  # without the rule it drifts


def test_inverse_recovers_the_input_for_every_method():
    x, beta, gamma = numbers(4, (3, 5), seed=3)
    a, b, g = single(x, beta, gamma)
    ways = ((2.0, 0.5, None), (1.0, 1.0, None), (2.0, 0.5, 400), (1.5, 0.5, 60), (2.0, 0.25, 60))

    @quick
    def recover(a, b, g):
        exponents: list[tuple[dict[str, Any], Any]] = [
            ({"alpha": alpha, "epsilon": epsilon}, steps) for alpha, epsilon, steps in ways
        ]
        found = [inverse(gdn(a, b, g, **e), b, g, steps=steps, **e) for e, steps in exponents]
        first = inverse(jnp.moveaxis(gdn(a, b, g), -1, 1), b, g, "n c ...")
        return [*found, jnp.moveaxis(first, 1, -1)], inverse(jnp.zeros((1, 4)), b, g)

    found, nothing = recover(a, b, g)
    assert nothing.tolist() == [[0.0] * 4]
    for k, back in enumerate(found):
        np.testing.assert_allclose(back, x, rtol=2e-3, atol=1e-5, err_msg=str(k))


def test_inverse_is_nan_exactly_where_no_input_gives_the_output():
    _, beta, gamma = numbers(3)
    y = np.random.default_rng(4).uniform(-2.5, 2.5, (200, 3))
    radius = np.array([np.abs(np.linalg.eigvals(np.diag(row**2) @ gamma)).max() for row in y])
    assert 20 < (radius < 1).sum() < 180
    np.testing.assert_array_equal(np.isnan(quick(inverse)(*single(y, beta, gamma))).all(-1), radius >= 1)


@pytest.mark.slow
def test_each_step_of_the_inverse_shrinks_the_error_by_the_rate_that_the_docstring_states():
    x, beta, gamma = numbers(3, (2,), seed=5)
    ways, steps = ((2.0, 0.5), (1.5, 0.5)), (1, 2, 4, 8, 16)

    @quick
    def after_steps(x, b, g):
        return [[inverse(gdn(x, b, g, alpha=alpha, epsilon=epsilon), b, g, alpha=alpha, epsilon=epsilon, steps=k)
                 for k in steps] for alpha, epsilon in ways]  # fmt: skip

    with jax.enable_x64(True):
        found = after_steps(x, beta, gamma)
    for (alpha, epsilon), each in zip(ways, np.asarray(found), strict=True):
        errors = np.abs(np.log(np.abs(each) / np.abs(x))).max(-1)
        assert (np.abs(each) <= np.abs(x)).all()  # from below
        rate = alpha * epsilon * (1 - beta / pooled(x, beta, gamma, alpha)).max(-1)
        assert (rate < 1).all()
        for k, error in zip(steps, errors, strict=True):
            assert (error <= errors[0] * rate ** (k - 1) * (1 + 1e-9)).all()


def test_igdn_is_one_step_of_the_inverse_from_the_output():
    y, beta, gamma = numbers()
    np.testing.assert_allclose(quick(igdn)(*single(y, beta, gamma)), y * np.sqrt(pooled(y, beta, gamma, 2)), rtol=2e-6)


def plainly(x, beta, gamma, alpha, epsilon, sign=-1):
    q = beta.reshape(1, 1, -1) + jnp.einsum("nsj,ij->nsi", jnp.abs(x) ** alpha, gamma)
    return x * q ** (sign * epsilon)


@pytest.mark.slow
def test_gdn_has_every_derivative_of_its_formula_in_inputs_parameters_and_exponents():
    x, beta, gamma = numbers(2, (1, 2), seed=6)
    args = (x, beta, gamma, np.array(1.7), np.array(0.6))
    assert_same_derivatives(lambda x, b, g, a, e: gdn(x, b, g, alpha=a, epsilon=e), plainly, args)


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "epsilon", "sign"), [(2, 0.5, -1), (1, 1.0, -1), (2, 0.75, 1), (2, 0.5, 1)])
def test_forms_with_fixed_exponents_have_every_derivative_of_the_formula(alpha, epsilon, sign):
    assert_same_derivatives(
        functools.partial(gdn if sign < 0 else igdn, alpha=alpha, epsilon=epsilon),
        functools.partial(plainly, alpha=alpha, epsilon=epsilon, sign=sign),
        numbers(3, (2, 2), seed=6),
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 300])
def test_inverse_has_every_derivative_that_undoes_those_of_gdn(steps):
    x, beta, gamma = numbers(3, (1, 2), seed=7)

    def there_and_back(x, b, g):
        return inverse(gdn(x, b, 0.2 * g), b, 0.2 * g, steps=steps), b, g

    assert_same_derivatives(there_and_back, lambda *args: args, (x, beta, gamma), rtol=1e-6)


def test_bfloat16_is_pooled_in_float32_and_comes_back_as_bfloat16():
    x = jnp.concatenate([jnp.full((1, 1), 16.0), jnp.full((1, 255), 1.0)], 1).astype(jnp.bfloat16)
    y = quick(gdn)(x, jnp.zeros(256, jnp.bfloat16), jnp.ones((256, 256), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    want = (x.astype(jnp.float32) / np.sqrt(256.0 + 255.0)).astype(jnp.bfloat16)  # bfloat16 loses ones beside 256
    np.testing.assert_array_equal(y, want)
    assert jax.eval_shape(inverse, y, jnp.ones(256), jnp.ones((256, 256))).dtype == jnp.bfloat16


def test_masked_channels_are_in_no_pool_and_a_nan_there_reaches_nothing():
    x, beta, gamma = numbers(4, (3, 2), seed=8)
    mask = np.ones(x.shape, bool)
    mask[..., 2] = False
    kept = [0, 1, 3]
    a, b, g = single(np.where(mask, x, np.nan), beta, gamma)

    def loss(*p):
        y = gdn(*p, mask=jnp.asarray(mask))
        return jnp.sum(jnp.sin(y)), y

    (value, y), grads = quick(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(a, b, g)
    cut = x[..., kept] / np.sqrt(pooled(x[..., kept], beta[kept], gamma[np.ix_(kept, kept)], 2))
    np.testing.assert_allclose(np.asarray(y)[..., kept], cut, rtol=2e-6)
    assert (np.asarray(y)[..., 2] == 0).all()
    assert np.isfinite(value)
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


def test_zeros_and_large_inputs_have_finite_derivatives():
    def loss(x, alpha, epsilon, beta):
        learned = [f(x, beta, jnp.eye(3), alpha=alpha, epsilon=epsilon) for f in (gdn, igdn)]
        return jnp.sum(jnp.stack(learned + [f(x, beta, jnp.eye(3)) for f in (gdn, igdn)]))

    grad = quick(jax.grad(loss, (0, 1, 2)))
    for alpha, epsilon in ((2.0, 0.5), (1.0, 1.0), (1.3, 0.4)):
        for size, beta in ((0.0, 0.0), (0.0, 1.0), (1e-30, 1.0), (1e12, 0.0), (1e12, 1.0)):
            found = grad(*single(np.full((1, 3), size), alpha, epsilon, np.full(3, beta)))
            assert all(np.isfinite(g).all() for g in found), (alpha, epsilon, size, beta)


SETTINGS = [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"inverse": True, "layout": "n c ..."}, marks=pytest.mark.slow),
    pytest.param({"alpha": 1.0, "epsilon": 1.0, "rectify": True}, marks=pytest.mark.slow),
    {"learn_alpha": True, "learn_epsilon": True, "beta_min": 0.3, "gradient": "block"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "defaults")
def test_linen_is_nnx_on_the_same_parameters_with_its_gradients(settings):
    x = jnp.asarray(np.random.default_rng(9).normal(0, 2, (2, 3, 3)), jnp.float32)
    layer: Any = normjax.linen.GDN(gamma_init=nn.initializers.uniform(0.4), **settings)
    params = quick(layer.init)(jax.random.key(1), x)["params"]
    other = normjax.nnx.GDN(3, rngs=nnx.Rngs(0), **settings)
    assert set(nnx.to_pure_dict(nnx.state(other, nnx.Param))) == set(params)
    for name, value in params.items():
        getattr(other, name)[...] = value

    def plain(params):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    def learned(model):
        return jnp.sum(jnp.sin(model(x)))

    value, grads = quick(jax.value_and_grad(plain))(params)
    graph, state = nnx.split(other)
    want, theirs = quick(jax.value_and_grad(lambda state: learned(nnx.merge(graph, state))))(state)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    theirs = nnx.to_pure_dict(theirs)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, theirs[name], rtol=1e-5, atol=1e-6)
        assert float(jnp.abs(grad).max()) > 0, name


@pytest.mark.slow
def test_layer_starts_from_the_published_values():
    layer: Any = normjax.linen.GDN(learn_alpha=True, learn_epsilon=True)
    params = quick(layer.init)(jax.random.key(0), jnp.ones((1, 3)))["params"]
    np.testing.assert_allclose(nonnegative(params["beta_raw"], MINIMA.beta), np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(nonnegative(params["gamma_raw"]), 0.1 * np.eye(3), atol=1e-8)
    assert [float(nonnegative(params[f"{name}_raw"])) for name in ("alpha", "epsilon")] == pytest.approx([2.0, 0.5])
    assert diagonal(0.5)(jax.random.key(0), (2, 2), jnp.float32).tolist() == [[0.5, 0.0], [0.0, 0.5]]


X, BETA, GAMMA = jnp.ones((2, 3)), jnp.ones(3), jnp.ones((3, 3))
ERRORS = {
    "gamma": (
        lambda: gdn(X, BETA, jnp.ones((3, 2))),
        FieldError,
        'gamma has shape (3, 2), but 3 channels (layout "n ... c", shape (2, 3)) need (3, 3)',
    ),
    "beta": (
        lambda: igdn(X, jnp.ones(2), GAMMA, "n c"),
        FieldError,
        'beta has shape (2,), but 3 channels (layout "n c", shape (2, 3)) need (3,)',
    ),
    "no channels": (
        lambda: gdn(X, BETA, GAMMA, "n d"),
        FieldError,
        "GDN pools over the axis 'c', which layout \"n d\" does not name",
    ),
    "integers": (
        lambda: gdn(jnp.ones((2, 3), jnp.int32), BETA, GAMMA),
        TypeError,
        "gdn takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)",
    ),
    "alpha": (
        lambda: gdn(X, BETA, GAMMA, alpha=0.0),
        ValueError,
        "alpha is a positive number or a scalar array; found 0.0",
    ),
    "several inverses": (
        lambda: inverse(X, BETA, GAMMA, alpha=2.0, epsilon=0.75),
        ValueError,
        "GDN has one inverse for alpha * epsilon <= 1; found 2.0 * 0.75",
    ),
    "no system": (
        lambda: inverse(X, BETA, GAMMA, alpha=1.5, epsilon=0.5),
        ValueError,
        "the inverse without steps needs alpha * epsilon = 1; found 1.5 * 0.5; give steps=",
    ),
    "unknown exponents": (
        lambda: inverse(X, BETA, GAMMA, alpha=jnp.array(2.0)),
        ValueError,
        "the inverse without steps needs alpha * epsilon = 1; found an exponent that is an array; give steps=",
    ),
    "gradient": (
        lambda: nonnegative(BETA, gradient="towards"),
        ValueError,
        "gradient is one of 'pass', 'block'; found 'towards'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusal_says_what_was_found_and_what_is_accepted(name):
    refuses(*ERRORS[name])


@pytest.mark.slow
def test_channels_that_are_sharded_pool_as_a_whole_under_jit_and_are_refused_inside_shard_map():
    x, beta, gamma = single(*numbers(8, (2,)))
    mesh = jax.make_mesh((4,), ("model",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "model")
    lying = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    np.testing.assert_allclose(quick(gdn)(lying, beta, gamma), quick(gdn)(x, beta, gamma), rtol=1e-6)
    inside = jax.shard_map(lambda x: gdn(x, beta, gamma), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(FieldError, match=r"beta has shape \(8,\), but 2 channels"):
        jax.eval_shape(inside, x)


@pytest.mark.slow
def test_compiled_under_a_mapped_axis_and_alone_is_the_same():
    x, beta, gamma = single(*numbers(3, (4, 2)))
    mapped = quick(jax.vmap(functools.partial(gdn, beta=beta, gamma=gamma, layout="... c"), axis_name="n"))(x)
    np.testing.assert_allclose(mapped, quick(gdn)(x, beta, gamma), rtol=1e-6)
