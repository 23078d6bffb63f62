"""Additive attention (Bahdanau, Cho, Bengio, 2015) in tiles: O(L) memory, forward and backward.

    score[i, j] = sum_d weight[d] * tanh(query[i, d] + key[j, d])
    out[i]      = sum_j softmax_j(score[i, j]) * value[j]

The naive form stores a tanh for every (batch, query, key, feature); here a tile of them lives at a
time, the softmax is accumulated online, and the backward pass computes the tiles again from the
saved logarithm of the sum of exponentials (lse), as in flash attention:

    dS = P * (dO V^T - rowsum(dO * O)),   dT[i, j, d] = dS[i, j] * weight[d] * (1 - tanh^2)
    dquery = sum_j dT,   dkey = sum_i dT,   dweight = sum_ij dS * tanh,   dvalue = P^T dO
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn import additive_ops
from fastattn.checks import check_dense, check_sequences, check_size, shown
from fastattn.fork import serial_after_fork
from fastattn.integrations import onnx
from fastattn.integrations.symbolic import LeafModule, is_symbolic, record_function_call
from fastattn.problem import INTEGER_DTYPES, SUPPORTED_DTYPES

#: How each argument lies.
_LAYOUT = {"query": "[B, Lq, D]", "key": "[B, Lk, D]", "value": "[B, Lk, Dv]", "weight": "[D]"}


@serial_after_fork
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax of additive scores, times the values: ``[B, Lq, Dv]`` in the query's dtype.

    Args:
        query, key: projected, ``[B, Lq, D]`` and ``[B, Lk, D]``.
        value: ``[B, Lk, Dv]``.
        weight: the score's vector v, ``[D]``.
        key_lengths: int ``[B]``, keys at or past it are padding.
        key_mask: bool ``[B, Lk]``, True = attend (the opposite of the module's ``key_padding_mask``); combined
            with ``key_lengths`` by AND.

    float32, bfloat16 and float16 may be mixed, and are computed in float32; float64, in float64, not.  A query
    with no key to attend to gives 0, and gradients 0; what is masked out may be NaN or infinite.  Second
    derivatives take O(Lq * Lk * D) memory.  Raises TypeError or ValueError, naming the argument.
    """
    arguments = (query, key, value, weight, key_lengths, key_mask)
    if is_symbolic(arguments):
        return record_function_call(additive_attention, arguments)
    mask = _checked_mask(*arguments)
    if onnx.is_exporting():
        return onnx.additive_attention(query, key, value, weight, mask)
    out, _ = additive_ops.additive_forward(query, key, value, weight, mask)
    return out.to(query.dtype)


@serial_after_fork
def additive_weights(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The softmax weights ``[B, Lq, Lk]`` of :func:`additive_attention`, for inspection (no gradient).

    The arguments, and True = attend in ``key_mask``, are as there.
    """
    arguments = (query, key, weight, key_lengths, key_mask)
    if is_symbolic(arguments):
        return record_function_call(additive_weights, arguments)
    mask = _checked_mask(query, key, None, weight, key_lengths, key_mask)
    if onnx.is_exporting():
        return onnx.additive_weights(query, key, weight, mask)
    return additive_ops.additive_weights(query, key, weight, mask)


class AdditiveAttention(LeafModule):
    """Bahdanau's attention as a module: projects queries and keys, then :func:`additive_attention`.

    Args:
        query_dim, key_dim: the inputs' features.
        hidden_dim: features D of the score (default: ``query_dim``).

    Raises TypeError or ValueError, naming the argument.
    """

    def __init__(self, query_dim: int, key_dim: int | None = None, hidden_dim: int | None = None):
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        hidden_dim = query_dim if hidden_dim is None else hidden_dim
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("hidden_dim", hidden_dim)):
            check_size(name, size)
        self.query_proj = nn.Linear(query_dim, hidden_dim, bias=False)
        self.key_proj = nn.Linear(key_dim, hidden_dim)
        self.weight = nn.Parameter(torch.empty(hidden_dim))
        nn.init.uniform_(self.weight, -(hidden_dim**-0.5), hidden_dim**-0.5)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``([B, Lq, Dv], weights [B, Lq, Lk] or None)`` from ``[B, Lq, query_dim]`` and ``[B, Lk, key_dim]``.

        ``value`` ``[B, Lk, Dv]`` defaults to the key.  ``key_padding_mask`` bool ``[B, Lk]``, True = padding, as in
        ``nn.MultiheadAttention`` (the function's ``key_mask`` is the opposite).  ``key_lengths`` int ``[B]``.
        Raises TypeError or ValueError, naming the argument.
        """
        value = key if value is None else value
        for name, tensor, features in (("query", query, self.query_proj), ("key", key, self.key_proj)):
            check_sequences(name, tensor, features.in_features)
        key_mask = None
        if key_padding_mask is not None:
            if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
                given = shown(key_padding_mask)
                raise TypeError(f"key_padding_mask must be a bool tensor [B, Lk], True = padding, got {given}")
            if key_padding_mask.shape != key.shape[:2]:
                given = list(key_padding_mask.shape)
                raise ValueError(f"key_padding_mask must be [B, Lk] = {list(key.shape[:2])}, got {given}")
            key_mask = ~key_padding_mask
        query, key = self.query_proj(query), self.key_proj(key)
        out = additive_attention(query, key, value, self.weight, key_lengths, key_mask)
        weights = additive_weights(query, key, self.weight, key_lengths, key_mask) if need_weights else None
        return out, weights


def _checked_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    weight: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor | None:
    """Check the call, without a value for weights alone; the mask of the keys, bool ``[B, Lk]``, or None."""
    inputs = {"query": query, "key": key, "value": value, "weight": weight}
    if value is None:
        del inputs["value"]
    masks = {"key_lengths": key_lengths, "key_mask": key_mask}
    for name, tensor in (inputs | {name: mask for name, mask in masks.items() if mask is not None}).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    for name, tensor in inputs.items():
        dims = 1 if name == "weight" else 3
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, {_LAYOUT[name]}, got shape {list(tensor.shape)}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if (tensor.dtype == torch.float64) != (query.dtype == torch.float64):
            fitting = "float64" if query.dtype == torch.float64 else "float32, bfloat16 or float16"
            raise TypeError(f"{name} must be {fitting}, because query is {query.dtype}, got {tensor.dtype}")
    batch, _, features = query.shape
    length = key.shape[1]
    wanted = {"key": (batch, length, features), "weight": (features,)}
    if value is not None:
        wanted["value"] = (batch, length, value.shape[2])
    for name, shape in wanted.items():
        if inputs[name].shape != shape:
            raise ValueError(
                f"{name} must be {_LAYOUT[name]}, {list(shape)} here, to fit query [B, Lq, D] = {list(query.shape)}"
                f"{' and the key' if name == 'value' else ''}, got shape {list(inputs[name].shape)}"
            )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, length)):
        given = f"{key_mask.dtype} {list(key_mask.shape)}"
        raise ValueError(f"key_mask must be bool [B, Lk] = {[batch, length]}, True = attend, got {given}")
    if key_lengths is not None:
        if key_lengths.shape != (batch,) or key_lengths.dtype not in INTEGER_DTYPES:
            given = f"{key_lengths.dtype} {list(key_lengths.shape)}"
            raise ValueError(f"key_lengths must be int [B] = [{batch}], got {given}")
        valid = torch.arange(length, device=key.device) < key_lengths[:, None]
        key_mask = valid if key_mask is None else valid & key_mask
    return key_mask
