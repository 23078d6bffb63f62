"""The order of the training data: a function of the seed and the epoch, so that a resumed run repeats it."""

from __future__ import annotations

import torch

#: Batches whose examples are sorted together: enough for little padding, few enough to stay shuffled.
POOL_BATCHES = 32


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All examples in batches of like length, in random order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch_size * POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def pad_tokens(sequences: list[list[int]], pad_id: int, device: torch.device) -> torch.Tensor:
    """Token lists as int64 ``[B, L]``, padded on the right."""
    length = max(map(len, sequences))
    return torch.tensor([s + [pad_id] * (length - len(s)) for s in sequences], device=device)
