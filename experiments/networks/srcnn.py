"""SRCNN (Dong et al. 2014) with a normalizer before each ReLU."""

import flax.linen as nn
import jax

from experiments.networks import layers
from experiments.networks.conv import Conv
from normjax import Normalizer


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
        form = "xla" if jax.default_backend() != "cpu" else "images" if train else "strips"

        def conv(features: int, width: int) -> Conv:
            return Conv(features, (width, width), padding="VALID", form=form, kernel_init=first)

        first = nn.initializers.truncated_normal(1e-3)
        for features, width in zip(self.channels, (9, 5), strict=True):
            x = conv(features, width)(x)
            x = nn.relu(layers.norm(self.normalizer, self.affine, self.l1)(x, use_running_average=not train))
        return conv(1, 5)(x)[..., 0]
