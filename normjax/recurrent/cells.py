"""One step of an LSTM, a plain RNN and a GRU, with a normalizer at the published places."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from normjax._leaves import COUNT, one_of
from normjax.field import FieldError

PLACES = ("inside", "separate", "separate_raw")
BIASES = ("after", "before", "both")
# The gates in the order in which kernels are stacked; and what is normalized at once where W x and U h are apart.
GATES = {"simple": "z", "lstm": "ifgo", "gru": "rzn"}
_TOGETHER = {"simple": ("z",), "lstm": ("ifgo",), "gru": ("rz", "n")}

Norm = Callable[[str, jax.Array], jax.Array]  # normalizes the array z, [n, site], of a site with this name
Activation = Callable[[jax.Array], jax.Array]


class Weights(NamedTuple):
    """The linear maps of a cell, gates side by side in the order of `GATES`.

    Attributes:
      w, u: kernels of the input, `[i, gates * c]`, and of the state, `[c, gates * c]`.
      bw, bu: added to W x and to U h, each `[gates * c]`; None adds nothing.

    >>> lstm = Weights(jnp.zeros((3, 4 * 8)), jnp.zeros((8, 4 * 8)), bu=jnp.zeros(4 * 8))     # 3 inputs, 8 states
    >>> lstm.bw is None
    True
    """

    w: jax.Array
    u: jax.Array
    bw: jax.Array | None = None
    bu: jax.Array | None = None


@dataclass(frozen=True)
class Places:
    """Where a cell normalizes.

    Attributes:
      place: "inside" of the gates, after W x + U h + b; "separate", W x, U h and the LSTM's cell state each by itself, the
        cell state carried normalized; "separate_raw", where the cell state is carried as it is.
      per_gate: whether W x and U h, where apart, are normalized gate by gate. Published code (Ba et al. 2016, Ren et al.
        2017) normalizes all gates at once, a GRU's r and z at once and its candidate alone.
      bias_at: where W x and U h are apart, b is added "after" the normalization (Ba et al. 2016, Cooijmans et al. 2017),
        "before" it (code of Ren et al. 2017), or "both": before it to W x and after (LSTM in the code of Ba et al. 2016).

    Source: Ren et al. 2017, section 5.2; Ba et al. 2016, equations 20 to 22; Cooijmans et al. 2017, equations 6 to 8.

    >>> Places("separate_raw")
    Places(place='separate_raw', per_gate=False, bias_at='after')
    """

    place: str = "inside"
    per_gate: bool = False
    bias_at: str = "after"

    def __post_init__(self):
        one_of("place", self.place, PLACES)
        one_of("bias_at", self.bias_at, BIASES)


def sites(cell: str, features: int, places: Places) -> dict[str, int]:
    """The names and lengths (last axis) of the arrays that a "simple", "lstm" or "gru" cell of so many features normalizes.

    Source: Ren et al. 2017, section 5.2; Ba et al. 2016, equations 20 to 22.

    >>> sites("lstm", 8, Places("inside"))
    {'i': 8, 'f': 8, 'g': 8, 'o': 8, 'c': 8}
    >>> sites("lstm", 8, Places("separate"))
    {'xifgo': 32, 'hifgo': 32, 'c': 8}
    >>> sites("gru", 8, Places("separate"))
    {'xrz': 16, 'xn': 8, 'hrz': 16, 'hn': 8}
    """
    one_of("cell", cell, tuple(GATES))
    features, inside = COUNT("features", features), places.place == "inside"
    groups = GATES[cell] if inside or places.per_gate else _TOGETHER[cell]
    found = {side + group: features * len(group) for side in ([""] if inside else "xh") for group in groups}
    return found | ({"c": features} if cell == "lstm" else {})


def lstm_step(
    norm: Norm | None,
    places: Places,
    weights: Weights,
    c: jax.Array,
    h: jax.Array,
    x: jax.Array,
    *,
    gate_fn: Activation = jax.nn.sigmoid,
    activation_fn: Activation = jnp.tanh,
    forget_bias: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of an LSTM: the new c and h, each `[n, c]`.

    Args:
      norm: normalizes a site, called with its name and the array, `[n, site]`; None normalizes nothing.
      places: where to normalize.
      weights: the linear maps, gates i f g o.
      c: cell state, `[n, c]`.
      h: hidden state, `[n, c]`.
      x: input, `[n, i]`.
      gate_fn: activation of i, f and o.
      activation_fn: activation of g and of the cell state.
      forget_bias: added to the pre-activation of f, after any norm.
      dtype: of the linear maps; by default the widest of x, h and the weights.

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
        zx, zh = _sides(norm, "lstm", places, (zx, zh, bx, bh))
        z = zx + zh
    i, f, g, o = jnp.split(z, 4, -1)
    if forget_bias:
        # The code of Ren et al. 2017 adds it before the norm, which centres it away; their forget bias is 0.
        f = f + jnp.asarray(forget_bias, f.dtype)
    i, f, o, g = gate_fn(i), gate_fn(f), gate_fn(o), activation_fn(g)
    new = _gated((f, c), (i, g))
    shown = new if norm is None else norm("c", new)
    h = _gated((o, activation_fn(shown)))
    return (shown if places.place == "separate" else new), h


def simple_step(
    norm: Norm | None,
    places: Places,
    weights: Weights,
    h: jax.Array,
    x: jax.Array,
    *,
    activation_fn: Activation = jnp.tanh,
    residual: bool = False,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """One step of a plain RNN: the new h, `[n, c]`.

    Args:
      norm: normalizes a site, called with its name and the array, `[n, site]`; None normalizes nothing.
      places: where to normalize.
      weights: the linear maps, of one gate.
      h: state, `[n, c]`.
      x: input, `[n, i]`.
      activation_fn: activation of the new state.
      residual: whether to add h to the pre-activation, after the norms where W x and U h are apart.
      dtype: of the linear maps; by default the widest of x, h and the weights.

    Source: Ren et al. 2017, section 5.2.

    >>> one = jnp.ones((1, 1))
    >>> simple_step(None, Places(), Weights(one, one), one, one, activation_fn=jax.nn.relu)
    Array([[2.]], dtype=float32)
    """
    zx, zh, bx, bh = _linear(weights, x, h, dtype)
    if norm is None or places.place == "inside":
        z = _plus(_plus(_plus(zx + zh, bx), bh), h if residual else None)
        return activation_fn(z if norm is None else norm("z", z))
    zx, zh = _sides(norm, "simple", places, (zx, zh, bx, bh))
    return activation_fn(_plus(zx + zh, h if residual else None))


def gru_step(
    norm: Norm | None,
    places: Places,
    weights: Weights,
    h: jax.Array,
    x: jax.Array,
    *,
    gate_fn: Activation = jax.nn.sigmoid,
    activation_fn: Activation = jnp.tanh,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """One step of a GRU: the new h, (1 - z) * n + z * h, `[n, c]`.

    Where W x and U h are apart, the reset gate multiplies norm(U h). `inside`, which nobody published for a GRU, normalizes
    the candidate's W x + r * (U h).

    Args:
      norm: normalizes a site, called with its name and the array, `[n, site]`; None normalizes nothing.
      places: where to normalize.
      weights: the linear maps, gates r z n.
      h: state, `[n, c]`.
      x: input, `[n, i]`.
      gate_fn: activation of r and z.
      activation_fn: activation of the candidate n.
      dtype: of the linear maps; by default the widest of x, h and the weights.

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
        zx, zh = _sides(norm, "gru", places, (zx, zh, bx, bh))
    (xr, xz, xn), (hr, hz, hn) = jnp.split(zx, 3, -1), jnp.split(zh, 3, -1)
    r, z = xr + hr, xz + hz
    if inside is not None:
        r, z = inside("r", r), inside("z", z)
    r, z = gate_fn(r), gate_fn(z)
    n = xn + r * hn
    n = activation_fn(n if inside is None else inside("n", n))
    return _gated((1 - z, n), (z, h))


# W x and U h with the biases of each, None where there is none.
Sums = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def _linear(weights: Weights, x: jax.Array, h: jax.Array, dtype: DTypeLike | None) -> Sums:
    """W x, U h and the biases, in one dtype."""
    if x.shape[-1:] != weights.w.shape[:1]:
        raise FieldError(f"a cell made for inputs [n, {weights.w.shape[0]}] cannot take an array of shape {x.shape}")
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*(p.dtype for p in (x, h, *weights) if p is not None))
    bw, bu = (None if b is None else b.astype(dtype) for b in weights[2:])
    return jnp.dot(x.astype(dtype), weights.w.astype(dtype)), jnp.dot(h.astype(dtype), weights.u.astype(dtype)), bw, bu


def _plus(z: jax.Array, b: jax.Array | None) -> jax.Array:
    """The sum z + b in the dtype of z, for b along its last axes."""
    return z if b is None else z + b.astype(z.dtype).reshape((1,) * (z.ndim - b.ndim) + b.shape)


def _gated(*pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The sum of gates times values."""
    with jax.numpy_dtype_promotion("standard"):  # a state may be wider than the gates, as in Flax
        first, *rest = (gate * value for gate, value in pairs)
        return sum(rest, first)


def _each(norm: Norm, side: str, z: jax.Array, groups: Sequence[str]) -> jax.Array:
    """Normalizes each group of gates of z."""
    ends = np.cumsum([len(group) for group in groups])
    parts = jnp.split(z, [int(end) * (z.shape[-1] // int(ends[-1])) for end in ends[:-1]], -1)
    return jnp.concatenate([norm(side + group, part) for group, part in zip(groups, parts, strict=True)], -1)


def _sides(norm: Norm, cell: str, places: Places, sums: Sums) -> tuple[jax.Array, jax.Array]:
    """The normalized W x and U h with their biases."""
    zx, zh, bx, bh = sums
    groups = GATES[cell] if places.per_gate else _TOGETHER[cell]
    if places.bias_at == "before":
        zx, zh = _plus(zx, bx), _plus(zh, bh)
    elif places.bias_at == "both":  # the published LSTM has one b, on W x ahead of the norm and on the sum behind it
        zx = _plus(zx, bx if bh is None else bh if bx is None else bx + bh)
    zx, zh = _each(norm, "x", zx, groups), _each(norm, "h", zh, groups)
    return (zx, zh) if places.bias_at == "before" else (_plus(zx, bx), _plus(zh, bh))
