"""experiments: the command line refuses before it writes, a killed run ends with the same bits, the report is true."""

import json
import re
import subprocess
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compare
from experiments.common import files, loop, pictures, report, runs, tables, trained
from experiments.networks import layers
from experiments.networks.conv import Conv
from tests import toy
from tests.commands import ROOT, command, contents, kill, refused


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Two rows, tried out undisturbed: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, command("-m", "experiments.compare", "--smoke", "--rows", "batch", "batch*", folder=folder)


@pytest.mark.slow
def test_smoke_run_leaves_configurations_metrics_and_checkpoints(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stderr
    for name, row in (("batch", "batch"), ("batch*", "batch-star")):
        for k in range(2):
            seed = folder / "runs" / "compare-smoke" / row / f"seed-{k}"
            written = json.loads((seed / "config.json").read_text())
            assert written["seed"] == k
            assert written["config"] == runs.as_json(SMOKE[name])
            assert written["environment"]["jax"] == jax.__version__
            lines, arrays = contents(seed)
            assert [line["step"] for line in lines] == list(range(SMOKE[name].steps + 1))
            assert all({"loss", "penalty", "accuracy"} <= line.keys() for line in lines[1:])
            assert [line["step"] for line in lines if "test_accuracy" in line] == [0, 2, 4, 6]
            assert all((line["penalty"] > 0) == ("*" in name) for line in lines[1:])
            assert any("kernel" in name for name in arrays)
    assert sorted(p.name for p in (folder / "runs" / "compare-smoke").iterdir() if p.is_file()) == [
        "curves.png", "histograms.png", "metrics.csv", "report.html", "report.md", "response.png"
    ]  # fmt: skip


@pytest.mark.slow
def test_printed_table_holds_the_means_of_the_run_folders(smoke):
    folder, done = smoke
    seeds = [folder / "runs" / "compare-smoke" / "batch" / f"seed-{k}" / "metrics.jsonl" for k in range(2)]
    last = [files.read(seed)[-1] for seed in seeds]
    accuracy = [100 * line["test_accuracy"] for line in last]
    shown = f"{np.mean(accuracy):.2f} +- {np.std(accuracy, ddof=1):.2f}"
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| batch "))
    assert row.split("|")[2].strip() == shown
    assert row.split("|")[4].strip().startswith(f"{np.mean([line['test_correlation'] for line in last]):.3f}")
    assert row in (folder / "runs" / "compare-smoke" / "report.md").read_text()


@pytest.mark.slow
def test_html_report_needs_no_other_file(smoke):
    folder, _ = smoke
    html = (folder / "runs" / "compare-smoke" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<table>" in html
    assert "<em>" not in html  # the stars of the rows' names are no Markdown


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """The smallest experiment, run undisturbed."""
    folder = tmp_path_factory.mktemp("toy")
    done = command("-m", "tests.toy", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "n"),
    [
        ("checkpoint", 6),  # of seed 1 at step 4; seed 0 has its own
        ("steps", 2),
        ("metrics", 4),  # of seed 1 at step 2
        ("metrics", 1),  # before any checkpoint
        ("deletion", 3),  # of seed 0's step 2
    ],
)
def test_killed_run_resumes_to_the_same_bits(toys, tmp_path, moment, n):
    kill("tests.toy", moment, n, folder=tmp_path)
    resumed = command("-m", "tests.toy", "--resume", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for seed in ("slow/seed-0", "slow/seed-1", "fast-star/seed-0", "fast-star/seed-1"):
        assert contents(tmp_path / "runs" / "toy" / seed) == contents(toys / "runs" / "toy" / seed)
    tables = [(folder / "runs" / "toy" / "report.md").read_text().split("- `")[0] for folder in (tmp_path, toys)]
    assert tables[0] == tables[1]


def killed_and_resumed(undisturbed, folder, moment, n, *options):
    """What each seed of the main job, killed and resumed, left, beside what that of an undisturbed one left."""
    arguments = ["--smoke", "--rows", "batch*"]
    kill("experiments.compare", moment, n, *arguments, *options, folder=folder)
    resumed = command("-m", "experiments.compare", *arguments, "--resume", folder=folder)
    assert resumed.returncode == 0, resumed.stderr
    seeds = [Path("runs") / "compare-smoke" / "batch-star" / f"seed-{k}" for k in range(2)]
    return [(contents(folder / seed), contents(undisturbed / seed)) for seed in seeds]


@pytest.mark.slow
def test_run_on_many_devices_resumed_on_one_has_the_numbers_of_one(smoke, tmp_path):
    pairs = killed_and_resumed(smoke[0], tmp_path, "steps", 3, "--devices", "4")
    for (lines, arrays), (expected_lines, expected_arrays) in pairs:
        for line, expected in zip(lines, expected_lines, strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert lines[1:] != expected_lines[1:]  # or the devices were not used
        for name, expected in expected_arrays.items():
            values, wanted = (np.frombuffer(a, np.float32) for a in (arrays[name], expected))
            np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
    configs = [json.loads(path.read_text()) for path in tmp_path.rglob("seed-*/config.json")]
    assert [config["environment"]["devices"] for config in configs] == [4, 4]


# --- what is refused ------------------------------------------------------------------------------

SMOKE = {name: compare.configure(name, compare.Options(smoke=True)) for name in compare.ROWS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rows", "batch", "bacth*"],
            "no row is called 'bacth*'; did you mean 'batch*'? There are none, batch, layer, group, instance, rms, "
            "divisive, batch*, layer*, divisive*",
        ),
        (["--dataset", "digit"], "no data set is called 'digit'; did you mean 'digits'? There are digits, mnist, "
                                 "cifar10, cifar100"),
        (["--seeds", "0"], "--seeds is a positive number; found 0"),
        (["--lr", "-0.1"], "--lr is a positive number; found -0.1"),
        (["--batch-size", "0"], "--batch-size is a positive number; found 0"),
        (["--devices", "0"], "--devices is a positive number; found 0"),
        (["--devices", "3"], "a batch of 50 examples does not divide over 3 devices; choose other --devices or "
                             "--batch-size"),
        (["--processes", "2"], "--coordinator, --processes and --process go with --distributed"),
        (["--resume", "--overwrite"], "--resume keeps results and --overwrite deletes them: choose one"),
    ],
)  # fmt: skip
def test_wrong_command_is_refused_and_writes_nothing(capsys, tmp_path, arguments, message):
    assert refused(capsys, compare.main, "--out", str(tmp_path), *arguments) == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_more_devices_than_a_running_backend_has_are_refused(capsys, tmp_path):
    many = jax.local_device_count() + 1
    device = jax.local_devices()[0]
    assert refused(capsys, compare.main, "--out", str(tmp_path), "--devices", str(many)) == (
        f"error: --devices {many}: found {many - 1} ({device.platform}: {device.device_kind})\n"
    )


def test_misspelt_option_names_the_closest(capsys, tmp_path):
    error = refused(capsys, compare.main, "--out", str(tmp_path), "--sedes", "3")
    assert "--sedes" in error
    assert "--seeds INT" in error
    assert list(tmp_path.iterdir()) == []


def test_results_are_neither_lost_nor_mixed(capsys, tmp_path):
    folder = tmp_path / "compare" / "batch-star"
    runs.create([folder / "seed-0"], compare.configure("batch*", compare.Options(steps=20)), {})
    files.append(folder / "seed-0" / "metrics.jsonl", [{"step": 0}, {"step": 1}])
    out = ["--out", str(tmp_path), "--steps"]
    assert refused(capsys, compare.main, *out, "20", "--rows", "batch-star") == (
        f"error: {folder} already holds a run; --resume continues or keeps it, --overwrite deletes it first, "
        "--out starts elsewhere\n"
    )
    differs = (
        f"error: {folder / 'seed-0'} holds a run of another configuration: steps (20 there, 30 here), "
        "evaluate_every (2 there, 3 here), lr (0.05 there, 0.1 here); choose another --out, or the same options\n"
    )
    assert refused(capsys, compare.main, *out, "30", "--lr", "0.1", "--rows", "batch-star", "--resume") == differs
    assert refused(capsys, compare.main, *out, "30", "--lr", "0.1", "--rows", "layer") == differs
    assert sorted(p.name for p in folder.rglob("*")) == ["config.json", "metrics.jsonl", "seed-0"]


# --- the shared parts -----------------------------------------------------------------------------


def test_smallest_experiment_lists_trains_resumes_and_reports(capsys, tmp_path):
    toy.main(["--list"])
    assert capsys.readouterr().out == "slow, fast*\n"
    out = ["--out", str(tmp_path)]
    toy.main([*out, "--rows", "slow"])
    folder, before = tmp_path / "toy", contents(tmp_path / "toy" / "slow" / "seed-1")
    assert [line.get("test_error") is not None for line in before[0]] == [True, False, True, False, True, False, True]
    toy.main([*out, "--resume"])  # rows that are complete stay, and the report has both
    assert contents(folder / "slow" / "seed-1") == before
    errors = [files.read(folder / "fast-star" / f"seed-{k}" / "metrics.jsonl")[-1]["test_error"] for k in range(2)]
    shown = f"| {np.mean(errors):.3f} +- {np.std(errors, ddof=1):.3f} |"
    for page in (capsys.readouterr().out, (folder / "report.md").read_text()):
        assert [shown in line for line in page.splitlines() if line.startswith("| `fast*`")] == [True]
    mixed = [*out, "--steps", "2", "--rows", "slow", "--overwrite"]
    assert refused(capsys, toy.main, *mixed).startswith(
        f"error: {folder / 'fast-star' / 'seed-0'} holds a run of another"
    )
    toy.main([*out, "--steps", "2", "--overwrite"])
    assert len(contents(folder / "slow" / "seed-0")[0]) == 3


def test_an_experiment_of_no_steps_measures_the_first_weights(tmp_path):
    toy.main(["--out", str(tmp_path), "--steps", "0"])
    ((line,), _) = contents(tmp_path / "toy" / "slow" / "seed-0")
    assert line.keys() == {"step", "test_error"}


def test_torn_line_and_later_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append(path, [{"step": 0, "loss": 0.1}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.3}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "lo')
    assert files.read(path) == [{"step": 0, "loss": 0.1}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.3}]
    files.keep_until(path, 2)
    assert path.read_bytes() == whole
    files.keep_until(path, 1)
    assert [line["step"] for line in files.read(path)] == [0, 1]


def test_seeds_resume_at_their_last_common_checkpoint(tmp_path):
    seeds = [tmp_path / "seed-0", tmp_path / "seed-1"]
    for seed, steps in zip(seeds, (["4", "6"], ["4", "6.orbax-checkpoint-tmp"]), strict=True):
        for step in steps:
            (seed / "checkpoint" / step).mkdir(parents=True)
    assert runs.last_step(seeds) == 4


def test_committed_states_come_back_bit_for_bit(tmp_path):
    seeds = [tmp_path / "seed-0", tmp_path / "seed-1"]
    for seed in seeds:
        seed.mkdir()
    states = {"w": jax.random.normal(jax.random.key(0), (2, 3)), "count": jnp.array([5, 5], jnp.int32)}
    for step in (2, 4):
        runs.commit(seeds, step, [[{"step": step}]] * 2, states)
    assert [p.name for p in (seeds[0] / "checkpoint").iterdir()] == ["4"]
    restored = runs.rewind(seeds, jax.eval_shape(lambda: states))
    assert restored is not None
    step, loaded = restored
    assert step == 4
    assert {k: (v.dtype, v.tobytes()) for k, v in loaded.items()} == {
        k: (v.dtype, np.asarray(v).tobytes()) for k, v in states.items()
    }


def test_order_of_examples_does_not_depend_on_where_a_chunk_starts():
    _, keys, _ = loop.keys(3)
    whole = np.asarray(loop.batches(keys, 11, 2, 0, 12))
    pieces = [np.asarray(loop.batches(keys, 11, 2, *ends)) for ends in ((0, 3), (3, 4), (4, 12))]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    epochs = whole[:, :10].reshape(3, 2, 10)
    assert all(len(set(epoch.tolist())) == 10 for seed in epochs for epoch in seed)
    assert len({tuple(epoch.tolist()) for seed in epochs for epoch in seed}) == 6


@pytest.mark.parametrize("size", [(3, 3), (5, 4), (1, 1)])
def test_convolution_equals_flaxs_under_vmap(size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 8, 3)).astype(np.float32)
    params = {"kernel": rng.normal(size=(2, *size, 3, 6)), "bias": rng.normal(size=(2, 6))}
    variables = {"params": jax.tree.map(lambda a: a.astype(np.float32), params)}
    y = jax.vmap(Conv(6, size, form="patches").apply, in_axes=(0, None))(variables, x)
    for k in range(2):
        expected = nn.Conv(6, size).apply(jax.tree.map(lambda a, k=k: a[k], variables), x)
        np.testing.assert_allclose(y[k], expected, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 5, 2)])
def test_max_pool_equals_flaxs(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_array_equal(layers.max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.slow
def test_histograms_show_a_typical_pair_of_living_units_and_say_what_diverged():
    z = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    z[:, 1] += z[:, 0]
    z[:, 3] = 0.1  # dead
    layers = {"batch": z, "batch*": np.full_like(z, np.nan)}
    figure = pictures.draw_histograms({"batch*": "batch"}, layers)
    above, below = figure.axes
    i, j = (int(label.split()[-1]) for label in (above.get_xlabel(), above.get_ylabel()))
    r = np.abs(np.corrcoef(z[:, :3].T))
    pairs = r[np.triu_indices(3, 1)]
    assert above.get_title() == f"batch: |r| = {r[i, j]:.2f}"
    assert abs(r[i, j] - pairs.mean()) == pytest.approx(abs(pairs - pairs.mean()).min())
    np.testing.assert_array_equal(above.collections[0].get_array(), np.histogram2d(z[:, i], z[:, j], 60)[0].T)
    assert below.get_title() == "batch*: diverged"


def test_differences_are_paired_over_seeds():
    assert report.difference([0.9, 0.5], [0.8, 0.4]) == pytest.approx((0.1, 0.0))


def test_training_that_diverges_leaves_valid_json():
    assert [files.number(v) for v in (np.float32(0.1), np.nan, np.inf)] == [float(np.float32(0.1)), None, None]


@pytest.mark.parametrize("row", compare.ROWS)
def test_configuration_in_json_evaluates_back(row):
    written = json.loads(json.dumps(runs.as_json(compare.ROWS[row])))
    assert eval(written["normalizer"], {"Normalizer": compare.Normalizer}) == compare.ROWS[row].normalizer


def test_curves_of_rows_that_all_diverged_are_drawn():
    lines = [{"step": k, "loss": None} for k in range(1, 9)]
    figure = report.curves({"bn": trained.Row({}, {}, [lines])}, {"loss": "training loss (log)"}, lambda name: {}, 2)
    assert figure.axes[0].get_yscale() == "linear"


# --- what the documents say of the reports -------------------------------------------------------

EXPERIMENTS = ROOT / "experiments"
LESS_IS_BETTER = ("correlation", "mutual information", "test perplexity")


def differences(page: str) -> dict[tuple[str, str, str], str]:
    """Each difference of a report's tables of pairs, by metric and rows."""
    found, metric = {}, ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        metric = cells[2] if line.startswith("| pair ") else metric
        if pair := re.match(r"\| `(.+)` - `(.+)` +\|", line):
            found[metric, *pair.groups()] = cells[2]
    return found


def test_each_answer_to_a_claim_follows_from_the_report_that_it_links():
    row = r"^\| (.+) \| \[.+\]\((.+)\): (.+) \| `(.+)` - `(.+)` \| (.+) \| (.+) \|$"
    lines = re.findall(row, (EXPERIMENTS / "README.md").read_text(), re.M)
    assert len(lines) == 18
    for claim, link, metric, better, worse, shown, answer in lines:
        of = differences((EXPERIMENTS / link).read_text())
        assert [
            text for (title, *pair), text in of.items() if title.startswith(metric) and pair == [better, worse]
        ] == [shown]
        mean, _, std = shown.partition(" +- ")
        lower = metric in LESS_IS_BETTER or claim == "BN ruins super-resolution"
        assert answer == tables.answer(float(mean), float(std or "nan"), lower)


def test_numbers_in_the_prose_stand_in_the_report_linked_before_them():
    checked = 0
    for section in (EXPERIMENTS / "README.md").read_text().split("\n### ")[1:]:
        (link,) = re.findall(r"\]\((results/.+report\.md)\)", section)
        lines = [line for line in section.partition("\n## ")[0].splitlines() if not line.startswith(("|", "    "))]
        numbers = re.findall(r"(?<![\w.])\d+\.\d+", re.sub(r"`[^`]*`", "", "\n".join(lines)))
        said = (EXPERIMENTS / link).read_text()
        assert [number for number in numbers if number not in said] == []
        checked += len(numbers)
    assert checked > 20


def test_readme_shows_the_committed_report_of_the_main_job():
    page = (EXPERIMENTS / "results" / "compare" / "report.md").read_text()
    readme = (ROOT / "README.md").read_text()
    first = page.partition("Mean +-")[0]
    rows = re.findall(r"^\| ([\w*]+) +\| +([\d. +-]+) \| +([\d. +-]+) \| +([\d. +-]+) \|", first, re.M)
    assert [name for name, *_ in rows] == list(compare.ROWS)
    for row in rows:
        assert f"| {' | '.join(cell.strip() for cell in row)} |" in readme
    for start in (
        "Accuracy, in per cent, paired over seeds",
        "Correlation between first-layer units, paired over seeds",
    ):
        (sentence,) = re.findall(rf"^({start}: .*)$", page, re.M)
        assert sentence.replace("*", "\\*") in readme.replace("\n> ", " ")
    facts = re.search(r"cpu (?!cpu)([^,]+), cores (\d+)", page)
    assert facts is not None
    assert f"{facts[1]}, {facts[2]} cores" in readme
    picture = EXPERIMENTS / "results" / "compare" / "histograms.png"
    assert picture.read_bytes() == (ROOT / "docs" / "histograms.png").read_bytes()
