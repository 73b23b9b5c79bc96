"""Micro-batches: gradients, metrics and what is stored, as of the whole batch."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax._paths import PyTree, path_name
from normjax.train._batch import Batch, in_order
from normjax.train._objective import Found, Model, carried, objective
from normjax.train._report import Metrics, joined, pooled, quotient, wide, wide_dtype


class Split(NamedTuple):
    """A batch in parts: the arrays `[parts n/parts ...]`, and what makes the batch of a part of each of them."""

    arrays: list[jax.Array]
    join: Callable[[list[jax.Array]], Batch]

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.arrays[0])

    @property
    def size(self) -> int:
        """How many examples each has."""
        return self.arrays[0].shape[1]

    def whole(self) -> list[jax.Array]:
        """The arrays `[n ...]` of the whole batch."""
        return [in_order(a) for a in self.arrays]


def accumulate(
    model: Model, params: PyTree, stats: PyTree, parts: Split, key: jax.Array | None
) -> tuple[jax.Array, PyTree, Metrics, PyTree]:
    """Objective, gradient and metrics of all parts together, and what is stored after them.

    Running statistics start every part from those before the step, and are merged; anything else goes from part to part.
    """
    evaluate = functools.partial(objective, model, parts.number)
    gradient = jax.value_and_grad(evaluate, has_aux=True)

    def one(carry: PyTree, numbered: tuple[jax.Array, list[jax.Array]]) -> tuple[PyTree, PyTree]:
        (total, rest), (number, arrays) = carry, numbered
        with _of_examples(stats, parts):
            (value, found), grads = gradient(params, rest, parts.join(arrays), _own(key, number))
        # Sums of many parts lose what is small in a narrow dtype: in bfloat16 a sum of ones ends at 256.
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        left = value, found.report, found.weight, model.running(found.stats), found.seen
        return (total, _next(model, stats, found)), left

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide_dtype(p.dtype)), params)
    (total, after), (values, report, weights, running, seen) = lax.scan(one, (zeros, stats), _numbered(parts))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), _divided(total, weights, parts.number), params)
    value = _divided(jnp.sum(values), weights, parts.number)
    if any(parts.size in jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(report)):  # perhaps of examples
        whole = jax.eval_shape(lambda: evaluate(params, stats, parts.join(parts.whole()), key)[1].report)
        report = joined(report, whole)
    return value, grads, pooled(report, weights), model.merge(stats, after, running, seen)


@contextlib.contextmanager
def _of_examples(stats: PyTree, parts: Split) -> Iterator[None]:
    """Says which of what is stored has an axis of examples, where a part of them does not fit it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        count = parts.number * parts.size
        leaves = jax.tree_util.tree_leaves_with_path(stats)
        stored = {path_name(path): jnp.shape(a) for path, a in leaves if jnp.shape(a)[:1] == (count,)}
        if not stored:
            raise
        named = ", ".join(f"{name} of shape {shape}" for name, shape in stored.items())
        raise ValueError(
            f"a micro-batch of {parts.size} examples fails, perhaps since what is stored has an axis of the {count} of the "
            f"whole batch: {named}; let it be independent of the number of examples, or take micro_batches=1"
        ) from error


def value_of(model: Model, stats: PyTree, parts: Split, key: jax.Array | None, params: PyTree) -> jax.Array:
    """The objective of all parts together at other parameters; nothing is stored."""
    evaluate = functools.partial(objective, model, parts.number)

    @jax.checkpoint  # a search along a line differentiates this: one part is in memory at a time
    def one(rest: PyTree, numbered: tuple[jax.Array, list[jax.Array]]) -> tuple[PyTree, PyTree]:
        number, arrays = numbered
        value, found = evaluate(params, rest, parts.join(arrays), _own(key, number))
        return _next(model, stats, found), (value, found.weight)

    _, (values, weights) = lax.scan(one, stats, _numbered(parts))
    return _divided(jnp.sum(values), weights, parts.number)


def _own(key: jax.Array | None, number: jax.Array) -> jax.Array | None:
    """The key of a part."""
    return None if key is None else jax.random.fold_in(key, number)


def _numbered(parts: Split) -> tuple[jax.Array, list[jax.Array]]:
    return jnp.arange(parts.number), parts.arrays


def _next(model: Model, before: PyTree, found: Found) -> PyTree:
    """What the next part starts from."""
    return carried(before, model.keep(before, found.stats))


def _divided(sums: PyTree, weights: jax.Array | None, count: int) -> PyTree:
    """Sums over the parts, divided by their weights."""
    if weights is None:
        return jax.tree.map(lambda a: a / count, sums)
    return jax.tree.map(lambda a: quotient(a, jnp.sum(wide(weights), 0)), sums)
