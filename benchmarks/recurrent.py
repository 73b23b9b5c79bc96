"""One step and 35 steps of a normalized LSTM and a tanh RNN, [128, 650]: no norm, Flax's layer norm, normjax's.

    python -m benchmarks.recurrent --out DIR

The cells are those of `normjax.recurrent`, into which Flax's layer norm fits as well. The norms stand where Ba et al. 2016
put them, equations 20 to 22: on W x and on U h, all gates at once, and on the LSTM's cell before its output, each with a
scale and a bias of its own. Times are for a step, its gradients of the parameters and the input included. Matrix products
rule them, so there is no bandwidth floor.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import harness, results
from benchmarks.harness import BOTH, FORWARD, Case, Contender
from normjax import Normalizer, recurrent

EPS = 1e-5
PEER = "flax LayerNorm"
NONE = "none"
KINDS = {"LSTM": "lstm", "RNN": "simple"}
PLACES = recurrent.Places("separate_raw")

Params = dict[str, Any]
# (z [batch, site], {"scale", "bias"}) to the normalized z.
Norm = Callable[[jax.Array, Params], jax.Array]


@dataclass(frozen=True)
class Options(harness.Options):
    """What is timed.

    Attributes:
      cells: LSTM, RNN or both.
      steps: lengths of the sequences.
      modes: forward, forward+backward or both.
    """

    cells: tuple[str, ...] = tuple(KINDS)
    steps: tuple[int, ...] = (1, 35)
    modes: tuple[str, ...] = (FORWARD, BOTH)


def ours(normalizer: Normalizer) -> Norm:
    """A row of normjax with the learned scale and bias."""
    return lambda z, p: recurrent.normalize_site(z, normalizer, scale=p["scale"], bias=p["bias"]).y


def norms(window: int) -> dict[str, Norm]:
    """The contenders; `window` is the width of the divisive one."""
    layer = flax.linen.LayerNorm(epsilon=EPS)
    return {
        "normjax token": ours(Normalizer("c", "c", eps=EPS)),
        PEER: lambda z, p: layer.apply({"params": p}, z),  # pyright: ignore[reportReturnType]
        f"normjax c:{window}": ours(Normalizer(f"c:{window}", f"c:{window}", eps=1.0)),
        NONE: lambda z, p: z,
    }


# --- cells ----------------------------------------------------------------------------------------


def cell_params(cell: str, inputs: int, hidden: int, seed: int = 0) -> Params:
    """W [inputs, gates * hidden], U [hidden, gates * hidden], b [gates, hidden], and a scale and a bias for each site."""
    random, gates = np.random.default_rng(seed), len(recurrent.GATES[KINDS[cell]])

    def uniform(*shape):
        return jnp.asarray(random.uniform(-1, 1, shape) / math.sqrt(hidden), jnp.float32)

    sites = recurrent.sites(KINDS[cell], hidden, PLACES)
    norms = {name: {"scale": 1 + uniform(size), "bias": uniform(size)} for name, size in sites.items()}
    w, u = uniform(inputs, gates * hidden), uniform(hidden, gates * hidden)
    return {"W": w, "U": u, "b": uniform(gates, hidden), "norms": norms}


def start(cell: str, batch: int, hidden: int) -> tuple[jax.Array, ...]:
    """The first carry: (c, h) of an LSTM, (h,) of an RNN, each [batch, hidden]."""
    return (jnp.zeros((batch, hidden)),) * (2 if cell == "LSTM" else 1)


def step(cell: str, norm: Norm, params: Params, carry: tuple[jax.Array, ...], x: jax.Array):
    """One step; x is [batch, inputs]. Returns the new carry, and h."""
    weights = recurrent.Weights(params["W"], params["U"], None, params["b"].reshape(-1))

    def at_site(name, z):
        return norm(z, params["norms"][name])

    if cell == "LSTM":
        carry = recurrent.lstm_step(at_site, PLACES, weights, *carry, x)  # pyright: ignore[reportCallIssue]
    else:
        carry = (recurrent.simple_step(at_site, PLACES, weights, *carry, x),)  # pyright: ignore[reportCallIssue]
    return carry, carry[-1]


def unroll(cell: str, norm: Norm, params: Params, xs: jax.Array, carry: tuple[jax.Array, ...]):
    """All steps of xs [t, batch, inputs]; a single one without a scan. Returns the last carry, and h [t, batch, hidden]."""
    one = functools.partial(step, cell, norm, params)
    if len(xs) == 1:
        carry, h = one(carry, xs[0])
        return carry, h[None]
    return lax.scan(one, carry, xs)


# --- timing ---------------------------------------------------------------------------------------


def timed(name: str, cell: str, norm: Norm, mode: str, params: Params, xs: jax.Array, g: jax.Array) -> Contender:
    """An unrolled cell as a contender. `none` and the window compute something else than layer norm."""
    carry = start(cell, xs.shape[1], g.shape[-1])

    def forward(params, xs, carry):
        return {"h": unroll(cell, norm, params, xs, carry)[1]}

    def both(params, xs, carry, g):
        h, pull = jax.vjp(lambda params, xs: unroll(cell, norm, params, xs, carry)[1], params, xs)
        dparams, dxs = pull(g)
        return {"h": h, "xs": dxs, **{k: dparams[k] for k in "WUb"}, "norms": dparams["norms"]}

    def read(out):
        places = {f"{place} {k}": v for place, p in out.get("norms", {}).items() for k, v in p.items()}
        return {k: v for k, v in out.items() if k != "norms"} | places

    args = (params, xs, carry) if mode == FORWARD else (params, xs, carry, g)
    other = name not in (PEER, "normjax token")
    return Contender(name, forward if mode == FORWARD else both, args, read, other=other)


def cases(options: Options) -> Iterator[Case]:
    """For each cell, length and mode all norms."""
    batch, hidden, window = (3, 12, 6) if options.smoke else (128, 650, 60)
    for cell in options.cells:
        params = cell_params(cell, hidden, hidden)
        for steps in options.steps:
            xs, g = (harness.normal((steps, batch, hidden), jnp.float32, seed) for seed in (0, 1))
            for mode in options.modes:
                some = [timed(name, cell, norm, mode, params, xs, g) for name, norm in norms(window).items()]
                yield Case(cell, mode, xs, some, PEER, tolerance=1e-3)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables; returns what is written as JSON."""
    options = results.start(Options, argv, __file__, __doc__)
    rows = [r for r in harness.compare(cases(options), options) if r.contender != "copy"]
    microseconds = ("microseconds a step", lambda r: f"{1e6 * r.seconds / r.shape[0]:.0f}")
    text = results.tables(rows, ["ratio", microseconds, "megabytes"])
    return results.finish(results.Result(rows, text, results.plot(rows, "ratio")), options, argv, __file__)


if __name__ == "__main__":
    main()
