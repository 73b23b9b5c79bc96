"""The options of every layer with running statistics, and all that lies between a batch's statistics and what is kept.

A layer says which row's statistics it stores (`_row`), and how an array becomes an output with given statistics or with the
batch's own (`take`). Here is the rest: which statistics normalize (the stored ones, the batch's, or the batch's within
the limits of batch renormalization), what is stored afterwards, and which record and penalty are left.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from normjax import running as kept
from normjax._expect.arrays import statistics_dtype
from normjax._layers.describe import Amount, Layer, Number, Shape, Share, description
from normjax.penalty import l1_penalty
from normjax.running import BatchRecord, Running, Slot
from normjax.theory import Normalizer, Stats

Output = TypeVar("Output")
Limits = tuple[ArrayLike, ArrayLike]
Correct = Callable[[Stats, Normalizer], tuple[jax.Array, jax.Array]]  # r and d of batch renormalization


class Taken(NamedTuple, Generic[Output]):
    """What a layer makes of an array."""

    y: Output  # what the call returns: an array, or several
    stats: Stats  # of the row whose statistics are stored, each broadcasting against the input, with their weights
    row: Normalizer  # as it fits this batch
    centered: jax.Array | None  # v, whose mean absolute value the L1 penalty takes; None where a layer has none
    mergeable: bool = True  # False: the statistics of two batches do not give those of both, though the row's would


@description(kw_only=True)
class RunningLayer(Layer):
    """A layer with running statistics: the options that all of them have, which the docstring of `Norm` tells."""

    momentum: Share = 0.99
    averaging: str = "exponential"
    unbiased: bool = False
    mean_init: Number = 0.0
    var_init: Amount = 1.0
    update_running_average: bool = True
    renorm: tuple[float, float] | None = None
    l1: Amount = 0.0
    l1_axis_name: str | Sequence[str] | None = None

    # What a layer says.

    def _row(self) -> Normalizer | None:
        """The row whose statistics are stored; None where the options store none."""
        raise NotImplementedError

    def _keeps(self, shape: Shape, dtype: DTypeLike | None = None) -> dict[str, Slot]:
        """What is stored for inputs of this shape, by name: those of `Running`, and what else a layer has.

        The dtype is that of the inputs, None where it is not known yet.
        """
        row, stored = self._row(), stored_dtype(self, dtype)
        found = {} if row is None else kept.slots(row, self.layout, shape, self.averaging, stored)
        start = {"mean": self.mean_init, "var": self.var_init}
        return {name: slot._replace(fill=start.get(name, slot.fill)) for name, slot in found.items()}

    def _stores_unbiased(self) -> bool:
        """Whether the variance is corrected before it is stored; not where `unbiased` means something else to a layer."""
        return self.unbiased

    def _limits(self) -> Limits | None:
        """The limits of batch renormalization; None is plain."""
        return self.renorm

    def _averages_merge(self) -> bool:
        """Whether what parts of a batch have stored, each by itself, gives what the batch would have stored."""
        row, plain = self._row(), self.averaging == "exponential" and not self.unbiased
        return plain and row is not None and all(kept.stores(row)) and kept.mergeable(row, self.layout)

    # What a host says.

    def _uses_running(self, at_call: bool | None) -> bool:
        """Whether the stored statistics normalize; asked only where some are stored."""
        raise NotImplementedError

    def _stored(self, name: str, slot: Slot) -> jax.Array:
        """A stored value, which starts as the slot says."""
        raise NotImplementedError

    def _store(self, name: str, value: jax.Array) -> None:
        """Replaces a stored value."""
        raise NotImplementedError

    def _leave(self, seen: BatchRecord) -> None:
        """Leaves what a training batch showed to those who ask for it."""
        raise NotImplementedError

    def _penalize(self, value: Callable[[], jax.Array]) -> None:
        """Leaves the penalty to those who ask for it."""
        raise NotImplementedError

    # What all of them do.

    def _moves(self, at_call: bool | None) -> bool:
        """Whether a training batch moves what is stored."""
        return self.update_running_average if at_call is None else at_call

    def _normalized(
        self,
        x: jax.Array,
        take: Callable[[Stats | None], Taken[Output]],
        use_running_average: bool | None = None,
        *,
        update_running_average: bool | None = None,
        renorm: Limits | None = None,
        mask: ArrayLike | None = None,
        eps: ArrayLike | None = None,
        renormed: Callable[[Correct], Taken[Output]] | None = None,
    ) -> Output:
        """One application of a layer to the input x, by `take`, and the arguments of the call.

        `take` makes the output with the statistics that it is given, or, of None, with the batch's own. `eps` is that of the
        row where it is learned. `renormed` makes the output of batch renormalization, from a function that gives r and d for
        statistics and their row; by default the batch's statistics are moved so far that `take` gives r * y + d.
        """
        shape, row, starting, keeps = x.shape, self._row(), self._starting(), self._keeps(x.shape, x.dtype)
        found = {name: slot for name, slot in keeps.items() if name in Running._fields}
        used = bool(found) and self._uses_running(use_running_average)
        moves = not used and self._moves(update_running_average)
        # Inference needs no counts, which the checkpoints of other layers lack.
        needed = {name: slot for name, slot in keeps.items() if starting or moves or not name.endswith("_count")}
        held = {name: self._stored(name, slot) for name, slot in needed.items() if starting or name in found}
        running = Running(**{name: value for name, value in held.items() if name in found})
        limits = None if starting else self._limits() if renorm is None else renorm
        if limits is not None:
            if row is None:
                raise ValueError(f"renorm needs statistics that are stored, and {type(self).__name__} stores none")
            kept.require_renormalizable(_divided_by(row, "mean" in found), limits)
        training = bool(found) and not used and not starting
        if training and limits is not None:

            def correct(stats: Stats, row: Normalizer) -> tuple[jax.Array, jax.Array]:
                divided = _divided_by(row, running.mean is not None)
                return kept.corrections(stats, running, divided, self.layout, shape, limits, eps)

            out = _moved(take, correct, eps) if renormed is None else renormed(correct)
        else:
            out = take(kept.as_stats(running, row, self.layout, shape) if used and row is not None else None)
        if training and moves:
            self._remember(out, running, shape)
        if self.l1 and not starting:
            self._leave_penalty(out, mask)
        return out.y

    def _remember(self, out: Taken, running: Running, shape: tuple[int, ...]) -> None:
        """Stores the statistics of a training batch, and leaves its record."""
        kept.as_stats(running, out.row, self.layout, shape)  # refuses statistics of another number of channels
        stored, seen = kept.record(
            running,
            out.stats,
            out.row,
            self.layout,
            shape,
            momentum=self.momentum,
            averaging=self.averaging,
            unbiased=self._stores_unbiased(),
            exact=out.mergeable and kept.mergeable(out.row, self.layout),
        )
        for name, value in stored._asdict().items():
            if value is not None:
                self._store(name, value)
        self._leave(seen)

    def _leave_penalty(self, out: Taken, mask: ArrayLike | None) -> None:
        """Leaves alpha * mean |v|, over the mapped axes of the row's fields unless others are named."""
        v = out.centered
        if v is None:
            raise ValueError(f"{type(self).__name__} centres nothing that could be penalized; found l1={self.l1!r}")
        names = self.l1_axis_name
        if names is None:
            names = tuple(dict.fromkeys(name for field in out.row.fields for name in field.mapped))
        self._penalize(lambda: l1_penalty(v, self.l1, mask=mask, axis_name=names))


class Typed(Protocol):
    """The dtypes of a layer: of its output, by default that of the input, and of its parameters."""

    dtype: DTypeLike | None
    param_dtype: DTypeLike


def stored_dtype(layer: Typed, dtype: DTypeLike | None) -> np.dtype:
    """The dtype of what is stored beside inputs of this dtype (None is not known): float32, or wider where a layer is.

    It is as wide as the widest of inputs, output and parameters; complex where the inputs or the output are, or, if the
    inputs are not known, the parameters.
    """
    told = [layer.param_dtype if dtype is None else dtype, *([] if layer.dtype is None else [layer.dtype])]
    wide = [statistics_dtype(jax.dtypes.canonicalize_dtype(each)) for each in (*told, layer.param_dtype)]
    return np.result_type(*wide[:-1], jnp.finfo(wide[-1]).dtype)


def as_held(value: jax.Array, held: DTypeLike) -> jax.Array:
    """A value to store, in the dtype of what is held: it stays the same from batch to batch, so that a scan may carry it.

    A complex value replaces a real one as it is, since it would not fit.
    """
    return value if jnp.iscomplexobj(value) and not jnp.issubdtype(held, jnp.complexfloating) else value.astype(held)


def _divided_by(row: Normalizer, stores_mean: bool) -> Normalizer:
    """The row as batch renormalization sees it: a layer that leaves the mean out divides alone, so d is 0."""
    left_out = kept.stores(row)[0] and not stores_mean
    return dataclasses.replace(row, mean=None, keep_mean=False) if left_out else row


def _moved(take: Callable[[Stats | None], Taken[Output]], correct: Correct, eps: ArrayLike | None) -> Taken[Output]:
    """The output by the statistics that give r * y + d; what the batch shows stays what it was."""
    batch = take(None)
    moved = take(kept.renormalized(batch.stats, *correct(batch.stats, batch.row), batch.row, eps))
    return moved._replace(stats=batch.stats)
