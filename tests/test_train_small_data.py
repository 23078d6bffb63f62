"""Few training examples: the options follow their number, the user is told, and the model learns."""

from __future__ import annotations

import json
import random
import signal

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

import torch
from typer.testing import CliRunner

from fastattn.cli import app
from fastattn.train import history
from fastattn.train.classify import ClassificationTask
from fastattn.train.cli import CLASSIFY, DETECT, TRANSLATE
from fastattn.train.detect import DetectionTask
from fastattn.train.history import History
from fastattn.train.options import TrainOptions
from fastattn.train.translate import TranslationTask, smoothed_entropy

SMALL = "--embed-dim 16 --num-heads 2 --layers 1 --feedforward-dim 16 --min-frequency 1 --threads 1".split()


@pytest.mark.parametrize(
    ("task", "defaults", "examples", "batch", "epochs", "total", "warmup", "every"),
    [
        # The demonstrations: nothing changes.
        (TranslationTask, TRANSLATE, 18_000, 128, 6, 846, 200, 141),
        (ClassificationTask, CLASSIFY, 6_400, 64, 10, 1000, 100, 100),
        (DetectionTask, DETECT, 4_000, 32, 10, 2000, 100, 250),
        # 540 pairs: 5 batches of 128, 9 of 64, 17 of 32; 48 epochs of 17 are the first to make 800 steps.
        (TranslationTask, TRANSLATE, 540, 32, 48, 816, 200, 34),
        (TranslationTask, TRANSLATE, 1, 32, 800, 800, 200, 20),
        # scikit-learn's digits: 21 batches of 64; 20 epochs of 21 make 420.
        (ClassificationTask, CLASSIFY, 1_297, 64, 20, 420, 100, 21),
        (ClassificationTask, CLASSIFY, 160, 32, 80, 400, 100, 20),
        (DetectionTask, DETECT, 50, 32, 10, 2000, 100, 250),
    ],
)
def test_options_that_suit_the_data(task, defaults, examples, batch, epochs, total, warmup, every):
    options = TrainOptions(**defaults).suited_to(examples, task.least_steps)
    assert options.total_steps(examples) == total
    assert (options.batch_size, options.epochs, options.warmup_steps) == (batch, epochs, warmup)
    assert options.evaluate_every == every
    assert options.patience == (defaults.get("patience") if epochs == defaults.get("epochs") else None)
    assert options == options.suited_to(examples, task.least_steps)


@pytest.mark.parametrize(
    ("given", "total", "warmup", "every"),
    [
        ({"epochs": 6}, 6 * 17, 25, 34),
        ({"batch_size": 128}, 160 * 5, 200, 20),
        ({"epochs": 6, "batch_size": 128}, 30, 7, 20),
        ({"steps": 30}, 30, 7, 34),
        ({"steps": 30, "warmup_steps": 200}, 30, 200, 34),
        ({"evaluate_every": 3}, 816, 200, 3),
    ],
)
def test_what_is_given_stays(given, total, warmup, every):
    options = TrainOptions(**TRANSLATE | given).suited_to(540, TranslationTask.least_steps, given)
    assert {name: getattr(options, name) for name in given} == given
    assert (options.total_steps(540), options.warmup_steps, options.evaluate_every) == (total, warmup, every)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def opinions(tmp_path_factory):
    """120 short texts, of which one of twelve words tells the label."""
    rng = random.Random(0)
    words = {"good": "good great fine clever moving funny".split(), "bad": "bad dull poor awful weak silly".split()}
    rest = "the film I saw on a Tuesday with my sister was and we talked about it".split()
    rows = []
    for i in range(120):
        label = ("good", "bad")[i % 2]
        text = [*rng.sample(rest, 6), rng.choice(words[label])]
        rng.shuffle(text)
        rows.append(f"{' '.join(text)},{label}\n")
    path = tmp_path_factory.mktemp("data") / "opinions.csv"
    path.write_text("text,label\n" + "".join(rows))
    return path


def test_a_hundred_texts_are_learnt(tmp_path, opinions):
    """96 for training: 3 batches of 32 an epoch. With 10 epochs, all of them warm-up, nothing was."""
    result = invoke("train", "classify", "--data", opinions, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    few, plan = result.output.splitlines()[:2]
    assert few == "few data: batches of 32 in place of 64, 134 epochs in place of 10, for 400 steps at least"
    assert plan == (
        "96 training examples in batches of 32, 3 steps an epoch: 134 epochs, 402 steps, 100 of them warm-up"
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["steps"], report["examples"]) == (402, 12)
    assert report["accuracy"] > 0.9


def test_a_run_on_few_data_resumes_bit_by_bit(tmp_path, opinions, monkeypatch):
    arguments = ("train", "classify", "--data", opinions, "--epochs", 10, *SMALL, "--out")
    assert invoke(*arguments, tmp_path / "whole").exit_code == 0
    loss, calls = ClassificationTask.loss, []

    def interrupted(self, model, batch):
        calls.append(None)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return loss(self, model, batch)

    monkeypatch.setattr(ClassificationTask, "loss", interrupted)
    result = invoke(*arguments, tmp_path / "run")
    assert result.exit_code == 130, result.output
    result = invoke(*arguments, tmp_path / "run", "--resume")
    assert result.exit_code == 0, result.output
    assert "30 steps, 7 of them warm-up; 5 are done" in result.output and "few data" not in result.output
    ours, whole = (
        torch.load(run / "checkpoint.pt", weights_only=True) for run in (tmp_path / "run", tmp_path / "whole")
    )
    assert ours["options"] == whole["options"]
    for name, tensor in whole["model"].items():
        assert torch.equal(ours["model"][name], tensor), name


def test_a_warm_up_longer_than_the_run_is_pointed_out(tmp_path, opinions):
    options = ("--steps", 5, "--warmup-steps", 50)
    result = invoke("train", "classify", "--data", opinions, "--out", tmp_path / "run", *options, *SMALL)
    assert "The warm-up does not end before the run: the learning rate gets to 10% of its peak" in result.output


def test_what_label_smoothing_leaves():
    """The loss of the target itself, by torch."""
    for share, size in ((0.1, 500), (0.3, 7), (1.0, 4)):
        smoothed = torch.full((size,), share / size, dtype=torch.float64)
        smoothed[2] += 1 - share
        loss = torch.nn.functional.cross_entropy(
            smoothed.log()[None], torch.tensor([2]), label_smoothing=share, reduction="sum"
        )
        assert smoothed_entropy(share, size) == pytest.approx(loss.item())
    assert smoothed_entropy(0.0, 5) == 0


def test_the_curves_say_why_the_training_loss_is_the_higher_one(tmp_path, monkeypatch):
    from fastattn.train.translate import TranslationData

    data = TranslationData([("a", "b")] * 3, [("a", "b")])
    sizes = {"embed_dim": 8, "num_heads": 2, "feedforward_dim": 8, "vocab_size": 300}
    task = TranslationTask(data, dropout=0.2, **sizes)
    floor = smoothed_entropy(0.1, task.config.vocab_size)
    assert task.about_losses() == (
        f"The training loss has label smoothing of 0.1, with which a perfect model has a loss of {floor:.2f} and "
        "dropout of 0.2; the validation loss has none."
    )
    assert TranslationTask(data, dropout=0.0, label_smoothing=0.0, **sizes).about_losses() == ""
    figures = []
    monkeypatch.setattr(history, "write_figure", lambda path, figure, dpi: figures.append(figure))
    rows = [{"step": 1, "loss": 1.0, "validation_loss": 0.5, "bleu": 1.0, "learning_rate": 0.1}]
    History(rows).draw(tmp_path / "curves.png", "title", task.about_losses())
    (figure,) = figures
    (note,) = (text for text in figure.texts if "label smoothing" in text.get_text())
    assert note.get_text() == task.about_losses()
    figure.draw_without_rendering()
    extent = note.get_window_extent()
    assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1
