"""The Hopper forward kernel's own source, run on the CPU emulator against the fp64 definition of attention."""

import math

import pytest
import torch

pytest.importorskip("triton")

from fastattn.kernels.hopper import launch
from fastattn.kernels.hopper.configs import ForwardConfig
from gluon_emulator import EmulationError
from gluon_emulator_language import load_kernels
from hopper_cases import KERNELS, definition, emulated, make_case

SOURCES = ["primitives", "schedule", "band", "forward"]


def run_forward(problem, config, seed=0, programs=2, edits=()):
    """(out, lse) of the emulated kernel, launched as on a device."""
    kernels = load_kernels(KERNELS, SOURCES, edits)
    out = torch.full_like(problem.query, float("nan"))
    lse = torch.full(problem.query.shape[:3], float("nan"))
    with emulated(launch, kernels, ["attention_forward"], seed, programs):
        launch.forward(problem, out, lse, config)
    return out, lse


def check_forward(problem, config, seed=0, programs=2, edits=()):
    out, lse = run_forward(problem, config, seed, programs, edits)
    expected, expected_lse = definition(problem)
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    torch.testing.assert_close(lse.double()[~empty], expected_lse[~empty], rtol=0, atol=1e-4)
    tolerance = 2 * torch.finfo(problem.query.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


SMALL = ForwardConfig(block_n=64)

PROBLEMS = {
    "plain": {"Lq": 256, "Lk": 256},
    "ragged": {"Lq": 131, "Lk": 200},
    "one key": {"Lq": 65, "Lk": 1},
    "one query": {"Lq": 1, "Lk": 257},
    "causal": {"Lq": 320, "Lk": 320, "causal": "upper_left"},
    "causal, more keys": {"Lq": 130, "Lk": 333, "causal": "upper_left"},
    "causal, more queries": {"Lq": 333, "Lk": 130, "causal": "upper_left"},
    "lower right": {"Lq": 130, "Lk": 333, "causal": "lower_right"},
    "lower right, more queries": {"Lq": 333, "Lk": 130, "causal": "lower_right"},
    "window": {"Lq": 390, "Lk": 390, "window": (70, 33)},
    "window, causal": {"Lq": 390, "Lk": 390, "window": (100, None), "causal": "upper_left"},
    "narrow window": {"Lq": 200, "Lk": 450, "window": (0, 0), "causal": "lower_right"},
    "left only": {"Lq": 300, "Lk": 300, "window": (64, None)},
    "key lengths": {"B": 3, "H": 1, "Lq": 140, "Lk": 200, "lengths": (0, 77, 200)},
    "key lengths, lower right": {
        "B": 3,
        "H": 1,
        "Lq": 140,
        "Lk": 200,
        "lengths": (3, 128, 197),
        "causal": "lower_right",
    },
    "right only": {"Lq": 130, "Lk": 300, "window": (None, 5)},
    "window, more keys": {"Lq": 130, "Lk": 333, "window": (70, 33)},
    "lower right, window": {"Lq": 130, "Lk": 333, "window": (70, None), "causal": "lower_right"},
    "key lengths, causal": {"B": 3, "H": 1, "Lq": 70, "Lk": 200, "lengths": (0, 40, 200), "causal": "upper_left"},
    "key lengths, window": {"B": 2, "H": 1, "Lq": 140, "Lk": 300, "lengths": (100, 300), "window": (20, 9)},
    "grouped heads": {"B": 2, "H": 6, "group": 3, "Lq": 128, "Lk": 128},
    "fp16": {"Lq": 192, "Lk": 192, "dtype": torch.float16, "causal": "upper_left"},
    "D=128": {"Lq": 128, "Lk": 192, "D": 128},
    "D=128, window": {"Lq": 70, "Lk": 333, "D": 128, "window": (40, None), "causal": "lower_right"},
    "D=256": {"Lq": 70, "Lk": 130, "D": 256},
    "D=256, more keys": {"Lq": 70, "Lk": 130, "D": 256, "causal": "upper_left"},
    "D=40": {"Lq": 128, "Lk": 192, "D": 40, "causal": "upper_left"},
    "D=96": {"Lq": 131, "Lk": 192, "D": 96},
    "D=192": {"Lq": 70, "Lk": 130, "D": 192, "causal": "lower_right"},
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("seed", range(2))
def test_every_problem(name, seed):
    check_forward(make_case(**PROBLEMS[name]), SMALL, seed)


@pytest.mark.parametrize(
    "config",
    [
        ForwardConfig(consumers=3, block_n=64, stages=3),
        ForwardConfig(block_n=128),
        ForwardConfig(block_n=64, stages=4),
        ForwardConfig(block_n=64, ping_pong=False),
        ForwardConfig(block_n=64, overlap=False),
        ForwardConfig(block_n=64, persistent=False),
        ForwardConfig(block_n=64, own_out=False),
        ForwardConfig(consumers=3, block_n=64, own_out=False, heads_inner=False),
    ],
    ids=str,
)
def test_every_switch(config):
    for seed, name in enumerate(("causal", "ragged", "window, causal", "key lengths")):
        check_forward(make_case(**PROBLEMS[name]), config, seed)


@pytest.mark.parametrize("seed", range(12))
def test_many_schedules(seed):
    check_forward(
        make_case(H=3, Lq=320, Lk=320, causal="upper_left"),
        ForwardConfig(block_n=64, stages=2 + seed % 2),
        seed,
        programs=3,
    )


def test_strided_inputs():
    problem = make_case(Lq=100, Lk=150, transposed=True)
    assert problem.query.stride(2) != problem.query.shape[-1]
    check_forward(problem, SMALL)


@pytest.mark.parametrize("shape", [{}, {"causal": "upper_left"}], ids=str)
def test_a_nan_that_is_seen_shows(shape):
    """In the lse and the output of every query that sees its key; tiles that no query sees it from stay clean."""
    problem = make_case(Lq=300, Lk=300, **shape)
    problem.key[0, 0, 130, 5] = math.nan
    problem.value[0, 1, 200, 7] = math.nan
    out, lse = run_forward(problem, SMALL)
    expected, expected_lse = definition(problem)
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    assert (lse > -math.inf)[~lse.isnan()].all()
    assert out[0, 0][lse[0, 0].isnan()].isnan().all()
    first = 200 if shape else 0
    assert out[0, 1, first:, 7].isnan().all() and not out[0, 1, : first // 128 * 128].isnan().any()


FAULTS = {
    "the producer does not wait for a free K": ("            mbarrier.wait(k_empty.index(stage), free)\n", ""),
    "the producer does not wait for a free V": ("            mbarrier.wait(v_empty.index(stage), free)\n", ""),
    "the producer waits with the wrong parity": (
        "free = ((loads // OPTIONS.stages) & 1) ^ 1",
        "free = (loads // OPTIONS.stages) & 1",
    ),
    "the producer does not wait for a free Q": ("            mbarrier.wait(q_empty.index(i), (round_ & 1) ^ 1)\n", ""),
    "half of the bytes expected": ("k_desc.block_type.nbytes)", "k_desc.block_type.nbytes // 2)"),
    "V used before it is there": ("    mbarrier.wait(v_full.index(before), v_parity)\n", ""),
    "K used before it is there": (
        "    mbarrier.wait(k_full.index(stage), (load // STAGES) & 1)\n",
        "",
    ),
    "V of the wrong stage": ("v_tiles.index(before)", "v_tiles.index(stage)"),
    "V released before its product is done": (
        "        hold_order(v_full.index(before), v_parity)\n",
        "        hold_order(v_full.index(before), v_parity)\n        mbarrier.arrive(v_empty.index(before), count=1)\n",
    ),
    "V released twice": (
        "mbarrier.arrive(v_empty.index(before), count=1)",
        "mbarrier.arrive(v_empty.index(before), count=2)",
    ),
    "scores used before their wait": (
        "s = warpgroup_mma_wait(1, deps=[s_token])",
        "s = warpgroup_mma_wait(2, deps=[s_token])",
    ),
    "output not rescaled": (
        "    output = output * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]\n",
        "",
    ),
    "no fence before the TMA store": ("        fence_async_shared()\n        tma_store(", "        tma_store("),
    "output staged over a store in flight": (
        "        tma.store_wait(0)\n        o_tile = o_tiles.index(CONSUMER)\n",
        "        o_tile = o_tiles.index(CONSUMER)\n",
    ),
    "one thread's sum taken for its row's": ("gl.sum(quad_sums, 1)", "gl.max(quad_sums, 1)"),
    "a turn left over": (
        "    if OPTIONS.ping_pong and CONSUMER == 0:\n        take_turn(CONSUMER)  # the turn that nobody took\n",
        "",
    ),
    "nobody starts": (
        "        pass_turn(CONSUMER, OPTIONS.consumers)  # consumer 0 goes first\n",
        "        pass\n",
    ),
    "one arrival frees K": (
        "k_empty = new_barriers(STAGES, CONSUMERS)",
        "k_empty = new_barriers(STAGES, 1)",
    ),
    "border tiles not masked": ("i <= edge + low_edge,", "False,"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault):
    old, new = FAULTS[fault]
    problem = make_case(H=3, Lq=333, Lk=333, causal="upper_left")
    with pytest.raises((EmulationError, AssertionError)):
        for seed in range(20):
            check_forward(problem, SMALL, seed, edits=[("forward", old, new)])


@pytest.mark.parametrize(
    "old, new",
    [
        (
            "end_any = gl.minimum(length, last + offset + right + 1)",
            "end_any = gl.minimum(length, last + offset + right)",
        ),
        ("full_high = gl.maximum(end_all, 0) // BLOCK_N", "full_high = gl.cdiv(gl.maximum(end_all, 0), BLOCK_N)"),
        ("full_low = gl.cdiv(", "full_low = 0 * gl.cdiv("),
        ("    if round_ % 2 == 1:\n        place = programs - 1 - program\n    return", "    return"),
    ],
    ids=["range one short", "right edge taken for full", "left edge taken for full", "one deals otherwise"],
)
def test_schedule_faults_are_caught(old, new):
    problem = make_case(H=3, Lq=390, Lk=391, causal="lower_right", window=(200, None))
    with pytest.raises((EmulationError, AssertionError, ZeroDivisionError)):
        check_forward(problem, SMALL, programs=7, edits=[("schedule", old, new)])
