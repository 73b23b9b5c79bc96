"""Classifiers: loss and accuracy of a linen model, what images go through before it, the units of its first layer."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from matplotlib.figure import Figure

import normjax.train
from experiments.common import data, loop, pictures, place, runs
from normjax.train import State

Array = TypeVar("Array", np.ndarray, jax.Array)
Inputs = Callable[[loop.Batch], jax.Array]


class Classifier(NamedTuple):
    """A model and its optimizer as functions of one seed; batches have labels under "label".

    Attributes:
      init: makes the state from a key.
      step: one training step; metrics: loss, penalty, accuracy.
      judge: loss and accuracy of a batch.
      preactivation: the first layer's output before normalization, [n, ..., units], of a batch.
    """

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, loop.Metrics]]
    judge: Callable[[State, loop.Batch], loop.Metrics]
    preactivation: Callable[[State, loop.Batch], jax.Array]


def classifier(
    model: nn.Module,
    tx: optax.GradientTransformation,
    shape: Sequence[int],
    inputs: Inputs,
    mesh: Mesh | None = None,
    **step: Any,
) -> Classifier:
    """A linen model trained on the cross-entropy of its logits.

    Args:
      model: called as model(x, train=...), with a method `preactivation`.
      tx: the optimizer.
      shape: of one example, as the model takes it.
      inputs: what the model takes of a batch.
      mesh: the devices that each batch is spread over.
      **step: other arguments of `normjax.train.linen_step`.
    """

    def loss(call: Callable[..., jax.Array], batch: loop.Batch, train: bool) -> tuple[jax.Array, loop.Metrics]:
        logits = call(inputs(batch), train=train)
        label = batch["label"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return cross_entropy.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == label)}

    def init(key: jax.Array) -> State:
        return normjax.train.linen_init(model, tx, key, jnp.zeros((1, *shape)), train=False)

    def preactivation(state: State, batch: loop.Batch) -> Any:
        return model.apply({"params": state.params, **state.stats}, inputs(batch), method="preactivation")

    advance = normjax.train.linen_step(model, loss, tx, mesh=mesh, **step)
    return Classifier(init, advance, normjax.train.linen_eval(model, loss, mesh=mesh), preactivation)


# --- what networks are given ----------------------------------------------------------------------


@functools.cache
def pixel_moments(dataset: data.Dataset) -> tuple[float, float]:
    """Mean and standard deviation of the pixels of all training images, those of the other processes too."""
    blocks = np.array_split(dataset.train["image"], 100)  # all pixels as integers would fill the memory
    counts = place.total(np.sum([np.bincount(block.ravel(), minlength=256) for block in blocks], axis=0))
    values = np.arange(256)
    mean = float(np.average(values, weights=counts))
    return mean, float(np.average((values - mean) ** 2, weights=counts) ** 0.5)


@functools.cache
def mean_image(dataset: data.Dataset) -> np.ndarray:
    """The mean over all images, of training and test together as published, float32 [h, w, c]."""
    splits = (dataset.train["image"], dataset.test["image"])
    total = np.sum([split.sum(axis=0, dtype=np.int64) for split in splits], axis=0)
    return (total / sum(map(len, splits))).astype(np.float32)


def augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Shifts each image [n, h, w, c] by up to 4 pixels along both axes, zeros coming in, and mirrors half of them."""
    n, h, w, c = image.shape
    shift, mirror = jax.random.split(key)
    corners = jax.random.randint(shift, (n, 2), 0, 9)
    padded = jnp.pad(image, ((0, 0), (4, 4), (4, 4), (0, 0)))

    def crop(one: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(one, (corner[0], corner[1], 0), (h, w, c))

    flipped = jax.random.bernoulli(mirror, shape=(n, 1, 1, 1))
    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


def kernels(params: Any) -> Any:
    """Which parameters decay: the kernels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


# --- what is shown --------------------------------------------------------------------------------


def say(evaluation: Mapping[str, np.ndarray]) -> str:
    """What the bar shows."""
    return f"held-out accuracy {evaluation['accuracy'].mean():.1%}"


def first(split: Mapping[str, Array], examples: int | None) -> dict[str, Array]:
    """The first examples of a split or a batch; all for None."""
    return {name: column[:examples] for name, column in split.items()}


def stars(rows: Sequence[str]) -> dict[str, str]:
    """Each starred row (smoothed and penalized, as in Ren et al. 2017), with its plain one.

    >>> stars(["bn", "bn*", "base"])
    {'bn*': 'bn'}
    """
    return {name: name[:-1] for name in rows if name.endswith("*") and name[:-1] in rows}


def histograms(
    folder: Path, rows: Sequence[str], of: Callable[[str], Classifier], batch: Mapping[str, np.ndarray]
) -> dict[str, Figure]:
    """The picture "histograms" of two units without and with a star, if any such pair is among the rows.

    Shown are the first-layer pre-activations of seed 0, from its checkpoint, on one batch.
    """

    def layer(name: str) -> np.ndarray:
        model = of(name)
        state = loop.trained(runs.seed_folders(folder, name, 1)[0], model.init)
        z = np.asarray(jax.jit(model.preactivation)(state, jax.tree.map(jnp.asarray, dict(batch))))
        return z.reshape(-1, z.shape[-1])

    pairs = stars(rows)
    if not pairs:
        return {}
    z = {name: layer(name) for pair in pairs.items() for name in pair}
    return {"histograms": pictures.draw_histograms(pairs, z)}
