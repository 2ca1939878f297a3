"""Problems: load, validate, fingerprint, split, and keep the evidence that they are hard.

Every row that is not used is reported with its place and a reason; what makes the whole source unusable is a DataError.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soar.files import write_atomic, write_json
from soar.problems.answers import extract
from soar.problems.sources import DataError, Row, file_rows, gym_rows, hub_revision, hub_rows, split_source
from soar.types import Problem, Screening

__all__ = [
    "DataError",
    "Dropped",
    "LoadReport",
    "check_evidence",
    "find_leaks",
    "fingerprint",
    "fits_budget",
    "load_problems",
    "make_problems",
    "read_answer",
    "read_hard",
    "split",
    "split_source",
    "write_hard",
]  # fmt: skip

QUESTION_COLUMNS = ("question", "problem", "prompt", "messages")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "expected_answer", "gold")
ID_COLUMNS = ("id", "unique_id", "uid", "question_id")
MEDIA_COLUMNS = ("image", "images", "audio", "video")
MAX_QUESTION_CHARS = 20_000

WorldLoader = Callable[[str], Iterable[Problem]]


@dataclass(frozen=True)
class Dropped:
    """A row that is not used: where it stands (`file:line`) and why."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.detail}" if self.detail else "")


@dataclass
class LoadReport:
    """What was read. columns: the mapping chosen (question, answer, id). notes: what was done to rows that are kept.

    revision: the commit of a hub dataset.
    """

    source: str
    kind: str
    columns: dict[str, str | None] = field(default_factory=dict)
    rows: int = 0
    kept: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    revision: str | None = None

    def lines(self, most: int = 10) -> list[str]:
        """The report as text lines, with at most `most` dropped rows listed."""
        mapping = ", ".join(f"{key} = column {name!r}" for key, name in self.columns.items() if name)
        text = [f"{self.source}: {self.kept} problems from {self.rows} rows" + (f" ({mapping})" if mapping else "")]
        text += [f"  dataset revision {self.revision}"] if self.revision else []
        text += [f"  {count} x {note}" for note, count in self.notes.most_common()]
        counts = Counter(row.reason for row in self.dropped)
        text += [f"  dropped {count}: {reason}" for reason, count in counts.most_common()]
        text += [f"    {row}" for row in self.dropped[:most]]
        return text + ([f"    ... and {len(self.dropped) - most} more"] if len(self.dropped) > most else [])


def fingerprint(question: str) -> str:
    """sha256 of the question, blind to case, whitespace, Unicode form and invisible characters."""
    text = unicodedata.normalize("NFKC", question).casefold()
    text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()


def load_problems(
    source: str,
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
    limit: int = 0,
    skip_bad_rows: bool = False,
    max_question_chars: int = MAX_QUESTION_CHARS,
    hub_split: str = "train",
    revision: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    worlds: WorldLoader | None = None,
) -> tuple[list[Problem], LoadReport]:
    """Problems of a JSONL, JSON, CSV or parquet file, a Hugging Face dataset id, or a generated source (`KIND:NAME`).

    question_column, answer_column: None picks the first known alias. limit: keep the first `limit` problems (0: all).
    skip_bad_rows: drop unreadable rows and conflicting duplicates instead of refusing the source.
    worlds: gives the problems of `world:NAME` (a world is not imported here); seed, options: of other generated sources.

    Raises DataError: unreadable source, missing column, unreadable row, equal questions with different answers, no
    problem.
    """
    kind, name = split_source(source)
    report = LoadReport(source, kind)
    if kind == "world":
        if worlds is None:
            raise DataError(f"problems.source = {source!r}: no worlds are available here; pass `worlds`")
        problems = list(worlds(name))
        problems = problems[:limit] if limit else problems
        report.rows = report.kept = len(problems)
        return problems, report
    if kind == "hub":
        report.revision = revision = hub_revision(name, revision)
    if kind in ("file", "hub"):
        rows = file_rows(name) if kind == "file" else hub_rows(name, hub_split, revision)
    else:
        rows = gym_rows(name, limit, seed, dict(options or {}))
    wanted = {"question": question_column, "answer": answer_column}
    problems = make_problems(rows, report, wanted, limit, skip_bad_rows, max_question_chars)
    return problems, report


def make_problems(
    rows: Iterable[Row],
    report: LoadReport,
    wanted: Mapping[str, str | None],
    limit: int = 0,
    skip_bad_rows: bool = False,
    max_question_chars: int = MAX_QUESTION_CHARS,
) -> list[Problem]:
    """Problems of `rows`; fills `report`. Raises DataError as `load_problems`."""
    problems: list[Problem] = []
    seen: dict[str, tuple[str, str]] = {}
    ids: set[str] = set()
    for row in rows:
        if limit and len(problems) == limit:
            break
        report.rows += 1
        if row.error is None and not report.columns:
            report.columns = choose_columns(row, wanted)
        built = _build(row, report, max_question_chars)
        if isinstance(built, Dropped):
            if built.reason in REFUSED and not skip_bad_rows:
                raise DataError(f"{built.where}: {built.reason}: {built.detail}; mend the row, or {SKIP}")
            report.dropped.append(built)
            continue
        key = fingerprint(built.question)
        if key in seen:
            report.dropped.append(_duplicate(row, built, *seen[key], skip_bad_rows))
            continue
        seen[key] = (row.where, built.answer)
        if built.id in ids:
            report.notes["id that another row has too: replaced by the fingerprint"] += 1
            built = Problem(key[:16], built.question, built.answer, built.extra)
        ids.add(built.id)
        problems.append(built)
    report.kept = len(problems)
    if not problems:
        first = f"; the first: {report.dropped[0].where}: {report.dropped[0].reason}" if report.dropped else ""
        raise DataError(f"{report.source}: no problem left of {report.rows} rows{first}")
    return problems


UNREADABLE = "unreadable row"
MISSING = "missing column"
MEDIA = "image, audio or video"
WRONG_TYPE = "question or answer of a wrong type"
REFUSED = (UNREADABLE, MISSING, WRONG_TYPE)
SKIP = "leave such rows out with --set problems.skip_bad_rows=true"


def _duplicate(row: Row, problem: Problem, where: str, answer: str, skip_bad_rows: bool) -> Dropped:
    if answer == problem.answer:
        return Dropped(row.where, "duplicate question", f"same as {where}")
    detail = f"answer {problem.answer!r}, but {answer!r} at {where}"
    if not skip_bad_rows:
        raise DataError(f"{row.where}: same question with another answer: {detail}; mend one, or {SKIP}")
    return Dropped(row.where, "same question with another answer", detail)


def choose_columns(row: Row, wanted: Mapping[str, str | None]) -> dict[str, str | None]:
    """The columns to read, from the first row. Raises DataError listing the columns found and the nearest name."""
    known = {str(name).casefold(): str(name) for name in row.fields}
    chosen: dict[str, str | None] = {}
    for kind, aliases in (("question", QUESTION_COLUMNS), ("answer", ANSWER_COLUMNS)):
        asked = wanted.get(kind)
        names = (asked,) if asked else aliases
        found = next((known[name.casefold()] for name in names if name.casefold() in known), None)
        if found is None:
            near = [match for name in names for match in difflib.get_close_matches(name.casefold(), known, n=1)]
            hint = f"; did you mean {known[near[0]]!r}?" if near else "."
            raise DataError(
                f"{row.where}: no {kind} column: looked for {', '.join(names)}, "
                f"found {', '.join(known.values()) or 'none'}{hint} Set problems.{kind}_column to the right name"
            )
        chosen[kind] = found
    chosen["id"] = next((known[name] for name in ID_COLUMNS if name in known), None)
    return chosen


def _build(row: Row, report: LoadReport, max_question_chars: int) -> Problem | Dropped:
    if row.error is not None:
        return Dropped(row.where, UNREADABLE, row.error)
    media = next((name for name in MEDIA_COLUMNS if row.fields.get(name)), None)
    if media is not None:
        raise DataError(f"{row.where}: column {media!r}: only text problems can be used; drop the column or the row")
    names = report.columns
    for name in (names["question"], names["answer"]):
        if name not in row.fields:
            return Dropped(row.where, MISSING, f"no {name!r} here, as the first row has")
    question = _read_question(row, row.fields[str(names["question"])])
    if isinstance(question, Dropped):
        return question
    answer = read_answer(row, row.fields[str(names["answer"])], report)
    if isinstance(answer, Dropped):
        return answer
    if len(question) > max_question_chars:
        return Dropped(row.where, "question too long", f"{len(question)} characters, at most {max_question_chars}")
    key = names["id"]
    identifier = row.fields.get(key) if key else None
    used = {names["question"], names["answer"], key}
    extra = {str(name): value for name, value in row.fields.items() if name not in used}
    return Problem(fingerprint(question)[:16] if identifier in (None, "") else str(identifier), question, answer, extra)


def _read_question(row: Row, value: Any) -> str | Dropped:
    if isinstance(value, list):
        value = _last_user_turn(row, value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return Dropped(row.where, "empty question")
    if not isinstance(value, str):
        return Dropped(row.where, WRONG_TYPE, f"the question is a {type(value).__name__}, expected text")
    return value.strip()


def _last_user_turn(row: Row, turns: list[Any]) -> Any:
    """Text of the last user message of a chat prompt. Raises DataError for parts that are not text."""
    users = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
    if not users:
        return turns
    content = users[-1].get("content")
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(f"{row.where}: a message with {MEDIA}: only text problems can be used; drop the row")
    return "".join(str(part.get("text", "")) for part in content)


def read_answer(row: Row, value: Any, report: LoadReport) -> str | Dropped:
    """The gold answer as text. `0` is an answer; null, blank, NaN and infinity are none. Notes go to `report`."""
    if value is None:
        return Dropped(row.where, "empty answer", "null")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        detail = f"the answer is a {type(value).__name__} ({value!r:.60}), expected text or a number"
        return Dropped(row.where, WRONG_TYPE, detail)
    if isinstance(value, float) and not math.isfinite(value):
        return Dropped(row.where, "answer is not a finite number", str(value))
    text = str(value).strip()
    if "####" in text:
        report.notes["answer taken from behind the last ####"] += 1
        text = text.rpartition("####")[2].strip()
    elif "\\boxed" in text or "\\fbox" in text:
        boxed = extract(text, "boxed")
        if boxed is not None:
            several = text.count("\\boxed") > 1
            report.notes["answer taken from the last of several boxes" if several else "answer taken from its box"] += 1
            text = boxed
    return text or Dropped(row.where, "empty answer", repr(value)[:60])


def find_leaks(train: Sequence[Problem], test: Sequence[Problem]) -> list[Problem]:
    """Problems of `test` whose question stands in `train` too, by fingerprint."""
    known = {fingerprint(problem.question) for problem in train}
    return [problem for problem in test if fingerprint(problem.question) in known]


def fits_budget(
    problems: Sequence[Problem], count_tokens: Callable[[Problem], int], context: int, max_tokens: int
) -> tuple[list[Problem], list[Dropped]]:
    """Problems whose prompt leaves `max_tokens` of `context` for the completion, and the others with their counts."""
    kept, dropped = [], []
    for problem in problems:
        tokens = count_tokens(problem)
        if tokens + max_tokens <= context:
            kept.append(problem)
        else:
            detail = f"prompt {tokens} + completion {max_tokens} > context {context} tokens"
            dropped.append(Dropped(problem.id, "prompt too long", detail))
    return kept, dropped


def split(problems: Sequence[Problem], seed: int, test_share: float = 0.5) -> tuple[list[Problem], list[Problem]]:
    """(train, test), with sizes exact up to rounding and at least one problem in each.

    Problems are ordered by a hash of (seed, fingerprint), so that the halves and their order depend on the seed and the
    questions, but not on the order of the file.
    Raises DataError for fewer than two problems, and for equal questions (they could land in both halves).
    """
    if len(problems) < 2:
        raise DataError(f"{len(problems)} problem cannot be split into a training and a test half; 2 are needed")
    keyed = {fingerprint(problem.question): problem for problem in problems}
    if len(keyed) < len(problems):
        count = len(problems) - len(keyed)
        raise DataError(f"{count} questions occur more than once; drop duplicates before the split")
    order = sorted(keyed, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    count = min(max(round(test_share * len(order)), 1), len(order) - 1)
    return [keyed[key] for key in order[count:]], [keyed[key] for key in order[:count]]


def write_hard(
    path: Path,
    problems: Sequence[Problem],
    screenings: Sequence[Screening],
    evidence: Mapping[str, Any],
    columns: bool = False,
) -> None:
    """Write the fail@K set: one JSON line for each problem, and `<path>.evidence.json` saying how it was screened.

    evidence: model, revision, prompt fingerprint, attempts, temperature, max_tokens and the like. columns: further
    columns of the source are written too, for verifiers that read them. Both files appear whole.
    """
    lines = [
        (problem.extra if columns else {})
        | {
            "id": problem.id, "question": problem.question, "answer": problem.answer, "successes": screening.successes,
            "attempts": screening.attempts, "truncated": screening.truncated,
        }
        for problem, screening in zip(problems, screenings, strict=True)
    ]  # fmt: skip
    write_atomic(path, "".join(json.dumps(line, default=str) + "\n" for line in lines).encode())
    write_json(evidence_path(path), dict(sorted(evidence.items())))


def evidence_path(path: Path) -> Path:
    """Where the evidence of the hard set `path` is kept."""
    return path.with_name(path.name + ".evidence.json")


def read_hard(path: Path) -> tuple[list[Problem], list[Screening], dict[str, Any]]:
    """(problems, screenings, evidence) of a file that `write_hard` wrote; empty evidence where its file is missing.

    Raises DataError with file and line.
    """
    problems, screenings = [], []
    for row in file_rows(str(path)):
        if row.error is not None:
            raise DataError(f"{row.where}: {row.error}")
        try:
            fields = row.fields
            problems.append(Problem(str(fields["id"]), fields["question"], fields["answer"]))
            counts = (int(fields["successes"]), int(fields["attempts"]), int(fields.get("truncated", 0)))
            screenings.append(Screening(*counts))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{row.where}: not a screened problem ({type(error).__name__}: {error})") from error
    where = evidence_path(path)
    try:
        evidence = json.loads(where.read_text(encoding="utf-8")) if where.exists() else {}
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); screen again") from error
    return problems, screenings, evidence


def check_evidence(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse evidence that was made in another way. Raises DataError naming each key of `wanted` that differs."""
    different = [
        f"{key}: screened with {found[key]!r}, this run uses {value!r}" if key in found else f"{key}: not recorded"
        for key, value in wanted.items()
        if key not in found or found[key] != value
    ]
    if different:
        lines = "\n  ".join(different)
        raise DataError(f"{where}: that these problems are hard was shown in another way:\n  {lines}\nScreen again")
