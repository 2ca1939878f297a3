"""Quantities: a number with a unit, read from text and compared with a tolerance (`science` extra, for pint).

Bounded: a number, then at most MAX_FACTORS unit names with exponents of one digit. pint parses nothing but names that it
knows and the signs between them. A gold answer may end with options in square brackets: `9.81 m/s^2 [2 %]`, `[+- 0.05]`
(in its own unit), `[unit optional]`, several separated by commas. The domain `science` grades by it.
"""

import contextlib
import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

from soar.problems.answers import PATTERNS, normalize, rewrite
from soar.problems.domain import styled
from soar.types import UserError, Verdict, import_extra

MAX_CHARS = 200
MAX_FACTORS = 8
MAX_EXPONENT = 300  # of ten
TOLERANCE = 0.01  # relative, where the gold answer states none
FUZZ = 1e-9  # relative, for the arithmetic of unit conversion
PLAIN = ("percent", "radian", "dimensionless", "count")  # units that a plain number may replace


class Quantity(NamedTuple):
    """A number with a unit, as it was written."""

    value: float
    step: float  # of one in the last written place; 0 where the text does not say how exact it is (`1500`, `3/4`)
    unit: Any  # pint's; None: a plain number


@lru_cache(maxsize=1)
def registry() -> Any:
    """pint's unit registry, one a process. Raises UserError where pint is not installed."""
    pint = import_extra("pint", UserError, "numbers with units need pint: pip install 'soar-rl[science]'")
    return pint.UnitRegistry(cache_folder=None)


@lru_cache(maxsize=4096)
def _unit_name(name: str) -> str:
    """pint's own name of a unit, read as written, else in lower case. Raises ValueError for an unknown one."""
    for spelling in (name, name.lower() if len(name) > 3 else name):
        # pint's error of an unknown unit is an AttributeError
        with contextlib.suppress(AttributeError, ValueError, TypeError, KeyError):
            if spelling.isidentifier() and (name_of_pint := str(registry().get_name(spelling))):
                return name_of_pint
    raise ValueError(f"no unit {name!r}")


def read_quantity(text: str) -> Quantity | None:
    """A number with or without a unit; None for anything else, for unknown units, and for more than MAX_CHARS.

    What stands before the last `=` is dropped, and so are `about` and the like. Numbers: `1,500`, `1.5e3`, `1.5 x 10^3`,
    `1.5\\times 10^{3}`, `10^3`, `3/4`. Units: names and symbols that pint knows, with `^`, `**` or digits behind them as
    exponents, `*`, blank, `/`, `per` and brackets between them: `m/s^2`, `m s-2`, `J/(mol K)`, `\\text{kg m}^2`.
    """
    if len(text) > MAX_CHARS:
        return None
    text = PATTERNS["lead"].sub("", normalize(text).strip(" .")).strip(" .;,")
    match, exponent, step = PATTERNS["number"].match(re.sub(r"^10\s*\^(?=[\s{(]*[-+]?\d)", "1*10^", text)), 0, 0.0
    if match is None or (match["top"] and int(match["bottom"]) == 0):
        return None
    if match["top"]:
        value = int(f"{match['sign']}{match['top']}") / int(match["bottom"])
    else:
        digits = match["digits"].replace(",", "")
        exponent = int(match["e"] or 0) + int(match["p"] or match["q"] or match["r"] or 0)
        if ("." in digits or exponent) and len(digits.replace(".", "").lstrip("0")) >= 2:
            step = 10.0 ** (min(exponent, MAX_EXPONENT) - len(digits.partition(".")[2]))
        value = float(f"{match['sign']}{digits}e{exponent}")
    try:
        unit = read_unit(match.string[match.end() :])
    except ValueError:
        return None
    return Quantity(value, step, unit) if abs(exponent) <= MAX_EXPONENT and math.isfinite(value) else None


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Any:
    """pint's unit of an expression; None for blank text. Raises ValueError for what is no unit. A slash inverts the next
    factor or bracket only: `J/mol K` is (J/mol) K, as for pint. Temperatures in compound units are differences.
    """
    text = rewrite(text, "unit").strip(" .,;")
    factors = [(m[0], m[1], m[2] or m[3] or m[4] or "1") for m in PATTERNS["factor"].finditer(text)]
    if "".join(shown for shown, _, _ in factors) != text or sum(bool(name) for _, name, _ in factors) > MAX_FACTORS:
        raise ValueError(f"no unit {text!r}")
    words = "".join(f"{_unit_name(name)}**{power} " if name else sign for sign, name, power in factors)
    try:
        return registry().parse_units("1" * text.startswith(("/", "*")) + words) if text else None
    except Exception as error:  # pint's parser raises what Python's tokenizer and its own assertions raise
        raise ValueError(f"no unit {words!r}") from error


def read_gold(text: str) -> tuple[Quantity, dict[str, float]] | None:
    """A gold answer and its options (relative, absolute, unit_optional); None where either cannot be read."""
    body, bracket, rest = text.strip().partition("[")
    quantity, options = read_quantity(body), dict[str, float]()
    if quantity is None or (bracket and not rest.endswith("]")):
        return None
    for part in rest.removesuffix("]").split(",") if bracket else ():
        part = " ".join(part.split()).lower()
        if part == "unit optional":
            options["unit_optional"] = 1
        elif number := re.fullmatch(r"(?:\+-|\u00b1)?\s?(\d{1,6}(?:\.\d{1,12})?(?:e-?\d{1,2})?)\s?(%?)", part):
            options["relative" if number[2] else "absolute"] = float(number[1]) / (100 if number[2] else 1)
        else:
            return None
    return quantity, options


def compare_quantities(answer: str, gold: str) -> Verdict:
    """Whether an answer is the gold quantity; UNSCORABLE when the gold answer is none. Options in the answer are not read.

    Tolerance: what the gold answer states; else 1 %, or half a unit of its last place where it is written with a point
    or a power of ten and two figures or more, whichever is larger. No unit is wrong unless `[unit optional]`.
    """
    read, given = read_gold(gold), read_quantity(answer.partition("[")[0])
    if read is None:
        return Verdict.UNSCORABLE
    wanted, options = read
    if given is None:
        return Verdict.WRONG
    try:
        value = float(registry().Quantity(given.value, given.unit).to(wanted.unit or "").magnitude)
    except (ArithmeticError, ValueError, AttributeError, TypeError):  # of another dimension, among others
        value = math.nan  # near to nothing
    if given.unit is None and wanted.unit is not None and "unit_optional" in options:
        value = given.value
    elif (given.unit is None) != (wanted.unit is None) and str(given.unit or wanted.unit) not in PLAIN:
        return Verdict.WRONG
    size = abs(wanted.value)
    allowed = max(TOLERANCE * size, wanted.step / 2)
    if {"relative", "absolute"} & set(options):
        allowed = max(options.get("relative", 0.0) * size, options.get("absolute", 0.0))
    return Verdict.CORRECT if abs(value - wanted.value) <= allowed + FUZZ * size else Verdict.WRONG


SCIENCE = styled(
    "science",
    verify=lambda answer, problem: compare_quantities(answer, problem.answer),
    validate=lambda problem: None if read_gold(problem.answer) else "answer_is_no_quantity",
    prepare=lambda: registry().get_name("m"),  # loaded once a worker
)
