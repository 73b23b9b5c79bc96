"""What an RNN of either library does around Flax's scan over the steps of its cell."""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike

from normjax import recurrent
from normjax._layers.recurrent import Cell
from normjax.field import FieldError
from normjax.recurrent import Carry


def mean_penalty(cell: object, values: jax.Array, seq_lengths: ArrayLike | None, before: jax.Array | None) -> jax.Array:
    """The penalty of a sequence: the mean of that of each step, `[t]`, over all valid steps of all examples, and before."""
    axes = recurrent.penalty_axes(cell.normalizer, cell.l1_axis_name) if isinstance(cell, Cell) else ()
    value = recurrent.mean_over_time(values, seq_lengths, axes)
    return value if before is None else before + value


def start_sequence(
    features: int, inputs: jax.Array, time_major: bool, carry: Carry, first: Callable[[tuple[int, ...]], Carry]
) -> tuple[int, Carry, bool]:
    """The axis of time, before so many of features; the carry (None: `first` of a step's shape); whether it counts steps."""
    if inputs.ndim < features + 1:
        said = "[t, n, i] or [t, i], time first" if time_major else "[n, t, i] or [t, i]"
        raise FieldError(f"an RNN takes sequences, {said}; found an array of shape {inputs.shape}")
    time = 0 if time_major else inputs.ndim - features - 1
    carry = first(inputs.shape[:time] + inputs.shape[time + 1 :]) if carry is None else carry
    return time, carry, recurrent.unpack(carry)[1] is not None
