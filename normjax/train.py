"""Training steps with optax: the task's loss plus the L1 penalties of the layers, running statistics carried along.

A step is a pure function `step(state, batch, key) -> (state, metrics)` that knows no particular model. What the model is
asked and what is learned from its answer is the user's `loss`:

    def loss(call, batch, train):                       # returns the loss of a batch and a dictionary of metrics
        logits = call(batch["image"], train=train)      # linen: the model's apply; nnx: the model itself
        return cross_entropy(logits, batch["label"]), {"accuracy": ...}

    state = linen_init(model, tx, key, images, train=False)
    run = jax.jit(epoch(linen_step(model, loss, tx)))   # one lax.scan, the data on the device
    state, metrics = run(state, data, order, key)       # order: [steps, batch] indices; metrics: [steps] arrays
    jax.vmap(run, in_axes=(0, None, 0, 0))              # several seeds side by side

Many devices: the batch is spread over an axis of a mesh, and everything is still that of the whole batch, running
statistics too, because XLA sums over the devices what one device sums over the examples.

    mesh = jax.make_mesh((8,), ("data",))
    state = place(state, mesh)                          # replicated, or sharded as Flax's metadata or `specs` say
    step = jax.jit(linen_step(model, loss, tx, mesh=mesh), donate_argnums=0)
    state, metrics = step(state, shard(batch, mesh))    # one device's numbers, but for rounding

Inside `jax.shard_map` a device sees its own examples alone. There fields name the mapped axis (`"@data n ..."`), and both
the loss and the gradient are averaged over it, the gradient before anything else in `tx`:

    def loss(call, batch, train):
        ...
        return lax.pmean(cross_entropy, "data"), {"accuracy": lax.pmean(accuracy, "data")}

    tx = optax.chain(optax.stateless(lambda grads, params: lax.pmean(grads, "data")), tx)

One of the two is not enough. Under `check_vma=True`, the default, JAX itself sums the gradients of replicated
parameters: of N local losses, which averaging afterwards leaves N times too large. Under `check_vma=False` it does not,
and the gradient of the averaged loss is each device's own. With both averages, either setting is right.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from normjax.mesh import Axis, Batch, Spread, as_it_came, bare, place, shard, shardings
from normjax.penalty import total_penalty
from normjax.running import merge_trees, recalibrated

__all__ = [
    "State", "epoch", "linen_eval", "linen_init", "linen_recalibrate", "linen_step", "nnx_eval", "nnx_init",
    "nnx_recalibrate", "nnx_step", "place", "shard", "shardings",
]  # fmt: skip

Metrics = dict[str, Any]
Loss = Callable[[Any, Batch, bool], tuple[Any, Metrics]]
Step = Callable[..., tuple["State", Metrics]]

STATISTICS = ("update", "keep", "frozen")
_SOWN = ("losses", "moments", "intermediates")


class State(NamedTuple):
    """What training carries: a pytree.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: parameters; for nnx the `nnx.State` of its `nnx.Param`s.
      stats: everything else that changes: linen's other collections (`batch_stats`), nnx's other variables.
      opt_state: the state of the optax transformation.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


def linen_init(
    model: nn.Module, tx: optax.GradientTransformation, key: jax.Array, *inputs: Any, **kwargs: Any
) -> State:
    """Initializes a linen model and its optimizer.

    Args:
      model: a linen module.
      tx: an optax transformation.
      key: a PRNG key, for parameters and dropout.
      *inputs: passed to the model.
      **kwargs: passed to the model.

    Returns:
      The first State.

    >>> linen_init(nn.Dense(2), optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 3))).params["kernel"].shape
    (3, 2)
    """
    variables = dict(model.init({"params": key, "dropout": jax.random.fold_in(key, 1)}, *inputs, **kwargs))
    params = variables.pop("params", {})
    stats = {name: value for name, value in variables.items() if name not in _SOWN}
    return State(jnp.zeros((), jnp.int32), params, stats, tx.init(params))


def nnx_init(model: nnx.Module, tx: optax.GradientTransformation) -> tuple[nnx.GraphDef, State]:
    """Splits an nnx model into its static structure and the first State.

    >>> structure, state = nnx_init(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> state.params["kernel"].shape
    (3, 2)
    """
    structure, params, stats = nnx.split(model, nnx.Param, ...)
    return structure, State(jnp.zeros((), jnp.int32), params, stats, tx.init(params))


def linen_step(
    model: nn.Module,
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    statistics: str = "update",
    penalty_weights: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    axis: Axis = "data",
    specs: Any = None,
) -> Step:
    """Makes the training step of a linen model.

    Args:
      model: a linen module.
      loss: `loss(call, batch, train)`; `call` is `model.apply` with the variables bound, running statistics and sown
        penalties looked after, and `rngs={"dropout": key}` unless the caller gives others.
      tx: an optax transformation.
      micro_batches: the batch is split into so many equal parts, whose gradients and metrics are averaged: part k of p
        takes the examples k, k + p, k + 2 p, ..., so that every device has its share of it. Each part is normalized by
        itself; what is stored are the statistics of all parts together, merged exactly where the row
        allows it (order 2, A = B or None, no windows), else averaged. Layers that are lifted (`nn.scan`,
        `nn.vmap`) merge if the collection `moments` is lifted with them; statistics of recurrent cells are averaged.
      statistics: "update" the running ones; "keep" them, while normalizing with the batch's; or "frozen": normalize with
        the stored ones and leave them (fine-tuning).
      penalty_weights: factors of the layers' penalties by path component, see `total_penalty`.
      mesh: the devices to spread each batch over, with the state placed there by `place`. Axes of either type, Auto or
        Explicit: how what is inside the step lies on the devices is left to XLA. A model that states its own shardings
        in types does without `mesh`, since the step follows types.
      axis: the axis of the mesh, or several, that the examples are spread over; all devices along the others see them.
      specs: those given to `place`, so that the state stays where it is: XLA might move it, and compile again.

    Returns:
      `step(state, batch, key=None) -> (state, metrics)`. metrics: "loss" (of the task), "penalty", and the user's.

    Raises:
      ValueError: an unknown way with statistics; a batch that does not divide into micro-batches, or these over the
        devices; an axis that the mesh lacks; metrics that are called loss or penalty.

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
    _choose(statistics)
    run = _linen_run(model, loss, average=True if statistics == "frozen" else None, penalty_weights=penalty_weights)

    def absorb(before: Any, after: Any, moments: Any) -> Any:
        if "batch_stats" not in before:
            return after
        old, new = (bare(stats["batch_stats"]) for stats in (before, after))
        merged = merge_trees(old, new, moments)
        return {**after, "batch_stats": nn.meta.replace_boxed(before["batch_stats"], merged)}

    return _make_step(run, absorb, tx, micro_batches, statistics, Spread(mesh, axis, specs))


def nnx_step(
    structure: nnx.GraphDef,
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    statistics: str = "update",
    penalty_weights: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    axis: Axis = "data",
    specs: Any = None,
) -> Step:
    """Makes the training step of an nnx model; arguments and metrics as for `linen_step`.

    `loss(model, batch, train)` gets the model itself, as a view in training mode: `use_running_average` and `deterministic`
    are set on every layer, and a layer that is given `use_running_average` at its call follows the call, as in Flax; so
    leave it out there for "frozen" to hold. Random states live in the model, and the step's key is not used.

    Args:
      structure: the graph definition, from `nnx_init`.
      loss: see above.
      tx: an optax transformation.
      micro_batches: see `linen_step`.
      statistics: see `linen_step`.
      penalty_weights: see `linen_step`.
      mesh: see `linen_step`.
      axis: see `linen_step`.
      specs: see `linen_step`.

    >>> def loss(model, batch, train):
    ...     return jnp.mean((model(batch["x"]) - batch["y"]) ** 2), {}
    >>> structure, state = nnx_init(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tx := optax.sgd(0.1))
    >>> data = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[3.0], [5.0]])}
    >>> state, metrics = jax.jit(nnx_step(structure, loss, tx))(state, data)
    >>> sorted(metrics), int(state.step)
    (['loss', 'penalty'], 1)
    """
    _choose(statistics)
    run = _nnx_run(structure, loss, average=statistics == "frozen", penalty_weights=penalty_weights)

    def absorb(before: Any, after: Any, moments: Any) -> Any:
        pure = merge_trees(nnx.to_pure_dict(before), nnx.to_pure_dict(after), moments)
        nnx.replace_by_pure_dict(after, pure)
        return after

    return _make_step(run, absorb, tx, micro_batches, statistics, Spread(mesh, axis, specs))


def _linen_run(model: Any, loss: Loss, *, average: bool | None, train: bool = True, penalty_weights: Any = None):
    """One forward pass of a linen model: loss, metrics, penalty, the collections afterwards, what the layers saw.

    `average` makes every layer normalize with the stored statistics (True) or with the batch's (False); None leaves it to
    the model.
    """

    def run(params: Any, stats: Any, batch: Batch, key: Any):
        box = {"variables": {"params": params, **stats}, "moments": {}, "losses": {}}

        def call(*args: Any, **kwargs: Any) -> Any:
            if key is not None:
                kwargs.setdefault("rngs", {"dropout": key})
            asked = kwargs.pop("mutable", ())
            mutable = [*stats, "losses", "moments", *([asked] if isinstance(asked, str) else asked)]
            variables = {**box["variables"], "losses": box["losses"], "moments": box["moments"]}
            with contextlib.nullcontext() if average is None else nn.intercept_methods(_forced(average)):
                y, changed = model.apply(variables, *args, mutable=mutable, **kwargs)
            changed = dict(changed)
            box["losses"], box["moments"] = changed.pop("losses", {}), changed.pop("moments", {})
            box["variables"] |= {name: changed.pop(name) for name in stats if name in changed}
            return (y, changed) if asked else y

        value, metrics = loss(call, batch, train)
        after = {name: box["variables"][name] for name in stats}
        return value, metrics, total_penalty(box["losses"], penalty_weights), after, box["moments"]

    return run


def _nnx_run(structure: Any, loss: Loss, *, average: bool, train: bool = True, penalty_weights: Any = None):
    """One forward pass of an nnx model; see `_linen_run`."""
    from normjax.nnx import Moments, Penalty

    def run(params: Any, stats: Any, batch: Batch, key: Any):
        model = _view(nnx.merge(structure, params, stats, copy=True), train=train, average=average)
        captured: Any = nnx.capture(lambda m: loss(m, batch, train), Penalty, Moments)(model)
        (value, metrics), penalties, moments = captured
        penalty = total_penalty(nnx.to_pure_dict(penalties), penalty_weights)
        after = nnx.split(model, nnx.Param, ...)[2]
        return value, metrics, penalty, after, nnx.to_pure_dict(moments)

    return run


def linen_eval(
    model: nn.Module, loss: Loss, *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Callable[[State, Batch], Metrics]:
    """Makes the evaluation `evaluate(state, batch) -> metrics` of a linen model, "loss" among them.

    With a mesh, a batch is spread over its devices as in `linen_step`; one that does not divide is evaluated by each.

    >>> evaluate = linen_eval(nn.Dense(1), lambda call, batch, train: (jnp.sum(call(batch)), {"train": train}))
    >>> evaluate(linen_init(nn.Dense(1), optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 3))), jnp.zeros((2, 3)))
    {'loss': Array(0., dtype=float32), 'train': False}
    """
    spread = Spread(mesh, axis)

    def evaluate(state: State, batch: Batch) -> Metrics:
        call = functools.partial(model.apply, {"params": state.params, **state.stats})
        value, metrics = loss(call, spread(batch) if spread.fits(batch) else batch, False)
        return {"loss": value, **metrics}

    return spread.automatic(evaluate, lambda state: PartitionSpec())


def nnx_eval(
    structure: nnx.GraphDef, loss: Loss, *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Callable[[State, Batch], Metrics]:
    """Makes the evaluation `evaluate(state, batch) -> metrics` of an nnx model, in evaluation mode.

    With a mesh, a batch is spread over its devices as in `linen_eval`.

    >>> structure, state = nnx_init(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> evaluate = nnx_eval(structure, lambda model, batch, train: (jnp.sum(model(batch)), {}))
    >>> evaluate(state, jnp.zeros((2, 3)))
    {'loss': Array(0., dtype=float32)}
    """
    spread = Spread(mesh, axis)

    def evaluate(state: State, batch: Batch) -> Metrics:
        model = _view(nnx.merge(structure, state.params, state.stats, copy=True), train=False, average=True)
        value, metrics = loss(model, spread(batch) if spread.fits(batch) else batch, False)
        return {"loss": value, **metrics}

    return spread.automatic(evaluate, lambda state: PartitionSpec())


def linen_recalibrate(
    model: nn.Module, loss: Loss, *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Callable[..., State]:
    """Makes `recalibrate(state, data, order) -> state`: the running statistics of the parameters as they are now.

    An average over the steps of training mixes the statistics of many earlier parameters. This one evaluates the model
    (`train` is False: no dropout) on every batch, except that each layer normalizes with the batch's own statistics, and
    stores those of all batches together: exact where the row merges (order 2, A = B or None, no windows), else their mean.

    Args:
      model: a linen module.
      loss: as for `linen_step`; only what the layers see matters.
      mesh: as for `linen_eval`.
      axis: as for `linen_eval`.

    Returns:
      A function of the state, data and order, which are those of `epoch`. Statistics of elements that no batch has
      seen, and everything else of the state, stay.

    Raises:
      ValueError: a layer with running statistics saw no batch: it is not one of normjax's.

    Source: Wu & Johnson 2021, section 3 ("precise" batch norm statistics).

    >>> from normjax.linen import BatchNorm
    >>> model, data = BatchNorm(), jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> state = linen_init(model, optax.sgd(0.1), jax.random.key(0), data, use_running_average=True)
    >>> loss = lambda call, batch, train: (jnp.sum(call(batch, use_running_average=not train)), {})
    >>> state = linen_recalibrate(model, loss)(state, data, jnp.array([[0, 1], [2, 3]]))
    >>> state.stats["batch_stats"]["mean"], state.stats["batch_stats"]["var"]
    (Array([4.], dtype=float32), Array([5.], dtype=float32))
    """
    run = _linen_run(model, loss, average=False, train=False)

    def absorb(stats: Any, seen: Any) -> Any:
        stored = stats.get("batch_stats", {})
        pure = recalibrated(bare(stored), seen)
        return {**stats, "batch_stats": nn.meta.replace_boxed(stored, pure)} if stored else stats

    return _make_recalibrate(run, absorb, Spread(mesh, axis))


def nnx_recalibrate(
    structure: nnx.GraphDef, loss: Loss, *, mesh: Mesh | None = None, axis: Axis = "data"
) -> Callable[..., State]:
    """Makes `recalibrate(state, data, order) -> state` for an nnx model; see `linen_recalibrate`.

    >>> from normjax.nnx import BatchNorm
    >>> structure, state = nnx_init(BatchNorm(1, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> data, loss = jnp.array([[1.0], [3.0], [5.0], [7.0]]), lambda model, batch, train: (jnp.sum(model(batch)), {})
    >>> nnx_recalibrate(structure, loss)(state, data, jnp.array([[0, 1], [2, 3]])).stats["var"][...]
    Array([5.], dtype=float32)
    """
    run = _nnx_run(structure, loss, average=False, train=False)

    def absorb(stats: Any, seen: Any) -> Any:
        after = jax.tree.map(lambda a: a, stats)  # a copy: the caller's variables stay as they are
        stored = nnx.to_pure_dict(nnx.filter_state(stats, nnx.BatchStat))
        nnx.replace_by_pure_dict(after, recalibrated(stored, seen))
        return after

    return _make_recalibrate(run, absorb, Spread(mesh, axis))


def _make_recalibrate(run: Any, absorb: Any, spread: Spread) -> Callable[..., State]:
    def recalibrate(state: State, data: Batch, order: jax.Array) -> State:
        def one(_: None, rows: jax.Array):
            batch = spread(jax.tree.map(lambda a: a[rows], data))
            return None, run(state.params, state.stats, batch, None)[-1]

        _, seen = lax.scan(one, None, order)
        return state._replace(stats=absorb(state.stats, seen))

    return spread.automatic(recalibrate, lambda state: as_it_came(state)[0])


def epoch(step: Step, *, mesh: Mesh | None = None, axis: Axis = "data") -> Callable[..., tuple[State, Metrics]]:
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
    spread = Spread(mesh, axis)

    def run(state: Any, data: Any, order: jax.Array, key: Any = None) -> tuple[Any, Metrics]:
        def one(state: Any, rows: jax.Array):
            batch = spread(jax.tree.map(lambda a: a[rows], data))
            return step(state, batch, None if key is None else jax.random.fold_in(key, state.step))

        return lax.scan(one, state, order)

    return spread.automatic(run, as_it_came)


def _make_step(run: Any, absorb: Any, tx: Any, micro_batches: int, statistics: str, spread: "Spread") -> Step:
    """The step that linen and nnx share; `run` is one forward pass, `absorb` merges the statistics of several."""

    def objective(params: Any, stats: Any, batch: Batch, key: Any):
        value, metrics, penalty, after, moments = run(params, stats, batch, key)
        taken = {"loss", "penalty"} & set(metrics)
        if taken:
            raise ValueError(f"the step itself reports {sorted(taken)}; give the metrics of `loss` other names")
        return value + penalty, ({"loss": value, "penalty": penalty, **metrics}, after, moments)

    gradient = jax.grad(objective, has_aux=True)
    if micro_batches < 1:
        raise ValueError(f"micro_batches is at least 1; found {micro_batches!r}")

    def step(state: State, batch: Batch, key: Any = None) -> tuple[State, Metrics]:
        batch = spread(batch)
        if micro_batches == 1:
            grads, (metrics, after, _) = gradient(state.params, state.stats, batch, key)
        else:
            parts = spread(jax.tree.map(lambda a: _split(a, micro_batches), batch), 1)

            def one(carry: Any, numbered: Any):
                (total, stats), (number, part) = carry, numbered
                sub = None if key is None else jax.random.fold_in(key, number)
                grads, (metrics, after, moments) = gradient(state.params, stats, part, sub)
                # Random states go on; running statistics start every part from those before the step.
                carry = jax.tree.map(jnp.add, total, grads), _keep(state.stats, after)
                return carry, (metrics, after, moments)

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            parts = (jnp.arange(micro_batches), parts)
            (grads, _), (metrics, after, moments) = lax.scan(one, (zeros, state.stats), parts)
            grads = jax.tree.map(lambda g: g / micro_batches, grads)
            metrics = jax.tree.map(lambda m: jnp.mean(m, 0), metrics)
            after = absorb(state.stats, after, moments)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stats = after if statistics == "update" else _keep(state.stats, after)
        return spread.settle(State(state.step + 1, params, stats, opt_state)), metrics

    return spread.automatic(step, as_it_came)


def _choose(statistics: str) -> None:
    if statistics not in STATISTICS:
        raise ValueError(f"statistics is one of {', '.join(map(repr, STATISTICS))}; found {statistics!r}")


def _split(a: jax.Array, parts: int) -> jax.Array:
    if a.shape[0] % parts:
        raise ValueError(f"a batch of {a.shape[0]} examples does not split into {parts} equal micro-batches")
    # Strided: each device keeps its own examples, where contiguous parts would lie on some of the devices.
    return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)


def _keep(before: Any, after: Any) -> Any:
    """The state after a step, but the running statistics from before it."""
    if isinstance(before, nnx.State):
        kept = nnx.merge_state(after, nnx.filter_state(before, nnx.BatchStat))
        return kept
    return {**after, **({"batch_stats": before["batch_stats"]} if "batch_stats" in before else {})}


def _view(model: Any, train: bool, average: bool) -> Any:
    flags = {"use_running_average": average, "deterministic": not train}
    return nnx.view(model, raise_if_not_found=False, **flags)


def _forced(average: bool) -> Any:
    """Makes every layer that can normalize with stored statistics do so, or not, whatever the model asks of it."""

    def intercept(next_method: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not hasattr(module, "use_running_average"):
            return next_method(*args, **kwargs)
        if module.use_running_average is not None:
            object.__setattr__(module, "use_running_average", average)  # the layer is bound afresh at every apply
            return next_method(*args, **kwargs)
        kwargs.pop("use_running_average", None)
        return next_method(*args[:1], use_running_average=average, **kwargs)

    return intercept
