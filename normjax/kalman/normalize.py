"""Kalman normalization of one array: with a prior and the batch, or with what is believed of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import align_parameter, require_float, require_real, statistics_dtype
from normjax._leaves import AMOUNT, one_of
from normjax._normalize.evaluate import equation, normalize
from normjax.kalman._blocks import believed_output, blocks_of, pooled_prior
from normjax.kalman.mixing import mix_beliefs, require_gain
from normjax.propagate import Belief, Filtered
from normjax.running import unbiased as with_unbiased_variance
from normjax.theory import Normalizer, Stats, row

STORED = ("filtered", "batch", "first_block")  # what `statistics_to_store` can give


class Kalman(NamedTuple):
    """What `kalman_normalize` returns.

    Attributes:
      y: the normalized array, in the dtype of x.
      filtered: what is believed of x and of y.
      stats: the batch's own statistics, each broadcasting against x, with their weights; in `normalize_by_belief` those that
        normalized, without weights.
      centered: v = x - mean, float32 or wider, 0 where masked; the L1 penalty is on it.

    >>> out = kalman_normalize(jnp.array([[0.0], [2.0]]))
    >>> out.filtered.input.mean.item(), out.stats.mean.item(), out.centered.ravel().tolist()
    (1.0, 1.0, [-1.0, 1.0])
    """

    y: jax.Array
    filtered: Filtered
    stats: Stats
    centered: jax.Array


def require_kalman_row(normalizer: Normalizer | str) -> None:
    """Raises ValueError for a row that has no mean and variance of one field, which is what is believed of a layer.

    >>> require_kalman_row(Normalizer("n", None))
    Traceback (most recent call last):
    ...
    ValueError: Kalman normalization needs a mean and a variance: A = B, order 2, gain 1, power 1/2, without windows, floor \
or keep_mean; found Normalizer('n', None)
    """
    n = row(normalizer)
    windows = any(span.window for field in n.fields for span in field.spans)
    numbers = (n.order, n.gain, n.power, n.floor, n.keep_mean)
    if n.mean is None or n.mean != n.var or numbers != (2, 1, 0.5, None, False) or windows:
        raise ValueError(
            "Kalman normalization needs a mean and a variance: A = B, order 2, gain 1, power 1/2, without "
            f"windows, floor or keep_mean; found {n}"
        )


def normalize_by_belief(
    x: ArrayLike,
    belief: Belief,
    normalizer: Normalizer | str = "batch",
    layout: str = "n ... c",
    *,
    stats: Stats | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Kalman:
    """Normalizes x with what is believed of it, such as stored statistics: inference, where no batch is looked at.

    Args:
      x: array of a real floating dtype, axes as named by `layout`. [units u]
      belief: mean and variance of x, of its rank: one number for each channel or for all, and for each block of examples.
      normalizer: a row with A = B, order 2: "batch", blocks of it `Normalizer("n/64 ...", "n/64 ...")`, "group", "layer".
      layout: name of each axis.
      stats: means and variances that normalize in place of the belief, as batch renormalization limits them, each
        broadcasting against x; the belief of y follows from both.
      scale: factor of y: a scalar, `[c]`, `[n, c]`, or of the rank of x, constant over space.
      bias: added to scale * y, in the shapes of `scale`.
      mask: boolean mask or weights that broadcast against x; at weight zero the output is the bias.

    Source: Wang et al. 2018.

    >>> out = normalize_by_belief(jnp.array([[3.0]]), Belief(jnp.array([[1.0]]), jnp.array([[4.0]])), scale=2.0, bias=1.0)
    >>> out.y.round(2).item(), out.filtered.output.mean.item(), out.filtered.output.var.round(2).item()
    (3.0, 1.0, 4.0)
    """
    x, n = require_real(x, "normalize_by_belief"), row(normalizer)
    require_kalman_row(n)
    blocks = blocks_of(n, layout, x.shape)
    belief = Belief(*(jnp.asarray(s).astype(statistics_dtype(x.dtype)) for s in belief))
    used = Stats(*(blocks.for_each_example(s) for s in belief)) if stats is None else stats
    out = equation(x, n, layout, stats=used, scale=scale, bias=bias, mask=mask)
    by = None if stats is None else Belief(*(blocks.for_each_block(s) for s in (stats.mean, stats.var)))
    output = believed_output(belief, by, n, layout, x.shape, scale, bias)
    return Kalman(out.y, Filtered(belief, output), used, out.centered)


def kalman_normalize(
    x: ArrayLike,
    prior: Belief | None = None,
    normalizer: Normalizer | str = "batch",
    layout: str = "n ... c",
    *,
    gain: ArrayLike = 0.1,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    guard: float | None = None,
    unbiased: bool = False,
    refuse: bool = True,
) -> Kalman:
    """Normalizes x with the mixture of a prior and its own statistics.

    Args:
      x: array of a real floating dtype, axes as named by `layout`. [units u]
      prior: the prediction, from `normjax.propagate.predict` or `join`; None for the first layer, which is plain
        normalization. One for each channel or example is pooled over those that share statistics.
      normalizer: a row with A = B, order 2: "batch", blocks of it `Normalizer("n/64 ...", "n/64 ...")`, "group", "layer".
      layout: name of each axis.
      gain: q, the weight of the batch, a scalar or one number a channel, `[c]`.
      scale: factor of y: a scalar, `[c]`, `[n, c]`, or of the rank of x, constant over space.
      bias: added to scale * y, in the shapes of `scale`.
      mask: boolean mask or weights that broadcast against x; where 0, x counts in no statistic and the output is the bias;
        where no element is valid, the prior stands.
      guard: where the mean (over channels and blocks of this shard) of prior variance / batch variance is not below this
        number, the batch's statistics alone are used; the published code has 100.
      unbiased: whether, without a prior, the variance that is believed is w / (w - 1) times that which normalizes, for w
        elements: so in the published code, whose first layer is a fused operation.
      refuse: whether, without a prior, a field over a single element is an error, as it is for `normjax.normalize`.

    Source: Wang et al. 2018; `guard` and `unbiased` from its published code.

    >>> x = jnp.array([[0.0], [2.0]])
    >>> out = kalman_normalize(x, Belief(jnp.zeros((1, 1)), jnp.ones((1, 1))), gain=0.5)
    >>> out.filtered.input.mean, out.filtered.input.var                      # var: 1 + 0 + 0.25
    (Array([[0.5]], dtype=float32), Array([[1.25]], dtype=float32))
    """
    n = row(normalizer)
    require_kalman_row(n)
    require_gain(gain)
    x = require_float(x, "kalman_normalize")
    if jnp.iscomplexobj(x):
        raise TypeError(f"kalman_normalize takes real arrays, found {x.dtype}")
    blocks = blocks_of(n, layout, x.shape)
    if prior is None:
        evaluate = normalize if refuse else equation
        y, v, stats = evaluate(x, n, layout, scale=scale, bias=bias, mask=mask)
        shown = with_unbiased_variance(stats) if unbiased else stats
        belief = Belief(blocks.for_each_block(shown.mean), blocks.for_each_block(shown.var))
        return Kalman(y, Filtered(belief, believed_output(belief, None, n, layout, x.shape, scale, bias)), stats, v)
    stats = equation(x, n, layout, mask=mask).stats
    before = pooled_prior(prior, n, layout, x, blocks)
    batch = Belief(blocks.for_each_block(stats.mean), blocks.for_each_block(stats.var))
    weighted = blocks.for_each_block(stats.var_weight) > 0
    belief = mix_beliefs(before, batch, align_parameter(gain, x, layout, "gain", before.mean.dtype))
    if guard is not None:
        # Is the mean of before / now below the guard? A batch variance of 0 is as far as can be.
        now = batch.var
        ratio = jnp.where(weighted, jnp.where(now > 0, before.var / jnp.where(now > 0, now, 1), jnp.inf), 0)
        count = jnp.sum(jnp.broadcast_to(weighted, ratio.shape).astype(ratio.dtype))
        near = lax.stop_gradient(jnp.sum(ratio) < AMOUNT("guard", guard) * count)
        belief = Belief(*(jnp.where(near, mixed, plain) for mixed, plain in zip(belief, batch, strict=True)))
    belief = Belief(*(jnp.where(weighted, mixed, stays) for mixed, stays in zip(belief, before, strict=True)))
    out = normalize_by_belief(x, belief, n, layout, scale=scale, bias=bias, mask=mask)
    return out._replace(stats=stats)


def statistics_to_store(
    out: Kalman, normalizer: Normalizer | str = "batch", layout: str = "n ... c", stored: str = "filtered"
) -> Stats:
    """What a training batch gives to the running statistics of a layer: input of `normjax.running.observe`.

    Args:
      out: what `kalman_normalize` returned.
      normalizer: the row that it was given.
      layout: name of each axis.
      stored: "filtered", the statistics that normalized, so that inference does what training did; "batch", the batch's
        own; "first_block", the first block's that normalized it, as the published code: 2 of its 128 images.

    Source: Wang et al. 2018; "first_block" from its published code.

    >>> out = kalman_normalize(jnp.array([[0.0], [2.0]]), Belief(jnp.zeros((1, 1)), jnp.ones((1, 1))), gain=0.5)
    >>> statistics_to_store(out).mean.item(), statistics_to_store(out, stored="batch").mean.item()
    (0.5, 1.0)
    """
    one_of("stored", stored, STORED)
    if stored == "batch":
        return out.stats
    blocks = blocks_of(row(normalizer), layout, out.y.shape)
    axis = blocks.axis
    mean, var = (blocks.for_each_example(s) for s in out.filtered.input)
    found = Stats(mean, var, out.stats.mean_weight, out.stats.var_weight)
    if stored == "filtered" or axis is None:
        return found

    arrays = map(jnp.asarray, found)
    return Stats(*(jnp.broadcast_to(lax.slice_in_dim(s, 0, 1, axis=axis), s.shape) for s in arrays))
