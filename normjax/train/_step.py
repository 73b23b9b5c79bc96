"""Steps, epochs, evaluation and recalibration for models of either library, of which each answers as `_Model`."""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from normjax._leaves import one_of
from normjax._paths import PyTree
from normjax.train.mesh import Axis, BatchSharding

STATISTICS = ("update", "keep", "frozen")
Asked = TypeVar("Asked")
Batch: TypeAlias = PyTree  # arrays with the examples along their first axis
Metrics: TypeAlias = dict[str, PyTree]  # scalars by name, mostly: what a loss reports of a batch
Loss: TypeAlias = Callable[[Asked, Batch, bool], tuple[ArrayLike, Metrics]]
"""`loss(model, batch, train)`: the loss of a batch, a scalar, and metrics; the model is a function or an nnx module."""
Aside: TypeAlias = tuple[Metrics, PyTree, PyTree]  # what is reported, what is stored afterwards, what the layers saw
Run: TypeAlias = Callable[..., tuple["State", Metrics]]
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
    """The State before the first step."""
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
    """What one forward pass of a model gives."""

    loss: ArrayLike  # the task's, a scalar
    metrics: Metrics
    penalty: jax.Array  # the sum of the layers' penalties, a scalar
    stats: PyTree  # everything that changes but the parameters, as it is afterwards
    seen: PyTree  # what the layers saw of the batch, nested dictionaries of `normjax.running.BatchRecord`


def _as_it_came(state: PyTree) -> tuple[PyTree, PartitionSpec]:
    """Specs of the results of a step: the state lies as before, metrics are replicated."""
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, state), PartitionSpec()


class _Model(Protocol):
    """What a step asks of a model of either library; this file knows no Flax."""

    def run(self, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None) -> Pass:
        """One forward pass."""
        ...

    def keep(self, before: PyTree, after: PyTree) -> PyTree:
        """What is stored after a step, but the running statistics from before it."""

    def merge(self, before: PyTree, after: PyTree, seen: PyTree) -> PyTree:
        """What is stored after several micro-batches, given their last state; statistics and `seen` are stacked."""

    def recalibrate(self, stats: PyTree, seen: PyTree) -> PyTree:
        """What is stored, the running statistics replaced by those of all batches in `seen`, stacked."""


def make_step(
    model: _Model, tx: optax.GradientTransformation, micro_batches: int, statistics: str, sharding: BatchSharding
) -> Step:
    """The training step of a model of either library; `linen_step` and `nnx_step` say what the arguments are."""
    one_of("statistics", statistics, STATISTICS)
    if micro_batches < 1:
        raise ValueError(f"micro_batches is at least 1; found {micro_batches!r}")
    gradient = jax.grad(functools.partial(_objective, model), has_aux=True)

    def step(state: State, batch: Batch, key: jax.Array | None = None) -> tuple[State, Metrics]:
        batch = sharding.constrain_batch(batch)
        if micro_batches == 1:
            grads, (metrics, stats, _) = gradient(state.params, state.stats, batch, key)
        else:
            parts = jax.tree.map(functools.partial(_split, parts=micro_batches), batch)
            grads, metrics, stats = _accumulate(model, gradient, state, sharding.constrain_batch(parts, 1), key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stats = stats if statistics == "update" else model.keep(state.stats, stats)
        return sharding.constrain_state(State(state.step + 1, params, stats, opt_state)), metrics

    return sharding.with_auto_axes(step, _as_it_came)


def _objective(
    model: _Model, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[ArrayLike, Aside]:
    """What is minimized, and what is found on the way."""
    found = model.run(params, stats, batch, key)
    if taken := {"loss", "penalty"} & set(found.metrics):
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
    model: _Model, gradient: Callable[..., tuple[PyTree, Aside]], state: State, parts: Batch, key: jax.Array | None
) -> tuple[PyTree, Metrics, PyTree]:
    """Mean gradients and metrics of the micro-batches `[count n/count ...]`, and what is stored after all of them."""
    count = len(jax.tree.leaves(parts)[0])

    def one(carry: tuple[PyTree, PyTree], numbered: tuple[jax.Array, Batch]) -> tuple[PyTree, PyTree]:
        (total, stats), (number, part) = carry, numbered
        own_key = None if key is None else jax.random.fold_in(key, number)
        grads, (metrics, after, seen) = gradient(state.params, stats, part, own_key)
        # Random states go on; running statistics start every part from those before the step.
        return (jax.tree.map(jnp.add, total, grads), model.keep(state.stats, after)), (metrics, after, seen)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, _), (metrics, after, seen) = lax.scan(one, (zeros, state.stats), (jnp.arange(count), parts))
    grads, metrics = jax.tree.map(lambda g: g / count, grads), jax.tree.map(lambda m: jnp.mean(m, 0), metrics)
    return grads, metrics, model.merge(state.stats, after, seen)


def make_evaluation(run: Callable[[State, Batch], tuple[ArrayLike, Metrics]], sharding: BatchSharding) -> Evaluation:
    """The evaluation of a model of either library; a batch that does not divide is evaluated by each device."""

    def evaluate(state: State, batch: Batch) -> Metrics:
        value, metrics = run(state, sharding.constrain_batch(batch) if sharding.divides(batch) else batch)
        return {"loss": value, **metrics}

    return sharding.with_auto_axes(evaluate, lambda state: PartitionSpec())


def make_recalibration(model: _Model, sharding: BatchSharding) -> Recalibration:
    """The recalibration of a model of either library, which normalizes with the statistics of each batch meanwhile."""

    def recalibrate(state: State, data: Batch, order: jax.Array) -> State:
        def one(_: None, rows: jax.Array) -> tuple[None, PyTree]:
            return None, model.run(state.params, state.stats, sharding.batch_at(data, rows), None).seen

        return state._replace(stats=model.recalibrate(state.stats, lax.scan(one, None, order)[1]))

    return sharding.with_auto_axes(recalibrate, lambda state: _as_it_came(state)[0])


def epoch(step: Run, *, mesh: Mesh | None = None, axis: Axis = "data") -> Run:
    """Makes `run(state, data, order, key=None)` of a step: many steps under one `lax.scan`, the data on the device.

    It returns the last state and the metrics of every step, each `[steps, ...]`; data is a pytree of arrays, examples
    along the first axis; order int32 indices `[steps, batch]`; step k gets the key `fold_in(key, state.step)`. The mesh
    and its axis, or axes, that the examples are spread over are the step's own.

    On many devices the data lie replicated (`place(data, mesh)`): each picks its part of a batch from its own copy; or
    sharded by examples (`shard(data, mesh)`), as processes that read their own part must have them: each holds its part
    only, and the devices exchange every batch.

    >>> step = lambda state, batch, key=None: (state + batch.sum(), {"sum": batch.sum()})
    >>> epoch(step)(jnp.array(0.0), jnp.arange(4.0), jnp.array([[0, 1], [2, 3]]))
    (Array(6., dtype=float32), {'sum': Array([1., 5.], dtype=float32)})
    """
    sharding = BatchSharding(mesh, axis)

    def run(state: State, data: Batch, order: jax.Array, key: jax.Array | None = None) -> tuple[State, Metrics]:
        def one(state: State, rows: jax.Array) -> tuple[State, Metrics]:
            own_key = None if key is None else jax.random.fold_in(key, state.step)
            return step(state, sharding.batch_at(data, rows), own_key)

        return lax.scan(one, state, order)

    return sharding.with_auto_axes(run, _as_it_came)
