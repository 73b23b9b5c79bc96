"""Trained rows, read back from the folders of `runs.py`: configuration, environment and metrics of every seed.

Reports, tables and figures are made of these alone; a number without a folder behind it cannot get into them.
"""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common import files, machine, runs


class Row(NamedTuple):
    """A row that was trained to its end.

    Attributes:
      config: what config.json says of it (that of seed 0; the seeds share it).
      environment: the environment of seed 0.
      seeds: for each seed, its lines of metrics.
      later: other environments, of seeds that were added and of --resume; with the "step" where it was resumed.
    """

    config: dict
    environment: dict
    seeds: list[list[files.Line]]
    later: Sequence[dict] = ()

    def last(self, name: str) -> list[float]:
        """A metric's last value for each seed; NaN where it was not finite."""
        return [_float(lines[-1][name]) for lines in self.seeds]

    def first(self, name: str) -> list[float]:
        """A metric's value before training, for each seed."""
        return [_float(lines[0][name]) for lines in self.seeds]

    def recent(self, name: str, steps: int) -> list[float]:
        """A metric's mean over the last steps, for each seed."""
        return [statistics.fmean(_float(line[name]) for line in lines[1:][-steps:]) for lines in self.seeds]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A metric's steps, [t], and values, [seeds, t], wherever it was written."""
        steps = [line["step"] for line in self.seeds[0] if name in line]
        return np.array(steps), np.array(
            [[_float(line[name]) for line in lines if name in line] for lines in self.seeds]
        )


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def read_rows(experiment: Path, names: Sequence[str]) -> dict[str, Row]:
    """Reads the seeds 0, 1, ... of the named rows that have reached their last step; rows without any are left out."""
    rows = {}
    for name in names:
        seeds, environments, config = [], [], {}
        while (folder := runs.seed_folders(experiment, name, len(seeds) + 1)[-1]).is_dir():
            if (step := runs.last_step([folder])) is None:
                break
            content = runs.read_config(folder)
            if step != content["config"]["steps"]:
                break
            seeds.append(files.read(folder / "metrics.jsonl"))
            environments += [content["environment"], *content.get("resumed", [])]
            config = config or content["config"]
        if seeds:
            later = {str(machine.lasting(facts)): facts for facts in environments if facts != environments[0]}
            rows[name] = Row(config, environments[0], seeds, tuple(later.values()))
    return rows


def environments(rows: Mapping[str, Row]) -> str:
    """A Markdown list of the commands and the environments that the rows were trained with, without their dates."""
    trained: dict[str, list[str]] = {}
    for name, row in rows.items():
        said = _facts(row.environment)
        for facts in row.later:
            changed = {k: v for k, v in facts.items() if k in (*machine.PASSING, "step") or v != row.environment.get(k)}
            begin = f"seeds from step {facts['step']:,} on" if "step" in facts else "seeds added"
            said += f"; {begin}: {_facts(changed) or 'in the same environment'}"
        trained.setdefault(said, []).append(f"`{name}`")  # as code: a bare * may set the rest in italics
    return "\n".join(f"- {', '.join(names)}: {facts}" for facts, names in trained.items())


def _facts(environment: Mapping[str, object]) -> str:
    """The command of an environment and what it may depend on."""
    facts = [f"{k} {v}" for k, v in environment.items() if k not in (*machine.PASSING, "step")]
    command = [f"`{environment['command']}`"] if environment.get("command") else []
    return ", ".join(command + facts)


def seeds(rows: Mapping[str, Row]) -> str:
    """How many seeds the rows have.

    >>> seeds({"bn": Row({}, {}, [[], []]), "ln": Row({}, {}, [[], []])})
    'seeds 2'
    """
    each = {name: len(row.seeds) for name, row in rows.items()}
    if len(set(each.values())) == 1:
        return f"seeds {next(iter(each.values()))}"
    return f"seeds {', '.join(f'{number} of `{name}`' for name, number in each.items())}"


def as_csv(rows: Mapping[str, Row]) -> str:
    """The learning curves: a line for each row, seed and evaluation, metrics of steps as their means since the last one.

    >>> lines = [{"step": 0, "test_a": 1}, {"step": 1, "b": 2}, {"step": 2, "b": 4, "test_a": 3}]
    >>> print(as_csv({"bn": Row({}, {}, [lines])}), end="")
    row,seed,step,b,test_a
    bn,0,0,,1.0
    bn,0,2,3.0,3.0
    """
    found: list[dict[str, object]] = []
    for name, row in rows.items():
        for seed, lines in enumerate(row.seeds):
            since: list[files.Line] = []
            for line in lines:
                since.append(line)
                if any(key.startswith("test_") for key in line):
                    keys = [key for key in line if key != "step"]
                    means = {key: statistics.fmean(_float(each[key]) for each in since if key in each) for key in keys}
                    found.append({"row": name, "seed": seed, "step": line["step"], **means})
                    since = []
    names = sorted({key for line in found for key in line} - {"row", "seed", "step"})
    text = io.StringIO()
    writer = csv.DictWriter(text, ["row", "seed", "step", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
