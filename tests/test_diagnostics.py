"""diagnostics, similarity, information: NumPy and SciPy in float64, the published analyses at initialization."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import lax
from jax.sharding import PartitionSpec as P

from normjax import TABLE, FieldError, Normalizer, diagnostics, normalize

pytestmark = pytest.mark.slow  # together they would take the default tier past its five minutes


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

    @jax.jit
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
    matrix_and_mean = jax.jit(lambda x: (diagnostics.correlation_matrix(x), diagnostics.correlation(x)))
    c, mean = map(np.asarray, matrix_and_mean(jnp.asarray(x, jnp.float32)))
    others = [0, 1, 2, 4]
    np.testing.assert_allclose(c[np.ix_(others, others)], np.corrcoef(rows(x)[:, others], rowvar=False), atol=1e-5)
    assert not c[3].any()
    assert not c[:, 3].any()
    assert mean == pytest.approx(reference_correlation(x[..., others]), rel=1e-5)


def test_correlation_under_weights_counts_samples_as_repeated():
    x = data((4, 3))
    times = np.array([[1], [2], [3], [1]])
    repeated = np.repeat(x, times[:, 0], axis=0)
    found = jax.jit(lambda x, mask: diagnostics.correlation_matrix(x, mask=mask))(*map(jnp.float32, (x, times)))
    np.testing.assert_allclose(found, np.corrcoef(repeated, rowvar=False), atol=1e-5)


def test_normalized_measures_do_not_depend_on_the_size_of_the_numbers():
    measures = (diagnostics.correlation, diagnostics.cosine_similarity, diagnostics.stable_rank)
    found = jax.jit(lambda x: jnp.stack([jnp.stack([m(x * s) for m in measures]) for s in (1e-30, 1.0, 1e30)]))
    for scaled in (values := found(jnp.asarray(data(), jnp.float32))):
        np.testing.assert_allclose(scaled, values[1], rtol=1e-4)


def test_unit_moments_equal_scipys():
    x = data((50, 4))
    found = jax.jit(lambda x: diagnostics.unit_moments(x, "c n"))(jnp.asarray(x.T, jnp.float32))
    expected = [x.mean(0), x.std(0, ddof=1), scipy.stats.skew(x), scipy.stats.kurtosis(x, fisher=False)]
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4)
    biased = jax.jit(lambda x: diagnostics.unit_moments(x, unbiased=False))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(biased.std, x.std(0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)], ids=["few examples", "few elements"])
def test_stable_rank_is_one_of_copies_and_the_number_of_orthogonal_examples(shape):
    copies = np.outer(np.arange(1.0, shape[0] + 1), np.arange(1.0, shape[1] + 1))
    rank = jax.jit(diagnostics.stable_rank)
    assert float(rank(jnp.float32(copies))) == pytest.approx(1, rel=1e-5)
    assert float(rank(jnp.float32(np.eye(*shape) * 7))) == pytest.approx(3, rel=1e-5)  # zero examples are left out


def test_measures_of_nothing_are_nan_and_their_gradients_zero():
    nothing = jnp.zeros((3, 2))
    measures = (diagnostics.correlation, diagnostics.cosine_similarity, diagnostics.stable_rank)
    for value, slope in jax.jit(lambda x: [jax.value_and_grad(measure)(x) for measure in measures])(nothing):
        assert np.isnan(value)
        assert not np.asarray(slope).any()
    others = jax.jit(
        lambda x, mask: (
            diagnostics.dead_units(x),
            diagnostics.activation_size(x),
            diagnostics.dead_units(x, mask=mask),
        )
    )
    np.testing.assert_array_equal(others(nothing, np.zeros((3, 2), bool)), [1, 0, np.nan])


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


# --- mutual information ---------------------------------------------------------------------------


def test_joint_histogram_equals_numpys():
    a, b = data((400, 2)).T
    weight = np.random.default_rng(1).random(400).astype(np.float32)
    bounds = ((-1.0, 1.5), (-2.0, 2.0))
    kept = weight < 0.5
    constant = np.full(400, 3.0)

    @jax.jit
    def found(a, b, weight, constant):
        histogram = diagnostics.joint_histogram
        return {
            "plain": histogram(a, b, bins=7),
            "bounded": histogram(a, b, bins=5, bounds=bounds),
            "weighted": histogram(a, b, bins=6, mask=weight),
            "masked": histogram(jnp.where(kept, a, jnp.nan), b, bins=6, mask=kept),
            "constant": histogram(constant, b, bins=2),
        }

    expected = {
        "plain": np.histogram2d(a, b, 7),
        "bounded": np.histogram2d(a, b, 5, bounds),
        "weighted": np.histogram2d(a, b, 6, weights=weight),
        "masked": np.histogram2d(a[kept], b[kept], 6),
        "constant": np.histogram2d(constant, b, 2),
    }
    for name, each in found(*(jnp.asarray(v, jnp.float32) for v in (a, b, weight, constant))).items():
        for one, other in zip(each, expected[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)


def test_information_is_the_sum_of_entropies_less_the_joint_one():
    counts = np.random.default_rng(0).poisson(1.5, (3, 6, 5)).astype(np.float32)
    counts[0, 2] = 0
    found = jax.jit(diagnostics.information)(counts)
    corrected = jax.jit(functools.partial(diagnostics.information, miller_madow=True))(counts)
    for c, plain, less in zip(counts, found, corrected, strict=True):
        entropy = scipy.stats.entropy
        expected = entropy(c.sum(0)) + entropy(c.sum(1)) - entropy(c.ravel())
        assert float(plain) == pytest.approx(expected, rel=1e-4)
        excess = (c > 0).sum() - (c.sum(0) > 0).sum() - (c.sum(1) > 0).sum() + 1
        assert float(less) == pytest.approx(expected - excess / (2 * c.sum()), rel=1e-4)
    slope = jax.jit(jax.grad(diagnostics.information))(jnp.array([[3.0, 0.0], [1.0, 2.0]]))
    assert np.isfinite(slope).all()


def test_mutual_information_of_a_gaussian_pair_is_the_analytic_one_within_the_estimators_error():
    samples, bins = 20_000, 24
    normal = np.random.default_rng(0).normal(size=(2, samples))
    measure = jax.jit(
        lambda x: [diagnostics.mutual_information(x, bins=bins, miller_madow=corrected) for corrected in (False, True)]
    )
    for rho in (0.0, 0.5, 0.9):
        pair = np.stack([normal[0], rho * normal[0] + math.sqrt(1 - rho**2) * normal[1]], -1)
        plain, corrected = map(float, measure(jnp.asarray(pair, jnp.float32)))
        exact = -0.5 * math.log(1 - rho**2)
        # What bins of about a third of a standard deviation hide, and twice the spread of the mean of log p / (p p).
        hidden = 0.05 * exact
        spread = 2 * rho / math.sqrt(samples)
        bias = (bins - 1) ** 2 / (2 * samples)
        assert exact - hidden - spread <= plain <= exact + bias + spread
        assert exact - hidden - spread - bias / 4 <= corrected <= exact + spread + bias / 4
        assert corrected < plain


def test_mutual_information_matrix_holds_every_pair_and_entropies_on_the_diagonal():
    x = data((60, 2, 3))
    x[..., 1] = 4
    matrix = np.asarray(
        jax.jit(functools.partial(diagnostics.mutual_information_matrix, bins=5))(jnp.asarray(x, jnp.float32))
    )
    flat = rows(x)
    for i in range(3):
        assert matrix[i, i] == pytest.approx(scipy.stats.entropy(np.histogram(flat[:, i], 5)[0]), abs=1e-5)
        for j in range(3):
            joint = np.histogram2d(flat[:, i], flat[:, j], 5)[0]
            entropies = scipy.stats.entropy(joint.sum(0)) + scipy.stats.entropy(joint.sum(1))
            assert matrix[i, j] == pytest.approx(entropies - scipy.stats.entropy(joint.ravel()), abs=1e-5)
    mean = jax.jit(functools.partial(diagnostics.mutual_information, layout="c n t", bins=5))
    found = mean(jnp.asarray(np.moveaxis(x, -1, 0), jnp.float32))
    assert float(found) == pytest.approx(matrix[0, 2], rel=1e-5)  # the only pair without the constant


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


@pytest.mark.parametrize(
    "name", [name if name == "stable_rank" else pytest.param(name, marks=pytest.mark.slow) for name in SCALARS]
)
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
        value, first, second, scanned, mapped = jax.jit(along)(jnp.asarray(x), jnp.asarray(t))
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, reference(x), rtol=1e-10)
        np.testing.assert_allclose(first, [slope] * 3, rtol=1e-5)
        np.testing.assert_allclose(second, [bend] * 2, rtol=1e-3)
        np.testing.assert_allclose(scanned, [reference(x), reference(2 * x)], rtol=1e-10)
        np.testing.assert_allclose(mapped, scanned, rtol=1e-10)


def test_measures_of_bfloat16_are_float32_of_the_rounded_numbers():
    x = jnp.asarray(data(), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    found = jax.jit(lambda x: {name: measure(x) for name, (measure, _) in SCALARS.items()})(x)
    for name, (_, reference) in SCALARS.items():
        assert found[name].dtype == np.float32
        assert float(found[name]) == pytest.approx(reference(exact), rel=1e-4)


@pytest.mark.slow
def test_second_derivative_of_the_stable_rank_is_finite_where_eigenvalues_coincide():
    x = jnp.eye(4, 6)  # all eigenvalues of the Gram matrix are 1
    assert np.isfinite(jax.jit(jax.hessian(diagnostics.stable_rank))(x)).all()


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


def in_shards(shape, names):
    """The measures of an array, masked at example 5: of the whole, and of four parts that know of each other."""
    x = jnp.asarray(data(shape), jnp.float32)
    mask = jnp.arange(8).reshape(8, *[1] * (len(shape) - 1)) != 5
    x = jnp.where(mask, x, jnp.nan)

    def all_of(x, mask, **kwargs):
        return {name: MAPPED[name](x, mask=mask, **kwargs) for name in names}

    return x, mask, jax.jit(all_of)(x, mask), functools.partial(all_of, axis_name="data")


def test_measure_of_mapped_parts_is_that_of_the_whole():
    x, mask, whole, part = in_shards((8, 3, 5), ("correlation", "cosine_similarity", "stable_rank", "gradient_norm"))
    split = jax.tree.map(lambda a: np.asarray(a).reshape(4, 2, *a.shape[1:]), (x, mask))
    mapped = jax.jit(jax.vmap(part, axis_name="data"))(*split)
    for name, value in whole.items():
        np.testing.assert_allclose(mapped[name], np.full(4, value), rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 3, 5), (8, 5)], ids=["few examples", "few elements"])
def test_measure_of_shards_is_that_of_the_whole(shape):
    x, mask, whole, part = in_shards(shape, MAPPED)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P("data")), "out_specs": P()}
    sharded = jax.jit(jax.shard_map(part, mesh=mesh, check_vma=False, **specs))(x, mask)
    split = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (x, mask))
    mapped = jax.jit(jax.vmap(part, axis_name="data"))(*split)
    for name, value in whole.items():
        np.testing.assert_allclose(sharded[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(mapped[name], np.full(4, value), rtol=1e-5, err_msg=name)


# --- weights, report, errors ----------------------------------------------------------------------


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
    linen = {"layers_0": {"bias": np.zeros(2, np.float32), "kernel": kernel, "step": np.ones(1, np.int32)}}
    assert list(norms(linen)) == ["layers_0/bias", "layers_0/kernel"]
    model = nnx.Sequential(nnx.Linear(3, 2, kernel_init=lambda *_: jnp.asarray(kernel), rngs=nnx.Rngs(0)))
    found = norms(nnx.state(model, nnx.Param))
    assert set(found) == {"layers/0/bias", "layers/0/kernel"}
    assert float(found["layers/0/kernel"]) == pytest.approx(np.linalg.norm(kernel), rel=1e-6)


def test_report_holds_every_number_of_every_layer():
    x, g = jnp.asarray(data(), jnp.float32), jnp.asarray(data(seed=1), jnp.float32)
    report = jax.jit(functools.partial(diagnostics.report, layout={"conv": "n ... c"}, bins=4))
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
    "bins": (lambda: diagnostics.mutual_information(jnp.ones((2, 3)), bins=0), ValueError,
             "bins is an integer of at least 1; found 0"),
    "shapes": (lambda: diagnostics.joint_histogram(jnp.ones(2), jnp.ones(3)), FieldError,
               "a joint histogram takes two arrays of one shape, found shapes (2,) and (3,)"),
}
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_was_found_and_what_is_accepted(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_error_of_a_report_names_the_layer():
    with pytest.raises(FieldError) as caught:
        diagnostics.report({"pool": jnp.ones(4), "conv": jnp.ones((2, 3))})
    assert caught.value.__notes__ == ["while measuring layer 'pool', shape (4,), layout \"n ... c\""]


# --- the analyses of Lubana et al. 2021 at initialization -----------------------------------------

DEPTH, WIDTH, SIDE, BATCH, CLASSES = 20, 64, 16, 32, 100
GAIN = math.sqrt(2 * math.pi / (math.pi - 1))  # 1.7139588594, over the standard deviation of relu(N(0, 1))


def conv(h, w, stride=1):
    return lax.conv_general_dilated(h, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def weight_norm(v):
    return v / jnp.sqrt(jnp.sum(v**2, (0, 1, 2), keepdims=True))


def scaled_standardization(w):
    mean, std = jnp.mean(w, (0, 1, 2), keepdims=True), jnp.std(w, (0, 1, 2), keepdims=True)
    return GAIN / math.sqrt(math.prod(w.shape[:3])) * (w - mean) / (std + 1e-5)


def scaled_relu(z):
    return GAIN * (jax.nn.relu(z) - math.sqrt(1 / (2 * math.pi)))


def by(row):
    row = TABLE.get(row, row)
    return lambda z: jax.nn.relu(normalize(z, row).y), lambda w: w


def groups_of(size):
    field = f"... c/{WIDTH // size}"
    return by(Normalizer(field, field))


NETWORKS = {
    "plain": (jax.nn.relu, lambda w: w),
    "layer": by("layer"),
    "group of 16": groups_of(16),
    "group of 8": groups_of(8),
    "group of 4": groups_of(4),
    "group of 2": groups_of(2),
    "instance": by("instance"),
    "batch": by("batch"),
    "variance": by("variance"),
    "filter": by("filter"),
    "weight norm": (scaled_relu, weight_norm),
    "scaled weight standardization": (jax.nn.relu, scaled_standardization),
}


def kaiming(key, shape):
    return jax.random.normal(key, shape) * math.sqrt(2 / math.prod(shape[:-1]))


@functools.cache
def at_initialization(name):
    """One seed of a network: cosine similarity and stable rank of its last activations, gradient ratio of its ends."""
    activation, prepare = NETWORKS[name]

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 5)
        x = jax.random.normal(keys[0], (BATCH, SIDE, SIDE, 3))
        first = prepare(kaiming(keys[1], (3, 3, 3, WIDTH)))
        others = jax.vmap(lambda key: prepare(kaiming(key, (3, 3, WIDTH, WIDTH))))(jax.random.split(keys[2], DEPTH - 1))
        head = jax.random.normal(keys[3], (WIDTH, CLASSES)) / math.sqrt(WIDTH)
        labels = jax.nn.one_hot(jax.random.randint(keys[4], (BATCH,), 0, CLASSES), CLASSES)

        def loss(at_first, at_last):
            h = activation(conv(x, first) + at_first)
            h = lax.scan(lambda h, w: (activation(conv(h, w)), None), h, others[:-1])[0]
            h = activation(conv(h, others[-1]) + at_last)
            logits = h.mean((1, 2)) @ head
            return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), -1)), h

        zeros = jnp.zeros((BATCH, SIDE, SIDE, WIDTH))
        (at_first, at_last), h = jax.grad(loss, (0, 1), has_aux=True)(zeros, zeros)
        ratio = diagnostics.gradient_norm(at_first) / diagnostics.gradient_norm(at_last)
        return jnp.stack([diagnostics.cosine_similarity(h), diagnostics.stable_rank(h), ratio])

    return np.asarray(run(jax.random.key(0)))


# Cosine similarity and stable rank of layer 20, gradient norm of layer 1 over that of layer 20.
# fmt: off
PUBLISHED = {
    "plain":                         (0.891, 1.1, 0.8),
    "layer":                         (0.894, 1.1, 1.4),
    "group of 16":                   (0.850, 1.2, 1.7),
    "group of 8":                    (0.750, 1.3, 2.8),
    "group of 4":                    (0.648, 1.5, 5.0),
    "group of 2":                    (0.490, 2.0, 9.6),
    "instance":                      (0.381, 2.5, 20.5),
    "batch":                         (0.381, 2.5, 19.8),
    "variance":                      (0.714, 1.4, 5.1),
    "filter":                        (0.537, 1.8, 6.5),
    "weight norm":                   (0.119, 6.8, 27),
    "scaled weight standardization": (0.349, 2.7, 26),
}
# fmt: on


def assert_published(name, found):
    """Within what one seed is from the median of a few: weights alone move the gradients' ratio by a third."""
    cosine, rank, ratio = PUBLISHED[name]
    assert found[0] == pytest.approx(cosine, abs=0.06)
    assert found[1] == pytest.approx(rank, rel=0.15)
    assert abs(math.log(found[2] / ratio)) < math.log(1.45)


@pytest.mark.parametrize(
    "name", [name if name == "batch" else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_analyses_at_initialization_are_the_published_ones(name):
    assert_published(name, at_initialization(name))


@pytest.mark.slow
def test_smaller_groups_keep_examples_apart_and_make_early_gradients_large():
    order = ["layer", "group of 16", "group of 8", "group of 4", "group of 2", "instance"]
    cosine, rank, ratio = np.array([at_initialization(name) for name in order]).T
    assert (np.diff(cosine) < 0).all()
    assert (np.diff(rank) > 0).all()
    assert (np.diff(ratio) > 0).all()


RESIDUAL = {"plain": (14, 184), "batch": (2.18, 3.69), "instance": (2.18, 3.69), "layer": (1.12, 1.62),
            "filter": (1.70, 2.86), "scaled weight standardization": (35, 735)}  # fmt: skip


def residual_sizes(name, blocks=9, width=32, side=16, batch=16):
    """Activation sizes in the first stage of a residual network: each block is conv, norm, relu, conv, norm, add, relu."""
    row = TABLE.get(name)
    prepare = NETWORKS[name][1]

    def layer(h, w):
        z = conv(h, prepare(w))
        return z if row is None else normalize(z, row).y

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (batch, side, side, 3))

        def block(h, key):
            one, two = (kaiming(key, (3, 3, width, width)) for key in jax.random.split(key))
            h = jax.nn.relu(h + layer(jax.nn.relu(layer(h, one)), two))
            return h, diagnostics.activation_size(h)

        h = jax.nn.relu(layer(x, kaiming(keys[1], (3, 3, 3, width))))
        return lax.scan(block, h, jax.random.split(keys[2], blocks))[1]

    return np.median([run(jax.random.key(seed)) for seed in range(3)], axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIDUAL)
def test_activations_of_a_residual_network_grow_as_published(name):
    """Exponentially without normalization of activations, linearly with it."""
    sizes = residual_sizes(name)
    found = np.log(sizes[[4, 8]] / RESIDUAL[name])
    # Where neither weights nor activations are normalized, single seeds differ by factors of three; their growth does not.
    found = np.diff(found) / 4 if name == "plain" else found
    np.testing.assert_allclose(found, 0, atol=0.25)
