"""From a problem and its saved forward to the launches of the backward kernels."""

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .backward_keys import gradients_of_keys
from .backward_queries import gradients_of_queries
from .capability import tma_reason
from .configs import backward_config
from .launch import multiprocessors, on_device, tile_descriptor, tile_layout, writable
from .plan import band_of, keys_plan, queries_plan
from .statistics import row_statistics


def row_descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of row statistics [heads, padded rows] in boxes of one head's ``rows``."""
    box = [1, rows]
    layout = tile_layout(tuple(box), tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)


def backward(problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, config=None) -> None:
    """Launch the backward kernels on the current stream; see :func:`fastattn.kernels.hopper.backward`.

    Gradients given as None are not computed (dK and dV come from one kernel: asked for one, it makes both).
    """
    query, key, value = problem.query, problem.key, problem.value
    wanted = [gradient for gradient in (grad_query, grad_key, grad_value) if gradient is not None]
    if not query.numel() or not key.numel():
        for gradient in wanted:
            gradient.zero_()
        return
    if tma_reason("grad_out", grad_out):
        grad_out = grad_out.contiguous()
    band = band_of(problem)
    config = config or backward_config(query.shape[-1], band.has_left or band.has_right)
    programs = multiprocessors(query.device)
    lengths = problem.key_lengths if problem.key_lengths is not None else lse
    with on_device(query):
        lse_2, delta = row_statistics(out, lse, grad_out, grad_lse)
        if grad_key is not None or grad_value is not None:
            targets = [
                torch.empty_like(tensor) if gradient is None else writable(gradient)
                for gradient, tensor in ((grad_key, key), (grad_value, value))
            ]
            plan = keys_plan(problem, band, config, programs)
            gradients_of_keys[(plan.programs,)](
                tile_descriptor(query, config.block_m),
                tile_descriptor(grad_out, config.block_m),
                row_descriptor(lse_2, config.block_m),
                row_descriptor(delta, config.block_m),
                tile_descriptor(key, 64),
                tile_descriptor(value, 64),
                *(tile_descriptor(target, 64) for target in targets),
                lengths,
                **plan.scalars,
                OPTIONS=plan.options,
                num_warps=4,
                maxnreg=config.entry_registers,
            )
            for gradient, target in zip((grad_key, grad_value), targets, strict=True):
                if gradient is not None and target is not gradient:
                    gradient.copy_(target)
        if grad_query is not None:
            target = writable(grad_query)
            plan = queries_plan(problem, band, config, programs)
            gradients_of_queries[(plan.programs,)](
                tile_descriptor(query, 64),
                tile_descriptor(grad_out, 64),
                tile_descriptor(key, config.block_n),
                tile_descriptor(value, config.block_n),
                tile_descriptor(target, 64),
                lse_2,
                delta,
                lengths,
                **plan.scalars,
                OPTIONS=plan.options,
                num_warps=4,
                maxnreg=config.entry_registers,
            )
            if target is not grad_query:
                grad_query.copy_(target)
