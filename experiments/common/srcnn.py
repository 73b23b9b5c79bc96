"""SRCNN (Dong et al. 2014) with a normalizer before each ReLU, and a convolution that is fast on CPUs inside of loops."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from normjax import Normalizer
from normjax.linen import Norm


class Conv(nn.Module):
    """Convolution of [n, h, w, i] that sees no border, to [n, h - k + 1, w - k + 1, features].

    XLA's own convolution is slow on CPUs, most of all inside of a loop. There, patches are gathered and multiplied by
    the kernel as one matrix, a few at a time, so that they stay in the caches; for the gradient they are gathered again.

    Attributes:
      features: output channels.
      width: k, of the square kernel (k, k, i, features).
      form: "xla"; on CPUs "images" takes ten at a time, small ones, and "rows" four of an image, a large one.
    """

    features: int
    width: int
    form: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x."""
        k, i = self.width, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.truncated_normal(1e-3), (k, k, i, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        product = functools.partial(shifted if self.features < i // 8 else gathered, kernel=kernel)
        if self.form == "images":
            y = jax.lax.map(jax.checkpoint(product), x, batch_size=10)
        elif self.form == "rows":
            y = jnp.stack([by_rows(image, product, k - 1) for image in x])
        else:
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias.reshape(1, 1, 1, -1)


def by_rows(x: jax.Array, product: Callable[[jax.Array], jax.Array], more: int, rows: int = 4) -> jax.Array:
    """The convolution of one image, [h, w, i], by strips of so many rows of its output, which need so many `more`."""
    h = len(x) - more
    strips = -(-h // rows)
    x = jnp.pad(x, ((0, strips * rows - h), (0, 0), (0, 0)))
    y = jax.lax.map(product, x[rows * np.arange(strips)[:, None] + np.arange(rows + more)])
    return y.reshape(-1, *y.shape[2:])[:h]


def gathered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of one image, [h, w, i]: its patches, then one matrix product."""
    k = len(kernel)
    h, w = (n - k + 1 for n in x.shape[:2])
    x = jnp.concatenate([x[:, s : s + w] for s in range(k)], axis=-1)
    x = jnp.concatenate([x[r : r + h] for r in range(k)], axis=-1)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same, the product first: fewer numbers are moved where few channels come out."""
    k, _, i, o = kernel.shape
    h, w = (n - k + 1 for n in x.shape[:2])
    y = (x @ kernel.transpose(2, 0, 1, 3).reshape(i, -1)).reshape(*x.shape[:2], k, k, o)
    y = sum(y[:, s : s + w, :, s] for s in range(k))
    return sum(y[r : r + h, :, r] for r in range(k))  # type: ignore[index, return-value]


class SRCNN(nn.Module):
    """9-5-5 convolutions of one channel, [n, h, w] to [n, h - 16, w - 16], a normalizer before each ReLU.

    Attributes:
      normalizer: what normalizes the first two layers; Normalizer(None, None) leaves them alone.
      affine: whether a scale and a bias a channel follow the normalizer.
      l1: factor of the penalty on centred activations, mean |v|, of each normalizer.
      channels: output channels of the first two layers.
    """

    normalizer: Normalizer
    affine: bool = False
    l1: float = 0.0
    channels: tuple[int, int] = (64, 32)

    @nn.compact
    def __call__(self, low: jax.Array, train: bool) -> jax.Array:
        """Enlarged images, 8 pixels less on each side."""
        x = low[..., None]
        form = "xla" if jax.default_backend() != "cpu" else "images" if train else "rows"
        for features, width in zip(self.channels, (9, 5), strict=True):
            x = Conv(features, width, form)(x)
            norm = Norm(self.normalizer, momentum=0.9, use_scale=self.affine, use_bias=self.affine, l1=self.l1)
            x = nn.relu(norm(x, use_running_average=not train))
        return Conv(1, 5, form)(x)[..., 0]
