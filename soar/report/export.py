"""What a run leaves for other programs: its questions for TRL, verl, verifiers and prime-rl, or as a dataset; its policies.

The prompt of a row is what the run's students were asked, and `reward.py` beside the rows grades with the verifier that the
run used, so another trainer continues where the run stopped. The answers are the teacher's own and were never checked for
truth; every card says so. Adapters already have PEFT's format; the export adds tokenizer, card and a base path that
resolves. Questions need no torch.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from soar.config import refuse_code
from soar.engine.load import resolve_path
from soar.files import Row, read_object, visible, write_atomic, write_json
from soar.problems.domain import load_domain
from soar.problems.prompts import FORMATS, PromptFormat, get_format
from soar.report.runs import Run, changed_after_run, count, number, read_run
from soar.report.text import ARM_MEANINGS, arm_name, with_interval
from soar.types import VERSION, UserError

TEMPLATES = Path(__file__).parent.parent / "templates" / "export"
MAX_EXAMPLES = 3
KINDS = {"pq": "promotion questions", "accepted": "accepted questions", "hard": "hard training problems"}


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


def task_of(run: Run) -> Task:
    """Prompt format and verifier, or domain, that the manifest records. Raises ExportError, DomainError."""
    refuse_code(run.path, run.config)
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


def collect(run: Run, source: str = "pq", with_hard: bool = False) -> list[Row]:
    """The rows to export, in file order: promotion questions or (`all`) all accepted ones, then the hard training half.

    A row has question, answer, kind (of KINDS), step, dataset, reward; the last three are None for hard problems. Rows
    without a text question and answer are left out. Raises ExportError when nothing is left.
    """
    rows = _rows(run.pq, "pq") if source == "pq" else _rows(run.questions, "accepted")
    if not rows:
        hint = (
            "pq.jsonl: no question to export; no student was promoted, so there are none; export every accepted question "
            "with --questions all"
            if source == "pq"
            else "questions.jsonl: no question to export; the run has not finished an outer step yet"
        )
        raise ExportError(f"{run.path}/{hint}")
    return rows + (_rows(run.hard_train, "hard") if with_hard else [])


def _rows(rows: list[Row], kind: str) -> list[Row]:
    """Rows with text, without lone surrogates, which no UTF-8 file can hold."""
    numbers = {"step": count, "dataset": count, "reward": number}
    return [
        {
            **{key: row[key].encode("utf-8", "replace").decode() for key in ("question", "answer")},
            "kind": kind,
            **{key: convert(row.get(key)) for key, convert in numbers.items()},
        }
        for row in rows
        if all(isinstance(row.get(key), str) for key in ("question", "answer"))
    ]


def solution(task: Task, answer: str) -> str:
    """The gold answer as TRL's `accuracy_reward` reads it: math-verify finds bare LaTeX only between dollar signs."""
    return f"${answer}$" if task.verifier == "math" and "$" not in answer else answer


def _chat(task: Task, row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.fmt.student_text(row["question"])}]


def _trl_row(task: Task, row: Row) -> Row:
    """`prompt` (a chat, or text for formats without turns), `solution`, and where the row comes from."""
    prompt: Any = _chat(task, row) if task.fmt.turns else task.fmt.student_text(row["question"])
    kept = (
        row if task.domain else {key: value for key, value in row.items() if key != "question"}
    )  # a domain may look at it
    return {"prompt": prompt, "solution": solution(task, row["answer"]), **kept}


def _verl_row(task: Task, i: int, row: Row) -> Row:
    """The five fields of verl's data preparation."""
    return {
        "data_source": task.module,
        "prompt": _chat(task, row),
        "ability": "math" if task.verifier in ("math", "number") and not task.domain else "reasoning",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"index": i, "split": "train", **row},
    }


def _jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def _parquet(rows: list[Row]) -> bytes:
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
    text = (TEMPLATES / f"{name}.in").read_text(encoding="utf-8")
    values = {"VERIFIER": task.verifier, "STYLE": task.fmt.answer_style, "DOMAIN": task.domain}
    for key, value in {**values, "MODULE": task.module, "VERSION": VERSION}.items():
        text = text.replace(f"@{key}@", json.dumps(value, ensure_ascii=False))
    return text.encode()


def files_of(form: str, task: Task, rows: list[Row]) -> dict[str, bytes]:
    """Files of an export by path, the data first. form: trl, verl, verifiers or jsonl (a dataset folder)."""
    if form == "trl":
        return {"train.jsonl": _jsonl([_trl_row(task, r) for r in rows]), "reward.py": template("reward.py", task)}
    if form == "verl":
        data = _parquet([_verl_row(task, i, row) for i, row in enumerate(rows)])
        return {"train.parquet": data, "reward.py": template("reward.py", task)}
    if form == "verifiers":
        return {
            f"{task.module}/questions.jsonl": _jsonl(
                [{"prompt": task.fmt.student_text(row["question"]), **row} for row in rows]
            ),
            f"{task.module}/__init__.py": template("taskset_init.py", task),
            f"{task.module}/taskset.py": template("taskset.py", task),
            "pyproject.toml": template("pyproject.toml", task),
        }
    return {"questions.jsonl": _jsonl(rows)}


def _card(file: str, /, **values: Any) -> bytes:
    """A README.md from `templates/export/FILE.md.in`; filters: visible, json (JSON text)."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"visible": visible, "json": json.dumps}
    text = (TEMPLATES / f"{file}.md.in").read_text(encoding="utf-8")
    return environment.from_string(text).render(values, version=VERSION).encode()


def _check_target(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out {out}: it exists and is not an empty folder; give another one")


def export_questions(run_dir: Path, out: Path, form: str, source: str = "pq", with_hard: bool = False) -> list[Path]:
    """Write the questions of a run folder into the new folder `out`; returns the files written.

    form: as for `files_of`. source: `pq` or `all` accepted questions. with_hard: the hard training half too.
    Raises ReportError for no run folder, ExportError for nothing to export, a target in use or a missing library.
    """
    _check_target(out)
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
    rows = collect(run, source, with_hard)
    files = files_of(form, task, rows)
    counts = {what: sum(row["kind"] == kind for row in rows) for kind, what in KINDS.items()}
    files["README.md"] = _card(
        "questions",
        form=form,
        data_file=next(iter(files)),
        task=task,
        counts=", ".join(f"{n:,} {what}" for what, n in counts.items() if n),
        different=f"{len({row['question'] for row in rows}):,}",
        seed=run.manifest.get("seed"),
        steps=len(run.steps),
        rows=[{"question": row["question"], "answer": row["answer"]} for row in rows[:MAX_EXAMPLES]],
    )
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in files]


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ARM_OF = {"student": "ps", "teacher": "", **{name: name for name in ARM_MEANINGS if name not in ("base", "ps")}}
"""Name of a policy -> the arm that its held-out result stands under. `student` is the promoted student (PS)."""


def adapter_folder(policy: str) -> str:
    """Where the adapter of a policy lies in a run folder."""
    return policy if policy in ("student", "teacher") else f"arms/{policy}"


def _adapter_of(run_dir: Path, policy: str) -> tuple[Path, Row]:
    """Folder and settings of a policy's adapter, as the run left it. Raises ExportError."""
    from safetensors import SafetensorError, safe_open

    if policy not in ARM_OF:
        raise ExportError(f"--policy {policy!r}: expected one of {', '.join(ARM_OF)}")
    folder, again = run_dir / adapter_folder(policy), "`soar run --out RUN --resume` writes it again"
    for path in (folder / name for name in ADAPTER_FILES):
        if not path.is_file():
            raise ExportError(
                f"{path} is missing: adapters are written after the evaluation, and an arm that did not run has "
                "none; finish the run with `soar run ... --resume`, or choose another --policy"
            )
        if changed_after_run(run_dir, f"{adapter_folder(policy)}/{path.name}"):
            raise ExportError(f"{path} was changed after the run (hashes.json knows another sha256); {again}")
    settings, notes = read_object(folder / ADAPTER_FILES[0])
    if notes or not isinstance(settings.get("r"), int):
        raise ExportError(f"{folder / ADAPTER_FILES[0]} is damaged; {again}")
    try:
        safe_open(folder / ADAPTER_FILES[1], framework="numpy")  # reads the header
    except SafetensorError as error:
        raise ExportError(f"{folder / ADAPTER_FILES[1]} is damaged ({error}); {again}") from error
    return folder, settings


def _rank(settings: Row) -> int:
    return max([settings["r"], *map(int, (settings.get("rank_pattern") or {}).values())])


def base_of(run: Run) -> tuple[str, Row]:
    """Path or hub id of the base model, and the loader's options, as the run had them."""
    refuse_code(run.path, run.config)
    model = run.config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise ExportError(f"{run.path / 'manifest.json'} names no base model (config.model.path)")
    options = {key: model[key] for key in ("revision", "gguf_file") if model.get(key)}
    if "gguf_file" not in options:
        options["trust_remote_code"] = bool(model.get("trust_remote_code"))
    return resolve_path(model["path"]), options


def _finish(run: Run, policy: str, out: Path, rank: int | None) -> list[Path]:
    """Tokenizer and card beside exported weights; returns all files. rank: of the adapter, None for a merged model.

    A base model that is a folder of this machine is named as the run named it, and not in the card's metadata.
    """
    from transformers import AutoTokenizer

    path, options = base_of(run)
    AutoTokenizer.from_pretrained(path, **options).save_pretrained(out)
    base, arms = visible(str(run.config["model"]["path"])), run.arms
    k = min(arms[ARM_OF[policy]].pass_at) if ARM_OF[policy] in arms else 0
    shown = [arms[name] for name in dict.fromkeys(("base", "hard_only", ARM_OF[policy])) if name in arms]
    meaning = ARM_MEANINGS.get(ARM_OF[policy], "the teacher, which writes practice questions")
    card = _card(
        "weights",
        name=run.name,
        policy=policy,
        meaning=meaning[0].upper() + meaning[1:],
        merged=rank is None,
        rank=rank or 0,
        base=base,
        on_hub=not base.startswith("builtin:") and not Path(base).exists(),
        options="".join(f", {key}={value!r}" for key, value in options.items() if value),
        k=k,
        seed=run.manifest.get("seed"),
        results=[f"{arm_name(entry.name)}: {with_interval(entry, k)}" for entry in shown if k in entry.pass_at],
    )
    write_atomic(out / "README.md", card)
    return sorted(out.iterdir())


def export_adapter(run_dir: Path, out: Path, policy: str = "student") -> list[Path]:
    """Write a policy as a PEFT adapter folder with tokenizer and card; returns the files.

    An embedded base model (`builtin:NAME`) is named by its folder in the installed package. Raises ReportError for no run
    folder, ExportError for a policy that the run does not have or a target in use, OSError when the tokenizer cannot be
    loaded.
    """
    _check_target(out)
    run = read_run(run_dir)
    adapter, settings = _adapter_of(run_dir, policy)
    base, _ = base_of(run)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter / ADAPTER_FILES[1], out / ADAPTER_FILES[1])
    write_json(out / ADAPTER_FILES[0], {**settings, "base_model_name_or_path": base})
    return _finish(run, policy, out, _rank(settings))


def export_merged(run_dir: Path, out: Path, policy: str = "student") -> list[Path]:
    """Write base model and adapter as one model folder (safetensors) with tokenizer and card; returns the files.

    The product is taken in float32 and stored in the base model's own type. Raises as `export_adapter`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    _check_target(out)
    run = read_run(run_dir)
    adapter, _ = _adapter_of(run_dir, policy)
    base, options = base_of(run)
    weights: Row = {} if "gguf_file" in options else {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options, **weights)
    if "gguf_file" in options:  # plain weights once it is loaded, but it keeps the mark that forbids saving them
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    stored = model.dtype
    merged = PeftModel.from_pretrained(model.to(torch.float32), str(adapter)).merge_and_unload()
    out.mkdir(parents=True, exist_ok=True)
    merged.to(stored).save_pretrained(out)
    return _finish(run, policy, out, None)
