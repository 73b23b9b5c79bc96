"""The L1 penalty on centred activations (Ren et al. 2017): alpha times the mean of |v|, once a layer.

v is `normalize(...).centered`; in training it is centred with the batch's own statistics. A layer that does not centre
is penalized on x itself. The mean is over the valid elements of all shards: sums and counts are combined, then divided.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import as_weights, require_float, statistics_dtype, zero_masked
from normjax._expect.sharding import axis_size
from normjax._expect.sizes import as_number
from normjax._leaves import AMOUNT
from normjax._paths import path_parts


def l1_penalty(
    centered: ArrayLike, alpha: ArrayLike = 1.0, *, mask: ArrayLike | None = None, axis_name: str | Sequence[str] = ()
) -> jax.Array:
    """Computes alpha * mean |v| of one layer, a scalar of float32 or wider; 0 where nothing is valid.

    Args:
      centered: centred activations v, of any shape. [units u]
      alpha: weight of the layer. [1 / u, for a loss without units]
      mask: boolean mask or weights that broadcast against `centered`; where it is zero an element does not count.
      axis_name: mapped axes (vmap, shard_map, pmap) whose elements belong to the same mean.

    Source: Ren et al. 2017, equation 7.

    >>> l1_penalty(jnp.array([[1.0, -3.0], [2.0, 2.0]]), 0.5)
    Array(1., dtype=float32)
    >>> l1_penalty(jnp.array([[1.0, jnp.nan], [3.0, 0.0]]), mask=jnp.array([[True, False], [True, False]]))
    Array(2., dtype=float32)
    """
    if hasattr(centered, "centered"):
        raise TypeError(
            f"l1_penalty takes centred activations, normalize(...).centered; found {type(centered).__name__}"
        )
    v, alpha = require_float(centered, "l1_penalty"), AMOUNT("alpha", alpha)
    v = v.astype(statistics_dtype(v.dtype))
    weights = as_weights(mask, v)
    size = jnp.abs(zero_masked(v, weights))
    if weights is None:
        value, count = jnp.sum(size), jnp.asarray(as_number(v.shape, size.dtype))
    else:
        value, count = jnp.sum(size * weights.value), jnp.sum(jnp.broadcast_to(weights.value, v.shape))
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for name in names:
        axis_size(name)
    if names:
        value, count = lax.psum((value, count), names)
    mean = jnp.where(count > 0, value / jnp.where(count > 0, count, 1), 0)
    return jnp.asarray(alpha, mean.dtype) * mean


def total_penalty(
    penalties: object, weights: Mapping[str, ArrayLike] | None = None, default: ArrayLike = 1.0
) -> jax.Array:
    """Adds the penalties of a model's layers, a float32 scalar; 0 for an empty tree.

    Args:
      penalties: a pytree of scalars, such as the `losses` collection of a linen model.
      weights: factor by path, for paths that contain the key as a component ("conv1"); the first that matches counts.
      default: factor of the layers that no key matches.

    >>> losses = {"conv1": {"l1": jnp.array(2.0)}, "conv2": {"l1": jnp.array(3.0)}}
    >>> total_penalty(losses), total_penalty(losses, {"conv2": 10.0})
    (Array(5., dtype=float32), Array(32., dtype=float32))
    """
    total = jnp.zeros((), np.float32)
    for path, value in jax.tree_util.tree_leaves_with_path(penalties):
        parts = path_parts(path)
        factor = next((w for name, w in (weights or {}).items() if name in parts), default)
        total = total + jnp.asarray(factor, np.float32) * jnp.sum(jnp.asarray(value).astype(np.float32))
    return total
