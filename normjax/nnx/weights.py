"""Flax nnx modules with normalized kernels: Flax's own, with parameters and state around `_layers/weights.py`.

`WeightNorm` and `SpectralNorm` have the arguments, attributes and shapes of Flax's. What differs: the scales are
`nnx.Param`s, so an optimizer sees them; the layer's own parameters are never overwritten, so a model may be called inside of
any transformation that closes over it; only parameters are normalized, and norms are float32 or wider. What they keep of a
parameter is keyed by its path as text, "kernel" or "layers/0/kernel", where Flax has a tuple, which msgpack and JSON refuse;
`nnx.update` with a state of Flax's, or an older one of ours, finds its place, and `normjax.interop.text_keys` makes text of
the keys of a pure dictionary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import (
    ConvGeneralDilatedT,
    DotGeneralT,
    PaddingLike,
    PathParts,
    PrecisionLike,
    PromoteDtypeFn,
)
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike, DTypeLike

from normjax._layers import weights
from normjax._layers.describe import Initializer, ones
from normjax._layers.pickling import Portable
from normjax._leaves import as_python
from normjax.nnx._signature import Constructor, spelled_out
from normjax.nnx.host import NO_METADATA, Copied, Metadata
from normjax.reparametrize import Weight
from normjax.weights import weight_norm


def _text(path: PathParts | str) -> str:
    """A path as text; text is one already."""
    return path if isinstance(path, str) else "/".join(map(str, path))


class ByPath(nnx.Dict):
    """Variables by the path of a parameter: text, or the tuple that is Flax's key for the same.

    >>> scales = ByPath({("dense", "kernel"): nnx.Param(jnp.ones(2))})
    >>> list(scales), scales[("dense", "kernel")].shape, ("dense", "bias") in scales
    (['dense/kernel'], (2,), False)
    """

    def __init__(self, variables: Mapping[PathParts, nnx.Variable]):
        super().__init__({_text(path): variable for path, variable in variables.items()})

    def __getitem__(self, key: PathParts | str) -> Any:
        return vars(self)[_text(key)]

    def __setitem__(self, key: PathParts | str, value: Any) -> None:
        setattr(self, _text(key), value)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and _text(key) in vars(self)

    def _graph_node_set_key(self, key: PathParts | str, value: Any) -> None:
        """Takes an entry of a state that is not there under this key, which `nnx.update` brings."""
        held = vars(self).get(_text(key))
        if isinstance(held, nnx.Variable):
            held.set_value(value.get_value() if isinstance(value, nnx.Variable) else value)
        else:
            super()._graph_node_set_key(key, value)


class _Options(TypedDict, total=False):
    """Keyword arguments that `nnx.Linear` and `nnx.Conv` share."""

    use_bias: bool
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    precision: PrecisionLike
    kernel_init: Initializer
    bias_init: Initializer
    promote_dtype: PromoteDtypeFn
    preferred_element_type: DTypeLike | None
    kernel_metadata: Metadata
    bias_metadata: Metadata


class LinearOptions(_Options, total=False):
    """The keyword arguments of `nnx.Linear`."""

    dot_general: DotGeneralT


class ConvOptions(_Options, total=False):
    """The keyword arguments of `nnx.Conv`."""

    padding: PaddingLike
    input_dilation: int | Sequence[int] | None
    kernel_dilation: int | Sequence[int] | None
    feature_group_count: int
    mask: jax.Array | None
    conv_general_dilated: ConvGeneralDilatedT


def _with_params(module: nnx.Module, change: Callable[[PathParts, nnx.Variable], jax.Array | None]) -> Any:
    """A twin of the module with other parameters: `change(path, variable)`, None to keep one.

    The twin shares all other variables, so that statistics, random counts and captures land where they belong.
    """
    structure, params, rest = nnx.split(module, nnx.Param, ...)
    flat = ((path, variable, change(path, variable)) for path, variable in nnx.to_flat_state(params))
    new = [(path, variable if value is None else variable.replace(value)) for path, variable, value in flat]
    return nnx.merge(structure, nnx.from_flat_state(new), rest)


class Host(weights.Reparametrized, Copied, nnx.Module):
    """Flax's side of `Linear` and `Conv`: the scale, the bound, and the twin that has the kernel of the product."""

    kernel: nnx.Param[jax.Array]
    param_dtype: DTypeLike
    __signature__ = Constructor()

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
        # It has done its work; a layer made by another function is the same to jit and to pickle.
        self.scale_init = None

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
        **flax: Unpack[LinearOptions],
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
        **flax: Unpack[ConvOptions],
    ):
        window = as_python(kernel_size), as_python(strides)  # Flax asks whether they are integers of Python
        nnx.Conv.__init__(self, in_features, out_features, *window, rngs=rngs, **flax)
        self._make(rngs, scale_metadata, weight=weight, use_scale=use_scale, scale_init=scale_init, bound=bound)

    def __call__(self, inputs: jax.Array, out_sharding: Sharding | PartitionSpec | None = None) -> jax.Array:
        """Convolves inputs, `[n ... i]`, with the reparametrized kernel."""
        return nnx.Conv.__call__(self._product(), inputs, out_sharding)


Linear.__init__ = spelled_out(Linear.__init__, nnx.Linear.__init__)
Conv.__init__ = spelled_out(Conv.__init__, nnx.Conv.__init__)


class WeightNorm(Copied, Portable, nnx.WeightNorm):
    """Weight norm around a layer: arguments and outputs of `flax.nnx.WeightNorm`, whose kernel each call overwrites.

    Here the kernel stays what the layer made and the optimizer makes of it, as in the paper and in torch. So steps differ:
    one turns a kernel of norm r by 1 / r ** 2 of what it turns a kernel of norm 1.

    Args:
      layer_instance: the layer.
      feature_axes: axes with a norm each; None gives each parameter one norm.
      use_scale: whether a scale is learned for each feature: `scales`, `nnx.Param`s by path, as "kernel".
      scale_init: its initializer; None starts from the norms, so that nothing changes at first.
      epsilon: added to the squared norm.
      dtype: of the normalized parameters.
      param_dtype: of the scales.
      variable_filter: which parameters are normalized, an nnx filter.
      promote_dtype: accepted and not used.
      rngs: random keys for the initializer.

    Source: Salimans & Kingma 2016, equation 2.

    >>> layer = WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    >>> layer(jnp.ones((2, 3))).shape, layer.scales["kernel"].shape
    ((2, 4), (4,))
    """

    __signature__ = Constructor()

    scale_init: None  # pyright: ignore[reportIncompatibleVariableOverride]  (it has done its work)
    scales: Any  # by path; Flax has a dictionary of bare arrays, which nothing trains

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: weights.Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer | None = ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: nnx.filterlib.Filter = nnx.PathContains("kernel"),  # noqa: B008, a value
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
    ):
        given: Any = {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": promote_dtype}
        given |= {"feature_axes": feature_axes, "epsilon": epsilon, "variable_filter": variable_filter}
        super().__init__(layer_instance, use_scale=False, rngs=rngs, **given)
        self.use_scale, scales = use_scale, dict[PathParts, nnx.Variable]()
        # A layer made by another initializer is the same to jit and to pickle.
        self.scale_init = None

        def first(value: jax.Array) -> jax.Array:
            if scale_init is None:
                return weights.first_scale(value, self.feature_axes, epsilon, param_dtype)
            return scale_init(rngs.params(), weights.scale_shape(value.shape, self.feature_axes), param_dtype)

        for path, variable in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if use_scale and self.variable_filter(path, variable):
                scales[path] = nnx.Param(first(variable[...]))
        self.scales = nnx.data(ByPath(scales) if use_scale else None)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized."""

        def change(path: PathParts, variable: nnx.Variable) -> jax.Array | None:
            if not self.variable_filter(path, variable):
                return None
            scale = None if self.scales is None else self.scales[path][...]
            return weights.weight_normed(variable[...], scale, self.feature_axes, self.epsilon, self.dtype)

        return _with_params(self.layer_instance, change)(x, *args, **kwargs)


class SpectralNorm(Copied, Portable, nnx.SpectralNorm):
    """Spectral norm around a layer: arguments, variables and outputs of `flax.nnx.SpectralNorm`.

    Every parameter of two axes or more is divided by its largest singular value. The parameters themselves never change, as
    in the paper and in torch; Flax overwrites them at every call, so that gradients and steps differ.

    Args:
      layer_instance: the layer.
      n_steps: power iterations of a call, from the stored u; with none nothing is normalized.
      epsilon: added to the squared norms of the iteration.
      dtype: of the normalized parameters.
      param_dtype: of u and sigma.
      error_on_non_matrix: refuse parameters of more than two axes, rather than flatten all but the last.
      update_stats: whether a call stores the new u and sigma; `.train()` and `.eval()` set it.
      feature_axes: axes of a parameter that are the columns of its matrix, the outputs; all others are its rows. Flax has
        the last alone; -2 for a `ConvTranspose` with `transpose_kernel=True`, as PyTorch has it there.
      rngs: random keys for u.

    Source: Miyato et al. 2018, algorithm 1.

    >>> layer = SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    >>> layer(jnp.ones((2, 3)), update_stats=False).shape, layer.batch_stats["kernel/u"].shape
    ((2, 4), (1, 4))
    """

    feature_axes: weights.Axes
    batch_stats: ByPath

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        feature_axes: weights.Axes = -1,
        rngs: nnx.Rngs,
    ):
        given: Any = {"dtype": dtype, "param_dtype": param_dtype, "epsilon": epsilon, "update_stats": update_stats}
        given |= {"error_on_non_matrix": error_on_non_matrix}
        super().__init__(layer_instance, n_steps=0, rngs=rngs, **given)  # which draws no u of another shape
        self.n_steps, stats = n_steps, dict[PathParts, nnx.Variable]()
        self.feature_axes = tuple(feature_axes) if isinstance(feature_axes, Sequence) else feature_axes
        for path, variable in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if n_steps < 1 or variable.ndim <= 1:
                continue
            if variable.ndim > 2 and error_on_non_matrix:
                raise ValueError(f"Layer instance parameter is {variable.ndim}D but error_on_non_matrix is True")
            shape = weights.u_shape(variable.shape, self.feature_axes)
            stats[(*path, "u")] = nnx.BatchStat(jax.nn.initializers.normal()(rngs.params(), shape, param_dtype))
            stats[(*path, "sigma")] = nnx.BatchStat(jnp.ones((), param_dtype))
        self.batch_stats = nnx.data(ByPath(stats))

    def __call__(self, x: ArrayLike, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Calls the layer, with its parameters normalized; `update_stats` stores the new u and sigma."""
        update = not self.use_running_average if update_stats is None else update_stats

        def change(path: PathParts, variable: nnx.Variable) -> jax.Array | None:
            if (*path, "u") not in self.batch_stats:
                return None
            u, sigma = (self.batch_stats[(*path, name)] for name in ("u", "sigma"))
            how = self.n_steps, self.epsilon, self.feature_axes, self.dtype
            out = weights.spectral_normed(variable[...], u[...], sigma[...], *how)
            if update:
                u.set_value(out.u)  # not in place: what msgpack restored is an array of NumPy that refuses writes
                sigma.set_value(out.sigma)
            return out.kernel

        return _with_params(self.layer_instance, change)(x, **kwargs)
