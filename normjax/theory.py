"""The theory: one equation, and every classical normalizer as a row of one table. Read this file first.

Around every element of an array x lie two fields, A (summation) and B (suppression); E_F is the average over field F.

    v = x - E_A[x]                          centre
    m = E_B[|v| ** order]                   the moment
    d = (eps + gain * m) ** power           denominator; with a floor field F:  d = max(d, E_F[d])
    y = v / d                               divide  (keep_mean: y = x / d, v unchanged)
    out = scale * y + bias                  affine

A `Normalizer` is the two fields and the few numbers. A field is a string over the names of the axes (`field.py`):
in `"n ... c"`, n is the axis of examples, c the channels, `...` every axis between them. So batch norm averages over
`"n ..."`, layer norm over `"... c"`, and divisive norm over `"...:5 c"`: a sliding 5 x 5 window of space, all channels.

How E_F is evaluated is the business of `moments.py`; parameters and running statistics that of `linen` and `nnx`.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax import derivative, kernels, moments, order
from normjax.field import Field, FieldError, axes, bind
from normjax.moments import Plan, Weights, inverse_power
from normjax.order import top


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, repr=False)
class Normalizer:
    """Two fields and a few numbers. Static: hashable, and never traced.

    Attributes:
      mean: the summation field A, or None to skip the centring. Strings are parsed.
      var: the suppression field B, or None to skip the division.
      eps: added to the moment; sigma squared in Ren et al. 2017. [units of x ** order]
      gain: factor of the moment.
      power: exponent of the denominator. y has no units where order * power = 1.
      order: p takes the mean of |v| ** p; `inf` the maximum over B; `top(k)` the mean of the k largest |v|. The last
        two give m directly, to be used with power 1.
      floor: a field F; the denominator is raised to at least its average over F.
      border: past the edge, windows see nothing ("truncate", the definition of Ren et al. 2017) or zeros ("zero").
      window: "box" or "gaussian" (standard deviation width / 4, cut at the width).
      lean: the side of the extra element of an even window, "after" or "before".
      keep_mean: divide x rather than v.

    >>> Normalizer("...:5 c", "...:5 c", eps=1.0)
    Normalizer('...:5 c', '...:5 c', eps=1.0)
    >>> eval(repr(TABLE["contrast"])) == TABLE["contrast"]
    True
    """

    mean: Field | str | None
    var: Field | str | None
    _: KW_ONLY
    eps: float = 1e-5
    gain: float = 1.0
    power: float = 0.5
    order: float | top = 2
    floor: Field | str | None = None
    border: str = "truncate"
    window: str = "box"
    lean: str = "after"
    keep_mean: bool = False

    def __post_init__(self):
        for name in ("mean", "var", "floor"):
            field = getattr(self, name)
            object.__setattr__(self, name, None if field is None else Field.parse(field))
        moments.choose("border", self.border, moments.BORDERS)
        moments.choose("window", self.window, moments.WINDOWS)
        moments.choose("lean", self.lean, moments.LEANS)
        for name in ("eps", "gain", "power", "order"):
            value = getattr(self, name)
            if isinstance(value, np.generic):  # so that the repr evaluates back
                value = value.item()
                object.__setattr__(self, name, value)
            if name != "order" and (not _is_number(value) or not 0 <= value < math.inf):
                raise ValueError(f"{name} is a finite number of at least 0; found {value!r}")
        number = self.order.k if isinstance(self.order, top) else self.order
        whole = isinstance(number, int) or not isinstance(self.order, top)
        if not whole or not _is_number(number) or not number > 0:
            raise ValueError(f"order is a positive number, inf or top(k); found {self.order!r}")

    def __repr__(self) -> str:
        shown = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Field) and repr(value).startswith("Field.parse"):
                value = str(value)
            text = "float('inf')" if value == math.inf else repr(value)
            if not f.kw_only:
                shown.append(text)
            elif getattr(self, f.name) != f.default:
                shown.append(f"{f.name}={text}")
        return f"Normalizer({', '.join(shown)})"

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields that are not None: A, B and the floor."""
        return tuple(f for f in (self.mean, self.var, self.floor) if isinstance(f, Field))

    def local(self) -> "Normalizer":
        """The normalizer without its mapped axes: what it does to one shard alone."""

        def strip(field: Any) -> Field | None:
            return None if field is None else field.local() or Field(())

        return dataclasses.replace(self, mean=strip(self.mean), var=strip(self.var), floor=strip(self.floor))


# fmt: off
TABLE: Mapping[str, Normalizer] = MappingProxyType({
    # Ioffe & Szegedy 2015
    "batch":         Normalizer("n ...", "n ..."),
    # Ba, Kiros & Hinton 2016: the whole layer
    "layer":         Normalizer("... c", "... c"),
    # layer norm as transformers use it: each token by itself; Li et al. 2019, position norm
    "token":         Normalizer("c", "c"),
    # Ulyanov et al. 2016
    "instance":      Normalizer("...", "..."),
    # Wu & He 2018
    "group":         Normalizer("... c/32", "... c/32"),
    # Zhang & Sennrich 2019
    "rms":           Normalizer(None, "c"),
    # Ren et al. 2017; in a recurrent network "c:60"
    "divisive":      Normalizer("...:5 c", "...:5 c", eps=1.0),
    # Krizhevsky et al. 2012: k = 2, alpha = 1e-4 a channel of 5, beta = 3/4; y has the units of x ** -1/2
    "response":      Normalizer(None, "c:5", eps=2.0, gain=5e-4, power=0.75, border="zero"),
    # Jarrett et al. 2009: subtractive, then divisive, with the image's mean spread as the floor
    "contrast":      Normalizer("...:9 c", "...:9 c", floor="...", window="gaussian"),
    # Singh & Krishnan 2020 (a thresholded linear unit follows)
    "filter":        Normalizer(None, "..."),
    # Hoffer et al. 2017: batch norm of eighths of the batch
    "ghost":         Normalizer("n/8 ...", "n/8 ..."),
    # Hoffer et al. 2018: the gain makes it the standard deviation of Gaussian data
    "l1_batch":      Normalizer("n ...", "n ...", gain=math.sqrt(math.pi / 2), power=1.0, order=1),
    # Daneshmand et al. 2020: divides, and keeps the mean
    "variance":      Normalizer("n ...", "n ...", keep_mean=True),
    # Salimans & Kingma 2016
    "mean_only":     Normalizer("n ...", None),
    # Ortiz et al. 2020
    "local_context": Normalizer("...:9 c/8", "...:9 c/8"),
})
# fmt: on


def row(normalizer: Normalizer | str) -> Normalizer:
    """The normalizer itself, or the row of TABLE with this name.

    >>> row("token")
    Normalizer('c', 'c')
    >>> row("divisve")
    Traceback (most recent call last):
    ...
    ValueError: no normalizer is called 'divisve'; did you mean 'divisive'? TABLE has batch, layer, token, instance, \
group, rms, divisive, response, contrast, filter, ghost, l1_batch, variance, mean_only, local_context
    """
    if isinstance(normalizer, Normalizer):
        return normalizer
    if not isinstance(normalizer, str):
        raise TypeError(f"a normalizer is a Normalizer or a name in TABLE, found {type(normalizer).__name__}")
    if normalizer in TABLE:
        return TABLE[normalizer]
    close = difflib.get_close_matches(normalizer, TABLE, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"no normalizer is called {normalizer!r}; {hint}TABLE has {', '.join(TABLE)}")


class Stats(NamedTuple):
    """The moments that normalized an array, each broadcasting against it, None where its field is None.

    Attributes:
      mean: E_A[x]. [u]
      var: the moment m = E_B[|v| ** order], before eps, gain and power. [u ** order]
      mean_weight: number of elements (sum of weights) behind each mean; where the mean was given, what came with it.
      var_weight: the same for var.
    """

    mean: Any = None
    var: Any = None
    mean_weight: Any = None
    var_weight: Any = None


class Normalized(NamedTuple):
    """What `normalize` returns.

    Attributes:
      y: the normalized array, in the dtype of x.
      centered: v = x - E_A[x], float32 or wider, 0 where masked; the L1 penalty takes its mean absolute value.
      stats: the moments used.
    """

    y: jax.Array
    centered: jax.Array
    stats: Stats


def normalize(
    x: ArrayLike,
    normalizer: Normalizer | str,
    layout: str = "n ... c",
    *,
    stats: Stats | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
) -> Normalized:
    """Normalizes x: centres each element over A, divides it by the spread over B.

    Numerical decisions: statistics accumulate in float32 or wider, windows too. The moment is taken of the centred v
    (two passes), so it cannot be negative or cancel. Where the denominator is zero (eps = 0 and v = 0), y and its gradient
    are zero. Masked elements are selected away before any arithmetic, so a NaN there reaches nothing.

    Arrays that are sharded over devices under `jit` are normalized as wholes. Inside `shard_map`, `pmap` and `vmap` an
    array is one shard or one example; a field reaches beyond it along the axes that it maps: `"@data n ..."`, `"h:5@rows"`.

    Args:
      x: array of a real or complex floating dtype, axes as named by `layout`. [units u]
      normalizer: a Normalizer, or the name of a row of TABLE.
      layout: name of each axis of x; `...` matches any number of axes.
      stats: moments to use instead of those of x (inference); one that is None is computed from x, around the given
        mean. Each has the rank of x and broadcasts against it.
      scale: factor of y: a scalar; one number a channel (axis c of the layout), `[c]`; one for each example and
        channel, `[n, c]`; or an array of the rank of x that broadcasts against it.
      bias: added to scale * y; the same shapes.
      mask: boolean mask or non-negative weights that broadcast against x. At weight zero, x is left out of every
        statistic and y is 0, so that the output is the bias.
      eps: replaces the row's number, for a learned sigma: a scalar or an array that broadcasts. [units u ** order]

    Returns:
      `(y, centered, stats)`; y has the dtype of x.

    Raises:
      FieldError: field, layout, shapes or mapped axes do not fit, or A holds a single element.
      TypeError: x holds integers.
      ValueError: no row has this name.

    Source: Ren et al. 2017, equations 4 to 6; the other rows as named in TABLE.

    >>> x = jnp.array([[1.0, 3.0], [5.0, 7.0]])
    >>> normalize(x, Normalizer("c", "c", eps=0.0)).y.tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    >>> normalize(x, "batch").stats.mean.tolist()                   # each channel over the examples
    [[3.0, 5.0]]
    >>> normalize(x, Normalizer("n", None), bias=jnp.array([0.0, 1.0])).y.tolist()
    [[-2.0, -1.0], [2.0, 3.0]]
    >>> image = jnp.ones((2, 32, 32, 3), jnp.bfloat16)
    >>> normalize(image, Normalizer("...:7 c", "...:5 c", eps=0.25)).y.dtype
    dtype(bfloat16)
    """
    normalizer = row(normalizer)
    x = moments.as_floating(x, "normalize")
    try:
        if mask is None and (stats is None or stats.mean is None):
            _refuse_single_element(normalizer, layout, x.shape)
        return equation(x, normalizer, layout, stats=stats, scale=scale, bias=bias, mask=mask, eps=eps)
    except FieldError as error:
        error.add_note(f'while normalizing shape {x.shape}, layout "{layout}", with {normalizer}')
        raise


def _refuse_single_element(normalizer: Normalizer, layout: str, shape: tuple[int, ...]) -> None:
    """Raises FieldError where centring would leave nothing but zeros."""
    field = normalizer.mean
    if field is None or 0 in shape:
        return
    assert isinstance(field, Field)
    where = axes(layout, len(shape))
    if any(s.axis is None or where.get(s.axis) or s.axis != "..." for s in field.spans):
        bound = bind(field, layout, shape)
        size = bound.reach() * math.prod(moments.members(span) for _, span in bound.spans)
        padded = normalizer.border == "zero" and any(s.window and s.window > 1 for _, s in bound.spans)
        if size > 1 or padded:
            return
    raise FieldError(f'field "{field}" holds a single element of an array of shape {shape}, so centring leaves zero')


@dataclass(frozen=True)
class _Recipe:
    """All that is static about one evaluation of the equation; `a`, `b`, `floor` are the bound fields.

    `positive` says that eps alone keeps the denominator from zero.
    """

    normalizer: Normalizer
    a: Plan | None
    b: Plan | None
    floor: Plan | None
    dtype: Any
    positive: bool


def equation(
    x: jax.Array,
    normalizer: Normalizer,
    layout: str = "n ... c",
    *,
    stats: Stats | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    dtype: Any = None,
) -> Normalized:
    """The equation itself, without the refusals of `normalize`: for layers that accept what Flax accepts.

    Args as for `normalize`; `dtype` is that of y, by default the dtype of x.

    >>> equation(jnp.ones((3, 1)), Normalizer("c", "c")).y.tolist()
    [[0.0], [0.0], [0.0]]
    """
    n = normalizer

    work = moments.wide(x.dtype)
    real = jnp.finfo(work).dtype
    weights = moments.weigh(mask, x.astype(work))
    scale, bias = _beside(scale, bias, x, layout, work)
    positive = eps is None and n.eps > 1e-30
    eps = jnp.asarray(n.eps if eps is None else eps, real)
    if eps.ndim and (eps.ndim != x.ndim or any(e not in (1, s) for e, s in zip(eps.shape, x.shape, strict=True))):
        raise FieldError(f"eps is a scalar, or has the rank of x and broadcasts against it: found shapes {eps.shape} "
                         f"and {x.shape}")  # fmt: skip
    mean, var = (stats.mean, stats.var) if stats else (None, None)
    mean = None if mean is None or n.mean is None else statistic_beside(mean, x, "mean", work)
    var = None if var is None or n.var is None else statistic_beside(var, x, "var", real)
    given = (mean is not None, var is not None)

    def plan(field: Any, needed: bool = True) -> Plan | None:
        # Not where its moment is given: three examples may be normalized by what eight groups of others left.
        return Plan(bind(field, layout, x.shape), n.border, n.window, n.lean) if field is not None and needed else None

    a, b = (plan(field, not was) for field, was in zip((n.mean, n.var), given, strict=True))
    recipe = _Recipe(n, a, b, plan(n.floor), jnp.dtype(dtype or x.dtype), positive)
    if not any(given) and kernels.used() != "xla" and _is_for_kernels(recipe, x, weights, eps, scale, bias):
        y, v, mean, var = _by_kernel(recipe, x, eps, scale, bias)
    elif not any(given) and derivative.has_rule(recipe, x, weights):
        y, v, mean, var = _ruled(recipe, derivative.in_passes(recipe), x, weights, eps, scale, bias)
    else:
        y, v, mean, var = _plain(recipe, x, weights, eps, scale, bias, mean, var)
    came = (stats.mean_weight, stats.var_weight) if stats else (None, None)
    counted = [weight if was else _weight(p, weights, work) if p else None
               for p, was, weight in zip((recipe.a, recipe.b), given, came, strict=True)]  # fmt: skip
    return Normalized(y, v, Stats(mean, var, *counted))


def _plain(recipe, x, weights, eps, scale, bias, mean=None, var=None, apart=False):
    """The equation as it stands; JAX differentiates it. `apart` as in `derivative.py`."""
    n = recipe.normalizer
    x = moments.silence(x.astype(moments.wide(x.dtype)), weights)
    # Where y is x over d, an error of d counts |x| times: the variance then sheds what rounding left of the mean, E[v] ** 2.
    a = recipe.a
    exact = n.keep_mean and n.order == 2 and mean is None and a is not None and a == recipe.b and a.bound.pooled
    if a is not None and mean is None:
        mean = moments.average(x, a, weights)[0]
    v = x if mean is None else moments.silence(x - mean, weights)
    y = x if n.keep_mean else v
    if n.var is not None:
        if var is None:
            var = _moment(v, n, recipe.b, weights)
            if exact:
                var = jnp.maximum(var - _square(moments.average(v, recipe.b, weights)[0]), 0)
        q = eps + n.gain * (derivative.fresh(var, 3) if apart else var)
        if apart and mean is not None and not n.keep_mean:
            y = x - derivative.fresh(mean, 3)
        y = y * _reciprocal(q, recipe, weights, x.shape).astype(y.dtype)
    return _affine(y, scale, bias).astype(recipe.dtype), v, mean, var


def _affine(y, scale, bias):
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _square(v):
    return lax.square(v) if not jnp.iscomplexobj(v) else lax.square(v.real) + lax.square(v.imag)


def _moment(v, n: Normalizer, plan: Plan, weights: Weights | None):
    """The moment, E_B[|v| ** order]."""
    if n.order == 2:
        return moments.average(_square(v), plan, weights)[0]
    a = jnp.abs(v)
    if isinstance(n.order, top):
        return order.mean_of_largest(a, n.order.k, plan, weights)
    if n.order == math.inf:
        return order.largest(a, plan)
    if n.order != 1:
        # |v| ** p has no finite slope at 0 for p < 1, and JAX's power has none for a traced 0 either.
        a = jnp.where(a > 0, jnp.where(a > 0, a, 1) ** n.order, 0)
    return moments.average(a, plan, weights)[0]


def _reciprocal(q, recipe: _Recipe, weights: Weights | None, shape: tuple[int, ...]):
    """1 / d, for q = eps + gain * m; zero where d is zero."""
    n = recipe.normalizer
    if recipe.floor is None:
        return inverse_power(q, n.power, recipe.positive)
    d = q * inverse_power(q, 1 - n.power) if n.power < 1 else jnp.where(q > 0, jnp.where(q > 0, q, 1) ** n.power, 0)
    named = {axis for axis, _ in recipe.floor.bound.spans}
    over = jnp.broadcast_to(d, [shape[i] if i in named else size for i, size in enumerate(d.shape)])
    d = jnp.maximum(d, moments.average(moments.silence(over, weights), recipe.floor, weights)[0])
    return inverse_power(d, 1.0)


def _is_for_kernels(recipe, x, weights, eps, scale, bias) -> bool:
    """Whether a fused kernel evaluates the same equation: order 2 over whole trailing axes of this array."""
    n, a, b = recipe.normalizer, recipe.a, recipe.b
    if weights is not None or b is None or a not in (None, b) or n.order != 2 or n.floor is not None or n.keep_mean:
        return False
    if not all(axis is not None and span.whole and not span.mapped for axis, span in b.bound.spans):
        return False
    scale, bias = (None if p is None else p.shape for p in (scale, bias))
    return kernels.fits(x.shape, b.bound.whole, scale, bias, x.dtype, eps.shape, jax.typeof(x).sharding.spec)


def _by_kernel(recipe, x, eps, scale, bias):
    """What `_plain` returns, from the kernels that the user switched on."""
    n = recipe.normalizer
    y, mean, var = kernels.normalize(
        x, recipe.b.bound.whole, eps, scale, bias,
        centre=recipe.a is not None, gain=n.gain, power=n.power, dtype=recipe.dtype,
    )  # fmt: skip
    v = x.astype(var.dtype)
    return y, v if mean is None else v - mean, mean, var


# The same equation with its derivative rule (`derivative.py`), for the rows that gain by it.
_ruled = derivative.with_rule(_plain)


def _weight(plan: Plan, weights: Weights | None, dtype: Any):
    """The sum of weights behind each average."""
    if weights is None:
        return moments.counts(plan, dtype)
    ones = jnp.ones(plan.bound.shape, weights.value.dtype)
    return moments.average(ones, plan, weights)[1]


def statistic_beside(given: ArrayLike, x: jax.Array, name: str, dtype: Any) -> jax.Array:
    """A statistic as an array of this dtype that broadcasts against x: a scalar, or of the rank of x.

    Raises:
      FieldError: it does not fit x.

    >>> statistic_beside(2.0, jnp.ones((1, 2)), "mean", "float32").dtype
    dtype('float32')
    """
    given = jnp.asarray(given)
    fits = given.ndim == x.ndim and all(g in (1, s) for g, s in zip(given.shape, x.shape, strict=True))
    if given.ndim and not fits:
        raise FieldError(f"a given {name} has the rank of x and broadcasts against it: found shapes "
                         f"{given.shape} and {x.shape}")  # fmt: skip
    return given.astype(dtype)


def affine(y: jax.Array, layout: str, scale: ArrayLike | None, bias: ArrayLike | None) -> jax.Array:
    """The last line of the equation, scale * y + bias, for scale and bias as `normalize` takes them.

    >>> affine(jnp.ones((1, 2)), "n c", jnp.array([2.0, 3.0]), 1.0).tolist()
    [[3.0, 4.0]]
    """
    return _affine(y, *_beside(scale, bias, y, layout, y.dtype))


def _beside(scale, bias, x, layout, dtype):
    named = (("scale", scale), ("bias", bias))
    return [None if p is None else parameter_beside(p, x, layout, name, dtype) for name, p in named]


def parameter_beside(p: ArrayLike, x: jax.Array, layout: str, name: str, dtype: Any) -> jax.Array:
    """A scale, a bias or their like as an array of this dtype that broadcasts against x.

    Args:
      p: a scalar, `[c]`, `[n, c]`, or of the rank of x.
      x: the array beside which it is laid.
      layout: name of each axis of x.
      name: of the parameter, for errors.
      dtype: of the result.

    Raises:
      FieldError: it does not fit x.

    >>> parameter_beside(jnp.ones(3), jnp.ones((2, 3, 5)), "n c t", "scale", "float32").shape
    (1, 3, 1)
    """
    p = jnp.asarray(p)
    if jnp.iscomplexobj(p) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise FieldError(f"a complex {name} does not fit a real array of dtype {x.dtype}")
    p, given = p.astype(dtype), p.shape
    if p.ndim in (0, x.ndim):
        spread = p.shape
    else:
        where = axes(layout, x.ndim)
        along = {1: ("c",), 2: ("n", "c")}.get(p.ndim, ())
        if not along or not all(axis in where for axis in along):
            raise FieldError(f'{name} of shape {p.shape} is not a scalar, [c], [n, c] or of the rank of x, for layout '
                             f'"{layout}" and shape {x.shape}')  # fmt: skip
        sizes = {where[axis][0]: size for axis, size in zip(along, p.shape, strict=True)}
        spread = tuple(sizes.get(i, 1) for i in range(x.ndim))
        p = p.reshape(spread) if list(sizes) == sorted(sizes) else p.T.reshape(spread)
    if any(s not in (1, t) for s, t in zip(spread, x.shape, strict=False)):
        raise FieldError(f'{name} of shape {given} does not broadcast against shape {x.shape}, layout "{layout}"')
    return p
