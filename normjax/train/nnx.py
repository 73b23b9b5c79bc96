"""Training, evaluation and recalibration of nnx models."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from normjax._paths import PyTree
from normjax.nnx import BatchNorm, Moments, Penalty
from normjax.nnx import recurrent as cells
from normjax.nnx.host import Keeping
from normjax.running import merge_trees, recalibrated
from normjax.train import _step
from normjax.train._batch import Batch
from normjax.train._forward import PENALTY, RECORD, Leaving, Left, Path, in_their_dtypes, run_through_branches
from normjax.train._objective import Pass, own_momentum, weighted_penalty, with_averages
from normjax.train._report import Loss, Metrics, Value, ask, require_loss
from normjax.train._step import Evaluation, Recalibration, State, Step
from normjax.train.mesh import Axis, BatchSharding

M = TypeVar("M", bound=nnx.Module)


def nnx_init(model: M, tx: optax.GradientTransformation) -> tuple[nnx.GraphDef[M], State]:
    """Splits an nnx model into its graph definition, for `nnx_step` and its kin, and the first State with that of `tx`.

    >>> structure, state = nnx_init(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> state.params["kernel"].shape
    (3, 2)
    """
    if not isinstance(model, nnx.Module):
        hint = ": of linen, take `linen_init`" if isinstance(model, nn.Module) else ""
        raise TypeError(f"nnx_init takes an nnx module first; found {type(model).__name__}{hint}")
    _step.require_transformation(tx)
    structure, params, stats = nnx.split(model, nnx.Param, ...)
    return structure, _step.start_state(params, stats, tx)


def nnx_update(model: nnx.Module, state: State) -> None:
    """Puts a trained State back into the model that `nnx_init` split: its parameters and all its other variables.

    The model gets a copy of the arrays, as they lie on the devices, so that a later step may still donate the State's. Its
    modes, such as `use_running_average`, stay what they are. ValueError if the State is of another model.

    >>> model = nnx.Linear(1, 1, use_bias=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    >>> structure, state = nnx_init(model, tx := optax.sgd(0.5))
    >>> loss = lambda model, batch, train: (jnp.sum(model(batch)), {})
    >>> state, _ = jax.jit(nnx_step(structure, loss, tx))(state, jnp.ones((1, 1)))
    >>> nnx_update(model, state)
    >>> model(jnp.ones((1, 1)))
    Array([[0.5]], dtype=float32)
    """
    given = [part for part in (state.params, state.stats) if isinstance(part, nnx.State)]
    if len(given) < 2:
        raise ValueError(
            "nnx_update takes a State of `nnx_init` and `nnx_step`; found one whose parts are no nnx.State"
        )
    own, new = (
        {path: variable.shape for part in parts for path, variable in nnx.to_flat_state(part)}
        for parts in (nnx.split(model, nnx.Param, ...)[1:], given)
    )
    if other := [path for path in {**own, **new} if own.get(path) != new.get(path)]:
        name, found = ".".join(map(str, other[0])), [sizes.get(other[0], "missing") for sizes in (own, new)]
        raise ValueError(
            f"the State is of another model: {name} is {found[0]} in the model and {found[1]} in the State"
        )
    nnx.update(model, *(jax.tree.map(jnp.copy, part) for part in given))


def nnx_step(
    structure: nnx.GraphDef[M],
    loss: Loss[M],
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    statistics: str = "update",
    penalty_weights: Mapping[str, ArrayLike] | None = None,
    mesh: Mesh | None = None,
    axis: Axis = "data",
    specs: PyTree = None,
) -> Step:
    """Makes the training step of an nnx model, `step(state, batch, key=None) -> (state, metrics)`.

    The metrics are "loss" (of the task), "penalty", and the user's. Random states live in the model: a key is for a loss
    that draws random numbers itself.

    Args:
      structure: the graph definition, from `nnx_init`.
      loss: `loss(model, batch, train)` gets the model, in training mode: `use_running_average=False` and
        `deterministic=False` are set on every layer but those where they were True when `nnx_init` split the model. These
        stay frozen, as Flax's would: a model that was in evaluation mode is frozen as a whole, and `model.train()` before
        `nnx_init` trains all of it. A layer that is given `use_running_average` at its call follows that, and so cannot be
        "frozen". A loss with an argument `key` is given one of the step's. Its value is a scalar, a `train.Mean` or a
        `train.Sum`.
      tx: an optax transformation. Those that ask for the loss (`optax.lbfgs`, `contrib.reduce_on_plateau`, ...) are given
        `value`, which is loss plus penalty, `grad`, and `value_fn`, which evaluates the same batch with the same random
        numbers at other parameters.
      micro_batches: equal parts of the batch, whose gradients and metrics are averaged in float32 or wider; scalars, and
        what is marked `train.Shared`, go to every part. Parts weigh alike unless the loss is a `train.Mean`; metrics are
        averaged unless they are a `train.Sum`, or have a first axis of examples, whose order stays. Each part is normalized
        by itself; running statistics (`nnx.BatchStat`) start from those before the step and are stored merged, exactly
        where the row allows it (order 2, A = B or None, no windows), else averaged; in a branch or a loop, such as
        `nnx.cond`, and of Flax's own BatchNorm, exactly if it is called once, there is no mask and the average is
        exponential, as it is by default. Every other variable, random states too, goes from part to part, as in successive
        steps.
      statistics: "update" the running ones; "keep" them, while normalizing with the batch's; or "frozen": normalize with
        the stored ones and leave them (fine-tuning).
      penalty_weights: factors of the layers' penalties by path component, see `normjax.penalty.total_penalty`; a
        ValueError names one that matches nothing.
      mesh: the devices to spread each batch over, with the state placed there by `place`.
      axis: the axis of the mesh, or several, that the examples are spread over; all devices along the others see them.
      specs: those given to `place`, so that the state stays where it is.

    >>> def loss(model, batch, train):
    ...     return jnp.mean((model(batch["x"]) - batch["y"]) ** 2), {}
    >>> structure, state = nnx_init(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tx := optax.sgd(0.1))
    >>> data = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[3.0], [5.0]])}
    >>> state, metrics = jax.jit(nnx_step(structure, loss, tx))(state, data)
    >>> sorted(metrics), int(state.step)
    (['loss', 'penalty'], 1)
    """
    merged, frozen = micro_batches > 1 and statistics == "update", statistics == "frozen"
    trained = _NnxModel(structure, loss, "nnx_step", frozen, penalty_weights=penalty_weights, records=merged)
    return _step.make_step(trained, tx, micro_batches, statistics, BatchSharding(mesh, axis, specs))


def nnx_eval(structure: nnx.GraphDef[M], loss: Loss[M], *, mesh: Mesh | None = None, axis: Axis = "data") -> Evaluation:
    """Makes the evaluation `evaluate(state, batch, key=None) -> metrics` of an nnx model in evaluation mode.

    "loss" is among the metrics; `structure` is that of `nnx_init`; `loss(model, batch, train)` is called with train=False.
    The batch is spread over `axis` of the mesh; one that does not divide is evaluated by each device.

    >>> structure, state = nnx_init(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> evaluate = nnx_eval(structure, lambda model, batch, train: (jnp.sum(model(batch)), {}))
    >>> evaluate(state, jnp.zeros((2, 3)))
    {'loss': Array(0., dtype=float32)}
    """
    evaluated = _NnxModel(structure, loss, "nnx_eval", use_running_average=True, train=False)

    def run(state: State, batch: Batch, key: jax.Array | None) -> tuple[Value, Metrics]:
        return ask(loss, evaluated.view(state.params, state.stats), batch, False, key)

    return _step.make_evaluation(evaluated, run, BatchSharding(mesh, axis))


def nnx_recalibrate(
    structure: nnx.GraphDef[M], loss: Loss[M], *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Recalibration:
    """Makes `recalibrate(state, data, order, key=None) -> state`: the running statistics of the parameters as they are now.

    The model of this `structure` (from `nnx_init`) is evaluated on every batch (`loss(model, batch, False)`: no dropout;
    only what the layers see matters), except that each layer normalizes with the batch's own statistics; those of all
    batches together are stored: exact where the row merges, else their mean. Data and order are those of `epoch`, the
    batches spread over `axis` of the mesh; statistics of elements that no batch has seen, and all else, stay. A layer with
    running statistics that saw no batch, since it is not one of normjax's, is a ValueError.

    Source: Wu & Johnson 2021, section 3 ("precise" batch norm statistics).

    >>> from normjax.nnx import BatchNorm
    >>> structure, state = nnx_init(BatchNorm(1, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> data, loss = jnp.array([[1.0], [3.0], [5.0], [7.0]]), lambda model, batch, train: (jnp.sum(model(batch)), {})
    >>> nnx_recalibrate(structure, loss)(state, data, jnp.array([[0, 1], [2, 3]])).stats["var"][...]
    Array([5.], dtype=float32)
    """
    model = _NnxModel(structure, loss, "nnx_recalibrate", use_running_average=False, train=False, records=True)
    return _step.make_recalibration(model, BatchSharding(mesh, axis))


@dataclass(frozen=True, eq=False)
class _NnxModel(Generic[M]):
    """An nnx model as a step asks for it; `train` is what the loss is told, and whether there is dropout.

    Random states are in `stats`; a key is for the loss.
    """

    structure: nnx.GraphDef[M]
    loss: Loss[M]
    maker: str  # the function that made it, for errors
    use_running_average: bool
    train: bool = True
    penalty_weights: Mapping[str, ArrayLike] | None = None
    records: bool = False  # whether layers are asked for what they saw of the batch

    def check(self, params: PyTree | None = None) -> None:
        if not isinstance(self.structure, nnx.GraphDef):
            hint = "linen_step".replace("step", self.maker.split("_")[1])
            hint = f": of linen, take `{hint}`" if isinstance(self.structure, nn.Module) else ""
            first = f"{self.maker} takes the graph definition of `nnx_init` first"
            raise TypeError(f"{first}; found {type(self.structure).__name__}{hint}")
        require_loss(self.loss, self.maker)
        if params is not None and not isinstance(params, nnx.State):
            raise TypeError(f"{self.maker} takes the state of `nnx_init`; its parameters are {type(params).__name__}")

    def view(self, params: nnx.State, stats: nnx.State) -> M:
        """The model in the mode of this pass, a copy: trained, it keeps what it was built to leave out."""
        model = nnx.merge(self.structure, params, stats, copy=True)
        for flag, value in (("use_running_average", self.use_running_average), ("deterministic", not self.train)):
            every = value or not self.train
            only = ... if every else functools.partial(_is_open, flag)
            model = nnx.view(model, only=only, raise_if_not_found=False, **{flag: value})
        return model

    def run(self, params: nnx.State, stats: nnx.State, batch: Batch, key: jax.Array | None) -> Pass:
        run = functools.partial(self._run, params, stats, batch, key)
        return run_through_branches(run, lambda: frozenset(self._leavers(params, stats)))

    def _leavers(self, params: nnx.State, stats: nnx.State) -> Iterator[Left]:
        """What the layers of the model may leave, by path."""
        for path, module in nnx.iter_modules(self.view(params, stats)):
            if isinstance(module, Keeping | BatchNorm) and self.records:
                yield path, RECORD
            if isinstance(module, Keeping | cells.Host) and module.l1:
                yield path, PENALTY

    def _run(self, params: nnx.State, stats: nnx.State, batch: Batch, key: jax.Array | None, leaving: Leaving) -> Pass:
        """One forward pass, in which layers leave what they are to leave."""
        model, types = self.view(params, stats), {Penalty: PENALTY, **({Moments: RECORD} if self.records else {})}

        def forward(model: M) -> tuple[Value, Metrics]:
            modules: list[tuple[Path, Any]] = list(nnx.iter_modules(model))
            for path, module in modules:
                kept = tuple(v for v in module.__captures__ if (path, types[type(v)]) not in leaving.silent)
                if isinstance(module, nnx.List) or not kept:  # numbers beside this name cannot be sorted, as remat does
                    del module.__captures__
                else:
                    module.__captures__ = nnx.data(kept)
            return ask(self.loss, model, batch, self.train, key)

        zeros: dict[Any, Penalty] = {(*path, "l1"): Penalty(jnp.zeros((), jnp.float32)) for path in leaving.started}
        captured = nnx.capture(forward, *types, init=nnx.from_flat_state(zeros))
        (value, metrics), *sown = captured(model)
        penalties, seen = map(nnx.to_pure_dict, (*sown, nnx.State({}))[:2])
        after = in_their_dtypes(stats, nnx.split(model, nnx.Param, ...)[2])
        penalty = weighted_penalty(penalties, self.penalty_weights, params)
        return Pass(value, metrics, penalty, after, with_averages(seen, self._momenta(model)))

    def _momenta(self, model: M) -> dict[Path, float]:
        """How layers average, by path, where they leave no record: Flax's own batch norms, ours in a branch or a loop."""
        if not (self.records and self.train):
            return {}
        return {path: own_momentum(m) for path, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm | Keeping)}

    def keep(self, before: nnx.State, after: nnx.State) -> nnx.State:
        return nnx.merge_state(after, nnx.filter_state(before, nnx.BatchStat))

    def running(self, stats: nnx.State) -> nnx.State:
        return nnx.filter_state(stats, nnx.BatchStat)

    def merge(self, before: nnx.State, after: nnx.State, running: nnx.State, seen: PyTree) -> nnx.State:
        old = nnx.to_pure_dict(self.running(before))
        nnx.replace_by_pure_dict(running, merge_trees(old, nnx.to_pure_dict(running), seen))
        return nnx.merge_state(after, running)

    def recalibrate(self, stats: nnx.State, seen: PyTree) -> nnx.State:
        after = jax.tree.map(lambda a: a, stats)  # a copy: the caller's variables stay as they are
        stored = nnx.to_pure_dict(nnx.filter_state(stats, nnx.BatchStat))
        nnx.replace_by_pure_dict(after, recalibrated(stored, seen))
        return after


def _is_open(flag: str, path: Path, module: object) -> bool:
    """Whether a module was not built to normalize with stored statistics, or to drop nothing, whatever the mode."""
    return getattr(module, flag, None) is not True
