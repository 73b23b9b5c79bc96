"""Scale and bias from another array: style, adaptive instance norm."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax import running
from normjax._expect.arrays import as_weights, require_float, statistics_dtype, zero_masked
from normjax._normalize.evaluate import equation, normalize
from normjax.conditional.modulation import Modulation, modulate
from normjax.theory import Normalizer, Stats, row


def style(
    y: ArrayLike,
    normalizer: Normalizer | str = "instance",
    layout: str = "n ... c",
    *,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    unbiased: bool = False,
) -> Modulation:
    """The style of an array: its standard deviation as the scale, its mean as the bias, of the rank of y.

    Args:
      y: floating-point array, axes as named by `layout`. [u]
      layout: name of each axis of y.
      normalizer: the row whose denominator (for "instance" the deviation) and mean are the style; without a floor.
      mask: boolean mask or weights that broadcast against y; 0 leaves an element out.
      eps: added to the moment, by default the row's number. The authors' Lua code takes 0 for the style. [u ** order]
      unbiased: divide by one less than the number of elements, as PyTorch's `var`; the paper and its code do not.

    Source: Huang & Belongie 2017, equations 5, 6 and 8.

    >>> style(jnp.array([[[2.0], [4.0]]]), eps=0.0)[:2]
    (Array([[[1.]]], dtype=float32), Array([[[3.]]], dtype=float32))
    """
    n = row(normalizer)
    y = require_float(y, "style")
    stats = normalize(y.astype(statistics_dtype(y.dtype)), n, layout, mask=mask).stats
    if unbiased:
        running.require_unbiased(n)
        stats = running.unbiased(stats)
    if stats.var is None or n.floor is not None:
        raise ValueError(f"a style has a spread: a row that divides, without a floor; found {n}")
    return Modulation(denominator(stats.var, n, layout, eps), 0.0 if stats.mean is None else stats.mean)


def denominator(
    var: jax.Array, normalizer: Normalizer | str, layout: str = "n ... c", eps: ArrayLike | None = None
) -> jax.Array:
    """What a row without a floor divides by, from its moment: (eps + gain * var) ** power, with gradient zero where it is 0.

    The moment has the rank of the normalized array, axes as named by `layout`; `eps` replaces the row's number.

    Source: the third line of `normjax.theory`.

    >>> denominator(jnp.array([[4.0, 0.0]]), Normalizer("n", "n", eps=0.0)).tolist()
    [[2.0, 0.0]]
    """
    normalizer = row(normalizer)
    # One over it is what the equation makes of ones, so that what was divided by it is multiplied by the same.
    plain = Normalizer(None, normalizer.var, eps=normalizer.eps, gain=normalizer.gain, power=normalizer.power)
    inverse = equation(jnp.ones_like(var), plain, layout, stats=Stats(var=var), eps=eps).y
    zero = inverse == 0  # a NaN is none: what overflowed is no spread of zero
    return jnp.where(zero, 0, 1 / jnp.where(zero, 1, inverse))


def adain(
    content: ArrayLike,
    style_from: ArrayLike,
    layout: str = "n ... c",
    *,
    eps: ArrayLike = 1e-5,
    style_eps: ArrayLike | None = None,
    strength: ArrayLike = 1.0,
    mask: ArrayLike | None = None,
    style_mask: ArrayLike | None = None,
    unbiased: bool = False,
) -> jax.Array:
    """Adaptive instance norm: the content with the mean and the deviation that each channel of the style has.

    Three versions are about, which differ in a small image. This one, the paper's: biased, eps in both variances. The
    authors' Lua code: `style_eps=0`. A well-known PyTorch version: `unbiased=True`.

    Args:
      content: floating-point array, axes as named by `layout`. [u]
      style_from: floating-point array of the same examples and channels, and any other lengths.
      layout: name of each axis of both.
      eps: added to the variance of the content, and of the style. [u ** 2]
      style_eps: added to the variance of the style instead of `eps`. [u ** 2]
      strength: 1 is the style, 0 the content as it is, between them a mixture.
      mask: boolean mask or weights that broadcast against the content; where 0, it is the style's mean.
      style_mask: boolean mask or weights that broadcast against the style; 0 leaves an element out.
      unbiased: whether both variances are the unbiased ones.

    Source: Huang & Belongie 2017, equation 8; the strength, equation 14 (there between codes, before the decoder).

    >>> content, picture = jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0], [10.0], [30.0]]])
    >>> adain(content, picture).round().tolist()
    [[[10.0], [30.0]]]
    """
    content, n = require_float(content, "adain"), row("instance")
    style_eps = eps if style_eps is None else style_eps
    modulation = style(style_from, n, layout, mask=style_mask, eps=style_eps, unbiased=unbiased)
    stats = running.unbiased(normalize(content, n, layout, mask=mask).stats) if unbiased else None
    wide = content.astype(statistics_dtype(content.dtype))
    wide = zero_masked(wide, as_weights(mask, wide))
    y = modulate(wide, modulation, n, layout, stats=stats, mask=mask, eps=eps)
    return (wide + jnp.asarray(strength).astype(wide.dtype) * (y - wide)).astype(content.dtype)
