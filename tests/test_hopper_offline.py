"""Every shipped Hopper configuration, compiled for sm_90 without a GPU and judged by its machine code."""

import pytest

triton = pytest.importorskip("triton")

from fastattn.kernels.hopper import report  # noqa: E402
from fastattn.kernels.hopper.configs import BackwardConfig  # noqa: E402
from fastattn.kernels.offline import SHARED_MEMORY  # noqa: E402

#: Exponentials that issue under a wgmma, of all, in the forward's main loop.
OVERLAP = 0.95


@pytest.mark.parametrize(
    "case", report.shipped(), ids=lambda case: f"{case[0]}-{case[1]}-{'causal' if case[2] else 'full'}"
)
def test_compiled_configuration(case):
    rows = report.compile_rows(*case)
    assert len(rows) == (1 if case[0] == "forward" else 2)
    for row in rows:
        assert row.loop_instructions["HGMMA"] > 0, row
        assert row.warnings == (), row
        assert row.loop_spills == 0, row
        assert row.shared_bytes <= SHARED_MEMORY[90], row
        assert row.loop_registers < (240 if getattr(row.config, "consumers", 2) == 2 else 160), row
        if case[0] == "forward":
            assert row.exponentials_in_flight >= OVERLAP * row.exponentials, row


LOOP = [
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
    "MUFU.EX2 R1, R1",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "MUFU.EX2 R2, R2",
    "MUFU.EX2 R3, R3",
]


def test_exponentials_are_counted_under_a_product_only():
    assert report.exponentials_in_flight(LOOP) == (1, 3)


def test_a_product_in_flight_over_the_back_edge_counts():
    rotated = [*LOOP[3:5], *LOOP[:3], "MUFU.EX2 R3, R3"]
    assert report.exponentials_in_flight(rotated) == (2, 3)


def test_advisories_are_recognised():
    message = "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert report.SERIALIZED.findall(message) == ["C7514"]


def test_fused_backward():
    """Not a default: its products must not be serialised, and it must fit."""
    (row,) = report.compile_rows("backward", 128, False, BackwardConfig(fused=True))
    assert row.loop_instructions["HGMMA"] > 0, row
    assert row.warnings == (), row
    assert row.shared_bytes <= SHARED_MEMORY[90], row
