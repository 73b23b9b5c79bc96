"""Our layers in the place of Flax's in a linen model that somebody else wrote."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn
from flax.linen.module import InterceptorContext, run_interceptors

from normjax.linen import flax_names, weights


def _call(cls: type[nn.Module]) -> Callable[..., Any]:
    """The call of a layer as it was written, which Flax's modules wrap."""
    return vars(cls)["__call__"].__wrapped__


OURS: dict[Callable[..., Any], Callable[..., Any]] = {
    _call(vars(nn)[name]): _call(vars(room)[name])
    for room, names in (
        (flax_names, ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")),
        (weights, ("SpectralNorm", "WeightNorm")),
    )
    for name in names
}


@contextlib.contextmanager
def swap_layers() -> Iterator[None]:
    """Within, Flax's normalization layers compute as ours, in any linen model: variables and checkpoints stay what they are.

    The layers are `BatchNorm`, `GroupNorm`, `InstanceNorm`, `LayerNorm`, `RMSNorm`, `SpectralNorm` and `WeightNorm`,
    wherever the model has them: as defaults of its arguments, in subclasses whose call is Flax's or asks it by `super()`,
    under lifted transformations. It is also a decorator: `swap_layers()(f)` is f, within.

    What it does is `nn.intercept_methods`, so it holds for the thread that enters it, and while a function is traced:
    decorate what is given to `jax.jit`, as below; a function that was compiled before stays as it is. Other interceptors,
    such as those of `normjax.train`, see our calls; those that were entered earlier see Flax's as well.

    >>> from flax import linen as nn
    >>> model, x = nn.Sequential([nn.Dense(4), nn.LayerNorm()]), jnp.ones((2, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> jax.jit(swap_layers()(model.apply))(variables, x).shape
    (2, 4)
    """

    def ours(following: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        asked: Any = context.orig_method  # a partial of the method as it was written
        mine = OURS.get(asked.func)
        # Not `mine` itself: interceptors that were entered later, as a training step does, would not see the call.
        return following(*args, **kwargs) if mine is None else run_interceptors(mine, context.module, *args, **kwargs)

    with nn.intercept_methods(ours):
        yield
