"""Flax linen modules with normalized kernels: parameters and state around `normjax/weights.py` and `spectral.py`.

`Dense` and `Conv` are Flax's with one more step: the kernel passes through a reparametrization on its way to the product.
`WeightNorm` and `SpectralNorm` wrap any layer, with the arguments, names, shapes and collections of Flax's own, so that a
checkpoint loads. What differs there is what is right here: only parameters are normalized, never a batch statistic of the
wrapped layer, which also stays free to update; initial kernels are stored as the layer made them; norms are float32 or
wider.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes, initializers

from normjax._expect.arrays import statistics_dtype
from normjax.layer import Axes
from normjax.reparametrize import Weight, by_number, initial_bound, matching_scale, takes_bound
from normjax.spectral import spectral_norm
from normjax.weights import weight_norm

Dtype = Any
Initializer = Any


def _reparametrized(module: Any, kernel: jax.Array) -> jax.Array:
    """The kernel of `Dense` or `Conv` as it enters the product."""
    weight, mask = module.weight, getattr(module, "mask", None)
    options: dict[str, Any] = {} if mask is None else {"mask": mask}
    scale: tuple[jax.Array, ...] = ()
    if module.use_scale:
        init, shape, dtype = module.scale_init, kernel.shape[-1:], module.param_dtype
        if init is None:
            scale = (module.param("scale", lambda key: matching_scale(kernel, weight, **options).astype(dtype)),)
        else:
            scale = (module.param("scale", init, shape, dtype),)
    if takes_bound(weight):
        rho = module.variable("batch_stats", "rho", lambda: initial_bound(kernel, weight, module.bound, **options))
        options["rho"] = rho.value
    return weight(kernel, *scale, **options)


class _Reparametrized(nn.Module):
    """What `Dense` and `Conv` add to Flax's."""

    weight: Weight = weight_norm
    use_scale: bool = True
    scale_init: Initializer | None = initializers.ones
    bound: str = "rms"

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *init_args: Any, unbox: bool = True, **init_kwargs: Any) -> Any:
        """Declares a parameter; the kernel comes back reparametrized."""
        value: Any = super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        return _reparametrized(self, value) if name == "kernel" else value


def _result(dtype: Dtype | None, *arrays: jax.Array) -> Any:
    """The dtype of a normalized parameter, as Flax has it."""
    with jax.numpy_dtype_promotion("standard"):
        return dtypes.canonicalize_dtype(*arrays, dtype=dtype)


class Dense(_Reparametrized, nn.Dense):
    """`flax.linen.Dense` whose kernel is a function of a free kernel, by default weight norm.

    Attributes:
      weight: a function of `normjax.weights` or any other `weight(kernel, scale)`, or `weight(kernel)` where
        `use_scale` is False; `functools.partial` sets its options.
      use_scale: whether a factor of each output is learned, the parameter `scale`, `[o]`.
      scale_init: its initializer; None starts from the norms of the kernel, so that weight norm changes nothing at first.
      bound: how `bounded_weight_norm` finds its constant in the initial kernel, "rms" or "mean" (see `norm_bound`); it
        is stored as `rho` in the collection `batch_stats`, and never changes.

    All other attributes are Flax's.

    Source: as the functions of `normjax.weights`.

    >>> layer = Dense(4)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (4,), 'kernel': (3, 4), 'scale': (4,)}}
    >>> from normjax.weights import bounded_weight_norm
    >>> layer = Dense(4, weight=bounded_weight_norm, use_scale=False)
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((2, 3))))
    {'batch_stats': {'rho': ()}, 'params': {'bias': (4,), 'kernel': (3, 4)}}
    """


class Conv(_Reparametrized, nn.Conv):
    """`flax.linen.Conv` whose kernel is a function of a free kernel; attributes as for `Dense`.

    The attribute `mask` of Flax leaves masked weights out of the statistics too.

    >>> from normjax.weights import scaled_weight_standardization
    >>> layer = Conv(8, (3, 3), weight=scaled_weight_standardization)
    >>> jax.tree.map(jnp.shape, jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 5, 5, 3))))
    {'params': {'bias': (8,), 'kernel': (3, 3, 3, 8), 'scale': (8,)}}
    """


def _mapped(module: Any, change: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the wrapped layer with parameters changed one by one: `change(path, value)`."""

    def forward(layer: nn.Module) -> Any:
        return layer(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    if module.is_initializing():
        forward(module.layer_instance)  # makes the parameters, which the second call then finds

    def changed(collections: Any) -> Any:
        def one(path: Any, value: Any) -> Any:
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            return change(f"{module.layer_instance.name}/{name}", value)

        return jax.tree_util.tree_map_with_path(one, collections)

    return nn.map_variables(forward, "params", trans_in_fn=changed)(module.layer_instance)


class WeightNorm(nn.Module):
    """Weight norm around a layer: arguments, parameters and numbers of `flax.linen.WeightNorm`.

    Attributes:
      layer_instance: the layer.
      epsilon: added to the squared norm.
      dtype: of the normalized parameters.
      param_dtype: of the scales.
      use_scale: whether a scale is learned for each feature.
      scale_init: its initializer.
      feature_axes: axes with a norm each; None gives each parameter one norm.
      variable_filter: parts of paths, one of which a parameter's path "Dense_0/kernel" contains if it is normalized;
        None normalizes all.

    Source: Salimans & Kingma 2016, equation 2.

    >>> layer = WeightNorm(nn.Dense(4))
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((2, 3))))["params"]["layer_instance/kernel/scale"]
    (4,)
    """

    layer_instance: nn.Module
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    feature_axes: Axes | None = -1
    variable_filter: Iterable[str] | None = dataclasses.field(default_factory=lambda: {"kernel"})

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized."""

        def change(name: str, value: jax.Array) -> jax.Array:
            if self.variable_filter and not any(part in name for part in self.variable_filter):
                return value
            layout, field, features = by_number(value.ndim, self.feature_axes)
            shape = [value.shape[axis] for axis in features]
            scale = None
            if self.use_scale:
                scale = self.param(f"{name}/scale", self.scale_init, shape, self.param_dtype)
            dtype = _result(self.dtype, value, *(() if scale is None else (scale,)))
            wide = value.astype(statistics_dtype(value.dtype))
            return weight_norm(wide, scale, eps=self.epsilon, layout=layout, field=field).astype(dtype)

        return _mapped(self, change, args, kwargs)


class SpectralNorm(nn.Module):
    """Spectral norm around a layer: arguments, variables and numbers of `flax.linen.SpectralNorm`.

    Every parameter of two axes or more is divided by its largest singular value. The parameters themselves never change.

    Attributes:
      layer_instance: the layer.
      n_steps: power iterations of a call, from the stored u; with none nothing is normalized.
      epsilon: added to the squared norms of the iteration.
      dtype: of the normalized parameters.
      param_dtype: of u and sigma.
      error_on_non_matrix: refuse parameters of more than two axes, rather than flatten all but the last.
      collection_name: where u and sigma are stored, as "Dense_0/kernel/u" and "Dense_0/kernel/sigma".

    Source: Miyato et al. 2018, algorithm 1.

    >>> layer = SpectralNorm(nn.Dense(4))
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)), update_stats=False)
    >>> jax.tree.map(jnp.shape, variables["batch_stats"])
    {'layer_instance/kernel/sigma': (), 'layer_instance/kernel/u': (1, 4)}
    """

    layer_instance: nn.Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized; `update_stats` stores the new u and sigma."""

        def change(name: str, value: jax.Array) -> jax.Array:
            if value.ndim <= 1 or self.n_steps < 1:
                return value
            if value.ndim > 2 and self.error_on_non_matrix:
                raise ValueError(f"Input is {value.ndim}D but error_on_non_matrix is True")
            collection, shape = self.collection_name, (1, value.shape[-1])
            start = None if self.has_variable(collection, f"{name}/u") else self.make_rng("params")
            u = self.variable(collection, f"{name}/u", jax.random.normal, start, shape, self.param_dtype)
            sigma = self.variable(collection, f"{name}/sigma", jnp.ones, (), self.param_dtype)
            wide = value.astype(statistics_dtype(value.dtype))
            out = spectral_norm(wide, u.value, steps=self.n_steps, eps=self.epsilon, layout="... o")
            dtype = _result(self.dtype, value, u.value, sigma.value)
            if update_stats and not self.is_initializing():
                u.value, sigma.value = out.u, out.sigma.astype(self.param_dtype)
            return out.kernel.astype(dtype)

        return _mapped(self, change, args, kwargs)
