"""Where a training state and its batches lie on the devices of a mesh.

`place` puts a state, `shard` a batch; `Spread` is what the steps of `train.py` know of the mesh. Everything is done with
the shardings of global arrays: the compiler sends what has to be sent, and a statistic over the examples is one over all.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Batch = Any  # a pytree of arrays with the examples along their first axis
Axis = str | tuple[str, ...]


def place(tree: Any, mesh: Mesh, specs: Any = None) -> Any:
    """Puts a State, or any pytree, on the devices of a mesh: copies, so that a step may take them as donated.

    Args:
      tree: a `normjax.train.State` with values that all processes have alike, of a fresh start or of a checkpoint.
      mesh: the devices.
      specs: see `shardings`.

    Returns:
      The same with arrays on all devices of the mesh.

    Raises:
      ValueError: see `shardings`.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> place({"w": jnp.ones(3)}, mesh)["w"].sharding.spec
    P()
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh, specs))


def _put(a: Any, sharding: NamedSharding) -> jax.Array:
    """A copy of an array where its sharding says."""
    if not isinstance(a, jax.Array):
        return jax.device_put(a, sharding)
    if sharding.is_fully_addressable or not a.is_fully_addressable:
        # Copied first: what stays on its device would share its memory, whatever `may_alias` says, and be donated too.
        return jax.device_put(jnp.copy(a), sharding)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):  # through the host, the only way to devices of other processes
        data = jax.device_put(np.asarray(jax.random.key_data(a)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))
    return jax.device_put(np.asarray(a), sharding)


def shard(batch: Batch, mesh: Mesh, axis: Axis = "data") -> Batch:
    """Spreads the examples of a batch, or of a data set, over an axis of a mesh.

    With several processes each gives the examples of its own devices, in their order along the axis; the result is all
    of them, as one array.

    Args:
      batch: a pytree of arrays with the examples along their first axis.
      mesh: the devices.
      axis: the axis of the mesh, or several.

    Raises:
      ValueError: the examples do not divide over the devices, or the mesh lacks the axis.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> shard(jnp.ones((4, 3)), mesh).sharding.spec
    P('data',)
    """
    size = Spread(mesh, axis).size  # which refuses an axis that the mesh lacks
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    held = sharding.addressable_devices_indices_map((size,)).values()
    mine = len({(index or (slice(0, 1),))[0].start for index in held})

    def one(a: Any) -> jax.Array:
        _divides(a.shape[0], mine, axis)
        if jax.process_count() == 1:
            return jax.device_put(a, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(a))

    return jax.tree.map(one, batch)


def shardings(tree: Any, mesh: Mesh, specs: Any = None) -> Any:
    """Where each array of a State lies: for `place`, and for `jax.jit(init, out_shardings=...)`.

    A parameter lies as `specs` says, else as Flax's metadata says (`nn.with_partitioning`, nnx's `out_sharding`), else it
    is replicated. The optimizer's arrays lie as the parameter they belong to: the one that their path ends with, if the
    shapes agree. Running statistics are small and replicated.

    Args:
      tree: a State of arrays or of `jax.ShapeDtypeStruct`s; or any pytree, replicated but for Flax's metadata.
      mesh: the devices.
      specs: PartitionSpecs of the parameters, under their paths or under a beginning of them: `{"Dense_0": {"kernel":
        P(None, "model")}}`, `{"Dense_0": P("model")}` or `P("model")`.

    Returns:
      A pytree of NamedShardings like `tree`.

    Raises:
      ValueError: an axis that the mesh lacks, an array that does not divide, or specs without a parameter.

    >>> from jax.sharding import PartitionSpec as P
    >>> from normjax.train import State
    >>> state = State(jnp.array(0), {"w": jnp.ones((2, 4))}, {}, {"trace": {"w": jnp.ones((2, 4))}})
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> found = shardings(state, mesh, {"w": P(None, "model")})
    >>> found.params["w"].spec, found.opt_state["trace"]["w"].spec, found.step.spec
    (P(None, 'model'), P(None, 'model'), P())
    """
    given = {_names(path): _unboxed(spec) for path, spec in _leaves(specs)}
    known: dict[tuple, tuple] = {}
    if given:
        for path, leaf in _leaves(tree.params):
            for start in sorted((g for g in given if _names(path)[: len(g)] == g), key=len):
                known[_names(path)] = (jnp.shape(_unboxed(leaf)), given[start], start)
        if unused := set(given) - {start for _, _, start in known.values()}:
            raise ValueError(f"specs name {'.'.join(min(unused))!r}, but no parameter is left there")

    def one(path: tuple, leaf: Any) -> Any:
        names, shape = _names(path), jnp.shape(_unboxed(leaf))
        tails = (known.get(names[k:]) for k in range(1, len(names)) if names[0] in ("params", "opt_state"))
        spec = next((spec for found, spec, _ in filter(None, tails) if found == shape), None)
        if spec is None:
            spec = _annotated(leaf)
        _check(spec, shape, mesh, ".".join(names))
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_box)


class Spread(NamedTuple):
    """Where a batch goes: over some axes of a mesh, or nowhere (mesh None)."""

    mesh: Mesh | None
    axis: Axis
    specs: Any = None

    @property
    def size(self) -> int:
        """Over how many devices the examples are spread."""
        if self.mesh is None:
            return 1
        names = (self.axis,) if isinstance(self.axis, str) else tuple(self.axis)
        for name in names:
            if name not in self.mesh.shape:
                raise ValueError(f"the mesh has the axes {', '.join(map(repr, self.mesh.axis_names))}; found {name!r}")
        return math.prod(self.mesh.shape[name] for name in names)

    def fits(self, batch: Batch) -> bool:
        """Whether the examples divide over the devices."""
        return all(a.shape[0] % self.size == 0 for a in jax.tree.leaves(batch))

    def __call__(self, batch: Batch, dim: int = 0) -> Batch:
        """The batch with its axis `dim` over the devices; how the other axes lie is left open."""
        if (mesh := self._here()) is None:
            return batch

        def one(a: jax.Array) -> jax.Array:
            _divides(a.shape[dim], self.size, self.axis, "micro-batch" if dim else "batch")
            spec = [self.axis if i == dim else PartitionSpec.UNCONSTRAINED for i in range(a.ndim)]
            return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*spec)))

        return jax.tree.map(one, batch)

    def settle(self, state: Any) -> Any:
        """The state where `place` put it."""
        mesh = self._here()
        return state if mesh is None else lax.with_sharding_constraint(state, shardings(state, mesh, self.specs))

    def _here(self) -> Any:
        """The mesh as constraints want it: as the surroundings see it, if they set one."""
        here = jax.sharding.get_abstract_mesh()
        return self.mesh if self.mesh is None or here.empty else here

    def automatic(self, run: Callable, out: Callable[[Any], Any]) -> Callable:
        """The function `run(state, ...)` with Explicit axes made Auto inside; `out(state)` are the specs of its results.

        So that any model runs on any mesh: types refuse what is ambiguous, such as a product summed over a sharded axis.
        """
        self.size  # noqa: B018  (refuses an axis that the mesh lacks before anything is traced)
        mesh = self.mesh
        if mesh is None or AxisType.Explicit not in mesh.axis_types:
            return run

        @functools.wraps(run)
        def outside(state: Any, *args: Any) -> Any:
            here = jax.sharding.get_abstract_mesh()
            if not here.empty and AxisType.Explicit not in here.axis_types:  # an epoch has done it for its steps
                return run(state, *args)
            layout = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out(state), is_leaf=_is_spec)
            return jax.sharding.auto_axes(run, out_sharding=layout)(state, *args)

        return outside


def as_it_came(state: Any) -> Any:
    """Specs of the results of a step: the state lies as before, metrics are replicated."""
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, state), PartitionSpec()


def _divides(length: int, devices: int, axis: Axis, what: str = "batch") -> None:
    if length % devices:
        raise ValueError(
            f"a {what} of {length} examples does not divide over the {devices} devices of mesh axis {axis!r}"
        )


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _is_box(x: Any) -> bool:
    """Whether Flax's metadata surround the array: a linen box or an nnx variable."""
    return isinstance(x, nn.meta.AxisMetadata | nnx.Variable)


def bare(tree: Any) -> Any:
    """The tree with its arrays out of Flax's boxes, as they are: `nn.unbox` would also constrain where they lie.

    >>> bare({"mean": nn.Partitioned(jnp.ones(2), names=("model",))})
    {'mean': Array([1., 1.], dtype=float32)}
    """
    return jax.tree.map(_unboxed, tree, is_leaf=_is_box)


def _unboxed(x: Any) -> Any:
    if isinstance(x, nn.Partitioned):
        return x.value
    return x.unbox() if isinstance(x, nn.meta.AxisMetadata) else x.get_value() if isinstance(x, nnx.Variable) else x


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    """Paths and leaves; boxes and specs are leaves."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: _is_box(x) or _is_spec(x))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _annotated(leaf: Any) -> PartitionSpec:
    """The spec that Flax's metadata give, in names of the mesh; replicated without."""
    if isinstance(leaf, nnx.Variable):
        return nnx.spmd.get_var_pspec(leaf) or PartitionSpec()
    if isinstance(leaf, nn.LogicallyPartitioned):
        return nn.spmd.logical_to_mesh_axes(leaf.names) or PartitionSpec()
    return leaf.get_partition_spec() if isinstance(leaf, nn.Partitioned) else PartitionSpec()


def _check(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh, name: str) -> None:
    """Raises ValueError where an array cannot lie as its spec says."""
    if len(spec) > len(shape):
        raise ValueError(f"{name} of shape {shape} has fewer axes than {spec}")
    for i, entry in enumerate(spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for one in names:
            if one not in mesh.shape:
                raise ValueError(f"{name} is to lie along {one!r}; the mesh has the axes "
                                 f"{', '.join(map(repr, mesh.axis_names))}")  # fmt: skip
        devices = math.prod(mesh.shape[one] for one in names)
        if shape[i] % devices:
            raise ValueError(f"{name} of shape {shape} does not divide: axis {i} of length {shape[i]} over the "
                             f"{devices} devices of mesh axis {entry!r}")  # fmt: skip
