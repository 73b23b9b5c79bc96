"""More rows: families of normalizers with constants and dialects of their own.

`theory.TABLE` holds one choice of each row. Here a function makes the row of a family from its numbers, and names the
dialects in which papers and published code differ. A row is a `Normalizer`, and `normalize` evaluates it; what needs a step
beside it is in `around.py`.

Half precision: statistics are float32 or wider, so float16 data overflow in no row, whatever its order. In float32 itself
squares overflow at |v| = 1e19, and the sum behind E|v| (sums come before the division by n) at n * |v| = 3e38.

For mapped axes, or other names, give a `field`: `l1_batch("@data n ...")`.
"""

import dataclasses
import math

from normjax.field import Field, FieldError, axes
from normjax.gaussian import bounds_constant, gaussian_largest, gaussian_moment
from normjax.order import top
from normjax.theory import Normalizer

BATCH = "n ..."

# Rows that batches or their like are the field of.


def l1_batch(field: Field | str = BATCH, *, eps: float = 1e-5, normalized: bool = True) -> Normalizer:
    """L1 batch norm: v / (eps + sqrt(pi / 2) * E|v|), of unit variance on Gaussian data.

    Args:
      field: A and B.
      eps: added to the spread; 0 in the second of the authors' files, where a constant channel gives NaN (here 0).
        [units of x]
      normalized: False leaves the constant out.

    Source: Hoffer et al. 2018, section 4.

    >>> from normjax import TABLE
    >>> l1_batch() == TABLE["l1_batch"]
    True
    """
    gain = math.sqrt(math.pi / 2) if normalized else 1.0
    return Normalizer(field, field, eps=eps, gain=gain, power=1.0, order=1)


def lp_batch(p: float, field: Field | str = BATCH, *, eps: float = 1e-5, calibrated: bool = False) -> Normalizer:
    """Lp batch norm: v / (eps + E[|v| ** p]) ** (1 / p).

    Args:
      p: the order, 1 or more.
      field: A and B.
      eps: added to the moment, inside of the root. [units of x ** p]
      calibrated: divides the moment by that of a standard normal, for unit variance on Gaussian data; the authors do
        so for p = 1 alone.

    Raises:
      ValueError: p is less than 1 or infinite.

    Source: Hoffer et al. 2018, section 4.

    >>> from normjax import TABLE
    >>> lp_batch(2) == TABLE["batch"]
    True
    """
    if not 1 <= p < math.inf:
        raise ValueError(f"p is at least 1 and finite; found {p!r} (for the maximum: top_batch(1, size))")
    gain = 1 / gaussian_moment(p) if calibrated else 1.0
    return Normalizer(field, field, eps=eps, gain=gain, power=1 / p, order=p)


def top_batch(
    k: int, size: int | None, field: Field | str = BATCH, *, eps: float = 1e-5, calibrated: bool = False
) -> Normalizer:
    """Top-k batch norm: v / (eps + C * mean of the k largest |v|); L-infinity batch norm for k = 1.

    Args:
      k: how many.
      size: number n of elements behind each statistic in training, examples * positions (all shards'): C(n) has to stay
        the same at inference, where the batch is another.
      field: A and B.
      eps: added to the spread. [units of x]
      calibrated: C = 1 / E[mean of the k largest of n]. The paper's C(n) gives 1.42 standard deviations for k = 1 and
        1.19 for k = 10 of n = 1024.

    Source: Hoffer et al. 2018, section 4.

    >>> top_batch(1, 1024).order, top_batch(10, 1024).order
    (inf, top(k=10))
    """
    if size is None:
        raise ValueError("top-k batch norm needs size, the number of elements behind each statistic in training")
    if not 1 <= k <= size:
        raise ValueError(f"k is within 1 and size={size}; found {k}")
    gain = 1 / gaussian_largest(size, k) if calibrated else bounds_constant(size)
    return Normalizer(field, field, eps=eps, gain=gain, power=1.0, order=math.inf if k == 1 else top(k))


def range_row(
    size: int | None, field: Field | str = BATCH, *, eps: float = 1e-5, calibrated: bool = False
) -> Normalizer:
    """The row of range batch norm, v / (eps + C * m), with m by `around.mean_range` (alone, it takes the largest |v|).

    Args:
      size: number of elements of a part in training, on which C depends.
      field: A, and what the parts' ranges are averaged over.
      eps: added to the spread. [units of x]
      calibrated: C is one over the expected range of Gaussian data; else the code's 0.35 * `bounds_constant`, half of
        that of the maximum and a factor from experiments, which gives .81 to .98 standard deviations.

    Raises:
      ValueError: `size` is missing or less than 2.

    Source: Banner et al. 2018, section 3, and the code of its authors.

    >>> round(range_row(64).gain, 4), round(range_row(64, calibrated=True).gain, 4)
    (0.1873, 0.2133)
    """
    if size is None or size < 2:
        raise ValueError(f"range batch norm needs size, the number of elements of a part in training, at least 2; "
                         f"found {size!r}")  # fmt: skip
    gain = 0.5 / gaussian_largest(size, signed=True) if calibrated else 0.35 * bounds_constant(size)
    return Normalizer(field, field, eps=eps, gain=gain, power=1.0, order=math.inf)


def ghost_batch(parts: int, *, eps: float = 1e-5) -> Normalizer:
    """Ghost batch norm: statistics of each of so many equal parts of the batch (Hoffer et al. 2017, algorithm 1).

    >>> from normjax import TABLE
    >>> ghost_batch(8) == TABLE["ghost"]
    True
    """
    return _same(f"n/{parts} ..." if parts > 1 else BATCH, eps)


def ghost_row(
    shape: tuple[int, ...], layout: str, examples: int | None, eps: float = 1e-5, *, strict: bool = True
) -> Normalizer:
    """The row "ghost" for parts of so many examples; None takes all of them, as inference does, whose batch need not divide.

    Args:
      shape: of the array.
      layout: name of each axis.
      examples: of a part.
      eps: added to the variance.
      strict: False takes all of them where they do not divide.

    Raises:
      FieldError: the layout has no examples, or their number does not divide.

    >>> from normjax import TABLE
    >>> ghost_row((64, 3), "n c", 8) == TABLE["ghost"]
    True
    """
    where = axes(layout, len(shape)).get("n")
    if examples is None or (where and shape[where[0]] == 0):
        return ghost_batch(1, eps=eps)
    if where is None or examples < 1 or shape[where[0]] % examples:
        if not strict:
            return ghost_batch(1, eps=eps)
        found = f'layout "{layout}" without n' if where is None else f"{shape[where[0]]} examples"
        raise FieldError(f"cannot split the batch into parts of {examples} examples; found {found}")
    return ghost_batch(shape[where[0]] // examples, eps=eps)


def extended_batch(*, eps: float = 1e-5) -> Normalizer:
    """Extended batch norm: the mean of each channel over the batch, one spread around these over all (Luo et al. 2020)."""
    return Normalizer(BATCH, "n ... c", eps=eps)


def local_context(window: int = 9, groups: int = 8, *, eps: float = 1e-5) -> Normalizer:
    """Local context norm: a window of space by a block of channels, truncated at the border (Ortiz et al. 2020).

    >>> from normjax import TABLE
    >>> local_context() == TABLE["local_context"]
    True
    """
    return _same(f"...:{window} c/{groups}", eps)


def local_contrast(window: int = 9, shape: str = "gaussian", *, floor: bool = True, eps: float = 0.0) -> Normalizer:
    """Local contrast norm: v / max(sigma, mean of sigma over the image), over a window of space and all channels.

    Args:
      window: width.
      shape: "gaussian" (standard deviation width / 4), or "box". At the border the weights of what exists sum to 1.
      floor: whether the spread is at least its mean.
      eps: added to the variance; the paper has none. [units of x squared]

    Source: Jarrett et al. 2009, section 2.1.
    """
    field = f"...:{window} c"
    return Normalizer(field, field, eps=eps, floor="..." if floor else None, window=shape)


def unbiased_group(groups: int, size: int, *, eps: float = 1e-5) -> Normalizer:
    """Group norm by the unbiased variance, in the code of Lubana et al. 2021; `size` as for `with_ddof`.

    With one group it is not layer norm, and with a group for each channel not instance norm, by sqrt((size - 1) / size).
    """
    return with_ddof(_same(f"... c/{groups}", eps), size)


def with_ddof(normalizer: Normalizer, size: int, ddof: int = 1) -> Normalizer:
    """The row with the gain size / (size - ddof): a variance over `size` elements becomes unbiased.

    Raises:
      ValueError: `size` is not more than `ddof`.

    >>> from normjax import TABLE
    >>> with_ddof(TABLE["instance"], 16).gain
    1.0666666666666667
    """
    if not size > ddof:
        raise ValueError(f"size is more than ddof={ddof}; found {size}")
    return dataclasses.replace(normalizer, gain=normalizer.gain * size / (size - ddof))


# Rows along the channels.


def lrn_alexnet(n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75) -> Normalizer:
    """Local response norm, x / (k + alpha * sum of n squares) ** beta (Krizhevsky et al. 2012, section 3.3); n is odd.

    >>> from normjax import TABLE
    >>> lrn_alexnet() == TABLE["response"]
    True
    """
    if n % 2 == 0:
        raise ValueError(f"the window of AlexNet's formula is centred, so n is odd; found {n}")
    return _response(n, k, alpha * n, beta)


def lrn_torch(size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Normalizer:
    """Local response norm as `torch.nn.LocalResponseNorm`: alpha times a mean of squares; an even window leans before.

    The mean counts the zeros past the edge.
    """
    return _response(size, k, alpha, beta, "before")


def lrn_tensorflow(depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5) -> Normalizer:
    """Local response norm as `tf.nn.local_response_normalization`: alpha times the sum of 2 * depth_radius + 1 squares."""
    return _response(2 * depth_radius + 1, bias, alpha * (2 * depth_radius + 1), beta)


def lrn_onnx(size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Normalizer:
    """Local response norm as ONNX's operator LRN: alpha / size times the sum of squares; an even window leans after."""
    return _response(size, bias, alpha, beta)


def _response(size: int, eps: float, gain: float, power: float, lean: str = "after") -> Normalizer:
    return Normalizer(None, f"c:{size}", eps=eps, gain=gain, power=power, border="zero", lean=lean)


def l2(features: int, field: Field | str = "c", *, eps: float = 1e-10) -> Normalizer:
    """Length one, x / sqrt(||x|| ** 2 + eps), over fields of so many elements; ScaleNorm has one learned factor behind it.

    ScaleNorm's code divides by max(||x||, 1e-5), which differs where ||x|| is near 1e-5.

    Source: Nguyen & Salazar 2019, equation 7.

    >>> from normjax import normalize
    >>> normalize(jnp.array([[3.0, 4.0]]), l2(2)).y.round(6).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    return Normalizer(None, field, eps=eps, gain=float(features))


def _same(field: Field | str, eps: float) -> Normalizer:
    return Normalizer(field, field, eps=eps)
