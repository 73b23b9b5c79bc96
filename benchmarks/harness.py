"""The one harness of the speed benchmarks: interleaved rounds, medians, ratios to a peer and to the bandwidth of memory.

A `Case` is one computation at one shape, a `Contender` one library's way to do it. `compare` first checks that all
contenders give the same numbers, then takes turns: in every round each has one turn, in an order shuffled anew. A
machine's speed drifts by a factor of two within minutes, but alike for neighbours: quote ratios of one run.

Every case has one more contender, "copy": XLA's `x * a + a` over the same array, which reads and writes it once. An
operation that must pass over the array P times (reads and writes counted) can take no less than P / 2 copies: its floor.
"""

import gc
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

FORWARD, BOTH, STEP = "forward", "forward+backward", "step"


@dataclass(frozen=True)
class Contender:
    """One library's way to compute a case.

    Attributes:
      name: the column of the table.
      call: a function of `args`; compiled by XLA first unless `torch`.
      args: what it takes.
      read: makes of its result a {name: array} that is comparable with the other contenders'.
      torch: whether this is PyTorch, which is called as it stands.
      other: whether it computes something else than the others, which is then not compared.
    """

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    read: Callable[[Any], Mapping[str, Any]] = lambda out: out
    torch: bool = False
    other: bool = False


@dataclass(frozen=True)
class Case:
    """One computation at one shape.

    Attributes:
      name: the row of the table.
      mode: "forward", "forward+backward" or "step".
      x: the array that the copy pass copies; temporaries are counted in its bytes.
      contenders: all must agree with the first.
      peer: name of the contender that times are divided by.
      passes: how often x's bytes must pass between the processor and memory at least; None for no floor.
      tolerance: the largest difference between two results, relative to the largest value.
      loose: the same for some results by name, where contenders are known to round differently.
      group: a contender that was slow in one case of a group is left out of the later ones; "" is no group.
    """

    name: str
    mode: str
    x: jax.Array
    contenders: Sequence[Contender]
    peer: str
    passes: float | None = None
    tolerance: float = 1e-4
    loose: Mapping[str, float] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Row:
    """One contender of one case, as measured.

    Attributes:
      case: name of the case.
      contender: name of the contender.
      mode: as the case's.
      dtype: of x.
      shape: of x.
      turns: how many there were; one for a contender over the limit.
      seconds: median over the turns.
      low: first quartile.
      high: third quartile.
      floors: seconds over the floor's; None where the case has none.
      ratio: seconds over the peer's.
      peer: name of the peer.
      temporary: bytes of temporary memory at the peak over the bytes of x; None for PyTorch.
      compile_seconds: tracing, lowering and compiling; None for PyTorch.
      error: the largest difference from the first contender's results; None if it computes something else.
    """

    case: str
    contender: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    turns: int
    seconds: float
    low: float
    high: float
    floors: float | None
    ratio: float
    peer: str
    temporary: float | None
    compile_seconds: float | None
    error: float | None


@dataclass(frozen=True)
class Output:
    """What every benchmark understands.

    Attributes:
      out: folder for results in JSON and a plot; by default the table is only printed.
      smoke: tiny shapes, and two rounds where there are rounds, to see whether everything runs.
    """

    out: Path | None = None
    smoke: bool = False


@dataclass(frozen=True)
class Options(Output):
    """What every benchmark that takes times understands.

    Attributes:
      rounds: turns that every contender takes.
      limit: seconds; a contender that takes longer has one turn, and none in the wider cases of its group.
      heap: "kept" keeps freed memory in the process (Linux), "stock" leaves it to the allocator.
    """

    rounds: int = 20
    limit: float = 1.0
    heap: Literal["kept", "stock"] = "kept"


# --- measuring ------------------------------------------------------------------------------------


def has(library: str) -> bool:
    """Whether a library is installed; prints a note if not."""
    found = importlib.util.find_spec(library) is not None
    if not found:
        print(f"note: {library} is not installed and is left out", file=sys.stderr)
    return found


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def torch() -> Any:
    """PyTorch, which is optional: its types are therefore not checked."""
    return importlib.import_module("torch")


def normal(shape: tuple[int, ...], dtype: Any, seed: int = 0, mean: float = 0.3) -> jax.Array:
    """Numbers with standard deviation 1.5."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) * 1.5 + mean, dtype)


def array(value: Any) -> np.ndarray:
    """An array of JAX or PyTorch as NumPy's, in float32."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value).astype(np.float32)


def disagreement(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    """For each result, the largest difference between a and b, relative to the largest value of b.

    >>> disagreement({"y": np.array([1.0, 2.0])}, {"y": np.array([1.0, 4.0])})
    {'y': 0.5}
    """
    if a.keys() != b.keys():
        raise ValueError(f"results have different names: {sorted(a)} and {sorted(b)}")
    found = {}
    for name in a:
        ours, theirs = array(a[name]), array(b[name])
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} has shapes {ours.shape} and {theirs.shape}")
        largest = float(np.abs(theirs).max(initial=0.0)) or 1.0
        worst = float(np.abs(ours - theirs).max(initial=0.0)) / largest
        found[name] = worst if math.isfinite(worst) else math.inf
    return found


class Running:
    """A contender ready to run, and the seconds of its turns."""

    def __init__(self, contender: Contender):
        self.contender, self.calls, self.first = contender, 1, 0.0
        self.seconds: list[float] = []
        self.error: float | None = None
        self.run, self.temporary, self.compile_seconds = contender.call, None, None
        if not contender.torch:
            start = time.perf_counter()
            self.run = jax.jit(contender.call).lower(*contender.args).compile()
            self.compile_seconds = time.perf_counter() - start
            memory = self.run.memory_analysis()
            self.temporary = memory.temp_size_in_bytes if memory else None

    def wait(self, out: Any) -> Any:
        """Waits until a result is there."""
        if not self.contender.torch:
            return jax.block_until_ready(out)
        if not on_cpu():
            torch().cuda.synchronize()
        return out

    def result(self) -> Mapping[str, Any]:
        """What it computes; times this first call."""
        start = time.perf_counter()
        out = self.wait(self.run(*self.contender.args))
        self.first = time.perf_counter() - start
        return {} if self.contender.other else self.contender.read(out)

    def turn(self) -> float:
        """Seconds a call. The result is dropped before the next call, so that its memory can be used again."""
        run, args, each = self.run, self.contender.args, on_cpu()
        out = None
        start = time.perf_counter()
        for _ in range(self.calls):
            out = None
            out = run(*args)
            if each:  # an accelerator queues the calls, as in training
                self.wait(out)
        self.wait(out)
        return (time.perf_counter() - start) / self.calls

    def warm(self) -> None:
        """Two calls; the second sets how many make a turn, so that a turn is long enough for the clock."""
        self.turn()
        self.calls = min(100, math.ceil((0.001 if on_cpu() else 0.01) / self.turn()))


def compare(cases: Iterable[Case], options: Options) -> list[Row]:
    """Measures every contender of every case, the contenders of a case in interleaved rounds.

    Raises:
      AssertionError: two contenders of a case compute different things.
    """
    slow: set[tuple[str, str, str]] = set()
    return [row for case in cases for row in _compare(case, options, slow)]


def _compare(case: Case, options: Options, slow: set[tuple[str, str, str]]) -> Iterator[Row]:
    print(f"{case.name} {case.mode} {case.x.dtype} {case.x.shape}", file=sys.stderr, flush=True)
    copy = Contender("copy", lambda x, a: x * a + a, (case.x, jnp.asarray(1.5, case.x.dtype)), other=True)
    invited = [c for c in case.contenders if (case.group, case.mode, c.name) not in slow]
    running = {c.name: Running(c) for c in (*invited, copy)}
    assert len(running) == len(invited) + 1, f"{case.name}: two contenders have one name"
    _check(case, running.values())
    gc.collect()
    racing = []
    for name, r in running.items():
        if r.first > options.limit and (again := r.turn()) > options.limit:  # the first call may have imported things
            print(f"note: {name} takes {again:.1f} s and has one turn", file=sys.stderr)
            r.seconds = [again]
            slow.update({(case.group, case.mode, name)} if case.group else {})
        else:
            r.warm()
            racing.append(r)
    shuffled = np.random.default_rng(0)
    for _ in range(2 if options.smoke else options.rounds):
        for i in shuffled.permutation(len(racing)):
            racing[i].seconds.append(racing[i].turn())
            if racing[i].contender.torch:
                time.sleep(0.001)  # its threads go on spinning for a while, and would take a core from the next one
    median = {name: float(np.median(r.seconds)) for name, r in running.items()}
    floor = None if case.passes is None else case.passes / 2 * median["copy"]
    for name, r in running.items():
        low, high = np.quantile(r.seconds, [0.25, 0.75])
        yield Row(
            case.name, name, case.mode, str(case.x.dtype), case.x.shape, len(r.seconds), median[name], float(low),
            float(high), None if floor is None else median[name] / floor, median[name] / median[case.peer], case.peer,
            None if r.temporary is None else r.temporary / case.x.nbytes, r.compile_seconds, r.error,
        )  # fmt: skip


def _check(case: Case, running: Iterable[Running]) -> None:
    """Runs each once, and asserts that all give what the first gives: times of different functions say nothing."""
    reference = None
    for r in running:
        result = r.result()
        if not r.contender.other:
            reference = result if reference is None else reference
            errors = disagreement(result, reference)
            r.error = max(errors.values())
            for name, error in errors.items():
                who = f"{case.name}, {case.mode}: {r.contender.name}"
                assert error <= case.loose.get(name, case.tolerance), f"{who} differs by {error:.1e} in {name}"
