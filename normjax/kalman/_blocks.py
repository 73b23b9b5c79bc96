"""How beliefs lie beside an array: by blocks of examples, pooled as a row pools, before and after it normalizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax._expect.binding import axes, bind
from normjax._expect.expectation import expect
from normjax._expect.sharding import local_blocks
from normjax._leaves import inverse_power, nan_if_infinite
from normjax._normalize.evaluate import affine
from normjax.field import EXAMPLES, Field, FieldError
from normjax.propagate import Belief
from normjax.theory import Normalizer


class Blocks(NamedTuple):
    """How statistics lie along the axis of examples: one number for each block of examples, or repeated for each example.

    Beliefs have the first form; statistics that stand beside x have the second, in blocks that are neither 1 nor all.
    """

    axis: int | None  # that of the examples; None where the layout has none
    examples: int  # its length
    blocks: int  # how many have statistics of their own: 1 is a whole batch, `examples` is each example by itself

    def for_each_block(self, s: ArrayLike) -> jax.Array:
        """The statistic with one number for each block."""
        s = jnp.asarray(s)
        if self.axis is None or s.shape[self.axis] != self.examples or self.blocks == self.examples:
            return s
        return lax.slice_in_dim(s, 0, None, self.examples // self.blocks, self.axis)

    def for_each_example(self, s: ArrayLike) -> jax.Array:
        """The statistic with each block's number repeated for its examples."""
        s = jnp.asarray(s)
        if self.axis is None or s.shape[self.axis] in (1, self.examples):
            return s
        return jnp.repeat(s, self.examples // self.blocks, self.axis, total_repeat_length=self.examples)


def blocks_of(n: Normalizer, layout: str, shape: tuple[int, ...]) -> Blocks:
    """The blocks of examples that a row tells apart in arrays of this shape."""
    assert n.mean is not None
    where = axes(layout, len(shape))
    if EXAMPLES not in where:
        return Blocks(None, 1, 1)
    axis = where[EXAMPLES][0]
    bound, blocks = bind(n.mean, layout, shape), shape[axis]
    for along, span in bound.spans:
        if along == axis:
            blocks = local_blocks(bound, axis, span) if span.blocks else 1
    return Blocks(axis, shape[axis], blocks)


def _require_prior(prior: Belief, n: Normalizer, layout: str, shape: tuple[int, ...], blocks: Blocks) -> None:
    """Raises unless the prior has numbers for a channel each or for all, and along n for all, each block or each example."""
    if not isinstance(prior, Belief):
        raise TypeError(f"a prior is a Belief, as `predict` gives it; found {type(prior).__name__}")
    channel = axes(layout, len(shape)).get("c", (None,))[0]
    accepted = [
        {1, blocks.blocks, size} if i == blocks.axis else {1, size} if i == channel else {1}
        for i, size in enumerate(shape)
    ]
    for s in map(jnp.shape, prior):
        if len(s) != len(shape) or any(size not in a for size, a in zip(s, accepted, strict=True)):
            fitting = ", ".join(" or ".join(map(str, sorted(a))) for a in accepted)
            raise FieldError(
                f'a prior for shape {shape}, layout "{layout}", field "{n.mean}" has shape ({fitting}); found {s}'
            )


def pooled_prior(prior: Belief, n: Normalizer, layout: str, x: jax.Array, blocks: Blocks) -> Belief:
    """The prior with one number for each block of examples and group of channels, pooled over what shares statistics."""
    assert n.mean is not None
    _require_prior(prior, n, layout, x.shape, blocks)
    mean, var = jnp.broadcast_arrays(*(jnp.asarray(s).astype(statistics_dtype(x.dtype)) for s in prior))
    channel = axes(layout, x.ndim).get("c", (None,))[0]
    each = blocks.axis is not None and mean.shape[blocks.axis] == blocks.examples != blocks.blocks
    shared = (None, "c", EXAMPLES) if each else (None, "c")
    if spans := tuple(span for span in n.mean.spans if span.axis in shared):
        if channel is not None and any(span.axis == "c" for span in spans) and mean.shape[channel] == 1:
            wide = [size if i == channel else mean.shape[i] for i, size in enumerate(x.shape)]
            mean, var = (jnp.broadcast_to(s, wide) for s in (mean, var))
        middle = expect(mean, Field(spans), layout)
        mean, var = middle, nan_if_infinite(expect(var + lax.square(mean - middle), Field(spans), layout))
    return Belief(*(blocks.for_each_block(s) for s in (mean, var)))


def believed_output(
    belief: Belief,
    used: Belief | None,
    n: Normalizer,
    layout: str,
    shape: tuple[int, ...],
    scale: ArrayLike | None,
    bias: ArrayLike | None,
) -> Belief:
    """The belief of y, for a belief of x and what normalized it, which is the belief itself (None) or something else.

    By the belief itself y has the mean bias and the variance scale ** 2, but for eps: a variance of 0 stays 0. There is one
    number for each channel, and for each block, or for each example where scale or bias are.
    """
    blocks, by = blocks_of(n, layout, shape), belief if used is None else used
    smoothed = jnp.asarray(by.var) + n.eps
    share = belief.var * inverse_power(smoothed, 1.0)
    shift = None if used is None else (belief.mean - by.mean) * inverse_power(smoothed, 0.5)
    channel = axes(layout, len(shape)).get("c", (None,))[0]
    each = any(jnp.ndim(p) > 1 for p in (scale, bias) if p is not None)  # a scale for each example

    def spread_out(s: ArrayLike) -> jax.Array:
        s = blocks.for_each_example(s) if each else jnp.asarray(s)
        whole = (channel, blocks.axis) if each else (channel,)
        return jnp.broadcast_to(s, [shape[i] if i in whole else size for i, size in enumerate(s.shape)])

    share = spread_out(share)
    var = affine(affine(share, layout, scale, None), layout, scale, None)
    if shift is None:
        return Belief(affine(jnp.zeros_like(share), layout, None, bias), var)
    return Belief(affine(spread_out(shift), layout, scale, bias), var)
