"""One weight that weight norm or spectral norm makes, with Flax's axes, and PyTorch's arithmetic on it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from normjax.interop._layer import Array


@dataclass(frozen=True, eq=False)
class WeightRecord:
    """One weight as a function of what is learned, with Flax's axes.

    Attributes:
      kind: "weight", scale * kernel / norm of the kernel, or "spectral", kernel / sigma.
      kernel: the free kernel, `[... i o]`, or `[... o i]` of a ConvTranspose. [u]
      scale: the norm of each feature, `[o]` or a scalar, for "weight". [u]
      u: left singular vector as it is stored, `[o]`, for "spectral".
      sigma: the singular value that the stored vectors give, with which the weight is what PyTorch evaluates with. [u]
      v: right singular vector in PyTorch's order, None where it is not stored.
      feature_axes: the axis of the kernel that the scale, or u, lies along; None for one norm of all.
      bias: the layer's own, None where it has none.
      name: PyTorch's name of the weight.
      spelling: PyTorch's: "parametrizations" or "hooks".

    Source: Salimans & Kingma 2016, equation 2; Miyato et al. 2018, algorithm 1.

    >>> WeightRecord("weight", np.array([[3.0], [4.0]]), scale=np.array([10.0])).weight().ravel().tolist()
    [6.0, 8.0]
    """

    kind: str
    kernel: Array
    scale: Array = None
    u: Array = None
    sigma: Array = None
    v: Array = None
    feature_axes: int | None = -1
    bias: Array = None
    name: str = "weight"
    spelling: str = "parametrizations"

    def weight(self) -> np.ndarray:
        """The weight that enters the product, of the kernel's shape, as PyTorch has it in evaluation; zeros stay zeros.

        Source: Salimans & Kingma 2016, equation 2; Miyato et al. 2018, algorithm 1.
        """
        wide = np.asarray(self.kernel, np.float64)  # whose squares neither overflow nor underflow
        if self.kind == "spectral":
            norm, scale = np.asarray(self.sigma, np.float64), 1.0
        else:
            others, shape = axes_apart(wide.ndim, self.feature_axes)
            norm = np.sqrt(np.sum(np.square(wide), others, keepdims=True))
            scale = np.reshape(self.scale, [-1 if axis in shape else 1 for axis in range(wide.ndim)])
        return (wide / np.where(norm == 0, 1, norm) * scale).astype(self.kernel.dtype)


def keepdims(shape: tuple[int, ...], feature: int, axes: Iterable[int]) -> tuple[int, ...]:
    """The shape that PyTorch gives to a scale along a feature axis of Flax's."""
    kept = [1] * len(shape)
    kept[list(axes)[feature]] = shape[feature]
    return tuple(kept)


def rows(kernel: np.ndarray, feature: int | None) -> np.ndarray:
    """The kernel as PyTorch's matrix `[features, all others]`."""
    assert feature is not None
    theirs = np.transpose(kernel, (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2)))
    dim = {-1: 0, -2: 1}.get(feature, feature + kernel.ndim + 2)
    return np.moveaxis(theirs, dim, 0).reshape(theirs.shape[dim], -1)


def sigma(kernel: np.ndarray, feature: int | None, record: WeightRecord) -> np.ndarray:
    """The singular value that the stored vectors give, as PyTorch computes it in evaluation."""
    return np.reshape(record.u, -1) @ (rows(kernel, feature) @ np.reshape(record.v, -1))


def axes_apart(ndim: int, feature: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that a norm is taken over, and those that it is not."""
    kept = () if feature is None else (feature % ndim,)
    return tuple(axis for axis in range(ndim) if axis not in kept), kept
