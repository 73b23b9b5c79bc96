"""The keyword arguments that constructors of nnx hand on to Flax, as type checkers read them: nnx has no fields."""

from collections.abc import Callable, Sequence
from typing import Required, TypedDict

import jax
from flax import nnx
from flax.typing import ConvGeneralDilatedT, DotGeneralT, PaddingLike, PrecisionLike, PromoteDtypeFn
from jax.typing import DTypeLike

from normjax._layers.describe import Initializer
from normjax.nnx.host import Metadata
from normjax.theory import Normalizer


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


class NormOptions(TypedDict, total=False):
    """The keyword arguments of Flax's normalization layers."""

    epsilon: float
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    use_bias: bool  # not of RMSNorm, nor bias_init and bias_metadata
    use_scale: bool
    bias_init: Initializer
    scale_init: Initializer
    reduction_axes: int | Sequence[int] | None  # not of InstanceNorm
    feature_axes: int | Sequence[int]  # not of GroupNorm
    axis_name: str | None
    axis_index_groups: Sequence[Sequence[int]] | None
    use_fast_variance: bool
    promote_dtype: PromoteDtypeFn
    rngs: Required[nnx.Rngs]
    bias_metadata: Metadata
    scale_metadata: Metadata


class CellOptions(TypedDict, total=False):
    """The keyword arguments of a cell: ours, as `normjax._layers.recurrent.Cell` describes them, and those of Flax's cell.

    nnx has no fields that a constructor could be made of, so this list is what type checkers read.
    """

    normalizer: Normalizer | str | None
    place: str
    per_gate: bool
    bias_at: str
    momentum: float
    max_steps: int | None
    use_scale: bool | Sequence[str]
    use_bias: bool | Sequence[str]
    learn_sigma: bool
    sigma_init: float | None
    scale_init: Initializer
    norm_bias_init: Initializer
    l1: float
    l1_axis_name: str | Sequence[str] | None
    forget_bias: float  # of the LSTM cells

    gate_fn: Callable[[jax.Array], jax.Array]
    activation_fn: Callable[[jax.Array], jax.Array]
    residual: bool  # of SimpleCell
    kernel_init: Initializer
    recurrent_kernel_init: Initializer
    bias_init: Initializer
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    carry_init: Initializer | None
    promote_dtype: PromoteDtypeFn
    keep_rngs: bool
    kernel_metadata: Metadata
    recurrent_kernel_metadata: Metadata
    bias_metadata: Metadata
