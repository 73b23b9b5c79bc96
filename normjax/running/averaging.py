"""How a batch moves what is stored: an average by exponential, debiased or cumulative weights.

Nothing that is not finite is ever stored, and a field without a valid element leaves its statistic as it was.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.jet import jet_rules, zero_prop
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax._leaves import SHARE, one_of
from normjax.field import FieldError
from normjax.running.state import AVERAGES, Running, _require_kinds
from normjax.theory import Normalizer, Stats, row

_Given = jax.Array | None

# JAX lacks this one; booleans do not move.
jet_rules.setdefault(lax.reduce_and_p, functools.partial(zero_prop, lax.reduce_and_p))


def update(running: Running, batch: Stats, momentum: ArrayLike = 0.99, averaging: str = "exponential") -> Running:
    """Moves the stored statistics towards those of a batch; float32, or wider where they are (complex where the batch is).

    Elements without weight keep the old value, and their count. Where the mean or the variance of an element is not finite
    (in the dtype that is stored), it keeps both, so that no mean is stored without its variance; where the two have
    different shapes, all elements count as one.

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
    _require_kinds(running, batch)
    _require_observed(running, batch)
    one_of("averaging", averaging, AVERAGES)
    moments = (
        (running.mean, batch.mean, batch.mean_weight, running.mean_count),
        (running.var, batch.var, batch.var_weight, running.var_count),
    )
    mixed = [_mixed(old, new, count, momentum, averaging) for old, new, _, count in moments]
    finite = [
        None if m is None or old is None else _finite(m, old, new) | (False if weight is None else weight <= 0)
        for m, (old, new, weight, _) in zip(mixed, moments, strict=True)
    ]
    values, counts = [], []
    for m, valid, (old, _, weight, count) in zip(mixed, _together(*finite), moments, strict=True):
        if m is not None and valid is not None and old is not None:
            valid = _sharded_like(valid if weight is None else valid & (weight > 0), m)
            old = jax.lax.stop_gradient(jnp.where(valid, m, old.astype(m.dtype)))
            count = None if count is None else count + valid.astype(count.dtype)
        values.append(old)
        counts.append(count)
    return Running(*values, *counts)


def _mixed(old: _Given, new: _Given, count: _Given, momentum: ArrayLike, averaging: str) -> _Given:
    """The average of the old value and the new one, float32 or as wide as the old; None where one of them is missing."""
    if old is None or new is None:
        return None
    work = np.result_type(statistics_dtype(old.dtype), statistics_dtype(new.dtype))
    kept = statistics_dtype(old.dtype)
    kept = work if jnp.iscomplexobj(new) and not jnp.iscomplexobj(old) else kept
    if averaging == "exponential":
        keep = momentum if isinstance(momentum, float | int) else jnp.asarray(momentum).astype(work)
    elif count is None:
        raise ValueError(
            f"averaging={averaging!r} needs the counts of batches beside the statistics; `initial` with the same "
            "averaging makes them"
        )
    else:
        keep = (1 - _share((count + 1).astype(jnp.finfo(work).dtype), momentum, averaging)).astype(work)
    mixed = keep * old.astype(work) + (1 - keep) * new.astype(work)
    return _sharded_like(mixed.astype(kept), old)


def _finite(mixed: jax.Array, old: jax.Array, new: jax.Array | None) -> jax.Array:
    """Where an average can be stored: it is finite, also in the narrower dtype that the old value may have."""
    narrow = mixed if jnp.iscomplexobj(mixed) else mixed.astype(old.dtype)
    return jnp.isfinite(narrow) if new is None else jnp.isfinite(new) & jnp.isfinite(narrow)


def _together(mean: _Given, var: _Given) -> tuple[_Given, _Given]:
    """Where the mean may be stored, and where the variance: each where the other may be too."""
    if mean is None or var is None:
        return mean, var
    if mean.shape != var.shape:
        both = jnp.all(mean) & jnp.all(var)
        return jnp.full(mean.shape, both), jnp.full(var.shape, both)
    return mean & var, mean & var


def _require_observed(running: Running, batch: Stats) -> None:
    """Raises FieldError for statistics of a batch in the shapes that `normalize` gave them."""
    for name, old, new in (("mean", running.mean, batch.mean), ("var", running.var, batch.var)):
        if old is not None and new is not None and jnp.shape(old) != jnp.shape(new):
            raise FieldError(
                f"the {name} of the batch has shape {jnp.shape(new)}, the stored one {jnp.shape(old)}: give "
                "running.observe(stats, normalizer, layout, x.shape) for the stats that normalize returned"
            )


def _share(t: jax.Array, momentum: ArrayLike, averaging: str) -> jax.Array:
    """The weight of batch t, a float, in the average of t batches."""
    if averaging == "cumulative":
        return 1 / t
    if isinstance(momentum, float | int):
        decay = jnp.asarray(math.log(momentum) if momentum > 0 else -math.inf, t.dtype)
    else:
        decay = jnp.log(jnp.asarray(momentum).astype(t.dtype))
    # (1 - momentum) / (1 - momentum ** t); for a momentum of one, its limit: the mean of all batches.
    return jnp.where(decay < 0, jnp.expm1(decay) / jnp.expm1(jnp.where(decay < 0, decay, -1) * t), 1 / t)


def _sharded_like(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new value sharded as the stored one, which matters on meshes with explicit axes: a scan carries one type."""
    have, want = jax.typeof(new).sharding, jax.typeof(old).sharding
    if have.spec == want.spec:
        return new
    mesh = have.mesh if want.mesh.empty else want.mesh  # statistics made outside a mesh are replicated on any
    return jax.sharding.reshard(new, jax.sharding.NamedSharding(mesh, want.spec))


def require_unbiased(normalizer: Normalizer | str) -> None:
    """Raises ValueError unless the row's moment is a variance: order 2 and A = B, without windows.

    Args:
      normalizer: the row whose moment is to be corrected, or its name in TABLE.

    >>> require_unbiased(Normalizer(None, "c"))
    Traceback (most recent call last):
    ...
    ValueError: unbiased=True needs a variance: order 2 and A = B, without windows; found Normalizer(None, 'c')
    """
    normalizer = row(normalizer)
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
    enough, wide = w > 1, w.astype(stats.var.dtype)
    factor = jnp.where(enough, wide / jnp.where(enough, wide - 1, 1), 1)
    return stats._replace(var=stats.var * factor, var_weight=jnp.where(enough, w, 0))
