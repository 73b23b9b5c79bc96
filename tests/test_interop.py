"""interop.py: dictionaries as the libraries print them, and, where a library is installed, its own layers."""

import contextlib
import copy
import dataclasses
import os
import re
import warnings
from typing import Any

import flax.linen
import flax.nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
import normjax.nnx
from normjax.interop import (
    FOREVER,
    KINDS,
    Record,
    arguments,
    read,
    read_cells,
    read_weights,
    write,
    write_cells,
    write_weights,
)

LIBRARIES = ("linen", "nnx", "torch", "keras", "haiku", "equinox")
F = np.float32
SCALE, BIAS, MEAN, VAR = np.array([[1, 2], [-3, 4], [0.5, -0.25], [1.5, 2.5]], F)
AFFINE = {"scale": SCALE, "bias": BIAS}
SHAPED = {"*": {"shape": (1, 1, 1, -1)}}


def four(*values):
    """Arrays of channels with the singleton axes of Haiku."""
    return [np.reshape(value, (1, 1, 1, -1)) for value in values]


def ema(average, counter, decay):
    """Haiku's state of one average."""
    factor = F(1) - F(decay) ** F(counter)
    return {"counter": np.array(counter, np.int32), "hidden": average * factor, "average": average}


# One layer of each kind as each library's own dictionaries hold it (names and shapes printed from flax 0.12, torch 2.13,
# keras 3.15, haiku 0.0.17, equinox 0.13), what `read` must be told, and what `write` must be told.
# fmt: off
LITERAL = {
    ("linen", "batch"): ({"params": {"n": AFFINE}, "batch_stats": {"n": {"mean": MEAN, "var": VAR}}}, None, None),
    ("linen", "layer"): ({"params": {"n": AFFINE}}, None, None),
    ("linen", "group"): ({"params": {"n": AFFINE}}, {"n": {"kind": "group"}}, None),
    ("linen", "rms"): ({"params": {"n": {"scale": SCALE}}}, {"n": {"kind": "rms"}}, None),
    ("nnx", "batch"): ({"n": AFFINE | {"mean": MEAN, "var": VAR}}, None, None),
    ("nnx", "instance"): ({"n": AFFINE}, {"n": {"kind": "instance"}}, None),
    ("torch", "batch"): ({"n.weight": SCALE, "n.bias": BIAS, "n.running_mean": MEAN, "n.running_var": VAR,
                          "n.num_batches_tracked": np.array(7)}, None, None),
    ("torch", "layer"): ({"n.weight": SCALE, "n.bias": BIAS}, None, None),
    ("torch", "rms"): ({"n.weight": SCALE}, {"*": {"kind": "rms"}}, None),
    ("keras", "batch"): ({"n/gamma": SCALE, "n/beta": BIAS, "n/moving_mean": MEAN, "n/moving_variance": VAR}, None, None),
    ("keras", "group"): ({"n/gamma": SCALE, "n/beta": BIAS}, {"n": {"kind": "group"}}, None),
    ("keras", "rms"): ({"n/scale": SCALE}, {"n": {"kind": "rms"}}, None),
    ("haiku", "batch"): ({"params": {"n": dict(zip(("scale", "offset"), four(SCALE, BIAS), strict=True))},
                          "state": {"n/~/mean_ema": ema(four(MEAN)[0], 3, 0.75),
                                    "n/~/var_ema": ema(four(VAR)[0], 3, 0.75)}}, {"n": {"decay_rate": 0.75}}, SHAPED),
    ("haiku", "layer"): ({"params": {"n": {"scale": SCALE, "offset": BIAS}}}, None, None),
    ("haiku", "rms"): ({"params": {"n": {"scale": SCALE}}}, {"n": {"kind": "rms"}}, None),
    ("equinox", "batch"): ({"n": {"weight": SCALE, "bias": BIAS, "batch_counter": 2,
                                  "batch_state_index": (MEAN * F(0.75), VAR * F(0.75))}}, {"n": {"momentum": 0.5}}, None),
    ("equinox", "layer"): ({"n": {"weight": SCALE, "bias": BIAS}}, None, None),
    ("equinox", "rms"): ({"n": {"weight": SCALE, "bias": BIAS}}, {"n": {"kind": "rms"}}, None),
}
EMA_MODE = {"n": {"weight": SCALE, "bias": BIAS, "ema_first_time_index": np.array(False), "ema_state_index": (MEAN, VAR)}}
# fmt: on
CASES = [pytest.param(*key, *value, id="-".join(key)) for key, value in LITERAL.items()]


def shaped(name, kind):
    return SHAPED if (name, kind) == ("haiku", "batch") else None


def assert_same(a, b, path=""):
    """Trees of the same keys, types of key included, dtypes and numbers."""
    if isinstance(b, dict):
        assert set(a) == set(b), path
        for key in b:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(b, tuple):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other, path)
    else:
        assert np.asarray(a).dtype == np.asarray(b).dtype, path
        np.testing.assert_array_equal(a, b, err_msg=path)


def scribble(tree):
    """Overwrites every array, to show whose memory it is."""
    for leaf in jax.tree.leaves(tree):
        np.asarray(leaf).fill(9)


@pytest.mark.parametrize(("library", "kind", "entries", "told", "wanted"), CASES)
def test_literal_dictionary_reads_as_its_layer_and_writes_back_the_same(library, kind, entries, told, wanted):
    before = copy.deepcopy(entries)
    records, rest = read(entries, library, told)
    record = records["n"]
    assert (list(records), rest, record.kind) == (["n"], {}, kind)
    np.testing.assert_array_equal(record.scale, SCALE)
    if kind == "batch":
        np.testing.assert_array_equal(record.mean, MEAN)
        np.testing.assert_array_equal(record.var, VAR)
    back = write(records, library, wanted)
    assert_same(back, entries)
    scribble(back)
    np.testing.assert_array_equal(record.scale, SCALE)
    scribble([value for value in vars(record).values() if isinstance(value, np.ndarray)])
    assert_same(entries, before)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_survives_a_stay_in_any_library(library, kind):
    record = Record(
        kind,
        SCALE,
        None if kind == "rms" else BIAS,
        *((MEAN, VAR) if kind == "batch" else (None, None)),
        epsilon=0.01,
        momentum=0.75 if kind == "batch" else None,
    )
    hyper = arguments(record, library)
    names = {"epsilon", "eps", "momentum", "decay_rate"} & set(hyper)
    entries = write({"a/0/n": record}, library, shaped(library, kind))
    back = read(entries, library, {"*": {"kind": kind} | {name: hyper[name] for name in names}})[0]["a/0/n"]
    for field in dataclasses.fields(Record):
        if (library, field.name) != ("torch", "count"):  # torch counts what others do not
            np.testing.assert_array_equal(getattr(back, field.name), getattr(record, field.name), err_msg=field.name)


def test_whole_model_gives_its_norms_and_keeps_the_rest_in_place():
    conv, shape = np.ones((2, 3, 3, 3), F), LITERAL["torch", "batch"][0]
    state = {
        "layer1.0.conv.weight": conv,
        "layer1.0.bn": 5,
        "relu.weight": SCALE,
        "fc.weight": np.ones((4, 2)),
        "fc.bias": F(1),
    }
    state |= {f"layer1.0.b{key}": value for key, value in shape.items()}
    records, rest = read(state, "torch")
    assert list(records) == ["layer1/0/bn"]
    assert list(rest) == ["layer1.0.conv.weight", "layer1.0.bn", "relu.weight", "fc.weight", "fc.bias"]
    assert rest["layer1.0.conv.weight"] is conv
    assert_same(write(records, "torch", rest=rest), state)


def test_layer_with_a_part_that_no_norm_has_stays_in_the_rest():
    entries = {"params": {"n": AFFINE | {"sigma": F(1)}}, "batch_stats": {"n": {"mean": MEAN, "var": VAR}}}
    records, rest = read(entries, "linen")
    assert records == {}
    assert_same(rest, entries)


@pytest.mark.parametrize("library", ["keras", "haiku", "torch", "equinox"])
def test_names_of_another_library_are_not_taken_for_parts(library):
    entries = (
        {"params": {"n": AFFINE | {"mean": MEAN, "var": VAR}}}
        if library == "haiku"
        else {
            "n.mean": MEAN,
            "n.var": VAR,
            "n.count": MEAN,
            "n.scale": SCALE,
            "n/mean": MEAN,
            "n/scale": SCALE,
            "n/bias": SCALE,
            "n/var": SCALE,
        }
    )
    records, rest = read(entries, library)
    assert records == {}
    assert_same(rest, entries)


def test_kind_none_leaves_a_layer_in_the_rest():
    entries = LITERAL["torch", "layer"][0]
    assert read(entries, "torch", {"n": {"kind": None}}) == ({}, entries)


def test_weight_norm_of_flax_whose_names_hold_slashes_keeps_its_tree():
    entries = {
        "params": {
            "WeightNorm_0": {"Dense_0/kernel/scale": SCALE},
            "Dense_0": {"kernel": np.ones((2, 2)), "bias": BIAS},
        }
    }
    records, rest = read(entries, "linen")
    assert records == {}
    assert_same(rest, entries)


def test_nnx_lists_keep_numbers_as_keys():
    entries = {"layers": {0: AFFINE, 1: {"kernel": SCALE}}}
    records, rest = read(entries, "nnx")
    assert list(records) == ["layers/0"]
    assert_same(write(records, "nnx", rest=rest), entries)


def test_haiku_modules_keep_slashes_and_layers_without_parameters():
    state = LITERAL["haiku", "batch"][0]["state"]
    entries = {"params": {}, "state": {f"net/~/{name}": value for name, value in state.items()}}
    records, _ = read(entries, "haiku", {"*": {"decay_rate": 0.75}})
    assert list(records) == ["net/~/n"]
    assert_same(write(records, "haiku", SHAPED), {"state": entries["state"]})


@pytest.mark.parametrize("first", [False, True])
def test_equinox_ema_mode_reads_as_a_plain_average_and_its_first_time_as_a_fresh_one(first):
    entries = {"n": EMA_MODE["n"] | {"ema_first_time_index": np.array(first)}}
    records, _ = read(entries, "equinox")
    np.testing.assert_array_equal(records["n"].mean, np.zeros(2) if first else MEAN)
    np.testing.assert_array_equal(records["n"].var, np.ones(2) if first else VAR)
    back = write(records, "equinox", {"n": {"mode": "ema"}})["n"]
    assert back["ema_first_time_index"] == first
    if not first:
        assert_same({"n": back}, entries)
        scribble(back)
        np.testing.assert_array_equal(records["n"].mean, MEAN)


def test_equinox_layer_that_has_seen_nothing_and_learns_nothing_is_a_fresh_one():
    entries = {"weight": None, "bias": None, "batch_counter": 0, "batch_state_index": (np.zeros(2, F), np.ones(2, F))}
    records, rest = read(entries, "equinox", {"": {"momentum": 0.99}})
    assert (records[""].scale, records[""].bias, rest) == (None, None, {})
    np.testing.assert_array_equal(records[""].var, np.ones(2))
    assert_same(write(records, "equinox"), {name: entries[name] for name in ("batch_counter", "batch_state_index")})


def test_haiku_layer_of_one_channel_keeps_an_axis():
    one = np.ones((1, 1, 1, 1), F)
    entries = {
        "params": {"n": {"scale": one}},
        "state": {"n/~/mean_ema": ema(one, 1, 0.5), "n/~/var_ema": ema(one, 1, 0.5)},
    }
    records, _ = read(entries, "haiku", {"n": {"decay_rate": 0.5}})
    assert (records["n"].scale.shape, records["n"].mean.shape, records["n"].count.shape) == ((1,), (1,), ())
    assert_same(write(records, "haiku", SHAPED), entries)


def test_later_patterns_override_earlier_ones():
    state = {f"{name}.{part}": SCALE for name in ("a", "b") for part in ("weight", "bias")}
    records, _ = read(state, "torch", {"*": {"eps": 0.5, "kind": "group"}, "b": {"eps": 0.25}})
    assert [(r.epsilon, r.kind) for r in records.values()] == [(0.5, "group"), (0.25, "group")]


def test_counts_of_normjax_become_those_of_haiku_and_equinox():
    counts = {"mean_count": np.array([2, 2], np.int32), "var_count": np.array([2, 2], np.int32)}
    entries = {"params": {}, "batch_stats": {"n": {"mean": MEAN, "var": VAR} | counts}}
    records, _ = read(entries, "linen", {"n": {"momentum": 0.5}})
    assert records["n"].averaging == "debiased"
    assert_same(write(records, "linen", {"n": {"averaging": "debiased"}}), {"batch_stats": entries["batch_stats"]})
    assert_same(write(records, "linen"), {"batch_stats": {"n": {"mean": MEAN, "var": VAR}}})  # what Flax can load
    scalar = {"n": dataclasses.replace(records["n"], count=np.array(2))}  # as torch counts, in int64
    assert_same(write(scalar, "linen", {"n": {"averaging": "debiased"}}), {"batch_stats": entries["batch_stats"]})
    equinox = write(records, "equinox")["n"]
    assert_same(equinox, {"batch_state_index": (MEAN * F(0.75), VAR * F(0.75)), "batch_counter": 2})
    haiku = write(records, "haiku", SHAPED)["state"]["n/~/var_ema"]
    assert_same(haiku, ema(four(VAR)[0], 2, 0.5))


def test_average_that_is_not_debiased_has_had_forever_many_updates_in_haiku_and_equinox():
    records = {"n": Record("batch", None, None, MEAN, VAR, momentum=0.9)}
    assert write(records, "haiku", SHAPED)["state"]["n/~/mean_ema"]["counter"] == FOREVER
    equinox = write(records, "equinox")["n"]
    assert equinox["batch_counter"] == FOREVER
    np.testing.assert_array_equal(equinox["batch_state_index"][0], MEAN)


def test_elements_make_the_variance_of_torch_biased_and_unbiased_again():
    x = np.random.default_rng(0).normal(size=(3, 10, 2))  # 3 batches of 10 elements, averaged cumulatively
    entries = {
        "running_mean": x.mean((0, 1)),
        "running_var": x.var(1, ddof=1).mean(0),
        "num_batches_tracked": np.array(3),
    }
    records, _ = read(entries, "torch", {"": {"momentum": None, "elements": 10}})
    assert (records[""].averaging, records[""].momentum) == ("cumulative", None)
    np.testing.assert_allclose(records[""].var, x.var(1).mean(0), rtol=1e-12)
    back = write(records, "torch", {"": {"elements": 10}})
    np.testing.assert_allclose(back["running_var"], entries["running_var"], rtol=1e-12)


def test_torch_instance_norm_with_statistics_goes_to_flax_as_batch_norm_only():
    records, _ = read(LITERAL["torch", "batch"][0], "torch", {"n": {"kind": "instance"}})
    with pytest.raises(ValueError, match="kind 'batch', which gives the same inference"):
        write(records, "linen")
    assert set(write({"n": dataclasses.replace(records["n"], kind="batch")}, "linen")) == {"params", "batch_stats"}
    assert_same(write(records, "torch"), LITERAL["torch", "batch"][0])


@pytest.mark.parametrize(("library", "kind"), [("torch", "group"), ("equinox", "batch"), ("torch", "layer")])
def test_library_that_learns_both_or_neither_gets_ones_or_zeros(library, kind):
    entries = write({"n": Record(kind, None, BIAS)}, library)
    assert_same(read(entries, library, {"*": {"kind": kind}})[0]["n"].scale, np.ones(2, F))
    if kind != "layer":
        entries = write({"n": Record(kind, SCALE)}, library)
        assert_same(read(entries, library, {"*": {"kind": kind}})[0]["n"].bias, np.zeros(2, F))


def test_statistics_in_half_precision_are_widened_and_parameters_are_not():
    entries = {"n": {name: jnp.ones(2, jnp.bfloat16) for name in ("scale", "bias", "mean", "var")}}
    record = read(entries, "nnx")[0]["n"]
    dtypes = [np.dtype(value.dtype).name for value in (record.scale, record.bias, record.mean, record.var)]
    assert dtypes == ["bfloat16", "bfloat16", "float32", "float32"]


WHOLE = Record("batch", SCALE, BIAS, MEAN, VAR, epsilon=1e-3, momentum=0.9)
LONE = Record("rms", SCALE, epsilon=1e-6)


@pytest.mark.parametrize(
    ("library", "batch", "rms"),
    [
        ("linen", dict(epsilon=1e-3, momentum=0.9, use_scale=True, use_bias=True), dict(epsilon=1e-6, use_scale=True)),
        ("nnx", dict(epsilon=1e-3, momentum=0.9, use_scale=True, use_bias=True), dict(epsilon=1e-6, use_scale=True)),
        (
            "torch",
            dict(eps=1e-3, momentum=0.1, affine=True, track_running_stats=True),
            dict(eps=1e-6, elementwise_affine=True),
        ),
        ("keras", dict(epsilon=1e-3, momentum=0.9, scale=True, center=True), dict(epsilon=1e-6)),
        (
            "haiku",
            dict(eps=1e-3, decay_rate=0.9, create_scale=True, create_offset=True),
            dict(eps=1e-6, create_scale=True),
        ),
        (
            "equinox",
            dict(eps=1e-3, momentum=0.9, channelwise_affine=True, mode="batch"),
            dict(eps=1e-6, use_weight=True, use_bias=False),
        ),
    ],
)
def test_arguments_are_in_the_convention_of_the_library(library, batch, rms):
    assert arguments(WHOLE, library) == batch
    assert arguments(LONE, library) == rms


# What peers document as the default epsilon of batch, layer and rms.
@pytest.mark.parametrize(
    ("library", "batch", "layer", "rms"),
    [
        ("linen", 1e-5, 1e-6, 1e-6),
        ("nnx", 1e-5, 1e-6, 1e-6),
        ("torch", 1e-5, 1e-5, np.finfo(F).eps),
        ("keras", 1e-3, 1e-3, 1e-6),
        ("haiku", 1e-5, 1e-5, 1e-5),
        ("equinox", 1e-5, 1e-5, 1e-5),
    ],
)
def test_epsilon_is_the_default_of_the_library_and_kind_unless_given(library, batch, layer, rms):
    for kind, epsilon in (("batch", batch), ("layer", layer), ("rms", rms)):
        entries = write({"n": Record(kind, SCALE)}, library, shaped(library, kind))
        assert read(entries, library, {"*": {"kind": kind}})[0]["n"].epsilon == epsilon


TORCH = LITERAL["torch", "batch"][0]
EQUINOX = LITERAL["equinox", "batch"][0]
COUNTED = {"mean": MEAN, "var": VAR, "mean_count": np.array([1, 2]), "var_count": np.array([1, 2])}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: read({}, "jax"),
            "library is one of 'linen', 'nnx', 'torch', 'keras', 'haiku', 'equinox'; found 'jax'",
        ),
        (
            lambda: read({"n": AFFINE}, "linen"),
            "a linen checkpoint: found the collections 'n'; accepted: 'params', 'batch_stats'",
        ),
        (
            lambda: read(TORCH, "torch", {"n": {"kind": "norm"}}),
            "torch layer 'n': kind is one of 'batch', 'layer', 'group', 'instance', 'rms'; found 'norm'",
        ),
        (
            lambda: read(TORCH, "torch", {"m*": {"eps": 1.0}}),
            "torch layers 'm*': found no such normalization layer; accepted: 'n'",
        ),
        (
            lambda: read(TORCH, "torch", {"n": {"epsilon": 1.0}}),
            "torch layers 'n': found options 'epsilon'; accepted: 'kind', 'eps', 'momentum', 'elements'",
        ),
        (
            lambda: read({"fc/kernel": SCALE, "fc/bias": BIAS}, "keras", {"fc": {"kind": "layer"}}),
            "keras layer 'fc': found entries 'kernel', 'bias'; accepted: 'gamma', 'scale', 'beta', 'moving_mean', "
            "'moving_variance'",
        ),
        (
            lambda: read({"running_mean": MEAN}, "torch", {"": {"kind": "batch"}}),
            "torch layer '': found a running mean alone; accepted: both or neither",
        ),
        (
            lambda: read(EQUINOX, "equinox"),
            "equinox layer 'n': found no count of updates or no momentum; accepted: batch_counter, and 'momentum' as it "
            "was in training",
        ),
        (
            lambda: write(read({"n": COUNTED}, "nnx")[0], "torch"),
            "torch layer 'n': found counts of updates that differ by channel, [1, 2]; accepted: one count for all",
        ),
        (
            lambda: read({"n": COUNTED | {"var_count": np.array([2, 2])}}, "nnx"),
            "nnx layer 'n': found other counts of updates for the mean than for the variance; accepted: the same",
        ),
        (
            lambda: write({"n": dataclasses.replace(WHOLE, averaging="debiased")}, "equinox"),
            "equinox layer 'n': found debiased averages without count or momentum; accepted: both",
        ),
        (
            lambda: write({"n": WHOLE}, "haiku"),
            "haiku layer 'n': found no 'shape'; accepted: 'shape', the singleton axes of Haiku's arrays, such as "
            "(1, 1, 1, -1)",
        ),
        (
            lambda: write({"n": Record("rms", SCALE, BIAS)}, "torch"),
            "torch layer 'n': found a bias in kind 'rms'; accepted: a scale alone",
        ),
        (
            lambda: write({"n": LONE}, "torch", rest={"n.weight": 1}),
            "torch layer 'n': found the entry 'n/weight' in the rest too; accepted: one of the two",
        ),
        (
            lambda: write({"n": WHOLE}, "torch", {"n": {"elements": 1}}),
            "torch layer 'n': found elements=1; accepted: a number above 1",
        ),
        (
            lambda: write({"n": WHOLE}, "equinox", {"n": {"mode": "legacy"}}),
            "equinox layer 'n': mode is one of 'batch', 'ema'; found 'legacy'",
        ),
        (
            lambda: write({"n": WHOLE}, "nnx", {"n": {"averaging": "cumulative"}}),
            "nnx layer 'n': found no count of updates for cumulative averages; accepted: a count",
        ),
    ],
)
def test_refusal_names_the_layer_what_was_found_and_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


BOX = flax.linen.with_partitioning
FORMS = {  # what a checkpoint with boxes looks like when it comes back
    "as it is": lambda variables: variables,
    "state dict": flax.serialization.to_state_dict,
    "msgpack": lambda variables: flax.serialization.msgpack_restore(flax.serialization.to_bytes(variables)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [False, True])
def test_boxes_are_read_as_arrays_and_come_back(form, half):
    init = flax.linen.initializers
    bias = init.zeros if half else BOX(init.zeros, ("e",))
    layer = normjax.linen.LayerNorm(scale_init=BOX(init.ones, ("e",)), bias_init=bias)
    entries = FORMS[form](layer.init(jax.random.key(0), jnp.ones((2, 6))))
    records, rest = read(entries, "linen")
    np.testing.assert_array_equal(records[""].scale, np.ones(6))
    back = write(records, "linen", rest=rest)
    assert jax.tree.structure(back) == jax.tree.structure(entries)
    np.testing.assert_array_equal(write(records, "torch")["weight"], np.ones(6))


@pytest.mark.parametrize("key", [int, str])
def test_numbers_for_keys_stay_ints_or_text(key):
    entries = {"layers": {key(0): AFFINE, key(1): {"kernel": SCALE}}}
    records, rest = read(entries, "nnx")
    assert_same(write(records, "nnx", rest=rest), entries)
    own = {name: Record(record.kind, record.scale, record.bias) for name, record in records.items()}
    assert_same(write(own, "nnx", rest=rest), entries)


E = np.ones(3, F)
LIST: Any = [1]
NO_LAYERS = {
    "a list": (lambda: read(LIST, "torch"), TypeError, "a torch checkpoint is a dictionary"),
    "an outer dictionary": (lambda: read({"state_dict": TORCH}, "torch"), ValueError, "pass entries['state_dict']"),
    "lengths": (
        lambda: read({"n.weight": E, "n.bias": E[:2]}, "torch", {"n": {"kind": "layer"}}),
        ValueError,
        "one shape",
    ),
    "negative": (
        lambda: read({"n": {"mean": E, "var": -E}}, "nnx"),
        ValueError,
        "a negative variance or NaN in 3 of 3",
    ),
    "nan": (lambda: read({"n": {"mean": E, "var": E * F("nan")}}, "nnx"), ValueError, "a negative variance or NaN"),
    "text": (lambda: read({"params": {"n": {"scale": "a", "bias": "b"}}}, "linen"), ValueError, "str 'a' for 'scale'"),
}


@pytest.mark.parametrize("name", NO_LAYERS)
def test_what_is_no_layer_is_refused(name):
    call, kind, text = NO_LAYERS[name]
    with pytest.raises(kind, match=re.escape(text)):
        call()


# PyTorch's entries by hand: of w = g v / |v| with v = (3, 4), and of a matrix whose singular vectors are the axes.
V, G = np.array([[3, 4]], F), np.array([[10]], F)
MATRIX, LEFT, RIGHT = np.array([[4, 0, 0], [0, 1, 0]], F), np.array([1, 0], F), np.array([1, 0, 0], F)
SPELLINGS = [
    ({"fc.weight_g": G, "fc.weight_v": V, "fc.bias": G[0]}, 2 * V),
    ({"fc.parametrizations.weight.original0": G, "fc.parametrizations.weight.original1": V, "fc.bias": G[0]}, 2 * V),
    ({"fc.weight_orig": MATRIX, "fc.weight_u": LEFT, "fc.weight_v": RIGHT}, MATRIX / 4),
    (
        {
            "fc.parametrizations.weight.original": MATRIX,
            "fc.parametrizations.weight.0._u": LEFT,
            "fc.parametrizations.weight.0._v": RIGHT,
        },
        MATRIX / 4,
    ),
]


@pytest.mark.parametrize(("entries", "weight"), SPELLINGS)
def test_weights_of_torch_are_read_in_both_spellings_and_evaluate_in_our_wrappers(entries, weight):
    records, rest = read_weights(entries | {"o": E}, "torch")
    np.testing.assert_allclose(records["fc"].weight(), weight.T, rtol=1e-6)
    assert_same(write_weights(records, "torch", rest=rest), entries | {"o": E})
    tiny = {key: value * F(1e-25) if value.shape == weight.shape else value for key, value in entries.items()}
    np.testing.assert_allclose(read_weights(tiny, "torch")[0]["fc"].weight(), weight.T, rtol=1e-6)
    x, record = np.array([[1, 2, 3]], F)[:, : weight.shape[1]], records["fc"]
    wrapper = "WeightNorm" if record.kind == "weight" else "SpectralNorm"
    options = {} if record.kind == "weight" else {"update_stats": False}
    dense: dict[str, Any] = {"use_bias": record.bias is not None}
    want = x @ weight.T + (0 if record.bias is None else record.bias)
    layer = getattr(normjax.linen, wrapper)(flax.linen.Dense(len(weight), **dense))
    np.testing.assert_allclose(layer.apply(write_weights({"": record}, "linen"), x, **options), want, rtol=1e-6)
    inner = flax.nnx.Linear(*weight.shape[::-1], **dense, rngs=flax.nnx.Rngs(0))
    twin = getattr(normjax.nnx, wrapper)(inner, rngs=flax.nnx.Rngs(0))
    state = flax.nnx.state(twin)
    flax.nnx.replace_by_pure_dict(state, write_weights({"": record}, "nnx"))
    flax.nnx.update(twin, state)
    np.testing.assert_allclose(twin(x, **options), want, rtol=1e-6)
    assert_same(write_weights(read_weights(state, "nnx")[0], "nnx"), flax.nnx.to_pure_dict(state))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cell"), [("LSTM", "LSTMCell"), ("GRU", "GRUCell"), ("RNN", "SimpleCell")])
def test_cells_of_torch_are_the_same_function(name, cell):
    torch, x = library("torch"), np.random.default_rng(0).normal(size=(2, 5, 3)).astype(F)
    theirs = getattr(torch.nn, name)(3, 4, batch_first=True)
    records, rest = read_cells(theirs.state_dict(), "torch")
    assert rest == {}
    rnn = normjax.linen.RNN(getattr(normjax.linen, cell)(4))
    got = np.asarray(rnn.apply(write_cells({"cell": records["l0"]}, "linen"), x))
    np.testing.assert_allclose(got, theirs(torch.as_tensor(x))[0].detach().numpy(), atol=1e-6)


# ---- the libraries' own layers --------------------------------------------------------------------------------------

C, GROUPS, HYPER = 4, 2, {"epsilon": 0.01, "momentum": 0.75}
FLAX = {"batch": "BatchNorm", "layer": "LayerNorm", "group": "GroupNorm", "instance": "InstanceNorm", "rms": "RMSNorm"}
X = np.random.default_rng(1).normal(0.5, 2, (4, 3, 5, 5, C)).astype(F)  # three batches to train on, one to infer


def library(name):
    """The library, imported as its users do; its own warnings are not ours."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


# Each peer is a layer built from arguments, as three functions: its checkpoint, loading one, and running a batch (nhwc).


def linen_peer(module):
    def peer(kind, args):
        average = dict(use_running_average=None) if kind == "batch" else {}
        groups = dict(num_groups=GROUPS) if kind == "group" else {}
        layer = getattr(module, FLAX[kind])(**args, **average, **groups)
        variables = dict(layer.init(jax.random.key(0), X[0], **(dict(use_running_average=True) if average else {})))

        def run(x, train):
            flag = dict(use_running_average=not train) if kind == "batch" else {}
            y, changed = layer.apply(variables, x, **flag, mutable=["batch_stats"])
            variables.update(changed)
            return y

        return lambda: jax.tree.map(np.asarray, variables), variables.update, run

    return peer


def nnx_peer(module):
    def peer(kind, args):
        groups = dict(num_groups=GROUPS) if kind == "group" else {}
        layer = getattr(module, FLAX[kind])(C, **args, **groups, rngs=flax.nnx.Rngs(0))

        def run(x, train):
            return layer(x, use_running_average=not train) if kind == "batch" else layer(x)

        def export():
            return jax.tree.map(np.asarray, flax.nnx.to_pure_dict(flax.nnx.state(layer)))

        return export, lambda entries: flax.nnx.update(layer, jax.tree.map(jnp.asarray, entries)), run

    return peer


def torch_peer(kind, args):
    torch = library("torch")
    layer = {
        "batch": lambda: torch.nn.BatchNorm2d(C, **args),
        "layer": lambda: torch.nn.LayerNorm(C, **args),
        "group": lambda: torch.nn.GroupNorm(GROUPS, C, **args),
        "instance": lambda: torch.nn.InstanceNorm2d(C, **args),
        "rms": lambda: torch.nn.RMSNorm(C, **args),
    }[kind]()

    def load(entries):
        layer.load_state_dict({name: torch.as_tensor(value) for name, value in entries.items()})

    def run(x, train):
        layer.train(train)
        x = torch.as_tensor(x)
        y = layer(x) if kind in ("layer", "rms") else layer(x.movedim(-1, 1)).movedim(1, -1)
        return y.detach().numpy()

    return layer.state_dict, load, run


def keras_peer(kind, args):
    layers = library("keras").layers
    layer = {
        "batch": lambda: layers.BatchNormalization(name="n", **args),
        "layer": lambda: layers.LayerNormalization(name="n", **args),
        "group": lambda: layers.GroupNormalization(GROUPS, name="n", **args),
        "instance": lambda: layers.GroupNormalization(-1, name="n", **args),
        "rms": lambda: layers.RMSNormalization(name="n", **args),
    }[kind]()
    layer.build(X[0].shape)

    def load(entries):
        for variable in layer.variables:
            variable.assign(entries[variable.path])

    def export():
        return {variable.path: variable.numpy() for variable in layer.variables}

    return export, load, lambda x, train: layer(x, training=train)


def haiku_peer(kind, args):
    hk = library("haiku")
    forward = hk.transform_with_state(
        {
            "batch": lambda x, train: hk.BatchNorm(**args)(x, train),
            "layer": lambda x, train: hk.LayerNorm(-1, **args)(x),
            "group": lambda x, train: hk.GroupNorm(GROUPS, **args)(x),
            "instance": lambda x, train: hk.InstanceNorm(**args)(x),
            "rms": lambda x, train: hk.RMSNorm(-1, **args)(x),
        }[kind]
    )
    variables = dict(zip(("params", "state"), forward.init(jax.random.key(0), X[0], True), strict=True))

    def run(x, train):
        y, variables["state"] = forward.apply(variables["params"], variables["state"], None, x, train)
        return y

    return lambda: variables, lambda entries: variables.update(jax.tree.map(jnp.asarray, entries)), run


def equinox_peer(kind, args):
    eqx = library("equinox")
    make = {
        "batch": lambda: eqx.nn.BatchNorm(C, "n", **args),
        "layer": lambda: eqx.nn.LayerNorm(C, **args),
        "group": lambda: eqx.nn.GroupNorm(GROUPS, C, **args),
        "instance": lambda: eqx.nn.GroupNorm(C, C, **args),
        "rms": lambda: eqx.nn.RMSNorm(C, **args),
    }[kind]
    held = list(eqx.nn.make_with_state(make)())
    indices = ("batch_counter", "batch_state_index", "ema_first_time_index", "ema_state_index")

    def export():
        entries = {name: getattr(held[0], name) for name in ("weight", "bias")}
        stored = {name: getattr(held[0], name, None) for name in indices}
        return entries | {name: index and held[1].get(index) for name, index in stored.items()}

    def load(entries):
        for name, value in entries.items():
            if name in indices:
                held[1] = held[1].set(getattr(held[0], name), value)
            else:
                held[0] = eqx.tree_at(lambda layer, n=name: getattr(layer, n), held[0], jnp.asarray(value))

    def run(x, train):
        layer = held[0]
        if kind in ("layer", "rms"):
            return jax.vmap(jax.vmap(jax.vmap(layer)))(x)
        x = jnp.moveaxis(jnp.asarray(x), -1, 1)
        if kind != "batch":
            return jnp.moveaxis(jax.vmap(layer)(x), 1, -1)
        each = jax.vmap(lambda x, s: layer(x, s, inference=not train), (0, None), (0, None), axis_name="n")
        y, held[1] = each(x, held[1])
        return jnp.moveaxis(y, 1, -1)

    return export, load, run


PEERS = {
    "torch": ("torch", torch_peer),
    "keras": ("keras", keras_peer),
    "haiku": ("haiku", haiku_peer),
    "equinox": ("equinox", equinox_peer),
    "flax.linen": ("linen", linen_peer(flax.linen)),
    "flax.nnx": ("nnx", nnx_peer(flax.nnx)),
    "normjax.linen": ("linen", linen_peer(normjax.linen)),
    "normjax.nnx": ("nnx", nnx_peer(normjax.nnx)),
}


def the_arguments(kind, to):
    """The arguments of a layer with the numbers of HYPER, in a library's convention."""
    ones = np.ones(C, F)
    stored = ones if kind == "batch" else None
    return arguments(
        Record(
            kind,
            ones,
            None if kind == "rms" else ones,
            stored,
            stored,
            epsilon=HYPER["epsilon"],
            momentum=HYPER["momentum"],
        ),
        to,
    )


def hyper(kind, name):
    """The part of them that `read` must be told."""
    args = the_arguments(kind, name)
    return {"kind": kind} | {key: args[key] for key in ("epsilon", "eps", "momentum", "decay_rate") if key in args}


def randomised(entries, rng):
    """The checkpoint with other scales and biases, whatever the library calls them."""
    if not isinstance(entries, dict):
        return entries
    ours = ("weight", "bias", "gamma", "beta", "scale", "offset")
    return {
        key: jnp.asarray(rng.normal(1, 1, np.shape(value)), jnp.float32)
        if key.replace("/", ".").split(".")[-1] in ours and value is not None
        else randomised(value, rng)
        for key, value in entries.items()
    }


@contextlib.contextmanager
def their_rules():
    """Other libraries count on JAX's default promotion, and warn of things of their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(kind, peer, steps=2):
    """A layer with random parameters, after some steps of training; its checkpoint and its functions."""
    export, load, run = PEERS[peer][1](kind, the_arguments(kind, PEERS[peer][0]))
    load({k: v for k, v in randomised(plain(export()), np.random.default_rng(7)).items() if v is not None})
    for x in X[:steps]:
        run(x, True)
    return export, load, run


def plain(entries):
    return {key: plain(value) if hasattr(value, "items") else value for key, value in entries.items()}


def only(records):
    """The one layer of a checkpoint, wherever it lies."""
    (record,) = records.values()
    return record


def under(record, peer, kind):
    """The one-layer checkpoint that a peer loads: under the path where it exports its own."""
    name, make = PEERS[peer]
    export = make(kind, the_arguments(kind, name))[0]
    (path,) = read(plain(export()), name, {"*": hyper(kind, name)})[0]
    return write({path: record}, name, shaped(name, kind))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["normjax.linen", "normjax.nnx", "flax.linen", "flax.nnx"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["torch", "keras", "haiku", "equinox"])
def test_layer_of_another_library_infers_the_same_in_ours_and_in_flax_and_back(source, kind, target):
    with their_rules():
        name, other = PEERS[source][0], PEERS[target][0]
        export, load, run = trained(kind, source)
        want = np.asarray(run(X[3], False))
        record = only(read(plain(export()), name, {"*": hyper(kind, name)})[0])
        assert (record.epsilon, record.momentum) == (HYPER["epsilon"], HYPER["momentum"] if kind == "batch" else None)

        # There: built from what `arguments` says, it infers the same.
        there_export, there_load, there_run = PEERS[target][1](kind, arguments(record, other))
        there_load(under(record, target, kind))
        np.testing.assert_allclose(np.asarray(there_run(X[3], False)), want, rtol=1e-5, atol=1e-5)

        # And back: what the other library exports loads into a new layer of the first.
        back = only(read(plain(there_export()), other, {"*": hyper(kind, other)})[0])
        _, load, run = PEERS[source][1](kind, arguments(back, name))
        load(under(back, source, kind))
        np.testing.assert_allclose(np.asarray(run(X[3], False)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["torch", "keras", "haiku", "equinox"])
def test_training_goes_on_elsewhere_as_it_would_have_here(peer):
    with their_rules():
        name, n = PEERS[peer][0], X[0].size // C
        export, _, run = trained("batch", "normjax.linen")
        record = only(read(plain(export()), "linen", {"*": hyper("batch", "linen")})[0])
        there_export, there_load, there_run = PEERS[peer][1]("batch", the_arguments("batch", name))
        there_load(under(record, peer, "batch"))
        run(X[2], True)
        there_run(X[2], True)
        here = only(read(plain(export()), "linen")[0])
        there = only(read(plain(there_export()), name, {"*": hyper("batch", name)})[0])
        np.testing.assert_allclose(there.mean, here.mean, rtol=1e-5, atol=1e-6)
        # What torch adds to the variance is n / (n - 1) times as much.
        added = (here.var - HYPER["momentum"] * record.var) * (n / (n - 1) if peer == "torch" else 1)
        np.testing.assert_allclose(there.var, HYPER["momentum"] * record.var + added, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("haiku", "equinox"), ("equinox", "haiku")])
def test_debiased_average_goes_on_in_another_library_as_it_would_have_here(source, target):
    with their_rules():
        export, _, run = trained("batch", source)
        record = only(read(plain(export()), source, {"*": hyper("batch", source)})[0])
        assert (int(record.count), record.averaging) == (2, "debiased")
        there_export, there_load, there_run = PEERS[target][1]("batch", the_arguments("batch", target))
        there_load(under(record, target, "batch"))
        run(X[2], True)
        there_run(X[2], True)
        here = only(read(plain(export()), source, {"*": hyper("batch", source)})[0])
        there = only(read(plain(there_export()), target, {"*": hyper("batch", target)})[0])
        for field in ("mean", "var", "count"):
            np.testing.assert_allclose(getattr(there, field), getattr(here, field), rtol=1e-5)


@pytest.mark.slow
def test_torch_instance_norm_with_statistics_infers_as_batch_norm():
    with their_rules():
        torch = library("torch")
        layer = torch.nn.InstanceNorm2d(C, affine=True, track_running_stats=True)
        layer(torch.as_tensor(X[0]).movedim(-1, 1))
        want = layer.eval()(torch.as_tensor(X[3]).movedim(-1, 1)).movedim(1, -1).detach().numpy()
        record = only(read(layer.state_dict(), "torch", {"": {"kind": "instance"}})[0])
        record = dataclasses.replace(record, kind="batch")
        _, load, run = PEERS["normjax.linen"][1]("batch", arguments(record, "linen"))
        load(write({"": record}, "linen"))
        np.testing.assert_allclose(run(X[3], False), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["haiku", "equinox", "torch"])
def test_counted_average_of_another_library_goes_on_in_normjax_as_it_would_have_there(source):
    averaging = "cumulative" if source == "torch" else "debiased"
    extra = {"momentum": None} if source == "torch" else {}
    with their_rules():
        export, _, run = PEERS[source][1]("batch", the_arguments("batch", source) | extra)
        for x in X[:2]:
            run(x, True)
        told = {"*": hyper("batch", source) | extra}
        record = only(read(plain(export()), source, told)[0])
        assert (int(record.count), record.averaging) == (2, averaging)
        layer = normjax.linen.Norm("batch", averaging=averaging, momentum=HYPER["momentum"], unbiased=source == "torch")
        variables = write({"": record}, "linen", {"": {"averaging": averaging}})
        _, changed = layer.apply(variables, X[2], use_running_average=False, mutable=["batch_stats"])
        run(X[2], True)
        here = only(read(changed, "linen", {"": {"averaging": averaging}})[0])
        there = only(read(plain(export()), source, told)[0])
        for field in ("mean", "var"):
            np.testing.assert_allclose(getattr(here, field), getattr(there, field), rtol=1e-5)
        assert (set(here.count.tolist()), int(there.count)) == ({3}, 3)


@pytest.mark.parametrize("key", [int, str])
def test_a_model_read_piece_by_piece_and_written_again_is_as_it_was(key):
    rngs = flax.nnx.Rngs(0)
    wrappers = [
        getattr(normjax.nnx, name)(flax.nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
        for name in ("WeightNorm", "SpectralNorm")
    ]
    norm, cell = normjax.nnx.BatchNorm(5, rngs=rngs), normjax.nnx.OptimizedLSTMCell(5, 4, rngs=rngs)
    parts = [flax.nnx.Linear(3, 4, rngs=rngs), *wrappers, norm, cell]
    model = flax.nnx.Module()
    model.layers = flax.nnx.List(parts)  # pyright: ignore[reportAttributeAccessIssue]
    state = flax.nnx.to_pure_dict(flax.nnx.state(model, (flax.nnx.Param, flax.nnx.BatchStat)))
    state = {"layers": {key(number): layer for number, layer in state["layers"].items()}}
    norms, rest = read(state, "nnx")
    kernels, rest = read_weights(rest, "nnx")
    cells, rest = read_cells(rest, "nnx")
    assert (list(norms), list(kernels), list(cells)) == (["layers/3"], ["layers/1", "layers/2"], ["layers/4"])
    assert list(rest["layers"]) == [key(0)]
    rest = write_cells(cells, "nnx", rest)
    rest = write_weights(kernels, "nnx", rest=rest)
    assert_same(write(norms, "nnx", rest=rest), state)
