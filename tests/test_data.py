"""Problems in: every row is used or reported with its place and reason; the split and the evidence can be trusted."""

import json
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import datasets
import pyarrow
import pytest
from helpers import ROOT
from pyarrow import parquet
from tables import cases

from soar.config import ProblemsConfig
from soar.problems import load
from soar.problems.domain import Domain, domain_of
from soar.problems.load import DataError, load_problems
from soar.problems.pool import open_pool
from soar.problems.prompts import FORMATS
from soar.problems.sources import split_source
from soar.report.export import files_of
from soar.types import Problem, Screening, Verdict, columns_of

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
SUMS = ROOT / "examples" / "sums_environment.py"


def write(path: Path, rows: list[Any]) -> str:
    """A JSONL file of `rows` (texts are written as they are); its path."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def row(question: Any, answer: Any, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


def test_bad_rows_are_refused_or_skipped_and_counted(tmp_path):
    lines = [
        '\ufeff{"question": "nan", "answer": NaN}', '{"question": "inf", "answer": Infinity}', row("null", None),
        row("e", ""), row("blank", " \t"), row("zero", 0), row("float", 0.5), row("minus", "-0"), row("big", "1e400"), "",
        row("x" * 30_000, "2"), '{"question": "q2", "ans', "[1]", row("", "1"), row("Zero ", "0"), row("zero", "1"),
        row("two", ["1", "2"]), row("true", True),
    ]  # fmt: skip
    name = write(tmp_path / "a.jsonl", lines)
    problems, report = load_problems(name, skip_bad_rows=True)
    assert {p.question: p.answer for p in problems} == {"zero": "0", "float": "0.5", "minus": "-0", "big": "1e400"}
    assert [[d.where.rpartition(":")[2], d.reason] for d in report.dropped] == cases("data", "dropped")
    assert report.dropped[5].detail == "30000 characters, at most 20000"
    assert report.dropped[9].detail.endswith("a.jsonl:6")
    problems, report = load_problems(write(tmp_path / "c.jsonl", [row("a", "1", id=7), row("b", "2", id=7)]))
    assert [p.id for p in problems] == ["7", load.fingerprint("b")[:16]] and sum(report.notes.values()) == 1


@pytest.mark.parametrize(("name", "content"), cases("data", "ending"))
def test_files_of_other_endings_give_the_same_problems(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    with patch.object(Path, "open", autospec=True, side_effect=Path.open) as opened:
        problems, _ = load_problems(str(tmp_path / name))
    assert opened.call_count <= 2, "to see whether it may be read, and to read it"
    wanted = [("q1, with comma", "1"), ("two\nlines", "2"), ('"quoted"', "3")]
    assert [(p.question, p.answer) for p in problems] == wanted


@pytest.mark.parametrize(("origin", "fields", "question", "answer", "columns"), cases("data", "columns"))
def test_files_are_read_as_they_are(tmp_path, origin, fields, question, answer, columns):
    parquet.write_table(pyarrow.Table.from_pylist([fields]), tmp_path / "a.parquet")
    asked = {"question_column": "text", "answer_column": "meta.key"} if "meta" in fields else {}
    for name in (write(tmp_path / "a.jsonl", [{**fields, "level": 5}]), str(tmp_path / "a.parquet")):
        (problem,), report = load_problems(name, **asked)
        assert (problem.question, problem.answer) == (question, answer)
        chosen = columns.split(", ")
        assert f"(question = column '{chosen[0]}', answer = column '{chosen[1]}')" in report.lines()[0]
    assert load_problems(str(tmp_path / "a.jsonl"), **asked)[0][0].extra["level"] == 5


def test_what_was_done_to_values_is_in_the_report(tmp_path):
    solutions = [r"so $\boxed{\frac{1}{2}}$.", r"First \boxed{1}, hence \boxed{2}", "#### 6, no:\n#### 1,007", "9"]
    system = {"role": "system", "content": "Think."}
    lines = [{"messages": [system, {"role": "user", "content": f"q{i}"}], "answer": s} for i, s in enumerate(solutions)]
    problems, report = load_problems(write(tmp_path / "a.jsonl", lines))
    assert [p.answer for p in problems] == [r"\frac{1}{2}", "2", "1,007", "9"]
    assert report.lines()[1:] == [line for (line,) in cases("data", "done")]


@pytest.mark.parametrize("form", ["trl", "verl", "jsonl"])
@pytest.mark.parametrize("fmt", ["tags", "question_answer"])
def test_our_own_exports_are_read_back(tmp_path, form, fmt):
    rows = [{"question": q, "answer": a} for q, a in (("What is 1+1?", "2"), ("What is x?", r"\frac12"))]
    domain = None if form == "jsonl" else Domain("mine", FORMATS[fmt], "math")
    for name, content in files_of(form, domain, rows, {}).items():
        (tmp_path / name).write_bytes(content)
    problems, _ = load_problems(str(tmp_path))
    assert [(p.question, p.answer) for p in problems] == [(row["question"], row["answer"]) for row in rows]


def test_a_folder_of_files_is_one_source_and_rows_are_streamed(tmp_path):
    for kind, number in (("algebra", 2), ("geometry", 1)):  # as MATH comes
        (tmp_path / kind).mkdir()
        problem = {"problem": f"{kind}?", "level": "Level 5", "type": kind, "solution": rf"\boxed{{{number}}}"}
        (tmp_path / kind / f"{number}.json").write_text(json.dumps(problem))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "hard.jsonl.evidence.json").write_text("{}")
    problems, _ = load_problems(str(tmp_path))
    assert [(p.question, p.answer) for p in problems] == [("algebra?", "2"), ("geometry?", "1")]
    name = write(tmp_path / "a.jsonl", [*[row(f"q{i // 2}", "1") for i in range(10)], "broken"])
    problems, report = load_problems(name, limit=3)
    assert [p.question for p in problems] == ["q0", "q1", "q2"] and report.rows == 5
    table = datasets.Dataset.from_list([row(f"q{i}", f"{i}") for i in range(5)])
    splits, saved = datasets.DatasetDict(train=table, test=table.select([4, 3])), tmp_path / "saved"
    splits.save_to_disk(saved, num_shards={"train": 2, "test": 1})
    (saved / "train" / "cache-0a.arrow").write_text("what `map` leaves there")
    write(saved / "train" / "us_state.json", [row("a file of one's own", "5")])
    assert [p.answer for p in load_problems(str(saved / "train"))[0]] == list("012345")
    with pytest.raises(DataError, match="name the folder of one: test, train"):
        load_problems(str(saved))


@pytest.mark.parametrize(("source", "kind"), cases("data", "source"))
def test_kinds_of_sources(source, kind):
    assert split_source(source) == tuple(kind)


def test_a_dataset_id_comes_from_the_cache_when_the_hub_does_not_answer(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset("json", data_files=write(tmp_path / "a.jsonl", [row("q1", "#### 5"), row("q2", "6")]),
                                  split="train", cache_dir=str(tmp_path / "made"))  # fmt: skip
    cached = tmp_path / "cache" / "owner___math" / "default" / "0.0.0" / COMMIT
    shutil.copytree(Path(table.cache_files[0]["filename"]).parent, cached)
    os.rename(cached / "json-train.arrow", cached / "math-train.arrow")
    about = json.loads((cached / "dataset_info.json").read_text()) | {"builder_name": "parquet", "dataset_name": "math"}
    (cached / "dataset_info.json").write_text(json.dumps(about))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, COMMIT):
        problems, report = load_problems("owner/math", revision=revision)
        assert [p.answer for p in problems] == ["5", "6"]
        assert report.revision == COMMIT and f"  dataset revision {COMMIT}" in report.lines()
    with pytest.raises(DataError, match=f"the cache has commit {COMMIT}, not {OTHER}"):
        load_problems("owner/math", revision=OTHER)
    said = r"'owner/other', split 'train', revision 'main': .*owner/other.*download the file"
    with pytest.raises(DataError, match=said):
        load_problems("owner/other")


def test_reasoning_gym_only_generates(monkeypatch):
    class Tasks(list[dict[str, Any]]):
        def score_answer(self, *_: Any) -> float:
            raise AssertionError("its scorers execute answers")

    @dataclass
    class Settings:
        terms: int = 2
        size: int = 500
        seed: int | None = None

    def create_dataset(name: str, size: int, seed: int, terms: int = 2) -> Tasks:
        if terms > 9:
            raise AssertionError("terms must be at most 9")
        return Tasks({"question": f"{name} {seed} {terms} {i}", "answer": i, "metadata": {}} for i in range(size))

    factory = SimpleNamespace(DATASETS={"chain_sum": (Tasks, Settings)})
    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    problems, _ = load_problems("reasoning_gym:chain_sum", limit=4, seed=7, options={"terms": 3})
    assert [(p.question, p.answer) for p in problems] == [(f"chain_sum 7 3 {i}", str(i)) for i in range(4)]
    assert problems[0].extra == {"family": "chain_sum", "metadata": "{}"}
    for source, options, message in cases("data", "family"):
        with pytest.raises(DataError, match=message):
            load_problems(f"reasoning_gym:{source}", options=options)


def test_split_halves_are_stable_under_reordering_and_depend_on_the_seed():
    problems = [Problem(str(i), f"question {i}", "1") for i in range(101)]
    shuffled = problems.copy()
    random.Random(0).shuffle(shuffled)
    train, test = load.split(problems, seed=0)
    assert (train, test) == load.split(shuffled, seed=0)
    assert (len(train), len(test)) == (51, 50)
    assert sorted(p.id for p in train + test) == sorted(p.id for p in problems)
    assert load.split(problems, seed=1)[0] != train
    assert [len(part) for part in load.split(problems, seed=0, test_share=0.7)] == [30, 71]
    for share in (0.01, 0.99):
        assert sorted(map(len, load.split(problems[:2], 0, share))) == [1, 1]
    assert load.find_leaks(train, test) == []
    assert load.find_leaks(train, [Problem("x", train[0].question.upper() + " ", "4")])[0].id == "x"
    with pytest.raises(DataError, match="1 problem cannot be split"):
        load.split(problems[:1], 0)
    assert load.split([problems[5], *problems], 0) == (train, test)
    same = ["What is 1 + 1?", " what  is\n1 + 1? ", "WHAT IS 1 + 1?", "What\u200b is 1 + 1?", "Ｗhat is 1 + 1?"]
    assert len({load.fingerprint(text) for text in same}) == 1
    assert len({load.fingerprint(text) for text in ["1 + 1", "1 + 2", "1 - 1", "", "\ud800"]}) == 5
    assert load.fingerprint("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


def test_evidence_made_in_another_way_is_refused_by_key(tmp_path):
    wanted = {"model": "m", "prompt": "p", "max_tokens": 512}
    load.check_evidence({**wanted, "more": 1}, wanted, "hard.jsonl")
    with pytest.raises(DataError) as caught:
        load.check_evidence({"model": "other", "max_tokens": 512}, wanted, "hard.jsonl")
    message = str(caught.value)
    assert "hard.jsonl" in message and "model.path: screened with 'other', this run uses 'm'" in message
    assert "problems.format or domain: not recorded" in message and "max_tokens" not in message
    prompts = ({"prompt": FORMATS[name].fingerprint()} for name in ("tags", "question_answer"))
    with pytest.raises(DataError, match=r"format or domain: screened with 'tags', this run uses 'question_answer'"):
        load.check_evidence(*prompts, "hard.jsonl")
    problems = [Problem("a", "x \u2028 \ud800", "1"), Problem("b", "y", r"\frac12", {"successes": 9})]
    screenings = [Screening(0, 128, 3), Screening(1, 128)]
    evidence = {"model": "m", "attempts": 128}
    path = tmp_path / "hard" / "train.jsonl"
    load.write_hard(path, problems, screenings, evidence)
    assert load.read_hard(path) == (problems, screenings, evidence)
    assert load_problems(str(path))[0] == problems
    load.evidence_path(path).unlink()
    assert load.read_hard(path)[2] == {}


def test_a_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "verifiers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(DataError, match=r"pip install 'soar-rl\[environments\]'"):
        load_problems("verifiers:missing_package")


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


@pytest.mark.parametrize(("name", "field", "method", "hook", "message"), cases("data", "environment"))
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
