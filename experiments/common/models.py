"""Networks of the experiments: Conv, a convolution that is fast under vmap, and CNN, a small one.

Images are [n, h, w, c], kernels (h, w, i, o). A model takes its normalizer as a field, so that one
model serves every row of an experiment.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

import normjax
from normjax.linen import Norm


class Conv(nn.Module):
    """Convolution of [n, h, w, i] with a kernel (h, w, i, o): stride 1, SAME border.

    The image's patches are gathered by shifted slices and multiplied by the kernel as one matrix.
    Experiments train several seeds under vmap, which turns `lax.conv_general_dilated` with one
    kernel a seed into a grouped convolution, and XLA runs that slowly on CPUs: on two cores this form
    is 1.9 times as fast on 8x8 images and 2.6 times on 32x32 ones (benchmarks/seeds_conv.py). The price is memory:
    the patches are h * w times the input.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      use_bias: whether to add a bias a channel.
      kernel_init: initializer of the kernel.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x, [n, h, w, i], to [n, h, w, o]."""
        (h, w), (height, width, i) = self.kernel_size, x.shape[1:]
        kernel = self.param("kernel", self.kernel_init, (h, w, i, self.features))
        padded = jnp.pad(x, ((0, 0), ((h - 1) // 2, h // 2), ((w - 1) // 2, w // 2), (0, 0)))
        patches = jnp.concatenate(
            [padded[:, r : r + height, s : s + width] for r in range(h) for s in range(w)], axis=-1
        )
        y = patches @ kernel.reshape(h * w * i, self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.reshape(1, 1, 1, -1)
        return y


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 2x2 squares of [n, h, w, c]; an odd last row or column is dropped.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
    [5.0, 7.0, 13.0, 15.0]
    """
    n, h, w, c = x.shape
    squares = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return squares.max(axis=(2, 4))  # with a reduce_window, the gradient is a slow scatter


class CNN(nn.Module):
    """[3x3 convolution, normalizer, ReLU, 2x2 max pool] for each of `channels`, then dense.

    Running statistics keep a factor of 0.9 at each step, as in Ren et al. 2017.

    Attributes:
      normalizer: what normalizes each convolution's output; Normalizer(None, None) leaves it alone.
      classes: number of outputs.
      channels: output channels of the convolutions.
      affine: whether a scale and a bias a channel follow the normalizer.
      l1: factor of the penalty on centred activations, mean |v|, of each normalizer.
    """

    normalizer: normjax.Normalizer
    classes: int = 10
    channels: tuple[int, ...] = (16, 32)
    affine: bool = True
    l1: float = 0.0

    def setup(self) -> None:
        """Builds the layers."""
        self.convs = [Conv(c) for c in self.channels]
        self.norms = [
            Norm(self.normalizer, momentum=0.9, use_scale=self.affine, use_bias=self.affine, l1=self.l1)
            for _ in self.channels
        ]
        self.dense = nn.Dense(self.classes)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [n, classes] of images x [n, h, w, c]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = max_pool(nn.relu(norm(conv(x), use_running_average=not train)))
        return self.dense(x.reshape(len(x), -1))

    def preactivation(self, x: jax.Array) -> jax.Array:
        """The first convolution's output before normalization, [n, h, w, channels[0]]."""
        return self.convs[0](x)
