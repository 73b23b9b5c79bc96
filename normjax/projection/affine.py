"""Scale and bias of normalizers: projected, or pulled to 1 and 0."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from normjax._expect.arrays import statistics_dtype
from normjax._leaves import safe_root
from normjax._paths import ByPath, arrays_by_path, paths_and_shapes
from normjax.projection._update import (
    after_update,
    as_transformation,
    first_step,
    is_empty,
    next_step,
    no_norms,
    require_nonzero,
    update_to_norm,
    updates_by_path,
)
from normjax.projection.hold import ProjectState
from normjax.selection import Kernels


def project_affine(where: object = None) -> optax.GradientTransformationExtraArgs:
    """Scale and bias of each normalizer return together to their initial joint norm.

    A symmetry only where a positively homogeneous function and another normalizer follow; elsewhere `pull_affine`, or
    neither. The joint norm of (1, 0) is sqrt(c) for c channels; a published port takes sqrt(2) whatever c is.

    Args:
      where: patterns of paths, such as "encoder/*/scale" or "norm" (all that is below it); a mask: a tree of booleans or
        a function that gives one; of parameters of any rank. Those called `scale`, and `bias` beside a `scale`, count. By
        default all of these, but for those of a layer with a kernel: the scale of weight norm is no normalizer's.

    Returns:
      An optax transformation with a ProjectState: norms by path of the normalizer.

    Raises:
      TypeError: a mask without booleans, or parameters that are not floating.
      ValueError: no normalizer is there, a pattern that matches nothing, one that starts at norm 0 (seen only outside of
        transformations), or no parameters at update.

    Source: Lyle et al. 2024.

    >>> project_affine().init({"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}).norms
    {'norm': Array(2., dtype=float32)}
    """
    caller = "project_affine"

    def init(params: optax.Params) -> ProjectState:
        if is_empty(params):
            return ProjectState(first_step(), no_norms())
        groups = _normalizers(params, where, caller)
        norms = {module: safe_root(_joint_square(parts.values())) for module, parts in groups.items()}
        return ProjectState(first_step(), require_nonzero(norms, caller))

    def update(
        updates: optax.Updates, state: ProjectState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProjectState]:
        scales = [f"{module}/scale".lstrip("/") for module in state.norms]
        ps, us, back = updates_by_path(updates, params, scales, caller)
        changed, groups = {}, _normalizers(params, where, caller)
        for module, norm in state.norms.items():
            squared = _joint_square(after_update(ps[name], us[name]) for name in groups[module])
            changed |= {name: update_to_norm(ps[name], us[name], squared, norm) for name in groups[module]}
        return back(changed), ProjectState(next_step(state.step), state.norms)

    return as_transformation(init, update)


def pull_affine(strength: float, where: object = None) -> optax.GradientTransformationExtraArgs:
    """Pulls scale to 1 and bias to 0: the gradient of strength / 2 (|scale - 1| ** 2 + |bias| ** 2).

    Stands where `optax.add_decayed_weights` does: first in the chain as a penalty, or right before the learning rate.

    Args:
      strength: of the pull.
      where: patterns of paths, such as "encoder/*/scale" or "norm" (all that is below it); a mask: a tree of booleans or
        a function that gives one; of parameters of any rank. Those called `scale`, and `bias` beside a `scale`, count. By
        default all of these, but for those of a layer with a kernel: the scale of weight norm is no normalizer's.

    Returns:
      An optax transformation with an `optax.EmptyState`.

    Raises:
      TypeError: a mask without booleans, or parameters that are not floating.
      ValueError: no normalizer is there, a pattern that matches nothing, or no parameters at update.

    Source: Lyle et al. 2024, for normalizers that no other follows.

    >>> params = {"norm": {"scale": jnp.array([3.0]), "bias": jnp.array([1.0])}}
    >>> pull_affine(0.5).update(jax.tree.map(jnp.zeros_like, params), optax.EmptyState(), params)[0]
    {'norm': {'bias': Array([0.5], dtype=float32), 'scale': Array([1.], dtype=float32)}}
    """
    caller = "pull_affine"

    def init(params: optax.Params) -> optax.EmptyState:
        if not is_empty(params):
            _normalizers(params, where, caller)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        ps, us, back = updates_by_path(updates, params, (), caller)
        changed = {}
        for parts in _normalizers(params, where, caller).values():
            for name in parts:
                away = ps[name] - 1 if name.split("/")[-1] == "scale" else ps[name]
                changed[name] = us[name] + (strength * away).astype(us[name].dtype)
        return back(changed), state

    return as_transformation(init, update)


def _joint_square(parts: Iterable[jax.Array]) -> jax.Array:
    """The squared norm of several arrays together, float32 or wider."""
    squares = [jnp.sum(lax.square(part.astype(statistics_dtype(part.dtype)))) for part in parts]
    return jnp.asarray(sum(squares))


def _normalizers(params: object, where: object, caller: str) -> dict[str, ByPath]:
    """Scale and bias of each normalizer: by its path, and then by theirs."""
    leaves = arrays_by_path(params)
    chosen = leaves if where is None else Kernels(where, field="...", layout="...").select(params, caller)
    groups: dict[str, ByPath] = {}
    for name in chosen:
        module, _, last = name.rpartition("/")
        scale, kernel = (f"{module}/{part}".lstrip("/") for part in ("scale", "kernel"))
        if where is None and (kernel in leaves or module in leaves):  # "dense/kernel/scale", as linen's wrapper has it
            continue
        if last == "scale" or (last == "bias" and scale in leaves):
            groups.setdefault(module, {})[name] = leaves[name]
    if not groups:
        raise ValueError(
            f"{caller}: nothing here is called 'scale', as a normalizer's factor is. {paths_and_shapes(leaves)}"
        )
    return groups
