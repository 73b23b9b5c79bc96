"""What the transformations share: updates by path, the arithmetic of one update, and norms that were recorded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import statistics_dtype
from normjax._paths import ByPath, arrays_by_path, paths_and_shapes
from normjax.selection import Kernels

Schedule = Callable[[jax.Array], ArrayLike]  # count -> value
NORM_POWERS = {"sgd": 2, "sign": 1}  # of the norm in the effective learning rate, by what a step is proportional to


@dataclass(frozen=True)
class RecordedNorms:
    """Norms by path, of one time or, along a first axis, of several; `every` is the updates from one to the next."""

    norms: Mapping[str, ArrayLike]
    every: int = 1

    def at(self, count: jax.Array | int, name: str, kernels: Kernels, w: jax.Array, caller: str) -> jax.Array:
        """The norms of a kernel before update number `count`.

        Raises:
          ValueError: there are none of this path, or they have another shape.

        >>> RecordedNorms({"kernel": jnp.array([5.0, 7.0])}).at(9, "kernel", Kernels(), jnp.ones((2, 2)), "example")
        Array(7., dtype=float32)
        """
        if name not in self.norms:
            raise ValueError(f"{caller}: norms of {name!r} are not among those given: {', '.join(self.norms)}")
        record, shape = jnp.asarray(self.norms[name]), jax.eval_shape(kernels.norm, w).shape
        if record.shape in ((), shape):
            return record
        if record.shape[1:] != shape or not len(record):
            raise ValueError(
                f"{caller}: norms of {name!r} have shape {shape}, or that behind an axis of time; found {record.shape}"
            )
        return jnp.take(record, jnp.minimum(count // self.every, len(record) - 1), axis=0)


# --- one update -----------------------------------------------------------------------------------


def value_at(schedule: Schedule | ArrayLike | None, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A schedule's value at this count, or the number itself.

    >>> value_at(lambda count: count / 2, jnp.array(3), jnp.float32)
    Array(1.5, dtype=float32)
    """
    with jax.numpy_dtype_promotion("standard"):  # counts are integers, and schedules multiply them by floats
        return jnp.asarray(schedule(count) if callable(schedule) else schedule).astype(dtype)


def after_update(p: jax.Array, u: jax.Array) -> jax.Array:
    """Parameter and update added, float32 or wider.

    >>> after_update(jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16))
    Array([2.], dtype=float32)
    """
    work = max(statistics_dtype(p.dtype), statistics_dtype(u.dtype), key=lambda dtype: dtype.itemsize)
    return p.astype(work) + u.astype(work)


def update_to_norm(p: jax.Array, u: jax.Array, squared: jax.Array, norm: jax.Array) -> jax.Array:
    """The update that leaves `norm` where u would leave the root of `squared`; u itself where there is no such factor.

    >>> update_to_norm(jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0]), jnp.array([25.0]), jnp.array([10.0]))
    Array([3., 8.], dtype=float32)
    """
    known = (squared > 0) & jnp.isfinite(squared) & (norm > 0)
    factor = jnp.where(known, norm.astype(squared.dtype) / jnp.sqrt(jnp.where(known, squared, 1)), 1)
    after = after_update(p, u)
    return (factor.astype(after.dtype) * after - p.astype(after.dtype)).astype(u.dtype)


# --- refusals -------------------------------------------------------------------------------------


def require_output(kernels: Kernels, caller: str) -> None:
    """Raises ValueError where nobody said which kernel is the output layer's; TypeError for no `Kernels`."""
    if not isinstance(kernels, Kernels):
        raise TypeError(f"{caller} takes Kernels, such as Kernels(output='Dense_2'); found {kernels!r}")
    if kernels.where is None and kernels.output is None:
        raise ValueError(
            f"{caller} cannot read off the parameters which kernel is the output layer's, which no normalizer "
            "follows: Kernels(output='Dense_2') leaves it free, Kernels(output=()) takes it too"
        )


def require_nonzero(norms: ByPath, caller: str) -> ByPath:
    """The norms, of which none is known to be 0; ValueError for one that is."""
    for name, norm in norms.items():
        if isinstance(norm, Tracer) or not norm.is_fully_addressable:
            continue
        if zeros := int(np.sum(np.asarray(norm) == 0)):
            count = f" in {zeros} of {norm.size} places" if norm.size > 1 else ""
            raise ValueError(
                f"{caller}: {name!r} starts with norm 0{count}, to which nothing can be projected; leave it "
                "out, or start it elsewhere"
            )
    return norms


# --- trees, and what optax asks for ---------------------------------------------------------------


def updates_by_path(
    updates: optax.Updates, params: optax.Params | None, names: Iterable[str], caller: str
) -> tuple[ByPath, ByPath, Callable[[ByPath], optax.Updates]]:
    """Parameters and updates by path, and the way from changed updates back to a tree.

    Raises:
      ValueError: no parameters, other updates than parameters, or one of `names` that is no parameter.
    """
    if params is None:
        raise ValueError(f"{caller} needs the parameters: tx.update(updates, state, params)")
    ps, (flat, structure) = arrays_by_path(params), jax.tree.flatten(updates)
    if len(flat) != len(ps):
        raise ValueError(f"{caller}: there are {len(ps)} parameters but {len(flat)} updates")
    if missing := [name for name in names if name not in ps]:
        raise ValueError(
            f"{caller}: the state holds a norm of {missing[0]!r}, which is no parameter. {paths_and_shapes(ps)}"
        )
    us = dict(zip(ps, flat, strict=True))
    return ps, us, lambda changed: structure.unflatten([changed.get(name, u) for name, u in us.items()])


def as_transformation(
    init: optax.TransformInitFn, update: Callable[..., tuple[optax.Updates, optax.OptState]]
) -> optax.GradientTransformationExtraArgs:
    """The two functions as a transformation that lets no parameters pass."""

    def passing(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is not None and is_empty(params):  # `optax.partition` gave this one nothing
            return updates, state
        return update(updates, state, params)

    return optax.with_extra_args_support(optax.GradientTransformation(init, passing))


def is_empty(params: optax.Params) -> bool:
    """Whether there is nothing to work on: so `optax.tree_map_params` asks what of a state is like parameters (nothing)."""
    return not jax.tree.leaves(params)


def no_norms() -> ByPath:
    """What stands for the norms where there are no parameters: a leaf, since `optax.tree_map_params` marks leaves."""
    return cast(ByPath, first_step())


def first_step() -> jax.Array:
    """Step 0."""
    return jnp.zeros((), jnp.int32)


def next_step(step: jax.Array) -> jax.Array:
    """The step after this one; the last one stays."""
    return jnp.asarray(optax.safe_increment(step))
