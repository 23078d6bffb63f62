"""The record of a run: one line of JSON per measurement, and its curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastattn.models.fields import check_value
from fastattn.train.output_files import write_figure, write_text

_NOT_CURVES = ("step", "epoch", "seconds")


class History:
    """Rows such as ``{"step": 50, "epoch": 0.3, "loss": 1.2}``; a row holds what was measured at its step."""

    def __init__(self, rows: list[dict[str, Any]] | None = None):
        self.rows = list(rows or [])

    @classmethod
    def of(cls, rows: Any) -> History:
        """Of rows that may be anything: a TypeError or ValueError says what they are not."""
        for row in rows:
            check_value("history", row, dict)
            for name, value in {"step": None, **row}.items():
                check_value("history", name, str)
                check_value(f"history's {name}", value, float)
        return cls(rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one measurement."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        return [p[0] for p in points], [p[1] for p in points]

    def names(self) -> list[str]:
        """What was measured, in the order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in _NOT_CURVES))

    def write(self, path: Path) -> None:
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def draw(self, path: Path, title: str, note: str = "") -> None:
        """One panel for the losses, one for the learning rate, one for the other figures, over the steps.

        ``note`` stands below them.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = self.names()
        losses = [n for n in names if "loss" in n]
        others = [n for n in names if n not in losses and n != "learning_rate"]
        panels = [(label, group) for label, group in (("loss", losses), ("validation", others)) if group]
        panels = [(group[0].replace("_", " ") if len(group) == 1 else label, group) for label, group in panels]
        if "learning_rate" in names:
            panels.append(("learning rate", ["learning_rate"]))
        figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(1, len(panels), squeeze=False)
        for axes, (label, group) in zip(rows[0], panels, strict=True):
            for name in group:
                steps, values = self.series(name)
                marker = "." if len(steps) < 60 else None
                text = "training loss" if name == "loss" else name.replace("_", " ")
                axes.plot(steps, values, label=text, marker=marker)
            axes.set(xlabel="step", title=label)
            axes.grid(alpha=0.3)
            if len(group) > 1:
                axes.legend(frameon=False)
        figure.suptitle(title)
        figure.supxlabel(note, fontsize=8)
        write_figure(path, figure, dpi=110)
