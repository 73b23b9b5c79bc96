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

Inside `jax.shard_map` a step leaves gradients to the caller: average both the loss and the gradient over the mapped axis.
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

from normjax.penalty import total_penalty
from normjax.running import merge_trees

Batch = Any  # a pytree of arrays with the examples along their first axis
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
) -> Step:
    """Makes the training step of a linen model.

    Args:
      model: a linen module.
      loss: `loss(call, batch, train)`; `call` is `model.apply` with the variables bound, running statistics and sown
        penalties looked after, and `rngs={"dropout": key}` unless the caller gives others.
      tx: an optax transformation.
      micro_batches: the batch is split into so many equal parts, whose gradients and metrics are averaged. Each part is
        normalized by itself; what is stored are the statistics of all parts together, merged exactly where the row
        allows it (order 2, A = B or None), else averaged.
      statistics: "update" the running ones; "keep" them, while normalizing with the batch's; or "frozen": normalize with
        the stored ones and leave them (fine-tuning).
      penalty_weights: factors of the layers' penalties by path component, see `total_penalty`.

    Returns:
      `step(state, batch, key=None) -> (state, metrics)`. metrics: "loss" (of the task), "penalty", and the user's.

    Raises:
      ValueError: an unknown way with statistics; a batch that does not divide; metrics that are called loss or penalty.

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

    def run(params: Any, stats: Any, batch: Batch, key: Any):
        box = {"variables": {"params": params, **stats}, "moments": {}, "losses": {}}

        def call(*args: Any, **kwargs: Any) -> Any:
            if key is not None:
                kwargs.setdefault("rngs", {"dropout": key})
            asked = kwargs.pop("mutable", ())
            mutable = [*stats, "losses", "moments", *([asked] if isinstance(asked, str) else asked)]
            variables = {**box["variables"], "losses": box["losses"], "moments": box["moments"]}
            with nn.intercept_methods(_freeze) if statistics == "frozen" else contextlib.nullcontext():
                y, changed = model.apply(variables, *args, mutable=mutable, **kwargs)
            changed = dict(changed)
            box["losses"], box["moments"] = changed.pop("losses", {}), changed.pop("moments", {})
            box["variables"] |= {name: changed.pop(name) for name in stats if name in changed}
            return (y, changed) if asked else y

        value, metrics = loss(call, batch, True)
        after = {name: box["variables"][name] for name in stats}
        return value, metrics, total_penalty(box["losses"], penalty_weights), after, box["moments"]

    def absorb(before: Any, after: Any, moments: Any) -> Any:
        if "batch_stats" not in before:
            return after
        return {**after, "batch_stats": merge_trees(before["batch_stats"], after["batch_stats"], moments)}

    return _make_step(run, absorb, tx, micro_batches, statistics)


def nnx_step(
    structure: nnx.GraphDef,
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    statistics: str = "update",
    penalty_weights: Mapping[str, Any] | None = None,
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

    >>> def loss(model, batch, train):
    ...     return jnp.mean((model(batch["x"]) - batch["y"]) ** 2), {}
    >>> structure, state = nnx_init(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tx := optax.sgd(0.1))
    >>> data = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[3.0], [5.0]])}
    >>> state, metrics = jax.jit(nnx_step(structure, loss, tx))(state, data)
    >>> sorted(metrics), int(state.step)
    (['loss', 'penalty'], 1)
    """
    from normjax.nnx import Moments, Penalty

    _choose(statistics)

    def run(params: Any, stats: Any, batch: Batch, key: Any):
        model = _view(nnx.merge(structure, params, stats, copy=True), train=True, average=statistics == "frozen")
        captured: Any = nnx.capture(lambda m: loss(m, batch, True), Penalty, Moments)(model)
        (value, metrics), penalties, moments = captured
        penalty = total_penalty(nnx.to_pure_dict(penalties), penalty_weights)
        after = nnx.split(model, nnx.Param, ...)[2]
        return value, metrics, penalty, after, nnx.to_pure_dict(moments)

    def absorb(before: Any, after: Any, moments: Any) -> Any:
        pure = merge_trees(nnx.to_pure_dict(before), nnx.to_pure_dict(after), moments)
        nnx.replace_by_pure_dict(after, pure)
        return after

    return _make_step(run, absorb, tx, micro_batches, statistics)


def linen_eval(model: nn.Module, loss: Loss) -> Callable[[State, Batch], Metrics]:
    """Makes the evaluation `evaluate(state, batch) -> metrics` of a linen model, "loss" among them.

    >>> evaluate = linen_eval(nn.Dense(1), lambda call, batch, train: (jnp.sum(call(batch)), {"train": train}))
    >>> evaluate(linen_init(nn.Dense(1), optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 3))), jnp.zeros((2, 3)))
    {'loss': Array(0., dtype=float32), 'train': False}
    """

    def evaluate(state: State, batch: Batch) -> Metrics:
        call = functools.partial(model.apply, {"params": state.params, **state.stats})
        value, metrics = loss(call, batch, False)
        return {"loss": value, **metrics}

    return evaluate


def nnx_eval(structure: nnx.GraphDef, loss: Loss) -> Callable[[State, Batch], Metrics]:
    """Makes the evaluation `evaluate(state, batch) -> metrics` of an nnx model, in evaluation mode.

    >>> structure, state = nnx_init(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> evaluate = nnx_eval(structure, lambda model, batch, train: (jnp.sum(model(batch)), {}))
    >>> evaluate(state, jnp.zeros((2, 3)))
    {'loss': Array(0., dtype=float32)}
    """

    def evaluate(state: State, batch: Batch) -> Metrics:
        model = _view(nnx.merge(structure, state.params, state.stats, copy=True), train=False, average=True)
        value, metrics = loss(model, batch, False)
        return {"loss": value, **metrics}

    return evaluate


def epoch(step: Step) -> Callable[..., tuple[State, Metrics]]:
    """Makes `run(state, data, order, key=None)`: many steps under one `lax.scan`, the data on the device.

    Args:
      step: from `linen_step` or `nnx_step`.

    Returns:
      A function of the state, data (a pytree of arrays, examples along the first axis), order (int32 indices, [steps,
      batch]) and a key, from which step k takes `fold_in(key, state.step)`. It returns the last state and the metrics
      of every step, each `[steps, ...]`.

    >>> step = lambda state, batch, key=None: (state + batch.sum(), {"sum": batch.sum()})
    >>> epoch(step)(jnp.array(0.0), jnp.arange(4.0), jnp.array([[0, 1], [2, 3]]))
    (Array(6., dtype=float32), {'sum': Array([1., 5.], dtype=float32)})
    """

    def run(state: Any, data: Any, order: jax.Array, key: Any = None) -> tuple[Any, Metrics]:
        def one(state: Any, rows: jax.Array):
            batch = jax.tree.map(lambda a: a[rows], data)
            return step(state, batch, None if key is None else jax.random.fold_in(key, state.step))

        return lax.scan(one, state, order)

    return run


def _make_step(run: Any, absorb: Any, tx: Any, micro_batches: int, statistics: str) -> Step:
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
        if micro_batches == 1:
            grads, (metrics, after, _) = gradient(state.params, state.stats, batch, key)
        else:
            parts = jax.tree.map(lambda a: _split(a, micro_batches), batch)

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
        return State(state.step + 1, params, stats, opt_state), metrics

    return step


def _choose(statistics: str) -> None:
    if statistics not in STATISTICS:
        raise ValueError(f"statistics is one of {', '.join(map(repr, STATISTICS))}; found {statistics!r}")


def _split(a: jax.Array, parts: int) -> jax.Array:
    if a.shape[0] % parts:
        raise ValueError(f"a batch of {a.shape[0]} examples does not split into {parts} equal micro-batches")
    return a.reshape(parts, a.shape[0] // parts, *a.shape[1:])


def _keep(before: Any, after: Any) -> Any:
    """The state after a step, but the running statistics from before it."""
    if isinstance(before, nnx.State):
        kept = nnx.merge_state(after, nnx.filter_state(before, nnx.BatchStat))
        return kept
    return {**after, **({"batch_stats": before["batch_stats"]} if "batch_stats" in before else {})}


def _view(model: Any, train: bool, average: bool) -> Any:
    flags = {"use_running_average": average, "deterministic": not train}
    return nnx.view(model, raise_if_not_found=False, **flags)


def _freeze(next_method: Any, args: tuple, kwargs: dict, context: Any) -> Any:
    """Makes every layer that can normalize with stored statistics do so, whatever the model asks of it."""
    module = context.module
    if context.method_name != "__call__" or not hasattr(module, "use_running_average"):
        return next_method(*args, **kwargs)
    if module.use_running_average is not None:
        object.__setattr__(module, "use_running_average", True)  # the layer is bound afresh at every apply
        return next_method(*args, **kwargs)
    kwargs.pop("use_running_average", None)
    return next_method(*args[:1], use_running_average=True, **kwargs)
