"""The operators that PyTorch sees: ``torch.ops.fastattn.attention_{forward,backward,weights}``.

They are registered with shape functions for ``torch.compile`` and ``torch.export``, derivatives,
and ``vmap`` rules. Their arguments are the fields of :class:`fastattn.problem.Arguments`, then the
dropout's ``rng_state`` and the backend's name.  Beside ``out`` and ``lse`` the forward gives
``out_residual``, what rounding took from ``out``: see :func:`empty_residual`.

Second derivatives are computed densely: the gradient of ``attention_backward`` differentiates
:func:`fastattn.reference.gradients`, which takes O(Lq * Lk) memory. So does the gradient of
returned attention weights.
"""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from fastattn import dispatch, memory, reference
from fastattn.eager import is_eager, is_observed, is_transformed
from fastattn.fork import serial_after_fork
from fastattn.integrations import onnx
from fastattn.integrations.on_import import integrate_on_import
from fastattn.problem import (
    Arguments,
    Problem,
    bias_gradient_shape,
    check_problem,
    problem_from_arguments,
    with_unit_last_stride,
)

_LIBRARY = torch.library.Library("fastattn", "DEF")
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_PROBLEM_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias, Tensor? key_lengths, "
    "Scalar? scale, str? causal, SymInt? window_left, SymInt? window_right, float dropout_p, "
    "Tensor? rng_state, str backend"
)
#: Where the differentiable ones stand among these arguments.
_DIFFERENTIABLE = tuple(Arguments._fields.index(name) for name in ("query", "key", "value", "bias"))
_QUERY, _KEY, _VALUE, _BIAS = _DIFFERENTIABLE
_DROPOUT = Arguments._fields.index("dropout_p")
#: What the backward is given before these arguments: grad_out, grad_lse, out, lse, out_residual.
_GIVEN = 5
_ROUNDED_DTYPES = (torch.bfloat16, torch.float16)
#: Fewer elements than this are no large result in any dtype.
_SURELY_SMALL = memory.LARGE // 8


def empty_laid_out_like(tensor: Tensor, last_size: int, new_empty_strided=Tensor.new_empty_strided) -> Tensor:
    """Uninitialised [B, H, L, last_size] that lies in memory in the order of ``tensor``'s dimensions.

    A query that is a view of [B, L, H, D] or of [L, B, H, D], as the projections of a multi-head
    attention layer are, gets an output that merges back into [B, L, H * D] without a copy. It is not
    a view: outputs of a custom Function that are views cannot be changed in place.
    """
    batch, heads, length, _ = tensor.shape
    batch_stride, head_stride, length_stride, _ = tensor.stride()
    if head_stride >= length_stride:
        strides = (heads * length * last_size, length * last_size, last_size, 1)
    elif batch_stride >= length_stride or batch_stride == 0:
        strides = (length * heads * last_size, last_size, heads * last_size, 1)
    else:
        strides = (heads * last_size, last_size, batch * heads * last_size, 1)
    return new_empty_strided(tensor, (batch, heads, length, last_size), strides)


def empty_result(tensor: Tensor, last_size: int) -> Tensor:
    """The same for a result that is about to be computed."""
    if last_size == tensor.shape[3]:
        return empty_like(tensor)
    return _empty_laid_out(tensor, last_size)


def empty_like(tensor: Tensor) -> Tensor:
    """The same of ``tensor``'s own shape, as that of a gradient."""
    if tensor.is_contiguous() and (tensor.numel() < _SURELY_SMALL or not tensor.is_cpu):
        return torch.empty_like(tensor)
    return _empty_laid_out(tensor, tensor.shape[3])


def _empty_laid_out(tensor: Tensor, last_size: int) -> Tensor:
    large = memory.new_contiguous(tensor, last_size)
    return empty_laid_out_like(tensor, last_size, memory.new_empty_strided) if large is None else large


def empty_lse(query: Tensor) -> Tensor:
    """Uninitialised [B, Hq, Lq], float32 or, for a float64 query, float64."""
    batch, heads, length, _ = query.shape
    if query.dtype == torch.float32:
        return query.new_empty(batch, heads, length)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((batch, heads, length), dtype=dtype)


def empty_residual(out: Tensor) -> Tensor | None:
    """Uninitialised int16 like ``out``: what rounding to a 16-bit dtype takes from it; None in wider ones.

    Only the engine that wrote its bits reads them; zeros stand for nothing. The backward's delta is
    rowsum(grad_out * out). Where score gradients cancel, a delta of the rounded ``out`` leaves that rounding in their
    place.
    """
    return empty_like(out).view(torch.int16) if out.dtype in _ROUNDED_DTYPES else None


def _keeps_residual(query: Tensor, backend: str) -> bool:
    """Does the operator give a residual? The backend has to be known before there is data to choose it by."""
    return query.dtype in _ROUNDED_DTYPES and query.is_cpu and backend in ("auto", "cpu")


# The computations on real tensors.


@serial_after_fork
def _forward(
    *arguments, wants_lse: bool = True, wants_residual: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [B, Hq, Lq, Dv] in query's layout, lse [B, Hq, Lq] and out_residual, None if that saves time."""
    problem = problem_from_arguments(*arguments[:-1])
    check_problem(problem)
    engine = dispatch.select(problem, arguments[-1])
    if problem.dropout_p == 1.0:
        problem = _without_values(problem)
    query = problem.query
    out = empty_result(query, problem.value.shape[3])
    lse = empty_lse(query) if wants_lse or not engine.LSE_IS_OPTIONAL else None
    residual = empty_residual(out) if wants_residual and engine.KEEPS_RESIDUAL else None
    engine.forward(problem, out, lse, *(() if residual is None else (residual,)))
    return out, lse, residual


def _forward_operator(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, residual = _forward(*arguments)
    if residual is None:
        keeps = _keeps_residual(arguments[_QUERY], arguments[-1])  # but no engine was there to do it
        residual = torch.zeros_like(out, dtype=torch.int16) if keeps else out.new_empty(0)
    return out, lse, residual


@serial_after_fork
def _gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_residual: Tensor | None,
    *rest,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Those of query, key, value and bias, None where one is not needed."""
    *arguments, backend, needs_query, needs_key, needs_value, needs_bias = rest
    bias = arguments[_BIAS]
    if needs_bias and _has_repeated_elements(bias):
        # A caller's own expanded view: each of its elements has a gradient of its own.
        arguments[_BIAS] = bias = bias.clone(memory_format=torch.contiguous_format)  # an empty one too
    problem = problem_from_arguments(*arguments)
    check_problem(problem)
    engine = dispatch.select(problem, backend)
    out, grad_out = with_unit_last_stride(out), with_unit_last_stride(grad_out)
    lse = lse.contiguous()  # vmap over the gradient alone expands it
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    grad_query = empty_like(problem.query) if needs_query else None
    grad_key = empty_like(problem.key) if needs_key else None
    grad_value = empty_like(problem.value) if needs_value else None
    grad_bias = None
    if needs_bias:
        grad_bias = memory.new_zeros(bias, bias_gradient_shape(problem.bias), problem.lse_dtype)
    if problem.dropout_p == 1.0:
        problem, grad_out = _without_values(problem), torch.zeros_like(grad_out)
    residual = ()
    if engine.KEEPS_RESIDUAL and out_residual is not None and out_residual.numel() > 0:
        residual = (with_unit_last_stride(out_residual),)
    engine.backward(problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, grad_bias, *residual)
    if needs_bias:
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _backward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, an operator's: empty tensors in place of those that are not needed."""
    out = arguments[2]
    return tuple(out.new_empty(0) if gradient is None else gradient for gradient in _gradients(*arguments))


def _without_values(problem: Problem) -> Problem:
    """What dropout of every weight leaves: no value reaches out, and the scores reach lse alone."""
    value = problem.value.new_zeros(problem.value.shape)
    return problem._replace(value=value, dropout_p=0.0, rng_state=None)


@serial_after_fork
def _weights(lse: Tensor, average: bool, *arguments) -> Tensor:
    problem = problem_from_arguments(*arguments[:-1])
    check_problem(problem)
    engine = dispatch.select(problem, arguments[-1])
    weights = _empty_weights(lse, average, problem.query, problem.key)
    if problem.dropout_p == 1.0:
        return weights.zero_()
    engine.weights(problem, lse, weights, average)
    return weights


def _empty_weights(lse: Tensor, average: bool, query: Tensor, key: Tensor) -> Tensor:
    batch, heads, queries, _ = query.shape
    leading = (batch,) if average else (batch, heads)
    return lse.new_empty((*leading, queries, key.shape[2]))


def _has_repeated_elements(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


# Shapes, dtypes and strides without data.


def _fake_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    query, value = arguments[_QUERY], arguments[_VALUE]
    out = empty_laid_out_like(query, value.shape[3])
    keeps = _keeps_residual(query, arguments[-1])
    residual = torch.empty_like(out, dtype=torch.int16) if keeps else out.new_empty(0)
    return out, empty_lse(query), residual


def _fake_backward(grad_out, grad_lse, out, lse, out_residual, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments, needs = rest[:-5], rest[-4:]
    bias = arguments[_BIAS]
    grads = [
        empty_laid_out_like(_empty_with_unit_last_stride(tensor), tensor.shape[3]) if needed else None
        for tensor, needed in zip((arguments[_QUERY], arguments[_KEY], arguments[_VALUE]), needs, strict=False)
    ]
    grads.append(bias.new_empty(bias.shape) if needs[3] else None)
    return tuple(out.new_empty(0) if grad is None else grad for grad in grads)


def _fake_weights(lse, average, *arguments) -> Tensor:
    return _empty_weights(lse, average, arguments[_QUERY], arguments[_KEY])


# Derivatives.


def _remember_forward(ctx, inputs, output) -> None:
    *arguments, rng_state, backend = inputs
    ctx.save_for_backward(*arguments[: _BIAS + 2], rng_state, *output)
    ctx.options = (*arguments[_BIAS + 2 :], backend)
    ctx.set_materialize_grads(False)
    if output[2] is not None:
        ctx.mark_non_differentiable(output[2])


def _differentiate_forward(ctx, grad_out, grad_lse, _=None):
    *tensors, rng_state, out, lse, out_residual = ctx.saved_tensors
    *options, backend = ctx.options
    needs_query, needs_key, needs_value, _, needs_bias, *others = ctx.needs_input_grad
    if grad_out is None:
        if grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_out = torch.zeros_like(out)
    grad_query, grad_key, grad_value, grad_bias = attention_gradients(
        *(grad_out, grad_lse, out, lse, out_residual, *tensors, *options, rng_state, backend),
        *(needs_query, needs_key, needs_value, needs_bias),
    )
    return grad_query, grad_key, grad_value, None, grad_bias, *[None] * len(others)


def _remember_backward(ctx, inputs, output) -> None:
    grad_out, grad_lse, *_ = inputs
    *arguments, rng_state = inputs[_GIVEN:-5]
    ctx.save_for_backward(grad_out, grad_lse, *arguments[: _BIAS + 2], rng_state)
    ctx.options = tuple(arguments[_BIAS + 2 :])
    ctx.needs = tuple(inputs[-4:])


def _differentiate_backward(ctx, *grads_of_gradients):
    """The derivative of the gradients: they are recomputed densely from query, key, value and bias.

    ``out``, ``lse`` and ``out_residual`` receive no gradient, because the recomputation does not read them.
    """
    grad_out, grad_lse, *tensors, rng_state = ctx.saved_tensors
    bias = tensors[_BIAS]

    def gradients(grad_out, grad_lse, query, key, value, bias):
        arguments = [query, key, value, tensors[_BIAS - 1], bias, tensors[_BIAS + 1], *ctx.options]
        problem = problem_from_arguments(*arguments, rng_state)
        precise = reference.in_dtype(problem, problem.lse_dtype)
        results = list(reference.gradients(precise, grad_out.to(problem.lse_dtype), grad_lse))
        if ctx.needs[3]:
            results[3] = results[3].sum_to_size(bias.shape).to(bias.dtype)
        results[:3] = [result.to(query.dtype) for result in results[:3]]
        return tuple(result for result, needed in zip(results, ctx.needs, strict=True) if needed)

    primals = [grad_out, grad_lse, tensors[_QUERY], tensors[_KEY], tensors[_VALUE], bias]
    results = vector_jacobian_product(
        gradients,
        primals,
        tuple(grad for grad, needed in zip(grads_of_gradients, ctx.needs, strict=True) if needed),
    )
    grads = [None] * len(ctx.needs_input_grad)
    for index, result in zip((0, 1, *(_GIVEN + i for i in _DIFFERENTIABLE)), results, strict=True):
        grads[index] = result
    return tuple(grads)


def _remember_weights(ctx, inputs, output) -> None:
    _, ctx.average, *arguments, rng_state, _ = inputs
    ctx.save_for_backward(*arguments[: _BIAS + 2], rng_state)
    ctx.options = tuple(arguments[_BIAS + 2 :])


def _differentiate_weights(ctx, grad_weights):
    """Dense: the weights are recomputed, from query, key and bias alone."""
    *tensors, rng_state = ctx.saved_tensors

    def weights(query, key, bias):
        arguments = [query, key, tensors[_VALUE], tensors[_BIAS - 1], bias, tensors[_BIAS + 1], *ctx.options]
        problem = problem_from_arguments(*arguments, rng_state)
        return reference.weights(reference.in_dtype(problem, problem.lse_dtype), ctx.average)

    primals = [tensors[_QUERY], tensors[_KEY], tensors[_BIAS]]
    results = vector_jacobian_product(weights, primals, grad_weights)
    grads = [None] * len(ctx.needs_input_grad)
    for index, result in zip((2 + _QUERY, 2 + _KEY, 2 + _BIAS), results, strict=True):
        grads[index] = result
    return tuple(grads)


def vector_jacobian_product(function, primals: list, cotangents) -> list:
    """The gradients of ``function`` at ``primals``, of which any may be None and then has none."""
    given = [index for index, primal in enumerate(primals) if primal is not None]

    def of_given(*values):
        arguments = list(primals)
        for index, value in zip(given, values, strict=True):
            arguments[index] = value
        return function(*arguments)

    _, pullback = torch.func.vjp(of_given, *(primals[index] for index in given))
    results = [None] * len(primals)
    for index, gradient in zip(given, pullback(cotangents), strict=True):
        results[index] = gradient
    return results


# vmap: the mapped dimension joins the batch.


def fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[B, ...], mapped over ``dim`` or shared by all -> [size * B, ...]."""
    if tensor is None:
        return None
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _fold_mask(tensor: Tensor | None, dim: int | None, size: int, batch: int, keep_shared: bool):
    """The same for masks, whose batch may have size 1; one that all share can stay as it is."""
    if tensor is None or (dim is None and tensor.shape[0] == 1 and keep_shared):
        return tensor
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.expand(size, batch, *mapped.shape[2:]).flatten(0, 1)


def _fold_arguments(arguments: tuple, dims: tuple, size: int, keep_shared: bool = True) -> tuple[list, int]:
    """The folded problem arguments and the batch size before folding."""
    folded = list(arguments)
    query, dim = arguments[_QUERY], dims[_QUERY]
    batch = (query if dim is None else query.movedim(dim, 0)[0]).shape[0]
    for index in (_QUERY, _KEY, _VALUE, _BIAS + 1):
        folded[index] = fold(arguments[index], dims[index], size)
    for index in (_BIAS - 1, _BIAS):
        folded[index] = _fold_mask(arguments[index], dims[index], size, batch, keep_shared)
    return folded, batch


def one_by_one(operator, info, dims: tuple, arguments: tuple):
    """Map by a loop: with dropout, each example has the mask that its own seed and indices give."""
    results = []
    for example in range(info.batch_size):
        results.append(
            operator(
                *(
                    argument if dim is None else argument.select(dim, example)
                    for argument, dim in zip(arguments, dims, strict=True)
                )
            )
        )
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _map_forward(info, dims, *arguments):
    operator = _attention_forward
    if arguments[_DROPOUT] > 0.0:
        return one_by_one(operator, info, dims, arguments)
    size = info.batch_size
    folded, batch = _fold_arguments(arguments, dims, size)
    *results, residual = operator(*folded)
    results = [result.unflatten(0, (size, batch)) for result in results]
    residual = residual.expand(size, 0) if residual.dim() == 1 else residual.unflatten(0, (size, batch))
    return (*results, residual), (0, 0, 0)


def _map_backward(info, dims, *arguments):
    operator = attention_backward
    if arguments[_GIVEN + _DROPOUT] > 0.0:
        return one_by_one(operator, info, dims, arguments)
    size, needs = info.batch_size, arguments[-4:]
    # A shared bias has one gradient for each example, so it may not stay shared.
    folded, batch = _fold_arguments(arguments[_GIVEN:], dims[_GIVEN:], size, keep_shared=not needs[3])
    results = operator(
        *(fold(tensor, dim, size) for tensor, dim in zip(arguments[:_GIVEN], dims[:_GIVEN], strict=True)), *folded
    )
    unfolded = [
        result.unflatten(0, (size, batch)) if needed else result.expand(size, 0)
        for result, needed in zip(results, needs, strict=True)
    ]
    bias, bias_dim = arguments[_GIVEN + _BIAS], dims[_GIVEN + _BIAS]
    if needs[3] and (bias if bias_dim is None else bias.movedim(bias_dim, 0)[0]).shape[0] == 1:
        unfolded[3] = unfolded[3].sum(dim=1, keepdim=True)
    return tuple(unfolded), (0, 0, 0, 0)


def _map_weights(info, dims, *arguments):
    operator = attention_weights
    if arguments[2 + _DROPOUT] > 0.0:
        return one_by_one(operator, info, dims, arguments)
    folded, batch = _fold_arguments(arguments[2:], dims[2:], info.batch_size)
    result = operator(fold(arguments[0], dims[0], info.batch_size), arguments[1], *folded)
    return result.unflatten(0, (info.batch_size, batch)), 0


def _empty_with_unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.new_empty(tensor.shape)


def _tensor_arguments(operator: torch._ops.OpOverload) -> itemgetter:
    """Picks the arguments that may be tensors."""
    types = (str(argument.type) for argument in operator._schema.arguments)
    return itemgetter(*(index for index, name in enumerate(types) if "Tensor" in name))


def _wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def register(name: str, signature: str, compute, fake, differentiate, remember, map_rule, floating: itemgetter):
    """Register the operator; return the function that calls it. ``floating`` picks its floating tensors.

    Eager calls go to an autograd.Function or straight to the computation, which takes a tenth of the
    time of PyTorch's dispatcher for operators in Python. Functorch transforms need such a Function too,
    because the formulas of ``torch.library.register_autograd`` do not nest in transforms, and so does
    forward-mode differentiation, which those formulas would silently drop and the Function refuses.
    Theirs has a ``setup_context``, for which PyTorch inspects the signature at every call; the one for
    eager calls does without.
    """
    qualified = f"fastattn::{name}"
    _LIBRARY.define(f"{name}{signature}", tags=_TAGS)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, differentiate, setup_context=remember, lib=_LIBRARY)
    torch.library.register_vmap(qualified, map_rule, lib=_LIBRARY)
    operator = getattr(torch.ops.fastattn, name).default
    tensors = _tensor_arguments(operator)

    written_out = getattr(onnx, name, operator)

    def compute_or_dispatch(*arguments):
        return operator(*arguments) if is_observed(tensors(arguments)) else compute(*arguments)

    def compute_and_remember(ctx, *arguments):
        output = compute(*arguments)
        remember(ctx, arguments, output)
        return output

    backward = {"backward": staticmethod(differentiate)}
    rules = {
        "forward": staticmethod(compute_or_dispatch),
        "setup_context": staticmethod(remember),
        "vmap": staticmethod(map_rule),
    }
    transformed = type(name, (torch.autograd.Function,), backward | rules)
    eager = type(name, (torch.autograd.Function,), backward | {"forward": staticmethod(compute_and_remember)})

    def call(*arguments):
        if onnx.is_exporting():
            return written_out(*arguments)
        if torch.compiler.is_compiling():
            return operator(*arguments)
        if is_transformed():
            return transformed.apply(*arguments)
        if is_observed(tensors(arguments)):
            return operator(*arguments)
        if _wants_gradient(floating(arguments)):
            return eager.apply(*arguments)
        return compute(*arguments)

    return call


_forward_tensors = itemgetter(*_DIFFERENTIABLE)
_backward_tensors = itemgetter(*range(_GIVEN), *(_GIVEN + index for index in _DIFFERENTIABLE))

_attention_forward = register(
    "attention_forward",
    f"({_PROBLEM_SCHEMA}) -> (Tensor out, Tensor lse, Tensor out_residual)",
    _forward_operator,
    _fake_forward,
    _differentiate_forward,
    _remember_forward,
    _map_forward,
    _forward_tensors,
)


def attention_forward(*arguments) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    is_plain = is_eager() and not is_observed(_all_forward_tensors(arguments))
    if is_plain and not _wants_gradient(_forward_tensors(arguments)):
        return _forward(*arguments, wants_residual=False)[:2]
    return _attention_forward(*arguments)[:2]


class _Output(torch.autograd.Function):
    """out of :func:`attention_forward` in eager mode; a second output takes time in both directions."""

    @staticmethod
    def forward(ctx, *arguments):
        results = _forward(*arguments)
        _remember_forward(ctx, arguments, results)
        return results[0]

    @staticmethod
    def backward(ctx, grad_out):
        return _differentiate_forward(ctx, grad_out, None)


def attention_output(*arguments) -> Tensor:
    """out of :func:`attention_forward` for a call that does not want its lse."""
    if not is_eager() or is_observed(_all_forward_tensors(arguments)):
        return attention_forward(*arguments)[0]
    if _wants_gradient(_forward_tensors(arguments)):
        return _Output.apply(*arguments)
    return _forward(*arguments, wants_lse=False, wants_residual=False)[0]


def attention_gradients(*arguments) -> tuple[Tensor | None, ...]:
    """The results of :func:`attention_backward`, None for those not needed."""
    is_plain = is_eager() and not is_observed(_all_backward_tensors(arguments))
    if is_plain and not _wants_gradient(_backward_tensors(arguments)):
        return _gradients(*arguments)
    results = attention_backward(*arguments)
    return tuple(result if needed else None for result, needed in zip(results, arguments[-4:], strict=True))


attention_backward = register(
    "attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? out_residual, {_PROBLEM_SCHEMA}, "
    "bool need_query, bool need_key, bool need_value, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _differentiate_backward,
    _remember_backward,
    _map_backward,
    _backward_tensors,
)
attention_weights = register(
    "attention_weights",
    f"(Tensor lse, bool average, {_PROBLEM_SCHEMA}) -> Tensor",
    _weights,
    _fake_weights,
    _differentiate_weights,
    _remember_weights,
    _map_weights,
    itemgetter(0, *(2 + index for index in _DIFFERENTIABLE)),
)
_all_forward_tensors, _all_backward_tensors = map(
    _tensor_arguments, (torch.ops.fastattn.attention_forward.default, torch.ops.fastattn.attention_backward.default)
)

integrate_on_import("torch.utils.flop_counter", "fastattn.integrations.flops")
integrate_on_import("torch.distributed.tensor", "fastattn.integrations.sharding")
