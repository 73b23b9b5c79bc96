"""Normalized recurrent cells for linen: Flax's cells with parameters and statistics around `_layers/recurrent.py`.

Any `nn.RNN` runs a cell; ours, `RNN`, also lifts the running statistics and the penalty through the scan.

A row that stores statistics with `max_steps` counts its steps: its carry ends with a `Clock`. Cells leave nothing in
`moments`: micro-batches of `normjax.train` average what each of them stored, so that a variance lacks the spread between
their means, and `linen_recalibrate` refuses them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.core.scope import CollectionFilter, union_filters
from flax.linen import initializers
from flax.linen.recurrent import DenseParams, flip_sequences
from flax.typing import InOutScanAxis
from jax.typing import ArrayLike, DTypeLike

from normjax import recurrent
from normjax._layers import recurrent as cells
from normjax._layers import sequence
from normjax._layers.describe import Initializer
from normjax._layers.pickling import Portable
from normjax._layers.recurrent import SiteOptions
from normjax._layers.statistics import as_held
from normjax._leaves import COUNT
from normjax.linen.host import Keeping
from normjax.recurrent import Carry, Clock, Site, Weights


class _Site(nn.Module):
    """The parameters and statistics of one site."""

    options: SiteOptions
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, z: jax.Array, clock: Clock | None, use_running: bool) -> Site:
        learned = {}
        for name, (shape, init) in self.options.learns.items():
            make = init if callable(init) else initializers.constant(init)
            learned[name] = self.param(name, make, shape, self.param_dtype)
        stored = {name: self.variable("batch_stats", name, slot.make) for name, slot in self.options.slots.items()}
        out = self.options(z, learned, {name: v.value for name, v in stored.items()}, clock, use_running)
        if stored and not self.is_initializing() and not use_running:
            for name, variable in stored.items():
                variable.value = as_held(getattr(out.running, name), variable.value.dtype)
        return out


class Host(cells.Cell, nn.RNNCellBase, kw_only=True):
    """Flax's side of a cell: parameters, statistics and the carry.

    Attributes:
      use_running_average: whether to normalize with the stored statistics, for rows that have any; here or at the call.
    """

    use_running_average: bool | None = None

    __call__ = nn.compact(cells.Cell.__call__)
    _uses_running, _penalize = Keeping._uses_running, Keeping._penalize  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        self._check()
        self.features = COUNT(f"features of {type(self).__name__}", self._features())
        super().__post_init__()

    def _features(self) -> int:
        return self.features  # pyright: ignore[reportAttributeAccessIssue]

    def _at_site(self, name: str, z: jax.Array, clock: Clock | None, use_running: bool) -> Site:
        site = _Site(self._site(name, self.is_initializing(), z.dtype), self.param_dtype, name=f"norm_{name}")
        return site(z, clock, use_running)

    def _dense(
        self, side: str, gates: str, x: jax.Array, kernel_init: Initializer, biased: str
    ) -> tuple[jax.Array, jax.Array | None]:
        """Flax's kernels of one side, side by side, and the biases of the gates in `biased`."""
        c, given = self._features(), {"param_dtype": self.param_dtype, "kernel_init": kernel_init}
        made = []
        for gate in gates:
            name = side + gate if len(gates) > 1 else side
            made.append(DenseParams(c, use_bias=gate in biased, bias_init=self.bias_init, name=name, **given)(x))
        zero = jnp.zeros((c,), self.param_dtype)
        bias = jnp.concatenate([zero if b is None else b for _, b in made]) if biased else None
        return jnp.concatenate([kernel for kernel, _ in made], -1), bias

    def _second_bias(self, name: str, gates: int) -> jax.Array | None:
        """The bias of the linear map to which Flax gives none; needed where each map has its own, ahead of its norm."""
        shape = (gates * self._features(),)
        return self.param(name, self.bias_init, shape, self.param_dtype) if self._has_two_biases() else None

    @nn.nowrap
    def initialize_carry(
        self, rng: jax.Array, input_shape: tuple[int, ...], seq_lengths: ArrayLike | None = None
    ) -> Carry:
        """Flax's carry, with a `Clock` for rows with statistics of each step, or where `seq_lengths`, `[n]`, are given."""
        return self._clocked(super().initialize_carry(rng, input_shape), input_shape, seq_lengths)


class LSTMCell(cells.LSTMCell, Host, nn.LSTMCell):  # noqa: D101
    __doc__ = cells.LSTMCell.__doc__

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        w, _ = self._dense("i", "ifgo", x, self.kernel_init, "")
        u, bias = self._dense("h", "ifgo", h, self.recurrent_kernel_init, "ifgo")
        return Weights(w, u, self._second_bias("input_bias", 4), bias)


class OptimizedLSTMCell(LSTMCell, nn.OptimizedLSTMCell):
    """`LSTMCell` under the name that changing the import line asks for; Flax's two have one set of parameters too."""


class GRUCell(cells.GRUCell, Host, nn.GRUCell):  # noqa: D101
    __doc__ = cells.GRUCell.__doc__

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        w, bw = self._dense("i", "rzn", x, self.kernel_init, "rzn")
        u, bu = self._dense("h", "rzn", h, self.recurrent_kernel_init, "n")
        return Weights(w, u, bw, bu)


class SimpleCell(cells.SimpleCell, Host, nn.SimpleCell):  # noqa: D101
    __doc__ = cells.SimpleCell.__doc__

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        w, bw = self._dense("i", "z", x, self.kernel_init, "z")
        u, _ = self._dense("h", "z", h, self.recurrent_kernel_init, "")
        return Weights(w, u, bw, self._second_bias("hidden_bias", 1))


class RNN(Portable, nn.RNN):
    """`flax.linen.RNN` with what a normalized cell needs.

    Running statistics are carried through the scan; in inference, where they do not change, they are read in it (under
    Flax's, variables that are carried must be mutable). `seq_lengths` masks the padding: it enters no statistic and no
    penalty. An example that is over keeps its state, which is then also its output, and one of length 0 its first carry;
    Flax's goes on over the padding, and hands over the last step's carry for length 0. With a cell of Flax's this is
    Flax's own. The penalties of the steps become their mean over all valid steps of all examples.

    Under `flax.linen.RNN` with `variable_axes={"losses": 0}, variable_carry="batch_stats"` they lie along time instead,
    so that `total_penalty` adds them, as Ren et al. 2017 do beside a loss that is summed over the steps too.

    >>> rnn = RNN(SimpleCell(4, normalizer="token", l1=0.1))
    >>> x = jnp.ones((2, 3, 5))
    >>> variables = jax.eval_shape(rnn.init, jax.random.key(0), x)
    >>> y, changed = jax.eval_shape(
    ...     lambda v: rnn.apply(v, x, seq_lengths=jnp.array([3, 1]), mutable=["losses"]), variables
    ... )
    >>> changed["losses"]["cell"]["l1"]
    ShapeDtypeStruct(shape=(), dtype=float32)
    """

    variable_axes: Mapping[CollectionFilter, InOutScanAxis] = FrozenDict({"losses": 0})
    variable_carry: CollectionFilter = "batch_stats"

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        use_running_average: bool | None = None,
    ) -> Any:
        """Applies the cell to every step.

        Args:
          inputs: `[n, t, i]`, or `[t, n, i]` if `time_major`.
          initial_carry: a carry of the cell; by default its `initialize_carry`.
          init_key: random key for that.
          seq_lengths: number of valid steps of each example, `[n]`; None where no sequence is padded.
          return_carry: whether to return the last carry too; this and the next three replace Flax's attributes.
          time_major: whether time is the first axis of inputs and outputs.
          reverse: whether the steps are taken from the last to the first.
          keep_order: whether the outputs of reversed steps lie in the order of the inputs.
          use_running_average: whether the cell normalizes with the stored statistics; replaces its attribute.

        Returns:
          The outputs, `[n, t, c]` or `[t, n, c]`; or the last carry and the outputs.
        """
        cell: Any = self.cell
        given = {"return_carry": return_carry, "time_major": time_major, "reverse": reverse, "keep_order": keep_order}
        if seq_lengths is not None:
            seq_lengths = jnp.asarray(seq_lengths)
            if not isinstance(cell, Host):  # a cell that reads no clock
                return super().__call__(
                    inputs, initial_carry=initial_carry, init_key=init_key, seq_lengths=seq_lengths, **given
                )
        how = {name: getattr(self, name) if value is None else value for name, value in given.items()}
        major = how["time_major"]
        first = functools.partial(cell.initialize_carry, jax.random.key(0) if init_key is None else init_key)
        time, carry, clocked = sequence.start_sequence(cell.num_feature_axes, inputs, major, initial_carry, first)
        carry = carry if seq_lengths is None else recurrent.with_lengths(carry, seq_lengths)
        examples = inputs.ndim - cell.num_feature_axes - 1
        flip = functools.partial(flip_sequences, seq_lengths=seq_lengths, num_batch_dims=examples, time_major=major)
        inputs = flip(inputs) if how["reverse"] else inputs
        asked = {} if use_running_average is None else {"use_running_average": use_running_average}
        carry, outputs = _scanned(self, carry, inputs, time, seq_lengths, asked)
        outputs = flip(outputs) if how["reverse"] and how["keep_order"] else outputs
        if not how["return_carry"]:
            return outputs
        return recurrent.hand_over(carry, clocked, seq_lengths is not None), outputs


def _scanned(
    rnn: RNN, carry: Carry, inputs: jax.Array, time: int, seq_lengths: jax.Array | None, asked: dict[str, bool]
) -> tuple[Carry, jax.Array]:
    """The cell of an RNN over all steps; the penalties that it leaves become one."""
    cell: Any = rnn.cell
    if rnn.is_initializing():
        cell(carry, jnp.take(inputs, 0, time), **asked)  # a scan carries only variables that exist
    before = cell.get_variable("losses", "l1") if cell.has_variable("losses", "l1") else None
    if before is not None:
        cell.put_variable("losses", "l1", jnp.zeros(inputs.shape[time], before.dtype))
    carried, broadcast = rnn.variable_carry, rnn.variable_broadcast
    if carried == "batch_stats" and not cell.is_mutable_collection(carried):  # a scan carries only what may change
        carried, broadcast = False, union_filters(broadcast, carried)
    scan = nn.scan(
        lambda cell, carry, x: cell(carry, x, **asked),
        in_axes=time,
        out_axes=time,
        unroll=rnn.unroll,
        variable_axes=rnn.variable_axes,
        variable_broadcast=broadcast,
        variable_carry=carried,
        split_rngs=rnn.split_rngs,
    )
    carry, outputs = scan(cell, carry, inputs)
    if cell.is_mutable_collection("losses") and cell.has_variable("losses", "l1"):
        value = sequence.mean_penalty(cell, cell.get_variable("losses", "l1"), seq_lengths, before)
        cell.put_variable("losses", "l1", value)
    return carry, outputs
