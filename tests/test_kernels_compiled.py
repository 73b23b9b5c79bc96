"""The fused kernels by the compilers of TPUs and GPUs, which need neither: they compile, and move what they have to.

Skipped without the compilers; a pass is the bytes of x. Alone, forward and as trained: a norm reads x and writes y, then
reads x and the cotangent and writes the gradient.
"""

import jax
import jax.numpy as jnp
import pytest

from normjax import kernels

chips = pytest.importorskip("benchmarks.chips", exc_type=ImportError)
HERE = {chip for chip in chips.CHIPS if not chips.missing(chip)}
if not HERE:
    pytest.skip(chips.missing("v5e"), allow_module_level=True)
chips.alone()

ROWS, IMAGES = (32768, 1024), (64, 56, 56, 256)  # the images lie beyond the fast memory of a TPU v5e in float32
KERNELS = {  # the shape, the axes, and the options of the kernel
    "layer": (ROWS, (1,), {}),
    "rms": (ROWS, (1,), {"centre": False}),
    "layer gelu": (ROWS, (1,), {"activation": "gelu"}),
    "layer exact_gelu": (ROWS, (1,), {"activation": "exact_gelu"}),
    "rms silu": (ROWS, (1,), {"centre": False, "activation": "silu"}),
    "group": (IMAGES, (1, 2), {"groups": 32}),
    "instance": (IMAGES, (1, 2), {"groups": 256}),
    "group relu": (IMAGES, (1, 2), {"groups": 32, "activation": "relu"}),
}
QUICK = {("layer", "v5e"), ("group", "v5e"), ("layer gelu", "h200"), ("group relu", "h200")}


def each(names):
    found = []
    for chip in chips.CHIPS:
        skip = pytest.mark.skipif(chip not in HERE, reason=chips.missing(chip))
        for name in names:
            slow = () if (name, chip) in QUICK else (pytest.mark.slow,)
            found.append(pytest.param(name, chip, marks=(skip, *slow)))
    return found


def beside(shape):
    one = (*(1 for _ in shape[1:]), shape[-1])
    return jax.ShapeDtypeStruct(one, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "chip"), each(KERNELS))
def test_a_norm_moves_two_passes_forward_and_five_as_trained(name, chip, dtype):
    shape, axes, options = KERNELS[name]
    x, row = jax.ShapeDtypeStruct(shape, dtype), beside(shape)

    def f(x, scale, bias):
        return kernels.normalize(x, axes, 1e-5, scale, bias, **options)[0]

    with kernels.using("pallas"):
        forward = chips.passes(f, x, row, row, chip=chip)
        trained = chips.passes(chips.train(f), x, x, row, row, chip=chip)
    assert forward.passes <= 2.05
    assert trained.passes <= 5.3
    assert trained.temporary <= 0.05


@pytest.mark.parametrize(("name", "chip"), each([name for name in KERNELS if "groups" not in KERNELS[name][2]]))
def test_a_residual_add_with_its_norm_moves_four_passes_forward_and_four_backward(name, chip):
    shape, axes, options = KERNELS[name]
    x, row = jax.ShapeDtypeStruct(shape, jnp.bfloat16), beside(shape)

    def f(x, r, scale, bias):
        return kernels.add_and_normalize(x, r, axes, 1e-5, scale, bias, **options)[:2]

    def backward(total, g, gsum, scale, bias):  # of what the forward pass keeps
        _, pull = jax.vjp(lambda *kept: f(kept[0], None, *kept[1:]), total, scale, bias)
        return pull((g, gsum))

    with kernels.using("pallas"):
        assert chips.passes(f, x, x, row, row, chip=chip).passes <= 4.05
        assert chips.passes(backward, x, x, x, row, row, chip=chip).passes <= 4.3
