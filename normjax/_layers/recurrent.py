"""Normalized recurrent cells, described once, without Flax: options, documentation and a step.

A cell has the arguments, parameters and carry of Flax's; with `normalizer=None` it is Flax's, under Flax's `RNN` too (ours
holds the state of a sequence that is over). What follows Flax's arguments is by name only, and says what is normalized,
and where. Each site (`normjax.recurrent.sites`) is a submodule `norm_<site>`.

The faces, `linen/recurrent.py` and `nnx/recurrent.py`, add Flax's cell and its variables: `class GRUCell(recurrent.GRUCell,
Host, nn.GRUCell)`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax import recurrent
from normjax._layers.describe import Amount, Initializer, Integer, Number, Parameter, Share, hold_to_ranges, ones, zeros
from normjax._layers.pickling import Portable
from normjax._layers.statistics import stored_dtype
from normjax.recurrent import Activation, Carry, Clock, Norm, Places, Site, Weights
from normjax.running import Running, Slot, stores
from normjax.theory import Normalizer, row

Arrays = Mapping[str, jax.Array]
Step = Callable[..., jax.Array | tuple[jax.Array, ...]]  # the steps take different numbers of states


class SiteOptions(NamedTuple):
    """One normalized array of a cell, as the cell tells it."""

    learns: Mapping[str, Parameter]  # of "scale" `[site]`, "bias" `[site]` and "sigma" what is learned
    slots: Mapping[str, Slot]  # what is stored, by name
    normalize: Callable[..., Site]  # `normalize_site` with the options of the cell

    def __call__(self, z: jax.Array, learned: Arrays, stored: Arrays, clock: Clock | None, use_running: bool) -> Site:
        eps = jnp.square(learned["sigma"]) if "sigma" in learned else None
        given = {"scale": learned.get("scale"), "bias": learned.get("bias"), "use_running": use_running}
        return self.normalize(z, running=Running(**stored), clock=clock, eps=eps, **given)


class _Asked(Portable):
    """What a cell asks of its face: attributes of Flax's cells that a step reads, and what needs variables."""

    bias_init: Initializer
    gate_fn: Activation
    activation_fn: Activation
    residual: bool
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    def _features(self) -> int: ...  # length of the states

    def _weights(self, x: jax.Array, h: jax.Array) -> Weights: ...  # the linear maps, for x `[n, i]` and h `[n, c]`

    def _uses_running(self, at_call: bool | None) -> bool: ...  # asked only where statistics are stored

    def _at_site(self, name: str, z: jax.Array, clock: Clock | None, use_running: bool) -> Site:
        """Normalizes a site with its variables, and stores what is to be stored."""
        ...

    def _penalize(self, value: Callable[[], jax.Array]) -> None: ...  # leaves the penalty of a step to those who ask


@dataclasses.dataclass(kw_only=True, init=False, eq=False, repr=False)
class Cell(_Asked):
    """What the cells have beyond Flax's.

    Attributes:
      normalizer: a Normalizer of layout "n c", the name of a row of TABLE, or None for Flax's own cell.
      place: "inside", "separate" or "separate_raw", see `normjax.recurrent`.
      per_gate: whether W x and U h are normalized gate by gate, where they are normalized apart.
      bias_at: "after", "before" or "both", where W x and U h are normalized apart. With "before" each of the two linear
        maps has a bias of its own: beside Flax's, an LSTM learns `input_bias`, `[4 * c]` (gates i f g o), for W x, and a
        SimpleCell `hidden_bias`, `[c]`, for U h.
      momentum: weight of the old value in the running average.
      max_steps: number of steps with stored statistics of their own; None shares one of all steps.
      use_scale: whether a site learns a factor; or the names of those that do.
      use_bias: whether a site learns an addend; or the names of those that do.
      learn_sigma: whether a site learns sigma, one scalar; eps = sigma ** 2.
      sigma_init: its initial value; by default the square root of the row's eps.
      scale_init: initializer of the factors.
      norm_bias_init: initializer of the addends.
      l1: weight alpha of the L1 penalty, alpha * mean |v| summed over the sites; 0 leaves none. In linen each step sows it
        as `l1` into `losses` when that is mutable, never while initializing; in nnx it is captured as `Penalty`.
      l1_axis_name: mapped axes that share one mean of |v|; by default those of the fields.
    """

    normalizer: Normalizer | str | None = None
    place: str = "inside"
    per_gate: bool = False
    bias_at: str = "after"
    momentum: Share = 0.99
    max_steps: Integer | None = None
    use_scale: bool | Sequence[str] = True
    use_bias: bool | Sequence[str] = True
    learn_sigma: bool = False
    sigma_init: Amount | None = None
    scale_init: Initializer = ones
    norm_bias_init: Initializer = zeros
    l1: Amount = 0.0
    l1_axis_name: str | Sequence[str] | None = None

    _kind: ClassVar[str]  # its name in `recurrent.GATES`

    @staticmethod
    def _static(value: Any) -> Any:
        """An option as it is set; nnx says that it is none of the data."""
        return value

    def _step(self) -> Step:
        """One of the steps of `recurrent`, `step(norm, places, weights, *states, x)`, with the cell's activations."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raises where options are not what they may be, or contradict each other; called when the cell is made."""
        hold_to_ranges(self, self._static)
        self._places()  # refuses a place that the cell has not
        n = self._row()
        if n is None and self.l1:
            raise ValueError(
                f"l1 has no meaning without a normalizer; found l1={self.l1!r}. Normalizer(None, None), with "
                "use_scale=False, use_bias=False, normalizes nothing, and is penalized on the pre-activations"
            )
        if n is not None:
            recurrent.start_sigma(n, self.learn_sigma, self.sigma_init)
            recurrent.site_slots(n, 1, self.max_steps)

    def _row(self) -> Normalizer | None:
        return None if self.normalizer is None else row(self.normalizer)

    def _places(self) -> Places:
        return Places(self.place, self.per_gate, self.bias_at)

    def _sites(self) -> dict[str, int]:
        return recurrent.sites(self._kind, self._features(), self._places())

    def _site(self, name: str, starting: bool = False, dtype: DTypeLike | None = None) -> SiteOptions:
        """The options of a site; `starting` while initializing, when mapped axes need not exist yet.

        The dtype is that of the pre-activations, None where it is not known yet.
        """
        n, sites = self._row(), self._sites()
        assert n is not None
        learns, size = {}, sites[name]
        options = ("scale", self.use_scale, self.scale_init), ("bias", self.use_bias, self.norm_bias_init)
        for key, use, init in options:
            if name in recurrent.choose_sites(f"use_{key}", use, tuple(sites)):
                learns[key] = Parameter((size,), init)
        sigma = recurrent.start_sigma(n, self.learn_sigma, self.sigma_init)
        learns |= {} if sigma is None else {"sigma": Parameter((), sigma)}
        slots = recurrent.site_slots(n, size, self.max_steps, stored_dtype(self, dtype))
        given = {"max_steps": self.max_steps, "momentum": self.momentum, "l1_axis_name": self.l1_axis_name}
        given |= {"refuse": False, "l1": 0.0} if starting else {"l1": self.l1}
        n = n.local() if starting else n
        normalize = functools.partial(recurrent.normalize_site, normalizer=n, **given)
        return SiteOptions(learns, slots, normalize)

    def _has_two_biases(self) -> bool:
        """Whether each linear map has its own bias, ahead of its norm, where Flax's cell has one for both."""
        return self.normalizer is not None and self.place != "inside" and self.bias_at == "before"

    def _clocked(self, carry: Carry, input_shape: Sequence[int], seq_lengths: ArrayLike | None) -> Carry:
        """Flax's carry, with a clock where one is needed."""
        if seq_lengths is None and not recurrent.needs_clock(self._row(), self.max_steps):
            return carry
        states, _ = recurrent.unpack(carry)
        return recurrent.pack(states, recurrent.start_clock(tuple(input_shape[:-1]), seq_lengths))

    def __call__(
        self, carry: Carry, inputs: ArrayLike, use_running_average: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Takes one step.

        Args:
          carry: (c, h) of an LSTM, h of the others, each `[n, c]`; or (c, h, Clock), (h, Clock). From `initialize_carry`.
          inputs: `[n, i]`; all axes but the last are examples.
          use_running_average: whether the stored statistics of rows that have any normalize; replaces the attribute.

        Returns:
          The new carry, and h, `[n, c]`.

        Raises:
          FieldError: the normalizer does not fit, or needs a clock that the carry lacks.
        """
        x, (states, clock) = jnp.asarray(inputs), recurrent.unpack(carry)
        weights, n = self._weights(x, states[-1]), self._row()
        penalties: list[jax.Array] = []
        norm: Norm | None = None
        if n is not None:
            use_running = any(stores(n)) and self._uses_running(use_running_average)

            def at_site(name: str, z: jax.Array) -> jax.Array:
                out = self._at_site(name, z, clock, use_running)
                penalties.extend([] if out.penalty is None else [out.penalty])
                return out.y

            norm = at_site
        out = recurrent.advance(functools.partial(self._step(), norm, self._places(), weights), states, clock, x)
        if penalties:
            self._penalize(lambda: sum(penalties[1:], penalties[0]))
        return out


@dataclasses.dataclass(kw_only=True, init=False, eq=False, repr=False)
class LSTMCell(Cell):
    """An LSTM cell with the arguments, parameters and carry (c, h) of Flax's, normalized.

    `normalizer` says what is averaged and `place` where, both by name; `recurrent.ren2017`, `ba2016` and
    `cooijmans2017` give the published cells as arguments. The other options are those of
    `normjax._layers.recurrent.Cell`. The linear maps are two matrix products, with the gates in the order i f g o, as in
    PyTorch; g is the candidate, which Keras calls c.

    Attributes:
      forget_bias: added to the forget gate after any norm; Flax and Ren et al. 2017 have 0.

    Source: Ren et al. 2017, section 5.2; Ba et al. 2016, equations 20 to 22; Cooijmans et al. 2017, equations 6 to 8.

    >>> from normjax import linen, nnx, recurrent
    >>> cell = linen.LSTMCell(8, use_running_average=False, **recurrent.cooijmans2017(max_steps=3))
    >>> variables = jax.eval_shape(linen.RNN(cell).init, jax.random.key(0), jnp.ones((2, 5, 4)))
    >>> sorted(variables["params"]["cell"])
    ['hf', 'hg', 'hi', 'ho', 'if', 'ig', 'ii', 'io', 'norm_c', 'norm_hifgo', 'norm_xifgo']
    >>> variables["batch_stats"]["cell"]["norm_c"]["mean"].shape                # [max_steps, c]
    (3, 8)
    >>> from flax.nnx import Rngs
    >>> nnx.LSTMCell(4, 8, normalizer="token", place="separate", rngs=Rngs(0)).norm_hifgo.scale.shape
    (32,)
    """

    forget_bias: Number = 0.0
    _kind = "lstm"

    def _step(self) -> Step:
        given = {"gate_fn": self.gate_fn, "activation_fn": self.activation_fn, "dtype": self.dtype}
        return functools.partial(recurrent.lstm_step, forget_bias=self.forget_bias, **given)


class GRUCell(Cell):
    """A GRU cell with the arguments, parameters and carry of Flax's, normalized.

    `normalizer` says what is averaged and `place` where, both by name; `recurrent.ba2016` gives the published cell as
    arguments. The other options are those of `normjax._layers.recurrent.Cell`. Flax's nnx cell lacks the candidate's
    bias of U h, which its linen cell has; so do ours. The gates lie in the order r z n, as in PyTorch; n is the candidate.

    Source: Ba et al. 2016, supplementary material.

    >>> from normjax import linen, recurrent
    >>> cell = linen.GRUCell(8, **recurrent.ba2016())
    >>> variables = jax.eval_shape(linen.RNN(cell).init, jax.random.key(0), jnp.ones((2, 5, 4)))
    >>> sorted(name for name in variables["params"]["cell"] if name.startswith("norm"))
    ['norm_hn', 'norm_hrz', 'norm_xn', 'norm_xrz']
    """

    _kind = "gru"

    def _step(self) -> Step:
        gate, act = self.gate_fn, self.activation_fn
        return functools.partial(recurrent.gru_step, gate_fn=gate, activation_fn=act, dtype=self.dtype)


class SimpleCell(Cell):
    """A plain RNN cell with the arguments, parameters and carry of Flax's, normalized.

    `normalizer` says what is averaged and `place` where, both by name; `recurrent.ren2017` gives the published cells as
    arguments. The other options are those of `normjax._layers.recurrent.Cell`.

    Source: Ren et al. 2017, section 5.2.

    >>> from normjax import linen, recurrent
    >>> cell = linen.SimpleCell(80, **recurrent.ren2017("dn*", "relu"))
    >>> cell.normalizer, cell.l1
    (Normalizer('c:60', 'c:60', eps=1.0, border='zero'), 0.01)
    """

    _kind = "simple"

    def _step(self) -> Step:
        act, residual = self.activation_fn, self.residual
        return functools.partial(recurrent.simple_step, activation_fn=act, residual=residual, dtype=self.dtype)
