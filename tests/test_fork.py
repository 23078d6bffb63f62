"""Attention in processes that were forked from one whose threads are running, as data loaders do."""

from __future__ import annotations

import multiprocessing
import os

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastattn import MultiHeadAttention, scaled_dot_product_attention
from fastattn.additive import additive_attention, additive_weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def attend_with_gradients():
    torch.manual_seed(0)
    query = torch.randn(2, 4, 128, 32, requires_grad=True)
    out = scaled_dot_product_attention(query, query, query, is_causal=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), query)
    return out.detach(), gradient


def send_results(connection):
    torch.set_num_threads(2)
    connection.send([tensor.numpy() for tensor in attend_with_gradients()])
    connection.close()


def test_a_forked_child_gets_the_same_bits():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = attend_with_gradients()
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe()
        child = context.Process(target=send_results, args=(sender,))
        child.start()
        assert receiver.poll(60), "the child hangs"
        for actual, truth in zip(receiver.recv(), expected, strict=True):
            assert torch.equal(torch.from_numpy(actual), truth)
        child.join(60)
        assert child.exitcode == 0
        for actual, truth in zip(attend_with_gradients(), expected, strict=True):
            assert torch.equal(actual, truth)
    finally:
        torch.set_num_threads(before)


def copying_calls():
    """Functions of (results, their gradients) for which PyTorch copies, casts or sums more than 32768 elements."""
    torch.manual_seed(0)
    query, bias = torch.randn(2, 4, 128, 64), torch.randn(2, 4, 128, 128)
    doubled = query.double()
    rows, weight = torch.randn(4, 300, 64), torch.randn(64)
    strided = query.mT.contiguous().mT

    def attend(query, *mask, grad_out=query, **options):
        # Three inputs: the gradients of one that is used three times are added up by autograd, with threads.
        inputs = [tensor.detach().requires_grad_() for tensor in (query, query, query, *mask)]
        out = scaled_dot_product_attention(*inputs, **options)
        return out, *torch.autograd.grad(out, inputs, grad_out)

    def attend_under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return (scaled_dot_product_attention(query, query, query),)

    def attend_additively():
        inputs = [tensor.detach().requires_grad_() for tensor in (rows, rows, rows, weight)]
        out = additive_attention(*inputs)
        return out, *torch.autograd.grad(out, inputs, rows), additive_weights(rows, rows, weight)

    return {
        "strided": lambda: attend(strided, grad_out=strided),
        "bias": lambda: attend(query, bias),
        "shared bias": lambda: attend(query, bias[:1, :1]),
        "float32 mask of a float64 call": lambda: (
            scaled_dot_product_attention(doubled, doubled, doubled, attn_mask=bias),
        ),
        "broadcast batch": lambda: (scaled_dot_product_attention(query.expand(2, -1, -1, -1, -1), query, query),),
        "reference": lambda: attend(query, backend="reference"),
        "autocast": attend_under_autocast,
        "additive": attend_additively,
    }


def compare_in_child(calls, expected):
    torch.set_num_threads(2)
    for name, call in calls.items():
        for actual, truth in zip(call(), expected[name], strict=True):
            # numpy compares: PyTorch would do that with several threads.
            assert numpy.array_equal(as_numpy(actual), as_numpy(truth)), name
    assert torch.get_num_threads() == 2


def as_numpy(tensor):
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def test_a_forked_child_with_several_threads_does_not_wait_for_those_of_its_parent():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        calls = copying_calls()
        expected = {name: call() for name, call in calls.items()}
        child = multiprocessing.get_context("fork").Process(target=compare_in_child, args=(calls, expected))
        child.start()
        child.join(60)
        if child.exitcode is None:
            child.kill()
            pytest.fail("the child hangs")
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


class Attended(Dataset):
    """Items that attention computes in the worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.full((1, 1, 16, 8), float(index))
        return scaled_dot_product_attention(x, x, x)[0]


def test_data_loader_workers():
    module = MultiHeadAttention(8, 2, batch_first=True)
    x = torch.randn(4, 64, 8)
    module(x, x, x)
    loader = DataLoader(Attended(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    batches = list(loader)
    assert [batch.mean().item() for batch in batches] == [0.5, 2.5]
