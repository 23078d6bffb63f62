"""torch.profiler: a row for each pass of an engine, with and without gradients."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

import fastattn


def rows(function, **options):
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        function()
    events = profiler.key_averages(group_by_input_shape=bool(options))
    return {event.key: event for event in events if event.key.startswith("fastattn::")}


def test_a_plain_call_is_a_row():
    query = torch.randn(1, 2, 4, 8)
    found = rows(lambda: fastattn.scaled_dot_product_attention(query, query, query), record_shapes=True)
    assert list(found) == ["fastattn::attention_forward[cpu]"]
    assert found["fastattn::attention_forward[cpu]"].input_shapes == [[1, 2, 4, 8]] * 3
    found = rows(lambda: fastattn.scaled_dot_product_attention(query, query, query, backend="reference"))
    assert list(found) == ["fastattn::attention_forward[reference]"]


def test_a_training_step_has_a_row_for_each_pass():
    module = fastattn.MultiHeadAttention(8, 2, dropout=0.2)
    x = torch.randn(4, 2, 8)

    def step():
        out, _ = module(x, x, x)
        out.sum().backward()

    found = rows(step)
    assert set(found) == {f"fastattn::attention_{name}[cpu]" for name in ("forward", "backward", "weights")}
    assert all(event.count == 1 for event in found.values())


def test_no_profiler_means_no_recording():
    query = torch.randn(1, 2, 4, 8)
    rows(lambda: fastattn.scaled_dot_product_attention(query, query, query))
    from fastattn import dispatch
    from fastattn.backends import cpu

    assert dispatch.select_plain(query, query, query, False) == (cpu, (8, 8))
