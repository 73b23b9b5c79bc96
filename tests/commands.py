"""Experiments as commands: run as a user would, refused, killed at a moment, and all that they left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[1]

# Runs a module's command, and kills it (no clean-up, as `kill -9`) at the n-th time that a moment comes.
KILLER = """
import importlib, os, pathlib, shutil, signal, sys
from experiments.common import files, loop, runs

name, moment, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
main = importlib.import_module(name).main
times = 0

def its_time():
    global times
    times += 1
    return times == n

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def batches(*args, do=loop.batches):  # before the steps of a chunk
    return die() if its_time() else do(*args)

def append(path, lines, do=files.append):  # half the lines, the last one torn
    if its_time():
        do(path, lines)
        os.truncate(path, path.stat().st_size - 30)
        die()
    do(path, lines)

def rename(source, target, do=os.rename):  # a checkpoint is written but not yet named
    if pathlib.Path(target).parent.name == "checkpoint" and its_time():
        die()
    do(source, target)

def rmtree(path, *args, do=shutil.rmtree, **kwargs):  # an old checkpoint is half deleted
    if its_time():
        next(p for p in pathlib.Path(path).rglob("*") if p.is_file()).unlink()
        die()
    do(path, *args, **kwargs)

if moment == "steps": loop.batches = batches
if moment == "metrics": files.append = append
if moment == "checkpoint": os.rename = rename
if moment == "deletion": shutil.rmtree = rmtree
main(sys.argv[4:])
"""


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs `python *arguments` in an empty folder, as a user would: under JAX's own settings."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def kill(module: str, moment: str, n: int, *arguments: str, folder: Path) -> None:
    """Runs a module's command until the n-th time that a moment of KILLER comes."""
    killed = command("-c", KILLER, module, moment, str(n), *arguments, folder=folder)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


class Killed(BaseException):
    """Stands for kill -9 within this process: nothing handles it."""


def kill_here(monkeypatch, module, name, n, main, arguments) -> None:
    """Runs `main`, and stops it where the function `name` of a module is called for the n-th time."""
    calls, do = [], getattr(module, name)

    def dying(*args):
        calls.append(args)
        if len(calls) == n:
            raise Killed
        return do(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(Killed):
            main(arguments)


def refused(capsys, main, *arguments: str) -> str:
    """What a command prints to stderr when it refuses."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def contents(seed: Path) -> tuple[list[dict], dict[str, bytes]]:
    """All that must not change: metrics without the seconds, and the bytes of every array."""
    lines = [json.loads(line) for line in (seed / "metrics.jsonl").read_text().splitlines()]
    (checkpoint,) = (seed / "checkpoint").iterdir()
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(checkpoint.absolute())
    arrays = {jax.tree_util.keystr(p): np.asarray(a).tobytes() for p, a in jax.tree_util.tree_leaves_with_path(state)}
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines], arrays
