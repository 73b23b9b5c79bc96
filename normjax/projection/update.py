"""What the transformations share: updates by path, the arithmetic of one update, and norms that were recorded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax.selection import Kernels, Norms, by_path, listed

Schedule = Callable[[Any], ArrayLike]
RULES = {"sgd": 2, "sign": 1}  # the power of the norm in the effective learning rate


class ProjectState(NamedTuple):
    """How many updates were made (int32 scalar), and the norms that weights return to, by path."""

    step: jax.Array
    norms: Any


@dataclass(frozen=True)
class Record:
    """Norms by path, of one time or of several."""

    norms: Mapping[str, ArrayLike]
    every: int = 1

    def at(self, count: Any, name: str, kernels: Kernels, w: jax.Array, caller: str) -> jax.Array:
        """The norms of a kernel before update number `count`."""
        if name not in self.norms:
            raise ValueError(f"{caller}: norms of {name!r} are not among those given: {', '.join(self.norms)}")
        record, shape = jnp.asarray(self.norms[name]), jax.eval_shape(kernels.norm, w).shape
        if record.shape in ((), shape):
            return record
        if record.shape[1:] != shape or not len(record):
            raise ValueError(f"{caller}: norms of {name!r} have shape {shape}, or that behind an axis of time; found "
                             f"{record.shape}")  # fmt: skip
        return jnp.take(record, jnp.minimum(count // self.every, len(record) - 1), axis=0)


def now(schedule: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """A schedule's value, or a number."""
    with jax.numpy_dtype_promotion("standard"):  # counts are integers, and schedules multiply them by floats
        return jnp.asarray(schedule(count) if callable(schedule) else schedule).astype(dtype)


def added(p: jax.Array, u: jax.Array) -> jax.Array:
    """Parameter and update added, float32 or wider."""
    work = max(statistics_dtype(p.dtype), statistics_dtype(u.dtype), key=lambda dtype: dtype.itemsize)
    return p.astype(work) + u.astype(work)


def towards(p: jax.Array, u: jax.Array, squared: jax.Array, norm: jax.Array) -> jax.Array:
    """The update that leaves `norm` where u would leave the root of `squared`; u itself where there is no such factor."""
    known = (squared > 0) & jnp.isfinite(squared) & (norm > 0)
    factor = jnp.where(known, norm.astype(squared.dtype) / jnp.sqrt(jnp.where(known, squared, 1)), 1)
    after = added(p, u)
    return (factor.astype(after.dtype) * after - p.astype(after.dtype)).astype(u.dtype)


def want_output(kernels: Kernels, caller: str) -> None:
    """Raises ValueError where nobody said which kernel is the output layer's; TypeError for no `Kernels`."""
    if not isinstance(kernels, Kernels):
        raise TypeError(f"{caller} takes Kernels, such as Kernels(output='Dense_2'); found {kernels!r}")
    if kernels.where is None and kernels.output is None:
        raise ValueError(f"{caller} cannot read off the parameters which kernel is the output layer's, which no normalizer "
                         "follows: Kernels(output='Dense_2') leaves it free, Kernels(output=()) takes it too")  # fmt: skip


def not_zero(found: Norms, caller: str) -> Norms:
    """The norms, of which none is known to be 0."""
    for name, norm in found.items():
        if isinstance(norm, Tracer) or not norm.is_fully_addressable:
            continue
        if zeros := int(np.sum(np.asarray(norm) == 0)):
            count = f" in {zeros} of {norm.size} places" if norm.size > 1 else ""
            raise ValueError(f"{caller}: {name!r} starts with norm 0{count}, to which nothing can be projected; leave it "
                             "out, or start it elsewhere")  # fmt: skip
    return found


def pair(updates: Any, params: Any, names: Iterable[str], caller: str) -> tuple[Norms, Norms, Callable[[Norms], Any]]:
    """Parameters and updates by path, and the way from changed updates back to a tree."""
    if params is None:
        raise ValueError(f"{caller} needs the parameters: tx.update(updates, state, params)")
    ps, (flat, structure) = by_path(params), jax.tree.flatten(updates)
    if len(flat) != len(ps):
        raise ValueError(f"{caller}: there are {len(ps)} parameters but {len(flat)} updates")
    if missing := [name for name in names if name not in ps]:
        raise ValueError(f"{caller}: the state holds a norm of {missing[0]!r}, which is no parameter. {listed(ps)}")
    us = dict(zip(ps, flat, strict=True))
    return ps, us, lambda changed: structure.unflatten([changed.get(name, u) for name, u in us.items()])


def transformation(init: Callable, update: Callable) -> optax.GradientTransformationExtraArgs:
    """The two functions as a transformation that lets no parameters pass."""

    def passing(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is not None and is_placeholder(params):  # `optax.partition` gave this one nothing
            return updates, state
        return update(updates, state, params)

    return optax.with_extra_args_support(optax.GradientTransformation(init, passing))


def is_placeholder(params: Any) -> bool:
    """Whether there is nothing to work on: so `optax.tree_map_params` asks what of a state is like parameters (nothing)."""
    return not jax.tree.leaves(params)


def first_step() -> jax.Array:
    """Step 0."""
    return jnp.zeros((), jnp.int32)


def next_step(step: jax.Array) -> jax.Array:
    """The step after this one; the last one stays."""
    return jnp.asarray(optax.safe_increment(step))
