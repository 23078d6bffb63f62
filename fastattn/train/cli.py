"""``fastattn train`` and ``fastattn predict``.  Heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastattn.models import fields
from fastattn.needs import require
from fastattn.train.command import (
    Attention,
    Commands,
    Out,
    Resume,
    options_of,
    train_and_report,
    training_command,
    within,
)

train_app = typer.Typer(
    cls=Commands, help="Train a model on your data or on the demonstration's.", no_args_is_help=True
)
predict_app = typer.Typer(cls=Commands, help="Use a trained model.", no_args_is_help=True)

Model = Annotated[Path, typer.Option(help="Directory of a trained run.", show_default=False)]
Size = Annotated[int, typer.Option(min=1)]
Share = Annotated[float, typer.Option(callback=within(fields.SHARE))]
HeldOut = Annotated[
    float,
    typer.Option(
        callback=within(fields.Range(0, 0.5, without_least=True, without_most=True)),
        help="Share of a file for validation, and again for the test.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1...")]

TRANSLATE = {"epochs": 6, "batch_size": 128, "learning_rate": 2e-3}
CLASSIFY = {"epochs": 10, "batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 100, "patience": 4}

DETECT = {"steps": 2000, "batch_size": 32, "warmup_steps": 100, "weight_decay": 1e-4, "evaluate_every": 250}


@train_app.command("translate")
@training_command(**TRANSLATE)
def train_translate(
    data: Annotated[
        str, typer.Option(help="demo (generated dates), or a TSV file of two columns: source, translation.")
    ] = "demo",
    target: Annotated[
        Path | None, typer.Option(help="Then --data is a text file, and this its translation line by line.")
    ] = None,
    *,
    out: Out,
    resume: Resume = False,
    attention: Attention = "fastattn",
    vocab_size: Annotated[
        int, typer.Option(help="Subword tokens, shared by both languages.", min=261, max=1 << 24)
    ] = 500,
    embed_dim: Size = 128,
    num_heads: Size = 4,
    layers: Annotated[int, typer.Option(help="Of the encoder and of the decoder each.", min=1)] = 2,
    feedforward_dim: Size = 512,
    dropout: Share = 0.0,
    post_norm: Annotated[bool, typer.Option("--post-norm", help="Normalise after each sublayer.")] = False,
    positions: Annotated[str, typer.Option(help="sinusoidal, learned or rotary.")] = "sinusoidal",
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.", min=2)] = 256,
    label_smoothing: Share = 0.1,
    beam_size: Annotated[int, typer.Option(help="For the test at the end.", min=1, max=1000)] = 4,
    held_out: HeldOut = 0.05,
    given: dict,
) -> None:
    """An encoder-decoder Transformer that translates; reports exact match and BLEU."""
    require("fastattn train translate")
    from fastattn.train.dates import date_corpus
    from fastattn.train.errors import TrainingError
    from fastattn.train.splits import split
    from fastattn.train.text_files import read_aligned, read_pairs
    from fastattn.train.translate import TranslationData, TranslationTask

    options = options_of(given, TRANSLATE, out, resume)
    if data == "demo":
        if target is not None:
            raise TrainingError("--target goes with --data, a text file of the sources")
        parts = date_corpus(seed=options.seed)
    else:
        pairs = read_pairs(data) if target is None else read_aligned(data, target)
        parts = split(pairs, held_out, options.seed)
    task = TranslationTask(
        TranslationData(*parts),
        vocab_size=vocab_size,
        label_smoothing=label_smoothing,
        beam_size=beam_size,
        seed=options.seed,
        embed_dim=embed_dim,
        num_heads=num_heads,
        encoder_layers=layers,
        decoder_layers=layers,
        feedforward_dim=feedforward_dim,
        dropout=dropout,
        norm_first=not post_norm,
        positions=positions,
        max_length=max_length,
        attention=attention,
    )
    train_and_report(task, options, given, out, resume)


@train_app.command("classify")
@training_command(**CLASSIFY)
def train_classify(
    data: Annotated[
        str,
        typer.Option(
            help="demo (generated reviews), digits (scikit-learn's, as sequences of rows), a CSV or TSV file with a "
            "header, or IMDB's folder or tar."
        ),
    ] = "demo",
    test_data: Annotated[Path | None, typer.Option(help="A CSV or TSV file for the final test.")] = None,
    *,
    out: Out,
    resume: Resume = False,
    attention: Attention = "fastattn",
    text_column: str = "text",
    label_column: str = "label",
    encoder: Annotated[str, typer.Option(help="transformer, bilstm or cnn.")] = "transformer",
    pooling: Annotated[str, typer.Option(help="additive or dot.")] = "additive",
    vocab_size: Annotated[int, typer.Option(help="Most words that are told apart.", min=5, max=1 << 24)] = 20_000,
    min_frequency: Annotated[int, typer.Option(help="Rarer words are unknown.", min=1, max=1 << 31)] = 2,
    embed_dim: Size = 64,
    num_heads: Size = 4,
    layers: Size = 2,
    feedforward_dim: Size = 128,
    dropout: Share = 0.1,
    positions: Annotated[str, typer.Option(help="sinusoidal, learned or rotary.")] = "rotary",
    max_length: Annotated[int, typer.Option(help="Words read of each text.", min=1)] = 512,
    held_out: HeldOut = 0.1,
    given: dict,
) -> None:
    """A text classifier with attention pooling; reports accuracy, F1 and the confusion matrix."""
    require("fastattn train classify")
    from fastattn.train.classify import ClassificationTask, classification_data

    options = options_of(given, CLASSIFY, out, resume)
    task = ClassificationTask(
        classification_data(data, test_data, text_column, label_column, held_out, options.seed),
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        seed=options.seed,
        encoder=encoder,
        pooling=pooling,
        embed_dim=embed_dim,
        num_heads=num_heads,
        layers=layers,
        feedforward_dim=feedforward_dim,
        dropout=dropout,
        positions=positions,
        max_length=max_length,
        attention=attention,
    )
    train_and_report(task, options, given, out, resume)


@train_app.command("detect")
@training_command(**DETECT)
def train_detect(
    data: Annotated[
        str,
        typer.Option(
            help="demo (scenes of handwritten digits, written to OUT/scenes), or a folder with train/, validation/ and "
            "perhaps test/, each of images and annotations.json (COCO)."
        ),
    ] = "demo",
    *,
    out: Out,
    resume: Resume = False,
    attention: Attention = "fastattn",
    rgb: Annotated[bool, typer.Option("--rgb", help="Read the images as RGB, not as grey.")] = False,
    num_queries: Annotated[int, typer.Option(help="Most objects found in an image.", min=1)] = 16,
    embed_dim: Size = 96,
    num_heads: Size = 4,
    encoder_layers: Size = 2,
    decoder_layers: Size = 3,
    feedforward_dim: Size = 192,
    dropout: Share = 0.0,
    given: dict,
) -> None:
    """A detection transformer; reports COCO's average precision."""
    require("fastattn train detect")
    if data == "demo":
        require("fastattn train detect --data demo")
    from fastattn.models.detector import Detector, DetectorConfig
    from fastattn.train.coco import CocoFolder
    from fastattn.train.detect import DetectionTask
    from fastattn.train.memory import require_room
    from fastattn.train.scenes import write_demonstration

    options = options_of(given, DETECT, out, resume)
    sizes = {
        "num_queries": num_queries,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "feedforward_dim": feedforward_dim,
        "dropout": dropout,
        "attention": attention,
    }
    require_room(Detector, DetectorConfig(**sizes))  # before the demonstration is written
    folder = write_demonstration(out / "scenes") if data == "demo" else Path(data)
    channels = 3 if rgb else 1
    parts = [CocoFolder(folder / name, channels) for name in ("train", "validation")]
    if (folder / "test").is_dir():
        parts.append(CocoFolder(folder / "test", channels))
    task = DetectionTask(*parts, seed=options.seed, **sizes)
    train_and_report(task, options, given, out, resume)


@predict_app.command("translate")
def predict_translate(
    texts: Annotated[list[str] | None, typer.Argument(help="Default: the lines of standard input.")] = None,
    *,
    model: Model,
    beam_size: Annotated[int, typer.Option(min=1, max=1000, help="1 is greedy.")] = 4,
    attention_map: Annotated[
        Path | None, typer.Option(help="PNG of where the translation of the first text looked.")
    ] = None,
    attention: Attention = "fastattn",
    device: Device = "cpu",
) -> None:
    """Print a translation for each text."""
    require("fastattn predict translate")
    if attention_map is not None:
        require("fastattn predict translate --attention-map")
    from fastattn.train.devices import resolve_device
    from fastattn.train.output_files import check_outputs
    from fastattn.train.translate import draw_attention, load_translator, translate

    check_outputs({"--attention-map": attention_map})
    texts = _texts(texts)
    where = resolve_device(device)
    translator, tokenizer = load_translator(model, where, attention)
    results = translate(translator, tokenizer, texts, where, beam_size)
    for result in results:
        print(result)
    if attention_map is not None:
        draw_attention(attention_map, translator, tokenizer, texts[0], results[0], where)


@predict_app.command("classify")
def predict_classify(
    texts: Annotated[list[str] | None, typer.Argument(help="Default: the lines of standard input.")] = None,
    *,
    model: Model,
    html: Annotated[Path | None, typer.Option(help="Write the coloured texts as a page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the coloured texts as a picture.")] = None,
    attention: Attention = "fastattn",
    device: Device = "cpu",
) -> None:
    """Print label, probability and each text, its words coloured by the attention they got."""
    require("fastattn predict classify")
    if png is not None:
        require("fastattn predict classify --png")
    from rich.console import Console

    from fastattn.train import show
    from fastattn.train.classify import explain_texts, load_classifier
    from fastattn.train.devices import resolve_device
    from fastattn.train.output_files import check_outputs

    check_outputs({"--html": html, "--png": png})
    where = resolve_device(device)
    results = explain_texts(*load_classifier(model, where, attention), _texts(texts), where)
    console = Console()
    for result in results:
        console.print(f"{result.label} {result.probability:.3f} ", show.coloured(result), highlight=False)
    if html is not None:
        show.write_html(html, results)
    if png is not None:
        show.draw_words(png, results)


@predict_app.command("detect")
def predict_detect(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    *,
    model: Model,
    threshold: Annotated[
        float, typer.Option(callback=within(fields.Range(0, 1)), help="Least score of an object.")
    ] = 0.4,
    pictures: Annotated[
        Path | None, typer.Option(help="Directory for the images with their boxes and attention drawn.")
    ] = None,
    attention: Attention = "fastattn",
    device: Device = "cpu",
) -> None:
    """Print, as a line of JSON for each image, the objects in it: label, score, box (x, y, width, height)."""
    require("fastattn predict detect")
    if pictures is not None:
        require("fastattn predict detect --pictures")
    import json

    from fastattn.train.detect import detect, load_detector
    from fastattn.train.devices import resolve_device

    detector, names = load_detector(model, resolve_device(device), attention)
    for found in detect(detector, names, images, threshold, pictures):
        print(json.dumps(found))


def _texts(arguments: list[str] | None) -> list[str]:
    """The texts given as arguments, else the lines of standard input."""
    from fastattn.train.errors import TrainingError
    from fastattn.train.input_files import decode

    if arguments:
        # what is not UTF-8 among the arguments comes as lone surrogates
        texts = [decode("the argument TEXTS", text.encode(errors="surrogateescape")) for text in arguments]
    elif sys.stdin is None:
        texts = []
    else:
        text = decode("standard input", sys.stdin.buffer.read())
        texts = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not texts:
        raise TrainingError("no text given, as an argument or on standard input")
    return texts
