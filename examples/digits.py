"""A small vision transformer on scikit-learn's handwritten digits, with torch's attention and with fastattn's.

The model is written with nn.MultiheadAttention and knows nothing of fastattn. It is trained once as
it is and once, from the same weights and on the same batches, after ``fastattn.convert``.

    python examples/digits.py    # needs scikit-learn: pip install 'fastattn[models]'
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fastattn
from fastattn.needs import require_or_exit

PIXELS, CLASSES = 64, 10


class Block(nn.Module):
    """A pre-norm transformer block (Vaswani et al. 2017; Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """Each pixel of an 8 x 8 image, with its neighbours, is a token (Dosovitskiy et al. 2020, overlapping patches)."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(1, width, kernel_size=3, padding=1)
        self.position = nn.Parameter(0.5 * torch.randn(PIXELS, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 64]."""
        patches = self.embedding(images.view(-1, 1, 8, 8))  # [B, width, 8, 8]
        tokens = patches.flatten(2).transpose(1, 2) + self.position  # [B, 64, width]
        return self.head(self.blocks(tokens).mean(dim=1))


@dataclass
class Run:
    """What one training gave: the loss of every step, the test accuracy, the median seconds of a step."""

    losses: list[float]
    accuracy: float
    seconds_per_step: float


def load(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels; a quarter is for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.tensor(part) for part in parts)
    return (
        train_images.float().to(device),
        train_labels.to(device),
        test_images.float().to(device),
        test_labels.to(device),
    )


def train(model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, batch: int, advance) -> Run:
    """Train with AdamW and a one-cycle rate; ``advance`` is called after each step."""
    train_images, train_labels, test_images, test_labels = data
    steps = len(train_images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    order = torch.Generator().manual_seed(1)
    losses, seconds = [], []
    model.train()
    for _ in range(epochs):
        shuffled = torch.randperm(len(train_images), generator=order).to(train_images.device)
        for chosen in shuffled[: steps * batch].view(steps, batch):
            start = time.perf_counter()
            loss = F.cross_entropy(model(train_images[chosen]), train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            advance()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(dim=-1) == test_labels).float().mean().item()
    return Run(losses, accuracy, statistics.median(seconds))


def compare(epochs: int, batch: int, seed: int, device: torch.device, console: Console) -> dict[str, Run]:
    """Train the model as it is and after ``fastattn.convert``, from the same weights."""
    data = load(device)
    torch.manual_seed(seed)
    models = {"nn.MultiheadAttention": VisionTransformer().to(device)}
    models["fastattn"] = copy.deepcopy(models["nn.MultiheadAttention"])
    console.print(str(fastattn.convert(models["fastattn"])))
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, model in models.items():
            task = progress.add_task(name, total=epochs * (len(data[0]) // batch))
            runs[name] = train(model, data, epochs, batch, lambda task=task: progress.advance(task))
    return runs


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description="Digits with nn.MultiheadAttention and with fastattn.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args(arguments)
    require_or_exit("examples/digits.py")
    console = Console()
    runs = compare(given.epochs, given.batch, given.seed, given.device, console)

    table = Table("attention", "test accuracy", "last loss", "ms per step")
    for name, run in runs.items():
        table.add_row(name, f"{run.accuracy:.2%}", f"{run.losses[-1]:.4f}", f"{1e3 * run.seconds_per_step:.1f}")
    console.print(table)
    theirs, ours = runs["nn.MultiheadAttention"], runs["fastattn"]
    apart = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    console.print(f"largest difference of the loss curves: {apart:.2e}")
    console.print(
        f"a training step with fastattn is {theirs.seconds_per_step / ours.seconds_per_step:.2f} times as fast"
    )
    return runs


if __name__ == "__main__":
    main()
