"""The cells of a study -> one JSON document: arms over seeds, paired comparisons, teachers, promotions. Needs no torch.

Everything is read from the cells' run folders, so the document can be made again at any time, also of an unfinished study.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from soar import seeds
from soar.files import Row, read_jsonl
from soar.loop.statistics import over_seeds, paired_over_seeds, wilson_interval
from soar.report.questions import collapsed, describe, label_share
from soar.report.runs import ReportError, Run, count, number, numbers, read_run
from soar.studies.study import Cell, Study, comparisons

SCHEMA = 1
TEACHER_STEPS = 3  # outer steps at the start, and at the end, whose questions are compared

Counts = dict[tuple[str, str], dict[int, Row]]
"""(variant, arm) -> seed -> evaluation event."""


def collect(study: Study, cells: Sequence[Cell], failures: dict[str, str]) -> dict[str, Any]:
    """The content of study.json. failures: cell name -> why it has no result."""
    runs: dict[str, Run] = {}
    for cell in cells:
        try:
            runs[cell.name] = read_run(cell.folder)
        except ReportError:
            continue
    counts = _counts(cells, runs)
    return {
        "schema": SCHEMA,
        "name": study.name,
        "question": study.question,
        "recipe": study.recipe,
        "seeds": list(study.seeds),
        "cells": [_cell(cell, runs.get(cell.name), failures.get(cell.name)) for cell in cells],
        "arms": [_arm(study, variant, arm, by_seed) for (variant, arm), by_seed in counts.items()],
        "comparisons": [_compare(study, a, b, counts, cells, runs) for a, b in comparisons(study, list(counts))],
        "teachers": [_teacher(variant, cells, runs) for variant in study.variants],
        "promotions": [_promotions(variant, cells, runs) for variant in study.variants],
        "pq": [_pq(variant, cells, runs) for variant in study.variants],
        "curves": {variant: _curves(variant, cells, runs) for variant in study.variants},
    }


def _counts(cells: Sequence[Cell], runs: dict[str, Run]) -> Counts:
    found: Counts = {}
    for cell in cells:
        run = runs.get(cell.name)
        for event in run.events.get("evaluation", []) if run and run.finished else []:
            if isinstance(event.get("correct"), list):
                found.setdefault((cell.variant, str(event.get("arm"))), {})[cell.seed] = event
    return found


def _cell(cell: Cell, run: Run | None, failure: str | None) -> Row:
    state = "missing" if run is None else "finished" if run.finished else "unfinished"
    summary = run.summary if run is not None else {}
    wall = summary.get("wall_seconds")
    return {
        "variant": cell.variant,
        "seed": cell.seed,
        "folder": f"cells/{cell.name}",
        "state": "failed" if failure and state != "finished" else state,
        "reason": failure if state != "finished" else None,
        "promotions": count(summary.get("promotions")),
        "outer_steps": count(summary.get("outer_steps")),
        "wall_seconds": sum(numbers(list(wall.values()))) if isinstance(wall, dict) else None,
    }


def _ks(study: Study, attempts: int) -> list[int]:
    return [k for k in study.ks if k <= attempts]


def _arm(study: Study, variant: str, arm: str, by_seed: dict[int, Row]) -> Row:
    attempts = min(int(event["attempts"]) for event in by_seed.values())
    correct_S_H = [event["correct"] for event in by_seed.values()]
    seed = seeds.derive(study.name, "interval")
    pass_at = {str(k): over_seeds(correct_S_H, attempts, k, seed, study.bootstrap) for k in _ks(study, attempts)}
    rollouts = numbers([event.get("student_rollouts") for event in by_seed.values()])
    return {
        "variant": variant,
        "arm": arm,
        "seeds": list(by_seed),
        "problems": [len(row) for row in correct_S_H],
        "attempts": attempts,
        "student_rollouts": statistics.fmean(rollouts) if rollouts else None,
        "pass_at": pass_at,
    }


def _compare(
    study: Study, a: tuple[str, str], b: tuple[str, str], counts: Counts, cells: Sequence[Cell], runs: dict[str, Run]
) -> Row:
    """The paired comparison over the seeds in which both arms answered the same held-out problems."""
    tests = {
        (cell.variant, cell.seed): [row.get("id") for row in runs[cell.name].hard_test]
        for cell in cells
        if cell.name in runs
    }
    both = [seed for seed in counts[a] if seed in counts[b]]
    shared = [seed for seed in both if tests[a[0], seed] == tests[b[0], seed]]
    found: Row = {"a": ":".join(a), "b": ":".join(b), "seeds": shared, "left_out": len(both) - len(shared)}
    if not shared:
        return {**found, "pass_at": {}}
    attempts = min(int(counts[x][seed]["attempts"]) for x in (a, b) for seed in shared)
    rows_a, rows_b = ([counts[x][seed]["correct"] for seed in shared] for x in (a, b))
    seed = seeds.derive(study.name, "paired")
    return {
        **found,
        "pass_at": {
            str(k): paired_over_seeds(rows_a, rows_b, attempts, k, seed, study.bootstrap) for k in _ks(study, attempts)
        },
    }


def _teacher(variant: str, cells: Sequence[Cell], runs: dict[str, Run]) -> Row:
    """How the teacher of a variant changed from its first to its last outer steps, seed by seed."""
    found = []
    for cell in cells:
        run = runs.get(cell.name)
        if cell.variant != variant or run is None or not run.steps:
            continue
        part = max(1, min(TEACHER_STEPS, len(run.steps) // 2))
        first, last = (_period(run, events, cell.seed) for events in (run.steps[:part], run.steps[-part:]))
        means = numbers([event.get("reward_mean") for event in run.steps])
        found.append(
            {
                "seed": cell.seed,
                "first": first,
                "last": last,
                "reward_sd": statistics.stdev(means) if len(means) > 1 else None,
                "collapsed": collapsed(first, last),
            }
        )
    return {"variant": variant, "cells": found, "collapsed": sum(bool(row["collapsed"]) for row in found)}


def _period(run: Run, events: Sequence[Row], seed: int) -> Row:
    """Figures of the questions and rewards of some outer steps."""
    steps = {event.get("step") for event in events}
    rows = [row for row in run.questions if row.get("step") in steps]
    accepted, sampled = (sum(numbers([event.get(key) for event in events])) for key in ("accepted", "sampled"))
    rewards, divergences = (numbers([event.get(key) for event in events]) for key in ("reward_mean", "teacher_kl"))
    return {
        **describe(rows, seed),
        "accepted_share": accepted / sampled if sampled else None,
        "reward_mean": statistics.fmean(rewards) if rewards else None,
        "teacher_kl": statistics.fmean(divergences) if divergences else None,
    }


def _pq(variant: str, cells: Sequence[Cell], runs: dict[str, Run]) -> Row:
    """The promotion questions of a variant, seed by seed; shares by the judge, where one was asked, else by the oracle."""
    found = []
    for cell in cells:
        run = runs.get(cell.name)
        if cell.variant != variant or run is None or not run.pq:
            continue
        labels, _ = read_jsonl(cell.folder / "pq_labels.jsonl")
        figures = describe(run.pq, cell.seed)
        if labels:
            judged = describe(labels, cell.seed)
            figures |= {key: judged[key] for key in ("well_posed", "correct")}
        oracle = "oracle" if figures["well_posed"] is not None else None
        found.append({"seed": cell.seed, "judge": labels[0].get("judge") if labels else oracle, **figures})
    return {"variant": variant, "cells": found}


def _promotions(variant: str, cells: Sequence[Cell], runs: dict[str, Run]) -> Row:
    """Promotions among the decisions with a full window.

    Neighbouring windows of w steps share w - 1 of them, so the interval counts a window as 1 / w of a trial.
    """
    windows = promoted = 0
    effective = 0.0
    per_seed = []
    for cell in cells:
        run = runs.get(cell.name)
        if cell.variant != variant or run is None:
            continue
        full = [event for event in run.steps if number(event.get("window_mean")) is not None]
        mine = sum(event.get("promoted") is True for event in full)
        windows, promoted = windows + len(full), promoted + mine
        effective += max(mine, len(full) / cell.config.promotion.window)
        per_seed.append({"seed": cell.seed, "windows": len(full), "promotions": mine})
    share = promoted / windows if windows else None
    return {
        "variant": variant,
        "windows": windows,
        "promotions": promoted,
        "share": share,
        "interval_95": list(wilson_interval((share or 0.0) * effective, effective)),
        "per_seed": per_seed,
    }


STEP_FIGURES = ("reward_mean", "distinct_share", "baseline_pass_rate")
LABELS = ("well_posed", "correct")  # of questions, where there is an oracle


def _curves(variant: str, cells: Sequence[Cell], runs: dict[str, Run]) -> list[Row]:
    """Means over seeds of the figures of every outer step."""
    by_step: dict[int, list[Row]] = {}
    written: dict[int, list[Row]] = {}
    for cell in cells:
        run = runs.get(cell.name)
        if run is None or cell.variant != variant:
            continue
        for rows, kept in ((run.steps, by_step), (run.questions, written)):
            for row in rows:
                kept.setdefault(count(row.get("step")) or 0, []).append(row)
    found = []
    for step, events in sorted(by_step.items()):
        known = {key: numbers([event.get(key) for event in events]) for key in STEP_FIGURES}
        means = {key: statistics.fmean(values) if values else None for key, values in known.items()}
        shares = {key: label_share(written.get(step, []), key) for key in LABELS}
        found.append({"step": step, "seeds": len(events), **means, **shares})
    return found
