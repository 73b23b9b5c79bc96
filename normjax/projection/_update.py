"""What the transformations share: updates by path, the arithmetic of one update, and norms that were recorded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from normjax._expect.arrays import statistics_dtype
from normjax._paths import ByPath, PyTree, arrays_by_path, paths_and_shapes
from normjax.selection import Kernels

Schedule = Callable[[jax.Array], ArrayLike]  # count -> value
NORM_POWERS = {"sgd": 2, "sign": 1}  # of the norm in the effective learning rate, by what a step is proportional to


class ProjectState(NamedTuple):
    """The state of the transformations that hold a norm.

    Attributes:
      step: how many updates were made, an int32 scalar.
      norms: {path: the norm that weights return to}, float32 or wider; empty where a record gives it.

    Source: Lyle et al. 2024, the initial norms.

    >>> from normjax.projection import project
    >>> project(Kernels(output=())).init({"kernel": jnp.array([[3.0], [4.0]])})
    ProjectState(step=Array(0, dtype=int32), norms={'kernel': Array(5., dtype=float32)})
    """

    step: jax.Array
    norms: ByPath


def no_norms() -> ProjectState:
    """The state where there are no parameters: its norms are a leaf, since `optax.tree_map_params` marks leaves."""
    return ProjectState(first_step(), cast(ByPath, first_step()))


@dataclass(frozen=True)
class RecordedNorms:
    """Norms by path, of one time or, along a first axis, of several; `every` is the updates from one to the next."""

    norms: Mapping[str, ArrayLike]
    every: int = 1

    def at(self, count: jax.Array | int, name: str, kernels: Kernels, w: jax.Array, caller: str) -> jax.Array:
        """The norms of a kernel before update number `count`; ValueError where there are none, or of another shape."""
        if name not in self.norms:
            raise ValueError(f"{caller}: norms of {name!r} are not among those given: {', '.join(self.norms)}")
        record, shape = jnp.asarray(self.norms[name]), jax.eval_shape(kernels.norm, w).shape
        if record.shape in ((), shape):
            return record
        if record.shape[1:] != shape or not len(record):
            accepted = f"norms of {name!r} have shape {shape}, or that behind an axis of time"
            raise ValueError(f"{caller}: {accepted}; found {record.shape}")
        return jnp.take(record, jnp.minimum(count // self.every, len(record) - 1), axis=0)


def value_at(schedule: Schedule | ArrayLike | None, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A schedule's value at this count, or the number itself."""
    with jax.numpy_dtype_promotion("standard"):  # counts are integers, and schedules multiply them by floats
        return jnp.asarray(schedule(count) if callable(schedule) else schedule).astype(dtype)


def after_update(p: jax.Array, u: jax.Array) -> jax.Array:
    """Parameter and update added, float32 or wider."""
    work = max(statistics_dtype(p.dtype), statistics_dtype(u.dtype), key=lambda dtype: dtype.itemsize)
    return p.astype(work) + u.astype(work)


def update_to_norm(p: jax.Array, u: jax.Array, otherwise: jax.Array, norm: jax.Array) -> jax.Array:
    """The update that leaves `norm` where u would leave the norm `otherwise`; u itself where there is no such factor."""
    known = (otherwise > 0) & jnp.isfinite(otherwise) & (norm > 0)
    factor = jnp.where(known, norm.astype(otherwise.dtype) / jnp.where(known, otherwise, 1), 1)
    after = after_update(p, u)
    return (factor.astype(after.dtype) * after - p.astype(after.dtype)).astype(u.dtype)


def select(kernels: Kernels, params: optax.Params, caller: str) -> ByPath:
    """The kernels by path; where none matches a pattern, says so if `optax.masked` or `optax.partition` hides some."""
    try:
        return kernels.select(params, caller)
    except ValueError as error:
        leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
        if "matches no parameter" not in str(error) or not any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
            raise
        hidden = (
            "optax.masked or optax.partition hides the others; where the output layer is one of them, say output=()"
        )
        raise ValueError(f"{error}; {hidden}") from None


def above_zero(value: ArrayLike) -> bool:
    """Whether this is a real number above 0, or an array of such, as far as that is known: what is traced passes."""
    array = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
    if array.dtype == bool or not (
        jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        return False
    if isinstance(array, Tracer):
        return True
    return bool(array.size and np.all(np.asarray(array) > 0) and np.all(np.isfinite(np.asarray(array))))


def is_count(value: ArrayLike) -> bool:
    """Whether this is an integer of at least 1, as far as that is known: what is traced passes."""
    dtype, shape = (getattr(value, name, None) for name in ("dtype", "shape"))
    integer = isinstance(value, int) if dtype is None else jnp.issubdtype(dtype, jnp.integer) and not shape
    return integer and not isinstance(value, bool) and above_zero(value)


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
            found = f"{name!r} starts with norm 0{count}, to which nothing can be projected"
            raise ValueError(f"{caller}: {found}; leave it out, or start it elsewhere")
    return norms


def require_parameters(names: Iterable[str], ps: ByPath, caller: str) -> None:
    """Raises ValueError where a state holds norms of something that is no parameter."""
    if missing := [name for name in names if name not in ps]:
        found = f"the state holds a norm of {missing[0]!r}, which is no parameter"
        raise ValueError(f"{caller}: {found}. {paths_and_shapes(ps)}")


def as_transformation(
    caller: str,
    empty: Callable[[], optax.OptState],
    init: optax.TransformInitFn,
    change: Callable[[optax.Params, ByPath, ByPath, PyTree], tuple[ByPath, optax.OptState]],
) -> optax.GradientTransformationExtraArgs:
    """A transformation of what changes parameters and updates by path: `change(tree of parameters, ps, us, state)`.

    `empty` is the state where there is nothing to work on, as `optax.partition` may give it, and as
    `optax.tree_map_params` does to ask what of a state is like parameters (nothing).
    """

    def begin(params: optax.Params) -> optax.OptState:
        return init(params) if jax.tree.leaves(params) else empty()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(f"{caller} needs the parameters: tx.update(updates, state, params)")
        ps, (flat, structure) = arrays_by_path(params), jax.tree.flatten(updates)
        if not ps:
            return updates, state
        if len(flat) != len(ps):
            raise ValueError(f"{caller}: there are {len(ps)} parameters but {len(flat)} updates")
        us = dict(zip(ps, flat, strict=True))
        changed, state = change(params, ps, us, state)
        return structure.unflatten([changed.get(name, u) for name, u in us.items()]), state

    return optax.with_extra_args_support(optax.GradientTransformation(begin, update))


def first_step() -> jax.Array:
    """Step 0."""
    return jnp.zeros((), jnp.int32)


def next_step(step: jax.Array) -> jax.Array:
    """The step after this one; the last one stays."""
    return jnp.asarray(optax.safe_increment(step))
