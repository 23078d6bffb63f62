"""Train a Transformer to translate written dates, then look at what it does.

    pip install 'fastattn[models]'
    python examples/translate_dates.py --out runs/dates

The same as ``fastattn train translate``, in Python: a starting point for your own pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastattn.needs import require_or_exit
from fastattn.train.dates import date_corpus
from fastattn.train.loop import Run
from fastattn.train.options import TrainOptions
from fastattn.train.progress import Progress
from fastattn.train.translate import TranslationData, TranslationTask, draw_attention, translate

WRITTEN = ["Donnerstag, den 5.3.1998", "the twenty-first of May, two thousand and seven", "[de words] 2024-02-29"]


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/dates"),
    pairs: int = 20_000,
    steps: int = 850,
    attention: Annotated[str, typer.Option(help="fastattn, torch or naive.")] = "fastattn",
) -> dict:
    require_or_exit("examples/translate_dates.py")
    train, validation, test = date_corpus(pairs)
    task = TranslationTask(TranslationData(train, validation, test), vocab_size=500, dropout=0.0, attention=attention)
    options = TrainOptions(steps=steps, batch_size=128, learning_rate=2e-3, evaluate_every=min(steps, 141))
    report = Run(task, options, out).train(Progress.on_terminal())
    print(f"exact match {report['exact_match']:.3f}, BLEU {report['bleu']:.1f}")

    device = torch.device("cpu")
    translations = translate(task.model, task.tokenizer, WRITTEN, device, beam_size=4)
    for source, target in zip(WRITTEN, translations, strict=True):
        print(f"{source}  ->  {target}")
    draw_attention(out / "attention.png", task.model, task.tokenizer, WRITTEN[0], translations[0], device)
    return report


if __name__ == "__main__":
    typer.run(main)
