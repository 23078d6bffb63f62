"""The classification task: texts (or sequences of feature vectors) with labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fastattn.models.classifier import Classifier, ClassifierConfig
from fastattn.train import checkpoint as files
from fastattn.train.batches import pad_tokens
from fastattn.train.errors import TrainingError
from fastattn.train.memory import build
from fastattn.train.output_files import write_json, write_text
from fastattn.train.reviews import review_corpus
from fastattn.train.show import Explained
from fastattn.train.splits import split
from fastattn.train.task import LOSSES_DIFFER, Task, digest_of
from fastattn.train.text_files import read_imdb, read_labelled
from fastattn.train.tokens import EOS_ID, PAD_ID, load_tokenizer, train_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Labelled = list[tuple[Any, str]]


@dataclass
class ClassificationData:
    """(input, label) examples; an input is a text, or a list of feature vectors."""

    train: Labelled
    validation: Labelled
    test: Labelled = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        return isinstance(self.train[0][0], str)


class ClassificationTask(Task):
    """Cross-entropy training of a :class:`Classifier`; accuracy decides which weights are best."""

    name = "classify"
    metric = "accuracy"
    least_steps = 400

    def __init__(
        self, data: ClassificationData, vocab_size: int = 20_000, min_frequency: int = 2, seed: int = 0, **options
    ):
        if not data.train or not data.validation:
            raise TrainingError(f"{len(data.train)} training and {len(data.validation)} validation examples: too few")
        self.data = data
        self.labels = sorted({label for _, label in data.train})
        if len(self.labels) < 2:
            raise TrainingError(f"all training examples have the label {self.labels[0]!r}; at least two are needed")
        for part in (data.validation, data.test):
            for _, label in part:
                if label not in self.labels:
                    raise TrainingError(f"the label {label!r} of a held-out example is not in the training data")
        self.tokenizer = None
        if data.is_text:
            self.tokenizer = train_words((text for text, _ in data.train), vocab_size, min_frequency)
            options["vocab_size"] = self.tokenizer.get_vocab_size()
        else:
            options["input_dim"] = len(data.train[0][0][0])
        torch.manual_seed(seed)
        self.config = ClassifierConfig(num_classes=len(self.labels), pad_id=PAD_ID, **options)
        self.model = build(Classifier, self.config)
        self.inputs, self.targets = self._encode(data.train)

    def lengths(self) -> list[int]:
        return [len(x) for x in self.inputs]

    def collate(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        inputs, lengths = collate_inputs([self.inputs[i] for i in indices], self.device)
        return inputs, lengths, torch.tensor([self.targets[i] for i in indices], device=self.device)

    def loss(self, model, batch) -> torch.Tensor:
        inputs, lengths, targets = batch
        return F.cross_entropy(model(inputs, lengths).float(), targets)

    def evaluate(self) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        inputs, targets = self._encode(self.data.validation)
        logits = classify(self.model, inputs, self.device)[0]
        predicted = logits.argmax(-1).tolist()
        return {
            "validation_loss": float(F.cross_entropy(logits, torch.tensor(targets))),
            "accuracy": float(accuracy_score(targets, predicted)),
            "f1": float(f1_score(targets, predicted, average="macro")),
        }

    def about_losses(self) -> str:
        dropout = self.config.dropout
        return LOSSES_DIFFER.format(reasons=f"dropout of {dropout:g}") if dropout else ""

    def report(self) -> dict[str, Any]:
        from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

        examples = self.data.test or self.data.validation
        inputs, targets = self._encode(examples)
        predicted = classify(self.model, inputs, self.device)[0].argmax(-1).tolist()
        figures = {
            "examples": len(examples),
            "accuracy": float(accuracy_score(targets, predicted)),
            "f1": float(f1_score(targets, predicted, average="macro")),
            "labels": self.labels,
            "confusion_matrix": confusion_matrix(targets, predicted, labels=range(len(self.labels))).tolist(),
        }
        if self.data.is_text:
            figures["bag_of_words_accuracy"] = bag_of_words_accuracy(self.data.train, examples)
        return figures

    def configuration(self) -> dict[str, Any]:
        return asdict(self.config)

    def save_files(self, directory: Path) -> None:
        write_json(directory / files.LABELS, self.labels)
        if self.tokenizer is not None:
            write_text(directory / "tokenizer.json", self.tokenizer.to_str())

    def digest(self) -> str:
        return digest_of(self.inputs, self.targets, self.labels)

    def _encode(self, examples: Labelled):
        inputs = [x for x, _ in examples]
        if self.tokenizer is not None:
            inputs = [ids for ids, _ in encode_texts(self.tokenizer, inputs, self.config.max_length)]
        else:
            inputs = [x[: self.config.max_length] for x in inputs]
        return inputs, [self.labels.index(label) for _, label in examples]


def encode_texts(tokenizer: Tokenizer, texts: list[str], max_length: int):
    """For each text its token ids, at most ``max_length``, and the tokens' (start, end) in the text.

    An empty text is one end token without a place, so that there is something to attend to.
    """
    encoded = []
    for encoding in tokenizer.encode_batch(texts):
        ids, offsets = encoding.ids[:max_length], encoding.offsets[:max_length]
        encoded.append((ids, offsets) if ids else ([EOS_ID], [(0, 0)]))
    return encoded


def collate_inputs(inputs: list, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as ``[B, L]`` or feature sequences as ``[B, L, F]``, padded; lengths ``[B]``."""
    lengths = torch.tensor([len(x) for x in inputs], device=device)
    if isinstance(inputs[0][0], int):
        return pad_tokens(inputs, PAD_ID, device), lengths
    tensors = [torch.tensor(x, dtype=torch.float32) for x in inputs]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device), lengths


@torch.no_grad()
def classify(model: Classifier, inputs: list, device: torch.device, batch_size: int = 250):
    """Logits ``[N, num_classes]`` and, for each input, the weights of its positions as a list."""
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    logits = torch.empty(len(inputs), model.config.num_classes)
    weights: list[list[float]] = [[] for _ in inputs]
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        scores, shares = model.explain(*collate_inputs([inputs[i] for i in indices], device))
        logits[indices] = scores.float().cpu()
        for i, share in zip(indices, shares.tolist(), strict=True):
            weights[i] = share[: len(inputs[i])]
    return logits, weights


def bag_of_words_accuracy(train: Labelled, test: Labelled) -> float | None:
    """The accuracy of a logistic regression on word counts: what order and context must beat.

    None where the texts have no word that it would count.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    try:
        model.fit([x for x, _ in train], [y for _, y in train])
    except ValueError:  # words of one letter are none to it
        return None
    return float(model.score([x for x, _ in test], [y for _, y in test]))


def digits_as_sequences() -> ClassificationData:
    """scikit-learn's 1797 handwritten digits, each a sequence of 8 rows of 8 grey values in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [((digits.images[i] / 16.0).tolist(), str(digits.target[i])) for i in order]
    return ClassificationData(examples[500:], examples[:200], examples[200:500])


def classification_data(
    data: str, test_data: Path | None, text_column: str, label_column: str, held_out: float, seed: int
) -> ClassificationData:
    """The data that the command line names: "demo", "digits", a CSV or TSV file, IMDB's folder or tar."""
    path = Path(data)
    is_imdb = path.is_dir() or ".tar" in path.suffixes or path.suffix == ".tgz"
    if test_data is not None and (data in ("demo", "digits") or is_imdb):
        raise TrainingError(f"--test-data goes with a CSV or TSV file; {data} has a test of its own")
    if data == "demo":
        return ClassificationData(*review_corpus(seed=seed))
    if data == "digits":
        return digits_as_sequences()
    if is_imdb:
        train, test = read_imdb(path)
        rest, validation, more = split(train, held_out / 2, seed, every_label=True)
        return ClassificationData(rest, validation + more, test)
    examples = read_labelled(path, text_column, label_column)
    train, validation, test = split(examples, held_out, seed, every_label=True)
    if test_data is not None:
        known = sorted({label for _, label in train})
        train, test = train + test, read_labelled(test_data, text_column, label_column, known)
    return ClassificationData(train, validation, test)


def explain_texts(
    model: Classifier, tokenizer: Tokenizer | None, labels: list[str], texts: list[str], device: torch.device
) -> list[Explained]:
    """Label, probability and attended words of each text."""
    if tokenizer is None:
        raise TrainingError("the run was trained on sequences of numbers; it cannot read texts")
    encoded = encode_texts(tokenizer, texts, model.config.max_length)
    logits, weights = classify(model, [ids for ids, _ in encoded], device)
    probability, best = logits.softmax(-1).max(-1)
    return [
        Explained(text, labels[label], p, offsets, shares)
        for text, label, p, (_, offsets), shares in zip(
            texts, best.tolist(), probability.tolist(), encoded, weights, strict=True
        )
    ]


def load_classifier(directory: Path, device: torch.device, attention: str | None = None):
    """(model, tokenizer or None, labels) of a trained run."""
    model = files.load_model(Classifier, ClassifierConfig, directory, ClassificationTask.name, attention)
    labels = files.read_labels(directory, model.config.num_classes)
    size = model.config.vocab_size
    tokenizer = load_tokenizer(directory / "tokenizer.json", size) if size else None
    return model.to(device), tokenizer, labels
