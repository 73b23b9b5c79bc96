"""Where a training state and its batches lie on a mesh: the shardings of global arrays, and XLA sends what must be sent."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from normjax._paths import PyTree, path_parts
from normjax.train._batch import check_order, examples, is_known, map_examples
from normjax.train._metadata import annotated_spec, is_boxed, unboxed

Axis = str | tuple[str, ...]
Names = tuple[str, ...]
Shape = tuple[int, ...]
Tree = TypeVar("Tree")
Function = TypeVar("Function", bound=Callable[..., PyTree])


def place(tree: Tree, mesh: Mesh, specs: PyTree = None) -> Tree:
    """Puts a State, or any pytree, on the devices of a mesh: copies, so that a step may take them as donated.

    `tree` holds values that all processes have alike, of a fresh start or of a checkpoint; `specs` are PartitionSpecs of
    the parameters, under their paths or under a beginning of them, as `shardings` takes them. A ValueError names an axis
    that the mesh lacks, an array that does not divide, or specs without a parameter.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> place({"w": jnp.ones(3)}, mesh)["w"].sharding.spec
    P()
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh, specs))


def _put(a: ArrayLike, sharding: NamedSharding) -> jax.Array:
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


def shard(batch: Tree, mesh: Mesh, axis: Axis = "data") -> Tree:
    """Spreads the examples of a batch, or of a data set, over an axis of a mesh, or several.

    The examples lie along the first axis of the arrays of a pytree, and divide over the devices. With several processes
    each gives the examples of its own devices, in their order along the axis; the result is all of them, as one array.
    Scalars, and what is marked `train.Shared`, are copied to all devices.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> shard(jnp.ones((4, 3)), mesh).sharding.spec
    P('data',)
    """
    size = BatchSharding(mesh, axis).devices  # which refuses an axis that the mesh lacks
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    held = sharding.addressable_devices_indices_map((size,)).values()
    mine = len({(index or (slice(0, 1),))[0].start for index in held})

    def one(a: np.ndarray | jax.Array) -> jax.Array:
        _check_divides(a.shape[0], mine, axis)
        if jax.process_count() == 1:
            return jax.device_put(a, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(a))

    return map_examples(one, batch, lambda leaf: place(leaf, mesh))


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh, specs: PyTree = None) -> PyTree:
    """Where each array of a State lies: NamedShardings for `place`, and for `jax.jit(init, out_shardings=...)`.

    A parameter lies as `specs` says, else as Flax's metadata says (`nn.with_partitioning`, nnx's `out_sharding`), else
    it is replicated. The optimizer's arrays lie as the parameter they belong to: the one that their path ends with, if
    the shapes agree, but for axes in front (a history of updates), which are whole. Running statistics are small and
    replicated. A ValueError names an axis that the mesh lacks, an array that does not divide, or specs without a parameter.

    Args:
      tree: a State of arrays or `jax.ShapeDtypeStruct`s; or any pytree, replicated but for Flax's metadata.
      mesh: the devices.
      specs: PartitionSpecs of the parameters, under their paths or under a beginning of them: `P("model")`,
        `{"Dense_0": P("model")}` or `{"Dense_0": {"kernel": P(None, "model")}}`.

    >>> from jax.sharding import PartitionSpec as P
    >>> from normjax.train import State
    >>> state = State(jnp.array(0), {"w": jnp.ones((2, 4))}, {}, {"trace": {"w": jnp.ones((2, 4))}})
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> found = shardings(state, mesh, {"w": P(None, "model")})
    >>> found.params["w"].spec, found.opt_state["trace"]["w"].spec, found.step.spec
    (P(None, 'model'), P(None, 'model'), P())
    """
    _require_mesh(mesh)
    given = {path_parts(path): unboxed(spec) for path, spec in _leaves(specs)}
    known = _specified(given, tree.params) if given else {}
    sizes = {path_parts(path): jnp.shape(unboxed(leaf)) for path, leaf in _leaves(getattr(tree, "params", None))}

    def one(path: KeyPath, leaf: PyTree) -> PyTree:
        names, shape = path_parts(path), jnp.shape(unboxed(leaf))
        tails = [names[k:] for k in range(1, len(names)) if names[0] in ("params", "opt_state")]
        ahead = next(
            (len(shape) - len(sizes[t]) for t in tails if t in sizes and shape[-len(sizes[t]) :] == sizes[t]), 0
        )
        spec = next((known[tail][1] for tail in tails if tail in known and known[tail][0] == shape[ahead:]), None)
        spec = PartitionSpec(*[None] * ahead, *(annotated_spec(leaf) if spec is None else spec))
        _check_spec(spec, shape, mesh, ".".join(names))
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_boxed)


def _specified(given: dict[Names, PartitionSpec], params: PyTree) -> dict[Names, tuple[Shape, PartitionSpec]]:
    """Shape and spec of each parameter that has one, by path: the spec under the longest beginning of its path."""
    known, used = {}, set()
    for path, leaf in _leaves(params):
        names = path_parts(path)
        if starts := [start for start in given if names[: len(start)] == start]:
            start = max(starts, key=len)
            known[names] = jnp.shape(unboxed(leaf)), given[start]
            used.add(start)
    if unused := set(given) - used:
        raise ValueError(f"specs name {'.'.join(min(unused))!r}, but no parameter is left there")
    return known


class BatchSharding(NamedTuple):
    """Where the batches of a step lie: along axes of a mesh, or nowhere (mesh None); `specs` as `shardings` takes them."""

    mesh: Mesh | None
    axis: Axis
    specs: PyTree = None

    @property
    def devices(self) -> int:
        """Over how many devices the examples are spread."""
        if self.mesh is None:
            return 1
        _require_mesh(self.mesh)
        names = (self.axis,) if isinstance(self.axis, str) else tuple(self.axis)
        for name in names:
            if name not in self.mesh.shape:
                raise ValueError(f"the mesh has the axes {', '.join(map(repr, self.mesh.axis_names))}; found {name!r}")
        return math.prod(self.mesh.shape[name] for name in names)

    def divides(self, batch: PyTree) -> bool:
        """Whether the examples divide over the devices."""
        return all(a.shape[0] % self.devices == 0 for a in examples(batch).values())

    def constrain_batch(self, batch: Tree, dim: int = 0) -> Tree:
        """The batch with its axis `dim` over the devices; how the other axes lie is left open."""
        if (mesh := self._here()) is None:
            return batch

        def one(a: jax.Array) -> jax.Array:
            _check_divides(a.shape[dim], self.devices, self.axis, "micro-batch" if dim else "batch")
            spec = [self.axis if i == dim else PartitionSpec.UNCONSTRAINED for i in range(a.ndim)]
            return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*spec)))

        return map_examples(one, batch)

    def held(self, call: str, data: Tree, order: ArrayLike) -> Tree:
        """The data as JAX's arrays; ValueError where the order does not fit them, or a mesh holds them that is unknown."""
        check_order(order, data)
        for name, a in examples(data).items():
            here = jax.typeof(a).sharding
            if self.mesh is None and AxisType.Explicit in here.mesh.axis_types and any(here.spec):
                raise ValueError(
                    f"data {name!r} lie as {here.spec} on a mesh: `{call}(..., mesh=mesh)` takes them there"
                )
        return map_examples(jnp.asarray, data)

    def batch_at(self, data: Tree, rows: jax.Array) -> Tree:
        """The batch of these rows of the data."""
        return self.constrain_batch(map_examples(lambda a: a[rows], data))

    def constrain_state(self, state: Tree) -> Tree:
        """The state where `place` put it."""
        mesh = self._here()
        return state if mesh is None else lax.with_sharding_constraint(state, shardings(state, mesh, self.specs))

    def _here(self) -> Mesh | AbstractMesh | None:
        """The mesh as constraints want it: as the surroundings see it, if they set one."""
        here = jax.sharding.get_abstract_mesh()
        return self.mesh if self.mesh is None or here.empty else here

    def with_auto_axes(self, run: Function, out: Callable[[PyTree], PyTree]) -> Function:
        """The function `run(state, ...)` with Explicit axes made Auto inside; `out(state)` are the specs of its results.

        So that any model runs on any mesh: types refuse what is ambiguous, such as a product summed over a sharded axis.
        """
        self.devices  # noqa: B018  (refuses an axis that the mesh lacks before anything is traced)
        mesh = self.mesh
        if mesh is None or AxisType.Explicit not in mesh.axis_types:
            return run

        @functools.wraps(run)
        def outside(state: PyTree, *args: PyTree) -> PyTree:
            here = jax.sharding.get_abstract_mesh()
            if not here.empty and AxisType.Explicit not in here.axis_types:  # an epoch has done it for its steps
                return run(state, *args)
            _check_placed(state, args)
            specs, structure = jax.tree.flatten(out(state), lambda spec: isinstance(spec, PartitionSpec))
            layout = structure.unflatten(NamedSharding(mesh, spec) for spec in specs)
            found = jax.sharding.auto_axes(run, out_sharding=layout)(state, *args)
            _check_traced((state, args))  # after what a step itself refuses
            return found

        return cast(Function, outside)


def _leaves(tree: PyTree) -> list[tuple[KeyPath, PyTree]]:
    """Paths and leaves; boxes and specs are leaves."""
    return jax.tree_util.tree_leaves_with_path(tree, lambda leaf: is_boxed(leaf) or isinstance(leaf, PartitionSpec))


def _require_mesh(mesh: object) -> None:
    """Raises TypeError unless this is a mesh."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh is a `jax.sharding.Mesh`, as `jax.make_mesh` makes it; found {type(mesh).__name__}")


def _check_placed(state: PyTree, others: PyTree) -> None:
    """Raises ValueError where what a step with Explicit axes is given lies on no mesh, as far as it is known."""
    for what, tree, how in (("state", state, "place(state, mesh)"), ("batch", others, "shard(batch, mesh)")):
        arrays = [a for a in jax.tree.leaves(tree) if isinstance(a, jax.Array) and is_known(a)]
        if any(not isinstance(a.sharding, NamedSharding) for a in arrays):
            raise ValueError(f"the {what} lies on one device, not on the mesh: `{how}` puts it there")


def _check_traced(values: PyTree) -> None:
    """Raises ValueError where nothing that a compiled step is given lies on the mesh."""
    traced = [a for a in jax.tree.leaves(values) if not is_known(a)]
    if traced and all(jax.typeof(a).sharding.mesh.empty for a in traced):
        raise ValueError("neither state nor batch lies on the mesh: `place(state, mesh)` puts the state there")


def _check_divides(length: int, devices: int, axis: Axis, what: str = "batch") -> None:
    """Raises ValueError where examples do not divide over the devices."""
    if length % devices:
        over = f"the {devices} devices of mesh axis {axis!r}"
        raise ValueError(f"a {what} of {length} examples does not divide over {over}")


def _check_spec(spec: PartitionSpec, shape: Shape, mesh: Mesh | AbstractMesh, name: str) -> None:
    """Raises ValueError where an array cannot lie as its spec says."""
    if len(spec) > len(shape):
        raise ValueError(f"{name} of shape {shape} has fewer axes than {spec}")
    for i, entry in enumerate(spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for one in names:
            if one not in mesh.shape:
                axes = ", ".join(map(repr, mesh.axis_names))
                raise ValueError(f"{name} is to lie along {one!r}; the mesh has the axes {axes}")
        devices = math.prod(mesh.shape[one] for one in names)
        if shape[i] % devices:
            over = f"axis {i} of length {shape[i]} over the {devices} devices of mesh axis {entry!r}"
            raise ValueError(f"{name} of shape {shape} does not divide: {over}")
