"""The translation task: pairs of texts, subword tokens, a Transformer; judged by exact match and BLEU."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastattn.models.decoding import beam_search, greedy
from fastattn.models.fields import Share, check_value
from fastattn.models.transformer import Transformer, TransformerConfig, translation_loss
from fastattn.train import checkpoint as files
from fastattn.train.batches import pad_tokens
from fastattn.train.errors import TrainingError
from fastattn.train.memory import build
from fastattn.train.output_files import write_text
from fastattn.train.task import LOSSES_DIFFER, Task, digest_of
from fastattn.train.tokens import BOS_ID, EOS_ID, PAD_ID, load_tokenizer, train_subwords

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Pairs = list[tuple[str, str]]


@dataclass
class TranslationData:
    """Pairs of (source, target) text."""

    train: Pairs
    validation: Pairs
    test: Pairs = field(default_factory=list)


class TranslationTask(Task):
    """Teacher-forced training with label smoothing, greedy decoding for validation, beam search for the test.

    Pairs longer than ``max_length`` tokens are truncated in training.
    """

    name = "translate"
    metric = "exact_match"
    least_steps = 800

    def __init__(
        self,
        data: TranslationData,
        vocab_size: int = 1000,
        label_smoothing: float = 0.1,
        beam_size: int = 4,
        validation_limit: int = 500,
        seed: int = 0,
        **model_options,
    ):
        if not data.train or not data.validation:
            raise TrainingError(f"{len(data.train)} training and {len(data.validation)} validation pairs: too few")
        check_value("label_smoothing", label_smoothing, Share)
        self.data = data
        self.label_smoothing, self.beam_size = label_smoothing, beam_size
        self.validation_limit = validation_limit
        self.tokenizer = train_subwords((text for pair in data.train for text in pair), vocab_size)
        torch.manual_seed(seed)
        self.config = TransformerConfig(
            vocab_size=self.tokenizer.get_vocab_size(),
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            **model_options,
        )
        self.model = build(Transformer, self.config)
        limit = self.config.max_length
        self.sources = encode_sources(self.tokenizer, [s for s, _ in data.train], limit)
        targets = self.tokenizer.encode_batch([t for _, t in data.train])
        self.targets = [[BOS_ID, *t.ids[: limit - 1], EOS_ID] for t in targets]

    def lengths(self) -> list[int]:
        return [len(s) + len(t) for s, t in zip(self.sources, self.targets, strict=True)]

    def collate(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        source = pad_tokens([self.sources[i] for i in indices], PAD_ID, self.device)
        target = pad_tokens([self.targets[i] for i in indices], PAD_ID, self.device)
        return source, target

    def loss(self, model, batch) -> torch.Tensor:
        source, target = batch  # [B, Ls], [B, Lt + 1]
        return translation_loss(model(source, target[:, :-1]), target[:, 1:], PAD_ID, self.label_smoothing)

    def evaluate(self) -> dict[str, float]:
        pairs = self.data.validation[: self.validation_limit]
        translated = translate(self.model, self.tokenizer, [s for s, _ in pairs], self.device)
        loss, tokens = 0.0, 0
        for start in range(0, len(pairs), 250):
            part = pairs[start : start + 250]
            source = pad_tokens(
                encode_sources(self.tokenizer, [s for s, _ in part], self.config.max_length), PAD_ID, self.device
            )
            targets = self.tokenizer.encode_batch([t for _, t in part])
            target = pad_tokens(
                [[BOS_ID, *t.ids[: self.config.max_length - 1], EOS_ID] for t in targets], PAD_ID, self.device
            )
            count = int((target[:, 1:] != PAD_ID).sum())
            logits = self.model(source, target[:, :-1])
            loss += float(translation_loss(logits, target[:, 1:], PAD_ID)) * count
            tokens += count
        return {"validation_loss": loss / tokens, "exact_match": exact_match(translated, [t for _, t in pairs])}

    def about_losses(self) -> str:
        share, size = self.label_smoothing, self.config.vocab_size
        reasons = []
        if share:
            reasons.append(
                f"label smoothing of {share:g}, with which a perfect model has a loss of "
                f"{smoothed_entropy(share, size):.2f}"
            )
        if self.config.dropout:
            reasons.append(f"dropout of {self.config.dropout:g}")
        return LOSSES_DIFFER.format(reasons=" and ".join(reasons)) if reasons else ""

    def report(self) -> dict[str, Any]:
        pairs = self.data.test or self.data.validation
        translated = translate(self.model, self.tokenizer, [s for s, _ in pairs], self.device, beam_size=self.beam_size)
        references = [t for _, t in pairs]
        return {
            "pairs": len(pairs),
            "exact_match": exact_match(translated, references),
            "bleu": bleu(translated, references),
            "beam_size": self.beam_size,
        }

    def configuration(self) -> dict[str, Any]:
        return asdict(self.config)

    def save_files(self, directory: Path) -> None:
        write_text(directory / "tokenizer.json", self.tokenizer.to_str())

    def digest(self) -> str:
        return digest_of(self.sources, self.targets)


def smoothed_entropy(share: float, size: int) -> float:
    """The least cross-entropy that label smoothing leaves: the target's own, a ``share`` of it spread over ``size``."""
    each = share / size
    return -sum(p * math.log(p) * n for p, n in ((1 - share + each, 1), (each, size - 1)) if p)


def encode_sources(tokenizer: Tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """Token lists that end in EOS, at most ``max_length`` long."""
    return [[*e.ids[: max_length - 1], EOS_ID] for e in tokenizer.encode_batch(texts)]


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: list[str],
    device: torch.device,
    beam_size: int = 1,
    batch_size: int = 250,
    max_length: int | None = None,
) -> list[str]:
    """Translations of the texts, greedy for ``beam_size`` 1.  Like lengths are decoded together."""
    sources = encode_sources(tokenizer, texts, model.config.max_length)
    order = sorted(range(len(texts)), key=lambda i: len(sources[i]))
    result = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        source = pad_tokens([sources[i] for i in indices], PAD_ID, device)
        # A translation is rarely over twice its source: a run-away hypothesis ends there.
        limit = min(max_length or model.config.max_length, 2 * source.shape[1] + 30)
        if beam_size == 1:
            tokens = greedy(model, source, limit)
        else:
            tokens = beam_search(model, source, beam_size, max_length=limit)[0][:, 0]
        for i, text in zip(indices, tokenizer.decode_batch(tokens.tolist()), strict=True):
            result[i] = text
    return result


def exact_match(translated: list[str], references: list[str]) -> float:
    """The share of translations that are the reference, letter by letter."""
    return sum(a == b for a, b in zip(translated, references, strict=True)) / len(references)


def bleu(translated: list[str], references: list[str]) -> float:
    """Corpus BLEU (Papineni et al., 2002) by sacrebleu with its default tokenisation, 0 to 100."""
    from sacrebleu import corpus_bleu

    return corpus_bleu(translated, [references]).score


def draw_attention(
    path: Path, model: Transformer, tokenizer: Tokenizer, text: str, translated: str, device: torch.device
) -> None:
    """A picture of the last decoder layer's cross-attention, mean over its heads."""
    from fastattn.train.show import draw_translation

    (source,) = encode_sources(tokenizer, [text], model.config.max_length)
    target = [BOS_ID, *tokenizer.encode(translated).ids][: model.config.max_length]
    maps = model.cross_attention(torch.tensor([source], device=device), torch.tensor([target], device=device))

    def names(ids: list[int]) -> list[str]:
        texts = ("end" if i == EOS_ID else tokenizer.decode([i]).replace(" ", "␣") for i in ids)
        return ["".join(c if c.isprintable() else "·" for c in text) for text in texts]

    # Row t of the map belongs to the token that position t predicts, the one after target[t].
    draw_translation(path, names(source), names([*target[1:], EOS_ID]), maps[-1, 0].float().cpu().numpy())


def load_translator(directory: Path, device: torch.device, attention: str | None = None):
    """(model, tokenizer) of a trained run."""
    model = files.load_model(Transformer, TransformerConfig, directory, TranslationTask.name, attention)
    return model.to(device), load_tokenizer(directory / "tokenizer.json", model.config.vocab_size)
