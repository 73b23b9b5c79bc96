"""Compiles ahead of time for chips that are not here, and counts what the compiled program moves.

The compilers are those of `pip install -e '.[aot]'`: libtpu for TPUs, and JAX's plugin for CUDA. Neither needs a device.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.traffic import traffic

# What libtpu asks for where no TPU is; the last lets several processes compile at once.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Per multiprocessor, from NVIDIA's tables: compute capability, multiprocessors, bytes of shared memory, of it one block's
# at most, bytes a second and bytes of the memory, bytes of the second cache, clock in GHz.
GPUS = {
    "a100": ((8, 0), 108, 167936, 166912, 2.039e12, 85_899_345_920, 41_943_040, 1.41),
    "h100": ((9, 0), 132, 233472, 232448, 3.35e12, 85_899_345_920, 52_428_800, 1.98),
    "h200": ((9, 0), 132, 233472, 232448, 4.8e12, 150_754_820_096, 52_428_800, 1.98),
}
CHIPS = (*TPUS, *GPUS)
PLUGINS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}

Spec = jax.ShapeDtypeStruct


def platform(chip: str) -> Literal["tpu", "cuda"]:
    """The platform of a chip, by the name that JAX lowers for."""
    if chip not in CHIPS:
        raise ValueError(f"chip is {chip!r}; accepted are {', '.join(CHIPS)}")
    return "tpu" if chip in TPUS else "cuda"


def missing(chip: str) -> str:
    """Why nothing can be compiled for a chip here; "" if it can."""
    needs = PLUGINS[platform(chip)]
    return "" if importlib.util.find_spec(needs) else f"the compiler for {chip} needs {needs}: pip install -e '.[aot]'"


def _gpu(chip: str) -> str:
    """A chip as XLA describes one (its message GpuTargetConfig)."""
    (major, minor), cores, shared, block, bandwidth, memory, cache, clock = GPUS[chip]
    return f"""gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }} core_count: {cores} clock_rate_ghz: {clock}
      memory_bandwidth: {int(bandwidth)} device_memory_size: {memory} l2_cache_size: {cache}
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {block}
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      fpus_per_core: {64 if major < 9 else 128} registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }} platform_name: "CUDA" device_description_str: "{chip.upper()}" """


def alone() -> None:
    """This process computes on the CPU, and the compilers look for no device. To be called before JAX computes anything."""
    os.environ.update({name: value for name, value in ALONE.items() if name not in os.environ})
    jax.config.update("jax_platforms", "cpu")


@cache
def place(chip: str) -> SingleDeviceSharding:
    """Where the arrays of a program lie that is compiled for a chip, which is not here."""
    if why := missing(chip):
        raise ModuleNotFoundError(why)
    alone()
    kind = platform(chip)
    try:
        if kind == "tpu":
            topology = topologies.get_topology_desc(platform=kind, topology_name=TPUS[chip])
        else:
            topology = topologies.get_topology_desc("", kind, target_config=_gpu(chip), topology="1x1x1")
    except NotImplementedError as error:  # the plugin looked for a device, and gave up
        raise RuntimeError(
            f"JAX computed something before it was asked for {chip}: call chips.alone() first"
        ) from error
    return SingleDeviceSharding(topology.devices[0])


@dataclass(frozen=True)
class Account:
    """What the compiler of a chip says about a function.

    Attributes:
      passes: bytes moved between the chip and its memory over the bytes of x, conditionals taking their cheapest branch.
      worst: passes if conditionals take their costliest branch.
      kernels: how many are started.
      temporary: bytes of temporary memory over the bytes of x.
      parts: passes by kernel.
    """

    passes: float
    worst: float
    kernels: int
    temporary: float
    parts: Mapping[str, float]


def size(spec: Any) -> int:
    """Bytes of an array as its elements lie, or of a tree of arrays."""
    return sum(int(np.prod(s.shape)) * jnp.dtype(s.dtype).itemsize for s in jax.tree.leaves(spec))


def compiled(f: Callable[..., Any], *specs: Any, chip: str) -> Any:
    """A function compiled for a chip; specs are trees of arrays or of `jax.ShapeDtypeStruct`."""
    placed = jax.tree.map(lambda s: Spec(s.shape, s.dtype, sharding=place(chip)), specs)
    return jax.jit(f).lower(*placed).compile()


def passes(f: Callable[..., Any], *specs: Any, chip: str, size_of: Any = None) -> Account:
    """Compiles a function for a chip and counts what it moves, in sizes of `size_of` (by default of the first argument)."""
    program = compiled(f, *specs, chip=chip)
    found, unit = traffic(program.as_text()), size(specs[0] if size_of is None else size_of)
    temporary = program.memory_analysis().temp_size_in_bytes
    parts = {name: moved / unit for name, moved in found.parts.items()}
    return Account(found.low / unit, found.high / unit, found.kernels, temporary / unit, parts)


# --- forms of a layer -----------------------------------------------------------------------------


def both(f: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """The output of f(x, *params) and all gradients, in one program that takes g, x, *params.

    XLA may write the output in the pass that sums its gradient, which no network can do: see `train`. With `has_aux`, f
    returns a pair (output, others), whose others have no gradient, and the program returns them too.
    """
    return _pulled(f, has_aux, lambda y, g: (y, g))


def train(f: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """As in a network, where the gradient g of the output is known only after the output is written.

    A program that takes g, x, *params and returns the output of f(x, *params) and all gradients. With `has_aux`, f returns
    a pair (output, others), whose others have no gradient, and the program returns them too.
    """
    return _pulled(f, has_aux, lambda y, g: jax.lax.optimization_barrier((y, g)))


def _pulled(f: Callable[..., Any], has_aux: bool, between: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[..., Any]:
    def call(g, x, *params):
        found: Any = jax.vjp(f, x, *params, has_aux=has_aux)
        y, g = between(found[0], g)
        return y, found[1](g), *found[2:]

    return call
