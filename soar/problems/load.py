"""Problems: load, validate, fingerprint, split, and keep the evidence that they are hard."""

import hashlib
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from soar.config import ProblemsConfig
from soar.files import finite, read_object, write_atomic, write_json
from soar.problems.answers import LEXICON, PATTERNS, extract
from soar.problems.prompts import FORMATS
from soar.problems.sources import DataError, Row, environment, file_rows, gym_rows, hub_rows, split_source, with_options
from soar.types import Problem, Screening

COLUMNS: dict[str, list[str]] = LEXICON["columns"]
MAX_QUESTION_CHARS = 20_000
SKIP = "leave such rows out with --set problems.skip_bad_rows=true"
# Config keys of what evidence records under another name
KEY_OF = {"model": "model.path", "prompt": "problems.format or domain", "verifier": "problems.verifier"}
KEY_OF |= {"model_sha256": "the model's files (sha256)", "verifier_sha256": "the verifier's file (sha256)"}
KEY_OF |= {key: f"screen.{key}" for key in ("attempts", "max_successes", "early_stop", "temperature")}
KEY_OF |= {key: f"student.sampling.{key}" for key in ("top_p", "max_tokens", "stop")}


@dataclass(eq=False)
class Dropped(Exception):
    """A row that is not used: why, and where it stands (`file:line`). refused: the whole source is, by default."""

    reason: str
    detail: str = ""
    refused: bool = False
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.reason, self.detail)))


@dataclass
class LoadReport:
    """What was read. columns: the mapping chosen. notes: what was done to rows that are kept. revision: of a hub dataset."""

    source: str
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
    source: str, seed: int = 0, origin: str = "problems.source", **settings: Any
) -> tuple[list[Problem], LoadReport]:
    """Problems of a source, and what the loader did. Raises DataError.

    source: a JSONL, JSON, CSV or parquet file, a folder of them, a Hugging Face dataset id, `reasoning_gym:NAME` or
    `verifiers:NAME`. seed: of generated problems. origin: the key that holds the source, for errors. settings: keys of
    `config.ProblemsConfig`. question_column and answer_column name a column, with dots into objects
    (`reward_model.ground_truth`), or several (`Body + Question`); None: the first known alias. limit: keep so many problems
    (0: all). Unreadable rows and conflicting duplicates refuse the source unless skip_bad_rows is set.
    """
    keys, (kind, name) = ProblemsConfig(source=source, **settings), split_source(source, origin)
    report = LoadReport(source)
    if kind == "hub":
        rows, report.revision = hub_rows(name, keys.split, keys.revision, origin)
    elif kind == "file":
        rows = file_rows(name)
    elif kind == "reasoning_gym":
        rows = gym_rows(name, keys.limit, seed, keys.options, origin)
    elif kind == "verifiers":
        rows = environment(with_options(source, keys.options)).rows(keys.limit)
    else:
        raise DataError(f"{origin} = {source!r}: a world has no rows; `domains.candidates` makes its problems")
    wanted = {"question": keys.question_column, "answer": keys.answer_column}
    problems, places, ids = dict[str, Problem](), dict[str, str](), set[str]()
    for row in rows:
        if keys.limit and len(problems) == keys.limit:
            break
        report.rows += 1
        try:
            if row.error is not None:
                raise Dropped("unreadable row", row.error, True)
            report.columns = report.columns or choose_columns(row, wanted, origin)
            problem = _build(row, report)
            key = fingerprint(problem.question)
            if key in problems and problem.answer == problems[key].answer:
                raise Dropped("duplicate question", f"same as {places[key]}")
            if key in problems:
                detail = f"answer {problem.answer!r}, but {problems[key].answer!r} at {places[key]}"
                raise Dropped("same question with another answer", detail, True)
        except Dropped as dropped:
            dropped.where = row.where
            if dropped.refused and not keys.skip_bad_rows:
                raise DataError(f"{dropped}; mend the row, or {SKIP}") from None
            report.dropped.append(dropped.with_traceback(None))
            continue
        if problem.id in ids:
            report.notes["id that another row has too: replaced by the fingerprint"] += 1
            problem = replace(problem, id=key[:16])
        ids.add(problem.id)
        problems[key], places[key] = problem, row.where
    report.kept = len(problems)
    if not problems:
        first = f"; the first: {report.dropped[0]}" if report.dropped else ""
        raise DataError(f"{source}: no problem left of {report.rows} rows{first}")
    return list(problems.values()), report


def choose_columns(row: Row, wanted: Mapping[str, str | None], origin: str) -> dict[str, str | None]:
    """The columns to read, from the first row. Raises DataError listing the columns it has."""
    chosen: dict[str, str | None] = {}
    for kind, asked in wanted.items():
        names, mend = [asked] if asked else COLUMNS[kind], f"name it: --set problems.{kind}_column=NAME"
        if origin != "problems.source":  # no key names its columns
            mend = f"rename the column, for {origin} is read by its usual names alone"
        there = find_columns(row, kind, names, mend)
        filled = (n for n in there if any(pick(row.fields, part) not in (None, "") for part in n.split(" + ")))
        chosen[kind] = next(filled, there[0])
    return {**chosen, "id": next((name for name in COLUMNS["id"] if name in row.fields), None)}


def find_columns(row: Row, kind: str, looked_for: Sequence[str], mend: str) -> list[str]:
    """Those of the names that a row has, dots into objects, ` + ` between several. Raises DataError where there is none."""
    names: dict[str, str] = {}
    for name, value in row.fields.items():
        inner = _parsed(value, "{")
        keys = (f"{name}.{key}" for key in inner) if isinstance(inner, dict) else ()
        names |= {key.casefold(): key for key in (str(name), *keys)}
    parts = [name.casefold().split(" + ") for name in looked_for]
    there = [" + ".join(names[part] for part in some) for some in parts if names.keys() >= set(some)]
    if not there:
        found = ", ".join(names.values()) or "none"
        raise DataError(f"{row.where}: no {kind} column: looked for {', '.join(looked_for)}, found {found}; {mend}")
    return there


def pick(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a column; a dot goes into an object or JSON text. Raises KeyError where it is missing."""
    if name in fields:
        return fields[name]
    column, _, key = name.partition(".")
    inner = _parsed(fields.get(column), "{")
    if not isinstance(inner, dict) or key not in inner:
        raise KeyError(name)
    return inner[key]


def _parsed(value: Any, opening: str) -> Any:
    """JSON text that begins with `opening` as what it stands for; any other value as it is."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) and value.lstrip().startswith(opening) else value
    return value


def _build(row: Row, report: LoadReport) -> Problem:
    """The problem of a row. Raises Dropped; DataError for pictures and sounds, which change what a question asks."""
    if media := next((name for name in COLUMNS["media"] if row.fields.get(name)), None):
        raise DataError(f"{row.where}: column {media!r}: only text problems can be used; drop the column or the row")
    names = report.columns
    asked = str(names["question"]).split(" + ")
    try:
        *texts, gold = [pick(row.fields, name) for name in (*asked, str(names["answer"]))]
    except KeyError as missing:
        raise Dropped("missing column", f"no {missing} here, as the first row has", True) from None
    texts = [text for text in texts if text not in (None, "")] or texts[:1]  # one of several may be empty
    question = " ".join(_read_question(row, text, report) for text in texts)
    answer = read_answer(gold, report)
    if len(question) > MAX_QUESTION_CHARS:
        raise Dropped("question too long", f"{len(question)} characters, at most {MAX_QUESTION_CHARS}")
    identifier = row.fields.get(names["id"] or "")
    used = {*asked, names["answer"], names["id"]}
    extra = {str(name): value for name, value in row.fields.items() if name not in used}
    return Problem(fingerprint(question)[:16] if identifier in (None, "") else str(identifier), question, answer, extra)


def _read_question(row: Row, value: Any, report: LoadReport) -> str:
    """The question as text, without a student prompt of FORMATS around it. Raises Dropped."""
    turns = _parsed(value, "[")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        value = _last_turn(row, turns, report)
    if not isinstance(value, str | None):
        kind = type(value).__name__
        raise Dropped("question or answer of a wrong type", f"the question is a {kind}, expected text", True)
    if value is None or not value.strip():
        raise Dropped("empty question")
    for fmt in FORMATS.values():
        before, _, after = fmt.student_template.partition("{question}")
        if len(value) > len(before + after) and value.startswith(before) and value.endswith(after):
            report.notes[f"prompt of the format {fmt.name} taken off the question"] += 1
            value = value[len(before) : len(value) - len(after)]
    return value.strip()


def _last_turn(row: Row, turns: list[Any], report: LoadReport) -> str | None:
    """The last user turn of a chat, with what was said before it in front. Raises DataError for parts that are not text."""
    said: list[tuple[str, str]] = []
    for turn in turns:
        role, content = str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value"))
        if isinstance(content, list):
            if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                raise DataError(f"{row.where}: a message with image, audio or video: only text problems can be used")
            content = "".join(str(part.get("text", "")) for part in content)
        said.append(({"human": "user", "gpt": "assistant"}.get(role, role), str(content or "")))
    while said and said[-1][0] != "user":  # the solution, in files for fine-tuning
        said.pop()
    if len(said) > 1:
        report.notes["system prompt and earlier turns put in front of the question"] += 1
    chat = any(role == "assistant" for role, _ in said)
    return "\n\n".join(f"{role.title()}: {text}" if chat and role != "system" else text for role, text in said) or None


def read_answer(value: Any, report: LoadReport) -> str:
    """The gold answer as text. `0` is an answer; null, blank, NaN and infinity are none. Raises Dropped."""
    if isinstance(value, dict) and value.keys() == {"target"}:  # Search-R1's
        report.notes["answer taken from its target"] += 1
        value = value["target"]
    items = value if isinstance(value, list) else _parsed(value, '["')
    if isinstance(items, list) and len(items) == 1:
        report.notes["answer taken out of a list of one"] += 1
        value = items[0]
    if value is None:
        raise Dropped("empty answer", "null")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        detail = f"the answer is a {type(value).__name__} ({value!r:.60}), expected text or a number"
        detail += "; a reward function can be given several answers as one JSON text" if isinstance(value, list) else ""
        raise Dropped("question or answer of a wrong type", detail, True)
    if isinstance(value, float) and not math.isfinite(value):
        raise Dropped("answer is not a finite number", str(value))
    text, note = str(value).strip(), ""
    if "####" in text:
        text, note = text.rpartition("####")[2].strip().split("\n")[0].strip(), "behind the last ####"
    elif ("\\boxed" in text or "\\fbox" in text) and (boxed := extract(text, "boxed")) is not None:
        text, note = boxed, "the last of several boxes" if text.count("\\boxed") > 1 else "its box"
    elif said := PATTERNS["answer_is"].search(text[-400:]):
        text, note = said[1].strip(), "behind `the answer is`"
    report.notes.update([f"answer taken from {note}"] if note else [])
    if not text:
        raise Dropped("empty answer", repr(value)[:60])
    return text


def find_leaks(train: Sequence[Problem], test: Sequence[Problem]) -> list[Problem]:
    """Problems of `test` whose question stands in `train` too, by fingerprint."""
    prints = {fingerprint(problem.question) for problem in train}
    return [problem for problem in test if fingerprint(problem.question) in prints]


def split(problems: Sequence[Problem], seed: int, test_share: float = 0.5) -> tuple[list[Problem], list[Problem]]:
    """(train, test), with sizes exact up to rounding and at least one in each. Raises DataError for fewer than two problems.

    Equal questions count once. Ordered by a hash of (seed, fingerprint), so that the order of the file has no say.
    """
    keyed = {fingerprint(problem.question): problem for problem in problems}
    if len(keyed) < 2:
        raise DataError(f"{len(keyed)} problem cannot be split into a training and a test half; 2 are needed")
    order = sorted(keyed, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    count = min(max(round(test_share * len(order)), 1), len(order) - 1)
    return [keyed[key] for key in order[count:]], [keyed[key] for key in order[:count]]


def write_hard(
    path: Path, problems: Sequence[Problem], screenings: Sequence[Screening], evidence: Mapping[str, Any]
) -> None:
    """Write the fail@K set, a JSON line a problem with all columns of its source, and the evidence beside it; both whole."""
    lines = ""
    for problem, screening in zip(problems, screenings, strict=True):
        fields = {"id": problem.id, "question": problem.question, "answer": problem.answer, **asdict(screening)}
        lines += json.dumps({**finite(problem.extra), **fields}, default=str) + "\n"
    write_atomic(path, lines.encode())
    write_json(evidence_path(path), dict(sorted(evidence.items())))


def evidence_path(path: Path) -> Path:
    """Where the evidence of the hard set `path` is kept."""
    return path.parent / f"{path.name}.evidence.json"


def hard_file(source: str) -> Path | None:
    """The file of a source that is a hard set, with its evidence beside it; else None."""
    path = Path(os.path.expanduser(source))
    return path if path.is_file() and evidence_path(path).is_file() else None


def read_hard(path: Path) -> tuple[list[Problem], list[Screening], dict[str, Any]]:
    """(problems, screenings, evidence or {} where there is none) that `write_hard` wrote. Raises DataError with the line."""
    problems, screenings, where = [], [], evidence_path(path)
    for row in file_rows(str(path)):
        if row.error is not None:
            raise DataError(f"{row.where}: {row.error}")
        try:
            problems.append(Problem(str(row.fields["id"]), row.fields["question"], row.fields["answer"]))
            if not isinstance(row.fields["question"], str) or not isinstance(row.fields["answer"], str):
                raise TypeError("question or answer is no text")
            counts = (row.fields["successes"], row.fields["attempts"], row.fields.get("truncated", 0))
            screenings.append(Screening(*map(int, counts)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            found = f"not a screened problem ({type(error).__name__}: {error})"
            raise DataError(f"{row.where}: {found}; screen again, or move {where.name} away") from error
    evidence, notes = read_object(where)
    if notes and where.exists():
        raise DataError(f"{where.parent}/{notes[0]}; screen again")
    return problems, screenings, evidence


def check_evidence(recorded: Mapping[str, Any], wanted: Mapping[str, Any], where: str, advice: str = "") -> None:
    """Refuse evidence made in another way. Raises DataError naming each key of `wanted` that differs, with advice on it."""
    lines, formats = "", {form.fingerprint(): name for name, form in FORMATS.items()}
    for key, value in wanted.items():
        if key not in recorded:
            lines += f"\n  {KEY_OF.get(key, key)}: not recorded"
        elif recorded[key] != value:
            was, now = (formats.get(str(given), given) for given in (recorded[key], value))
            lines += f"\n  {KEY_OF.get(key, key)}: screened with {was!r}, this run uses {now!r}"
    if lines:
        raise DataError(f"{where}: that these problems are hard was shown in another way:{lines}\nScreen again{advice}")
