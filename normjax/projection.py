"""Weights held at a norm: optax transformations for layers that a normalizer makes blind to the scale of their weights.

Where f(c W) = f(W), the gradient at c W is that at W over c. A gradient step eta at norm |W| then turns the layer as far as
eta / |W| ** 2 does at norm 1 (eta / |W| for steps that do not scale with the gradient: sign, Adam); and since the gradient
is orthogonal to W, every step makes the norm grow: |W + dW| ** 2 = |W| ** 2 + |dW| ** 2. So the norm is a learning rate
that nobody chose. `project` holds it, `norm_schedule` chooses it, weight decay shrinks it, and `scale_by_weight_norm` does
without weight decay what weight decay does to it.

`Kernels` says which weights, and what one norm of them is taken over. Norms are dictionaries by path,
`{"Dense_0/kernel": norm}`, of float32 or wider. A transformation comes last in `optax.chain`, unless it says otherwise.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from normjax import moments
from normjax.field import Field, FieldError, axes, bind

Norms = dict[str, jax.Array]
Schedule = Callable[[Any], ArrayLike]
Patterns = str | Iterable[str]

_RULES = {"sgd": 2, "sign": 1}  # the power of the norm in the effective learning rate


@dataclass(frozen=True)
class Kernels:
    """Which parameters, and what one norm of them is taken over.

    What may be scaled without changing the network depends on the normalizer that follows:

        "... i o"      the whole kernel          layer or RMS norm
        "... i"        each output feature       batch or instance norm
        "... i o/32"   each block of features    group norm

    Attributes:
      where: None: those called `kernel` that the layout fits. Patterns: `"encoder/*/kernel"`, `"Dense_0"` (all that is
        below it), with shell wildcards, of which those count that the layout fits. A mask: a tree of booleans, or of its
        beginnings, or a function that gives one, as for `optax.masked`.
      output: patterns of what is left out, the output layer, which no normalizer follows; `()` takes it too. A
        transformation wants it said where `where` is None: names do not tell which kernel it is.
      field: what one norm is taken over: whole axes and blocks.
      layout: name of each axis of a kernel, i for inputs and o for output features; `"o i ..."` where these come first.

    Raises:
      FieldError: field and layout do not fit each other.

    >>> params = {"hidden": {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}}
    >>> norms(params, Kernels(field="... i"))
    {'hidden/kernel': Array([5., 1.], dtype=float32)}
    """

    where: Any = None
    _: KW_ONLY
    output: Patterns | None = None
    field: str | Field = "... i o"
    layout: str = "... i o"

    def __post_init__(self):
        spans = Field.parse(self.field).spans
        if any(span.window for span in spans):
            raise FieldError(f'a norm is taken over whole axes and blocks; field "{self.field}" has a window')
        bind(Field.parse(self.field), self.layout, (0,) * len(self.layout.split()))

    def select(self, params: Any, caller: str) -> Norms:
        """The parameters themselves, by path.

        Raises:
          FieldError: a mask takes a parameter that the layout does not fit.
          TypeError: a mask without booleans, or weights that are not floating.
          ValueError: a pattern matches nothing, or nothing is left.
        """
        leaves = _named(params)
        patterns = (self.where,) if isinstance(self.where, str) else self.where
        if patterns is None:
            chosen = {name for name, w in leaves.items() if name.split("/")[-1] == "kernel" and self._fits(w)}
        elif isinstance(patterns, tuple | list) and all(isinstance(pattern, str) for pattern in patterns):
            chosen = self._matching(patterns, leaves, caller)
        else:
            mask = patterns(params) if callable(patterns) else patterns
            flags = jax.tree.leaves(jax.tree.broadcast(mask, params))
            if wrong := [flag for flag in flags if not isinstance(flag, bool | np.bool_)]:
                raise TypeError(f"{caller}: a mask is made of booleans, found {type(wrong[0]).__name__}")
            chosen = {name for name, flag in zip(leaves, flags, strict=True) if flag}
        chosen -= self._matching(self.output or (), leaves, caller)
        if not chosen:
            raise ValueError(f"{caller}: no parameter is left to work on. {_listed(leaves)}")
        for name, w in leaves.items():
            if name in chosen and not jnp.issubdtype(w.dtype, jnp.floating):
                raise TypeError(f"{caller}: the norm of {name!r} is asked for, which has dtype {w.dtype}")
            if name in chosen and not self._fits(w):
                raise FieldError(f'{caller}: layout "{self.layout}" does not fit {name!r}, which has shape {w.shape}')
        return {name: w for name, w in leaves.items() if name in chosen}

    def _matching(self, patterns: Patterns, leaves: Norms, caller: str) -> set[str]:
        """The paths that the patterns stand for, of parameters that the layout fits."""
        found = set()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            here = {name for name in leaves if _matches(name, pattern)}
            fitting = {name for name in here if self._fits(leaves[name])}
            if not fitting:
                what = f'only what layout "{self.layout}" does not fit' if here else "no parameter"
                close = [] if here else difflib.get_close_matches(pattern, leaves, 1, 0.4)
                hint = f"; did you mean {close[0]!r}? " if close else ". "
                raise ValueError(f"{caller}: {pattern!r} matches {what}{hint}{_listed(leaves)}")
            found |= fitting
        return found

    def _fits(self, w: jax.Array) -> bool:
        try:
            axes(self.layout, w.ndim)
        except FieldError:
            return False
        return True

    def _whole(self, w: jax.Array) -> tuple[int, ...]:
        """The axes that a norm covers whole."""
        return bind(Field.parse(self.field), self.layout, w.shape).whole

    def squared(self, w: jax.Array) -> jax.Array:
        """The squared norm, of the rank of w, float32 or wider."""
        plan = moments.Plan(bind(Field.parse(self.field), self.layout, w.shape))
        return moments.total(lax.square(w.astype(moments.wide(w.dtype))), plan)

    def norm(self, w: jax.Array) -> jax.Array:
        """The norm, without the axes that it covers whole."""
        return jnp.squeeze(_root(self.squared(w)), self._whole(w))

    def beside(self, norm: jax.Array, w: jax.Array) -> jax.Array:
        """A norm, or one for all, so that it broadcasts against w."""
        return jnp.expand_dims(norm, self._whole(w)) if norm.ndim else norm.reshape((1,) * w.ndim)


class ProjectState(NamedTuple):
    """How many updates were made (int32 scalar), and the norms that weights return to, by path."""

    step: jax.Array
    norms: Any


def norms(params: Any, kernels: Kernels = Kernels()) -> Norms:
    """The norms of kernels, by path; a record of them is what `scale_by_weight_norm` and `norm_schedule` take.

    Args:
      params: a pytree: linen's parameters, an `nnx.State`, an nnx module. [units w]
      kernels: which; by default all that are called `kernel`, each as a whole.

    Returns:
      Euclidean norms, float32 or wider, without the axes that the field covers whole. [units w]

    Raises:
      FieldError, TypeError, ValueError: see `Kernels.select`.

    >>> norms({"kernel": jnp.array([[3.0], [4.0]], jnp.bfloat16)})
    {'kernel': Array(5., dtype=float32)}
    """
    return {name: kernels.norm(w) for name, w in kernels.select(params, "norms").items()}


def project(kernels: Kernels, *, rho: str | float = "initial", every: int = 1) -> optax.GradientTransformationExtraArgs:
    """Normalize-and-Project: after the optimizer's step, kernels return to the norm rho.

    Emits rho (p + u) / |p + u| - p; the optimizer's moments stay as they are. Weight decay before it is no more than a
    factor 1 / (1 - eta lambda) of the learning rate. A norm of 0, or not finite, lets the update pass.

    Args:
      kernels: which. No official code was published, and ports disagree on the output layer: `Kernels(output="Dense_2")`
        leaves it free, `Kernels(output=())` takes it too.
      rho: "initial", each norm as it is when the state is made; "rms" or "mean" of a kernel's initial norms, for all its
        features; or a number. [units w]
      every: only each so many steps; the others pass.

    Returns:
      An optax transformation with a ProjectState.

    Raises:
      FieldError, TypeError, ValueError: see `Kernels.select`.
      ValueError: an output layer that is not named, an unknown rho, weights that start at norm 0 (seen only outside of
        transformations; inside they are left free), or no parameters at update.

    Source: Lyle et al. 2024 (Normalize-and-Project). The whole kernel is layer norm's symmetry, each feature batch norm's.

    >>> params = {"hidden": {"kernel": 2 * jnp.eye(2)}, "head": {"kernel": jnp.ones((2, 2))}}
    >>> tx = optax.chain(optax.sgd(1.0), project(Kernels(output="head")))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> norms(params)["hidden/kernel"].round(4), norms(optax.apply_updates(params, updates))["hidden/kernel"].round(4)
    (Array(2.8284, dtype=float32), Array(2.8284, dtype=float32))
    """
    return _project(kernels, rho, every, "project")


def bounded_norm(kernels: Kernels, *, rho: str | float = "rms") -> optax.GradientTransformationExtraArgs:
    """Bounded weight norm: all output features of a kernel have one norm, which is kept.

    It is `project` with the field "... i" and one rho. The first step moves weights that do not start there. The published
    code has three forms: rho = |V_0| / sqrt(o), the paper's, is "rms"; a later module takes the "mean" of the features'
    norms; an earlier one bounds the whole kernel's norm alone, which is `project` with the field "... i o".

    Args:
      kernels: which, as for `project`; the field is "... i".
      rho: as for `project`.

    Raises:
      FieldError, TypeError, ValueError: see `project`.

    Source: Hoffer et al. 2018, bounded weight normalization.

    >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 7.0]])}
    >>> tx = bounded_norm(Kernels(output=()))
    >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()      # 5 = sqrt((1 + 49) / 2)
    [[5.0, 0.0], [0.0, 5.0]]
    """
    return _project(dataclasses.replace(kernels, field="... i"), rho, 1, "bounded_norm")


def norm_schedule(
    schedule: Schedule, kernels: Kernels, *, recorded: Mapping[str, ArrayLike] | None = None, record_every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """A schedule of the norm in place of one of the learning rate: a norm times c is a learning rate over c ** 2.

    Update number t = 0, 1, ... leaves the norm schedule(t + 1) * N, on which update t + 1 acts; N is the initial norm, or
    the recorded one of t + 1.

    Args:
      schedule: factor of the norm; 10 ** (epoch // 20 / 2) is a learning rate over 10 every 20 epochs.
      kernels: which; the published form takes the field "... i".
      recorded: norms by path, as `norms` gives them, of these kernels and perhaps of others; or stacked along a first axis
        of time, as `lax.scan` does: record k is of before update k * record_every, and the last one stays. [units w]
      record_every: updates from one record to the next.

    Returns:
      An optax transformation with a ProjectState.

    Raises:
      FieldError, TypeError, ValueError: see `project`; a kernel without a record, or a record of another shape.

    Source: Hoffer et al. 2018; their code rescales to the record of a run with weight decay.

    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx = norm_schedule(lambda step: 10.0 ** (step / 2), Kernels(output=()))
    >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 1))}, tx.init(params), params)
    >>> round(float(norms(optax.apply_updates(params, updates))["kernel"]), 3)  # 5 * sqrt(10)
    15.811
    """
    return _project(kernels, "initial", 1, "norm_schedule", schedule, _Record(recorded, record_every))


def _project(
    kernels: Kernels, rho: str | float, every: int, caller: str, schedule: Schedule | None = None, record: Any = None
) -> optax.GradientTransformationExtraArgs:
    number = rho if isinstance(rho, int | float) and not isinstance(rho, bool) else None
    if rho not in ("initial", "rms", "mean") and (number is None or not number > 0):
        raise ValueError(f"{caller}: rho is 'initial', 'rms', 'mean' or a number above 0; found {rho!r}")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"{caller}: every is an integer of at least 1; found {every!r}")
    _want_output(kernels, caller)

    def target(norm: jax.Array) -> jax.Array:
        if number is not None:
            return jnp.full((), number, norm.dtype)
        return norm if rho == "initial" else jnp.mean(norm) if rho == "mean" else _root(jnp.mean(lax.square(norm)))

    def init(params: Any) -> ProjectState:
        if _is_placeholder(params):
            return ProjectState(_start(), _start())
        chosen = kernels.select(params, caller)
        if record is not None and record.norms is not None:
            for name, w in chosen.items():
                record.at(0, name, kernels, w, caller)  # what does not fit is refused here already
            return ProjectState(_start(), {})
        return ProjectState(_start(), _not_zero({name: target(kernels.norm(w)) for name, w in chosen.items()}, caller))

    def update(updates: Any, state: ProjectState, params: Any = None) -> tuple[Any, ProjectState]:
        ps, us, back = _pair(updates, params, state.norms, caller)
        step, changed = _next(state.step), {}
        for name in state.norms or kernels.select(params, caller):
            p, u = ps[name], us[name]
            squared = kernels.squared(_sum(p, u))
            norm = state.norms[name] if state.norms else record.at(step, name, kernels, p, caller)
            norm = kernels.beside(norm, p).astype(squared.dtype)
            if schedule is not None:
                norm = norm * _now(schedule, step, squared.dtype)
            new = _towards(p, u, squared, norm)
            changed[name] = new if every == 1 else jnp.where(step % every == 0, new, u)
        return back(changed), ProjectState(step, state.norms)

    return _transformation(init, update)


def scale_by_weight_norm(
    recorded: Mapping[str, ArrayLike],
    kernels: Kernels,
    *,
    learning_rate: float | Schedule | None = None,
    weight_decay: float | None = None,
    correction: str = "exact",
    rule: str = "sgd",
    record_every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """A correction of the learning rate in place of weight decay: updates times (|w| / |w_recorded|) ** 2.

    The record is of a run with weight decay from the same start. Without weight decay the kernels then turn as they did
    there, while their norms grow. Stands behind momentum and before the learning rate: `optax.chain(optax.trace(0.9),
    scale_by_weight_norm(...), optax.scale_by_learning_rate(0.1))`; the output layer keeps its weight decay
    (`optax.add_decayed_weights(5e-4, mask)`). The record of a run without any, and `project`, give that run projected.

    With plain SGD it is exact with the factor 1 / (1 - eta lambda), which the paper leaves out: a step with weight decay is
    (1 - eta lambda) (w - eta / (1 - eta lambda) g). With momentum both are approximate.

    Args:
      recorded: as for `norm_schedule`.
      kernels: which, and what the norms are taken over; the paper's field is "... i".
      learning_rate: eta, or its schedule, for the factor.
      weight_decay: lambda, for the factor.
      correction: "exact", or "paper" for no factor.
      rule: "sgd", as above, or "sign" for steps that do not scale with the gradient: the first power.
      record_every: as for `norm_schedule`; the paper records epochs.

    Returns:
      An optax transformation with an `optax.ScaleByScheduleState`.

    Raises:
      FieldError, TypeError, ValueError: see `norm_schedule`; an unknown name, or numbers that the factor lacks.

    Source: Hoffer et al. 2018. Their code puts 0 for NaN; here for an infinite factor too.

    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx = scale_by_weight_norm({"kernel": jnp.array(2.5)}, Kernels(output=()), correction="paper")
    >>> tx.update({"kernel": jnp.ones((2, 1))}, tx.init(params), params)[0]["kernel"].tolist()
    [[4.0], [4.0]]
    """
    caller, record = "scale_by_weight_norm", _Record(recorded, record_every)
    moments.choose("correction", correction, ("exact", "paper"))
    moments.choose("rule", rule, tuple(_RULES))
    _want_output(kernels, caller)
    exact = correction == "exact"
    if exact and (learning_rate is None or weight_decay is None):
        raise ValueError(f"{caller}: correction='exact' needs learning_rate and weight_decay; 'paper' goes without")

    def init(params: Any) -> optax.ScaleByScheduleState:
        if not _is_placeholder(params):
            for name, w in kernels.select(params, caller).items():
                record.at(0, name, kernels, w, caller)
        return optax.ScaleByScheduleState(_start())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        ps, us, back = _pair(updates, params, (), caller)
        changed = {}
        for name in kernels.select(params, caller):
            p, u = ps[name], us[name]
            norm = kernels.norm(p)
            past = record.at(state.count, name, kernels, p, caller).astype(norm.dtype)
            ratio = (norm / jnp.where(past > 0, past, 1)) ** _RULES[rule]
            if exact and weight_decay is not None:
                ratio = ratio / (1 - _now(learning_rate, state.count, norm.dtype) * weight_decay)
            ratio = kernels.beside(jnp.where((past > 0) & jnp.isfinite(ratio), ratio, 0), p)
            work = moments.wide(u.dtype)
            changed[name] = (ratio.astype(work) * u.astype(work)).astype(u.dtype)
        return back(changed), optax.ScaleByScheduleState(_next(state.count))

    return _transformation(init, update)


def project_affine(where: Any = None) -> optax.GradientTransformationExtraArgs:
    """Scale and bias of each normalizer return together to their initial joint norm.

    A symmetry only where a positively homogeneous function and another normalizer follow; elsewhere `pull_affine`, or
    neither. The joint norm of (1, 0) is sqrt(c) for c channels; a published port takes sqrt(2) whatever c is.

    Args:
      where: as for `Kernels`, of parameters of any rank; those called `scale`, and `bias` beside a `scale`, count. By
        default all of these.

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
        squares: list[Any] = [jnp.sum(lax.square(part.astype(moments.wide(part.dtype)))) for part in parts]
        return jnp.asarray(sum(squares))

    def init(params: Any) -> ProjectState:
        if _is_placeholder(params):
            return ProjectState(_start(), _start())
        found = {name: _root(joint(parts.values())) for name, parts in _normalizers(params, where, caller).items()}
        return ProjectState(_start(), _not_zero(found, caller))

    def update(updates: Any, state: ProjectState, params: Any = None) -> tuple[Any, ProjectState]:
        ps, us, back = _pair(updates, params, [f"{module}/scale".lstrip("/") for module in state.norms], caller)
        changed, groups = {}, _normalizers(params, where, caller)
        for module, norm in state.norms.items():
            squared = joint(_sum(ps[name], us[name]) for name in groups[module])
            changed |= {name: _towards(ps[name], us[name], squared, norm) for name in groups[module]}
        return back(changed), ProjectState(_next(state.step), state.norms)

    return _transformation(init, update)


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
        if not _is_placeholder(params):
            _normalizers(params, where, "pull_affine")
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        ps, us, back = _pair(updates, params, (), "pull_affine")
        changed = {}
        for parts in _normalizers(params, where, "pull_affine").values():
            for name in parts:
                away = ps[name] - 1 if name.split("/")[-1] == "scale" else ps[name]
                changed[name] = us[name] + (strength * away).astype(us[name].dtype)
        return back(changed), state

    return _transformation(init, update)


def effective_learning_rate(
    params: Any,
    learning_rate: ArrayLike,
    kernels: Kernels = Kernels(),
    *,
    rule: str = "sgd",
    reference: Mapping[str, ArrayLike] | float = 1.0,
) -> Norms:
    """The learning rate that turns each kernel as far when its norm is `reference`: eta (reference / |w|) ** 2.

    Args:
      params: as for `norms`. [units w]
      learning_rate: eta.
      kernels: which; by default all that are called `kernel`, each as a whole.
      rule: "sgd" for steps that scale with the gradient, momentum included; "sign" for those that do not (sign, Adam): the
        first power.
      reference: one norm for all, or norms by path, such as the initial ones. [units w]

    Returns:
      Rates by path, of the shapes that `norms` gives; infinite at norm 0.

    Raises:
      FieldError, TypeError, ValueError: see `norms`; an unknown rule, or a kernel that the reference lacks.

    Source: Lyle et al. 2024; Hoffer et al. 2018.

    >>> effective_learning_rate({"kernel": jnp.array([[3.0], [4.0]])}, 0.1)
    {'kernel': Array(0.004, dtype=float32)}
    """
    moments.choose("rule", rule, tuple(_RULES))
    rates = {}
    for name, w in kernels.select(params, "effective_learning_rate").items():
        norm = kernels.norm(w)
        known = reference if isinstance(reference, Mapping) else {name: reference}
        rho = _Record(known, 1).at(0, name, kernels, w, "effective_learning_rate").astype(norm.dtype)
        rates[name] = jnp.asarray(learning_rate).astype(norm.dtype) * (rho / norm) ** _RULES[rule]
    return rates


def equilibrium_norm(
    learning_rate: ArrayLike, weight_decay: ArrayLike, grad_square: ArrayLike, *, first_order: bool = False
) -> jax.Array:
    """The norm at which SGD's growth and weight decay balance: |w| ** 4 = eta G / (lambda (2 - eta lambda)).

    It is the fixed point of |w'| ** 2 = (1 - eta lambda) ** 2 |w| ** 2 + eta ** 2 G / |w| ** 2.

    Args:
      learning_rate: eta.
      weight_decay: lambda.
      grad_square: G, the mean squared norm of the gradient at norm 1; it is G / |w| ** 2 at norm |w|.
      first_order: eta G / (2 lambda), the form that is usually quoted, to the first order of eta lambda.

    Returns:
      The norm of what G is the gradient of. [units w]

    Source: from the recursion of Hoffer et al. 2018.

    >>> round(float(equilibrium_norm(0.1, 5e-4, 0.16, first_order=True)), 5)
    2.0
    """
    eta, decay, square = (jnp.asarray(value) for value in (learning_rate, weight_decay, grad_square))
    return jnp.sqrt(jnp.sqrt(eta * square / (decay * (2 - (0 if first_order else eta * decay)))))


@dataclass(frozen=True)
class _Record:
    """Norms by path, of one time or of several."""

    norms: Mapping[str, ArrayLike] | None
    every: int

    def at(self, count: Any, name: str, kernels: Kernels, w: jax.Array, caller: str) -> jax.Array:
        """The norms of a kernel before update number `count`."""
        assert self.norms is not None
        if name not in self.norms:
            raise ValueError(f"{caller}: norms of {name!r} are not among those given: {', '.join(self.norms)}")
        record, shape = jnp.asarray(self.norms[name]), jax.eval_shape(kernels.norm, w).shape
        if record.shape in ((), shape):
            return record
        if record.shape[1:] != shape or not len(record):
            raise ValueError(f"{caller}: norms of {name!r} have shape {shape}, or that behind an axis of time; found "
                             f"{record.shape}")  # fmt: skip
        return jnp.take(record, jnp.minimum(count // self.every, len(record) - 1), axis=0)


def _now(schedule: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """A schedule's value, or a number."""
    with jax.numpy_dtype_promotion("standard"):  # counts are integers, and schedules multiply them by floats
        return jnp.asarray(schedule(count) if callable(schedule) else schedule).astype(dtype)


def _root(squared: jax.Array) -> jax.Array:
    """The square root, with a gradient of 0 at 0."""
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def _sum(p: jax.Array, u: jax.Array) -> jax.Array:
    """Parameter and update added, float32 or wider."""
    work = max(moments.wide(p.dtype), moments.wide(u.dtype), key=lambda dtype: dtype.itemsize)
    return p.astype(work) + u.astype(work)


def _towards(p: jax.Array, u: jax.Array, squared: jax.Array, norm: jax.Array) -> jax.Array:
    """The update that leaves `norm` where u would leave the root of `squared`; u itself where there is no such factor."""
    known = (squared > 0) & jnp.isfinite(squared) & (norm > 0)
    factor = jnp.where(known, norm.astype(squared.dtype) / jnp.sqrt(jnp.where(known, squared, 1)), 1)
    after = _sum(p, u)
    return (factor.astype(after.dtype) * after - p.astype(after.dtype)).astype(u.dtype)


def _named(tree: Any) -> Norms:
    """The arrays of a tree by path. An nnx variable and a box of linen end theirs with `value`, which is left out."""

    def name(path: tuple) -> str:
        boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
        return jax.tree_util.keystr(path[:-1] if boxed else path, simple=True, separator="/")

    return {name(path): jnp.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern stands for this path or for a beginning of it."""
    parts = name.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[: k + 1]), pattern) for k in range(len(parts)))


def _listed(leaves: Norms) -> str:
    shown = ", ".join(f"{name} {leaf.shape}" for name, leaf in list(leaves.items())[:12])
    return f"The parameters are {shown}{', ...' if len(leaves) > 12 else ''}"


def _normalizers(params: Any, where: Any, caller: str) -> dict[str, Norms]:
    """Scale and bias of each normalizer: by its path, and then by theirs."""
    leaves = _named(params)
    chosen = leaves if where is None else Kernels(where, field="...", layout="...").select(params, caller)
    found: dict[str, Norms] = {}
    for name in chosen:
        module, _, last = name.rpartition("/")
        if last == "scale" or (last == "bias" and f"{module}/scale".lstrip("/") in leaves):
            found.setdefault(module, {})[name] = leaves[name]
    if not found:
        raise ValueError(f"{caller}: nothing here is called 'scale', as a normalizer's factor is. {_listed(leaves)}")
    return found


def _want_output(kernels: Kernels, caller: str) -> None:
    if kernels.where is None and kernels.output is None:
        raise ValueError(f"{caller} cannot read off the parameters which kernel is the output layer's, which no normalizer "
                         "follows: Kernels(output='Dense_2') leaves it free, Kernels(output=()) takes it too")  # fmt: skip


def _not_zero(found: Norms, caller: str) -> Norms:
    """The norms, of which none is known to be 0."""
    for name, norm in found.items():
        if isinstance(norm, Tracer) or not norm.is_fully_addressable:
            continue
        if zeros := int(np.sum(np.asarray(norm) == 0)):
            count = f" in {zeros} of {norm.size} places" if norm.size > 1 else ""
            raise ValueError(f"{caller}: {name!r} starts with norm 0{count}, to which nothing can be projected; leave it "
                             "out, or start it elsewhere")  # fmt: skip
    return found


def _pair(updates: Any, params: Any, names: Iterable[str], caller: str) -> tuple[Norms, Norms, Callable[[Norms], Any]]:
    """Parameters and updates by path, and the way from changed updates back to a tree."""
    if params is None:
        raise ValueError(f"{caller} needs the parameters: tx.update(updates, state, params)")
    ps, (flat, structure) = _named(params), jax.tree.flatten(updates)
    if len(flat) != len(ps):
        raise ValueError(f"{caller}: there are {len(ps)} parameters but {len(flat)} updates")
    if missing := [name for name in names if name not in ps]:
        raise ValueError(f"{caller}: the state holds a norm of {missing[0]!r}, which is no parameter. {_listed(ps)}")
    us = dict(zip(ps, flat, strict=True))
    return ps, us, lambda changed: structure.unflatten([changed.get(name, u) for name, u in us.items()])


def _transformation(init: Callable, update: Callable) -> optax.GradientTransformationExtraArgs:
    def passing(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is not None and not jax.tree.leaves(params):  # `optax.partition` gave this one nothing
            return updates, state
        return update(updates, state, params)

    return optax.with_extra_args_support(optax.GradientTransformation(init, passing))


def _is_placeholder(params: Any) -> bool:
    """Whether there is nothing to work on: so `optax.tree_map_params` asks what of a state is like parameters (nothing)."""
    return not jax.tree.leaves(params)


def _start() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _next(step: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(step))
