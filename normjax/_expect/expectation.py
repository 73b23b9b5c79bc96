"""E, the average over a field, as one frozen value: what `theory.statistics` and `theory.output` are handed."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normjax._expect import extremes
from normjax._expect.arrays import Weights, as_weights, require_float, statistics_dtype, zero_masked
from normjax._expect.average import average, counts
from normjax._expect.binding import Plan, bind
from normjax._leaves import check_window
from normjax.field import Field
from normjax.theory import top


@dataclass(frozen=True)
class OverFields:
    """E for the fields of one normalizer and one array. A field is bound, or refused, when it is first averaged over.

    Without a mask it is static and hashable, so that a derivative rule can take it as an argument that is not traced.
    `recentred`: the moment of order 2 sheds the square of what rounding left of the mean, E[v] ** 2. For y = x / d, where
    an error of d counts |x| times; only where the mean is that of the array, over the same field.
    """

    layout: str
    shape: tuple[int, ...]  # of the array, or of one shard or mapped example of it
    border: str = "truncate"
    window: str = "box"
    lean: str = "after"
    weights: Weights | None = None  # what is averaged is zero at masked positions already: `only`
    recentred: bool = False

    def plan(self, field: Field) -> Plan:
        """The field bound to the array, and what its windows do."""
        return Plan(bind(field, self.layout, self.shape), self.border, self.window, self.lean)

    def only(self, x: jax.Array) -> jax.Array:
        """The array with zeros at masked positions."""
        return zero_masked(x, self.weights)

    def __call__(self, x: jax.Array, field: Field, order: float | top | None = None) -> jax.Array:
        """E_field[x], or with an order the moment E_field[|x| ** order]; x may be shorter than the array, of length 1."""
        plan = self.plan(field)
        named = {axis for axis, _ in plan.bound.spans}
        x = jnp.broadcast_to(x, [self.shape[i] if i in named else size for i, size in enumerate(x.shape)])
        if order is None:
            return average(x, plan, self.weights)[0]
        if order == 2:
            m = average(_square(x), plan, self.weights)[0]
            if self.recentred and plan.bound.pooled:
                m = jnp.maximum(m - _square(average(x, plan, self.weights)[0]), 0)
            return m
        a = jnp.abs(x)
        if isinstance(order, top):
            return extremes.mean_of_largest(a, order.k, plan, self.weights)
        if order == math.inf:
            return extremes.largest(a, plan)
        if order != 1:
            # |v| ** p has no finite slope at 0 for p < 1, and JAX's power has none for a traced 0 either.
            a = jnp.where(a == 0, 0, jnp.where(a == 0, 1, a) ** order)
        return average(a, plan, self.weights)[0]

    def weight(self, field: Field, dtype: DTypeLike) -> ArrayLike:
        """The sum of weights behind each average over a field."""
        plan = self.plan(field)
        if self.weights is None:
            return counts(plan, dtype)
        return average(jnp.ones(self.shape, self.weights.value.dtype), plan, self.weights)[1]


def _square(v: jax.Array) -> jax.Array:
    return lax.square(v) if not jnp.iscomplexobj(v) else lax.square(v.real) + lax.square(v.imag)


def expect(
    x: ArrayLike,
    field: str | Field,
    layout: str = "n ... c",
    *,
    border: str = "truncate",
    window: str = "box",
    lean: str = "after",
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Averages x over a field: E_field[x].

    The result has the rank of x and the dtype float32 or wider: axes that are averaged whole have length 1, all others
    keep theirs. float16 and bfloat16 are averaged in float32. [units u]

    Args:
      x: array of a real or complex floating dtype, axes as named by `layout`. [units u]
      field: a Field or its string, such as `"...:5 c"`.
      layout: name of each axis of x; `...` matches any number of axes.
      border: past the edge, windows see nothing ("truncate"), or zeros ("zero": division by the full width).
      window: "box", or "gaussian" with standard deviation width / 4, cut at the width.
      lean: the side on which a window of even width has its extra element, "after" or "before".
      mask: boolean or non-negative weights that broadcast against x; zero leaves x out, a field without weight is 0.

    Raises:
      FieldError: the field names an axis that the layout lacks, groups do not divide it, or a mapped axis is unbound.
      TypeError: x holds integers.

    Source: Ren et al. 2017, section 3 (E_A and E_B); border "zero": Krizhevsky et al. 2012, section 3.3.

    >>> x = jnp.arange(5.0)
    >>> expect(x, "c", "c")
    Array([2.], dtype=float32)
    >>> expect(x, "c:3", "c").tolist()
    [0.5, 1.0, 2.0, 3.0, 3.5]
    >>> expect(x, "c:3", "c", mask=x > 1).tolist()
    [0.0, 2.0, 2.5, 3.0, 3.5]
    >>> expect(jnp.ones((2, 4, 8)), "c", layout="n t c").shape
    (2, 4, 1)
    """
    x = require_float(x, "expect")
    check_window(border, window, lean)
    x = x.astype(statistics_dtype(x.dtype))
    E = OverFields(layout, x.shape, border, window, lean, as_weights(mask, x))
    return E(E.only(x), Field.parse(field))
