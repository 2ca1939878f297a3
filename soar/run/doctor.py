"""The doctor: does everything that a run folder says follow from its raw lines? Needs no torch.

Each check names what it looked at and everything it found wrong. Numbers are recomputed by the functions that made them,
from lines that nothing else in the folder was computed from: attempts per problem, questions, rewards. Left out, because
the folder does not hold what they were made from: rewards of datasets (verdicts of single attempts are kept as a hash
only), means over students, and times.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from soar import seeds
from soar.config import Config, ConfigError, build
from soar.files import sha256_of
from soar.loop.evaluate import summarize
from soar.report.page import render
from soar.report.questions import step_vendi
from soar.report.runs import PAUSE_FILE, REVIEW_FILE, ReportError, Row, read_jsonl, read_object, read_run, summary_of
from soar.run import ledger
from soar.run.alarms import KINDS, screen_alarms, step_alarms
from soar.run.checks import Check, guarded, unequal
from soar.run.screen import screen_event
from soar.types import Screening


@dataclass(frozen=True)
class Patient:
    """The raw content of a run folder."""

    path: Path
    config: Config
    rows: list[Row]
    questions: list[Row]
    pq: list[Row]
    ledger: list[Row]
    hard_train: list[Row]
    hard_test: list[Row]
    summary: Row

    def of(self, kind: str) -> list[Row]:
        """The events of one kind."""
        return [row for row in self.rows if row.get("event") == kind]


def examine(folder: Path) -> list[Check]:
    """Every check of a run folder. Raises ReportError when the folder holds no run."""
    if not (folder / "manifest.json").is_file():
        raise ReportError(f"{folder}: no run folder: it has no manifest.json; give the folder that `soar run` wrote")
    patient, complaints = _read(folder)
    checks = [Check("every file can be read, every line is whole", complaints)]
    if patient is None:
        return checks
    for what, look in (
        ("hashes of the files", _hashes),
        ("checksums of the checkpoints", _checkpoints),
        ("completeness", _completeness),
        ("screening and the hard set", _screening),
        ("outer steps and their questions", _steps),
        ("alarms from the steps", _alarms),
        ("promotions and promotion questions", _promotions),
        ("ledger of promotions", _ledger),
        ("pass@k and intervals from the attempts", _evaluations),
        ("summary.json from metrics.jsonl", _summary),
        ("workers and what they lost", _workers),
        ("report.html from the files", _report),
    ):
        checks.append(guarded(what, partial(look, patient)))
    return checks


def _read(folder: Path) -> tuple[Patient | None, list[str]]:
    manifest, notes = read_object(folder / "manifest.json")
    lists: dict[str, list[Row]] = {}
    for name in (
        "metrics.jsonl", "questions.jsonl", "pq.jsonl", "ledger.jsonl", "hard/train.jsonl", "hard/test.jsonl",
    ):  # fmt: skip
        lists[name], more = read_jsonl(folder / name, name) if os.path.lexists(folder / name) else ([], [])
        notes += more
    summary: Row = {}
    if os.path.lexists(folder / "summary.json"):
        summary, more = read_object(folder / "summary.json")
        notes += more
    for name in (REVIEW_FILE, PAUSE_FILE):
        notes += read_object(folder / name)[1] if os.path.lexists(folder / name) else []
    try:
        config = build(manifest.get("config", {}), f"{folder}/manifest.json")
    except ConfigError as error:
        return None, [*notes, str(error)]
    metrics, questions, pq, entries, train, test = lists.values()
    return Patient(folder, config, metrics, questions, pq, entries, train, test, summary), notes


def _hashes(patient: Patient) -> Check:
    path = patient.path / "hashes.json"
    if not path.is_file():
        return Check("", [], "none yet: they are written when the run is finished")
    known, complaints = read_object(path)
    for name, digest in known.items():
        if not (patient.path / name).is_file():
            complaints.append(f"{name} is missing")
        elif sha256_of(patient.path / name) != digest:
            complaints.append(f"{name} was changed after the run: its sha256 is not that in hashes.json")
    return Check("", complaints, f"{len(known)} files")


def _checkpoints(patient: Patient) -> Check:
    state = patient.path / "state"
    if not (state / "latest.json").is_file():
        return Check("", [], "no checkpoint yet")
    latest, complaints = read_object(state / "latest.json")
    number = int(latest["number"])
    for folder in sorted(path for path in state.iterdir() if path.is_dir() and path.name.isdecimal()):
        own, notes = read_object(folder / "checksums.json")
        known = latest["sha256"] if int(folder.name) == number else own
        complaints += notes
        for name, digest in known.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != digest:
                complaints.append(f"{folder.name}/{name} is damaged: its checksum is not the recorded one")
    document, notes = read_object(state / f"{number:06d}" / "state.json")
    complaints += notes
    for name, size in document.get("sizes", {}).items():
        found = (patient.path / name).stat().st_size if (patient.path / name).is_file() else 0
        if found < size:
            complaints.append(f"{name} has {found} bytes, but had {size} at the last checkpoint: lines are lost")
    return Check("", complaints, f"stage {document.get('stage')}")


def _completeness(patient: Patient) -> Check:
    if not patient.summary:
        return Check("", [], "the run is not finished, so nothing can be missing yet")
    arms = patient.of("evaluation")
    trained = [f"arms/{row['arm']}" for row in arms if row["arm"] not in ("base", "ps")]
    wanted = [
        "hard/train.jsonl", "hard/test.jsonl", "metrics.jsonl", "report.html",
        *(["questions.jsonl"] if patient.of("outer_step") else []), *(["pq.jsonl"] if patient.of("promotion") else []),
        *(f"{name}/{file}" for name in ("teacher", "student", *trained)
          for file in ("adapter_model.safetensors", "adapter_config.json")),
    ]  # fmt: skip
    complaints = [f"{name} is missing" for name in wanted if not (patient.path / name).is_file()]
    steps = len(patient.of("outer_step"))
    if steps != patient.config.teacher.steps and not patient.config.limits.max_promotions:
        complaints.append(f"{steps} outer steps, but teacher.steps = {patient.config.teacher.steps}")
    return Check("", complaints)


def _screening(patient: Patient) -> Iterable[str]:
    both = [row["question"] for row in (*patient.hard_train, *patient.hard_test)]
    if len(set(both)) < len(both):
        yield "a question stands twice in hard/train.jsonl and hard/test.jsonl"
    events = patient.of("screen")
    if len(events) != 1 and patient.of("outer_step"):
        yield f"{len(events)} screen events, expected 1"
    path = patient.path / "hard" / "screen.jsonl"
    if not events or not path.is_file():
        return
    rows = [row for row in read_jsonl(path)[0] if "id" in row]
    by_id = {row["id"]: row for row in rows}
    limit = patient.config.screen.max_successes
    found = {row["id"]: Screening(row["successes"], row["attempts"], row["truncated"]) for row in rows}
    yield from unequal("screen", events[0], screen_event(found, patient.config))
    for row in (*patient.hard_train, *patient.hard_test):
        source = by_id.get(row["id"])
        if source is None or any(source[key] != row[key] for key in ("successes", "attempts", "truncated")):
            yield f"hard problem {row['id']}: its counts are not those of hard/screen.jsonl"
        elif row["successes"] > limit:
            yield f"hard problem {row['id']} was solved {row['successes']} times, at most {limit} are hard"


def _workers(patient: Patient) -> Check:
    """Every piece of work that lost its worker was done later, and no piece was done twice."""
    path = patient.path / "workers.jsonl"
    if not path.is_file():
        return Check("", [], "none: one process did everything")
    rows, complaints = read_jsonl(path, path.name)
    open_pieces: set[int] = set()
    done: set[int] = set()
    for row in rows:
        if row["event"] == "opened":  # another process counts its pieces from 1 again
            open_pieces, done = set(), set()
        elif row["event"] == "lost" and "piece" in row:
            open_pieces.add(row["piece"])
        elif row["event"] == "done":
            if row["piece"] in done:
                complaints.append(f"piece {row['piece']} ({row['work']}) was done twice")
            done.add(row["piece"])
            open_pieces.discard(row["piece"])
    if patient.summary and open_pieces:
        complaints.append(f"pieces {sorted(open_pieces)} lost their worker and were not done again")
    lost = sum(row["event"] == "lost" for row in rows)
    return Check("", complaints, f"{sum(row['event'] == 'started' for row in rows)} started, {lost} lost")


def _steps(patient: Patient) -> Iterable[str]:
    config, steps = patient.config, patient.of("outer_step")
    if [row["step"] for row in steps] != list(range(len(steps))):
        yield "the outer steps are not numbered 0, 1, 2, ..."
    by_step: dict[int, list[Row]] = {}
    for row in patient.questions:
        by_step.setdefault(row["step"], []).append(row)
    if sorted(by_step) != [row["step"] for row in steps]:
        yield f"questions.jsonl holds steps {sorted(by_step)}, metrics.jsonl {[row['step'] for row in steps]}"
    window: list[float] = []
    refused = {row["step"] for row in patient.of("review") if row["decision"] == "rejected"}
    for row in steps:
        where, questions = f"outer step {row['step']}", by_step.get(row["step"], [])
        rewards = [reward for reward in row["reward_G"] if reward is not None]
        mean = sum(rewards) / len(rewards) if rewards else None
        window += [mean] if mean is not None else []
        last = window[-config.promotion.window :]
        full = len(window) >= config.promotion.window
        window_mean = sum(last) / config.promotion.window if full else None
        yield from unequal(where, row, {
            "reward_mean": mean,
            "window_mean": window_mean,
            "accepted": len(questions),
            "sampled": len(questions) + sum(row["rejected"].values()),
            "distinct_share": len({q["question"] for q in questions}) / max(1, len(questions)),
            "promoted": window_mean is not None and window_mean > config.promotion.tau and bool(rewards),
        })  # fmt: skip
        if "vendi" in row and questions:  # runs of older versions have none
            yield from unequal(where, row, {"vendi": step_vendi([q["question"] for q in questions])})
        if row["promoted"]:
            window = []
        for question in questions:
            if question["reward"] != row["reward_G"][question["dataset"]]:
                yield f"{where}: a question of dataset {question['dataset']} has another reward than its dataset"
                break
    events = {row["step"] for row in patient.of("promotion")}
    waiting = {row["step"] for row in steps if row["promoted"]} - events - refused
    on_hold = (patient.path / REVIEW_FILE).is_file()
    if (events | refused | waiting) != {row["step"] for row in steps if row["promoted"]} or (waiting and not on_hold):
        yield "the promotion events are not those of the outer steps that promoted"


def _alarms(patient: Patient) -> Iterable[str]:
    """An alarm that was taken out is found, and one that follows from nothing."""
    steps, learns = patient.of("outer_step"), patient.config.teacher.reward == "grounded"
    wanted = [found for event in patient.of("screen") for found in screen_alarms(event)]
    for number, event in enumerate(steps):
        own = [row for row in patient.questions if row["step"] == event["step"]]
        wanted += step_alarms(event, own, steps[:number], learns)
    kinds = {row["kind"] for row in wanted} | set(KINDS)
    found = [row for row in patient.of("alarm") if row["kind"] in kinds]
    for row in wanted:
        if row not in found:
            yield f"step {row['step']}: the alarm {row['kind']!r} is missing"
    for row in found:
        if row not in wanted:
            yield f"step {row['step']}: the alarm {row['kind']!r} follows from nothing"


def _promotions(patient: Patient) -> Iterable[str]:
    steps = {row["step"]: row for row in patient.of("outer_step")}
    wanted: list[Row] = []
    for event in patient.of("promotion"):
        step, where = steps[event["step"]], f"promotion of step {event['step']}"
        rewards = [reward for reward in step["reward_G"] if reward is not None]
        own = [row for row in patient.questions if row["step"] == event["step"] and row["dataset"] == event["dataset"]]
        wanted += own
        yield from unequal(where, event, {
            "reward": max(rewards),
            "dataset": step["reward_G"].index(max(rewards)),
            "questions": len(own),
            "baseline_pass_rate": step["baseline_pass_rate"],
        })  # fmt: skip
    keys = ("step", "dataset", "question", "answer", "reward")
    on_hold = read_object(patient.path / REVIEW_FILE)[0]
    if held := on_hold.get("promotion"):
        shown = [[row[key] for key in keys] for row in on_hold["questions"]]
        own = [row for row in patient.questions if (row["step"], row["dataset"]) == (held["step"], held["dataset"])]
        if shown != [[row[key] for key in keys] for row in own]:
            yield f"{REVIEW_FILE} shows other questions than the dataset that waits for a decision has"
    if [[row[key] for key in keys] for row in patient.pq] != [[row[key] for key in keys] for row in wanted]:
        yield "pq.jsonl does not hold the questions of the promoted datasets, in their order"


def _ledger(patient: Patient) -> Check:
    complaints = ledger.complaints(patient.ledger)
    standing = [line for line in patient.ledger if line["decision"] != "rejected"]
    events = patient.of("promotion")
    if len(standing) != len(events):
        complaints.append(f"{len(standing)} promotions stand in ledger.jsonl, {len(events)} in metrics.jsonl")
    for line, event in zip(standing, events, strict=False):
        complaints += unequal(f"ledger of step {event['step']}", line, {key: event[key] for key in ledger.FIELDS})
        rows = [row for row in patient.pq if row["step"] == event["step"]]
        if ledger.questions_digest(rows) != line["questions_sha256"]:
            complaints.append(f"ledger of step {event['step']}: pq.jsonl holds other questions than were promoted")
    return Check("", complaints, f"{len(patient.ledger)} lines")


def _evaluations(patient: Patient) -> Check:
    config, events, complaints = patient.config, patient.of("evaluation"), []
    seed = seeds.derive(config.seed, "evaluate")
    steps = patient.of("outer_step")
    group = config.student.prompts_per_step * config.student.attempts
    for row in events:
        where, arm = f"evaluation of {row['arm']}", row["arm"]
        trained = sum(step["arm"] == arm for step in patient.of("arm_step")) * group
        spent = {"base": 0, "ps": steps[-1]["student_rollouts"] if steps else 0}.get(arm, trained)
        complaints += unequal(where, row, {
            **summarize(row["correct"], config.evaluate.attempts, config.evaluate, seed),
            "problems": len(patient.hard_test),
            "attempts": config.evaluate.attempts,
            "student_rollouts": spent,
        })  # fmt: skip
        if len(row["correct"]) != len(patient.hard_test):
            complaints.append(f"{where}: {len(row['correct'])} counts for {len(patient.hard_test)} held-out problems")
    return Check("", complaints, f"{len(events)} arms")


def _summary(patient: Patient) -> Check:
    if not patient.summary:
        return Check("", [], "the run is not finished")
    found = summary_of(patient.rows, patient.config, {})
    complaints = unequal("summary.json", patient.summary, {k: v for k, v in found.items() if k != "wall_seconds"})
    strange = sorted(set(patient.summary) - set(found))
    complaints += [f"summary.json: {name} follows from nothing" for name in strange]
    return Check("", complaints, "times are as measured")


def _report(patient: Patient) -> Check:
    path = patient.path / "report.html"
    if not path.is_file():
        return Check("", [] if not patient.summary else ["report.html is missing; `soar report` writes it"])
    if path.read_bytes() == render(read_run(patient.path)).encode():
        return Check("", [], "every number on the page follows from the files")
    if not patient.summary:
        return Check("", [], "the page is older than the files; `soar report` writes it anew")
    return Check("", ["the page is not what the files say; `soar report` writes it anew (or another version wrote it)"])
