"""Temporary memory of forward and gradient together, as the compiler states it: exact, so a test and no timing.

N is the size of x. What is bounded is what stands between x and the results; plain differentiation keeps 1 to 6 N.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from normjax import TABLE, Normalizer, normalize

IMAGES, TOKENS = (32, 32, 32, 128), (16, 256, 768)
POOLED = {k: Normalizer(f"...:{k} c", f"...:{k} c", eps=1.0) for k in (5, 31)}
CASES = {
    "token": (TABLE["token"], TOKENS, 0.02),
    "token, two axes": (TABLE["token"], (4096, 1024), 0.02),
    "layer": (TABLE["layer"], IMAGES, 0.02),
    "rms": (TABLE["rms"], TOKENS, 0.02),
    "group": (TABLE["group"], IMAGES, 0.02),
    "instance": (TABLE["instance"], IMAGES, 0.02),
    "batch": (TABLE["batch"], IMAGES, 0.02),
    "ghost": (TABLE["ghost"], IMAGES, 0.02),
    "divisive 5 x 5": (POOLED[5], IMAGES, 0.15),
    "divisive 31 x 31": (POOLED[31], IMAGES, 0.15),
    "divisive 5 x 5, 64 channels": (POOLED[5], (128, 32, 32, 64), 0.15),
    **{f"divisive, each channel, {k}": (Normalizer(f"...:{k}", f"...:{k}", eps=1.0), IMAGES, 3.01) for k in (3, 7)},
}


def both_ways(normalizer, x, g, scale, bias):
    y, back = jax.vjp(lambda *args: normalize(args[0], normalizer, scale=args[1], bias=args[2]).y, x, scale, bias)
    return y, back(g)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradient_keep_little_beside_x(name):
    normalizer, shape, bound = CASES[name]
    x, p = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    analysis = jax.jit(functools.partial(both_ways, normalizer)).lower(x, x, p, p).compile().memory_analysis()
    assert analysis is not None, "XLA tells no sizes on this platform"
    temporary = analysis.temp_size_in_bytes / (4 * x.size)
    assert temporary <= bound, f"{temporary:.3f} N"
