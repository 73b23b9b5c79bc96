"""The ResNet-32 of Ren et al. 2017 for CIFAR. It runs one seed at a time, see `conv.FORMS`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks import layers
from experiments.networks.conv import Conv
from normjax import Normalizer


class ResNet(nn.Module):
    """Residual network of 2 * 3 * units + 2 layers, with normalizer and ReLU before each convolution.

    The first convolution's normalizer and ReLU come before the first unit's branches part. Shortcuts have no weights:
    they take the mean over 2x2 squares and fill new channels with zeros, half before and half after.

    Attributes:
      normalizers: of the first convolution's output, and of each of the three stages.
      classes: number of outputs.
      widths: channels of the first convolution and of each stage.
      units: in each stage, of two convolutions each.
      affine: whether a scale and a bias a channel follow the normalizers.
      learn_sigma: whether each normalizer learns its sigma.
      l1: factor of the penalty on centred activations, mean |v|, of each normalizer.

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

        def norm(normalizer: Normalizer) -> nn.Module:
            return layers.norm(normalizer, self.affine, self.l1, self.learn_sigma)

        first, *stages = zip(self.normalizers, self.widths, strict=True)
        self.first = _conv(first[1])
        self.first_norm = norm(first[0])
        norms, convs = [], []
        for k, (normalizer, width) in enumerate(stages):
            for unit in range(self.units):
                norms += [norm(normalizer) for _ in range(1 if k == unit == 0 else 2)]
                convs += [_conv(width, 2 if k and unit == 0 else 1), _conv(width)]
        self.norms, self.convs = norms, convs
        self.last_norm = norm(self.normalizers[-1])
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


def _conv(width: int, stride: int = 1) -> Conv:
    std = (2 / (3 * 3 * width)) ** 0.5
    return Conv(width, stride=stride, form="halves", use_bias=False, kernel_init=nn.initializers.normal(std))


def _shortcut(x: jax.Array, width: int) -> jax.Array:
    """The input as it is, or at half the size with more channels."""
    n, h, w, c = x.shape
    if c == width:
        return x
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), ((width - c) // 2, width - c - (width - c) // 2)))
