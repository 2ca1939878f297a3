"""Any causal language model folder and any problem file through the command line; domains: the one in docs/domains.md, taken
out of the page, hostile and broken ones, `science`, `procedural`, `code`, the one of examples/multiple_choice.py; the
embedded world: oracle, labels, the shipped model and its pretraining."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pretrain
import pytest
import torch
from helpers import BOS, ROOT, tiny_model, tiny_tokenizer
from loop_helpers import events, read_jsonl, sets, tiny_config, write_problems
from multiple_choice import arrange
from multiple_choice import verify as verify_choice
from tables import CASES, cases, write_jsonl
from test_sandbox import needs_one
from tokenizers import processors
from world import carrying_steps

from soar.cli import main
from soar.config import ConfigError, load, resolve_path
from soar.domains import procedural
from soar.domains import world as worlds
from soar.domains.candidates import candidates
from soar.domains.code import CODE, MAX_TESTS, Unusable, flaw, grade, read_answer, read_problem, read_tests
from soar.domains.procedural import compare, kind_of
from soar.domains.science import compare_quantities, read_gold, read_quantity, read_unit
from soar.loop.arms import oracle
from soar.plan.check import check_problems
from soar.problems.domain import Domain, Grader, load_domain
from soar.problems.load import load_problems
from soar.problems.pool import VerifierError, VerifierPool
from soar.problems.prompts import FORMATS
from soar.sandbox import run as sandbox
from soar.sandbox.run import End, Outcome, SandboxError
from soar.types import Problem, Reason, Rejection, Verdict

PAGE = (ROOT / "docs" / "domains.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
ROMAN_WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", "X", "V", "I", "3", "plus")
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", "3", "5", "8", "apples", "and")


def save_model(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """A random Gemma with a tokenizer that puts a BOS in front; two rows of its output layer have no token."""
    shape = {"num_key_value_heads": 1, "max_position_embeddings": 160, "sliding_window": 16}
    model, tokenizer = tiny_model("gemma3", vocab_size=len(words) + 2, **shape), tiny_tokenizer(words)
    for parameter in model.parameters():
        parameter.data.mul_(0.05)  # it says every word now and then
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.backend_tokenizer.post_processor = begin
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_sets(changes: dict[str, Any]) -> list[str]:
    """The settings of `cases/small.json` with changes, as words of a command."""
    small = json.loads((Path(__file__).parent / "cases" / "small.json").read_text(encoding="utf-8"))
    return sets(*(f"{key}={json.dumps(value)}" for key, value in {**small, **changes}.items()))


def test_a_random_model_runs_to_the_end(tmp_path, capsys):
    """With columns under other names than ours: the loader finds them."""
    out = tmp_path / "run"
    rows = [{"problem": f"What is {i} and {i} and 5 ?", "solution": f"think\n#### {2 * i + 5}"} for i in range(8)]
    model, sums = save_model(tmp_path / "model"), write_jsonl(tmp_path / "sums.jsonl", rows)
    place = ["--model", str(model), "--problems", str(sums)]
    assert main(["run", *place, "--out", str(out), "--quiet", *small_sets({})]) == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["outer_steps"], summary["promotions"]) == (2, 2)
    assert list(summary["arms"]) == ["base", "hard_only", "base_t", "ps", "pq"]
    assert all(set(row["answer"]) & set("358") for row in read_jsonl(out / "questions.jsonl"))
    assert [row["failed_students"] for row in events(out, "outer_step")] == [0, 0]
    for row in read_jsonl(out / "pq.jsonl"):
        assert set(row) == {"step", "dataset", "question", "answer", "reward"} and row["question"]
    hard = read_jsonl(out / "hard" / "train.jsonl") + read_jsonl(out / "hard" / "test.jsonl")
    assert sorted(int(row["answer"]) for row in hard) == [2 * i + 5 for i in range(8)]
    printed = capsys.readouterr().out
    assert "promotions: 2 in 2 outer steps" in printed and "pass@2" in printed


@pytest.fixture(scope="module")
def roman(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of the page, as a file."""
    path = tmp_path_factory.mktemp("domain") / "roman.py"
    path.write_text(BLOCKS[0], encoding="utf-8")
    return path


def test_the_page_holds_a_short_domain_and_a_test_that_passes(roman, monkeypatch):
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 60
    scope: dict[str, Any] = {}
    exec(BLOCKS[1], scope)
    monkeypatch.chdir(roman.parent)
    scope["test_roman"]()


def test_teacher_texts_are_problems_or_named_rejections(roman):
    texts = [" What is 9 plus 5?\nAnswer: XIV", " What is 1 plus 1?"]
    texts += [" Q Answer: IIII", "", " Cut Answer: V", " Answer: V"]
    pairs = [("What is 9 plus 5?", "XIV"), ("What is 9 plus 5?", "XV"), ("What is love?", "X")]
    asked = [Problem(str(i), *pair) for i, pair in enumerate(pairs)]
    with VerifierPool(load_domain(f"{roman}:ROMAN"), workers=1) as pool:
        good, *found = pool.read_problems(texts, [text.startswith(" Cut") for text in texts])
        judged = oracle(SimpleNamespace(verifier=pool), tiny_config(), asked)
        assert pool.check_answers([None, "XIV"], ["XIV", "XIV"]) == [Verdict.NO_ANSWER, Verdict.CORRECT]
    assert isinstance(good, Problem) and (good.question, good.answer) == pairs[0]
    names = [outcome.name for outcome in found if isinstance(outcome, Rejection)]
    assert names == ["no_answer", "not_a_numeral", "empty", "truncated", "empty"]
    assert judged == [(True, True), (True, False), (False, False)]


def test_a_run_with_the_example_of_the_page(roman, tmp_path, capsys):
    model, problems = save_model(tmp_path / "model", ROMAN_WORDS), tmp_path / "sums.jsonl"
    answers = ("IV", "V", "XII")
    write_problems(problems, [Problem(f"p{n}", f"What is {n} plus {n}?", answers[n % 3]) for n in range(8)])
    ones = dict.fromkeys(("teacher.steps", "teacher.questions", "reward.questions"), 1)
    keys = small_sets({"problems.domain": f"{roman}:ROMAN", "arms.run": ["base"], **ones})
    place = ["--model", str(model), "--problems", str(problems)]
    assert main(["check", "small-1gpu", *place, *keys, "--no-model"]) == 0
    assert "8 of 8 gold answers grade as correct by 'domain roman'" in capsys.readouterr().out
    assert main(["screen", "small-1gpu", *place, *keys, "--out", str(tmp_path / "screen"), "--quiet"]) == 0
    hard = tmp_path / "screen" / "hard.jsonl"
    keys += sets(f"problems.source={json.dumps(str(hard))}")
    out = tmp_path / "run"
    assert main(["run", "small-1gpu", "--model", str(model), *keys, "--out", str(out), "--quiet"]) == 0
    steps = events(out, "outer_step")
    assert all("no_answer" in step["rejected"] and "not_a_numeral" in step["rejected"] for step in steps)
    assert {row["answer"] for row in read_jsonl(out / "pq.jsonl")} <= {"X", "V", "I"}
    assert "domain" in json.loads((out / "manifest.json").read_text())["hashes"]
    changed = tmp_path / "changed.py"
    changed.write_text(roman.read_text(encoding="utf-8") + "\n# another text\n", encoding="utf-8")
    keys += sets(f"problems.domain={json.dumps(f'{changed}:ROMAN')}")
    assert main(["run", "small-1gpu", "--model", str(model), *keys, "--out", str(tmp_path / "other"), "--quiet"]) == 1
    assert "domain: screened with" in capsys.readouterr().err


HOSTILE = (CASES / "hostile_domain.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("domain") / "hostile.py"
    path.write_text(HOSTILE, encoding="utf-8")
    return path


def test_what_a_domain_raises_is_data(hostile):
    with VerifierPool(load_domain(f"{hostile}:D"), timeout_s=1.5, workers=1) as pool:
        texts = ["fine", "raise", "hang", "die", "shape", "kinds", "odd", "fine too"]
        found = pool.read_problems(texts, [False] * len(texts))
        names = [outcome.answer if isinstance(outcome, Problem) else outcome.name for outcome in found]
        failed = Reason.READER_FAILED.value
        odd = ("b_odd_name_b_" + 100 * "x")[:40]
        assert names == ["fine", failed, "reader_timeout", failed, failed, failed, odd, "fine too"]
        answers = ["yes", "no", "half", "none", "nan", "verdict", "text", "raise"]
        expected = ["correct", "wrong", "wrong", "unscorable", "unscorable", "no_answer", "crashed", "crashed"]
        assert [v.value for v in pool.check_answers(answers, ["g"] * 8)] == expected
        assert "ZeroDivisionError" in str(pool.last_error) or "TypeError" in str(pool.last_error)
        assert pool.usable([Problem("p", "What now?", answer) for answer in ("bad", "good")]) == [False, True]


@pytest.mark.parametrize(("reference", "message"), cases("domains", "reference"))
def test_what_is_no_domain_is_refused(hostile, reference, message):
    (hostile.parent / "broken.py").write_text("1 / 0\n")
    (hostile.parent / "mute.py").write_text("from verifier_functions import Mute\nraise Mute\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_domain(str(hostile.parent / reference) if ":" in reference else reference)
    assert str(hostile.parent / "absent") not in sys.path


def test_a_teacher_may_have_a_mark_of_its_own(hostile):
    read = Grader(load_domain(f"{hostile}:KEY_MARK")).read("What is 2 + 2? Key: 4")
    assert isinstance(read, Problem) and (read.question, read.answer) == ("What is 2 + 2?", "4")


def test_a_fingerprint_covers_prompts_version_and_file(hostile, tmp_path):
    domain = load_domain(f"{hostile}:D")
    copy = tmp_path / "elsewhere.py"
    copy.write_text(HOSTILE, encoding="utf-8")
    assert load_domain(f"{copy}:D").fingerprint() == domain.fingerprint()
    copy.write_text(HOSTILE.replace("time.sleep(60)", "time.sleep(61)"), encoding="utf-8")
    changes: list[dict[str, Any]] = [{"version": 2}, {"prompts": FORMATS["tags"]}, {"verifier": "math"}, {"name": "x"}]
    others = {Domain(**{**vars(domain), **change}).fingerprint() for change in changes}
    others |= {load_domain(f"{copy}:D").fingerprint(), domain.fingerprint()}
    assert len(others) == len(changes) + 2


C, W = Verdict.CORRECT, Verdict.WRONG
WORLD = worlds.get_world("tiny")
COMPARED = [(compare_quantities, *case) for case in (*cases("science", "quantity"), ("9" * 500, "3 m", "wrong"))]
COMPARED += [(compare, *case) for case in cases("procedural", "compared")]


@pytest.mark.parametrize(("comparison", "answer", "gold", "verdict"), COMPARED)
def test_comparison(comparison, answer, gold, verdict):
    assert comparison(answer, gold).value == verdict


def test_reading():
    found = read_quantity("0.0450 kg m/s")
    assert found and (found.value, found.step, str(found.unit)) == (0.045, 1e-4, "kilogram * meter / second")
    steps = {text: q.step for text in ("1500", "1.50e3", "0.05") if (q := read_quantity(text))}
    assert steps == {"1500": 0, "1.50e3": 10, "0.05": 0}
    assert str(read_unit("J/(mol K)")) == "joule / kelvin / mole"
    assert read_gold("5 m [soon]") is read_gold("5 m [3 %") is read_quantity("5 parrots") is None
    assert compare_quantities("5 m", "tall") is Verdict.UNSCORABLE


def question(*options: str, stem: str = "What is it?") -> str:
    return "\n".join([stem, *(f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))])


def test_options_are_shuffled_and_the_same_for_every_order_they_came_in():
    made = [arrange(Problem("p", question("iron", "copper", "tin", "none of the above"), answer)) for answer in "ABCD"]
    assert all(isinstance(p, Problem) for p in made)
    problems: list[Any] = made
    assert len({p.question for p in problems}) == 1 and problems[3].answer == "D", "stays last"
    assert sorted(p.answer for p in problems) == ["A", "B", "C", "D"]
    other: Any = arrange(Problem("p", question("tin", "iron", "none of the above", "copper"), "copper"))
    assert (other.question, other.answer) == (problems[1].question, problems[1].answer)
    assert arrange(other) == other
    assert [verify_choice(text, other) for text in ("copper", "tin", "A or B")] == [C, W, Verdict.NO_ANSWER]


def test_multiple_choice_is_loaded_like_any_file(tmp_path):
    domain, path = f"{ROOT / 'examples' / 'multiple_choice.py'}:DOMAIN", tmp_path / "choices.jsonl"
    rows = ['{"question": "Q1?", "answer": "1", "options": ["yes", "no"]}', '{"question": "Q2?", "answer": "no"}']
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    loaded = candidates(load("small-1gpu", [f"problems.source={path}", f"problems.domain={domain}"]))
    assert len(loaded.problems) == 1 and "no_options" in str(loaded.report.dropped[0])
    arc = {"choices": {"text": ["0", "1"], "label": ["1", "2"]}, "answerKey": "1", "Context": "Tin.", "input": [1]}
    source = f"problems.source={write_jsonl(path, [{'question': f'Q{i}?', **arc} for i in range(4)])}"
    finding, _ = check_problems(load("small-1gpu", [source]))
    assert finding.status == "warning" and "students do not see" in finding.details[0] and ":DOMAIN" in finding.advice
    key = "problems.question_column = 'Context + question'"
    assert finding.details[1].strip() == f"4 x column 'Context' is not asked: {key} puts it in front"
    made, report, _ = candidates(load("small-1gpu", [source, key.replace("'", '"')]))
    assert (made[0].question, [note for note in report.notes if "Context" in note]) == ("Tin. Q0?", [])
    made, report, _ = candidates(load("small-1gpu", [source, f"problems.domain={domain}"]))
    assert not report.notes, "the domain may put it in"
    assert [f"({p.answer}) 0" in p.question for p in made] == [True] * 4, "label 1 is the first"
    texts = [
        f"<question>\n{body}\n</question>\n<answer>\n\\boxed{{B}}\n</answer>"
        for body in (question("iron", "copper"), question("iron", "iron"))
    ]
    with VerifierPool(load_domain(domain), workers=1) as pool:
        good, bad = pool.read_problems(texts, [False] * 2)
        assert isinstance(good, Problem) and isinstance(bad, Rejection) and bad.name == "duplicate_options"
        told = [r"\boxed{copper}", "the answer is iron", r"\boxed{A or B}", "nothing"]
        verdicts = pool.check(told, [good.answer] * 4, {"question": [good.question] * 4})
        assert verdicts == [C, W, Verdict.NO_ANSWER, Verdict.NO_ANSWER]


@pytest.mark.parametrize("name", ["code", "science", "procedural"])
def test_every_built_in_domain_verifies_its_examples(name):
    domain = load_domain(name)
    assert domain.name == name
    assert domain.verify is not None
    for problem in domain.examples:
        assert name == "code" or domain.verify(problem.answer, problem) is C  # code: see its own tests
        assert domain.validate is None or domain.validate(problem) is None


def problem(family: str, answer: str = "7", **metadata: Any) -> Problem:
    return Problem("p", "q", answer, {"family": family, "metadata": json.dumps(metadata)})


def test_families_are_graded_by_us_by_their_scorer_or_refused_by_name(monkeypatch):
    kinds = ["compared", "compared", "scorer", "refused"]
    assert [kind_of(name) for name in ("chain_sum", "sudoku", "jugs", "countdown")] == kinds
    assert procedural.verify("7", Problem("p", "q", "7", {"family": "jugs"})) is Verdict.UNSCORABLE  # no metadata
    assert procedural.validate(problem("chain_sum")) is procedural.validate(Problem("p", "q", "7")) is None
    assert procedural.validate(problem("countdown")) == "scorer_runs_text"
    assert procedural.verify("7", problem("countdown")) is Verdict.UNSCORABLE

    def score(answer: str, entry: dict[str, Any]) -> float:
        return {"good": 1.0, "half": 0.5}.get(answer, 0.0) if entry["metadata"] == {"size": 3} else -1.0

    monkeypatch.setattr(procedural, "_scorer", lambda family: {"jugs": score}[family])
    assert [procedural.verify(text, problem("jugs", "good", size=3)) for text in ("good", "half", "bad")] == [C, W, W]
    assert procedural.validate(problem("jugs", "good", size=3)) is None
    assert procedural.validate(problem("jugs", "bad", size=3)) == "gold_answer_refused"
    assert procedural.verify("8", problem("chain_sum")) is W  # not asked: our own comparison can grade it


def test_real_families():
    pytest.importorskip("reasoning_gym")
    problems, _ = load_problems("reasoning_gym:chain_sum", limit=3, seed=1, options={"min_terms": 6, "max_terms": 6})
    assert all(p.question.count("+") + p.question.count(" - ") >= 4 for p in problems)
    jugs, _ = load_problems("reasoning_gym:jugs", limit=2, seed=1)
    assert all(procedural.validate(p) is None for p in jugs) and procedural.verify("[]", jugs[0]) is W


@pytest.mark.parametrize(("question", "answer", "topic", "steps"), cases("worlds", "label"))
def test_labels(question, answer, topic, steps):
    assert WORLD.read(question) == (topic, answer)
    assert carrying_steps(question) == steps


def test_hard_problems_are_distinct_graded_right_and_fixed_by_the_seed():
    problems = WORLD.problems("hard", 300, 5)
    assert problems == worlds.get_world("tiny-rare").problems("hard", 300, 5)
    assert {p.question for p in problems} != {p.question for p in WORLD.problems("hard", 300, 6)}
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 300
    chains = [(p.extra["steps"], p.extra["carries"]) for p in problems]
    assert {chain: chains.count(chain) for chain in chains} == {(4, 4): 75, (5, 4): 75, (5, 5): 75, (6, 5): 75}
    for problem in problems:
        assert carrying_steps(problem.question) == problem.extra["carries"]
        assert WORLD.solve(problem.question) == problem.answer
    with pytest.raises(ValueError, match="ask for fewer"):
        WORLD.problems("real", 50_000, 0)


def test_shipped_model_loads_with_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(resolve_path("builtin:tiny"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000_000
    tokens = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokens.get_vocab() == pretrain.tokenizer().get_vocab()
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokens.eos_token_id, tokens.pad_token_id)
    ids = tokens("<solve> 41 a+8 b+7 <work>", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=20, do_sample=False)
    # 49 needs no carry; 49 + 7 does, and the base model's likeliest text forgets it.
    assert tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == " start=41 a=49 b=46 <ans> 49 46"
    assert next(model.parameters()).dtype == torch.float32


ADD = (CASES / "add.txt").read_text(encoding="utf-8").rstrip("\n")
ADD_TASK = "Write a Python function:\n\ndef add(a, b):\n\nReturn the sum of a and b."
ADD_TESTS = "assert add(1, 2) == 3\nassert add(0, 0) == 0\nassert add(-1, 1) == 0"
DEEP = ("[" * 900 + "]" * 900, "-" * 9000 + "1", "9" * 9000)


def answers(*values: Any) -> Outcome:
    return Outcome(End.DONE, dict(enumerate(values)))


@pytest.mark.parametrize(("test", "right", "wrong"), cases("coding", "assert"))
def test_asserts_are_taken_apart(test, right, wrong):
    tests = read_tests(test)
    assert (tests.entry, len(tests.checks)) == ("f", 1)
    assert tests.verdict(answers(right)) is Verdict.CORRECT
    assert tests.verdict(answers(wrong)) is Verdict.WRONG


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *cases("coding", "unusable"),
        ("assert f(0x" + "f" * 9000 + ") == 1", "unsafe_tests"),
        *((f"assert f(1) == {text}", "unreadable_tests") for text in DEEP),
        ("\n".join(f"assert f({i}) == {i + 1}" for i in range(MAX_TESTS + 1)), "too_many_tests"),
        ("x" * (CODE.max_answer_chars + 1), "too_many_tests"),
    ],
)
def test_tests_that_cannot_be_used_are_named(text, name):
    with pytest.raises(Unusable, match=name):
        read_tests(text)


def test_hostile_values_are_wrong_and_nothing_else():
    tests = read_tests("assert sorted(f(1)) == [1]")
    deep: Any = 0
    for _ in range(100):
        deep = [deep]
    values: tuple[Any, ...] = (deep, {"dict": [[[], 1]]}, {"set": [[1]]}, {"unheard": 1}, {})
    ends = [Outcome(End.DONE, {0: [1], 1: [1]}), Outcome(End.DONE)]
    for outcome in (*map(answers, (*values, {"tuple": 3}, [1, "a"])), *ends):
        assert tests.verdict(outcome) is Verdict.WRONG
    assert tests.verdict(Outcome(End.TIMEOUT, {0: [1]})) is Verdict.TIMEOUT
    assert tests.verdict(Outcome(End.KILLED, {0: [1]})) is Verdict.CRASHED


@pytest.mark.parametrize(("tests", "name"), cases("coding", "flaw"))
def test_tests_that_say_too_little_are_named(tests, name):
    assert flaw(read_tests(tests)) == name


@needs_one
def test_a_teacher_text_is_a_task_with_tests():
    texts = [ADD, "```python\ndef " + ADD, "Here it is:\n```python\ndef " + ADD, ADD.split("```")[0]]
    texts.append(ADD.replace("    return a + b\n", "    ...\n"))  # no solution of its own
    assert [read_problem(text) for text in texts] == [(ADD_TASK, ADD_TESTS)] * len(texts)
    typed = read_problem(ADD.replace("add(a, b):", "add(a: int, b: int = 2) -> int:"))
    assert typed[0].split("\n")[2] == "def add(a: int, b: int=2) -> int:"


BAD_TEXTS = [(ADD, " ", "no_code"), (ADD, "a story about numbers", "not_python")]
BAD_TEXTS += [("Return the sum of a and b.", *CODE.prompts.placeholders, "placeholder")]
BAD_TEXTS += [(ADD_TESTS.split("\n")[0], "assert sum([1, 2]) == 3", "unsafe_tests")]


@needs_one
@pytest.mark.parametrize(("change", "to", "name"), [*cases("coding", "teacher"), *BAD_TEXTS])
def test_a_bad_teacher_text_is_named(change, to, name):
    text = ADD.replace(change, to).replace(', "zero"', "")
    assert read_problem(text) == name


@pytest.mark.parametrize(("completion", "code"), cases("coding", "program"))
def test_the_program_is_taken_out_of_a_completion(completion, code):
    assert read_answer(completion) == code


def test_a_sandbox_that_breaks_ends_the_run_and_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox.Sandbox, "run", Mock(side_effect=SandboxError("the sandbox broke")))
    assert grade("def f(x) return", "assert f(1) == 2\nassert f(2) == 3") is Verdict.WRONG  # not run
    assert grade("def f(x):\n    return x", "no tests") is Verdict.UNSCORABLE
    with pytest.raises(VerifierError, match="the sandbox broke"):
        grade("def f(x):\n    return 7\n", "assert f(1) == 7\nassert f(2) == 8")


@needs_one
def test_the_pool_grades_in_killable_workers():
    golds = [problem.answer for problem in CODE.examples]
    columns = {"question": [problem.question for problem in CODE.examples]}
    right = [
        "```python\ndef double_odd(values):\n    return [2 * v for v in values if v % 2]\n```",
        "```python\na, b = map(int, input().split())\nprint(a * b)\n```",
    ]
    with VerifierPool(load_domain("code"), workers=1, timeout_s=20) as pool:
        assert pool.check_golds(golds, columns) == [Verdict.CORRECT] * 2
        assert pool.check(right, golds, columns) == [Verdict.CORRECT] * 2
        assert pool.check(["I do not know", right[0]], golds, columns) == [Verdict.NO_ANSWER, Verdict.WRONG]
        loop = "```python\ndef double_odd(values):\n    while True:\n        pass\n```"
        assert pool.check([loop], golds[:1], {"question": [""]}) == [Verdict.TIMEOUT]
        found = pool.read_problems([ADD, "nothing"], [False, False])
        assert (found[0].question, found[0].answer) == (ADD_TASK, ADD_TESTS)  # type: ignore[union-attr]
        assert found[1].name == "not_python"  # type: ignore[union-attr]
