"""What a batch is made of: leaves with the examples along their first axis, and leaves that all examples share."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from normjax._paths import PyTree, path_name

Batch: TypeAlias = PyTree  # arrays with the examples along their first axis, and what the examples share
Tree = TypeVar("Tree")


class Shared(NamedTuple):
    """Marks a part of a batch that all its examples share: `{"x": x, "class_weights": Shared(w)}`.

    Micro-batches, the batches of `epoch` and the devices of a mesh take their examples of every other array, and this as
    it is; the loss gets it unwrapped. Scalars need no mark.

    Attributes:
      value: an array of any shape, or a pytree of them.

    >>> from flax import linen as nn
    >>> import optax
    >>> def loss(call, batch, train):
    ...     return jnp.mean(call(batch["x"]) @ batch["w"]), {}
    >>> model, batch = nn.Dense(3), {"x": jnp.ones((4, 2)), "w": Shared(jnp.ones((3, 1)))}
    >>> from normjax.train import linen_init, linen_step
    >>> state = linen_init(model, optax.sgd(0.1), jax.random.key(0), batch["x"])
    >>> linen_step(model, loss, optax.sgd(0.1), micro_batches=2)(state, batch)[0].params["bias"]
    Array([-0.1, -0.1, -0.1], dtype=float32)
    """

    value: PyTree


def is_shared(leaf: object) -> bool:
    """Whether a leaf of a batch has no examples: what is marked, and scalars."""
    return isinstance(leaf, Shared) or not getattr(leaf, "shape", ())


def _marked(leaf: object) -> bool:
    return isinstance(leaf, Shared)


def map_examples(do: Callable[..., PyTree], batch: Tree, share: Callable[..., PyTree] = lambda leaf: leaf) -> Tree:
    """The batch with a function applied to every leaf that has examples, and `share` to those that have none."""
    return jax.tree.map(lambda a: share(a) if is_shared(a) else do(a), batch, is_leaf=_marked)


def examples(batch: Batch) -> dict[str, PyTree]:
    """The leaves with examples by path."""
    leaves = jax.tree_util.tree_leaves_with_path(batch, is_leaf=_marked)
    return {path_name(path): leaf for path, leaf in leaves if not is_shared(leaf)}


def bare_batch(batch: Batch) -> Batch:
    """The batch as a loss takes it: without marks."""
    return jax.tree.map(lambda leaf: leaf.value if _marked(leaf) else leaf, batch, is_leaf=_marked)


def split(batch: Batch, parts: int) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Batch]]:
    """The leaves with examples `[n ...]` as `[parts n/parts ...]`, and what makes the batch of a part of each of them."""
    leaves, structure = jax.tree.flatten(batch, is_leaf=_marked)
    found = examples(batch)
    if not found:
        raise ValueError("a batch of micro-batches has arrays with examples along their first axis; found none")
    lengths = {name: a.shape[0] for name, a in found.items()}
    # The examples are those of most leaves: what differs is named.
    usual = max(lengths.values(), key=list(lengths.values()).count)
    for name, length in lengths.items():
        if length != usual:
            other = next(n for n, found in lengths.items() if found == usual)
            raise ValueError(
                f"leaf {name!r} of the batch has {length} along its first axis, where the examples lie, and leaf "
                f"{other!r} has {usual}: give what all micro-batches share as `train.Shared`"
            )
    if usual % parts:
        raise ValueError(f"a batch of {usual} examples does not split into {parts} equal micro-batches")

    def one(a: jax.Array) -> jax.Array:
        # Strided: each device keeps its own examples, where contiguous parts would lie on some of the devices.
        return a.reshape(usual // parts, parts, *a.shape[1:]).swapaxes(0, 1)

    def join(part: list[jax.Array]) -> Batch:
        taken = iter(part)
        return structure.unflatten(leaf if is_shared(leaf) else next(taken) for leaf in leaves)

    return [one(a) for a in found.values()], join


def in_order(parts: jax.Array) -> jax.Array:
    """An array `[parts n/parts ...]` of examples as `[n ...]`, in the order of the batch that `split` took apart."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def is_known(a: ArrayLike) -> bool:
    """Whether the values of an array can be looked at: outside of jit and its kin."""
    return not isinstance(a, Tracer)


def shortest(data: Batch) -> int | None:
    """The number of examples of a data set, those that all its leaves have; None where no leaf has examples."""
    return min((a.shape[0] for a in examples(data).values()), default=None)


def check_order(order: ArrayLike, data: Batch) -> None:
    """Raises ValueError where indices `[steps, batch]` are none, or, as far as they are known, lie beyond the data."""
    shape, dtype = jnp.shape(order), jnp.result_type(order)
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"order holds integer indices of shape [steps, batch]; found {dtype} of shape {shape}")
    size = shortest(data)
    if size is None or not is_known(order) or not math.prod(shape):
        return
    low, high = int(jnp.min(jnp.asarray(order))), int(jnp.max(jnp.asarray(order)))
    if low < -size or high >= size:
        raise ValueError(f"order holds indices of the {size} examples, 0 to {size - 1}; found {low} to {high}")
