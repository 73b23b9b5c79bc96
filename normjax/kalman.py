"""Kalman normalization: statistics that travel through the layers (Wang et al. 2018).

A small batch tells little about the mean and variance of a layer; the layer before it and the kernel between them tell
more. A `Belief` is a mean and a variance, laid beside an array as `Stats` are. Each layer mixes the prediction (prior) with
what its batch shows (m, v), by a gain q between 0 and 1, and normalizes with the result:

    predict     mean_p, var_p of the next layer, from the state, the activation and the kernel: `predict`
    update      mean = mean_p + q (m - mean_p)
                var  = var_p + q (v - var_p) + q (1 - q) (m - mean_p) ** 2
    normalize   y = scale * (x - mean) / sqrt(var + eps) + bias

The update gives the mean and variance of a mixture, 1 - q parts prior and q parts batch. The gain is a number (0.1 for
micro-batches, 0.95 for large ones) or learned. The first layer has no prior: `None` is plain normalization.

"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax import running
from normjax._expect.arrays import align_parameter, require_float, statistics_dtype
from normjax._expect.binding import axes, bind
from normjax._expect.expectation import expect
from normjax._expect.sharding import local_blocks
from normjax._leaves import inverse_power, one_of
from normjax._normalize.evaluate import affine, equation, normalize
from normjax.field import EXAMPLES, Field, FieldError
from normjax.propagate import Belief, Filtered, linear
from normjax.running import Running
from normjax.theory import Normalizer, Stats, row

STORED = ("filtered", "batch", "first_block")
# Where a learned transition starts: the identity, and a noise of 0.01 before its softplus.
FIRST_TRANSITION = {"a": 1.0, "u": 0.0, "r": float(np.log(np.expm1(0.01)))}


class Kalman(NamedTuple):
    """What `kalman_normalize` returns: y in the dtype of x, the beliefs, and the batch's own statistics beside x."""

    y: jax.Array
    filtered: Filtered
    stats: Stats


def update(prior: Belief, batch: Belief, gain: ArrayLike) -> Belief:
    """The mixture of 1 - gain parts prior and gain parts batch: mean and variance.

    Args:
      prior: the prediction.
      batch: the batch's mean and (biased) variance, of shapes that broadcast against the prior's.
      gain: q, between 0 and 1.

    Returns:
      The belief after the batch, in the dtype of the prior.

    Source: Wang et al. 2018, the update step; the published code with p = 1 - q.

    >>> update(Belief(jnp.array(0.0), jnp.array(1.0)), Belief(jnp.array(2.0), jnp.array(3.0)), 0.5)
    Belief(mean=Array(1., dtype=float32), var=Array(3., dtype=float32))
    """
    q = jnp.asarray(gain).astype(prior.mean.dtype)
    apart = batch.mean - prior.mean
    mean = prior.mean + q * apart
    return Belief(mean, prior.var + q * (batch.var - prior.var) + q * (1 - q) * lax.square(apart))


def logit(gain: float) -> float:
    """The number whose sigmoid is the gain: where a learned gain starts.

    Raises:
      ValueError: the gain is not strictly between 0 and 1.

    >>> round(logit(0.1), 4)
    -2.1972
    """
    if not 0 < gain < 1:
        raise ValueError(f"a learned gain starts strictly between 0 and 1; found {gain!r}")
    return float(np.log(gain) - np.log1p(-gain))


def check(normalizer: Normalizer, gain: ArrayLike = 0.1, source: str = "filtered") -> None:
    """Raises ValueError where Kalman normalization has no meaning.

    >>> check(Normalizer("n", None))
    Traceback (most recent call last):
    ...
    ValueError: Kalman normalization needs a mean and a variance: A = B, order 2, gain 1, power 1/2, without windows, floor \
or keep_mean; found Normalizer('n', None)
    """
    n = normalizer
    windows = any(span.window for field in n.fields for span in field.spans)
    numbers = (n.order, n.gain, n.power, n.floor, n.keep_mean)
    if n.mean is None or n.mean != n.var or numbers != (2, 1, 0.5, None, False) or windows:
        raise ValueError("Kalman normalization needs a mean and a variance: A = B, order 2, gain 1, power 1/2, without "
                         f"windows, floor or keep_mean; found {n}")  # fmt: skip
    if isinstance(gain, int | float | np.number) and not 0 <= gain <= 1:
        raise ValueError(f"gain lies between 0 and 1; found {gain!r}")
    one_of("stored", source, STORED)


class _Blocks(NamedTuple):
    """Statistics of blocks of examples, once for each example (long) and once for each block (short)."""

    axis: int | None
    length: int
    rows: int

    def short(self, s: Any) -> jax.Array:
        s = jnp.asarray(s)
        if self.axis is None or s.shape[self.axis] != self.length or self.rows == self.length:
            return s
        return lax.slice_in_dim(s, 0, None, self.length // self.rows, self.axis)

    def long(self, s: jax.Array) -> jax.Array:
        if self.axis is None or s.shape[self.axis] in (1, self.length):
            return s
        return jnp.repeat(s, self.length // self.rows, self.axis, total_repeat_length=self.length)


def _blocks(n: Normalizer, layout: str, shape: tuple[int, ...]) -> _Blocks:
    assert n.mean is not None
    where = axes(layout, len(shape))
    if EXAMPLES not in where:
        return _Blocks(None, 1, 1)
    axis = where[EXAMPLES][0]
    bound, rows = bind(n.mean, layout, shape), shape[axis]
    for along, span in bound.spans:
        if along == axis:
            rows = local_blocks(bound, axis, span) if span.blocks else 1
    return _Blocks(axis, shape[axis], rows)


def _fit(prior: Belief, n: Normalizer, layout: str, x: jax.Array, blocks: _Blocks) -> Belief:
    """The prior in the shape of the batch's statistics, pooled over the examples and channels that share them."""
    assert n.mean is not None
    if not isinstance(prior, Belief):
        raise TypeError(f"a prior is a Belief, as `predict` gives it; found {type(prior).__name__}")
    work = statistics_dtype(x.dtype)
    mean, var = (jnp.asarray(s).astype(work) for s in prior)
    channel = axes(layout, x.ndim).get("c", (None,))[0]
    accepted = [
        {1, blocks.rows, size} if i == blocks.axis else {1, size} if i == channel else {1}
        for i, size in enumerate(x.shape)
    ]
    for s in (mean, var):
        if s.ndim != x.ndim or any(size not in a for size, a in zip(s.shape, accepted, strict=True)):
            fitting = ", ".join(" or ".join(map(str, sorted(a))) for a in accepted)
            raise FieldError(f'a prior for shape {x.shape}, layout "{layout}", field "{n.mean}" has shape ({fitting}); '
                             f"found {s.shape}")  # fmt: skip
    mean, var = jnp.broadcast_arrays(mean, var)
    each = blocks.axis is not None and mean.shape[blocks.axis] == blocks.length != blocks.rows
    shared = (None, "c", EXAMPLES) if each else (None, "c")
    if spans := tuple(span for span in n.mean.spans if span.axis in shared):
        if channel is not None and any(span.axis == "c" for span in spans) and mean.shape[channel] == 1:
            wide = [size if i == channel else mean.shape[i] for i, size in enumerate(x.shape)]
            mean, var = (jnp.broadcast_to(s, wide) for s in (mean, var))
        middle = expect(mean, Field(spans), layout)
        mean, var = middle, expect(var + lax.square(mean - middle), Field(spans), layout)
    return Belief(*(blocks.short(s) for s in (mean, var)))


def _after(
    belief: Belief, n: Normalizer, layout: str, shape: tuple[int, ...], blocks: _Blocks, scale: Any, bias: Any
) -> Belief:
    """The belief of y: N(bias, scale ** 2), but for eps: a spread of 0 stays 0."""
    share = belief.var * inverse_power(belief.var + n.eps, 1.0)
    channel = axes(layout, len(shape)).get("c", (None,))[0]
    if any(jnp.ndim(p) > 1 for p in (scale, bias) if p is not None):  # a scale for each example
        share = blocks.long(share)
        share = jnp.broadcast_to(share, [size if i == blocks.axis else s for i, (size, s) in
                                         enumerate(zip(shape, share.shape, strict=True))])  # fmt: skip
    share = jnp.broadcast_to(share, [shape[i] if i == channel else s for i, s in enumerate(share.shape)])
    var = affine(affine(share, layout, scale, None), layout, scale, None)
    return Belief(affine(jnp.zeros_like(share), layout, None, bias), var)


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
) -> Kalman:
    """Normalizes x with the mixture of a prior and its own statistics.

    Args:
      x: array of a real floating dtype, axes as named by `layout`. [units u]
      prior: the prediction, from `predict` or `join`; None for the first layer, which is plain normalization. A prior for
        each channel is pooled over channels, and one for each example over examples, where the fields share statistics.
      normalizer: a row with A = B, order 2: "batch", blocks of it `Normalizer("n/64 ...", "n/64 ...")`, "group", "layer".
      layout: name of each axis.
      gain: q, the weight of the batch, a scalar or one number a channel, `[c]`.
      scale: as for `normalize`, constant over space.
      bias: the same.
      mask: as for `normalize`. Where no element is valid, the prior stands.
      guard: where the mean of prior variance / batch variance is not below this number, the batch's statistics alone are
        used; the published code has 100. The mean is over the channels and blocks of this array (of this shard).
      unbiased: whether, without a prior, the variance that is believed is w / (w - 1) times that which normalizes, for w
        elements: so in the published code, whose first layer is a fused operation.

    Returns:
      `(y, filtered, stats)`: y in the dtype of x; what is believed of x and y; the batch's own statistics.

    Raises:
      FieldError: field, layout, shapes or prior do not fit.
      TypeError: integers or complex numbers, or a prior that is no Belief.
      ValueError: the row has no variance, or the gain is not between 0 and 1.

    Source: Wang et al. 2018; `guard` and `unbiased` from its published code.

    >>> x = jnp.array([[0.0], [2.0]])
    >>> out = kalman_normalize(x, Belief(jnp.zeros((1, 1)), jnp.ones((1, 1))), gain=0.5)
    >>> out.filtered.input.mean, out.filtered.input.var                      # var: 1 + 0 + 0.25
    (Array([[0.5]], dtype=float32), Array([[1.25]], dtype=float32))
    """
    given: dict[str, Any] = {"scale": scale, "bias": bias, "mask": mask, "guard": guard, "unbiased": unbiased}
    return _mix(x, prior, row(normalizer), layout, gain, **given)


def _mix(
    x: ArrayLike, prior: Belief | None, n: Normalizer, layout: str, gain: ArrayLike, *, scale: Any, bias: Any, mask: Any,
    guard: float | None, unbiased: bool, refuse: bool = True,
) -> Kalman:  # fmt: skip
    """As `kalman_normalize`; `refuse` asks for the checks of `normalize`."""
    check(n, gain)
    x = require_float(x, "kalman_normalize")
    if jnp.iscomplexobj(x):
        raise TypeError(f"kalman_normalize takes real arrays, found {x.dtype}")
    blocks = _blocks(n, layout, x.shape)
    if prior is None:
        y, _, stats = (normalize if refuse else equation)(x, n, layout, scale=scale, bias=bias, mask=mask)
        var = running.unbiased(stats).var if unbiased else stats.var
        belief = Belief(blocks.short(stats.mean), blocks.short(var))
        return Kalman(y, Filtered(belief, _after(belief, n, layout, x.shape, blocks, scale, bias)), stats)
    stats = equation(x, n, layout, mask=mask).stats
    prior, batch = _fit(prior, n, layout, x, blocks), Belief(blocks.short(stats.mean), blocks.short(stats.var))
    weighted = blocks.short(stats.var_weight) > 0
    belief = update(prior, batch, align_parameter(gain, x, layout, "gain", prior.mean.dtype))
    if guard is not None:
        near = _is_near(prior.var, batch.var, weighted, guard)
        belief = Belief(*(jnp.where(near, mixed, plain) for mixed, plain in zip(belief, batch, strict=True)))
    belief = Belief(*(jnp.where(weighted, mixed, before) for mixed, before in zip(belief, prior, strict=True)))
    used = Stats(*(blocks.long(s) for s in belief))
    y = equation(x, n, layout, stats=used, scale=scale, bias=bias, mask=mask).y
    return Kalman(y, Filtered(belief, _after(belief, n, layout, x.shape, blocks, scale, bias)), stats)


def _is_near(before: jax.Array, now: jax.Array, weighted: jax.Array, guard: float) -> jax.Array:
    """Whether the mean of before / now lies below the guard; a batch variance of 0 is as far as can be."""
    ratio = jnp.where(now > 0, before / jnp.where(now > 0, now, 1), jnp.inf)
    ratio = jnp.where(weighted, ratio, 0)
    count = jnp.sum(jnp.broadcast_to(weighted, ratio.shape).astype(ratio.dtype))
    return lax.stop_gradient(jnp.sum(ratio) < guard * count)


# For the modules.


class Applied(NamedTuple):
    """y, the beliefs, the statistics to store, and what the batch shows of them (None: nothing to store)."""

    y: jax.Array
    filtered: Filtered
    running: Running
    batch: Stats | None


def apply(
    x: ArrayLike,
    prior: Belief | None,
    normalizer: Normalizer,
    layout: str,
    stored: Running,
    *,
    use_running: bool = False,
    update_running: bool = True,
    momentum: ArrayLike = 0.9,
    source: str = "filtered",
    gain: ArrayLike = 0.1,
    gain_logit: ArrayLike | None = None,
    transition: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    dtype: Any = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    guard: float | None = None,
    unbiased: bool = False,
    refuse: bool = True,
) -> Applied:
    """One application of a layer: with the stored statistics, or with prior and batch, which then update the stored ones.

    `source` says what is stored: "filtered", the statistics that normalized (mean over the blocks of examples), so that
    inference does what training did; "batch", the batch's own; "first_block", the first block's alone, which is what the
    published code stores: 2 of its 128 images. `transition` is (a, u, raw r) of `linear`, r = softplus(raw r).

    >>> stored = Running(jnp.zeros(1), jnp.ones(1))
    >>> out = apply(jnp.array([[0.0], [2.0]]), None, row("batch"), "n c", stored)
    >>> out.running.mean.round(3), out.filtered.input.var
    (Array([0.1], dtype=float32), Array([[1.]], dtype=float32))
    """
    check(normalizer, gain, source)
    x, n = require_float(x, "KalmanNorm"), normalizer
    if dtype is not None:
        with jax.numpy_dtype_promotion("standard"):
            x = x.astype(jnp.promote_types(x.dtype, dtype))
    dtype = jnp.dtype(dtype or x.dtype)
    stores = stored.mean is not None
    stats = running.as_stats(stored, n, layout, x.shape)
    if use_running and stores:
        y = normalize(x, n, layout, stats=stats, scale=scale, bias=bias, mask=mask).y
        belief = Belief(*(s.astype(statistics_dtype(x.dtype)) for s in stats[:2]))
        blocks = _blocks(n, layout, x.shape)
        filtered = Filtered(belief, _after(belief, n, layout, x.shape, blocks, scale, bias))
        return Applied(y.astype(dtype), filtered, stored, None)
    if gain_logit is not None:
        gain = jax.nn.sigmoid(jnp.asarray(gain_logit))
    if transition is not None and prior is not None:
        a, u, raw = transition
        prior = linear(prior, a, u, jax.nn.softplus(jnp.asarray(raw)), layout)
    out = _mix(
        x, prior, n, layout, gain, scale=scale, bias=bias, mask=mask, guard=guard, unbiased=unbiased, refuse=refuse
    )
    y = out.y.astype(dtype)
    if not (stores and update_running):
        return Applied(y, out.filtered, stored, None)
    blocks = _blocks(n, layout, x.shape)
    shown = out.stats
    if source != "batch":
        mean, var = (blocks.long(s) for s in out.filtered.input)
        shown = Stats(mean, var, shown.mean_weight, shown.var_weight)
    if source == "first_block" and blocks.axis is not None:
        shown = Stats(*(_first(jnp.asarray(s), blocks.axis) for s in shown))
    batch = running.observe(shown, n, layout, x.shape)
    return Applied(y, out.filtered, running.update(stored, batch, momentum), batch)


def _first(s: jax.Array, axis: int) -> jax.Array:
    return jnp.broadcast_to(lax.slice_in_dim(s, 0, 1, axis=axis), s.shape)
