"""Two processes of two devices each, joined by jax.distributed on this machine, give the numbers of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common import cli
from normjax import Normalizer, normalize, train
from tests.commands import contents
from tests.test_train import alike, maker, masked_data

ROOT = Path(__file__).parents[1]
PROCESSES, DEVICES = 2, 2
SECONDS, PATIENCE = 240, 20  # for a job, and for the others once one has failed, before all are killed

# Each process runs this with its number and the coordinator's port; process 0 writes what it computed.
WORKER = """
import sys
import numpy as np
from experiments.common import cli

port, process, path = sys.argv[1:]
mesh = cli.connect(2, True, f"127.0.0.1:{port}", 2, int(process))
from tests import test_distributed
numbers = test_distributed.compute(mesh)
if process == "0":
    np.savez(path, **numbers)
"""

# Runs the main job; process 1 is killed (no clean-up) before its third chunk of steps.
KILLER = """
import os, signal, sys
from experiments import compare
from experiments.common import loop

chunks = 0

def batches(*args, do=loop.batches):
    global chunks
    chunks += 1
    if chunks == 3 and sys.argv[sys.argv.index("--process") + 1] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return do(*args)

loop.batches = batches
compare.main(sys.argv[1:])
"""

# One process refuses, and the others are not left waiting.
REFUSER = """
import sys
from experiments.common import cli

port, process = sys.argv[1:3]
cli.connect(1, True, f"127.0.0.1:{port}", 2, int(process))
with cli.together():
    print("in step")
cli.agree("alike", "options")
if sys.argv[3] == "room":
    with cli.together():
        if process == "1":
            cli.fail("no room")
cli.agree(process, "options")
print("went on")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def together(folder, *commands, only=None):
    """Runs commands of Python side by side: their exit codes, and what each printed.

    Waits for all of them (or for number `only`), then kills what is left; a failed one is given company for a while.
    """
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    logs = [folder / f"process-{k}.log" for k in range(len(commands))]
    running, until = [], time.monotonic() + SECONDS
    try:
        for command, path in zip(commands, logs, strict=True):
            with open(path, "w") as log:
                command = [sys.executable, *command]
                running.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))
        awaited = running if only is None else [running[only]]
        while any(process.poll() is None for process in awaited):
            if any(process.returncode for process in awaited):
                until = min(until, time.monotonic() + PATIENCE)
            if time.monotonic() > until:
                break
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [process.returncode for process in running], [path.read_text() for path in logs]


def compare(folder, *arguments, script=("-m", "experiments.compare"), processes=PROCESSES, only=None):
    """Tries the main job's row batch* out, in so many processes; results go to folder/runs of process 0."""
    commands = [[*script, "--smoke", "--rows", "batch*", *arguments]]
    if processes > 1:
        port = free_port()
        joined = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
        joined += ["--devices", str(DEVICES)]
        commands = [
            [*commands[0], *joined, "--process", str(k), "--out", "runs" if k == 0 else f"other-{k}"]
            for k in range(processes)
        ]
    return together(folder, *commands, only=only)


def results(folder):
    return [contents(folder / "runs" / "compare-smoke" / "batch-star" / f"seed-{k}") for k in range(2)]


def compute(mesh):
    """Normalizations and training steps as a flat dictionary; without a mesh on one device."""
    numbers = {}
    x = np.random.default_rng(0).normal(0.3, 1.5, (8, 8, 5, 16)).astype(np.float32)
    replicated = None if mesh is None else NamedSharding(mesh, P())
    for name, (normalizer, spec) in {
        "batch": ("batch", P("data")),
        "windows": (Normalizer("...:5 c", "...:3 c", eps=0.5), P(None, "data")),  # they reach over to other processes
    }.items():

        def both(x, normalizer=normalizer):
            def weighted(x):
                y = normalize(x, normalizer).y
                return jnp.sum(jnp.sin(y)), y

            (_, y), gradient = jax.value_and_grad(weighted, has_aux=True)(x)
            return y, gradient

        on = jnp.asarray(x) if mesh is None else jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: x[index]
        )  # fmt: skip
        numbers[f"{name} y"], numbers[f"{name} gradient"] = jax.jit(both, out_shardings=replicated)(on)
    for api in ("linen", "nnx"):
        state, make = maker(api, None)
        batch = jax.tree.map(np.asarray, masked_data())
        step = jax.jit(make(micro_batches=2) if mesh is None else make(micro_batches=2, mesh=mesh))
        if mesh is not None:
            part = jax.tree.map(lambda a: np.split(a, PROCESSES)[jax.process_index()], batch)
            state, batch = train.place(state, mesh), train.shard(part, mesh)
        metrics = {}
        for key in jax.random.split(jax.random.key(3)):
            state, metrics = step(state, batch, key)
        leaves = jax.tree.leaves((state.params, state.stats, state.opt_state, metrics))
        for i, leaf in enumerate(leaves):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            numbers[f"{api} {i}"] = jax.random.key_data(leaf) if is_key else leaf
    return {name: np.asarray(value) for name, value in numbers.items()}


@pytest.mark.slow
def test_normalizations_gradients_and_training_steps_are_those_of_one_process(tmp_path):
    port, path = free_port(), str(tmp_path / "numbers.npz")
    codes, printed = together(tmp_path, *(["-c", WORKER, port, str(k), path] for k in range(PROCESSES)))
    assert codes == [0, 0], "\n".join(printed)
    alike(compute(None), dict(np.load(path)))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    (code,), (printed,) = compare(folder, processes=1)
    assert code == 0, printed
    return results(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, printed = compare(folder)
    assert codes == [0, 0], "\n".join(printed)
    assert "| batch* " in printed[0]
    assert "| batch* " not in printed[1]
    return folder


def same_but_for_rounding(found, expected):
    for (lines, arrays), (expected_lines, expected_arrays) in zip(found, expected, strict=True):
        assert [line.keys() for line in lines] == [line.keys() for line in expected_lines]
        for line, wanted in zip(lines, expected_lines, strict=True):
            assert line == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert arrays.keys() == expected_arrays.keys()
        for name, wanted in expected_arrays.items():
            values, expected_values = (np.frombuffer(a, np.float32) for a in (arrays[name], wanted))
            np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_main_job_in_two_processes_is_that_of_one(one, two):
    same_but_for_rounding(results(two), one)
    assert not list(two.glob("other-*"))  # process 0 alone writes
    written = json.loads((two / "runs" / "compare-smoke" / "batch-star" / "seed-0" / "config.json").read_text())
    assert (written["environment"]["devices"], written["environment"]["processes"]) == (4, 2)


@pytest.mark.slow
def test_a_killed_job_goes_on_with_the_same_bits_and_in_one_process_with_the_same_numbers(one, two, tmp_path):
    codes, printed = compare(tmp_path, script=("-c", KILLER), only=1)
    assert codes[1] == -signal.SIGKILL, "\n".join(printed)
    (tmp_path / "alone").mkdir()
    subprocess.run(["cp", "-r", tmp_path / "runs", tmp_path / "alone"], check=True)
    codes, printed = compare(tmp_path, "--resume")
    assert codes == [0, 0], "\n".join(printed)
    assert results(tmp_path) == results(two)
    (code,), (text,) = compare(tmp_path / "alone", "--resume", processes=1)
    assert code == 0, text
    same_but_for_rounding(results(tmp_path / "alone"), one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("room", ["process 1 stopped; its own message says why", "no room"]),
        ("options", ["process 1 has options other than those of process 0"] * 2),
    ],
)
def test_what_one_process_refuses_all_refuse(tmp_path, what, messages):
    port = free_port()
    codes, printed = together(tmp_path, *(["-c", REFUSER, port, str(k), what] for k in range(PROCESSES)))
    assert codes == [2, 2], "\n".join(printed)
    for text, message in zip(printed, messages, strict=True):
        assert "in step" in text
        assert f"error: {message}\n" in text
        assert "went on" not in text


def test_one_process_alone_passes_errors_on():
    with pytest.raises(KeyError, match="its own"), cli.together():
        raise KeyError("its own")
