"""Grade a file of completions against its gold answers, or every gold answer against itself. Streams; needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from soar.problems.answers import extract
from soar.problems.grading import DomainPool
from soar.problems.load import QUESTION_COLUMNS, DataError, Dropped, LoadReport, read_answer
from soar.problems.sources import Row, file_rows
from soar.problems.verify import NAMES, VerifierPool
from soar.types import Verdict

COMPLETION_COLUMNS = ("completion", "response", "output", "generation", "prediction", "answer")
GOLD_COLUMNS = ("gold", "ground_truth", "expected_answer", "target", "answer", "solution")
BARE_COLUMN = "answer"  # holds an answer, not a text with an answer in it
BLOCK = 2_000
SHOWN = 200  # characters of an answer that are kept for the listing


@dataclass(frozen=True)
class Graded:
    """One row that is listed. where: `file:line`. answer: what the completion commits to. label: the file's own verdict."""

    where: str
    verdict: Verdict
    answer: str | None
    gold: str
    label: bool | None = None

    def __str__(self) -> str:
        own = "" if self.label is None else f" (labelled {'correct' if self.label else 'wrong'})"
        return f"{self.where}: {self.verdict.value}{own}: {self.answer!r} against {self.gold!r}"


@dataclass
class Grades:
    """counts: rows per verdict. listed: the first rows that are not correct, or that the label column judges otherwise.

    agree: rows where verdict and label agree, None without a label column. columns: what was read.
    """

    columns: dict[str, str]
    counts: Counter[Verdict] = field(default_factory=Counter)
    listed: list[Graded] = field(default_factory=list)
    agree: int | None = None

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    def as_json(self) -> dict[str, Any]:
        """JSON-ready: counts and shares by verdict, agreement, and the listed rows."""
        counts = {verdict.value: self.counts[verdict] for verdict in Verdict}
        shares = {name: count / self.rows for name, count in counts.items()}
        rows = [
            {"where": r.where, "verdict": r.verdict.value, "answer": r.answer, "gold": r.gold, "label": r.label}
            for r in self.listed
        ]
        return {
            "columns": self.columns, "rows": self.rows, "counts": counts, "shares": shares, "agree": self.agree,
            "listed": rows,
        }  # fmt: skip


def choose_columns(row: Row, asked: dict[str, str | None], golds: bool) -> dict[str, str]:
    """The columns `completion` (unless golds) and `gold`, and `label` when asked for, by the first row.

    `answer` is the completion only when there is another gold column. Raises DataError listing the columns found.
    """
    known = {name.casefold(): name for name in map(str, row.fields)}
    chosen: dict[str, str] = {}
    wanted = (("gold", GOLD_COLUMNS),) if golds else (("completion", COMPLETION_COLUMNS), ("gold", GOLD_COLUMNS))
    for kind, aliases in (*wanted, *((("label", ()),) if asked.get("label") else ())):
        own = asked.get(kind)
        names = [own] if own else [name for name in aliases if known.get(name) not in chosen.values()]
        found = next((known[name.casefold()] for name in names if name.casefold() in known), None)
        if found is None:
            raise DataError(
                f"{row.where}: no {kind} column: looked for {', '.join(names)}, found {', '.join(known.values()) or 'none'}; "
                f"name it with --{kind}-column"
            )
        chosen[kind] = found
    return chosen


def _text(value: Any) -> str:
    """A completion as text; of chat messages the last one's."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return "" if value is None else value if isinstance(value, str) else str(value)


def grade_file(
    source: str, pool: VerifierPool, asked: dict[str, str | None], golds: bool = False, most: int = 10
) -> Grades:
    """Grade every row of a JSONL, JSON, CSV or parquet file.

    asked: names of the columns `completion`, `gold` and `label`, None for the known ones. golds: every gold answer
    against itself. most: rows listed. Raises DataError with file and line, VerifierError.
    """
    rows = file_rows(source)
    grades: Grades | None = None
    report = LoadReport(source, "file")
    while block := list(islice(rows, BLOCK)):
        for row in block:
            if row.error is not None:
                raise DataError(f"{row.where}: {row.error}; mend or remove the line")
        grades = grades or Grades(choose_columns(block[0], asked, golds), agree=0 if asked.get("label") else None)
        for graded in _grade(block, pool, grades.columns, report):
            grades.counts[graded.verdict] += 1
            differs = not graded.verdict.solved if graded.label is None else graded.label != graded.verdict.solved
            if graded.label is not None and grades.agree is not None:
                grades.agree += not differs
            if differs and len(grades.listed) < most:
                grades.listed.append(graded)
    if grades is None:
        raise DataError(f"{source}: no rows")
    return grades


def _grade(block: Sequence[Row], pool: VerifierPool, columns: dict[str, str], report: LoadReport) -> Iterator[Graded]:
    answers = [_gold(row, columns["gold"], report) for row in block]
    if "completion" not in columns:
        verdicts = pool.check_golds(answers, _further(block, columns, pool))
        found: list[str | None] = list(answers)
    else:
        texts = [_text(_field(row, columns["completion"])) for row in block]
        bare = columns["completion"].casefold() == BARE_COLUMN
        further = _further(block, columns, pool)
        if isinstance(pool, DomainPool):
            found = [text or None for text in texts] if bare else pool.read_answers(texts)
            verdicts = pool.check_answers(found, answers, further)
        else:
            found = [text or None if bare else extract(text, pool.answer_style) for text in texts]
            verdicts = pool.check_answers(found, answers) if pool.name in NAMES else pool.check(texts, answers, further)
    for row, verdict, answer, gold in zip(block, verdicts, found, answers, strict=True):
        shown = None if answer is None else answer[:SHOWN]
        yield Graded(row.where, verdict, shown, gold[:SHOWN], _label(row, columns.get("label")))


def _further(block: Sequence[Row], columns: dict[str, str], pool: VerifierPool) -> dict[str, list[Any]]:
    """The other columns of the file, for a function or a domain; `question` under whatever usual name it has."""
    names = {name for row in block for name in row.fields} - set(columns.values()) - {"answer", "completions"}
    further = {name: [row.fields.get(name) for row in block] for name in names}
    question = next((name for name in QUESTION_COLUMNS if name in further), None)
    if isinstance(pool, DomainPool) and question is not None:
        further["question"] = further[question]
    return further


def _field(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise DataError(f"{row.where}: no {name!r} here, as the first row has; mend or remove the line")
    return row.fields[name]


def _gold(row: Row, name: str, report: LoadReport) -> str:
    answer = read_answer(row, _field(row, name), report)
    if isinstance(answer, Dropped):
        raise DataError(f"{answer}; mend or remove the line")
    return answer


def _label(row: Row, name: str | None) -> bool | None:
    """Whether the file itself calls a row correct: true, or a number of 1 or more."""
    if name is None:
        return None
    value = _field(row, name)
    text = str(value).strip().casefold()
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text) >= 1
    except ValueError:
        raise DataError(f"{row.where}: label {value!r:.60}, expected true, false or a number") from None


def table_lines(grades: Grades, golds: bool) -> list[str]:
    """Counts, shares and the listed rows as text lines; answers are escaped."""
    mapping = ", ".join(f"{kind} = column {name!r}" for kind, name in grades.columns.items())
    lines = [f"{grades.rows:,} rows ({mapping})", ""]
    for verdict in Verdict:
        count = grades.counts[verdict]
        if count or verdict in (Verdict.CORRECT, Verdict.WRONG):
            lines.append(f"  {verdict.value:12s} {count:9,d}  {count / grades.rows:7.2%}")
    title = "gold answers that do not grade as correct" if golds else "not correct"
    if grades.agree is not None:
        lines += ["", f"label and verdict agree on {grades.agree:,} rows ({grades.agree / grades.rows:.2%})"]
        title = "where they differ"
    if grades.listed:
        lines += ["", f"{title}, the first {len(grades.listed)}:", *(f"  {row}" for row in grades.listed)]
    return lines
