"""The norm of a kernel as a learning rate."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from normjax import diagnostics
from normjax._expect.arrays import statistics_dtype
from normjax._leaves import one_of
from normjax._paths import ByPath
from normjax.projection import _update
from normjax.projection._update import NORM_POWERS, RecordedNorms, Schedule
from normjax.selection import Kernels


def scale_by_weight_norm(
    recorded: Mapping[str, ArrayLike],
    kernels: Kernels,
    *,
    learning_rate: ArrayLike | Schedule | None = None,
    weight_decay: ArrayLike | None = None,
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
      recorded: norms by path, as `norms` gives them, of these kernels and perhaps of others; or stacked along a first axis
        of time, as `lax.scan` does: record k is of before update k * record_every, and the last one stays. [units w]
      kernels: which, and what the norms are taken over; the paper's field is "... i".
      learning_rate: eta, or its schedule, for the factor.
      weight_decay: lambda, for the factor.
      correction: "exact", or "paper" for no factor.
      rule: "sgd", as above, or "sign" for steps that do not scale with the gradient: the first power.
      record_every: updates from one record to the next; the paper records epochs.

    Source: Hoffer et al. 2018. Their code puts 0 for NaN; here for an infinite factor too.

    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> tx = scale_by_weight_norm({"kernel": jnp.array(2.5)}, Kernels(output=()), correction="paper")
    >>> tx.update({"kernel": jnp.ones((2, 1))}, tx.init(params), params)[0]["kernel"].tolist()
    [[4.0], [4.0]]
    """
    caller, record = "scale_by_weight_norm", RecordedNorms(recorded, record_every)
    one_of("correction", correction, ("exact", "paper"))
    one_of("rule", rule, tuple(NORM_POWERS))
    _update.require_output(kernels, caller)
    exact = correction == "exact"
    if exact and (learning_rate is None or weight_decay is None):
        raise ValueError(f"{caller}: correction='exact' needs learning_rate and weight_decay; 'paper' goes without")

    def start() -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(_update.first_step())

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        for name, w in _update.select(kernels, params, caller).items():
            record.at(0, name, kernels, w, caller)
        return start()

    def change(
        params: optax.Params, ps: ByPath, us: ByPath, state: optax.ScaleByScheduleState
    ) -> tuple[ByPath, optax.ScaleByScheduleState]:
        count, changed = jnp.asarray(state.count), {}
        for name in _update.select(kernels, params, caller):
            p, u = ps[name], us[name]
            norm = kernels.norm(p)
            past = record.at(count, name, kernels, p, caller).astype(norm.dtype)
            ratio = (norm / jnp.where(past > 0, past, 1)) ** NORM_POWERS[rule]
            if exact and weight_decay is not None:
                eta = _update.value_at(learning_rate, count, norm.dtype)
                ratio = ratio / (1 - eta * jnp.asarray(weight_decay).astype(norm.dtype))
            ratio = kernels.align_norm(jnp.where((past > 0) & jnp.isfinite(ratio), ratio, 0), p)
            work = statistics_dtype(u.dtype)
            changed[name] = (ratio.astype(work) * u.astype(work)).astype(u.dtype)
        return changed, optax.ScaleByScheduleState(_update.next_step(count))

    return _update.as_transformation(caller, start, init, change)


def effective_learning_rates(
    params: object,
    learning_rate: ArrayLike,
    kernels: Kernels = Kernels(),  # noqa: B008, frozen
    *,
    rule: str = "sgd",
    reference: Mapping[str, ArrayLike] | float = 1.0,
) -> ByPath:
    """The learning rate that turns each kernel as far when its norm is `reference`: eta (reference / |w|) ** 2, by path.

    The rates have the shapes that `norms` gives: scalars for the field "... i o", `[o]` for "... i"; infinite at norm 0.
    The formula is `normjax.diagnostics.effective_learning_rate`, here of the norm of each kernel of a model.

    Args:
      params: a pytree: linen's parameters, an `nnx.State`, an nnx module. [units w]
      learning_rate: eta.
      kernels: which, and what one norm is taken over; by default all that are called `kernel`, each as a whole.
      rule: "sgd" for steps that scale with the gradient, momentum included; "sign" for those that do not (sign, Adam).
      reference: one norm for all, or norms by path, such as the initial ones. [units w]

    Source: Lyle et al. 2024, section on effective learning rates; Hoffer et al. 2018, section 3.

    >>> effective_learning_rates({"kernel": jnp.array([[3.0], [4.0]])}, 0.1)
    {'kernel': Array(0.004, dtype=float32)}
    """
    caller = "effective_learning_rates"
    one_of("rule", rule, tuple(NORM_POWERS))
    rates = {}
    for name, w in kernels.select(params, caller).items():
        norm = kernels.norm(w)
        known = reference if isinstance(reference, Mapping) else {name: reference}
        rho = RecordedNorms(known).at(0, name, kernels, w, caller).astype(norm.dtype)
        eta = jnp.asarray(learning_rate).astype(norm.dtype)
        rates[name] = diagnostics.effective_learning_rate(eta, norm, rho, order=NORM_POWERS[rule])
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

    Source: from the recursion of Hoffer et al. 2018.

    >>> round(float(equilibrium_norm(0.1, 5e-4, 0.16, first_order=True)), 5)
    2.0
    """
    eta, decay, square = (jnp.asarray(value) for value in (learning_rate, weight_decay, grad_square))
    return jnp.sqrt(jnp.sqrt(eta * square / (decay * (2 - (0 if first_order else eta * decay)))))
