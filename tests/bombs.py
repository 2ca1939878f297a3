"""Answers that hang, exhaust memory or crash a naive verifier. Each is the content of a box."""

from tables import cases

BOMBS = {
    "tower in a fraction": r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}",
    "tower of nines": r"9^{9^{9^9}}",
    "python tower": "9**9**9**9",
    "power of a hundred million": r"10^{100000000}",
    "factorial of a hundred million": r"(10^8)!",
    "nested factorials": "9!!!!",
    "factorial of a factorial": r"((((9)!)!)!)!",
    "million digits": "7" * 1_000_000,
    "two thousand digits": "7" * 2_000,
    "binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "sum of powers": r"\sum_{n=1}^{10^9} n^n",
    "long product": r"\prod_{n=1}^{10^7} n",
    "hard integral": r"\int_0^1 \frac{\sin(x^{x^{x}})}{\ln(1+x^{\pi})} dx",
    "two thousand braces": "{" * 2_000 + "1" + "}" * 2_000,
    "nine hundred parentheses": "(" * 900 + "1" + ")" * 900,
    "nested roots": r"\sqrt{" * 250 + "2" + "}" * 250,
    "nested fractions": r"\frac{1}{1+" * 150 + "1" + "}" * 150,
    "nested exponents": "x" + "^{x" * 300 + "}" * 300,
    "commas": "1," * 30_000,
    "power of two": "2^{24300000}",
    "big factorial": "100000!",
    "expanded product": "".join(f"(x+y+z+{i})" for i in range(60)) + "^{40}",
    "nested boxes": r"\boxed{" * 200 + "1" + "}" * 200,
    "unclosed environments": r"\begin{pmatrix}" * 100,
}
"""The gold answer is 42 throughout: none of these may be correct."""

HARMLESS: dict[str, str] = dict(cases("verify", "harmless"))  # type: ignore[arg-type]
"""Strange answers that cost nothing. None is 42 but two: `nul` (a NUL is dropped) and `template` (6 times 7)."""
