"""Files that survive a kill: written whole or not at all, and read back with one sentence for what is damaged.

Metrics are JSON lines, one a step, of which only the last can be torn. An error names the file, what is wrong with it and
what to do.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class RunError(ValueError):
    """A run folder does not fit what is asked of it, cannot be read or cannot be written."""


def unreadable(path: Path, why: object) -> RunError:
    """The error of a file in a seed's folder: which, what is wrong, what to do."""
    seed = next((part for part in (path, *path.parents) if part.name.startswith("seed-")), path)
    first = " ".join(str(why).split())[:200]
    return RunError(
        f"{path} cannot be used: {first}; put back a whole copy of it, or move {seed} elsewhere and --resume, which trains "
        "that seed again and keeps the others"
    )


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
        file.write(_text(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Line]:
    """Reads JSON lines; without the last one if a kill tore it (it has no line end).

    Raises:
      RunError: another line is damaged, or the steps do not follow each other.
    """
    try:
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
    except UnicodeDecodeError as error:
        raise unreadable(path, "it is not text") from error
    except OSError as error:
        raise unreadable(path, error.strerror) from error
    lines: list[Line] = []
    for k, text in enumerate(whole.split("\n") if whole else (), 1):
        try:
            line = json.loads(text)
            step = line["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise unreadable(path, f"line {k} is damaged, {text[:40]!r}") from None
        if lines and step <= lines[-1]["step"]:
            raise unreadable(path, f"line {k} has step {step} after step {lines[-1]['step']}")
        lines.append(line)
    return lines


def keep_until(path: Path, step: int) -> None:
    """Rewrites a metrics file without its torn last line and without the steps after `step`."""
    write(path, _text(line for line in read(path) if line["step"] <= step))


def _text(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def number(value: Any) -> float | None:
    """A finite float exactly, else None: JSON has no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None
