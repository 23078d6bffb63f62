"""torch's FlexAttention (Dong et al., arXiv:2412.05496) as a further peer.

Its masks are functions of indices, and its block masks are made beforehand, as its users do. Each case is compiled
for its own sizes, by torch.compile, which needs a C++ compiler. On a CPU it refuses a backward: it is a peer of the
forward alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import LeftOutError

#: mask_mod(batch, head, query, key) and score_mod(score, batch, head, query, key) of 0-dimensional tensors.
Modification = Callable[..., Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, **restrictions: object) -> Callable[[], Tensor]:
    """A forward call on [B, H, L, D] tensors, compiled, for this many threads.

    ``restrictions`` are those of :func:`modifications`. Raises LeftOutError where torch has no FlexAttention, or cannot
    compile it.
    """
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        raise LeftOutError(f"torch {torch.__version__} has no FlexAttention") from None
    # Else dynamo would count the cases as compilations of one function, and refuse the ninth.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    options = modifications(query, key, **restrictions)

    def call() -> Tensor:
        return compiled(query, key, value, enable_gqa=query.shape[1] != key.shape[1], **options)

    try:
        call()
    except Exception as error:
        raise LeftOutError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return call


def modifications(
    query: Tensor,
    key: Tensor,
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Tensor | None = None,
    document_of: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> dict:
    """``block_mask`` and ``score_mod`` of a call, where it needs them.

    Args:
        window: keys up to so far before and after the query.
        key_lengths: int [B].
        document_of: int [L], the document of each position; a query attends within its own.
        attn_mask: bool (True = attend) or float (added), broadcastable to [B, H, L, L].
    """
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    batch, heads = query.shape[:2]
    masks: list[Modification] = []
    options: dict = {}
    if is_causal:
        masks.append(lambda b, h, i, j: i >= j)
    if window is not None:
        masks.append(lambda b, h, i, j: (i - j).abs() <= window)
    if key_lengths is not None:
        masks.append(lambda b, h, i, j: j < key_lengths[b])
    if document_of is not None:
        masks.append(lambda b, h, i, j: document_of[i] == document_of[j])
    if attn_mask is not None:
        full = attn_mask.expand(batch, heads, query.shape[2], key.shape[2])
        if attn_mask.dtype == torch.bool:
            masks.append(lambda b, h, i, j: full[b, h, i, j])
        else:
            options["score_mod"] = lambda score, b, h, i, j: score + full[b, h, i, j]
    if masks:
        # A block mask of one sequence, or of one head, holds for all.
        sequences = batch if key_lengths is not None or (attn_mask is not None and attn_mask.shape[0] > 1) else None
        of_heads = heads if attn_mask is not None and attn_mask.shape[1] > 1 else None
        options["block_mask"] = create_block_mask(
            and_masks(*masks), sequences, of_heads, query.shape[2], key.shape[2], device=query.device
        )
    return options
