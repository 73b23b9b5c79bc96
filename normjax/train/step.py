"""One training step for models of either library, many under one scan, evaluation and recalibration. Knows no Flax.

A model is asked four things (`_Model`): to run on a batch, and what becomes of its statistics after micro-batches, when
they are kept, and when they are recalibrated. `linen.py` and `nnx.py` answer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from normjax._paths import PyTree
from normjax.train.mesh import Axis, BatchSharding, as_it_came

STATISTICS = ("update", "keep", "frozen")

Asked = TypeVar("Asked")
Batch: TypeAlias = PyTree
"""Arrays with the examples along their first axis."""
Metrics: TypeAlias = dict[str, PyTree]
"""Scalars by name, mostly: what a loss reports of a batch."""
Loss: TypeAlias = Callable[[Asked, Batch, bool], tuple[ArrayLike, Metrics]]
"""`loss(model, batch, train)`: the loss of a batch, a scalar, and metrics; the model is a function or an nnx module."""
Evaluation: TypeAlias = Callable[["State", Batch], Metrics]
Recalibration: TypeAlias = Callable[["State", Batch, jax.Array], "State"]


class State(NamedTuple):
    """What training carries: a pytree.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: parameters; for nnx the `nnx.State` of its `nnx.Param`s.
      stats: everything else that changes: linen's other collections (`batch_stats`), nnx's other variables.
      opt_state: the state of the optax transformation.

    >>> start_state({"w": jnp.ones(3)}, {}, optax.sgd(0.1)).step
    Array(0, dtype=int32)
    """

    step: jax.Array
    params: PyTree
    stats: PyTree
    opt_state: PyTree


def start_state(params: PyTree, stats: PyTree, tx: optax.GradientTransformation) -> State:
    """The State before the first step: what is trained, everything else that changes, and the optimizer's own.

    >>> start_state({"w": jnp.ones(3)}, {}, optax.trace(0.9)).opt_state.trace
    {'w': Array([0., 0., 0.], dtype=float32)}
    """
    return State(jnp.zeros((), jnp.int32), params, stats, tx.init(params))


class Step(Protocol):
    """A training step: what `linen_step` and `nnx_step` make.

    >>> def step(state, batch, key=None):
    ...     return state._replace(step=state.step + 1), {"mean": jnp.mean(batch)}
    >>> step(State(jnp.array(0), {}, {}, ()), jnp.ones(4))[1]["mean"].item()
    1.0
    """

    def __call__(self, state: State, batch: Batch, key: jax.Array | None = None) -> tuple[State, Metrics]:
        """The state after a batch, and what the step reports: "loss", "penalty" and the user's metrics."""
        ...


class Pass(NamedTuple):
    """What one forward pass of a model gives.

    Attributes:
      loss: the task's, a scalar.
      metrics: the user's.
      penalty: the sum of the layers' penalties, a scalar.
      stats: everything that changes but the parameters, as it is afterwards.
      seen: what the layers saw of the batch, nested dictionaries of `normjax.running.BatchRecord`.

    >>> Pass(jnp.array(2.0), {}, jnp.array(0.5), {}, {}).penalty.item()
    0.5
    """

    loss: ArrayLike
    metrics: Metrics
    penalty: jax.Array
    stats: PyTree
    seen: PyTree


class _Model(Protocol):
    """What a step asks of a model of either library."""

    def run(self, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None) -> Pass:
        """One forward pass."""
        ...

    def keep(self, before: PyTree, after: PyTree) -> PyTree:
        """What is stored after a step, but the running statistics from before it."""
        ...

    def merge(self, before: PyTree, after: PyTree, seen: PyTree) -> PyTree:
        """What is stored after several micro-batches; their last state, running statistics and `seen` stacked."""
        ...

    def recalibrate(self, stats: PyTree, seen: PyTree) -> PyTree:
        """What is stored, the running statistics replaced by those of all batches in `seen`, stacked."""
        ...


def make_step(
    model: _Model, tx: optax.GradientTransformation, micro_batches: int, statistics: str, sharding: BatchSharding
) -> Step:
    """The training step of a model of either library; arguments as `linen_step` and `nnx_step` document them.

    >>> class Line:
    ...     def run(self, params, stats, batch, key):
    ...         return Pass(jnp.mean((params * batch["x"] - batch["y"]) ** 2), {}, jnp.array(0.0), stats, {})
    >>> step = make_step(Line(), optax.sgd(0.25), 1, "update", BatchSharding(None, "data"))
    >>> state = start_state(jnp.array(1.0), {}, optax.sgd(0.25))
    >>> step(state, {"x": jnp.ones(2), "y": 3 * jnp.ones(2)})[0].params
    Array(2., dtype=float32)
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics is one of {', '.join(map(repr, STATISTICS))}; found {statistics!r}")
    if micro_batches < 1:
        raise ValueError(f"micro_batches is at least 1; found {micro_batches!r}")
    gradient = jax.grad(functools.partial(_objective, model), has_aux=True)

    def step(state: State, batch: Batch, key: jax.Array | None = None) -> tuple[State, Metrics]:
        batch = sharding.constrain_batch(batch)
        if micro_batches == 1:
            grads, (metrics, stats, _) = gradient(state.params, state.stats, batch, key)
        else:
            parts = jax.tree.map(functools.partial(_split, parts=micro_batches), batch)
            parts = sharding.constrain_batch(parts, 1)
            grads, metrics, stats = _accumulate(model, gradient, state, parts, micro_batches, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stats = stats if statistics == "update" else model.keep(state.stats, stats)
        return sharding.constrain_state(State(state.step + 1, params, stats, opt_state)), metrics

    return sharding.with_auto_axes(step, as_it_came)


def _objective(
    model: _Model, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[ArrayLike, tuple[Metrics, PyTree, PyTree]]:
    """What is minimized, and beside it what is reported, what is stored afterwards and what the layers saw."""
    found = model.run(params, stats, batch, key)
    taken = {"loss", "penalty"} & set(found.metrics)
    if taken:
        raise ValueError(f"the step itself reports {sorted(taken)}; give the metrics of `loss` other names")
    metrics = {"loss": found.loss, "penalty": found.penalty, **found.metrics}
    return found.loss + found.penalty, (metrics, found.stats, found.seen)


def _split(a: jax.Array, parts: int) -> jax.Array:
    """The examples `[n ...]` as `[parts n/parts ...]`."""
    if a.shape[0] % parts:
        raise ValueError(f"a batch of {a.shape[0]} examples does not split into {parts} equal micro-batches")
    # Strided: each device keeps its own examples, where contiguous parts would lie on some of the devices.
    return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)


def _accumulate(
    model: _Model,
    gradient: Callable[..., tuple[PyTree, tuple[Metrics, PyTree, PyTree]]],
    state: State,
    parts: Batch,
    count: int,
    key: jax.Array | None,
) -> tuple[PyTree, Metrics, PyTree]:
    """Mean gradients and metrics of the micro-batches `[count n/count ...]`, and what is stored after all of them."""

    def one(carry: tuple[PyTree, PyTree], numbered: tuple[jax.Array, Batch]) -> tuple[PyTree, PyTree]:
        (total, stats), (number, part) = carry, numbered
        own_key = None if key is None else jax.random.fold_in(key, number)
        grads, (metrics, after, seen) = gradient(state.params, stats, part, own_key)
        # Random states go on; running statistics start every part from those before the step.
        carry = jax.tree.map(jnp.add, total, grads), model.keep(state.stats, after)
        return carry, (metrics, after, seen)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, _), (metrics, after, seen) = lax.scan(one, (zeros, state.stats), (jnp.arange(count), parts))
    grads = jax.tree.map(lambda g: g / count, grads)
    metrics = jax.tree.map(lambda m: jnp.mean(m, 0), metrics)
    return grads, metrics, model.merge(state.stats, after, seen)


def make_evaluation(run: Callable[[State, Batch], tuple[ArrayLike, Metrics]], sharding: BatchSharding) -> Evaluation:
    """The evaluation of a model of either library; a batch that does not divide is evaluated by each device.

    >>> evaluate = make_evaluation(lambda state, batch: (jnp.sum(batch), {"size": 2}), BatchSharding(None, "data"))
    >>> evaluate(State(jnp.array(0), {}, {}, ()), jnp.ones(2))
    {'loss': Array(2., dtype=float32), 'size': 2}
    """

    def evaluate(state: State, batch: Batch) -> Metrics:
        value, metrics = run(state, sharding.constrain_batch(batch) if sharding.divides(batch) else batch)
        return {"loss": value, **metrics}

    return sharding.with_auto_axes(evaluate, lambda state: PartitionSpec())


def make_recalibration(model: _Model, sharding: BatchSharding) -> Recalibration:
    """The recalibration of a model of either library, which normalizes with the statistics of each batch meanwhile.

    >>> class Mean:
    ...     def run(self, params, stats, batch, key):
    ...         return Pass(0.0, {}, jnp.array(0.0), stats, {"mean": jnp.mean(batch)})
    ...     def recalibrate(self, stats, seen):
    ...         return jax.tree.map(jnp.mean, seen)
    >>> recalibrate = make_recalibration(Mean(), BatchSharding(None, "data"))
    >>> recalibrate(State(jnp.array(0), {}, {}, ()), jnp.arange(4.0), jnp.array([[0, 1], [2, 3]])).stats
    {'mean': Array(1.5, dtype=float32)}
    """

    def recalibrate(state: State, data: Batch, order: jax.Array) -> State:
        def one(_: None, rows: jax.Array) -> tuple[None, PyTree]:
            batch = sharding.constrain_batch(jax.tree.map(lambda a: a[rows], data))
            return None, model.run(state.params, state.stats, batch, None).seen

        _, seen = lax.scan(one, None, order)
        return state._replace(stats=model.recalibrate(state.stats, seen))

    return sharding.with_auto_axes(recalibrate, lambda state: as_it_came(state)[0])


def epoch(
    step: Callable[..., tuple[State, Metrics]], *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Callable[..., tuple[State, Metrics]]:
    """Makes `run(state, data, order, key=None)`: many steps under one `lax.scan`, the data on the device.

    On many devices the data lie in one of two ways. Replicated (`place(data, mesh)`), each device picks its part of a
    batch from its own copy, and nothing is sent. Sharded by examples (`shard(data, mesh)`), as processes that read
    their own part of the data must have them, each device holds its part only, and the devices exchange every batch.

    Args:
      step: from `linen_step` or `nnx_step`.
      mesh: the devices that each batch is spread over; the step's own.
      axis: the axis of the mesh, or several, that the examples are spread over.

    Returns:
      A function of the state, data (a pytree of arrays, examples along the first axis), order (int32 indices, [steps,
      batch]) and a key, from which step k takes `fold_in(key, state.step)`. It returns the last state and the metrics
      of every step, each `[steps, ...]`.

    >>> step = lambda state, batch, key=None: (state + batch.sum(), {"sum": batch.sum()})
    >>> epoch(step)(jnp.array(0.0), jnp.arange(4.0), jnp.array([[0, 1], [2, 3]]))
    (Array(6., dtype=float32), {'sum': Array([1., 5.], dtype=float32)})
    """
    sharding = BatchSharding(mesh, axis)

    def run(state: State, data: Batch, order: jax.Array, key: jax.Array | None = None) -> tuple[State, Metrics]:
        def one(state: State, rows: jax.Array) -> tuple[State, Metrics]:
            batch = sharding.constrain_batch(jax.tree.map(lambda a: a[rows], data))
            return step(state, batch, None if key is None else jax.random.fold_in(key, state.step))

        return lax.scan(one, state, order)

    return sharding.with_auto_axes(run, as_it_came)
