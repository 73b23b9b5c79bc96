"""Where numbers come from: versions, machine, commit and command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import normjax

PASSING = ("date", "command")  # facts of an environment that change nothing


def environment(devices: int = 1, command: str = "") -> dict[str, Any]:
    """Versions, devices, machine, commit, command and date: what a number may depend on besides its configuration."""
    device = jax.devices()[0]
    return {
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "normjax": normjax.__version__,
        "device": f"{device.platform}: {device.device_kind}",
        "devices": devices,
        "processes": jax.process_count(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": _commit(),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def lasting(environment: dict[str, Any]) -> dict[str, Any]:
    """The facts of an environment without those that change nothing.

    >>> lasting({"jax": "0.10", "date": "2026-11-21", "command": "python -m experiments.compare"})
    {'jax': '0.10'}
    """
    return {name: fact for name, fact in environment.items() if name not in PASSING}


def cpu() -> str:
    """The processor's name, as the system has it.

    >>> len(cpu()) > 0
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's git commit, with a + where files differ from it; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12"]
    try:
        done = subprocess.run([*command, "--dirty=+", "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
