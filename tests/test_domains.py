"""Any causal language model folder and any problem file through the command line; domains: the one in docs/domains.md, taken
out of the page; hostile and broken ones."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import BOS, ROOT, tiny_model, tiny_tokenizer
from loop_helpers import events, read_jsonl, sets, tiny_config, write_problems
from run_folders import write_jsonl
from tables import cases
from tokenizers import processors

from soar.cli import main
from soar.loop.arms import oracle
from soar.problems.domain import Domain, DomainError, load_domain
from soar.problems.pool import VerifierPool
from soar.problems.prompts import FORMATS
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


def soar_run(out: Path, **changes: Any) -> int:
    """A run with a model and problems beside its folder. Columns under other names than ours: the loader finds them."""
    rows = [{"problem": f"What is {i} and {i} and 5 ?", "solution": f"think\n#### {2 * i + 5}"} for i in range(8)]
    model, problems = save_model(out.with_name("model")), write_jsonl(out.with_name("sums.jsonl"), rows)
    words = ["run", "--model", str(model), "--problems", str(problems), "--out", str(out), "--quiet"]
    return main([*words, *small_sets(changes)])


def test_a_random_model_runs_to_the_end(tmp_path, capsys):
    out = tmp_path / "run"
    assert soar_run(out) == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["outer_steps"], summary["promotions"]) == (2, 2)
    assert list(summary["arms"]) == ["base", "hard_only", "ps", "pq"]
    assert all(set(row["answer"]) & set("358") for row in read_jsonl(out / "questions.jsonl"))
    assert [row["failed_students"] for row in events(out, "outer_step")] == [0, 0]
    for row in read_jsonl(out / "pq.jsonl"):
        assert set(row) == {"step", "dataset", "question", "answer", "reward"} and row["question"]
    hard = read_jsonl(out / "hard" / "train.jsonl") + read_jsonl(out / "hard" / "test.jsonl")
    assert sorted(int(row["answer"]) for row in hard) == [2 * i + 5 for i in range(8)]
    printed = capsys.readouterr().out
    assert "promotions: 2 in 2 outer steps" in printed and "pass@2" in printed


@pytest.mark.parametrize(("changes", "message"), cases("domains", "refused"))
def test_what_does_not_fit_the_model_is_refused_by_key(tmp_path, capsys, changes, message):
    assert soar_run(tmp_path / "run", **changes) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


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
    changed = tmp_path / "changed.py"
    changed.write_text(roman.read_text(encoding="utf-8") + "\n# another text\n", encoding="utf-8")
    keys += sets(f"problems.domain={json.dumps(f'{changed}:ROMAN')}")
    assert main(["run", "small-1gpu", "--model", str(model), *keys, "--out", str(tmp_path / "other"), "--quiet"]) == 1
    assert "domain: screened with" in capsys.readouterr().err


HOSTILE = (ROOT / "tests" / "cases" / "hostile_domain.txt").read_text(encoding="utf-8")


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


@pytest.mark.parametrize(("reference", "message"), cases("domains", "reference"))
def test_what_is_no_domain_is_refused(hostile, reference, message):
    (hostile.parent / "broken.py").write_text("1 / 0\n")
    with pytest.raises(DomainError, match=re.escape(message)):
        load_domain(str(hostile.parent / reference) if ":" in reference else reference)


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
