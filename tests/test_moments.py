"""Averages: the fast form equals the averaging matrices, for many fields, layouts, borders, shapes and masks."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import FieldError, expect
from tests import reference
from tests.rows import jit

FIELDS = (
    "n", "c", "...", "n ...", "... c", "n ... c", "c/4", "... c/2", "n/2 ...", "n/2 c/4", ".../2 c", "c:1", "c:5", "c:4",
    "...:3", "...:5 c", "...:4 c/2", "...:9 c", "n ...:3", "n:3 c", "...:64", "n/2 ...:6 c:3", "c:60",
)  # fmt: skip
LAYOUTS = (("n ... c", (4, 6, 8, 8)), ("n c ...", (4, 8, 6, 10)), ("... c n", (2, 6, 8, 4)), ("n ... c", (2, 6, 4)))


def array(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0.5, 1, shape).astype(dtype)


@pytest.mark.parametrize("border", ["truncate", "zero"])
@pytest.mark.parametrize(
    ("layout", "shape"), [LAYOUTS[3], *(pytest.param(*case, marks=pytest.mark.slow) for case in LAYOUTS[:3])], ids=str
)
def test_expect_equals_averaging_matrices(layout, shape, border):
    x, weights = array(shape), np.random.default_rng(1).uniform(size=shape)
    masks = (None, np.where(weights > 0.3, weights, 0), weights[..., :1] > 0.5)
    if (layout, shape) != LAYOUTS[0]:
        masks = masks[:2]
    for field in FIELDS:
        for window, lean in (("box", "after"), ("box", "before"), ("gaussian", "after")):
            if ":" not in field and (window, lean) != ("box", "after"):
                continue
            for mask in masks:
                got = expect(x, field, layout, border=border, window=window, lean=lean, mask=mask)
                want = reference.expect(x, field, layout, border, window, lean, mask)
                np.testing.assert_allclose(
                    np.broadcast_to(got, x.shape), want, atol=2e-6, err_msg=f"{field} {window} {lean}"
                )


@st.composite
def cases(draw):
    names = draw(st.permutations(["n", "h", "w", "c"]))[: draw(st.integers(1, 4))]
    shape = tuple(draw(st.sampled_from([1, 2, 3, 4, 6, 12])) for _ in names)
    hidden = draw(st.booleans()) and len(names) > 1
    start = draw(st.integers(0, len(names) - 1))
    stop = draw(st.integers(start + 1, len(names)))
    layout = [*names[:start], "...", *names[stop:]] if hidden else list(names)
    atoms = []
    for name in layout:
        sizes = shape[start:stop] if name == "..." else (shape[list(names).index(name)],)
        kind = draw(st.sampled_from(["skip", "whole", "window", "blocks"]))
        if kind == "whole":
            atoms.append(name)
        elif kind == "window":
            atoms.append(f"{name}:{draw(st.integers(1, 15))}")
        elif kind == "blocks":
            divisors = [k for k in range(1, 13) if all(size % k == 0 for size in sizes)]
            atoms.append(f"{name}/{draw(st.sampled_from(divisors))}")
    hypothesis.assume(atoms)
    field = " ".join(draw(st.permutations(atoms)))
    settings = [draw(st.sampled_from(two)) for two in (("truncate", "zero"), ("box", "gaussian"), ("after", "before"))]
    return field, " ".join(layout), shape, settings, draw(st.integers(0, 2**31)), draw(st.booleans())


@pytest.mark.slow
@hypothesis.given(cases())
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
def test_expect_equals_averaging_matrices_on_random_cases(case):
    check(case)


@pytest.mark.slow
@hypothesis.given(cases())
@hypothesis.settings(max_examples=300, deadline=None)
def test_expect_equals_averaging_matrices_on_many_random_cases(case):
    check(case)


def check(case):
    field, layout, shape, (border, window, lean), seed, masked = case
    x = array(shape, seed)
    mask = np.random.default_rng(seed + 1).uniform(size=shape) > 0.5 if masked else None
    got = expect(x, field, layout, border=border, window=window, lean=lean, mask=mask)
    want = reference.expect(x, field, layout, border, window, lean, mask)
    np.testing.assert_allclose(np.broadcast_to(got, shape), want, atol=3e-6)


def test_window_twice_the_axis_equals_the_whole_axis():
    x = array((3, 7, 5))
    np.testing.assert_allclose(expect(x, "...:14"), np.broadcast_to(expect(x, "..."), x.shape), rtol=1e-5)


def test_windows_accumulate_in_float32():
    box = expect(jnp.ones((1, 64, 64, 1), jnp.bfloat16), "...:33", border="zero") * 33 * 33
    assert box.dtype == jnp.float32
    assert box[0, 32, 32, 0] == 1089


def test_whole_axes_keep_length_one_and_others_their_length():
    x = array((4, 6, 8, 8))
    assert expect(x, "n ...").shape == (1, 1, 1, 8)
    assert expect(x, "...:3 c").shape == (4, 6, 8, 1)
    assert expect(x, "c/4").shape == x.shape


def test_hand_computed_window_means():
    image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    want = [[2.0, 2.5, 3.0], [3.5, 4.0, 4.5], [5.0, 5.5, 6.0]]
    np.testing.assert_allclose(expect(image, "...:3")[0, :, :, 0], want)
    zero = np.array([[8, 15, 12], [21, 36, 27], [20, 33, 24]]) / 9
    np.testing.assert_allclose(expect(image, "...:3", border="zero")[0, :, :, 0], zero, rtol=1e-6)


@pytest.mark.parametrize("field", ["c", "c/2", "c:3", "n c:3", "... c"])
def test_expect_is_self_consistent_under_jit_vmap_and_grad(field):
    x = array((4, 3, 3, 8))

    def value(x):
        return (expect(x, field) * jnp.cos(jnp.arange(8.0)).reshape(1, 1, 1, 8)).sum()

    one, two = value(x), value(2 * x)
    np.testing.assert_allclose(jit(value)(x), one, rtol=1e-5)
    np.testing.assert_allclose(jit(jax.vmap(value))(np.stack([x, 2 * x])), [one, two], rtol=1e-5)
    np.testing.assert_allclose(np.vdot(jit(jax.grad(value))(x), x), one, rtol=1e-4)  # linear: <grad, x> = value


def test_a_zero_size_array_averages_to_nothing():
    assert expect(jnp.zeros((0, 3, 4)), "n ... c").shape == (1, 1, 1)
    assert expect(jnp.zeros((2, 0, 4)), "...:3 c/2").shape == (2, 0, 4)


def test_a_mask_that_does_not_broadcast_is_refused():
    with pytest.raises(FieldError, match=r"must broadcast against the array: found shapes \(3,\) and \(2, 4\)"):
        expect(jnp.ones((2, 4)), "c", mask=jnp.ones(3))
