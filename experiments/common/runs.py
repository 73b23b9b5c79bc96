"""What a run leaves on disk, and how a killed run finds its place again.

    runs/<experiment>/<row>/seed-<k>/
      config.json        {"config": ..., "seed": k, "environment": ...}
      metrics.jsonl      one line a step: {"step": 1, "loss": ..., ...}
      checkpoint/<step>  the state after that step, an Orbax checkpoint

The seeds of a row train together, so a row resumes at the last step for which every seed has a
checkpoint. `commit` keeps that step whole under `kill -9` by its order: metrics of all seeds, then
checkpoints of all seeds, then the older checkpoints go. Whatever is cut off in between lies
beyond the last common checkpoint, and `rewind` drops it. A checkpoint is written under another
name and renamed (Orbax does that), config.json as well; only a last line of metrics can be torn.

Where several processes train together, process 0 alone calls what is here.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import normjax

Line = dict[str, Any]


class RunError(ValueError):
    """A run folder does not fit what is asked of it."""


def row_folder(experiment: Path, row: str) -> Path:
    """Where a row's seeds lie: "batch*" is `batch-star`, safe in shells and on every file system.

    >>> row_folder(Path("runs/compare"), "batch*").as_posix()
    'runs/compare/batch-star'
    """
    return experiment / row.replace("*", "-star")


def seed_folders(experiment: Path, row: str, seeds: int) -> list[Path]:
    """One folder for each seed of a row."""
    return [row_folder(experiment, row) / f"seed-{k}" for k in range(seeds)]


# --- files ------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> None:
    """Writes a whole file atomically: under another name, then renamed."""
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another command may write it too
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def append(path: Path, lines: Sequence[Line]) -> None:
    """Appends JSON lines and waits until they are on the disk."""
    with open(path, "ab") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Line]:
    """Reads JSON lines; without the last one if a kill tore it (it has no line end)."""
    whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
    return [json.loads(line) for line in whole.splitlines()]


def keep_until(path: Path, step: int) -> None:
    """Rewrites a metrics file without its torn last line and without the steps after `step`."""
    lines = [line for line in read(path) if line["step"] <= step]
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def number(value: Any) -> float | None:
    """A finite float exactly, else None: JSON has no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None


# --- configurations -----------------------------------------------------------------------------


def as_json(config: Any) -> dict[str, Any]:
    """A flat dataclass as JSON values; what JSON lacks (a Normalizer) as its repr."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return json.loads(json.dumps(fields, default=repr))


def environment(devices: int = 1) -> dict[str, Any]:
    """Versions, devices, commit and date: what a number may depend on besides its configuration."""
    device = jax.devices()[0]
    return {
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "normjax": normjax.__version__,
        "device": f"{device.platform}: {device.device_kind}",
        "devices": devices,
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The checkout's git commit, with a + where files differ from it; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12"]
    try:
        done = subprocess.run([*command, "--dirty=+", "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def differences(folder: Path, config: Any) -> list[str]:
    """Fields in which a seed folder's configuration differs: "steps (600 there, 100 here)"."""
    there = json.loads((folder / "config.json").read_text())["config"]
    here = as_json(config)
    return [
        f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)"
        for name in dict.fromkeys([*here, *there])
        if there.get(name) != here.get(name)
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
        is False.
    """
    for row, config in table.items():
        found = sorted(row_folder(experiment, row).glob("seed-*/config.json"))
        for path in found:
            if differ := differences(path.parent, config):
                raise RunError(
                    f"{path.parent} holds a run of another configuration: {', '.join(differ)}; "
                    "choose another --out, or the same options"
                )
        if found and row in rows and not resume:
            raise RunError(
                f"{row_folder(experiment, row)} already holds a run; --resume continues or keeps "
                "it, --overwrite deletes it first, --out starts elsewhere"
            )


def remove(folder: Path) -> None:
    """Deletes a folder, which is gone at once (renamed first) even if this is killed half-way."""
    bin_ = folder.with_name(folder.name + ".deleted")
    shutil.rmtree(bin_, ignore_errors=True)
    if folder.exists():
        folder.rename(bin_)
        shutil.rmtree(bin_)


def create(folders: Sequence[Path], config: Any, environment: dict[str, Any]) -> None:
    """Makes the seed folders that are not there yet, each with its config.json."""
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            content = {"config": as_json(config), "seed": seed, "environment": environment}
            write(folder / "config.json", json.dumps(content, indent=2) + "\n")


# --- metrics and checkpoints ----------------------------------------------------------------------


def commit(folders: Sequence[Path], step: int, lines: Sequence[Sequence[Line]], states: Any) -> None:
    """Writes what one chunk of steps added, in the order that makes it atomic over the seeds.

    Args:
      folders: a folder for each seed.
      step: the step that `states` has reached.
      lines: for each seed, the metrics of the steps since the last commit.
      states: pytree of arrays with a leading axis of seeds.
    """
    for folder, added in zip(folders, lines, strict=True):
        append(folder / "metrics.jsonl", added)
    states = jax.tree.map(np.asarray, states)
    with _checkpointer() as checkpointer:
        for k, folder in enumerate(folders):
            state = jax.tree.map(lambda a, k=k: a[k], states)
            checkpointer.save((folder / "checkpoint" / str(step)).absolute(), state)
            checkpointer.wait_until_finished()
    for folder in folders:
        _remove_checkpoints(folder, except_step=step)


def last_step(folders: Sequence[Path]) -> int | None:
    """The last step for which every seed has a whole checkpoint."""
    common = set.intersection(*({int(p.name) for p in f.glob("checkpoint/*") if p.name.isdigit()} for f in folders))
    return max(common, default=None)


def rewind(folders: Sequence[Path], like: Any) -> tuple[int, Any] | None:
    """Takes the folders back to their last common checkpoint, and loads it.

    Args:
      folders: a folder for each seed.
      like: pytree of arrays or shapes with a leading axis of seeds: the structure to load.

    Returns:
      The step and the states as arrays with a leading axis of seeds; None if there is no common checkpoint.
    """
    step = last_step(folders)
    for folder in folders:
        _remove_checkpoints(folder, except_step=step)
        keep_until(folder / "metrics.jsonl", -1 if step is None else step)
    if step is None:
        return None
    target = jax.tree.map(lambda a: np.empty(a.shape[1:], a.dtype), like)
    with _checkpointer() as checkpointer:
        states = [checkpointer.restore((f / "checkpoint" / str(step)).absolute(), target) for f in folders]
    return step, jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def load(folder: Path, like: Any) -> Any:
    """The state at one seed's last checkpoint, in the structure of `like` (arrays or shapes)."""
    step = last_step([folder])
    if step is None:
        raise RunError(f"{folder} has no checkpoint")
    target = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)
    with _checkpointer() as checkpointer:
        return checkpointer.restore((folder / "checkpoint" / str(step)).absolute(), target)


def _checkpointer() -> ocp.StandardCheckpointer:
    """Orbax without its waiting for other processes, which do not call it."""
    alone = {"active_processes": {0}, "barrier_sync_key_prefix": "process-0"} if jax.process_count() > 1 else {}
    return ocp.StandardCheckpointer(multiprocessing_options=ocp.options.MultiprocessingOptions(**alone))


def _remove_checkpoints(folder: Path, except_step: int | None) -> None:
    """Removes every checkpoint but one, whole or not."""
    for path in folder.glob("checkpoint/*"):
        if path.name != str(except_step):
            shutil.rmtree(path)
