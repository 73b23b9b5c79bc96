"""The tables that drive the tests: every row of TABLE with a layout and a shape that it fits, and a few more."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from normjax import TABLE, Normalizer, normalize

# Small programs: what counts is how soon they compile, and one program compiles sooner than its operations one by one.
FAST: Any = {"xla_backend_optimization_level": 0}
jit: Any = functools.partial(jax.jit, compiler_options=FAST)
compiled = jit(normalize, static_argnums=(1, 2))  # without jit: tests/test_golden.py

EXTRA = {
    "order_3": Normalizer("... c", "... c", order=3, power=1 / 3),
    "max_batch": Normalizer("n ...", "n ...", order=float("inf"), power=1.0),
    "zero_border": Normalizer("...:5 c", "...:7 c", eps=1.0, gain=49 / 25, border="zero"),
    "even_before": Normalizer("c:4", "c:6", lean="before"),
    "gaussian_channels": Normalizer("c:5", "c:7", window="gaussian", border="zero"),
    "extended": Normalizer("n ...", "c"),
    "box_contrast": Normalizer("...:3 c", "...:3 c", floor="... c"),
    "keep_mean_token": Normalizer("c", "c", keep_mean=True),
}
ROWS = {**TABLE, **EXTRA}
CHANNELS = {"group": 64}
DIFFERENTIABLE = [name for name in ROWS if name not in ("max_batch",)]


def example(name, seed=0, dtype: type = np.float32):
    """An input that the row fits: 8 examples of 6 x 5 positions."""
    shape = (8, 6, 5, CHANNELS.get(name, 16))
    return (np.random.default_rng(seed).normal(0.3, 1.5, shape)).astype(dtype)


def slow_but(names, *quick):
    """The names as parameters of a test, slow but for the quick ones, each of which takes a path of its own."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def with_eps(normalizer, eps):
    return dataclasses.replace(normalizer, eps=eps)
