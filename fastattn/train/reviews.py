"""Generated film reviews in which single words mislead: negation, and opinions about something else.

The label is the opinion about this film.  The words that carry it are often negated ("not a bad
film"), and other clauses judge the ending, the trailer or the director's last film, often the other
way.  Counting words therefore tells little; who is judged, and whether it is denied, tells all.
"""

from __future__ import annotations

import random

Labelled = list[tuple[str, str]]

LABELS = ("negative", "positive")

_WORDS = {
    "positive": (
        "good great wonderful moving clever charming gripping funny beautiful brilliant fine superb "
        "delightful touching fresh elegant"
    ).split(),
    "negative": (
        "bad dull boring awful clumsy tedious lifeless silly ugly dreadful poor weak predictable shallow stale sloppy"
    ).split(),
}
_FILM = ("film", "movie", "picture")
_PLAIN_MAIN = (
    "this is {a} {adjective} {film}",
    "it is {a} {adjective} {film}",
    "this {film} is {adjective}",
    "I found this {film} {adjective}",
    "what {a} {adjective} {film} this is",
    "{a} {adjective} {film}",
)
_DENIED_MAIN = (
    "this is not {a} {adjective} {film}",
    "it is hardly {a} {adjective} {film}",
    "this {film} is never {adjective}",
    "I would not call this {film} {adjective}",
    "nobody could call it {a} {adjective} {film}",
    "not {a} {adjective} {film}",
    "this {film} is anything but {adjective}",
    "far from {a} {adjective} {film}",
)
_ASPECT = (
    "the ending",
    "the score",
    "the plot",
    "the camera work",
    "the dialogue",
    "the trailer",
    "the book",
    "the second act",
    "the director's last {film}",
    "the {film} before it",
    "the lead actor",
    "the poster",
)
_PLAIN_ASPECT = ("{aspect} is {adjective}", "{aspect} was {adjective}", "I found {aspect} {adjective}")
_DENIED_ASPECT = (
    "{aspect} is not {adjective}",
    "{aspect} is never {adjective}",
    "{aspect} was anything but {adjective}",
    "I would not call {aspect} {adjective}",
    "{aspect} is hardly {adjective}",
)
_JOINED = (
    "{main}, though {other}",
    "{main}, although {other}",
    "{main}, even if {other}",
    "although {other}, {main}",
    "{other}, but {main}",
    "{main}, and {other}",
)
_ASIDE = (
    "I saw it on a Tuesday with my sister",
    "the cinema was half empty",
    "it runs for two hours",
    "we talked about it all the way home",
    "the man in front of me slept",
    "it opened here last week",
    "I had not read anything about it",
)


def generated_review(rng: random.Random, denial: float = 0.3) -> tuple[str, str]:
    """One (text, label).  ``denial`` is the share of negated opinions."""
    label = rng.choice(LABELS)
    clause = _opinion(rng, label, denial, _PLAIN_MAIN, _DENIED_MAIN, "")
    other_label = label if rng.random() < 0.4 else _opposite(label)
    other = _opinion(rng, other_label, denial, _PLAIN_ASPECT, _DENIED_ASPECT, rng.choice(_ASPECT))
    sentences = [rng.choice(_JOINED).format(main=clause, other=other)]
    if rng.random() < 0.5:
        more = rng.choice(LABELS)
        sentences.append(_opinion(rng, more, denial, _PLAIN_ASPECT, _DENIED_ASPECT, rng.choice(_ASPECT)))
    if rng.random() < 0.6:
        sentences.append(rng.choice(_ASIDE))
    rng.shuffle(sentences)
    return " ".join(s[0].upper() + s[1:] + "." for s in sentences), label


def review_corpus(examples: int = 8000, seed: int = 0, held_out: float = 0.1) -> tuple[Labelled, Labelled, Labelled]:
    """(train, validation, test) of distinct reviews, ``examples`` together, the last two ``held_out`` each."""
    rng = random.Random(seed)
    seen: dict[str, str] = {}
    while len(seen) < examples:
        text, label = generated_review(rng)
        seen[text] = label
    reviews = list(seen.items())
    held = round(examples * held_out)
    return reviews[2 * held :], reviews[:held], reviews[held : 2 * held]


def _opinion(rng, label, denial, plain, denied, aspect) -> str:
    deny = rng.random() < denial
    adjective = rng.choice(_WORDS[_opposite(label) if deny else label])
    article = "an" if adjective[0] in "aeiou" else "a"
    template = rng.choice(denied if deny else plain).replace("{aspect}", aspect)
    return template.format(a=article, adjective=adjective, film=rng.choice(_FILM))


def _opposite(label: str) -> str:
    return LABELS[1 - LABELS.index(label)]
