"""What a condition decides, and the row that it modulates; scale and bias from classes and from vectors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights, require_float, statistics_dtype, zero_masked
from normjax._leaves import Within
from normjax._normalize.evaluate import affine, normalize
from normjax.field import FieldError
from normjax.theory import Normalizer, Stats

# The row that AdaLN modulates: each token by itself, with the eps of DiT.
TOKEN = Normalizer("c", "c", eps=1e-6)


class Modulation(NamedTuple):
    """What a condition decides: factor and addend of the normalized array, and factor of a residual branch (`gated`).

    Attributes:
      scale: factor: a scalar, `[c]`, `[n, c]`, or of the rank of x; None where the method has none.
      bias: addend: a scalar, `[c]`, `[n, c]`, or of the rank of x; None where the method has none.
      gate: factor of the branch: a scalar, `[c]`, `[n, c]`, or of the rank of x; None where the method has none.

    Source: Perez et al. 2018, equation 2; the gate: Peebles & Xie 2023, section 3.2.
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
      layout: name of each axis of x.
      modulation: scale and bias; the gate is not used.
      normalizer: a Normalizer or the name of a row; None leaves x as it is (FiLM after another layer).
      stats: moments to use instead of those of x (inference), which broadcast against x; None computes them.
      mask: boolean mask or weights that broadcast against x; where 0, x counts nowhere and becomes the bias.
      eps: replaces the row's number: a scalar, or an array that broadcasts against x. [units of x ** order]

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
      layout: name of each axis of x.
      branch: floating-point array of the shape of x.
      gate: factor of the branch: a scalar, `[c]`, `[n, c]`, or of the rank of x.

    Source: Peebles & Xie 2023 (DiT), section 3.2, adaLN-Zero.

    >>> gated(jnp.ones((2, 1)), jnp.full((2, 1), 3.0), jnp.array([[0.0], [2.0]])).tolist()
    [[1.0], [7.0]]
    """
    x, branch = require_float(x, "gated"), require_float(branch, "gated")
    if x.shape != branch.shape:
        raise FieldError(f"a branch has the shape of what it is added to: found {branch.shape} and {x.shape}")
    return affine(branch.astype(statistics_dtype(x.dtype)), layout, gate, x).astype(x.dtype)


def by_class(labels: ArrayLike, scale: ArrayLike, bias: ArrayLike) -> Modulation:
    """The scale and bias of each example's class, `[n, c]`, from tables.

    Args:
      labels: integers, `[n]`, or weights, `[n, classes]`, that mix the classes. Outside of the table it gives NaN.
      scale: table of factors, `[classes, c]`.
      bias: table of addends, `[classes, c]`.

    Source: Dumoulin et al. 2017, equation 5, and section 4 (mixtures); de Vries et al. 2017, section 4.1.

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
            # JAX would take the nearest row for a label outside of the table.
            return table.at[labels].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return jnp.matmul(labels.astype(table.dtype), table, precision=lax.Precision.HIGHEST)

    return Modulation(find(scale), find(bias))


def split_modulation(flat: ArrayLike, order: Sequence[str] = ("scale", "bias"), around: float = 1.0) -> Modulation:
    """Cuts the last axis of `flat`, `[n, parts * c]`, into the parts of a modulation, and adds `around` to the scale.

    The parts have float32 or wider; checkpoints differ in their order: FiLM has ("scale", "bias"), DiT ("bias", "scale",
    "gate"). Those that it does not name are None.

    Source: Perez et al. 2018, equation 1; Peebles & Xie 2023, section 3.2.

    >>> split_modulation(jnp.array([[1.0, 2.0, 3.0]]), ("bias", "scale", "gate"))
    Modulation(scale=Array([[3.]], dtype=float32), bias=Array([[1.]], dtype=float32), gate=Array([[3.]], dtype=float32))
    """
    if not order or len(set(order)) < len(order) or not set(order) <= set(Modulation._fields):
        raise ValueError(f"the order names scale, bias and gate, each at most once; found {tuple(order)!r}")
    flat = require_float(flat, "split_modulation")
    flat = flat.astype(statistics_dtype(flat.dtype))  # in bfloat16, 1 + scale would keep 8 bits
    if flat.shape[-1] % len(order):
        named = f"{len(order)} parts: {', '.join(order)}"
        raise FieldError(f"the last axis of shape {flat.shape} does not split into {named}")
    parts = dict(zip(order, jnp.split(flat, len(order), -1), strict=True))
    if "scale" in parts:
        parts["scale"] = parts["scale"] + jnp.asarray(Within()("around", around), flat.dtype)
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
