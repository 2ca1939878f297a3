"""Environments of the package verifiers: two of its v1 interface as problems with their rubric, and what is refused."""

import sys
from pathlib import Path

import pytest
from helpers import ROOT
from tables import cases

from soar.config import ProblemsConfig, refuse_code
from soar.problems.domain import domain_of
from soar.problems.load import DataError, load_problems
from soar.problems.pool import open_pool
from soar.types import UserError, Verdict, columns_of

SUMS = ROOT / "examples" / "sums_environment.py"


def test_a_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "verifiers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(DataError, match=r"pip install 'soar-rl\[environments\]'"):
        load_problems("verifiers:missing_package")


@pytest.mark.parametrize("config", [{"problems": {"source": "verifiers:x"}}, {"arms": {"real": "verifiers:x"}}])
def test_an_environment_in_a_folder_of_others_is_code(config):
    with pytest.raises(UserError, match="--trust-run"):
        refuse_code(Path("run"), config)


def test_rewards_of_tasks_and_of_questions_of_the_teacher():
    pytest.importorskip("verifiers.v1")
    source = f"verifiers:{SUMS}"
    keys = ProblemsConfig(source=source, options={"system": "Add."}, verify_workers=1)
    problems, report = load_problems(source, options=keys.options, limit=3)
    assert [(p.question, p.answer) for p in problems] == [(f"What is {i} + {i}?", str(2 * i)) for i in range(3)]
    assert report.columns["answer"] == "answer"
    domain = domain_of(keys)
    assert domain.prompts.student_text("1 + 1?") == "Add.\n\n1 + 1?"
    assert domain.label == f'{source}{{"system": "Add."}}'
    with open_pool(domain, keys) as pool:
        verdicts = pool.check(["so = 0", "2", "x"], ["0", "2", "4"], columns_of(problems))
        assert (verdicts, verdicts.scores) == ([Verdict.CORRECT] * 2 + [Verdict.WRONG], [1.0, 1.5, 0.5])  # type: ignore[attr-defined]
        assert pool.check(["= 7", "= 8", "7"], ["7", "7", "none"], {"question": ["3 + 4?"] * 3}) == [
            Verdict.CORRECT, Verdict.WRONG, Verdict.UNSCORABLE,
        ]  # fmt: skip
        assert pool.check_golds(["0"], {"question": [""]}) == [Verdict.CORRECT]


@pytest.mark.parametrize(("name", "field", "method", "hook", "message"), cases("environments", "refused"))
def test_what_is_no_single_turn_of_text_is_refused_by_name(tmp_path, name, field, method, hook, message):
    pytest.importorskip("verifiers.v1")
    text = SUMS.read_text().replace('level: str = "easy"', field or 'level: str = "easy"')
    text = text.replace("    @vf.reward\n", f"    {method}\n\n    @vf.reward\n", 1)
    text = text.replace("\n__all__", f"    {hook}\n\n__all__") if hook else text
    if name == "several":
        text += "class Several(vf.SingleAgentEnv): pass\n__all__ += ['Several']\n"
    text = text.replace("prompt=turns, ", "") if name == "user" else text
    file = tmp_path / f"{name}_environment.py"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_problems(f"verifiers:{file}")
