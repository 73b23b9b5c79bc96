"""Scale and bias of normalizers: projected, or pulled to 1 and 0."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax._expect.ranges import towards_one
from normjax._leaves import safe_root
from normjax._paths import ByPath, arrays_by_path, paths_and_shapes
from normjax.projection import _update
from normjax.projection._update import ProjectState
from normjax.selection import Kernels


def project_affine(where: object = None) -> optax.GradientTransformationExtraArgs:
    """Scale and bias of each normalizer return together to their initial joint norm; the state is a ProjectState.

    A symmetry only where a positively homogeneous function and another normalizer follow; elsewhere `pull_affine`, or
    neither. The joint norm of (1, 0) is sqrt(c) for c channels; a published port takes sqrt(2) whatever c is. A norm that
    starts at 0 is a ValueError, seen only outside of transformations.

    Args:
      where: patterns of paths, such as "encoder/*/scale" or "norm" (all that is below it); a mask: a tree of booleans or
        a function that gives one. What is called `scale`, and `bias` beside a `scale`, counts. By default all of these,
        but for those of a layer with a kernel: the scale of weight norm is no normalizer's.

    Source: Lyle et al. 2024.

    >>> project_affine().init({"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}).norms
    {'norm': Array(2., dtype=float32)}
    """
    caller = "project_affine"

    def init(params: optax.Params) -> ProjectState:
        groups = _normalizers(params, where, caller)
        norms = {module: _joint_norm(parts.values()) for module, parts in groups.items()}
        return ProjectState(_update.first_step(), _update.require_nonzero(norms, caller))

    def change(params: optax.Params, ps: ByPath, us: ByPath, state: ProjectState) -> tuple[ByPath, ProjectState]:
        _update.require_parameters([f"{module}/scale".lstrip("/") for module in state.norms], ps, caller)
        changed, groups = {}, _normalizers(params, where, caller)
        for module, norm in state.norms.items():
            otherwise = _joint_norm(_update.after_update(ps[name], us[name]) for name in groups[module])
            changed |= {name: _update.update_to_norm(ps[name], us[name], otherwise, norm) for name in groups[module]}
        return changed, ProjectState(_update.next_step(state.step), state.norms)

    return _update.as_transformation(caller, _update.no_norms, init, change)


def pull_affine(strength: ArrayLike, where: object = None) -> optax.GradientTransformationExtraArgs:
    """Pulls scale to 1 and bias to 0: the gradient of strength / 2 (|scale - 1| ** 2 + |bias| ** 2).

    Stands where `optax.add_decayed_weights` does: first in the chain as a penalty, or right before the learning rate.

    Args:
      strength: of the pull, a number or what a transformation traces, as `optax.inject_hyperparams` does.
      where: patterns of paths, such as "encoder/*/scale" or "norm" (all that is below it); a mask: a tree of booleans or
        a function that gives one. What is called `scale`, and `bias` beside a `scale`, counts. By default all of these,
        but for those of a layer with a kernel: the scale of weight norm is no normalizer's.

    Source: Lyle et al. 2024, for normalizers that no other follows.

    >>> params = {"norm": {"scale": jnp.array([3.0]), "bias": jnp.array([1.0])}}
    >>> pull_affine(0.5).update(jax.tree.map(jnp.zeros_like, params), optax.EmptyState(), params)[0]
    {'norm': {'bias': Array([0.5], dtype=float32), 'scale': Array([1.], dtype=float32)}}
    """
    caller = "pull_affine"

    def init(params: optax.Params) -> optax.EmptyState:
        _normalizers(params, where, caller)
        return optax.EmptyState()

    def change(
        params: optax.Params, ps: ByPath, us: ByPath, state: optax.EmptyState
    ) -> tuple[ByPath, optax.EmptyState]:
        changed = {}
        for name in (name for parts in _normalizers(params, where, caller).values() for name in parts):
            away = ps[name] - 1 if name.split("/")[-1] == "scale" else ps[name]
            changed[name] = us[name] + (jnp.asarray(strength).astype(away.dtype) * away).astype(us[name].dtype)
        return changed, state

    return _update.as_transformation(caller, optax.EmptyState, init, change)


def _joint_norm(parts: Iterable[jax.Array]) -> jax.Array:
    """The norm of several arrays together, float32 or wider."""
    wide = [part.astype(statistics_dtype(part.dtype)) for part in parts]
    sizes = [jnp.max(jnp.abs(part), initial=0) for part in wide]
    s = towards_one(functools.reduce(jnp.maximum, sizes))
    return safe_root(jnp.asarray(sum(jnp.sum(lax.square(part * s)) for part in wide))) / s


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
        nothing = "nothing here is called 'scale', as a normalizer's factor is"
        raise ValueError(f"{caller}: {nothing}. {paths_and_shapes(leaves)}")
    return groups
