"""A generated corpus for translation: dates as people write them in English and German, and in ISO 8601.

Half of the pairs read a written date ("Dienstag, der 3. März 1998" -> "1998-03-03"), half write one
in a named style ("[de full] 1998-03-03/2" -> "Dienstag, der 3. März 1998").  The weekday that a style
needs is given as its ISO number after the slash: computing it is arithmetic, not translation.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta

Pairs = list[tuple[str, str]]

FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)

EN_MONTHS = "January February March April May June July August September October November December".split()
EN_SHORT_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
EN_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
DE_MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
DE_SHORT_MONTHS = "Jan. Feb. März Apr. Mai Juni Juli Aug. Sept. Okt. Nov. Dez.".split()
DE_DAYS = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split()

_EN_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_EN_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
_EN_ORDINALS = {1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth", 12: "twelfth"}
_DE_UNITS = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
    "sechzehn siebzehn achtzehn neunzehn"
).split()
_DE_TENS = "_ _ zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_DE_ORDINALS = {1: "erste", 3: "dritte", 7: "siebte", 8: "achte"}


def english_number(n: int) -> str:
    """0 to 99 in words."""
    if n < 20:
        return _EN_UNITS[n]
    tens, unit = divmod(n, 10)
    return _EN_TENS[tens] + (f"-{_EN_UNITS[unit]}" if unit else "")


def english_ordinal_word(n: int) -> str:
    """1 to 31 as in "the twenty-first"."""
    if n in _EN_ORDINALS:
        return _EN_ORDINALS[n]
    if n < 20:
        return _EN_UNITS[n] + "th"
    tens, unit = divmod(n, 10)
    if unit == 0:
        return _EN_TENS[tens][:-1] + "ieth"
    return f"{_EN_TENS[tens]}-{_EN_ORDINALS.get(unit, _EN_UNITS[unit] + 'th')}"


def english_ordinal(n: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def english_year(year: int) -> str:
    """1900 to 2099 as spoken: "nineteen ninety-eight", "two thousand and seven"."""
    century, rest = divmod(year, 100)
    if year == 2000:
        return "two thousand"
    if century == 20 and rest < 10:
        return f"two thousand and {english_number(rest)}"
    if rest == 0:
        return f"{english_number(century)} hundred"
    if rest < 10:
        return f"{english_number(century)} oh {english_number(rest)}"
    return f"{english_number(century)} {english_number(rest)}"


def german_number(n: int) -> str:
    """0 to 99 in words; 1 is "eins"."""
    if n < 20:
        return "eins" if n == 1 else _DE_UNITS[n]
    tens, unit = divmod(n, 10)
    return (f"{_DE_UNITS[unit]}und" if unit else "") + _DE_TENS[tens]


def german_ordinal_word(n: int) -> str:
    """1 to 31 as in "der einundzwanzigste"."""
    if n in _DE_ORDINALS:
        return _DE_ORDINALS[n]
    return german_number(n) + ("te" if n < 20 else "ste")


def german_year(year: int) -> str:
    """1900 to 2099 as spoken: "neunzehnhundertachtundneunzig", "zweitausendsieben"."""
    century, rest = divmod(year, 100)
    head = "neunzehnhundert" if century == 19 else "zweitausend"
    return head + (german_number(rest) if rest else "")


def _en(d: date) -> dict[str, object]:
    return {"day": EN_DAYS[d.weekday()], "month": EN_MONTHS[d.month - 1], "short": EN_SHORT_MONTHS[d.month - 1]}


def _de(d: date) -> dict[str, object]:
    return {"day": DE_DAYS[d.weekday()], "month": DE_MONTHS[d.month - 1], "short": DE_SHORT_MONTHS[d.month - 1]}


@dataclass(frozen=True)
class Style:
    """A way to write a date.  A ``name`` marks those that are also asked for by name."""

    write: Callable[[date], str]
    name: str | None = None
    weekday: bool = False


def _style(language, template: str, name: str | None = None) -> Style:
    def write(d: date) -> str:
        return template.format(
            d=d,
            nth=english_ordinal(d.day),
            en_nth=english_ordinal_word(d.day),
            de_nth=german_ordinal_word(d.day),
            en_year=english_year(d.year),
            de_year=german_year(d.year),
            **language(d),
        )

    return Style(write, name, "{day}" in template)


STYLES = (
    _style(_en, "{month} {d.day}, {d.year}", "en us"),
    _style(_en, "{d.day} {month} {d.year}", "en uk"),
    _style(_en, "{day}, {month} {d.day}, {d.year}", "en full"),
    _style(_en, "the {en_nth} of {month}, {en_year}", "en words"),
    _style(_en, "{short} {d.day}, {d.year}", "en short"),
    _style(_en, "{d.day} {short} {d.year}"),
    _style(_en, "{nth} of {month} {d.year}"),
    _style(_en, "{month} the {nth}, {d.year}"),
    _style(_en, "{day}, the {nth} of {month} {d.year}"),
    _style(_en, "{day:.3}, {d.day} {short} {d.year}"),
    _style(_en, "{month} {en_nth}, {en_year}"),
    _style(_en, "{d:%m/%d/%Y}"),
    _style(_de, "{d.day}. {month} {d.year}", "de"),
    _style(_de, "{day}, der {d.day}. {month} {d.year}", "de full"),
    _style(_de, "{d:%d.%m.%Y}", "de numbers"),
    _style(_de, "der {de_nth} {month} {de_year}", "de words"),
    _style(_de, "{d.day}. {short} {d.year}", "de short"),
    _style(_de, "{d.day}.{d.month}.{d.year}"),
    _style(_de, "am {d.day}. {month} {d.year}"),
    _style(_de, "{day}, den {d.day}.{d.month}.{d.year}"),
    _style(_de, "{day:.2}., {d.day}. {month} {d.year}"),
    _style(_de, "{d.day}. {month} {de_year}"),
)


def read_pair(d: date, style: Style) -> tuple[str, str]:
    """Written date -> ISO."""
    return style.write(d), d.isoformat()


def write_pair(d: date, style: Style) -> tuple[str, str]:
    """Named style and ISO date -> written date."""
    weekday = f"/{d.isoweekday()}" if style.weekday else ""
    return f"[{style.name}] {d.isoformat()}{weekday}", style.write(d)


def date_corpus(pairs: int = 20_000, seed: int = 0, held_out: float = 0.05) -> tuple[Pairs, Pairs, Pairs]:
    """(train, validation, test) pairs of (source, target), ``pairs`` together, the last two ``held_out`` each.

    The dates of the three parts are disjoint, so a held-out pair is of a day never seen in training,
    in any form.
    """
    rng = random.Random(seed)
    days = [FIRST + timedelta(n) for n in range((LAST - FIRST).days + 1)]
    rng.shuffle(days)
    named = [style for style in STYLES if style.name]
    held = round(len(days) * held_out)
    parts = (days[2 * held :], days[:held], days[held : 2 * held])
    sizes = (pairs - 2 * round(pairs * held_out), round(pairs * held_out), round(pairs * held_out))
    corpus = []
    for part, size in zip(parts, sizes, strict=True):
        seen: dict[str, str] = {}
        while len(seen) < size:
            d = rng.choice(part)
            read = rng.random() < 0.5
            source, target = read_pair(d, rng.choice(STYLES)) if read else write_pair(d, rng.choice(named))
            seen.setdefault(source, target)
        corpus.append(list(seen.items()))
    return tuple(corpus)
