"""EvoNorm and GRN: units with statistics inside, over fields; masks and mapped axes included."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import running
from normjax._expect.arrays import (
    Weights,
    align_parameter,
    align_statistic,
    as_weights,
    require_real,
    statistics_dtype,
    zero_masked,
)
from normjax._expect.expectation import expect
from normjax._leaves import inverse_power, nan_if_infinite, split_eps
from normjax._normalize.evaluate import affine, equation
from normjax.field import Field
from normjax.theory import Normalizer, Stats


class EvoNormed(NamedTuple):
    """What `evonorm_b0` returns.

    Attributes:
      y: the output, in the shape of x.
      stats: moments of the batch, for `running.observe`; inference needs `var` alone. All None where none were taken.

    Source: Liu et al. 2020, "Evolving normalization-activation layers".
    """

    y: jax.Array
    stats: Stats


def evonorm_row(field: Field | str, eps: float = 1e-5) -> Normalizer:
    """The row whose variance EvoNorm takes over a field: centred for the statistic, not for the output.

    Args:
      field: of the variance.
      eps: added to the variance. [units of x squared]

    Source: Liu et al. 2020, "Evolving normalization-activation layers"; pseudocode in its appendix.

    >>> from normjax import TABLE
    >>> evonorm_row("n ...") == TABLE["variance"]
    True
    """
    return Normalizer(field, field, eps=eps, keep_mean=True)


def evonorm_b0(
    x: ArrayLike,
    v: ArrayLike = 1.0,
    layout: str = "n ... c",
    *,
    batch: Field | str = "n ...",
    instance: Field | str = "...",
    eps: ArrayLike = 1e-5,
    unbiased: bool = False,
    nonlinear: bool = True,
    stats: Stats | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> EvoNormed:
    """EvoNorm-B0, norm and nonlinearity in one: x / max(sqrt(var_B + eps), v * x + sqrt(var_I + eps)) * scale + bias.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      v: learned slope, a scalar, `[c]`, or of the rank of x; starts at 1.
      batch: field of the batch's variance, mapped axes included: `"@data n ..."`.
      instance: field of the instance's variance; of a single element it is 0.
      eps: added to both variances. [u ** 2]
      unbiased: divides the instance's variance by one less than its count (0 for a single element), as the code of Lubana
        et al. 2021 does; the paper's is biased, and the batch's in both.
      nonlinear: False leaves scale * x + bias, as the paper's pseudocode does.
      stats: the stored variance of the batch (`running.as_stats`), for inference; it broadcasts against x.
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.
      dtype: of the output, by default that of x.

    Source: Liu et al. 2020, "Evolving normalization-activation layers"; pseudocode in its appendix.

    >>> x = jnp.array([1.0, -1.0, 2.0, -2.0]).reshape(2, 2, 1)
    >>> y, stats = evonorm_b0(x, 0.0)                              # v = 0: the larger of the two deviations divides
    >>> (1000 * y).round().ravel().tolist(), stats.var.ravel().tolist()
    ([632.0, -632.0, 1000.0, -1000.0], [2.5])
    """
    x, work, weights = _prepared(x, "evonorm_b0", mask)
    if not nonlinear:
        return EvoNormed(affine(work, layout, scale, bias).astype(dtype or x.dtype), Stats())
    number, _ = split_eps(eps)
    if stats is None or stats.var is None:
        stats = equation(x, evonorm_row(batch, number), layout, mask=mask).stats
    var = align_statistic(stats.var, x, "var", work.dtype)
    own = equation(x, evonorm_row(instance, number), layout, mask=mask).stats
    own = (running.unbiased(own) if unbiased else own).var
    v = align_parameter(v, work, layout, "v", work.dtype)
    d = jnp.maximum(_root(var + eps), v * work + _root(own + eps))
    y = zero_masked(work * inverse_power(d, 1.0), weights)
    return EvoNormed(affine(y, layout, scale, bias).astype(dtype or x.dtype), stats)


def evonorm_s0(
    x: ArrayLike,
    v: ArrayLike = 1.0,
    layout: str = "n ... c",
    *,
    field: Field | str = "... c/32",
    eps: ArrayLike = 1e-5,
    unbiased: bool = False,
    nonlinear: bool = True,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """EvoNorm-S0, norm and nonlinearity in one: x * sigmoid(v * x) / sqrt(var_G + eps) * scale + bias.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      v: learned slope, a scalar, `[c]`, or of the rank of x; starts at 1. [1 / u]
      field: field of the variance; the paper has groups of channels and all of space.
      eps: added to the variance. [u ** 2]
      unbiased: divides by one less than the count, as the code of Lubana et al. 2021 does; the paper's is biased.
      nonlinear: False leaves scale * x + bias, as the paper's pseudocode does.
      scale: factor of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      bias: addend of the result: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.
      dtype: of the output, by default that of x.

    Source: Liu et al. 2020, "Evolving normalization-activation layers"; pseudocode in its appendix.

    >>> (1000 * evonorm_s0(jnp.array([[1.0, 3.0, 0.0, 20.0]]), field="c/2")).round().tolist()
    [[731.0, 2858.0, 0.0, 2000.0]]
    """
    x, work, _ = _prepared(x, "evonorm_s0", mask)
    if not nonlinear:
        return affine(work, layout, scale, bias).astype(dtype or x.dtype)
    number, eps = split_eps(eps)
    row = evonorm_row(field, number)
    divided = equation(x, row, layout, mask=mask, eps=eps, dtype=work.dtype)
    if unbiased:
        var = running.unbiased(divided.stats).var
        divided = equation(x, row, layout, mask=mask, eps=eps, dtype=work.dtype, stats=Stats(divided.stats.mean, var))
    y = divided.y * jax.nn.sigmoid(align_parameter(v, work, layout, "v", work.dtype) * work)
    return affine(y, layout, scale, bias).astype(dtype or x.dtype)


def grn(
    x: ArrayLike,
    scale: ArrayLike = 0.0,
    bias: ArrayLike = 0.0,
    layout: str = "n ... c",
    *,
    space: Field | str = "...",
    channels: Field | str = "c",
    eps: ArrayLike = 1e-6,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Global response normalization: each channel times its share of the response, beside the input itself.

    y = scale * x * g / (mean of g over channels + eps) + bias + x, where g is the root of the sum of squares of a channel.

    Args:
      x: real array, axes as named by `layout`. [u]
      layout: name of each axis of x.
      scale: learned factor, a scalar, `[c]`, or of the rank of x; starts at 0, so that the layer starts as the identity.
      bias: learned addend, a scalar, `[c]`, or of the rank of x; starts at 0. [u]
      space: field over which squares are summed; in the authors' sparse pre-training it is `"n ..."`.
      channels: field of the mean of g.
      eps: added to the mean of g. [u]
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.
        A channel that is masked whole is not in the mean response.
      dtype: of the output, by default that of x.

    Source: Woo et al. 2023 (ConvNeXt V2), equations 1 to 3 and algorithm 1.

    >>> x = jnp.array([[[3.0, 0.0], [4.0, 5.0]]])                  # norms 5 and 5
    >>> grn(x, scale=2.0, bias=1.0).round().tolist()
    [[[10.0, 1.0], [13.0, 16.0]]]
    """
    x, work, _ = _prepared(x, "grn", mask)
    stats = equation(x, Normalizer(None, space), layout, mask=mask).stats
    count = jnp.asarray(stats.var_weight, work.dtype)
    g = _root(nan_if_infinite(stats.var * count))  # eps is beside the sum's root, so the mean's root would not do
    mean = expect(g, channels, layout, mask=None if mask is None else count > 0)
    share = g * inverse_power(mean + eps, 1.0)
    return (affine(work * share, layout, scale, bias) + work).astype(dtype or x.dtype)


def _prepared(x: ArrayLike, caller: str, mask: ArrayLike | None) -> tuple[jax.Array, jax.Array, Weights | None]:
    """The input, and the same in float32 or wider with zeros where masked, and its weights."""
    x = require_real(x, caller)
    work = x.astype(statistics_dtype(x.dtype))
    weights = as_weights(mask, work)
    return x, zero_masked(work, weights), weights


def _root(q: jax.Array) -> jax.Array:
    """The square root, with slope 0 at 0."""
    return jnp.where(q != 0, jnp.sqrt(jnp.where(q != 0, q, 1)), 0)
