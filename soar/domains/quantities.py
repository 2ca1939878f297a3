"""Quantities: a number with a unit, read from text and compared with a tolerance (`science` extra, for pint).

The grammar is our own and bounded: a number, then at most MAX_FACTORS unit names with small whole exponents. Only single
names reach pint, never an expression, so hostile text costs a look-up. A gold answer may end with options in square
brackets: `9.81 m/s^2 [2 %]`, `[+- 0.05]` (in its own unit), `[3 sf]`, `[unit optional]`, several separated by commas.

The domain `science` grades by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from soar.problems.answers import normalize
from soar.problems.domain import Domain
from soar.problems.prompts import plain, tagged, worked_list
from soar.types import Problem, UserError, Verdict

MAX_CHARS = 200
MAX_FACTORS = 8
MAX_POWER = 9  # of a unit
MAX_EXPONENT = 300  # of ten
TOLERANCE = 0.01  # relative, where the gold answer states none
FUZZ = 1e-9  # relative, for the arithmetic of unit conversion

NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<top>\d{1,15})\s*/\s*(?P<bottom>\d{1,15})(?![\d.])"
    r"|(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{0,40})?|\.\d{1,40})"
    r"(?:[eE](?P<e>[+-]?\d{1,3})(?![\d.]))?)"
    r"(?:\s*(?:\\times|\\cdot|[*x])\s*10\s*\^?\s*(?:\{\s*(?P<p>[+-]?\d{1,3})\s*\}|\(\s*(?P<r>[+-]?\d{1,3})\s*\)|(?P<q>[+-]?\d{1,3})))?",
    re.ASCII,
)
BARE_POWER = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|\(\s*([+-]?\d{1,3})\s*\)|([+-]?\d{1,3}))")
TOKEN = re.compile(
    r"(?P<name>[A-Za-z_]{1,30})\s*(?:(?:\^|\*\*)\s*(?:\{\s*(?P<a>[+-]?\d)\s*\}|\(\s*(?P<b>[+-]?\d)\s*\)|(?P<c>[+-]?\d))"
    r"|(?P<d>-?\d))?(?![\d^])|(?P<mark>[/*()])"
)
SPELLINGS = (
    (re.compile("[\u00b5\u03bc]|\\\\mu(?![a-z])\\s*"), "micro"),
    (re.compile("[\u03a9\u2126]|\\\\[Oo]mega(?![a-z])"), "ohm "),
    (re.compile(r"(?:\u0394|\\Delta)\s*\^?\s*(?:\{?\\circ\}?|\u00b0)\s*([CF])(?![A-Za-z])"), r" delta_deg\1 "),
    (re.compile(r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\u00b0)\s*([CFK])(?![A-Za-z])"), r" deg\1 "),
    (re.compile(r"degrees?\s+(?:(C)elsius|(F)ahrenheit)", re.IGNORECASE), lambda m: f" deg{(m[1] or m[2]).upper()} "),
    (re.compile(r"(?<![A-Za-z])([Cc]elsius|[Ff]ahrenheit)"), lambda m: f"deg{m[1][0].upper()}"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\u00b0"), " degree "),
    (re.compile(r"\\?%"), " percent "),
    (re.compile(r"(?<![A-Za-z])per(?![A-Za-z])"), "/"),
    (re.compile(r"([A-Za-z]{1,30})\s(?:(squared)|cubed)(?![A-Za-z])"), lambda m: f"{m[1]}^{2 if m[2] else 3}"),
    (re.compile(r"(?<![A-Za-z])(?:(square)|cubic)\s([A-Za-z]{1,30})"), lambda m: f"{m[2]}^{2 if m[1] else 3}"),
    (re.compile(r"\\frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}"), r"\1/(\2)"),
    (re.compile(r"\\cdot|\\times|\u22c5"), "*"),
    (re.compile(r"\\[a-zA-Z]+|[{}$\\~]"), " "),
)
LEAD = re.compile(r"^.*(?:=|\\approx|\u2248|\\simeq)|^\s*(?:approximately|about|roughly|around|exactly)\s", re.DOTALL)
OFFSET = {"degree_Celsius": "delta_degree_Celsius", "degree_Fahrenheit": "delta_degree_Fahrenheit"}


@dataclass(frozen=True)
class Quantity:
    """A number with a unit. figures: how many significant figures it is written with, at least and at most.

    step: value of one unit in the last written place, 0 where the text does not say how exact it is (`1500`, `3/4`).
    unit: factors (name, exponent); empty for a plain number.
    """

    value: float
    figures: tuple[int, int]
    step: float
    unit: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Options:
    """What a gold answer says about its comparison. absolute is in its own unit; None: not stated."""

    relative: float | None = None
    absolute: float | None = None
    figures: int | None = None
    unit_optional: bool = False


@lru_cache(maxsize=1)
def registry() -> Any:
    """pint's unit registry, one a process. Raises UserError where pint is not installed."""
    try:
        import pint
    except ImportError as error:
        raise UserError("numbers with units need pint: pip install 'soar-rl[science]'") from error
    return pint.UnitRegistry(cache_folder=None)


@lru_cache(maxsize=4096)
def _unit_name(name: str) -> str | None:
    """pint's own name of a unit, read as written, else in lower case; None for an unknown one."""
    import pint

    for spelling in dict.fromkeys((name, name.lower() if len(name) > 3 else name)):
        try:
            found = str(registry().get_name(spelling)) if spelling.isidentifier() else ""
        except (pint.PintError, ValueError, AttributeError, TypeError, KeyError):
            continue
        if found:
            return found
    return None


def read_quantity(text: str) -> Quantity | None:
    """A number with or without a unit; None for anything else, for unknown units, and for more than MAX_CHARS.

    What stands before the last `=` is dropped, and so are `about` and the like. Numbers: `1,500`, `1.5e3`, `1.5 x 10^3`,
    `1.5\\times 10^{3}`, `10^3`, `3/4`. Units: names and symbols that pint knows, with `^`, `**` or digits behind them as
    exponents, `*`, blank, `/`, `per` and brackets between them: `m/s^2`, `m s-2`, `J/(mol K)`, `\\text{kg m}^2`.
    """
    if len(text) > MAX_CHARS:
        return None
    text = LEAD.sub("", normalize(text).strip(" .")).strip(" .;,")
    power, match = BARE_POWER.match(text), NUMBER.match(text)
    if power is not None:
        exponent = int(power[1] or power[2] or power[3])
        value, figures, step, rest = 10.0 ** min(exponent, MAX_EXPONENT), (1, 1), 0.0, text[power.end() :]
    elif match is None or (match["top"] and int(match["bottom"]) == 0):
        return None
    elif match["top"]:
        exponent, rest = 0, text[match.end() :]
        value = int(f"{match['sign']}{match['top']}") / int(match["bottom"])
        figures, step = (1, len(match["top"])), 0.0
    else:
        digits = match["digits"].replace(",", "")
        exponent = int(match["e"] or 0) + int(match["p"] or match["q"] or match["r"] or 0)
        whole, point, decimals = digits.partition(".")
        most = len((whole + decimals).lstrip("0"))
        least = most if point else len(whole.strip("0"))
        figures, rest = (max(1, least), max(1, most)), text[match.end() :]
        step = 10.0 ** (min(exponent, MAX_EXPONENT) - len(decimals)) if (point or exponent) and most >= 2 else 0.0
        value = float(f"{match['sign']}{digits}e{exponent}")
    unit = read_unit(rest)
    if unit is None or abs(exponent) > MAX_EXPONENT or not math.isfinite(value):
        return None
    return Quantity(value, figures, step, unit)


def read_unit(text: str) -> tuple[tuple[str, int], ...] | None:
    """The factors of a unit expression, in pint's names; () for blank text, None for what is no unit."""
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    factors = [(_unit_name(name), power) for name, power in _factors(text.strip(" .,;"))]
    if len(factors) > MAX_FACTORS or any(name is None or abs(power) > MAX_POWER for name, power in factors):
        return None
    return tuple((str(name), power) for name, power in factors)


def _factors(text: str) -> Iterator[tuple[str, int]]:
    """(name, exponent) of every factor; a name `?`, which no unit has, where the text is no unit expression.

    A slash inverts the next factor or bracket only: `J/mol K` is read as (J/mol) K, as pint and calculators do.
    """
    position, invert, signs, ready = 0, 1, [1], False
    while position < len(text):
        token = TOKEN.match(text, position)
        if text[position] == " ":
            position += 1
            continue
        if token is None or len(signs) > 4:
            yield "?", 1
            return
        position = token.end()
        mark = token["mark"]
        if mark == "/":
            invert = -1
        elif mark == "(":
            signs.append(signs[-1] * invert)
            invert = 1
        elif mark == ")":
            if len(signs) == 1:
                yield "?", 1
                return
            signs.pop()
        elif token["name"]:
            power = int(token["a"] or token["b"] or token["c"] or token["d"] or 1)
            yield token["name"], power * invert * signs[-1]
            invert = 1
        ready = mark in (None, ")")
    if text and (len(signs) != 1 or not ready):
        yield "?", 1


def read_gold(text: str) -> tuple[Quantity, Options] | None:
    """A gold answer and its options; None where either cannot be read."""
    body, bracket, rest = text.strip().partition("[")
    if bracket and not rest.endswith("]"):
        return None
    quantity = read_quantity(body)
    options = _read_options(rest.removesuffix("]")) if bracket else Options()
    return None if quantity is None or options is None else (quantity, options)


def _read_options(text: str) -> Options | None:
    found: dict[str, Any] = {}
    for part in text.split(","):
        part = " ".join(part.split()).lower()
        number = re.fullmatch(r"(?:\+-|\u00b1)?\s?(\d{1,6}(?:\.\d{1,12})?(?:e-?\d{1,2})?)\s?(%?)", part)
        figures = re.fullmatch(r"(\d{1,2})\s?(?:sf|s\.f\.|significant figures?)", part)
        if part == "unit optional":
            found["unit_optional"] = True
        elif figures is not None and int(figures[1]):
            found["figures"] = int(figures[1])
        elif number is not None:
            found["relative" if number[2] else "absolute"] = float(number[1]) / (100 if number[2] else 1)
        else:
            return None
    return Options(**found)


def convert(quantity: Quantity, unit: tuple[tuple[str, int], ...]) -> float | None:
    """The value of a quantity in another unit; None for another dimension.

    A temperature that stands alone is a reading (25 degC = 298.15 K); within a compound unit it is a difference.
    """
    import pint

    def made(factors: tuple[tuple[str, int], ...]) -> Any:
        alone = len(factors) == 1 and factors[0][1] == 1
        result = registry().Unit("")
        for name, power in factors:
            result = result * registry().Unit(name if alone else OFFSET.get(name, name)) ** power
        return result

    try:
        value = float(registry().Quantity(quantity.value, made(quantity.unit)).to(made(unit)).magnitude)
    except (pint.PintError, ArithmeticError, ValueError):
        return None
    return value if math.isfinite(value) else None


def compare_quantities(answer: str, gold: str) -> Verdict:
    """Whether an answer is the gold quantity. UNSCORABLE when the gold answer is none. Options in the answer are not read.

    Tolerance: what the gold answer states; else 1 %, or half a unit of its last written place where it is written with
    a point or a power of ten and two figures or more, whichever is larger. A missing unit is wrong unless `[unit optional]`.
    """
    read = read_gold(gold)
    if read is None:
        return Verdict.UNSCORABLE
    wanted, options = read
    found = read_quantity(answer.partition("[")[0])
    if found is None:
        return Verdict.WRONG
    if options.figures is not None and not found.figures[0] <= options.figures <= found.figures[1]:
        return Verdict.WRONG
    if not found.unit and wanted.unit and options.unit_optional:
        found = replace(found, unit=wanted.unit)
    elif bool(found.unit) != bool(wanted.unit) and not _plain(found if found.unit else wanted):
        return Verdict.WRONG
    value = convert(found, wanted.unit)
    size = abs(wanted.value)
    if options.relative is None and options.absolute is None:
        allowed = max(TOLERANCE * size, wanted.step / 2)
    else:
        allowed = max((options.relative or 0.0) * size, options.absolute or 0.0)
    near = value is not None and abs(value - wanted.value) <= allowed + FUZZ * size
    return Verdict.CORRECT if near else Verdict.WRONG


def _plain(quantity: Quantity) -> bool:
    """Whether the unit is one that a plain number may replace: percent, or an angle."""
    return all(name in ("percent", "radian", "dimensionless", "count") for name, _ in quantity.unit)


SUBJECTS = "mechanics, electricity, heat, waves, chemistry, or radioactivity"
LIST = """Question: A car drives at 5 m/s for 4 s. How far does it go? Answer: 5 x 4 = 20 m
Question: A block has a mass of 12 g and a volume of 3 cm^3. What is its density? Answer: 12 / 3 = 4 g/cm^3
Question: A resistor of 6 ohm is connected to 12 V. What current flows? Answer: 12 / 6 = 2 A
Question: A train moves at 20 m/s for 7 s. How far does it go? Answer: 20 x 7 = 140 m
Question: A stone has a mass of 30 g and a volume of 5 cm^3. What is its density? Answer: 30 / 5 = 6 g/cm^3
"""
PROMPTS = {
    "tags": tagged(
        "science",
        """Write one new, original and challenging science problem from {subject}.
It should take at least two steps, state every constant that is needed, and have one number with a unit as its answer.
""",
        SUBJECTS,
        answer="number and unit",
        end="the final number and its unit",
    ),
    "plain": plain(
        "science_plain",
        "Write a science problem about {subject} whose answer is a number with a unit.",
        'Solve it step by step. End with "Answer:", the number and its unit.',
        "speed, density, or electric current",
    ),
    "list": worked_list("science_list", LIST),
}
SCIENCE = {
    style: Domain(
        name="science",
        prompts=prompts,
        verify=lambda answer, problem: compare_quantities(answer, problem.answer),
        validate=lambda problem: None if read_gold(problem.answer) else "answer_is_no_quantity",
        prepare=lambda: registry().get_name("m"),  # loaded once a worker
        examples=(
            Problem("speed", "A cyclist rides at 5 m/s for 2 minutes. How far does the cyclist ride?", "600 m"),
            Problem("heat", "How hot is 25 degrees Celsius in kelvin?", "298.15 K [+- 0.2]"),
        ),
    )
    for style, prompts in PROMPTS.items()
}
"""The domain `science`, by prompt style."""
