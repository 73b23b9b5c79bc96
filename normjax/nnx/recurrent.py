"""Normalized recurrent cells for nnx: Flax's cells with parameters and statistics around `_layers/recurrent.py`.

Any `nnx.RNN` runs a cell; ours, `RNN`, also masks padding and captures the penalty:
`y, sown = nnx.capture(rnn, Penalty)(x)`.
"""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from normjax import recurrent
from normjax._layers import recurrent as cells
from normjax._layers import sequence
from normjax._layers.describe import Initializer
from normjax._layers.pickling import Portable
from normjax._layers.recurrent import SiteOptions
from normjax._leaves import COUNT
from normjax.nnx._options import CellOptions
from normjax.nnx._signature import Constructor, spelled_out
from normjax.nnx.host import Copied, Keeping, Penalty, _replace
from normjax.recurrent import Carry, Clock, Site, Weights


def _value(variable: nnx.Variable | None) -> jax.Array | None:
    return None if variable is None else variable[...]


class _Site(nnx.Module):
    """The parameters and statistics of one site."""

    def __init__(self, options: SiteOptions, dtype: DTypeLike, rngs: nnx.Rngs):
        for name in ("scale", "bias", "sigma", "mean", "var"):
            setattr(self, name, nnx.data(None))
        for name, (shape, init) in options.learns.items():
            made = init(rngs.params(), shape, dtype) if callable(init) else jnp.full(shape, init, dtype)
            setattr(self, name, nnx.Param(made))
        for name, slot in options.slots.items():
            setattr(self, name, nnx.BatchStat(slot.make()))

    def __call__(self, options: SiteOptions, z: jax.Array, clock: Clock | None, use_running: bool) -> Site:
        """The normalized z and its penalty; stores what is to be stored."""
        learned, stored = ({name: getattr(self, name) for name in names} for names in (options.learns, options.slots))
        known, running = ({name: variable[...] for name, variable in some.items()} for some in (learned, stored))
        out = options(z, known, running, clock, use_running)
        if not use_running:
            for name, variable in stored.items():
                _replace(variable, getattr(out.running, name))
        return out


class Host(cells.Cell, Copied, nnx.RNNCellBase):
    """Flax's side of a cell: parameters, statistics and the carry.

    Args:
      in_features: length of the input.
      hidden_features: length of the states.
      use_running_average: whether to normalize with stored statistics; `.train()`, `.eval()` and `nnx.view` set it.
      rngs: random keys for the initializers.
      **options: those of `normjax._layers.recurrent.Cell`, and the other arguments of Flax's cell.
    """

    _second: tuple[str, int] | None = None  # name and gates of the bias that Flax's cell does without
    __signature__ = Constructor()
    _uses_running, _penalize = Keeping._uses_running, Keeping._penalize  # pyright: ignore[reportAssignmentType]
    _static = staticmethod(nnx.static)  # pyright: ignore[reportAssignmentType]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if Host in cls.__bases__:
            cls.__init__ = spelled_out(Host.__init__, cls.__bases__[-1].__init__, dataclasses.fields(cls))

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        use_running_average: bool | None = False,
        rngs: nnx.Rngs,
        **options: Unpack[CellOptions],
    ):
        made = type(self).__name__
        in_features = COUNT(f"in_features of {made}", in_features)
        hidden_features = COUNT(f"hidden_features of {made}", hidden_features)
        flax: dict[str, Any] = {"bias_init": initializers.zeros_init(), **options}
        ours = {field.name: flax.pop(field.name, field.default) for field in dataclasses.fields(self)}
        super().__init__(in_features, hidden_features, rngs=rngs, **flax)  # pyright: ignore[reportCallIssue]
        for name, value in ours.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.use_running_average = use_running_average
        self.normalizer = self._row()
        self._check()
        for name in () if self.normalizer is None else self._sites():
            setattr(self, f"norm_{name}", _Site(self._site(name), self.param_dtype, rngs))
        del self.scale_init, self.norm_bias_init  # they have done their work
        if self._second and self._has_two_biases():
            name, gates = self._second
            value = flax["bias_init"](rngs.params(), (gates * hidden_features,), self.param_dtype)
            setattr(self, name, nnx.Param(value))

    def set_view(self, use_running_average: bool | None = None):
        """Called by `nnx.view`.

        Args:
          use_running_average: whether to normalize with the stored statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _features(self) -> int:
        return self.hidden_features  # pyright: ignore[reportAttributeAccessIssue]

    def _at_site(self, name: str, z: jax.Array, clock: Clock | None, use_running: bool) -> Site:
        return getattr(self, f"norm_{name}")(self._site(name), z, clock, use_running)

    def _second_bias(self) -> jax.Array | None:
        return _value(getattr(self, self._second[0], None)) if self._second else None

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> Carry:
        """Flax's carry, with a `Clock` for rows with statistics of each step, or where `seq_lengths`, `[n]`, are given."""
        return self._clocked(super().initialize_carry(input_shape, rngs, carry_init), input_shape, seq_lengths)


class LSTMCell(cells.LSTMCell, Host, nnx.LSTMCell):  # noqa: D101
    __doc__ = cells.LSTMCell.__doc__
    _second = ("input_bias", 4)

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        sides = [self.ii, self.if_, self.ig, self.io], [self.hi, self.hf, self.hg, self.ho]
        w, u = (jnp.concatenate([gate.kernel[...] for gate in side], -1) for side in sides)
        bias = jnp.concatenate([b[...] for b in (gate.bias for gate in sides[1]) if b is not None])
        return Weights(w, u, self._second_bias(), bias)


class OptimizedLSTMCell(cells.LSTMCell, Host, nnx.OptimizedLSTMCell):
    """`LSTMCell` with the parameters of `flax.nnx.OptimizedLSTMCell`: the gates of each side in one kernel.

    >>> cell = nnx.eval_shape(lambda: OptimizedLSTMCell(4, 8, normalizer="token", rngs=nnx.Rngs(0)))
    >>> cell.dense_i.kernel.shape, cell.norm_c.scale.shape
    ((4, 32), (8,))
    """

    _second = ("input_bias", 4)

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        kernels = self.dense_i.kernel[...], self.dense_h.kernel[...]
        return Weights(*kernels, self._second_bias(), _value(self.dense_h.bias))


class GRUCell(cells.GRUCell, Host, nnx.GRUCell):  # noqa: D101
    __doc__ = cells.GRUCell.__doc__

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        return Weights(self.dense_i.kernel[...], self.dense_h.kernel[...], _value(self.dense_i.bias))


class SimpleCell(cells.SimpleCell, Host, nnx.SimpleCell):  # noqa: D101
    __doc__ = cells.SimpleCell.__doc__
    _second = ("hidden_bias", 1)

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights:
        kernels = self.dense_i.kernel[...], self.dense_h.kernel[...]
        return Weights(*kernels, _value(self.dense_i.bias), self._second_bias())


class RNN(Portable, Copied, nnx.RNN):
    """`flax.nnx.RNN` with what a normalized cell needs.

    `seq_lengths` masks the padding: it enters no statistic and no penalty. An example that is over keeps its state, which
    is then also its output, and one of length 0 its first carry; Flax's goes on over the padding, and hands over the last
    step's carry for length 0. With a cell of Flax's this is Flax's own. Under a capture of `Penalty` the penalties of the
    steps become their mean over all valid steps of all examples. `flax.nnx.RNN` runs a normalized cell too, but cannot
    capture within its scan.

    >>> def run(x):
    ...     rnn = RNN(SimpleCell(4, 8, normalizer="token", l1=0.1, rngs=nnx.Rngs(0)))
    ...     y, sown = nnx.capture(rnn, Penalty)(x, seq_lengths=jnp.array([5, 2]))
    ...     return y, sown["cell"]["l1"][...]
    >>> [a.shape for a in jax.eval_shape(run, jnp.ones((2, 5, 4)))]
    [(2, 5, 8), ()]
    """

    __signature__ = Constructor()

    def __init__(
        self,
        cell: nnx.RNNCellBase,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Any = None,
        broadcast_rngs: nnx.filterlib.Filter = None,
        rngs: nnx.Rngs | nnx.RngStream | bool = True,
    ):
        how = {"time_major": time_major, "return_carry": return_carry, "reverse": reverse, "keep_order": keep_order}
        axes = nnx.StateAxes({Penalty: 0, ...: nnx.Carry}) if state_axes is None else state_axes
        super().__init__(cell, **how, unroll=unroll, state_axes=axes, broadcast_rngs=broadcast_rngs, rngs=rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Applies the cell to every step.

        Args:
          inputs: `[n, t, i]`, or `[t, n, i]` if `time_major`.
          initial_carry: a carry of the cell; by default its `initialize_carry`.
          seq_lengths: number of valid steps of each example, `[n]`; None where no sequence is padded.
          return_carry: whether to return the last carry too; this and the next three replace Flax's attributes.
          time_major: whether time is the first axis of inputs and outputs.
          reverse: whether the steps are taken from the last to the first.
          keep_order: whether the outputs of reversed steps lie in the order of the inputs.
          rngs: random keys for a carry.

        Returns:
          The outputs, `[n, t, c]` or `[t, n, c]`; or the last carry and the outputs.
        """
        cell: Any = self.cell
        ours = isinstance(cell, Host)  # others read no clock, and have no penalty
        major = self.time_major if time_major is None else time_major
        returned = self.return_carry if return_carry is None else return_carry

        def first(shape: tuple[int, ...]) -> Carry:
            stream = self.rngs if rngs is None else rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
            return cell.initialize_carry(shape, stream)

        time, carry, clocked = sequence.start_sequence(cell.num_feature_axes, inputs, major, initial_carry, first)
        if seq_lengths is not None:
            seq_lengths = jnp.asarray(seq_lengths)
            carry = recurrent.with_lengths(carry, seq_lengths) if ours else carry
        captures = getattr(cell, "__captures__", ()) if ours and cell.l1 and cell.normalizer else ()
        sown = [v for v in captures if type(v) is Penalty]
        before = [v["l1"] if "l1" in v else None for v in sown]
        for v in sown:  # a scan writes only what exists
            v["l1"] = jnp.zeros(inputs.shape[time], jnp.float32)
        given = {"initial_carry": carry, "seq_lengths": seq_lengths, "time_major": major, "rngs": rngs}
        given |= {"reverse": reverse, "keep_order": keep_order}
        last, outputs = super().__call__(inputs, return_carry=True, **given)
        for v, old in zip(sown, before, strict=True):
            v["l1"] = sequence.mean_penalty(cell, v["l1"], seq_lengths, old)
        if not returned:
            return outputs
        return recurrent.hand_over(last, clocked, seq_lengths is not None), outputs
