"""The norm of a kernel as a learning rate."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax._leaves import one_of
from normjax.projection.update import (
    RULES,
    Record,
    Schedule,
    first_step,
    is_placeholder,
    next_step,
    now,
    pair,
    transformation,
    want_output,
)
from normjax.selection import Kernels, Norms


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
    caller, record = "scale_by_weight_norm", Record(recorded, record_every)
    one_of("correction", correction, ("exact", "paper"))
    one_of("rule", rule, tuple(RULES))
    want_output(kernels, caller)
    exact = correction == "exact"
    if exact and (learning_rate is None or weight_decay is None):
        raise ValueError(f"{caller}: correction='exact' needs learning_rate and weight_decay; 'paper' goes without")

    def init(params: Any) -> optax.ScaleByScheduleState:
        if not is_placeholder(params):
            for name, w in kernels.select(params, caller).items():
                record.at(0, name, kernels, w, caller)
        return optax.ScaleByScheduleState(first_step())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        ps, us, back = pair(updates, params, (), caller)
        changed = {}
        for name in kernels.select(params, caller):
            p, u = ps[name], us[name]
            norm = kernels.norm(p)
            past = record.at(state.count, name, kernels, p, caller).astype(norm.dtype)
            ratio = (norm / jnp.where(past > 0, past, 1)) ** RULES[rule]
            if exact and weight_decay is not None:
                ratio = ratio / (1 - now(learning_rate, state.count, norm.dtype) * weight_decay)
            ratio = kernels.beside(jnp.where((past > 0) & jnp.isfinite(ratio), ratio, 0), p)
            work = statistics_dtype(u.dtype)
            changed[name] = (ratio.astype(work) * u.astype(work)).astype(u.dtype)
        return back(changed), optax.ScaleByScheduleState(next_step(state.count))

    return transformation(init, update)


def effective_learning_rate(
    params: Any,
    learning_rate: ArrayLike,
    kernels: Kernels = Kernels(),  # noqa: B008, frozen
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
    one_of("rule", rule, tuple(RULES))
    rates = {}
    for name, w in kernels.select(params, "effective_learning_rate").items():
        norm = kernels.norm(w)
        known = reference if isinstance(reference, Mapping) else {name: reference}
        rho = Record(known).at(0, name, kernels, w, "effective_learning_rate").astype(norm.dtype)
        rates[name] = jnp.asarray(learning_rate).astype(norm.dtype) * (rho / norm) ** RULES[rule]
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
