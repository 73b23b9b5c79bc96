"""What a forward pass of a step asks of models of both libraries: what layers leave, and dtypes that stay.

What a layer leaves beside its output, a penalty or a record of the batch, travels in Flax's collections and captures. Out
of a branch or the body of a loop (`cond`, `switch`, `while_loop`, `scan`) nothing travels that was not there before, so
that JAX refuses the branch or the loop. A penalty is then started from zero; a record is not left.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from normjax._paths import PyTree, path_name

Result = TypeVar("Result")
PENALTY, RECORD = "penalty", "record"
Path = tuple[Hashable, ...]
Left = tuple[Path, str]  # the path of a layer, and what it leaves: PENALTY or RECORD


class Leaving(NamedTuple):
    """What layers do about what they leave."""

    silent: frozenset[Left] = frozenset()  # what is not left
    started: frozenset[Path] = frozenset()  # layers whose penalty starts from zero before they are called


def run_through_branches(run: Callable[[Leaving], Result], layers: Callable[[], frozenset[Left]]) -> Result:
    """The result of `run`, in which layers leave what they can get out of the branches and loops that they are called in.

    `layers()` is asked for what there may be left where `run` fails. ValueError if a penalty cannot get out.
    """
    try:
        return run(Leaving())
    except (TypeError, ValueError) as error:
        known = layers()
        if not known or not _traces(run, Leaving(known)):
            raise  # for another reason
        stuck = frozenset(one for one in known if not _traces(run, Leaving(known - {one})))
        started = frozenset(path for path, what in stuck if what == PENALTY)
        rest = Leaving(frozenset(one for one in stuck if one[1] == RECORD), started)
        if not stuck or not _traces(run, rest):
            names = ", ".join(sorted(repr("/".join(map(str, path))) for path in started or {path for path, _ in known}))
            raise ValueError(
                f"the L1 penalty of layer {names} cannot get out of the branch or the loop that the layer is called in: "
                "build it with l1=0, and add `normjax.penalty.l1_penalty` of what it returns to the loss"
            ) from error
    return run(rest)


def _traces(run: Callable[[Leaving], object], leaving: Leaving) -> bool:
    """Whether a pass can be traced so."""

    def traced() -> None:
        run(leaving)

    try:
        jax.eval_shape(traced)
    except (TypeError, ValueError):
        return False
    return True


def in_their_dtypes(before: PyTree, after: PyTree) -> PyTree:
    """What is stored after a step, each array in the dtype that it had before, so that a scan carries it.

    TypeError names an array that would lose more than digits, such as a real mean that became complex.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(before))

    def one(path: jax.tree_util.KeyPath, new: PyTree) -> PyTree:
        old, dtype = (getattr(leaf, "dtype", None) for leaf in (known.get(path), new))
        if old is None or dtype is None or old == dtype:
            return new
        for kind in (jnp.complexfloating, jnp.floating, jnp.integer):
            if jnp.issubdtype(old, kind) and (jnp.issubdtype(dtype, kind) or kind is jnp.complexfloating):
                return new.astype(old)
        raise TypeError(
            f"{path_name(path)} is {old} in the state and {dtype} after a step, but a training loop carries one dtype: cast "
            f"it to {dtype} once, before the first step"
        )

    return jax.tree_util.tree_map_with_path(one, after)
