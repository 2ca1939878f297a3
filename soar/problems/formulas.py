"""Formulas in LaTeX or as typed: tokens -> tree -> values, without a symbolic engine.

Two formulas are compared by their values: exactly where they are rational, else to 40 digits, and with every variable at
POINTS rational numbers that its name determines. Bounded in time (MAX_TOKENS, MAX_DEPTH, MAX_BITS), so that hostile text
may be read in the main process. Sums and integrals are not computed; what is outside the grammar raises `Unreadable`.
"""

import math
import operator
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial, reduce
from typing import Any, NamedTuple

import mpmath
from mpmath import libmp

from soar.problems.answers import LEXICON, PATTERNS, WORDS

MP = mpmath.MPContext()
MP.dps = 50
CLOSE, NOTHING = MP.mpf(10) ** -40, MP.mpf(10) ** -45
POINTS = 6
MAX_TOKENS = 1_000
MAX_DEPTH = 30
MAX_BITS = 40_000
MAX_ARGUMENT = 100_000  # of exp, sin, gamma, and of an exponent that is no whole number

OPERATORS, SAME = LEXICON["operators"], LEXICON["same"]
FUNCTIONS: dict[str, Callable[[Any], Any]] = {key: getattr(MP, name) for key, name in LEXICON["functions"].items()}
SEVERAL = ("max", "min", "gcd", "lcm")
TYPED = (*FUNCTIONS, *SEVERAL, *["sqrt", "log", "pi", "frac", "infty", "binom", "cdot", "times", "infinity", "inf"])
"""Names that are commands without their backslash too."""
OPEN, CLOSING = ("(", "[", "{", "\\{", "<("), (")", "]", "}", "\\}", ")>")
TOP, INSIDE = (re.compile(LEXICON["pattern"]["token"].replace("GAP", gap)) for gap in (r",|\{,\}|_|\ ", r"\{,\}|\ "))
TEXT_MARKS = {"\x01": True, "\x02": False}

Node = tuple[Any, ...]
"""("num", value, decimal places), ("var", name), or a key of OPERATIONS with its operands."""


class Unreadable(Exception):
    """No formula of this grammar, or one whose value is too large to be computed here."""


class Token(NamedTuple):
    """kind: num, cmd, var, word (letters that are no variables) or op. spaced: white space stands before it."""

    kind: str
    text: str
    spaced: bool = False

    def is_a(self, *texts: str) -> bool:
        """Whether it is an operator or a command among `texts`."""
        return self.kind in ("op", "cmd") and self.text in texts

    @property
    def depth(self) -> int:
        """1 where it opens a bracket or a matrix, -1 where it closes one."""
        return self.is_a(*OPEN, "beginmatrix") - self.is_a(*CLOSING, "endmatrix")


def tokenize(text: str, units: frozenset[str]) -> list[Token]:
    """The tokens of a text in which \\x01 and \\x02 stand around `\\text`. Raises Unreadable above MAX_TOKENS.

    units: runs of letters that are words behind a value. `1,234` is one number, two in brackets.
    """
    tokens, place, depth, spaced, in_text = list[Token](), 0, 0, False, False
    while place < len(text):
        match = (INSIDE if depth else TOP).match(text, place)
        if match is None or match.lastgroup is None or len(tokens) > MAX_TOKENS:
            raise Unreadable("no formula")
        kind, piece, place = match.lastgroup, match[match.lastgroup], match.end()
        if kind == "space" or piece in TEXT_MARKS:
            spaced, in_text = True, TEXT_MARKS.get(piece, in_text)
            continue
        behind = bool(tokens) and (tokens[-1].kind in ("num", "word") or tokens[-1].is_a(")", "}", "/", "*", "%"))
        is_word = in_text or piece.casefold() in WORDS["short"] or (behind and piece.casefold() in units)
        for made in _tokens(kind, piece, is_word):
            depth = max(0, depth + (made.text in OPEN) - (made.text in CLOSING))
            tokens.append(Token(made.kind, made.text, spaced))
            spaced = False
    return tokens


def _tokens(kind: str, piece: str, is_word: bool) -> Iterable[Token]:
    """The tokens of one match; letters that are no word and no name are variables."""
    if kind == "num":
        return [Token("num", re.sub(r"\{,\}|[,_ ]", "", piece))]
    if kind == "op":
        return [Token("op", "^" if piece == "**" else piece)]
    if kind == "cmd":
        return [_command(piece)]
    piece = "infinity" if piece.casefold() == "infinity" else piece
    name = next((name for name in TYPED if piece.endswith(name) and len(piece) <= len(name) + (name != "inf")), "")
    if piece != "infinity" and (is_word or (not name and (len(piece) >= 4 or PATTERNS["given_name"].fullmatch(piece)))):
        return [Token("word", piece)]
    letters = piece.removesuffix(name)
    return [*(Token("var", letter) for letter in letters), *([_command(name)] if name else [])]


def _command(name: str) -> Token:
    name = SAME.get(name, name)
    return Token("op", OPERATORS[name]) if name in OPERATORS else Token("cmd", name)


class Parser:
    """Recursive descent over tokens. `whole` reads the longest formula from `place`; what follows is the caller's."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens, self.place, self.depth, self.bars = list(tokens), 0, 0, False

    def peek(self, ahead: int = 0) -> Token:
        """The token so many places on; one of the kind `end` behind the last."""
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else Token("end", "")

    def take(self, *texts: str) -> str:
        """Step over the next token when it is an operator or a command among `texts`: its text, else ""."""
        token = self.peek()
        taken = token.is_a(*texts)
        self.place += taken
        return token.text if taken else ""

    def expect(self, text: str) -> None:
        """Step over this operator or command. Raises Unreadable where another token stands."""
        if not self.take(text):
            raise Unreadable(f"{text} expected")

    def whole(self, end: str = "") -> Node:
        """An expression, or two with `\\over` or `\\choose` between them, up to the closing bracket `end`."""
        node = self.expression()
        if kind := self.take("over", "choose"):
            node = (kind, node, self.expression())
        if end:
            self.expect(end)
        return node

    def expression(self) -> Node:
        """Terms with `+` or `-` between them. Raises Unreadable above MAX_DEPTH."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node: Node = ("neg", self.term()) if self.take("+", "-") == "-" else self.term()
        while sign := self.take("+", "-"):
            node = (sign, node, self.term())
        self.depth -= 1
        return node

    def term(self) -> Node:
        """Factors with `*`, `/` or nothing between them, or a mixed number."""
        node = self.power()
        while True:
            if sign := self.take("*", "/"):
                node = (sign, node, ("neg", self.power()) if self.take("-") else self.power())
            elif self.mixed(node):
                right = self.primary()
                node = ("+", node, ("/", right, self.primary()) if self.take("/") else right)
                node = ("%", node) if self.take("%") else node
            elif self.starts(node):
                node = ("*", node, self.power())
            else:
                return node

    def starts(self, left: Node) -> bool:
        """Whether a factor begins here, so that it is multiplied with what stands before."""
        token = self.peek()
        if token.kind == "num":
            return self.tokens[self.place - 1].is_a(")", "}") or left[0] in ("var", "pi", "e", "i", "!")
        if token.kind == "cmd":
            return token.text not in WORDS["ending"]
        return token.kind == "var" or token.is_a("(", "{", "[") or (token.text == "|" and not self.bars)

    def mixed(self, left: Node) -> bool:
        """Whether `2\\frac{1}{2}` or `2 1/2` stands here."""
        if left[0] != "num" or left[2] or left[1].denominator != 1:
            return False
        if self.peek().is_a("frac"):
            ahead = "".join(token.text for token in self.tokens[self.place : self.place + 7])
            return PATTERNS["whole_fraction"].match(ahead) is not None
        a, slash, b, behind = (self.peek(i) for i in range(4))
        return a.kind == b.kind == "num" and a.spaced and slash.is_a("/") and not behind.is_a("^")

    def power(self) -> Node:
        """A value with its exponent; `^\\circ` makes it degrees."""
        node = self.postfix()
        if not self.take("^"):
            return node
        if self.take("circ"):
            return ("circ", node)
        node = ("pow", node, self.exponent())
        return ("!", node) if self.take("!") else node

    def exponent(self) -> Node:
        """What stands behind `^`; a tower is read from the right."""
        if sign := self.take("-", "+"):
            return ("neg", self.exponent()) if sign == "-" else self.exponent()
        node = self.primary()
        return ("pow", node, self.exponent()) if self.take("^") else node

    def postfix(self) -> Node:
        """A value with `!`, `%` or a sign of degrees behind it."""
        node = self.primary()
        while sign := self.take("!", "%", "circ"):
            if sign == node[0]:
                raise Unreadable("twice")
            node = (sign, node)
        return node

    def argument(self) -> Node:
        """`{...}`, or one digit or letter."""
        token = self.peek()
        if token.kind == "num" and token.text.isdigit() and len(token.text) > 1:  # \frac12
            self.tokens[self.place : self.place + 1] = [Token("num", token.text[0]), Token("num", token.text[1:])]
        return self.primary()

    def primary(self) -> Node:
        """A numeral, a name, a command with its arguments, brackets or bars. Raises Unreadable for anything else."""
        token = self.peek()
        self.place += 1
        if token.kind == "num":
            return numeral(token.text)
        if token.kind == "var" or (token.kind == "word" and len(token.text) == 1):
            return self.name(token.text)
        if token.kind == "cmd":
            return self.command(token.text)
        if token.is_a("(", "{", "[", "|"):
            outside, self.bars = self.bars, token.text == "|"
            node = self.whole("|" if self.bars else CLOSING[OPEN.index(token.text)])
            self.bars = outside
            return ("|", node) if token.text == "|" else node
        raise Unreadable(f"{token.text!r} begins no value")

    def name(self, letter: str) -> Node:
        """A variable with its subscript, or a constant."""
        if not self.take("_"):
            return (letter,) if letter in ("e", "i") else ("var", letter)
        begin, depth = self.place, 0
        while depth or self.place == begin:
            if depth and self.peek().kind == "end":
                raise Unreadable("} expected")
            depth += self.peek().is_a("{") - self.peek().is_a("}")
            self.place += 1
        texts = (token.text for token in self.tokens[begin : self.place] if not token.is_a("{", "}"))
        return ("var", f"{letter}_{''.join(texts)}")

    def command(self, name: str) -> Node:
        """What a command stands for, with its arguments. Raises Unreadable for one that is not of this grammar."""
        if name in WORDS["greek"]:
            return self.name(name)
        if name in ("pi", "infty", "i"):
            return (name,)
        if name in ("frac", "binom"):
            return (name, self.argument(), self.argument())
        if name == "sqrt":
            degree: Node = self.whole("]") if self.take("[") else ("num", Fraction(2), 0)
            return ("root", self.argument(), degree)
        if name in ("lfloor", "lceil"):
            return (name[1:], self.whole("r" + name[1:]))
        if name in SEVERAL:
            close = {"(": ")", "\\{": "\\}", "{": "}"}.get(self.peek().text, "")
            self.place += 1
            parts = [self.expression()]
            while self.take(","):
                parts.append(self.expression())
            self.expect(close)
            return (name, *parts)
        if name in FUNCTIONS or name == "log":
            return self.function(name)
        if name in WORDS["bounded"]:
            return self.bounded(name)
        raise Unreadable(f"\\{name}")

    def bounded(self, name: str) -> Node:
        """A sum, product, integral or limit: not computed, but equal to one with the same bounds and an equal term."""
        bounds: list[Node] = []
        while self.peek().is_a("_", "^"):
            mark, braces = self.peek().text, self.peek(1).is_a("{")
            self.place += 1 + braces
            bounds.append(("+", ("var", name + mark), self.expression() if braces else self.argument()))
            while braces and self.take("=", "to"):
                bounds.append(("+", ("var", name + mark + "="), self.expression()))
            if braces:
                self.expect("}")
        return reduce(lambda a, b: ("*", a, b), bounds, ("+", ("var", name), self.term()))

    def function(self, name: str) -> Node:
        """A function of one argument: `\\log_2(8)`, `\\sin^2 x`, `\\sin 2x`, of which `\\sin^{-1}` is the inverse."""
        base: Node = ("num", Fraction(10), 0)
        if name == "log" and self.take("_"):
            base = self.primary() if self.peek(1).is_a("(") else self.argument()
        exponent = self.exponent() if self.take("^") else None
        if self.peek().is_a("(", "{", "["):
            value = self.postfix()
        else:
            value = self.power()
            while self.starts(value) and not self.peek().is_a("(", "[", *FUNCTIONS, "log"):
                value = ("*", value, self.power())
            while value[0] in ("pi", "*") and self.take("/"):
                value = ("/", value, self.power())
        if exponent == ("neg", ("num", Fraction(1), 0)) and name in ("sin", "cos", "tan"):
            return ("a" + name, value)
        node: Node = (name, value, base) if name == "log" else (name, value)
        return node if exponent is None else ("pow", node, exponent)


def numeral(text: str) -> Node:
    """("num", value, decimal places) of a numeral, with a period in `\\overline{3}`, `\\dot{3}` or `(3)`."""
    if match := PATTERNS["periodic"].fullmatch(text):
        whole, digits, period = match.groups()
        value = Fraction(int((whole or "0") + digits) + Fraction(int(period), 10 ** len(period) - 1), 10 ** len(digits))
        return ("num", value, 0)
    return ("num", Fraction(text), 0 if "e" in text.lower() else len(text.partition(".")[2]))


def nodes(tree: Node) -> Iterator[Node]:
    """A tree and all trees in it."""
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from nodes(part)


def point(name: str, k: int) -> Fraction:
    """The value of variable `name` at point k: a whole number, then fractions of both signs and many sizes."""
    seed = zlib.crc32(f"{name}:{k}".encode())
    if k == 0:
        return Fraction(3 + seed % 40)
    size = Fraction(1 + seed % 997, (7, 101, 1009, 211, 53)[(k - 1) % 5])
    return -size if k in (2, 4) else size


def evaluate(node: Node, k: int) -> Any:
    """The value at point k: a Fraction where exact, else of mpmath; None where undefined. Raises Unreadable if too large."""
    with suppress(ArithmeticError, ValueError, TypeError, NotImplementedError):
        value = _evaluate(node, k)
        return value if isinstance(value, Fraction) or not MP.isnan(value) else None
    return None


def _evaluate(node: Node, k: int) -> Any:
    kind, *parts = node
    if kind == "num":
        return parts[0]
    if kind == "var":
        return point(parts[0], k)
    return OPERATIONS[kind](*(_evaluate(part, k) for part in parts))


def real(value: Any) -> Any:
    """A Fraction as a number of mpmath."""
    return MP.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _whole(operation: Callable[..., int], *values: Any) -> Fraction:
    if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
        raise ValueError("no whole numbers")
    return Fraction(operation(*(value.numerator for value in values)))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bound(value: Any, most: int = MAX_ARGUMENT) -> Any:
    if abs(value) > most and (isinstance(value, Fraction) or not MP.isinf(value)):
        raise Unreadable("too large")
    return value


def both(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """An operation on two values, exact where both are."""
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return operation(real(a), real(b))
    value = operation(a, b)
    _bound(_bits(value), MAX_BITS)
    return value


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if b.denominator == 1:
            _bound(b * (_bits(a) - 1), MAX_BITS)
            return a ** int(_bound(b, 10**9))
        n, d = (_root(part, b.denominator) for part in (a.numerator, a.denominator))
        if n is not None and d is not None and abs(b.numerator) < 100:
            return _power(Fraction(n, d), Fraction(b.numerator))
    x, y = real(a), real(_bound(b))
    if x != 0 and not MP.isinf(x):
        _bound(MP.log(abs(x)) * abs(y))
    return MP.power(x, y)


def _root(value: int, degree: int) -> int | None:
    """The whole root of a whole number, None where there is none or it is too large."""
    if value < 0 or value.bit_length() > 2_000 or degree > 100:
        return None
    root = int(libmp.to_int(libmp.mpf_nthroot(libmp.from_int(value), degree, 2_100), "n"))
    return root if root**degree == value else None


def _nth_root(a: Any, degree: Any) -> Any:
    if isinstance(a, Fraction) and isinstance(degree, Fraction) and a < 0 and degree % 2 == 1:
        return -_power(-a, 1 / degree)
    return _power(a, both(operator.truediv, Fraction(1), degree))


def _factorial(a: Any) -> Any:
    if not isinstance(a, Fraction) or a.denominator != 1:
        return MP.gamma(real(_bound(a, 1_000)) + 1)
    return Fraction(math.factorial(int(_bound(a, 4_000))))


def _binomial(a: Any, b: Any) -> Any:
    whole = all(isinstance(x, Fraction) and x.denominator == 1 and x >= 0 for x in (a, b))
    a, b = (_bound(x, 4_000 if whole else 1_000) for x in (a, b))
    return Fraction(math.comb(int(a), int(b))) if whole else MP.binomial(real(a), real(b))


def _round(how: Callable[[Any], int], a: Any) -> Any:
    if not isinstance(a, Fraction):
        near = MP.nint(_bound(a, 10**30))
        a = near if abs(a - near) < CLOSE else a
    return Fraction(how(a))


_divided = partial(both, operator.truediv)
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: lambda a, function=function: function(real(_bound(a))) for name, function in FUNCTIONS.items()},
    "pi": lambda: +MP.pi, "e": lambda: +MP.e, "i": lambda: MP.mpc(0, 1), "infty": lambda: MP.inf,
    "+": partial(both, operator.add), "-": partial(both, operator.sub), "*": partial(both, operator.mul),
    "/": _divided, "over": _divided, "frac": _divided, "%": lambda a: _divided(a, Fraction(100)),
    "neg": operator.neg, "pow": _power, "root": _nth_root, "!": _factorial, "binom": _binomial, "choose": _binomial,
    "|": abs, "floor": partial(_round, math.floor), "ceil": partial(_round, math.ceil), "gcd": partial(_whole, math.gcd),
    "lcm": partial(_whole, math.lcm), "max": lambda *parts: max(parts, key=real), "min": lambda *parts: min(parts, key=real),
    "log": lambda a, base: MP.log(real(a)) / MP.log(real(base)), "circ": lambda a: real(a) * MP.pi / 180,
}  # fmt: skip


def close(a: Any, b: Any) -> bool:
    """Whether two values are equal; to zero what is as small as the digits that are lost on the way."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    x, y = real(a), real(b)
    if MP.isinf(x) or MP.isinf(y) or x == y:
        return bool(x == y)
    small, large = sorted((abs(x), abs(y)))
    return bool(abs(x - y) <= CLOSE * large if small else large < NOTHING)
