"""torch.utils.flop_counter.FlopCounterMode: the floating-point operations of the operators.

They are counted as torch counts those of its own attention: two for each multiply-add of the matrix products, 2 in the
forward pass and 5 in the backward pass, and nothing for the softmax. Torch counts every pair of a query and a key.
Here only the pairs count that causality, the window and the lengths of keys let through, because no others are
computed; of lengths that cannot be read, the full one. A mask and a bias are not read, so they count in full. Of the
backward pass only the products that the needed gradients ask for count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_OPERATORS = torch.ops.fastattn


def visible_pairs(
    queries: int, keys: int, causal: str | None, window_left: int | None, window_right: int | None
) -> int:
    """How many pairs of a query and a key the band lets through (see :class:`fastattn.problem.Problem`)."""
    if causal is None and window_left is None and window_right is None:
        return queries * keys
    shift = keys - queries if causal == "lower_right" else 0
    ahead = 0 if causal is not None else window_right
    up_to_last = queries * keys if ahead is None else _pairs_up_to(shift + ahead, queries, keys)
    before_first = 0 if window_left is None else _pairs_up_to(shift - window_left - 1, queries, keys)
    return up_to_last - before_first


def _pairs_up_to(diagonal: int, queries: int, keys: int) -> int:
    """Pairs (i, j) with j <= i + diagonal."""

    def sum_below(end: int) -> int:
        """sum of min(x, keys) over 0 <= x < end."""
        triangle = min(max(end, 0), keys)
        return triangle * (triangle - 1) // 2 + max(end - keys, 0) * keys

    return sum_below(queries + diagonal + 1) - sum_below(diagonal + 1)


def _call(operator: torch._ops.OpOverloadPacket, arguments: tuple, options: dict) -> dict:
    """The arguments by name."""
    names = (argument.name for argument in operator.default._schema.arguments)
    return dict(zip(names, arguments, strict=False)) | options


def _pairs(call: dict) -> int:
    """All of the call's pairs, over its batch and heads."""
    batch, heads, queries, _ = call["query"].shape
    band = call["causal"], call["window_left"], call["window_right"]
    lengths = call["key_lengths"]
    if type(lengths) is Tensor and lengths.is_cpu:
        return heads * sum(visible_pairs(queries, length, *band) for length in lengths.tolist())
    return batch * heads * visible_pairs(queries, call["key"].shape[2], *band)


@register_flop_formula(_OPERATORS.attention_forward, get_raw=True)
def forward_flops(*arguments, out_val=None, **options) -> int:
    call = _call(_OPERATORS.attention_forward, arguments, options)
    return 2 * _pairs(call) * (call["query"].shape[3] + call["value"].shape[3])


@register_flop_formula(_OPERATORS.attention_backward, get_raw=True)
def backward_flops(*arguments, out_val=None, **options) -> int:
    call = _call(_OPERATORS.attention_backward, arguments, options)
    head_dim, value_dim = call["query"].shape[3], call["value"].shape[3]
    wants_scores = call["need_query"] or call["need_key"] or call["need_bias"]
    per_pair = head_dim  # the scores, computed again
    per_pair += value_dim * (bool(call["need_value"]) + bool(wants_scores))
    per_pair += head_dim * (bool(call["need_query"]) + bool(call["need_key"]))
    return 2 * _pairs(call) * per_pair


@register_flop_formula(_OPERATORS.attention_weights, get_raw=True)
def weights_flops(*arguments, out_val=None, **options) -> int:
    call = _call(_OPERATORS.attention_weights, arguments, options)
    return 2 * _pairs(call) * call["query"].shape[3]
