"""Published normalized cells, as the keyword arguments of a cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normjax._leaves import COUNT, one_of
from normjax.theory import Normalizer


def symmetric_uniform(scale: float = 0.1) -> Callable[..., jax.Array]:
    """An initializer of U(-scale, scale), as Ren et al. 2017 draw every kernel.

    Source: Ren et al. 2017, its published configuration.

    >>> bool(jnp.all(jnp.abs(symmetric_uniform(0.1)(jax.random.key(0), (4, 4))) <= 0.1))
    True
    """
    return _Uniform(scale)


@dataclass(frozen=True)
class _Uniform:
    """The initializer of `symmetric_uniform`: a value, so that cells with it compare, hash and pickle."""

    scale: float

    def __call__(
        self, key: ArrayLike, shape: Sequence[int], dtype: DTypeLike = jnp.float32, **kwargs: Any
    ) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, -self.scale, self.scale, **kwargs)


@dataclass(frozen=True)
class _Constant:
    """An initializer of one number: a value, so that cells with it compare, hash and pickle."""

    value: float

    def __call__(self, key: ArrayLike, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


def ba2016() -> dict[str, Any]:
    """The layer-normalized cells of Ba et al. 2016, as keyword arguments of any cell.

    Their published LSTM adds its bias twice: `bias_at="both"`. Their published GRU adds its own `"before"`.

    Source: Ba, Kiros & Hinton 2016, equations 20 to 22.

    >>> ba2016()
    {'normalizer': Normalizer('c', 'c'), 'place': 'separate_raw', 'bias_at': 'after'}
    """
    return {"normalizer": Normalizer("c", "c"), "place": "separate_raw", "bias_at": "after"}


def cooijmans2017(max_steps: int) -> dict[str, Any]:
    """Recurrent batch norm, as keyword arguments of LSTMCell: statistics for each step, scales that start at 0.1.

    Only the site c has a bias of its own (their beta_x = beta_h = 0); the forget gate's bias starts at 1, and the running
    average keeps 0.95, as in their code. Steps after `max_steps` share the statistics of the last.

    Source: Cooijmans et al. 2017, equations 6 to 8 and section 4.

    >>> cooijmans2017(100)["max_steps"]
    100
    """
    places = {"normalizer": Normalizer("n", "n"), "place": "separate_raw", "bias_at": "after", "use_bias": ("c",)}
    first = {"scale_init": _Constant(0.1), "forget_bias": 1.0}
    return {**places, **first, "momentum": 0.95, "max_steps": COUNT("max_steps", max_steps)}


REN2017 = ("base", "bn", "bn-s", "bn-l1", "bn*", "ln", "ln-s", "ln-l1", "ln*", "dn", "dn-s", "dn*")
REN2017_DIALECTS = ("code", "paper")  # where the numbers come from
_ALPHA = {  # the weight of the penalty, where there is one
    "bn-l1": {"lstm": 1e-2, "tanh": 1e-1, "relu": 1e-4},
    "bn*": {"lstm": 1e-1, "tanh": 1e-4, "relu": 1e-1},
    "ln-l1": {"lstm": 1e-2, "tanh": 1e-2, "relu": 1e-2},
    "ln*": {"lstm": 1e-3, "tanh": 1e-2, "relu": 1e-2},
    "dn*": {"lstm": 1e-4, "tanh": 1e-2, "relu": 1e-2},
}


def ren2017(row: str, cell: str, dialect: str = "code", max_steps: int = 20) -> dict[str, Any]:
    """A cell of the word models of Ren et al. 2017, as keyword arguments of LSTMCell or SimpleCell.

    Where the code differs from the paper: its windows count zeros past the edge; on the plain RNNs, plain ln sits inside,
    with scale and bias, and ln and ln-s are penalized as ln-l1 is. Outside of a cell: their loss and penalty are both summed
    over the 20 steps, where the penalty of our `RNN`, a mean over the steps, stands beside a loss that is one too; and their
    steps are counted from 0 in each segment (`restart`), which for the bn rows decides the statistics.

    Args:
      row: one of REN2017.
      cell: "lstm", "tanh" or "relu".
      dialect: "code", which the published numbers come from, or "paper".
      max_steps: steps with statistics of their own, in the bn rows.

    Source: Ren et al. 2017, section 5.2 and its published configuration.

    >>> ren2017("dn*", "lstm")["normalizer"]
    Normalizer('c:30', 'c:30', eps=1.0, border='zero')
    >>> ren2017("bn", "tanh")["place"], ren2017("ln", "tanh")["place"], ren2017("ln", "lstm")["place"]
    ('separate', 'inside', 'separate')
    """
    one_of("row", row, REN2017)
    one_of("cell", cell, ("lstm", "tanh", "relu"))
    one_of("dialect", dialect, REN2017_DIALECTS)
    out: dict[str, Any] = {"kernel_init": symmetric_uniform(0.1), "recurrent_kernel_init": symmetric_uniform(0.1)}
    out |= {} if cell == "lstm" else {"activation_fn": jnp.tanh if cell == "tanh" else jax.nn.relu}
    if row == "base":
        return out | {"normalizer": None}
    code = dialect == "code"
    eps = 1.0 if row.endswith(("-s", "*")) else 1e-4
    penalized = row in ("ln", "ln-s") and cell != "lstm" and code
    field, border = {"b": "n", "l": "c", "d": "c:30" if cell == "lstm" else "c:60"}[row[0]], "truncate"
    if row.startswith("bn"):
        out |= {"place": "separate", "bias_at": "before", "max_steps": COUNT("max_steps", max_steps), "momentum": 0.9}
    elif row == "ln" and (cell == "lstm" or not code):
        out |= {"place": "separate", "bias_at": "before"}
    else:
        border = "zero" if code and row.startswith("dn") else "truncate"
        out |= {"place": "inside", "use_scale": row == "ln", "use_bias": row == "ln"}
    alpha = 1e-2 if penalized else _ALPHA.get(row, {}).get(cell, 0.0)
    return out | {"normalizer": Normalizer(field, field, eps=eps, border=border), "l1": alpha}
