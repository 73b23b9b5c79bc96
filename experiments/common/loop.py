"""The loop of every experiment: all seeds of a row at once, a chunk of steps as one lax.scan.

    train(folders, init, step, evaluate, data, test, steps=..., batch_size=..., evaluate_every=...)

The data lie on the device. The seeds run under one vmap. Between chunks the states are evaluated,
and metrics and checkpoints are committed (`runs.py`); a killed run continues at the last commit and
ends with the same bits: the order of the examples is a function of (key, epoch), and a chunk
starts at the same steps, so it is the same compiled program.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import normjax.train
from experiments.common import runs

State = Any
Batch = Any  # a pytree of arrays with a leading axis of examples
Metrics = dict[str, jax.Array]


def train(
    folders: Sequence[Path],
    init: Callable[[jax.Array], State],
    step: Callable[[State, Batch], tuple[State, Metrics]],
    evaluate: Callable[[State, Batch], Metrics],
    data: Batch,
    test: Batch,
    *,
    steps: int,
    batch_size: int,
    evaluate_every: int,
    on_chunk: Callable[[int, dict[str, np.ndarray]], None] = lambda step, metrics: None,
) -> State:
    """Trains one row to `steps`, from where its folders say that it stopped.

    A line of metrics.jsonl holds what `step` returned for that step (1, 2, ...). The last line of a
    chunk also holds what `evaluate` says of the state then, as test_<name>, and the seconds spent
    in training steps so far, all seeds together, compilation, evaluation and writing left out.
    Line 0 holds the evaluation of the initial state.

    Args:
      folders: a folder for each seed, made by `runs.create`.
      init: makes the state of one seed from a key.
      step: one training step of one seed.
      evaluate: metrics (scalars) of one seed's state on all of `test`.
      data: training examples.
      test: held-out examples.
      steps: number of training steps.
      batch_size: examples a step.
      evaluate_every: steps in a chunk; the last one may be shorter.
      on_chunk: called as on_chunk(step, evaluation) with each evaluation, [seeds] each.

    Returns:
      The states after the last step, with a leading axis of seeds.
    """
    init_keys, order_keys = keys(len(folders))
    examples = len(jax.tree.leaves(data)[0])
    data, test = jax.tree.map(jnp.asarray, (data, test))

    shapes = jax.eval_shape(jax.vmap(init), init_keys)
    restored = runs.rewind(folders, shapes)
    if restored is not None:
        done, states = restored
        seconds = runs.read(folders[0] / "metrics.jsonl")[-1]["seconds"]
        if done == steps:
            return states
    else:
        # Not under jit: that would compile the generators anew for every row, for seconds.
        done, states, seconds = 0, jax.vmap(init)(init_keys), 0.0
    # Through the host, so that first and restored states are alike to the compiler.
    states = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), states)

    judge = jax.jit(jax.vmap(evaluate, in_axes=(0, None)))
    advance = jax.jit(jax.vmap(normjax.train.epoch(step), in_axes=(0, None, 0)))

    @functools.cache
    def compiled(length: int) -> Callable[..., tuple[State, Metrics]]:
        order = jax.ShapeDtypeStruct((len(folders), length, batch_size), jnp.int32)
        return advance.lower(states, data, order).compile()

    def evaluated() -> dict[str, np.ndarray]:
        metrics = jax.device_get(judge(states, test))
        on_chunk(done, metrics)
        return metrics

    if restored is None:
        runs.commit(folders, 0, _lines(0, {}, evaluated(), seconds), states)
    while done < steps:
        stop = min(done + evaluate_every - done % evaluate_every, steps)
        run = compiled(stop - done)
        order = batches(order_keys, examples, batch_size, done, stop)
        start = time.perf_counter()
        states, metrics = jax.block_until_ready(run(states, data, order))
        seconds += time.perf_counter() - start
        first, done = done + 1, stop
        runs.commit(folders, done, _lines(first, metrics, evaluated(), seconds), states)
    return states


def keys(seeds: int) -> tuple[jax.Array, jax.Array]:
    """Keys of the first weights and of the order of examples, [seeds] each.

    They depend on the seed alone: rows of an experiment differ in neither.
    """
    each = jnp.stack([jax.random.key(k) for k in range(seeds)])
    weights, order = (jax.vmap(jax.random.fold_in, (0, None))(each, i) for i in (0, 1))
    return weights, order


def batches(order_keys: jax.Array, examples: int, size: int, start: int, stop: int) -> jax.Array:
    """Indices of the examples of steps start + 1 .. stop, int32 [seeds, steps, size].

    An epoch is a permutation drawn from (key, epoch); what does not fill a batch is left out of it.

    >>> _, order = keys(1)
    >>> whole = batches(order, 10, 5, 0, 4)
    >>> whole.shape, sorted(whole[0, :2].ravel().tolist())
    ((1, 4, 5), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    >>> bool((batches(order, 10, 5, 3, 4) == whole[:, 3:]).all())
    True
    """
    per_epoch = examples // size
    if per_epoch == 0:
        raise ValueError(f"a batch of {size} from {examples} examples")
    first, last = start // per_epoch, (stop - 1) // per_epoch
    order = [
        np.asarray(_permutations(order_keys, epoch, examples))[:, : per_epoch * size]
        for epoch in range(first, last + 1)
    ]
    steps = np.concatenate(order, axis=1).reshape(len(order_keys), -1, size)
    offset = first * per_epoch
    return jnp.asarray(steps[:, start - offset : stop - offset], jnp.int32)


@functools.partial(jax.jit, static_argnums=2)
def _permutations(order_keys: jax.Array, epoch: int, examples: int) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), examples)

    return jax.vmap(one)(order_keys)


def mean_over(evaluate: Callable[[State, Batch], Metrics], state: State, data: Batch, size: int) -> Metrics:
    """Metrics of a whole data set from their means over batches of `size` and the remainder.

    >>> mean = lambda state, batch: {"mean": jnp.mean(batch)}
    >>> float(mean_over(mean, None, jnp.arange(7.0), 3)["mean"])
    3.0
    """
    n = len(jax.tree.leaves(data)[0])
    whole = n // size * size
    parts = []
    if whole:
        stack = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), data)
        metrics = jax.lax.map(lambda batch: evaluate(state, batch), stack)
        parts.append((whole, jax.tree.map(lambda a: a.mean(axis=0), metrics)))
    if whole < n:
        rest = jax.tree.map(lambda a: a[whole:], data)
        parts.append((n - whole, evaluate(state, rest)))
    return jax.tree.map(
        lambda *means: sum(m * (k / n) for (k, _), m in zip(parts, means, strict=True)),
        *(metrics for _, metrics in parts),
    )


def _lines(first: int, metrics: Metrics, evaluation: dict[str, np.ndarray], seconds: float) -> list[list[runs.Line]]:
    """For each seed, a line a step; the evaluation and the seconds in the last one."""
    columns = {name: np.asarray(values) for name, values in metrics.items()}  # [seeds, steps]
    seeds = len(next(iter(evaluation.values())))
    length = next(iter(columns.values())).shape[1] if columns else 1
    lines = []
    for k in range(seeds):
        mine = [
            {"step": first + t} | {name: runs.number(v[k, t]) for name, v in columns.items()} for t in range(length)
        ]
        mine[-1] |= {f"test_{name}": runs.number(v[k]) for name, v in evaluation.items()}
        mine[-1] |= {"seconds": round(seconds, 3)}
        lines.append(mine)
    return lines
