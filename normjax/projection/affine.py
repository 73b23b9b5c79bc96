"""Scale and bias of normalizers: projected, or pulled to 1 and 0."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from normjax._expect.arrays import statistics_dtype
from normjax.projection.update import (
    ProjectState,
    added,
    first_step,
    is_placeholder,
    next_step,
    not_zero,
    pair,
    towards,
    transformation,
)
from normjax.selection import Kernels, Norms, by_path, listed, root


def project_affine(where: Any = None) -> optax.GradientTransformationExtraArgs:
    """Scale and bias of each normalizer return together to their initial joint norm.

    A symmetry only where a positively homogeneous function and another normalizer follow; elsewhere `pull_affine`, or
    neither. The joint norm of (1, 0) is sqrt(c) for c channels; a published port takes sqrt(2) whatever c is.

    Args:
      where: as for `Kernels`, of parameters of any rank; those called `scale`, and `bias` beside a `scale`, count. By
        default all of these, but for those of a layer with a kernel: the scale of weight norm is no normalizer's.

    Returns:
      An optax transformation with a ProjectState: norms by path of the normalizer.

    Raises:
      TypeError, ValueError: see `project`; no normalizer is there.

    Source: Lyle et al. 2024.

    >>> project_affine().init({"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}).norms
    {'norm': Array(2., dtype=float32)}
    """
    caller = "project_affine"

    def joint(parts: Iterable[jax.Array]) -> jax.Array:
        squares: list[Any] = [jnp.sum(lax.square(part.astype(statistics_dtype(part.dtype)))) for part in parts]
        return jnp.asarray(sum(squares))

    def init(params: Any) -> ProjectState:
        if is_placeholder(params):
            return ProjectState(first_step(), first_step())
        found = {name: root(joint(parts.values())) for name, parts in _normalizers(params, where, caller).items()}
        return ProjectState(first_step(), not_zero(found, caller))

    def update(updates: Any, state: ProjectState, params: Any = None) -> tuple[Any, ProjectState]:
        ps, us, back = pair(updates, params, [f"{module}/scale".lstrip("/") for module in state.norms], caller)
        changed, groups = {}, _normalizers(params, where, caller)
        for module, norm in state.norms.items():
            squared = joint(added(ps[name], us[name]) for name in groups[module])
            changed |= {name: towards(ps[name], us[name], squared, norm) for name in groups[module]}
        return back(changed), ProjectState(next_step(state.step), state.norms)

    return transformation(init, update)


def pull_affine(strength: float, where: Any = None) -> optax.GradientTransformationExtraArgs:
    """Pulls scale to 1 and bias to 0: the gradient of strength / 2 (|scale - 1| ** 2 + |bias| ** 2).

    Stands where `optax.add_decayed_weights` does: first in the chain as a penalty, or right before the learning rate.

    Args:
      strength: of the pull.
      where: as for `project_affine`.

    Raises:
      TypeError, ValueError: see `project_affine`.

    Source: Lyle et al. 2024, for normalizers that no other follows.

    >>> params = {"norm": {"scale": jnp.array([3.0]), "bias": jnp.array([1.0])}}
    >>> pull_affine(0.5).update(jax.tree.map(jnp.zeros_like, params), optax.EmptyState(), params)[0]
    {'norm': {'bias': Array([0.5], dtype=float32), 'scale': Array([1.], dtype=float32)}}
    """

    def init(params: Any) -> optax.EmptyState:
        if not is_placeholder(params):
            _normalizers(params, where, "pull_affine")
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        ps, us, back = pair(updates, params, (), "pull_affine")
        changed = {}
        for parts in _normalizers(params, where, "pull_affine").values():
            for name in parts:
                away = ps[name] - 1 if name.split("/")[-1] == "scale" else ps[name]
                changed[name] = us[name] + (strength * away).astype(us[name].dtype)
        return back(changed), state

    return transformation(init, update)


def _normalizers(params: Any, where: Any, caller: str) -> dict[str, Norms]:
    """Scale and bias of each normalizer: by its path, and then by theirs."""
    leaves = by_path(params)
    chosen = leaves if where is None else Kernels(where, field="...", layout="...").select(params, caller)
    found: dict[str, Norms] = {}
    for name in chosen:
        module, _, last = name.rpartition("/")
        scale, kernel = (f"{module}/{part}".lstrip("/") for part in ("scale", "kernel"))
        if where is None and (kernel in leaves or module in leaves):  # "dense/kernel/scale", as linen's wrapper has it
            continue
        if last == "scale" or (last == "bias" and scale in leaves):
            found.setdefault(module, {})[name] = leaves[name]
    if not found:
        raise ValueError(f"{caller}: nothing here is called 'scale', as a normalizer's factor is. {listed(leaves)}")
    return found
