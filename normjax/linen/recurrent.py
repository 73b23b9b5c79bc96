"""Normalized recurrent cells for linen: Flax's cells with parameters and statistics around the steps of `recurrent.py`.

A cell has the arguments, parameters and carry of Flax's; with `normalizer=None` it is Flax's. What follows Flax's
arguments is by name only, and says what is normalized, and where. Each site (`normjax.recurrent.sites`) is a submodule
`norm_<site>`. Any `nn.RNN` runs a cell; ours, `RNN`, also lifts the running statistics and the penalty through the scan.

A row that stores statistics with `max_steps` counts its steps: its carry ends with a `Clock`. Cells leave nothing in
`moments`: micro-batches of `normjax.train` average what each of them stored, so that a variance lacks the spread between
their means, and `linen_recalibrate` refuses them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.core.scope import union_filters
from flax.linen import initializers
from flax.linen.recurrent import DenseParams, flip_sequences
from jax.typing import ArrayLike

from normjax import recurrent
from normjax.recurrent import Clock, Places, Weights
from normjax.running import Running, stores
from normjax.theory import Normalizer, row

Initializer = Any
Dtype = Any
Carry = Any


class _Site(nn.Module):
    """The parameters and statistics of one site."""

    normalizer: Normalizer
    use_scale: bool
    use_bias: bool
    scale_init: Initializer
    norm_bias_init: Initializer
    param_dtype: Dtype
    max_steps: int | None
    momentum: float
    l1: float
    l1_axis_name: Any
    sigma_init: float | None  # None learns none

    @nn.compact
    def __call__(self, z: jax.Array, clock: Clock | None, use_running: bool) -> tuple[jax.Array, jax.Array | None]:
        shape, starting = (z.shape[-1],), self.is_initializing()
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.norm_bias_init, shape, self.param_dtype) if self.use_bias else None
        eps = None
        if self.sigma_init is not None:
            eps = jnp.square(self.param("sigma", initializers.constant(self.sigma_init), (), self.param_dtype))
        found = recurrent.site_slots(self.normalizer, shape[0], self.max_steps)
        stored = {name: self.variable("batch_stats", name, slot.make) for name, slot in found.items()}
        # While initializing, mapped axes need not exist yet.
        out = recurrent.normalize_site(
            z, self.normalizer.local() if starting else self.normalizer,
            Running(**{name: variable.value for name, variable in stored.items()}), clock=clock,
            max_steps=self.max_steps, refuse=not starting, use_running=use_running, momentum=self.momentum, scale=scale,
            bias=bias, eps=eps, l1=0.0 if starting else self.l1, l1_axis_name=self.l1_axis_name,
        )  # fmt: skip
        if stored and not starting and not use_running:
            for name, variable in stored.items():
                variable.value = getattr(out.running, name)
        return out.y, out.penalty


class _Normalized(nn.Module, kw_only=True):
    """What the cells have beyond Flax's.

    Attributes:
      normalizer: a Normalizer of layout "n c", the name of a row of TABLE, or None for Flax's own cell.
      place: "inside", "separate" or "separate_raw", see `normjax.recurrent`.
      per_gate: whether W x and U h are normalized gate by gate, where they are normalized apart.
      bias_at: "after", "before" or "both", where W x and U h are normalized apart.
      use_running_average: whether to normalize with the stored statistics, for rows that have any; here or at the call.
      momentum: weight of the old value in the running average.
      max_steps: number of steps with stored statistics of their own; None shares one of all steps.
      use_scale: whether a site learns a factor; or the names of those that do.
      use_bias: whether a site learns an addend; or the names of those that do.
      learn_sigma: whether a site learns sigma, one scalar; eps = sigma ** 2.
      sigma_init: its initial value; by default the square root of the row's eps.
      scale_init: initializer of the factors.
      norm_bias_init: initializer of the addends.
      l1: weight alpha of the L1 penalty, alpha * mean |v| summed over the sites, sown as `l1` into the collection
        `losses` at each step when that is mutable; never while initializing.
      l1_axis_name: mapped axes that share one mean of |v|; by default those of the fields.
    """

    normalizer: Normalizer | str | None = None
    place: str = "inside"
    per_gate: bool = False
    bias_at: str = "after"
    use_running_average: bool | None = None
    momentum: float = 0.99
    max_steps: int | None = None
    use_scale: bool | Sequence[str] = True
    use_bias: bool | Sequence[str] = True
    learn_sigma: bool = False
    sigma_init: float | None = None
    scale_init: Initializer = initializers.ones
    norm_bias_init: Initializer = initializers.zeros
    l1: float = 0.0
    l1_axis_name: str | Sequence[str] | None = None


def _apply(cell: Any, kind: str, carry: Carry, x: ArrayLike, average: bool | None, step: Callable[..., Any]) -> Any:
    """One step of a cell; `step(norm, places, *states, x)` is one of `recurrent.py` with its weights."""
    places, (states, clock) = Places(cell.place, cell.per_gate, cell.bias_at), recurrent.unpack(carry)
    norm, penalties = None, []
    if cell.normalizer is not None:
        n = row(cell.normalizer)
        use_running = any(stores(n)) and nn.merge_param("use_running_average", cell.use_running_average, average)
        names = tuple(recurrent.sites(kind, cell.features, places))
        sigma = recurrent.start_sigma(n, cell.learn_sigma, cell.sigma_init)
        scaled, biased = (recurrent.choose_sites(f, getattr(cell, f), names) for f in ("use_scale", "use_bias"))

        def at_site(name: str, z: jax.Array) -> jax.Array:
            site = _Site(
                n, name in scaled, name in biased, cell.scale_init, cell.norm_bias_init, cell.param_dtype,
                cell.max_steps, cell.momentum, cell.l1, cell.l1_axis_name, sigma, name=f"norm_{name}",
            )  # fmt: skip
            y, penalty = site(z, clock, use_running)
            penalties.append(penalty)
            return y

        norm = at_site

    out = recurrent.advance(lambda *given: step(norm, places, *given), states, clock, jnp.asarray(x))
    if cell.l1 and penalties and not cell.is_initializing():
        value = sum(penalties[1:], penalties[0])
        cell.sow("losses", "l1", value, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros((), value.dtype))
    return out


def _carry(cell: Any, carry: Carry, input_shape: tuple[int, ...], seq_lengths: ArrayLike | None) -> Carry:
    """Flax's carry, with a clock where one is needed."""
    n = None if cell.normalizer is None else row(cell.normalizer)
    if seq_lengths is None and not recurrent.needs_clock(n, cell.max_steps):
        return carry
    states, _ = recurrent.unpack(carry)
    return recurrent.pack(states, recurrent.start_clock(tuple(input_shape[:-1]), seq_lengths))


def _dense(cell: Any, side: str, gates: str, x: jax.Array, kernel_init: Initializer, biased: str) -> tuple[Any, Any]:
    """Flax's kernels of one side, side by side, and the biases of the gates in `biased`."""
    found = [
        DenseParams(
            cell.features, use_bias=gate in biased, param_dtype=cell.param_dtype, kernel_init=kernel_init,
            bias_init=cell.bias_init, name=side + gate if len(gates) > 1 else side,
        )(x)
        for gate in gates
    ]  # fmt: skip
    bias = None
    if biased:
        zero = jnp.zeros((cell.features,), cell.param_dtype)
        bias = jnp.concatenate([zero if b is None else b for _, b in found])
    return jnp.concatenate([kernel for kernel, _ in found], -1), bias


def _other_bias(cell: Any, name: str, gates: int) -> Any:
    """The bias of the linear map to which Flax gives none; needed where each map has its own, ahead of its norm."""
    if cell.normalizer is None or cell.place == "inside" or cell.bias_at != "before":
        return None
    return cell.param(name, cell.bias_init, (gates * cell.features,), cell.param_dtype)


class LSTMCell(_Normalized, nn.LSTMCell):
    """An LSTM cell with the arguments, parameters and carry (c, h) of `flax.linen.LSTMCell`, normalized.

    The linear maps are two matrix products, as in `flax.linen.OptimizedLSTMCell`.

    Attributes:
      forget_bias: added to the forget gate after any norm; Flax and Ren et al. 2017 have 0.

    Source: Ren et al. 2017, section 5.2; Ba et al. 2016, equations 20 to 22; Cooijmans et al. 2017, equations 6 to 8.

    >>> cell = LSTMCell(8, use_running_average=False, **recurrent.cooijmans2017(max_steps=3))
    >>> x = jnp.ones((2, 5, 4))
    >>> variables = jax.eval_shape(RNN(cell).init, jax.random.key(0), x)
    >>> sorted(variables["params"]["cell"])
    ['hf', 'hg', 'hi', 'ho', 'if', 'ig', 'ii', 'io', 'norm_c', 'norm_hifgo', 'norm_xifgo']
    >>> variables["batch_stats"]["cell"]["norm_c"]["mean"].shape
    (3, 8)
    """

    forget_bias: float = dataclasses.field(default=0.0, kw_only=True)

    @nn.compact
    def __call__(
        self, carry: Carry, inputs: ArrayLike, use_running_average: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Takes one step.

        Args:
          carry: (c, h), or (c, h, Clock), from `initialize_carry`.
          inputs: `[n, i]`; all axes but the last are examples.
          use_running_average: replaces the attribute.

        Returns:
          The new carry, and h.

        Raises:
          FieldError: the normalizer does not fit, or needs a clock that the carry lacks.
          ValueError: an attribute has another name than is accepted.
        """
        x, gates = jnp.asarray(inputs), "ifgo"
        h = recurrent.unpack(carry)[0][-1]
        w, _ = _dense(self, "i", gates, x, self.kernel_init, "")
        u, bias = _dense(self, "h", gates, h, self.recurrent_kernel_init, gates)
        weights = Weights(w, u, _other_bias(self, "input_bias", 4), bias)
        return _apply(
            self, "lstm", carry, x, use_running_average, lambda norm, places, c, h, x: recurrent.lstm_step(
                norm, places, weights, c, h, x, gate_fn=self.gate_fn, activation_fn=self.activation_fn,
                forget_bias=self.forget_bias, dtype=self.dtype,
            ),
        )  # fmt: skip

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...], seq_lengths: ArrayLike | None = None) -> Carry:
        """Flax's carry, with a `Clock` for rows with statistics of each step, or where `seq_lengths`, `[n]`, are given."""
        return _carry(self, super().initialize_carry(rng, input_shape), input_shape, seq_lengths)


class OptimizedLSTMCell(LSTMCell):
    """The same under the name that changing the import line asks for; Flax's two have one set of parameters too."""


class GRUCell(_Normalized, nn.GRUCell):
    """A GRU cell with the arguments, parameters and carry of `flax.linen.GRUCell`, normalized.

    Source: Ba et al. 2016, supplementary material.

    >>> cell = GRUCell(8, **recurrent.ba2016())
    >>> variables = jax.eval_shape(RNN(cell).init, jax.random.key(0), jnp.ones((2, 5, 4)))
    >>> sorted(name for name in variables["params"]["cell"] if name.startswith("norm"))
    ['norm_hn', 'norm_hrz', 'norm_xn', 'norm_xrz']
    """

    @nn.compact
    def __call__(
        self, carry: Carry, inputs: ArrayLike, use_running_average: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Takes one step; see `LSTMCell`. The carry is h, or (h, Clock)."""
        x, gates = jnp.asarray(inputs), "rzn"
        h = recurrent.unpack(carry)[0][-1]
        w, bw = _dense(self, "i", gates, x, self.kernel_init, gates)
        u, bu = _dense(self, "h", gates, h, self.recurrent_kernel_init, "n")
        return _apply(
            self, "gru", carry, x, use_running_average, lambda norm, places, h, x: recurrent.gru_step(
                norm, places, Weights(w, u, bw, bu), h, x, gate_fn=self.gate_fn, activation_fn=self.activation_fn,
                dtype=self.dtype,
            ),
        )  # fmt: skip

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...], seq_lengths: ArrayLike | None = None) -> Carry:
        """As for `LSTMCell`."""
        return _carry(self, super().initialize_carry(rng, input_shape), input_shape, seq_lengths)


class SimpleCell(_Normalized, nn.SimpleCell):
    """A plain RNN cell with the arguments, parameters and carry of `flax.linen.SimpleCell`, normalized.

    Source: Ren et al. 2017, section 5.2.

    >>> cell = SimpleCell(80, **recurrent.ren2017("dn*", "relu"))
    >>> cell.normalizer, cell.l1
    (Normalizer('c:60', 'c:60', eps=1.0, border='zero'), 0.01)
    """

    @nn.compact
    def __call__(
        self, carry: Carry, inputs: ArrayLike, use_running_average: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Takes one step; see `LSTMCell`. The carry is h, or (h, Clock)."""
        x = jnp.asarray(inputs)
        h = recurrent.unpack(carry)[0][-1]
        w, bw = _dense(self, "i", "z", x, self.kernel_init, "z")
        u, _ = _dense(self, "h", "z", h, self.recurrent_kernel_init, "")
        weights = Weights(w, u, bw, _other_bias(self, "hidden_bias", 1))
        return _apply(
            self, "simple", carry, x, use_running_average, lambda norm, places, h, x: recurrent.simple_step(
                norm, places, weights, h, x, activation_fn=self.activation_fn, residual=self.residual, dtype=self.dtype,
            ),
        )  # fmt: skip

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...], seq_lengths: ArrayLike | None = None) -> Carry:
        """As for `LSTMCell`."""
        return _carry(self, super().initialize_carry(rng, input_shape), input_shape, seq_lengths)


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
        init_key: Any = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        use_running_average: bool | None = None,
    ) -> Any:
        """Applies the cell to every step; see `flax.linen.RNN`. `use_running_average` is that of the cell's call."""
        cell: Any = self.cell
        given = {"return_carry": return_carry, "time_major": time_major, "reverse": reverse, "keep_order": keep_order}
        if seq_lengths is not None and not isinstance(cell, _Normalized):  # a cell that reads no clock
            return super().__call__(
                inputs, initial_carry=initial_carry, init_key=init_key, seq_lengths=jnp.asarray(seq_lengths), **given
            )
        how = {name: getattr(self, name) if value is None else value for name, value in given.items()}
        time = 0 if how["time_major"] else inputs.ndim - cell.num_feature_axes - 1
        batch = inputs.ndim - cell.num_feature_axes - 1
        asked = {} if use_running_average is None else {"use_running_average": use_running_average}
        carry = initial_carry
        if carry is None:
            shape = inputs.shape[:time] + inputs.shape[time + 1 :]
            carry = cell.initialize_carry(jax.random.key(0) if init_key is None else init_key, shape)
        clocked = recurrent.unpack(carry)[1] is not None
        carry = carry if seq_lengths is None else recurrent.with_lengths(carry, seq_lengths)

        def flip(sequences: jax.Array) -> jax.Array:
            lengths = None if seq_lengths is None else jnp.asarray(seq_lengths)
            return flip_sequences(sequences, lengths, num_batch_dims=batch, time_major=how["time_major"])

        inputs = flip(inputs) if how["reverse"] else inputs
        if self.is_initializing():
            cell(carry, jnp.take(inputs, 0, time), **asked)  # a scan carries only variables that exist
        before = cell.get_variable("losses", "l1") if cell.has_variable("losses", "l1") else None
        if before is not None:
            cell.put_variable("losses", "l1", jnp.zeros(inputs.shape[time], before.dtype))
        carried, broadcast = self.variable_carry, self.variable_broadcast
        if carried == "batch_stats" and not cell.is_mutable_collection(carried):  # a scan carries only what may change
            carried, broadcast = False, union_filters(broadcast, carried)
        scan = nn.scan(
            lambda cell, carry, x: cell(carry, x, **asked), in_axes=time, out_axes=time, unroll=self.unroll,
            variable_axes=self.variable_axes, variable_broadcast=broadcast, variable_carry=carried,
            split_rngs=self.split_rngs,
        )  # fmt: skip
        carry, outputs = scan(cell, carry, inputs)
        if cell.is_mutable_collection("losses") and cell.has_variable("losses", "l1"):
            shared = recurrent.penalty_axes(getattr(cell, "normalizer", None), getattr(cell, "l1_axis_name", None))
            value = recurrent.mean_over_time(cell.get_variable("losses", "l1"), seq_lengths, shared)
            cell.put_variable("losses", "l1", value if before is None else before + value)
        outputs = flip(outputs) if how["reverse"] and how["keep_order"] else outputs
        if not how["return_carry"]:
            return outputs
        return recurrent.hand_over(carry, clocked, seq_lengths is not None), outputs
