"""Grade a file of completions against its gold answers, or every gold answer against itself. Streams; needs no torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from soar.problems.load import COLUMNS, DataError, Dropped, LoadReport, find_columns, pick, read_answer
from soar.problems.pool import VerifierPool
from soar.problems.sources import Row, file_rows
from soar.problems.verify import COMPARERS, gold_kind
from soar.types import Verdict

BLOCK = 2_000
SHOWN = 200  # characters of an answer that are kept for the listing, of a whole completion its last


@dataclass
class Grades:
    """columns: what was read. counts: rows per verdict. agree: rows where verdict and label agree, None without labels.
    listed: the first rows that are not correct, or that the label judges otherwise. texts: gold answers comparable only as
    text, where these are checked against themselves.
    """

    columns: dict[str, str]
    counts: Counter[Verdict] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)
    agree: int | None = None
    texts: Counter[str] = field(default_factory=Counter)


Single = tuple[str, str, str, bool | None, dict[str, Any]]
"""One completion of a row: `file:line`, its text, the gold answer, the file's own verdict, and the columns of the row."""


def grade_file(
    source: str, pool: VerifierPool, asked: dict[str, str | None], golds: bool = False, most: int = 10
) -> Grades:
    """Grade every row of a JSONL, JSON, CSV or parquet file. asked: names of the columns `completion`, `gold`, `label`,
    None for the usual. golds: each against itself. most: rows listed. Raises DataError with file and line, VerifierError.
    """
    rows, grades, report = file_rows(source), None, LoadReport(source)
    while block := list(islice(rows, BLOCK)):
        grades = grades or Grades(_columns(block[0], asked, golds), agree=0 if asked.get("label") else None)
        singles = [single for row in block for single in _singles(row, grades.columns, report)]
        verdicts = zip(singles, *_check(singles, pool, grades.columns), strict=True)
        for (where, _, gold, label, _), answer, verdict in verdicts:
            grades.counts[verdict] += 1
            if golds and pool.name in COMPARERS and gold_kind(gold, pool.name) == "text":
                grades.texts[gold] += 1
            same = verdict.solved == (label is None or label)
            grades.agree = None if grades.agree is None else grades.agree + same
            if not same and len(grades.listed) < most:
                texts = {"answer": answer and answer[-SHOWN:], "gold": gold[:SHOWN]}
                grades.listed.append({"where": where, "verdict": verdict, **texts, "label": label})
    if grades is None:
        raise DataError(f"{source}: no rows")
    return grades


def _columns(row: Row, asked: dict[str, str | None], golds: bool) -> dict[str, str]:
    """The columns by the first row; `answer` is the completion only when there is another gold column. Raises DataError."""
    chosen: dict[str, str] = {}
    for kind in ("completion", "gold", "label"):
        given, usual = asked.get(kind), COLUMNS.get(kind, [])
        if row.error is not None or (kind == "completion" and golds) or (kind == "label" and not given):
            continue
        names = [given] if given else [name for name in usual if name not in map(str.casefold, chosen.values())]
        chosen[kind] = find_columns(row, kind, names, f"name it with --{kind}-column")[0]
    return chosen


def _singles(row: Row, columns: dict[str, str], report: LoadReport) -> Iterator[Single]:
    """A row, or one for each of its generations; a list of labels is shared out with them. Raises DataError."""
    try:
        if row.error is not None:
            raise Dropped(row.error)
        values = {kind: pick(row.fields, name) for kind, name in columns.items()}
        gold, given, label = read_answer(values["gold"], report), values.get("completion"), values.get("label")
        texts = given if isinstance(given, list) and all(isinstance(text, str) for text in given) else [given]
        if not texts:
            raise Dropped(f"{columns['completion']!r} is an empty list, expected a text or a list of texts")
        several = texts is given
        labels = label if several and isinstance(label, list) and len(label) == len(texts) else [label] * len(texts)
        for i, (text, mark) in enumerate(zip(texts, labels, strict=True), start=1):
            if isinstance(text, list) and text and isinstance(text[-1], dict):  # chat messages
                text = text[-1].get("content")
            text = "" if text is None else str(text)  # 0 is an answer
            judged = _label(mark) if "label" in columns else None
            yield f"{row.where}[{i}]" if several else row.where, text, gold, judged, row.fields
    except KeyError as missing:
        raise DataError(f"{row.where}: no {missing} here, as the first row has; mend or remove the line") from None
    except Dropped as dropped:
        raise DataError(f"{row.where}: {dropped}; mend or remove the line") from None


def _label(value: Any) -> bool:
    """Whether the file itself calls a row correct: true, or a number of 1 or more."""
    try:
        return float({"true": "1", "false": "0"}.get(text := str(value).strip().casefold(), text)) >= 1
    except ValueError:
        raise Dropped(f"label {value!r:.60}, expected true, false or a number") from None


def _check(
    singles: Sequence[Single], pool: VerifierPool, columns: dict[str, str]
) -> tuple[Sequence[str | None], Sequence[Verdict]]:
    """What every completion commits to, and the verdict on it."""
    # The other columns of the file, for a function or a domain; `question` under whatever usual name it has.
    names = {name for *_, row in singles for name in row} - set(columns.values()) - {"answer", "completions"}
    further = {name: [row.get(name) for *_, row in singles] for name in names}
    if question := next((name for name in COLUMNS["question"] if name in further), None):
        further["question"] = further[question]
    texts, golds = [single[1] for single in singles], [single[2] for single in singles]
    if "completion" not in columns:
        return golds, pool.check_golds(golds, further)
    bare = columns["completion"].casefold() == "answer"  # an answer, not a text with an answer in it
    answers = [text or None for text in texts] if bare else pool.read_answers(texts)
    if pool.compares:
        return answers, pool.check_answers(answers, golds, further)
    return texts, pool.check(texts, golds, further)  # a function of the user's gets whole completions
