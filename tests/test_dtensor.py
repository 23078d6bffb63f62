"""DTensor inputs: two processes against one, and which shardings pass through without communication."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastattn

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs the gloo backend of torch.distributed"
)

GENERATOR = torch.Generator().manual_seed(0)
CALLS = {
    "plain": {},
    "band": {"is_causal": True, "window": (2, None)},
    "bias": {"attn_mask": torch.randn(1, 4, 5, 6, generator=GENERATOR)},
    "shared bias": {"attn_mask": torch.randn(5, 6, generator=GENERATOR)},
    "mask": {"attn_mask": torch.rand(2, 1, 5, 6, generator=GENERATOR) < 0.5},
    "lengths": {"key_lengths": torch.tensor([3, 6]), "causal": "lower_right", "return_lse": True},
}


class Block(nn.Module):
    """Attention between linear layers that tensor parallelism shards over the heads."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        query, key, value = (
            layer(x).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        heads = fastattn.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))


def check_calls(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    def results(distribute, key_heads, options):
        generator = torch.Generator().manual_seed(1)
        shapes = (2, 4, 5, 8), (2, key_heads, 6, 8), (2, key_heads, 6, 4)
        inputs = [distribute(torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
        options = {
            name: distribute_tensor(value, mesh, [Replicate()]) if distribute is not same and torch.is_tensor(value)
            else value.clone() if torch.is_tensor(value) else value
            for name, value in options.items()
        }  # fmt: skip
        bias = options.get("attn_mask")
        if bias is not None and bias.is_floating_point():
            inputs.append(bias.requires_grad_())
        with CommDebugMode() as communication:
            out = fastattn.scaled_dot_product_attention(*inputs[:3], enable_gqa=True, **options)
        if distribute is not same and distribute.dim != 2:
            assert communication.get_total_counts() == 0
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum(out.sin().sum() for out in outs)
        return (*outs, *torch.autograd.grad(loss, inputs))

    def same(tensor):
        return tensor

    class Distribute:
        def __init__(self, dim):
            self.dim = dim

        def __call__(self, tensor):
            shardable = tensor.shape[self.dim] > 1
            return distribute_tensor(tensor, mesh, [Shard(self.dim) if shardable else Replicate()])

    for name, options in CALLS.items():
        for dim, key_heads in ((0, 2), (1, 2), (1, 1), (2, 2)) if name == "plain" else ((0, 1), (1, 2)):
            expected = results(same, key_heads, options)
            found = results(Distribute(dim), key_heads, options)
            torch.testing.assert_close([result.full_tensor() for result in found], list(expected))


def check_uneven_groups(mesh):
    """Three key heads cannot be shared out to two ranks together with the six query heads that read them."""
    from torch.distributed.tensor import Shard, distribute_tensor

    query, key = torch.randn(1, 6, 4, 8, generator=torch.Generator().manual_seed(2)), torch.ones(1, 3, 4, 8)
    key = key * torch.arange(3.0)[:, None, None]
    found = fastattn.scaled_dot_product_attention(
        *(distribute_tensor(tensor, mesh, [Shard(1)]) for tensor in (query, key, key)), enable_gqa=True
    )
    expected = fastattn.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    torch.testing.assert_close(found.full_tensor(), expected)


def check_modules(mesh):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    block = Block()
    expected = block(x)
    gradient = torch.autograd.grad(expected.sin().sum(), block.query.weight)[0]
    columns = ColwiseParallel(use_local_output=False)
    plan = {"query": columns, "key": columns, "value": columns, "out": RowwiseParallel()}
    parallelize_module(block, mesh, plan)
    found = block(x)
    torch.testing.assert_close(found, expected)
    found_gradient = torch.autograd.grad(found.sin().sum(), block.query.weight)[0]
    torch.testing.assert_close(found_gradient.full_tensor(), gradient)

    module = fastattn.MultiHeadAttention(8, 4, batch_first=True)
    expected = module(x, x, x, is_causal=True)
    distribute_module(module, mesh)
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    found = module(sharded, sharded, sharded, is_causal=True)
    torch.testing.assert_close(tuple(result.full_tensor() for result in found), expected)
    module.dropout = 0.5
    with pytest.raises(ValueError, match=r"dropout_p must be 0.0 where query is a DTensor, got 0.5"):
        module(sharded, sharded, sharded)


def work(rank, store):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    check_calls(mesh)
    check_uneven_groups(mesh)
    check_modules(mesh)
    dist.destroy_process_group()


def work_beside(_, store):
    work(1, store)


def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    other = torch.multiprocessing.spawn(work_beside, (str(tmp_path / "store"),), nprocs=1, join=False)
    work(0, tmp_path / "store")
    assert other.join(timeout=60)
