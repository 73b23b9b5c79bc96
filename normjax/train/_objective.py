"""What a step asks of a model of either library, and what is minimized of its answer; this file knows no Flax."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normjax._leaves import is_number
from normjax._paths import PyTree, path_name, path_parts
from normjax.penalty import total_penalty
from normjax.running.records import OwnAverage
from normjax.train._batch import Batch
from normjax.train._report import Metrics, Value, as_mean


class Pass(NamedTuple):
    """What one forward pass of a model gives."""

    loss: Value  # the task's
    metrics: Metrics
    penalty: jax.Array  # the sum of the layers' penalties, a scalar
    stats: PyTree  # everything that changes but the parameters, as it is afterwards
    seen: PyTree  # what the layers saw of the batch, nested dictionaries of `normjax.running.BatchRecord`


class Model(Protocol):
    """What a step asks of a model."""

    def run(self, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None) -> Pass:
        """One forward pass."""
        ...

    def keep(self, before: PyTree, after: PyTree) -> PyTree:
        """What is stored after a step, but the running statistics from before it."""

    def running(self, stats: PyTree) -> PyTree:
        """The running statistics alone, of all that is stored."""

    def merge(self, before: PyTree, after: PyTree, running: PyTree, seen: PyTree) -> PyTree:
        """What is stored after several micro-batches: `after` the last, with `running` and `seen` of each, stacked."""

    def recalibrate(self, stats: PyTree, seen: PyTree) -> PyTree:
        """What is stored, the running statistics replaced by those of all batches in `seen`, stacked."""

    def check(self, params: PyTree | None = None) -> None:
        """Raises TypeError unless the model, its loss and, where given, these parameters are of its library."""


class Found(NamedTuple):
    """What is found on the way to an objective."""

    report: Metrics  # "loss", "penalty" and the user's metrics, as the loss returned them
    weight: jax.Array | None  # of the batch among others, None where all weigh alike
    stats: PyTree
    seen: PyTree


def own_momentum(layer: Any) -> float:
    """The momentum of a layer whose stored mean and variance merge, though it leaves no record; NaN of any other."""
    merges = getattr(layer, "_averages_merge", lambda: True)  # a batch norm of Flax's has no other averages
    return layer.momentum if is_number(layer.momentum) and merges() else math.nan


def with_averages(seen: PyTree, momenta: Mapping[tuple[PyTree, ...], float]) -> PyTree:
    """What the layers saw, and, of those that left nothing, how they average: their momentum by path, NaN if not known."""
    seen = jax.tree.map(lambda a: a, seen)  # a copy
    for path, momentum in momenta.items():
        node = seen
        for name in path:
            node = node.setdefault(name, {})
        if not math.isnan(momentum):
            node.setdefault("batch", OwnAverage(float(momentum)))
    return seen


def weighted_penalty(penalties: PyTree, weights: Mapping[str, ArrayLike] | None, params: PyTree) -> jax.Array:
    """The sum of the layers' penalties; ValueError where a weight matches none of them.

    A model without penalties, such as one whose `l1` is 0 for once, may have weights for layers that it has.
    """
    paths = [path_parts(path) for path, _ in jax.tree_util.tree_leaves_with_path(penalties)]
    layers = paths or [path_parts(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name in weights or ():
        if not any(name in path for path in layers):
            found = ", ".join(sorted({repr("/".join(path)) for path in paths})) or "none"
            raise ValueError(f"penalty_weights name {name!r}, which matches no penalty; the penalties are {found}")
    return total_penalty(penalties, weights)


def objective(
    model: Model, parts: int, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, Found]:
    """What is minimized, times the weight of the batch, which is one of `parts`, and what is found on the way."""
    found = model.run(params, stats, batch, key)
    if taken := {"loss", "penalty"} & set(found.metrics):
        raise ValueError(f"the step itself reports {sorted(taken)}; give the metrics of `loss` other names")
    report = {"loss": found.loss, "penalty": found.penalty, **found.metrics}
    total, weight = as_mean(found.loss, parts)
    penalty = found.penalty.astype(total.dtype)
    value = total + penalty if weight is None else total + weight.astype(total.dtype) * penalty
    return value, Found(report, weight, found.stats, found.seen)


def require_alike(before: PyTree, after: PyTree, who: str) -> None:
    """Raises ValueError where a step changed the structure of what is carried on, by micro-batches or by an epoch."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in (before, after))
        old, new = ({path_name(path) for path, _ in found} for found in leaves)
        changed = ", ".join(sorted(old ^ new)) or "containers"
        raise ValueError(
            f"what is stored changes in a step ({changed}), so that {who} cannot carry it on: create every variable in "
            "init, and leave collections that are sown out of `State.stats` (`call(..., mutable=[...])` returns them)"
        )


def carried(before: PyTree, after: PyTree) -> PyTree:
    """What one micro-batch stored, for the next; ValueError where the next one cannot take it."""
    require_alike(before, after, "micro-batches")
    old, new = jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after)
    for (path, b), a in zip(old, new, strict=True):
        if jnp.shape(b) != jnp.shape(a):
            raise ValueError(
                f"{path_name(path)} has the shape {jnp.shape(b)} before a micro-batch and {jnp.shape(a)} after it, so that "
                "the next cannot take it: let its shape be independent of the number of examples, or take micro_batches=1"
            )
    return jax.tree.unflatten(jax.tree.structure(before), new)
