"""How a batch moves what is stored: an average by exponential, debiased or cumulative weights.

Nothing that is not finite is ever stored, and a field without a valid element leaves its statistic as it was.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax._leaves import SHARE, one_of
from normjax.field import FieldError
from normjax.running.state import AVERAGES, Running
from normjax.theory import Normalizer, Stats

_Given = jax.Array | None


def update(running: Running, batch: Stats, momentum: ArrayLike = 0.99, averaging: str = "exponential") -> Running:
    """Moves the stored statistics towards those of a batch; float32 or wider (complex where the batch is).

    Elements without weight or not finite keep the old value, and their count.

    Args:
      running: the stored statistics, with counts unless the averaging is exponential.
      batch: the statistics of a batch in the shapes that are stored, from `observe`.
      momentum: weight of the old value, as in Flax (PyTorch's is that of the new one); not used by "cumulative".
      averaging: "exponential", "debiased" or "cumulative", see `normjax.running`.

    Source: debiased: Kingma & Ba 2015, section 3.

    >>> batch = Stats(mean=jnp.array([1.0, 2.0]), mean_weight=jnp.array([4.0, 0.0]))
    >>> update(Running(jnp.zeros(2)), batch, momentum=0.5).mean
    Array([0.5, 0. ], dtype=float32)
    >>> update(Running(jnp.zeros(2), mean_count=jnp.zeros(2, jnp.int32)), batch, 0.5, "debiased").mean
    Array([1., 0.], dtype=float32)
    """
    momentum = SHARE("momentum", momentum)
    _require_observed(running, batch)
    one_of("averaging", averaging, AVERAGES)

    def step(old: _Given, new: _Given, weight: _Given, count: _Given) -> tuple[_Given, _Given]:
        if old is None or new is None:
            return old, count
        if averaging == "exponential":
            keep = momentum if isinstance(momentum, float | int) else jnp.asarray(momentum).astype(new.dtype)
        elif count is None:
            raise ValueError(
                f"averaging={averaging!r} needs the counts of batches beside the statistics; `initial` with the same "
                "averaging makes them"
            )
        else:
            keep = (1 - _share(count + 1, momentum, averaging)).astype(new.dtype)
        least = new.dtype if jnp.iscomplexobj(new) else np.float32
        old = old.astype(np.result_type(statistics_dtype(old.dtype), least))
        mixed = (keep * old.astype(new.dtype) + (1 - keep) * new).astype(old.dtype)
        valid = jnp.isfinite(new) & jnp.isfinite(mixed) & (True if weight is None else weight > 0)
        mixed = jax.lax.stop_gradient(jnp.where(_sharded_like(valid, old), _sharded_like(mixed, old), old))
        return mixed, None if count is None else count + _sharded_like(valid, old).astype(count.dtype)

    mean, mean_count = step(running.mean, batch.mean, batch.mean_weight, running.mean_count)
    var, var_count = step(running.var, batch.var, batch.var_weight, running.var_count)
    return Running(mean, var, mean_count, var_count)


def _require_observed(running: Running, batch: Stats) -> None:
    """Raises FieldError for statistics of a batch in the shapes that `normalize` gave them."""
    for name, old, new in (("mean", running.mean, batch.mean), ("var", running.var, batch.var)):
        if old is not None and new is not None and jnp.shape(old) != jnp.shape(new):
            raise FieldError(
                f"the {name} of the batch has shape {jnp.shape(new)}, the stored one {jnp.shape(old)}: give "
                "running.observe(stats, normalizer, layout, x.shape) for the stats that normalize returned"
            )


def _share(t: jax.Array, momentum: ArrayLike, averaging: str) -> jax.Array:
    """The weight of batch t in the average of t batches."""
    t = t.astype(np.float32)
    if averaging == "cumulative":
        return 1 / t
    if isinstance(momentum, float | int):
        decay = np.float32(math.log(momentum) if momentum > 0 else -math.inf)
    else:
        decay = jnp.log(jnp.asarray(momentum, np.float32))
    # (1 - momentum) / (1 - momentum ** t); for a momentum of one, its limit: the mean of all batches.
    return jnp.where(decay < 0, jnp.expm1(decay) / jnp.expm1(jnp.where(decay < 0, decay, -1) * t), 1 / t)


def _sharded_like(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new value sharded as the stored one, which matters on meshes with explicit axes: a scan carries one type."""
    have, want = jax.typeof(new).sharding, jax.typeof(old).sharding
    if have.spec == want.spec:
        return new
    mesh = have.mesh if want.mesh.empty else want.mesh  # statistics made outside a mesh are replicated on any
    return jax.sharding.reshard(new, jax.sharding.NamedSharding(mesh, want.spec))


def require_unbiased(normalizer: Normalizer) -> None:
    """Raises ValueError unless the row's moment is a variance: order 2 and A = B, without windows.

    Args:
      normalizer: the row whose moment is to be corrected.

    >>> require_unbiased(Normalizer(None, "c"))
    Traceback (most recent call last):
    ...
    ValueError: unbiased=True needs a variance: order 2 and A = B, without windows; found Normalizer(None, 'c')
    """
    windows = any(span.window for field in normalizer.fields for span in field.spans)
    if normalizer.order != 2 or normalizer.mean is None or normalizer.mean != normalizer.var or windows:
        raise ValueError(f"unbiased=True needs a variance: order 2 and A = B, without windows; found {normalizer}")


def unbiased(stats: Stats) -> Stats:
    """Statistics with the unbiased variance, var * w / (w - 1) for the weight w behind it, as PyTorch stores it.

    Weights count elements here: w is their sum. Where it is one or less, no unbiased variance exists: the variance stays,
    and the weight becomes 0, so that nothing is stored. Whether the moment is a variance, `require_unbiased` asks.

    Args:
      stats: moments with their weights, of any one shape.

    Source: the running variance of PyTorch's batch norm.

    >>> unbiased(Stats(None, jnp.array([1.0, 1.0]), None, jnp.array([2.0, 1.0])))[1::2]
    (Array([2., 1.], dtype=float32), Array([2., 0.], dtype=float32))
    """
    if stats.var is None:
        return stats
    w = jnp.asarray(stats.var_weight)
    enough = w > 1
    factor = jnp.where(enough, w / jnp.where(enough, w - 1, 1), 1)
    return stats._replace(var=stats.var * factor.astype(stats.var.dtype), var_weight=jnp.where(enough, w, 0))
