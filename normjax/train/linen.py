"""Training, evaluation and recalibration of linen models."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.typing import ArrayLike

from normjax._paths import PyTree
from normjax.running import merge_trees, recalibrated
from normjax.train import _step
from normjax.train._batch import Batch
from normjax.train._calls import collections, made_by_init, note_momentum, require_linen, streams, watch
from normjax.train._forward import Leaving, Left, in_their_dtypes, run_through_branches
from normjax.train._metadata import bare
from normjax.train._objective import Pass, weighted_penalty, with_averages
from normjax.train._report import Loss, Metrics, Value, ask, require_loss
from normjax.train._step import Evaluation, Recalibration, State, Step
from normjax.train.mesh import Axis, BatchSharding

Call: TypeAlias = Callable[..., PyTree]  # the model as a function, with its variables looked after


def linen_init(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *inputs: PyTree,
    rngs: str | Iterable[str] = ("dropout",),
    **kwargs: PyTree,
) -> State:
    """The first State of a linen model, called with these inputs, and of the optax transformation `tx`.

    `key` is a PRNG key for parameters, and for every stream of random numbers: `rngs` names those that the model asks for
    by name, as lifted layers do (`split_rngs`); any other that `make_rng` asks for is served too.

    >>> linen_init(nn.Dense(2), optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 3))).params["kernel"].shape
    (3, 2)
    """
    require_linen(model, "linen_init")
    _step.require_transformation(tx)
    dropout = {"dropout": jax.random.fold_in(key, 1)}
    variables = model.init({**streams(key, rngs), **dropout, "params": key}, *inputs, **kwargs)
    sown = ("losses", "moments", "intermediates")
    stats = {name: value for name, value in variables.items() if name not in ("params", *sown)}
    return _step.start_state(variables.get("params", {}), stats, tx)


def linen_step(
    model: nn.Module,
    loss: Loss[Call],
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    statistics: str = "update",
    penalty_weights: Mapping[str, ArrayLike] | None = None,
    rngs: str | Iterable[str] = ("dropout",),
    mesh: Mesh | None = None,
    axis: Axis = "data",
    specs: PyTree = None,
) -> Step:
    """Makes the training step of a linen model, `step(state, batch, key=None) -> (state, metrics)`.

    The metrics are "loss" (of the task), "penalty", and the user's.

    Args:
      model: a linen module.
      loss: `loss(call, batch, train)`; `call` is `model.apply` with the variables bound, running statistics and sown
      tx: an optax transformation. Those that ask for the loss (`optax.lbfgs`, `contrib.reduce_on_plateau`, ...) are given
        `value`, which is loss plus penalty, `grad`, and `value_fn`, which evaluates the same batch with the same key at
        other parameters.
      micro_batches: equal parts of the batch, whose gradients and metrics are averaged in float32 or wider: part k of p
        takes the examples k, k + p, k + 2 p, ..., so that every device has its share; scalars, and what is marked
        `train.Shared`, go to every part. Parts weigh alike unless the loss is a `train.Mean`; metrics are averaged unless
        they are a `train.Sum`, or have a first axis of examples, whose order stays. Each part is normalized by itself;
        running statistics (`batch_stats`) start from those before the step and are stored merged, exactly where the row
        allows it (order 2, A = B or None, no windows), else averaged. Every other collection goes from part to part, as in
        successive steps. Lifted layers (`nn.scan`, `nn.vmap`) merge if `moments` is lifted with them. Those that are not,
        layers in a branch or a loop such as `nn.cond`, and Flax's own BatchNorm merge if they are called once, have no mask
        and average exponentially, as is their default; statistics of recurrent cells are averaged.
      statistics: "update" the running ones; "keep" them, while normalizing with the batch's; or "frozen": normalize with
        the stored ones and leave them (fine-tuning).
      penalty_weights: factors of the layers' penalties by path component, see `normjax.penalty.total_penalty`; a
        ValueError names one that matches nothing.
      rngs: the names of the streams of random numbers that have keys of their own, for `has_rng` and `split_rngs`. Any
        other that `make_rng` asks for is served as well.
      mesh: the devices to spread each batch over, with the state placed there by `place`. Axes Auto or Explicit: how
        what is inside lies is left to XLA. A model that states its shardings in types does without `mesh`.
      axis: the axis of the mesh, or several, that the examples are spread over; all devices along the others see them.
      specs: those given to `place`, so that the state stays where it is: XLA might move it, and compile again.

    >>> def loss(call, batch, train):
    ...     return jnp.mean((call(batch["x"]) - batch["y"]) ** 2), {}
    >>> model, tx = nn.Dense(1, use_bias=False), optax.sgd(0.25)
    >>> data = {"x": jnp.array([[1.0], [1.0]]), "y": jnp.array([[3.0], [3.0]])}
    >>> state = linen_init(model, tx, jax.random.key(0), data["x"])
    >>> state = state._replace(params={"kernel": jnp.ones((1, 1))})
    >>> state, metrics = jax.jit(linen_step(model, loss, tx))(state, data)
    >>> state.params["kernel"].item(), metrics["loss"].item()
    (2.0, 4.0)
    """
    merged, stored = micro_batches > 1 and statistics == "update", True if statistics == "frozen" else None
    trained = _LinenModel(model, loss, "linen_step", stored, True, penalty_weights, merged, rngs)
    return _step.make_step(trained, tx, micro_batches, statistics, BatchSharding(mesh, axis, specs))


def linen_eval(model: nn.Module, loss: Loss[Call], *, mesh: Mesh | None = None, axis: Axis = "data") -> Evaluation:
    """Makes the evaluation `evaluate(state, batch, key=None) -> metrics` of a linen model, "loss" among them.

    `loss(call, batch, train)` is called with train=False; `call` is `model.apply` with the variables bound, and with
    random numbers where there is a key. The batch is spread over `axis` of the mesh; one that does not divide is evaluated
    by each device.

    >>> evaluate = linen_eval(nn.Dense(1), lambda call, batch, train: (jnp.sum(call(batch)), {"train": train}))
    >>> evaluate(linen_init(nn.Dense(1), optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 3))), jnp.zeros((2, 3)))
    {'loss': Array(0., dtype=float32), 'train': False}
    """

    def run(state: State, batch: Batch, key: jax.Array | None) -> tuple[Value, Metrics]:
        keys = {} if key is None else {"rngs": streams(key, ("dropout",))}
        call = functools.partial(model.apply, {"params": state.params, **state.stats}, **keys)
        return ask(loss, call, batch, False, key)

    return _step.make_evaluation(_LinenModel(model, loss, "linen_eval"), run, BatchSharding(mesh, axis))


def linen_recalibrate(
    model: nn.Module, loss: Loss[Call], *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Recalibration:
    """Makes `recalibrate(state, data, order, key=None) -> state`: the running statistics of the parameters as they are now.

    An average over training mixes the statistics of many earlier parameters. This one evaluates the model on every batch
    (`loss(call, batch, False)`: no dropout; only what the layers see matters), except that each layer normalizes with the
    batch's own statistics, and stores those of all batches together: exact where the row merges (order 2, A = B or None,
    no windows), else their mean. Data and order are those of `epoch`, the batches spread over `axis` of the mesh;
    statistics of elements that no batch has seen, and all else, stay. A layer with running statistics that saw no batch,
    since it is not one of normjax's, is a ValueError.

    Source: Wu & Johnson 2021, section 3 ("precise" batch norm statistics).

    >>> from normjax.linen import BatchNorm
    >>> model, data = BatchNorm(), jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> state = linen_init(model, optax.sgd(0.1), jax.random.key(0), data, use_running_average=True)
    >>> loss = lambda call, batch, train: (jnp.sum(call(batch, use_running_average=not train)), {})
    >>> state = linen_recalibrate(model, loss)(state, data, jnp.array([[0, 1], [2, 3]]))
    >>> state.stats["batch_stats"]["mean"], state.stats["batch_stats"]["var"]
    (Array([4.], dtype=float32), Array([5.], dtype=float32))
    """
    evaluated = _LinenModel(model, loss, "linen_recalibrate", stored=False, train=False, records=True)
    return _step.make_recalibration(evaluated, BatchSharding(mesh, axis))


@dataclass(frozen=True, eq=False)
class _LinenModel:
    """A linen model as a step asks for it; `train` is what the loss is told."""

    model: nn.Module
    loss: Loss[Call]
    maker: str  # the function that made it, for errors
    stored: bool | None = None  # whether layers normalize with stored statistics; None: as the model asks
    train: bool = True
    penalty_weights: Mapping[str, ArrayLike] | None = None
    records: bool = False  # whether layers are asked for what they saw of the batch
    rngs: str | Iterable[str] = ("dropout",)

    def check(self, params: PyTree | None = None) -> None:
        require_linen(self.model, self.maker)
        require_loss(self.loss, self.maker)
        if isinstance(params, nnx.State):
            raise TypeError(f"{self.maker} takes the state of `linen_init`; found one of `nnx_init`")

    def run(self, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None) -> Pass:
        met: set[Left] = set()  # what the layers that are called may leave
        run = functools.partial(self._run, params, stats, batch, key, met)
        return run_through_branches(run, lambda: frozenset(met))

    def _run(
        self, params: PyTree, stats: PyTree, batch: Batch, key: jax.Array | None, met: set[Left], leaving: Leaving
    ) -> Pass:
        """One forward pass, in which layers leave what they are to leave."""
        sown = {"losses": {}, **({"moments": {}} if self.records else {})}  # as the last call left them
        started: PyTree = unflatten_dict({(*path, "l1"): jnp.zeros((), jnp.float32) for path in leaving.started})
        variables = {"params": params, **stats, **sown, "losses": started}
        watched = functools.partial(watch, self.stored, leaving, met)
        momenta: dict[tuple[str, ...], float] = {}

        def call(*args: PyTree, mutable: bool | str | Collection[str] = (), **kwargs: PyTree) -> PyTree:
            """The model's output, and beside it what has changed in the collections `mutable`, where some are asked for."""
            if key is not None:
                kwargs.setdefault("rngs", streams(key, self.rngs))
            asked, names = collections(mutable), (*stats, *sown)
            noted = functools.partial(note_momentum, momenta)
            with nn.intercept_methods(watched), nn.intercept_methods(noted):
                output, changed = self.model.apply(variables, *args, mutable=[*names, *asked], **kwargs)
            changed = {**sown, **changed}
            variables.update({name: changed.pop(name) for name in names if name in changed})
            return (output, changed) if asked else output

        with made_by_init():
            value, metrics = ask(self.loss, call, batch, self.train, key)
        penalty = weighted_penalty(variables["losses"], self.penalty_weights, params)
        after = in_their_dtypes(stats, {name: variables[name] for name in stats})
        seen = with_averages(variables.get("moments", {}), momenta if self.records and self.train else {})
        return Pass(value, metrics, penalty, after, seen)

    def keep(self, before: PyTree, after: PyTree) -> PyTree:
        return {**after, "batch_stats": before["batch_stats"]} if "batch_stats" in before else after

    def running(self, stats: PyTree) -> PyTree:
        return {name: stats[name] for name in ("batch_stats",) if name in stats}

    def merge(self, before: PyTree, after: PyTree, running: PyTree, seen: PyTree) -> PyTree:
        if "batch_stats" not in before:
            return after
        old, new = (bare(stats["batch_stats"]) for stats in (before, running))
        return {**after, "batch_stats": nn.meta.replace_boxed(before["batch_stats"], merge_trees(old, new, seen))}

    def recalibrate(self, stats: PyTree, seen: PyTree) -> PyTree:
        stored = stats.get("batch_stats", {})
        pure = recalibrated(bare(stored), seen)
        return {**stats, "batch_stats": nn.meta.replace_boxed(stored, pure)} if stored else stats
