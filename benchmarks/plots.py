"""The result's pictures: throughput and memory against sequence length."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Colour and marker of each implementation, the same in every picture.
STYLES = {
    "naive": {"color": "#9a9a9a", "marker": "s", "label": "naive"},
    "torch": {"color": "#d1605e", "marker": "^", "label": "torch SDPA"},
    "fastattn": {"color": "#1f6f8b", "marker": "o", "label": "fastattn", "linewidth": 2.2},
}
#: Panels of the throughput plot: title, then the workload's fields.
PANELS = (
    ("float32 forward", {"dtype": "float32", "backward": False, "causal": False}),
    ("float32 forward, causal", {"dtype": "float32", "backward": False, "causal": True}),
    ("float32 forward + backward", {"dtype": "float32", "backward": True, "causal": False}),
    ("bfloat16 forward", {"dtype": "bfloat16", "backward": False, "causal": False}),
)


def plot_throughput(result: dict, path: Path) -> None:
    """GFLOP/s of useful work against sequence length, with the machine's ceiling dashed."""
    lines = [line for line in result["lines"] if line["group"] == "length"]
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, fields) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        chosen = [line for line in lines if fields.items() <= line["fields"].items()]
        for name, style in STYLES.items():
            points = [
                (line["fields"]["length"], line["flops"] / line["seconds"][name] / 1e9)
                for line in chosen
                if name in line["seconds"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **style)
        ceiling = [(line["fields"]["length"], line["ceiling"] / 1e9) for line in chosen]
        if ceiling:
            axes.plot(
                *zip(*ceiling, strict=True), color="black", linestyle="--", linewidth=1, label="FMA rate, probed beside"
            )
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.supxlabel("sequence length (1 sequence, 8 heads of 64)", fontsize=10)
    figure.supylabel("useful GFLOP/s", fontsize=10)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{result['machine']['cpu']}, two threads, {result['date']}", fontsize=10)
    figure.savefig(path, dpi=120)


def plot_memory(result: dict, path: Path) -> None:
    """Peak memory of forward and backward against sequence length."""
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, style in STYLES.items():
        points = sorted(
            (entry["length"], entry["bytes"] / 2**20) for entry in result["memory"] if entry["implementation"] == name
        )
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("sequence length (1 sequence, 8 heads of 64, float32)")
    axes.set_ylabel("MiB at the peak of forward + backward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
