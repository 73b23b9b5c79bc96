"""Where arrays lie: on one device, on all devices of a mesh, or in parts that each of several processes has read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import normjax.train
from experiments.common import cli


def from_process_0(make: Callable[[], Any], like: Any) -> Any:
    """What `make` returns in process 0, bit for bit in all: a pytree of NumPy arrays of the shapes of `like`."""
    with cli.together():
        made = make() if jax.process_index() == 0 else like
    if jax.process_count() == 1:
        return made
    leaves, tree = jax.tree.flatten(made)
    # As bytes: what is sent is added up, and a sum knows no -0.0.
    sent = np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    pieces = np.split(received, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    whole = [piece.view(leaf.dtype).reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(tree, whole)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays on every device of the mesh."""
    return jax.tree.map(jnp.asarray, tree) if mesh is None else normjax.train.place(tree, mesh)


def spread(data: Any, examples: int, mesh: Mesh | None) -> Any:
    """The training examples on the devices: all on each, or where there are several processes, a part on each."""
    if mesh is None or jax.process_count() == 1:
        return everywhere(data, mesh)
    count = _rows_each(examples, mesh)
    padded = jax.tree.map(lambda a: np.pad(a, [(0, count - len(a)), *[(0, 0)] * (a.ndim - 1)]), data)
    return normjax.train.shard(padded, mesh)


def _rows_each(examples: int, mesh: Mesh) -> int:
    """How many rows each process adds to the whole array: its examples, and padding for equal parts on its devices."""
    return -(-examples // mesh.size) * (mesh.size // jax.process_count())


def rows(order: np.ndarray, examples: int, mesh: Mesh | None) -> np.ndarray:
    """Where the examples with these numbers lie in the whole array of `spread`."""
    if mesh is None or jax.process_count() == 1:
        return order
    return order % jax.process_count() * _rows_each(examples, mesh) + order // jax.process_count()


def total(counts: np.ndarray) -> np.ndarray:
    """Sums integer counts below 2 ** 31 over the processes.

    >>> total(np.array([1, 2]))
    array([1, 2])
    """
    if jax.process_count() == 1:
        return counts
    return multihost_utils.process_allgather(counts.astype(np.int32)).astype(np.int64).sum(0)
