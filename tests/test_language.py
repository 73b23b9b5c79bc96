"""experiments.language: texts, the recurrent models, the schedule, the paper's test, and the command."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.train
from experiments import language
from experiments.common import cli, data, files, loop, text
from experiments.networks.language import LanguageModel, mean_nats
from normjax.penalty import total_penalty
from tests.commands import contents, kill_here, refused

# --- texts ----------------------------------------------------------------------------------------


def write(folder: Path, **files: str | bytes) -> Path:
    """Files by name, a double underscore for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / f"{name.replace('__', '.')}.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_words_are_numbered_by_frequency_and_unknown_ones_are_unk(tmp_path):
    write(tmp_path, train=" b a b \n b a c\r\n", valid="a d\n", test="b")
    read = text.load(tmp_path)
    assert read.symbols == ("b", "<eos>", "a", "c", "<unk>")
    assert [part.tolist() for part in read[1:4]] == [[0, 2, 0, 1, 0, 2, 3, 1], [2, 4, 1], [0, 1]]


def test_characters_are_those_of_the_words_with_one_space_between(tmp_path):
    write(tmp_path, en__train=" aa  b\nb\n", en__valid="a\n", en__test="b")
    read = text.load(tmp_path, "char")
    assert "".join(read.symbols[k][0] for k in read.train) == "aa b<b<"


def test_treebank_files_are_found_below_the_folder_beside_the_copies_by_characters(tmp_path):
    inner = write(
        tmp_path / "simple-examples" / "data", ptb__char__train="a _ b", ptb__train="", ptb__valid="", ptb__test=""
    )
    for folder in (tmp_path, tmp_path / "simple-examples", inner):
        assert [path.name for path in text.find(folder).values()] == ["ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no texts: expected simple-examples/data/ptb.train.txt"),
        (
            {"train": "a\n", "valid": "a\n"},
            "has no test text: expected test.txt or NAME.test.txt beside train.txt, valid.txt",
        ),
        ({"train": "a\n", "valid": "", "test": "a\n"}, r"valid.txt is empty \(0 bytes\), expected lines of text"),
        ({"train": "a\n", "valid": "a\n", "test": b"ab\xff\n"}, "test.txt is not UTF-8 text: byte 2 of 4 is none"),
        ({"train": "a\n", "valid": "a\n", "test": b"a\0b\0\n\0"}, "test.txt is not UTF-8 text: it holds zero bytes"),
        (
            {"a__train": "a", "b__train": "a", "valid": "a", "test": "a"},
            "several train texts, a.train.txt, b.train.txt",
        ),
        (
            {"ptb__train": "a\n", "ptb__valid": "a\n", "ptb__test": "a\n"},
            r"ptb.train.txt is truncated or not the Treebank's: found 2 bytes, expected 5,101,618 bytes with SHA-256 fcea91",
        ),
    ],
)
def test_wrong_files_are_named_with_what_was_expected(tmp_path, files, message):
    with pytest.raises(data.DataError, match=message):
        text.load(write(tmp_path, **files))


def test_packed_archive_and_missing_folder_are_named(tmp_path):
    (tmp_path / "simple-examples.tgz").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"unpack .*simple-examples\.tgz first"):
        text.load(tmp_path)
    with pytest.raises(data.DataError, match=r"there is no folder .*nowhere"):
        text.load(tmp_path / "nowhere")


def test_documentation_needs_no_files_and_its_parts_share_no_topic():
    read = text.load(None)
    assert len(read.symbols) == text.DOCUMENTATION_WORDS
    assert len(read.train) > 50_000
    assert min(len(read.valid), len(read.test)) > 2_000
    topics = [set(re.findall(r"^topic ([a-z_]+)$", part, re.MULTILINE)) for part in text.documentation().values()]
    assert all(topics)
    assert not topics[0] & (topics[1] | topics[2])
    assert not topics[1] & topics[2]


def test_segments_follow_each_other_and_predict_each_token_once():
    tokens = np.arange(1, 48)
    cut = text.segments(tokens, 3, 4)
    assert cut["first"].tolist() == [True, False, False]
    streams = np.concatenate([*cut["tokens"][:, :, :-1], cut["tokens"][-1, :, -1:]], axis=1)
    np.testing.assert_array_equal(streams, tokens[:45].reshape(3, 15)[:, :13])
    whole = text.segments(tokens, 1, 10, whole=True)["tokens"][:, 0, 1:].ravel()
    assert whole[whole >= 0].tolist() == tokens[1:].tolist()
    with pytest.raises(data.DataError, match="a text of 47 tokens is too short: 3 x 21 are needed"):
        text.segments(tokens, 3, 20)


# --- the model ------------------------------------------------------------------------------------

V, H, N, T = 7, 5, 2, 4


def model(row: str, cell: str, unrolled: int = T, hidden: int = H) -> LanguageModel:
    return LanguageModel(
        row, cell, "code", vocabulary=V, hidden=hidden, layers=2, unrolled=unrolled, max_steps=unrolled
    )


def some_tokens(length: int = T) -> jax.Array:
    return jax.random.randint(jax.random.key(3), (N, length), 0, V)


def start(of: LanguageModel) -> dict:
    variables = dict(of.init(jax.random.key(0), some_tokens(of.unrolled), jnp.array(True), train=True))
    return {name: held for name, held in variables.items() if name != "losses"}


def by_hand(params: dict, tokens: np.ndarray, cell: str) -> np.ndarray:
    """Logits [t, n, vocabulary] of row base in NumPy float64, from zero states."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = p["embedding"]["embedding"][tokens.T]
    for k in range(2):
        w = p[f"layer_{k}"]["cell"]
        h = c = np.zeros((tokens.shape[0], H))
        outputs = []
        for step in x:
            if cell == "lstm":
                z = {g: step @ w["i" + g]["kernel"] + h @ w["h" + g]["kernel"] + w["h" + g]["bias"] for g in "ifgo"}
                i, f, o = (1 / (1 + np.exp(-z[g])) for g in "ifo")
                c = f * c + i * np.tanh(z["g"])
                h = o * np.tanh(c)
            else:
                z = step @ w["i"]["kernel"] + w["i"]["bias"] + h @ w["h"]["kernel"]
                h = np.tanh(z) if cell == "tanh" else np.maximum(z, 0)
            outputs.append(h)
        x = np.stack(outputs)
    return x @ p["softmax"]["kernel"] + p["softmax"]["bias"]


@pytest.mark.parametrize("cell", [pytest.param("lstm", marks=pytest.mark.slow), "relu"])
def test_base_model_equals_numpys_and_carries_its_state_until_the_text_begins_anew(cell):
    of = model("base", cell)
    variables = start(of)
    variables["params"] = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), variables["params"]
    )
    tokens = np.asarray(some_tokens(2 * T))
    expected = by_hand(variables["params"], tokens, cell)
    run = jax.jit(lambda v, tokens, first: of.apply(v, tokens, first, train=True, mutable=["carry"]))

    carried: dict = {"carry": jax.tree.map(lambda a: a + 1, variables["carry"])}  # is forgotten
    for part, first in ((slice(0, T), True), (slice(T, 2 * T), False)):
        logits, carried = run({**variables, **carried}, tokens[:, part], jnp.array(first))
        np.testing.assert_allclose(logits, expected[part], rtol=1e-5, atol=1e-5)


def test_penalty_is_summed_over_steps_and_layers():
    of = model("ln-l1", "tanh")
    variables, tokens = start(of), some_tokens()
    _, changed = of.apply(variables, tokens, jnp.array(True), train=True, mutable=["carry", "losses"])
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x, expected = p["embedding"]["embedding"][np.asarray(tokens).T], 0.0
    for k in range(2):
        w, h, outputs = p[f"layer_{k}"]["cell"], np.zeros((N, H)), []
        for step in x:
            z = step @ w["i"]["kernel"] + w["i"]["bias"] + h @ w["h"]["kernel"]
            v = z - z.mean(-1, keepdims=True)
            expected += 1e-2 * np.abs(v).mean()
            h = np.tanh(v / np.sqrt(1e-4 + np.square(v).mean(-1, keepdims=True)))
            outputs.append(h)
        x = np.stack(outputs)
    assert float(total_penalty(changed["losses"])) == pytest.approx(expected, rel=1e-5)


def test_test_of_one_stream_counts_every_prediction_once_with_the_state_carried():
    of = model("base", "tanh")
    variables = start(of)
    state = normjax.train.State(jnp.array(0), variables.pop("params"), variables, ())
    tokens = np.asarray(jax.random.randint(jax.random.key(4), (24,), 0, V))
    nats = mean_nats(of, state, text.segments(tokens, 1, 10, whole=True))
    logits = by_hand(state.params, tokens[None, :-1], "tanh")[:, 0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert float(nats) == pytest.approx(-log_p[np.arange(23), tokens[1:]].mean(), rel=1e-5)


@pytest.mark.slow
def test_test_of_batch_norm_takes_the_statistics_of_the_first_step_and_validation_those_of_each():
    of = model("bn", "relu")
    variables = start(of)
    params, segments = variables.pop("params"), text.segments(np.arange(12) % V, N, T)

    def nats(of, at):
        changed = jax.tree.map(lambda a: a if at is None else a.at[at].add(3.0), variables["batch_stats"])
        state = normjax.train.State(jnp.array(0), params, {**variables, "batch_stats": changed}, ())
        return float(run(of, state, segments))

    run = jax.jit(mean_nats, static_argnums=0)
    test = of.clone(max_steps=1)
    assert nats(test, 2) == nats(test, None) != nats(test, 0)
    assert nats(of, 2) != nats(of, None) != nats(of, 0)


# --- the schedule and the rows --------------------------------------------------------------------

ZEROS = [np.zeros(n, np.int32) for n in (929_589, 73_760, 82_430)]
SOME = text.Text("Some text", ZEROS[0], ZEROS[1], ZEROS[2], ("a",) * 10_000, "0")


def configured(row: str, *arguments: str) -> language.Config:
    options = cli.parse(language.Options, arguments, prog="", description="")
    return language.configure(row, options, SOME)


@pytest.mark.parametrize(("scale", "epoch", "validation"), [("1", 2323, 184), ("0.5", 1162, 92), ("0.02", 46, 37)])
def test_learning_rate_is_halved_after_each_epoch_from_the_fourth_at_any_scale(scale, epoch, validation):
    config = configured("base", "--scale", scale)
    assert (config.evaluate_every, config.steps, config.validation) == (epoch, 13 * epoch, validation)
    rate = language.learning_rate(config)
    ends = [float(rate(jnp.array(k * epoch + at))) for k in range(13) for at in (0, epoch - 1)]
    assert ends == [0.5 ** max(k - 3, 0) for k in range(13) for _ in range(2)]


@pytest.mark.parametrize(
    ("cell", "row", "lr", "window", "sigma", "alpha", "affine"),
    [
        ("lstm", "base", 1.0, None, None, 0.0, False),
        ("tanh", "base", 0.1, None, None, 0.0, False),
        ("relu", "bn", 0.1, "n", 1e-2, 0.0, True),
        ("relu", "bn*", 1.0, "n", 1.0, 1e-1, True),
        ("tanh", "bn-l1", 1.0, "n", 1e-2, 1e-1, True),
        ("lstm", "ln", 1.0, "c", 1e-2, 0.0, True),
        ("lstm", "ln*", 1.0, "c", 1.0, 1e-3, False),
        ("lstm", "dn*", 1.0, "c:30", 1.0, 1e-4, False),
        ("relu", "dn", 1.0, "c:60", 1e-2, 0.0, False),
    ],
)
def test_rows_are_the_published_configurations(cell, row, lr, window, sigma, alpha, affine):
    config = configured(row, "--cell", cell)
    assert (config.lr, config.l1, config.affine) == (lr, alpha, affine)
    if window is None:
        assert config.normalizer is None
    else:
        assert config.normalizer is not None
        assert str(config.normalizer.mean) == str(config.normalizer.var) == window
        assert config.normalizer.eps == pytest.approx(sigma**2)


# --- the command ----------------------------------------------------------------------------------


def test_list_shows_the_published_number_beside_each_row(capsys):
    language.main(["--list", "--cell", "relu"])
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert all(f"{number:.3f} |" in lines[row] for row, number in language.PUBLISHED["relu"].items())
    assert set(language.ROWS) < set(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cell", "ltsm"], "no cell is called 'ltsm'; did you mean 'lstm'? There are lstm, tanh, relu"),
        (["--level", "words"], "no level is called 'words'; did you mean 'word'? There are word, char"),
        (["--scale", "0"], "--scale is a positive number; found 0.0"),
        (["--rows", "dn**"], "no row is called 'dn**'; did you mean 'dn*'? There are " + ", ".join(language.ROWS)),
        (["--data-dir", "nowhere"], "there is no folder nowhere"),
        (["--data-dir", "{short}"], "the validation text of 4 tokens is too short: 20 x 21 are needed"),
    ],
)
def test_wrong_command_is_refused_and_writes_nothing(capsys, tmp_path, arguments, message):
    short = write(tmp_path, train="a b\n" * 300, valid="a b c\n", test="a\n")
    arguments = ["--out", str(tmp_path / "runs"), *(argument.format(short=short) for argument in arguments)]
    assert refused(capsys, language.main, *arguments) == f"error: {message}\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits_and_the_report_shows_them(tmp_path, monkeypatch, capsys):
    arguments = ["--smoke", "--cell", "tanh", "--rows", "bn*", "--out"]
    language.main([*arguments, str(tmp_path / "a")])
    printed = capsys.readouterr().out
    killed = [*arguments, str(tmp_path / "b")]
    kill_here(monkeypatch, loop, "batches", 3, language.main, killed)
    language.main([*killed, "--resume"])
    a, b = (tmp_path / name / "language-tanh-smoke" for name in "ab")
    for seed in ("bn-star/seed-0", "bn-star/seed-1"):
        lines, arrays = contents(a / seed)
        assert (lines, arrays) == contents(b / seed)
        assert [line["step"] for line in lines] == list(range(7))
        assert [line["step"] for line in lines if line.get("test_perplexity")] == [6]
        assert [line["step"] for line in lines if line.get("test_valid_perplexity")] == [0, 2, 4, 6]
        assert all(line["penalty"] > 0 for line in lines[1:])
    ours = [files.read(a / "bn-star" / f"seed-{k}" / "metrics.jsonl")[-1]["test_perplexity"] for k in range(2)]
    shown = f"{np.mean(ours):.2f} +- {np.std(ours, ddof=1):.2f}"
    for page in (printed, (a / "report.md").read_text()):
        assert sum(line.startswith("| `bn*`") and shown in line for line in page.splitlines()) == 1
    assert "data:image/png;base64," in (a / "report.html").read_text()
