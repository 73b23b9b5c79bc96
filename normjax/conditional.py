"""Conditional normalization: any row of the equation, with a scale and a bias that something else decides.

A `Modulation` is that scale and bias, and perhaps a gate. Where it comes from is what the published methods differ in:

    style        deviation and mean of another image            AdaIN (Huang & Belongie 2017)
    by_class     a row of a table, or a mixture of its rows     conditional instance norm (Dumoulin et al. 2017), batch norm
                                                                (de Vries et al. 2017)
    project      a linear map of a vector                       FiLM (Perez et al. 2018), AdaLN (Peebles & Xie 2023)
    from_map     convolutions of a map of labels                SPADE (Park et al. 2019)

and `modulate` normalizes with it. A learned scale is 1 + what the condition gives, so that nothing in is nothing done.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax import running
from normjax._expect.arrays import as_weights, require_float, statistics_dtype, zero_masked
from normjax._normalize.evaluate import affine, equation, normalize
from normjax.field import FieldError
from normjax.theory import Normalizer, Stats, row

# The row that AdaLN modulates: each token by itself, with the eps of DiT.
TOKEN = Normalizer("c", "c", eps=1e-6)


class Modulation(NamedTuple):
    """What a condition decides: factor and addend of the normalized array, and factor of a residual branch (`gated`).

    Attributes:
      scale: factor: a scalar, `[c]`, `[n, c]`, or of the rank of x; None where the method has none.
      bias: addend, of the same kinds of shapes; None where the method has none.
      gate: factor of the residual branch, of the same kinds of shapes; None where the method has none.

    Source: Perez et al. 2018, equation 2; the gate: Peebles & Xie 2023, section 3.2.

    >>> Modulation(2.0, 1.0).gate is None
    True
    """

    scale: Any = None
    bias: Any = None
    gate: Any = None


def modulate(
    x: ArrayLike,
    modulation: Modulation,
    normalizer: Normalizer | str | None = None,
    layout: str = "n ... c",
    *,
    stats: Stats | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
) -> jax.Array:
    """Computes scale * normalized(x) + bias.

    Args:
      x: floating-point array, axes as named by `layout`.
      modulation: scale and bias; the gate is not used.
      normalizer: a Normalizer or the name of a row; None leaves x as it is (FiLM after another layer).
      layout: name of each axis of x.
      stats: moments to use instead of those of x (inference), which broadcast against x; None computes them.
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.
      eps: replaces the row's number: a scalar, or an array that broadcasts against x. [units of x ** order]

    Returns:
      An array of the shape and dtype of x.

    Raises:
      FieldError: the row, the scale or the bias does not fit x.
      TypeError: x holds integers.

    Source: FiLM: Perez et al. 2018, equation 2.

    >>> x = jnp.array([[1.0, 3.0], [1.0, 3.0]])
    >>> modulate(x, Modulation(jnp.array([[1.0, 1.0], [2.0, 2.0]]), 5.0), "token").round(2).tolist()
    [[4.0, 6.0], [3.0, 7.0]]
    """
    scale, bias, _ = modulation
    if normalizer is not None:
        return normalize(x, normalizer, layout, stats=stats, scale=scale, bias=bias, mask=mask, eps=eps).y
    x = require_float(x, "modulate")
    work = x.astype(statistics_dtype(x.dtype))
    return affine(zero_masked(work, as_weights(mask, work)), layout, scale, bias).astype(x.dtype)


def gated(x: ArrayLike, branch: ArrayLike, gate: ArrayLike, layout: str = "n ... c") -> jax.Array:
    """The residual sum x + gate * branch. A gate that starts at zero makes a block start as the identity.

    Args:
      x: floating-point array, axes as named by `layout`.
      branch: floating-point array of the shape of x.
      gate: factor of the branch: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      layout: name of each axis of x.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      FieldError: the shapes do not fit.
      TypeError: x or the branch holds integers.

    Source: Peebles & Xie 2023 (DiT), section 3.2, adaLN-Zero.

    >>> gated(jnp.ones((2, 1)), jnp.full((2, 1), 3.0), jnp.array([[0.0], [2.0]])).tolist()
    [[1.0], [7.0]]
    """
    x, branch = require_float(x, "gated"), require_float(branch, "gated")
    if x.shape != branch.shape:
        raise FieldError(f"a branch has the shape of what it is added to: found {branch.shape} and {x.shape}")
    return affine(branch.astype(statistics_dtype(x.dtype)), layout, gate, x).astype(x.dtype)


def style(
    y: ArrayLike,
    normalizer: Normalizer | str = "instance",
    layout: str = "n ... c",
    *,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    unbiased: bool = False,
) -> Modulation:
    """The style of an array: its standard deviation as the scale, its mean as the bias.

    Args:
      y: floating-point array, axes as named by `layout`. [u]
      normalizer: the row whose statistics are the style: its denominator (for "instance" the deviation), and its mean.
      layout: name of each axis of y.
      mask: boolean mask or weights that broadcast against y; 0 leaves an element out.
      eps: added to the moment, by default the row's number. The authors' Lua code takes 0 for the style. [u ** order]
      unbiased: divide by one less than the number of elements, as PyTorch's `var` does by default. The paper, and the
        authors' code, divide by the number.

    Returns:
      Scale and bias, float32 or wider, of the rank of y. A deviation of zero has gradient zero. [u]

    Raises:
      FieldError: the row does not fit y.
      TypeError: y holds integers.
      ValueError: the row does not divide, or has a floor; or `unbiased`, and its moment is no variance.

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
    var: jax.Array, normalizer: Normalizer, layout: str = "n ... c", eps: ArrayLike | None = None
) -> jax.Array:
    """What a row without a floor divides by, from its moment: (eps + gain * var) ** power, with gradient zero where it is 0.

    Args:
      var: the moment, of the rank of the normalized array. [u ** order]
      normalizer: the row.
      layout: name of each axis of the array.
      eps: replaces the row's number: a scalar, or an array that broadcasts. [u ** order]

    Returns:
      An array of the shape and dtype of var.

    Source: the third line of `normjax.theory`.

    >>> denominator(jnp.array([[4.0, 0.0]]), Normalizer("n", "n", eps=0.0)).tolist()
    [[2.0, 0.0]]
    """
    n = normalizer
    # One over it is what the equation makes of ones, so that what was divided by it is multiplied by the same.
    ones, plain = jnp.ones_like(var), Normalizer(None, n.var, eps=n.eps, gain=n.gain, power=n.power)
    inverse = equation(ones, plain, layout, stats=Stats(var=var), eps=eps).y
    return jnp.where(inverse > 0, 1 / jnp.where(inverse > 0, inverse, 1), 0)


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
      style_from: floating-point array of the same examples and channels; its other axes may be of other lengths.
      layout: name of each axis of both.
      eps: added to the variance of the content, and of the style. [u ** 2]
      style_eps: added to the variance of the style instead of `eps`. [u ** 2]
      strength: 1 is the style, 0 the content as it is, between them a mixture.
      mask: boolean mask or weights that broadcast against the content; where 0, it counts nowhere and becomes the style's
        mean.
      style_mask: boolean mask or weights that broadcast against the style; 0 leaves an element out.
      unbiased: whether both variances are the unbiased ones.

    Returns:
      An array of the shape and dtype of the content.

    Raises:
      FieldError: the style has other examples or channels, or a mask does not fit.
      TypeError: an array holds integers.

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


def by_class(labels: ArrayLike, scale: ArrayLike, bias: ArrayLike) -> Modulation:
    """The scale and bias of each example's class, from tables.

    Args:
      labels: integers, `[n]`, or weights of the classes, `[n, classes]`, whose scales and biases are mixed.
      scale: table of factors, `[classes, c]`.
      bias: table of addends, `[classes, c]`.

    Returns:
      Scale and bias, `[n, c]`. A label outside of the table gives NaN: JAX would take the nearest row.

    Raises:
      FieldError: the tables or the labels have other shapes, or the labels another dtype.

    Source: Dumoulin et al. 2017, equation 5, and section 4 (mixtures); de Vries et al. 2017, section 4.1, with a table
    in place of a network.

    >>> table = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> by_class(jnp.array([1, 0, 5]), table, -table).scale.tolist()
    [[3.0, 4.0], [1.0, 2.0], [nan, nan]]
    >>> by_class(jnp.array([[0.5, 0.5]]), table, -table).bias.tolist()
    [[-2.0, -3.0]]
    """
    labels, scale, bias = jnp.asarray(labels), jnp.asarray(scale), jnp.asarray(bias)
    if scale.ndim != 2 or scale.shape != bias.shape:
        raise FieldError(f"tables of scale and bias are both [classes, c]; found shapes {scale.shape} and {bias.shape}")
    hard = jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim == 1
    soft = jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == 2 and labels.shape[1] == scale.shape[0]
    if not hard and not soft:
        accepted = f"integers [n], or weights [n, {scale.shape[0]}]"
        raise FieldError(f"labels are {accepted}; found {labels.dtype} of shape {labels.shape}")

    def find(table: jax.Array) -> jax.Array:
        if hard:
            return table.at[labels].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return jnp.matmul(labels.astype(table.dtype), table, precision=lax.Precision.HIGHEST)

    return Modulation(find(scale), find(bias))


def split_modulation(flat: ArrayLike, order: Sequence[str] = ("scale", "bias"), around: float = 1.0) -> Modulation:
    """Cuts the last axis into the parts of a modulation, and adds `around` to the scale.

    Args:
      flat: floating-point array, `[n, parts * c]`.
      order: the parts, in which checkpoints differ: FiLM has ("scale", "bias"), DiT ("bias", "scale", "gate").
      around: added to the scale.

    Returns:
      The parts, each `[n, c]`, float32 or wider; None for those that the order does not name.

    Raises:
      FieldError: the parts do not divide the last axis.
      TypeError: the array holds integers.
      ValueError: the order names other parts, or one twice.

    Source: Perez et al. 2018, equation 1; Peebles & Xie 2023, section 3.2.

    >>> split_modulation(jnp.array([[1.0, 2.0, 3.0]]), ("bias", "scale", "gate"))
    Modulation(scale=Array([[3.]], dtype=float32), bias=Array([[1.]], dtype=float32), gate=Array([[3.]], dtype=float32))
    """
    if not order or len(set(order)) < len(order) or not set(order) <= set(Modulation._fields):
        raise ValueError(f"the order names scale, bias and gate, each at most once; found {tuple(order)!r}")
    flat = require_float(flat, "split_modulation")
    flat = flat.astype(statistics_dtype(flat.dtype))  # in bfloat16, 1 + scale would keep 8 bits
    if flat.shape[-1] % len(order):
        raise FieldError(
            f"the last axis of shape {flat.shape} does not split into {len(order)} parts: {', '.join(order)}"
        )
    parts = dict(zip(order, jnp.split(flat, len(order), -1), strict=True))
    if "scale" in parts:
        parts["scale"] = parts["scale"] + jnp.asarray(around, flat.dtype)
    return Modulation(**parts)


def project(
    condition: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    order: Sequence[str] = ("scale", "bias"),
    *,
    around: float = 1.0,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> Modulation:
    """A modulation `[n, c]` by a linear map of a condition, `split_modulation(activation(condition) @ kernel + bias)`.

    Args:
      condition: floating-point vectors, `[n, k]`.
      kernel: matrix `[k, parts * c]`; zeros make the modulation start as nothing.
      bias: addend of the map, `[parts * c]`.
      order: the parts of the map's output: "scale", "bias", "gate", each at most once.
      around: added to the scale: 1, or 0 where the map gives the scale itself (Perez et al. 2018, equation 1).
      activation: applied to the condition first; DiT's is `jax.nn.silu`.

    Returns:
      The parts, each `[n, c]`, float32 or wider; None for those that the order does not name.

    Raises:
      FieldError: the shapes do not fit, or the parts do not divide the map's output.
      TypeError: the condition holds integers.
      ValueError: the order names other parts, or one twice.

    Source: FiLM: Perez et al. 2018, equation 1, its code adds the 1; AdaLN: Peebles & Xie 2023, section 3.2.

    >>> project(jnp.array([[1.0, 2.0]]), jnp.ones((2, 2))).scale.tolist()
    [[4.0]]
    """
    condition, kernel = require_float(condition, "project"), jnp.asarray(kernel)
    if condition.ndim != 2 or kernel.ndim != 2 or condition.shape[1] != kernel.shape[0]:
        found = f"shapes {condition.shape} and {kernel.shape}"
        raise FieldError(f"a condition is [n, k] and a kernel [k, parts * c]; found {found}")
    work = jnp.promote_types(statistics_dtype(condition.dtype), statistics_dtype(kernel.dtype))
    condition = condition.astype(work)
    flat = (condition if activation is None else activation(condition)) @ kernel.astype(work)
    if bias is not None:
        bias = jnp.asarray(bias)
        if bias.shape != kernel.shape[1:]:
            raise FieldError(f"the bias of a kernel {kernel.shape} is {kernel.shape[1:]}; found shape {bias.shape}")
        flat = flat + bias.astype(work).reshape(1, -1)
    return split_modulation(flat, order, around)
