"""What an answer says, read once: text -> `Reading`.

Numbers and formulas with units, per cent signs and counted nouns; lists and sets, tuples, matrices, intervals and their
unions, inequalities, equations, `x = 3`, ratios; everything else is `Words`, numbers in a base and congruences among them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial, reduce
from itertools import accumulate, dropwhile, islice, pairwise, product
from operator import and_, gt, methodcaller, or_
from typing import Any, NamedTuple

from soar.problems.answers import LEXICON, NUMERALS, PATTERNS, SCALES, WORDS, mark_up, spelled
from soar.problems.formulas import POINTS, Node, Parser, Token, Unreadable, close, evaluate, nodes, real, tokenize

MAX_PARTS = 100

UNITS: dict[str, tuple[str, Fraction]] = {}  # unit -> (first unit of its line, how many of it)
for line in LEXICON["units"]:
    names, *others = (part.split() for part in re.split("[:,]", line))
    for *more, size in ([*names, 1], *others):
        UNITS |= {name.casefold(): (names[0], Fraction(size)) for name in more}
COMPOUND = LEXICON["compound"]
CURRENCIES = ("dollar", "euro", "gbp", "rupee", "yen")
SHORT_UNITS = WORDS["percent"] | {"in", "am", "pm", *COMPOUND, *(name for name in UNITS if len(name) > 1)}
LEADING = ("=", "approx", ":", "\n", ",", "&", "therefore", "implies", "Rightarrow")
COMBINED = {"cup": or_, "cap": and_, "setminus": gt}  # of two truth values, whether a number lies in each region
RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "in", "approx", "equiv")


class Unit(NamedTuple):
    """powers: unit -> power, sorted; factor: how many of them. label: words that are no known units (`apples`)."""

    powers: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    label: str = ""


@dataclass(frozen=True)
class Scalar:
    """A number or an expression. places: decimal places of a plain decimal, else 0. product: its unit read as a variable."""

    node: Node
    unit: Unit | None = None
    percent: bool = False
    places: int = 0
    product: Scalar | None = None

    @cached_property
    def names(self) -> frozenset[str]:
        """Its variables."""
        return frozenset(node[1] for node in nodes(self.node) if node[0] == "var")

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """What `formulas.evaluate` gives at every point, once where it has no variables."""
        return tuple(evaluate(self.node, k) for k in range(POINTS if self.names else 1))


class Named(NamedTuple):
    """`x = 3`, `f(x) = 2x`, `(x, y) = (1, 2)`."""

    name: str
    value: Reading
    arguments: tuple[str, ...] = ()


class Relation(NamedTuple):
    """`node = 0`, `> 0`, `>= 0` or `!= 0`. right: the right side of an equation with a sum of letters on the left."""

    kind: str
    node: Node
    right: Scalar | None = None


class Tuple(NamedTuple):
    """Parts in an order: brackets like `(]`, `matrix` of rows `&`, `:` for ratios and times."""

    kind: str
    parts: tuple[Reading, ...]


class Bag(NamedTuple):
    """Parts without an order, each counted once. joiner: `and` or `or` where a word says it, else a comma."""

    parts: tuple[Reading, ...]
    joiner: str = ","


class Region(NamedTuple):
    """A set of real numbers, by its ends."""

    ends: tuple[Scalar, ...]
    inside: Callable[[Any, Sequence[Any]], bool]  # whether a number is, given the ends' values
    name: str = ""  # of the variable, where one is told
    gap: bool = False  # all but one number (`x \\ne 1`)


class Words(NamedTuple):
    """What is compared as text. value: it is no words for all that."""

    text: str
    value: bool = False


Reading = Scalar | Named | Relation | Tuple | Bag | Region | Words


@lru_cache(maxsize=20_000)
def read(text: str) -> Reading:
    """What an answer says. Never raises; what is no mathematics is `Words`."""
    if PATTERNS["plain"].fullmatch(text):
        node = Parser([Token("num", text.lstrip("-"))]).primary()
        return Scalar(("neg", node) if text[0] == "-" else node, places=node[2])
    plain = mark_up(text)
    bare = plain.replace("\x01", "").replace("\x02", "").strip()
    if bare[:1].isalpha() and (number := spelled(bare)) is not None:
        return Scalar(("num", number, 0))
    plain = LEXICON["said"].get(bare.casefold().rstrip("."), plain)
    based = PATTERNS["base"].fullmatch(bare)
    if based and (based[2].isdigit() or based[2] in NUMERALS):
        base = int(based[2]) if based[2].isdigit() else NUMERALS.index(based[2])
        return Words(f"{based[1].lstrip('0')} in base {base}", value=True)
    tokens: list[Token] = []
    try:
        tokens = tokenize(plain, SHORT_UNITS)
        return _read(tokens)
    except (Unreadable, RecursionError) as error:
        return _words(tokens, "too large" in str(error)) if tokens else Words(" ".join(bare.split()))


def _words(tokens: Sequence[Token], large: bool = False) -> Words:
    """What is compared as text: without silent words, nouns in the singular. large: a value that cannot be computed."""
    said = [t for t in tokens if t.text.casefold() not in WORDS["silent"]]
    texts = [re.sub("(?<=..[^s])s$", "", t.text.casefold()) if t.kind == "word" else t.text for t in said]
    formula = not any(token.kind == "word" for token in tokens)
    value = formula and (large or any(token.kind == "cmd" and token.text in WORDS["symbolic"] for token in tokens))
    return Words(re.sub("(?<=[a-z]{2}) - (?=[a-z]{2})", "", " ".join(texts).strip(" .,;")), value)


def _split(tokens: Sequence[Token], at: Callable[[Token], bool]) -> tuple[list[list[Token]], list[Token]]:
    """The pieces between the top-level tokens that `at` names, and those tokens. Raises Unreadable for odd brackets."""
    if not any(map(at, tokens)):
        return [list(tokens)], []
    pieces, cuts, depths = [list[Token]()], list[Token](), list(accumulate(token.depth for token in tokens))
    if min(depths) < 0 or depths[-1]:
        raise Unreadable("brackets")
    for token, depth in zip(tokens, depths, strict=True):
        if depth == 0 and at(token):
            pieces.append([])
            cuts.append(token)
        else:
            pieces[-1].append(token)
    return pieces, cuts


def _closes(tokens: Sequence[Token]) -> bool:
    """Whether the last token closes the bracket that the first one opens."""
    depths = list(accumulate(token.depth for token in tokens))
    return bool(depths) and depths[-1] == 0 and 0 not in depths[:-1]


_is = partial(methodcaller, "is_a")


def _joins(token: Token) -> bool:
    return token.is_a(",", ";", "\n", "or", "and") or (token.kind == "word" and token.text.casefold() in ("or", "and"))


def _trim(tokens: list[Token]) -> list[Token]:
    """Without words and signs that may stand before an answer, without punctuation behind it, without braces around it."""
    while tokens and tokens[-1].is_a(".", ",", ";", ":", "\n"):
        tokens = tokens[:-1]
    first = next((i for i, t in enumerate(tokens) if not (t.kind == "word" and t.text.casefold() in WORDS["lead"])), 0)
    marks = (*LEADING, ".") if first else LEADING
    first += next((i for i, t in enumerate(tokens[first:]) if not t.is_a(*marks)), 0)
    if first:
        return _trim(tokens[first:])
    return _trim(tokens[1:-1]) if len(tokens) > 2 and tokens[0].is_a("{") and _closes(tokens) else tokens


def _read(tokens: list[Token]) -> Reading:
    """One value, or the parts of a list."""
    pieces, cuts = _split(_trim(tokens), _joins)
    pieces = [piece for piece in pieces if piece]
    if not 0 < len(pieces) <= MAX_PARTS:
        raise Unreadable("no parts, or too many")
    if len(pieces) == 1:
        return _read_part(pieces[0])
    words = {cut.text.casefold() for cut in cuts} & {"and", "or"}
    if "and" in words:
        with suppress(Unreadable):  # 3 dollars and 50 cents
            return _sum(pieces)
    return _join([_read_or_keep(piece) for piece in pieces], "or" if "or" in words else "and" if words else ",")


def _read_or_keep(tokens: list[Token]) -> Reading:
    try:
        return _read_part(_trim(tokens))
    except Unreadable as error:
        return _words(tokens, "too large" in str(error))


def _join(parts: list[Reading], joiner: str) -> Reading:
    """The parts of a list; inequalities of one variable become one region."""
    flat = [piece for part in parts for piece in (part.parts if isinstance(part, Bag) else (part,))]
    regions = [part for part in flat if isinstance(part, Region)]
    if not flat or len(regions) < len(flat) or len({region.name for region in regions}) > 1:
        return Bag(tuple(flat), joiner)
    made, *others = sorted(regions, key=lambda region: region.gap)
    for region in others:
        made = combine("cap" if joiner == "and" or (region.gap and joiner == ",") else "cup", made, region)
    return made


def _read_part(tokens: list[Token]) -> Reading:
    """One part of a list: two values for `\\pm`, an equation, an inequality, a congruence, or a value."""
    if any(map(_is("+-", "-+"), tokens)):
        two = [[Token("op", t.text[k], t.spaced) if t.is_a("+-", "-+") else t for t in tokens] for k in (0, 1)]
        return _join([_read_part(part) for part in two], ",")
    pieces, cuts = _split(tokens, _is(*RELATIONS))
    kinds = [cut.text for cut in cuts]
    if not kinds or kinds == ["in"]:
        return _read_value(pieces[-1])
    if kinds == ["equiv"]:
        return _congruence(*pieces)
    return _equation(pieces, kinds) if set(kinds) <= {"=", "approx"} else _inequality(pieces, kinds)


def _congruence(left: list[Token], right: list[Token]) -> Reading:
    place = next((i for i, token in enumerate(right) if token.text in ("pmod", "mod", "bmod")), 0)
    numbers = (*_scalar(right[:place]).values, *_scalar([t for t in right[place + 1 :] if not t.is_a("(", ")")]).values)
    if len(numbers) != 2 or not all(isinstance(number, Fraction) for number in numbers) or not numbers[1]:
        raise Unreadable("no congruence of numbers")
    rest = Words(f"{numbers[0] % numbers[1]} mod {numbers[1]}", value=True)
    return Named("".join(token.text for token in left), rest) if left else rest


def _name(tokens: list[Token]) -> tuple[str, tuple[str, ...]] | None:
    """Name and arguments where the tokens are a name: `x`, `a_n`, `AB`, `f(x, y)`, `(x, y)`, a word."""
    odd = not 0 < len(tokens) <= 12 or tokens[0].is_a("sqrt", "sin", "cos", "tan", "log", "ln", "exp", "frac", "pi")
    product = any(t.kind == "num" and not before.is_a("_", "{", "-") for before, t in pairwise(tokens))
    match = PATTERNS["name"].fullmatch("".join(token.text for token in tokens if not token.is_a("{", "}")))
    if odd or product or any(token.kind == "word" for token in tokens[1:]) or match is None or match[1] in ("e", "i"):
        return None
    arguments = tuple(match[2].strip("()").split(",")) if match[2] else ()
    return (match[1].strip("|"), arguments) if match[1] else (match[2], ())


def _equation(pieces: list[list[Token]], kinds: list[str]) -> Reading:
    """A value with its name, an equation, or a value after steps that come to it (`6 * 7 = 42`)."""
    named = _name(pieces[0])
    rest = pieces[1:] if named else pieces
    if named is None and len(pieces) == 2 and (named := _name(pieces[1])):
        rest = pieces[:1]
    sides = list[Reading]()
    for piece in rest:
        try:
            sides.append(_read_value(piece))
        except Unreadable:
            if piece is pieces[-1] or sum(token.kind == "word" for token in piece) > 2:
                raise
            sides.append(_words(piece))
    constant = [side for side in sides if isinstance(side, Scalar) and not side.names]
    numbers = [side.values[0] for side in constant]
    rounded = "approx" in kinds[len(pieces) - len(rest) :] and len(constant) > 1
    if not rounded and any(not close(number, numbers[-1]) for number in numbers[:-1]):
        raise Unreadable("the sides differ")
    if rounded and abs(real(numbers[0]) - real(numbers[-1])) > abs(real(numbers[0])) / 100:
        raise Unreadable("not about the same")
    value = constant[0] if rounded else sides[-1]
    if named:
        return Named(named[0], value, named[1])
    if len(constant) == len(sides):
        return value
    left, right = sides[0], sides[-1]
    if isinstance(left, Words) and constant:
        return Named(left.text, value)  # `\\angle ABC = 60`
    if len(sides) == 2 and isinstance(left, Scalar) and isinstance(right, Scalar):
        letters = not right.names and all(token.kind == "var" or token.is_a("+") for token in pieces[0])
        return Relation("=", ("-", left.node, right.node), right if letters else None)
    raise Unreadable("an equation of other things")


def _inequality(pieces: list[list[Token]], kinds: list[str]) -> Reading:
    """A chain of inequalities: regions where a variable stands alone, else relations."""
    sides, parts = [_scalar(piece) for piece in pieces], list[Reading]()
    for left, kind, right in zip(sides, kinds, sides[1:], strict=False):
        if kind in ("<", "<="):
            left, right, kind = right, left, kind.replace("<", ">")
        if kind not in (">", ">=", "!=") or not (left.names or right.names):
            raise Unreadable("no inequality with a variable")
        side, end, above = (right, left, False) if right.names else (left, right, True)
        if side.node[0] == "var" and not end.names:
            parts.append(_half_line(kind, side.node[1], end, above))
        elif kind != "!=" and side.node == ("|", ("var", *side.names)) and not end.names:  # `|x - 2|` says no more
            low, high = Scalar(("neg", end.node)), end
            lines = (_half_line(kind, side.node[1][1], e, above == (e is high)) for e in (low, high))
            parts.append(combine("cup" if above else "cap", *lines))
        else:
            parts.append(Relation(kind, ("-", left.node, right.node)))
    return parts[0] if len(parts) == 1 else _join(parts, "and")


def _half_line(kind: str, name: str, end: Scalar, above: bool) -> Region:
    gap = kind == "!="
    return Region((end,), lambda x, e: kind == ">=" if x == e[0] else gap or bool((x > e[0]) == above), name, gap)


def _read_value(tokens: list[Token]) -> Reading:
    """One value: a set, an interval, a tuple, a matrix, a ratio, or a scalar with its unit."""
    tokens = _trim(tokens)
    while len(tokens) > 2 and tokens[0].is_a("(") and _closes(tokens) and len(_split(tokens[1:-1], _joins)[0]) == 1:
        if any(map(_is(*RELATIONS), tokens)):
            raise Unreadable("a relation in brackets")
        tokens = _trim(tokens[1:-1])
    pieces, cuts = _split(tokens, _is("cup", "cap", "setminus"))
    if cuts:
        made, *regions = (as_region(_read_value(piece)) for piece in pieces)
        return reduce(lambda a, b: combine(b[0].text, a, b[1]), zip(cuts, regions, strict=True), made)
    pieces, cuts = _split(tokens, lambda t: t.is_a(":") or (t.kind == "word" and t.text == "to"))
    if cuts:
        clock = any(piece and piece[0].text[0] == "0" < piece[0].text for piece in pieces[1:])
        return Tuple("clock" if clock else ":", tuple(_scalar(piece) for piece in pieces))
    if any(map(_is("pmod"), tokens)):
        return _congruence([], tokens)
    matrix = next((i for i, token in enumerate(tokens) if token.is_a("beginmatrix")), 0)
    if matrix and _closes(tokens[matrix:]):
        minus = [Token("num", "1")] * (matrix == 1 and tokens[0].is_a("-"))
        factor = _scalar([*tokens[: matrix - tokens[matrix - 1].is_a("*")], *minus])
        matrix_read = _read_value(tokens[matrix:])
        if isinstance(matrix_read, Tuple) and not factor.unit:
            unscaled = (row.parts for row in matrix_read.parts if isinstance(row, Tuple))
            scaled = ((Scalar(("*", factor.node, x.node)) for x in row if isinstance(x, Scalar)) for row in unscaled)
            return Tuple("matrix", tuple(Tuple("&", tuple(row)) for row in scaled))
    if len(tokens) == 1 and tokens[0].is_a("setR", "emptyset"):
        return Region((), lambda x, ends: True) if tokens[0].is_a("setR") else Bag(())
    if _closes(tokens) and tokens[0].is_a("beginmatrix"):
        lines = [_split(line, _is("&"))[0] for line in _split(tokens[1:-1], _is("\n"))[0] if line]
        rows = tuple(Tuple("&", tuple(map(_cell, line))) for line in lines)
        if not rows:
            raise Unreadable("an empty matrix")
        if not all(isinstance(cell, Scalar) for row in rows for cell in row.parts):
            return Bag(rows)  # values with the conditions under which they hold
        return rows[0].parts[0] if len(rows) == len(rows[0].parts) == 1 else Tuple("matrix", rows)
    if _closes(tokens) and tokens[0].is_a("(", "[", "<(", "\\{"):
        return _bracket(tokens[0].text + tokens[-1].text, tokens[1:-1])
    numbers = [i for i, t in enumerate(tokens) if t.kind == "num" and (not i or tokens[i - 1].kind == "word")][1:]
    return _sum([tokens[i:j] for i, j in pairwise([0, *numbers, len(tokens)])]) if numbers else _scalar(tokens)


def _cell(tokens: list[Token]) -> Reading:
    """A cell of a matrix, without the comma or word that leads to a condition."""
    words = ("if", "when", "for")
    rest = dropwhile(lambda t: t.is_a(",") or (t.kind == "word" and t.text.casefold() in words), tokens)
    return _read_or_keep(list(rest))


def _sum(pieces: list[list[Token]]) -> Scalar:
    """`2 hours 30 minutes` as one quantity: units of one kind, each smaller than the one before. Raises Unreadable."""
    parts = [_scalar(piece) for piece in pieces]
    units = [part.unit for part in parts if part.unit and part.unit.powers]
    falling = all(b.factor < a.factor for a, b in pairwise(units))
    if len(units) < len(parts) or len({u.powers for u in units}) > 1 or not falling:
        raise Unreadable("no sum of units")
    total, *others = (("*", p.node, ("num", u.factor / units[0].factor, 0)) for p, u in zip(parts, units, strict=True))
    return _valued(Scalar(reduce(lambda a, b: ("+", a, b), others, total), units[0]))


def _bracket(kind: str, inner: list[Token]) -> Reading:
    """What stands in brackets: a set, a tuple or an interval, a matrix of bracketed rows, or one number."""
    if kind == "\\{\\}":
        builder, bars = _split(inner, _is(":", "|", "mid"))
        if len(bars) == 1:
            return _read(builder[1])
        pieces = [_trim(piece) for piece in _split(inner, _joins)[0]]
        if any(piece and (piece[0].is_a("\\{") or piece[0].is_a("emptyset")) and _closes(piece) for piece in pieces):
            parts = [_read_or_keep(piece) for piece in pieces if piece]  # sets in a set stay apart from their elements
            return Bag(tuple(Tuple("set", (part,)) if isinstance(part, Bag) else part for part in parts))
        inside = _read(inner) if inner else Bag(())
        return inside if isinstance(inside, Bag) else Bag((inside,))
    pieces, _ = _split(inner, _is(",", ";"))
    if len(pieces) == 1:
        return _scalar(inner)
    parts = [_read_part(_trim(piece)) for piece in pieces]
    choices = (part.parts if isinstance(part, Bag) and part.parts else (part,) for part in parts)  # `(0, \\pm 2)`
    rows = tuple(Tuple(kind, row) for row in islice(product(*choices), MAX_PARTS))
    if kind == "[]" and len(rows) == 1 and all(isinstance(row, Tuple) and row.kind == "[]" for row in rows[0].parts):
        return Tuple("matrix", tuple(Tuple("&", row.parts) for row in rows[0].parts if isinstance(row, Tuple)))
    return rows[0] if len(rows) == 1 else Bag(rows)


def as_region(reading: Reading) -> Region:
    """The set of real numbers that is an interval, a list of numbers or a region. Raises Unreadable."""
    if isinstance(reading, Region):
        return reading
    ends = tuple(part for part in getattr(reading, "parts", ()) if isinstance(part, Scalar))
    if isinstance(reading, Bag) and len(ends) == len(reading.parts):
        return Region(ends, lambda x, values: x in values)
    if isinstance(reading, Tuple) and reading.kind in ("()", "[)", "(]", "[]") and len(ends) == len(reading.parts) == 2:
        low, high = reading.kind[0] == "[", reading.kind[1] == "]"
        return Region(ends, lambda x, v: v[0] < x < v[1] or (low and x == v[0] <= v[1]) or (high and v[0] <= x == v[1]))
    raise Unreadable("no region")


def combine(kind: str, a: Region, b: Region) -> Region:
    """Union (`cup`), intersection (`cap`) or difference (`setminus`) of two regions."""
    n, joined = len(a.ends), COMBINED[kind]
    if n + len(b.ends) > MAX_PARTS:
        raise Unreadable("too many parts")
    return Region((*a.ends, *b.ends), lambda x, e: joined(a.inside(x, e[:n]), b.inside(x, e[n:])), a.name or b.name)


def _read_unit(tokens: Sequence[Token]) -> tuple[Unit | None, int, bool]:
    """Unit, scale (`million`) and per cent sign in what stands behind a value. Raises Unreadable for anything else."""
    words = list[str]()
    for token in tokens:
        if token.kind not in ("word", "var", "num") and not token.is_a(*"^/.()*{},-", *(["'"] if words else [])):
            raise Unreadable("more than words behind a value")
        word = token.text.casefold() if len(token.text) > 1 else token.text
        words += COMPOUND.get(word, word).split()
    found, label, scale, percent = list[list[Any]](), list[str](), 1, False  # found: name, size and power of each unit
    sign = following = 1  # of the power of the next unit: -1 behind a slash; 2 behind `square`, 3 behind `cubic`
    for word in re.findall(r"[^\W\d_]+|\^[ {(]*-?\s*\d+|\d+|/", " ".join(words)):
        single = word.removesuffix("s") if len(word) > 2 else word
        if word == "/":
            sign = -1
        elif word[0] == "^":
            power = int(re.sub(r"[^-\d]", "", word))
            if not found or abs(power * found[-1][2]) > 3:
                raise Unreadable("a power of a word")
            found[-1][2] *= power
        elif word in ("square", "cubic"):
            following = 2 if word == "square" else 3
        elif word.isdigit() or {word, single} & WORDS["meaning"] or (single.endswith("th") and single[:-2] in SCALES):
            raise Unreadable("a word that changes the value")
        elif word in WORDS["percent"]:
            percent = True
        elif single in SCALES and not label and all(name == "?" for name, _, _ in found):
            scale *= SCALES[single]
        else:
            unit = UNITS.get(word.casefold()) or UNITS.get(single.casefold())
            label += [single] if unit is None and single not in WORDS["counted"] else []
            found.append([*(unit or ("?", Fraction(1))), sign * following])  # ?: a counted noun; its power says nothing
            following = 1
    if following != 1:
        raise Unreadable("square of nothing")
    powers, factor = Counter[str](), Fraction(1)
    for name, size, power in found:
        powers[name] += power
        factor *= size**power
    powers.pop("?", None)
    if label:
        return Unit(label=" ".join([*label, *sorted(powers)])), scale, percent
    return Unit(tuple(sorted(powers.items())), factor) if powers else None, scale, percent


def _scalar(tokens: list[Token]) -> Scalar:
    """A number or an expression with its unit. Raises Unreadable."""
    tokens, lead = _trim(tokens), list[Token]()
    if not tokens:
        raise Unreadable("nothing")
    sign = [token for token in tokens[:1] if token.is_a("-")]
    word = tokens[len(sign)] if len(tokens) > len(sign) + 1 else Token("end", "")
    if word.kind == "word" and UNITS.get(word.text.casefold(), ("",))[0] in CURRENCIES:
        lead, tokens = [word], [*sign, *tokens[len(sign) + 1 :]]
        tokens = tokens[1:] if tokens[0].is_a(".") else tokens
    product: Scalar | None = None
    letter = tokens[1] if len(tokens) == 2 or (len(tokens) == 4 and tokens[2].is_a("^")) else Token("end", "")
    if tokens[0].kind == "num" and letter.kind == "var" and letter.spaced and letter.text in LEXICON["letter_units"]:
        product, tokens = Scalar(Parser(tokens).whole()), [tokens[0], letter._replace(kind="word"), *tokens[2:]]
    parser = Parser(tokens)
    node = parser.whole()
    unit, scale, percent = _read_unit([*tokens[parser.place :], *lead])
    for kind in ("%", "circ"):
        inner = node[1] if node[0] == kind else ("neg", node[1][1]) if node[0] == "neg" and node[1][0] == kind else None
        if inner is not None:
            node, percent = inner, percent or kind == "%"
            unit = unit or (Unit((("degree", 1),)) if kind == "circ" else None)
    literal = node[1] if node[0] == "neg" else node
    places = literal[2] if literal[0] == "num" and scale == 1 else 0
    node = node if scale == 1 else ("*", node, ("num", Fraction(scale), 0))
    made = Scalar(node, unit, percent, places, product)
    if unit and unit.label and made.names:
        raise Unreadable("words behind a variable")
    return _valued(made)


def _valued(made: Scalar) -> Scalar:
    """The scalar itself. Raises Unreadable where it is defined nowhere, or its values are too large."""
    if all(value is None for value in made.values):
        raise Unreadable("undefined everywhere")
    return made
