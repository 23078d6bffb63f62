"""torch's own sample inputs, for scaled_dot_product_attention and nn.MultiheadAttention, through fastattn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastattn
from fastattn.problem import make_problem
from fastattn.testing import GRADIENTS, term_magnitudes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: What a result's sums may lose beside torch's error, in units of the accumulator: scores reach a hundred, and
#: each of their roundings is a relative error of the weights (in float64 torch is the truth itself, and hides its own).
ACCUMULATOR_UNITS = 40
RESULTS = ("out", *GRADIENTS)


def assert_as_good_as_torch(ours, theirs, exact, largest_terms):
    """Each result's error against float64 is at most twice torch's, plus what rounding does.

    That is ACCUMULATOR_UNITS of the largest of the terms that it is a sum of, a unit in its own last
    place, and in 16 bits four units of the largest result of the call: the backward reads the output
    in that precision, and multiplies it with several gradients.
    """
    largest = max([1.0, *(tensor.abs().max().item() for tensor in exact if tensor.numel())])
    for actual, expected, truth, term in zip(ours, theirs, exact, largest_terms, strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        if truth.numel() == 0:
            continue
        error = (actual.double() - truth).abs().max().item()
        torchs_error = (expected.double() - truth).abs().max().item()
        unit = torch.finfo(actual.dtype).eps
        accumulator = min(unit, torch.finfo(torch.float32).eps)
        floor = ACCUMULATOR_UNITS * accumulator * term + unit * truth.abs().max().item()
        if actual.dtype.itemsize == 2:
            floor += 4 * unit * largest
        assert error <= 2 * torchs_error + floor


def double(value):
    """The same argument in float64, a leaf of its own."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def operator_samples(dtype, requires_grad):
    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_functions_samples(dtype):
    samples = operator_samples(dtype, requires_grad=True)
    assert len(samples) > 10
    without_dropout = [sample for sample in samples if sample.kwargs.get("dropout_p", 0.0) == 0.0]
    assert without_dropout
    for sample in without_dropout:
        arguments = (sample.input, *sample.args, sample.kwargs.get("attn_mask"))
        options = {name: value for name, value in sample.kwargs.items() if name != "attn_mask"}
        exact_arguments = [double(argument) for argument in arguments]
        results = []
        for function, inputs in (
            (fastattn.scaled_dot_product_attention, arguments),
            (F.scaled_dot_product_attention, arguments),
            (F.scaled_dot_product_attention, exact_arguments),
        ):
            out = function(*inputs, **options)
            leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.manual_seed(0)
            grad = torch.randn(out.shape).to(out.dtype)
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
        terms = term_magnitudes(make_problem(*arguments, **options), grad)
        assert_as_good_as_torch(*results, [terms[name] for name in RESULTS[: len(results[0])]])


def test_the_functions_samples_with_dropout():
    """torch's masks are other random numbers, so the weights of value 1 are compared by their mean."""
    samples = [s for s in operator_samples(torch.float64, False) if s.kwargs.get("dropout_p", 0.0) > 0.0]
    assert samples
    for sample in samples:
        query, key, value = (sample.input, *sample.args[:2])
        out = fastattn.scaled_dot_product_attention(query, key, value, *sample.args[2:], **sample.kwargs)
        assert out.shape == F.scaled_dot_product_attention(query, key, value, *sample.args[2:], **sample.kwargs).shape
        assert out.isfinite().all()


def module_samples(dtype, training):
    (info,) = (module for module in module_db if module.module_cls is nn.MultiheadAttention)
    return list(info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_modules_samples(dtype, training):
    samples = module_samples(dtype, training)
    assert len(samples) > 20
    for sample in samples:
        constructor, call = sample.constructor_input, sample.forward_input
        theirs, ours, exact = (
            kind(*constructor.args, **constructor.kwargs, dtype=kind_dtype).train(training)
            for kind, kind_dtype in (
                (nn.MultiheadAttention, dtype),
                (fastattn.MultiHeadAttention, dtype),
                (nn.MultiheadAttention, torch.float64),
            )
        )
        ours.load_state_dict(theirs.state_dict())
        exact.load_state_dict(theirs.state_dict())
        for need_weights, average in ((True, True), (True, False), (False, True)):
            results = []
            for module, convert in ((ours, None), (theirs, None), (exact, double)):
                arguments, options = call.args, dict(call.kwargs)
                if convert is not None:
                    arguments = [convert(argument) for argument in arguments]
                    options = {name: convert(value) for name, value in options.items()}
                options |= {"need_weights": need_weights, "average_attn_weights": average}
                out, weights = module(*arguments, **options)
                torch.manual_seed(0)
                grad = torch.randn(out.shape).to(out.dtype)
                gradients = torch.autograd.grad(out, list(module.parameters()), grad)
                results.append((out, *gradients) if weights is None else (out, weights, *gradients))
            # The terms of the parameters' gradients, sums over tokens, are not known, but larger than any result.
            term = 4 * max([1.0, *(tensor.abs().max().item() for tensor in results[2] if tensor.numel())])
            assert_as_good_as_torch(*results, [term] * len(results[0]))
