"""Small convolutional networks for classification: `CNN`, and `ren2017`, which sets it up as published for CIFAR.

Images are [n, h, w, c].
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from experiments.networks import layers
from experiments.networks.conv import Conv
from normjax import Normalizer

Stage = Callable[[jax.Array], jax.Array]


def relu_max(x: jax.Array) -> jax.Array:
    """ReLU, then the maximum over 2x2 squares."""
    return layers.max_pool(nn.relu(x))


def max_relu(x: jax.Array) -> jax.Array:
    """The maximum over 3x3 at stride 2, then ReLU: they commute, and so ReLU has less to do and no zeros tie."""
    return nn.relu(layers.overlapping_max(x))


def relu_mean(x: jax.Array) -> jax.Array:
    """ReLU, then the mean over 3x3 at stride 2."""
    return layers.overlapping_mean(nn.relu(x))


class CNN(nn.Module):
    """[convolution, normalizer, ReLU, pool] a few times, then one or two dense layers, both linear.

    Attributes:
      normalizers: one for each convolution's output; Normalizer(None, None) leaves it alone.
      classes: number of outputs.
      channels: output channels of the convolutions.
      affine: whether a scale and a bias a channel follow the normalizers.
      learn_sigma: whether each normalizer learns its sigma.
      l1: factor of the penalty on centred activations, mean |v|, of each normalizer.
      width: of the square kernels.
      form: of the convolutions, see `conv.FORMS`.
      stages: what follows each normalizer.
      hidden: outputs of a dense layer before the last one; None for no such layer.
      stds: of the first weights of each convolution and of the dense layers, normal, cut at two standard deviations
        and not rescaled; empty for LeCun's.
      dropout: probability of a zero among the inputs of the dense layers.
    """

    normalizers: tuple[Normalizer, ...]
    classes: int = 10
    channels: tuple[int, ...] = (16, 32)
    affine: bool = True
    learn_sigma: bool = False
    l1: float = 0.0
    width: int = 3
    form: str = "patches"
    stages: tuple[Stage, ...] = (relu_max, relu_max)
    hidden: int | None = None
    stds: tuple[float, ...] = ()
    dropout: float = 0.0

    def setup(self) -> None:
        """Builds the layers."""

        def first(layer: int) -> Initializer:
            return nn.initializers.truncated_normal(self.stds[layer]) if self.stds else nn.initializers.lecun_normal()

        size = (self.width, self.width)
        self.convs = [Conv(c, size, form=self.form, kernel_init=first(k)) for k, c in enumerate(self.channels)]
        self.norms = [layers.norm(n, self.affine, self.l1, self.learn_sigma) for n in self.normalizers]
        self.drop = nn.Dropout(self.dropout)
        last = nn.Dense(self.classes, kernel_init=first(-1))
        # A lone layer is called dense, of two each has its number: so they stand in checkpoints.
        self.dense = last if self.hidden is None else [nn.Dense(self.hidden, kernel_init=first(-1)), last]

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [n, classes] of images x [n, h, w, c], whose sides every pool has to halve."""
        for conv, norm, stage in zip(self.convs, self.norms, self.stages, strict=True):
            x = stage(norm(conv(x), use_running_average=not train))
        x = x.reshape(len(x), -1)
        dense: Any = self.dense
        for layer in [dense] if self.hidden is None else dense:
            x = layer(self.drop(x, deterministic=not train))
        return x

    def preactivation(self, x: jax.Array) -> jax.Array:
        """The first convolution's output before normalization, [n, h, w, channels[0]]."""
        return self.convs[0](x)


def ren2017(
    normalizers: tuple[Normalizer, ...],
    *,
    channels: tuple[int, ...] = (32, 32, 64),
    hidden: int = 64,
    **more: Any,
) -> CNN:
    """The CNN of Ren et al. 2017 for CIFAR: three 5x5 convolutions, the first pool a maximum, the others means.

    It runs one seed at a time, see `conv.FORMS`. The paper's windows shrink with the maps, hence a normalizer for each.

    Args:
      normalizers: one for each convolution.
      channels: of the convolutions.
      hidden: outputs of the first dense layer.
      **more: other attributes of `CNN`.
    """
    stages, stds = (max_relu, relu_mean, relu_mean), (1e-4, 1e-2, 1e-2, 0.1)
    return CNN(normalizers, channels=channels, hidden=hidden, width=5, form="halves", stages=stages, stds=stds, **more)
