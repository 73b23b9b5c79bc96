"""Steps, epochs, evaluation and recalibration for models of either library, of which each answers as `Model`."""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from normjax._leaves import one_of
from normjax._paths import PyTree
from normjax.train._batch import Batch, split
from normjax.train._objective import Model, objective, require_alike
from normjax.train._parts import Split, accumulate, value_of
from normjax.train._report import Metrics, Value, quotient, settled
from normjax.train.mesh import Axis, BatchSharding

STATISTICS = ("update", "keep", "frozen")
Run: TypeAlias = Callable[..., tuple["State", Metrics]]
ValueOf: TypeAlias = Callable[[PyTree], jax.Array]


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
    """The State before the first step, in which no array stands twice, so that it can be donated."""
    known = {id(a) for a in jax.tree.leaves((params, stats))}

    def own(a: jax.Array) -> jax.Array:
        a = jnp.copy(a) if id(a) in known else a  # some optimizers keep the parameters, or one array of zeros twice
        known.add(id(a))
        return a

    return State(jnp.zeros((), jnp.int32), params, stats, jax.tree.map(own, tx.init(params)))


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


class Evaluation(Protocol):
    """An evaluation: what `linen_eval` and `nnx_eval` make.

    >>> def evaluate(state, batch, key=None):
    ...     return {"loss": jnp.mean(batch)}
    >>> evaluate(State(jnp.array(0), {}, {}, ()), jnp.ones(4))["loss"].item()
    1.0
    """

    def __call__(self, state: State, batch: Batch, key: jax.Array | None = None) -> Metrics:
        """The loss and the user's metrics of a batch; the key is for a loss, or a model of linen, that asks for one."""
        ...


class Recalibration(Protocol):
    """A recalibration: what `linen_recalibrate` and `nnx_recalibrate` make.

    >>> def recalibrate(state, data, order, key=None):
    ...     return state._replace(stats={"mean": jnp.mean(data[order])})
    >>> recalibrate(State(jnp.array(0), {}, {}, ()), jnp.ones(4), jnp.array([[0, 1], [2, 3]])).stats["mean"].item()
    1.0
    """

    def __call__(self, state: State, data: Batch, order: ArrayLike, key: jax.Array | None = None) -> State:
        """The state with the running statistics of the data; a loss or model that asks for a key is given one a batch."""
        ...


def _as_it_came(state: PyTree) -> tuple[PyTree, PartitionSpec]:
    """Specs of the results of a step: the state lies as before, metrics are replicated."""
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, state), PartitionSpec()


def require_state(state: State, call: str) -> None:
    """Raises TypeError unless this is a State."""
    if not all(hasattr(state, name) for name in State._fields):
        raise TypeError(f"`{call}` takes a `train.State` first; found {type(state).__name__}")


def make_step(
    model: Model, tx: optax.GradientTransformation, micro_batches: int, statistics: str, sharding: BatchSharding
) -> Step:
    """The training step of a model of either library; `linen_step` and `nnx_step` say what the arguments are."""
    one_of("statistics", statistics, STATISTICS)
    if (parts := _whole(micro_batches)) < 1:
        raise ValueError(f"micro_batches is at least 1; found {micro_batches!r}")
    model.check()
    require_transformation(tx)
    # Some transformations that pass on what they are given do not say so in their type: `optax.MultiSteps`.
    takes = inspect.signature(tx.update).parameters
    everything = any(argument.kind is argument.VAR_KEYWORD for argument in takes.values())

    def step(state: State, batch: Batch, key: jax.Array | None = None) -> tuple[State, Metrics]:
        require_state(state, "step(state, batch, key=None)")
        model.check(state.params)
        batch = sharding.constrain_batch(batch)
        value, grads, metrics, stats, value_fn = _evaluated(model, parts, sharding, state, batch, key)
        found = {"value": value, "grad": grads, "value_fn": value_fn}  # for those that ask: line searches, plateaus
        asked: PyTree = {name: told for name, told in found.items() if everything or name in takes}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **asked)
        params = optax.apply_updates(state.params, updates)
        stats = stats if statistics == "update" else model.keep(state.stats, stats)
        return sharding.constrain_state(State(state.step + 1, params, stats, opt_state)), metrics

    return sharding.with_auto_axes(step, _as_it_came)


def _whole(number: int) -> int:
    """An integer, NumPy's too."""
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"micro_batches is a whole number of at least 1; found {number!r}") from None


def require_transformation(tx: optax.GradientTransformation) -> None:
    """Raises TypeError unless this has what an optax transformation has."""
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise TypeError(f"tx is an optax transformation, such as optax.sgd(0.1); found {type(tx).__name__}")


def _evaluated(
    model: Model, parts: int, sharding: BatchSharding, state: State, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, PyTree, Metrics, PyTree, ValueOf]:
    """What is minimized, its gradient, metrics, what is stored afterwards, and the minimized of other parameters."""
    if parts > 1:
        arrays, join = split(batch, parts)
        whole = Split(sharding.constrain_batch(arrays, 1), join)
        return *accumulate(model, state.params, state.stats, whole, key), functools.partial(
            value_of, model, state.stats, whole, key
        )

    def mean(params: PyTree) -> tuple[jax.Array, PyTree]:
        value, found = objective(model, 1, params, state.stats, batch, key)
        return value if found.weight is None else quotient(value, found.weight), found

    (value, found), grads = jax.value_and_grad(mean, has_aux=True)(state.params)
    return value, grads, settled(found.report), found.stats, lambda params: mean(params)[0]


def make_evaluation(
    model: Model, run: Callable[[State, Batch, jax.Array | None], tuple[Value, Metrics]], sharding: BatchSharding
) -> Evaluation:
    """The evaluation of a model of either library; a batch that does not divide is evaluated by each device."""
    model.check()

    def evaluate(state: State, batch: Batch, key: jax.Array | None = None) -> Metrics:
        require_state(state, "evaluate(state, batch, key=None)")
        model.check(state.params)
        value, metrics = run(state, sharding.constrain_batch(batch) if sharding.divides(batch) else batch, key)
        return settled({"loss": value, **metrics})

    return sharding.with_auto_axes(evaluate, lambda state: PartitionSpec())


def make_recalibration(model: Model, sharding: BatchSharding) -> Recalibration:
    """The recalibration of a model of either library, which normalizes with the statistics of each batch meanwhile."""
    model.check()

    def recalibrate(state: State, data: Batch, order: ArrayLike, key: jax.Array | None = None) -> State:
        require_state(state, "recalibrate(state, data, order, key=None)")
        model.check(state.params)
        data = sharding.held("recalibrate", data, order)

        def one(number: jax.Array, rows: jax.Array) -> tuple[jax.Array, PyTree]:
            own_key = None if key is None else jax.random.fold_in(key, number)
            return number + 1, model.run(state.params, state.stats, sharding.batch_at(data, rows), own_key).seen

        seen = lax.scan(one, jnp.zeros((), jnp.int32), jnp.asarray(order))[1]
        return state._replace(stats=model.recalibrate(state.stats, seen))

    return sharding.with_auto_axes(recalibrate, lambda state: _as_it_came(state)[0])


def epoch(step: Run, *, mesh: Mesh | None = None, axis: Axis = "data") -> Run:
    """Makes `run(state, data, order, key=None)` of a step: many steps under one `lax.scan`, the data on the device.

    It returns the last state and the metrics of every step, each `[steps, ...]`; data is a pytree of arrays, examples
    along the first axis; order int32 indices `[steps, batch]`, which are refused beyond the
    data where they are known, outside of jit; step k gets the key `fold_in(key, state.step)`. The mesh
    and its axis, or axes, that the examples are spread over are the step's own. Scalars, and what is marked
    `train.Shared`, are given to every step whole.

    On many devices the data lie replicated (`place(data, mesh)`): each picks its part of a batch from its own copy; or
    sharded by examples (`shard(data, mesh)`), as processes that read their own part must have them: each holds its part
    only, and the devices exchange every batch.

    >>> step = lambda state, batch, key=None: (state + batch.sum(), {"sum": batch.sum()})
    >>> epoch(step)(jnp.array(0.0), jnp.arange(4.0), jnp.array([[0, 1], [2, 3]]))
    (Array(6., dtype=float32), {'sum': Array([1., 5.], dtype=float32)})
    """
    sharding = BatchSharding(mesh, axis)

    def run(state: State, data: Batch, order: ArrayLike, key: jax.Array | None = None) -> tuple[State, Metrics]:
        data = sharding.held("epoch", data, order)

        def one(state: State, rows: jax.Array) -> tuple[State, Metrics]:
            own_key = None if key is None else jax.random.fold_in(key, state.step)
            after, metrics = step(state, sharding.batch_at(data, rows), own_key)
            require_alike(state, after, "an epoch")
            return after, metrics

        return lax.scan(one, state, jnp.asarray(order))

    return sharding.with_auto_axes(run, _as_it_came)
