"""Pictures of attention: words coloured by their weight (terminal, HTML, PNG), and a map of a translation."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from fastattn.train.output_files import write_figure, write_text


@dataclass(frozen=True)
class Explained:
    """A classified text: ``spans`` are (start, end) of its words, ``weights`` their shares, summing to 1."""

    text: str
    label: str
    probability: float
    spans: list[tuple[int, int]]
    weights: list[float]

    def pieces(self) -> list[tuple[str, float]]:
        """The whole text in order, each piece with its weight relative to the largest (0 between words)."""
        largest = max(self.weights, default=0.0) or 1.0
        pieces, position = [], 0
        for (start, end), weight in zip(self.spans, self.weights, strict=True):
            if start > position:
                pieces.append((self.text[position:start], 0.0))
            if end > start:
                pieces.append((self.text[start:end], weight / largest))
            position = max(position, end)
        return [*pieces, (self.text[position:], 0.0)] if position < len(self.text) else pieces


def coloured(explained: Explained):
    """For ``rich``: the text on backgrounds from none to red."""
    from rich.text import Text

    text = Text()
    for piece, weight in explained.pieces():
        fade = round(255 * (1 - weight))
        text.append(piece, f"black on #ff{fade:02x}{fade:02x}" if weight > 0.05 else "")
    return text


def write_html(path: Path, results: list[Explained]) -> None:
    """A page with one paragraph for each text."""
    paragraphs = []
    for result in results:
        words = "".join(
            f'<span style="background:rgba(255,0,0,{weight:.3f})" title="{weight:.3f}">{html.escape(piece)}</span>'
            if weight > 0
            else html.escape(piece)
            for piece, weight in result.pieces()
        )
        paragraphs.append(f"<p><b>{html.escape(result.label)} {result.probability:.3f}</b> {words}</p>")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>What the classifier read</title>\n'
        "<style>body{font:16px/1.7 sans-serif;max-width:45em;margin:2em auto}span{border-radius:3px}</style>\n"
        "</head><body>\n" + "\n".join(paragraphs) + "\n</body></html>\n"
    )
    write_text(path, page)


def draw_words(path: Path, results: list[Explained], width: float = 9.0) -> None:
    """The texts as a PNG, words wrapped and coloured by weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi, size, line = 120, 11, 0.27  # line height in inches
    measure = Figure(figsize=(width, 1), dpi=dpi)
    renderer = FigureCanvasAgg(measure).get_renderer()

    def inches(word: str, weight: str = "normal") -> float:
        return measure.text(0, 0, word, size=size, weight=weight).get_window_extent(renderer).width / dpi

    space = inches("a a") - inches("aa")
    placed, y = [], 0.0  # (x, y in lines, word, weight or None for a heading)
    for result in results:
        heading = f"{result.label} {result.probability:.2f}"
        placed.append((0.1, y, heading, None))
        x = 0.1 + inches(heading, "bold") + 3 * space
        for piece, weight in result.pieces():
            if not piece.strip():
                x += space
                continue
            for word in piece.split():
                if x + inches(word) > width - 0.1:
                    x, y = 0.4, y + 1
                placed.append((x, y, word, weight))
                x += inches(word)
        y += 1.6
    height = (y + 0.3) * line
    figure = Figure(figsize=(width, height), dpi=dpi)
    FigureCanvasAgg(figure)
    for x, row, word, weight in placed:
        box = None
        if weight:
            box = {"facecolor": (1, 1 - weight, 1 - weight), "edgecolor": "none", "pad": 1.2}
        figure.text(
            x / width,
            1 - (row + 0.7) * line / height,
            word,
            size=size,
            weight="bold" if weight is None else "normal",
            va="center",
            bbox=box,
        )
    write_figure(path, figure, dpi)


def draw_translation(path: Path, source: list[str], target: list[str], weights) -> None:
    """The map ``[len(target), len(source)]`` of where each target token looked in the source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.38 * len(source), 1.2 + 0.34 * len(target)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(target)), target)
    axes.set(xlabel="source", ylabel="translation")
    figure.colorbar(image, ax=axes, label="weight")
    write_figure(path, figure, dpi=120)
