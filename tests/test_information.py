"""information: joint histograms and mutual information against NumPy, SciPy and the Gaussian's own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from normjax import FieldError
from normjax.diagnostics import information, joint_histogram, mutual_information, mutual_information_matrix
from tests.kernels import quickly
from tests.refusals import refuses
from tests.test_diagnostics import data, rows


def test_joint_histogram_equals_numpys():
    a, b = data((400, 2)).T
    weight = np.random.default_rng(1).random(400).astype(np.float32)
    bounds = ((-1.0, 1.5), (-2.0, 2.0))
    kept = weight < 0.5
    constant = np.full(400, 3.0)

    @quickly
    def found(a, b, weight, constant):
        histogram = joint_histogram
        return {
            "plain": histogram(a, b, bins=7),
            "bounded": histogram(a, b, bins=5, bounds=bounds),
            "weighted": histogram(a, b, bins=6, mask=weight),
            "masked": histogram(jnp.where(kept, a, jnp.nan), b, bins=6, mask=kept),
            "constant": histogram(constant, b, bins=2),
            "infinite": histogram(jnp.where(kept, a, jnp.inf), b, bins=6),
        }

    expected: dict = {
        "plain": np.histogram2d(a, b, 7),
        "bounded": np.histogram2d(a, b, 5, bounds),
        "weighted": np.histogram2d(a, b, 6, weights=weight),
        "masked": np.histogram2d(a[kept], b[kept], 6),
        "constant": np.histogram2d(constant, b, 2),
        "infinite": (
            np.histogram2d(a[kept], b[kept], (6, np.histogram_bin_edges(b, 6)))[0],
            np.histogram_bin_edges(a[kept], 6),
            np.histogram_bin_edges(b, 6),
        ),
    }
    for name, each in found(*(jnp.asarray(v, jnp.float32) for v in (a, b, weight, constant))).items():
        for one, other in zip(each, expected[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_information_is_the_sum_of_entropies_less_the_joint_one():
    counts = np.random.default_rng(0).poisson(1.5, (3, 6, 5)).astype(np.float32)
    counts[0, 2] = 0
    found = quickly(information)(counts)
    corrected = quickly(functools.partial(information, miller_madow=True))(counts)
    for c, plain, less in zip(counts, found, corrected, strict=True):
        entropy = scipy.stats.entropy
        expected = entropy(c.sum(0)) + entropy(c.sum(1)) - entropy(c.ravel())
        assert float(plain) == pytest.approx(expected, rel=1e-4)
        excess = (c > 0).sum() - (c.sum(0) > 0).sum() - (c.sum(1) > 0).sum() + 1
        assert float(less) == pytest.approx(expected - excess / (2 * c.sum()), rel=1e-4)
    slope = quickly(jax.grad(information))(jnp.array([[3.0, 0.0], [1.0, 2.0]]))
    assert np.isfinite(slope).all()


@pytest.mark.slow
def test_mutual_information_of_a_gaussian_pair_is_the_analytic_one_within_the_estimators_error():
    samples, bins = 20_000, 24
    normal = np.random.default_rng(0).normal(size=(2, samples))
    measure = quickly(
        lambda x: [mutual_information(x, bins=bins, miller_madow=corrected) for corrected in (False, True)]
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


@pytest.mark.slow
def test_mutual_information_matrix_holds_every_pair_and_entropies_on_the_diagonal():
    x = data((60, 2, 3))
    x[..., 1] = 4
    matrix = np.asarray(quickly(functools.partial(mutual_information_matrix, bins=5))(jnp.asarray(x, jnp.float32)))
    flat = rows(x)
    for i in range(3):
        assert matrix[i, i] == pytest.approx(scipy.stats.entropy(np.histogram(flat[:, i], 5)[0]), abs=1e-5)
        for j in range(3):
            joint = np.histogram2d(flat[:, i], flat[:, j], 5)[0]
            entropies = scipy.stats.entropy(joint.sum(0)) + scipy.stats.entropy(joint.sum(1))
            assert matrix[i, j] == pytest.approx(entropies - scipy.stats.entropy(joint.ravel()), abs=1e-5)
    mean = quickly(functools.partial(mutual_information, layout="c n t", bins=5))
    found = mean(jnp.asarray(np.moveaxis(x, -1, 0), jnp.float32))
    assert float(found) == pytest.approx(matrix[0, 2], rel=1e-5)  # the only pair without the constant


# fmt: off
ERRORS = [
    (lambda: mutual_information(jnp.ones((2, 3)), bins=0), ValueError, "bins is an integer of at least 1; found 0"),
    (lambda: joint_histogram(jnp.ones(2), jnp.ones(3)), FieldError,
     "a joint histogram takes two arrays of one shape, found shapes (2,) and (3,)"),
    (lambda: joint_histogram(jnp.ones(2), jnp.ones(2), bounds=((0, 1), (2, 2))), ValueError,
     "bounds are a pair (least, largest) for each of the two units; found ((0, 1), (2, 2))"),
]
# fmt: on


def test_error_says_what_was_found_and_what_is_accepted():
    for case in ERRORS:
        refuses(*case)
