"""What Flax says beside an array about where it lies: linen's boxes (`nn.with_partitioning`) and nnx's variables."""

import jax
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

from normjax._paths import PyTree


def is_boxed(leaf: object) -> bool:
    """Whether Flax's metadata surround an array: a box of linen or a variable of nnx."""
    return isinstance(leaf, nn.meta.AxisMetadata | nnx.Variable)


def unboxed(leaf: object) -> PyTree:
    """What is in a box, as it is: `nn.unbox` would also constrain where it lies. Anything else stays."""
    if isinstance(leaf, nn.Partitioned):
        return leaf.value
    if isinstance(leaf, nn.meta.AxisMetadata):
        return leaf.unbox()
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def bare(tree: PyTree) -> PyTree:
    """A tree with its arrays out of Flax's boxes."""
    return jax.tree.map(unboxed, tree, is_leaf=is_boxed)


def annotated_spec(leaf: object) -> PartitionSpec:
    """The axes of the mesh that Flax's metadata name for each axis of an array; replicated where nothing is said."""
    if isinstance(leaf, nnx.Variable):
        return nnx.spmd.get_var_pspec(leaf) or PartitionSpec()
    if isinstance(leaf, nn.LogicallyPartitioned):
        return nn.spmd.logical_to_mesh_axes(leaf.names) or PartitionSpec()
    return leaf.get_partition_spec() if isinstance(leaf, nn.Partitioned) else PartitionSpec()
