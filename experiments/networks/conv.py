"""Convolutions: one layer, `Conv`, and one table of the ways to compute it, `FORMS`.

Images are [n, h, w, c], kernels (h, w, i, o). XLA's own convolution is slow on CPUs where one of a few things holds, each
of which has its form here; all forms compute the same sums, with the same variables.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer


class Conv(nn.Module):
    """Convolution of [n, h, w, i] with a kernel (h, w, i, o).

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      stride: along both.
      padding: "SAME", TensorFlow's border of zeros, or "VALID": no border, and an output that is smaller.
      form: how it is computed, a name in `FORMS`.
      use_bias: whether to add a bias a channel.
      kernel_init: initializer of the kernel.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: str = "SAME"
    form: str = "xla"
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x, [n, h, w, i], to [n, h', w', features]."""
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        form = FORMS[self.form]
        if self.padding not in form.paddings or self.stride not in form.strides:
            raise ValueError(f"form {self.form!r} has no convolution of padding {self.padding!r}, stride {self.stride}")
        y = form.convolve(x, kernel, self.stride, self.padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.reshape(1, 1, 1, -1)
        return y


def library(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """XLA's own convolution."""
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


# --- seeds side by side ---------------------------------------------------------------------------


def patches(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """The image's patches, gathered by shifted slices, times the kernel as one matrix."""
    (h, w, i, o), (height, width) = kernel.shape, x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), ((h - 1) // 2, h // 2), ((w - 1) // 2, w // 2), (0, 0)))
    slices = [padded[:, r : r + height, s : s + width] for r in range(h) for s in range(w)]
    return jnp.concatenate(slices, axis=-1) @ kernel.reshape(h * w * i, o)


# --- one seed, in a loop --------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """Convolution of [n, h, w, i] with (h, w, i, o); gradients are as fast inside of a loop as outside.

    On CPUs, XLA hands a convolution to its fast library where the axes of its operands lie in one certain order, and brings
    them into that order outside of loops only: in a `lax.scan`, JAX's own gradients of a convolution take the slow path,
    many times as slow. Here the derivative is written with axes so ordered that its transpose, the
    gradient, is in the fast order. Forward mode and second derivatives work, and are as slow as they were.

    >>> x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1))
    >>> convolve(x, kernel).ravel().tolist(), jax.grad(lambda k: convolve(x, k).sum())(kernel)[:, :, 0, 0].tolist()
    ([4.0, 4.0, 4.0, 4.0], [[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])
    """
    return library(x, kernel, stride, padding)


@convolve.defjvp
def _convolve_jvp(stride: int, padding: str, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    convolution = functools.partial(lax.conv_general_dilated, window_strides=(stride,) * 2, padding=padding)
    by_x = convolution(dx, kernel.transpose(0, 1, 3, 2), dimension_numbers=("NHWC", "HWOI", "NHWC"))
    fast = ("CHWN", "IHWO", "HWNC")
    by_kernel = convolution(x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3), dimension_numbers=fast)
    return convolve(x, kernel, stride, padding), by_x + by_kernel.transpose(2, 0, 1, 3)


def halves(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """`convolve` of both halves of a batch: on CPUs each runs on one core, side by side where there are two.

    Channels are filled with zeros up to a multiple of 4, without which the library is slow.
    """
    if fill := -x.shape[-1] % 4:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, fill)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, fill), (0, 0)))
    parts = jnp.split(x, 2) if jax.default_backend() == "cpu" and len(x) % 2 == 0 else [x]
    return jnp.concatenate([convolve(part, kernel, stride, padding) for part in parts])


# --- large kernels, no border ---------------------------------------------------------------------


def images(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """Ten images at a time, so that their patches stay in the caches; for the gradient they are gathered again."""
    return lax.map(jax.checkpoint(functools.partial(_product(kernel), kernel=kernel)), x, batch_size=10)


def strips(x: jax.Array, kernel: jax.Array, stride: int, padding: str, rows: int = 4) -> jax.Array:
    """Each image by strips of so many rows of its output, so that the patches of a strip stay in the caches."""
    more = len(kernel) - 1  # rows that a strip needs beside those of its output
    h = x.shape[1] - more
    count = -(-h // rows)
    starts = rows * np.arange(count)[:, None] + np.arange(rows + more)
    product = functools.partial(_product(kernel), kernel=kernel)

    def one(image: jax.Array) -> jax.Array:
        y = lax.map(product, jnp.pad(image, ((0, count * rows - h), (0, 0), (0, 0)))[starts])
        return y.reshape(-1, *y.shape[2:])[:h]

    return jnp.stack([one(image) for image in x])


def _product(kernel: jax.Array) -> Callable[..., jax.Array]:
    return shifted if kernel.shape[-1] < kernel.shape[-2] // 8 else gathered


def gathered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of one image, [h, w, i]: its patches, by columns and then by rows, and one matrix product."""
    k = len(kernel)
    h, w = (n - k + 1 for n in x.shape[:2])
    x = jnp.concatenate([x[:, s : s + w] for s in range(k)], axis=-1)
    x = jnp.concatenate([x[r : r + h] for r in range(k)], axis=-1)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of one image, [h, w, i], the product first: where few channels come out, fewer numbers move."""
    k, _, i, o = kernel.shape
    h, w = (n - k + 1 for n in x.shape[:2])
    y = (x @ kernel.transpose(2, 0, 1, 3).reshape(i, -1)).reshape(*x.shape[:2], k, k, o)
    y = sum(y[:, s : s + w, :, s] for s in range(k))
    return sum(y[r : r + h, :, r] for r in range(k))  # type: ignore[index, return-value]


# --- the table ------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A way to compute a convolution.

    Attributes:
      convolve: the function of x, kernel, stride and padding.
      taken: when.
      measured: what it gains, on two CPU cores.
      strides: those that it has.
      paddings: those that it has.
    """

    convolve: Callable[[jax.Array, jax.Array, int, str], jax.Array]
    taken: str
    measured: str
    strides: tuple[int, ...] = (1,)
    paddings: tuple[str, ...] = ("VALID",)


FORMS = {
    "xla": Form(library, "elsewhere than on a CPU", "nothing", (1, 2), ("SAME", "VALID")),
    "patches": Form(
        patches,
        "several seeds side by side: vmap makes a grouped convolution of XLA's, which is slow",
        "gradient of two 3x3 layers, 5 seeds: 1.9 times as fast as grouped on 8x8 images, 2.6 on 32x32 "
        "(benchmarks/seeds_conv.py); of the three 5x5 layers of `cnn.ren2017`, both directions, 243 ms a seed, where "
        "`halves`, a seed after the other, takes 119. The patches are h * w times the input",
        paddings=("SAME",),
    ),
    "halves": Form(
        halves,
        "one seed at a time in a loop",
        "by the fill, 23 to 8 ms: forward, 5x5 from 3 to 32 channels, 100 images of 32x32. A whole training step: 1.5 to "
        "1.9 times as fast as a plain Flax loop (benchmarks/loops.py, --heap stock)",
        (1, 2),
        ("SAME", "VALID"),
    ),
    "images": Form(images, "a batch of small images in a loop: SRCNN's training", "see networks/srcnn.py"),
    "strips": Form(strips, "a large image: SRCNN's scores", "see networks/srcnn.py"),
}
