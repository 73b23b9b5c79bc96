"""What the theory stands on: checks of arguments, a table that refuses writes, powers that are zero at zero."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental.jet import jet_rules
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

K = TypeVar("K")
V = TypeVar("V")


def one_of(name: str, value: object, accepted: tuple) -> None:
    """Raises ValueError unless the value is one of those accepted."""
    if value not in accepted:
        raise ValueError(f"{name} is one of {', '.join(map(repr, accepted))}; found {value!r}")


def check_window(border: str, window: str, lean: str) -> None:
    """Raises ValueError unless these three words say what a sliding window does."""
    one_of("border", border, ("truncate", "zero"))
    one_of("window", window, ("box", "gaussian"))
    one_of("lean", lean, ("after", "before"))


def as_python(value: Any) -> Any:
    """A number of NumPy, or the numbers of a dataclass, as Python's, whose repr evaluates back; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return dataclasses.replace(value, **{f.name: as_python(getattr(value, f.name)) for f in dataclasses.fields(value)})


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether this is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(name: str, value: object) -> float:
    """The value; ValueError unless it is a finite number of at least 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is a finite number of at least 0; found {value!r}")
    return value


def split_eps(eps: Any) -> tuple[float, Any]:
    """An eps as the number of a row, and what is to be given at the evaluation: None, or an eps that only a run knows."""
    if isinstance(eps, Tracer):
        return 1.0, eps  # a row is static; while eps is given, its own number is not read
    number: Any = eps.item() if isinstance(eps, np.ndarray | jax.Array) and eps.size == 1 else eps
    return number, None


def known_numbers(value: object) -> np.ndarray | None:
    """The numbers of an array that this process can read without waiting for an accelerator; None inside of `jit`.

    >>> known_numbers(jnp.ones(2)).tolist(), jax.jit(lambda x: jnp.array(known_numbers(x) is None))(jnp.ones(1)).item()
    ([1.0, 1.0], True)
    """
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and any(device.platform != "cpu" for device in value.devices()):
        return None
    return None if isinstance(value, jax.Array) and not value.is_fully_addressable else np.asarray(value)


def refuse_unless(name: str, accepted: str, value: object, accepts: Callable[[np.ndarray], np.ndarray]) -> None:
    """Raises ValueError for known numbers of which one is not accepted; says the first."""
    numbers = known_numbers(value)
    if numbers is None or (right := accepts(numbers)).all():
        return
    raise ValueError(f"{name} {accepted}; found {numbers[~right].ravel()[0]}")


@dataclasses.dataclass(frozen=True)
class Within:
    """The numbers that an argument takes, from `least` to `most`, both included; called with its name, it refuses others.

    NumPy's and JAX's numbers are taken like Python's, truth values are not. What is traced passes, since its value is not
    known; of an array every element counts. The type of a layer's option says it: `Annotated[float, Within(0, 1)]`.

    Attributes:
      least: the least number.
      most: the largest; where it is infinite, infinity itself is refused.

    >>> Within(0, 1)("momentum", 0.9)
    0.9
    >>> Within(0, 1)("momentum", 1.5)
    Traceback (most recent call last):
    ...
    ValueError: momentum is a number from 0 to 1; found 1.5
    """

    least: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"a number from {self.least} to {self.most}"
        return "a finite number" + ("" if self.least == -math.inf else f" of at least {self.least}")

    def __call__(self, name: str, value: Any) -> Any:
        """The value; TypeError or ValueError, with the name of the argument, for what is not among the numbers."""
        found = np.asarray(None) if isinstance(value, Sequence) else known_numbers(value)
        if found is None:
            return value
        if not (jnp.issubdtype(found.dtype, np.floating) or jnp.issubdtype(found.dtype, np.integer)):
            raise TypeError(f"{name} is {self}; found {value!r}")
        beyond = found < math.inf if self.most == math.inf else found <= self.most
        if not np.all((found >= self.least) & (found > -math.inf) & beyond):
            raise ValueError(f"{name} is {self}; found {value!r}")
        return as_python(value)


class Whole(Within):
    """The integers that an argument takes, from `least` on; they come back as Python's.

    >>> Whole(1)("window", np.int64(3))
    3
    """

    def __str__(self) -> str:
        return "an integer" + ("" if self.least == -math.inf else f" of at least {self.least}")

    def __call__(self, name: str, value: Any) -> int:
        """The value; TypeError or ValueError, with the name of the argument, for what is not among the integers."""
        number = as_integer(value)
        if number is None:
            raise TypeError(f"{name} is {self}; found {value!r}")
        if number < self.least:
            raise ValueError(f"{name} is {self}; found {value!r}")
        return number


INTEGER = Whole()
COUNT = Whole(1)
AMOUNT = Within(0)
SHARE = Within(0, 1)


def as_integer(value: Any) -> int | None:
    """An integer of Python, NumPy or JAX, arrays of one included, as Python's; None for anything else, and truth values."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def integers(name: str, values: int | Iterable[int], count: int = 1) -> tuple[int, ...]:
    """Several integers, such as the numbers of axes, as a tuple of Python's; one stands for so many of it.

    >>> integers("axis", np.int64(-1)), integers("strides", 2, 3), integers("axis", [np.int32(0), 2])
    ((-1,), (2, 2, 2), (0, 2))
    """
    one = as_integer(values)
    if one is not None:
        return (one,) * count
    if not isinstance(values, Iterable) or isinstance(values, str) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name} is an integer, or several; found {values!r}")
    return tuple(INTEGER(name, value) for value in values)


def shortest_repr(instance: "DataclassInstance") -> str:
    """The repr of a dataclass that evaluates back, without what is at its default; a parsed field as its string."""
    shown = []
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        text = "float('inf')" if value == math.inf else repr(value)
        text = text[len("Field.parse(") : -1] if text.startswith("Field.parse(") else text
        if not f.kw_only or value != f.default:
            shown.append(f"{f.name}={text}" if f.kw_only else text)
    return f"{type(instance).__name__}({', '.join(shown)})"


class Frozen(Mapping[K, V]):
    """A mapping that refuses writes, and that pickles and copies, as `types.MappingProxyType` does not."""

    def __init__(self, items: Mapping[K, V]):
        self._items = dict(items)

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items!r})"


def inverse_power(
    q: jax.Array, power: float, positive: bool = False, inverse_root: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """The power q ** -power, zero where q is zero; by square roots where they do, since a general power is slow.

    `positive` promises that q is positive: a select would break a chain that XLA:CPU computes in one pass. `inverse_root`
    stands in for the one here, which compilers of kernels do not know.
    """
    inverse_root = inverse_root or _inverse_root
    if not positive:
        nonzero = (q > 0) | jnp.isnan(q)
        return jnp.where(nonzero, inverse_power(jnp.where(nonzero, q, 1), power, True, inverse_root), 0)
    if power == 0.5:
        return inverse_root(q)
    if power == 0.75:
        root = inverse_root(q)
        return root * lax.sqrt(root)
    return 1 / q if power == 1 else q**-power


_inverse_root_p = Primitive("inverse_root")  # a primitive, since Taylor mode cannot see through a `jax.custom_jvp`


def _inverse_root(q: jax.Array) -> jax.Array:
    """The power q ** -0.5, whose derivatives of all orders hold no power of q that it does not hold itself.

    JAX's own take q ** -2 from the second on, which is infinite for a q of 1e-20, and infinity times a tangent of 0 is NaN.
    Here tangents come first: what they are multiplied by, one by one, is the root.
    """
    return _inverse_root_p.bind(q)


def _root_tangent(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array | ad.Zero]:
    root, (dq,) = _inverse_root(*primals), tangents
    return root, ad.Zero(root.aval) if type(dq) is ad.Zero else ((dq * root) * root) * (-0.5 * root)


_inverse_root_p.def_impl(lax.rsqrt)
_inverse_root_p.def_abstract_eval(lambda q: q)
ad.primitive_jvps[_inverse_root_p] = _root_tangent
batching.defvectorized(_inverse_root_p)
mlir.register_lowering(_inverse_root_p, mlir.lower_fun(lax.rsqrt, multiple_results=False))
jet_rules[_inverse_root_p] = jet_rules[lax.rsqrt_p]


def nan_if_infinite(q: jax.Array, gain: float = 1.0) -> jax.Array:
    """A statistic q; NaN where gain * q has overflowed, since dividing by infinity would give a zero that nobody notices.

    >>> nan_if_infinite(jnp.array([1.0, jnp.inf, 1e38]), 10.0).tolist()
    [1.0, nan, nan]
    """
    used = lax.stop_gradient(gain * q)
    return q + (used - used)  # not 0 * used, which compilers may multiply out


def safe_root(q: jax.Array) -> jax.Array:
    """The square root, with slope 0 at 0 in place of an infinite one; NaN of NaN.

    >>> jax.vmap(jax.grad(safe_root))(jnp.array([0.0, 4.0]))
    Array([0.  , 0.25], dtype=float32)
    """
    nonzero = (q > 0) | jnp.isnan(q)
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, q, 1)), 0)
