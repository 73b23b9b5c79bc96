"""benchmarks/traffic.py: bytes of programs written out here, counted by hand. No compiler is asked."""

import pytest

from benchmarks.hlo import arrays
from benchmarks.traffic import traffic

# Two branches, a kernel of two operands and one of one.
BRANCHES = """
%dear (p: (f32[8,128], f32[8,128])) -> f32[8,128] {
  %p = (f32[8,128]{1,0}, f32[8,128]{1,0}) parameter(0)
  %a = f32[8,128]{1,0} get-tuple-element(%p), index=0
  %b = f32[8,128]{1,0} get-tuple-element(%p), index=1
  ROOT %sum = f32[8,128]{1,0} add(%a, %b)
}

%cheap (p: (f32[8,128], f32[8,128])) -> f32[8,128] {
  %p = (f32[8,128]{1,0}, f32[8,128]{1,0}) parameter(0)
  ROOT %a = f32[8,128]{1,0} get-tuple-element(%p), index=0
}
"""
# Reads every second row of p, overwrites the first rows of q.
FUSED = """
%fused (p: f32[64,128], q: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %q = f32[64,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %negative = f32[64,128]{1,0} negate(%p)
  %rows = f32[32,128]{1,0} slice(%negative), slice={[0:64:2], [0:128]}
  ROOT %update = f32[64,128]{1,0} dynamic-update-slice(%q, %rows, %zero, %zero)
}
"""
LOOP = """
%body (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %p = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[1024]{0} get-tuple-element(%p), index=1
  %y = f32[1024]{0} negate(%x)
  ROOT %r = (s32[], f32[1024]{0}) tuple(%i, %y)
}

%condition (p: (s32[], f32[1024])) -> pred[] {
  %p = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
"""
NAME = 'custom-call(%x), custom_call_target="tpu_custom_call"'
# What stands before ENTRY, shape of x, lines of ENTRY; bytes with the cheapest and the costliest branches, kernels.
PROGRAMS = {
    "a copy reads and writes": ("", "f32[8,128]", "copy(%x)", 8192, 8192, 1),
    "rows and columns that fill up a tile of a TPU count": (
        "",
        "f32[3,100]{1,0:T(8,128)}",
        "negate(%x)",
        8192,
        8192,
        1,
    ),
    "an array given twice is read once": ("", "f32[8,128]", "add(%x, %x)", 8192, 8192, 1),
    "fast memory is free": ("", "f32[8,128]{1,0:T(8,128)S(1)}", "negate(%x)", 0, 0, 1),
    "a view is no kernel": ("", "f32[8,128]", "bitcast(%x)", 0, 0, 0),
    "a kernel of Mosaic counts operands and results": ("", "f32[8,128]", NAME, 8192, 8192, 1),
    "a fusion reads what its slices take and writes its update": (
        FUSED,
        "f32[64,128]",
        "fusion(%x, %x), kind=kLoop, calls=%fused",
        2 * 16384,
        2 * 16384,
        1,
    ),
}


def entry(before, shape, line):
    return (
        f"HloModule m\n{before}\nENTRY %main (x: {shape}) -> {shape} {{\n"
        f"  %x = {shape} parameter(0)\n  ROOT %y = {shape} {line}\n}}\n"
    )


@pytest.mark.parametrize(("before", "shape", "line", "low", "high", "kernels"), PROGRAMS.values(), ids=PROGRAMS)
def test_program_moves_what_was_counted_by_hand(before, shape, line, low, high, kernels):
    found = traffic(entry(before, shape, line))
    assert (found.low, found.high, found.kernels) == (low, high, kernels)


def test_conditional_takes_its_cheapest_or_its_costliest_branch():
    lines = "tuple(%x, %x)\n  %p = pred[] constant(true)\n  ROOT %z = f32[8,128] conditional(%p, %y, %y)"
    text = entry(BRANCHES, "f32[8,128]", f"{lines}, true_computation=%dear, false_computation=%cheap")
    found = traffic(text.replace("ROOT %y", "%y"))
    assert (found.low, found.high, found.kernels) == (0, 3 * 4096, 0)


def looped(loop, noted=""):
    lines = "tuple(%x, %x)\n  ROOT %z = (s32[], f32[1024]{0}) while(%y), condition=%condition, body=%body"
    return entry(loop, "f32[1024]", lines + noted).replace("ROOT %y", "%y")


@pytest.mark.parametrize(("noted", "trips"), [("", 7), (', backend_config={"known_trip_count":{"n":"5"}}', 5)])
def test_body_of_a_loop_counts_as_often_as_it_runs(noted, trips):
    found = traffic(looped(LOOP, noted))
    assert (found.low, found.kernels) == (trips * 8192, trips)


def test_copy_between_memories_counts_once_and_is_no_kernel():
    far, near = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
    lines = f"copy-start(%x)\n  ROOT %z = {near} copy-done(%y)"
    text = entry("", far, lines).replace(f"ROOT %y = {far}", f"%y = ({near}, {far}, u32[]{{:S(2)}})")
    assert (traffic(text).low, traffic(text).kernels) == (4096, 0)


# Shape, what is taken of each axis, bytes of the tiles or sectors that are touched.
SLICES = [
    ("f32[64,128]", [range(0, 64, 16), range(128)], 4 * 512),
    ("f32[64,128]", [range(64), range(0, 128, 16)], 64 * 8 * 32),
    ("bf16[64,128]", [range(64), range(0, 128, 16)], 64 * 128 * 2),
    ("f32[64,128]{1,0:T(8,128)}", [range(0, 64, 16), range(128)], 4 * 8 * 512),
    ("f32[64,256]{1,0:T(8,128)}", [range(64), range(5)], 64 * 512),
    ("f32[64,128]{0,1}", [range(64), range(0, 128, 16)], 8 * 256),
]


@pytest.mark.parametrize(("shape", "taken", "moved"), SLICES)
def test_slice_takes_whole_tiles_and_sectors(shape, taken, moved):
    assert arrays(shape)[0].cover(taken) == moved


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="no computation of this text is called ENTRY"):
        traffic("HloModule m\n")
    with pytest.raises(ValueError, match="what all-gather-start moves is not known: y"):
        traffic(entry("", "f32[8]", "all-gather-start(%x)"))
    with pytest.raises(ValueError, match=r"how often z runs is not known: its condition has the constants \[\]"):
        traffic(looped(LOOP.replace("constant(7)", "parameter(1)")))
