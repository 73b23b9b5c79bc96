"""What a run leaves on disk, and how a killed run finds its place again.

    runs/<experiment>/<row>/lock      while a command is at it (`locks.py`)
    runs/<experiment>/<row>/seed-<k>/
      config.json        {"config": ..., "seed": k, "environment": ..., "resumed": [{"step": ..., ...}, ...]}
      metrics.jsonl      one line a step: {"step": 1, "loss": ..., ...}
      checkpoint/<step>  the state after that step, an Orbax checkpoint

The seeds of a row train together, so they resume at the last step for which each of them has a
checkpoint. `commit` keeps that step whole under `kill -9` by its order: metrics of all seeds, then
checkpoints of all seeds, then the older checkpoints go. Whatever is cut off in between lies
beyond the last common checkpoint, and `rewind` drops it. A checkpoint is written under another
name and renamed (Orbax does that), config.json as well; only a last line of metrics can be torn.

Seeds that have no common checkpoint, since some were added or lost theirs, train in groups that do (`starts`). What cannot
be read is a RunError, raised before anything is changed; files of other names stay.

Where several processes train together, process 0 alone calls what is here.
"""

import collections
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import files, orbax

LOCK = "lock"


def row_folder(experiment: Path, row: str) -> Path:
    """Where a row's seeds lie: "batch*" is `batch-star`, safe in shells and on every file system.

    >>> row_folder(Path("runs/compare"), "batch*").as_posix()
    'runs/compare/batch-star'
    """
    return experiment / row.replace("*", "-star")


def seed_folders(experiment: Path, row: str, seeds: int) -> list[Path]:
    """One folder for each seed of a row."""
    return [row_folder(experiment, row) / f"seed-{k}" for k in range(seeds)]


# --- configurations -----------------------------------------------------------------------------


def as_json(config: Any) -> dict[str, Any]:
    """A flat dataclass as JSON values; what JSON lacks (a Normalizer) as its repr."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return json.loads(json.dumps(fields, default=repr))


def read_config(folder: Path) -> files.Line:
    """What config.json of a seed's folder says: "config", "seed", "environment" and, if it was resumed, "resumed".

    Raises:
      RunError: it is not there, damaged, or of another seed.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
        whole = isinstance(found["config"], dict) and isinstance(found["environment"], dict)
        if not whole or f"seed-{found['seed']}" != folder.name:
            raise files.unreadable(path, f"it does not describe {folder.name}")
    except FileNotFoundError:
        raise files.unreadable(path, "it is not there") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, files.RunError):
            raise
        raise files.unreadable(path, "it is torn or not JSON of a run") from error
    return found


def write_config(folder: Path, content: files.Line) -> None:
    """Writes config.json."""
    files.write(folder / "config.json", json.dumps(content, indent=2) + "\n")


def remove(folder: Path) -> None:
    """Deletes a folder, which is gone at once (renamed first) even if this is killed half-way; a lock stays."""
    bin_ = folder.with_name(folder.name + ".deleted")
    if bin_.exists():
        shutil.rmtree(bin_)
    if not (folder / LOCK).exists():
        if folder.exists():
            folder.rename(bin_)
            shutil.rmtree(bin_)
        return
    bin_.mkdir()
    for path in folder.iterdir():
        if path.name != LOCK:
            path.rename(bin_ / path.name)
    shutil.rmtree(bin_)


def create(folders: Sequence[Path], config: Any, environment: dict[str, Any]) -> None:
    """Makes the seed folders that are not there yet, and config.json in those that have no checkpoint."""
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        if not _checkpoints(folder):
            write_config(folder, {"config": as_json(config), "seed": seed, "environment": environment})


def steps_known(folder: Path) -> int:
    """The last step that a seed's folder knows anything of, in a checkpoint or in metrics; -1 for none."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
    except OSError as error:
        raise files.unreadable(path, error) from error
    return max(lines - 1, *_checkpoints(folder), -1)


# --- metrics and checkpoints ----------------------------------------------------------------------


def commit(folders: Sequence[Path], step: int, lines: Sequence[Sequence[files.Line]], states: Any) -> None:
    """Writes what one chunk of steps added, in the order that makes it atomic over the seeds.

    Args:
      folders: a folder for each seed.
      step: the step that `states` has reached.
      lines: for each seed, the metrics of the steps since the last commit.
      states: pytree of arrays with a leading axis of seeds.

    Raises:
      RunError: a file cannot be written; what was committed before stays whole.
    """
    states = jax.tree.map(np.asarray, states)
    folder = folders[0]
    try:
        for folder, added in zip(folders, lines, strict=True):
            files.append(folder / "metrics.jsonl", added)
        with orbax.saving() as save:
            for k, folder in enumerate(folders):
                save(folder / "checkpoint" / str(step), jax.tree.map(lambda a, k=k: a[k], states))
        for folder in folders:
            _remove_checkpoints(folder, except_step=step)
    except Exception as error:  # Orbax has many for a full disk
        raise files.RunError(
            f"{folder} cannot take step {step}: {orbax.reason(error)}; what was committed before is whole, and --resume "
            "goes on there once it can be written"
        ) from error


def last_step(folders: Sequence[Path]) -> int | None:
    """The last step for which every seed has a whole checkpoint."""
    return max(set.intersection(*(set(_checkpoints(folder)) for folder in folders)), default=None)


def starts(folders: Sequence[Path]) -> list[int]:
    """The step from which each seed goes on, -1 for its first weights; those with the same one train together.

    Seeds that trained together have a common step, wherever they were killed. Where all have one, it is the last.
    """
    left = {k: found for k, folder in enumerate(folders) if (found := set(_checkpoints(folder)))}
    steps = [-1] * len(folders)
    while left:
        counts = collections.Counter(step for found in left.values() for step in found)
        step = max(counts, key=lambda step: (counts[step], step))
        for k in [k for k, found in left.items() if step in found]:
            steps[k] = step
            del left[k]
    # First weights are worth no program of their own.
    return [-1 if step == 0 and -1 in steps else step for step in steps]


def rewind(folders: Sequence[Path], like: Any, step: int | None = None) -> tuple[int, Any] | None:
    """Takes the folders back to their last common checkpoint, and loads it.

    Args:
      folders: a folder for each seed.
      like: pytree of arrays or shapes with a leading axis of seeds: the structure to load.
      step: of another checkpoint; -1 for none.

    Returns:
      The step and the states as arrays with a leading axis of seeds; None if there is no common checkpoint.

    Raises:
      RunError: the checkpoint or the metrics of a seed cannot be read, or do not reach that step; nothing was changed.
    """
    step = last_step(folders) if step is None else step
    step = -1 if step is None else step
    states = None
    if step >= 0:
        for folder in folders:
            _require_metrics(folder / "metrics.jsonl", step)
        target = jax.tree.map(lambda a: np.empty(a.shape[1:], a.dtype), like)
        states = [_load(folder, step, target) for folder in folders]
    for folder in folders:
        _remove_checkpoints(folder, except_step=step)
        if step >= 0:
            files.keep_until(folder / "metrics.jsonl", step)
        else:
            files.write(folder / "metrics.jsonl", "")
        for part in folder.glob("*.part"):  # of a killed process
            part.unlink()
    return None if states is None else (step, jax.tree.map(lambda *leaves: np.stack(leaves), *states))


def load(folder: Path, like: Any) -> Any:
    """The state at one seed's last checkpoint, in the structure of `like` (arrays or shapes)."""
    step = last_step([folder])
    if step is None:
        raise files.RunError(f"{folder} has no checkpoint")
    return _load(folder, step, jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like))


def _load(folder: Path, step: int, target: Any) -> Any:
    """A checkpoint, whole and of this structure, or a RunError."""
    path = folder / "checkpoint" / str(step)
    try:
        return orbax.restore(path, target)
    except Exception as error:  # Orbax and its file formats have many
        raise files.unreadable(path, "it is damaged, or was written by another version of the experiment") from error


def _require_metrics(path: Path, step: int) -> None:
    """A RunError unless the metrics reach a step, with every line that leads to it."""
    lines = [line for line in files.read(path) if line["step"] <= step]
    if not lines or lines[-1]["step"] != step:
        ends = f"ends after step {lines[-1]['step']}" if lines else "is empty" if path.exists() else "is not there"
        raise files.unreadable(path, f"it {ends}, and the checkpoint is of step {step}")
    if lines[-1]["step"] - lines[0]["step"] != len(lines) - 1 and lines[0]["step"] == 0:
        raise files.unreadable(path, f"it has {len(lines)} lines for the steps 0 to {step}")


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The whole checkpoints by their step, whatever else lies there."""
    return {int(path.name): path for path in folder.glob("checkpoint/*") if path.name.isdecimal() and path.is_dir()}


def _remove_checkpoints(folder: Path, except_step: int | None) -> None:
    """Removes every checkpoint but one, whole or not; what is none stays."""
    for path in folder.glob("checkpoint/*"):
        step, _, _ = path.name.partition(".orbax-checkpoint-tmp")
        if step.isdecimal() and path.is_dir() and path.name != str(except_step):
            shutil.rmtree(path)
