"""Normalized recurrent cells as pure steps: the published places of a normalizer in an RNN, an LSTM and a GRU.

    inside         act(norm(W x + U h + b)) at every gate and candidate, and at the LSTM's cell state before its output
                   activation; the cell state is carried raw        Ren et al. 2017: DN, DN*, LN-s, LN-l1, LN*
    separate       norm(W x) + norm(U h) + b, and norm at the LSTM's cell state, which is carried normalized
                                                                    Ren et al. 2017: their BN rows and plain LN
    separate_raw   the same, but the cell state is carried raw      Ba et al. 2016, equations 20 to 22;
                                                                    Cooijmans et al. 2017, equations 6 to 8

Each array that is normalized is a *site* with a scale, a bias and statistics of its own: "i f g o c" of an LSTM inside,
"xifgo hifgo c" where W x and U h are normalized as they are published: all gates at once. The layout is "n c".

What a step needs beside its states travels in the carry, as a `Clock`: the number of the step, for statistics that are
stored for each step, and the lengths of padded sequences. A variable would have to be reset between sequences.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from normjax import moments
from normjax.field import FieldError
from normjax.penalty import l1_penalty
from normjax.running import Running, Slot, as_stats, observe, slots, stores, update
from normjax.theory import Normalizer, Stats, equation, normalize

LAYOUT = "n c"
NOTHING = Running()  # no stored statistics
PLACES = ("inside", "separate", "separate_raw")
BIASES = ("after", "before", "both")
DIALECTS = ("code", "paper")
# The gates in the order in which kernels are stacked, and what is normalized at once where W x and U h are apart.
GATES = {"simple": "z", "lstm": "ifgo", "gru": "rzn"}
_TOGETHER = {"simple": ("z",), "lstm": ("ifgo",), "gru": ("rz", "n")}

# (name of the site, z [n, site]) to the normalized z.
Norm = Callable[[str, jax.Array], jax.Array]


class Weights(NamedTuple):
    """The linear maps of a cell, gates side by side in the order of `GATES`.

    Attributes:
      w: of the input, `[i, gates * c]`.
      u: of the state, `[c, gates * c]`.
      bw: added to W x, `[gates * c]` or None.
      bu: added to U h, `[gates * c]` or None.
    """

    w: Any
    u: Any
    bw: Any = None
    bu: Any = None


class Places(NamedTuple):
    """Where a cell normalizes.

    Attributes:
      place: one of PLACES.
      per_gate: whether W x and U h are normalized gate by gate. The paper and the code of Ba et al. 2016 and the code of
        Ren et al. 2017 normalize all gates at once (a GRU's r and z at once, its candidate alone).
      bias_at: where W x and U h are apart, b is added "after" the normalization (Ba et al. 2016, Cooijmans et al. 2017),
        "before" it (code of Ren et al. 2017), or "both": before it to W x and after (LSTM in the code of Ba et al. 2016).
    """

    place: str = "inside"
    per_gate: bool = False
    bias_at: str = "after"

    def check(self) -> "Places":
        """Itself.

        Raises:
          ValueError: `place` or `bias_at` has another name.
        """
        moments.choose("place", self.place, PLACES)
        moments.choose("bias_at", self.bias_at, BIASES)
        return self


def sites(cell: str, features: int, places: Places) -> dict[str, int]:
    """The names and lengths of the arrays that a cell ("simple", "lstm" or "gru") normalizes.

    >>> sites("lstm", 8, Places("inside"))
    {'i': 8, 'f': 8, 'g': 8, 'o': 8, 'c': 8}
    >>> sites("lstm", 8, Places("separate"))
    {'xifgo': 32, 'hifgo': 32, 'c': 8}
    >>> sites("gru", 8, Places("separate"))
    {'xrz': 16, 'xn': 8, 'hrz': 16, 'hn': 8}
    """
    inside = places.check().place == "inside"
    groups = GATES[cell] if inside or places.per_gate else _TOGETHER[cell]
    found = {side + group: features * len(group) for side in ([""] if inside else "xh") for group in groups}
    return found | ({"c": features} if cell == "lstm" else {})


# --- the steps ------------------------------------------------------------------------------------


def lstm_step(
    norm: Norm | None, places: Places, weights: Weights, c: jax.Array, h: jax.Array, x: jax.Array, *,
    gate_fn: Callable[..., Any] = jax.nn.sigmoid, activation_fn: Callable[..., Any] = jnp.tanh, forget_bias: float = 0.0,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """One step of an LSTM.

    Args:
      norm: normalizes a site; None normalizes nothing.
      places: where.
      weights: the linear maps, gates i f g o.
      c: cell state, `[n, c]`.
      h: hidden state, `[n, c]`.
      x: input, `[n, i]`.
      gate_fn: of i, f and o.
      activation_fn: of g and of the cell state.
      forget_bias: added to the pre-activation of f, after any norm.
      dtype: of the linear maps; by default the widest of x, h and the weights.

    Returns:
      The new c and h, each `[n, c]`.

    Source: Ren et al. 2017, section 5.2; Ba et al. 2016, equations 20 to 22; Cooijmans et al. 2017, equations 6 to 8.

    >>> zero = jnp.zeros((1, 1))
    >>> lstm_step(None, Places(), Weights(jnp.zeros((1, 4)), jnp.zeros((1, 4))), zero + 2, zero, zero)[0]
    Array([[1.]], dtype=float32)
    """
    zx, zh, bx, bh = _linear(weights, x, h, dtype)
    if norm is None or places.place == "inside":
        z = _plus(_plus(zx + zh, bx), bh)
        z = z if norm is None else _each(norm, "", z, GATES["lstm"])
    else:
        z = _apart(norm, "lstm", places, zx, zh, bx, bh)
    i, f, g, o = jnp.split(z, 4, -1)
    if forget_bias:
        # The code of Ren et al. 2017 adds it before the norm, which centres it away; their forget bias is 0.
        f = f + jnp.asarray(forget_bias, f.dtype)
    i, f, o, g = gate_fn(i), gate_fn(f), gate_fn(o), activation_fn(g)
    new = _add(_mul(f, c), _mul(i, g))
    shown = new if norm is None else norm("c", new)
    h = _mul(o, activation_fn(shown))
    return (shown if places.place == "separate" else new), h


def simple_step(
    norm: Norm | None, places: Places, weights: Weights, h: jax.Array, x: jax.Array, *,
    activation_fn: Callable[..., Any] = jnp.tanh, residual: bool = False, dtype: Any = None,
) -> jax.Array:  # fmt: skip
    """One step of a plain RNN; arguments as for `lstm_step`. Returns the new h, `[n, c]`.

    `residual` adds h to the pre-activation, after the norms where W x and U h are apart.

    Source: Ren et al. 2017, section 5.2.

    >>> one = jnp.ones((1, 1))
    >>> simple_step(None, Places(), Weights(one, one), one, one, activation_fn=jax.nn.relu)
    Array([[2.]], dtype=float32)
    """
    zx, zh, bx, bh = _linear(weights, x, h, dtype)
    if norm is None or places.place == "inside":
        z = _plus(_plus(zx + zh, bx), bh)
        z = _plus(z, h if residual else None)
        return activation_fn(z if norm is None else norm("z", z))
    z = _apart(norm, "simple", places, zx, zh, bx, bh)
    return activation_fn(_plus(z, h if residual else None))


def gru_step(
    norm: Norm | None, places: Places, weights: Weights, h: jax.Array, x: jax.Array, *,
    gate_fn: Callable[..., Any] = jax.nn.sigmoid, activation_fn: Callable[..., Any] = jnp.tanh, dtype: Any = None,
) -> jax.Array:  # fmt: skip
    """One step of a GRU; arguments as for `lstm_step`. Returns the new h = (1 - z) * n + z * h, `[n, c]`.

    Where W x and U h are apart, the reset gate multiplies norm(U h). `inside`, which nobody published for a GRU, normalizes
    the candidate's W x + r * (U h).

    Source: Ba et al. 2016, supplementary material, GRU.

    >>> zero = jnp.zeros((1, 1))
    >>> gru_step(None, Places(), Weights(jnp.zeros((1, 3)), jnp.zeros((1, 3))), zero + 2, zero)
    Array([[1.]], dtype=float32)
    """
    zx, zh, bx, bh = _linear(weights, x, h, dtype)
    inside = norm if places.place == "inside" else None
    if norm is None or inside is not None:
        zx, zh = _plus(zx, bx), _plus(zh, bh)
    else:
        zx, zh = _sides(norm, "gru", places, zx, zh, bx, bh)
    (xr, xz, xn), (hr, hz, hn) = jnp.split(zx, 3, -1), jnp.split(zh, 3, -1)
    r, z = xr + hr, xz + hz
    if inside is not None:
        r, z = inside("r", r), inside("z", z)
    r, z = gate_fn(r), gate_fn(z)
    n = xn + r * hn
    n = activation_fn(n if inside is None else inside("n", n))
    return _add(_mul(1 - z, n), _mul(z, h))


def _linear(weights: Weights, x: jax.Array, h: jax.Array, dtype: Any):
    """W x, U h and the biases, in one dtype."""
    if dtype is None:
        given = [x.dtype, h.dtype, *(p.dtype for p in weights if p is not None)]
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*given)
    x, h = x.astype(dtype), h.astype(dtype)
    bw, bu = (None if b is None else b.astype(dtype) for b in weights[2:])
    return jnp.dot(x, weights.w.astype(dtype)), jnp.dot(h, weights.u.astype(dtype)), bw, bu


def _plus(z: jax.Array, b: jax.Array | None) -> jax.Array:
    """The sum z + b in the dtype of z, for b along its last axes."""
    return z if b is None else z + b.astype(z.dtype).reshape((1,) * (z.ndim - b.ndim) + b.shape)


def _mul(a: jax.Array, b: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # a state may be wider than the gates, as in Flax
        return a * b


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        return a + b


def _each(norm: Norm, side: str, z: jax.Array, groups: Sequence[str]) -> jax.Array:
    """Normalizes each group of gates of z."""
    ends = np.cumsum([len(group) for group in groups])
    parts = jnp.split(z, [int(end) * (z.shape[-1] // int(ends[-1])) for end in ends[:-1]], -1)
    return jnp.concatenate([norm(side + group, part) for group, part in zip(groups, parts, strict=True)], -1)


def _sides(norm: Norm, cell: str, places: Places, zx: jax.Array, zh: jax.Array, bx: Any, bh: Any):
    """The normalized W x and U h with their biases."""
    groups = GATES[cell] if places.per_gate else _TOGETHER[cell]
    at = places.bias_at
    if at == "both":
        # The published LSTM has one b. It adds it to W x ahead of the norm, and to the sum behind it.
        b = bx if bh is None else bh if bx is None else bx + bh
        zx, zh = _each(norm, "x", _plus(zx, b), groups), _each(norm, "h", zh, groups)
    elif at == "before":
        return _each(norm, "x", _plus(zx, bx), groups), _each(norm, "h", _plus(zh, bh), groups)
    else:
        zx, zh = _each(norm, "x", zx, groups), _each(norm, "h", zh, groups)
    return _plus(zx, bx), _plus(zh, bh)


def _apart(norm: Norm, cell: str, places: Places, zx: jax.Array, zh: jax.Array, bx: Any, bh: Any) -> jax.Array:
    zx, zh = _sides(norm, cell, places, zx, zh, bx, bh)
    return zx + zh


# --- the carry ------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """What the carry holds beside the states, one number for each example, so that `nn.RNN` can pick its last step.

    Attributes:
      step: int32 number of the step, from 0.
      length: int32 number of valid steps; None where all are.
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
    """The carry, counting valid steps from here; a clock that runs goes on."""
    states, clock = unpack(carry)
    fresh = start_clock(states[0].shape[:-1], seq_lengths)
    return pack(states, fresh if clock is None else Clock(clock.step, clock.step + fresh.length))


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
    if going is not None:
        new = tuple(
            jnp.where(going, after, before.astype(after.dtype)) for after, before in zip(new, states, strict=True)
        )
    return pack(new, None if clock is None else clock._replace(step=clock.step + 1)), new[-1]


def mean_over_time(values: jax.Array, seq_lengths: ArrayLike | None = None) -> jax.Array:
    """The mean of a number of each step, `[t]`, over all valid steps of all examples.

    >>> mean_over_time(jnp.array([1.0, 4.0]), jnp.array([1, 1, 2])).item()     # three examples, then one
    1.75
    """
    if seq_lengths is None:
        return jnp.mean(values)
    time = jnp.arange(values.shape[0]).reshape(-1, 1)
    weight = jnp.sum((time < jnp.asarray(seq_lengths).reshape(1, -1)).astype(values.dtype), 1)
    total = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1)


# --- one site -------------------------------------------------------------------------------------


def site_slots(normalizer: Normalizer, features: int, max_steps: int | None) -> dict[str, Slot]:
    """What a site stores, with a first axis of steps if there is a `max_steps`.

    Raises:
      ValueError: `max_steps` is less than 1.

    >>> from normjax import TABLE
    >>> {name: slot.shape for name, slot in site_slots(TABLE["batch"], 4, 20).items()}
    {'mean': (20, 4), 'var': (20, 4)}
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is at least 1, or None for one statistic of all steps; found {max_steps!r}")
    found = slots(normalizer, LAYOUT, (None, features))
    steps = () if max_steps is None else (max_steps,)
    return {name: slot._replace(shape=steps + slot.shape) for name, slot in found.items()}


def needs_clock(normalizer: Normalizer | None, max_steps: int | None) -> bool:
    """Whether a cell must know the number of its step.

    >>> from normjax import TABLE
    >>> needs_clock(TABLE["batch"], 20), needs_clock(TABLE["token"], 20), needs_clock(TABLE["batch"], None)
    (True, False, False)
    """
    return normalizer is not None and max_steps is not None and any(stores(normalizer))


def choose_sites(name: str, given: bool | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The sites that an argument like `use_bias` speaks of: all, none, or those it names.

    Raises:
      ValueError: it names a site that the cell lacks.

    >>> choose_sites("use_bias", True, ("x", "c")), choose_sites("use_bias", ("c",), ("x", "c"))
    (('x', 'c'), ('c',))
    """
    if isinstance(given, bool):
        return tuple(known) if given else ()
    unknown = [site for site in given if site not in known]
    if isinstance(given, str) or unknown:
        raise ValueError(f"{name} is True, False or a tuple of sites of this cell, {', '.join(known)}; found {given!r}")
    return tuple(given)


class Site(NamedTuple):
    """What `normalize_site` returns: y, the statistics to store, and the penalty (None where none was asked for)."""

    y: jax.Array
    running: Running
    penalty: jax.Array | None


def normalize_site(
    z: jax.Array,
    normalizer: Normalizer,
    running: Running = NOTHING,
    *,
    clock: Clock | None = None,
    max_steps: int | None = None,
    refuse: bool = True,
    use_running: bool = False,
    momentum: ArrayLike = 0.99,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    l1: float = 0.0,
    l1_axis_name: str | Sequence[str] | None = None,
) -> Site:
    """Normalizes one array of a step; all axes but the last are examples.

    With `max_steps` the statistics that are stored have a first axis of steps. In training, the statistics of this batch
    move those of its step (of the step of its latest example); in inference each example takes those of its own step.
    Steps past the last take, and move, the last.

    Args:
      z: pre-activations, `[n, site]`.
      normalizer: of layout "n c".
      running: stored statistics.
      clock: number of the step, and the lengths: examples that are over are masked.
      max_steps: number of steps with statistics of their own; None shares them.
      refuse: whether the checks of `normalize` are made.
      use_running: whether to normalize with what is stored.
      momentum: weight of the old value.
      scale: factor, `[site]`.
      bias: addend, `[site]`.
      l1: weight of the penalty l1 * mean |v| over this step's valid elements.
      l1_axis_name: mapped axes that share the mean; by default those of the fields.

    Raises:
      FieldError: the normalizer does not fit, or the carry has no clock.

    Source: Cooijmans et al. 2017, section 3; Ren et al. 2017, equation 7 (the penalty).

    >>> from normjax import TABLE
    >>> z, stored = jnp.array([[1.0], [3.0]]), Running(jnp.zeros((3, 1)), jnp.ones((3, 1)))
    >>> out = normalize_site(z, TABLE["batch"], stored, clock=Clock(jnp.array([1, 1])), max_steps=3, momentum=0.5)
    >>> out.running.mean.ravel().tolist()
    [0.0, 1.0, 0.0]
    """
    shape = z.shape
    z = z.reshape(-1, shape[-1])
    going = valid(clock)
    mask = None if going is None else going.reshape(-1, 1)
    stored, stats, at = any(value is not None for value in running), None, None
    if stored and max_steps is not None:
        if clock is None:
            raise FieldError("statistics for each step need the number of the step: give the cell a carry of its own "
                             "initialize_carry, which ends with a Clock")  # fmt: skip
        steps = jnp.clip(clock.step.reshape(-1), 0, max_steps - 1)
        at = jnp.max(steps if mask is None else jnp.where(mask[:, 0], steps, 0))
        if use_running:  # one row for each example, which may be at another step than its neighbour
            stats = Stats(*(None if p is None else p[steps].reshape(len(z), -1) for p in running[:2]))
    elif stored and use_running:
        stats = as_stats(running, normalizer, LAYOUT, z.shape)
    evaluate = normalize if refuse else equation
    out = evaluate(z, normalizer, LAYOUT, stats=stats, scale=scale, bias=bias, mask=mask)
    if stored and not use_running:
        batch = observe(out.stats, normalizer, LAYOUT, z.shape)
        if at is None:
            running = update(running, batch, momentum)
        else:
            moved = update(Running(*(None if p is None else p[at] for p in running)), batch, momentum)
            pairs = zip(running, moved, strict=True)
            running = Running(*(None if p is None else p.at[at].set(new.astype(p.dtype)) for p, new in pairs))
    penalty = None
    if l1:
        if l1_axis_name is None:
            l1_axis_name = tuple(dict.fromkeys(name for field in normalizer.fields for name in field.mapped))
        penalty = l1_penalty(out.centered, l1, mask=mask, axis_name=l1_axis_name)
    return Site(out.y.reshape(shape), running, penalty)


# --- published cells ------------------------------------------------------------------------------


def symmetric_uniform(scale: float = 0.1) -> Callable[..., jax.Array]:
    """An initializer of U(-scale, scale), as Ren et al. 2017 draw every kernel.

    >>> bool(jnp.all(jnp.abs(symmetric_uniform(0.1)(jax.random.key(0), (4, 4))) <= 0.1))
    True
    """

    def make(key: Any, shape: Sequence[int], dtype: Any = jnp.float32, **kwargs: Any) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, -scale, scale, **kwargs)

    return make


def ba2016() -> dict[str, Any]:
    """The layer-normalized cells of Ba et al. 2016, as arguments of a cell.

    Their published LSTM adds its bias twice: `bias_at="both"`. Their published GRU adds its own `"before"`.

    Source: Ba, Kiros & Hinton 2016, equations 20 to 22.

    >>> ba2016()
    {'normalizer': Normalizer('c', 'c'), 'place': 'separate_raw', 'bias_at': 'after'}
    """
    return {"normalizer": Normalizer("c", "c", eps=1e-5), "place": "separate_raw", "bias_at": "after"}


def cooijmans2017(max_steps: int) -> dict[str, Any]:
    """Recurrent batch norm, as arguments of an LSTM cell: statistics for each step, scales that start at 0.1.

    Only the site c has a bias of its own (their beta_x = beta_h = 0); the forget gate's bias starts at 1, and the running
    average keeps 0.95, as in their code.

    Source: Cooijmans et al. 2017, equations 6 to 8 and section 4.

    >>> cooijmans2017(100)["max_steps"]
    100
    """
    return {
        "normalizer": Normalizer("n", "n", eps=1e-5), "place": "separate_raw", "bias_at": "after", "momentum": 0.95,
        "max_steps": max_steps, "scale_init": jax.nn.initializers.constant(0.1), "use_bias": ("c",), "forget_bias": 1.0,
    }  # fmt: skip


REN2017 = ("base", "bn", "bn-s", "bn-l1", "bn*", "ln", "ln-s", "ln-l1", "ln*", "dn", "dn-s", "dn*")
_ALPHA = {
    ("bn-l1", "lstm"): 1e-2, ("bn-l1", "tanh"): 1e-1, ("bn-l1", "relu"): 1e-4, ("bn*", "lstm"): 1e-1,
    ("bn*", "tanh"): 1e-4, ("bn*", "relu"): 1e-1, ("ln-l1", "lstm"): 1e-2, ("ln-l1", "tanh"): 1e-2,
    ("ln-l1", "relu"): 1e-2, ("ln*", "lstm"): 1e-3, ("ln*", "tanh"): 1e-2, ("ln*", "relu"): 1e-2,
    ("dn*", "lstm"): 1e-4, ("dn*", "tanh"): 1e-2, ("dn*", "relu"): 1e-2,
}  # fmt: skip


def ren2017(row: str, cell: str, dialect: str = "code", max_steps: int = 20) -> dict[str, Any]:
    """A cell of the word models of Ren et al. 2017, as arguments of an LSTM or a plain RNN cell.

    Where the code differs from the paper: its windows count zeros past the edge; on the plain RNNs, plain ln sits inside,
    with scale and bias, and ln and ln-s are penalized as ln-l1 is.

    Args:
      row: one of REN2017.
      cell: "lstm", "tanh" or "relu".
      dialect: "code", which the published numbers come from, or "paper".
      max_steps: steps with statistics of their own, in the bn rows.

    Returns:
      Keyword arguments of LSTMCell or SimpleCell.

    Raises:
      ValueError: no row, cell or dialect has this name.

    Source: Ren et al. 2017, section 5.2 and its published configuration.

    >>> ren2017("dn*", "lstm")["normalizer"]
    Normalizer('c:30', 'c:30', eps=1.0, border='zero')
    >>> ren2017("bn", "tanh")["place"], ren2017("ln", "tanh")["place"], ren2017("ln", "lstm")["place"]
    ('separate', 'inside', 'separate')
    """
    moments.choose("row", row, REN2017)
    moments.choose("cell", cell, ("lstm", "tanh", "relu"))
    moments.choose("dialect", dialect, DIALECTS)
    out: dict[str, Any] = {"kernel_init": symmetric_uniform(0.1), "recurrent_kernel_init": symmetric_uniform(0.1)}
    out |= {} if cell == "lstm" else {"activation_fn": jnp.tanh if cell == "tanh" else jax.nn.relu}
    if row == "base":
        return out | {"normalizer": None}
    code = dialect == "code"
    eps = 1.0 if row.endswith(("-s", "*")) else 1e-4
    alpha = _ALPHA.get((row, cell), 0.0)
    if row in ("ln", "ln-s") and cell != "lstm" and code:
        alpha = 1e-2
    if row.startswith("bn"):
        normalizer = Normalizer("n", "n", eps=eps)
        out |= {"place": "separate", "bias_at": "before", "max_steps": max_steps, "momentum": 0.9}
    elif row == "ln" and (cell == "lstm" or not code):
        normalizer = Normalizer("c", "c", eps=eps)
        out |= {"place": "separate", "bias_at": "before"}
    else:
        field = "c" if row.startswith("ln") else "c:30" if cell == "lstm" else "c:60"
        border = "zero" if code and row.startswith("dn") else "truncate"
        normalizer = Normalizer(field, field, eps=eps, border=border)
        affine = row == "ln"
        out |= {"place": "inside", "use_scale": affine, "use_bias": affine}
    return out | {"normalizer": normalizer, "l1": alpha}
