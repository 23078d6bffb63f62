"""The cycle model of Hopper's main loops against times that can be worked out by hand."""

import pytest

pytest.importorskip("triton")

from fastattn.kernels.hopper import cycle_model
from fastattn.kernels.hopper.cycle_model import BARRIER, CONTENTION, PRODUCT_DRAIN, decode, tile_cycles
from fastattn.kernels.hopper.machine_code import Disassembly

PRODUCTS = ["HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24"] * 7 + [
    "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"
]
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXPONENTIALS = [f"MUFU.EX2 R{i}, R{i}" for i in range(100, 132)]


def turn_of(*loops):
    return tile_cycles([([], loop, []) for loop in loops])


@pytest.mark.parametrize(
    ("text", "cycles"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT", 64),  # 6 KiB of shared memory in 64 cycles
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT", 32),  # 4 KiB: at the limit
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT", 24),  # 3 KiB: over what 16 cycles can bring
        ("HGMMA.64x32x16.F32.BF16 R24, R88, gdesc[UR4], R24", 16),
    ],
)
def test_products_run_at_the_tensor_cores_rate_or_shared_memorys(text, cycles):
    assert cycle_model.product_cycles(text) == cycles


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("FFMA R1, R2, UR8, -R12.reuse", {"R2", "UR8", "R12"}, {"R1"}),
        ("LDS.64 R20, [R226+UR8+0x38000]", {"R226", "UR8"}, {"R20", "R21"}),
        ("STS.64 [R3+UR8+0x4000], R152", {"R3", "UR8", "R152"}, set()),
        ("SHFL.BFLY PT, R90, R1, 0x1, 0x1f", {"R1"}, {"R90"}),
        ("ISETP.GT.AND P0, PT, R88, R24, PT", {"R24"}, {"P0", "R88"}),
        ("UIADD3 UR26, UP0, UR18, 0x80, URZ", {"UP0", "UR18"}, {"UR26"}),
    ],
)
def test_operands(text, reads, writes):
    found = decode(text)
    assert set(found.reads) >= reads and set(found.writes) >= writes


def test_a_lone_warpgroup_waits_for_its_products():
    found = turn_of([*PRODUCTS, WAIT])
    assert found.products == 8 * 64
    assert found.products + PRODUCT_DRAIN <= found.turn <= found.products + PRODUCT_DRAIN + 12


def test_two_warpgroups_keep_the_tensor_cores_busy():
    found = turn_of([*PRODUCTS, WAIT], [*PRODUCTS, WAIT])
    assert found.products == found.turn == 2 * 8 * 64


def test_exponentials_bound_three_warpgroups():
    found = turn_of(*[[*PRODUCTS[:1], PRODUCTS[-1], WAIT, *EXPONENTIALS]] * 3)
    assert found.turn == pytest.approx(3 * 32 * 8 * CONTENTION, rel=0.02)


def test_a_result_is_waited_for():
    chain = ["MUFU.EX2 R1, R1"] * 10
    assert turn_of(chain).turn == pytest.approx(10 * 20, rel=0.05)


def test_turns_are_taken():
    """One exponential at a time under a barrier each hands to the other: nothing of the two overlaps."""
    first = ["BAR.SYNC 0x8, 0x100", *EXPONENTIALS, "BAR.ARV 0x9, 0x100"]
    second = ["BAR.SYNC 0x9, 0x100", *EXPONENTIALS, "BAR.ARV 0x8, 0x100"]
    alone = 31 * 8 * CONTENTION + BARRIER
    assert turn_of(first, second).turn == pytest.approx(2 * alone, rel=0.02)


def test_consumers_that_wait_for_each_other_are_an_error():
    with pytest.raises(ValueError, match="wait for each other"):
        cycle_model.Part([[decode("BAR.SYNC 0x8, 0x100")], [decode("FADD R1, R1, R1")]]).run([[1], [1]])


def test_what_comes_before_and_after_a_loop_is_paid_once():
    alone = turn_of(EXPONENTIALS)
    found = tile_cycles([(EXPONENTIALS, EXPONENTIALS, EXPONENTIALS)])
    assert found.turn == pytest.approx(alone.turn, rel=0.01)
    assert found.fixed == pytest.approx(2 * alone.turn, rel=0.02)


def test_a_tile_without_a_mask_skips_the_mask():
    code = """
        .L_x_1:
        /*0000*/ FADD R1, R1, R1 ;
        .L_x_2:
        /*0010*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT, gsb0 ;
        /*0020*/ @P0 BRA `(.L_x_3) ;
        /*0030*/ FSEL R1, R1, R1, P0 ;
        .L_x_3:
        /*0040*/ MUFU.EX2 R1, R1 ;
        /*0050*/ @P1 BRA `(.L_x_2) ;
        /*0060*/ FMUL R1, R1, R1 ;
        /*0070*/ BRA `(.L_x_1) ;
    """
    ((before, turn, after),) = Disassembly.read(code).work_loops()
    assert [text.split()[0] for text in before] == ["FADD"]
    assert [text.split()[0] for text in turn] == ["HGMMA.64x128x16.F32.BF16", "BRA", "MUFU.EX2", "BRA"]
    assert [text.split()[0] for text in after] == ["FMUL", "BRA"]


def test_taller_tiles_ask_less_of_l2():
    """A tile of 128 x 128 at D = 128: 4 * 128^3 FLOP for keys and values of 2 * 128 * 128 * 2 bytes."""
    flop, read = 4 * 128**3, 2 * 128 * 128 * 2
    assert cycle_model.l2_bound(128) == pytest.approx(cycle_model.L2_BANDWIDTH * flop / read)
    assert cycle_model.l2_bound(192) == pytest.approx(1.5 * cycle_model.l2_bound(128))
