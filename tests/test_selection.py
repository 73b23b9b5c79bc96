"""Which parameters are meant: patterns, masks and layouts, their norms, and the mistakes."""

import jax
import numpy as np
import pytest

from normjax.selection import Kernels, norms
from tests.refusals import refuses

TREE = {
    "a": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)},
    "b": {
        "kernel": np.ones((3, 3), np.float32),
        "weight": np.ones((3, 2), np.float32),
        "c": {"kernel": np.ones((2, 3, 2), np.float32)},
    },
}
LISTED = "The parameters are a/bias (3,), a/kernel (2, 3), b/c/kernel (2, 3, 2), b/kernel (3, 3), b/weight (3, 2)"
CHOICES = [
    (Kernels(output=()), {"a/kernel", "b/kernel", "b/c/kernel"}),
    (Kernels(output="b"), {"a/kernel"}),
    (Kernels(output=("a/*", "b/c")), {"b/kernel"}),
    (Kernels("b"), {"b/kernel", "b/c/kernel", "b/weight"}),
    (Kernels("*kernel", output="a"), {"b/kernel", "b/c/kernel"}),
    (Kernels(["a", "b/weight"]), {"a/kernel", "b/weight"}),
    (Kernels({"a": {"kernel": True, "bias": False}, "b": False}), {"a/kernel"}),
    (Kernels(lambda params: jax.tree.map(lambda p: p.ndim == 3, params)), {"b/c/kernel"}),
    (Kernels(layout="o i", field="i"), {"a/kernel", "b/kernel"}),
    (Kernels("a/bias", layout="c", field="c"), {"a/bias"}),
]


@pytest.mark.parametrize(("kernels", "expected"), CHOICES, ids=[str(i) for i in range(len(CHOICES))])
def test_patterns_and_masks_choose_parameters(kernels, expected):
    assert set(kernels.select(TREE, "a test")) == expected


MISTAKES = {
    "output": (lambda: norms(TREE, Kernels(output="zzz")), f"norms: 'zzz' matches no parameter. {LISTED}"),
    "rank": (
        lambda: norms(TREE, Kernels("a/bias")),
        f"norms: 'a/bias' matches only what layout \"... i o\" does not fit. {LISTED}",
    ),
    "mask_rank": (
        lambda: norms(TREE, Kernels({"a": True, "b": False})),
        "norms: layout \"... i o\" does not fit 'a/bias', which has shape (3,)",
    ),
    "mask": (lambda: norms(TREE, Kernels({"a": 1, "b": False})), "norms: a mask is made of booleans, found int"),
    "integers": (
        lambda: norms({"kernel": np.ones((2, 2), np.int32)}),
        "norms: the norm of 'kernel' is asked for, which has dtype int32",
    ),
    "window": (lambda: Kernels(field="i:3"), 'a norm is taken over whole axes and blocks; field "i:3" has a window'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    attempt, message = MISTAKES[name]
    refuses(attempt, (ValueError, TypeError), message)


def test_norms_beyond_the_range_of_float16_are_no_trouble():
    np.testing.assert_allclose(
        norms({"kernel": np.full((30, 30), 60000, np.float16)})["kernel"], 30 * 59999.9, rtol=1e-4
    )


def test_stacked_layers_have_a_norm_each():
    w = np.random.default_rng(0).normal(size=(3, 5, 4, 2)).astype(np.float32)
    found = norms({"scanned": {"kernel": w}}, Kernels(layout="l ... i o"))["scanned/kernel"]
    np.testing.assert_allclose(found, np.sqrt((w**2).sum((1, 2, 3))), rtol=1e-6)
