"""One shape of an experiment, and the one command that runs any of them.

    EXPERIMENT = Experiment("compare", "Trains ...", Options, tuple(ROWS), listing, configure, load, train, write)
    main = functools.partial(run, EXPERIMENT)       # python -m experiments.compare --rows ... --seeds ... --resume

An experiment is a table: rows that differ in a few options, each trained with several seeds. Its file says what the rows
are (`configure`), how one is trained (`train`) and what is reported (`report`); the text of the report is Markdown, in
experiments/reports/<name>.md. `run` does the rest, alike for all: it refuses wrong options before it writes, makes the
folders runs/<name>/<row>/seed-<k>/, resumes what a kill left, trains under one bar, and reads the report back from disk.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.common import cli, command, data, files, folders, locks, loop, machine, report, runs, stop, trained


class Config(Protocol):
    """What every configuration has beside its own: a frozen dataclass of all that a row's numbers depend on."""

    @property
    def seeds(self) -> int:
        """How many."""
        ...

    @property
    def steps(self) -> int:
        """Of training; 0 evaluates the first weights alone."""
        ...

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations and checkpoints."""
        ...


O = TypeVar("O", bound=command.Options)  # noqa: E741
C = TypeVar("C", bound=Config)
D = TypeVar("D")


@dataclass(frozen=True)
class Job(Generic[O, D]):
    """What the rows of one command share.

    Attributes:
      options: the command line.
      folder: of the experiment.
      data: what `Experiment.load` returned.
      mesh: the devices that each batch is spread over; None for one alone.
    """

    options: O
    folder: Path
    data: D
    mesh: Mesh | None = None


@dataclass(frozen=True)
class Experiment(Generic[O, D, C]):
    """A published table or figure: what is its own.

    Attributes:
      name: of its file and its folder in runs/.
      description: a sentence, for --help.
      options: the class of its command line.
      rows: the names that --rows takes.
      listing: what --list prints.
      configure: the configuration of a row under some options; the third argument is from `source`.
      load: reads the data, given the options and what came from `source`; it may raise DataError or OSError.
      train: how a row is trained.
      report: what is said and drawn of the rows of the folder that are complete, whatever --rows: all of them were
        trained under one setting (`runs.check`), so the given configurations hold for each.
      folder: its folder's name, where options make a difference.
      source: what configurations depend on beside the options, read before anything else (the length of a text).
      text: of its report, where it is not reports/<name>.md.
    """

    name: str
    description: str
    options: type[O]
    rows: Sequence[str]
    listing: Callable[[O], str]
    configure: Callable[[str, O, Any], C]
    load: Callable[[O, Any], D]
    train: Callable[[Job[O, D], C], loop.Task]
    report: Callable[[Job[O, D], Mapping[str, C], dict[str, trained.Row]], report.Report]
    folder: Callable[[O], str] | None = None
    source: Callable[[O], Any] = lambda options: None
    text: Path | None = None


def run(experiment: Experiment[O, D, C], argv: Sequence[str] | None = None) -> None:
    """The command of an experiment: trains the chosen rows and reports on all rows of its folder.

    Args:
      experiment: which.
      argv: the command line; None takes that of the process.
    """
    prog = f"python -m experiments.{experiment.name}"
    options = cli.parse(experiment.options, argv, prog=prog, description=experiment.description)
    command.folders_named(options)
    if options.only_prints:
        options.check()
        with _refused():
            print(experiment.listing(options))
        return
    start = time.perf_counter()
    mesh = options.connect()
    said = shlex.join([*prog.split(), *(sys.argv[1:] if argv is None else argv)])
    with stop.handled(), contextlib.ExitStack() as locked:
        with cli.together():
            rows, configs, job = _prepare(experiment, options, mesh, locked)
        environment = machine.environment(1 if mesh is None else mesh.size, said)
        bar = command.each(rows, {row: config.steps for row, config in configs.items()})
        with _refused(f"cannot write to {job.folder}: "), contextlib.closing(bar):  # what is said stands below the bar
            for row, show in bar:
                _train(job, experiment.train(job, configs[row]), row, configs[row], environment, show)
        with cli.together(), _refused(f"the report in {job.folder} was not written, --resume writes it: "):
            if jax.process_index() == 0:
                _report(experiment, job, configs)
                print(f"The whole job took {time.perf_counter() - start:.0f} seconds.")


def _report(experiment: Experiment[O, D, C], job: Job[O, D], configs: dict[str, C]) -> None:
    """Reports on all rows that are complete; of two commands that end at once, the second waits and reports on both."""
    with locks.held(job.folder, wait=True):
        complete = trained.read_rows(job.folder, list(configs))
        text = experiment.text or report.TEXTS / f"{experiment.name}.md"
        report.publish(job.folder, text, experiment.report(job, configs, complete), complete)


def _prepare(
    experiment: Experiment[O, D, C], options: O, mesh: Mesh | None, locked: contextlib.ExitStack
) -> tuple[list[str], dict[str, C], Job[O, D]]:
    """Refuses what cannot be done, reads the data, and makes the folder: rows, configurations of all, what they share."""
    rows = command.rows_of(options, experiment.rows)
    options.check()
    with _refused():
        source = experiment.source(options)
        configs = {row: experiment.configure(row, options, source) for row in experiment.rows}
    name = experiment.name if experiment.folder is None else experiment.folder(options)
    folder = command.folder(options, name)
    loaded = command.begin(options, folder, configs, rows, lambda: experiment.load(options, source), locked)
    return rows, configs, Job(options, folder, loaded, mesh)


def _train(
    job: Job, task: loop.Task, row: str, config: Config, environment: dict, show: Callable[[int, str], None]
) -> None:
    """Trains all seeds of one row, from where its folders say that it stopped."""
    paths = runs.seed_folders(job.folder, row, config.seeds)
    with cli.together():
        if jax.process_index() == 0:
            for sentence in folders.prepare(paths, config, environment):
                tqdm.write(sentence, file=sys.stderr)
    with stop.training(row):
        loop.train(
            paths,
            task,
            steps=config.steps,
            evaluate_every=config.evaluate_every,
            mesh=job.mesh,
            on_chunk=lambda step, evaluation: show(step, task.say(evaluation)),
        )
    task.finish(paths, show)


@contextlib.contextmanager
def _refused(what: str = "") -> Iterator[None]:
    """Data or runs that are not there or damaged, or cannot be written, end the command with a message and exit code 2."""
    try:
        yield
    except (data.DataError, files.RunError) as error:
        cli.fail(str(error))
    except OSError as error:
        cli.fail(f"{what}{error}")
