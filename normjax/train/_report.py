"""What a loss reports of a batch: its value and metrics, plain, or as sums of which several parts make those of a whole."""

import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import statistics_dtype
from normjax._paths import PyTree, path_name
from normjax.train._batch import Batch, bare_batch, in_order


class Mean(NamedTuple):
    """A mean as a sum and a weight, as a loss returns it where the parts of a batch do not weigh alike.

    A mean over tokens under a mask is `Mean(jnp.sum(error * mask), jnp.sum(mask))`. A step reports the quotient, 0 where
    nothing weighs. Micro-batches add sums and weights and then divide, so that loss, gradient and metrics are those of
    the whole batch. Of a loss the weights also weigh the penalties of the parts and its metrics that are plain numbers.

    Attributes:
      total: the sum of what is averaged, times its weights; of a loss a scalar, of a metric of any shape.
      weight: the sum of the weights, such as a count; a scalar, or of the shape of `total`. No gradient goes through it.

    >>> from flax import linen as nn
    >>> import optax
    >>> from normjax.train import linen_init, linen_step
    >>> def loss(call, batch, train):
    ...     error = (call(batch["x"])[..., 0] - batch["y"]) ** 2
    ...     return Mean(jnp.sum(error * batch["mask"]), jnp.sum(batch["mask"])), {}
    >>> batch = {"x": jnp.ones((2, 3, 1)), "y": jnp.array([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])}
    >>> batch["mask"] = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])                # three tokens, and one
    >>> model = nn.Dense(1, kernel_init=nn.initializers.zeros)
    >>> state = linen_init(model, optax.sgd(1.0), jax.random.key(0), batch["x"])
    >>> after, metrics = linen_step(model, loss, optax.sgd(1.0), micro_batches=2)(state, batch)
    >>> metrics["loss"].item(), after.params["bias"].item()                         # the means of 1, 4, 9, 16 and 2, 4, 6, 8
    (7.5, 5.0)
    """

    total: ArrayLike
    weight: ArrayLike


class Sum(NamedTuple):
    """A sum, such as a count of hits: micro-batches add it, where they average a plain number.

    Attributes:
      total: the sum over a batch; of a loss a scalar, of a metric of any shape.

    >>> from flax import linen as nn
    >>> import optax
    >>> from normjax.train import linen_init, linen_step
    >>> def loss(call, batch, train):
    ...     return jnp.mean(call(batch)), {"largest": jnp.max(batch), "positive": Sum(jnp.sum(batch > 0))}
    >>> x = jnp.array([[1.0], [-1.0], [2.0], [3.0]])
    >>> state = linen_init(nn.Dense(1), optax.sgd(0.1), jax.random.key(0), x)
    >>> _, metrics = linen_step(nn.Dense(1), loss, optax.sgd(0.1), micro_batches=2)(state, x)
    >>> metrics["largest"].item(), metrics["positive"].item()                # 2 and 3 of the parts, averaged
    (2.5, 3)
    """

    total: ArrayLike


Value: TypeAlias = ArrayLike | Mean | Sum
Metrics: TypeAlias = dict[str, PyTree]  # numbers by name, mostly: what a loss reports of a batch
Asked = TypeVar("Asked")
Asks = TypeVar("Asks", contravariant=True)


class KeyedLoss(Protocol[Asks]):
    """A loss that takes a key for random numbers of its own, `loss(model, batch, train, key)`.

    >>> def loss(call, batch, train, key):
    ...     noise = 0.0 if key is None else 0.1 * jax.random.normal(key, batch["x"].shape)
    ...     return jnp.mean(call(batch["x"] + noise) ** 2), {}
    >>> keyed: KeyedLoss = loss
    """

    def __call__(self, model: Asks, batch: Batch, train: bool, /, *, key: jax.Array) -> tuple[Value, Metrics]:
        """The loss of a batch and its metrics; the key is None in evaluation without one."""
        ...


Loss: TypeAlias = Callable[[Asked, Batch, bool], tuple[Value, Metrics]] | KeyedLoss[Asked]
"""`loss(model, batch, train)`: the loss of a batch, a scalar, and metrics; the model is a function or an nnx module."""


def require_loss(loss: Callable[..., PyTree], maker: str) -> None:
    """Raises TypeError unless this may be a loss: a function, and no model."""
    if not callable(loss) or hasattr(loss, "init"):
        raise TypeError(f"{maker} takes a function `loss(model, batch, train)` second; found {type(loss).__name__}")


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for each name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def takes_key(loss: Callable[..., PyTree]) -> inspect.Parameter | None:
    """The argument `key` of a loss, if it has one."""
    try:
        return inspect.signature(loss).parameters.get("key")
    except (TypeError, ValueError):  # what is compiled has no signature
        return None


def ask(loss: Callable[..., PyTree], model: PyTree, batch: Batch, train: bool, key: jax.Array | None) -> PyTree:
    """What the loss says of a batch: its value and its metrics, checked."""
    keys = {}
    if (argument := takes_key(loss)) is not None and not (key is None and argument.default is not argument.empty):
        if key is None and train:
            raise ValueError("the loss takes a key: give the step one, `step(state, batch, key)`")
        keys = {"key": None if key is None else named_key(key, "loss")}
    found = loss(model, bare_batch(batch), train, **keys)
    if not isinstance(found, tuple | list) or isinstance(found, Mean | Sum) or len(found) != 2:
        raise TypeError(f"loss returns a value and a dictionary of metrics, `return value, {{}}`; found {_said(found)}")
    if not isinstance(found[1], Mapping):
        raise TypeError(f"the metrics of the loss are a dictionary, which may be empty; found {_said(found[1])}")
    return found


def _said(found: object) -> str:
    """A value that a loss returned, in words."""
    if isinstance(found, tuple | list) and not hasattr(found, "_fields"):
        return f"a {type(found).__name__} of {len(found)}"
    return f"an array of shape {jnp.shape(found)}" if isinstance(found, jax.Array) else type(found).__name__


def as_mean(value: Value, parts: int = 1) -> tuple[jax.Array, jax.Array | None]:
    """Sum and weight of the loss of one of `parts` micro-batches; weight None where the parts weigh alike."""
    total = wide(value.total if isinstance(value, Mean | Sum) else value)
    weight = lax.stop_gradient(wide(value.weight)) if isinstance(value, Mean) else None
    for a in (total, total if weight is None else weight):
        if a.shape:
            raise TypeError(f"the value of a loss is a scalar, as `jnp.mean` gives it; found shape {a.shape}")
    return (total * parts, None) if isinstance(value, Sum) else (total, weight)


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype in which numbers of this one are added: float32 or wider."""
    return statistics_dtype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else np.dtype(np.float32)


def wide(a: ArrayLike) -> jax.Array:
    """A number as float32 or wider."""
    a = jnp.asarray(a)
    return a.astype(wide_dtype(a.dtype))


def quotient(total: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean, 0 where nothing weighs."""
    weight = jnp.broadcast_to(weight, total.shape).astype(total.dtype)
    return jnp.where(weight != 0, total / jnp.where(weight != 0, weight, 1), 0)


def _is_report(leaf: object) -> bool:
    return isinstance(leaf, Mean | Sum)


def settled(report: PyTree) -> PyTree:
    """The loss or the metrics of a batch as plain numbers."""

    def one(leaf: PyTree) -> PyTree:
        if isinstance(leaf, Mean):
            return quotient(wide(leaf.total), wide(leaf.weight))
        return _added(jnp.asarray(leaf.total)[None]) if isinstance(leaf, Sum) else leaf

    return jax.tree.map(one, report, is_leaf=_is_report)


class Examples(NamedTuple):
    """A metric of every example of a batch, in their order."""

    values: jax.Array


def joined(report: PyTree, whole: PyTree) -> PyTree:
    """Metrics of parts, stacked along a first axis, where those with a number for every example are put in their order.

    `whole` are those of the whole batch, as far as their shapes go; ValueError names one that parts cannot give.
    """

    def one(path: jax.tree_util.KeyPath, part: PyTree, all_: PyTree) -> PyTree:
        sizes = [(jnp.shape(p)[1:], jnp.shape(w)) for p, w in zip(*map(jax.tree.leaves, (part, all_)), strict=True)]
        if all(p == w for p, w in sizes):
            return part
        (p, w), number = sizes[0], len(jax.tree.leaves(part)[0])
        if _is_report(part) or (p[0] * number, *p[1:]) != w:
            raise ValueError(
                f"metric {path_name(path)} has the shape {w} of a whole batch and {p} of a micro-batch: sum or average over "
                "the examples, or give one number, or one array, for each along the first axis"
            )
        return Examples(in_order(part))

    return jax.tree_util.tree_map_with_path(one, report, whole, is_leaf=_is_report)


def pooled(report: PyTree, weights: jax.Array | None) -> PyTree:
    """The metrics of a whole batch, plain numbers, of those of its parts, stacked along a first axis.

    `weights` `[parts]` are those of plain numbers; None weighs them alike.
    """

    def one(leaf: PyTree) -> jax.Array:
        if isinstance(leaf, Mean):
            return quotient(jnp.sum(wide(leaf.total), 0), jnp.sum(wide(leaf.weight), 0))
        if isinstance(leaf, Sum):
            return _added(leaf.total)
        if isinstance(leaf, Examples):
            return leaf.values
        leaf = jnp.asarray(leaf)
        values = wide(leaf)
        if weights is None:
            mean = jnp.mean(values, 0)
        else:
            each = jnp.broadcast_to(weights.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf.shape).astype(values.dtype)
            # A part of weight 0 may have nothing to report: 0/0.
            mean = quotient(jnp.sum(jnp.where(each != 0, each * values, 0), 0), jnp.sum(each, 0))
        return mean.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else mean

    return jax.tree.map(one, report, is_leaf=lambda leaf: _is_report(leaf) or isinstance(leaf, Examples))


def _added(totals: ArrayLike) -> jax.Array:
    """The sum over the first axis: integers as integers, anything else as float32 or wider."""
    totals = jnp.asarray(totals)
    exact = jnp.issubdtype(totals.dtype, jnp.integer) or totals.dtype == jnp.bool_
    return jnp.sum(totals if exact else wide(totals), 0)
