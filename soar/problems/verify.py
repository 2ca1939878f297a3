"""Comparing an answer with a gold answer as mathematics: `reading.py` reads both, `equal` compares the readings.

Bounded in time, so that hostile text may be compared in the main process. `50%` equals 50 and 0.5, since gold answers
drop the sign; `3 or 5` is the set {3, 5}.
"""

import math
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from typing import Any, Literal

from soar.problems.answers import LEXICON, MAX_ANSWER_CHARS, PATTERNS, normalize, read_letters, split_choice
from soar.problems.formulas import MP, POINTS, Node, Unreadable, both, close, evaluate, nodes, real
from soar.problems.reading import Bag, Named, Reading, Region, Relation, Scalar, Tuple, Unit, Words, as_region, read
from soar.types import UserError, Verdict

MAX_TEXT_WORDS = 8
DEGREE = Unit((("degree", 1),))
LEAST_PLACES = 6  # of a decimal that may stand for a number that no decimal can write
PARAMETER = r"(?<![A-Za-z\\])%s(?![A-Za-z])"


class VerifierError(UserError, RuntimeError):
    """A verifier that cannot be used: unknown name, no such function, wrong return shape, workers that do not start."""


def equal(a: Reading, b: Reading) -> bool:
    """Whether two readings are the same. Raises Unreadable for values too large to be compared."""
    if isinstance(a, Words) or isinstance(b, Words):
        a, b = (x.value if isinstance(x, Named) and isinstance(x.value, Words) else x for x in (a, b))
        return isinstance(a, Words) and isinstance(b, Words) and a.text == b.text != ""
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Bag) and not isinstance(y, Bag) and len(_distinct(x.parts)) == 1:  # {3} against 3
            return equal(x.parts[0], y)
        if isinstance(x, Named) and isinstance(y, Bag) and isinstance(x.value, Tuple) and x.name.startswith("("):
            names, parts = x.name.strip("()").split(","), x.value.parts  # (p, q) = (3, 5) against p = 3, q = 5
            return len(names) == len(parts) and equal(Bag(tuple(map(Named, names, parts))), y)
        if isinstance(x, Tuple) and x.kind == "()" and isinstance(y, Bag):
            # (3, 5) against q = 5, p = 3: the order of the alphabet, where names are told on one side only
            named = sorted((p for p in y.parts if isinstance(p, Named) and not p.arguments), key=lambda p: p.name)
            if len(named) == len(y.parts):
                return len(x.parts) == len(named) > 1 and all(map(equal, x.parts, (p.value for p in named)))
        if isinstance(x, Tuple) and isinstance(y, Scalar) and x.kind == ":" and len(x.parts) == 2:
            over, under = x.parts  # of 12:30 pm the last has a unit: a time is no ratio
            plain = isinstance(over, Scalar) and isinstance(under, Scalar) and not (over.unit or under.unit)
            return plain and equal(Scalar(("/", over.node, under.node)), y)  # type: ignore[union-attr]
        if isinstance(x, Tuple) and isinstance(y, Tuple) and x.kind == "matrix" and y.kind in ("()", "<()>"):
            vector = tuple(row.parts[0] for row in x.parts if isinstance(row, Tuple) and len(row.parts) == 1)
            return len(vector) == len(x.parts) and equal(Tuple(y.kind, vector), y)
    if isinstance(a, Named) and isinstance(b, Named):
        return _equal_named(a, b)
    if isinstance(a, Relation) or isinstance(b, Relation):
        return _equal_relations(a, b)
    if isinstance(a, Named) or isinstance(b, Named):
        return equal(a.value if isinstance(a, Named) else a, b.value if isinstance(b, Named) else b)
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        return _equal_scalars(a, b)
    if isinstance(a, Bag) and isinstance(b, Bag):
        return _equal_bags(a, b)
    if isinstance(a, Tuple) and isinstance(b, Tuple):
        kinds = {kind.replace("<(", "(").replace(")>", ")") for kind in (a.kind, b.kind)}
        return len(kinds) == 1 and len(a.parts) == len(b.parts) and all(map(equal, a.parts, b.parts))
    return _equal_regions(a, b) if isinstance(a, Region) or isinstance(b, Region) else False


def _equal_scalars(a: Scalar, b: Scalar) -> bool:
    """Whether two values are the same at every point, in units of one kind; a per cent sign may be left out."""
    a, b = (x.product if x.product and y.names and not y.unit else x for x, y in ((a, b), (b, a)))
    if (a.percent and b.unit) or (b.percent and a.unit):
        return False
    if a.unit and b.unit and (a.unit.label, a.unit.powers) != (b.unit.label, b.unit.powers):
        return False
    factor = a.unit.factor / b.unit.factor if a.unit and b.unit else 1
    for x, y in ((a, b), (b, a)):
        if x.unit == DEGREE and not y.unit and not isinstance(y.values[0], Fraction):  # an angle in radians
            return _equal_scalars(Scalar(("circ", x.node)), y)
    places = max(a.places, b.places) if not (a.places and b.places) else 0
    reals = (a.names or b.names) and not any(node[0] == "i" for side in (a, b) for node in nodes(side.node))
    compared = 0
    for k in range(max(len(a.values), len(b.values))):
        x, y = a.values[k % len(a.values)], b.values[k % len(b.values)]
        if x is None or y is None or (reals and (_is_complex(x) or _is_complex(y))):
            continue  # another branch of a root or a logarithm says nothing about real values
        x = x if factor == 1 else both(operator.mul, x, factor)
        percent = a.percent != b.percent and (close(x / 100, y) if a.percent else close(x, y / 100))
        same = percent or close(x, y)
        if not same and places >= LEAST_PLACES:  # of a decimal, that may be rounded where none can be the other
            ends = (isinstance(v, Fraction) and not pow(10, v.denominator.bit_length(), v.denominator) for v in (x, y))
            same = not all(ends) and abs(real(x) - real(y)) < MP.mpf(10) ** -places
        if not same:
            return False
        compared += 1
    return compared > 0


def _is_complex(value: Any) -> bool:
    return isinstance(value, MP.mpc) and bool(abs(value.imag) > 1e-30 * (1 + abs(value.real)))


def _equal_named(a: Named, b: Named) -> bool:
    """Functions up to the names of their arguments; else equal values of one name, or equations of two."""
    if a.arguments and b.arguments:
        if len(a.arguments) != len(b.arguments) or a.name != b.name:
            return False
        if isinstance(a.value, Scalar) and isinstance(b.value, Scalar):
            x, y = (_rename(n.value.node, dict(zip(n.arguments, "\1\2\3\4\5", strict=False))) for n in (a, b))  # type: ignore[union-attr]
            return _equal_scalars(Scalar(x, places=a.value.places), Scalar(y, places=b.value.places))
    if a.name == b.name or a.arguments or b.arguments:
        return equal(a.value, b.value)
    return _equal_relations(a, b)


def _rename(node: Node, names: dict[str, str]) -> Node:
    if node[0] == "var":
        return ("var", names.get(node[1], node[1]))
    return tuple(_rename(part, names) if isinstance(part, tuple) else part for part in node)


def _as_relation(reading: Reading) -> Relation | None:
    if isinstance(reading, Named) and isinstance(reading.value, Scalar):
        letters = reading.name if reading.name.isalpha() and reading.name.islower() else [reading.name]
        product: list[Node] = [("var", letter) for letter in letters]
        return Relation("=", ("-", reduce(lambda a, b: ("*", a, b), product), reading.value.node))
    return reading if isinstance(reading, Relation) else None


def _equal_relations(a: Reading, b: Reading) -> bool:
    """Whether one is a multiple of the other, by the ratio of the two at every point."""
    left, right = _as_relation(a), _as_relation(b)
    if left is None or right is None:
        value, other = (left.right, b) if left else (right.right if right else None, a)
        return equal(value, other) if value and isinstance(other, Scalar) and not other.names else False
    if left.kind != right.kind:
        return False
    ratios = list[Any]()
    for k in range(POINTS):
        x, y = evaluate(left.node, k), evaluate(right.node, k)
        if x is not None and y is not None:
            ratios += [both(operator.truediv, x, y) if x != 0 and y != 0 else None]
            if ratios[-1] is None or not close(ratios[-1], ratios[0]):
                return False
    positive = left.kind in ("=", "!=") or all(not _is_complex(x) and real(x).real > 0 for x in ratios[:1])
    return bool(ratios) and positive


def _equal_bags(a: Bag, b: Bag) -> bool:
    if {a.joiner, b.joiner} == {"and", "or"} and any(isinstance(x, Region | Relation) for x in (*a.parts, *b.parts)):
        return False
    left, right = _distinct(a.parts), _distinct(b.parts)
    if len(left) != len(right):
        return False
    for part in left:
        place = next((i for i, other in enumerate(right) if equal(part, other)), None)
        if place is None:
            return False
        del right[place]
    return True


def _distinct(parts: Sequence[Reading]) -> list[Reading]:
    kept: list[Reading] = []
    for part in parts:
        kept += [] if any(equal(part, other) for other in kept) else [part]
    return kept


def _equal_regions(a: Reading, b: Reading) -> bool:
    """Whether the same numbers lie in both: tried at every end, between neighbours and beyond the last."""
    try:
        regions = [as_region(a), as_region(b)]
    except Unreadable:
        return False
    if regions[0].name and regions[1].name and regions[0].name != regions[1].name:
        return False
    for k in range(2 if any(end.names for region in regions for end in region.ends) else 1):
        ends = [[end.values[k % len(end.values)] for end in region.ends] for region in regions]
        if any(end is None or _is_complex(end) for side in ends for end in side):
            return False
        ends = [[real(end).real for end in side] for side in ends]
        marks = list[Any]()
        for mark in sorted(end for side in [*ends, [MP.mpf(0)]] for end in side if not MP.isinf(end)):
            marks += [] if marks and close(mark, marks[-1]) else [mark]
        ends = [[next((mark for mark in marks if close(mark, end)), end) for end in side] for side in ends]
        for x in (marks[0] - 1, *marks, *((x + y) / 2 for x, y in pairwise(marks)), marks[-1] + 1):
            if regions[0].inside(x, ends[0]) != regions[1].inside(x, ends[1]):
                return False
    return True


def read_number(answer: str) -> Fraction | None:
    """The exact value of an answer that is one rational number, unit and sign of currency aside; None for everything else."""
    reading = read(answer) if len(answer) <= MAX_ANSWER_CHARS and "=" not in answer else Words("")
    value = reading.values[0] if isinstance(reading, Scalar) and not reading.names else None
    return value if isinstance(value, Fraction) else None


def gold_kind(answer: str, verifier: str) -> Literal["value", "text", "none"]:
    """What a gold answer is to a named verifier: a value, words that can only be compared as text, or no answer at all.

    `none`: empty, a placeholder (`proof`, `n/a`), lines with words, prose of more than MAX_TEXT_WORDS words, and for
    `number` whatever is no number. Integrals and the like count as values.
    """
    text = normalize(answer)
    if not text or text.casefold().strip(" .[]()") in LEXICON["no_answer"]:
        return "none"
    if verifier not in ("math", "number"):
        return "value"
    if "\n" in answer.strip() and "\\" not in answer:
        return "none"
    reading = read(answer) if len(answer) <= MAX_ANSWER_CHARS else Words("")
    if verifier == "number":
        return "value" if isinstance(reading, Scalar) and not reading.names else "none"
    if split_choice(answer)[0] or all(words.value for words in _words_in(reading)):
        return "value"
    return "text" if len(text.split()) <= MAX_TEXT_WORDS else "none"


def _words_in(reading: Reading) -> Iterator[Words]:
    if isinstance(reading, Words):
        yield reading
    for part in (reading.value,) if isinstance(reading, Named) else getattr(reading, "parts", ()):
        yield from _words_in(part)


def is_parsable(answer: str, verifier: str) -> bool:
    """Whether it can be a gold answer: for `math` a finite value, set or relation, no words; for `number` one; else any."""
    if verifier not in ("math", "number"):
        return bool(answer.strip())
    if gold_kind(answer, verifier) != "value":
        return False
    reading = read(answer)
    return not (isinstance(reading, Scalar) and all(value is None or MP.isinf(real(value)) for value in reading.values))


def as_verdict(value: Any, name: str, success_at: float = 1.0) -> Verdict:
    """The verdict that a user's check returned. Raises TypeError for anything else.

    value: True, False, a number (`success_at` or more is correct), None or NaN (unscorable), or a Verdict.
    """
    if isinstance(value, Verdict):
        return value
    if value is None:
        return Verdict.UNSCORABLE
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        kind = type(value).__name__
        raise TypeError(f"{name} returned a {kind} ({value!r:.80}), expected True, False, a number, None or a Verdict")
    score = float(value)
    return Verdict.UNSCORABLE if math.isnan(score) else _verdict(score >= success_at)


def _verdict(same: bool) -> Verdict:
    return Verdict.CORRECT if same else Verdict.WRONG


def compare_exact(answer: str, gold: str) -> Verdict:
    """Equal text, up to whitespace."""
    return _verdict(answer.split() == gold.split())


def compare_choice(answer: str, gold: str) -> Verdict:
    """Equal choice letters, of which a lone one may be small; equal normalised text where the gold answer is no letter."""
    letter, text = split_choice(gold)[0], normalize(answer)
    chosen = split_choice(answer)[0] or text.strip("().").upper()
    return _verdict(chosen == letter if letter else text == normalize(gold))


def compare_number(answer: str, gold: str) -> Verdict:
    """`compare_math` for a gold answer that is a number; UNSCORABLE where it is none."""
    return compare_math(answer, gold) if gold_kind(gold, "number") == "value" else Verdict.UNSCORABLE


def _same_parameter(answer: str, gold: str) -> str:
    """The answer with the gold answer's name for a whole number: `2k\\pi` is `2n\\pi` with n in the whole numbers."""
    told = [(PATTERNS["integer"].search(text), set(re.findall(PARAMETER % "([kmn])", text))) for text in (answer, gold)]
    names = [match[1] if match else "".join(letters) for match, letters in told]
    if not any(match for match, _ in told) or names[0] == names[1] or [len(name) for name in names] != [1, 1]:
        return answer
    return answer if re.search(PARAMETER % names[1], answer) else re.sub(PARAMETER % names[0], names[1], answer)


def compare_math(answer: str, gold: str) -> Verdict:
    """Equal as mathematics; UNSCORABLE where the gold answer is prose or a placeholder."""
    if answer == gold:
        return Verdict.CORRECT
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return Verdict.WRONG
    a, g = normalize(answer), normalize(gold)
    if a == g or not a:
        return _verdict(a == g)
    answer = _same_parameter(answer, gold)
    letters = read_letters(answer), read_letters(gold)
    if all(letters):
        return _verdict(letters[0] == letters[1])
    (chosen, answer_text), (letter, gold_text) = split_choice(answer), split_choice(gold)
    if letter and (chosen or (gold.lstrip("\\$ ")[:1] == "(" and len(a.strip("().")) == 1)):
        return compare_choice(answer, gold)
    wanted = read(gold_text or gold)
    with suppress(Unreadable):  # too large at the points where they were to be compared
        if equal(wanted, read(answer_text or answer)):
            return Verdict.CORRECT
    return Verdict.UNSCORABLE if any(_words_in(wanted)) and gold_kind(gold, "math") == "none" else Verdict.WRONG


COMPARERS = {"math": compare_math, "number": compare_number, "exact": compare_exact, "choice": compare_choice}
