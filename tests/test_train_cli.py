"""The commands train and predict, from the terminal's side, and short versions of the demonstrations."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

import torch
from typer.testing import CliRunner

from fastattn.train.classify import ClassificationData, ClassificationTask, classification_data
from fastattn.train.cli import predict_app, train_app
from fastattn.train.dates import date_corpus
from fastattn.train.loop import Run
from fastattn.train.options import TrainOptions
from fastattn.train.reviews import generated_review, review_corpus
from fastattn.train.show import Explained
from fastattn.train.translate import TranslationData, TranslationTask

runner = CliRunner(env={"COLUMNS": "200"})

SMALL_CLASSIFIER = "--embed-dim 16 --num-heads 2 --layers 1 --feedforward-dim 16 --min-frequency 1".split()


def train(*arguments):
    return runner.invoke(train_app, [str(a) for a in arguments])


def predict(*arguments, **options):
    return runner.invoke(predict_app, [str(a) for a in arguments], **options)


@pytest.fixture(scope="module")
def reviews_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = review_corpus(200)[0]
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, reviews_file):
    out = tmp_path_factory.mktemp("runs") / "reviews"
    result = train("classify", "--data", reviews_file, "--out", out, "--epochs", 2, *SMALL_CLASSIFIER)
    assert result.exit_code == 0, result.output
    return out


def test_training_reports_and_continues(classifier, reviews_file):
    report = json.loads((classifier / "report.json").read_text())
    assert {"accuracy", "f1", "confusion_matrix", "bag_of_words_accuracy"} <= report.keys()
    assert sum(map(sum, report["confusion_matrix"])) == report["examples"]
    again = ["classify", "--data", reviews_file, "--out", classifier, *SMALL_CLASSIFIER]
    refused = train(*again)
    assert refused.exit_code == 1 and "already holds a run" in refused.output
    result = train(*again, "--resume", "--learning-rate", "0.5")
    assert result.exit_code == 1 and "cannot be resumed with 0.5" in result.output
    result = train(*again, "--resume", "--epochs", 3)
    assert result.exit_code == 0, result.output
    assert json.loads((classifier / "report.json").read_text())["steps"] == 12


def test_predictions_show_the_words(classifier, tmp_path):
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    text = "Not a <bad> film, though the ending drags."
    result = predict("classify", "--model", classifier, "--html", page, "--png", picture, text)
    assert result.exit_code == 0, result.output
    assert text in result.output
    assert result.output.split()[0] in ("negative", "positive")
    assert "&lt;" in page.read_text() and "<bad>" not in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_texts_from_standard_input(classifier):
    result = predict("classify", "--model", classifier, input="one\n\ntwo\n")
    assert result.exit_code == 0 and len(result.output.splitlines()) == 2
    nothing = predict("classify", "--model", classifier, input="")
    assert nothing.exit_code == 1 and "no text given" in nothing.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.csv: the file is empty"),
        ("text,label\na,pos\nb,\n", "bad.csv:3: the column 'label' is empty"),
        ("text,label\n" + "".join(f"t{i},pos\n" for i in range(30)), "all training examples have the label 'pos'"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, content, message):
    data = tmp_path / "bad.csv"
    data.write_text(content)
    result = train("classify", "--data", data, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_bad_label_in_the_test_file(tmp_path, reviews_file):
    test = tmp_path / "test.csv"
    test.write_text("text,label\nfine,positve\n")
    result = train("classify", "--data", reviews_file, "--test-data", test, "--out", tmp_path / "run")
    assert result.exit_code == 1 and "test.csv:2: the label 'positve' is not one of" in result.output


def test_a_label_that_stands_once_is_trained(tmp_path):
    data = tmp_path / "rare.csv"
    rows = [f"some text {i},{'good' if i % 2 else 'bad'}\n" for i in range(20)]
    data.write_text("text,label\n" + "".join(rows) + "so so,mixed\n")
    for seed in range(8):
        parts = classification_data(str(data), None, "text", "label", 0.1, seed)
        assert ("so so", "mixed") in parts.train
        assert (len(parts.train), len(parts.validation), len(parts.test)) == (17, 2, 2)
    result = train("classify", "--data", data, "--out", tmp_path / "run", "--steps", 3, "--seed", 1, *SMALL_CLASSIFIER)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "report.json").read_text())["labels"] == ["bad", "good", "mixed"]


def test_fewer_examples_for_training_than_labels(tmp_path):
    data = tmp_path / "few.csv"
    data.write_text("text,label\nfine,good\npoor,bad\ndull,bad\n")
    for seed in range(4):
        result = train("classify", "--data", data, "--out", tmp_path / "run", "--seed", seed)
        assert result.exit_code == 1 and not (tmp_path / "run").exists()
        reason = "2 labels, and only 1 of 3 distinct examples left for training, where each label needs one"
        assert reason in " ".join(result.output.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("translate", "--target", "x"),
        ("classify", "--test-data", "x"),
        ("classify", "--data", "digits", "--test-data", "x"),
    ],
)
def test_a_file_that_would_be_ignored_is_an_error(tmp_path, arguments):
    result = train(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == 1 and arguments[-2] in result.output
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_written_is_one_line(classifier, tmp_path):
    result = predict("classify", "--model", classifier, "--png", tmp_path / "absent" / "a.png", "text")
    assert result.exit_code == 1 and "absent" in result.output and "Traceback" not in result.output


def test_texts_without_a_word_that_a_bag_would_count(tmp_path):
    data = tmp_path / "letters.csv"
    data.write_text("text,label\n" + "".join(f"{chr(97 + i)},{'ab'[i % 2]}\n" for i in range(26)))
    result = train("classify", "--data", data, "--out", tmp_path / "run", "--epochs", 1, *SMALL_CLASSIFIER)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "report.json").read_text())["bag_of_words_accuracy"] is None


@pytest.mark.parametrize("option", [("--encoder", "gru"), ("--attention", "flash"), ("--device", "abacus")])
def test_bad_options(tmp_path, reviews_file, option):
    result = train("classify", "--data", reviews_file, "--out", tmp_path / "run", *option)
    assert result.exit_code == 1 and option[1] in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [("--layers", "0"), ("--num-heads", "0"), ("--max-length", "0")])
@pytest.mark.parametrize("task", ["translate", "classify"])
def test_sizes_of_nothing_are_refused(tmp_path, task, option):
    result = train(task, "--out", tmp_path / "run", *option)
    assert result.exit_code == 2 and option[0] in result.output
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_one(classifier, tmp_path):
    missing = predict("translate", "--model", tmp_path, "text")
    assert missing.exit_code == 1 and "holds no run" in missing.output
    wrong = predict("translate", "--model", classifier, "text")
    assert wrong.exit_code == 1 and "'classify', not 'translate'" in wrong.output


def test_translation_from_two_files(tmp_path):
    pairs = date_corpus(pairs=200)[0]
    (tmp_path / "s").write_text("".join(f"{s}\n" for s, _ in pairs))
    (tmp_path / "t").write_text("".join(f"{t}\n" for _, t in pairs))
    sizes = "--embed-dim 16 --num-heads 2 --layers 1 --feedforward-dim 16 --steps 3 --batch-size 16 --post-norm".split()
    out, picture = tmp_path / "run", tmp_path / "map.png"
    result = train("translate", "--data", tmp_path / "s", "--target", tmp_path / "t", "--out", out, *sizes)
    assert result.exit_code == 0, result.output
    assert "bleu" in result.output
    result = predict("translate", "--model", out, "--attention-map", picture, "3 March 1998", "4 May 2001")
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pieces_cover_the_text_in_order():
    explained = Explained("Not bad, no", "positive", 0.9, [(0, 3), (4, 7), (7, 8)], [0.5, 0.25, 0.25])
    assert explained.pieces() == [("Not", 1.0), (" ", 0.0), ("bad", 0.5), (",", 0.5), (" no", 0.0)]


def test_short_demonstration_of_translation(tmp_path):
    """Reading English dates only, with a small model: enough to see that learning generalises to new days."""
    corpus = [[p for p in part if p[1][:4].isdigit() and p[0][0].isdigit()] for part in date_corpus(pairs=12_000)]
    task = TranslationTask(
        TranslationData(*corpus), vocab_size=350, embed_dim=64, feedforward_dim=128, dropout=0.0, attention="torch"
    )
    options = TrainOptions(steps=300, batch_size=64, learning_rate=4e-3, warmup_steps=60, evaluate_every=300)
    report = Run(task, options, tmp_path / "run").train()
    assert report["exact_match"] > 0.9


def test_short_demonstration_of_classification(tmp_path):
    """What counting words cannot tell: the bag-of-words model is beaten by 20 points at least."""
    data = ClassificationData(*review_corpus(4000))
    task = ClassificationTask(data, min_frequency=1, encoder="bilstm", layers=1, dropout=0.0)
    options = TrainOptions(epochs=7, batch_size=32, learning_rate=5e-3, warmup_steps=50)
    report = Run(task, options, tmp_path / "run").train()
    assert report["accuracy"] > report["bag_of_words_accuracy"] + 0.2


def test_denied_praise_is_no_praise():
    import random

    rng = random.Random(0)
    for text, label in (generated_review(rng, denial=0.0) for _ in range(200)):
        assert " not " not in text.replace("had not read", "") and label in ("negative", "positive")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu(tmp_path, reviews_file):
    arguments = ("classify", "--data", reviews_file, "--out", tmp_path / "run", "--device", "cuda", "--bf16")
    result = train(*arguments, "--epochs", 1, *SMALL_CLASSIFIER)
    assert result.exit_code == 0, result.output


def test_the_examples_run(tmp_path):
    examples = Path(__file__).parents[1] / "examples"
    dates = runpy.run_path(str(examples / "translate_dates.py"))["main"]
    assert dates(tmp_path / "dates", pairs=400, steps=3, attention="torch")["steps"] == 3
    reviews = runpy.run_path(str(examples / "classify_reviews.py"))["main"]
    assert set(reviews(tmp_path / "reviews", reviews=100, epochs=1, encoder=["cnn"])) == {"cnn"}
    for name in ("dates/attention.png", "reviews/cnn/attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
