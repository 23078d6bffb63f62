"""Train classifiers of film reviews with each encoder, and compare them with counting words.

    pip install 'fastattn[models]'
    python examples/classify_reviews.py --out runs/reviews

The same as ``fastattn train classify``, in Python: a starting point for your own texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastattn.models.classifier import ENCODERS
from fastattn.needs import require_or_exit
from fastattn.train import show
from fastattn.train.classify import ClassificationData, ClassificationTask, explain_texts
from fastattn.train.loop import Run
from fastattn.train.options import TrainOptions
from fastattn.train.progress import Progress
from fastattn.train.reviews import review_corpus

TEXTS = [
    "This is not a bad film, though the ending is dull.",
    "The score was wonderful, but nobody could call it a gripping movie.",
]


def main(
    out: Annotated[Path, typer.Option(help="A run is written below it for each encoder.")] = Path("runs/reviews"),
    reviews: int = 8000,
    epochs: int = 10,
    encoder: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all.")] = None,
) -> dict[str, dict]:
    require_or_exit("examples/classify_reviews.py")
    data = ClassificationData(*review_corpus(reviews))
    reports = {}
    for name in encoder or ENCODERS:
        task = ClassificationTask(data, encoder=name, pooling="additive")
        options = TrainOptions(epochs=epochs, learning_rate=2e-3, warmup_steps=100, patience=4)
        options = options.suited_to(len(data.train), task.least_steps, given=["epochs"])
        report = reports[name] = Run(task, options, out / name).train(Progress.on_terminal())
        print(f"{name}: accuracy {report['accuracy']:.3f}, bag of words {report['bag_of_words_accuracy']:.3f}")
        results = explain_texts(task.model, task.tokenizer, task.labels, TEXTS, torch.device("cpu"))
        show.draw_words(out / name / "attention.png", results)
    return reports


if __name__ == "__main__":
    typer.run(main)
