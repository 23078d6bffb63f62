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
    options_of,
    padded,
    rows_of,
    sizes_of,
    tensors_of,
)
from .backward_bias import gradient_of_bias
from .backward_keys import gradients_of_keys
from .backward_queries import gradients_of_queries
from .configs import Config, choose
from .decode import combine_parts, decode_part
from .finite import mark_nonfinite
from .forward import attention_forward
from .large_scores import split_large_lse
from .remembered import Call, remembered
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


def forward(
    problem, out: torch.Tensor, lse: torch.Tensor, config: Config | None = None, call: Call | None = None
) -> None:
    """Write out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]; an explicit configuration is for measuring.

    ``call`` is what is remembered of calls alike, where the caller has it already; they have no ``config``.
    """
    batch, heads, Lq = lse.shape
    if not lse.numel():
        return
    if not problem.key.shape[2]:
        out.zero_()
        lse.fill_(-math.inf)
        return
    call = call or remembered(forward, problem, (out, lse), config)
    if config is None and call.once("splits_keys", splits_keys, problem):
        return _decode(call, problem, out, lse, call.once("splits", decode_splits, problem), None)
    with on_device(out):
        marks = nonfinite_heads(call, problem, problem.value)

        def arguments() -> tuple[int, dict]:
            tiles = chosen("forward", problem, config)
            return triton.cdiv(Lq, tiles.block_m) * batch * heads, {
                "value": rows_of(problem.value),
                "out": rows_of(out),
                "lse": lse,
                "dropout": dropout_of(problem),
                "nonfinite": marks,
                "together": together_by_group(problem),
                **boxes(tiles, tiles.block_n, key=problem.key, value=problem.value),
                **launch_arguments(problem, tiles),
            }

        tensors = tensors_of(problem) | {"key_boxes": problem.key, "value_boxes": problem.value}
        call.launch(attention_forward, tensors | {"out": out, "lse": lse, "nonfinite": marks}, arguments)


def nonfinite_heads(call: Call, problem, tensor: torch.Tensor) -> torch.Tensor | None:
    """int32 [B * Hkv]: which heads of K or V hold an infinity or a NaN, where a mask or bias may hide one."""
    if problem.attn_mask is None and problem.bias is None:
        return None
    batch, heads, length, head_dim = tensor.shape
    marks = torch.zeros(batch * heads, dtype=torch.int32, device=tensor.device)

    def arguments() -> tuple[int, dict]:
        blocks = {"D": head_dim, "BLOCK_L": MARKED_ROWS, "BLOCK_D": padded(head_dim)}
        tensors = {"x": rows_of(tensor), "marks": marks}
        return triton.cdiv(length, MARKED_ROWS) * batch * heads, tensors | {"heads": heads, "L": length} | blocks

    call.launch(mark_nonfinite, {"x": tensor, "marks": marks}, arguments)
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
    _decode(remembered(decode, problem, (out, lse), splits, config), problem, out, lse, splits, config)


def _decode(call: Call, problem, out: torch.Tensor, lse: torch.Tensor, splits: int, config: Config | None) -> None:
    part_out = lse.new_empty(splits, lse.numel(), out.shape[-1])
    part_sum, part_max = lse.new_empty(2, splits, lse.numel())
    parts = {"part_out": part_out, "part_sum": part_sum, "part_max": part_max}

    def arguments() -> tuple[int, dict]:
        tiles = call.once("tiles", chosen, "decode", problem, config)
        batch, key_heads, Lk, _ = problem.key.shape
        blocks = triton.cdiv(problem.group_size * lse.shape[2], tiles.block_m)
        keys_per_split = triton.cdiv(triton.cdiv(Lk, splits), tiles.block_n) * tiles.block_n
        own = {"value": rows_of(problem.value), "splits": splits, "keys_per_split": keys_per_split}
        return batch * key_heads * blocks * splits, parts | own | launch_arguments(problem, tiles)

    def arguments_to_combine() -> tuple[int, dict]:
        options = options_of(problem, call.once("tiles", chosen, "decode", problem, config))
        own = {"out": rows_of(out), "lse": lse, "splits": splits}
        return lse.numel(), parts | own | {"sizes": sizes_of(problem), "OPTIONS": options}

    with on_device(out):
        call.launch(decode_part, tensors_of(problem) | parts, arguments)
        call.launch(combine_parts, parts | {"out": out, "lse": lse}, arguments_to_combine)


def statistics(call: Call, out, lse, grad_out, grad_lse) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse in log2 units, delta = rowsum(dO * O) - d lse), fp32 [B, Hq, Lq]."""
    batch, heads, Lq = lse.shape
    log2_lse, delta = lse.new_empty(2, *lse.shape)
    tensors = {"lse": lse, "grad_lse": grad_lse, "log2_lse": log2_lse, "delta": delta}

    def arguments() -> tuple[int, dict]:
        head_dim = out.shape[-1]
        blocks = {"DV": head_dim, "BLOCK_DV": padded(head_dim), "BLOCK_M": STATISTICS_ROWS}
        rows = {"out": rows_of(out), "grad_out": rows_of(grad_out)}
        return triton.cdiv(Lq, STATISTICS_ROWS) * batch * heads, tensors | rows | {"Lq": Lq, "heads": heads} | blocks

    with on_device(out):
        call.launch(row_statistics, tensors | {"out": out, "grad_out": grad_out}, arguments)
    return log2_lse, delta


def large_lse_split(
    call: Call, problem, lse: torch.Tensor, log2_lse: torch.Tensor, kernel: str, config: Config | None
) -> torch.Tensor:
    """Write what P is recomputed from to ``log2_lse``, and return the factors beside it (see large_scores.py).

    In the tiles of ``kernel``, a name in configs.py.
    """
    batch, heads, Lq = lse.shape
    rescale = torch.empty_like(log2_lse)
    tensors = {"lse": lse, "log2_lse": log2_lse, "rescale": rescale}

    def arguments() -> tuple[int, dict]:
        tiles = chosen(kernel, problem, config)
        limit = {"LIMIT": LARGEST_WHOLE_LSE[problem.query.element_size()]}
        return triton.cdiv(Lq, tiles.block_m) * batch * heads, tensors | limit | launch_arguments(problem, tiles)

    with on_device(lse):
        call.launch(split_large_lse, tensors_of(problem) | tensors, arguments)
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
    call: Call | None = None,
) -> None:
    """Write the gradients that are asked for; explicit configurations are for measuring, ``call`` as in forward."""
    batch, heads, Lq = lse.shape
    key_heads, Lk = problem.key.shape[1:3]
    if not lse.numel() or not Lk:
        for gradient in (grad_query, grad_key, grad_value):
            if gradient is not None:
                gradient.zero_()
        return
    given = (out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, grad_bias)
    call = call or remembered(backward, problem, given, key_value_config, query_config, bias_config)
    log2_lse, delta = statistics(call, out, lse, grad_out, grad_lse)
    rescale = None
    if problem.bias is not None or problem.query.element_size() == 4:
        rescale = large_lse_split(call, problem, lse, log2_lse, "grad_query", query_config)
    rows = {"log2_lse": log2_lse, "rescale": rescale, "delta": delta}
    tensors = tensors_of(problem) | rows | {"grad_out": grad_out}

    def shared(config: Config) -> dict:
        operands = {"value": rows_of(problem.value), "grad_out": rows_of(grad_out), "dropout": dropout_of(problem)}
        return rows | operands | launch_arguments(problem, config)

    def arguments_for_keys() -> tuple[int, dict]:
        config = chosen("grad_key_value", problem, key_value_config)
        return triton.cdiv(Lk, config.block_n) * batch * key_heads, {
            "grad_key": rows_of(grad_key),
            "grad_value": rows_of(grad_value),
            "together": heads_together(batch * key_heads, problem.query, grad_out),
            **boxes(config, config.block_m, query=problem.query, grad_out=grad_out),
            **shared(config),
        }

    def arguments_for_queries() -> tuple[int, dict]:
        config = chosen("grad_query", problem, query_config)
        return triton.cdiv(Lq, config.block_m) * batch * heads, {
            "grad_query": rows_of(grad_query),
            "nonfinite": marks,
            "together": together_by_group(problem),
            **boxes(config, config.block_n, key=problem.key, value=problem.value),
            **shared(config),
        }

    def arguments_for_bias() -> tuple[int, dict]:
        config = chosen("grad_bias", problem, bias_config)
        return bias_programs(problem, grad_bias, config), {
            "grad_bias": grad_bias,
            "batch": batch,
            **summed_sides(problem, grad_bias),
            **shared(config),
        }

    with on_device(out):
        if grad_key is not None or grad_value is not None:
            own = {"grad_key": grad_key, "grad_value": grad_value}
            streamed = {"query_boxes": problem.query, "grad_out_boxes": grad_out}
            call.launch(gradients_of_keys, tensors | own | streamed, arguments_for_keys)
        if grad_query is not None:
            marks = nonfinite_heads(call, problem, problem.key)
            own = {"grad_query": grad_query, "nonfinite": marks}
            streamed = {"key_boxes": problem.key, "value_boxes": problem.value}
            call.launch(gradients_of_queries, tensors | own | streamed, arguments_for_queries)
        if grad_bias is not None:
            call.launch(gradient_of_bias, tensors | {"grad_bias": grad_bias}, arguments_for_bias)


def summed_sides(problem, grad_bias: torch.Tensor) -> dict[str, bool]:
    """Over which dimensions of the scores the bias's gradient is summed, as the kernel's options."""
    full = (*problem.query.shape[:3], problem.key.shape[2])
    summed = [size == 1 and whole != 1 for size, whole in zip(grad_bias.shape, full, strict=True)]
    return dict(zip(("SUM_B", "SUM_H", "SUM_M", "SUM_N"), summed, strict=True))


def bias_programs(problem, grad_bias: torch.Tensor, config: Config) -> int:
    """Programs of the bias's gradient: one for each of its tiles."""
    summed, sizes = summed_sides(problem, grad_bias), grad_bias.shape
    tiles = 1 if summed["SUM_M"] else triton.cdiv(sizes[2], config.block_m)
    tiles *= 1 if summed["SUM_N"] else triton.cdiv(sizes[3], config.block_n)
    return tiles * sizes[0] * sizes[1]


def weights(problem, lse: torch.Tensor, out: torch.Tensor, average: bool, config: Config | None = None) -> None:
    """Write the attention weights [B, Lq, Lk] (mean over the heads) or [B, Hq, Lq, Lk]."""
    if not out.numel():
        return
    call = remembered(weights, problem, (lse, out), average, config)
    log2_lse = torch.empty_like(lse)
    rescale = large_lse_split(call, problem, lse, log2_lse, "weights", config)
    tensors = {"log2_lse": log2_lse, "rescale": rescale, "weights": out}

    def arguments() -> tuple[int, dict]:
        tiles = chosen("weights", problem, config)
        number = triton.cdiv(out.shape[-2], tiles.block_m) * triton.cdiv(out.shape[-1], tiles.block_n)
        own = {"dropout": dropout_of(problem), "AVERAGE": average}
        return number * math.prod(out.shape[:-2]), tensors | own | launch_arguments(problem, tiles)

    with on_device(out):
        call.launch(attention_weights, tensors_of(problem) | tensors, arguments)
