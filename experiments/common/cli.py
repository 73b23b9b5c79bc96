"""Command lines: a dataclass of options, names picked from a table, one way to refuse, many devices and processes.

    options = cli.parse(Options, argv, prog="python -m experiments.compare", description=...)
    mesh = cli.connect(options.devices, ...)            # before anything touches a device
    with cli.together():                                # what one process refuses, all refuse
        rows = [cli.pick(name, ROWS, "row") for name in options.rows]

`parse` is tyro: a field is an option, its type checks it, the line under it is its help, and a
misspelt option names the closest one. Whoever refuses prints one message and exits with code 2.
"""

import contextlib
import difflib
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

Options = TypeVar("Options")


def parse(options: type[Options], argv: Sequence[str] | None, *, prog: str, description: str) -> Options:
    """Reads the command line (sys.argv if `argv` is None) into an instance of `options`.

    Exits with code 2 and a message on an unknown option or a value of the wrong type.
    """
    return tyro.cli(options, args=argv, prog=prog, description=description)


def pick(name: str, known: Iterable[str], what: str) -> str:
    """Returns `name` if it is known, else exits with code 2 and the closest name.

    >>> pick("batch", ["batch", "layer"], "row")
    'batch'
    """
    known = list(known)
    if name in known:
        return name
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    fail(f"no {what} is called {name!r}; did you mean {closest!r}? There are {', '.join(known)}")


def fail(message: str) -> NoReturn:
    """Prints the message to stderr and exits with code 2: the command was wrong, nothing ran."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def connect(
    devices: int | None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Mesh | None:
    """Joins the processes of a job and lays their devices out; to be called before anything touches a device.

    On a CPU, `devices` are simulated, so that a job for many can be tried anywhere.

    Args:
      devices: how many devices each process uses; by default all it has with `distributed`, else one.
      distributed: whether this is one of several processes. What the other three leave out, `jax.distributed` finds by
        itself on clusters that it knows (Slurm, Open MPI, Kubernetes, Cloud TPU).
      coordinator: host:port of process 0.
      processes: how many there are.
      process: which one this is, from 0.

    Returns:
      A mesh with one axis, "data", on which the devices of a process lie side by side; None for one device alone.

    Exits with code 2 where a process has too few devices, or the processes do not find each other.
    """
    if devices is not None:
        if devices < 1:
            fail(f"--devices is a positive number; found {devices}")
        # A wish that only the CPU's backend reads; it comes too late once a backend runs.
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            with contextlib.suppress(RuntimeError):
                jax.config.update("jax_num_cpu_devices", devices)
    if distributed:
        try:
            jax.distributed.initialize(coordinator, processes, process)
        except (RuntimeError, ValueError, TypeError) as error:
            fail(f"--distributed: {error}; --coordinator HOST:PORT, --processes and --process say it by hand")
    elif (coordinator, processes, process) != (None, None, None):
        fail("--coordinator, --processes and --process go with --distributed")
    if devices is None and not distributed:
        return None
    with together():
        found = jax.local_devices()
        if devices is not None and len(found) < devices:
            fail(f"--devices {devices}: found {len(found)} ({found[0].platform}: {found[0].device_kind})")
    each: dict[int, list] = {}
    for device in jax.devices():
        each.setdefault(device.process_index, []).append(device)
    chosen = [device for k in sorted(each) for device in each[k][:devices]]
    return Mesh(np.array(chosen), ("data",), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs its body in every process; where one fails, all exit, instead of waiting for it forever.

    >>> with together():
    ...     pick("batch", ["batch"], "row")
    'batch'
    """
    failure = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        if jax.process_count() > 1:
            failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
            if failure is None and len(failed):
                fail(f"process {failed[0]} stopped; its own message says why")


def agree(value: object, what: str) -> None:
    """Exits with code 2 unless all processes have the same value."""
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(np.array(zlib.crc32(repr(value).encode()), np.uint32))
        if (different := np.flatnonzero(digests != digests[0])).size:
            fail(f"process {different[0]} has {what} other than those of process 0")
