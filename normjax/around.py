"""Normalizers that need a step around `normalize`: statistics of another array, of a part of it, of another moment."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax import moments, running
from normjax.field import Field, FieldError, axes
from normjax.gaussian import bounds_constant, gaussian_largest
from normjax.rows import BATCH, ghost_batch, l2
from normjax.theory import TABLE, Normalized, Normalizer, Stats, affine, equation, normalize


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
      mask: as for `normalize`.

    Source: Singh & Krishnan 2020, equations 1 to 4.

    >>> (10 * filter_response(jnp.array([[[3.0], [-4.0]]]), tau=0.0, eps=0.0).y).round().tolist()
    [[[8.0], [0.0]]]
    """
    out = normalize(x, "filter", layout, scale=scale, bias=bias, mask=mask, eps=jnp.abs(jnp.asarray(eps)))
    if tau is None:
        return out
    wide = moments.wide(out.y.dtype)
    threshold = affine(jnp.zeros(out.y.shape, wide), layout, None, tau)
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
      field: of the reference's statistics.
      scale: as for `normalize`, of both.
      bias: the same.
      eps: added to the variance. [u ** 2]
      mask: as for `normalize`, of x.
      reference_mask: the same, of the reference.

    Returns:
      The normalized x and the normalized reference (by batch norm), for the next layer.

    Source: Salimans et al. 2016, section 3.5.

    >>> y, _ = virtual_batch(jnp.array([[3.0]]), jnp.array([[0.0], [0.0]]), eps=0.0)
    >>> y.stats.mean.tolist(), y.stats.var.tolist()                 # of 0, 0 and 3
    ([[1.0]], [[2.0]])
    """
    x = moments.as_floating(x, "virtual_batch")
    n = Normalizer(field, field, eps=eps)
    known = normalize(reference, n, layout, scale=scale, bias=bias, mask=reference_mask)
    where = axes(layout, x.ndim)
    spans = n.fields[0].spans
    alone = Field(tuple(span for span in spans if not span.mixes_examples and where.get(span.axis or "")))
    lone = equation(x, Normalizer(alone, alone), layout, mask=mask).stats
    shape = np.broadcast_shapes(*(np.shape(part) for part in (*known.stats, *lone)))
    theirs, own = (Stats(*(jnp.broadcast_to(jnp.asarray(part), shape) for part in s)) for s in (known.stats, lone))
    merged = running.merge(theirs, own)
    given = Stats(merged.mean, merged.var)
    return normalize(x, n, layout, stats=given, scale=scale, bias=bias, mask=mask), known


def range_batch(
    x: ArrayLike,
    layout: str = "n ... c",
    *,
    size: int,
    parts: int = 16,
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
      size: number of elements of a part in training, on which C depends.
      parts: number of equal parts of the batch.
      eps: added to the spread. [u]
      calibrated: C is one over the expected range of Gaussian data; else the code's 0.35 * `bounds_constant`, half of
        that of the maximum and a factor from experiments, which gives .81 to .98 standard deviations.
      scale: as for `normalize`.
      bias: the same.
      mask: the same.

    Returns:
      As `normalize`; the var of the statistics is the mean range.

    Source: Banner et al. 2018, section 3, and the code of its authors.
    """
    x = moments.as_floating(x, "range_batch")
    gain = 0.35 * bounds_constant(size)
    if calibrated:
        gain = 0.5 / gaussian_largest(size, signed=True)
    part = ghost_batch(parts).mean
    u = normalize(x, Normalizer(part, None), layout, mask=mask).centered  # a range is the same around any centre
    peak = Normalizer(None, part, power=1.0, order=math.inf)
    above, below = (equation(jnp.where(s * u > 0, s * u, 0), peak, layout, mask=mask).stats for s in (1, -1))
    some = None if mask is None else jnp.broadcast_to(jnp.asarray(above.var_weight) > 0, above.var.shape)
    spread = moments.expect(above.var + below.var, BATCH, layout, mask=some)
    n = Normalizer(BATCH, BATCH, eps=eps, gain=gain, power=1.0, order=math.inf)
    return normalize(x, n, layout, stats=Stats(var=spread), scale=scale, bias=bias, mask=mask)


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
    """Top-k batch norm by a moving average of the moment, beta * previous + (1 - beta) * that of the batch.

    Args:
      x: array, axes as named by `layout`.
      previous: the average before, as it was returned; 0 at first.
      row: from `top_batch`.
      layout: name of each axis.
      beta: weight of the average before; no gradient goes through it.
      published: the authors' code keeps C(n) times the average, so that C(n) enters anew at each step.
      scale: as for `normalize`.
      bias: the same.
      mask: the same.

    Returns:
      As `normalize`, and the average to pass on, which broadcasts against x.

    Source: Hoffer et al. 2018, their code.
    """
    x = moments.as_floating(x, "ghost_top")
    batch = equation(x, row, layout, mask=mask).stats
    var = beta * lax.stop_gradient(jnp.asarray(previous, batch.var.dtype)) + (1 - beta) * batch.var
    out = normalize(x, row, layout, stats=batch._replace(var=var), scale=scale, bias=bias, mask=mask)
    return out, lax.stop_gradient(row.gain * var if published else var)


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
    first = math.ceil(fraction * x.shape[axis] - 1e-9)
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
