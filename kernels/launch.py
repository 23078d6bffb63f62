"""From a problem and its buffers to launches on the current stream. No synchronisation, nothing data-dependent."""

import math

import torch
import triton

from .arguments import (
    architecture_of,
    boxes,
    dropout_of,
    heads_together,
    launch_arguments,
    multiprocessors_of,
    on_device,
    padded,
    rows_of,
)
from .backward_bias import gradient_of_bias
from .backward_keys import gradients_of_keys
from .backward_queries import gradients_of_queries
from .configs import Config, choose
from .decode import combine_parts, decode_part
from .finite import mark_nonfinite
from .forward import attention_forward
from .large_scores import split_large_lse
from .statistics import row_statistics
from .weights import attention_weights

#: A program should have at least this many keys of its own in a split.
KEYS_PER_SPLIT = 256
#: By element size: up to which |lse| its rounding costs the gradients no more than their own sums do, some 16 units of
#: fp32, a sixteenth of a unit of fp16 and less of bf16's.
LARGEST_WHOLE_LSE = {2: 1024.0, 4: 16.0}
#: Rows (queries times heads of a group) up to which splitting the keys is considered.
DECODE_ROWS = 64
STATISTICS_ROWS = 64
MARKED_ROWS = 32
MOST_SPLITS = 128
#: The share of the best occupation that is good enough for fewer splits.
NEARLY = 0.9


def chosen(kernel: str, problem, config: Config | None) -> Config:
    if config is not None:
        return config
    head_dim = max(padded(problem.query.shape[-1]), padded(problem.value.shape[-1]))
    elementwise = problem.attn_mask is not None or problem.bias is not None or problem.dropout_p > 0
    return choose(kernel, problem.query.element_size(), head_dim, architecture_of(problem.query), elementwise)


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
    with on_device(out):
        attention_forward[(triton.cdiv(Lq, config.block_m) * batch * heads,)](
            value=rows_of(problem.value),
            out=rows_of(out),
            lse=lse,
            dropout=dropout_of(problem),
            nonfinite=nonfinite_heads(problem, problem.value),
            together=together_by_group(problem),
            **boxes(config, config.block_n, key=problem.key, value=problem.value),
            **launch_arguments(problem, config),
        )


def nonfinite_heads(problem, tensor: torch.Tensor) -> torch.Tensor | None:
    """int32 [B * Hkv]: which heads of K or V hold an infinity or a NaN, where a mask or bias may hide one."""
    if problem.attn_mask is None and problem.bias is None:
        return None
    batch, heads, length, head_dim = tensor.shape
    marks = torch.zeros(batch * heads, dtype=torch.int32, device=tensor.device)
    mark_nonfinite[(triton.cdiv(length, MARKED_ROWS) * batch * heads,)](
        rows_of(tensor), marks, heads, length, D=head_dim, BLOCK_L=MARKED_ROWS, BLOCK_D=padded(head_dim)
    )
    return marks


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
    slots = 2 * multiprocessors_of(problem.query)
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
    part_out = lse.new_empty(splits, lse.numel(), out.shape[-1])
    part_sum, part_max = lse.new_empty(2, splits, lse.numel())
    arguments = launch_arguments(problem, config)
    with on_device(out):
        decode_part[(batch * key_heads * blocks * splits,)](
            value=rows_of(problem.value),
            part_out=part_out,
            part_sum=part_sum,
            part_max=part_max,
            splits=splits,
            keys_per_split=keys_per_split,
            **arguments,
        )
        combine_parts[(lse.numel(),)](
            part_out,
            part_sum,
            part_max,
            rows_of(out),
            lse,
            sizes=arguments["sizes"],
            splits=splits,
            OPTIONS=arguments["OPTIONS"],
        )


def statistics(problem, out, lse, grad_out, grad_lse) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse in log2 units, delta = rowsum(dO * O) - d lse), fp32 [B, Hq, Lq]."""
    batch, heads, Lq = lse.shape
    log2_lse, delta = lse.new_empty(2, *lse.shape)
    with on_device(out):
        row_statistics[(triton.cdiv(Lq, STATISTICS_ROWS) * batch * heads,)](
            rows_of(out),
            lse,
            rows_of(grad_out),
            grad_lse,
            log2_lse,
            delta,
            Lq=Lq,
            heads=heads,
            DV=out.shape[-1],
            BLOCK_DV=padded(out.shape[-1]),
            BLOCK_M=STATISTICS_ROWS,
        )
    return log2_lse, delta


def large_lse_split(problem, lse: torch.Tensor, log2_lse: torch.Tensor, config: Config) -> torch.Tensor:
    """Write what P is recomputed from to ``log2_lse``, and return the factors beside it (see large_scores.py)."""
    batch, heads, Lq = lse.shape
    rescale = torch.empty_like(log2_lse)
    with on_device(lse):
        split_large_lse[(triton.cdiv(Lq, config.block_m) * batch * heads,)](
            lse=lse,
            log2_lse=log2_lse,
            rescale=rescale,
            LIMIT=LARGEST_WHOLE_LSE[problem.query.element_size()],
            **launch_arguments(problem, config),
        )
    return rescale


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
    bias_config: Config | None = None,
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
    rescale = None
    if problem.bias is not None or problem.query.element_size() == 4:
        rescale = large_lse_split(problem, lse, log2_lse, chosen("grad_query", problem, query_config))
    shared = {
        "value": rows_of(problem.value),
        "grad_out": rows_of(grad_out),
        "log2_lse": log2_lse,
        "rescale": rescale,
        "delta": delta,
        "dropout": dropout_of(problem),
    }
    with on_device(out):
        if grad_key is not None or grad_value is not None:
            config = chosen("grad_key_value", problem, key_value_config)
            gradients_of_keys[(triton.cdiv(Lk, config.block_n) * batch * key_heads,)](
                grad_key=rows_of(grad_key),
                grad_value=rows_of(grad_value),
                together=heads_together(batch * key_heads, problem.query, grad_out),
                **boxes(config, config.block_m, query=problem.query, grad_out=grad_out),
                **shared,
                **launch_arguments(problem, config),
            )
        if grad_query is not None:
            config = chosen("grad_query", problem, query_config)
            gradients_of_queries[(triton.cdiv(Lq, config.block_m) * batch * heads,)](
                grad_query=rows_of(grad_query),
                nonfinite=nonfinite_heads(problem, problem.key),
                together=together_by_group(problem),
                **boxes(config, config.block_n, key=problem.key, value=problem.value),
                **shared,
                **launch_arguments(problem, config),
            )
        if grad_bias is not None:
            _launch_grad_bias(problem, grad_bias, shared, bias_config)


def _launch_grad_bias(problem, grad_bias: torch.Tensor, shared: dict, config: Config | None) -> None:
    config = chosen("grad_bias", problem, config)
    full = (*problem.query.shape[:3], problem.key.shape[2])
    summed = [size == 1 and whole != 1 for size, whole in zip(grad_bias.shape, full, strict=True)]
    sizes = grad_bias.shape
    tiles = 1 if summed[2] else triton.cdiv(sizes[2], config.block_m)
    tiles *= 1 if summed[3] else triton.cdiv(sizes[3], config.block_n)
    gradient_of_bias[(tiles * sizes[0] * sizes[1],)](
        grad_bias=grad_bias,
        batch=full[0],
        **shared,
        **launch_arguments(problem, config),
        **dict(zip(("SUM_B", "SUM_H", "SUM_M", "SUM_N"), summed, strict=True)),
    )


def weights(problem, lse: torch.Tensor, out: torch.Tensor, average: bool, config: Config | None = None) -> None:
    """Write the attention weights [B, Lq, Lk] (mean over the heads) or [B, Hq, Lq, Lk]."""
    if not out.numel():
        return
    config = chosen("weights", problem, config)
    log2_lse = torch.empty_like(lse)
    rescale = large_lse_split(problem, lse, log2_lse, config)
    tiles = triton.cdiv(out.shape[-2], config.block_m) * triton.cdiv(out.shape[-1], config.block_n)
    with on_device(out):
        attention_weights[(tiles * math.prod(out.shape[:-2]),)](
            log2_lse=log2_lse,
            rescale=rescale,
            weights=out,
            dropout=dropout_of(problem),
            **launch_arguments(problem, config),
            AVERAGE=average,
        )
