"""Training loops of the experiments: a chunk of steps as one scan over data on the device, against a plain Flax loop.

    python -m benchmarks.loops --out docs/speed

The plain loop is what a Flax user writes: batches from host NumPy, one jitted step at a time, layers of flax.linen,
metrics fetched at every step. Ours is what `experiments` run: the network of `experiments/networks` and
`normjax.train.epoch`. Both start from the same weights and take the same batches, and must give the same losses. A turn is
a chunk of steps from that start; shown are seconds a step.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax.train
from benchmarks import harness, results
from benchmarks.harness import Row
from experiments.networks.cnn import ren2017
from experiments.networks.language import LanguageModel, cross_entropy
from normjax import Normalizer

PEER, OURS = "flax loop", "normjax"
LOOP = "training loop"
# How many times as fast as the plain loop.
FASTER: results.Shown = ("steps a second, as a multiple of the {peer}'s", lambda r: f"{1 / r.ratio:.2f}")


class Pair(NamedTuple):
    """One model trained in two ways; both return the losses of a chunk of steps.

    Attributes:
      batch: one batch of inputs, for its shape and dtype.
      steps: in a chunk.
      plain: the Flax loop.
      ours: the scan.
    """

    batch: np.ndarray
    steps: int
    plain: Callable[[], np.ndarray]
    ours: Callable[[], np.ndarray]


# --- the CNN --------------------------------------------------------------------------------------


class FlaxCNN(nn.Module):
    """`cnn.ren2017` with batch norm, of Flax's own layers."""

    channels: Sequence[int]
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of images [n, h, w, c]."""
        for k, c in enumerate(self.channels):
            x = nn.Conv(c, (5, 5))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-4)(x))
            if k == 0:
                x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            else:
                x = nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)
        x = x.reshape((len(x), -1))
        x = nn.Dense(self.hidden)(x)
        return nn.Dense(10)(x)


def cnn(smoke: bool) -> Pair:
    """Row bn of `experiments.cifar`: batches of 100 images of 32x32."""
    n, size, channels, steps = (4, 8, (4, 4, 8), 2) if smoke else (100, 32, (32, 32, 64), 10)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20 * n, size, size, 3), np.uint8)
    labels = random.integers(0, 10, len(images)).astype(np.int32)
    order = random.permutation(len(images))[: steps * n].reshape(steps, n).astype(np.int32)
    mean, tx = images.mean(axis=0, dtype=np.float32), optax.sgd(1e-3, momentum=0.9)

    batch_norm = Normalizer("n ...", "n ...", eps=1e-4)
    model = ren2017((batch_norm,) * len(channels), channels=channels, hidden=64)

    def loss(call, batch, train):
        logits = call(batch["image"].astype(jnp.float32) - mean[None], train=train)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}

    start = normjax.train.linen_init(model, tx, jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False)
    epoch = jax.jit(normjax.train.epoch(normjax.train.linen_step(model, loss, tx)))
    data = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}

    def ours() -> np.ndarray:
        return np.asarray(epoch(start, data, order)[1]["loss"])

    flax_model = FlaxCNN(channels, 64)
    names = {"convs": "Conv", "norms": "BatchNorm", "dense": "Dense"}

    def renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{names[kind]}_{k}": tree[f"{kind}_{k}"] for kind, _, k in (name.partition("_") for name in tree)}

    @jax.jit
    def step(params, stats, optimizer, image, label):
        def objective(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = flax_model.apply(variables, image, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new["batch_stats"]

        (value, new), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer = tx.update(gradient, optimizer, params)
        return optax.apply_updates(params, updates), new, optimizer, value

    params, stats = renamed(start.params), renamed(start.stats["batch_stats"])

    def plain() -> np.ndarray:
        state, losses = (params, stats, tx.init(params)), []
        for rows in order:
            *state, value = step(*state, images[rows].astype(np.float32) - mean, labels[rows])
            losses.append(float(value))
        return np.array(losses)

    return Pair(images[:n], steps, plain, ours)


# --- the language model ---------------------------------------------------------------------------


class FlaxLanguageModel(nn.Module):
    """`language.LanguageModel` of row base, of Flax's own layers."""

    vocabulary: int
    hidden: int

    @nn.compact
    def __call__(self, tokens: jax.Array, carries: Sequence[Any]) -> tuple[jax.Array, list[Any]]:
        """Logits [n, t, vocabulary] of tokens [n, t], and the last carry of each layer."""
        x = nn.Embed(self.vocabulary, self.hidden, name="embedding")(tokens)
        last = []
        for k, carry in enumerate(carries):
            cell = nn.OptimizedLSTMCell(self.hidden, parent=None)
            carry, x = nn.RNN(cell, return_carry=True, name=f"layer_{k}")(x, initial_carry=carry)
            last.append(carry)
        return nn.Dense(self.vocabulary, name="softmax")(x), last


def lstm(smoke: bool) -> Pair:
    """Row base of `experiments.language`: 20 steps of 20 streams of words."""
    n, t, vocabulary, hidden, steps = (4, 5, 50, 8, 2) if smoke else (20, 20, 10_000, 200, 10)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (steps, n, t + 1)).astype(np.int32)
    model = LanguageModel("base", "lstm", "code", vocabulary, hidden, layers=2, unrolled=t, max_steps=t)
    tx = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(1.0))

    def loss(call, batch, train):
        logits = call(batch["tokens"][0, :, :-1], batch["first"][0], train=train)
        return t * cross_entropy(logits, batch["tokens"][0, :, 1:].T).mean(), {}

    begin = normjax.train.linen_init(model, tx, jax.random.key(0), jnp.asarray(tokens[0, :, :-1]), True, train=True)
    epoch = jax.jit(normjax.train.epoch(normjax.train.linen_step(model, loss, tx)))
    data = {"tokens": jnp.asarray(tokens), "first": jnp.arange(steps) == 0}
    order = np.arange(steps, dtype=np.int32)[:, None]

    def ours() -> np.ndarray:
        return np.asarray(epoch(begin, data, order)[1]["loss"])

    flax_model = FlaxLanguageModel(vocabulary, hidden)

    @jax.jit
    def step(params, optimizer, carries, batch):
        def objective(params):
            logits, last = flax_model.apply({"params": params}, batch[:, :-1], carries)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
            return t * nats.mean(), last

        (value, last), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer = tx.update(gradient, optimizer, params)
        return optax.apply_updates(params, updates), optimizer, last, value

    zeros = [(jnp.zeros((n, hidden)),) * 2] * 2

    def plain() -> np.ndarray:
        state, losses = (begin.params, tx.init(begin.params), zeros), []
        for batch in tokens:
            *state, value = step(*state, batch)
            losses.append(float(value))
        return np.array(losses)

    return Pair(tokens[0, :, :-1], steps, plain, ours)


MODELS: dict[str, Callable[[bool], Pair]] = {"CIFAR CNN, batch norm": cnn, "Treebank LSTM": lstm}


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options(harness.Options):
    """What is timed.

    Attributes:
      models: which.
      rounds: turns that both take.
    """

    models: tuple[str, ...] = tuple(MODELS)
    rounds: int = 10


def measure(name: str, pair: Pair, rounds: int) -> Iterator[Row]:
    """Both ways in interleaved rounds, after a first turn each whose losses must agree."""
    runs = {PEER: pair.plain, OURS: pair.ours}
    losses = {way: {"loss": run()} for way, run in runs.items()}
    error = harness.disagreement(losses[OURS], losses[PEER])["loss"]
    assert error < 1e-3, f"{name}: losses differ by {error:.1e}"
    for run in runs.values():
        run()
    seconds = {way: [] for way in runs}
    for turn in range(rounds):
        for way in sorted(runs, reverse=bool(turn % 2)):
            start = time.perf_counter()
            runs[way]()
            seconds[way].append((time.perf_counter() - start) / pair.steps)
    peer = float(np.median(seconds[PEER]))
    for way, each in seconds.items():
        low, median, high = (float(np.quantile(each, q)) for q in (0.25, 0.5, 0.75))
        yield Row(
            name, way, LOOP, str(pair.batch.dtype), pair.batch.shape, rounds, median, low, high, None, median / peer, PEER,
            None, None, error if way == OURS else 0.0,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables; returns what is written as JSON."""
    options = results.start(Options, argv, __file__, __doc__)
    rounds = 2 if options.smoke else options.rounds
    rows = [row for name in options.models for row in measure(name, MODELS[name](options.smoke), rounds)]
    text = results.tables(rows, (FASTER, "milliseconds"))
    return results.finish(results.Result(rows, text, results.plot(rows, "ratio")), options, argv, __file__)


if __name__ == "__main__":
    main()
