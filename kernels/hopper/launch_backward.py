"""From a problem and its saved forward to the launches of the backward kernels."""

import dataclasses
import os

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..arguments import on_device
from ..remembered import Call, remembered
from .backward_fused import gradients
from .backward_keys import gradients_of_keys
from .backward_keys_wide import gradients_of_wide_keys
from .backward_queries import gradients_of_queries
from .capability import orders, tma_reason
from .configs import BackwardConfig, backward_config, keys_of_program, tile_columns
from .launch import compiler_options, multiprocessors, stand_in, tile_descriptor, tile_layout
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


def in_place(gradients) -> list[bool]:
    """Which gradients TMA can write itself."""
    return [gradient is not None and tma_reason("output", gradient) is None for gradient in gradients]


def targets_like(call: Call, name: str, tensors, gradients) -> list[torch.Tensor]:
    """Where a kernel writes each gradient: in place where TMA can, else (or where None is asked for) a stand-in."""
    return [
        gradient if direct else stand_in(tensor if gradient is None else gradient)
        for tensor, gradient, direct in zip(tensors, gradients, call.once(name, in_place, gradients), strict=True)
    ]


def deliver(targets, gradients) -> None:
    """Copy the stand-ins to the gradients that they stand for."""
    for target, gradient in zip(targets, gradients, strict=True):
        if gradient is not None and target is not gradient:
            gradient.copy_(target)


def seen_part(gradient: torch.Tensor | None, seen: slice | None) -> torch.Tensor | None:
    """dK or dV of the seen keys (None: all); zeros are written to the others, which no query sees."""
    if gradient is None or seen is None:
        return gradient
    gradient[:, :, : seen.start].zero_()
    gradient[:, :, seen.stop :].zero_()
    return gradient[:, :, seen]


def query_descriptors(problem, grad_out, lse_2, delta, rows: int) -> dict:
    """Descriptors of what streams past a block of keys, in tiles of ``rows`` queries."""
    return {
        "q_desc": tile_descriptor(problem.query, rows),
        "do_desc": tile_descriptor(grad_out, rows),
        "lse_desc": row_descriptor(lse_2, rows),
        "delta_desc": row_descriptor(delta, rows),
    }


def key_gradients(call, problem, band, config, grad_out, lse_2, delta, lengths, grad_key, grad_value) -> None:
    """dK and dV."""
    targets = targets_like(call, "key targets", (problem.key, problem.value), (grad_key, grad_value))
    described = {"k_desc": problem.key, "v_desc": problem.value, "dk_desc": targets[0], "dv_desc": targets[1]}

    def arguments() -> tuple[int, dict]:
        plan = keys_plan(problem, band, config, multiprocessors(problem.query.device))
        return plan.programs, {
            **query_descriptors(problem, grad_out, lse_2, delta, config.block_m),
            **{name: tile_descriptor(tensor, 64) for name, tensor in described.items()},
            "lengths": lengths,
            **plan.named(),
            **compiler_options(config),
        }

    wide = keys_of_program(problem.query.shape[-1]) == 64
    streamed = {"q_desc": problem.query, "do_desc": grad_out, "lse_desc": lse_2, "delta_desc": delta}
    tensors = {**streamed, **described, "lengths": lengths}
    call.launch(gradients_of_wide_keys if wide else gradients_of_keys, tensors, arguments)
    deliver(targets, (grad_key, grad_value))


def query_gradients(call, problem, band, config, grad_out, lse_2, delta, lengths, grad_query) -> None:
    """dQ."""
    targets = targets_like(call, "query targets", (problem.query,), (grad_query,))
    rows = {"q_desc": problem.query, "do_desc": grad_out, "dq_desc": targets[0]}
    keys = {"k_desc": problem.key, "v_desc": problem.value}
    pointers = {"lse_ptr": lse_2, "delta_ptr": delta, "lengths": lengths}

    def arguments() -> tuple[int, dict]:
        plan = queries_plan(problem, band, config, multiprocessors(problem.query.device))
        return plan.programs, {
            **{name: tile_descriptor(tensor, 64) for name, tensor in rows.items()},
            **{name: tile_descriptor(tensor, config.block_n) for name, tensor in keys.items()},
            **pointers,
            **plan.named(),
            **compiler_options(config),
        }

    call.launch(gradients_of_queries, {**rows, **keys, **pointers}, arguments)
    deliver(targets, (grad_query,))


def all_gradients(
    call, problem, band, config, grad_out, lse_2, delta, lengths, grad_query, grad_key, grad_value
) -> None:
    """dQ, dK and dV in one sweep."""
    query = problem.query
    targets = targets_like(call, "key targets", (problem.key, problem.value), (grad_key, grad_value))
    B, H, L, D = query.shape
    total = torch.zeros(B, H, L, D, dtype=torch.float32, device=query.device)
    counters = torch.zeros(B * H * -(-L // config.block_m), dtype=torch.int32, device=query.device)

    def arguments() -> tuple[int, dict]:
        plan = fused_plan(problem, band, config, multiprocessors(query.device))
        return plan.programs, {
            **query_descriptors(problem, grad_out, lse_2, delta, config.block_m),
            "k_desc": tile_descriptor(problem.key, 128),
            "v_desc": tile_descriptor(problem.value, 128),
            "dq_desc": tile_descriptor(total, config.block_m, tile_columns(D) // 2),
            "dk_desc": tile_descriptor(targets[0], 64),
            "dv_desc": tile_descriptor(targets[1], 64),
            "counters": counters,
            "lengths": lengths,
            **plan.named(),
            "DS_LAYOUT": tile_layout((128, config.block_m), query.dtype),
            **compiler_options(config),
        }

    streamed = {"q_desc": query, "do_desc": grad_out, "lse_desc": lse_2, "delta_desc": delta}
    kept = {"k_desc": problem.key, "v_desc": problem.value, "dk_desc": targets[0], "dv_desc": targets[1]}
    added = {"dq_desc": total, "counters": counters, "lengths": lengths}
    call.launch(gradients, {**streamed, **kept, **added}, arguments)
    torch.mul(total, problem.scale, out=grad_query)
    deliver(targets, (grad_key, grad_value))


def backward_numbers(problem, grad_out, config) -> tuple[Band, BackwardConfig, slice | None, bool] | None:
    """(band, configuration, which keys are seen if not all, whether TMA can read ``grad_out``), or None for no work."""
    if not problem.query.numel() or not problem.key.numel():
        return None
    band = band_of(problem)
    seen = seen_keys(problem, band)
    config = config or chosen_config(without_unseen(problem, seen), band)
    if torch.are_deterministic_algorithms_enabled():
        config = config.deterministic()
    return band, config, seen, tma_reason("grad_out", grad_out) is None


def backward(
    problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, config=None, call: Call | None = None
) -> None:
    """Launch the backward kernels on the current stream; see kernels/hopper/__init__.py.

    Gradients given as None are not computed (dK and dV come from one kernel: asked for one, it makes both). ``call``
    is what is remembered of calls alike, with the same :func:`orders`, where the caller has it already.
    """
    tensors = (out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value)
    call = call or remembered(backward, problem, tensors, config, *orders())
    numbers = call.once("numbers", backward_numbers, problem, grad_out, config)
    if numbers is None:
        for gradient in (grad_query, grad_key, grad_value):
            if gradient is not None:
                gradient.zero_()
        return
    band, config, seen, readable = numbers
    if not readable:
        grad_out = grad_out.contiguous()
    grad_key, grad_value = seen_part(grad_key, seen), seen_part(grad_value, seen)
    problem = without_unseen(problem, seen)
    lengths = problem.key_lengths if problem.key_lengths is not None else lse
    with on_device(problem.query):
        rows = row_statistics(call, out, lse, grad_out, grad_lse)
        common = call, problem, band, config, grad_out, *rows, lengths
        wants_keys = grad_key is not None or grad_value is not None
        if config.fused and wants_keys and grad_query is not None:
            all_gradients(*common, grad_query, grad_key, grad_value)
            return
        if wants_keys:
            key_gradients(*common, grad_key, grad_value)
        if grad_query is not None:
            query_gradients(*common, grad_query)
