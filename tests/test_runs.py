"""Runs are not lost: locks, damaged folders, signals, seeds that are added; by the smallest experiment, tests/toy.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import cifar, compare
from experiments.common import experiment, files, folders, locks, loop, runs, stop, tables, trained
from tests import toy
from tests.commands import ROOT, command, contents, kill_here, refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of row slow, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    toy.main(["--out", str(folder), "--rows", "slow"])
    return folder / "toy"


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "toy")
    return tmp_path / "toy"


def everything(folder):
    """All files below a folder but its lock, with their content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def of_row_slow(folder):
    """All that must not change of row slow."""
    return [contents(folder / "slow" / f"seed-{k}") for k in range(2)]


# --- locks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--resume"], ["--overwrite"], [], ["--rows", "fast*", "slow", "--resume"], ["--smoke"]]
)
def test_folder_in_use_is_refused_with_its_holder_and_stays(capsys, copied, arguments):
    smoke = "--smoke" in arguments
    experiment_ = copied.rename(copied.with_name("toy-smoke")) if smoke else copied
    (experiment_ / "fast-star").mkdir()
    held = experiment_ / ("fast-star" if smoke else "slow")  # --smoke would delete rows that it does not train, too
    rows = ["--rows", "slow"] if smoke else []
    with locks.held(held):
        before = everything(experiment_)
        said = refused(capsys, toy.main, "--out", str(copied.parent), *arguments, *rows)
        assert everything(experiment_) == before
    assert f"error: {held} is in use by process {os.getpid()} on " in said
    assert "since 20" in said
    assert "pytest" in said
    assert not (held / "lock").exists()


def test_other_rows_of_a_folder_in_use_train_beside_it_and_the_report_has_what_is_complete(copied):
    with locks.held(copied / "slow"):
        toy.main(["--out", str(copied.parent), "--rows", "fast*"])
    text = (copied / "report.md").read_text()
    assert "| `slow`" in text
    assert "| `fast*`" in text


def test_lock_that_a_dead_process_left_is_none(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 1}')
    locks.refuse(tmp_path)
    with locks.held(tmp_path):
        with pytest.raises(locks.InUse, match=f"process {os.getpid()}"):
            locks.refuse(tmp_path)
        with pytest.raises(locks.InUse), locks.held(tmp_path):
            pass
    locks.refuse(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- damaged folders ---------------------------------------------------------------------------


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def without_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))


def truncated(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        os.truncate(path, 10)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        ("config.json", torn, "it is torn or not JSON of a run"),
        ("config.json", lambda path: path.write_text("[]"), "it is torn or not JSON of a run"),
        ("config.json", lambda path: path.write_bytes(b"\xff\x00"), "it is torn or not JSON of a run"),
        ("config.json", Path.unlink, "it is not there"),
        ("config.json", lambda path: path.write_text(path.read_text().replace('"seed": 1', '"seed": 0')),
         "it does not describe seed-1"),
        ("metrics.jsonl", Path.unlink, "it is not there, and the checkpoint is of step 6"),
        ("metrics.jsonl", lambda path: path.write_text(""), "it is empty, and the checkpoint is of step 6"),
        ("metrics.jsonl", torn, "it ends after step 5, and the checkpoint is of step 6"),
        ("metrics.jsonl", without_line, "it has 6 lines for the steps 0 to 6"),
        ("metrics.jsonl", lambda path: path.write_text("{}\n" + path.read_text()), "line 1 is damaged, '{}'"),
        ("metrics.jsonl", lambda path: path.write_text(path.read_text() * 2), "line 8 has step 0 after step 6"),
        ("metrics.jsonl", lambda path: path.write_bytes(b"\xff\n"), "it is not text"),
        ("checkpoint/6", truncated, "it is damaged, or was written by another version of the experiment"),
        ("checkpoint/6", emptied, "it is damaged, or was written by another version of the experiment"),
        ("checkpoint/6/_METADATA", Path.unlink, ""),
    ],
)  # fmt: skip
def test_damaged_file_is_named_with_what_to_do_and_nothing_is_lost(capsys, copied, file, damage, what):
    seed = copied / "slow" / "seed-1"
    damage(seed / file)
    before = everything(copied)
    said = refused(capsys, toy.main, "--out", str(copied.parent), "--rows", "slow", "--resume").splitlines()[-1]
    path = seed / "checkpoint" / "6" if "checkpoint" in file else seed / file
    assert said.startswith(f"error: {path} cannot be used: {what}")
    assert said.endswith(
        f"put back a whole copy of it, or move {seed} elsewhere and --resume, which trains that seed again and keeps the "
        "others"
    )
    assert everything(copied) == before


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["checkpoint", "."])
def test_seed_that_lost_its_checkpoint_is_trained_again_alone(capsys, whole, copied, lost):
    seeds = [copied / "slow" / f"seed-{k}" for k in range(2)]
    shutil.rmtree(seeds[1] / lost if lost != "." else seeds[1])
    before = everything(seeds[0])
    toy.main(["--out", str(copied.parent), "--rows", "slow", "--resume"])
    assert everything(seeds[0]) == before
    (lines, arrays), (expected, bits) = contents(seeds[1]), contents(whole / "slow" / "seed-1")
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    assert lines[-1]["test_error"] == pytest.approx(expected[-1]["test_error"], rel=1e-5)
    assert arrays.keys() == bits.keys()
    said = capsys.readouterr().err
    if lost == "checkpoint":
        kept = copied / "slow" / "seed-1.lost"
        assert f"{seeds[1]} has no checkpoint: that seed is trained again, and what it had is seed-1.lost" in said
        assert (kept / "metrics.jsonl").read_text() == (whole / "slow" / "seed-1" / "metrics.jsonl").read_text()
    else:
        assert f"{copied / 'slow'} gets seed-1; the seeds that it has stay as they are" in said


def test_stray_files_stay_and_disturb_nothing(copied):
    strays = [copied / place / ".DS_Store" for place in (".", "slow", "slow/seed-0", "slow/seed-0/checkpoint")]
    strays += [copied / "slow" / "seed-0 (copy)", copied / "slow" / "seed-0" / "checkpoint" / "notes.txt"]
    for path in strays:
        path.touch()
    before = trained_but(copied, strays)
    toy.main(["--out", str(copied.parent), "--rows", "slow", "--resume"])
    assert all(path.exists() for path in strays)
    assert trained_but(copied, strays) == before


def trained_but(folder, strays):
    return {path: content for path, content in everything(folder / "slow").items() if path not in strays}


@pytest.mark.slow
def test_full_disk_is_one_sentence_and_the_run_goes_on_with_the_same_bits(capsys, whole, tmp_path, monkeypatch):
    do = files.append

    def append(path, lines):
        do(path, lines[:1])
        if lines[0]["step"] == 3:
            raise OSError(28, "No space left on device", str(path))
        do(path, lines[1:])

    arguments = ["--out", str(tmp_path), "--rows", "slow"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "append", append)
        said = refused(capsys, toy.main, *arguments).splitlines()[-1]
    assert said == (
        f"error: {tmp_path / 'toy' / 'slow' / 'seed-0'} cannot take step 4: No space left on device; what was committed "
        "before is whole, and --resume goes on there once it can be written"
    )
    toy.main([*arguments, "--resume"])
    assert of_row_slow(tmp_path / "toy") == of_row_slow(whole)


def test_seeds_go_on_where_they_have_a_common_checkpoint(tmp_path):
    def steps(*each):
        seeds = []
        for k, found in enumerate(each):
            seeds.append(tmp_path / "-".join(map(str, each)) / f"seed-{k}")
            for step in found:
                (seeds[-1] / "checkpoint" / str(step)).mkdir(parents=True)
        return runs.starts(seeds)

    assert steps([4], [4, 6]) == [4, 4]  # killed in a commit
    assert steps([4, 6], [6]) == [6, 6]  # killed after it
    assert steps([0], []) == [-1, -1]  # in the first one
    assert steps([9], [9], []) == [9, 9, -1]  # a seed is added
    assert steps([9], [9], [2, 4], [4]) == [9, 9, 4, 4]  # others are in training
    assert steps([3], [5]) == [3, 5]


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (compare.main, ["--batch-size", "5000"], "--batch-size 5000: a batch of more examples than the 1,352 to train on"),
        (compare.main, ["--data-dir", ""], "--data-dir names a folder; found ''"),
        (compare.main, ["--data-dir", "DIR"], "--data-dir DIR: digits are read from no folder; leave it out, or choose "
                                              "another --dataset"),
        (cifar.main, ["--smoke", "--data-dir", "{bad}"], "{bad}/cifar-10-binary.tar.gz is truncated or damaged"),
        (cifar.main, ["--dataset", "digits", "--data-dir", "DIR"], "--data-dir DIR: digits are read from no folder"),
    ],
)  # fmt: skip
def test_options_that_fail_are_refused_before_a_folder_is_made(capsys, tmp_path, main, arguments, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b\x08\x00" + bytes(100))
    arguments = [argument.format(bad=tmp_path / "bad") for argument in arguments]
    said = refused(capsys, main, "--out", str(tmp_path / "runs"), *arguments)
    assert said.startswith("error: " + message.format(bad=tmp_path / "bad"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_folder_without_results_does_not_stand_in_the_way(capsys, whole, tmp_path, monkeypatch):
    """A command of other options fails after its first evaluation; its folder also has a torn config.json."""
    out = ["--out", str(tmp_path), "--rows", "slow"]
    kill_here(monkeypatch, loop, "batches", 1, toy.main, [*out, "--steps", "4"])
    seeds = [tmp_path / "toy" / "slow" / f"seed-{k}" for k in range(2)]
    assert [runs.last_step([seed]) for seed in seeds] == [0, 0]
    torn(seeds[0] / "config.json")
    toy.main(out)
    assert of_row_slow(tmp_path / "toy") == of_row_slow(whole)


def seeds_from_options(row, options, source):
    return replace(toy.configure(row, options, source), seeds=options.seeds)


def test_seeds_are_added_to_a_finished_run_and_no_other_option_is_changed(capsys, copied):
    more = replace(toy.TOY, configure=seeds_from_options)
    before = everything(copied / "slow")
    out = ["--out", str(copied.parent), "--rows", "slow", "--resume"]
    experiment.run(more, [*out, "--seeds", "4"])
    assert everything(copied / "slow").items() > before.items()
    rows = trained.read_rows(copied, ["slow"])
    errors = rows["slow"].last("test_error")
    assert len(set(errors)) == 4
    assert tables.shown("test_error", 3)(rows["slow"]) in (copied / "report.md").read_text()
    assert trained.seeds(rows) == "seeds 4"
    assert "seeds added: `python -m experiments.toy --out" in (copied / "report.md").read_text()
    said = refused(capsys, toy.main, *out, "--steps", "9")
    assert f"{copied / 'slow' / 'seed-0'} holds a run of another configuration: steps (6 there, 9 here)" in said
    assert "choose another --out, or the same options (python -m experiments.toy" in said


@pytest.mark.slow
def test_environment_of_a_resume_stands_beside_the_first(tmp_path, monkeypatch):
    out = ["--out", str(tmp_path), "--rows", "slow"]
    kill_here(monkeypatch, loop, "batches", 2, toy.main, out)
    toy.main([*out, "--resume"])
    for k in range(2):
        found = runs.read_config(tmp_path / "toy" / "slow" / f"seed-{k}")
        (resumed,) = found["resumed"]
        assert resumed.keys() == {"step", *found["environment"]}
        assert (resumed["step"], resumed["command"]) == (2, f"python -m experiments.toy {' '.join(out)} --resume")
        assert found["environment"]["command"] == f"python -m experiments.toy {' '.join(out)}"
        assert found["environment"]["cpu"]
    text = (tmp_path / "toy" / "report.md").read_text()
    assert f"seeds from step 2 on: `python -m experiments.toy {' '.join(out)} --resume`" in text


# --- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_signal_ends_the_chunk_commits_it_and_says_how_to_go_on(capsys, whole, tmp_path, monkeypatch, number, code):
    calls, do = [], loop.batches

    def batches(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # for the thread that hears of it
        return do(*args)

    out = ["--out", str(tmp_path), "--rows", "slow"]
    handlers = [signal.getsignal(each) for each in stop.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", batches)
        with pytest.raises(SystemExit) as caught:
            toy.main(out)
    assert caught.value.code == code
    assert capsys.readouterr().err.endswith("\nslow: stopped after step 4; --resume goes on\n")
    assert [signal.getsignal(each) for each in stop.SIGNALS] == handlers
    assert runs.last_step(runs.seed_folders(tmp_path / "toy", "slow", 2)) == 4
    toy.main([*out, "--resume"])
    assert of_row_slow(tmp_path / "toy") == of_row_slow(whole)


# Runs the smallest experiment; at the n-th time that a moment comes it says so, and then takes long.
SLOW = """
import os, pathlib, sys, time
from experiments.common import loop, stop
from tests import toy

moment, n, grace = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
stop.GRACE = grace
times = 0

def slowly(do, seconds):
    def slow(*args):
        global times
        if moment != "checkpoint" or pathlib.Path(args[1]).parent.name == "checkpoint":
            times += 1
            if times == n:
                print("now", flush=True)
                time.sleep(seconds)
        return do(*args)
    return slow

if moment == "steps": loop.batches = slowly(loop.batches, 60)
if moment == "checkpoint": os.rename = slowly(os.rename, 3)
toy.main(sys.argv[4:])
"""


def started(folder, moment, n, grace=60.0):
    """The process of SLOW at its moment."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", SLOW, moment, str(n), str(grace), "--rows", "slow"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, cwd=folder, env=environment, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "n", "grace", "signals", "code", "step"),
    [
        ("checkpoint", 4, 60.0, [signal.SIGINT], 130, 2),  # of seed 1: it is finished
        ("checkpoint", 5, 0.3, [signal.SIGTERM], 143, 4),  # of seed 0, and so is that of seed 1 however long it takes
        ("steps", 3, 0.5, [signal.SIGTERM], 143, 4),  # given up: the chunk takes too long
        ("steps", 3, 60.0, [signal.SIGINT, signal.SIGINT], 130, 4),  # at once
    ],
)
def test_process_that_is_told_to_stop_does(whole, tmp_path, moment, n, grace, signals, code, step):
    process = started(tmp_path, moment, n, grace)
    begin = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert time.monotonic() - begin < 20
    assert said.endswith(f"slow: stopped after step {step}; --resume goes on\n")
    assert "Traceback" not in said
    resumed = command("-m", "tests.toy", "--rows", "slow", "--resume", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert of_row_slow(tmp_path / "runs" / "toy") == of_row_slow(whole)


@pytest.mark.slow
def test_second_command_names_the_process_that_has_the_folder_and_a_kill_frees_it(tmp_path):
    process = started(tmp_path, "steps", 2)
    for arguments in (["--resume"], ["--overwrite"], []):
        second = command("-m", "tests.toy", *arguments, folder=tmp_path)
        assert second.returncode == 2
        assert f"runs/toy/slow is in use by process {process.pid} on " in second.stderr
    process.kill()
    process.communicate()
    resumed = command("-m", "tests.toy", "--resume", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


# --- what is said of the numbers -------------------------------------------------------------------


def test_verdicts_are_those_of_the_numbers():
    def row(*values):
        return trained.Row({}, {}, [[{"step": 1, "a": value}] for value in values])

    rows = {"bn": row(0.5, 0.7), "bn*": row(0.6, 0.9), "ln": row(0.5), "ln*": row(0.4, 0.1), "dn": row(0.5, 0.7)}
    metric = tables.Metric("a", "accuracy", digits=3)
    assert tables.compared(rows, metric, tables.claims("bn* > bn, ln* > ln, ln* > bn, dn > bn, rms > bn")) == (
        "Accuracy, paired over seeds: bn* - bn: +0.150 +- 0.071, more than its spread; ln* - ln: -0.100, one seed; "
        "ln* - bn: -0.350 +- 0.354, not more than its spread; dn - bn: +0.000 +- 0.000, not more than its spread."
    )
    assert folders.has_results(Path("nowhere")) is False


def test_curves_can_be_drawn_again_from_the_csv(whole):
    rows = trained.read_rows(whole, ["slow"])
    head, *lines = (whole / "metrics.csv").read_text().splitlines()
    assert head == "row,seed,step,loss,seconds,test_error"
    found = [line.split(",") for line in lines]
    assert [line[:3] for line in found] == [["slow", str(k), str(step)] for k in range(2) for step in (0, 2, 4, 6)]
    _, values = rows["slow"].curve("test_error")
    assert [float(line[5]) for line in found] == values.ravel().tolist()
    loss = rows["slow"].curve("loss")[1].reshape(2, 3, 2).mean(-1)
    assert [float(line[3]) for line in found if line[3]] == pytest.approx(loss.ravel().tolist())
    assert json.loads((whole / "slow" / "seed-0" / "config.json").read_text())["seed"] == 0
