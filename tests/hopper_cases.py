"""Problems for the Hopper kernels, and the definition of attention that they are held to."""

import math
from pathlib import Path

import torch

from fastattn import kernels
from fastattn.problem import Problem

KERNELS = Path(kernels.__file__).parent / "hopper"


def make_case(
    B=1,
    H=2,
    group=1,
    Lq=128,
    Lk=128,
    D=64,
    dtype=torch.bfloat16,
    causal=None,
    window=(None, None),
    lengths=None,
    transposed=False,
    seed=0,
):
    """A random problem; ``transposed`` lays tensors out [B, L, H, D] as a packed projection does."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads, length):
        if transposed:
            return torch.randn(B, length, heads, D, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(B, heads, length, D, generator=generator).to(dtype)

    return Problem(
        query=tensor(H, Lq),
        key=tensor(H // group, Lk),
        value=tensor(H // group, Lk),
        scale=1 / math.sqrt(D),
        causal=causal,
        window_left=window[0],
        window_right=window[1],
        key_lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
    )


def allowed(problem) -> torch.Tensor:
    """bool [B, 1, Lq, Lk]: the band, key by key, from its definition in :class:`Problem`."""
    B, _, Lq, _ = problem.query.shape
    Lk = problem.key.shape[2]
    n = torch.full((B,), Lk) if problem.key_lengths is None else problem.key_lengths
    n = n.view(B, 1, 1, 1)
    query, key = torch.arange(Lq).view(1, 1, Lq, 1), torch.arange(Lk).view(1, 1, 1, Lk)
    position = query + (n - Lq if problem.causal == "lower_right" else 0)
    seen = (key < n).expand(B, 1, Lq, Lk)
    if problem.causal:
        seen = seen & (key <= position)
    if problem.window_left is not None:
        seen = seen & (key >= position - problem.window_left)
    if problem.window_right is not None:
        seen = seen & (key <= position + problem.window_right)
    return seen


def definition(problem, query=None, key=None, value=None):
    """(out, lse) in fp64, term by term; pass fp64 leaves to differentiate through it.

    Keys that are padding are replaced by zeros, so that what they hold cannot matter.
    """
    query = problem.query.double() if query is None else query
    key = problem.key.double() if key is None else key
    value = problem.value.double() if value is None else value
    seen = allowed(problem)
    if problem.key_lengths is not None:
        real = torch.arange(key.shape[2]) < problem.key_lengths[:, None]
        key = torch.where(real[:, None, :, None], key, 0.0)
        value = torch.where(real[:, None, :, None], value, 0.0)
    key = key.repeat_interleave(problem.group_size, 1)
    value = value.repeat_interleave(problem.group_size, 1)
    scores = (query @ key.mT * problem.scale).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(seen, (scores - lse[..., None]).exp(), 0.0)
    return weights @ value, lse
