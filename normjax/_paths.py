"""A path of a pytree as text: one spelling for linen's dictionaries, `nnx.State`s, nnx modules and optimizer states."""

from typing import Any, TypeAlias

import jax
from jax.tree_util import KeyPath

PyTree: TypeAlias = Any
"""Any tree of arrays that JAX's tree functions take: no type says what its leaves are, nor which classes are nodes."""


def path_parts(path: KeyPath) -> tuple[str, ...]:
    """The keys of a path as text, one by one.

    Args:
      path: as `jax.tree_util.tree_leaves_with_path` gives it.

    Returns:
      The names, numbers and attributes along it; a name that holds a slash stays one part.

    >>> [path_parts(path) for path, _ in jax.tree_util.tree_leaves_with_path({"a": [1.0, {"dense/kernel": 2.0}]})]
    [('a', '0'), ('a', '1', 'dense/kernel')]
    """
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_name(path: KeyPath) -> str:
    """A path as text. An nnx variable and a box of linen end theirs with `value`, which is left out.

    Args:
      path: as `jax.tree_util.tree_leaves_with_path` gives it.

    Returns:
      The keys with slashes between them.

    >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({"a": [1.0, {"kernel": 2.0}]})]
    ['a/0', 'a/1/kernel']
    """
    boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    return "/".join(path_parts(path[:-1] if boxed else path))
