"""What travels from step to step beside the states: the number of the step, and the lengths of padded sequences.

Statistics of each step need its number. A variable would have to be reset between sequences; the carry ends with a `Clock`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normjax.field import FieldError

Carry = Any  # the state of a cell, or a tuple of states that ends with a Clock where steps are counted; Any in Flax too


class Clock(NamedTuple):
    """The time of each example, so that `nn.RNN` can pick the last step of each.

    Attributes:
      step: int32 number of the step, from 0, of the shape of the batch, `[n]`; it stops where the example is over.
      length: int32 number of the step at which the example is over, `[n]`; None where all go on.

    >>> Clock(jnp.array([0, 0]), jnp.array([3, 5])).length.tolist()
    [3, 5]
    """

    step: jax.Array
    length: jax.Array | None = None


def start_clock(batch: tuple[int, ...], seq_lengths: ArrayLike | None = None) -> Clock:
    """The clock at step 0 for a batch of this shape, `(n,)`; with the valid steps of each example, `[n]`, in padded ones.

    >>> start_clock((2,), jnp.array([3, 5]))
    Clock(step=Array([0, 0], dtype=int32), length=Array([3, 5], dtype=int32))
    """
    length = None if seq_lengths is None else jnp.asarray(seq_lengths, jnp.int32)
    if length is not None and length.shape != tuple(batch):
        raise FieldError(f"seq_lengths has one number for each example, shape {tuple(batch)}; found {length.shape}")
    return Clock(jnp.zeros(batch, jnp.int32), length)


def unpack(carry: Carry) -> tuple[tuple[jax.Array, ...], Clock | None]:
    """The states of a carry, each `[n, c]`, and its clock if it has one.

    >>> unpack((1, 2)), unpack(1), unpack((1, Clock(0)))
    (((1, 2), None), ((1,), None), ((1,), Clock(step=0, length=None)))
    """
    if not isinstance(carry, tuple | list):
        return (carry,), None
    return (tuple(carry[:-1]), carry[-1]) if isinstance(carry[-1], Clock) else (tuple(carry), None)


def pack(states: Sequence[jax.Array], clock: Clock | None) -> Carry:
    """A carry as Flax has it, one state by itself and several, each `[n, c]`, as a tuple; the clock last if there is one.

    >>> pack((1,), None), pack((1, 2), None), pack((1,), Clock(0))
    (1, (1, 2), (1, Clock(step=0, length=None)))
    """
    if clock is not None:
        return (*states, clock)
    return states[0] if len(states) == 1 else tuple(states)


def with_lengths(carry: Carry, seq_lengths: ArrayLike) -> Carry:
    """The carry, with a clock that counts the valid steps of each example, `[n]`, from here; one that runs goes on.

    >>> with_lengths((jnp.ones((1, 2)), Clock(jnp.array([3]))), jnp.array([2]))[-1]
    Clock(step=Array([3], dtype=int32), length=Array([5], dtype=int32))
    """
    states, clock = unpack(carry)
    fresh = start_clock(states[0].shape[:-1], seq_lengths)
    return pack(states, fresh if clock is None else Clock(clock.step, clock.step + jnp.asarray(seq_lengths, jnp.int32)))


def hand_over(carry: Carry, clocked: bool, bounded: bool) -> Carry:
    """The carry as the next call takes it, after all steps of this one.

    Args:
      carry: states, with or without a clock.
      clocked: whether the caller's carry had a clock; if not, it is taken off.
      bounded: whether this call was given the lengths of its sequences, which end with it.

    >>> hand_over((1, Clock(3, 3)), True, True), hand_over((1, Clock(3, 3)), False, True)
    ((1, Clock(step=3, length=None)), 1)
    """
    states, clock = unpack(carry)
    if clock is None:
        return carry
    return pack(states, None if not clocked else clock._replace(length=None) if bounded else clock)


def restart(carry: Carry) -> Carry:
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
    step: Callable[..., jax.Array | tuple[jax.Array, ...]],
    states: Sequence[jax.Array],
    clock: Clock | None,
    x: jax.Array,
) -> tuple[Carry, jax.Array]:
    """One step of a cell: the new carry and the output h, the last state, `[n, c]`.

    Args:
      step: called as `step(*states, x)`; gives the new state, or a tuple of the new states.
      states: each `[n, c]`; an example that is over keeps its own.
      clock: number of the step, and the lengths.
      x: input, `[n, i]`; that of an example that is over reaches nothing.

    >>> advance(lambda h, x: h + x, (jnp.ones((2, 1)),), Clock(jnp.zeros(2, int), jnp.array([0, 5])), jnp.ones((2, 1)))[1]
    Array([[1.],
           [2.]], dtype=float32)
    """
    going = valid(clock)
    new = step(*states, x if going is None else jnp.where(going, x, 0))
    new = new if isinstance(new, tuple) else (new,)
    if going is not None:
        new = tuple(jnp.where(going, a, b.astype(a.dtype)) for a, b in zip(new, states, strict=True))
    if clock is not None:
        clock = clock._replace(step=clock.step + (1 if going is None else going[..., 0].astype(jnp.int32)))
    return pack(new, clock), new[-1]


def mean_over_time(values: jax.Array, seq_lengths: ArrayLike | None = None, axis_name: Sequence[str] = ()) -> jax.Array:
    """The mean of a number of each step over all valid steps of all examples, a scalar.

    Args:
      values: one number of each step, `[t]`.
      seq_lengths: number of valid steps of each example, `[n]`; None where no sequence is padded.
      axis_name: mapped axes whose examples count too.

    >>> mean_over_time(jnp.array([1.0, 4.0]), jnp.array([1, 1, 2])).item()     # three examples, then one
    1.75
    """
    if seq_lengths is None:
        return jnp.mean(values)
    going = jnp.arange(values.shape[0])[:, None] < jnp.asarray(seq_lengths).reshape(1, -1)
    weight = jnp.sum(going.astype(values.dtype), 1)
    weight = lax.psum(weight, tuple(axis_name)) if axis_name else weight
    total = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1)
