"""Properties over random shapes, layouts and combinations of masks, on every backend and instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from fastattn import dispatch
from fastattn.problem import make_problem
from fastattn.testing import (
    LAYOUTS,
    MASK_SHAPES,
    Case,
    assert_within_budget,
    run_backend,
    run_reference,
)


def engines():
    """(backend, instruction set) pairs of this machine."""
    pairs = [("reference", None), ("torch", None)]
    cpu = dispatch.load("cpu")
    if not isinstance(cpu, ImportError) and cpu.unavailable() is None:
        pairs += [("cpu", isa) for isa in cpu.available_isas()]
    return pairs


@pytest.fixture(params=engines(), ids=lambda pair: "-".join(filter(None, pair)))
def backend(request):
    name, isa = request.param
    module = dispatch.load(name)
    if isa is None:
        yield module
        return
    before = module.isa()
    module.set_isa(isa)
    yield module
    module.set_isa(before)


lengths = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 200]))
head_dims = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 80, 96, 128]))
spans = st.one_of(st.none(), st.integers(0, 70))
# Results below the smallest normal number count as 0 (docs/reliability.md); no budget, a share of results, knows that.
scales = st.floats(-1, 1).filter(lambda scale: scale == 0.0 or abs(scale) >= 1e-20)


@st.composite
def cases(draw):
    batch, queries, keys = draw(st.integers(0, 3)), draw(lengths), draw(lengths)
    kv_heads = draw(st.integers(1, 2))
    key_lengths = draw(st.none() | st.lists(st.integers(0, keys), min_size=batch, max_size=batch).map(tuple))
    return Case(
        "drawn",
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=draw(head_dims),
        value_dim=draw(head_dims),
        scale=draw(st.none() | scales),
        causal=draw(st.sampled_from([None, "upper_left", "lower_right"])),
        window=draw(st.none() | st.tuples(spans, spans)),
        key_lengths=key_lengths,
        mask=draw(st.none() | st.sampled_from(sorted(MASK_SHAPES))),
        bias=draw(st.none() | st.sampled_from(sorted(MASK_SHAPES))),
        masked_rows=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9])),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
    )


quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def assume_usual_scores(backend, case):
    """The gradients of torch's kernel go by a rounded lse, and its exponentials are some units off.

    Of scores of usual size they are within the budget.
    """
    usual = case.scale is None or abs(case.scale) <= 1.0 / case.head_dim**0.5
    assume(usual or backend is not dispatch.load("torch"))


@given(case=cases(), dtype=dtypes)
@example(case=Case("drawn", batch=0, queries=0, keys=0, head_dim=1), dtype=torch.float32)
@example(case=Case("drawn", queries=200, keys=129, causal="lower_right", window=(3, 0)), dtype=torch.bfloat16)
@example(case=Case("drawn", heads=4, queries=31, keys=1, head_dim=4, value_dim=1, scale=1.0), dtype=torch.float64)
@example(
    case=Case("drawn", heads=6, kv_heads=2, queries=31, keys=1, head_dim=80, value_dim=63, scale=1.0, bias="full"),
    dtype=torch.float64,
)
@quick
def test_results_and_gradients_are_within_the_budget(backend, case, dtype):
    problem = case.make(dtype=dtype)
    assume(not backend.reasons(problem))
    assume_usual_scores(backend, case)
    grad_out, grad_lse = case.make_grad_out(dtype=dtype), case.make_grad_lse(dtype=problem.lse_dtype)
    actual = run_backend(backend, problem, grad_out, grad_lse)
    exact = run_reference(problem, grad_out, grad_lse)
    naive = run_reference(problem, grad_out, grad_lse, dtype=None)
    assert_within_budget(actual, problem, exact, naive, grad_out, grad_lse)


@given(case=cases(), average=st.booleans())
@quick
def test_weights_are_the_references(backend, case, average):
    from fastattn import reference

    problem = case.make(dtype=torch.float64)
    out, lse = reference.attention(problem)
    shape = (*problem.query.shape[:3], problem.key.shape[2])
    weights = out.new_full(shape[:1] + shape[2:] if average else shape, torch.nan)
    backend.weights(problem, lse, weights, average)
    expected = reference.weights(problem, average) if shape[1] else weights
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@given(case=cases(), dtype=dtypes)
@quick
def test_keys_that_nobody_may_see_change_nothing(backend, case, dtype):
    """NaN and inf past the key lengths leave every bit of the results."""
    keys = case.key_count
    case = replace(case, key_lengths=tuple((keys * i) // 3 for i in range(case.batch)), layout="contiguous")
    problem = case.make(dtype=dtype)
    assume(not backend.reasons(problem))
    grad_out = case.make_grad_out(dtype=dtype)
    clean = run_backend(backend, problem, grad_out)
    padding = torch.arange(keys) >= problem.key_lengths[:, None]
    key, value = problem.key.clone(), problem.value.clone()
    key.masked_fill_(padding[:, None, :, None], torch.nan)
    value.masked_fill_(padding[:, None, :, None], torch.inf)
    dirty = run_backend(backend, problem._replace(key=key, value=value), grad_out)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


@given(case=cases())
@example(case=Case("drawn", heads=6, kv_heads=2, queries=200, head_dim=1, causal="upper_left"))
@example(case=Case("drawn", heads=6, kv_heads=2, queries=64, head_dim=1, causal="upper_left"))
@quick
def test_a_sequence_does_not_depend_on_its_batch(backend, case):
    """Each sequence alone gives what it gives in the batch: bit by bit, or the reference's numbers.

    Bits may differ past 64 queries, where a larger batch shares each block of keys among more queries of a head and
    a band cuts the blocks elsewhere, and where torch multiplies.
    """
    assume_usual_scores(backend, case)
    case = replace(case, batch=3, dropout_p=0.0, key_lengths=None, mask=None, bias=None, layout="contiguous")
    problem, grad_out = case.make(), case.make_grad_out()
    together = run_backend(backend, problem, grad_out)
    exact, naive = run_reference(problem, grad_out), run_reference(problem, grad_out, dtype=None)
    for index in range(3):
        one = slice(index, index + 1)
        alone = problem._replace(query=problem.query[one], key=problem.key[one], value=problem.value[one])
        single = run_backend(backend, alone, grad_out[one])
        if backend is dispatch.load("cpu") and case.queries <= 64:
            for name, tensor in single.items():
                assert torch.equal(tensor, together[name][one]), name
        parts = ({name: tensor[one] for name, tensor in results.items()} for results in (exact, naive))
        assert_within_budget(single, alone, *parts, grad_out[one])


@given(
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    queries=st.integers(0, 9),
    keys=st.integers(0, 9),
    data=st.data(),
)
@quick
def test_masks_of_any_broadcastable_shape_mean_their_expansion(leading, queries, keys, data):
    full = (*leading, queries, keys)
    rank = data.draw(st.integers(0, len(full)))
    shape = tuple(data.draw(st.sampled_from([1, size])) for size in full[len(full) - rank :])
    query, key = torch.randn(*leading, queries, 3), torch.randn(*leading, keys, 3)
    mask = torch.rand(shape) < 0.5
    problem = make_problem(query, key, key, mask)
    dense = mask.expand(full)
    dense = dense.unsqueeze(1) if len(leading) == 1 else dense
    assert torch.equal(problem.attn_mask, dense.reshape(problem.attn_mask.shape))
