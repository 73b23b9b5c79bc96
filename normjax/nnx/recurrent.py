"""Normalized recurrent cells for nnx: Flax's cells with parameters and statistics around the steps of `recurrent.py`.

A cell has the arguments, parameters and carry of Flax's; with `normalizer=None` it is Flax's. What it has beyond them
says what is normalized, and where; the arguments mean what they mean in `normjax.linen.recurrent`. Each site
(`normjax.recurrent.sites`) is a submodule `norm_<site>`. Any `nnx.RNN` runs a cell; ours, `RNN`, also masks padding and
captures the penalty: `y, sown = nnx.capture(rnn, Penalty)(x)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from normjax import recurrent
from normjax.nnx.host import Penalty
from normjax.recurrent import Clock, Places, Weights
from normjax.running import Running, stores
from normjax.theory import Normalizer, row

Dtype = Any
Initializer = Any
Carry = Any
_ZEROS, _ONES = initializers.zeros_init(), initializers.ones_init()


def _value(variable: Any) -> Any:
    return None if variable is None else variable[...]


class _Site(nnx.Module):
    """The parameters and statistics of one site."""

    def __init__(
        self, cell: Any, size: int, scaled: bool, biased: bool, inits: tuple[Any, Any], sigma: float | None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        def learned(make: Initializer, use: bool) -> Any:
            return nnx.Param(make(rngs.params(), (size,), cell.param_dtype)) if use else nnx.data(None)

        self.scale, self.bias = learned(inits[0], scaled), learned(inits[1], biased)
        self.sigma = nnx.data(None) if sigma is None else nnx.Param(jnp.asarray(sigma, cell.param_dtype))
        found = recurrent.site_slots(cell.normalizer, size, cell.max_steps)
        self.mean, self.var = (
            nnx.BatchStat(found[name].make()) if name in found else nnx.data(None) for name in ("mean", "var")
        )

    def __call__(self, cell: Any, z: jax.Array, clock: Clock | None, use_running: bool) -> tuple[Any, Any]:
        """The normalized z and its penalty; stores what is to be stored."""
        out = recurrent.normalize_site(
            z, cell.normalizer, Running(_value(self.mean), _value(self.var)), clock=clock, max_steps=cell.max_steps,
            use_running=use_running, momentum=cell.momentum, scale=_value(self.scale), bias=_value(self.bias),
            eps=None if self.sigma is None else jnp.square(self.sigma[...]), l1=cell.l1, l1_axis_name=cell.l1_axis_name,
        )  # fmt: skip
        if not use_running:
            for name in ("mean", "var"):
                if getattr(self, name) is not None:
                    getattr(self, name)[...] = getattr(out.running, name)
        return out.y, out.penalty


class _Normalized(nnx.RNNCellBase):
    """What the cells have beyond Flax's; the keyword arguments that it does not name go to Flax's cell.

    Args:
      in_features: length of the input.
      hidden_features: length of the states.
      normalizer: a Normalizer of layout "n c", the name of a row of TABLE, or None for Flax's own cell.
      place: "inside", "separate" or "separate_raw", see `normjax.recurrent`.
      per_gate: whether W x and U h are normalized gate by gate, where they are normalized apart.
      bias_at: "after", "before" or "both", where W x and U h are normalized apart.
      use_running_average: whether to normalize with stored statistics; `.train()`, `.eval()` and `nnx.view` set it.
      momentum: weight of the old value in the running average.
      max_steps: number of steps with stored statistics of their own; None shares one of all steps.
      use_scale: whether a site learns a factor; or the names of those that do.
      use_bias: whether a site learns an addend; or the names of those that do.
      learn_sigma: whether a site learns sigma, one scalar; eps = sigma ** 2.
      sigma_init: its initial value; by default the square root of the row's eps.
      scale_init: initializer of the factors.
      norm_bias_init: initializer of the addends.
      l1: weight of the L1 penalty, alpha * mean |v| summed over the sites, captured as `Penalty` when it is not 0.
      l1_axis_name: mapped axes that share one mean of |v|; by default those of the fields.
      rngs: random keys for the initializers.
    """

    _kind: str
    _other: tuple[str, int] | None = None  # name and gates of the bias that Flax's cell does without

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        normalizer: Normalizer | str | None = None,
        place: str = "inside",
        per_gate: bool = False,
        bias_at: str = "after",
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        max_steps: int | None = None,
        use_scale: bool | Sequence[str] = True,
        use_bias: bool | Sequence[str] = True,
        learn_sigma: bool = False,
        sigma_init: float | None = None,
        scale_init: Initializer = _ONES,
        norm_bias_init: Initializer = _ZEROS,
        l1: float = 0.0,
        l1_axis_name: str | Sequence[str] | None = None,
        bias_init: Initializer = _ZEROS,
        rngs: nnx.Rngs,
        **flax: Any,
    ):
        super().__init__(in_features, hidden_features, bias_init=bias_init, rngs=rngs, **flax)  # pyright: ignore[reportCallIssue]
        self.normalizer = None if normalizer is None else row(normalizer)
        self.places = Places(place, per_gate, bias_at)
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.max_steps = max_steps
        self.l1 = l1
        self.l1_axis_name = l1_axis_name
        if self.normalizer is None:
            return
        sites = recurrent.sites(self._kind, hidden_features, self.places)
        scaled = recurrent.choose_sites("use_scale", use_scale, tuple(sites))
        biased = recurrent.choose_sites("use_bias", use_bias, tuple(sites))
        sigma = recurrent.start_sigma(self.normalizer, learn_sigma, sigma_init)
        for name, size in sites.items():
            site = _Site(self, size, name in scaled, name in biased, (scale_init, norm_bias_init), sigma, rngs)
            setattr(self, f"norm_{name}", site)
        if self._other and place != "inside" and bias_at == "before":
            name, gates = self._other
            shape = (gates * hidden_features,)
            setattr(self, name, nnx.Param(bias_init(rngs.params(), shape, self.param_dtype)))  # pyright: ignore[reportAttributeAccessIssue]

    def set_view(self, use_running_average: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
          use_running_average: whether to normalize with the stored statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Initializer | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> Carry:  # fmt: skip
        """Flax's carry, with a `Clock` for rows with statistics of each step, or where `seq_lengths`, `[n]`, are given."""
        carry = super().initialize_carry(input_shape, rngs, carry_init)
        if seq_lengths is None and not recurrent.needs_clock(self.normalizer, self.max_steps):
            return carry
        states, _ = recurrent.unpack(carry)
        return recurrent.pack(states, recurrent.start_clock(tuple(input_shape[:-1]), seq_lengths))


def _other_bias(cell: Any) -> Any:
    return _value(getattr(cell, cell._other[0], None))


def _apply(cell: Any, carry: Carry, x: ArrayLike, average: bool | None, step: Callable[..., Any]) -> Any:
    """One step of a cell; `step(norm, *states, x)` is one of `recurrent.py` with its weights."""
    states, clock = recurrent.unpack(carry)
    norm, penalties = None, []
    if cell.normalizer is not None:
        use_running = cell.use_running_average if average is None else average
        if use_running is None and any(stores(cell.normalizer)):
            raise ValueError(
                f"No `use_running_average` argument was provided to {type(cell).__name__}. Pass it to the constructor or "
                "to the call, or set it on the whole model: nnx.view(model, use_running_average=True) or False."
            )

        def at_site(name: str, z: jax.Array) -> jax.Array:
            y, penalty = getattr(cell, f"norm_{name}")(cell, z, clock, bool(use_running))
            penalties.append(penalty)
            return y

        norm = at_site

    out = recurrent.advance(lambda *given: step(norm, *given), states, clock, jnp.asarray(x))
    if cell.l1 and penalties and hasattr(cell, "__captures__"):
        value = sum(penalties[1:], penalties[0])
        cell.sow(Penalty, "l1", value, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros((), value.dtype))
    return out


def _lstm(cell: Any, weights: Weights, carry: Carry, inputs: ArrayLike, average: bool | None) -> Any:
    return _apply(
        cell, carry, inputs, average, lambda norm, c, h, x: recurrent.lstm_step(
            norm, cell.places, weights, c, h, x, gate_fn=cell.gate_fn, activation_fn=cell.activation_fn,
            forget_bias=cell.forget_bias, dtype=cell.dtype,
        ),
    )  # fmt: skip


class LSTMCell(_Normalized, nnx.LSTMCell):
    """An LSTM cell with the arguments, parameters and carry (c, h) of `flax.nnx.LSTMCell`, normalized.

    Args:
      in_features: length of the input.
      hidden_features: length of the states.
      forget_bias: added to the forget gate after any norm; Flax and Ren et al. 2017 have 0.
      **kwargs: see `normjax.linen.recurrent`, and `flax.nnx.LSTMCell`.

    Source: Ren et al. 2017, section 5.2; Ba et al. 2016, equations 20 to 22; Cooijmans et al. 2017, equations 6 to 8.

    >>> cell = nnx.eval_shape(lambda: LSTMCell(4, 8, rngs=nnx.Rngs(0), **recurrent.cooijmans2017(max_steps=3)))
    >>> cell.norm_c.mean.shape, cell.norm_hifgo.scale.shape
    ((3, 8), (32,))
    """

    _kind, _other = "lstm", ("input_bias", 4)

    def __init__(self, in_features: int, hidden_features: int, *, forget_bias: float = 0.0, **kwargs: Any):
        super().__init__(in_features, hidden_features, **kwargs)
        self.forget_bias = forget_bias

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
        """
        w, u = [self.ii, self.if_, self.ig, self.io], [self.hi, self.hf, self.hg, self.ho]
        weights = Weights(
            jnp.concatenate([p.kernel[...] for p in w], -1), jnp.concatenate([p.kernel[...] for p in u], -1),
            _other_bias(self), jnp.concatenate([_value(p.bias) for p in u]),
        )  # fmt: skip
        return _lstm(self, weights, carry, inputs, use_running_average)


class OptimizedLSTMCell(_Normalized, nnx.OptimizedLSTMCell):
    """An LSTM cell with the arguments and parameters of `flax.nnx.OptimizedLSTMCell`; otherwise `LSTMCell`.

    >>> cell = nnx.eval_shape(lambda: OptimizedLSTMCell(4, 8, normalizer="token", rngs=nnx.Rngs(0)))
    >>> cell.dense_i.kernel.shape, cell.norm_c.scale.shape
    ((4, 32), (8,))
    """

    _kind, _other = "lstm", ("input_bias", 4)

    def __init__(self, in_features: int, hidden_features: int, *, forget_bias: float = 0.0, **kwargs: Any):
        super().__init__(in_features, hidden_features, **kwargs)
        self.forget_bias = forget_bias

    def __call__(
        self, carry: Carry, inputs: ArrayLike, use_running_average: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Takes one step; see `LSTMCell`."""
        weights = Weights(
            self.dense_i.kernel[...], self.dense_h.kernel[...], _other_bias(self), _value(self.dense_h.bias)
        )
        return _lstm(self, weights, carry, inputs, use_running_average)


class GRUCell(_Normalized, nnx.GRUCell):
    """A GRU cell with the arguments, parameters and carry of `flax.nnx.GRUCell`, normalized.

    Flax's nnx cell lacks the candidate's bias of U h, which its linen cell has.

    Source: Ba et al. 2016, supplementary material.

    >>> cell = nnx.eval_shape(lambda: GRUCell(4, 8, rngs=nnx.Rngs(0), **recurrent.ba2016()))
    >>> cell.norm_hrz.scale.shape, cell.norm_hn.scale.shape
    ((16,), (8,))
    """

    _kind = "gru"

    def __call__(
        self, carry: Carry, inputs: ArrayLike, use_running_average: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Takes one step; see `LSTMCell`. The carry is h, or (h, Clock)."""
        weights = Weights(self.dense_i.kernel[...], self.dense_h.kernel[...], _value(self.dense_i.bias), None)
        return _apply(
            self, carry, inputs, use_running_average, lambda norm, h, x: recurrent.gru_step(
                norm, self.places, weights, h, x, gate_fn=self.gate_fn, activation_fn=self.activation_fn,
                dtype=self.dtype,
            ),
        )  # fmt: skip


class SimpleCell(_Normalized, nnx.SimpleCell):
    """A plain RNN cell with the arguments, parameters and carry of `flax.nnx.SimpleCell`, normalized.

    Source: Ren et al. 2017, section 5.2.

    >>> cell = nnx.eval_shape(lambda: SimpleCell(4, 80, rngs=nnx.Rngs(0), **recurrent.ren2017("dn*", "relu")))
    >>> cell.normalizer, cell.l1
    (Normalizer('c:60', 'c:60', eps=1.0, border='zero'), 0.01)
    """

    _kind, _other = "simple", ("hidden_bias", 1)

    def __call__(
        self, carry: Carry, inputs: ArrayLike, use_running_average: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Takes one step; see `LSTMCell`. The carry is h, or (h, Clock)."""
        weights = Weights(
            self.dense_i.kernel[...], self.dense_h.kernel[...], _value(self.dense_i.bias), _other_bias(self)
        )
        return _apply(
            self, carry, inputs, use_running_average, lambda norm, h, x: recurrent.simple_step(
                norm, self.places, weights, h, x, activation_fn=self.activation_fn, residual=self.residual,
                dtype=self.dtype,
            ),
        )  # fmt: skip


class RNN(nnx.RNN):
    """`flax.nnx.RNN` with what a normalized cell needs.

    `seq_lengths` masks the padding: it enters no statistic and no penalty, and an example that is over keeps its state,
    which is then also its output. Under a capture of `Penalty` the penalties of the steps become their mean over all
    valid steps of all examples. `flax.nnx.RNN` runs a normalized cell too, but cannot capture within its scan.

    >>> def run(x):
    ...     rnn = RNN(SimpleCell(4, 8, normalizer="token", l1=0.1, rngs=nnx.Rngs(0)))
    ...     y, sown = nnx.capture(rnn, Penalty)(x, seq_lengths=jnp.array([5, 2]))
    ...     return y, sown["cell"]["l1"][...]
    >>> [a.shape for a in jax.eval_shape(run, jnp.ones((2, 5, 4)))]
    [(2, 5, 8), ()]
    """

    def __init__(self, cell: nnx.RNNCellBase, *, state_axes: Any = None, **kwargs: Any):
        axes = nnx.StateAxes({Penalty: 0, ...: nnx.Carry}) if state_axes is None else state_axes
        super().__init__(cell, state_axes=axes, **kwargs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        rngs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Applies the cell to every step; see `flax.nnx.RNN`."""
        cell: Any = self.cell
        ours = isinstance(cell, _Normalized)  # others read no clock, and have no penalty
        major = self.time_major if time_major is None else time_major
        returned = self.return_carry if return_carry is None else return_carry
        time = 0 if major else inputs.ndim - cell.num_feature_axes - 1
        carry = initial_carry
        if carry is None:
            stream = self.rngs if rngs is None else rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
            carry = cell.initialize_carry(inputs.shape[:time] + inputs.shape[time + 1 :], stream)
        clocked = recurrent.unpack(carry)[1] is not None
        if seq_lengths is not None:
            seq_lengths = jnp.asarray(seq_lengths)
            carry = recurrent.with_lengths(carry, seq_lengths) if ours else carry
        sown = [
            v for v in getattr(cell, "__captures__", ()) if type(v) is Penalty and ours and cell.l1 and cell.normalizer
        ]
        before = [v["l1"] if "l1" in v else None for v in sown]
        for v in sown:  # a scan writes only what exists
            v["l1"] = jnp.zeros(inputs.shape[time], jnp.float32)
        last, outputs = super().__call__(
            inputs,
            initial_carry=carry,
            seq_lengths=seq_lengths,
            return_carry=True,
            time_major=major,
            rngs=rngs,
            **kwargs,
        )
        for v, old in zip(sown, before, strict=True):
            shared = recurrent.penalty_axes(cell.normalizer, cell.l1_axis_name)
            value = recurrent.mean_over_time(v["l1"], seq_lengths, shared)
            v["l1"] = value if old is None else old + value
        if not returned:
            return outputs
        return recurrent.hand_over(last, clocked, seq_lengths is not None), outputs
