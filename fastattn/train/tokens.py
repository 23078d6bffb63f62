"""Tokenizers: subwords for translation, words for classification, both by the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fastattn.train.errors import CheckpointError, DataError, brief
from fastattn.train.input_files import decode, read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
PAD_ID, BOS_ID, EOS_ID, UNKNOWN_ID = range(4)
SPECIAL_TOKENS = [PAD, BOS, EOS, UNKNOWN]


def train_subwords(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al., 2016): any text is encoded and decoded without loss.

    Digits are tokens of their own, so that numbers not seen in training are made of known tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_words(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """The commonest words and punctuation marks, lower-cased; the others are ``<unk>``.

    The encoding's offsets point into the text as given, so that weights can be shown on its words.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"\w+(?:['’]\w+)*|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model whose tokens are below ``vocab_size``."""
    from tokenizers import Tokenizer

    if not path.exists():
        raise CheckpointError(f"{path}: missing")
    try:
        tokenizer = Tokenizer.from_str(decode(path, read_bytes(path)))
        tokenizer.encode("a word")
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    except DataError as error:
        raise CheckpointError(f"{path}: not a tokenizer ({error.problem})") from error
    except BaseException as error:  # the library raises bare Exception, and its panics are none
        if isinstance(error, KeyboardInterrupt):
            raise
        raise CheckpointError(f"{path}: not a tokenizer ({brief(error)})") from error
    if largest >= vocab_size:
        raise CheckpointError(f"{path}: has the token {largest}, the model's are below {vocab_size}")
    return tokenizer
