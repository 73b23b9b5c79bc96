"""Paths of a pytree as text, and its arrays by path: one spelling for linen's dictionaries, `nnx.State`s and nnx modules."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

PyTree: TypeAlias = Any
"""Any tree of arrays that JAX's tree functions take: no type says what its leaves are, nor which classes are nodes."""
ByPath = dict[str, jax.Array]  # {"Dense_0/kernel": array}


def path_parts(path: KeyPath) -> tuple[str, ...]:
    """The keys of a path as text, one by one; a name that holds a slash stays one part.

    >>> [path_parts(path) for path, _ in jax.tree_util.tree_leaves_with_path({"a": [1.0, {"dense/kernel": 2.0}]})]
    [('a', '0'), ('a', '1', 'dense/kernel')]
    """
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_name(path: KeyPath) -> str:
    """A path with slashes. An nnx variable and a box of linen end theirs with `value`, which is left out."""
    boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    return "/".join(path_parts(path[:-1] if boxed else path))


def arrays_by_path(tree: PyTree) -> ByPath:
    """The arrays of a tree by path, in the order in which JAX flattens it.

    >>> arrays_by_path({"dense": {"bias": jnp.zeros(1)}})
    {'dense/bias': Array([0.], dtype=float32)}
    """
    return {path_name(path): jnp.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def paths_and_shapes(leaves: ByPath) -> str:
    """The first twelve paths and shapes as a sentence, for errors."""
    first = ", ".join(f"{name} {leaf.shape}" for name, leaf in list(leaves.items())[:12])
    return f"The parameters are {first}{', ...' if len(leaves) > 12 else ''}"
