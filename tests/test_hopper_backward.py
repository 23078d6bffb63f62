"""The Hopper backward kernels' own source, run on the CPU emulator against fp64 autograd."""

import dataclasses
import math
import types
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fastattn.kernels.hopper import launch_backward, plan
from fastattn.kernels.hopper.configs import BACKWARD, BackwardConfig
from fastattn.kernels.hopper.plan import LOG2_E, STATISTICS_ROWS, band_of, fused_plan
from gluon_emulator import EmulationError
from gluon_emulator_language import load_kernels
from hopper_cases import KERNELS, definition, emulated, hidden, make_case

INGREDIENTS = ["primitives", "schedule", "band"]
KERNELS_OF_BACKWARD = ["gradients", "gradients_of_keys", "gradients_of_wide_keys", "gradients_of_queries"]


def saved(problem):
    """(gradients in fp64, grad_out, lse_2, delta): the truth, and what the kernels get from the forward."""
    leaves = [t.double().requires_grad_() for t in (problem.query, problem.key, problem.value)]
    out, lse = definition(problem, *leaves)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(problem.query.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator) / 4
    sees = lse > -math.inf
    ((out * grad_out.double()).sum() + (torch.where(sees, lse, 0.0) * grad_lse.double()).sum()).backward()
    rows = lse.shape[0] * lse.shape[1]
    padding = -lse.shape[2] % STATISTICS_ROWS
    delta = torch.where(sees, (out * grad_out.double()).sum(-1) - grad_lse, 0.0).detach().float()
    lse_2 = torch.where(sees, lse * LOG2_E, math.inf).detach().float()
    lse_2 = torch.nn.functional.pad(lse_2, (0, padding), value=math.inf).reshape(rows, -1)
    delta = torch.nn.functional.pad(delta, (0, padding)).reshape(rows, -1)
    return [leaf.grad for leaf in leaves], grad_out, lse_2.contiguous(), delta.contiguous()


def run_backward(problem, config, seed, programs, wanted, edits=(), together=False):
    """The wanted gradients ("query", "key", "value") of the emulated kernels, launched as on a device; the truth."""
    sources = ["backward_keys", "backward_keys_wide", "backward_queries", "backward_fused"]
    kernels = load_kernels(KERNELS, [*INGREDIENTS, *sources], edits)
    expected, grad_out, lse_2, delta = saved(problem)
    dtype = torch.float32 if config.fused else problem.query.dtype
    grads = {
        "query": torch.full_like(problem.query, math.nan, dtype=dtype),
        "key": torch.full_like(problem.key, math.nan),
        "value": torch.full_like(problem.value, math.nan),
    }
    given = [grad if name in wanted else None for name, grad in grads.items()]
    statistics = mock.patch.object(launch_backward, "row_statistics", lambda *_: (lse_2, delta))
    with emulated(launch_backward, kernels, KERNELS_OF_BACKWARD, seed, programs, together), statistics:
        launch_backward.backward(problem, None, torch.empty(0), grad_out, None, *given, config)
    for name in set(wanted) - {"query"}:
        assert not grads[name].masked_fill(~hidden(problem), 0.0).any(), name
    truths = dict(zip(grads, expected, strict=True))
    return [grads[name] for name in wanted], [truths[name] for name in wanted]


def run_keys(problem, config, seed, programs, edits=()):
    """(grad_key, grad_value) of the emulated kernel for the head dimension, and the truth."""
    return run_backward(problem, config, seed, programs, ("key", "value"), edits)


def run_queries(problem, config, seed, programs, edits=()):
    """[grad_query] of the emulated kernel, and the truth."""
    return run_backward(problem, config, seed, programs, ("query",), edits)


def run_fused(problem, config, seed, programs, edits=(), together=False):
    """All gradients of the emulated kernel that adds dQ (here fp32) across programs, and the truth."""
    fused = dataclasses.replace(config, fused=True)
    return run_backward(problem, fused, seed, programs, ("query", "key", "value"), edits, together)


#: The ways to add dQ across programs; what each adds to the kernel's code, apart and together.
WAYS = {
    "last keys first": {"walk": "last keys first"},
    "two writers": {"writers": 2},
    "last keys first, two writers": {"walk": "last keys first", "writers": 2, "dq_stages": 3},
    "shifted": {"walk": "shifted", "ordered": False},
    "shifted, two writers": {"walk": "shifted", "ordered": False, "writers": 2},
    "two of a head": {"programs_of_head": 2},
}


RUNS = {"keys": run_keys, "queries": run_queries, "fused": run_fused}


def check_backward(run, problem, config, seed=0, programs=2, edits=()):
    grads, expected = RUNS[run](problem, config, seed, programs, edits)
    half_unit = torch.finfo(problem.query.dtype).eps / 2
    for grad, truth in zip(grads, expected, strict=True):
        largest = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(grad.double(), truth, rtol=half_unit, atol=half_unit * largest)


SMALL = BackwardConfig()

PROBLEMS = {
    "plain": {"Lq": 256, "Lk": 256},
    "ragged": {"Lq": 131, "Lk": 200},
    "one key": {"Lq": 65, "Lk": 1},
    "one query": {"Lq": 1, "Lk": 257},
    "causal": {"Lq": 320, "Lk": 320, "causal": "upper_left"},
    "causal, more keys": {"Lq": 130, "Lk": 333, "causal": "upper_left"},
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
    "grouped heads, causal": {"H": 4, "group": 2, "Lq": 200, "Lk": 300, "causal": "upper_left"},
    "fp16": {"Lq": 192, "Lk": 192, "dtype": torch.float16, "causal": "upper_left"},
    "D=128": {"Lq": 128, "Lk": 192, "D": 128},
    "D=128, window": {"Lq": 70, "Lk": 333, "D": 128, "window": (40, None), "causal": "lower_right"},
    "D=72": {"Lq": 131, "Lk": 192, "D": 72, "causal": "upper_left"},
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("run", RUNS)
def test_every_problem(run, name):
    check_backward(run, make_case(**PROBLEMS[name]), SMALL, seed=len(name))


@pytest.mark.parametrize(
    "config",
    [
        BackwardConfig(block_m=128, block_n=128),
        BackwardConfig(keys_stages=3, queries_stages=3),
        BackwardConfig(persistent=False, ordered=False),
        BackwardConfig(keys_own_out=False, queries_own_out=False, heads_inner=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("run", RUNS)
def test_every_switch(run, config):
    for seed, name in enumerate(("causal", "ragged", "window, causal", "key lengths")):
        check_backward(run, make_case(**PROBLEMS[name]), config, seed)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_with_the_last_keys_first(name):
    config = BackwardConfig(walk="last keys first", writers=2)
    check_backward("fused", make_case(**PROBLEMS[name]), config, seed=len(name))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_add_dq(way):
    for seed, name in enumerate(("causal", "window", "key lengths, lower right", "grouped heads, causal")):
        check_backward("fused", make_case(**PROBLEMS[name]), BackwardConfig(**WAYS[way]), seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("run", RUNS)
def test_many_schedules(run, seed):
    config = BackwardConfig(keys_stages=2 + seed % 2, queries_stages=2 + seed % 2)
    check_backward(run, make_case(H=3, Lq=260, Lk=260, causal="upper_left"), config, seed, programs=3)


def bits_of_dq(problem, config, edits=()) -> set[bytes]:
    """What dQ (fp32) comes to under several schedules of programs that run at a time."""
    found = set()
    for seed in range(6):
        grads, expected = run_fused(problem, config, seed, programs=2, edits=edits, together=True)
        torch.testing.assert_close(grads[0].double(), expected[0], rtol=1e-2, atol=2e-2)
        found.add(grads[0].numpy().tobytes())
    return found


@pytest.mark.parametrize(
    "shape", [{}, {"causal": "upper_left"}, {"window": (150, 100)}, {"B": 2, "lengths": (400, 70)}], ids=str
)
@pytest.mark.parametrize("way", [{}, WAYS["last keys first, two writers"]], ids=str)
def test_the_bits_of_an_ordered_dq_do_not_depend_on_the_schedule(way, shape):
    problem = make_case(H=1, Lq=190, Lk=400, dtype=torch.float16, **shape)
    assert len(bits_of_dq(problem, BackwardConfig(**way))) == 1


@pytest.mark.parametrize("way", ["last keys first", "two writers", "two of a head"])
def test_nor_do_those_of_another_way(way):
    problem = make_case(H=1, Lq=130, Lk=300, dtype=torch.float16, causal="lower_right")
    assert len(bits_of_dq(problem, BackwardConfig(**WAYS[way]))) == 1


@pytest.mark.parametrize("right", [0, 5, -70])
@pytest.mark.parametrize("left", [0, 100])
@pytest.mark.parametrize("last_keys_first", [False, True])
def test_turns_at_a_tile_count_the_blocks_that_add_to_it(last_keys_first, left, right):
    """Against each block's own tiles: the first to come waits for nobody, each other for as many as came before."""
    functions = load_kernels(KERNELS, [*INGREDIENTS, "backward_keys", "backward_fused"]).functions
    for lengths in ((190, 400), (400, 190), (65, 129), (64, 128), (1, 300)):
        for offset in (0, lengths[1] - lengths[0]):
            band = (lengths[0], offset, left, right)
            options = types.SimpleNamespace(
                block_m=64, has_left=left > 0, has_right=True, last_keys_first=last_keys_first
            )
            blocks = range(0, lengths[1], 128)
            adders = {}
            for first in reversed(blocks) if last_keys_first else blocks:
                low, count = functions["queries_of_keys"](first, band, lengths[1], 64, 128, left > 0, True)
                for tile in range(low, low + count):
                    adders.setdefault(tile, []).append(first)
            for tile, expected in adders.items():
                found = [functions["parts_before"](first, 64 * tile, band, lengths[1], options) for first in expected]
                assert found == list(range(len(expected)))


@pytest.mark.parametrize(
    ("config", "edits"),
    [
        (BackwardConfig(ordered=False), []),
        (BackwardConfig(ordered=False, walk="shifted"), []),
        (
            SMALL,
            [
                ("backward_fused", "            publish_stores()\n", ""),
                (
                    "backward_fused",
                    'gl.atomic_add(counter, 1, sem="release")\n',
                    'gl.atomic_add(counter, 1, sem="release")\n            publish_stores()\n',
                ),
            ],
        ),
    ],
    ids=["unordered", "shifted", "a turn passed before its part is added"],
)
def test_the_bits_of_another_dq_do(config, edits):
    assert len(bits_of_dq(make_case(H=1, Lq=190, Lk=400, dtype=torch.float16), config, edits)) > 1


def test_programs_that_would_wait_for_later_ones_are_refused():
    with pytest.raises(ValueError, match="wait for later"):
        BackwardConfig(walk="shifted")
    with pytest.raises(ValueError, match="walk is one of"):
        BackwardConfig(walk="sideways")
    with pytest.raises(ValueError, match="at most dq_stages = 1"):
        BackwardConfig(writers=2, dq_stages=1)
    shifted = BackwardConfig(ordered=False, walk="shifted", writers=2)
    assert shifted.deterministic() == BackwardConfig(writers=2)


@pytest.mark.parametrize(("at_a_time", "section"), [(1, 6), (2, 6), (4, 3), (12, 1), (0, 6)])
def test_programs_of_a_head_at_a_time(at_a_time, section):
    problem = make_case(B=2, H=3, Lq=200, Lk=300)
    config = BackwardConfig(fused=True, programs_of_head=at_a_time)
    assert fused_plan(problem, band_of(problem), config, 12).scalars["section"] == section


@pytest.mark.parametrize("section", [1, 2])
def test_fused_programs_of_few_heads_at_a_time(section, monkeypatch):
    problem = make_case(B=2, H=3, Lq=200, Lk=300, causal="lower_right")
    monkeypatch.setattr(plan, "L2_BYTES", section * 200 * 64 * 8)
    assert fused_plan(problem, band_of(problem), SMALL, 132).scalars["section"] == section
    check_backward("fused", problem, SMALL, section)


WIDE = {
    "plain": {"Lq": 130, "Lk": 130, "D": 256},
    "D=136": {"Lq": 70, "Lk": 65, "D": 136},
    "D=192, causal": {"Lq": 190, "Lk": 130, "D": 192, "causal": "upper_left"},
    "lower right": {"B": 3, "H": 1, "Lq": 70, "Lk": 140, "D": 256, "lengths": (0, 66, 140), "causal": "lower_right"},
    "window, groups": {"H": 4, "group": 2, "Lq": 200, "Lk": 200, "D": 256, "window": (40, 20)},
    "left only": {"Lq": 200, "Lk": 200, "D": 256, "window": (40, None)},
    "causal, more keys": {"Lq": 70, "Lk": 130, "D": 256, "causal": "upper_left"},
    "lower right, window": {"Lq": 70, "Lk": 200, "D": 256, "window": (9, None), "causal": "lower_right"},
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("run", ["keys", "queries"])
def test_wide_heads(run, name):
    for seed in range(2):
        check_backward(run, make_case(**WIDE[name]), BACKWARD[256, False], seed)


KEYS_FAULTS = {
    "the producer does not wait for a free stage": (
        "mbarrier.wait(empty.index(stage), ((loads // OPTIONS.stages) & 1) ^ 1)",
        "pass",
    ),
    "the producer does not wait for free keys": (
        "            mbarrier.wait(kv_empty.index(c), (round_ & 1) ^ 1)\n",
        "",
    ),
    "lse is not expected": (" + lse_desc.block_type.nbytes", ""),
    "stage released before dK is done": ("dk, dv = warpgroup_mma_wait(0,", "dk, dv = warpgroup_mma_wait(1,"),
    "dO used before it is there": ("            mbarrier.wait(do_full.index(stage), parity)\n", ""),
    "one arrival frees a stage": ("empty = new_barriers(STAGES, 2)", "empty = new_barriers(STAGES, 1)"),
    "no fence before the TMA stores": ("        fence_async_shared()\n        tma_store", "        tma_store"),
    "gradients staged over a store in flight": ("        tma.store_wait(0)\n        dk_tile =", "        dk_tile ="),
    "a group's second head skipped": ("for i in range(0, count * group)", "for i in range(0, count)"),
    "padded keys get gradients": (
        "real = gl.convert_layout(key, gl.SliceLayout(1, d_layout)) < length",
        "real = gl.convert_layout(key, gl.SliceLayout(1, d_layout)) < Lk",
    ),
}

WIDE_FAULTS = {
    "the producer does not wait for free keys": ("        mbarrier.wait(kv_empty, (round_ & 1) ^ 1)\n", ""),
    "one warpgroup frees the keys": ("kv_empty = new_barriers(1, 2)", "kv_empty = new_barriers(1, 1)"),
    "V overwritten by dK before it is stored": (
        "            tma.store_wait(0)\n            mbarrier.arrive(kv_empty, count=1)\n",
        "            mbarrier.arrive(kv_empty, count=1)\n",
    ),
    "dV staged over a store in flight": ("            tma.store_wait(0)\n            dv_tiles", "            dv_tiles"),
    "dK staged over K, which the other reads": ("v_tile.store(", "k_tile.store("),
    "dO used before it is there": ("            mbarrier.wait(do_full.index(stage), parity)\n", ""),
    "stage released before the gradient is done": (
        "gradient = warpgroup_mma_wait(0, deps=[token])",
        "gradient = warpgroup_mma_wait(1, deps=[token])",
    ),
    "dK not scaled": ("gradient * scale", "gradient"),
    "no fence before dK's store": (
        "            fence_async_shared()\n            tma_store(dk_desc",
        "            tma_store(dk_desc",
    ),
}

BAND_FAULTS = {
    "tiles on the diagonal not masked": (
        "cut = start + offset + right < first + KEYS - 1",
        "cut = start + offset + right < first - KEYS + 1",
    ),
    "the band one query late": ("from_query = key - (offset + right)", "from_query = key - (offset + right) + 1"),
}

QUERIES_FAULTS = {
    "the producer does not wait for a free stage": (
        "mbarrier.wait(empty.index(stage), ((loads // OPTIONS.stages) & 1) ^ 1)",
        "pass",
    ),
    "the producer does not wait for free queries": (
        "            mbarrier.wait(q_empty.index(c), (round_ & 1) ^ 1)\n",
        "",
    ),
    "stage released before dQ is done": (
        "dq = warpgroup_mma_wait(0, deps=[dq_token])",
        "dq = warpgroup_mma_wait(1, deps=[dq_token])",
    ),
    "delta dropped": ("(dp - delta[:, None])", "dp"),
    "no fence before the TMA store": ("        fence_async_shared()\n        tma_store", "        tma_store"),
    "padded keys reach dQ": ("zero_tail(k_tile, length - start, CONSUMER, 2)", "pass"),
    "padded values reach dQ": ("ds = gl.where(p == 0.0, 0.0, ds)", "pass"),
    "border tiles not masked": ("cut = i <= edge + low_edge", "cut = False"),
}

FUSED_FAULTS = {
    "dQ reads dS before the other half is there": (
        '        named_barrier("sync", "8", "256")  # both halves',
        "        # both halves",
    ),
    "one buffer for dS": ("ds_tiles.index(i % 2)", "ds_tiles.index(0)"),
    "no fence after dS": ("        fence_async_shared()\n        dk_token", "        dk_token"),
    "dQ staged over a part being added": (
        "        mbarrier.wait(dq_empty.index(dq_stage), ((i // DQ_STAGES) & 1) ^ 1)\n",
        "",
    ),
    "the writer does not wait for both halves": (
        "dq_full = new_barriers(DQ_STAGES, 2)",
        "dq_full = new_barriers(DQ_STAGES, 1)",
    ),
    "the writer frees a part before it is added": ("            publish_stores()\n", ""),
    "programs take turns in the wrong order": ("before = first // 128 - low", "before = high - 1 - first // 128"),
    "the writer adds from the first tile on": (
        "m = low + tile_of_turn(part % count, count, shift, OPTIONS.from_last_query)",
        "m = low + part % count",
    ),
    "a turn is never passed": ('gl.atomic_add(counter, 1, sem="release")', "pass"),
    "K overwritten while the other's dQ reads it": (
        '    named_barrier("sync", "8", "256")  # the other',
        "    # the other",
    ),
    "padded keys reach dQ": ("            zero_tail(k_all, length - first, CONSUMER, 2)\n", ""),
    "padded values reach dQ": ("            zero_tail(v_all, length - first, CONSUMER, 2)\n", ""),
}

#: (emulated run, faulty module): what is injected.
ALL_FAULTS = {
    ("keys", "backward_keys"): KEYS_FAULTS,
    ("keys", "band"): BAND_FAULTS,
    ("wide keys", "backward_keys_wide"): WIDE_FAULTS,
    ("queries", "backward_queries"): QUERIES_FAULTS,
    ("fused", "backward_fused"): FUSED_FAULTS,
}
FAULTS = [(*key, name) for key, faults in ALL_FAULTS.items() for name in faults]


@pytest.mark.parametrize("run, module, fault", FAULTS)
def test_faults_are_caught(run, module, fault):
    old, new = ALL_FAULTS[run, module][fault]
    wide = run == "wide keys"
    length, padded = (150, 30) if wide else (300, 170)
    problem = make_case(
        B=2, H=4, group=2, Lq=length, Lk=length, D=256 if wide else 64, lengths=(padded, length), causal="upper_left"
    )
    with pytest.raises((EmulationError, AssertionError)):
        for seed in range(12):
            check_backward(run.removeprefix("wide "), problem, SMALL, seed, edits=[(module, old, new)])
