"""The networks of Ren et al. 2017 for CIFAR: a CNN of three 5x5 convolutions, and a ResNet-32.

Images are [n, h, w, c]. A model takes one normalizer for each of its resolutions, since the paper's windows shrink
with the maps. Both run one seed at a time (`loop.train(side_by_side=False)`): under vmap the convolutions would
become grouped ones, which are slow on CPUs, and `models.Conv`, which avoids that, moves 25 times its input for a 5x5
kernel.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer

from normjax import Normalizer
from normjax.linen import Norm


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution of [n, h, w, i] with (h, w, i, o), SAME border; gradients are as fast inside of a loop as outside.

    On CPUs, XLA hands a convolution to its fast library where the axes of its operands lie in one certain order, and brings
    them into that order outside of loops only: in a `lax.scan`, JAX's own gradients of a convolution take the slow path,
    many times as slow. Here the derivative is written with axes so ordered that its transpose, the
    gradient, is in the fast order. Forward mode and second derivatives work, and are as slow as they were.

    >>> x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1))
    >>> convolve(x, kernel).ravel().tolist(), jax.grad(lambda k: convolve(x, k).sum())(kernel)[:, :, 0, 0].tolist()
    ([4.0, 4.0, 4.0, 4.0], [[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])
    """
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@convolve.defjvp
def _convolve_jvp(stride: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    convolution = functools.partial(lax.conv_general_dilated, window_strides=(stride,) * 2, padding="SAME")
    by_x = convolution(dx, kernel.transpose(0, 1, 3, 2), dimension_numbers=("NHWC", "HWOI", "NHWC"))
    by_kernel = convolution(
        x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3), dimension_numbers=("CHWN", "IHWO", "HWNC")
    )  # fmt: skip
    return convolve(x, kernel, stride), by_x + by_kernel.transpose(2, 0, 1, 3)


class Conv(nn.Module):
    """Convolution of [n, h, w, i] with a kernel (h, w, i, o), SAME border as in TensorFlow.

    Channels are filled with zeros up to a multiple of 4: on CPUs, XLA's convolution of three channels takes three times
    as long as one of four (forward, 5x5 to 32 channels, 100 images of 32x32: 23 against 8 ms on two cores). There, each of
    these convolutions runs on one core, so a batch goes in two halves, which run side by side where there are two.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      stride: along both.
      use_bias: whether to add a bias a channel.
      kernel_init: initializer of the kernel.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: int = 1
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x, [n, h, w, i], to [n, ceil(h / stride), ceil(w / stride), o]."""
        i = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, i, self.features))
        if fill := -i % 4:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, fill)))
            kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, fill), (0, 0)))
        halves = jnp.split(x, 2) if jax.default_backend() == "cpu" and len(x) % 2 == 0 else [x]
        y = jnp.concatenate([convolve(half, kernel, self.stride) for half in halves])
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.reshape(1, 1, 1, -1)
        return y


def _pooled(x: jax.Array, axis: int, merge: Callable, fill: float) -> jax.Array:
    """Merges elements 2 i, 2 i + 1 and 2 i + 2 along an axis of even size; past the end lies `fill`."""
    if x.shape[axis] % 2:
        raise ValueError(f"pooling takes maps of even size; found {x.shape}")
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    first, second = (lax.index_in_dim(pairs, k, axis + 1, keepdims=False) for k in (0, 1))
    ends = [(0, int(k == axis), 0) for k in range(x.ndim)]
    third = lax.pad(lax.slice_in_dim(first, 1, None, axis=axis), jnp.asarray(fill, x.dtype), ends)
    return merge(merge(first, second), third)


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over windows of 3x3 at stride 2, SAME border, of [n, h, w, c] with even h and w.

    The gradient goes to the first maximum of each window, row by row, as in TensorFlow. Ten times as fast as the
    gradient of `lax.reduce_window`, which is a scatter.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
    [10.0, 11.0, 14.0, 15.0]
    """

    def larger(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(a >= b, a, b)  # jnp.maximum would halve the gradient between equals

    return _pooled(_pooled(x, 2, larger, -jnp.inf), 1, larger, -jnp.inf)


def avg_pool(x: jax.Array) -> jax.Array:
    """Mean over windows of 3x3 at stride 2, SAME border, of [n, h, w, c] with even h and w.

    What lies past the border is not counted.

    >>> avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
    [5.0, 6.5, 11.0, 12.5]
    """
    total = _pooled(_pooled(x, 2, jnp.add, 0.0), 1, jnp.add, 0.0)
    rows, columns = (np.where(np.arange(size) == size - 1, 2, 3) for size in total.shape[1:3])
    return total * jnp.asarray(1 / np.outer(rows, columns)[None, :, :, None], x.dtype)


class CNN(nn.Module):
    """[5x5 convolution, normalizer, ReLU, 3x3 pool of stride 2] three times, then two dense layers, both linear.

    The first pool takes the maximum, the others the mean. Dropout, if any, is on the inputs of both dense layers.

    Attributes:
      normalizers: one for each convolution's output; Normalizer(None, None) leaves it alone.
      classes: number of outputs.
      channels: of the convolutions.
      hidden: outputs of the first dense layer.
      affine: whether a scale and a bias a channel follow the normalizers.
      learn_sigma: whether each normalizer learns its sigma.
      l1: factor of the penalty on centred activations, mean |v|, of each normalizer.
      dropout: probability of a zero.

    Source: Ren et al. 2017, the CIFAR experiments. Weights start as a normal distribution cut at two standard deviations
    and not rescaled.
    """

    normalizers: tuple[Normalizer, ...]
    classes: int = 10
    channels: tuple[int, ...] = (32, 32, 64)
    hidden: int = 64
    affine: bool = True
    learn_sigma: bool = False
    l1: float = 0.0
    dropout: float = 0.0

    def setup(self) -> None:
        """Builds the layers."""
        stds = (1e-4, 1e-2, 1e-2)
        self.convs = [
            Conv(c, (5, 5), kernel_init=nn.initializers.truncated_normal(std))
            for c, std in zip(self.channels, stds, strict=True)
        ]
        self.norms = [_norm(self, normalizer) for normalizer in self.normalizers]
        self.dense = [
            nn.Dense(size, kernel_init=nn.initializers.truncated_normal(0.1)) for size in (self.hidden, self.classes)
        ]
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [n, classes] of images x [n, h, w, c], h and w multiples of 8."""
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), use_running_average=not train)
            # ReLU and maximum commute: after the pool it has a quarter of the work, and no zeros tie in the windows.
            x = nn.relu(max_pool(x)) if k == 0 else avg_pool(nn.relu(x))
        x = x.reshape(len(x), -1)
        for dense in self.dense:
            x = dense(self.drop(x, deterministic=not train))
        return x

    def preactivation(self, x: jax.Array) -> jax.Array:
        """The first convolution's output before normalization, [n, h, w, channels[0]]."""
        return self.convs[0](x)


class ResNet(nn.Module):
    """Residual network of 2 * 3 * units + 2 layers, with normalizer and ReLU before each convolution.

    The first convolution's normalizer and ReLU come before the first unit's branches part. Shortcuts have no weights:
    they take the mean over 2x2 squares and fill new channels with zeros, half before and half after.

    Attributes:
      normalizers: of the first convolution's output, and of each of the three stages.
      classes: number of outputs.
      widths: channels of the first convolution and of each stage.
      units: in each stage, of two convolutions each.
      affine: see `CNN`.
      learn_sigma: see `CNN`.
      l1: see `CNN`.

    Source: He et al. 2016, Identity mappings in deep residual networks; widths and windows of Ren et al. 2017.
    """

    normalizers: tuple[Normalizer, ...]
    classes: int = 10
    widths: tuple[int, ...] = (16, 16, 32, 64)
    units: int = 5
    affine: bool = True
    learn_sigma: bool = False
    l1: float = 0.0

    def setup(self) -> None:
        """Builds the layers."""
        first, *stages = zip(self.normalizers, self.widths, strict=True)
        self.first = _resnet_conv(first[1])
        self.first_norm = _norm(self, first[0])
        norms, convs = [], []
        for k, (normalizer, width) in enumerate(stages):
            for unit in range(self.units):
                norms += [_norm(self, normalizer) for _ in range(1 if k == unit == 0 else 2)]
                convs += [_resnet_conv(width, 2 if k and unit == 0 else 1), _resnet_conv(width)]
        self.norms, self.convs = norms, convs
        self.last_norm = _norm(self, self.normalizers[-1])
        self.dense = nn.Dense(self.classes)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [n, classes] of images x [n, h, w, c], h and w multiples of 4."""

        def active(norm: nn.Module, z: jax.Array) -> jax.Array:
            return nn.relu(norm(z, use_running_average=not train))  # pyright: ignore[reportCallIssue]

        x = active(self.first_norm, self.first(x))
        norms = iter(self.norms)
        for number, (before, after) in enumerate(zip(self.convs[::2], self.convs[1::2], strict=True)):
            branch = before(active(next(norms), x) if number else x)
            x = _shortcut(x, branch.shape[-1]) + after(active(next(norms), branch))
        return self.dense(active(self.last_norm, x).mean(axis=(1, 2)))

    def preactivation(self, x: jax.Array) -> jax.Array:
        """The first convolution's output before normalization, [n, h, w, widths[0]]."""
        return self.first(x)


def _norm(model: CNN | ResNet, normalizer: Normalizer) -> Norm:
    """A normalizer as the paper has it: running statistics keep a factor of 0.9 at each step."""
    affine, learned = model.affine, model.learn_sigma
    return Norm(normalizer, momentum=0.9, use_scale=affine, use_bias=affine, learn_sigma=learned, l1=model.l1)


def _resnet_conv(width: int, stride: int = 1) -> Conv:
    std = (2 / (3 * 3 * width)) ** 0.5
    return Conv(width, stride=stride, use_bias=False, kernel_init=nn.initializers.normal(std))


def _shortcut(x: jax.Array, width: int) -> jax.Array:
    """The input as it is, or at half the size with more channels."""
    n, h, w, c = x.shape
    if c == width:
        return x
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), ((width - c) // 2, width - c - (width - c) // 2)))
