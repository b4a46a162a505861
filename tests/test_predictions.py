"""Predictions from machine code: what is read, which loop, what a trip costs, how many warps, and the page.

tests/data/compiled_sm_80.sass is cuobjdump's text of three kernels of tests/cuda/compiled.cu. The other programs are
written here, line by line, with the control codes that they are to have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import predict  # noqa: E402
import predict_model  # noqa: E402
import predict_parts  # noqa: E402
import sass  # noqa: E402
from predict_model import Launch, walk  # noqa: E402
from predict_parts import PARTS, occupancy  # noqa: E402
from sass import Instruction, Trip  # noqa: E402

A100, H100, RTX_4090 = PARTS
DATA = Path(__file__).parent / "data" / "compiled_sm_80.sass"


def line(address: int, text: str, stall=1, sets=7, releases=7, waits=0) -> str:
    """An instruction as cuobjdump prints it: "@P0 BRA 0x20"."""
    high = stall << 41 | 1 << 45 | sets << 46 | releases << 49 | waits << 52
    first = f"        /*{address:04x}*/                   {text} ;      /* 0x{address:016x} */"
    return f"{first}\n{'':80}/* 0x{high:016x} */"


def program(*texts) -> list[Instruction]:
    """Each a text, or a text with its control codes."""
    lines = ["\tcode for sm_80", "\t\tFunction : a_kernel"]
    for place, text in enumerate(texts):
        text, codes = (text, {}) if isinstance(text, str) else (text[0], text[1])
        lines += line(16 * place, text, **codes).splitlines()
    ((key, found),) = sass.kernels(lines).items()
    assert key == ("sm_80", "a_kernel") and len(found) == len(texts)
    return found


def names(trip: Trip) -> list[str]:
    return [each.name for each in trip.instructions]


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_instructions_are_read_with_their_control_codes():
    load, use = program(
        ("@!P0 LDG.E.128 R4, [R2.64]", dict(stall=2, sets=3, releases=1)),
        ("FADD R4, R4, 1", dict(stall=13, waits=0b1010)),
    )
    assert load == Instruction(0, "LDG.E.128", "R4, [R2.64]", True, 2, 3, 1, ())
    assert use == Instruction(16, "FADD", "R4, R4, 1", False, 13, None, None, (1, 3))


def test_what_cuobjdump_prints_is_read():
    found = sass.kernels(DATA.read_text().splitlines())
    product, copy, int8 = found.values()
    assert {architecture for architecture, _ in found} == {"sm_80"}
    counts = [Trip(code).counts for code in (product, copy, int8)]
    assert [each["matrix"] for each in counts] == [1, 0, 1]
    assert [sass.main_loop(code).products for code in (product, copy, int8)] == [16 * 8 * 16, 0, 16 * 8 * 32]
    trip = sass.main_loop(copy)
    # A float4 a lane, read and written.
    assert (trip.header, trip.loaded, trip.stored) == (None, 32 * 16, 32 * 16)
    # ptxas never waits longer than 15 cycles, and what is loaded is waited for.
    assert all(0 <= each.stall <= 15 for code in found.values() for each in code)
    loads = [each for each in copy if each.opcode == "LDG"]
    (store,) = (each for each in copy if each.opcode == "STG")
    assert len(loads) == 1 and loads[0].sets in store.waits
    assert Trip(product).counts["shared"] == 1 and Trip(product).loaded == 32 * 16


@pytest.mark.parametrize(
    ("name", "pipe", "bytes_", "products"),
    [
        ("LDG.E.EF.128", "global", 16, 0),
        ("LDG.E.U16.CONSTANT", "global", 2, 0),
        ("STG.E", "global", 4, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128", "global", 16, 0),
        ("LDSM.16.MT88.4", "shared", 16, 0),
        ("LDSM.16.M88.2", "shared", 8, 0),
        ("LDS.64", "shared", 8, 0),
        ("SHFL.BFLY", "shared", 4, 0),
        ("HMMA.16816.F32.BF16", "matrix", 0, 16 * 8 * 16),
        ("IMMA.16832.S8.S8", "matrix", 0, 16 * 8 * 32),
        # A warpgroup's: a quarter is a warp's.
        ("HGMMA.64x128x16.F32.BF16", "matrix", 0, 16 * 128 * 16),
        ("MUFU.EX2", "special", 0, 0),
        ("IMAD.MOV.U32", "float32", 0, 0),
        ("F2FP.BF16.F32.PACK_AB", "integer", 0, 0),
        ("BAR.SYNC", "other", 0, 0),
    ],
)
def test_what_an_instruction_does(name, pipe, bytes_, products):
    each = Instruction(0, name, "", False, 1, None, None, ())
    assert (sass.pipe(each), sass.width(each), sass.products(each)) == (pipe, bytes_, products)


# --- Loops ------------------------------------------------------------------------------------------------------------

HMMA = "HMMA.16816.F32 R0, R4, R8, R0"


def test_the_main_loop_is_the_one_without_masks():
    """Two loops with the same products: the one whose tiles need fewer instructions for them."""
    masked = [HMMA, "ISETP.GT.AND P1, PT, R1, R2, PT", "FSEL R0, R0, R3, P1", "@P0 BRA 0x10"]
    plain = [HMMA, "@P0 BRA 0x50"]
    trip = sass.main_loop(program("MOV R1, R2", *masked, *plain, "EXIT"))
    assert (trip.header, names(trip)) == (0x50, ["HMMA.16816.F32", "BRA"])


def test_a_small_loop_is_not_the_main_one_however_neat():
    """A rest of one product in a loop of two instructions, beside the loop of four."""
    small, large = [HMMA, "@P0 BRA 0x0"], [HMMA, HMMA, HMMA, HMMA, *["NOP"] * 9, "@P0 BRA 0x20"]
    assert sass.main_loop(program(*small, *large, "EXIT")).header == 0x20
    # Half of the work is enough.
    small, large = [HMMA, HMMA, "@P0 BRA 0x0"], [HMMA, HMMA, HMMA, HMMA, *["NOP"] * 9, "@P0 BRA 0x30"]
    assert sass.main_loop(program(*small, *large, "EXIT")).header == 0x0


def test_a_loop_around_another_is_not_the_main_one():
    trip = sass.main_loop(program("MOV R1, R2", "LDS R3, [R4]", HMMA, "@P0 BRA 0x20", "@P1 BRA 0x10", "EXIT"))
    assert (trip.header, names(trip)) == (0x20, ["HMMA.16816.F32", "BRA"])


def test_a_loop_may_lie_in_pieces():
    """Its last part stands behind the exit and jumps back into the middle: it belongs to the trip all the same."""
    code = program(
        "BRA 0x30", "EXIT", "NOP", HMMA, "@P1 BRA 0x60", "@!P0 BRA 0x10", "LDGSTS.E.128 [R1], [R2.64]", "@P0 BRA 0x30",
        "EXIT",
    )  # fmt: skip
    assert names(sass.main_loop(code)) == ["HMMA.16816.F32", "BRA", "LDGSTS.E.128", "BRA"]


def test_a_trip_prefetches_and_steps_over_what_is_rare():
    """Past the copy, which a branch could skip; past the exponentials of a role; not through the mask."""
    exponentials = ["MUFU.EX2 R0, R0"] * 16
    code = program(
        HMMA, "@P1 BRA 0x30", "LDGSTS.E.128 [R1], [R2.64]",
        "@P2 BRA 0x70", "ISETP.GT.AND P1, PT, R1, R2, PT", "FSEL R0, R0, R3, P1", "NOP",
        "@P3 BRA 0x180", *exponentials, "@P0 BRA 0x0", "EXIT",
    )  # fmt: skip
    trip = sass.main_loop(code)
    assert trip.counts["global"] == 1 and trip.counts["special"] == 16 and trip.counts["integer"] == 0
    assert trip.counts["other"] == 4


def around(code: list[Instruction]) -> list[Instruction]:
    """The program, whose EXIT goes back to the start while @P7."""
    return [
        *code[:-1],
        code[-1]._replace(name="BRA", operands="0x0", predicate=True),
        code[-1]._replace(address=1 << 20),
    ]


def test_of_known_bytes_the_path_is_taken_that_has_them():
    """A vector in and one out, by way of a residual's or of parameters of twice the width."""
    code = program(
        "LDG.E.128 R4, [R2.64]", "@P0 BRA 0x40", "LDG.E.128 R8, [R2.64]", "STG.E.128 [R2.64], R8", "@P1 BRA 0x70",
        "LDG.E.128 R12, [R2.64]", "LDG.E.128 R16, [R2.64]", "STG.E.128 [R2.64], R4", "STG.E [R6.64], R4", "EXIT",
    )  # fmt: skip
    assert (sass.main_loop(code).loaded, sass.main_loop(code).stored) == (4 * 512, 2 * 512 + 128)
    # Of the whole kernel the bytes themselves are known; of a loop, which goes round again at the end, their ratio.
    amounts = [(512 * loaded, 512 * stored) for loaded, stored in ((1, 1), (2, 2), (4, 2), (3, 1))]
    found = [sass.main_loop(code, (amount,)) for amount in amounts]
    assert [trip.vectors(sass.WIDE) for trip in found] == amounts
    assert [trip.vectors(sass.WIDE) for trip in (sass.main_loop(around(code), (each,)) for each in amounts)] != amounts
    plain, residual, wide = (sass.main_loop(around(code), ((ratio * 512, 512),)) for ratio in (1.0, 2.0, 3.0))
    assert (plain.loaded, plain.stored) in {(512, 512 + 128), (1024, 1024 + 128)}
    assert (residual.loaded, residual.stored) == (4 * 512, 2 * 512 + 128)
    assert (wide.loaded, wide.stored) == (3 * 512, 512 + 128)


LOAD, STORE, SQUARE = "LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4", "FMUL R4, R4, R4"


def test_of_a_load_under_a_predicate_the_known_bytes_say_whether_it_is_executed():
    """A parameter of one dtype or the other: both loads are issued, one of them moves bytes."""
    parameter = ["@P0 LDG.E.128 R8, [R6.64]", "@!P0 LDG.E.128 R8, [R6.64+0x10]"]
    code = program(LOAD, *parameter, "FMUL R4, R4, R8", STORE, "EXIT")
    trip = sass.main_loop(code, ((1024, 512),))
    assert (trip.loaded, trip.stored, len(trip.instructions)) == (1024, 512, 6) and names(trip).count("NOP") == 1
    assert sass.main_loop(code).loaded == 3 * 512


def test_marks_tell_branches_apart():
    """Three functions of what is loaded, and the same bytes: by the constants that stand in them."""

    def arm(constant, length, end=0x110):
        return [f"FMUL R4, R4, {constant}", *[SQUARE] * length, f"BRA 0x{end:x}"]

    branches = ["@P0 BRA 0x60", "@P1 BRA 0xb0", *arm(0.5, 1), *arm(0.25, 3), *arm(0.125, 4)]
    code = program(LOAD, *branches, STORE, "EXIT")
    ways = {"0.5,": (0.5, 0), "0.25": (0.25, 0), "0.125": (0.125, 0)}
    assert len(code) == 19 and code[6].operands.endswith("0.25") and code[11].operands.endswith("0.125") and ways
    for wanted, avoided, constant in (
        ((), (), "0.5"), (("0.25$",), (), "0.25"), ((), ("0.5$", "0.25$"), "0.125"), (("R4, R4, R4",), (), "0.125")
    ):  # fmt: skip
        trip = sass.main_loop(code, ((512, 512),), sass.Marks(wanted, avoided))
        assert [each.operands.split()[-1] for each in trip.instructions if "0." in each.operands] == [constant]
    assert sass.Marks(("0.25$",), ("0.75$",)).missing(code) == ["0.75$"]


def test_a_trip_that_stores_nothing_has_its_arithmetic():
    """The shortest way around would load and go."""
    body = ["LDG.E.128 R4, [R2.64]", "@P1 BRA 0x120", *["MUFU.EX2 R4, R4"] * 16]
    trip = sass.main_loop(program(*body, "@P0 BRA 0x0", "EXIT"))
    assert trip.counts["special"] == 16


def test_a_wrong_trip_is_refused():
    """What the emulator counts of the kernel does not fit it, or it loads what it does not use."""
    code = program(LOAD, LOAD, *[SQUARE.replace("R4", f"R{n}") for n in (4, 5, 6, 7)], STORE, "@P0 BRA 0x0", "EXIT")
    loop = sass.main_loop(code)
    none = sass.NO_MARKS
    assert sass.checked(Trip(loop.instructions[1:], 0x0), ((1024, 1024),), none, (2, 2)).loaded == 512
    with pytest.raises(sass.Wrong, match="1024 and 512 bytes in vectors; a warp 1024 and 1024"):
        sass.checked(loop, ((1024, 1024),), none, (2, 2))
    # The first of the two is written over.
    with pytest.raises(sass.Wrong, match=r"does not use what LDG.E.128 R4, \[R2.64\] at 0 loads"):
        sass.checked(loop, ((1024, 512),), none, (2, 1))
    with pytest.raises(sass.Wrong, match="does not use what"):
        sass.checked(Trip([code[1], code[2], code[7]], 0x10), (), none, (1, 0))
    with pytest.raises(sass.Wrong, match="that the call does not execute"):
        sass.checked(Trip(code[1:8], 0x10), ((512, 512),), sass.Marks((), ("R5",)), (1, 1))
    # Of a whole kernel the bytes are known, or where threads share them the requests.
    whole = Trip(code[1:8])
    assert sass.checked(whole, ((512, 512),), none, (9, 9)) and sass.checked(whole, ((256, 512),), none, (1, 1))
    with pytest.raises(sass.Wrong, match="a warp 256 and 512"):
        sass.checked(whole, ((256, 512),), none, (2, 1))


def test_without_a_loop_the_trip_is_the_whole_kernel():
    tail = ["LDG.E.U8 R9, [R2.64]", "@P0 BRA 0x40"]
    code = program(
        "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64]", "STG.E.128 [R2.64], R4", "@P1 BRA 0x60", *tail, "EXIT"
    )
    assert sass.main_loop(code).header is None
    # A loop of a quarter of the bytes is the kernel's work, whatever stands around it.
    wide = ["LDG.E.128 R9, [R2.64]", "@P0 BRA 0x40"]
    code = program(
        "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64]", "STG.E.128 [R2.64], R4", "@P1 BRA 0x60", *wide, "EXIT"
    )
    assert sass.main_loop(code).header == 0x40


# --- The machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "registers", "threads", "shared", "blocks"),
    [
        # CUDA's occupancy calculator: registers by 256 a warp, of each scheduler's quarter.
        (A100, 32, 256, 0, 8),
        (A100, 255, 128, 0, 2),
        (A100, 168, 128, 0, 3),
        (A100, 129, 128, 0, 3),
        (A100, 32, 32, 0, 32),
        (A100, 32, 128, 80 * 1024, 2),
        (A100, 32, 128, 82 * 1024, 1),  # each block gives the system 1 KB
        (H100, 32, 128, 75 * 1024, 3),
        (H100, 32, 1024, 0, 2),
        (RTX_4090, 32, 1024, 0, 1),
        (RTX_4090, 32, 256, 0, 6),
        (RTX_4090, 32, 32, 0, 24),
        (RTX_4090, 255, 128, 64 * 1024, 1),
        (RTX_4090, 32, 128, 100 * 1024, 0),
    ],
)
def test_occupancy(part, registers, threads, shared, blocks):
    assert occupancy(part, registers, threads, shared) == blocks
    if not blocks:
        with pytest.raises(ValueError, match=f"no block of .* fits a multiprocessor of {part.name}"):
            predict_model.predict(part, Trip(program("EXIT")), Launch(registers, threads, shared))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_rates_add_up_to_the_data_sheets_peak(part):
    """Multiply-adds a cycle × schedulers × multiprocessors × clock; of mma.sync where it is the fastest there is."""
    everywhere = 2 * predict_parts.SCHEDULERS * part.multiprocessors.value * part.clock.value
    for rate, peak in (
        (part.wgmma or part.mma, part.peak), (part.wgmma_int8 or part.mma_int8, part.peak_int8)
    ):  # fmt: skip
        assert rate.value * everywhere == pytest.approx(peak.value, rel=0.005)


def test_every_rate_has_a_source():
    used = {rate.source for part in PARTS for rate in part if isinstance(rate, predict_parts.Rate)}
    assert used == set(predict_parts.SOURCES)


def test_a_warp_waits_for_stall_counts_pipes_and_scoreboards():
    chain = program(("FADD R1, R1, R2", dict(stall=4)), ("FADD R1, R1, R2", dict(stall=4)))
    assert walk(A100, chain, 0.0, 0.0, 1) == 8
    # The pipe takes one in two cycles on an A100, in one on an H100, whatever the stall count says.
    independent = program(*["FADD R1, R2, R3"] * 4)
    assert walk(A100, independent, 0.0, 0.0, 1) == 8 and walk(H100, independent, 0.0, 0.0, 1) == 4
    # Four warps in step issue one after another.
    assert walk(A100, program("NOP", "NOP"), 0.0, 0.0, 4) == 8
    # An mma in 8 cycles.
    assert walk(A100, program(HMMA, HMMA), 0.0, 0.0, 1) == 16
    load = ("LDS R1, [R2]", dict(sets=0))
    waited = program(load, ("FADD R1, R1, R2", dict(waits=1)))
    # 4 cycles of the shared port for four schedulers' 128 bytes each, and the latency.
    assert walk(A100, waited, 0.0, 0.0, 1) == 4 + A100.local.value + 1
    far = program(("LDG.E R1, [R2.64]", dict(sets=0)), ("FADD R1, R1, R2", dict(waits=1)))
    assert walk(A100, far, 0.0, 500.0, 1) - walk(A100, far, 0.0, 100.0, 1) == pytest.approx(400)


def test_a_copy_is_waited_for_by_its_group():
    def copying(left: int) -> list[Instruction]:
        return program(
            "LDGSTS.E.128 [R1], [R2.64]", ("LDGDEPBAR", dict(sets=7)), f"DEPBAR.LE SB0, 0x{left:x}", *["NOP"] * 100
        )

    # All but the youngest group: a trip later it has long come.
    assert walk(A100, copying(0), 0.0, 1000.0, 1) > 1000
    assert walk(A100, copying(1), 0.0, 50.0, 1) < 150


def test_a_warpgroups_product_is_waited_for_where_the_code_says():
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
    code = program(product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", *["FADD R1, R2, R3"] * 10)
    # 16 × 128 × 16 multiply-adds a warp by 512 a cycle, then what follows; side by side without the wait.
    assert walk(H100, code, 0.0, 0.0, 1) == pytest.approx(64 + 10 + 1, abs=1)
    assert walk(H100, [code[0], *code[2:]], 0.0, 0.0, 1) < 64
    assert predict_model.operand_bytes(code[0]) == 2 * 16 * (128 + 64)
    held = program("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8], R24")
    assert predict_model.operand_bytes(held[0]) == 2 * 16 * 128
    with pytest.raises(ValueError, match="A100 has no HGMMA"):
        walk(A100, code, 0.0, 0.0, 1)


def test_a_range_is_from_no_overlap_to_all():
    """Eight products, 64 cycles, then 64 cycles of exponentials: two warps can hide one behind the other, or not."""
    code = program(*[(HMMA, dict(stall=8))] * 8, *["MUFU.EX2 R0, R1"] * 7, ("MUFU.EX2 R0, R1", dict(sets=0)),
                   ("NOP", dict(waits=1)))  # fmt: skip
    found = predict_model.predict(A100, Trip(code), Launch(255, 128, 0))
    assert found.warps == 2 and found.busy["matrix"] == found.busy["special"] == 64
    assert found.best == pytest.approx(A100.sustained.value * min(1, 64 / max(64, found.alone / 2)), rel=1e-3)
    assert found.worst == pytest.approx(A100.sustained.value * 64 / (found.in_step / 2), rel=1e-3)
    assert 1.6 < found.best / found.worst < 2.3
    assert found.worst < predict_model.expected(found.worst, found.best) < found.best
    # One warp has nobody to hide behind.
    alone = predict_model.predict(A100, Trip(code), Launch(255, 128, 100 * 1024))
    assert alone.best == alone.worst < found.best and alone.binds == "latency, 1 warps"


def test_bytes_are_limited_by_bandwidth_or_by_what_is_in_flight():
    code = program(("LDG.E.128 R4, [R2.64]", dict(sets=0)), ("STG.E.128 [R2.64], R4", dict(waits=1)))
    full = predict_model.predict(A100, Trip(code), Launch(32, 256, 0), 1024.0)
    few = predict_model.predict(A100, Trip(code), Launch(32, 32, 80 * 1024), 1024.0)
    assert full.best == pytest.approx(A100.streamed.value) and full.binds == "memory"
    # Little: two warps' 512 bytes a latency; a quarter of a warp for each scheduler and block.
    wanted = 1024 / (few.alone / few.warps) / (A100.bandwidth.value / 108 / 4 / A100.clock.value)
    assert few.warps == 0.5 and few.best == pytest.approx(A100.streamed.value * wanted)


# --- The strangers, and the page --------------------------------------------------------------------------------------

STRANGERS = json.loads(predict.STRANGERS.read_text("utf-8"))


def test_the_fitted_number_is_where_the_strangers_are():
    """Within 20% of the published rate that was fitted, for all; and no other choice is much nearer."""

    def furthest(overlap: float) -> float:
        return max(
            abs((each["worst"] + overlap * (each["best"] - each["worst"])) * each["peak"] / 1e12
                / each["published"][0]["rate"] - 1)
            for each in STRANGERS if each["published"]
        )  # fmt: skip

    assert len([each for each in STRANGERS if each["published"]]) == 4
    assert furthest(predict_model.OVERLAP) < predict.AGREES
    assert furthest(predict_model.OVERLAP) <= min(furthest(step / 20) for step in range(21)) + 0.005


def test_what_the_page_says_without_a_compiler_is_up_to_date():
    text = predict.PAGE.read_text("utf-8")
    head = predict.HEAD.partition("{")[0]
    for part in (head, "\n".join(predict.calibration(STRANGERS)), "\n".join(predict.rates())):
        assert part.strip() in text, "docs/predictions.md is stale: run `make tables`"
    before = json.loads(predict.BEFORE.read_text("utf-8"))
    assert f"commit {before['commit']}" in text


def test_every_prediction_stands_beside_an_empty_column():
    text = predict.PAGE.read_text("utf-8")
    tables = [part for part in text.split("\n\n") if part.startswith("|") and "| measured |" in part]
    assert len(tables) >= 8
    for lines in (table.splitlines() for table in tables):
        heading = [cell.strip() for cell in lines[0].strip("|").split("|")]
        for row in lines[2:]:
            cells = dict(enumerate(cell.strip() for cell in row[1:-1].split("|")))
            assert len(cells) == len(heading), row
            assert all(cells[place] == "" for place, name in enumerate(heading) if name == "measured"), row


@pytest.mark.deep
@pytest.mark.timeout(1500)
def test_the_page_is_what_the_machine_code_says():
    """Made anew, in a process of its own: in this one Triton's kernels may be interpreted."""
    from disassemble_cuda import Missing, compiler_version

    try:
        compiler = compiler_version()
    except Missing as missing:
        pytest.skip(str(missing))
    text = predict.PAGE.read_text("utf-8")
    import triton

    versions = predict.versions(compiler, triton.__version__)
    if versions not in text:
        pytest.skip(f"docs/predictions.md is of other compilers than {versions}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, ROOT / "bench" / "predict.py", "--print"], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == text, "docs/predictions.md is stale: run `make tables`"
