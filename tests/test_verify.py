"""Verifiers: what an answer is, when it equals the gold answer, and that no answer can hang, crash or fool a check."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from bombs import BOMBS, HARMLESS

from soar.problems.answers import MAX_ANSWER_CHARS, extract, normalize, read_choice
from soar.problems.load import load_problems
from soar.problems.pool import CHUNK, VerifierPool, strip_environment
from soar.problems.verify import VerifierError, read_number, read_reward
from soar.types import Verdict

FUNCTIONS = Path(__file__).parent / "verifier_functions.py"
DATA = Path(os.environ.get("SOAR_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
CORRECT, WRONG, NO_ANSWER = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER


def box(answer: str) -> str:
    return rf"So the answer is \boxed{{{answer}}}."


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    """A shared `math` pool; its time limit is generous, since the tests may run on a busy machine."""
    with VerifierPool("math", workers=2, timeout_s=20) as started:
        yield started


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {x}", "x"),
        (r"\boxed 7.", "7"),
        (r"\fbox{8}", "8"),
        (r"\\boxed{9}", "9"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{", None),
        (r"\boxed", None),
        (r"\boxedx{4}", None),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, answer: str | None) -> None:
    assert extract(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a=55 b=60 <ans> 60", "60"),
        ("<ans> 60 <eos> <ans> 7", "60"),
        ("<ans> 60<|im_end|>rest", "60"),
        ("Answer: 42", "42"),
        ("answer : 42\nmore", "42"),
        ("**Answer:** 42", "42"),
        ("**Answer**: **42**", "42"),
        ("Answer:\n\n42 apples\n", "42 apples"),
        ("Answer: \\boxed{42}.", "42"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("Answer:", None),
        ("The final answer is: 42", "42"),
        ("the answer is 42", None),
        ("canswer: 4", None),
    ],
)
def test_extract_marker(text: str, answer: str | None) -> None:
    assert extract(text, "marker") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 6 + 9 = 15, 15 + 2 = 17", "17"),
        ("17\n6 + 9: 15", "17"),
        (" 6 + 9 = 15 apples<|im_end|>= 3", "15 apples"),
        ("6 + 9 =", None),
        ("\n17", None),
    ],
)
def test_extract_line(text: str, answer: str | None) -> None:
    assert extract(text, "line") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 + 4 = 7, 7 + 5 = 12\n1 + 1 = 2", "7, 12"),
        ("3 + 4 = 7, and 7 + 5 = 12.", "7, 12"),
        ("3 - 9 = -6, -6 + 1 =-5<|im_end|> = 9", "-6, -5"),
        ("3 + 4 = seven, 7 + 5 = 12", None),
        ("3 + 4 = 7.5", None),
        ("3 + 4 = ", None),
        ("12", None),
        ("", None),
        ("= " * 100_000, None),
        ("= " + "9" * 31, None),
        ("3 + 4 = 7 + 5 = 12", "7, 12"),
        ("3 + 4 = 7,7 + 5 = 12", None),
        ("= 7,000", None),
        ("= 7/2", None),
        ("= 7e3", None),
        ("= 7x", None),
        ("= \u0667", None),
        ("= 007, 1 - 1 = -0", "7, 0"),
    ],
)
def test_running_totals(text: str, answer: str | None) -> None:
    assert extract(text, "totals") == answer


def test_a_lucky_end_is_no_running_total() -> None:
    right, lucky = "3 + 4 = 7, 7 + 5 = 12", "3 + 5 = 8, 8 + 4 = 12"
    with VerifierPool("number", answer_style="line") as end, VerifierPool("exact", answer_style="totals") as totals:
        assert end.check([right, lucky], ["12", "12"]) == [Verdict.CORRECT] * 2
        assert totals.check([right, lucky, "?"], ["7, 12"] * 3) == [Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER]
        assert totals.check_golds(["7, 12", "7", "7,12", "a"]) == [Verdict.CORRECT] * 2 + [Verdict.UNSCORABLE] * 2


def test_extract_reads_only_the_end_of_a_long_completion() -> None:
    assert extract(r"\boxed{1}" + " " * 200_000, "boxed") is None
    assert extract("x" * 200_000 + r"\boxed{1}", "boxed") == "1"


def test_answer_shotgun_counts_only_its_last_box() -> None:
    text = " ".join(box(str(i)) for i in range(10))
    with VerifierPool("exact") as pool:
        assert pool.check([text, text], ["9", "4"]) == [CORRECT, WRONG]


@pytest.mark.parametrize(
    ("text", "numerator", "denominator"),
    [
        ("42", 42, 1), ("-3", -3, 1), ("+3", 3, 1), ("0", 0, 1), ("-0", 0, 1), ("0.0", 0, 1), ("3.", 3, 1),
        (".75", 3, 4), ("1,234,567", 1234567, 1),
        ("1,234", 1234, 1), ("1{,}234", 1234, 1), (r"1\,234", 1234, 1), (r"1,\!234", 1234, 1), ("1 234", 1234, 1),
        ("1_000", 1000, 1), ("1,234,567.5", 2469135, 2), (r"\frac12", 1, 2), (r"\dfrac{3}{4}", 3, 4), ("3/4", 3, 4),
        (r"\tfrac{-3}{4}", -3, 4), (r"-\frac{3}{4}", -3, 4), (r"1\frac12", 3, 2), (r"-1\frac{1}{2}", -3, 2),
        ("1 1/2", 3, 2), ("½", 1, 2), ("1½", 3, 2), ("−5", -5, 1), (r"\$15.48", 387, 25), ("$15.48$", 387, 25),
        (r"12^\circ", 12, 1), ("12°", 12, 1), ("10 dollars", 10, 1), (r"69\text{ degrees}", 69, 1), ("1e3", 1000, 1),
        (r"3\times10^{2}", 300, 1), (r"2.5 \cdot 10^{-1}", 1, 4), ("４２", 42, 1),
        ("42.", 42, 1), (r"\text{42}", 42, 1), ("4\u200b2", 42, 1),
    ],
)  # fmt: skip
def test_read_number(text: str, numerator: int, denominator: int) -> None:
    assert read_number(text) == Fraction(numerator, denominator)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "1,23", "1.234,5", "1/0", r"\frac{1}{0}", "nan", "inf", "1e4000", "٤٢", "5m", "2x", "x²", "10^{10^{10}}",
        r"\sqrt{2}", "--3", "1..2", "0x10", "5 = x", "it is 5 or 6",
    ],
)  # fmt: skip
def test_read_number_leaves_the_rest(text: str) -> None:
    assert read_number(text) is None


def test_normalize_keeps_powers_and_indices() -> None:
    assert normalize("x²") == normalize("x^{2}") == "x^2" != normalize("x2")
    assert normalize("√12") == r"\sqrt{12}"
    assert normalize("x₁₂") == "x_{12}"
    assert normalize("  \\text{ab}\\, c.  ") == "ab c"
    long = "a" * (MAX_ANSWER_CHARS + 1) + "."
    assert normalize(long) == long


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        (r"\text{(B)}", "(B)", CORRECT), ("B", "(B)", CORRECT), ("B.", "B", CORRECT), ("B) 42", "B", CORRECT),
        ("(C)", "(B)", WRONG), ("b", "B", WRONG), ("Because", "B", WRONG), ("Saturday", r"\text{Saturday}", CORRECT),
    ],
)  # fmt: skip
def test_choice(answer: str, gold: str, verdict: Verdict) -> None:
    with VerifierPool("choice") as pool:
        assert pool.check([box(answer)], [gold]) == [verdict]


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("42", "42.0", CORRECT), ("It is 42 apples", "42", CORRECT), ("1,234", "1234", CORRECT), ("142", "42", WRONG),
        ("3 and 42", "42", WRONG), ("none", "42", WRONG), ("0.333", "1/3", WRONG), ("7", "seven", Verdict.UNSCORABLE),
        ("0", "0", CORRECT), ("-5", "5", WRONG), ("7" * 3_000, "7", WRONG), ("42" + " 1" * 2_000, "1", WRONG),
    ],
)  # fmt: skip
def test_number(answer: str, gold: str, verdict: Verdict) -> None:
    with VerifierPool("number") as pool:
        assert pool.check([box(answer)], [gold]) == [verdict]


def test_exact_compares_text_up_to_whitespace() -> None:
    with VerifierPool("exact", answer_style="marker") as pool:
        texts = ["a=1 <ans> 60 ", "<ans>  6 0", "<ans> 060", "60"]
        assert pool.check(texts, ["60", "6 0", "60", "60"]) == [CORRECT, CORRECT, WRONG, NO_ANSWER]


MATH_PAIRS = [
    ("42", "42", CORRECT), ("42.0", "42", CORRECT), ("142", "42", WRONG), ("0", "0", CORRECT), ("0.0", "0", CORRECT),
    (".5", r"\frac12", CORRECT), (r"1\frac12", "3/2", CORRECT), ("1,234", "1234", CORRECT), ("½", "0.5", CORRECT),
    (r"50\%", ".5", CORRECT), ("50%", "50", CORRECT), ("5%", "50", WRONG), (r"\$42", "42", CORRECT),
    (r"69\text{ degrees}", r"69^\circ", CORRECT), ("0.1000001", "0.1", WRONG), ("0.333", "1/3", WRONG),
    ("0.3333333", "1/3", CORRECT), ("1/2^{99}", "1/2^{98}", WRONG), (r"\frac{1}{2004!}", r"\frac{1}{2006!}", WRONG),
    (r"\frac{1}{2004!}", r"\frac{1}{2004!}", CORRECT), (r"2^{-98}", "1/2^{98}", CORRECT),
    ("e^{-100}", "e^{-101}", WRONG),
    (r"\frac{\sqrt2}{2^{99}}", r"\frac{\sqrt2}{2^{98}}", WRONG), ("x=1/2^{99}", "x=1/2^{98}", WRONG),
    (r"\{1/2^{99}, 3\}", r"\{1/2^{98}, 3\}", WRONG), ("(1,2)", r"\{1,2\}", WRONG), (r"\{2,1\}", r"\{1,2\}", CORRECT),
    ("(2,1)", "(1,2)", WRONG), ("[1,2]", "(1,2)", WRONG), ("(1,2]", "(1,2]", CORRECT), ("3", "(3,4)", WRONG),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)", CORRECT), (r"\pm 3", "3,-3", CORRECT),
    ("x=3", "3", CORRECT), ("3", "x=3", CORRECT), ("y=3", "x=3", WRONG), ("3 or 5", "3,5", CORRECT),
    ("3 or 5", "3", WRONG), ("3,5,7", "5", WRONG),
    ("1+x", "x+1", CORRECT), ("(x+1)^2", "x^2+2x+1", CORRECT), ("(x+1)^2", "x^2+2x", WRONG),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}", CORRECT), ("3+4i", "4i+3", CORRECT), ("3-4i", "3+4i", WRONG),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", CORRECT),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}", WRONG),
    ("B", r"\text{(B)}", CORRECT), ("C", r"\text{(B)}", WRONG), ("saturday", r"\text{Saturday}", CORRECT),
    ("Sunday", r"\text{Saturday}", WRONG), ("x²", "x^2", CORRECT), ("√2", r"\sqrt{2}", CORRECT),
    ("2π", r"2\pi", CORRECT), ("3√2", r"\sqrt{18}", CORRECT),
    (r"\infty", r"\infty", CORRECT), ("x", "y", WRONG), ("2x", "2y", WRONG),
    (r"f(0)=0, where $b$ is an arbitrary integer and so on and on", "0", WRONG),
    ("0", "f(x)=ax, where a is an arbitrary integer with g(a)=0", Verdict.UNSCORABLE),
]  # fmt: skip


def test_math(pool: VerifierPool) -> None:
    answers, golds, expected = zip(*MATH_PAIRS, strict=True)
    found = pool.check([box(answer) for answer in answers], golds)
    wrong = [(a, g, v.value) for a, g, v, e in zip(answers, golds, found, expected, strict=True) if v is not e]
    assert wrong == []


def test_math_verdict_of_a_pair_does_not_depend_on_the_batch(pool: VerifierPool) -> None:
    some = [MATH_PAIRS[i] for i in (17, 18, 33, 38, 41)]
    with VerifierPool("math", workers=1, timeout_s=20) as other:
        alone = [other.check([box(answer)], [gold])[0] for answer, gold, _ in reversed(some)]
    assert alone[::-1] == [expected for _, _, expected in some]


def test_harmless_oddities_are_wrong_and_run_nothing(pool: VerifierPool) -> None:
    names = [name for name in HARMLESS if name not in ("nul", "template")]
    found = pool.check([box(HARMLESS[name]) for name in names], ["42"] * len(names))
    assert {n: v.value for n, v in zip(names, found, strict=True) if v not in (WRONG, NO_ANSWER)} == {}
    assert not list(Path.cwd().glob("PWNED*"))
    assert pool.check([box("4\x002"), box("{{6*7}}"), box("{{6*7}}")], ["42", "42", "7*7"]) == [CORRECT, CORRECT, WRONG]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bombs_are_contained_while_other_checks_go_on() -> None:
    ordinary = [(box(f"{i}+x+y"), f"y+x+{i}") for i in range(100)]
    names = list(BOMBS)
    texts, golds = [text for text, _ in ordinary], [gold for _, gold in ordinary]
    for place, name in enumerate(names):
        texts.insert(4 * place, box(BOMBS[name]))
        golds.insert(4 * place, "42")
    places = {4 * place: name for place, name in enumerate(names)}
    with VerifierPool("math", workers=2, timeout_s=1) as pool:
        verdicts = pool.check(texts, golds)
        again = pool.check(texts, golds)
    allowed = (WRONG, NO_ANSWER, Verdict.TIMEOUT, Verdict.CRASHED)
    assert {name: verdicts[i].value for i, name in places.items() if verdicts[i] not in allowed} == {}
    others = [verdict for i, verdict in enumerate(verdicts) if i not in places]
    assert others.count(CORRECT) == len(ordinary)
    assert verdicts[names.index("tower of nines") * 4] is Verdict.TIMEOUT
    assert again == verdicts


def test_user_function_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("MY_SECRET", "y")
    expected = {
        "42": CORRECT, "41": WRONG, "raise": Verdict.CRASHED, "segfault": Verdict.CRASHED, "exit": Verdict.CRASHED,
        "sleep": Verdict.TIMEOUT, "ignore the timer": Verdict.TIMEOUT, "eat memory": Verdict.CRASHED,
        "none": Verdict.UNSCORABLE, "nan": Verdict.UNSCORABLE,
        "half": WRONG, "two": CORRECT, "bool": CORRECT, "minus": WRONG, "secrets": WRONG,
    }  # fmt: skip
    texts = [*expected, *["42"] * 40]
    with VerifierPool(f"{FUNCTIONS}:obey", workers=2, timeout_s=1.0, memory_mb=2048) as pool:
        found = pool.check(texts, ["42"] * len(texts))
        assert pool.last_error is not None and "obey" in pool.last_error
        assert pool.check(["raise"], ["42"]) == [Verdict.CRASHED]
        assert pool.last_error == f"{FUNCTIONS}:obey: KeyError: 'no such key'"
        levels = pool.check(["level", "level"], ["", ""], {"level": ["hard", "easy"]})
    assert {text: verdict.value for text, verdict in zip(texts, found, strict=True)} == {
        text: verdict.value for text, verdict in expected.items()
    }
    assert found[len(expected) :] == [CORRECT] * 40
    assert levels == [CORRECT, WRONG]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("a_string", "a_string returned str; expected a list"),
        ("two_values", "two_values returned 2 values for 1 completion"),
        ("a_word", r"a_word returned a str \('yes'\)"),
        ("nothing", "nothing returned NoneType"),
        ("missing", "has no function 'missing'"),
        ("NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
    ],
)
def test_user_function_of_a_wrong_shape_is_named(function: str, message: str) -> None:
    with (
        VerifierPool(f"{FUNCTIONS}:{function}", workers=1, timeout_s=20) as pool,
        pytest.raises(VerifierError, match=message),
    ):
        pool.check(["1"], ["1"])


def test_user_function_by_module_path_and_unknown_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_grader.py").write_text(
        "def grade(completions, answer, **kw):\n    return [float(answer == ['7'])]\n"
    )
    monkeypatch.chdir(tmp_path)
    with VerifierPool("my_grader:grade", workers=1, timeout_s=20) as pool:
        assert pool.check(["x", "y"], ["7", "8"]) == [CORRECT, WRONG]
    for name, message in (("no_such_module:f", "No module named"), ("none.py:f", "no file none.py")):
        with VerifierPool(name, workers=1) as pool, pytest.raises(VerifierError, match=message):
            pool.check(["x"], ["7"])


def test_read_reward_counts_only_full_marks() -> None:
    values = {1.0: CORRECT, 2: CORRECT, 0.99: WRONG, 0: WRONG, None: Verdict.UNSCORABLE, float("inf"): CORRECT}
    assert {value: read_reward([value], "f") for value in values} == values


def test_unknown_verifier_and_wrong_lengths_are_refused() -> None:
    with pytest.raises(VerifierError, match="expected one of math, number, exact, choice"):
        VerifierPool("maths")
    with pytest.raises(ValueError, match="expected boxed, marker, line or totals"):
        VerifierPool("exact", answer_style="latex")
    with VerifierPool("exact") as pool, pytest.raises(ValueError, match="2 completions, but 1 gold"):
        pool.check(["a", "b"], ["a"])
    with (
        VerifierPool(f"{FUNCTIONS}:obey") as pool,
        pytest.raises(ValueError, match="column 'level' has 1 values for 2 completions"),
    ):
        pool.check(["a", "b"], ["a", "b"], {"level": ["x"]})


def test_equal_pairs_are_checked_once(pool: VerifierPool) -> None:
    seen: list[int] = []
    run = pool._settle
    sums = [r"\sum_{k=1}^{3} k", r"\sum_{k=1}^{4} k"]
    try:
        pool._settle = lambda items: seen.append(len(items)) or run(items)  # type: ignore[method-assign]
        for _ in range(2):
            assert pool.check([*map(box, sums)] * 10, [r"\sum_{k=1}^{4} k"] * 20) == [WRONG, CORRECT] * 10
    finally:
        pool._settle = run  # type: ignore[method-assign]
    assert [count for count in seen if count] == [1]


def test_named_string_verifiers_start_no_process() -> None:
    for name in ("exact", "number", "choice"):
        with VerifierPool(name) as pool:
            pool.check([box("1")] * 3, ["1"] * 3)
            assert pool._pool is None


def test_pool_heals_when_its_workers_are_killed(pool: VerifierPool) -> None:
    assert pool.check([box(r"\int x dx")], [r"\int y dy"]) == [WRONG]
    inner = pool._pool
    assert inner is not None
    for process in list(inner._pool_manager.worker_manager.workers.values()):
        process.kill()
    golds = [rf"\sum_{{k=1}}^{{3}} k^{i}" for i in range(1, CHUNK)]
    assert pool.check([box(gold.replace("k", "n")) for gold in golds], golds) == [CORRECT] * (CHUNK - 1)


def test_pool_is_usable_from_threads_and_after_close(pool: VerifierPool) -> None:
    found: dict[int, list[Verdict]] = {}

    def check(k: int) -> None:
        found[k] = pool.check([box(f"{k}+c+{i}") for i in range(20)], [f"{k}+{i}+c" for i in range(20)])

    threads = [threading.Thread(target=check, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[k] for k in range(3)] == [[CORRECT] * 20] * 3
    pool.close()
    assert pool.check([box("d+1")], ["1+d"]) == [CORRECT]


def test_script_without_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from soar.problems.pool import VerifierPool, VerifierError\n"
        "pool = VerifierPool('math', workers=1, timeout_s=5)\n"
        "try:\n    print(pool.check([r'\\boxed{\\int x dx}'], ['1+x']))\n"
        "except VerifierError as error:\n    print('REFUSED', error)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "REFUSED" in done.stdout and "if __name__ == '__main__'" in done.stdout


def test_strip_environment_keeps_only_what_a_check_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    try:
        os.environ.update({"WANDB_API_KEY": "k", "AWS_SECRET_ACCESS_KEY": "k", "LC_ALL": "C.UTF-8"})
        strip_environment()
        assert "WANDB_API_KEY" not in os.environ and "AWS_SECRET_ACCESS_KEY" not in os.environ
        assert os.environ["PATH"] == before["PATH"] and os.environ["LC_ALL"] == "C.UTF-8"
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_parsable(pool: VerifierPool) -> None:
    values = {
        "42": True, r"\frac{1}{2}": True, "x+y": True, "(1,2)": True, r"x \le 3": True, r"18\text{ units}": True,
        "hello world": False, "N/A": False, "[answer]": False, "the final answer": False, "1/0": False, "nan": False,
        r"\text{Evelyn}": False, r"\infty": False, "": False, "yes, because 3>2": False, r"2\sqrt{3}+": False,
    }  # fmt: skip
    assert dict(zip(values, pool.parsable(list(values)), strict=True)) == values
    assert pool.parsable([]) == []
    with VerifierPool("number") as number:
        assert number.parsable(["12", "twelve", "1/0"]) == [True, False, False]
    with VerifierPool("exact") as exact:
        assert exact.parsable(["dog", " "]) == [True, False]


def test_check_golds_takes_no_shortcut_for_equal_text(pool: VerifierPool) -> None:
    prose = "Yes, because every such triangle has two equal angles and so on"
    golds = ["42", r"\frac{x}{2}", r"\text{Saturday}", prose, r"2\sqrt{3}+"]
    found = pool.check_golds(golds)
    assert found[:4] == [CORRECT, CORRECT, CORRECT, Verdict.UNSCORABLE]
    with VerifierPool("number") as number:
        assert number.check_golds(["42", "dog"]) == [CORRECT, Verdict.UNSCORABLE]
    with VerifierPool(f"{FUNCTIONS}:obey", answer_style="marker", workers=1, timeout_s=20) as function:
        assert function.check_golds(["42"]) == [WRONG]


@pytest.mark.skipif(not (DATA / "math_pool.jsonl").exists(), reason="needs the data folder (SOAR_DATA)")
def test_gold_answers_of_gsm8k_and_math_grade_as_correct(pool: VerifierPool) -> None:
    for name in ("gsm8k_test", "math_pool"):
        golds = list(dict.fromkeys(problem.answer for problem in load_problems(str(DATA / f"{name}.jsonl"))[0]))
        verdicts = pool.check_golds(golds)
        assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict is not CORRECT] == []


def test_read_choice() -> None:
    assert (read_choice("(A) yes"), read_choice("(A) yes", bare=True), read_choice("Z")) == ("A", None, None)
