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

The lines are functions: `statistics` and `output`, which are handed E, and `scale_and_shift`. How E is evaluated is the
business of `_expect/`; who evaluates the equation (as it stands, by a derivative rule, by a kernel) that of `_normalize/`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from normjax import _leaves
from normjax._leaves import Frozen, as_python, check_window, finite, inverse_power, is_number, shortest_repr
from normjax.field import Field, Parsed


@dataclass(frozen=True)
class top:
    """The order of a moment that is the mean of the k largest |v| (Hoffer et al. 2018, section 4).

    >>> Normalizer("n", "n", order=top(10), power=1.0)
    Normalizer('n', 'n', power=1.0, order=top(k=10))
    """

    k: int


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

    mean: Parsed = Parsed()  # noqa: RUF009 (a descriptor, not a value)
    var: Parsed = Parsed()  # noqa: RUF009
    _: KW_ONLY
    eps: float = 1e-5
    gain: float = 1.0
    power: float = 0.5
    order: float | top = 2
    floor: Parsed = Parsed(None)  # noqa: RUF009
    border: str = "truncate"
    window: str = "box"
    lean: str = "after"
    keep_mean: bool = False

    def __post_init__(self):
        check_window(self.border, self.window, self.lean)
        for name in ("eps", "gain", "power", "order"):
            value = as_python(getattr(self, name))
            object.__setattr__(self, name, value if name == "order" else finite(name, value))
        number = self.order.k if isinstance(self.order, top) else self.order
        if not is_number(number) or not number > 0 or (number is not self.order and not isinstance(number, int)):
            raise ValueError(f"order is a positive number, inf or top(k); found {self.order!r}")

    def __repr__(self) -> str:
        return shortest_repr(self)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields that are not None: A, B and the floor."""
        return tuple(f for f in (self.mean, self.var, self.floor) if f is not None)

    def local(self) -> "Normalizer":
        """The normalizer without its mapped axes: what it does to one shard alone."""

        def strip(field: Field | None) -> Field | None:
            return None if field is None else field.local() or Field(())

        return replace(self, mean=strip(self.mean), var=strip(self.var), floor=strip(self.floor))


# fmt: off
TABLE: Mapping[str, Normalizer] = Frozen({
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
    >>> row("divisve")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: no normalizer is called 'divisve'; did you mean 'divisive'? TABLE has batch, layer, token, ...
    """
    if isinstance(normalizer, Normalizer):
        return normalizer
    if not isinstance(normalizer, str):
        raise TypeError(f"a normalizer is a Normalizer or a name in TABLE, found {type(normalizer).__name__}")
    if normalizer in TABLE:
        return TABLE[normalizer]
    hint = "".join(f"did you mean {name!r}? " for name in difflib.get_close_matches(normalizer, TABLE, 1))
    raise ValueError(f"no normalizer is called {normalizer!r}; {hint}TABLE has {', '.join(TABLE)}")


class Stats(NamedTuple):
    """The moments that normalized an array, each broadcasting against it, None where its field is None.

    Attributes:
      mean: E_A[x]. [u]
      var: the moment m = E_B[|v| ** order], before eps, gain and power. [u ** order; u for inf and top(k)]
      mean_weight: number of elements (sum of weights) behind each mean; where the mean was given, what came with it.
      var_weight: number of elements (sum of weights) behind each var; where var was given, what came with it.
    """

    mean: Any = None
    var: Any = None
    mean_weight: Any = None
    var_weight: Any = None


class Expectation(Protocol):
    """E over what is zero where masked: `E(x, F)` is the average E_F[x], `E(v, F, order)` the moment E_F[|v| ** order].

    Both broadcast against x. `E.only(x)` is x with zeros at masked positions.
    """

    def __call__(self, x: Array, field: Field, order: float | top | None = None) -> Array: ...  # noqa: D102 (above)
    def only(self, x: Array) -> Array: ...  # noqa: D102 (above)


def statistics(
    x: Array, n: Normalizer, E: Expectation, mean: Array | None = None, moment: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """The first two lines of the equation: `(v, mean, moment)`. A mean or a moment that is given stands.

    >>> from normjax._expect.expectation import OverFields
    >>> statistics(jnp.array([1.0, 3.0]), Normalizer("c", "c"), OverFields("c", (2,)))
    (Array([-1.,  1.], dtype=float32), Array([2.], dtype=float32), Array([1.], dtype=float32))
    """
    if mean is None and n.mean is not None:
        mean = _leaves.nan_if_infinite(E(x, n.mean)) if n.var is None else E(x, n.mean)  # the moment tells
    v = x if mean is None else E.only(x - mean)
    if moment is None and n.var is not None:
        moment = _leaves.nan_if_infinite(E(v, n.var, n.order), n.gain)
    return v, mean, moment


def output(x: Array, v: Array, moment: Array | None, n: Normalizer, E: Expectation, eps: Array | None = None) -> Array:
    """The next two lines: v (or x) over the denominator; `eps`, where it is given, stands for the row's number.

    v is handed in, since a second x - mean would be one more array of the size of x to differentiate.

    >>> from normjax._expect.expectation import OverFields
    >>> output(jnp.ones(2), jnp.array([-1.0, 1.0]), jnp.array([4.0]), Normalizer("c", "c"), OverFields("c", (2,)))
    Array([-0.49999937,  0.49999937], dtype=float32)
    """
    y = x if n.keep_mean else v
    if moment is None:
        return y
    q, power, positive = smoothed(moment, n, eps), n.power, is_positive(n, eps)
    if n.floor is not None:
        d = q if power == 1 else q * inverse_power(q, 1 - power)
        q, power, positive = jnp.maximum(d, E(E.only(d), n.floor)), 1.0, False
    return y * inverse_power(q, power, positive).astype(y.dtype)


def scale_and_shift(y: Array, scale: Array | None, bias: Array | None) -> Array:
    """The last line, scale * y + bias; None leaves either out.

    >>> scale_and_shift(jnp.ones(1), 2 * jnp.ones(1), None).tolist()
    [2.0]
    """
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def smoothed(moment: Array, n: Normalizer, eps: Array | None = None) -> Array:
    """The base of the denominator, q = eps + gain * m.

    >>> smoothed(jnp.ones(1), Normalizer(None, "c", eps=2.0, gain=0.5)).tolist()
    [2.5]
    """
    return (n.eps if eps is None else eps) + n.gain * moment


def is_positive(n: Normalizer, eps: Array | None = None) -> bool:
    """Whether the number eps of the row alone keeps the denominator from zero; of a traced eps nothing is known.

    >>> is_positive(TABLE["batch"]), is_positive(Normalizer("c", "c", eps=0.0))
    (True, False)
    """
    return eps is None and n.eps > 1e-30
