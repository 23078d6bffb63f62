"""The operators of additive attention: ``torch.ops.fastattn.additive_{forward,backward,weights}``.

They take the arguments of :func:`fastattn.additive.additive_attention` once it has checked them, with one
mask of the keys, bool ``[B, Lk]``. What they return is float32, or float64 for float64; lse is in log2 units.

Second derivatives are computed densely, in O(Lq * Lk * D) memory.
"""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from fastattn.backends import additive_cpu, additive_tiles, additive_triton
from fastattn.fork import serial_after_fork
from fastattn.ops import fold, one_by_one, register, vector_jacobian_product

_SCHEMA = "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? mask"
_WEIGHT = 3  # where it stands in the schema

# The computations on real tensors.


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _working(tensor: Tensor) -> Tensor:
    return tensor.to(_working_dtype(tensor))


def _without_masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Keys or values with those masked set to 0: zero times a masked NaN would be NaN."""
    return tensor if mask is None else tensor.masked_fill(~mask[:, :, None], 0.0)


def _make_call(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None):
    """The call of the first engine that takes it, on tensors of the dtype that is computed in."""
    query, key, value, weight = (_working(tensor) for tensor in (query, key, value, weight))
    key, value = _without_masked(key, mask), _without_masked(value, mask)
    if not additive_cpu.reasons(query, key, value):
        call = additive_cpu.Call(query, key, value, weight, mask)
        if not call.overflows:
            return call
    if not additive_triton.reasons(query, key, value):
        return additive_triton.Call(query, key, value, weight, mask)
    return additive_tiles.Call(query, key, value, weight, mask)


def _without_autocast(compute):
    """The function, whose products of PyTorch's are computed in the dtype of what they are given."""

    def wrapped(*arguments):
        if not torch._C._is_any_autocast_enabled():
            return compute(*arguments)
        with torch.autocast(arguments[0].device.type, enabled=False):
            return compute(*arguments)

    return wrapped


@serial_after_fork
@_without_autocast
def _forward(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [B, Lq, Dv] and lse [B, Lq]; -inf for a query that may attend to nothing."""
    return _make_call(query, key, value, weight, mask).forward()


@serial_after_fork
@_without_autocast
def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value, and of the weight for each sequence [B, D]."""
    *gradients, of_weight = _make_call(*inputs).backward(lse, (grad_out * out).sum(-1), grad_out)
    return *(grad.to(x.dtype) for grad, x in zip(gradients, inputs, strict=False)), of_weight


@_without_autocast
def _weights(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax weights [B, Lq, Lk], through which no gradient passes."""
    query, key, weight = (_working(tensor) for tensor in (query, key, weight))
    return additive_tiles.weights(query, _without_masked(key, mask), weight, mask)


# Shapes and dtypes without data.


def _fake_forward(query, key, value, weight, mask) -> tuple[Tensor, Tensor]:
    batch, queries, _ = query.shape
    dtype = _working_dtype(query)
    return (
        query.new_empty((batch, queries, value.shape[2]), dtype=dtype),
        query.new_empty((batch, queries), dtype=dtype),
    )


def _fake_backward(grad_out, out, lse, query, key, value, weight, mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_weight = out.new_empty((query.shape[0], weight.shape[0]))
    return *(x.new_empty(x.shape) for x in (query, key, value)), of_weight


def _fake_weights(query, key, weight, mask) -> Tensor:
    return query.new_empty((*query.shape[:2], key.shape[1]), dtype=_working_dtype(query))


# Derivatives.


def _remember_forward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 5
    *inputs, out, lse = ctx.saved_tensors
    *gradients, of_weight = additive_backward(grad_out, out, lse, *inputs)
    return *gradients, of_weight.sum(0).to(inputs[_WEIGHT].dtype), None


def _remember_backward(ctx, inputs, output) -> None:
    grad_out, _, _, *inputs = inputs
    ctx.save_for_backward(grad_out, *inputs)


def _differentiate_backward(ctx, *grads_of_gradients):
    """``out`` and ``lse`` receive no gradient, because the recomputation does not read them."""
    *primals, mask = ctx.saved_tensors

    def gradients(grad_out, query, key, value, weight):
        of_each = weight.expand(query.shape[0], -1)

        def out(*inputs):
            return _dense(*inputs, mask)

        _, pullback = torch.func.vjp(out, query, key, value, of_each)
        *grads, of_weight = pullback(grad_out)
        return *grads, _working(of_weight)

    of_grad_out, *of_inputs = vector_jacobian_product(gradients, primals, grads_of_gradients)
    return of_grad_out, None, None, *of_inputs, None


def _remember_weights(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output)


def _differentiate_weights(ctx, _):
    return (None,) * 4


def _dense(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """out [B, Lq, Dv] by the formula; weight [B, D]."""
    query, key, value, weight = (_working(tensor) for tensor in (query, key, value, weight))
    key, value = _without_masked(key, mask), _without_masked(value, mask)
    score = (torch.tanh(query[:, :, None] + key[:, None]) * weight[:, None, None]).sum(-1)
    if mask is None:
        return score.softmax(-1) @ value
    # Not -inf: a query that may attend to nothing would have weights, and gradients, of NaN.
    score = score.masked_fill(~mask[:, None], torch.finfo(score.dtype).min)
    return score.softmax(-1).masked_fill(~mask[:, None], 0.0) @ value


# vmap: the mapped dimension joins the batch, unless each example has a weight of its own.


def _map_forward(info, dims, *arguments):
    if dims[_WEIGHT] is not None:
        return one_by_one(additive_forward, info, dims, arguments)
    results = additive_forward(*_folded(info, dims, arguments, _WEIGHT))
    return tuple(_unfolded(info, result) for result in results), (0, 0)


def _map_backward(info, dims, *arguments):
    position = 3 + _WEIGHT
    if dims[position] is not None:
        return one_by_one(additive_backward, info, dims, arguments)
    results = additive_backward(*_folded(info, dims, arguments, position))
    return tuple(_unfolded(info, result) for result in results), (0, 0, 0, 0)


def _map_weights(info, dims, *arguments):
    position = 2
    if dims[position] is not None:
        return one_by_one(additive_weights, info, dims, arguments)
    return _unfolded(info, additive_weights(*_folded(info, dims, arguments, position))), 0


def _folded(info, dims, arguments, unmapped: int) -> list:
    return [
        argument if index == unmapped else fold(argument, dim, info.batch_size)
        for index, (argument, dim) in enumerate(zip(arguments, dims, strict=True))
    ]


def _unfolded(info, result: Tensor) -> Tensor:
    return result.unflatten(0, (info.batch_size, result.shape[0] // info.batch_size))


additive_forward = register(
    "additive_forward",
    f"({_SCHEMA}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _differentiate_forward,
    _remember_forward,
    _map_forward,
    itemgetter(0, 1, 2, 3),
)
additive_backward = register(
    "additive_backward",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _differentiate_backward,
    _remember_backward,
    _map_backward,
    itemgetter(0, 1, 2, 3, 4, 5, 6),
)


additive_weights = register(
    "additive_weights",
    "(Tensor query, Tensor key, Tensor weight, Tensor? mask) -> Tensor",
    _weights,
    _fake_weights,
    _differentiate_weights,
    _remember_weights,
    _map_weights,
    itemgetter(0, 1, 2),
)
