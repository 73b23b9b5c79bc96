"""The recurrent language models of Ren et al. 2017: embedding, normalized recurrent layers, softmax.

Source: Ren et al. 2017, section 5.2 (two layers of 200 units); Zaremba et al. 2014 (the set-up that it takes over).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from normjax import recurrent
from normjax.linen import RNN, LSTMCell, SimpleCell
from normjax.train import State


class LanguageModel(nn.Module):
    """Embedding, recurrent layers and a softmax layer; the states stay in the collection `carry` from call to call."""

    row: str
    cell: str
    dialect: str
    vocabulary: int
    hidden: int
    layers: int
    unrolled: int
    max_steps: int  # how many steps have statistics of their own

    @nn.compact
    def __call__(self, tokens: jax.Array, first: jax.Array, train: bool) -> jax.Array:
        """Predicts the token after each.

        Args:
          tokens: int32 [n, t], of n streams.
          first: bool scalar, whether the text begins here: the states are then zero.
          train: whether bn rows normalize with the batch's statistics.

        Returns:
          Logits, [t, n, vocabulary].
        """
        uniform = recurrent.symmetric_uniform(0.1)
        x = nn.Embed(self.vocabulary, self.hidden, embedding_init=uniform, name="embedding")(tokens.T)
        make: Any = LSTMCell if self.cell == "lstm" else SimpleCell
        arguments = recurrent.ren2017(self.row, self.cell, self.dialect, self.max_steps)
        # RNN has the mean of the penalties over the steps; this is their sum.
        arguments["l1"] = self.unrolled * arguments.get("l1", 0.0)
        for k in range(self.layers):
            cell = make(self.hidden, use_running_average=not train, parent=None, **arguments)
            # Statistics count the steps of a segment, so each has a new clock.
            zeros, clock = recurrent.unpack(cell.initialize_carry(jax.random.key(0), x.shape[1:]))
            kept = self.variable("carry", f"state_{k}", lambda zeros=zeros: zeros)
            states = jax.tree.map(lambda a: jnp.where(first, 0, a), tuple(kept.value))
            # Four steps a turn of the loop: 54 ms a training step of the LSTM on two cores, where one a turn takes 57.
            layer = RNN(cell, time_major=True, return_carry=True, unroll=4 if train else 1, name=f"layer_{k}")
            last, x = layer(x, initial_carry=recurrent.pack(states, clock))
            kept.value = recurrent.unpack(last)[0]
        flat = x.reshape(-1, self.hidden)
        return nn.Dense(self.vocabulary, kernel_init=uniform, name="softmax")(flat).reshape(*x.shape[:2], -1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Minus the log probability of each label, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def mean_nats(model: LanguageModel, state: State, part: Mapping[str, Any]) -> jax.Array:
    """The mean cross-entropy of all predictions of a text, whose segments follow each other with the state carried on."""
    streams = part["tokens"].shape[1]
    held = jax.tree.map(lambda a: jnp.zeros((streams, *a.shape[1:]), a.dtype), state.stats["carry"])

    def one(held: Any, segment: Mapping[str, jax.Array]):
        tokens, labels = segment["tokens"][:, :-1], segment["tokens"][:, 1:].T
        variables = {"params": state.params, **state.stats, "carry": held}
        logits, changed = model.apply(variables, tokens, segment["first"], train=False, mutable=["carry"])
        real = labels >= 0
        nats = jnp.where(real, cross_entropy(logits, jnp.maximum(labels, 0)), 0)  # type: ignore[arg-type]
        return changed["carry"], (nats.sum(), real.sum())

    _, (nats, count) = jax.lax.scan(one, held, part)
    return nats.sum() / count.sum().astype(nats.dtype)
