"""From a problem and its saved forward to the launches of the backward kernels."""

import dataclasses
import os

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .backward_fused import gradients
from .backward_keys import gradients_of_keys
from .backward_keys_wide import gradients_of_wide_keys
from .backward_queries import gradients_of_queries
from .capability import tma_reason
from .configs import BackwardConfig, backward_config, keys_of_program, tile_columns
from .launch import compiler_options, multiprocessors, on_device, tile_descriptor, tile_layout, writable
from .plan import Band, band_of, fused_is_faster, fused_plan, keys_plan, queries_plan, seen_keys, without_unseen
from .statistics import row_statistics


def chosen_config(problem, band: Band) -> BackwardConfig:
    """The configuration for a call; ``FASTATTN_HOPPER_UNORDERED=1`` lets a fused one add dQ's parts in any order.

    That is a little faster, but the last bits of dQ change from run to run, so never under
    ``torch.use_deterministic_algorithms``.
    """
    config = backward_config(problem.query.shape[-1], band.has_left or band.has_right)
    if config.fused and not fused_is_faster(problem, band, multiprocessors(problem.query.device)):
        config = dataclasses.replace(config, fused=False)
    unordered = os.environ.get("FASTATTN_HOPPER_UNORDERED") == "1" and not torch.are_deterministic_algorithms_enabled()
    return dataclasses.replace(config, ordered=False) if unordered else config


def row_descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of row statistics [heads, padded rows] in boxes of one head's ``rows``."""
    box = [1, rows]
    layout = tile_layout(tuple(box), tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)


def targets_like(tensors, gradients) -> list[torch.Tensor]:
    """Where a kernel writes each gradient: in place where TMA can, else (or where None is asked for) a stand-in."""
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if gradient is None else writable(gradient)
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


def deliver(targets, gradients) -> None:
    """Copy the stand-ins to the gradients that they stand for."""
    for target, gradient in zip(targets, gradients, strict=True):
        if gradient is not None and target is not gradient:
            gradient.copy_(target)


def seen_part(gradient: torch.Tensor | None, low: int, high: int) -> torch.Tensor | None:
    """dK or dV of the keys from low up to high; zeros are written to the others, which no query sees."""
    if gradient is None or high - low == gradient.shape[2]:
        return gradient
    gradient[:, :, :low].zero_()
    gradient[:, :, high:].zero_()
    return gradient[:, :, low:high]


def query_descriptors(problem, grad_out, lse_2, delta, rows: int) -> tuple:
    """Descriptors of what streams past a block of keys, in tiles of ``rows`` queries."""
    tiles = (tile_descriptor(tensor, rows) for tensor in (problem.query, grad_out))
    return *tiles, row_descriptor(lse_2, rows), row_descriptor(delta, rows)


def key_gradients(problem, band, config, grad_out, lse_2, delta, lengths, grad_key, grad_value) -> None:
    """dK and dV."""
    targets = targets_like((problem.key, problem.value), (grad_key, grad_value))
    plan = keys_plan(problem, band, config, multiprocessors(problem.query.device))
    wide = keys_of_program(problem.query.shape[-1]) == 64
    kernel = gradients_of_wide_keys if wide else gradients_of_keys
    kernel[(plan.programs,)](
        *query_descriptors(problem, grad_out, lse_2, delta, config.block_m),
        *(tile_descriptor(tensor, 64) for tensor in (problem.key, problem.value, *targets)),
        lengths,
        **plan.scalars,
        OPTIONS=plan.options,
        **compiler_options(config),
    )
    deliver(targets, (grad_key, grad_value))


def query_gradients(problem, band, config, grad_out, lse_2, delta, lengths, grad_query) -> None:
    """dQ."""
    targets = targets_like((problem.query,), (grad_query,))
    plan = queries_plan(problem, band, config, multiprocessors(problem.query.device))
    gradients_of_queries[(plan.programs,)](
        tile_descriptor(problem.query, 64),
        tile_descriptor(grad_out, 64),
        tile_descriptor(problem.key, config.block_n),
        tile_descriptor(problem.value, config.block_n),
        tile_descriptor(targets[0], 64),
        lse_2,
        delta,
        lengths,
        **plan.scalars,
        OPTIONS=plan.options,
        **compiler_options(config),
    )
    deliver(targets, (grad_query,))


def all_gradients(problem, band, config, grad_out, lse_2, delta, lengths, grad_query, grad_key, grad_value) -> None:
    """dQ, dK and dV in one sweep."""
    query = problem.query
    if torch.are_deterministic_algorithms_enabled():
        config = config.deterministic()
    targets = targets_like((problem.key, problem.value), (grad_key, grad_value))
    plan = fused_plan(problem, band, config, multiprocessors(query.device))
    B, H, L, D = query.shape
    total = torch.zeros(B, H, L, D, dtype=torch.float32, device=query.device)
    counters = torch.zeros(B * H * -(-L // config.block_m), dtype=torch.int32, device=query.device)
    gradients[(plan.programs,)](
        *query_descriptors(problem, grad_out, lse_2, delta, config.block_m),
        tile_descriptor(problem.key, 128),
        tile_descriptor(problem.value, 128),
        tile_descriptor(total, config.block_m, tile_columns(D) // 2),
        *(tile_descriptor(target, 64) for target in targets),
        counters,
        lengths,
        **plan.scalars,
        DS_LAYOUT=tile_layout((128, config.block_m), query.dtype),
        OPTIONS=plan.options,
        **compiler_options(config),
    )
    torch.mul(total, problem.scale, out=grad_query)
    deliver(targets, (grad_key, grad_value))


def backward(problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, config=None) -> None:
    """Launch the backward kernels on the current stream; see kernels/hopper/__init__.py.

    Gradients given as None are not computed (dK and dV come from one kernel: asked for one, it makes both).
    """
    query, key = problem.query, problem.key
    if not query.numel() or not key.numel():
        for gradient in (grad_query, grad_key, grad_value):
            if gradient is not None:
                gradient.zero_()
        return
    if tma_reason("grad_out", grad_out):
        grad_out = grad_out.contiguous()
    band = band_of(problem)
    grad_key, grad_value = (seen_part(gradient, *seen_keys(problem, band)) for gradient in (grad_key, grad_value))
    problem = without_unseen(problem, band)
    config = config or chosen_config(problem, band)
    lengths = problem.key_lengths if problem.key_lengths is not None else lse
    with on_device(query):
        common = problem, band, config, grad_out, *row_statistics(out, lse, grad_out, grad_lse), lengths
        wants_keys = grad_key is not None or grad_value is not None
        if config.fused and wants_keys and grad_query is not None:
            all_gradients(*common, grad_query, grad_key, grad_value)
            return
        if wants_keys:
            key_gradients(*common, grad_key, grad_value)
        if grad_query is not None:
            query_gradients(*common, grad_query)
