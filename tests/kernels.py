"""Formulas of normalized kernels in NumPy float64, and what the tests of kernels share."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from scipy import integrate

from normjax.weights import (
    centred_weight_norm,
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
