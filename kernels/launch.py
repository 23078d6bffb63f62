"""From a problem and its buffers to launches on the current stream. No synchronisation, nothing data-dependent."""

import math
from contextlib import nullcontext

import torch
import triton

from .arguments import (
    architecture_of,
    descriptor,
    head_strides,
    heads_together,
    multiprocessors,
    padded,
    problem_arguments,
    tma_ready,
)
from .backward import grad_bias_kernel, grad_key_value, grad_query_kernel, row_statistics
from .configs import Config, choose
from .decode import combine_parts, decode_part
from .forward import attention_forward
from .weights import attention_weights

#: A program should have at least this many keys of its own in a split.
KEYS_PER_SPLIT = 256
#: Rows (queries times heads of a group) up to which splitting the keys is considered.
DECODE_ROWS = 64
STATISTICS_ROWS = 64
MOST_SPLITS = 128
#: The share of the best occupation that is good enough for fewer splits.
NEARLY = 0.9


def on_device(tensor: torch.Tensor):
    """The tensor's device as the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def chosen(kernel: str, problem, config: Config | None) -> Config:
    if config is not None:
        return config
    head_dim = max(padded(problem.query.shape[-1]), padded(problem.value.shape[-1]))
    return choose(kernel, problem.query.element_size(), head_dim, architecture_of(problem.query))


def tile_arguments(config: Config) -> dict:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def by_tma(config: Config, rows: int, **tensors: torch.Tensor) -> dict:
    """TMA, and then descriptors of these tensors in boxes of ``rows`` rows in place of pointers."""
    first = next(iter(tensors.values()))
    if not (config.tma and tma_ready(*tensors.values()) and (architecture_of(first) >= 90 or not first.is_cuda)):
        return {"TMA": False}
    return {"TMA": True} | {name: descriptor(tensor, rows) for name, tensor in tensors.items()}


def forward(problem, out: torch.Tensor, lse: torch.Tensor, config: Config | None = None) -> None:
    """Write out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]; an explicit configuration is for measuring."""
    batch, heads, Lq = lse.shape
    if not lse.numel():
        return
    if not problem.key.shape[2]:
        out.zero_()
        lse.fill_(-math.inf)
        return
    if config is None and splits_keys(problem):
        return decode(problem, out, lse, decode_splits(problem))
    config = chosen("forward", problem, config)
    arguments = problem_arguments(problem) | by_tma(config, config.block_n, key=problem.key, value=problem.value)
    with on_device(out):
        attention_forward[(triton.cdiv(Lq, config.block_m) * batch * heads,)](
            out=out,
            lse=lse,
            together=together_by_group(problem),
            **arguments,
            **head_strides("o", out),
            **tile_arguments(config),
        )


def together_by_group(problem) -> int:
    """How many query heads take turns over keys and values in the L2 cache."""
    heads = problem.key.shape[0] * problem.key.shape[1]
    return heads_together(heads, problem.key, problem.value) * problem.group_size


def splits_keys(problem) -> bool:
    """Whether the forward pass is that of decoding: a group's few queries in one tile, the keys split."""
    rows = problem.group_size * problem.query.shape[2]
    few = 0 < rows <= DECODE_ROWS and problem.query.shape[0] > 0
    return few and problem.key.shape[2] >= 2 * KEYS_PER_SPLIT and problem.dropout_p == 0 and problem.scale > 0


def decode_splits(problem) -> int:
    """Into how many parts the keys are split, by the shape and the device alone.

    The fewest that keep the device nearly as busy as the best number does (as in FlashAttention's heuristic).
    """
    batch, key_heads, Lk, _ = problem.key.shape
    programs = batch * key_heads * triton.cdiv(problem.group_size * problem.query.shape[2], 16)
    slots = 2 * multiprocessors(problem.query.get_device()) if problem.query.is_cuda else 8
    most = max(1, min(Lk // KEYS_PER_SPLIT, MOST_SPLITS))
    busy = [programs * splits / slots / math.ceil(programs * splits / slots) for splits in range(1, most + 1)]
    return next(splits for splits, share in enumerate(busy, 1) if share >= NEARLY * max(busy))


def decode(problem, out: torch.Tensor, lse: torch.Tensor, splits: int, config: Config | None = None) -> None:
    """The forward pass with the keys split over programs."""
    config = chosen("decode", problem, config)
    batch, heads, Lq = lse.shape
    key_heads, Lk = problem.key.shape[1:3]
    blocks = triton.cdiv(problem.group_size * Lq, config.block_m)
    keys_per_split = triton.cdiv(triton.cdiv(Lk, splits), config.block_n) * config.block_n
    DV = out.shape[-1]
    part_out = lse.new_empty(splits, lse.numel(), DV)
    part_sum, part_max = lse.new_empty(2, splits, lse.numel())
    arguments = problem_arguments(problem)
    unused = ("rng_state", "threshold", "keep_scale", "POSITIVE_SCALE")
    with on_device(out):
        decode_part[(batch * key_heads * blocks * splits,)](
            part_out=part_out,
            part_sum=part_sum,
            part_max=part_max,
            **{name: value for name, value in arguments.items() if name not in unused},
            splits=splits,
            keys_per_split=keys_per_split,
            **tile_arguments(config),
        )
        combine_parts[(lse.numel(),)](
            part_out,
            part_sum,
            part_max,
            out,
            lse,
            **head_strides("o", out),
            Lq=Lq,
            heads=heads,
            splits=splits,
            DV=DV,
            BLOCK_DV=padded(DV),
        )


def statistics(problem, out, lse, grad_out, grad_lse) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse in log2 units, delta = rowsum(dO * O) - d lse), fp32 [B, Hq, Lq]."""
    batch, heads, Lq = lse.shape
    log2_lse, delta = lse.new_empty(2, *lse.shape)
    with on_device(out):
        row_statistics[(triton.cdiv(Lq, STATISTICS_ROWS) * batch * heads,)](
            out,
            lse,
            grad_out,
            grad_lse,
            log2_lse,
            delta,
            **head_strides("o", out),
            **head_strides("do", grad_out),
            Lq=Lq,
            heads=heads,
            DV=out.shape[-1],
            BLOCK_DV=padded(out.shape[-1]),
            BLOCK_M=STATISTICS_ROWS,
        )
    return log2_lse, delta


def backward(
    problem,
    out,
    lse,
    grad_out,
    grad_lse,
    grad_query,
    grad_key,
    grad_value,
    grad_bias,
    key_value_config: Config | None = None,
    query_config: Config | None = None,
) -> None:
    """Write the gradients that are asked for; explicit configurations are for measuring."""
    batch, heads, Lq = lse.shape
    key_heads, Lk = problem.key.shape[1:3]
    if not lse.numel() or not Lk:
        for gradient in (grad_query, grad_key, grad_value):
            if gradient is not None:
                gradient.zero_()
        return
    log2_lse, delta = statistics(problem, out, lse, grad_out, grad_lse)
    shared = {
        "grad_out": grad_out,
        "log2_lse": log2_lse,
        "delta": delta,
        **problem_arguments(problem),
        **head_strides("do", grad_out),
    }
    with on_device(out):
        if grad_key is not None or grad_value is not None:
            config = chosen("grad_key_value", problem, key_value_config)
            given = grad_key if grad_key is not None else grad_value
            grad_key_value[(triton.cdiv(Lk, config.block_n) * batch * key_heads,)](
                grad_key=grad_key,
                grad_value=grad_value,
                together=heads_together(batch * key_heads, problem.query, grad_out),
                **shared | by_tma(config, config.block_m, query=problem.query, grad_out=grad_out),
                **head_strides("dk", grad_key if grad_key is not None else given),
                **head_strides("dv", grad_value if grad_value is not None else given),
                **tile_arguments(config),
            )
        if grad_query is not None:
            config = chosen("grad_query", problem, query_config)
            grad_query_kernel[(triton.cdiv(Lq, config.block_m) * batch * heads,)](
                grad_query=grad_query,
                together=together_by_group(problem),
                **shared | by_tma(config, config.block_n, key=problem.key, value=problem.value),
                **head_strides("dq", grad_query),
                **tile_arguments(config),
            )
        if grad_bias is not None:
            _launch_grad_bias(problem, grad_bias, shared)


def _launch_grad_bias(problem, grad_bias: torch.Tensor, shared: dict) -> None:
    config = chosen("grad_bias", problem, None)
    full = (*problem.query.shape[:3], problem.key.shape[2])
    summed = [size == 1 and whole != 1 for size, whole in zip(grad_bias.shape, full, strict=True)]
    sizes = grad_bias.shape
    tiles = 1 if summed[2] else triton.cdiv(sizes[2], config.block_m)
    tiles *= 1 if summed[3] else triton.cdiv(sizes[3], config.block_n)
    grad_bias_kernel[(tiles * sizes[0] * sizes[1],)](
        grad_bias=grad_bias,
        **shared,
        batch=full[0],
        **tile_arguments(config),
        **dict(zip(("SUM_B", "SUM_H", "SUM_M", "SUM_N"), summed, strict=True)),
    )


def weights(problem, lse: torch.Tensor, out: torch.Tensor, average: bool) -> None:
    """Write the attention weights [B, Lq, Lk] (mean over the heads) or [B, Hq, Lq, Lk]."""
    if not out.numel():
        return
    config = chosen("weights", problem, None)
    arguments = problem_arguments(problem)
    unused = ("value", "stride_vb", "stride_vh", "stride_vn", "DV", "BLOCK_DV", "POSITIVE_SCALE")
    tiles = triton.cdiv(out.shape[-2], config.block_m) * triton.cdiv(out.shape[-1], config.block_n)
    with on_device(out):
        attention_weights[(tiles * math.prod(out.shape[:-2]),)](
            lse=lse,
            weights=out,
            **{name: value for name, value in arguments.items() if name not in unused},
            **tile_arguments(config),
            AVERAGE=average,
        )
