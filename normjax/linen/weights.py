"""Flax linen modules with normalized kernels: Flax's own, with parameters and state around `_layers/weights.py`.

`WeightNorm` and `SpectralNorm` have the arguments, names, shapes and collections of Flax's, so that a checkpoint loads. What
differs: only parameters are normalized, never a batch statistic of the wrapped layer, which also stays free to update;
initial kernels are stored as the layer made them; norms are float32 or wider.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from normjax._layers import weights
from normjax._layers.describe import Initializer, ones
from normjax._layers.pickling import Portable
from normjax._leaves import as_python
from normjax._paths import PyTree, path_name


class Host(weights.Reparametrized, nn.Module):
    """Flax's side of `Dense` and `Conv`: their kernel comes back reparametrized."""

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *init_args: Any, unbox: bool = True, **init_kwargs: Any) -> Any:
        """Declares a parameter; the kernel comes back reparametrized."""
        value: Any = super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        if name != "kernel":
            return value
        scale, rho, dtype = None, None, self.param_dtype  # pyright: ignore[reportAttributeAccessIssue]
        if self.use_scale:
            scale = self.param("scale", lambda key: self._first_scale(key, value, dtype))
        if self._needs_bound():
            rho = self.variable("batch_stats", "rho", lambda: self._first_bound(value)).value
        return self._entering(value, scale, rho)


class Dense(weights.Dense, Host, nn.Dense):  # noqa: D101
    __doc__ = weights.Dense.__doc__


class Conv(weights.Conv, Host, nn.Conv):  # noqa: D101
    __doc__ = weights.Conv.__doc__

    def __post_init__(self):
        for name in ("kernel_size", "strides", "input_dilation", "kernel_dilation", "padding"):
            setattr(self, name, as_python(getattr(self, name)))  # Flax asks whether they are integers of Python
        super().__post_init__()


def _with_params(
    wrapper: nn.WeightNorm | nn.SpectralNorm,
    change: Callable[[str, jax.Array], jax.Array],
    forward: Callable[[nn.Module], Any],
) -> Any:
    """What `forward` gives for the wrapped layer with parameters changed one by one: `change(path, value)`."""
    if wrapper.is_initializing():
        forward(wrapper.layer_instance)  # makes the parameters, which the second call then finds

    def one(path: jax.tree_util.KeyPath, leaf: PyTree) -> PyTree:
        # A box of Flax's metadata is one leaf here, so that it adds nothing to the name; its array changes within it.
        name = f"{wrapper.layer_instance.name}/{path_name(path[1:])}"
        return jax.tree.map(functools.partial(change, name), leaf)

    def is_box(leaf: object) -> bool:
        return isinstance(leaf, nn.meta.AxisMetadata)

    changed = functools.partial(jax.tree_util.tree_map_with_path, one, is_leaf=is_box)
    return nn.map_variables(forward, "params", trans_in_fn=changed)(wrapper.layer_instance)


class WeightNorm(Portable, nn.WeightNorm):
    """Weight norm around a layer: arguments, parameters and numbers of `flax.linen.WeightNorm`, but for the first kernel.

    `init` stores the kernel as the layer made it, as the paper and torch do; Flax stores it normalized. The first outputs
    are equal, but a step turns a kernel of norm r by 1 / r ** 2 of what it turns one of norm 1. A checkpoint of Flax's goes
    on as it does there.

    Attributes:
      layer_instance: the layer.
      epsilon: added to the squared norm.
      dtype: of the normalized parameters.
      param_dtype: of the scales.
      use_scale: whether a scale is learned for each feature.
      scale_init: its initializer; None starts from the norms, so that nothing changes at first.
      feature_axes: axes with a norm each; None gives each parameter one norm.
      variable_filter: parts of paths, one of which a parameter's path "Dense_0/kernel" contains if it is normalized;
        None normalizes all.

    Source: Salimans & Kingma 2016, equation 2.

    >>> layer = WeightNorm(nn.Dense(4))
    >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((2, 3))))["params"]["layer_instance/kernel/scale"]
    (4,)
    """

    scale_init: Initializer | None = ones  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self):
        if isinstance(self.variable_filter, set | list):  # Flax's default is a set, which nothing can hash
            object.__setattr__(self, "variable_filter", frozenset(self.variable_filter))
        super().__post_init__()

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized."""

        def change(name: str, value: jax.Array) -> jax.Array:
            if self.variable_filter and not any(part in name for part in self.variable_filter):
                return value
            scale = self.param(f"{name}/scale", lambda key: _first(self, key, value)) if self.use_scale else None
            return weights.weight_normed(value, scale, self.feature_axes, self.epsilon, self.dtype)

        return _with_params(self, change, lambda layer: layer(*args, **kwargs))


def _first(layer: nn.WeightNorm, key: jax.Array, value: jax.Array) -> jax.Array:
    """The scale of a parameter as it starts."""
    init: Initializer | None = layer.scale_init
    if init is None:
        return weights.first_scale(value, layer.feature_axes, layer.epsilon, layer.param_dtype)
    return init(key, [*weights.scale_shape(value.shape, layer.feature_axes)], layer.param_dtype)


class SpectralNorm(Portable, nn.SpectralNorm):
    """Spectral norm around a layer: arguments, variables and numbers of `flax.linen.SpectralNorm`, but for the first kernel.

    Every parameter of two axes or more is divided by its largest singular value. The parameters themselves never change:
    `init` stores the kernel as the layer made it, as the paper and torch do; Flax stores it divided.

    Attributes:
      layer_instance: the layer.
      n_steps: power iterations of a call, from the stored u; with none nothing is normalized.
      epsilon: added to the squared norms of the iteration.
      dtype: of the normalized parameters.
      param_dtype: of u and sigma.
      error_on_non_matrix: refuse parameters of more than two axes, rather than flatten all but the last.
      collection_name: where u and sigma are stored, as "Dense_0/kernel/u" and "Dense_0/kernel/sigma".
      feature_axes: axes of a parameter that are the columns of its matrix, the outputs; all others are its rows. Flax has
        the last alone; -2 for a `ConvTranspose` with `transpose_kernel=True`, as PyTorch has it there.

    Source: Miyato et al. 2018, algorithm 1.

    >>> layer = SpectralNorm(nn.Dense(4))
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)), update_stats=False)
    >>> jax.tree.map(jnp.shape, variables["batch_stats"])
    {'layer_instance/kernel/sigma': (), 'layer_instance/kernel/u': (1, 4)}
    """

    feature_axes: weights.Axes = -1

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized; `update_stats` stores the new u and sigma."""
        axes = getattr(self, "feature_axes", -1)  # Flax's own layers have none, under `swap_layers`

        def change(name: str, value: jax.Array) -> jax.Array:
            if value.ndim <= 1 or self.n_steps < 1:
                return value
            if value.ndim > 2 and self.error_on_non_matrix:
                raise ValueError(f"Input is {value.ndim}D but error_on_non_matrix is True")
            collection, shape = self.collection_name, weights.u_shape(value.shape, axes)
            start = None if self.has_variable(collection, f"{name}/u") else self.make_rng("params")
            u = self.variable(collection, f"{name}/u", jax.random.normal, start, shape, self.param_dtype)
            sigma = self.variable(collection, f"{name}/sigma", jnp.ones, (), self.param_dtype)
            how = self.n_steps, self.epsilon, axes, self.dtype
            out = weights.spectral_normed(value, u.value, sigma.value, *how)
            if update_stats and not self.is_initializing():
                u.value, sigma.value = out.u, out.sigma.astype(self.param_dtype)
            return out.kernel

        return _with_params(self, change, lambda layer: layer(*args, **kwargs))
