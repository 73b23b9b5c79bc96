"""Scores of whole images after training, in scores.json beside the metrics of a seed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.common import files, images, runs, trained
from experiments.common.images import Pair
from experiments.common.pairs import Dataset, Enlarge

Scores = dict[str, dict[str, dict[str, float | None]]]  # by set and image; None where it is not finite


def score(dataset: Dataset, enlarge: Enlarge) -> Scores:
    """PSNR and SSIM of each image of each set; `enlarge` is given the bicubic one, [h, w]."""

    def one(pair: Pair) -> dict[str, float | None]:
        found = images.score(enlarge(pair.low.astype(np.float32)), pair.high, dataset.zoom)
        return {name: files.number(value) for name, value in found.items()}

    return {test: {name: one(pair) for name, pair in of.items()} for test, of in dataset.tests.items()}


def write(folder: Path, scores: Scores) -> None:
    """Writes scores.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "scores.json", json.dumps(scores, indent=1) + "\n")


def means(scores: Scores) -> files.Line:
    """Averages over the images of each set: {"Set5 psnr": ..., "Set5 ssim": ..., ...}, null where one is."""
    line = {}
    for test, of in scores.items():
        for name in ("psnr", "ssim"):
            values = [math.nan if each[name] is None else each[name] for each in of.values()]
            line[f"{test} {name}"] = files.number(np.mean(np.asarray(values, np.float64)))
    return line


def joined(folder: Path, rows: Mapping[str, trained.Row]) -> dict[str, trained.Row]:
    """Bicubic, and those rows that are scored: the scores join the last line of each seed."""

    def read(folder: Path) -> files.Line:
        path = folder / "scores.json"
        try:
            return means(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise files.RunError(f"{path} is damaged; delete it and --resume, which scores again") from error

    scored = {"bicubic": trained.Row({"steps": 0}, {}, [[{"step": 0} | read(folder / "bicubic")]])}
    for name, row in rows.items():
        folders = runs.seed_folders(folder, name, len(row.seeds))
        if all((folder / "scores.json").exists() for folder in folders):
            seeds = [[*lines[:-1], lines[-1] | read(folder)] for lines, folder in zip(row.seeds, folders, strict=True)]
            scored[name] = row._replace(seeds=seeds)
    return scored


def bicubic(low: np.ndarray) -> np.ndarray:
    """What there is to beat: the image as it is."""
    return low
