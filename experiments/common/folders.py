"""The folder of an experiment: what may be trained there, what is deleted, and whose results each row has.

A row's seed has results where a step of training is known, in a checkpoint or in metrics. A folder without any (of a
command that failed before its first commit) is as none. Whatever has results is kept, or the command is refused.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import machine, runs
from experiments.common.files import RunError


def seeds(experiment: Path, row: str) -> list[Path]:
    """The folders of a row's seeds that are there."""
    found = runs.row_folder(experiment, row).glob("seed-*")
    return sorted(path for path in found if re.fullmatch(r"seed-\d+", path.name) and path.is_dir())


def has_results(folder: Path) -> bool:
    """Whether a seed's folder holds anything that training took."""
    known = runs.steps_known(folder)
    if known == 0:
        with contextlib.suppress(RunError):
            return runs.read_config(folder)["config"].get("steps") == 0  # a run of no steps is complete at once
    return known > 0


def differences(folder: Path, config: Any) -> list[str]:
    """Fields in which a seed folder's configuration differs: "steps (600 there, 100 here)".

    Not the number of seeds, on which no seed depends.
    """
    there = runs.read_config(folder)["config"]
    here = runs.as_json(config)
    return [
        f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)"
        for name in dict.fromkeys([*here, *there])
        if name != "seeds" and there.get(name) != here.get(name)
    ]


def check(experiment: Path, table: Mapping[str, Any], rows: Sequence[str], resume: bool) -> None:
    """Refuses to mix or to lose results; looks only, so a refused command leaves nothing.

    Args:
      experiment: the folder runs/<experiment>.
      table: the configuration of every row that may lie there, with the options of this command.
      rows: the rows to be trained now.
      resume: whether they may exist already.

    Raises:
      RunError: a row of the folder was trained with another configuration, or exists and `resume`
        is False, or its configuration cannot be read.
    """
    for row, config in table.items():
        found = [folder for folder in seeds(experiment, row) if has_results(folder)]
        for folder in found:
            if differ := differences(folder, config):
                command = runs.read_config(folder)["environment"].get("command")
                raise RunError(
                    f"{folder} holds a run of another configuration: {', '.join(differ)}; "
                    f"choose another --out, or the same options{f' ({command})' if command else ''}"
                )
        if found and row in rows and not resume:
            raise RunError(
                f"{runs.row_folder(experiment, row)} already holds a run; --resume continues or keeps "
                "it, --overwrite deletes it first, --out starts elsewhere"
            )


def clear(experiment: Path, configs: Mapping[str, Any], rows: Iterable[str]) -> None:
    """Deletes what the rows' seeds have without results, unless it is of the same configuration."""
    for row in rows:
        for folder in seeds(experiment, row):
            if not has_results(folder) and not _alike(folder, configs[row]):
                runs.remove(folder)


def _alike(folder: Path, config: Any) -> bool:
    try:
        return not differences(folder, config)
    except RunError:
        return False


def prepare(folders: Sequence[Path], config: Any, environment: dict[str, Any]) -> list[str]:
    """Makes the folders of a row's seeds ready to be trained, and notes in them where that goes on.

    A seed that has metrics and no checkpoint begins again in a new folder; the old one is called seed-<k>.lost.

    Args:
      folders: one for each seed.
      config: of the row.
      environment: of this command (`machine.environment`).

    Returns:
      What is to be said of it.
    """
    said = []
    begin = runs.starts(folders)
    added = [folder.name for folder in folders if not folder.exists()]
    for folder, step in zip(folders, begin, strict=True):
        if step < 0 and has_results(folder):
            kept = next(path for n in range(1, 1000) if not (path := _lost(folder, n)).exists())
            folder.rename(kept)
            said.append(f"{folder} has no checkpoint: that seed is trained again, and what it had is {kept.name}")
    if added and max(begin) > 0:
        said.append(f"{folders[0].parent} gets {', '.join(added)}; the seeds that it has stay as they are")
    runs.create(folders, config, environment)
    for folder, step in zip(folders, begin, strict=True):
        if 0 <= step < config.steps:
            _note(folder, step, environment)
    return said


def _lost(folder: Path, n: int) -> Path:
    return folder.with_name(f"{folder.name}.lost" + ("" if n == 1 else f"-{n}"))


def _note(folder: Path, step: int, environment: dict[str, Any]) -> None:
    """Adds an environment in which a seed was resumed, if it is not that of the last time."""
    content = runs.read_config(folder)
    resumed = content.setdefault("resumed", [])
    last = {name: fact for name, fact in (resumed or [content["environment"]])[-1].items() if name != "step"}
    if machine.lasting(last) != machine.lasting(environment) or not resumed:
        resumed.append({"step": step, **environment})
        runs.write_config(folder, content)
