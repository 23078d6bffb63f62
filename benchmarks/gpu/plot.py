"""``python -m benchmarks.gpu plot RESULT.json --out docs/``: throughput against sequence length.

One figure per head dimension, forward and backward, causal and not; each contender a line, the matrix
product of the same run as the ceiling. Needs matplotlib, and no GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastattn.needs import require_or_exit

#: In the order of the legend: label, colour, and whether the line is drawn strong.
STYLES = {
    "fastattn": ("fastattn", "#d62728", True),
    "fastattn_plain": ("fastattn, Triton kernels", "#ff9896", False),
    "cudnn": ("cuDNN", "#2ca02c", False),
    "flash": ("torch flash (FlashAttention-2)", "#1f77b4", False),
    "flex": ("FlexAttention", "#9467bd", False),
    "efficient": ("torch memory-efficient", "#8c564b", False),
    "naive": ("naive", "#7f7f7f", False),
}
PANELS = (
    ("forward", None, "forward"),
    ("forward", "upper_left", "forward, causal"),
    ("backward", None, "backward"),
    ("backward", "upper_left", "backward, causal"),
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py plot", description=__doc__)
    parser.add_argument("result", type=Path, help="a result file of this script")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the PNG files (default docs)")
    options = parser.parse_args(argv)
    require_or_exit("python -m benchmarks.gpu plot")
    content = json.loads(options.result.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    for dtype, head_dim in shapes(content["rows"]):
        path = options.out / f"gpu-{dtype}-d{head_dim}.png"
        plot(content, dtype, head_dim, path)
        print(path)
    return 0


def shapes(rows: list[dict]) -> list[tuple[str, int]]:
    """(dtype, head_dim) of which there are several lengths."""
    lengths: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        if _is_plain(row):
            lengths.setdefault((row["dtype"], row["head_dim"]), set()).add(row["queries"])
    return sorted(key for key, found in lengths.items() if len(found) > 1)


def curves(rows: list[dict], dtype: str, head_dim: int, direction: str, causal: str | None) -> dict[str, dict]:
    """{contender: {length: TFLOP/s}} of one panel."""
    found: dict[str, dict] = {}
    for row in rows:
        if not _is_plain(row) or (row["dtype"], row["head_dim"]) != (dtype, head_dim):
            continue
        if row["direction"] == direction and row["causal"] == causal and row["contender"] in STYLES:
            found.setdefault(row["contender"], {})[row["queries"]] = row["rate"]
    return found


def plot(content: dict, dtype: str, head_dim: int, path: Path) -> None:
    """Four panels into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4.2), sharey=True)
    ceiling = content["ceilings"].get("matmul_tflops")
    lengths = sorted({row["queries"] for row in content["rows"] if _is_plain(row) and row["head_dim"] == head_dim})
    for axis, (direction, causal, title) in zip(axes, PANELS, strict=True):
        found = curves(content["rows"], dtype, head_dim, direction, causal)
        for name, (label, colour, strong) in STYLES.items():
            if name in found:
                points = sorted(found[name].items())
                axis.plot(*zip(*points, strict=True), "o-", label=label, color=colour, lw=2.6 if strong else 1.3, ms=4)
        if ceiling:
            axis.axhline(ceiling, color="black", ls=":", lw=1, label="bf16 matrix product, same run")
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.set_xlabel("sequence length")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("TFLOP/s of useful work")
    axes[0].set_ylim(bottom=0)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=len(handles), frameon=False, fontsize=9)
    head = content["head"]
    about = (
        f"{head['machine']['gpu'] or head['machine']['cpu']}, torch {head['versions']['torch']}, {head['date'][:10]}"
    )
    figure.suptitle(f"{dtype}, D = {head_dim}, 16384 tokens, model width 2048 ({about})")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _is_plain(row: dict) -> bool:
    """A timed row of the main comparison: no variant, as many keys as queries and kv heads as heads."""
    return (
        row["part"] == "bench"
        and row["status"] == "ok"
        and row.get("variant") is None
        and "queries" in row
        and row["queries"] == row["keys"]
        and row["heads"] == row["kv_heads"]
    )
