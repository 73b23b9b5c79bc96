"""Whole training steps (gradient and optax update): the same model with Flax's layers and with normjax's.

    python -m benchmarks.steps --out DIR

  CIFAR CNN    Ren et al. 2017: three 5 x 5 convolutions (32, 32, 64), each with norm, ReLU and pooling; batch 100;
               momentum SGD. Batch norm and group norm (of 8), and divisive norm, which Flax lacks.
  PTB LSTM     Ren et al. 2017: 2 layers of 200, vocabulary 10,000, 20 steps, batch 20; SGD, clipped. Layer norm on W x,
               U h and the cell; divisive norm over 30 units.
  stack        12 layers of x + relu(LayerNorm(x)), [16, 512, 768].

Each table has one line for a model, and a column for the layer that it has.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax.linen
from benchmarks import harness, recurrent, results
from benchmarks.harness import STEP, Case, Contender

PEER, OURS = "flax", "normjax"
MODELS = ("CIFAR CNN, batch norm", "CIFAR CNN, group norm", "PTB LSTM, layer norm", "stack, layer norm")


@dataclass(frozen=True)
class Options(harness.Options):
    """What is timed.

    Attributes:
      models: which.
    """

    models: tuple[str, ...] = MODELS


# --- models ---------------------------------------------------------------------------------------


class CNN(nn.Module):
    """The network of Ren et al. 2017 for CIFAR-10; `norm()` makes a layer, None leaves it out."""

    norm: Callable[[], nn.Module] | None
    channels: tuple[int, ...] = (32, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [n, 10] of images [n, h, w, 3]."""
        for k, c in enumerate(self.channels):
            x = nn.Conv(c, (5, 5))(x)
            x = nn.relu(x if self.norm is None else self.norm()(x))  # pyright: ignore[reportCallIssue]
            x = (nn.max_pool if k == 0 else nn.avg_pool)(x, (3, 3), (2, 2), "SAME")
        return nn.Dense(10)(nn.Dense(64)(x.reshape(len(x), -1)))


class Stack(nn.Module):
    """Layers of x + relu(norm(x)); the mean square of the last is the loss."""

    norm: Callable[[], nn.Module]
    layers: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """A scalar."""
        for _ in range(self.layers):
            x = x + nn.relu(self.norm()(x))  # pyright: ignore[reportCallIssue]
        return jnp.mean(jnp.square(x))


def lstm_loss(norm: recurrent.Norm, params: Any, words: jax.Array) -> jax.Array:
    """Sum over the steps of the mean cross entropy; words are [t + 1, batch]. Layers as in `recurrent`."""
    x = params["embedding"][words[:-1]]
    for layer in params["layers"]:
        carry = recurrent.start("LSTM", x.shape[1], layer["b"].shape[-1])
        _, x = recurrent.unroll("LSTM", norm, layer, x, carry)
    logits = x @ params["out"] + params["bias"].reshape(1, 1, -1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, words[1:]).mean(axis=1).sum()


# --- contenders -----------------------------------------------------------------------------------


def timed(
    name: str, loss: Callable, tx: optax.GradientTransformation, params: Any, stats: Any, batch: Any, other: bool
):
    """A training step as a contender: (params, stats, optimizer state, batch) to all new ones and the loss."""

    def step(params, stats, optimizer, batch):
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats, batch)
        update, optimizer = tx.update(gradient, optimizer, params)
        return (
            optax.apply_updates(params, update),
            stats,
            optimizer,
            {"loss": value, "gradient": optax.tree.norm(gradient)},
        )

    return Contender(name, step, (params, stats, tx.init(params), batch), lambda out: out[-1], other=other)


def flax_model(name: str, model: nn.Module, tx: Any, batch: Any, of_logits: bool, other: bool) -> Contender:
    """A linen model as a contender; its input is batch[0], its labels batch[1]."""
    variables = jax.eval_shape(model.init, jax.random.key(0), batch[0])
    # The same start for all contenders, whatever their layers ask of the random numbers.
    params = jax.tree.map_with_path(_fill, variables.get("params", {}))
    stats = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables.get("batch_stats", {}))

    def loss(params, stats, batch):
        out, new = model.apply({"params": params, "batch_stats": stats}, batch[0], mutable=["batch_stats"])
        if of_logits:
            out = optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()
        return out, new.get("batch_stats", {})

    return timed(name, loss, tx, params, stats, batch, other)


def _fill(path: Any, s: jax.ShapeDtypeStruct) -> jax.Array:
    """Kernels of a size that keeps activations at theirs; scales 1, biases 0."""
    if s.ndim < 2:
        return jnp.full(s.shape, float(path[-1].key == "scale"), s.dtype)
    return jnp.asarray(np.random.default_rng(0).normal(0, np.prod(s.shape[:-1]) ** -0.5, s.shape), s.dtype)


def cnn(norm: str, smoke: bool) -> tuple[jax.Array, list[Contender]]:
    """Contenders of the CIFAR CNN, and its images."""
    n, size, channels = (2, 8, (8, 8, 16)) if smoke else (100, 32, (32, 32, 64))
    x = harness.normal((n, size, size, 3), jnp.float32)
    batch, tx = (x, jnp.arange(n) % 10), optax.sgd(1e-3, momentum=0.9)

    def layer(library):
        if norm == "batch norm":
            return lambda: library.BatchNorm(use_running_average=False, momentum=0.9)
        return lambda: library.GroupNorm(8)

    layers = {OURS: layer(normjax.linen), PEER: layer(nn), "normjax divisive": lambda: normjax.linen.DivisiveNorm(5),
              "none": None}  # fmt: skip
    return x, [flax_model(k, CNN(v, channels), tx, batch, True, k not in (OURS, PEER)) for k, v in layers.items()]


def lstm(smoke: bool) -> tuple[jax.Array, list[Contender]]:
    """Contenders of the PTB LSTM, and its embedded words."""
    hidden, vocabulary, steps, n, window = (8, 50, 3, 2, 4) if smoke else (200, 10_000, 20, 20, 30)
    random = np.random.default_rng(0)

    def uniform(*shape):
        return jnp.asarray(random.uniform(-0.1, 0.1, shape), jnp.float32)

    params = {
        "embedding": uniform(vocabulary, hidden),
        "layers": [recurrent.cell_params("LSTM", hidden, hidden, seed) for seed in range(2)],
        "out": uniform(hidden, vocabulary),
        "bias": jnp.zeros(vocabulary),
    }
    words = jnp.asarray(random.integers(0, vocabulary, (steps + 1, n)), jnp.int32)
    tx = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(1.0))
    some = []
    for name, norm in recurrent.norms(window).items():
        short = {"normjax token": OURS, recurrent.PEER: PEER, f"normjax c:{window}": "normjax divisive"}.get(name, name)

        def loss(params, stats, batch, norm=norm):
            return lstm_loss(norm, params, batch), stats

        some.append(timed(short, loss, tx, params, {}, words, short not in (OURS, PEER)))
    return params["embedding"][words[:-1]], some


def stack(smoke: bool) -> tuple[jax.Array, list[Contender]]:
    """Contenders of the stack, and its input."""
    x, layers = harness.normal((2, 4, 16) if smoke else (16, 512, 768), jnp.float32), 2 if smoke else 12
    kinds = {OURS: normjax.linen.LayerNorm, PEER: nn.LayerNorm}
    return x, [flax_model(k, Stack(v, layers), optax.sgd(1e-3), (x, None), False, False) for k, v in kinds.items()]


def cases(options: Options) -> Iterator[Case]:
    """A case for each model."""
    for model in options.models:
        kind, _, norm = model.partition(", ")
        make = {"CIFAR CNN": lambda s, norm=norm: cnn(norm, s), "PTB LSTM": lstm, "stack": stack}[kind]
        x, some = make(options.smoke)
        yield Case(model, STEP, x, some, PEER, tolerance=1e-3)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables; returns what is written as JSON."""
    options = results.start(Options, argv, __file__, __doc__)
    rows = [r for r in harness.compare(cases(options), options) if r.contender != "copy"]
    text = results.tables(rows, ("ratio", "milliseconds", "megabytes"))
    return results.finish(results.Result(rows, text, results.plot(rows, "ratio")), options, argv, __file__)


if __name__ == "__main__":
    main()
