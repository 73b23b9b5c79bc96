"""Local response, local contrast, local context and filter response normalization.

Libraries differ in what the factor alpha of local response norm multiplies, so each convention has a function of its own.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax._expect.arrays import align_parameter, statistics_dtype
from normjax._leaves import AMOUNT, COUNT, Whole
from normjax._normalize.evaluate import Normalized, normalize
from normjax.theory import Normalizer


def lrn_alexnet(n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75) -> Normalizer:
    """Local response norm of AlexNet, x / (k + alpha * sum of squares over n channels) ** beta, n odd.

    Source: Krizhevsky et al. 2012, section 3.3.

    >>> from normjax import TABLE
    >>> lrn_alexnet() == TABLE["response"]
    True
    """
    n = COUNT("n", n)
    if n % 2 == 0:
        raise ValueError(f"the window of AlexNet's formula is centred, so n is odd; found {n}")
    return _response(n, AMOUNT("k", k), AMOUNT("alpha", alpha) * n, beta)


def lrn_torch(size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Normalizer:
    """As `torch.nn.LocalResponseNorm`: x / (k + alpha * mean of squares over `size` channels) ** beta.

    The mean counts the zeros past the edge; an even window leans before.

    Source: Krizhevsky et al. 2012, section 3.3; the convention is PyTorch's.

    >>> lrn_torch(2).lean, lrn_torch(5, alpha=5e-4, k=2.0).gain == lrn_alexnet().gain
    ('before', True)
    """
    return _response(COUNT("size", size), AMOUNT("k", k), AMOUNT("alpha", alpha), beta, "before")


def lrn_tensorflow(depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5) -> Normalizer:
    """As `tf.nn.local_response_normalization`: x / (bias + alpha * sum of 2 * depth_radius + 1 squares) ** beta.

    Source: Krizhevsky et al. 2012, section 3.3; the convention is TensorFlow's.

    >>> lrn_tensorflow(2, 2.0, 1e-4, 0.75) == lrn_alexnet()
    True
    """
    size = 2 * Whole(0)("depth_radius", depth_radius) + 1
    return _response(size, AMOUNT("bias", bias), AMOUNT("alpha", alpha) * size, beta)


def lrn_onnx(size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Normalizer:
    """As ONNX's operator LRN: x / (bias + alpha / size * sum of `size` squares) ** beta; an even window leans after.

    Source: Krizhevsky et al. 2012, section 3.3; the convention is ONNX's.

    >>> lrn_onnx(5, alpha=5e-4, bias=2.0) == lrn_alexnet()
    True
    """
    return _response(COUNT("size", size), AMOUNT("bias", bias), AMOUNT("alpha", alpha), beta)


def _response(size: int, eps: float, gain: float, beta: float, lean: str = "after") -> Normalizer:
    return Normalizer(None, f"c:{size}", eps=eps, gain=gain, power=AMOUNT("beta", beta), border="zero", lean=lean)


def local_contrast(window: int = 9, shape: str = "gaussian", *, floor: bool = True, eps: float = 1e-5) -> Normalizer:
    """Local contrast norm: v / max(sigma, mean of sigma over the image), over a window of space and all channels.

    Args:
      window: width of the window along each axis of space.
      shape: "gaussian" (standard deviation width / 4), or "box". At the border the weights of what exists sum to 1.
      floor: whether sigma is at least its mean.
      eps: added to the variance. The paper has none: `eps=0.0`. [units of x squared]

    Source: Jarrett et al. 2009, section 2.1.

    >>> from normjax import TABLE
    >>> local_contrast() == TABLE["contrast"]
    True
    """
    field = f"...:{COUNT('window', window)} c"
    return Normalizer(field, field, eps=eps, floor="..." if floor else None, window=shape)


def local_context(window: int = 9, groups: int = 8, *, eps: float = 1e-5) -> Normalizer:
    """Local context norm: windows of this width in space by one of so many groups of channels, truncated at the border.

    Args:
      window: width of the window on every axis of space.
      groups: number of blocks of channels, which divides them.
      eps: added to the variance. [units of x squared]

    Source: Ortiz et al. 2020.

    >>> from normjax import TABLE
    >>> local_context() == TABLE["local_context"]
    True
    """
    field = f"...:{COUNT('window', window)} c/{COUNT('groups', groups)}"
    return Normalizer(field, field, eps=eps)


def filter_response(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    tau: ArrayLike | None = None,
    eps: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
) -> Normalized:
    """Filter response norm, and the thresholded linear unit behind it: max(scale * x / sqrt(E[x ** 2] + |eps|) + bias, tau).

    Args:
      x: floating-point array with axes of space. [units u]
      layout: name of each axis of x.
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      tau: the threshold: a scalar, `[c]`, `[n, c]`, or of the rank of x; None goes without. [units of y]
      eps: a number or a learned scalar, of which the absolute value counts. The paper fixes 1e-6, and learns it where maps
        are a single element; Lubana et al. 2021 learn it everywhere, from 1e-5. [u ** 2]
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes max(bias, tau).

    Source: Singh & Krishnan 2020, equations 1 to 4.

    >>> (10 * filter_response(jnp.array([[[3.0], [-4.0]]]), tau=0.0, eps=0.0).y).round().tolist()
    [[[8.0], [0.0]]]
    """
    out = normalize(x, "filter", layout, scale=scale, bias=bias, mask=mask, eps=jnp.abs(jnp.asarray(eps)))
    if tau is None:
        return out
    if jnp.iscomplexobj(out.y):
        raise TypeError(f"a threshold orders real numbers, found {out.y.dtype}; tau=None goes without")
    wide = statistics_dtype(out.y.dtype)
    threshold = align_parameter(tau, out.y, layout, "tau", wide)
    return out._replace(y=jnp.maximum(out.y.astype(wide), threshold).astype(out.y.dtype))
