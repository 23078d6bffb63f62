"""Attention in processes that were forked from one whose threads are running, as data loaders do."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastattn import MultiHeadAttention, scaled_dot_product_attention

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
