"""Normalized kernels: the equation of `theory.py` on weights, with averages over the inputs of each output.

A kernel is laid out as Flax does, `"... i o"`: space, inputs, outputs. The field of every function here is `"... i"`: all
that one output sums. A norm is a sum and a field an average, so a norm is the moment with gain = fan-in, the size of
the field. No statistic mixes examples, so nothing is stored and inference is the same function. What all functions take:

    kernel    array of a floating dtype; the result has its shape and dtype, statistics are float32 or wider. [units u]
    scale     the learned factor g of each output: a scalar, an array of the shape of the axes that the field does not
              name, `[o]`, or one of the rank of the kernel that broadcasts against it. None is 1.
    layout    name of each axis of the kernel: "o i ..." for PyTorch's, "i h d" for one of attention.
    field     what is averaged: "... i o" gives the whole kernel one norm, "... i@model" inputs spread over a mapped axis.
    mask      booleans that broadcast against the kernel; a masked weight is 0 and counts in no statistic.
    eps_rule  where eps enters the denominator (gain * m) ** power: "moment", inside of the power, as in the equation;
              "root", added after it, as most published code does; "floor", the least value of gain * m (NFNets).

Errors of all: FieldError where layout, field and shapes do not fit, or where centring would leave nothing of a field of
one weight; TypeError for a kernel of integers; ValueError for an eps_rule, p or eps that is not accepted.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights, require_float, statistics_dtype
from normjax._expect.binding import bind
from normjax._expect.expectation import expect
from normjax._expect.sharding import shards_of
from normjax._leaves import inverse_power, one_of
from normjax._normalize.evaluate import normalize
from normjax.field import Field, FieldError
from normjax.gain import RELU_GAIN, activation_gain
from normjax.theory import Normalizer

KERNEL, INPUTS, OUTPUTS = "... i o", "... i", "o"
EPS_RULES = ("moment", "root", "floor")
BOUNDS = ("rms", "mean")

AnyField = Field | str


def weight_centring(
    kernel: ArrayLike, scale: ArrayLike | None = None, *, layout: str = KERNEL, field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """Takes from the weights of each output their mean: w = g * (v - E[v]).

    Args and errors as at the top of this file.

    Source: Huang et al. 2017, the centring alone; `WCConv2d` of Lubana et al. 2021.

    >>> weight_centring(jnp.array([[1.0, 2.0], [3.0, 8.0]])).tolist()
    [[-1.0, -3.0], [1.0, 3.0]]
    """
    return _evaluate(_floating(kernel), Normalizer(field, None), layout, scale, mask)


def weight_norm(
    kernel: ArrayLike, scale: ArrayLike | None = None, *, p: float = 2, eps: float = 0.0, eps_rule: str = "moment",
    layout: str = KERNEL, field: AnyField = INPUTS, mask: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """Gives the weights of each output the norm g: w = g * v / ||v||_p.

    The paper has no eps; an output whose weights are all zero stays zero, its gradient included. Flax adds 1e-12 to the
    square (`eps=1e-12`), the code of Lubana et al. 2021 adds 1e-5 to the norm (`eps=1e-5, eps_rule="root"`).

    Beside what the top of this file says:
      scale: the norm of each output. [units of w]
      p: order of the norm; `inf` divides by the largest |v|. The code of Hoffer et al. 2018 forgets the absolute value
        there, bwn.py excepted, so that nothing bounds a negative weight.
      eps: added to the sum of |v| ** p [u ** p], or to the norm [u] with "root".

    Source: Salimans & Kingma 2016, equation 2; for other p Hoffer et al. 2018.

    >>> weight_norm(jnp.array([[3.0, 1.0], [4.0, 0.0]]), jnp.array([10.0, 2.0])).tolist()
    [[6.0, 2.0], [8.0, 0.0]]
    >>> weight_norm(jnp.array([[2.0], [-4.0]]), p=float("inf")).tolist()
    [[0.5], [-1.0]]
    """
    kernel = _silenced(kernel, mask)
    return _evaluate(kernel, _norm(kernel, p, eps, layout, field), layout, scale, None, eps_rule)


def centred_weight_norm(
    kernel: ArrayLike, scale: ArrayLike | None = None, *, eps: float = 0.0, eps_rule: str = "moment",
    layout: str = KERNEL, field: AnyField = INPUTS, mask: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """Centres the weights of each output and gives them the norm g: w = g * (v - E[v]) / ||v - E[v]||.

    Args and errors as for `weight_norm`.

    Source: Huang et al. 2017, "Centered weight normalization in accelerating training of deep neural networks".

    >>> centred_weight_norm(jnp.array([[1.0], [9.0], [1.0], [9.0]])).ravel().tolist()
    [-0.5, 0.5, -0.5, 0.5]
    """
    kernel = _floating(kernel)
    if mask is None:
        n = Normalizer(field, field, eps=eps, gain=_fan_in(kernel, layout, field))
        return _evaluate(kernel, n, layout, scale, None, eps_rule)
    # In two steps, since each output has a fan-in of its own: after the centring, masked weights are zeros to a sum.
    v = weight_centring(kernel.astype(statistics_dtype(kernel.dtype)), layout=layout, field=field, mask=mask)
    return weight_norm(v, scale, eps=eps, eps_rule=eps_rule, layout=layout, field=field).astype(kernel.dtype)


def bounded_weight_norm(
    kernel: ArrayLike, scale: ArrayLike | None = None, *, rho: ArrayLike, p: float = 2, eps: float = 0.0,
    eps_rule: str = "moment", layout: str = KERNEL, field: AnyField = INPUTS, outputs: AnyField = OUTPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """Gives the weights of every output one norm that is never learned: w = rho * v / ||v||_p.

    With a learned scale, as in the published bwn.py, only the norm of all outputs together is bounded: g is rescaled to
    the root mean square rho. Its sibling bwn_alt.py has no scale and `rho = norm_bound(kernel, rule="mean")`; a later
    code also overwrites v by v / ||v|| at each step, which is a projection and no part of this function.

    Beside what `weight_norm` takes:
      scale: None for the paper; the learned g of each output for bwn.py.
      rho: a constant of the layer, `norm_bound` of its initial kernel. [units of w]
      outputs: the field of the outputs, over which the mean square of the scale is taken.

    Source: Hoffer et al. 2018, bounded weight normalization.

    >>> kernel = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> bounded_weight_norm(kernel, rho=5.0).tolist()
    [[3.0, 5.0], [4.0, 0.0]]
    >>> w = bounded_weight_norm(kernel, jnp.array([14.0, 2.0]), rho=5.0)
    >>> [round(norm, 3) for norm in jnp.linalg.norm(w, axis=0).tolist()]    # root mean square 5
    [7.0, 1.0]
    """
    kernel = _silenced(kernel, mask)
    work = statistics_dtype(kernel.dtype)
    g = jnp.asarray(rho).astype(jnp.finfo(work).dtype)
    if scale is not None:
        scale = jnp.broadcast_to(_beside(scale, kernel, layout, field, work), _rows(kernel, layout, field))
        g = g * normalize(scale, Normalizer(None, outputs, eps=0.0), layout).y
    return _evaluate(kernel, _norm(kernel, p, eps, layout, field), layout, g, None, eps_rule)


def norm_bound(
    kernel: ArrayLike, *, rule: str = "rms", p: float = 2, layout: str = KERNEL, field: AnyField = INPUTS,
    outputs: AnyField = OUTPUTS, mask: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """The constant rho of `bounded_weight_norm`, from the initial kernel V.

    Beside what `weight_norm` takes:
      rule: "rms" is the paper's ||V||_F / sqrt(N_out), the root mean square of the norms of the outputs; "mean", of the
        published bwn_alt.py, is their mean, which is never larger.
      outputs: the field of the outputs.

    Returns:
      A float32 (or wider) scalar. [u]

    Source: Hoffer et al. 2018.

    >>> kernel = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> round(norm_bound(kernel).item() ** 2, 3), norm_bound(kernel, rule="mean").item()
    (13.0, 3.0)
    """
    one_of("rule", rule, BOUNDS)
    kernel = _silenced(kernel, mask)
    n = _norm(kernel, p, 0.0, layout, field)
    norms = _power(n.gain * normalize(kernel, n, layout).stats.var, n.power)
    rho = expect(norms if rule == "mean" else norms**2, outputs, layout)
    if rho.size != 1:
        raise FieldError(f'one bound is asked for: outputs "{outputs}" beside field "{field}" leave {rho.size} numbers of a '
                         f'kernel of shape {kernel.shape}, layout "{layout}"')  # fmt: skip
    return (rho if rule == "mean" else _power(rho, 0.5)).reshape(())


def weight_standardization(
    kernel: ArrayLike, scale: ArrayLike | None = None, *, eps: float = 1e-10, eps_rule: str = "moment",
    unbiased: bool = False, layout: str = KERNEL, field: AnyField = INPUTS, mask: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """Gives the weights of each output mean 0 and variance 1: w = g * (v - E[v]) / sqrt(Var[v] + eps).

    Beside what the top of this file says:
      eps: added to the variance [u ** 2], or to its root [u] with "root". The variance of a kernel is about 1 / fan-in,
        so the 1e-5 of activations would shrink it; this is the square of the 1e-5 that the code adds to the root.
      unbiased: divide the squares by fan-in - 1, as the published code does (`eps=1e-5, eps_rule="root",
        unbiased=True`), and not by fan-in, as the paper does. Not with a mask.

    Source: Qiao et al. 2019, "Micro-batch training with batch-channel normalization and weight standardization". The
    paper learns no scale.

    >>> weight_standardization(jnp.array([[1.0], [3.0]])).tolist()
    [[-1.0], [1.0]]
    """
    kernel, gain = _floating(kernel), 1.0
    if unbiased:
        if mask is not None:
            raise ValueError("unbiased=True divides by fan-in - 1, which a mask makes another number for each output")
        count = _fan_in(kernel, layout, field)
        gain = count / (count - 1) if count > 1 else 1.0  # one weight is refused below
    return _evaluate(kernel, Normalizer(field, field, eps=eps, gain=gain), layout, scale, mask, eps_rule)


def scaled_weight_standardization(
    kernel: ArrayLike, scale: ArrayLike | None = None, *, gain: float | Callable[[jax.Array], jax.Array] = RELU_GAIN,
    eps: float = 1e-10, eps_rule: str = "moment", layout: str = KERNEL, field: AnyField = INPUTS,
    mask: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """Standardizes weights so that activations keep variance 1: w = g * gain / sqrt(fan-in) * (v - E[v]) / std[v].

    Beside what the top of this file says:
      scale: starts at 1.
      gain: of the activation that made the input, as a number or as the function itself (see `activation_gain`). A
        first layer, whose input is no activation, takes 1; the published code gives it relu's too. The code of NFNets
        has 1.7139588594 for relu, which was measured on samples.
      eps: added to the variance, see `weight_standardization`. `ScaledStdConv2d` of Lubana et al. 2021 has `eps=1e-5,
        eps_rule="root"`, the code of NFNets `eps=1e-4 / fan_in, eps_rule="floor"`.
      mask: fan-in counts what it leaves.

    Source: Brock et al. 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets".

    >>> scaled_weight_standardization(jnp.array([[1.0], [3.0], [1.0], [3.0]]), gain=1.0).ravel().tolist()
    [-0.5, 0.5, -0.5, 0.5]
    """
    if isinstance(gain, str):
        raise TypeError(f"gain is a number or the activation itself, as in gain=jax.nn.relu; found {gain!r}")
    kernel = _floating(kernel)
    work = statistics_dtype(kernel.dtype)
    count = jnp.asarray(_fan_in(kernel, layout, field), jnp.finfo(work).dtype)
    if mask is not None:
        count = count * expect(_valid(kernel, mask).astype(count.dtype), field, layout)
    g = (activation_gain(gain) if callable(gain) else gain) * inverse_power(count, 0.5)
    if scale is not None:
        g = g * _beside(scale, kernel, layout, field, work)
    return _evaluate(kernel, Normalizer(field, field, eps=eps), layout, g, mask, eps_rule)


# One evaluation of the equation.


def _evaluate(kernel: jax.Array, n: Normalizer, layout: str, scale: Any, mask: Any, eps_rule: str = "moment"):
    """The row n on a kernel; with a rule other than "moment", eps is a number for each output that the moment gives."""
    one_of("eps_rule", eps_rule, EPS_RULES)
    field = n.mean if n.var is None else n.var
    assert field is not None
    scale = None if scale is None else _beside(scale, kernel, layout, field, statistics_dtype(kernel.dtype))
    mask = None if mask is None else _valid(kernel, mask)
    if eps_rule == "moment" or not n.eps:
        return normalize(kernel, n, layout, scale=scale, mask=mask).y
    stats = normalize(kernel, n, layout, mask=mask).stats
    m = n.gain * stats.var
    if eps_rule == "floor":
        eps = jnp.maximum(n.eps - m, 0)
    elif n.power == 0.5:  # (sqrt(m) + eps) ** 2 = m + ...
        eps = n.eps**2 + 2 * n.eps * _power(m, 0.5)
    elif n.power == 1:
        eps = n.eps
    else:
        eps = (n.eps + _power(m, n.power)) ** (1 / n.power) - m
    return normalize(kernel, n, layout, stats=stats, scale=scale, mask=mask, eps=eps).y


def _norm(kernel: jax.Array, p: float, eps: float, layout: str, field: AnyField) -> Normalizer:
    """The Lp norm over a field, as a row."""
    if not p > 0:
        raise ValueError(f"p, the order of a norm, is a positive number or inf; found {p!r}")
    if p == math.inf:
        return Normalizer(None, field, eps=eps, power=1.0, order=p)
    return Normalizer(None, field, eps=eps, gain=_fan_in(kernel, layout, field), power=1 / p, order=p)


def _fan_in(kernel: jax.Array, layout: str, field: AnyField) -> float:
    """How many weights the field holds, over all shards: what makes a sum of its average."""
    bound = bind(Field.parse(field), layout, kernel.shape)
    return float(bound.reach() * math.prod(shards_of(span) for _, span in bound.spans))


def _power(m: jax.Array, power: float) -> jax.Array:
    """The root m ** power, with derivative zero at zero."""
    return inverse_power(m, -power)


def _floating(kernel: ArrayLike) -> jax.Array:
    return require_float(kernel, "a reparametrization")


def _valid(kernel: jax.Array, mask: ArrayLike) -> jax.Array:
    """The mask as booleans of the shape of the kernel."""
    weights = as_weights(mask, kernel.astype(statistics_dtype(kernel.dtype)))
    assert weights is not None
    return jnp.broadcast_to(weights.valid, kernel.shape)


def _silenced(kernel: ArrayLike, mask: ArrayLike | None) -> jax.Array:
    """The kernel with zeros where masked, which are nothing to a sum."""
    kernel = _floating(kernel)
    return kernel if mask is None else jnp.where(_valid(kernel, mask), kernel, jnp.zeros((), kernel.dtype))


def _named(kernel: jax.Array, layout: str, field: AnyField) -> set[int]:
    """The axes of the kernel that the field names."""
    return {axis for axis, _ in bind(Field.parse(field), layout, kernel.shape).spans if axis is not None}


def _rows(kernel: jax.Array, layout: str, field: AnyField) -> tuple[int, ...]:
    """The shape of one number for each output, at the rank of the kernel."""
    named = _named(kernel, layout, field)
    return tuple(1 if axis in named else size for axis, size in enumerate(kernel.shape))


def _beside(scale: ArrayLike, kernel: jax.Array, layout: str, field: AnyField, dtype: Any) -> jax.Array:
    """The scale, laid along the axes that the field does not name."""
    scale = jnp.asarray(scale)
    given, named = scale.shape, _named(kernel, layout, field)
    outputs = tuple(size for axis, size in enumerate(kernel.shape) if axis not in named)
    if given and given == outputs:
        scale = scale.reshape(_rows(kernel, layout, field))
    fits = scale.ndim in (0, kernel.ndim) and all(a in (1, b) for a, b in zip(scale.shape, kernel.shape, strict=False))
    if not fits:
        raise FieldError(f"a scale is a scalar, has the shape {outputs} of the outputs, or the rank of the kernel: found "
                         f"shape {given}, kernel {kernel.shape}, layout \"{layout}\", field \"{field}\"")  # fmt: skip
    return scale.astype(dtype)
