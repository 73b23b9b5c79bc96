"""benchmarks/: every script runs, compares like with like, and says what its numbers depend on. Nothing here is timed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    accelerators,
    chips,
    harness,
    loops,
    neighbours,
    norms,
    recurrent,
    results,
    scaling,
    steps,
    windows,
)
from benchmarks.harness import Case, Contender, Options

ROOT = Path(__file__).parents[1]
# A few cases of each script that compile quickly, and the rest.
QUICK = {
    "windows": (windows, ["--kinds", "along channels", "--widths", "3", "5", "--modes", "forward+backward"]),
    "recurrent": (recurrent, ["--cells", "RNN", "--steps", "2", "--modes", "forward"]),
    "steps": (steps, ["--models", "stack, layer norm"]),
}
WHOLE = {
    "all of norms": (norms, []),
    "all of windows": (windows, ["--widths", "3", "5"]),
    "all of recurrent": (recurrent, ["--steps", "1", "2"]),
    "all of steps": (steps, []),
    "all of scaling": (scaling, ["--megabytes", "1", "2"]),
    "all of loops": (loops, []),
}
PARAMS = [
    *(pytest.param(*given, id=name) for name, given in QUICK.items()),
    *(pytest.param(*given, id=name, marks=pytest.mark.slow) for name, given in WHOLE.items()),
]
# In the tables only where they are installed.
OPTIONAL = {name: importlib.util.find_spec(name) is not None for name in ("haiku", "equinox", "torch")}
COMPILED_FOR = [chip for chip in ("v5e", "h200") if not chips.missing(chip)]


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("script", "arguments"), PARAMS)
def test_script_measures_and_writes_what_it_measured(script, arguments, tmp_path, capsys):
    """That the libraries agree is asserted by the harness itself, see below."""
    found = script.main(["--smoke", "--out", str(tmp_path), *arguments])
    name = script.__name__.rpartition(".")[2]
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(found))
    assert {"command", "device", "platform", "cores", "versions", "date", "heap", "rows"} <= found.keys()
    assert found["command"].startswith(f"python -m benchmarks.{name} --smoke")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert text.rstrip() == (tmp_path / f"{name}.md").read_text().rstrip()
    assert found["command"] in text
    for row in found["rows"]:
        assert f" {row['contender']} |" in text
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["ratio"] == 1 or row["contender"] != row["peer"]
        assert row["floors"] is None or row["floors"] > 0
        assert row["error"] is None or math.isfinite(row["error"])
    for row in found.get("compile", []):
        assert row["normjax"] > 0
        assert (row["flax"] is not None) == (row["row"] in scaling.FLAX)


@pytest.mark.skipif(not COMPILED_FOR, reason=chips.missing("v5e"))
def test_accelerators_are_compiled_for_and_what_was_counted_is_written(tmp_path, capsys):
    """In `make aot`, where the compilers are."""
    some = ["--smoke", "--rows", "rms", "divisive", "--dtypes", "bfloat16", "--chips", *COMPILED_FOR]
    found = accelerators.main([*some, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "accelerators.json").read_text()) == json.loads(json.dumps(found))
    assert found["command"].startswith("python -m benchmarks.accelerators --smoke")
    text = capsys.readouterr().out
    assert text.rstrip() == (tmp_path / "accelerators.md").read_text().rstrip()
    assert len(found["rows"]) == 2 * 2 * 2 * len(COMPILED_FOR)  # rows, modes, normjax and its peer
    for row in found["rows"]:
        assert f"{row['chip']}, {row['mode']}: passes" in text
        assert f" {row['passes']:.2f} |" in text
        assert 0 < row["passes"] <= row["worst"]
        assert row["kernels"] > 0 <= row["temporary"]


@pytest.mark.skipif(not COMPILED_FOR, reason=chips.missing("v5e"))
def test_neighbours_are_compiled_with_every_norm(tmp_path):
    """In `make aot`, where the compilers are."""
    found = neighbours.main(["--smoke", "--chips", COMPILED_FOR[0], "--out", str(tmp_path)])
    assert [row["contender"] for row in found["rows"][::2]] == list(neighbours.CONTENDERS)
    assert all(row["passes"] > 0 for row in found["rows"])
    assert "| AddNorm, kernel |" in (tmp_path / "neighbours.md").read_text()


def test_norms_have_every_library_that_is_installed():
    x = jnp.ones((4, 8))
    names = {c.name for c in norms.contenders("layer", harness.BOTH, x, x)}
    required = {"normjax.linen", "normjax.nnx", "flax.linen", "flax.nnx"}
    assert names == required | {name for name, here in OPTIONAL.items() if here}


def case(*calls, passes=2.0, **more):
    some = [Contender(name, call, (jnp.arange(1.0, 5.0),), **more) for name, call in calls]
    return Case("c", "forward", jnp.ones(1000), some, some[0].name, passes)


def test_contenders_that_compute_different_things_are_refused():
    wrong = case(("ours", lambda x: {"y": x}), ("theirs", lambda x: {"y": 1.01 * x}))
    with pytest.raises(AssertionError, match=r"theirs differs by 1.0e-02 in y"):
        harness.compare([wrong], Options(smoke=True))


def test_a_nan_agrees_with_nothing():
    assert harness.disagreement({"y": np.array([np.nan])}, {"y": np.array([1.0])}) == {"y": math.inf}
    assert harness.disagreement({"y": np.array([1.0])}, {"y": np.array([np.nan])}) == {"y": math.inf}


def test_results_of_other_shapes_or_names_are_refused():
    one, two = np.ones(1), np.ones(2)
    with pytest.raises(ValueError, match="y has shapes"):
        harness.disagreement({"y": one}, {"y": two})
    with pytest.raises(ValueError, match="different names"):
        harness.disagreement({"y": one}, {"z": one})


def test_floor_is_half_the_passes_times_the_copy():
    rows = {
        r.contender: r for r in harness.compare([case(("ours", lambda x: {"y": x}), passes=5.0)], Options(rounds=3))
    }
    assert rows["copy"].floors == pytest.approx(2 / 5)
    assert rows["ours"].floors == pytest.approx(rows["ours"].seconds / rows["copy"].seconds * 2 / 5)
    assert rows["copy"].ratio == pytest.approx(rows["copy"].seconds / rows["ours"].seconds)
    assert {r.turns for r in rows.values()} == {3}


def test_temporary_memory_is_what_xla_says():
    def keeps(x):
        return {"y": jnp.tanh(x @ x) @ x}  # the first product has to lie somewhere

    x = jnp.ones((64, 64))
    (ours, _) = harness.compare(
        [Case("c", "forward", x, [Contender("ours", keeps, (x,))], "ours")], Options(smoke=True)
    )
    memory = jax.jit(keeps).lower(x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes >= x.nbytes
    assert ours.temporary == memory.temp_size_in_bytes / x.nbytes
    assert ours.floors is None


def test_a_contender_over_the_limit_has_one_turn_and_is_left_out_of_wider_cases(capsys):
    def sleep(x):
        time.sleep(0.05)
        return {"y": x}

    some = [Contender("ours", lambda x: {"y": x}, (jnp.ones(3),)), Contender("slow", sleep, (jnp.ones(3),), torch=True)]
    pair = [Case(f"k {k}", "forward", jnp.ones(3), some, "ours", group="k") for k in (3, 5)]
    rows = harness.compare(pair, Options(rounds=4, limit=0.04))
    turns = {(r.case, r.contender): r.turns for r in rows}
    assert turns == {("k 3", "ours"): 4, ("k 3", "slow"): 1, ("k 3", "copy"): 4, ("k 5", "ours"): 4, ("k 5", "copy"): 4}
    assert "slow takes" in capsys.readouterr().err
    assert "| k 5 1 |" not in results.tables(rows, ["ratio"]).replace("  ", " ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux")
@pytest.mark.parametrize(("asked", "before"), [("kept", "stock"), ("stock", "kept")])
def test_heap_is_the_one_asked_for(asked, before):
    """The process starts itself again, with what it was called with."""
    code = (
        "import sys; from benchmarks import harness, results; "
        "print(results.start(harness.Options, None, 'x.py', '').heap, results.heap(), sys.flags.utf8_mode)"
    )
    clean = {k: v for k, v in os.environ.items() if k not in results.KEPT}
    environment = clean | (results.KEPT if before == "kept" else {})
    command = [sys.executable, "-X", "utf8", "-c", code, "--heap", asked]
    out = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [asked, asked, "1"]
