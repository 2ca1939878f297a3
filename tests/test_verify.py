"""Verifiers: what an answer is, when it equals the gold answer, and that no answer can hang, crash or fool a check, also not
by `soar verify`. Hostile texts through parser, extraction and comparison: benchmarks/fuzz.py checks a million of them."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import cases, write_jsonl

import soar
from soar.cli import grade, main
from soar.loop.rollout import mentions
from soar.problems import verify
from soar.problems.answers import MAX_ANSWER_CHARS, extract, mark_up, normalize, split_choice
from soar.problems.domain import Domain, Grader
from soar.problems.load import load_problems
from soar.problems.pool import MARK, VerifierPool, _Worker
from soar.problems.prompts import FORMATS
from soar.problems.verify import VerifierError, gold_kind, is_parsable, read_number
from soar.types import Problem, Reason, Rejection, Verdict

HERE = Path(__file__).parent
FUNCTIONS = HERE / "verifier_functions.py"
DATA = Path(os.environ.get("SOAR_DATA", HERE.parent.parent / "shared" / "data"))
CASES = DATA.parent / "cases" / "grading.jsonl"
CORRECT, WRONG, NO_ANSWER = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER
LONG = [("boxed", "\\boxed{1}" + " " * 200000, None), ("boxed", "x" * 200000 + "\\boxed{1}", "1")]
LONG_NUMBERS = [("math", "42", "0" * 2_000 + "42", "wrong"), ("number", "42" + " 1" * 2_000, "1", "wrong")]
ROWS = [row for (row,) in cases("cli_verify", "row")]
FRAGMENTS = [text for (text,) in cases("fuzz", "fragment")]
BOMBS: dict[str, str] = {n: "".join(text * times for text, times in parts) for n, parts in cases("verify", "bomb")}
"""Answers that hang, exhaust memory or crash a naive verifier, as the content of a box. None is 42, the gold answer."""
BOMBS["expanded product"] = "".join(f"(x+y+z+{i})" for i in range(60)) + "^{40}"
HARMLESS = dict(cases("verify", "harmless"))
"""Strange answers that cost nothing. None is 42 but two: `nul` (a NUL is dropped) and `template` (6 times 7)."""


def box(answer: str) -> str:
    return rf"So the answer is \boxed{{{answer}}}."


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool("math") as started:
        yield started


@pytest.mark.parametrize(("style", "text", "answer"), [*map(json.loads, (HERE / "extract.jsonl").open()), *LONG])
def test_extract(style, text, answer):
    assert extract(text, style) == answer


@pytest.mark.parametrize(("text", "value"), cases("verify", "number"))
def test_read_number(text, value):
    assert read_number(text) == (None if value is None else Fraction(value))


def test_normalize_keeps_powers_and_indices():
    assert normalize("x²") == normalize("x^{2}") == "x^2" != normalize("x2")
    assert [normalize(text) for text in ("√12", "x₁₂")] == [r"\sqrt{12}", "x_{12}"]
    assert normalize("  \\text{ab}\\, c.  ") == "ab c"
    long = "a" * (MAX_ANSWER_CHARS + 1) + "."
    assert normalize(long) == long
    assert [split_choice(text) for text in ("(A) yes", "A", "Z")] == [("A", "yes"), ("A", ""), (None, "Z")]
    assert mark_up("1" + r" $ \, \!" * 200 + "2") == "1 2", "patterns are cubic in runs of white space"


@pytest.mark.parametrize(
    ("verifier", "answer", "gold", "verdict"), [*cases("verify", "choice and number"), *LONG_NUMBERS]
)
def test_choice_and_number(verifier, answer, gold, verdict):
    with VerifierPool(verifier) as pool:
        assert [found.value for found in pool.check([box(answer)], [gold])] == [verdict]
        assert not pool._live, "no process is started"


def test_answers_are_compared_as_mathematics(pool):
    rows = [line.split("\t") for line in (HERE / "answers.tsv").read_text().splitlines()]
    answers, golds = [row[0] for row in rows], [row[1] for row in rows]
    assert len(rows) > 700
    meaning = {"1": CORRECT, "0": WRONG, "-": Verdict.UNSCORABLE}
    verdicts = pool.check_answers(answers, golds)
    assert [row for row, verdict in zip(rows, verdicts, strict=True) if verdict is not meaning[row[2]]] == []


@pytest.mark.skipif(not CASES.exists(), reason="needs the folder of cases beside SOAR_DATA")
def test_the_verdicts_of_a_mathematician(pool):
    rows, different = [json.loads(line) for line in CASES.read_text().splitlines()], []
    for name, style in (("math", "boxed"), ("number", "boxed"), ("math, --answer-style marker", "marker")):
        some = [row for row in rows if row["verifier"] == name]
        with VerifierPool(name.split(",")[0], answer_style=style) as own:
            verdicts = own.check([row["completion"] for row in some], [row["answer"] for row in some])
        different += [r for r, v in zip(some, verdicts, strict=True) if v.solved != (r["expected"] == "correct")]
    assert different == []


def test_bombs_are_wrong_answers_in_bounded_time(pool):
    """None of them is computed, and none takes a worker."""
    verdicts = pool.check([box(bomb) for bomb in BOMBS.values()], ["42"] * len(BOMBS))
    assert {n: v.value for n, v in zip(BOMBS, verdicts, strict=True) if v not in (WRONG, NO_ANSWER)} == {}
    assert not pool._live, "no process is started"
    names = [name for name in HARMLESS if name not in ("nul", "template")]
    verdicts = pool.check([box(HARMLESS[name]) for name in names], ["42"] * len(names))
    assert {n: v.value for n, v in zip(names, verdicts, strict=True) if v not in (WRONG, NO_ANSWER)} == {}
    assert not list(Path.cwd().glob("PWNED*"))
    assert pool.check([box("4\x002"), box("{{6*7}}"), box("{{6*7}}")], ["42", "42", "7*7"]) == [CORRECT, CORRECT, WRONG]


def test_user_function_outcomes(monkeypatch, tmp_path):
    for name, value in {"HF_TOKEN": "hf_x", "MY_SECRET": "y", "LC_ALL": "C", "PYTHONUTF8": "0"}.items():
        monkeypatch.setenv(name, value)
    expected = {
        "42": CORRECT, "41": WRONG, "raise": Verdict.CRASHED, "mute": Verdict.CRASHED, "segfault": Verdict.CRASHED,
        "sleep": Verdict.TIMEOUT, "eat memory": Verdict.CRASHED,
        "none": Verdict.UNSCORABLE, "nan": Verdict.UNSCORABLE, "print": WRONG,
        "half": WRONG, "two": CORRECT, "bool": CORRECT, "minus": WRONG, "secrets": WRONG,
    }  # fmt: skip
    texts = [*expected, *["42"] * 40]
    with VerifierPool(f"{FUNCTIONS}:obey", workers=2, timeout_s=2.0, memory_mb=2048) as pool:
        verdicts = pool.check(texts, ["42"] * len(texts))
        assert pool.last_error is not None and "obey" in pool.last_error
        late = ": no answer in 2 s (problems.verify_timeout_s)"
        raised = {"raise": ", line 13: KeyError: 'no such key'", "exit": ", line 13: SystemExit: 3", "sleep": late}
        raised["mute"] = ", line 13: Mute: its text cannot be made"
        for text, said in raised.items():
            assert not pool.check([text], ["42"])[0].solved and pool.last_error == f"{FUNCTIONS}:obey{said}"
        assert pool.check(["level", "level"], ["", ""], {"level": ["hard", "easy"]}) == [CORRECT, WRONG]
        assert pool.check(["x" + "42" * 50_000], ["42" * 50_000]) == [CORRECT], "the end of a long text"
        assert len(pool._live) <= 2, "a worker that did not answer in time is ended"
    assert dict(zip(expected, verdicts, strict=False)) == expected
    assert verdicts[len(expected) :] == [CORRECT] * 40
    assert {v for v in Verdict if not v.judged} == {Verdict.UNSCORABLE, Verdict.TIMEOUT, Verdict.CRASHED}
    (tmp_path / "right.py").write_text("GOLD = ['7']\n")
    (tmp_path / "mine.py").write_text("from right import GOLD\ndef f(completions, answer): return [answer == GOLD]\n")
    for folder, name in ((tmp_path, "mine:f"), (tmp_path.parent, f"{tmp_path.name}/mine.py:f")):
        monkeypatch.chdir(folder)
        with VerifierPool(name, workers=1, timeout_s=20) as pool:
            assert pool.check(["x", "y"], ["7", "8"]) == [CORRECT, WRONG]
    for name, message in (("no_such_module:f", "No module named"), ("none.py:f", r"no file none.py \(from ")):
        with VerifierPool(name, workers=1) as pool, pytest.raises(VerifierError, match=message):
            pool.check(["x"], ["7"])


def test_unknown_verifier_and_wrong_lengths_are_refused():
    with pytest.raises(VerifierError, match="expected one of math, number, exact, choice"):
        VerifierPool("maths")
    with pytest.raises(ValueError, match="expected boxed or marker"):
        VerifierPool("exact", answer_style="latex")
    with VerifierPool("exact") as pool, pytest.raises(ValueError, match="2 completions, but 1 gold"):
        pool.check(["a", "b"], ["a"])
    uneven = pytest.raises(ValueError, match="column 'level' has 1 values for 2 completions")
    with VerifierPool(f"{FUNCTIONS}:obey") as pool, uneven:
        pool.check(["a", "b"], ["a", "b"], {"level": ["x"]})


def test_a_pool_heals_when_its_workers_are_killed_and_serves_threads(monkeypatch):
    with VerifierPool(f"{FUNCTIONS}:obey", timeout_s=20, workers=2) as pool:
        for end in (lambda: [(w.process.kill(), w.process.wait()) for w in list(pool._live)], pool.close):
            assert set(pool.check(["a"] * 6, ["a"] * 6)) == {CORRECT}
            end()
        with ThreadPoolExecutor(3) as threads:
            verdicts = list(threads.map(lambda k: pool.check([k, "x"], [k, k]), "abc"))
        told = {"shape": "", "value": 1.0}  # by another worker that waits, or by a new one, which tells its shape first
        monkeypatch.setattr(_Worker, "receive", Mock(side_effect=[EOFError, told, told]))
        assert pool.check(["x"], ["y"]) == [CORRECT], "a check that is lost with its worker is made once more"
    assert verdicts == [[CORRECT, WRONG]] * 3


def test_a_script_without_main_guard_is_told_to_have_one(tmp_path, monkeypatch):
    """Before a worker loads the model that the script would train."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from soar.problems.pool import VerifierPool\n"
        "def grade(completions, answer, **columns):\n    return [1.0]\n"
        "with VerifierPool(f'{__file__}:grade', workers=1, timeout_s=60) as pool:\n    pool.check(['ab'], ['a'])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert "VerifierError" in done.stderr and "put that under `if __name__ == '__main__':`" in done.stderr
    monkeypatch.setenv(MARK, "1")
    with pytest.raises(VerifierError, match="calls soar when imported"):
        soar.screen("no such model", "no such problems")


def test_parsable(pool):
    values = dict(cases("verify", "parsable"))
    assert {text: is_parsable(text, "math") for text in values} == values
    assert [is_parsable(text, "number") for text in ("12", "twelve", "even", "1/0")] == [True, True, False, False]
    assert [is_parsable(text, "exact") for text in ("dog", " ")] == [True, False]
    kinds = dict(cases("verify", "kind"))
    assert {gold: gold_kind(gold, "math") for gold in kinds} == kinds
    assert [gold_kind(gold, "number") for gold in ("1/2", "5 km", "x", "dog")] == ["value", "value", "none", "none"]
    assert gold_kind("and", "math") == "text"  # a word that joins, alone
    prose = "Yes, because every such triangle has two equal angles and so on"
    golds = ["42", r"\frac{x}{2}", r"\text{Saturday}", prose, r"\sum_{k=1}^{3} k"]
    assert pool.check_golds(golds) == [CORRECT, CORRECT, CORRECT, Verdict.UNSCORABLE, CORRECT]
    with VerifierPool("number") as number:
        assert number.check_golds(["42", "dog"]) == [CORRECT, Verdict.UNSCORABLE]
    with VerifierPool(f"{FUNCTIONS}:obey", answer_style="marker", workers=1, timeout_s=20) as function:
        assert function.check_golds(["42"]) == [WRONG]


@pytest.mark.skipif(not (DATA / "math_pool.jsonl").exists(), reason="needs the data folder (SOAR_DATA)")
def test_gold_answers_of_gsm8k_and_math_grade_as_correct(pool):
    for name in ("gsm8k_test", "math_pool"):
        golds = list(dict.fromkeys(problem.answer for problem in load_problems(str(DATA / f"{name}.jsonl"))[0]))
        verdicts = pool.check_golds(golds)
        assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict is not CORRECT] == []


def verified(*words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    code = main(["verify", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_counts_shares_listing_and_labels(tmp_path, capsys):
    source = str(write_jsonl(tmp_path / "c.jsonl", ROWS))
    code, found = verified(source, "--verifier", "number", "--show", "2", capsys=capsys)
    assert code == 0
    wanted = {"correct": 2, "wrong": 1, "no_answer": 2, "unscorable": 1}
    assert {name: count for name, count in found["counts"].items() if count} == wanted
    assert found["shares"]["no_answer"] == pytest.approx(2 / 6)
    assert found["columns"] == {"completion": "completion", "gold": "gold"}
    assert [(row["where"], row["verdict"], row["answer"], row["gold"]) for row in found["listed"]] == [
        (f"{source}:2", "wrong", "2", "1"),
        (f"{source}:3", "no_answer", None, "0"),
    ]
    assert main(["verify", source, "--verifier", "number", "--show", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 rows (completion = column 'completion', gold = column 'gold')"
    assert lines[2].split() == ["correct", "2", "33.33%"]
    assert lines[-2:] == ["not correct, the first 1:", f"  {source}:2: wrong: '2' against '1'"]
    _, found = verified(source, "--verifier", "number", "--label-column", "ok", capsys=capsys)
    assert found["agree"] == 4
    assert [(row["where"], row["label"]) for row in found["listed"]] == [(f"{source}:2", True), (f"{source}:4", False)]


@pytest.mark.parametrize(("row", "columns"), cases("cli_verify", "columns"))
def test_columns_are_found(tmp_path, capsys, row, columns):
    _, found = verified(str(write_jsonl(tmp_path / "c.jsonl", [row])), "--verifier", "exact", capsys=capsys)
    assert found["columns"] == columns
    assert found["counts"]["correct"] == 1


def test_user_functions_get_whole_completions_and_columns(tmp_path, capsys, monkeypatch):
    rows = [{"completion": "level", "gold": "x", "level": level} for level in ("hard", "easy")]
    rows += [{"completion": "raise", "gold": "x", "level": ""}]
    name = f"{FUNCTIONS}:obey"
    source = str(write_jsonl(tmp_path / "c.jsonl", rows))
    _, found = verified(source, "--verifier", name, "--workers", "1", capsys=capsys)
    assert (found["counts"]["correct"], found["counts"]["wrong"], found["counts"]["crashed"]) == (1, 1, 1)
    assert "KeyError" in found["last_error"]
    assert [row["answer"] for row in found["listed"]] == ["level", "raise"], "what the function was given"
    rows = [row for (row,) in cases("cli_verify", "generations")]
    path = write_jsonl(tmp_path / "openr1.jsonl", rows)
    monkeypatch.setattr(grade, "BLOCK", 1)
    with VerifierPool("math", workers=1) as pool:
        grades = grade.grade_file(str(path), pool, {"label": "right"})
    assert (grades.counts[Verdict.CORRECT], grades.counts[Verdict.WRONG], grades.agree) == (2, 1, 2)
    assert [row["where"] for row in grades.listed] == [f"{path}:1[2]"]


def make_text(rng: random.Random, fragments: Sequence[str] = FRAGMENTS, most: int = 14) -> str:
    """Fragments in a random order, sometimes with a character changed, dropped or repeated many times."""
    text = "".join(rng.choice(fragments) for _ in range(rng.randint(0, most)))
    if text and rng.random() < 0.2:
        place = rng.randrange(len(text))
        other = rng.choice(["", chr(rng.randrange(0x20, 0x300)), text[place] * rng.randint(2, 400)])
        text = text[:place] + other + text[place + 1 :]
    return text


def check_text(text: str, other: str) -> int:
    """Raise AssertionError when extraction, parsing or a comparison breaks a promise on these texts.

    Returns how many of the formats read a problem.
    """
    accepted = 0
    answers = [extract(text, "boxed"), extract(text, "marker"), text]
    for answer in answers[:2]:
        told = answer is None or all(part in text for part in answer.split(", "))  # several boxes are joined so
        assert told and (answer is None or answer.strip() == answer != ""), "an answer stands in the text"
    for fmt in FORMATS.values():
        grader = Grader(Domain(fmt.name, fmt))
        outcome = grader.read(text)
        if isinstance(outcome, Problem):
            accepted += 1
            assert outcome.question and outcome.answer and outcome.question in text and outcome.answer in text
            assert len(outcome.question) <= 4000 and len(outcome.answer) <= MAX_ANSWER_CHARS
        else:
            assert isinstance(outcome.reason, Reason) and outcome.text == text
        assert isinstance(grader.read(text, truncated=True), Rejection)
    for answer in answers:
        if answer is not None:
            check_answer(answer, other)
    return accepted


def check_answer(answer: str, gold: str) -> None:
    """The comparisons: never an exception, equal texts are equal, and the order of the two does not matter."""
    for compare in (verify.compare_exact, verify.compare_choice):
        assert compare(answer, answer) is Verdict.CORRECT
        assert isinstance(compare(answer, gold), Verdict)
    for kind in ("math", "number"):
        assert gold_kind(answer, kind) in ("value", "text", "none")
    assert verify.compare_math(answer, answer) is Verdict.CORRECT
    there, back = verify.compare_math(answer, gold), verify.compare_math(gold, answer)
    assert there is back or Verdict.UNSCORABLE in (there, back) or not (normalize(answer) and normalize(gold))
    if "none" not in (gold_kind(answer, "math"), gold_kind(gold, "math")):
        assert verify.compare_number(answer, gold) in (there, Verdict.UNSCORABLE)
    number = read_number(answer)
    assert number is None or len(str(number)) > 2_000 or read_number(str(number)) == number
    mark_up(answer), split_choice(answer), mentions(answer, gold)


def test_parser_extraction_and_comparison_survive_any_text():
    rng = random.Random(0)
    for _ in range(700):
        check_text(make_text(rng), make_text(rng, most=3))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=60), st.text(max_size=30))
def test_any_unicode_text_can_be_compared(answer, gold):
    check_answer(answer, gold)


@pytest.mark.timeout(15)
@pytest.mark.parametrize("piece", [text for (text,) in cases("fuzz", "repeated")])
def test_long_repetitions_take_linear_time(piece):
    text = piece * (50_000 // len(piece))
    check_text(text, piece)
    check_text("Question" + text, "<" + piece)
    check_text("\\boxed{" + text + "}", "1")
    check_text("<question>" + text + "</question><answer>" + text + "</answer>", "1")
