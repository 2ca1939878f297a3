"""Words of an answer that have a value: units, scales and counted nouns behind a number, and numbers that are spelled out."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from soar.problems.answers import LEXICON, WORDS
from soar.problems.formulas import Token, Unreadable

UNITS: dict[str, tuple[str, Fraction]] = {}  # unit -> (first unit of its line, how many of it)
for line in LEXICON["units"]:
    names, *others = (part.split() for part in re.split("[:,]", line))
    for *more, size in ([*names, 1], *others):
        UNITS |= {name.casefold(): (names[0], Fraction(size)) for name in more}
COMPOUND, SCALES = LEXICON["compound"], LEXICON["scales"]
NUMERALS, TENS = LEXICON["numerals"].split(), LEXICON["tens"].split()
CURRENCIES = ("dollar", "euro", "gbp", "rupee", "yen")
SHORT_UNITS = WORDS["percent"] | {"in", "am", "pm", "sq", "cu", *COMPOUND, *(name for name in UNITS if len(name) > 1)}


class Unit(NamedTuple):
    """powers: unit -> power, sorted; factor: how many of them. label: words that are no known units (`apples`)."""

    powers: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    label: str = ""


def read_unit(tokens: Sequence[Token]) -> tuple[Unit | None, int, bool]:
    """Unit, scale (`million`) and per cent sign in what stands behind a value. Raises Unreadable for anything else."""
    words = list[str]()
    for token in tokens:
        if token.kind not in ("word", "var", "num") and not token.is_a(*"^/.()*{},-", *(["'"] if words else [])):
            raise Unreadable("more than words behind a value")
        word = token.text.casefold() if len(token.text) > 1 else token.text
        words += COMPOUND.get(word, word).split()
    powers, factor, label, scale, percent = dict[str, int](), Fraction(1), list[str](), 1, False
    sign = following = 1  # of the power of the next unit: -1 behind a slash; 2 behind `square`, 3 behind `cubic`
    last = ("", Fraction(1), 1)  # unit before this word, which `^2` or `squared` changes: name, size, sign
    for word in re.findall(r"[^\W\d_]+|\^[ {(]*-?\s*\d+|\d+|/", " ".join(words)):
        single = word.removesuffix("s") if len(word) > 2 else word
        if word in ("/", "per"):
            sign = -1
        elif word[0] == "^" or word in ("squared", "cubed"):
            power = {"squared": 2, "cubed": 3}.get(word) or int(re.sub(r"[^-\d]", "", word))
            if not last[0] or abs(power) > 3:
                raise Unreadable("a power of a word")
            powers[last[0]] = powers.get(last[0], 0) + last[2] * (power - 1)
            factor *= last[1] ** (last[2] * (power - 1))
        elif word in ("square", "sq", "cubic", "cu"):
            following = 2 if word[0] == "s" else 3
        elif word.isdigit() or {word, single} & WORDS["meaning"] or (single.endswith("th") and single[:-2] in SCALES):
            raise Unreadable("a word that changes the value")
        elif word in WORDS["percent"]:
            percent = True
        elif single in SCALES and not label and not powers:
            scale *= SCALES[single]
        elif (unit := UNITS.get(word.casefold()) or UNITS.get(single.casefold())) is not None:
            name, size = unit
            last = (name, size, sign)
            powers[name] = powers.get(name, 0) + sign * following
            factor *= size ** (sign * following)
            following = 1
        else:  # a counted noun; its power says nothing
            last, following = ("?", Fraction(1), sign), 1
            label += [single] if single not in WORDS["counted"] else []
    if following != 1:
        raise Unreadable("square of nothing")
    powers.pop("?", None)
    if label:
        return Unit(label=" ".join([*label, *sorted(powers)])), scale, percent
    return Unit(tuple(sorted(powers.items())), factor) if powers else None, scale, percent


def spelled(text: str) -> Fraction | None:
    """The number that words say, `twenty-one`, `two hundred and five`, `two thirds`; None for other words."""
    words, total, group = re.sub(r"-|\band\b", " ", text.casefold()).split(), 0, 0
    parts = LEXICON["parts"].get(words[-1].removesuffix("s")) if len(words) > 1 else None
    if parts:
        share = spelled(" ".join(words[:-1]))
        return None if share is None or share.denominator > 1 else share / parts
    for place, word in enumerate(words):
        # What may follow is less than the last digit's worth: 21 is said as 20 and 1, and no 1 follows 1
        room = 100 if group % 100 == 0 else 10 if group % 10 == 0 and group % 100 >= 20 else 0
        small = NUMERALS.index(word) if word in NUMERALS else 10 * TENS.index(word) + 20 if word in TENS else room
        if small < room and (small or place == 0 == len(words) - 1):
            group += small
        elif word in ("hundred", "dozen") and 0 < group < 100:
            group *= SCALES[word]
        elif SCALES.get(word, 0) > 100 and 0 < group < 1_000:
            total, group = total + group * SCALES[word], 0
        else:
            return None
    return Fraction(total + group) if words else None
