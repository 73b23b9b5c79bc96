"""Batch norm and its relatives: rows whose fields mix the examples of a batch, and norms by a reference batch.

`theory.TABLE` holds one choice of each row; here a function makes the row of a family from its numbers, with the variants
in which papers and published code differ. Batch norms by a range or by the largest values are in `batch_extremes.py`.

Half precision: statistics are float32 or wider, so float16 data overflow in no row, whatever its order. In float32 itself
squares overflow at |v| = 1e19, and the sum behind E|v| (sums come before the division by n) at n * |v| = 3e38.

For mapped axes, or other names, give a `field`: `l1_batch("@data n ...")`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from normjax._expect.arrays import align_statistic, require_float
from normjax._expect.binding import axes
from normjax._expect.sizes import divides, is_known
from normjax._leaves import COUNT, split_eps
from normjax._normalize.evaluate import Normalized, equation, normalize
from normjax.field import Field, FieldError
from normjax.gaussian import gaussian_moment
from normjax.running import merge
from normjax.theory import Normalizer, Stats

BATCH = "n ..."


def l1_batch(field: Field | str = BATCH, *, eps: float = 1e-5, normalized: bool = True) -> Normalizer:
    """L1 batch norm: v / (eps + sqrt(pi / 2) * E|v|), of unit variance on Gaussian data.

    Args:
      field: both fields, A and B.
      eps: added to E|v|; 0 in the second of the authors' files, where a constant channel gives NaN (here 0). [units of x]
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
      field: both fields, A and B.
      eps: added to the moment, inside of the root. [units of x ** p]
      calibrated: divides the moment by that of a standard normal; the authors do so for p = 1 alone.

    Source: Hoffer et al. 2018, section 4.

    >>> from normjax import TABLE
    >>> lp_batch(2) == TABLE["batch"]
    True
    """
    if not 1 <= p < math.inf:
        raise ValueError(f"p is at least 1 and finite; found {p!r} (for the maximum: top_batch(1, size))")
    gain = 1 / gaussian_moment(p) if calibrated else 1.0
    return Normalizer(field, field, eps=eps, gain=gain, power=1 / p, order=p)


def ghost_batch(parts: int, *, eps: float = 1e-5) -> Normalizer:
    """Ghost batch norm: statistics of each of so many equal parts of the batch, which divide it; 1 is batch norm.

    Args:
      parts: number of equal parts, which divides the batch.
      eps: added to the variance. [units of x squared]

    Source: Hoffer et al. 2017, algorithm 1.

    >>> from normjax import TABLE
    >>> ghost_batch(8) == TABLE["ghost"]
    True
    """
    parts = COUNT("parts", parts)
    field = f"n/{parts} ..." if parts > 1 else BATCH
    return Normalizer(field, field, eps=eps)


def ghost_row(
    shape: tuple[int, ...], layout: str, examples: int | None, eps: float = 1e-5, *, strict: bool = True
) -> Normalizer:
    """The row "ghost" for parts of so many examples; None takes all of them, as inference does, whose batch need not divide.

    Args:
      shape: shape of the array to normalize, axes as named by `layout`.
      layout: name of each axis of the array.
      examples: number of examples of a part.
      eps: added to the variance. [units of x squared]
      strict: False takes all of them where they do not divide.

    Source: Hoffer et al. 2017, algorithm 1.

    >>> from normjax import TABLE
    >>> ghost_row((64, 3), "n c", 8) == TABLE["ghost"]
    True
    """
    where = axes(layout, len(shape)).get("n")
    examples = None if examples is None else COUNT("examples", examples)
    if examples is None or (where and shape[where[0]] == 0):
        return ghost_batch(1, eps=eps)
    if where is None or not divides(examples, shape[where[0]]):
        if not strict:
            return ghost_batch(1, eps=eps)
        found = f'layout "{layout}" without n' if where is None else f"{shape[where[0]]} examples"
        error = FieldError(f"cannot split the batch into parts of {examples} examples; found {found}")
        error.add_note("`examples` divides the number of examples of every training batch")
        raise error
    parts = shape[where[0]] // examples
    if not is_known(parts):
        raise FieldError(
            f"the batch of {shape[where[0]]} examples has {parts} parts of {examples}, and a field cannot split an axis "
            "into a number of blocks that is a symbol: give the batch a size, or take all examples (None)"
        )
    return ghost_batch(parts, eps=eps)


def extended_batch(*, eps: float = 1e-5) -> Normalizer:
    """Extended batch norm: the mean of each channel over the batch, one variance around these over all channels.

    Args:
      eps: added to the variance. [units of x squared]

    Source: Luo et al. 2020.

    >>> extended_batch()
    Normalizer('n ...', 'n ... c')
    """
    return Normalizer(BATCH, "n ... c", eps=eps)


def virtual_batch(
    x: ArrayLike,
    reference: ArrayLike,
    layout: str = "n ... c",
    *,
    field: Field | str = BATCH,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    reference_mask: ArrayLike | None = None,
) -> tuple[Normalized, Normalized]:
    """Virtual batch norm: each example by the statistics of a fixed reference batch with the example added to it.

    Returns the normalized x, and the reference normalized by batch norm, for the next layer.

    Args:
      x: examples, axes as named by `layout`; each counts as one more example of the reference batch. [units u]
      reference: the reference batch, chosen once: the input of the same layer in a pass of its own.
      layout: name of each axis of both.
      field: field of the reference's statistics: the batch as a whole, without windows.
      scale: factor of both results: a scalar, `[c]`, or broadcasting against both.
      bias: addend of both results: a scalar, `[c]`, or broadcasting against both.
      eps: added to the variance. [u ** 2]
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.
      reference_mask: boolean mask or weights that broadcast against the reference; 0 leaves an element out.

    Source: Salimans et al. 2016, section 3.5.

    >>> y, _ = virtual_batch(jnp.array([[3.0]]), jnp.array([[0.0], [0.0]]), eps=0.0)
    >>> y.stats.mean.tolist(), y.stats.var.tolist()                 # of 0, 0 and 3
    ([[1.0]], [[2.0]])
    """
    x = require_float(x, "virtual_batch")
    number, eps = split_eps(eps)
    n = Normalizer(field, field, eps=number)
    spans = n.fields[0].spans
    if any(span.window or (span.blocks and span.mixes_examples) for span in spans):
        raise FieldError(f'a reference batch is averaged whole and without windows; found field "{n.mean}"')
    known = normalize(reference, n, layout, scale=scale, bias=bias, mask=reference_mask, eps=eps)
    align_statistic(known.stats.mean, x, "reference mean", known.stats.mean.dtype)
    where = axes(layout, x.ndim)
    alone = Field(tuple(span for span in spans if not span.mixes_examples and where.get(span.axis or "")))
    lone = equation(x, Normalizer(alone, alone), layout, mask=mask).stats
    shape = jnp.broadcast_shapes(*(np.shape(part) for part in (*known.stats, *lone)))
    theirs, own = (Stats(*(jnp.broadcast_to(jnp.asarray(part), shape) for part in s)) for s in (known.stats, lone))
    merged = merge(theirs, own)
    stats = Stats(merged.mean, merged.var)
    return normalize(x, n, layout, stats=stats, scale=scale, bias=bias, mask=mask, eps=eps), known
