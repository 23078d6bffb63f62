"""Every shipped Hopper configuration, compiled for sm_90 without a GPU and judged by its machine code."""

import dataclasses

import pytest

triton = pytest.importorskip("triton")

from fastattn.kernels.hopper import machine_code, report  # noqa: E402


@pytest.mark.parametrize("case", report.shipped(), ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_compiled_configuration(case):
    rows = report.compile_rows(*case)
    direction, config = case[0], case[4]
    assert len(rows) == (1 if direction == "forward" or config.fused else 2)
    for row in rows:
        assert report.broken_rules(row) == [], row


def test_two_sweeps_where_one_is_chosen():
    """What runs instead of the fused backward where a gradient is not asked for."""
    config = report.configs.BACKWARD_CANDIDATES[128]["64, 128"]
    assert not config.fused
    rows = report.compile_rows("backward", 128, "causal", "64, 128", config)
    assert len(rows) == 2
    for row in rows:
        assert report.broken_rules(row) == [], row


def test_another_order_of_dq_with_two_writers():
    name = "fused, last keys first, two writers"
    (row,) = report.compile_rows("backward", 128, "causal", name, report.configs.BACKWARD_CANDIDATES[128][name])
    assert report.broken_rules(row) == [], row


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_window_and_key_lengths_in_tiles_filled_with_zeros(direction):
    config = getattr(report.configs, f"{direction}_config")(96, True)
    for row in report.compile_rows(direction, 96, "window, lengths", "chosen", config):
        assert report.broken_rules(row) == [], row
        assert row.loop_instructions["HGMMA"] == (16 if direction == "forward" else 32)


def test_candidates_are_found_by_a_part_of_their_name():
    fused = report.candidates("fused, two writers")
    assert {name for _, _, _, name, _ in fused} == {
        "fused, two writers",
        "fused, two writers, 4 of a head",
        "fused, two writers, 4 of a head, 4 stages",
    }
    assert all(case in report.candidates() for case in fused)


def test_rules_can_be_broken():
    """A row that breaks every rule: none of them is empty."""
    (row,) = report.compile_rows("forward", 64, "none", "chosen", report.configs.forward_config(64, False))
    broken = dataclasses.replace(
        row,
        warnings=("C7512",),
        overwritten=1,
        loop_spills=1,
        shared_bytes=2**20,
        loop_registers=168,
        exponentials_in_flight=0,
    )
    assert len(report.broken_rules(broken)) == 6


LOOP = [
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT",
    "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0",
    "MUFU.EX2 R1, R1",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "MUFU.EX2 R2, R2",
    "MUFU.EX2 R3, R3",
]


def test_exponentials_are_counted_under_a_product_only():
    assert machine_code.exponentials_in_flight(LOOP) == (1, 3)


def test_a_product_in_flight_over_the_back_edge_counts():
    rotated = [*LOOP[3:5], *LOOP[:3], "MUFU.EX2 R3, R3"]
    assert machine_code.exponentials_in_flight(rotated) == (2, 3)


@pytest.mark.parametrize(
    "text",
    [
        "FFMA R88, R24, UR8, -R20.reuse",  # the left operand's first register
        "F2FP.BF16.F32.PACK_AB R91, R2, R3",  # and its last
        "FMUL R87, R87, R4",  # the accumulator's last
        "LDS.64 R22, [R2]",  # not the accumulator: R22 and R23
        "LDS.128 R22, [R2]",
        "SHFL.BFLY PT, R90, R1, 0x1, 0x1f",
        "STS [R88], R89",  # reads only
        "ISETP.GT.AND P0, PT, R88, R24, PT",
    ],
)
def test_writes_to_a_product_in_flight_are_found(text):
    harmless = text.startswith(("LDS.64", "STS", "ISETP"))
    expected = [] if harmless else [text]
    assert machine_code.overwritten_in_flight([*LOOP[:2], text, *LOOP[2:]]) == expected
    assert machine_code.overwritten_in_flight([*LOOP, text]) == []  # after the wait
    rotated = [text, LOOP[3], *LOOP[:2]]
    assert machine_code.overwritten_in_flight(rotated) == expected  # over the back edge


def test_only_innermost_loops_are_main():
    code = """
        .L_x_1:
        /*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT, gsb0 ;
        .L_x_2:
        /*0010*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0020*/ @!P0 BRA `(.L_x_2) ;
        /*0030*/ MUFU.EX2 R1, R1 ;
        /*0040*/ @P1 BRA `(.L_x_1) ;
        .L_x_3:
        /*0050*/ MUFU.EX2 R1, R1 ;
        /*0060*/ @P1 BRA `(.L_x_1) ;
    """
    (loop,) = machine_code.main_loops(code)
    assert [text.split()[0] for text in loop] == [
        "HGMMA.64x128x16.F32.BF16",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT",
        "BRA",
        "MUFU.EX2",
        "BRA",
    ]


def test_a_waits_retry_is_no_loop():
    """It stands behind the kernel, and from where it leads back it is less than the loop, and holds an epilogue."""
    code = """
        .L_x_1:
        /*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT, gsb0 ;
        /*0010*/ FFMA R1, R1, R1, R1 ;
        /*0020*/ FFMA R1, R1, R1, R1 ;
        /*0030*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0040*/ @!P0 BRA `(.L_x_3) ;
        .L_x_2:
        /*0050*/ MUFU.EX2 R1, R1 ;
        /*0060*/ BRA.U UP0, `(.L_x_1) ;
        /*0070*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT, gsb0 ;
        .L_x_3:
        /*0080*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0090*/ @!P0 BRA `(.L_x_3) ;
        /*00a0*/ BRA `(.L_x_2) ;
    """
    (loop,) = machine_code.main_loops(code)
    assert len(loop) == 7


def test_advisories_are_recognised():
    message = "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert report.SERIALIZED.findall(message) == ["C7514"]
