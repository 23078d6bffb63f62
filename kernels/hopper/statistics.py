"""The row statistics that the backward kernels read: lse in base 2, and delta = rowsum(dO * O) - dlse."""

import torch
import triton
import triton.language as tl

from .plan import LOG2_E, STATISTICS_ROWS


@triton.jit
def statistics_kernel(
    out,
    grad_out,
    lse,
    grad_lse,
    lse_2,
    delta,
    out_b,
    out_h,
    out_l,
    grad_b,
    grad_h,
    grad_l,
    H,
    L,
    padded,
    log2_e,
    HAS_GRAD_LSE: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS rows of a head, COLUMNS >= D a power of two.

    Rows past L, and rows that see nothing, get lse +inf (so that their probabilities are exp2(-inf) = 0) and delta 0.
    """
    blocks = padded // ROWS
    head = tl.program_id(0) // blocks
    batch, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = row < L
    rows, at = real[:, None] & (column < D)[None, :], row.to(tl.int64)[:, None]
    o = tl.load(out + batch * out_b + h * out_h + at * out_l + column[None, :], mask=rows, other=0.0)
    do = tl.load(grad_out + batch * grad_b + h * grad_h + at * grad_l + column[None, :], mask=rows, other=0.0)
    value = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    index = head.to(tl.int64) * L + row
    if HAS_GRAD_LSE:
        value -= tl.load(grad_lse + index, mask=real, other=0.0)
    row_lse = tl.load(lse + index, mask=real, other=float("-inf"))
    sees = row_lse != float("-inf")  # also a NaN, which shows in the row's gradients
    target = head.to(tl.int64) * padded + row
    tl.store(lse_2 + target, tl.where(sees, row_lse * log2_e, float("inf")))
    tl.store(delta + target, tl.where(sees, value, 0.0))


def row_statistics(call, out, lse, grad_out, grad_lse) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse_2, delta), each fp32 [B * H, L rounded up to STATISTICS_ROWS], of out and grad_out [B, H, L, D].

    ``call`` is the :class:`..remembered.Call` that they are part of.
    """
    B, H, L, D = out.shape
    padded = triton.cdiv(L, STATISTICS_ROWS) * STATISTICS_ROWS
    lse_2, delta = torch.empty(2, B * H, padded, dtype=torch.float32, device=out.device).unbind()
    rows = 32
    tensors = {
        "out": out,
        "grad_out": grad_out,
        "lse": lse,
        "grad_lse": lse if grad_lse is None else grad_lse,
        "lse_2": lse_2,
        "delta": delta,
    }

    def arguments() -> tuple[int, dict]:
        strides = zip(
            ("out_b", "out_h", "out_l", "grad_b", "grad_h", "grad_l"),
            (*out.stride()[:3], *grad_out.stride()[:3]),
            strict=True,
        )
        numbers = {"H": H, "L": L, "padded": padded, "log2_e": LOG2_E}
        options = {"HAS_GRAD_LSE": grad_lse is not None, "D": D, "COLUMNS": triton.next_power_of_2(D), "ROWS": rows}
        # in one dimension: the others end at 65535
        return padded // rows * B * H, tensors | dict(strides) | numbers | options | {"num_warps": 4}

    call.launch(statistics_kernel, tensors, arguments)
    return lse_2, delta
