"""The model of the fused backward's waits against times that can be worked out by hand."""

import dataclasses

import pytest

pytest.importorskip("triton")

from fastattn.kernels.hopper.wait_model import ADD, BESIDE, POLL, Launch, cycles

TURN = 3049


def test_unordered_programs_wait_for_nobody():
    launch = Launch(heads=1, blocks=4, causal=False, section=1, ordered=False)
    assert cycles(launch, TURN, multiprocessors=4) == pytest.approx(BESIDE + 8 * TURN + 500)
    assert cycles(launch, TURN, multiprocessors=1) == pytest.approx(4 * (BESIDE + 8 * TURN + 500))


@pytest.mark.parametrize("walk", ["first keys first", "last keys first"])
def test_each_block_follows_the_one_before_by_a_poll_and_an_addition(walk):
    launch = Launch(heads=1, blocks=4, causal=False, section=1, walk=walk)
    assert cycles(launch, TURN, multiprocessors=4) == pytest.approx(BESIDE + 8 * TURN + 4 * (POLL + ADD))


def test_the_last_keys_first_do_not_wait_under_a_causal_band():
    launch = Launch(heads=1, blocks=4, causal=True, section=1, walk="last keys first")
    assert cycles(launch, TURN, multiprocessors=4) == pytest.approx(BESIDE + 8 * TURN + POLL + ADD)


def test_a_late_block_waits_for_the_first_at_the_second_head_of_a_group():
    """The block of 2 + 2 tiles ends after the tenth turn of the one of 8 + 8, and only then makes room."""
    launch = Launch(heads=2, blocks=4, causal=True, section=1, group=2)
    second_begins = BESIDE + 10 * TURN + 4 * (POLL + ADD)
    assert cycles(launch, TURN, multiprocessors=4) == pytest.approx(second_begins + BESIDE + 16 * TURN + POLL + ADD)


def test_a_slow_writer_sets_the_pace_and_two_do_not():
    launch = Launch(heads=1, blocks=1, causal=False, section=1)
    long = dataclasses.replace(launch, blocks=32, heads=1)
    one = cycles(long, TURN, 1200, 2400, multiprocessors=1)
    two = cycles(dataclasses.replace(long, writers=2), TURN, 1200, 2400, multiprocessors=1)
    assert one / two == pytest.approx(3600 / TURN, rel=0.02)


def test_no_program_waits_for_a_later_one():
    """What the model refuses is what would hang: a walk whose turns follow no order of ids."""
    for walk in ("first keys first", "last keys first"):
        for causal in (False, True):
            cycles(Launch(heads=3, blocks=5, causal=causal, section=2, walk=walk), TURN, multiprocessors=2)
    backwards = type("Backwards", (Launch,), {"parts_before": lambda self, block, tile: self.blocks - 1 - block})
    with pytest.raises(ValueError, match="waits for a later program"):
        cycles(backwards(heads=1, blocks=2, causal=False, section=1), TURN, multiprocessors=2)
