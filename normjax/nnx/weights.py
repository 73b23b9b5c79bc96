"""Flax nnx modules with normalized kernels: parameters and state around `normjax/weights.py` and `spectral.py`.

`Linear` and `Conv` are Flax's with one more step: the kernel passes through a reparametrization on its way to the product.
`WeightNorm` and `SpectralNorm` wrap any layer, with the arguments, attributes and shapes of Flax's own. What differs there
is what is right here: the scales are `nnx.Param`s, so an optimizer sees them; the layer's own parameters are never
overwritten, in training or in evaluation, so a model may be called inside of any transformation that closes over it; only
parameters are normalized, and norms are float32 or wider.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jax.typing import ArrayLike

from normjax._expect.arrays import statistics_dtype
from normjax.layer import Axes
from normjax.reparametrize import Weight, by_number, initial_bound, matching_scale, takes_bound
from normjax.spectral import spectral_norm
from normjax.weights import weight_norm

Dtype = Any
Initializer = Any
Metadata = Mapping[str, Any]
_NO_METADATA: Metadata = MappingProxyType({})
_ONES = initializers.ones_init()


def _with_params(module: Any, change: Callable[[tuple[Any, ...], Any], jax.Array | None]) -> Any:
    """A twin of the module with other parameters: `change(path, variable)`, None to keep one.

    The twin shares all other variables, so that statistics, random counts and captures land where they belong.
    """
    structure, params, rest = nnx.split(module, nnx.Param, ...)
    new = []
    for path, variable in nnx.to_flat_state(params):
        value = change(path, variable)
        new.append((path, variable if value is None else variable.replace(value)))
    return nnx.merge(structure, nnx.from_flat_state(new), rest)


def _mask(module: Any) -> dict[str, Any]:
    """Flax's mask of a convolution, as an argument of a reparametrization."""
    mask = getattr(module, "mask", None)
    return {} if mask is None else {"mask": mask}


def _state(
    module: Any, weight: Weight, use_scale: bool, scale_init: Initializer | None, bound: str, metadata: Metadata,
    rngs: nnx.Rngs,
) -> tuple[Any, Any]:  # fmt: skip
    """The variables that `Linear` and `Conv` add to Flax's: scale and rho."""
    kernel, options = module.kernel[...], _mask(module)
    rho = nnx.BatchStat(initial_bound(kernel, weight, bound, **options)) if takes_bound(weight) else nnx.data(None)
    if not use_scale:
        return nnx.data(None), rho
    if scale_init is None:
        scale = matching_scale(kernel, weight, **options).astype(module.param_dtype)
    else:
        scale = scale_init(rngs.params(), kernel.shape[-1:], module.param_dtype)
    return nnx.Param(scale, **metadata), rho


def _reparametrized(module: Any) -> Any:
    """The twin of a `Linear` or `Conv` that has the kernel of the product."""
    options = _mask(module)
    if module.rho is not None:
        options["rho"] = module.rho[...]
    scale = () if module.scale is None else (module.scale[...],)
    kernel = module.weight(module.kernel[...], *scale, **options)
    return _with_params(module, lambda path, variable: kernel if path == ("kernel",) else None)


class Linear(nnx.Linear):
    """`flax.nnx.Linear` whose kernel is a function of a free kernel, by default weight norm.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      weight: a function of `normjax.weights` or any other `weight(kernel, scale)`, or `weight(kernel)` where
        `use_scale` is False; `functools.partial` sets its options.
      use_scale: whether a factor of each output is learned, the `nnx.Param` `scale`, `[o]`.
      scale_init: its initializer; None starts from the norms of the kernel, so that weight norm changes nothing at first.
      bound: how `bounded_weight_norm` finds its constant in the initial kernel, "rms" or "mean" (see `norm_bound`); it
        is stored as the `nnx.BatchStat` `rho`, and never changes.
      scale_metadata: metadata of the scale.
      rngs: random keys for the initializers.
      **flax: the other arguments of `flax.nnx.Linear`.

    Source: as the functions of `normjax.weights`.

    >>> layer = Linear(3, 4, rngs=nnx.Rngs(0))
    >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer)))
    {'bias': (4,), 'kernel': (3, 4), 'scale': (4,)}
    >>> layer(jnp.ones((2, 3))).shape
    (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Weight = weight_norm,
        use_scale: bool = True,
        scale_init: Initializer | None = _ONES,
        bound: str = "rms",
        scale_metadata: Metadata = _NO_METADATA,
        rngs: nnx.Rngs,
        **flax: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **flax)
        self.weight = weight
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.bound = bound
        self.scale, self.rho = _state(self, weight, use_scale, scale_init, bound, scale_metadata, rngs)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Multiplies by the reparametrized kernel."""
        return nnx.Linear.__call__(_reparametrized(self), inputs, out_sharding)


class Conv(nnx.Conv):
    """`flax.nnx.Conv` whose kernel is a function of a free kernel; added arguments as for `Linear`.

    The argument `mask` of Flax leaves masked weights out of the statistics too.

    >>> from normjax.weights import scaled_weight_standardization
    >>> layer = Conv(3, 8, (3, 3), weight=scaled_weight_standardization, rngs=nnx.Rngs(0))
    >>> jax.eval_shape(layer, jnp.ones((2, 5, 5, 3))).shape, layer.scale.shape
    ((2, 5, 5, 8), (8,))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        weight: Weight = weight_norm,
        use_scale: bool = True,
        scale_init: Initializer | None = _ONES,
        bound: str = "rms",
        scale_metadata: Metadata = _NO_METADATA,
        rngs: nnx.Rngs,
        **flax: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, strides, rngs=rngs, **flax)
        self.weight = weight
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.bound = bound
        self.scale, self.rho = _state(self, weight, use_scale, scale_init, bound, scale_metadata, rngs)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolves with the reparametrized kernel."""
        return nnx.Conv.__call__(_reparametrized(self), inputs, out_sharding)


def _result(dtype: Dtype | None, *arrays: Any) -> Any:
    """The dtype of a normalized parameter, as Flax has it."""
    with jax.numpy_dtype_promotion("standard"):
        return dtypes.canonicalize_dtype(*arrays, dtype=dtype)


class WeightNorm(nnx.Module):
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

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = _ONES,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        variable_filter: Any = nnx.PathContains("kernel"),  # noqa: B008, Flax's own default
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
    ):
        self.layer_instance = layer_instance
        self.feature_axes = feature_axes
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.promote_dtype = promote_dtype
        scales = {}
        for path, variable in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if use_scale and self.variable_filter(path, variable):
                features = by_number(variable.ndim, feature_axes)[2]
                shape = tuple(variable.shape[axis] for axis in features)
                scales[path] = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        self.scales = nnx.data(scales if use_scale else None)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized."""

        def change(path: tuple[Any, ...], variable: Any) -> jax.Array | None:
            if not self.variable_filter(path, variable):
                return None
            value: jax.Array = variable[...]
            scale = None if self.scales is None else self.scales[path][...]
            layout, field, _ = by_number(value.ndim, self.feature_axes)
            dtype = _result(self.dtype, value, *(() if scale is None else (scale,)))
            wide = value.astype(statistics_dtype(value.dtype))
            return weight_norm(wide, scale, eps=self.epsilon, layout=layout, field=field).astype(dtype)

        twin: Any = _with_params(self.layer_instance, change)
        return twin(x, *args, **kwargs)


class SpectralNorm(nnx.Module):
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

    Raises:
      ValueError: a parameter has more than two axes and `error_on_non_matrix` is set.

    Source: Miyato et al. 2018, algorithm 1.

    >>> layer = SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    >>> layer(jnp.ones((2, 3)), update_stats=False).shape, layer.batch_stats[("kernel", "u")].shape
    ((2, 4), (1, 4))
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs,
    ):
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        self.use_running_average = not update_stats
        stats = {}
        for path, variable in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if variable.ndim <= 1 or n_steps < 1:
                continue
            if variable.ndim > 2 and error_on_non_matrix:
                raise ValueError(f"Layer instance parameter is {variable.ndim}D but error_on_non_matrix is True")
            key = rngs.params()
            stats[(*path, "u")] = nnx.BatchStat(initializers.normal()(key, (1, variable.shape[-1]), param_dtype))
            stats[(*path, "sigma")] = nnx.BatchStat(_ONES(key, (), param_dtype))
        self.batch_stats = nnx.data(stats)

    def __call__(self, x: ArrayLike, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized; `update_stats` stores the new u and sigma."""
        update = not self.use_running_average if update_stats is None else update_stats

        def change(path: tuple[Any, ...], variable: Any) -> jax.Array | None:
            if (*path, "u") not in self.batch_stats:
                return None
            value: jax.Array = variable[...]
            u, sigma = (self.batch_stats[(*path, name)] for name in ("u", "sigma"))
            dtype = _result(self.dtype, value, u[...], sigma[...])
            wide = value.astype(statistics_dtype(value.dtype))
            out = spectral_norm(wide, u[...], steps=self.n_steps, eps=self.epsilon, layout="... o")
            if update:
                u[...], sigma[...] = out.u, out.sigma.astype(sigma.dtype)
            return out.kernel.astype(dtype)

        twin: Any = _with_params(self.layer_instance, change)
        return twin(x, **kwargs)
