"""Gains of activations: closed forms, adaptive quadrature and the published constants."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from normjax.gain import RELU_GAIN, activation_gain
from normjax.weights import scaled_weight_standardization
from tests.kernels import SILU_GAIN, draw, each


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


def test_a_constant_has_no_gain():
    with pytest.raises(ValueError, match="no gain makes that 1"):
        activation_gain(jnp.zeros_like)
