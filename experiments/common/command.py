"""What the commands of all experiments share: options, the rows asked for, a folder that loses nothing, one bar.

`experiment.run` puts them together. An experiment adds its own options in a subclass of `Options` (of `ManyDevices`, if
a batch may be spread over devices), with what is wrong with them in `check`.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import tyro
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.common import cli, data, files, folders, locks, runs

T = TypeVar("T")
C = TypeVar("C", bound=Any)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The part of the command line that is alike in every experiment."""

    rows: tuple[str, ...]
    """Rows to train; a * may be written -star."""
    seeds: int = 5
    """How many seeds; with --resume more than there are trains those that are missing."""
    data_dir: str | None = None
    """Folder of the publisher's archives or files."""
    out: Path = Path("runs")
    """Results go to a folder in OUT with the experiment's name (and -smoke for --smoke)."""
    smoke: bool = False
    """Try everything out: a few steps, few examples; replaces an earlier try."""
    resume: bool = False
    """Go on where a killed run stopped; keep rows and seeds that are complete. No other option than --rows and --seeds
    may differ, as a schedule depends on its length: what has others goes to another --out."""
    overwrite: bool = False
    """Delete what the chosen rows hold so far."""
    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the rows, train nothing."""

    @property
    def only_prints(self) -> bool:
        """Whether the command prints something (`Experiment.listing`) and trains nothing."""
        return self.show

    def check(self) -> None:
        """Exits with code 2 where a value is wrong by itself."""
        positive(self, "seeds")

    def connect(self) -> Mesh | None:
        """Joins what the job runs on; None for one device."""
        return None


@dataclass(frozen=True, kw_only=True)
class ManyDevices(Options):
    """Options of an experiment whose batches may be spread over devices and processes."""

    devices: int | None = None
    """Spread each batch over so many devices (of each process, with --distributed), on a CPU simulated ones."""
    distributed: bool = False
    """This is one of several processes, each started with the same options."""
    coordinator: str | None = None
    """HOST:PORT of process 0; needless, as the next two, on clusters that jax.distributed knows."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""

    def connect(self) -> Mesh | None:
        """Joins the processes, sees that they were started alike, and lays out the devices."""
        mesh = cli.connect(self.devices, self.distributed, self.coordinator, self.processes, self.process)
        # Every process its own folders; all else must be alike.
        cli.agree(replace(self, process=None, out=Path(), data_dir=None), "options")
        return mesh


def rows_of(options: Options, table: Iterable[str]) -> list[str]:
    """The rows that were asked for, each once; exits with code 2 and the closest name for one that is not there."""
    table = list(table)
    if not options.rows:
        cli.fail("--rows needs at least one row")
    return list(dict.fromkeys(cli.pick(name.replace("-star", "*"), table, "row") for name in options.rows))


def positive(options: Any, *names: str) -> None:
    """Exits with code 2 unless these options are positive numbers."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            cli.fail(f"--{name.replace('_', '-')} is a positive number; found {getattr(options, name)}")


def folders_named(options: Any) -> None:
    """Exits with code 2 where an option that names folders is empty."""
    for field in fields(options):
        if field.name.endswith("_dir"):
            value = getattr(options, field.name)
            if any(not str(path).strip() for path in ([value] if isinstance(value, str) else value or ())):
                cli.fail(f"--{field.name.replace('_', '-')} names a folder; found {value!r}")


def needless(dataset: str, data_dir: str | None) -> None:
    """Exits with code 2 where a folder is given for the digits, which are read from none."""
    if dataset == "digits" and data_dir is not None:
        cli.fail(f"--data-dir {data_dir}: digits are read from no folder; leave it out, or choose another --dataset")


def given(options: Any, *names: str) -> list[str]:
    """Those of these options that the command line gave a value; the others are None."""
    return [name for name in names if getattr(options, name) is not None]


def scaled(steps: int, scale: float) -> int:
    """A number of steps of a schedule that is shrunk as a whole, 1 or more.

    >>> scaled(80_000, 0.02), scaled(30_000, 0.02), scaled(10, 0.01)
    (1600, 600, 1)
    """
    return max(1, round(steps * scale))


def shrunk(config: C, **more: Any) -> C:
    """A configuration as --smoke has it: two seeds, six steps, and `more` of the configuration's own."""
    few = {"seeds": min(config.seeds, 2), "steps": min(config.steps, 6), "evaluate_every": 2}
    return replace(config, **few, **more)


def folder(options: Options, name: str) -> Path:
    """Where an experiment writes: OUT/<name>, or OUT/<name>-smoke."""
    return options.out / (f"{name}-smoke" if options.smoke else name)


def begin(
    options: Options,
    experiment: Path,
    configs: Mapping[str, Any],
    rows: Sequence[str],
    load: Callable[[], T],
    locked: contextlib.ExitStack,
) -> T:
    """Refuses what cannot be done, reads the data, then locks and makes the folder: in this order, so that nothing is lost.

    Args:
      options: the command line.
      experiment: from `folder`.
      configs: the configuration of every row that may lie there, under the options of this command.
      rows: those to be trained now.
      load: reads the data.
      locked: takes the locks of all that is trained or deleted.

    Returns:
      What `load` returned. Exits with code 2 and a message where the folder holds what does not fit or is in use by another
      process, where the data are not there or damaged, or where nothing can be written.
    """
    if options.resume and options.overwrite:
        cli.fail("--resume keeps results and --overwrite deletes them: choose one")
    deleted: Sequence[str] = rows if options.overwrite else ()
    staying = {name: config for name, config in configs.items() if name not in deleted}
    if fresh := options.smoke and not options.resume:
        staying = {}

    def touched() -> list[Path]:
        chosen = {runs.row_folder(experiment, name) for name in rows}
        return sorted(chosen | ({path for path in experiment.glob("*") if path.is_dir()} if fresh else set()))

    def check() -> None:
        for path in touched():
            locks.refuse(path)
        folders.check(experiment, staying, rows, options.resume)

    writes = jax.process_index() == 0
    try:
        if writes:
            check()
        loaded = load()
    except (files.RunError, data.DataError) as error:
        cli.fail(str(error))
    except OSError as error:
        cli.fail(f"cannot read or prepare the data in {options.data_dir or data.DEFAULT_DATA_DIR}: {error}")
    try:
        if writes:
            mine = touched()
            for path in mine:
                locked.enter_context(locks.held(path))
            folders.check(experiment, staying, rows, options.resume)  # another command may have ended meanwhile
            _delete(experiment, rows, deleted, configs, mine if fresh else [])
    except files.RunError as error:
        cli.fail(str(error))
    except OSError as error:
        cli.fail(f"cannot write to {experiment}: {error}")
    return loaded


def _delete(
    experiment: Path, rows: Sequence[str], deleted: Sequence[str], configs: Mapping[str, Any], tried: Sequence[Path]
) -> None:
    """Deletes what an earlier try left, the rows to be overwritten, and what the others have without results."""
    for path in [*tried, *(runs.row_folder(experiment, name) for name in deleted)]:
        runs.remove(path)
    for path in experiment.glob("*") if tried else ():
        if path.is_file() and path.name != runs.LOCK:
            path.unlink()
    folders.clear(experiment, configs, rows)


def each(
    rows: Sequence[str], steps: Mapping[str, int]
) -> Generator[tuple[str, Callable[[int, str], None]], None, None]:
    """Goes through the rows under one bar of steps; yields a row and `show(step, text)`, which moves the bar.

    >>> [name for name, show in each(["bn", "bn*"], {"bn": 3, "bn*": 3})]
    ['bn', 'bn*']
    """
    width = max(map(len, rows))
    quiet = jax.process_index() > 0
    total = sum(steps[name] for name in rows)
    with tqdm(total=total, unit="step", mininterval=0.2, dynamic_ncols=True, disable=quiet) as bar:
        before = 0
        for i, name in enumerate(rows):
            bar.set_description(f"{i + 1:2}/{len(rows)} {name:{width}}")
            bar.set_postfix_str("compiling")

            def show(step: int, text: str, before: int = before) -> None:
                bar.update(before + step - bar.n)
                bar.set_postfix_str(text)

            yield name, show
            before += steps[name]
            bar.update(before - bar.n)
