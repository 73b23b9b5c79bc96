"""Normalizers that need a step around `normalize`: statistics of another array, of a part of it, of another moment."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax import moments
from normjax.field import Field, FieldError, axes
from normjax.rows import BATCH, l2, range_row
from normjax.running import Running, as_stats, merge, observe, update
from normjax.theory import TABLE, Normalized, Normalizer, Stats, equation, normalize, parameter_beside, statistic_beside


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
      layout: name of each axis.
      scale: as for `normalize`.
      bias: the same.
      tau: the threshold, of the same shapes; None goes without.
      eps: a number or a learned scalar, of which the absolute value counts. The paper fixes 1e-6, and learns it where maps
        are a single element; Lubana et al. 2021 learn it everywhere, from 1e-5. [u ** 2]
      mask: as for `normalize`; a masked output is the bias, or the threshold above it.

    Raises:
      TypeError: a threshold for complex x.

    Source: Singh & Krishnan 2020, equations 1 to 4.

    >>> (10 * filter_response(jnp.array([[[3.0], [-4.0]]]), tau=0.0, eps=0.0).y).round().tolist()
    [[[8.0], [0.0]]]
    """
    out = normalize(x, "filter", layout, scale=scale, bias=bias, mask=mask, eps=jnp.abs(jnp.asarray(eps)))
    if tau is None:
        return out
    if jnp.iscomplexobj(out.y):
        raise TypeError(f"a threshold orders real numbers, found {out.y.dtype}; tau=None goes without")
    wide = moments.wide(out.y.dtype)
    threshold = parameter_beside(tau, out.y, layout, "tau", wide)
    return out._replace(y=jnp.maximum(out.y.astype(wide), threshold).astype(out.y.dtype))


def virtual_batch(
    x: ArrayLike,
    reference: ArrayLike,
    layout: str = "n ... c",
    *,
    field: Field | str = BATCH,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    reference_mask: ArrayLike | None = None,
) -> tuple[Normalized, Normalized]:
    """Virtual batch norm: each example by the statistics of a fixed reference batch with the example added to it.

    Args:
      x: examples, axes as named by `layout`; each counts as one more example of the reference batch. [units u]
      reference: the reference batch, chosen once: the input of the same layer in a pass of its own.
      layout: name of each axis of both.
      field: of the reference's statistics: the batch as a whole, without windows.
      scale: as for `normalize`, of both.
      bias: the same.
      eps: added to the variance. [u ** 2]
      mask: as for `normalize`, of x.
      reference_mask: the same, of the reference.

    Returns:
      The normalized x and the normalized reference (by batch norm), for the next layer.

    Raises:
      FieldError: the field takes parts of the batch, or windows; the arrays have other channels.

    Source: Salimans et al. 2016, section 3.5.

    >>> y, _ = virtual_batch(jnp.array([[3.0]]), jnp.array([[0.0], [0.0]]), eps=0.0)
    >>> y.stats.mean.tolist(), y.stats.var.tolist()                 # of 0, 0 and 3
    ([[1.0]], [[2.0]])
    """
    x = moments.as_floating(x, "virtual_batch")
    n = Normalizer(field, field, eps=eps)
    spans = n.fields[0].spans
    if any(span.window or (span.blocks and span.mixes_examples) for span in spans):
        raise FieldError(f'a reference batch is averaged whole and without windows; found field "{n.mean}"')
    known = normalize(reference, n, layout, scale=scale, bias=bias, mask=reference_mask)
    statistic_beside(known.stats.mean, x, "reference mean", known.stats.mean.dtype)
    where = axes(layout, x.ndim)
    alone = Field(tuple(span for span in spans if not span.mixes_examples and where.get(span.axis or "")))
    lone = equation(x, Normalizer(alone, alone), layout, mask=mask).stats
    shape = np.broadcast_shapes(*(np.shape(part) for part in (*known.stats, *lone)))
    theirs, own = (Stats(*(jnp.broadcast_to(jnp.asarray(part), shape) for part in s)) for s in (known.stats, lone))
    merged = merge(theirs, own)
    given = Stats(merged.mean, merged.var)
    return normalize(x, n, layout, stats=given, scale=scale, bias=bias, mask=mask), known


def mean_range(
    x: ArrayLike, layout: str, field: Field | str = BATCH, *, parts: int = 16, mask: ArrayLike | None = None
) -> Stats:
    """The mean over parts of the batch of max x - min x, as the `var` of statistics.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis.
      field: as for `range_row`; parts lie within one shard of a mapped axis.
      parts: number of equal parts of the examples.
      mask: as for `normalize`; a part that is masked whole does not count.

    Returns:
      Statistics without a mean; the weight is the number of examples in parts that count.

    Raises:
      FieldError: the parts do not divide the batch.
      TypeError: x holds integers or complex numbers.

    Source: Banner et al. 2018, section 3.

    >>> mean_range(jnp.array([[0.0], [4.0], [1.0], [3.0]]), "n c", parts=2).var.tolist()
    [[3.0]]
    """
    x = moments.as_floating(x, "mean_range")
    if jnp.iscomplexobj(x):
        raise TypeError(f"a range orders real numbers, found {x.dtype}")
    field = Field.parse(field)
    here = field.local() or Field(())
    if parts > 1:
        here = Field(tuple(dataclasses.replace(s, blocks=parts) if s.axis == "n" else s for s in here.spans))
    u = equation(x, Normalizer(here, None), layout, mask=mask).centered  # a range is the same around any centre
    peak = Normalizer(None, here, power=1.0, order=math.inf)
    above, below = (equation(jnp.where(s * u > 0, s * u, 0), peak, layout, mask=mask).stats for s in (1, -1))
    each = above.var + below.var
    some = jnp.broadcast_to(jnp.asarray(above.var_weight) > 0, each.shape)
    return equation(each, Normalizer(None, field, order=1), layout, mask=some).stats


def range_batch(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    size: int,
    parts: int = 16,
    field: Field | str = BATCH,
    eps: float = 1e-5,
    calibrated: bool = False,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Normalized:
    """Range batch norm: v / (eps + C * mean over parts of the batch of max v - min v).

    Args:
      x: array, axes as named by `layout`. [units u]
      layout: name of each axis.
      size: as for `range_row`.
      parts: as for `mean_range`.
      field: what is averaged.
      eps: as for `range_row`. [u]
      calibrated: the same.
      scale: as for `normalize`.
      bias: the same.
      mask: the same.

    Returns:
      As `normalize`; the var of the statistics is the mean range.

    Source: Banner et al. 2018, section 3.
    """
    row = range_row(size, field, eps=eps, calibrated=calibrated)
    stats = mean_range(x, layout, field, parts=parts, mask=mask)
    return normalize(x, row, layout, stats=stats, scale=scale, bias=bias, mask=mask)


def moving_top(
    x: ArrayLike,
    previous: ArrayLike,
    row: Normalizer,
    layout: str = "n ... c",
    *,
    beta: float = 0.75,
    mask: ArrayLike | None = None,
) -> Stats:
    """Statistics of a batch whose moment is a moving average, beta * previous + (1 - beta) * that of the batch.

    Args:
      x: array, axes as named by `layout`. [u]
      previous: the average before, which broadcasts against x; 0 at first. No gradient goes through it. [u]
      row: from `top_batch`.
      layout: name of each axis.
      beta: weight of the average before.
      mask: as for `normalize`.

    Source: Hoffer et al. 2018, their code.

    >>> moving_top(jnp.array([[-1.0], [1.0]]), 5.0, Normalizer("n", "n", order=1), beta=0.5).var.tolist()
    [[3.0]]
    """
    batch = equation(moments.as_floating(x, "moving_top"), row, layout, mask=mask).stats
    previous = lax.stop_gradient(jnp.asarray(previous, batch.var.dtype))
    return batch._replace(var=beta * previous + (1 - beta) * batch.var)


def stored_top(
    x: ArrayLike, kept: ArrayLike, row: Normalizer, layout: str, *, beta: float, mask: ArrayLike | None = None
) -> tuple[Stats, jax.Array]:
    """`moving_top` for a layer: the average before has the shape of a stored statistic, as the one that is returned beside.

    >>> row = Normalizer("n", "n", order=1)
    >>> stats, kept = stored_top(jnp.array([[-1.0], [1.0]]), jnp.array([5.0]), row, "n c", beta=0.5)
    >>> stats.var.tolist(), kept.tolist()
    ([[3.0]], [3.0])
    """
    shape, held = jnp.shape(x), Running(var=jnp.asarray(kept))
    stats = moving_top(x, as_stats(held, row, layout, shape).var, row, layout, beta=beta, mask=mask)
    return stats, update(held, observe(stats, row, layout, shape), 0.0).var


def ghost_top(
    x: ArrayLike,
    previous: ArrayLike,
    row: Normalizer,
    layout: str = "n ... c",
    *,
    beta: float = 0.75,
    published: bool = False,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Normalized, jax.Array]:
    """Top-k batch norm by a moving average of the moment, in training too.

    Args:
      x: as for `moving_top`.
      previous: the same, as it was returned.
      row: the same.
      layout: the same.
      beta: the same.
      published: the authors' code keeps C(n) times the average, so that C(n) enters anew at each step.
      scale: as for `normalize`.
      bias: the same.
      mask: the same.

    Returns:
      As `normalize`, and the average to pass on, which broadcasts against x.

    Source: Hoffer et al. 2018, their code.
    """
    stats = moving_top(x, previous, row, layout, beta=beta, mask=mask)
    out = normalize(x, row, layout, stats=stats, scale=scale, bias=bias, mask=mask)
    return out, lax.stop_gradient(row.gain * stats.var if published else stats.var)


def partial_rms(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    fraction: float = 0.0625,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-6,
    mask: ArrayLike | None = None,
) -> Normalized:
    """pRMSNorm: x divided by the root mean square of its first channels.

    Args:
      x: array, axes as named by `layout`. [units u]
      layout: name of each axis.
      fraction: of the channels, rounded up (the paper; its code rounds down).
      scale: as for `normalize`.
      bias: the same.
      eps: added to the mean square (the code adds 1e-8 to its root). [u ** 2]
      mask: as for `normalize`.

    Raises:
      ValueError: the fraction is not within 0 (excluded) and 1.

    Source: Zhang & Sennrich 2019, section 3.2.

    >>> partial_rms(jnp.array([[2.0, 6.0]]), fraction=0.5, eps=0.0).y.tolist()
    [[1.0, 3.0]]
    """
    x = moments.as_floating(x, "partial_rms")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is more than 0 and at most 1; found {fraction!r}")
    n = dataclasses.replace(TABLE["rms"], eps=eps)
    axis = axes(layout, x.ndim).get("c", (None,))[0]
    if axis is None:
        raise FieldError(f"partial_rms takes the first channels, axis 'c', which layout \"{layout}\" does not name")
    first = max(1, math.ceil(fraction * x.shape[axis] - 1e-9))
    weights = moments.weigh(mask, x.astype(moments.wide(x.dtype)))
    value = None if weights is None else weights.value
    if value is not None and value.shape[axis] != 1:
        value = lax.slice_in_dim(value, 0, first, axis=axis)
    var = equation(lax.slice_in_dim(x, 0, first, axis=axis), n, layout, mask=value).stats.var
    return normalize(x, n, layout, stats=Stats(var=var), scale=scale, bias=bias, mask=mask)


QK_KINDS = ("rms", "layer", "l2")


def qk(
    query: ArrayLike,
    key: ArrayLike,
    layout: str = "... c",
    *,
    kind: str = "rms",
    query_scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    eps: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """QK-norm: query and key, each normalized over the axis of a head, before their product.

    Args:
      query: `[..., heads, head_dim]`, or axes as named by `layout`, where c is the axis of a head.
      key: the same; it may have fewer heads.
      layout: name of each axis.
      kind: "rms"; "layer", layer norm without an addend (Dehghani et al. 2023); "l2", length 1 (Henry et al. 2020).
      query_scale: factor, `[c]` or a scalar; with "l2", `qk_scale` before training. It then takes the place of the
        division by sqrt(head_dim): an attention that divides needs sqrt(head_dim) times as much.
      key_scale: the same, of the key.
      eps: by default 1e-6, or 1e-10 for "l2".

    Returns:
      Both, in their dtypes.

    Source: Henry et al. 2020, section 3; Dehghani et al. 2023, section 2.1.

    >>> q, k = qk(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, -2.0]]), kind="l2")
    >>> round(float(jnp.vdot(q, k)), 4)
    -0.8
    """
    moments.choose("kind", kind, QK_KINDS)
    out = []
    for name, x, scale in (("query", query, query_scale), ("key", key, key_scale)):
        x = moments.as_floating(x, f"qk, for the {name},")
        where = axes(layout, x.ndim).get("c")
        if where is None:
            raise FieldError(f"qk normalizes over the axis of a head, 'c', which layout \"{layout}\" does not name")
        n = l2(x.shape[where[0]]) if kind == "l2" else Normalizer("c" if kind == "layer" else None, "c", eps=1e-6)
        n = n if eps is None else dataclasses.replace(n, eps=eps)
        out.append(normalize(x, n, layout, scale=scale).y)
    return out[0], out[1]


def qk_scale(length: int | None) -> float:
    """Where the learned factor of "l2" attention starts, log2(L ** 2 - L) for sequences of length L (97.5th percentile).

    Source: Henry et al. 2020, section 3.2.

    >>> round(qk_scale(64), 4)
    11.9773
    """
    if length is None or length < 2:
        raise ValueError(f'kind "l2" starts from the length of sequences, at least 2; found length={length}')
    return math.log2(length**2 - length)
