"""The parameters of a model by path, and the square root whose slope is 0 at 0: for the rooms that measure and project."""

import jax
import jax.numpy as jnp

from normjax._paths import path_name

ByPath = dict[str, jax.Array]  # {"Dense_0/kernel": array}


def arrays_by_path(tree: object) -> ByPath:
    """The arrays of a tree by path.

    Args:
      tree: any pytree: linen's dictionaries, an `nnx.State`, an nnx module.

    Returns:
      {path, joined by "/": array}, in the order in which JAX flattens the tree.

    >>> arrays_by_path({"dense": {"bias": jnp.zeros(1)}})
    {'dense/bias': Array([0.], dtype=float32)}
    """
    return {path_name(path): jnp.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def paths_and_shapes(leaves: ByPath) -> str:
    """The first twelve paths and shapes as a sentence, for errors.

    >>> paths_and_shapes({"dense/bias": jnp.zeros(1)})
    'The parameters are dense/bias (1,)'
    """
    first = ", ".join(f"{name} {leaf.shape}" for name, leaf in list(leaves.items())[:12])
    return f"The parameters are {first}{', ...' if len(leaves) > 12 else ''}"


def safe_root(square: jax.Array) -> jax.Array:
    """The square root, with slope 0 at 0 in place of an infinite one.

    >>> jax.vmap(jax.grad(safe_root))(jnp.array([0.0, 4.0]))
    Array([0.  , 0.25], dtype=float32)
    """
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
