"""Ctrl-C, SIGTERM and SIGHUP: what is committed stays, one sentence says where the run stands, a second one stops at once.

    with stop.handled():
        with stop.training("batch*"):
            with stop.writing(step): ...     # a commit, which is finished
            stop.reached()                   # leaves here if a signal came

The first signal lets the chunk of steps end and be committed, if that takes no longer than GRACE; else the chunk is given
up, and the last commit stands. XLA compiles and computes where Python's signal handlers do not run, so a thread that the
system wakes (`signal.set_wakeup_fd`) keeps the time. The exit code is 128 + the signal's number: 130 and 143.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

GRACE = 8.0  # seconds; container runtimes kill 10 seconds after SIGTERM
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Watch:
    """What the main thread and the thread that waits for signals know of each other."""

    def __init__(self, mine: frozenset[int]) -> None:
        self.mine = mine
        self.came = 0  # the first signal
        self.row: str | None = None  # in training; None elsewhere, where nothing waits to be committed
        self.step = -1  # the last one committed
        self.over = ""  # the last sentence, once the main thread leaves by itself
        self.files = threading.RLock()  # held while a commit is written
        self.timer: threading.Timer | None = None

    def wait(self, pipe: int) -> None:
        """Reads the numbers of the signals that come, until the pipe is closed."""
        while number := os.read(pipe, 1):
            if number[0] not in self.mine:
                continue
            if self.came or self.row is None:
                self.came = self.came or number[0]
                self.leave()
            self.came = number[0]
            self.timer = threading.Timer(GRACE, self.late)
            self.timer.daemon = True
            self.timer.start()

    def late(self) -> None:
        """The chunk has taken too long."""
        with self.files:
            if not self.over:
                self.leave()

    def leave(self) -> None:
        """Ends the process wherever it is, as a kill would, which every file survives."""
        os.write(2, f"\n{self.sentence()}\n".encode())
        os._exit(128 + self.came)

    def sentence(self) -> str:
        """Where the run stands."""
        if self.row is None:
            return "stopped; --resume goes on"
        if self.step < 0:
            return f"{self.row}: stopped before its first checkpoint; --resume goes on"
        return f"{self.row}: stopped after step {self.step}; --resume goes on"


_watch = _Watch(frozenset())


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles the signals meanwhile; nothing where they are ignored, another's, or this is not the main thread."""
    global _watch
    free = (signal.SIG_DFL, signal.default_int_handler)
    taken = {number: old for number in SIGNALS if (old := signal.getsignal(number)) in free}
    if threading.current_thread() is not threading.main_thread() or not taken:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before, watch = _watch, _Watch(frozenset(map(int, taken)))
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch.wait, args=(reading,), daemon=True)
    thread.start()
    _watch = watch
    for number in taken:
        signal.signal(number, lambda *_: None)  # no KeyboardInterrupt; the thread hears of it
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(woken)
        os.close(writing)
        thread.join()
        os.close(reading)
        if watch.timer is not None:
            watch.timer.cancel()
        _watch = before
        if watch.over:
            print(watch.over, file=sys.stderr)


@contextlib.contextmanager
def training(row: str) -> Iterator[None]:
    """A row is in training: what its chunk has done so far is worth some seconds."""
    _watch.row, _watch.step = row, -1
    try:
        yield
    finally:
        _watch.row = None


def at(step: int) -> None:
    """Training goes on from this step, -1 from the first weights."""
    _watch.step = step


@contextlib.contextmanager
def writing(step: int) -> Iterator[None]:
    """A step is being committed, which a first signal does not cut off."""
    with _watch.files:
        yield
        _watch.step = step


def reached() -> None:
    """Leaves with the signal's exit code, and one sentence at the end, if a signal came."""
    watch = _watch
    with watch.files:
        if watch.came:
            watch.over = watch.sentence()
            raise SystemExit(128 + watch.came)
