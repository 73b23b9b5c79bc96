"""A queue of experiments: it runs what is left, survives any kill, and refuses what it cannot run; by tests/toy.py."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import queue
from tests.commands import ROOT, command

TOY = "tests.toy --rows {row} --steps {steps} --out runs"


def written(folder, *lines):
    (folder / "all.txt").write_text("\n".join(["# comment", "", *lines]) + "\n")
    return "all.txt"


def started(folder, file, *arguments):
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    said = [sys.executable, "-m", "experiments.queue", file, *arguments]
    return subprocess.Popen(said, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


REFUSED = {
    "nothing": ([], "all.txt has no command: a line is what follows `python -m`"),
    "no module": (["experiments.nothing --rows a"], "all.txt, line 3: no module is called 'experiments.nothing'"),
    "twice": (["tests.toy", "tests.toy"], "all.txt, line 4 is line 3 once more"),
    "quotes": (["tests.toy --rows 'a"], "all.txt, line 3 is no command: No closing quotation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_list_of_commands_is_refused(name, tmp_path, monkeypatch, capsys):
    lines, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        queue.main([written(tmp_path, *lines)])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "all.txt.queue").exists()


def test_what_is_left_is_estimated_by_what_is_done():
    past = {"a": queue.Ended("a", 0, 3600.0), "b": queue.Ended("b", 2, 1.0)}
    said = queue.about(["a", "b", "c", "d"], past, {"c": 1800.0}, 2)
    assert (
        said
        == "1 of 4 done, 1 running, 2 left (1 of them failed); about 1 h 15 min, by the mean of those that are done"
    )
    assert queue.about(["a"], past, {}, 2) == "1 of 1 done, 0 running, 0 left"
    assert queue.about(["c"], past, {}, 2).endswith("how long that takes is known once one is done")


@pytest.mark.slow
def test_a_queue_that_is_killed_goes_on_and_starts_nothing_twice(tmp_path):
    lines = [TOY.format(row=row, steps=4) for row in ("slow", "'fast*'")]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert (
        command("-m", "experiments.queue", written(tmp_path / "whole", *lines), folder=tmp_path / "whole").returncode
        == 0
    )
    folder, file = tmp_path / "killed", written(tmp_path / "killed", *lines)
    first = started(folder, file, "--processes", "1")
    assert first.stdout is not None
    assert first.stdout.readline().startswith("started: tests.toy --rows slow")
    second = command("-m", "experiments.queue", file, folder=folder)
    assert second.returncode == 2
    assert f"all.txt.queue is in use by process {first.pid} on" in second.stderr
    while not list((folder / "runs").rglob("metrics.jsonl")):  # the first row is in training
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    left = command("-m", "experiments.queue", file, "--show", folder=folder).stdout
    assert left.splitlines()[-1] == lines[-1]
    time.sleep(3)  # the orphan ends with its parent, or has ended
    again = command("-m", "experiments.queue", file, "--processes", "1", folder=folder)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 done" in again.stdout
    assert metrics(folder) == metrics(tmp_path / "whole")
    third = command("-m", "experiments.queue", file, folder=folder)
    assert third.returncode == 0
    assert "started" not in third.stdout


def metrics(folder):
    files = sorted((folder / "runs").rglob("metrics.jsonl"))
    assert len(files) == 4  # two rows, two seeds
    numbers = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [[{k: v for k, v in line.items() if "second" not in k} for line in lines] for lines in numbers]


@pytest.mark.slow
def test_a_command_that_fails_is_said_and_tried_again(tmp_path):
    file = written(tmp_path, "tests.toy --rows nothing", TOY.format(row="slow", steps=2))
    for _ in range(2):
        ran = command("-m", "experiments.queue", file, folder=tmp_path)
        assert ran.returncode == 1
        assert "failed with code 2: tests.toy --rows nothing" in ran.stderr
        assert "no row is called 'nothing'" in ran.stderr
        assert "1 of 2 done, 0 running, 1 left (1 of them failed)" in ran.stdout
    ended = json.loads((tmp_path / "all.txt.queue/ended.json").read_text())
    assert sorted(one["code"] for one in ended) == [0, 2]
