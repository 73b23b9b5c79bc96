"""Training, evaluation and recalibration of linen models."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.typing import ArrayLike

from normjax._paths import PyTree
from normjax.linen import BatchNorm
from normjax.linen import recurrent as cells
from normjax.linen.host import Keeping
from normjax.penalty import total_penalty
from normjax.running import merge_trees, recalibrated
from normjax.train import _step
from normjax.train._forward import PENALTY, RECORD, Leaving, Left, beside, in_their_dtypes, run_through_branches
from normjax.train._metadata import bare
from normjax.train._step import Batch, Evaluation, Loss, Pass, Recalibration, State, Step
from normjax.train.mesh import Axis, BatchSharding

LEAVING = (Keeping, BatchNorm, cells.Host)  # the layers that leave penalties or records
Call: TypeAlias = Callable[..., PyTree]  # the model as a function, with its variables looked after


def linen_init(
    model: nn.Module, tx: optax.GradientTransformation, key: jax.Array, *inputs: PyTree, **kwargs: PyTree
) -> State:
    """The first State of a linen model, called with these inputs, and of the optax transformation `tx`.

    `key` is a PRNG key, for parameters and dropout.

    >>> linen_init(nn.Dense(2), optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 3))).params["kernel"].shape
    (3, 2)
    """
    variables = model.init({"params": key, "dropout": jax.random.fold_in(key, 1)}, *inputs, **kwargs)
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
    mesh: Mesh | None = None,
    axis: Axis = "data",
    specs: PyTree = None,
) -> Step:
    """Makes the training step of a linen model, `step(state, batch, key=None) -> (state, metrics)`.

    The metrics are "loss" (of the task), "penalty", and the user's.

    Args:
      model: a linen module.
      loss: `loss(call, batch, train)`; `call` is `model.apply` with the variables bound, running statistics and sown
        penalties looked after, and `rngs={"dropout": key}` unless the caller gives others.
      tx: an optax transformation.
      micro_batches: equal parts of the batch, whose gradients and metrics are averaged: part k of p takes the examples k,
        k + p, k + 2 p, ..., so that every device has its share. Each is normalized by itself; their statistics are stored
        merged, exactly where the row allows it (order 2, A = B or None, no windows), else averaged. Lifted layers
        (`nn.scan`, `nn.vmap`) merge if `moments` is lifted with them; statistics of recurrent cells, and of layers in a
        branch or a loop such as `nn.cond`, are averaged.
      statistics: "update" the running ones; "keep" them, while normalizing with the batch's; or "frozen": normalize with
        the stored ones and leave them (fine-tuning).
      penalty_weights: factors of the layers' penalties by path component, see `normjax.penalty.total_penalty`.
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
    merged = micro_batches > 1 and statistics == "update"
    trained = _LinenModel(model, loss, True if statistics == "frozen" else None, True, penalty_weights, records=merged)
    return _step.make_step(trained, tx, micro_batches, statistics, BatchSharding(mesh, axis, specs))


def linen_eval(model: nn.Module, loss: Loss[Call], *, mesh: Mesh | None = None, axis: Axis = "data") -> Evaluation:
    """Makes the evaluation `evaluate(state, batch) -> metrics` of a linen model, "loss" among them.

    `loss(call, batch, train)` is called with train=False; `call` is `model.apply` with the variables bound. The batch is
    spread over `axis` of the mesh; one that does not divide is evaluated by each device.

    >>> evaluate = linen_eval(nn.Dense(1), lambda call, batch, train: (jnp.sum(call(batch)), {"train": train}))
    >>> evaluate(linen_init(nn.Dense(1), optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 3))), jnp.zeros((2, 3)))
    {'loss': Array(0., dtype=float32), 'train': False}
    """

    def run(state: State, batch: Batch) -> tuple[ArrayLike, _step.Metrics]:
        return loss(functools.partial(model.apply, {"params": state.params, **state.stats}), batch, False)

    return _step.make_evaluation(run, BatchSharding(mesh, axis))


def linen_recalibrate(
    model: nn.Module, loss: Loss[Call], *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Recalibration:
    """Makes `recalibrate(state, data, order) -> state`: the running statistics of the parameters as they are now.

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
    whole = _LinenModel(model, loss, stored=False, train=False, records=True)
    return _step.make_recalibration(whole, BatchSharding(mesh, axis))


@dataclass(frozen=True, eq=False)
class _LinenModel:
    """A linen model as a step asks for it; `train` is what the loss is told."""

    model: nn.Module
    loss: Loss[Call]
    stored: bool | None  # whether layers normalize with stored statistics or the batch's; None: as the model asks
    train: bool = True
    penalty_weights: Mapping[str, ArrayLike] | None = None
    records: bool = False  # whether layers are asked for what they saw of the batch

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
        watch = functools.partial(_watch, self.stored, leaving, met)

        def call(*args: PyTree, mutable: str | Collection[str] = (), **kwargs: PyTree) -> PyTree:
            """The model's output, and beside it what has changed in the collections `mutable`, where some are asked for."""
            if key is not None:
                kwargs.setdefault("rngs", {"dropout": key})
            asked, names = [mutable] if isinstance(mutable, str) else mutable, (*stats, *sown)
            with nn.intercept_methods(watch):
                output, changed = self.model.apply(variables, *args, mutable=[*names, *asked], **kwargs)
            changed = {**sown, **changed}
            variables.update({name: changed.pop(name) for name in names if name in changed})
            return (output, changed) if asked else output

        value, metrics = self.loss(call, batch, self.train)
        penalty = beside(value, total_penalty(variables["losses"], self.penalty_weights))
        after = in_their_dtypes(stats, {name: variables[name] for name in stats})
        return Pass(value, metrics, penalty, after, variables.get("moments", {}))

    def keep(self, before: PyTree, after: PyTree) -> PyTree:
        return {**after, "batch_stats": before["batch_stats"]} if "batch_stats" in before else after

    def merge(self, before: PyTree, after: PyTree, seen: PyTree) -> PyTree:
        if "batch_stats" not in before:
            return after
        old, new = (bare(stats["batch_stats"]) for stats in (before, after))
        return {**after, "batch_stats": nn.meta.replace_boxed(before["batch_stats"], merge_trees(old, new, seen))}

    def recalibrate(self, stats: PyTree, seen: PyTree) -> PyTree:
        stored = stats.get("batch_stats", {})
        pure = recalibrated(bare(stored), seen)
        return {**stats, "batch_stats": nn.meta.replace_boxed(stored, pure)} if stored else stats


def _watch(
    stored: bool | None,
    leaving: Leaving,
    met: set[Left],
    call: Call,
    args: PyTree,
    kwargs: PyTree,
    context: nn.module.InterceptorContext,
) -> PyTree:
    """Every call of a method of a module: which layers leave something, and which statistics they normalize with."""
    module = context.module
    if context.method_name == "__call__" and module.scope is not None:
        for what, option, nothing in ((PENALTY, "l1", 0.0), (RECORD, "_leaves_records", False)):
            if getattr(module, option, nothing) and isinstance(module, LEAVING):
                met.add((module.path, what))
                if (module.path, what) in leaving.silent:
                    object.__setattr__(module, option, nothing)  # the layer is bound afresh at every apply
        if stored is not None and hasattr(module, "use_running_average"):
            args, kwargs = _told(module, stored, args, kwargs)
    return call(*args, **kwargs)


def _told(module: PyTree, stored: bool, args: PyTree, kwargs: PyTree) -> tuple[PyTree, PyTree]:
    """The arguments of a call in which a module normalizes with stored statistics, or not, whatever the model asks of it."""
    name, signature = "use_running_average", inspect.signature(type(module).__call__)
    takes, built = name in signature.parameters, module.use_running_average is not None
    hands_on = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())
    bound = signature.bind(module, *args, **kwargs) if takes else None
    given = kwargs.get(name) if bound is None else bound.arguments.get(name)
    if built or not (takes or hands_on):
        object.__setattr__(module, name, stored)  # the layer is bound afresh at every apply
    if given is None and (built or not takes):
        return args, kwargs
    if bound is None:
        return args, {**kwargs, name: stored}
    bound.arguments[name] = stored
    return bound.args[1:], bound.kwargs
