"""diagnostics and similarity against NumPy and SciPy in float64; `test_information.py` has the histograms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import lax
from jax.sharding import PartitionSpec as P

from normjax import FieldError, Normalizer, diagnostics, normalize
from tests.kernels import quickly
from tests.refusals import refuses


def data(shape=(6, 3, 2, 5), seed=0):
    """Correlated units of unequal size and mean."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) @ rng.normal(size=(shape[-1], shape[-1]))
    return x + rng.normal(size=shape[-1])


def rows(x):
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


# --- against NumPy and SciPy ----------------------------------------------------------------------


def reference_correlation(x):
    c = np.atleast_2d(np.corrcoef(rows(x), rowvar=False))
    return np.abs(c[~np.eye(len(c), dtype=bool)]).mean()


def gram(x):
    u = np.asarray(x, np.float64).reshape(len(x), -1)
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    return u @ u.T


def reference_cosine(x):
    k = gram(x)
    return ((k.sum(1) - 1) / (len(k) - 1)).mean()


def reference_rank(x):
    k = gram(x)
    return np.trace(k) / np.linalg.norm(k, 2)


REFERENCES = {
    diagnostics.correlation: reference_correlation,
    diagnostics.activation_size: lambda x: rows(x).var(0, ddof=1).mean(),
    diagnostics.cosine_similarity: reference_cosine,
    diagnostics.stable_rank: reference_rank,
    diagnostics.dead_units: lambda x: (rows(x) == 0).all(0).mean(),
}
MEASURES = pytest.mark.parametrize("measure", REFERENCES, ids=lambda measure: measure.__name__)


@MEASURES
def test_measure_equals_its_definition_in_both_layouts_and_behind_masks(measure):
    x = data()
    if measure is diagnostics.dead_units:
        x[:4, ..., 1] = 0
    masked = x.copy()
    masked[4:] = np.nan
    first = np.moveaxis(x, -1, 1)
    keep = np.arange(6).reshape(6, 1, 1, 1) < 4

    @quickly
    def found(x, first, masked):
        return (
            measure(x),
            measure(first, "n c ..."),
            measure(first, "n c h w"),
            measure(masked, mask=keep),
            measure(masked, mask=2.0 * keep),
        )

    whole, part = REFERENCES[measure](x), REFERENCES[measure](x[:4])
    got = found(*(jnp.asarray(a, jnp.float32) for a in (x, first, masked)))
    if measure is diagnostics.activation_size:  # weights count samples: twice as many
        n = 4 * 3 * 2
        np.testing.assert_allclose(got[4], part * (n - 1) / n * 2 * n / (2 * n - 1), rtol=1e-5)
        got, expected = got[:4], [whole] * 3 + [part]
    else:
        expected = [whole] * 3 + [part] * 2
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_correlation_matrix_equals_numpys_and_leaves_constant_units_out():
    x = data()
    x[..., 3] = 0.1  # no float
    matrix_and_mean = quickly(lambda x: (diagnostics.correlation_matrix(x), diagnostics.correlation(x)))
    c, mean = map(np.asarray, matrix_and_mean(jnp.asarray(x, jnp.float32)))
    others = [0, 1, 2, 4]
    np.testing.assert_allclose(c[np.ix_(others, others)], np.corrcoef(rows(x)[:, others], rowvar=False), atol=1e-5)
    assert not c[3].any()
    assert not c[:, 3].any()
    assert mean == pytest.approx(reference_correlation(x[..., others]), rel=1e-5)


@pytest.mark.slow
def test_correlation_under_weights_counts_samples_as_repeated():
    x = data((4, 3))
    times = np.array([[1], [2], [3], [1]])
    repeated = np.repeat(x, times[:, 0], axis=0)
    found = quickly(lambda x, mask: diagnostics.correlation_matrix(x, mask=mask))(*map(jnp.float32, (x, times)))
    np.testing.assert_allclose(found, np.corrcoef(repeated, rowvar=False), atol=1e-5)


@pytest.mark.slow
def test_normalized_measures_do_not_depend_on_the_size_of_the_numbers():
    measures = (diagnostics.correlation, diagnostics.cosine_similarity, diagnostics.stable_rank)
    found = quickly(lambda x: jnp.stack([jnp.stack([m(x * s) for m in measures]) for s in (1e-30, 1.0, 1e30)]))
    for scaled in (values := found(jnp.asarray(data(), jnp.float32))):
        np.testing.assert_allclose(scaled, values[1], rtol=1e-4)


@pytest.mark.slow
def test_unit_moments_equal_scipys():
    x = data((50, 4))
    found = quickly(lambda x: diagnostics.unit_moments(x, "c n"))(jnp.asarray(x.T, jnp.float32))
    expected = [x.mean(0), x.std(0, ddof=1), scipy.stats.skew(x), scipy.stats.kurtosis(x, fisher=False)]
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4)
    biased = quickly(lambda x: diagnostics.unit_moments(x, unbiased=False))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(biased.std, x.std(0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 8), (8, 3)], ids=["few examples", "few elements"])
def test_stable_rank_is_one_of_copies_and_the_number_of_orthogonal_examples(shape):
    copies = np.outer(np.arange(1.0, shape[0] + 1), np.arange(1.0, shape[1] + 1))
    rank = jax.jit(diagnostics.stable_rank)
    assert float(rank(jnp.float32(copies))) == pytest.approx(1, rel=1e-5)
    assert float(rank(jnp.float32(np.eye(*shape) * 7))) == pytest.approx(3, rel=1e-5)  # zero examples are left out


@pytest.mark.slow
def test_measures_of_nothing_are_nan_and_their_gradients_zero():
    nothing = jnp.zeros((3, 2))
    measures = (diagnostics.correlation, diagnostics.cosine_similarity, diagnostics.stable_rank)
    for value, slope in quickly(lambda x: [jax.value_and_grad(measure)(x) for measure in measures])(nothing):
        assert np.isnan(value)
        assert not np.asarray(slope).any()
    others = quickly(
        lambda x, mask: (
            diagnostics.dead_units(x),
            diagnostics.activation_size(x),
            diagnostics.dead_units(x, mask=mask),
        )
    )
    np.testing.assert_array_equal(others(nothing, np.zeros((3, 2), bool)), [1, 0, np.nan])


@pytest.mark.slow
def test_gradient_norm_is_frobenius_at_every_scale_with_slope_zero_at_zero():
    g = data()
    norm = jax.jit(jax.value_and_grad(diagnostics.gradient_norm))
    for scale in (1e-30, 1.0, 1e30):
        value, slope = norm(jnp.asarray(g * scale, jnp.float32))
        assert float(value) / scale == pytest.approx(np.linalg.norm(g), rel=1e-5)
        np.testing.assert_allclose(slope, g / np.linalg.norm(g), rtol=1e-4, atol=1e-6)
    assert not np.asarray(norm(jnp.zeros(g.shape))[1]).any()
    mask = np.arange(6).reshape(6, 1, 1, 1) < 4
    masked = jnp.asarray(np.where(mask, g, np.nan), jnp.float32)
    assert float(diagnostics.gradient_norm(masked, mask=mask)) == pytest.approx(np.linalg.norm(g[:4]), rel=1e-5)


# --- transformations ------------------------------------------------------------------------------

SCALARS = {
    "correlation": (diagnostics.correlation, reference_correlation),
    "activation_size": (diagnostics.activation_size, REFERENCES[diagnostics.activation_size]),
    "cosine_similarity": (diagnostics.cosine_similarity, reference_cosine),
    "stable_rank": (diagnostics.stable_rank, reference_rank),
    "gradient_norm": (diagnostics.gradient_norm, lambda x: np.linalg.norm(rows(x))),
    "kurtosis": (
        lambda x: diagnostics.unit_moments(x).kurtosis.sum(),
        lambda x: scipy.stats.kurtosis(rows(x), fisher=False).sum(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALARS)
def test_derivatives_are_those_of_finite_differences_under_every_transformation(name):
    measure, reference = SCALARS[name]
    x, t, h = data((4, 2, 3)), data((4, 2, 3), 1), 1e-5
    slope = (reference(x + h * t) - reference(x - h * t)) / (2 * h)
    h = 1e-3
    bend = (reference(x + h * t) - 2 * reference(x) + reference(x - h * t)) / h**2

    def along(x, t):
        value, tangent = jax.jvp(measure, (x,), (t,))
        gradient = jax.grad(measure)(x)
        rematerialized = jax.grad(jax.checkpoint(measure))(x)
        reverse_twice = jax.grad(lambda x: jnp.vdot(jax.grad(measure)(x), t))(x)
        forward_twice = jax.jvp(lambda x: jax.jvp(measure, (x,), (t,))[1], (x,), (t,))[1]
        _, scanned = lax.scan(lambda carry, x: (carry, measure(x)), None, jnp.stack([x, 2 * x]))
        mapped = jax.vmap(measure)(jnp.stack([x, 2 * x]))
        first = [tangent, jnp.vdot(gradient, t), jnp.vdot(rematerialized, t)]
        return value, first, [jnp.vdot(reverse_twice, t), forward_twice], scanned, mapped

    with jax.enable_x64(True):
        value, first, second, scanned, mapped = quickly(along)(jnp.asarray(x), jnp.asarray(t))
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, reference(x), rtol=1e-10)
        np.testing.assert_allclose(first, [slope] * 3, rtol=1e-5)
        np.testing.assert_allclose(second, [bend] * 2, rtol=1e-3)
        np.testing.assert_allclose(scanned, [reference(x), reference(2 * x)], rtol=1e-10)
        np.testing.assert_allclose(mapped, scanned, rtol=1e-10)


@pytest.mark.slow
def test_measures_of_bfloat16_are_float32_of_the_rounded_numbers():
    x = jnp.asarray(data(), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    found = quickly(lambda x: {name: measure(x) for name, (measure, _) in SCALARS.items()})(x)
    for name, (_, reference) in SCALARS.items():
        assert found[name].dtype == np.float32
        assert float(found[name]) == pytest.approx(reference(exact), rel=1e-4)


@pytest.mark.slow
def test_second_derivative_of_the_stable_rank_is_finite_where_eigenvalues_coincide():
    x = jnp.eye(4, 6)  # all eigenvalues of the Gram matrix are 1
    assert np.isfinite(quickly(jax.hessian(diagnostics.stable_rank))(x)).all()


MAPPED = {
    "correlation": diagnostics.correlation,
    "activation_size": diagnostics.activation_size,
    "cosine_similarity": diagnostics.cosine_similarity,
    "stable_rank": diagnostics.stable_rank,
    "dead_units": lambda x, **kwargs: diagnostics.dead_units(jax.nn.relu(x - 4), **kwargs),
    "gradient_norm": diagnostics.gradient_norm,
    "mutual_information": lambda x, **kwargs: diagnostics.mutual_information(x, bins=4, **kwargs),
    "skew": lambda x, **kwargs: diagnostics.unit_moments(x, **kwargs).skew.sum(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "names"), [((8, 3, 5), tuple(MAPPED)), ((8, 5), ("stable_rank",))], ids=["few examples", "few elements"]
)
def test_measure_of_mapped_parts_and_of_shards_is_that_of_the_whole(shape, names):
    x = jnp.asarray(data(shape), jnp.float32)
    mask = jnp.arange(8).reshape(8, *[1] * (len(shape) - 1)) != 5
    x = jnp.where(mask, x, jnp.nan)

    def all_of(x, mask, **kwargs):
        return {name: MAPPED[name](x, mask=mask, **kwargs) for name in names}

    whole, part = quickly(all_of)(x, mask), functools.partial(all_of, axis_name="data")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P("data")), "out_specs": P()}
    sharded = quickly(jax.shard_map(part, mesh=mesh, check_vma=False, **specs))(x, mask)
    split = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (x, mask))
    mapped = quickly(jax.vmap(part, axis_name="data"))(*split)
    for name, value in whole.items():
        np.testing.assert_allclose(sharded[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(mapped[name], np.full(4, value), rtol=1e-5, err_msg=name)


# --- weights, report, errors ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_at_any_norm_turns_scale_invariant_weights_as_the_effective_rate_does_at_norm_one():
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)

    def loss(w):
        return jnp.sum(jnp.tanh(normalize(x @ w, Normalizer("n c", "n c", eps=0.0)).y) ** 3)

    @jax.jit
    def turned(w, reference):
        norm = diagnostics.weight_norms({"w": w})["w"]
        scaled = w * (reference / norm)
        eta = diagnostics.effective_learning_rate(0.1, norm, reference)
        there, here = scaled - eta * jax.grad(loss)(scaled), w - 0.1 * jax.grad(loss)(w)
        rates = diagnostics.effective_learning_rate(jnp.array([0.1, 0.2]), jnp.array([2.0, 0.0]), 3.0, order=1)
        return norm, there / reference, here / norm, rates

    for reference in (1.0, 2.5):
        norm, there, here, rates = turned(w, reference)
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm, np.linalg.norm(w), rtol=1e-6)
    np.testing.assert_allclose(rates, [0.15, np.inf], rtol=1e-6)


def test_weight_norms_name_what_linen_and_nnx_name():
    from flax import nnx

    norms = jax.jit(diagnostics.weight_norms)
    kernel = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    zeros = np.zeros(2, np.float32)
    linen = {"layers_0": {"bias": zeros, "kernel": kernel, "step": np.ones(1, np.int32), "value": zeros}}
    assert list(norms(linen)) == ["layers_0/bias", "layers_0/kernel", "layers_0/value"]
    model = nnx.Sequential(nnx.Linear(3, 2, kernel_init=lambda *_: jnp.asarray(kernel), rngs=nnx.Rngs(0)))
    found = norms(nnx.state(model, nnx.Param))
    assert set(found) == {"layers/0/bias", "layers/0/kernel"}
    assert float(found["layers/0/kernel"]) == pytest.approx(np.linalg.norm(kernel), rel=1e-6)


@pytest.mark.slow
def test_report_holds_every_number_of_every_layer():
    x, g = jnp.asarray(data(), jnp.float32), jnp.asarray(data(seed=1), jnp.float32)
    report = quickly(functools.partial(diagnostics.report, layout={"conv": "n ... c"}, bins=4))
    found = report({"conv": x, "bare": x[:, 0, 0]}, {"conv": g})
    for name, layer in (("conv", x), ("bare", x[:, 0, 0])):
        layer = np.asarray(layer)
        for measure, reference in REFERENCES.items():
            assert float(found[name][measure.__name__]) == pytest.approx(reference(layer), rel=1e-4)
        assert float(found[name]["mean"]) == pytest.approx(np.abs(rows(layer).mean(0)).mean(), rel=1e-4)
        assert float(found[name]["std"]) == pytest.approx(rows(layer).std(0, ddof=1).mean(), rel=1e-4)
        assert 0 < float(found[name]["mutual_information"]) < math.log(4)
    assert float(found["conv"]["gradient_norm"]) == pytest.approx(np.linalg.norm(g), rel=1e-5)
    assert "gradient_norm" not in found["bare"]


# fmt: off
ERRORS = {
    "no units": (lambda: diagnostics.correlation(jnp.ones((2, 3)), "n t"), FieldError,
                 "units lie along the axis 'c', which layout \"n t\" does not name"),
    "no examples": (lambda: diagnostics.stable_rank(jnp.ones((2, 3)), "t c"), FieldError,
                    "examples lie along the axis 'n', which layout \"t c\" does not name"),
    "integers": (lambda: diagnostics.dead_units(jnp.ones((2, 3), int)), TypeError,
                 "dead_units takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)"),
    "complex": (lambda: diagnostics.correlation(jnp.ones((2, 3), complex)), TypeError,
                "correlation_matrix takes real numbers, found complex64; take the real part or the absolute value first"),
    "mask": (lambda: diagnostics.activation_size(jnp.ones((2, 3)), mask=jnp.ones(2)), FieldError,
             "a mask must broadcast against the array: found shapes (2,) and (2, 3)"),
    "mapped axis": (lambda: diagnostics.gradient_norm(jnp.ones(2), axis_name="data"), FieldError,
                    "mapped axis '@data' is not bound here; call this inside jax.vmap(..., axis_name=\"data\"), or inside "
                    'jax.shard_map or jax.pmap over a mesh axis "data"'),
}
# fmt: on


def test_error_says_what_was_found_and_what_is_accepted():
    for case in ERRORS.values():
        refuses(*case)


def test_error_of_a_report_names_the_layer():
    with pytest.raises(FieldError) as caught:
        diagnostics.report({"pool": jnp.ones(4), "conv": jnp.ones((2, 3))})
    assert caught.value.__notes__ == ["while measuring layer 'pool', shape (4,), layout \"n ... c\""]
