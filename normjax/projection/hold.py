"""Kernels held at a norm, or led along a schedule of norms."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from normjax._expect.ranges import towards_one
from normjax._leaves import safe_root
from normjax._paths import ByPath
from normjax.projection import _update
from normjax.projection._update import ProjectState, RecordedNorms, Schedule
from normjax.selection import Kernels

RULES = ("initial", "rms", "mean")  # of the norm that kernels are held at


def project(
    kernels: Kernels, *, rho: str | ArrayLike = "initial", every: ArrayLike = 1
) -> optax.GradientTransformationExtraArgs:
    """Normalize-and-Project: after the optimizer's step, kernels return to the norm rho; the state is a ProjectState.

    It must come last in `optax.chain`, behind the learning rate: it takes what it is given for the step that the parameters
    will make, and cannot see that more is to come. First in a chain it holds no norm, and nothing says so;
    `project_after(optimizer, kernels)` is last by its making.

    Emits rho (p + u) / |p + u| - p; the optimizer's moments stay as they are. Weight decay before it is no more than a
    factor 1 / (1 - eta lambda) of the learning rate. A norm of 0, or not finite, lets the update pass; one that starts at
    0 is a ValueError (seen only outside of transformations; inside it is left free).

    Args:
      kernels: which. No official code was published, and ports disagree on the output layer: `Kernels(output="Dense_2")`
        leaves it free, `Kernels(output=())` takes it too.
      rho: "initial", each norm as it is when the state is made; "rms" or "mean" of a kernel's initial norms, for all its
        features; or a number, an array that broadcasts against the norms of each kernel, or what a transformation traces:
        `optax.inject_hyperparams(project)(kernels, rho=2.0)` makes it a hyperparameter, or a schedule. [units w]
      every: only each so many steps; the others pass.

    Source: Lyle et al. 2024 (Normalize-and-Project). The whole kernel is layer norm's symmetry, each feature batch norm's.

    >>> from normjax.projection import norms
    >>> params = {"hidden": {"kernel": 2 * jnp.eye(2)}, "head": {"kernel": jnp.ones((2, 2))}}
    >>> tx = optax.chain(optax.sgd(1.0), project(Kernels(output="head")))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> norms(params)["hidden/kernel"].round(4), norms(optax.apply_updates(params, updates))["hidden/kernel"].round(4)
    (Array(2.8284, dtype=float32), Array(2.8284, dtype=float32))
    """
    return _project(kernels, rho, every, "project")


def project_after(
    optimizer: optax.GradientTransformation,
    kernels: Kernels,
    *,
    rho: str | ArrayLike = "initial",
    every: ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer and Normalize-and-Project behind it, where it belongs: `optax.chain(optimizer, project(kernels))`.

    Args:
      optimizer: all that makes the step: gradients in, updates out, the learning rate included.
      kernels: which; `Kernels(output="Dense_2")` leaves the output layer free, `Kernels(output=())` takes it too.
      rho: "initial", each norm as it is when the state is made; "rms" or "mean" of a kernel's initial norms, for all its
        features; or a number or array that broadcasts against the norms of each kernel. [units w]
      every: only each so many steps; the others pass.

    Source: Lyle et al. 2024 (Normalize-and-Project).

    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx = project_after(optax.sgd(0.5), Kernels(output=()))
    >>> updates, _ = tx.update({"kernel": jnp.ones((2, 1))}, tx.init(params), params)
    >>> round(float(jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"])), 4)
    5.0
    """
    return optax.with_extra_args_support(optax.chain(optimizer, project(kernels, rho=rho, every=every)))


def bounded_norm(kernels: Kernels, *, rho: str | ArrayLike = "rms") -> optax.GradientTransformationExtraArgs:
    """Bounded weight norm: all output features of a kernel have one norm, which is kept; the state is a ProjectState.

    It is `project` with the field "... i" and one rho, and comes last in `optax.chain` too. The first step moves weights
    that do not start there. The published code has three forms: rho = |V_0| / sqrt(o), the paper's, is "rms"; a later module
    takes the "mean" of the features' norms; an earlier one bounds the whole kernel's norm alone, which is `project` with the
    field "... i o".

    Args:
      kernels: which; `Kernels(output="Dense_2")` leaves the output layer free, `Kernels(output=())` takes it too. Their
        field is "... i" here, whatever it was.
      rho: "rms" or "mean" of a kernel's initial norms, for all its features; "initial", each feature's own; or a number, an
        array that broadcasts against `[o]`, or what a transformation traces, as `optax.inject_hyperparams` does. [units w]

    Source: Hoffer et al. 2018, bounded weight normalization.

    >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 7.0]])}
    >>> tx = bounded_norm(Kernels(output=()))
    >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()      # 5 = sqrt((1 + 49) / 2)
    [[5.0, 0.0], [0.0, 5.0]]
    """
    _update.require_output(kernels, "bounded_norm")
    return _project(dataclasses.replace(kernels, field="... i"), rho, 1, "bounded_norm")


def norm_schedule(
    schedule: Schedule, kernels: Kernels, *, recorded: Mapping[str, ArrayLike] | None = None, record_every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """A schedule of the norm in place of one of the learning rate: a norm times c is a learning rate over c ** 2.

    Update number t = 0, 1, ... leaves the norm schedule(t + 1) * N, on which update t + 1 acts; N is the initial norm, or
    the recorded one of t + 1. The state is a ProjectState. It comes last in `optax.chain`. The
    schedule is no hyperparameter: `optax.inject_hyperparams(norm_schedule, static_args="schedule")`.

    Args:
      schedule: factor of the norm; 10 ** (epoch // 20 / 2) is a learning rate over 10 every 20 epochs.
      kernels: which, and what one norm is taken over; the published form takes the field "... i".
      recorded: norms by path, as `norms` gives them, of these kernels and perhaps of others; or stacked along a first axis
        of time, as `lax.scan` does: record k is of before update k * record_every, and the last one stays. [units w]
      record_every: updates from one record to the next.

    Source: Hoffer et al. 2018; their code rescales to the record of a run with weight decay.

    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> from normjax.projection import norms
    >>> tx = norm_schedule(lambda step: 10.0 ** (step / 2), Kernels(output=()))
    >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 1))}, tx.init(params), params)
    >>> round(float(norms(optax.apply_updates(params, updates))["kernel"]), 3)  # 5 * sqrt(10)
    15.811
    """
    record = None if recorded is None else RecordedNorms(recorded, record_every)
    return _project(kernels, "initial", 1, "norm_schedule", schedule, record)


def _project(
    kernels: Kernels,
    rho: str | ArrayLike,
    every: ArrayLike,
    caller: str,
    schedule: Schedule | None = None,
    record: RecordedNorms | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation behind all three: kernels return to a target, to a record, or to a schedule times either."""
    _require(kernels, rho, every, caller)
    given = None if isinstance(rho, str) else functools.partial(_given, rho, caller)

    def target(name: str, norm: jax.Array) -> jax.Array:
        if given is not None:
            return given(name, norm)
        s = towards_one(jnp.max(norm, initial=0))
        root = safe_root(jnp.mean(lax.square(norm * s))) / s
        return norm if rho == "initial" else jnp.mean(norm) if rho == "mean" else root

    def init(params: optax.Params) -> ProjectState:
        chosen = _update.select(kernels, params, caller)
        if record is not None:
            for name, w in chosen.items():
                record.at(0, name, kernels, w, caller)  # what does not fit is refused here already
            return ProjectState(_update.first_step(), {})
        targets = {name: target(name, kernels.norm(w)) for name, w in chosen.items()}
        return ProjectState(_update.first_step(), _update.require_nonzero(targets, caller))

    def change(params: optax.Params, ps: ByPath, us: ByPath, state: ProjectState) -> tuple[ByPath, ProjectState]:
        _update.require_parameters(state.norms, ps, caller)
        step, changed, held = _update.next_step(state.step), {}, dict(state.norms)
        for name in state.norms or _update.select(kernels, params, caller):
            p, u = ps[name], us[name]
            otherwise = kernels.wide_norm(_update.after_update(p, u))
            if given is None:
                norm = record.at(step, name, kernels, p, caller) if record else state.norms[name]
            else:
                norm = held[name] = given(name, jax.eval_shape(kernels.norm, p))  # of now: it may be a hyperparameter
            norm = kernels.align_norm(norm, p).astype(otherwise.dtype)
            if schedule is not None:
                norm = norm * _update.value_at(schedule, step, otherwise.dtype)
            new = _update.update_to_norm(p, u, otherwise, norm)
            changed[name] = new if isinstance(every, int) and every == 1 else jnp.where(step % every == 0, new, u)
        return changed, ProjectState(step, held)

    return _update.as_transformation(caller, _update.no_norms, init, change)


def _require(kernels: Kernels, rho: str | ArrayLike, every: ArrayLike, caller: str) -> None:
    """Raises ValueError for a norm or a number of steps that is none, as far as that is known."""
    if not (rho in RULES if isinstance(rho, str) else _update.above_zero(rho)):
        raise ValueError(f"{caller}: rho is 'initial', 'rms', 'mean' or a number above 0; found {rho!r}")
    if not _update.is_count(every):
        raise ValueError(f"{caller}: every is an integer of at least 1; found {every!r}")
    _update.require_output(kernels, caller)


def _given(rho: ArrayLike, caller: str, name: str, norm: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """The number that was said, for the norms of this kernel, of which shape and dtype are asked."""
    number = jnp.asarray(rho).astype(norm.dtype)
    if number.ndim and np.broadcast_shapes(number.shape, norm.shape) != norm.shape:
        raise ValueError(f"{caller}: rho of shape {number.shape} does not fit the norms of {name!r}, {norm.shape}")
    return jnp.broadcast_to(number, norm.shape) if number.ndim else number
