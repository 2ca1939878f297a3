"""What a run leaves for other programs: its questions for TRL and verl, or as a dataset; its policies.

The prompt of a row is what the run's students were asked, and `reward.py` beside the rows grades with the verifier that the
run used, so another trainer continues where the run stopped. The answers are the teacher's own and were never checked for
truth; every card says so. Adapters get tokenizer, card and a base path that resolves. Questions need no torch.
"""

import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soar.config import ProblemsConfig, refuse_code, resolve_path
from soar.files import Row, finite, json_bytes, read_object, storage_errors, visible, write_atomic, write_json
from soar.problems.domain import Domain, domain_of
from soar.report.runs import ReportError, Run, changed_after_run, count, mapping, number, read_run
from soar.report.text import ARM_MEANINGS, fill, held_out
from soar.types import VERSION, import_extra, shared_columns

# Of the row of a hard problem: no columns of its source, or written anew.
OURS = {"id", "question", "answer", "successes", "attempts", "truncated", "prompt", "reward_model"}
BEGUN = ".unfinished"  # a file in a folder that is being filled: what is written there, by name


def source_columns(row: Row) -> Row:
    """The columns of a hard problem's row that its source gave."""
    return {key: value for key, value in row.items() if key not in OURS}


def domain_of_run(run: Run) -> Domain:
    """How the questions of a run are put and graded, as its manifest records. Raises ReportError."""
    refuse_code(run.path, run.config)
    try:
        return domain_of(ProblemsConfig.model_validate(run.config.get("problems")))
    except ValueError as error:
        place = f"{run.path / 'manifest.json'}: config.problems"
        raise ReportError(f"{place}: {error}; export with the version that wrote the run") from error


def collect(run: Run, source: str = "pq", with_hard: bool = False) -> list[Row]:
    """The rows to export, in file order: promotion questions or (`all`) all accepted ones, then the hard training half.

    Each has question, answer, step, dataset, reward (None for hard problems). Rows without a text question and answer are
    left out; lone surrogates, which no UTF-8 file can hold, become `?`. Raises ReportError where there are no questions.
    """
    questions, hard = (
        [row for row in rows if all(isinstance(row.get(key), str) for key in ("question", "answer"))]
        for rows in (run.pq if source == "pq" else run.questions, run.hard_train if with_hard else [])
    )
    if not questions:
        why = "pq.jsonl: no student was promoted; export every accepted question with --questions all"
        why = why if source == "pq" else "questions.jsonl: no question; an outer step writes some"
        raise ReportError(f"{run.path}/{why}")
    function = ":" in str(mapping(run.config.get("problems")).get("verifier"))  # it may read any column
    told = [source_columns(row) for row in run.hard_train if function]
    rows, shared = list[Row](), shared_columns(told)
    for row in (*questions, *hard):
        more = source_columns(row) if function and "successes" in row else shared
        texts = {key: row[key].encode("utf-8", "replace").decode() for key in ("question", "answer")}
        places = {key: count(row.get(key)) for key in ("step", "dataset")}
        rows.append({**more, **texts, **places, "reward": number(row.get("reward"))})
    return rows


def solution(domain: Domain, answer: str) -> str:
    """The gold answer as TRL's `accuracy_reward` reads it: math-verify finds bare LaTeX only between dollar signs."""
    return f"${answer}$" if not domain.own and domain.verifier == "math" and "$" not in answer else answer


def _trl_row(domain: Domain, row: Row) -> Row:
    """`prompt` (a chat, or text for formats without turns), `solution`, and where the row comes from."""
    text = domain.prompts.student_text(row["question"])
    prompt: Any = [{"role": "user", "content": text}] if domain.prompts.turns else text
    looks = domain.own or ":" in domain.verifier  # which may look at it
    kept = {key: value for key, value in row.items() if key != "question" or looks}
    return {"prompt": prompt, **kept, "solution": solution(domain, row["answer"])}


def _verl_row(domain: Domain, i: int, row: Row) -> Row:
    """The five fields of verl's data preparation."""
    told = {key: value for key, value in row.items() if key != "extra_info"} | mapping(row.get("extra_info"))
    return {
        "data_source": row.get("data_source", "soar"),
        "prompt": [{"role": "user", "content": domain.prompts.student_text(row["question"])}],
        "ability": "math" if domain.verifier in ("math", "number") and not domain.own else "reasoning",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"index": i, "split": "train", **told},
    }


def _parquet(rows: list[Row]) -> bytes:
    missing = "--format verl writes parquet and needs pyarrow: pip install 'soar-rl[parquet]'"
    arrow, parquet = (import_extra(name, ReportError, missing) for name in ("pyarrow", "pyarrow.parquet"))
    sink = arrow.BufferOutputStream()
    try:
        parquet.write_table(arrow.Table.from_pylist(rows), sink)
    except (arrow.ArrowException, UnicodeError, OverflowError) as error:
        mend = "drop the column that has several kinds of values, empty objects or broken text, or export with --format trl"
        raise ReportError(f"parquet cannot hold the columns of these problems ({error}); {mend}") from error
    return bytes(sink.getvalue())


def reward_files(domain: Domain, config: Row) -> dict[str, bytes]:
    """`reward.py`, which pays as the config's students are paid, and the user's file that it needs."""
    named, own = domain.reference or domain.verifier, dict[str, bytes]()
    if (file := Path(named.rpartition(":")[0])).suffix == ".py":
        if not file.is_file():
            raise ReportError(f"the run's verifier {file} is not here ({Path.cwd()}); export from where it was begun")
        named, own = f"verifier.py:{named.rpartition(':')[2]}", {"verifier.py": file.read_bytes()}
    keys, graded = mapping(config.get("problems")), mapping(config.get("student")).get("reward") == "binary"
    text = fill("export/reward.py.in", domain=domain, named=named, keys=keys, graded=graded)
    return {"reward.py": f"{text}\n".encode(), **own}


def files_of(form: str, domain: Domain | None, rows: list[Row], config: Row) -> dict[str, bytes]:
    """Files of an export by path, the data first. form: trl, verl or, without a domain, jsonl (a dataset folder)."""
    if domain is None:
        return {"questions.jsonl": b"".join(map(json_bytes, rows))}
    if form == "verl":
        data = _parquet([_verl_row(domain, i, row) for i, row in enumerate(rows)])
        return {"train.parquet": data, **reward_files(domain, config)}
    return {"train.jsonl": b"".join(json_bytes(_trl_row(domain, row)) for row in rows), **reward_files(domain, config)}


def card(file: str, /, **values: Any) -> bytes:
    """A README.md from `templates/export/FILE.md.in`."""
    return f"{fill(f'export/{file}.md.in', **values, version=VERSION)}\n".encode()


def _left(out: Path) -> list[Path]:
    """What a killed export has left in its target. Raises ReportError where anything else is there."""
    place = Path(os.path.realpath(out))  # `new/..` is a folder that is there
    named, notes = read_object(place / BEGUN)
    parts = "|".join(map(re.escape, () if notes else (BEGUN, *named)))
    ours = re.compile(rf"{parts}|\.({parts}|{re.escape(BEGUN)})\.\d+\.tmp")  # or half of one, by `write_atomic`
    there = [*place.iterdir()] if place.is_dir() else []
    if place.exists() != place.is_dir() or not all(ours.fullmatch(path.name) for path in there):
        raise ReportError(f"--out {out}: it exists and is not an empty folder; give another one")
    return there


def _write(out: Path, files: dict[str, bytes]) -> list[Path]:
    """All files of an export, or none of them; returns where they lie. Raises Interrupted, ReportError as `_left`."""
    there = _left(out)
    try:
        with storage_errors(out, "Nothing of it is left: make room or permit writing there, or give another --out"):
            for left in (path for path in there if path.name != BEGUN):  # which says that they may go
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            write_json(out / BEGUN, {Path(name).parts[0]: len(content) for name, content in files.items()})
            for name in reversed(files):  # nothing loads the others without the first: what a kill leaves is no export
                write_atomic(out / name, files[name])
            (out / BEGUN).unlink()
    except BaseException:
        shutil.rmtree(os.path.realpath(out), ignore_errors=True)
        raise
    return [out / name for name in files]


def export_questions(run_dir: Path, out: Path, form: str, source: str = "pq", with_hard: bool = False) -> list[Path]:
    """Write the questions of a run folder into the new folder `out`; returns the files written.

    form: as for `files_of`. source: `pq` or `all` accepted questions. with_hard: the hard training half too.
    Raises ReportError for no run folder, nothing to export, a target in use or a missing library.
    """
    _left(out)  # before the work
    run = read_run(run_dir)
    domain = domain_of_run(run) if form != "jsonl" else None  # which grades nothing, so no code has to be trusted
    for name in ("pq.jsonl" if source == "pq" else "questions.jsonl", *(["hard/train.jsonl"] if with_hard else [])):
        damage = [note for note in run.notes if note.startswith(f"{name}:") and "not complete" not in note]
        if changed_after_run(run_dir, name):
            damage = [f"{name} was changed after the run (hashes.json knows another sha256)"]
        if damage:
            raise ReportError(f"{run_dir}/{damage[0]}; restore it from a copy, then export")
    recorded = mapping(run.manifest.get("hashes"))
    if domain and any(recorded.get(key, sha256) != sha256 for key, sha256 in domain.hashes.items()):
        why = "was changed since it graded the run (its manifest.json knows another sha256)"
        raise ReportError(f"{run_dir}: {domain.label} {why}; restore it, or take --format jsonl, without a reward")
    rows = collect(run, source, with_hard)
    files = files_of(form, domain, rows, run.config)
    kind = "promotion" if source == "pq" else "accepted"
    counts = f"{len(rows):,} {kind} questions{', hard training problems among them' * with_hard}"
    shown = [{key: row[key] for key in ("question", "answer")} for row in rows[:3]]
    about = {"form": form, "data_file": next(iter(files)), "counts": counts, "rows": shown}
    files["README.md"] = card("questions", run=run, domain=domain, **about)
    return _write(out, files)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ARM_OF = {"student": "ps", "teacher": ""} | {name: name for name in ARM_MEANINGS if name not in ("base", "ps")}
"""Name of a policy -> the arm that its held-out result stands under. `student` is the promoted student (PS)."""


def adapter_folder(policy: str) -> str:
    """Where the adapter of a policy lies in a run folder."""
    return policy if policy in ("student", "teacher") else f"arms/{policy}"


def _adapter_of(run_dir: Path, policy: str) -> Path:
    """Folder of a policy's adapter, as the run left it. Raises ReportError."""
    from safetensors import SafetensorError, safe_open

    if policy not in ARM_OF:
        raise ReportError(f"--policy {policy!r}: expected one of {', '.join(ARM_OF)}")
    folder, again = run_dir / adapter_folder(policy), "`soar run --out RUN --resume` writes it again"
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            why = "adapters are written after the evaluation, and an arm that did not run has none"
            advice = "finish the run with `soar run ... --resume`, or choose another --policy"
            raise ReportError(f"{folder / name} is missing: {why}; {advice}")
        if changed_after_run(run_dir, f"{adapter_folder(policy)}/{name}"):
            raise ReportError(f"{folder / name} was changed after the run (hashes.json knows another sha256); {again}")
    try:
        safe_open(folder / ADAPTER_FILES[1], framework="numpy")  # reads the header
    except SafetensorError as error:
        raise ReportError(f"{folder / ADAPTER_FILES[1]} is damaged ({error}); {again}") from error
    return folder


def base_of(run: Run) -> tuple[str, Row]:
    """Path or hub id of the base model, and the loader's options, as the run had them."""
    model = mapping(run.config.get("model"))
    refuse_code(run.path, {"model": model})
    if not isinstance(model.get("path"), str):
        raise ReportError(f"{run.path / 'manifest.json'} names no base model (config.model.path)")
    options = {key: model[key] for key in ("revision", "gguf_file") if model.get(key)}
    return resolve_path(model["path"]), {**options, "trust_remote_code": bool(model.get("trust_remote_code"))}


def export_adapter(run_dir: Path, out: Path, policy: str = "student") -> list[Path]:
    """Write a policy as a PEFT adapter folder with tokenizer and card; returns the files.

    A base model in a folder here, or in the package (`builtin:NAME`), is named by its whole path, but in no card's metadata.
    Raises Interrupted; ReportError for no run, no such policy, a target in use or a tokenizer that cannot be loaded.
    """
    from transformers import AutoTokenizer

    _left(out)  # before the work
    run = read_run(run_dir)
    adapter = _adapter_of(run_dir, policy)
    settings, notes = read_object(adapter / ADAPTER_FILES[0])
    if notes:
        raise ReportError(f"{adapter}: {notes[0]}")
    path, options = base_of(run)
    trained_on = str(settings.get("base_model_name_or_path"))  # by the whole path where it was a folder
    path = trained_on if os.path.isabs(trained_on) and (os.path.isdir(trained_on) or not os.path.isdir(path)) else path
    files = {ADAPTER_FILES[0]: json_bytes(finite({**settings, "base_model_name_or_path": path}), indent=2)}
    files[ADAPTER_FILES[1]] = (adapter / ADAPTER_FILES[1]).read_bytes()
    try:
        with TemporaryDirectory() as place:  # a tokenizer can write to no name that is not UTF-8
            AutoTokenizer.from_pretrained(path, **options).save_pretrained(place)
            parts = [file for file in sorted(Path(place).rglob("*")) if file.is_file()]
            files |= {str(file.relative_to(place)): file.read_bytes() for file in parts}
    except Exception as error:  # a damaged folder, or a hub without a network, makes transformers raise anything
        raise ReportError(f"the tokenizer of the base model {path} cannot be loaded: {error}") from error
    arm, base, arms = ARM_OF[policy], visible(str(run.config["model"]["path"])), run.arms
    shown = [arms[name] for name in dict.fromkeys(("base", "hard_only", arm)) if arm in arms and name in arms]
    meaning = ARM_MEANINGS.get(arm, "the teacher, which writes practice questions")
    given = "".join(f", {key}={value!r}" for key, value in options.items() if value)
    about = {"on_hub": not Path(path).is_dir(), "path": path, "options": given, "results": list(map(held_out, shown))}
    files["README.md"] = card("weights", run=run, policy=policy, meaning=meaning, base=base, **about)
    return _write(out, files)


def push_folder(folder: Path, repo: str, kind: str) -> str:
    """Upload an export to a Hugging Face repository, made private where there is none; returns the commit's address.

    kind: model or dataset. Raises ReportError; the folder stays.
    """
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder))
    except Exception as why:  # the hub's own errors and those of its network library are of many kinds
        raise ReportError(f"--push {repo}: {why}; the export is in {folder} (`hf auth login`, `hf upload`)") from why
