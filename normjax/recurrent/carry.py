"""What travels from step to step beside the states: the number of the step, and the lengths of padded sequences.

Statistics that are stored for each step need to know which step it is. A variable would have to be reset between
sequences; so the carry ends with a `Clock`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax.field import FieldError


class Clock(NamedTuple):
    """The time of each example, so that `nn.RNN` can pick the last step of each.

    Attributes:
      step: int32 number of the step, from 0; it stops where the example is over.
      length: int32 number of the step at which the example is over; None where all go on.
    """

    step: Any
    length: Any = None


def start_clock(batch: tuple[int, ...], seq_lengths: ArrayLike | None = None) -> Clock:
    """The clock before the first step of a batch of this shape.

    Raises:
      FieldError: `seq_lengths` has another shape than the batch.

    >>> start_clock((2,), jnp.array([3, 5]))
    Clock(step=Array([0, 0], dtype=int32), length=Array([3, 5], dtype=int32))
    """
    length = None if seq_lengths is None else jnp.asarray(seq_lengths, jnp.int32)
    if length is not None and length.shape != tuple(batch):
        raise FieldError(f"seq_lengths has one number for each example, shape {tuple(batch)}; found {length.shape}")
    return Clock(jnp.zeros(batch, jnp.int32), length)


def unpack(carry: Any) -> tuple[tuple[Any, ...], Clock | None]:
    """The states of a carry, and its clock if it has one.

    >>> unpack((1, 2)), unpack(1), unpack((1, Clock(0)))
    (((1, 2), None), ((1,), None), ((1,), Clock(step=0, length=None)))
    """
    if not isinstance(carry, tuple | list):
        return (carry,), None
    return (tuple(carry[:-1]), carry[-1]) if isinstance(carry[-1], Clock) else (tuple(carry), None)


def pack(states: Sequence[Any], clock: Clock | None) -> Any:
    """A carry as Flax has it, with the clock last if there is one.

    >>> pack((1,), None), pack((1, 2), None), pack((1,), Clock(0))
    (1, (1, 2), (1, Clock(step=0, length=None)))
    """
    if clock is not None:
        return (*states, clock)
    return states[0] if len(states) == 1 else tuple(states)


def with_lengths(carry: Any, seq_lengths: ArrayLike) -> Any:
    """The carry, counting valid steps from here; a clock that runs goes on.

    >>> with_lengths((jnp.ones((1, 2)), Clock(jnp.array([3]))), jnp.array([2]))[-1]
    Clock(step=Array([3], dtype=int32), length=Array([5], dtype=int32))
    """
    states, clock = unpack(carry)
    fresh = start_clock(states[0].shape[:-1], seq_lengths)
    return pack(states, fresh if clock is None else Clock(clock.step, clock.step + fresh.length))


def hand_over(carry: Any, clocked: bool, bounded: bool) -> Any:
    """The carry as the next call takes it: without a clock that the caller gave none of, or lengths that end here.

    >>> hand_over((1, Clock(3, 3)), True, True), hand_over((1, Clock(3, 3)), False, True)
    ((1, Clock(step=3, length=None)), 1)
    """
    states, clock = unpack(carry)
    if clock is None:
        return carry
    if not clocked:
        return pack(states, None)
    return pack(states, clock._replace(length=None) if bounded else clock)


def restart(carry: Any) -> Any:
    """The carry with its clock back at step 0: the states go on into the next segment, its statistics are counted anew.

    So do the word models of Ren et al. 2017: segments of 20 steps in training, of a single one in their test, which
    therefore takes the statistics of the first step throughout.

    >>> restart((jnp.ones((1, 2)), Clock(jnp.array([20]))))[-1]
    Clock(step=Array([0], dtype=int32), length=None)
    """
    states, clock = unpack(carry)
    return carry if clock is None else pack(states, Clock(jnp.zeros_like(clock.step)))


def valid(clock: Clock | None) -> jax.Array | None:
    """Which examples are not over yet, `[n, 1]`; None where all go on.

    >>> valid(Clock(jnp.array([1, 1]), jnp.array([1, 2]))).tolist()
    [[False], [True]]
    """
    return None if clock is None or clock.length is None else (clock.step < clock.length)[..., None]


def advance(
    step: Callable[..., Any], states: Sequence[jax.Array], clock: Clock | None, x: jax.Array
) -> tuple[Any, jax.Array]:
    """One step of a cell, `step(*states, x)`; an example that is over keeps its states, and its x reaches nothing.

    Returns:
      The new carry and the output h, which is the last state.

    >>> advance(lambda h, x: h + x, (jnp.ones((2, 1)),), Clock(jnp.zeros(2, int), jnp.array([0, 5])), jnp.ones((2, 1)))[1]
    Array([[1.],
           [2.]], dtype=float32)
    """
    going = valid(clock)
    new = step(*states, x if going is None else jnp.where(going, x, 0))
    new = new if isinstance(new, tuple) else (new,)
    passed: Any = 1
    if going is not None:
        new = tuple(
            jnp.where(going, after, before.astype(after.dtype)) for after, before in zip(new, states, strict=True)
        )
        passed = going[..., 0].astype(jnp.int32)
    return pack(new, None if clock is None else clock._replace(step=clock.step + passed)), new[-1]


def mean_over_time(
    values: jax.Array, seq_lengths: ArrayLike | None = None, axis_name: Sequence[str] = ()
) -> jax.Array:  # fmt: skip
    """The mean of a number of each step, `[t]`, over all valid steps of all examples, those along mapped axes too.

    >>> mean_over_time(jnp.array([1.0, 4.0]), jnp.array([1, 1, 2])).item()     # three examples, then one
    1.75
    """
    if seq_lengths is None:
        return jnp.mean(values)
    time = jnp.arange(values.shape[0]).reshape(-1, 1)
    weight = jnp.sum((time < jnp.asarray(seq_lengths).reshape(1, -1)).astype(values.dtype), 1)
    weight = lax.psum(weight, tuple(axis_name)) if axis_name else weight
    total = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1)
