"""Every refusal says what was found and what is accepted; the whole text is asserted."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from normjax import TABLE, Field, FieldError, Normalizer, Span, Stats, expect, explain, normalize, top, train
from normjax import linen as nl
from normjax import nnx as nx
from normjax.diagnostics import report
from normjax.penalty import l1_penalty
from normjax.running import Running, as_stats, initial, merge, slots, update
from tests.refusals import refuses

IMAGE = jnp.ones((8, 12, 10, 64))
DENSE = jnp.ones((8, 64))

CASES = {
    "unreadable atom": (
        lambda: Field.parse("h:5 w:-5 c"),
        "cannot read this as axis, axis:window or axis/groups\n    h:5 w:-5 c\n        ^^^^",
    ),
    "empty field": (lambda: Field.parse(" "), "an empty field averages nothing; use None to skip the step"),
    "not a field": (lambda: Field.parse(cast(Any, 3)), "a field is a string or a Field, found int"),
    "axis twice": (
        lambda: Field.parse("c n c:5"),
        "field \"c n c:5\" names 'c' twice\n    c n c:5\n        ^^^",
    ),
    "unknown axis": (
        lambda: expect(DENSE, "h w"),
        'field "h w" averages over \'h\', which layout "n ... c" does not name\n    h w\n    ^',
    ),
    "groups that do not divide": (
        lambda: expect(IMAGE, "c/7"),
        "cannot split axis 'c' of length 64 into 7 equal groups",
    ),
    "wrong rank": (lambda: expect(IMAGE, "c", "n c"), 'layout "n c" names 2 axes, but the array has 4'),
    "too small a rank": (
        lambda: expect(jnp.ones(3), "c"),
        'layout "n ... c" names at least 2 axes, but the array has 1',
    ),
    "axis twice in the layout": (
        lambda: expect(IMAGE, "c", "n c ... c"),
        "layout \"n c ... c\" names 'c' twice\n    n c ... c\n            ^",
    ),
    "unreadable layout": (lambda: expect(DENSE, "c", "n, c"), "a layout names axes, as \"n ... c\" does; found 'n, c'"),
    "nothing matched": (
        lambda: expect(DENSE, "..."),
        'field "..." matches no axis of an array of shape (8, 64), layout "n ... c"',
    ),
    "single element, no axis": (
        lambda: normalize(DENSE, "instance"),
        'field "..." holds a single element of an array of shape (8, 64), so centring leaves zero',
    ),
    "single element, one example": (
        lambda: normalize(DENSE[:1], "batch"),
        'field "n ..." holds a single element of an array of shape (1, 64), so centring leaves zero',
    ),
    "single element, blocks of one": (
        lambda: normalize(DENSE, Normalizer("c/64", "c")),
        'field "c/64" holds a single element of an array of shape (8, 64), so centring leaves zero',
    ),
    "integers": (
        lambda: normalize(jnp.ones((2, 3), jnp.int32), "token"),
        "normalize takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)",
    ),
    "unbound mapped axis": (
        lambda: normalize(DENSE, Normalizer("@data", "@data")),
        "mapped axis '@data' is not bound here; call this inside jax.vmap(..., axis_name=\"data\"), or inside "
        'jax.shard_map or jax.pmap over a mesh axis "data"',
    ),
    "misspelt row": (
        lambda: normalize(DENSE, "divisve"),
        f"no normalizer is called 'divisve'; did you mean 'divisive'? TABLE has {', '.join(TABLE)}",
    ),
    "not a normalizer": (
        lambda: normalize(DENSE, cast(Any, 3)),
        "a normalizer is a Normalizer or a name in TABLE, found int",
    ),
    "negative eps given": (lambda: normalize(DENSE, "token", eps=-5.0), "eps is a number of at least 0; found -5.0"),
    "eps that is no number": (
        lambda: normalize(DENSE, "token", eps=jnp.array(jnp.nan)),
        "eps is a number of at least 0; found nan",
    ),
    "negative variance": (
        lambda: normalize(DENSE, "token", stats=Stats(var=jnp.array(-1.0), mean=jnp.array(0.0))),
        "the var of statistics is at least 0; found -1.0",
    ),
    "negative mask": (
        lambda: normalize(DENSE, "token", mask=-jnp.ones(64)),
        "a mask is made of booleans, or of weights that are finite and at least 0; found -1.0",
    ),
    "infinite mask": (
        lambda: l1_penalty(DENSE, mask=np.array([1.0] * 63 + [np.inf])),
        "a mask is made of booleans, or of weights that are finite and at least 0; found inf",
    ),
    "mask": (
        lambda: normalize(DENSE, "token", mask=jnp.ones(3)),
        "a mask must broadcast against the array: found shapes (3,) and (8, 64)",
    ),
    "scale": (
        lambda: normalize(DENSE, "token", scale=jnp.ones(3)),
        'scale of shape (3,) does not broadcast against shape (8, 64), layout "n ... c"',
    ),
    "bias rank": (
        lambda: normalize(IMAGE, "token", bias=jnp.ones((12, 10, 64))),
        'bias of shape (12, 10, 64) is not a scalar, [c], [n, c] or of the rank of x, for layout "n ... c" and '
        "shape (8, 12, 10, 64)",
    ),
    "eps that is larger": (
        lambda: normalize(DENSE[:1], "token", eps=jnp.ones((5, 1))),
        "eps is a scalar, or has the rank of x and broadcasts against it: found shapes (5, 1) and (1, 64)",
    ),
    "complex scale": (
        lambda: normalize(DENSE, "token", scale=jnp.ones(64, jnp.complex64)),
        "a complex scale does not fit a real array of dtype float32",
    ),
    "order of a truth value": (
        lambda: Normalizer("c", "c", order=True),
        "order is a positive number, inf or top(k); found True",
    ),
    "a fraction of largest": (
        lambda: Normalizer("c", "c", order=top(cast(Any, 2.5))),
        "order is a positive number, inf or top(k); found top(k=2.5)",
    ),
    "nnx features": (
        lambda: nx.LayerNorm(5, rngs=nnx.Rngs(0))(DENSE),
        "a layer made for 5 features cannot take an input of shape (8, 64)",
    ),
    "nnx batch features": (
        lambda: nx.BatchNorm(5, rngs=nnx.Rngs(0))(DENSE),
        "a layer made for 5 features cannot take an input of shape (8, 64)",
    ),
    "no micro-batches": (
        lambda: train.linen_step(cast(Any, None), cast(Any, None), cast(Any, None), micro_batches=0),
        "micro_batches is at least 1; found 0",
    ),
    "eps": (
        lambda: normalize(IMAGE, "token", eps=jnp.ones(64)),
        "eps is a scalar, or has the rank of x and broadcasts against it: found shapes (64,) and (8, 12, 10, 64)",
    ),
    "given statistics": (
        lambda: normalize(DENSE, "batch", stats=Stats(jnp.ones(64), None)),
        "a given mean has the rank of x and broadcasts against it: found shapes (64,) and (8, 64)",
    ),
    "border": (
        lambda: Normalizer("c:3", "c", border="reflect"),
        "border is one of 'truncate', 'zero'; found 'reflect'",
    ),
    "negative eps": (lambda: Normalizer("c", "c", eps=-1.0), "eps is a finite number of at least 0; found -1.0"),
    "order": (lambda: Normalizer("c", "c", order=0), "order is a positive number, inf or top(k); found 0"),
    "top-k over a window": (
        lambda: normalize(DENSE, Normalizer(None, "c:5", order=top(2))),
        'order=top(2) takes whole axes and blocks; field "c:5" has windows',
    ),
    "top-k beyond the size": (
        lambda: normalize(DENSE, Normalizer(None, "c", order=top(65))),
        'order=top(65) needs 65 elements; field "c" holds 64 of shape (8, 64)',
    ),
    "window over examples": (
        lambda: slots(Normalizer("n:5", "n"), "n ... c", (8, 64)),
        "field \"n:5\" slides over the examples ('n:5'), which cannot be stored",
    ),
    "another size at inference": (
        lambda: as_stats(Running(jnp.ones((4, 4, 3))), Normalizer("n ...:3", None), "n ... c", (2, 5, 4, 3)),
        'the stored mean has shape (4, 4, 3), but field "n ...:3" on an array of shape (2, 5, 4, 3), layout "n ... c", '
        "needs (5, 4, 3)",
    ),
    "moments of order 1": (
        lambda: merge(Stats(None, 1.0, None, 2.0), Stats(None, 1.0, None, 2.0), order=1),
        "moments of order 1 cannot be merged, only those of order 2",
    ),
    "penalty of integers": (
        lambda: l1_penalty(jnp.ones(3, jnp.int32)),
        "l1_penalty takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)",
    ),
    "span without an axis": (lambda: Span(None), "a span needs an axis, a mapped axis, or both"),
    "span of both kinds": (
        lambda: Span("c", window=3, blocks=2),
        "a span is a window or blocks of axis 'c', not both",
    ),
    "window of zero": (lambda: Span("c", window=0), "window of axis 'c' must be an integer of at least 1, found 0"),
    "explain": (lambda: explain("group", (8, 4, 4, 48)), "cannot split axis 'c' of length 48 into 32 equal groups"),
    "linen integers": (
        lambda: nl.Norm("token").init(jax.random.key(0), jnp.ones((2, 3), jnp.int32)),
        "Norm takes floating-point arrays, found int32; cast first: x.astype(jnp.float32)",
    ),
    "linen without channels": (
        lambda: nl.Norm("token", "n t f").init(jax.random.key(0), jnp.ones((2, 3, 4))),
        "a learned scale or bias lies along axis 'c', which layout \"n t f\" does not name; use_scale=False, "
        "use_bias=False goes without",
    ),
    "nnx without a shape": (
        lambda: nx.Norm(3, Normalizer("n", "n"), rngs=nnx.Rngs(0)),
        "Normalizer('n', 'n') stores statistics along other axes than the channels: give the whole shape of an input as "
        "`features`, found 3",
    ),
    "averaging": (
        lambda: nl.Norm("batch", averaging="ema").init(jax.random.key(0), DENSE, False),
        "averaging is one of 'exponential', 'debiased', 'cumulative'; found 'ema'",
    ),
    "averaging without counts": (
        lambda: update(Running(jnp.zeros(1)), Stats(jnp.ones(1), None, jnp.ones(1)), averaging="cumulative"),
        "averaging='cumulative' needs the counts of batches beside the statistics; `initial` with the same averaging "
        "makes them",
    ),
    "unbiased without a variance": (
        lambda: nx.Norm(64, "l1_batch", unbiased=True, rngs=nnx.Rngs(0))(DENSE),
        f"unbiased=True needs a variance: order 2 and A = B, without windows; found {TABLE['l1_batch']}",
    ),
    "renormalization without stored statistics": (
        lambda: nx.Norm(64, "token", renorm=(3.0, 5.0), rngs=nnx.Rngs(0))(DENSE),
        "batch renormalization needs a row that stores all its moments, a variance among them, and has neither floor nor "
        "keep_mean; found Normalizer('c', 'c')",
    ),
    "limits that bind everything": (
        lambda: nx.BatchRenorm(64, r_max=0.5, rngs=nnx.Rngs(0))(DENSE),
        "r_max is at least 1; found 0.5",
    ),
    "one limit": (
        lambda: nx.Norm(64, "batch", renorm=cast(Any, 3.0), rngs=nnx.Rngs(0))(DENSE),
        "renorm is a pair of limits (r_max, d_max); found 3.0",
    ),
    "a window of nobody's memory": (
        lambda: Normalizer("...:99999999999 c", "c"),
        "window of axis '...' is at most 16777216 wide, found 99999999999; '...' alone takes the whole axis",
    ),
    "window of a truth value": (
        lambda: Span("c", window=True),
        "window of axis 'c' must be an integer of at least 1, found True",
    ),
    "layout as a list": (
        lambda: normalize(DENSE, "token", cast(Any, ["n", "c"])),
        "a layout names axes, as \"n ... c\" does; found ['n', 'c']",
    ),
    "nnx layout as a list": (
        lambda: nx.Norm(64, "token", layout=cast(Any, ["n", "c"]), rngs=nnx.Rngs(0)),
        "a layout names axes, as \"n ... c\" does; found ('n', 'c')",
    ),
    "penalty of all that normalize returns": (
        lambda: l1_penalty(cast(Any, normalize(DENSE, "token")), 0.1),
        "l1_penalty takes centred activations, normalize(...).centered; found Normalized",
    ),
    "normalize of all that normalize returns": (
        lambda: normalize(cast(Any, normalize(DENSE, "token")), "token"),
        "normalize takes an array, found Normalized; give one of its parts: y, centered, stats",
    ),
    "negative penalty": (lambda: l1_penalty(DENSE, -0.1), "alpha is a finite number of at least 0; found -0.1"),
    "statistics as a pair": (
        lambda: normalize(DENSE, "batch", stats=cast(Any, (DENSE[:1], DENSE[:1]))),
        "stats are a normjax.Stats(mean, var), each of the rank of x and broadcasting against it; found tuple (stored "
        "statistics become one by normjax.running.as_stats)",
    ),
    "statistics that were not observed": (
        lambda: update(initial(TABLE["batch"], "n c", (8, 64)), normalize(DENSE, "batch").stats, 0.9),
        "the mean of the batch has shape (1, 64), the stored one (64,): give running.observe(stats, normalizer, layout, "
        "x.shape) for the stats that normalize returned",
    ),
    "momentum": (
        lambda: update(Running(jnp.zeros(1)), Stats(jnp.ones(1), None, jnp.ones(1)), 1.5),
        "momentum is a number from 0 to 1; found 1.5",
    ),
    "a window given as features": (
        lambda: nx.DivisiveNorm(3, rngs=nnx.Rngs(0))(IMAGE),
        "a layer made for 3 features cannot take an input of shape (8, 12, 10, 64); features comes first, then window: "
        "DivisiveNorm(64, window=...)",
    ),
    "one scale for all channels": (
        lambda: nx.Norm(1, "layer", rngs=nnx.Rngs(0))(DENSE),
        "a layer made for 1 features cannot take an input of shape (8, 64)",
    ),
    "a fraction of features": (
        lambda: nx.Norm(cast(Any, 2.5), "batch", rngs=nnx.Rngs(0)),
        "features of Norm is the number of channels, an integer, or the whole shape of an input; found 2.5",
    ),
    "features as text": (
        lambda: nx.Norm(cast(Any, "16"), "batch", rngs=nnx.Rngs(0)),
        "features, the number of channels, comes first in nnx: Norm(64, ...); found features='16'",
    ),
    "a seed for random keys": (
        lambda: nx.Norm(64, "batch", rngs=cast(Any, 0)),
        "rngs of Norm is an nnx.Rngs, as in rngs=nnx.Rngs(0); found 0",
    ),
    "a seed for those of a cell": (
        lambda: nx.GRUCell(4, 8, rngs=cast(Any, 0)),
        "rngs of GRUCell is an nnx.Rngs, as in rngs=nnx.Rngs(0); found 0",
    ),
    "a seed for those of a kernel": (
        lambda: nx.Linear(4, 8, rngs=cast(Any, 0)),
        "rngs of Linear is an nnx.Rngs, as in rngs=nnx.Rngs(0); found 0",
    ),
    "sigma where nothing is divided": (
        lambda: nl.Norm("mean_only", learn_sigma=True),
        "learn_sigma learns what is added to a spread; Normalizer('n ...', None) divides by nothing",
    ),
    "sigma of a cell that divides by nothing": (
        lambda: nx.GRUCell(4, 8, normalizer="mean_only", learn_sigma=True, rngs=nnx.Rngs(0)),
        "learn_sigma learns what is added to a spread; Normalizer('n ...', None) divides by nothing",
    ),
    "penalty of a cell without a normalizer": (
        lambda: nl.LSTMCell(8, l1=0.1),
        "l1 has no meaning without a normalizer; found l1=0.1. Normalizer(None, None), with use_scale=False, "
        "use_bias=False, normalizes nothing, and is penalized on the pre-activations",
    ),
    "a sequence without time": (
        lambda: nl.RNN(nl.GRUCell(8)).init(jax.random.key(0), jnp.ones(4)),
        "an RNN takes sequences, [n, t, i] or [t, i]; found an array of shape (4,)",
    ),
    "inputs of another length": (
        lambda: nx.RNN(nx.GRUCell(4, 8, rngs=nnx.Rngs(0)))(jnp.ones((2, 3, 5))),
        "a cell made for inputs [n, 4] cannot take an array of shape (2, 5)",
    ),
    "weight as text": (
        lambda: nx.Linear(3, 4, weight=cast(Any, "standardization"), rngs=nnx.Rngs(0)),
        "weight is a function, such as normjax.weights.weight_standardization; found 'standardization'",
    ),
    "report of text": (
        lambda: report(cast(Any, "abc")),
        "report takes activations by layer, {name: array}, as normjax.capture gives them; found str",
    ),
    "groups of Flax's layer": (
        lambda: nl.GroupNorm(7).init(jax.random.key(0), DENSE),
        "Number of groups (7) does not divide the number of channels (64).",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_is(case):
    provoke, message = CASES[case]
    refuses(provoke, (ValueError, TypeError), message)


def test_field_errors_are_value_errors_with_the_context_as_a_note():
    with pytest.raises(FieldError) as caught:
        normalize(IMAGE, Normalizer("c/7", "c/7"))
    assert isinstance(caught.value, ValueError)
    assert caught.value.__notes__ == [
        "while normalizing shape (8, 12, 10, 64), layout \"n ... c\", with Normalizer('c/7', 'c/7')"
    ]


REMEDIES = {  # notes that stand below an error, since the row that was named is not the user's own
    "group of 16 channels": (
        lambda: normalize(jnp.ones((2, 3, 16)), "group"),
        "row 'group' has 32 groups; a row of your own has others: Normalizer('... c/4', '... c/4')",
    ),
    "ghosts of a batch of 2": (
        lambda: normalize(DENSE[:2], "ghost"),
        "row 'ghost' has 8 groups; a row of your own has others: Normalizer('n ...', 'n ...')",
    ),
    "parts of a batch of 2": (
        lambda: nx.GhostBatchNorm(64, rngs=nnx.Rngs(0))(DENSE[:2]),
        "`examples` divides the number of examples of every training batch",
    ),
    "examples under vmap": (
        lambda: jax.vmap(lambda x: normalize(x, "batch", "c").y)(DENSE),
        'examples that jax.vmap maps over are "@n", with jax.vmap(..., axis_name="n")',
    ),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_an_error_of_a_row_s_own_numbers_comes_with_the_remedy(case):
    provoke, note = REMEDIES[case]
    with pytest.raises(FieldError) as caught:
        provoke()
    assert note in caught.value.__notes__


def test_masks_and_zero_size_axes_never_raise_for_a_single_element():
    assert normalize(DENSE[:1], "batch", mask=True).y.shape == (1, 64)
    assert normalize(DENSE[:, :0], "token").y.shape == (8, 0)


def test_single_elements_are_legal_without_centring_and_where_zeros_count():
    assert normalize(DENSE, Normalizer(None, "c/64")).y.shape == DENSE.shape
    np.testing.assert_allclose(normalize(DENSE[:, :1], Normalizer("c:5", None, border="zero")).y, 0.8, rtol=1e-6)


def test_mapped_sizes_count_as_elements():
    out = jax.vmap(lambda x: normalize(x, Normalizer("@n", "@n"), "c").y, axis_name="n")(DENSE)
    assert out.shape == DENSE.shape
    with pytest.raises(FieldError, match="holds a single element"):
        jax.vmap(lambda x: normalize(x, Normalizer("@n", "@n"), "c").y, axis_name="n")(DENSE[:1])
