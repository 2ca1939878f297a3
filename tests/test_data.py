"""Problems in: every row is used or reported with its place and reason; the split and the evidence can be trusted."""

from __future__ import annotations

import json
import random
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from soar.problems.load import (
    DataError,
    LoadReport,
    check_evidence,
    evidence_path,
    find_leaks,
    fingerprint,
    fits_budget,
    load_problems,
    make_problems,
    read_hard,
    split,
    write_hard,
)
from soar.problems.sources import Row, file_rows, split_source
from soar.types import Problem, Screening


def write(path: Path, rows: list[Any], encoding: str = "utf-8", end: str = "\n") -> str:
    """A JSONL file of `rows` (texts are written as they are); its path."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return str(path)


def row(question: str, answer: Any, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


def test_missing_directory_and_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a directory"):
        load_problems(str(tmp_path))
    name = write(tmp_path / "a.jsonl", [row("q", "1")])

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied"):
        load_problems(name)


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        load_problems(str(tmp_path / "empty.jsonl"))
    (tmp_path / "header.csv").write_text("question,answer\n")
    with pytest.raises(DataError, match="no problem left of 0 rows"):
        load_problems(str(tmp_path / "header.csv"))
    name = write(tmp_path / "nothing.jsonl", [row("q", None), row("", "1")])
    with pytest.raises(DataError, match=r"no problem left of 2 rows; the first: .*nothing\.jsonl:1: empty answer"):
        load_problems(name)


def test_broken_line_is_refused_with_its_number_or_skipped(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [row("q1", "1"), '{"question": "q2", "ans', row("q3", "3"), "[1]"])
    with pytest.raises(DataError, match=r"a\.jsonl:2: unreadable row: not JSON .*problems.skip_bad_rows=true"):
        load_problems(name)
    problems, report = load_problems(name, skip_bad_rows=True)
    assert [p.answer for p in problems] == ["1", "3"]
    assert [d.where.rpartition(":")[2] for d in report.dropped] == ["2", "4"]
    assert "a JSON list" in report.dropped[1].detail


def test_bom_crlf_and_blank_lines_are_read(tmp_path: Path) -> None:
    name = write(
        tmp_path / "a.jsonl",
        ["\ufeff" + json.dumps(row("q1", "1")), "", json.dumps(row("q2", "2")), "  ", ""],
        end="\r\n",
    )
    problems, report = load_problems(name)
    assert [(p.question, p.answer) for p in problems] == [("q1", "1"), ("q2", "2")]
    assert report.rows == 2
    (tmp_path / "b.csv").write_bytes("\ufeffquestion,answer\r\nq1,1\r\n\r\nq2,2\r\n".encode())
    assert [p.answer for p in load_problems(str(tmp_path / "b.csv"))[0]] == ["1", "2"]


def test_other_encodings_are_named(tmp_path: Path) -> None:
    name = write(tmp_path / "latin.jsonl", [row("q", "1"), row("café", "2")], encoding="latin-1")
    with pytest.raises(DataError, match=r"latin\.jsonl:2: byte 0xe9 is not UTF-8 .*Latin-1"):
        load_problems(name)
    with pytest.raises(DataError, match="looks like UTF-16"):
        load_problems(write(tmp_path / "wide.jsonl", [row("q", "1")], encoding="utf-16"))
    with pytest.raises(DataError, match="looks like UTF-16"):
        load_problems(write(tmp_path / "be.jsonl", [row("q", "1")], encoding="utf-16-be"))
    (tmp_path / "latin.csv").write_bytes("question,answer\nq,1\ncafé,2\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_problems(str(tmp_path / "latin.csv"))
    (tmp_path / "latin.json").write_bytes('[{"question": "q",\n "answer": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.json:2: byte 0xe9"):
        load_problems(str(tmp_path / "latin.json"))


def test_answers_that_are_none_are_dropped_and_zero_is_kept(tmp_path: Path) -> None:
    lines = [
        '{"question": "nan", "answer": NaN}', '{"question": "inf", "answer": Infinity}', row("null", None),
        row("e", ""), row("blank", " \t"), row("zero", 0), row("float zero", 0.0), row("text zero", "0"),
        row("minus zero", "-0"),
        row("int", 12), row("float", 0.5), row("big", "1e400"), row("underscore", "1_000"),
    ]  # fmt: skip
    problems, report = load_problems(write(tmp_path / "a.jsonl", lines))
    expected = {"zero": "0", "float zero": "0.0", "text zero": "0", "minus zero": "-0", "int": "12", "float": "0.5"}
    expected |= {"big": "1e400", "underscore": "1_000"}
    assert {p.question: p.answer for p in problems} == expected
    assert [d.reason for d in report.dropped] == ["answer is not a finite number"] * 2 + ["empty answer"] * 3


@pytest.mark.parametrize("answer", [True, [1], {"a": 1}])
def test_answers_of_other_types_are_refused_or_skipped(tmp_path: Path, answer: Any) -> None:
    name = write(tmp_path / "a.jsonl", [row("q1", "1"), row("q2", answer)])
    with pytest.raises(DataError, match=r"a\.jsonl:2: question or answer of a wrong type: the answer is a"):
        load_problems(name)
    assert [p.question for p in load_problems(name, skip_bad_rows=True)[0]] == ["q1"]


def test_missing_column_lists_what_is_there_and_the_nearest(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"questoin": "q", "answer": "1", "level": 3}])
    with pytest.raises(DataError) as caught:
        load_problems(name)
    message = str(caught.value)
    assert "a.jsonl:1: no question column" in message and "questoin, answer, level" in message
    assert "did you mean 'questoin'?" in message and "problems.question_column" in message
    with pytest.raises(DataError, match="no answer column: looked for result, found"):
        load_problems(write(tmp_path / "b.jsonl", [row("q", "1")]), answer_column="result")
    later = write(tmp_path / "c.jsonl", [row("q", "1"), {"question": "q2"}])
    with pytest.raises(DataError, match=r"c\.jsonl:2: missing column: no 'answer' here"):
        load_problems(later)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("question", "answer"),
        ("problem", "solution"),
        ("prompt", "ground_truth"),
        ("Problem", "expected_answer"),
        ("question", "gold"),
    ],
)
def test_aliases_are_found_and_reported(tmp_path: Path, question: str, answer: str) -> None:
    problems, report = load_problems(write(tmp_path / "a.jsonl", [{question: "q", answer: "7", "level": 5}]))
    assert (problems[0].question, problems[0].answer, problems[0].extra) == ("q", "7", {"level": 5})
    assert report.columns == {"question": question, "answer": answer, "id": None}
    assert f"question = column '{question}', answer = column '{answer}'" in report.lines()[0]


def test_named_columns_win_over_aliases(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "1", "text": "t", "key": "2"}])
    problems, _ = load_problems(name, question_column="text", answer_column="key")
    assert (problems[0].question, problems[0].answer) == ("t", "2")


def test_gold_in_a_solution_is_taken_from_its_last_box(tmp_path: Path) -> None:
    lines = [
        row("one", r"We add: $\boxed{\frac{1}{2}}$."),
        row("several", r"First \boxed{1}, hence \boxed{2}"),
        row("gsm", "3 + 4 = 7 <<3+4=7>>\n#### 1,007"),
        row("plain", "9"),
    ]
    problems, report = load_problems(write(tmp_path / "a.jsonl", lines))
    assert [p.answer for p in problems] == [r"\frac{1}{2}", "2", "1,007", "9"]
    assert report.notes["answer taken from its box"] == 1
    assert report.notes["answer taken from the last of several boxes"] == 1
    assert report.notes["answer taken from behind the last ####"] == 1


def test_duplicates(tmp_path: Path) -> None:
    lines = [row("What is 1+1?", "2", id="a"), row("what is  1+1?", "2", id="b"), row("Other?", "3", id="a")]
    problems, report = load_problems(write(tmp_path / "a.jsonl", lines))
    assert [p.question for p in problems] == ["What is 1+1?", "Other?"]
    assert report.dropped[0].detail.endswith("a.jsonl:1")
    assert len({p.id for p in problems}) == 2 and problems[0].id == "a"
    assert sum(report.notes.values()) == 1
    clash = write(tmp_path / "b.jsonl", [row("q", "2"), row("Q ", "3")])
    with pytest.raises(DataError, match=r"b\.jsonl:2: same question with another answer: answer '3', but '2' at .*:1"):
        load_problems(clash)
    problems, report = load_problems(clash, skip_bad_rows=True)
    assert [p.answer for p in problems] == ["2"] and len(report.dropped) == 1


def test_leaks_between_halves_are_found() -> None:
    train = [Problem("1", "What is 2+2?", "4"), Problem("2", "x", "1")]
    test = [Problem("3", "what is 2+2? ", "4"), Problem("4", "y", "1")]
    assert [p.id for p in find_leaks(train, test)] == ["3"]


def test_too_long_questions_are_dropped_with_their_length(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [row("short", "1"), row("x" * 30_000, "2")])
    problems, report = load_problems(name)
    assert len(problems) == 1 and report.dropped[0].detail == "30000 characters, at most 20000"
    kept, dropped = fits_budget(
        [Problem("a", "q " * 10, "1"), Problem("b", "q " * 50, "1")], lambda p: len(p.question.split()), 64, 32
    )
    assert [p.id for p in kept] == ["a"]
    assert dropped[0].detail == "prompt 50 + completion 32 > context 64 tokens"


def test_special_tokens_roles_and_boxes_in_questions_are_kept(tmp_path: Path) -> None:
    texts = ["<|eot_id|> <s> what?", "User: a Assistant: \\boxed{1}", "tab\tand \u202e RTL \u200b", "emoji \U0001f600"]
    problems, _ = load_problems(write(tmp_path / "a.jsonl", [row(text, "1") for text in texts]))
    assert [p.question for p in problems] == texts


def test_chat_prompts_give_the_last_user_turn_and_media_are_refused(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "old"}, {"role": "user", "content": "q"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    problems, _ = load_problems(
        write(tmp_path / "a.jsonl", [{"prompt": chat, "answer": "1"}, {"prompt": parts, "answer": "1"}])
    )
    assert [p.question for p in problems] == ["q", "ab"]
    image = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]
    with pytest.raises(DataError, match="only text problems"):
        load_problems(write(tmp_path / "b.jsonl", [{"prompt": image, "answer": "1"}]))
    with pytest.raises(DataError, match="column 'image': only text problems"):
        load_problems(write(tmp_path / "c.jsonl", [row("q", "1", image="abc")]))


def test_json_csv_tsv_and_parquet_give_the_same_problems(tmp_path: Path) -> None:
    rows = [row("q1, with comma", "1"), row("two\nlines", "2"), row('"quoted"', "3")]
    reference = [(r["question"], r["answer"]) for r in rows]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "a.csv").write_text('question,answer\n"q1, with comma",1\n"two\nlines",2\n"""quoted""",3\n')
    (tmp_path / "a.tsv").write_text('question\tanswer\nq1, with comma\t1\n"two\nlines"\t2\n"""quoted"""\t3\n')
    names = ["a.json", "b.json", "a.csv", "a.tsv"]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in [*names, "a.parquet"]:
        assert [(p.question, p.answer) for p in load_problems(str(tmp_path / name))[0]] == reference, name
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a parquet file"):
        load_problems(str(tmp_path / "bad.parquet"))


def test_csv_errors_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n"two\nlines",1\nq2,2,3\n')
    with pytest.raises(DataError, match=r"a\.csv:4: unreadable row: another number of fields than the 2 of the header"):
        load_problems(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text('question,answer\nq1,1\n"open,2\n')
    with pytest.raises(DataError, match=r"b\.csv:\d+: not CSV"):
        load_problems(str(tmp_path / "b.csv"))


def test_json_errors(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"question": "q", "answer": "1"}\n{"question": "r", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        load_problems(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("3")
    with pytest.raises(DataError, match="a JSON int, expected a list of objects"):
        load_problems(str(tmp_path / "b.json"))
    (tmp_path / "c.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"c\.jsonl:1: unreadable row"):
        load_problems(str(tmp_path / "c.jsonl"))


def test_rows_are_streamed(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [*[row(f"q{i}", "1") for i in range(10)], "broken"])
    problems, report = load_problems(name, limit=3)
    assert [p.question for p in problems] == ["q0", "q1", "q2"] and report.rows == 3

    def endless() -> Iterator[Row]:
        number = 0
        while True:
            number += 1
            yield Row(f"x:{number}", row(f"q{number}", "1"))

    report = LoadReport("endless", "file")
    assert len(make_problems(endless(), report, {}, limit=1000)) == 1000
    assert isinstance(file_rows(name), Iterator)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("world:tiny", ("world", "tiny")), ("reasoning_gym:chain_sum", ("reasoning_gym", "chain_sum")),
        ("openai/gsm8k", ("hub", "openai/gsm8k")), ("hub:openai/gsm8k:main", ("hub", "openai/gsm8k:main")),
        ("data/x.jsonl", ("file", "data/x.jsonl")), ("./x", ("file", "./x")), ("x.parquet", ("file", "x.parquet")),
    ],
)  # fmt: skip
def test_split_source(source: str, kind: tuple[str, str]) -> None:
    assert split_source(source) == kind


@pytest.mark.parametrize(
    ("source", "message"), [("", "empty"), ("planet:tiny", "unknown kind 'planet'"), ("a/b/c", "no such file")]
)
def test_split_source_refuses(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_source(source)


def test_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"unknown ending '\.txt'; expected one of \.jsonl"):
        load_problems(str(tmp_path / "a.txt"))


def test_worlds_are_handed_in() -> None:
    made = [Problem(str(i), f"q{i}", "1") for i in range(5)]
    problems, report = load_problems("world:tiny", worlds=lambda name: made if name == "tiny" else [], limit=3)
    assert problems == made[:3] and report.kept == 3
    with pytest.raises(DataError, match="pass `worlds`"):
        load_problems("world:tiny")


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


COMMIT = "0123456789abcdef" * 2 + "01234567"


def fake_hub(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, str | None]]) -> None:
    class HfApi:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            asked.append((name, revision))
            return types.SimpleNamespace(sha=COMMIT)

    fake_module(monkeypatch, "huggingface_hub", HfApi=HfApi)


@pytest.mark.parametrize(("revision", "asks"), [(None, 1), ("v1", 1), (COMMIT, 0)])
def test_hub_rows_are_streamed_with_split_and_pinned_revision(
    monkeypatch: pytest.MonkeyPatch, revision: str | None, asks: int
) -> None:
    asked: dict[str, Any] = {}
    pinned: list[tuple[str, str | None]] = []
    fake_hub(monkeypatch, pinned)

    def load_dataset(path: str, name: str | None, **keys: Any) -> list[dict[str, Any]]:
        asked.update(keys, path=path, name=name)
        return [row("q1", "#### 5"), row("q2", "6")]

    fake_module(monkeypatch, "datasets", load_dataset=load_dataset)
    problems, report = load_problems("hub:openai/gsm8k:main", hub_split="test", revision=revision)
    assert [p.answer for p in problems] == ["5", "6"]
    assert asked == {"path": "openai/gsm8k", "name": "main", "split": "test", "revision": COMMIT, "streaming": True}
    assert pinned == [("openai/gsm8k", revision)] * asks
    assert report.revision == COMMIT and f"  dataset revision {COMMIT}" in report.lines()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'a/b' on the Hub (offline mode is enabled)"),
        FileNotFoundError("Dataset 'a/b' is a gated dataset on the Hub"),
        RuntimeError("Dataset scripts are no longer supported, but found b.py"),
        ValueError("Unknown split 'train'"),
    ],
)
def test_hub_errors_keep_the_hubs_reason(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: Any, **keys: Any) -> None:
        assert "trust_remote_code" not in keys
        raise error

    class HfApi:
        dataset_info = load_dataset

    fake_module(monkeypatch, "datasets", load_dataset=load_dataset)
    with pytest.raises(DataError) as caught:
        load_problems("a/b", revision=COMMIT)
    assert str(error) in str(caught.value) and "download the file" in str(caught.value)
    fake_module(monkeypatch, "huggingface_hub", HfApi=HfApi)
    with pytest.raises(DataError) as caught:
        load_problems("a/b")
    assert str(error) in str(caught.value) and "revision 'main'" in str(caught.value)


def test_optional_packages_are_named_when_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install soar-rl\[hub\]"):
        load_problems("a/b", revision=COMMIT)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install soar-rl\[hub\]"):
        load_problems("a/b")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"pip install 'soar-rl\[procedural\]'"):
        load_problems("reasoning_gym:chain_sum")


def test_reasoning_gym_only_generates(monkeypatch: pytest.MonkeyPatch) -> None:
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

    fake_module(monkeypatch, "reasoning_gym", create_dataset=create_dataset)
    fake_module(monkeypatch, "reasoning_gym.factory", DATASETS={"chain_sum": (Tasks, Settings)})
    problems, _ = load_problems("reasoning_gym:chain_sum", limit=4, seed=7, options={"terms": 3})
    assert [(p.question, p.answer) for p in problems] == [(f"chain_sum 7 3 {i}", str(i)) for i in range(4)]
    assert problems[0].extra == {"family": "chain_sum", "metadata": "{}"}
    for source, options, message in (
        ("chainsum", {}, "no such family; did you mean chain_sum"),
        ("chain_sum", {"depth": 1}, "has 'depth': chain_sum knows terms"),
        ("chain_sum", {"terms": 10}, "terms must be at most 9"),
    ):
        with pytest.raises(DataError, match=message):
            load_problems(f"reasoning_gym:{source}", options=options)


def test_fingerprint_is_blind_to_form_and_not_to_content() -> None:
    same = ["What is 1 + 1?", " what  is\n1 + 1? ", "WHAT IS 1 + 1?", "What\u200b is 1 + 1?", "Ｗhat is 1 + 1?"]
    assert len({fingerprint(text) for text in same}) == 1
    assert len({fingerprint(text) for text in ["1 + 1", "1 + 2", "1 - 1", "", "\ud800"]}) == 5
    assert fingerprint("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


def test_split_halves_are_stable_under_reordering_and_depend_on_the_seed() -> None:
    problems = [Problem(str(i), f"question {i}", "1") for i in range(101)]
    shuffled = problems.copy()
    random.Random(0).shuffle(shuffled)
    train, test = split(problems, seed=0)
    assert (train, test) == split(shuffled, seed=0)
    assert (len(train), len(test)) == (51, 50)
    assert sorted(p.id for p in train + test) == sorted(p.id for p in problems)
    assert split(problems, seed=1)[0] != train
    assert [len(part) for part in split(problems, seed=0, test_share=0.1)] == [91, 10]
    assert find_leaks(train, test) == []


def test_split_of_few_or_equal_problems() -> None:
    two = [Problem("a", "x", "1"), Problem("b", "y", "1")]
    assert sorted(map(len, split(two, 0, 0.01))) == [1, 1] == sorted(map(len, split(two, 0, 0.99)))
    with pytest.raises(DataError, match="1 problem cannot be split"):
        split(two[:1], 0)
    with pytest.raises(DataError, match="1 questions occur more than once"):
        split([*two, Problem("c", "X", "1")], 0)


def test_evidence_round_trip(tmp_path: Path) -> None:
    problems = [Problem("a", "x \u2028 \ud800", "1"), Problem("b", "y", r"\frac12")]
    screenings = [Screening(0, 128, 3), Screening(1, 128)]
    evidence = {"model": "m", "attempts": 128}
    path = tmp_path / "hard" / "train.jsonl"
    write_hard(path, problems, screenings, evidence)
    assert read_hard(path) == (problems, screenings, evidence)
    assert [p.name for p in path.parent.iterdir() if "partial" in p.name] == []
    assert json.loads(path.read_text().splitlines()[1])["successes"] == 1
    evidence_path(path).unlink()
    assert read_hard(path)[2] == {}
    path.write_text('{"id": "a", "question": "x", "answer": "1", "successes": 0}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1: not a screened problem \(KeyError: 'attempts'\)"):
        read_hard(path)


def test_evidence_made_in_another_way_is_refused_by_key() -> None:
    wanted = {"model": "m", "prompt": "p", "max_tokens": 512}
    check_evidence({**wanted, "more": 1}, wanted, "hard.jsonl")
    with pytest.raises(DataError) as caught:
        check_evidence({"model": "other", "max_tokens": 512}, wanted, "hard.jsonl")
    message = str(caught.value)
    assert "hard.jsonl" in message and "model: screened with 'other', this run uses 'm'" in message
    assert "prompt: not recorded" in message and "max_tokens" not in message
