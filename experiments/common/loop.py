"""The loop of every experiment: all seeds of a row at once, a chunk of steps as one lax.scan.

    train(folders, Task(init, step, evaluate, data, test, batch_size=...), steps=..., evaluate_every=...)

The data lie on the device. The seeds run side by side (one vmap) or one after the other (one lax.map).
Between chunks the states are evaluated, and metrics and checkpoints are committed (`runs.py`); a killed run
continues at the last commit and ends with the same bits: the order of the examples is a function of (key,
epoch), and a chunk starts at the same steps, so it is the same compiled program. Seeds that were added later, or
that lost their checkpoint, train by themselves, in a program of fewer seeds: their numbers are the same but for rounding.

On a mesh (`cli.connect`), the batch of each step is spread over the devices, and the states lie on all
of them. The numbers are those of one device but for rounding, so a run may also go on with another
number of devices. Of several processes, each holds its part of the data, and process 0 alone writes.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax.train
from experiments.common import cli, files, place, runs, stop

State = Any
Batch = Any  # a pytree of arrays with a leading axis of examples
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Task:
    """How a row is trained: functions of one seed, and what they are given.

    Attributes:
      init: makes the state from a key.
      step: one training step.
      evaluate: metrics (scalars) of a state on all of `test`.
      data: training examples; of process k of p, the examples k, k + p, k + 2 p, ... of all.
      test: held-out examples, all of them in every process.
      batch_size: examples a step.
      examples: number of training examples in all processes; None for those in `data`.
      shuffle: whether an epoch is a permutation of the examples; else it takes them as they come.
      side_by_side: whether the seeds train in one vmap, or one after the other. Small networks are faster side by
        side; large ones, whose convolutions XLA turns into slow grouped ones, are not.
      noise: whether `step` takes a key as well, another one for each step, for dropout and augmentation.
      say: what the bar shows of an evaluation, [seeds] each.
      finish: called with the seeds' folders and the bar after the last step, and again where a complete row is resumed.
    """

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, Metrics]]
    evaluate: Callable[[State, Batch], Metrics]
    data: Batch
    test: Batch
    batch_size: int
    examples: int | None = None
    shuffle: bool = True
    side_by_side: bool = True
    noise: bool = False
    say: Callable[[dict[str, np.ndarray]], str] = lambda metrics: ""
    finish: Callable[[Sequence[Path], Callable[[int, str], None]], None] = lambda folders, show: None


def train(
    folders: Sequence[Path],
    task: Task,
    *,
    steps: int,
    evaluate_every: int,
    mesh: Mesh | None = None,
    on_chunk: Callable[[int, dict[str, np.ndarray]], None] = lambda step, metrics: None,
) -> None:
    """Trains one row to `steps`, from where its folders (of each seed, made by `folders.prepare`) say that it stopped.

    A line of metrics.jsonl holds what `step` returned for that step (1, 2, ...). The last line of a chunk of
    `evaluate_every` also holds what `evaluate` says of the state then, as test_<name>, and the seconds spent in
    training steps so far, all seeds together, compilation, evaluation and writing left out. Line 0 holds the evaluation
    of the initial state. `on_chunk` is called with the steps done, their mean over all seeds, and each evaluation of those
    that train together, [seeds] each. On a mesh, `task` was made for it too.

    Raises:
      RunError: what a folder holds cannot be read, or nothing can be written.
    """
    begin = np.array(place.from_process_0(lambda: np.array(runs.starts(folders)), np.zeros(len(folders), np.int64)))
    for step in sorted(set(begin.tolist()), reverse=True):
        group, others = np.flatnonzero(begin == step), np.maximum(begin, 0).sum() - max(step, 0) * np.sum(begin == step)

        def show(done: int, evaluation: dict[str, np.ndarray], n: int = len(group), others: int = int(others)) -> None:
            on_chunk((others + n * done) // len(folders), evaluation)

        _train(folders, group, step, task, steps, evaluate_every, mesh, show)
        begin[group] = steps


def _train(
    folders: Sequence[Path],
    group: np.ndarray,
    begin: int,
    task: Task,
    steps: int,
    evaluate_every: int,
    mesh: Mesh | None,
    on_chunk: Callable[[int, dict[str, np.ndarray]], None],
) -> None:
    """Trains some seeds together, from a step that all of them have reached; -1 is before the first weights."""
    init_keys, order_keys, noise_keys = (each[group] for each in keys(len(folders)))
    folders = [folders[k] for k in group]
    seconds, states = _begin(folders, begin, task.init, init_keys)
    stop.at(begin)
    if begin == steps:
        return
    fresh, done = begin < 0, max(begin, 0)
    examples = len(jax.tree.leaves(task.data)[0]) if task.examples is None else task.examples
    # Through the host, so that first and restored states are alike to the compiler.
    states = place.everywhere(jax.tree.map(np.asarray, states), mesh)
    data, test = place.spread(task.data, examples, mesh), place.everywhere(task.test, mesh)
    judge, compiled = _programs(task, mesh)
    noise = noise_keys if task.noise else None

    def commit(first: int, metrics: Metrics) -> None:
        evaluation = jax.device_get(judge(states, test))
        on_chunk(done, evaluation)
        with cli.together():
            with stop.writing(done):
                if jax.process_index() == 0:
                    runs.commit(folders, done, _lines(first, metrics, evaluation, seconds), states)
            stop.reached()

    if fresh:
        commit(0, {})
    while done < steps:
        end = min(done + evaluate_every - done % evaluate_every, steps)
        run = compiled(states, end - done, noise, data)
        rows = batches(order_keys, examples, task.batch_size, done, end, task.shuffle)
        order = place.everywhere(place.rows(rows, examples, mesh), mesh)
        start = time.perf_counter()
        states, metrics = jax.block_until_ready(run((states, order, noise), data))
        seconds += time.perf_counter() - start
        first, done = done + 1, end
        commit(first, metrics)


def _begin(
    folders: Sequence[Path], begin: int, init: Callable[[jax.Array], State], init_keys: jax.Array
) -> tuple[float, State]:
    """The seconds so far and the states at a step; first states for -1."""
    shapes = jax.eval_shape(jax.vmap(init), init_keys)
    nothing = np.float64(0), jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    seconds, states = place.from_process_0(lambda: _restore(folders, begin, nothing), nothing)
    if begin < 0:
        # Not under jit: that would compile the generators anew for every row, for seconds.
        states = jax.vmap(init)(init_keys)
    return float(seconds), states


def _programs(task: Task, mesh: Mesh | None) -> tuple[Callable[..., Metrics], Callable[..., Any]]:
    """What evaluates the states, and what compiles a chunk of so many steps, once for each length."""
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    judge = jax.jit(_over_seeds(task.evaluate, task.side_by_side), out_shardings=replicated)
    epoch = normjax.train.epoch(task.step, mesh=mesh)
    advance = jax.jit(
        _over_seeds(lambda own, data: epoch(own[0], data, *own[1:]), task.side_by_side), out_shardings=replicated
    )
    programs: dict[int, Any] = {}

    def compiled(states: State, length: int, noise: jax.Array | None, data: Batch) -> Any:
        if length not in programs:
            shape = len(jax.tree.leaves(states)[0]), length, task.batch_size
            order = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)
            programs[length] = advance.lower((states, order, noise), data).compile()
        return programs[length]

    return judge, compiled


def _restore(folders: Sequence[Path], begin: int, nothing: tuple) -> tuple:
    """The seconds so far and the states at a step, or `nothing`."""
    restored = runs.rewind(folders, nothing[1], begin)
    if restored is None:
        return nothing
    path = folders[0] / "metrics.jsonl"
    try:
        return np.float64(files.read(path)[-1]["seconds"]), restored[1]
    except (KeyError, TypeError, ValueError):
        raise files.unreadable(path, f"its line of step {begin} lacks the seconds") from None


def _over_seeds(f: Callable[[Any, Any], Any], side_by_side: bool) -> Callable[[Any, Any], Any]:
    """`f(own, shared)` of one seed, for all seeds: the first argument has a leading axis of them."""
    if side_by_side:
        return jax.vmap(f, in_axes=(0, None))
    return lambda each, shared: jax.lax.map(lambda own: f(own, shared), each)


def keys(seeds: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys of the first weights, of the order of examples and of noise, [seeds] each.

    They depend on the seed alone: rows of an experiment differ in neither.
    """
    each = jnp.stack([jax.random.key(k) for k in range(seeds)])
    weights, order, noise = (jax.vmap(jax.random.fold_in, (0, None))(each, i) for i in (0, 1, 2))
    return weights, order, noise


def batches(order_keys: jax.Array, examples: int, size: int, start: int, stop: int, shuffle: bool = True) -> np.ndarray:
    """Indices of the examples of steps start + 1 .. stop, int32 [seeds, steps, size].

    An epoch is a permutation drawn from (key, epoch), or all examples as they come; what does not
    fill a batch is left out of it.

    >>> _, order, _ = keys(1)
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
    as_they_come = np.broadcast_to(np.arange(examples), (len(order_keys), examples))
    order = [
        np.asarray(_permutations(order_keys, epoch, examples)) if shuffle else as_they_come
        for epoch in range(first, last + 1)
    ]
    steps = np.concatenate([epoch[:, : per_epoch * size] for epoch in order], axis=1).reshape(len(order_keys), -1, size)
    offset = first * per_epoch
    return steps[:, start - offset : stop - offset].astype(np.int32)


@functools.partial(jax.jit, static_argnums=2)
def _permutations(order_keys: jax.Array, epoch: int, examples: int) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), examples)

    return jax.vmap(one)(order_keys)


def trained(folder: Path, init: Callable[[jax.Array], State]) -> State:
    """The state of one seed at its last checkpoint; `init` says what it looks like."""
    return runs.load(folder, jax.eval_shape(init, jax.random.key(0)))


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


def _lines(first: int, metrics: Metrics, evaluation: dict[str, np.ndarray], seconds: float) -> list[list[files.Line]]:
    """For each seed, a line a step; the evaluation and the seconds in the last one."""
    columns = {name: np.asarray(values) for name, values in metrics.items()}  # [seeds, steps]
    seeds = len(next(iter(evaluation.values())))
    length = next(iter(columns.values())).shape[1] if columns else 1
    lines = []
    for k in range(seeds):
        mine = [
            {"step": first + t} | {name: files.number(v[k, t]) for name, v in columns.items()} for t in range(length)
        ]
        mine[-1] |= {f"test_{name}": files.number(v[k]) for name, v in evaluation.items()}
        mine[-1] |= {"seconds": round(seconds, 3)}
        lines.append(mine)
    return lines
