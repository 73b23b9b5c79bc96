"""Commands of experiments, one process a core at low priority, until all are done; killed and started again, it goes on.

    python -m experiments.queue FILE                # runs what is left, with --resume
    python -m experiments.queue FILE --show         # says what is left, and how long that may take

FILE has one command a line, as it is written after `python -m`; lines that are empty or start with # are skipped:

    experiments.language --data-dir DIR --rows base --seeds 1 --out runs
    experiments.language --data-dir DIR --rows 'ln*' --seeds 1 --out runs

Beside FILE stands FILE.queue/: `ended.json` (how each command ended that has), the output of each command, and the lock
that a queue holds while it runs. A command that has ended well is never started again; one that was killed, or has
failed, is. Rows lock their own folders, so a command whose folder another process has fails, and says which process that is.
"""

import contextlib
import ctypes
import datetime
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated

import tyro

from experiments.common import cli, files, locks

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
LATEST = 60  # seconds between two lines about what runs


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
      file: the commands.
      processes: how many run at a time, each on cores of its own.
      show: whether to say what is left, and run nothing.
    """

    file: Annotated[Path, tyro.conf.Positional]
    processes: int = len(CORES)
    show: bool = False


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
      command: its line.
      code: its exit code.
      seconds: how long it took, since it was started the last time.
      at: when it ended.
    """

    command: str
    code: int
    seconds: float
    at: str = ""


@dataclass
class Running:
    """A command that runs.

    Attributes:
      command: its line.
      process: what runs it.
      log: where its output goes.
      cores: those that it may use.
      since: when it was started, by `time.monotonic`.
    """

    command: str
    process: subprocess.Popen
    log: IO[bytes]
    cores: list[int]
    since: float


def read(file: Path) -> list[str]:
    """The commands of a file, each checked; exits with code 2 and the number of the line that is wrong."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cli.fail(f"{file} cannot be read as a list of commands: {error}")
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{file}, line {number}"
        try:
            module = shlex.split(line)[0]
            known = importlib.util.find_spec(module) is not None
        except (ValueError, ImportError) as error:
            cli.fail(f"{where} is no command: {error}")
        if not known:
            cli.fail(f"{where}: no module is called {module!r}; a line is what follows `python -m`")
        if line in found:
            cli.fail(f"{where} is line {found[line]} once more")
        found[line] = number
    if not found:
        cli.fail(f"{file} has no command: a line is what follows `python -m`, such as experiments.compare --rows dn")
    return list(found)


def ended(folder: Path) -> dict[str, Ended]:
    """The commands that have ended, by their lines; of one that was tried again, the last time."""
    path = folder / "ended.json"
    try:
        return {one["command"]: Ended(**one) for one in json.loads(path.read_text())} if path.exists() else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        cli.fail(
            f"{path} cannot be used: {error}; without it, every command is started again, and goes on where it stood"
        )


def about(commands: Sequence[str], past: Mapping[str, Ended], running: Mapping[str, float], processes: int) -> str:
    """One sentence: how many are done, run and are left, and how long that may take, by the mean of those that are done."""
    done = [past[c] for c in commands if c in past and past[c].code == 0]
    failed = [c for c in commands if c in past and past[c].code != 0 and c not in running]
    left = [c for c in commands if c not in running and (c not in past or past[c].code != 0)]
    said = f"{len(done)} of {len(commands)} done, {len(running)} running, {len(left)} left"
    said += f" ({len(failed)} of them failed)" if failed else ""
    if not (left or running):
        return said
    if not done:
        return f"{said}; how long that takes is known once one is done"
    each = statistics.mean(e.seconds for e in done)
    rest = each * len(left) + sum(max(each - since, 0) for since in running.values())
    hours, minutes = divmod(round(rest / processes / 60), 60)
    return f"{said}; about {hours} h {minutes:02d} min, by the mean of those that are done"


def start(command: str, folder: Path, number: int, cores: list[int]) -> Running:
    """Starts a command at the lowest priority on these cores; it ends with this process, however that ends."""
    words = shlex.split(command)
    log = open(folder / f"{number:03d}.log", "ab")
    arguments = [sys.executable, "-m", *words, *([] if "--resume" in words else ["--resume"])]
    parent = os.getpid()

    def lowly() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)
            os.sched_setaffinity(0, cores)
            with contextlib.suppress(OSError):  # Linux shares its time among sessions first, where it groups them
                Path("/proc/self/autogroup").write_text("19")
        os.nice(19)

    process = subprocess.Popen(
        arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=lowly
    )
    return Running(command, process, log, cores, time.monotonic())


def run(commands: Sequence[str], folder: Path, processes: int) -> bool:
    """Runs what is left; whether all ended well."""
    cores = [CORES[i::processes] for i in range(min(processes, len(CORES)))]
    cores += [CORES] * (processes - len(cores))
    past = ended(folder)
    waiting = [c for c in commands if c not in past or past[c].code != 0]
    running: list[Running] = []
    try:
        last = 0.0
        while waiting or running:
            while waiting and len(running) < processes:
                command = waiting.pop(0)
                running.append(start(command, folder, commands.index(command) + 1, cores.pop(0)))
                print(f"started: {command}", flush=True)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                cores.append(one.cores)
                past[one.command] = closed(one)
                files.write(folder / "ended.json", json.dumps([asdict(e) for e in past.values()], indent=1) + "\n")
            if time.monotonic() - last > LATEST:
                last = time.monotonic()
                print(about(commands, past, {r.command: last - r.since for r in running}, processes), flush=True)
            time.sleep(0.2)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:  # what they have committed stands; --resume goes on there
            one.process.wait()
            one.log.close()
    print(about(commands, past, {}, processes), flush=True)
    return all(past[c].code == 0 for c in commands)


def closed(one: Running) -> Ended:
    """How a command has ended, which is said too."""
    one.log.close()
    when = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    it = Ended(one.command, one.process.returncode, round(time.monotonic() - one.since, 1), when)
    if it.code == 0:
        print(f"done: {it.command}", flush=True)
    else:
        path = Path(one.log.name)
        said = path.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        print(
            f"failed with code {it.code}: {it.command}\n  {said[0]}\n  all of it: {path}", file=sys.stderr, flush=True
        )
    return it


def interrupted(*_: object) -> None:
    """Ctrl-C, for SIGTERM and SIGHUP too."""
    raise KeyboardInterrupt


def signals() -> Iterator[signal.Signals]:
    """Those that end a queue as Ctrl-C does."""
    yield from (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with code 1 where a command has failed, and with 130 where the queue was stopped."""
    said = (__doc__ or "").partition("\n")[0]
    options = cli.parse(Options, argv, prog="python -m experiments.queue", description=said)
    if options.processes < 1:
        cli.fail(f"processes is at least 1; found {options.processes}")
    commands, folder = read(options.file), options.file.with_name(f"{options.file.name}.queue")
    if options.show:
        print(about(commands, ended(folder), {}, options.processes))
        past = ended(folder)
        print("\n".join(c for c in commands if c not in past or past[c].code != 0))
        return
    for number in signals():
        signal.signal(number, interrupted)
    try:
        with locks.held(folder):
            well = run(commands, folder, options.processes)
    except locks.InUse as error:
        cli.fail(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    main()
