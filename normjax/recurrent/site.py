"""One normalized array of a cell: its statistics, which may be those of each step, and its penalty."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normjax._leaves import AMOUNT, COUNT, INTEGER, SHARE
from normjax._normalize.evaluate import equation, normalize
from normjax.field import FieldError
from normjax.penalty import l1_penalty
from normjax.recurrent.clock import Clock, valid
from normjax.running import NOTHING, Running, Slot, as_stats, observe, slots, stores, update
from normjax.theory import Normalizer, Stats, row

LAYOUT = "n c"


def site_slots(
    normalizer: Normalizer | str, features: int, max_steps: int | None, dtype: DTypeLike = np.float32
) -> dict[str, Slot]:
    """What a site of so many features stores, "mean" and "var" with a first axis of `max_steps`; nothing if no examples mix.

    The dtype is that of the pre-activations; the statistics are float32 or wider.

    Source: Cooijmans et al. 2017, section 3.

    >>> from normjax import TABLE
    >>> {name: slot.shape for name, slot in site_slots(TABLE["batch"], 4, 20).items()}
    {'mean': (20, 4), 'var': (20, 4)}
    """
    max_steps = None if max_steps is None else INTEGER("max_steps", max_steps)
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is at least 1, or None for one statistic of all steps; found {max_steps!r}")
    steps = () if max_steps is None else (max_steps,)
    found = slots(normalizer, LAYOUT, (None, COUNT("features", features)), dtype=dtype)
    return {name: slot._replace(shape=steps + slot.shape) for name, slot in found.items()}


def needs_clock(normalizer: Normalizer | str | None, max_steps: int | None) -> bool:
    """Whether a cell must know the number of its step: where it stores statistics of each of `max_steps` steps.

    >>> from normjax import TABLE
    >>> needs_clock(TABLE["batch"], 20), needs_clock(TABLE["token"], 20), needs_clock(TABLE["batch"], None)
    (True, False, False)
    """
    return normalizer is not None and max_steps is not None and any(stores(normalizer))


def choose_sites(name: str, given: bool | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The sites that an argument like `use_bias` (`name`) speaks of: all that are known, none, or those it names.

    >>> choose_sites("use_bias", True, ("x", "c")), choose_sites("use_bias", ("c",), ("x", "c"))
    (('x', 'c'), ('c',))
    """
    if isinstance(given, bool):
        return tuple(known) if given else ()
    unknown = [site for site in given if site not in known]
    if isinstance(given, str) or unknown:
        raise ValueError(f"{name} is True, False or a tuple of sites of this cell, {', '.join(known)}; found {given!r}")
    return tuple(given)


def start_sigma(normalizer: Normalizer | str, learn: bool, given: ArrayLike | None) -> ArrayLike | None:
    """The first value of a sigma to learn, as given or the square root of the row's eps [units of z]; None learns none.

    Source: Ren et al. 2017, equation 3.

    >>> start_sigma(Normalizer("c", "c", eps=0.25), True, None), start_sigma(Normalizer("c", "c"), False, 1.0)
    (0.5, None)
    """
    normalizer = row(normalizer)
    if learn and normalizer.var is None:
        raise ValueError(f"learn_sigma learns what is added to a spread; {normalizer} divides by nothing")
    return None if not learn else normalizer.eps**0.5 if given is None else given


def penalty_axes(normalizer: Normalizer | str | None, given: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """The mapped axes that share one mean of |v|: those given, one or several, or else those of the row's fields.

    >>> penalty_axes(Normalizer("@n", "@n @m")), penalty_axes("token", "n")
    (('n', 'm'), ('n',))
    """
    if given is not None:
        return (given,) if isinstance(given, str) else tuple(given)
    fields = () if normalizer is None else row(normalizer).fields
    return tuple(dict.fromkeys(name for field in fields for name in field.mapped))


class Site(NamedTuple):
    """What `normalize_site` returns: y, `[n, site]`, the statistics to store from now on, and l1 * mean |v| or None.

    >>> normalize_site(jnp.array([[1.0, 3.0]]), Normalizer("c", "c", eps=0.0), l1=0.5).penalty
    Array(0.5, dtype=float32)
    """

    y: jax.Array
    running: Running
    penalty: jax.Array | None


def normalize_site(
    z: jax.Array,
    normalizer: Normalizer | str,
    running: Running = NOTHING,
    *,
    clock: Clock | None = None,
    max_steps: int | None = None,
    refuse: bool = True,
    use_running: bool = False,
    momentum: ArrayLike = 0.99,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    l1: float = 0.0,
    l1_axis_name: str | Sequence[str] | None = None,
) -> Site:
    """Normalizes one array of a step; all axes but the last are examples.

    With `max_steps`, the statistics of this batch move those of the step of its latest example in training; in inference
    each example takes those of its own step. Steps past the last take, and move, the last.

    Args:
      z: pre-activations, `[n, site]`. [units u]
      normalizer: of layout "n c", or its name in TABLE.
      running: stored statistics, `[site]`, or `[max_steps, site]` of each step; none by default.
      clock: number of the step, and the lengths: examples that are over are masked.
      max_steps: number of steps with statistics of their own; None shares one of all steps.
      refuse: whether the checks of `normalize` are made.
      use_running: whether to normalize with what is stored.
      momentum: weight of the old value.
      scale: factor, `[site]`.
      bias: addend, `[site]`.
      eps: replaces the row's number, for a learned sigma. [u ** order]
      l1: weight of the penalty l1 * mean |v| over this step's valid elements.
      l1_axis_name: mapped axes that share the mean; by default those of the fields.

    Raises:
      FieldError: the normalizer does not fit, or statistics of each step lack a clock.

    Source: Cooijmans et al. 2017, section 3; Ren et al. 2017, equation 7 (the penalty).

    >>> from normjax import TABLE
    >>> z, stored = jnp.array([[1.0], [3.0]]), Running(jnp.zeros((3, 1)), jnp.ones((3, 1)))
    >>> out = normalize_site(z, TABLE["batch"], stored, clock=Clock(jnp.array([1, 1])), max_steps=3, momentum=0.5)
    >>> out.running.mean.ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    max_steps = None if max_steps is None else COUNT("max_steps", max_steps)
    momentum, l1 = SHARE("momentum", momentum), AMOUNT("l1", l1)
    normalizer, shape = row(normalizer), z.shape
    z, going = z.reshape(-1, shape[-1]), valid(clock)
    mask = None if going is None else going.reshape(-1, 1)
    stored = any(value is not None for value in running)
    steps = None if max_steps is None or not stored else _steps(clock, max_steps)
    stats = _stored_stats(running, normalizer, z.shape, steps) if stored and use_running else None
    evaluate = normalize if refuse else equation
    out = evaluate(z, normalizer, LAYOUT, stats=stats, scale=scale, bias=bias, mask=mask, eps=eps)
    if stored and not use_running:
        batch = observe(out.stats, normalizer, LAYOUT, z.shape)
        if steps is None:
            running = update(running, batch, momentum)
        else:
            running = _update_at(_latest(steps, mask, penalty_axes(normalizer)), running, batch, momentum)
    shared = penalty_axes(normalizer, l1_axis_name)
    penalty = l1_penalty(out.centered, l1, mask=mask, axis_name=shared) if l1 else None
    return Site(out.y.reshape(shape), running, penalty)


def _steps(clock: Clock | None, max_steps: int) -> jax.Array:
    """The row of stored statistics that belongs to the step of each example, `[n]`."""
    if clock is None:
        raise FieldError(
            "statistics for each step need the number of the step: give the cell a carry of its own initialize_carry, "
            "which ends with a Clock"
        )
    return jnp.clip(clock.step.reshape(-1), 0, max_steps - 1)


def _latest(steps: jax.Array, mask: jax.Array | None, mapped: Sequence[str]) -> jax.Array:
    """The row that a batch moves: that of its latest valid example, over all shards, which move the same row."""
    at = jnp.max(steps if mask is None else jnp.where(mask[:, 0], steps, 0))
    return lax.pmax(at, tuple(mapped)) if mapped else at


def _stored_stats(
    running: Running, normalizer: Normalizer | str, shape: tuple[int, ...], steps: jax.Array | None
) -> Stats:
    """What is stored, beside an array of this shape: with steps, for each example the row of its own."""
    if steps is None:
        return as_stats(running, normalizer, LAYOUT, shape)
    return Stats(*(None if p is None else p[steps].reshape(shape[0], -1) for p in running[:2]))


def _update_at(at: jax.Array, running: Running, batch: Stats, momentum: ArrayLike) -> Running:
    """Moves the statistics of one step towards those of a batch."""
    moved = update(Running(*(None if p is None else p[at] for p in running)), batch, momentum)
    pairs = zip(running, moved, strict=True)
    return Running(*(p if p is None or new is None else p.at[at].set(new.astype(p.dtype)) for p, new in pairs))
