"""Promotion questions for other trainers: TRL, verl, verifiers and prime-rl, plain JSONL, a Hugging Face dataset.

Needs no torch. The prompt of a row is what the run's students were asked, and `reward.py` beside the rows grades with the
verifier that the run used, so another trainer continues where the run stopped. The answers are the teacher's own and
were never checked for truth; every card says so. Left out: the rollouts themselves, which no other trainer could use.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from soar.files import Row, visible, write_atomic
from soar.problems.domain import load_domain
from soar.problems.prompts import FORMATS, PromptFormat, get_format
from soar.report.runs import Run, changed_after_run, count, number, read_run
from soar.types import VERSION, UserError

TEMPLATES = Path(__file__).parent.parent / "templates"
MAX_EXAMPLES = 3
SOURCES = ("pq", "all")


class ExportError(UserError):
    """A run folder or target folder that cannot be used for the export asked for."""


@dataclass(frozen=True)
class Task:
    """How the questions of a run are put and graded: prompt format, verifier or domain, name of the run."""

    name: str
    fmt: PromptFormat
    verifier: str
    model: str
    domain: str = ""

    @property
    def module(self) -> str:
        """The run's name as a Python module: `my run` -> `soar_my_run`."""
        return "soar_" + (re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_") or "run")

    @property
    def ability(self) -> str:
        return "math" if self.verifier in ("math", "number") and not self.domain else "reasoning"


@dataclass(frozen=True)
class Question:
    """One exported row. kind: `pq`, `accepted` or `hard`; step, dataset, reward: None for hard problems."""

    question: str
    answer: str
    kind: str
    step: int | None = None
    dataset: int | None = None
    reward: float | None = None

    def about(self) -> Row:
        return {"kind": self.kind, "step": self.step, "dataset": self.dataset, "reward": self.reward}


def task_of(run: Run) -> Task:
    """Prompt format and verifier, or domain, that the manifest records. Raises ExportError, DomainError."""
    sections = [run.config.get(key) for key in ("problems", "model")]
    problems, model = (section if isinstance(section, dict) else {} for section in sections)
    path = str(model.get("path") or "unknown")
    if reference := str(problems.get("domain") or ""):
        domain = load_domain(reference, str(problems.get("style", "tags")))
        return Task(run.name, domain.prompts, domain.label, path, domain.reference)
    form = problems.get("format")
    if form not in FORMATS:
        raise ExportError(
            f"{run.path / 'manifest.json'}: config.problems.format = {form!r}, expected one of {', '.join(FORMATS)}; "
            "export with the version that wrote the run"
        )
    return Task(run.name, get_format(form), str(problems.get("verifier", "math")), path)


def collect(run: Run, source: str = "pq", with_hard: bool = False) -> list[Question]:
    """The questions to export, in file order: promotion questions or all accepted ones, then the hard training half.

    Rows without a text question and answer are left out. Raises ExportError when nothing is left.
    """
    if source not in SOURCES:
        raise ExportError(f"--questions {source!r}: expected one of {', '.join(SOURCES)}")
    rows, kind, file = (run.pq, "pq", "pq.jsonl") if source == "pq" else (run.questions, "accepted", "questions.jsonl")
    questions = [_question(row, kind) for row in rows]
    if not any(questions):
        hint = (
            "no student was promoted, so there are none; export every accepted question with --questions all"
            if source == "pq"
            else "the run has not finished an outer step yet"
        )
        raise ExportError(f"{run.path / file}: no question to export; {hint}")
    questions += [_question(row, "hard") for row in run.hard_train] if with_hard else []
    return [question for question in questions if question is not None]


def _question(row: Row, kind: str) -> Question | None:
    """A row as a question, without lone surrogates, which no UTF-8 file can hold; None without text."""
    texts = [row.get(key) for key in ("question", "answer")]
    if not all(isinstance(text, str) for text in texts):
        return None
    question, answer = (str(text).encode("utf-8", "replace").decode() for text in texts)
    return Question(
        question, answer, kind, count(row.get("step")), count(row.get("dataset")), number(row.get("reward"))
    )


def messages(task: Task, question: str) -> list[dict[str, str]]:
    """The student prompt as a chat of one user turn."""
    return [{"role": "user", "content": task.fmt.student_text(question)}]


def solution(task: Task, answer: str) -> str:
    """The gold answer as TRL's `accuracy_reward` reads it: math-verify finds bare LaTeX only between dollar signs."""
    return f"${answer}$" if task.verifier == "math" and "$" not in answer else answer


def trl_rows(task: Task, questions: list[Question]) -> list[Row]:
    """`prompt` (a chat, or text for formats without turns), `solution`, and where the row comes from."""
    rows: list[Row] = []
    for q in questions:
        prompt: Any = messages(task, q.question) if task.fmt.turns else task.fmt.student_text(q.question)
        question = {"question": q.question} if task.domain else {}  # a domain's check may look at it
        row = {"prompt": prompt, "solution": solution(task, q.answer), "answer": q.answer, **question}
        rows.append({**row, **q.about()})
    return rows


def verl_rows(task: Task, questions: list[Question]) -> list[Row]:
    """The five fields of verl's data preparation: data_source, prompt, ability, reward_model, extra_info."""
    return [
        {
            "data_source": task.module,
            "prompt": messages(task, q.question),
            "ability": task.ability,
            "reward_model": {"style": "rule", "ground_truth": q.answer},
            "extra_info": {"index": i, "split": "train", "question": q.question, "answer": q.answer, **q.about()},
        }
        for i, q in enumerate(questions)
    ]


def plain_rows(questions: list[Question]) -> list[Row]:
    """`question`, `answer` and where the row comes from: what `soar run --problems` reads."""
    return [{"question": q.question, "answer": q.answer, **q.about()} for q in questions]


def jsonl(rows: list[Row]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def parquet(rows: list[Row]) -> bytes:
    """Rows as one parquet file. Raises ExportError when pyarrow is missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ExportError("--format verl writes parquet and needs pyarrow: pip install 'soar-rl[parquet]'") from error
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def template(name: str, task: Task) -> bytes:
    """`templates/export/NAME.in` with `@KEY@` replaced by JSON text, which is valid Python and TOML for strings."""
    text = (TEMPLATES / "export" / f"{name}.in").read_text(encoding="utf-8")
    values = {"VERIFIER": task.verifier, "STYLE": task.fmt.answer_style, "DOMAIN": task.domain}
    values |= {"MODULE": task.module, "VERSION": VERSION}
    for key, value in values.items():
        text = text.replace(f"@{key}@", json.dumps(value, ensure_ascii=False))
    return text.encode()


def files_of(form: str, task: Task, questions: list[Question]) -> dict[str, bytes]:
    """Files of an export by path, the data first. form: one of QUESTION_FORMATS."""
    if form == "trl":
        return {"train.jsonl": jsonl(trl_rows(task, questions)), "reward.py": template("reward.py", task)}
    if form == "verl":
        return {"train.parquet": parquet(verl_rows(task, questions)), "reward.py": template("reward.py", task)}
    if form == "verifiers":
        rows = [
            {"prompt": task.fmt.student_text(q.question), **row}
            for q, row in zip(questions, plain_rows(questions), strict=True)
        ]
        return {
            f"{task.module}/questions.jsonl": jsonl(rows),
            f"{task.module}/__init__.py": template("taskset_init.py", task),
            f"{task.module}/taskset.py": template("taskset.py", task),
            "pyproject.toml": template("pyproject.toml", task),
        }
    return {"data/train.jsonl" if form == "hf" else "questions.jsonl": jsonl(plain_rows(questions))}


QUESTION_FORMATS = ("trl", "verl", "verifiers", "jsonl", "hf")


def card(file: str, /, **values: Any) -> bytes:
    """A README.md from `templates/export/FILE.md.in`; filters: visible, json (JSON text)."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"visible": visible, "json": json.dumps}
    text = (TEMPLATES / "export" / f"{file}.md.in").read_text(encoding="utf-8")
    return environment.from_string(text).render(values, version=VERSION).encode()


def data_card(run: Run, task: Task, questions: list[Question], form: str, data_file: str) -> bytes:
    """README.md of an export: what the rows are, how they came about, what nobody checked, and how to use them."""
    kinds = {"pq": "promotion questions", "accepted": "accepted questions", "hard": "hard training problems"}
    counts = {name: sum(q.kind == kind for q in questions) for kind, name in kinds.items()}
    return card(
        "questions",
        form=form,
        data_file=data_file,
        task=task,
        counts=", ".join(f"{n:,} {name}" for name, n in counts.items() if n),
        different=f"{len({q.question for q in questions}):,}",
        seed=run.manifest.get("seed"),
        steps=len(run.steps),
        rows=[{"question": q.question, "answer": q.answer} for q in questions[:MAX_EXAMPLES]],
    )


def check_target(out: Path) -> None:
    """Raises ExportError when `out` is a file or a folder that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out {out}: it exists and is not an empty folder; give another one")


def export_questions(run_dir: Path, out: Path, form: str, source: str = "pq", with_hard: bool = False) -> list[Path]:
    """Write the questions of a run folder into the new folder `out`; returns the files written.

    form: one of QUESTION_FORMATS. source: `pq` or `all` accepted questions. with_hard: the hard training half too.
    Raises ReportError for no run folder, ExportError for nothing to export, a target in use or a missing library.
    """
    check_target(out)
    run = read_run(run_dir)
    task = task_of(run)
    for name in ("pq.jsonl" if source == "pq" else "questions.jsonl", *(["hard/train.jsonl"] if with_hard else [])):
        if changed_after_run(run_dir, name):
            raise ExportError(
                f"{run_dir / name} was changed after the run (hashes.json knows another sha256); restore it from a copy, "
                "then export"
            )
        damaged = [note for note in run.notes if note.startswith(f"{name}:") and "not complete" not in note]
        if damaged:
            raise ExportError(f"{run_dir}/{damaged[0]}; an export would lack that line: restore it from a copy")
    questions = collect(run, source, with_hard)
    files = files_of(form, task, questions)
    files["README.md"] = data_card(run, task, questions, form, next(iter(files)))
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in files]
