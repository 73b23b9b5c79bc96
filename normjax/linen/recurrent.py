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
from flax.core.scope import union_filters
from flax.linen import initializers
from flax.linen.recurrent import DenseParams, flip_sequences
from jax.typing import ArrayLike, DTypeLike

from normjax import recurrent
from normjax._layers import recurrent as cells
from normjax._layers.recurrent import Initializer, SiteOptions
from normjax.recurrent import Carry, Clock, Site, Weights
from normjax.running import Running


class _Site(nn.Module):
    """The parameters and statistics of one site."""

    options: SiteOptions
    scale_init: Initializer
    norm_bias_init: Initializer
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, z: jax.Array, clock: Clock | None, use_running: bool) -> tuple[jax.Array, jax.Array | None]:
        at, shape, dtype = self.options, (z.shape[-1],), self.param_dtype
        scale = self.param("scale", self.scale_init, shape, dtype) if at.scaled else None
        bias = self.param("bias", self.norm_bias_init, shape, dtype) if at.biased else None
        eps = None
        if at.sigma_init is not None:
            eps = jnp.square(self.param("sigma", initializers.constant(at.sigma_init), (), dtype))
        stored = {name: self.variable("batch_stats", name, slot.make) for name, slot in at.slots.items()}
        running = Running(**{name: variable.value for name, variable in stored.items()})
        given = {"running": running, "clock": clock, "use_running": use_running}
        out = at.normalize(z, scale=scale, bias=bias, eps=eps, **given)
        if stored and not self.is_initializing() and not use_running:
            for name, variable in stored.items():
                variable.value = getattr(out.running, name)
        return out.y, out.penalty


class Host(cells.Cell, nn.RNNCellBase, kw_only=True):
    """Flax's side of a cell: parameters, statistics and the carry.

    Attributes:
      use_running_average: whether to normalize with the stored statistics, for rows that have any; here or at the call.
    """

    use_running_average: bool | None = None

    __call__ = nn.compact(cells.Cell.__call__)

    def _features(self) -> int:
        return self.features  # pyright: ignore[reportAttributeAccessIssue]

    def _uses_running(self, at_call: bool | None) -> bool:
        return bool(nn.merge_param("use_running_average", self.use_running_average, at_call))

    def _at_site(self, name: str, z: jax.Array, clock: Clock | None, use_running: bool) -> Site:
        options = self._site(name, self.is_initializing())
        site = _Site(options, self.scale_init, self.norm_bias_init, self.param_dtype, name=f"norm_{name}")
        y, penalty = site(z, clock, use_running)
        return Site(y, Running(), penalty)

    def _penalize(self, value: jax.Array) -> None:
        self.sow("losses", "l1", value, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros((), value.dtype))

    @nn.nowrap
    def initialize_carry(
        self, rng: jax.Array, input_shape: tuple[int, ...], seq_lengths: ArrayLike | None = None
    ) -> Carry:
        """Flax's carry, with a `Clock` for rows with statistics of each step, or where `seq_lengths`, `[n]`, are given."""
        return self._clocked(super().initialize_carry(rng, input_shape), input_shape, seq_lengths)


def _dense(
    cell: Any, side: str, gates: str, x: jax.Array, kernel_init: Initializer, biased: str
) -> tuple[jax.Array, jax.Array | None]:
    """Flax's kernels of one side, side by side, and the biases of the gates in `biased`."""
    given = {"param_dtype": cell.param_dtype, "kernel_init": kernel_init, "bias_init": cell.bias_init}
    names = {gate: side + gate if len(gates) > 1 else side for gate in gates}
    found = [DenseParams(cell.features, use_bias=gate in biased, name=names[gate], **given)(x) for gate in gates]
    bias = None
    if biased:
        zero = jnp.zeros((cell.features,), cell.param_dtype)
        bias = jnp.concatenate([zero if b is None else b for _, b in found])
    return jnp.concatenate([kernel for kernel, _ in found], -1), bias


def _second_bias(cell: Any, name: str, gates: int) -> jax.Array | None:
    """The bias of the linear map to which Flax gives none; needed where each map has its own, ahead of its norm."""
    if not cell._has_two_biases():
        return None
    return cell.param(name, cell.bias_init, (gates * cell.features,), cell.param_dtype)


class LSTMCell(cells.LSTMCell, Host, nn.LSTMCell):  # noqa: D101
    __doc__ = cells.LSTMCell.__doc__

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        w, _ = _dense(self, "i", "ifgo", x, self.kernel_init, "")
        u, bias = _dense(self, "h", "ifgo", h, self.recurrent_kernel_init, "ifgo")
        return Weights(w, u, _second_bias(self, "input_bias", 4), bias)


class OptimizedLSTMCell(LSTMCell):
    """`LSTMCell` under the name that changing the import line asks for; Flax's two have one set of parameters too."""


class GRUCell(cells.GRUCell, Host, nn.GRUCell):  # noqa: D101
    __doc__ = cells.GRUCell.__doc__

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        w, bw = _dense(self, "i", "rzn", x, self.kernel_init, "rzn")
        u, bu = _dense(self, "h", "rzn", h, self.recurrent_kernel_init, "n")
        return Weights(w, u, bw, bu)


class SimpleCell(cells.SimpleCell, Host, nn.SimpleCell):  # noqa: D101
    __doc__ = cells.SimpleCell.__doc__

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        w, bw = _dense(self, "i", "z", x, self.kernel_init, "z")
        u, _ = _dense(self, "h", "z", h, self.recurrent_kernel_init, "")
        return Weights(w, u, bw, _second_bias(self, "hidden_bias", 1))


class RNN(nn.RNN):
    """`flax.linen.RNN` with what a normalized cell needs.

    Running statistics are carried through the scan; in inference, where they do not change, they are read in it (under
    Flax's, variables that are carried must be mutable). `seq_lengths` masks the padding: it enters no statistic and no
    penalty, and an example that is over keeps its state, which is then also its output. The penalties of the steps
    become their mean over all valid steps of all examples.

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

    variable_axes: Mapping[Any, Any] = FrozenDict({"losses": 0})
    variable_carry: Any = "batch_stats"

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
        batch = inputs.ndim - cell.num_feature_axes - 1
        time = 0 if how["time_major"] else batch
        carry = initial_carry
        if carry is None:
            shape = inputs.shape[:time] + inputs.shape[time + 1 :]
            carry = cell.initialize_carry(jax.random.key(0) if init_key is None else init_key, shape)
        clocked = recurrent.unpack(carry)[1] is not None
        carry = carry if seq_lengths is None else recurrent.with_lengths(carry, seq_lengths)
        flip = functools.partial(
            flip_sequences, seq_lengths=seq_lengths, num_batch_dims=batch, time_major=how["time_major"]
        )
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
        value = cells.mean_penalty(cell, cell.get_variable("losses", "l1"), seq_lengths, before)
        cell.put_variable("losses", "l1", value)
    return carry, outputs
