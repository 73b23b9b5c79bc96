"""Flax nnx modules with normalized kernels: Flax's own, with parameters and state around `_layers/weights.py`.

`WeightNorm` and `SpectralNorm` have the arguments, attributes and shapes of Flax's. What differs: the scales are
`nnx.Param`s, so an optimizer sees them; the layer's own parameters are never overwritten, so a model may be called inside of
any transformation that closes over it; only parameters are normalized, and norms are float32 or wider.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PathParts
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike, DTypeLike

from normjax._layers import weights
from normjax._layers.describe import Initializer, ones
from normjax._leaves import as_python
from normjax.nnx.host import NO_METADATA, Metadata
from normjax.reparametrize import Weight
from normjax.weights import weight_norm


def _with_params(module: nnx.Module, change: Callable[[PathParts, nnx.Variable], jax.Array | None]) -> Any:
    """A twin of the module with other parameters: `change(path, variable)`, None to keep one.

    The twin shares all other variables, so that statistics, random counts and captures land where they belong.
    """
    structure, params, rest = nnx.split(module, nnx.Param, ...)
    flat = ((path, variable, change(path, variable)) for path, variable in nnx.to_flat_state(params))
    new = [(path, variable if value is None else variable.replace(value)) for path, variable, value in flat]
    return nnx.merge(structure, nnx.from_flat_state(new), rest)


class Host(weights.Reparametrized, nnx.Module):
    """Flax's side of `Linear` and `Conv`: the scale, the bound, and the twin that has the kernel of the product."""

    kernel: nnx.Param[jax.Array]
    param_dtype: DTypeLike

    def _make(self, rngs: nnx.Rngs, metadata: Metadata, **options: Weight | bool | str | None) -> None:
        """Adds what is learned and stored beside Flax's."""
        for name, value in options.items():
            setattr(self, name, value)
        kernel = self.kernel[...]
        self.rho = nnx.BatchStat(self._first_bound(kernel)) if self._needs_bound() else nnx.data(None)
        self.scale = nnx.data(None)
        if self.use_scale:
            key = None if self.scale_init is None else rngs.params()
            self.scale = nnx.Param(self._first_scale(key, kernel, self.param_dtype), **metadata)

    def _product(self) -> Any:
        """The twin whose kernel enters the product."""
        scale, rho = (None if variable is None else variable[...] for variable in (self.scale, self.rho))
        kernel = self._entering(self.kernel[...], scale, rho)
        return _with_params(self, lambda path, variable: kernel if path == ("kernel",) else None)


class Linear(weights.Dense, Host, nnx.Linear):  # noqa: D101
    __doc__ = weights.Dense.__doc__

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Weight = weight_norm,
        use_scale: bool = True,
        scale_init: Initializer | None = ones,
        bound: str = "rms",
        scale_metadata: Metadata = NO_METADATA,
        rngs: nnx.Rngs,
        **flax: Any,
    ):
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **flax)
        self._make(rngs, scale_metadata, weight=weight, use_scale=use_scale, scale_init=scale_init, bound=bound)

    def __call__(self, inputs: jax.Array, out_sharding: Sharding | PartitionSpec | None = None) -> jax.Array:
        """Multiplies inputs, `[... i]`, by the reparametrized kernel."""
        return nnx.Linear.__call__(self._product(), inputs, out_sharding)


class Conv(weights.Conv, Host, nnx.Conv):  # noqa: D101
    __doc__ = weights.Conv.__doc__

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        weight: Weight = weight_norm,
        use_scale: bool = True,
        scale_init: Initializer | None = ones,
        bound: str = "rms",
        scale_metadata: Metadata = NO_METADATA,
        rngs: nnx.Rngs,
        **flax: Any,
    ):
        window = as_python(kernel_size), as_python(strides)  # Flax asks whether they are integers of Python
        nnx.Conv.__init__(self, in_features, out_features, *window, rngs=rngs, **flax)
        self._make(rngs, scale_metadata, weight=weight, use_scale=use_scale, scale_init=scale_init, bound=bound)

    def __call__(self, inputs: jax.Array, out_sharding: Sharding | PartitionSpec | None = None) -> jax.Array:
        """Convolves inputs, `[n ... i]`, with the reparametrized kernel."""
        return nnx.Conv.__call__(self._product(), inputs, out_sharding)


class WeightNorm(nnx.WeightNorm):
    """Weight norm around a layer: arguments and numbers of `flax.nnx.WeightNorm`.

    Args:
      layer_instance: the layer.
      feature_axes: axes with a norm each; None gives each parameter one norm.
      use_scale: whether a scale is learned for each feature: `scales`, `nnx.Param`s by path.
      scale_init: its initializer.
      epsilon: added to the squared norm.
      dtype: of the normalized parameters.
      param_dtype: of the scales.
      variable_filter: which parameters are normalized, an nnx filter.
      promote_dtype: accepted and not used.
      rngs: random keys for the initializer.

    Source: Salimans & Kingma 2016, equation 2.

    >>> layer = WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    >>> layer(jnp.ones((2, 3))).shape, layer.scales[("kernel",)].shape
    ((2, 4), (4,))
    """

    if not TYPE_CHECKING:  # to a reader the constructor is Flax's; its scales are bare arrays, which nothing trains

        @functools.wraps(nnx.WeightNorm.__init__)
        def __init__(self, *args, use_scale=True, scale_init=ones, param_dtype=jnp.float32, rngs, **flax):
            given = {"scale_init": scale_init, "param_dtype": param_dtype, "rngs": rngs, **flax}
            super().__init__(*args, use_scale=False, **given)
            self.use_scale, scales = use_scale, {}
            for path, variable in nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param)):
                if use_scale and self.variable_filter(path, variable):
                    shape = weights.scale_shape(variable.shape, self.feature_axes)
                    scales[path] = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
            self.scales = nnx.data(scales if use_scale else None)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized."""

        def change(path: PathParts, variable: nnx.Variable) -> jax.Array | None:
            if not self.variable_filter(path, variable):
                return None
            scale = None if self.scales is None else self.scales[path][...]
            return weights.weight_normed(variable[...], scale, self.feature_axes, self.epsilon, self.dtype)

        return _with_params(self.layer_instance, change)(x, *args, **kwargs)


class SpectralNorm(nnx.SpectralNorm):
    """Spectral norm around a layer: arguments, variables and numbers of `flax.nnx.SpectralNorm`.

    Every parameter of two axes or more is divided by its largest singular value. The parameters themselves never change.

    Args:
      layer_instance: the layer.
      n_steps: power iterations of a call, from the stored u; with none nothing is normalized.
      epsilon: added to the squared norms of the iteration.
      dtype: of the normalized parameters.
      param_dtype: of u and sigma.
      error_on_non_matrix: refuse parameters of more than two axes, rather than flatten all but the last.
      update_stats: whether a call stores the new u and sigma; `.train()` and `.eval()` set it.
      rngs: random keys for u.

    Source: Miyato et al. 2018, algorithm 1.

    >>> layer = SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    >>> layer(jnp.ones((2, 3)), update_stats=False).shape, layer.batch_stats[("kernel", "u")].shape
    ((2, 4), (1, 4))
    """

    def __call__(self, x: ArrayLike, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized; `update_stats` stores the new u and sigma."""
        update = not self.use_running_average if update_stats is None else update_stats

        def change(path: PathParts, variable: nnx.Variable) -> jax.Array | None:
            if (*path, "u") not in self.batch_stats:
                return None
            u, sigma = (self.batch_stats[(*path, name)] for name in ("u", "sigma"))
            out = weights.spectral_normed(variable[...], u[...], sigma[...], self.n_steps, self.epsilon, self.dtype)
            if update:
                u[...], sigma[...] = out.u, out.sigma
            return out.kernel

        return _with_params(self.layer_instance, change)(x, **kwargs)
