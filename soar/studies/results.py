"""The cells of a study -> one JSON document, its tables in Markdown, and one self-contained HTML page. Needs no torch.

Arms over seeds, paired comparisons, teachers, promotions: all is read from the cells' run folders, so it can be made again at
any time, also of an unfinished study.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from soar import seeds
from soar.files import Row, asset, digest
from soar.loop.statistics import clopper_pearson, holm, over_seeds, paired_over_seeds, pass_at_k
from soar.report.page import column, render, step_rows
from soar.report.runs import Arm, ReportError, Run, count, mean, numbers, read_run
from soar.report.text import DASH, MINUS, arm_name, bounds, duration, fill, percent, percent_digits, share_within, whole
from soar.studies.study import MAY_CHANGE, Cell, Study, comparisons

SCHEMA = 3
WORDS = asset("study")
CLIMB = 0.05  # mean pass@k from which a seed counts as off zero
TEACHER_STEPS = 3  # outer steps at the start, and at the end, that are compared
TEACHER_FIGURES = ("mean", "accepted_share", "distinct_share", "vendi", "well_posed", "correct", "teacher_kl")
CAN_COLLAPSE = ("distinct_share", "accepted_share", "vendi")
COLLAPSE = 0.5  # a teacher has collapsed when one of them falls below this part of its start


@dataclass(frozen=True)
class Outcome:
    """What one arm of one cell did on the held-out problems. correct: problem id -> correct attempts of `attempts`."""

    correct: dict[str, int]
    attempts: int
    arm: Arm

    def pass_at(self, k: int) -> dict[str, float]:
        """pass@k by problem, from this cell's own number of attempts."""
        return {name: pass_at_k(self.attempts, correct, k) for name, correct in self.correct.items()}


Outcomes = dict[tuple[str, str], dict[int, Outcome]]  # (variant, arm) -> seed -> outcome


def collect(study: Study, cells: Sequence[Cell], failures: dict[str, str], definition: Row) -> dict[str, Any]:
    """The content of study.json. failures: cell name -> why it has no result; definition: as it was recorded."""
    runs: dict[str, Run] = {}
    outcomes: Outcomes = {}
    for cell in cells:
        with suppress(ReportError):
            runs[cell.name] = read_run(cell.folder)
            for name, outcome in _outcomes(runs[cell.name]):
                outcomes.setdefault((cell.variant, name), {})[cell.seed] = outcome
    by_variant = {v: [(c, runs[c.name]) for c in cells if c.variant == v and c.name in runs] for v in study.variants}
    compared = [_compare(study, a, b, outcomes) for a, b in comparisons(study, list(outcomes))]
    others = [entry for row in compared for entry in row["pass_at"].values() if not entry["primary"]]
    for entry, p in zip(others, holm([entry["p_seeds"] for entry in others]), strict=True):
        entry["p_adjusted"] = p  # the primary comparison's stands as it is
    return {
        "schema": SCHEMA,
        **study.model_dump(mode="json", include={"name", "question", "recipe", "seeds", "primary"}),
        "definition": definition,
        "definition_sha256": digest({key: value for key, value in definition.items() if key not in MAY_CHANGE}),
        "cells": [_cell(cell, runs.get(cell.name), failures.get(cell.name)) for cell in cells],
        "arms": [_arm(study, *name, by_seed) for name, by_seed in outcomes.items()],
        "comparisons": compared,
        "loops": [_loop(variant, pairs) for variant, pairs in by_variant.items()],
    }


def _outcomes(run: Run) -> Iterator[tuple[str, Outcome]]:
    ids = [str(row.get("id")) for row in run.hard_test]
    for event in run.events.get("evaluation", []) if run.finished else []:
        name, given, attempts = str(event.get("arm")), event.get("correct"), count(event.get("attempts")) or 0
        correct = given if isinstance(given, list) and len(given) == len(ids) else []
        if name in run.arms and correct and all(type(n) is int and 0 <= n <= attempts for n in correct):
            yield name, Outcome(dict(zip(ids, correct, strict=True)), attempts, run.arms[name])


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
        **{key: count(summary.get(key)) for key in ("promotions", "outer_steps")},
        "wall_seconds": sum(numbers(list(wall.values()))) if isinstance(wall, dict) else None,
    }


def _ks(study: Study, outcomes: Sequence[Outcome]) -> list[int]:
    return [k for k in study.ks if k <= min(outcome.attempts for outcome in outcomes)]


def _arm(study: Study, variant: str, arm: str, by_seed: dict[int, Outcome]) -> Row:
    """An arm over its seeds, and how many of them climbed: means of arms that either climb or do not say little."""
    outcomes, place, pass_at = list(by_seed.values()), seeds.derive(study.name, "interval"), {}
    for k in _ks(study, outcomes):
        spread = over_seeds([o.pass_at(k) for o in outcomes], place, study.bootstrap)
        climbed = sum(mean >= CLIMB for mean in spread["per_seed"])
        pass_at[str(k)] = {**spread, "climbed": climbed, "climbed_95": list(clopper_pearson(climbed, len(outcomes)))}
    costs = {"student_rollouts": "rollouts", "total_tokens": "total_tokens", "evaluation_tokens": "evaluation_tokens"}
    return {
        "variant": variant,
        "arm": arm,
        "seeds": list(by_seed),
        **{key: mean(numbers([getattr(o.arm, name) for o in outcomes])) for key, name in costs.items()},
        "pass_at": pass_at,
    }


def _compare(study: Study, a: tuple[str, str], b: tuple[str, str], outcomes: Outcomes) -> Row:
    """The paired comparison over the seeds in which both arms answered the same held-out problems."""
    both = [seed for seed in outcomes[a] if seed in outcomes[b]]
    shared = [seed for seed in both if list(outcomes[a][seed].correct) == list(outcomes[b][seed].correct)]
    rows_a, rows_b = ([outcomes[name][seed] for seed in shared] for name in (a, b))
    names, place, pass_at = (":".join(a), ":".join(b)), seeds.derive(study.name, "paired"), {}
    for k in _ks(study, rows_a + rows_b) if shared else ():
        values_a, values_b = ([o.pass_at(k) for o in rows] for rows in (rows_a, rows_b))
        entry = paired_over_seeds(values_a, values_b, place, study.bootstrap)
        pass_at[str(k)] = {**entry, "primary": study.primary == (*names, k), "p_adjusted": entry["p_seeds"]}
    left_out = len(both) - len(shared)
    return {"a": names[0], "b": names[1], "seeds": shared, "left_out": left_out, "pass_at": pass_at}


def _loop(variant: str, pairs: Sequence[tuple[Cell, Run]]) -> Row:
    """How the teacher of a variant changed, as means of its first and of its last outer steps, and its promotions among
    the decisions with a full window. Neighbouring windows of w steps share w - 1 of them, so one counts as 1 / w of a
    trial."""
    cells, effective = [], 0.0
    for cell, rows in ((cell, step_rows(run)) for cell, run in pairs if run.steps):
        part = max(1, min(TEACHER_STEPS, len(rows) // 2))
        ends = (rows[:part], rows[-part:])
        first, last = ({key: mean(column(some, key)) for key in TEACHER_FIGURES} for some in ends)
        fell = [key for key in CAN_COLLAPSE if (last[key] or 0.0) < COLLAPSE * (first[key] or 0.0)]
        full = [row for row in rows if row["window_mean"] is not None]
        promoted = sum(row["promoted"] for row in full)
        effective += max(promoted, len(full) / cell.config.promotion.window)
        entry = {"seed": cell.seed, "first": first, "last": last, "collapsed": fell}
        cells.append({**entry, "windows": len(full), "promotions": promoted})
    windows, promotions = (sum(row[key] for row in cells) for key in ("windows", "promotions"))
    share = promotions / windows if windows else None
    interval = list(clopper_pearson((share or 0.0) * effective, effective))
    sums = {"collapsed": sum(bool(row["collapsed"]) for row in cells), "windows": windows, "promotions": promotions}
    return {"variant": variant, **sums, "share": share, "interval_95": interval, "cells": cells}


def tables(results: Row) -> list[Row]:
    """Every table of the study, empty ones left out: title, note, header, rows of as many cells, all of it text."""
    ks = sorted({k for row in results["arms"] for k in row["pass_at"]}, key=int)
    rows = {
        "arms": _arm_rows(results, ks),
        "comparisons": [row for entry in results["comparisons"] for row in _comparison_rows(results, entry)],
        "loops": [_loop_row(row) for row in results["loops"] if row["cells"]],
        "cells": [_cell_row(cell) for cell in results["cells"]],
    }
    values = {"primary": primary_line(results), "climb": percent(CLIMB, 0), "steps": TEACHER_STEPS}
    every = []
    for key, words in WORDS["tables"].items():
        parts = ([f"pass@{k}" for k in ks] if word == "pass@k" else [word] for word in words["header"])
        every.append({**words, "note": words["note"].format(**values), "header": [*chain(*parts)], "rows": rows[key]})
    return [table for table in every if table["rows"]]


def primary_line(results: Row) -> str:
    """Which comparison was named before the study ran, and the digest of the definition that names it."""
    if not results["primary"]:
        return str(WORDS["no_primary"])
    (a, b), k = (label(results, name) for name in results["primary"][:2]), results["primary"][2]
    return str(WORDS["primary"].format(a=a, b=b, k=k, digest=results["definition_sha256"][:12]))


def label(results: Row, result: str) -> str:
    """`grounded:ps` as `PS`, in a study of several variants as `grounded: PS`."""
    variant, _, arm = result.partition(":")
    return arm_name(arm) if len(results["definition"]["variants"]) == 1 else f"{variant}: {arm_name(arm)}"


def _arm_rows(results: Row, ks: Sequence[str]) -> list[list[str]]:
    rows = []
    for row in results["arms"]:
        spreads = [row["pass_at"].get(k) for k in ks]
        shares = [DASH if s is None else share_within(s["mean"], s["interval_95"]) for s in spreads]
        costs = [whole(row[key]) for key in ("total_tokens", "evaluation_tokens", "student_rollouts")]
        last, seeds = spreads[-1], len(row["seeds"])
        off = f"{last['climbed']} of {seeds} {bounds(last['climbed_95'], 0)}" if last else DASH
        rows.append([label(results, f"{row['variant']}:{row['arm']}"), str(seeds), *shares, off, *costs])
    return rows


def _comparison_rows(results: Row, row: Row) -> list[list[str]]:
    rows, name = [], f"{label(results, row['a'])} - {label(results, row['b'])}"
    for k, entry in row["pass_at"].items():
        digits = percent_digits(entry["difference"], entry["interval_95"])
        adjusted = "primary" if entry["primary"] else f"{entry['p_adjusted']:.4f}"
        gap = share_within(entry["difference"], entry["interval_95"])
        shown = [gap, bounds(entry["bootstrap_95"], digits), f"{entry['p_seeds']:.4f}"]
        rows.append([name, str(len(row["seeds"])), k, *shown, adjusted])
    return rows


def _loop_row(row: Row) -> list[str]:
    """Changes such as `0.98 -> 0.41`: means over seeds of the first and the last outer steps."""
    cells = [row["variant"]]
    for key in TEACHER_FIGURES:
        means = [mean([c[part][key] for c in row["cells"] if c[part][key] is not None]) for part in ("first", "last")]
        ends = [DASH if value is None else f"{value:.3g}".replace("-", MINUS) for value in means]
        cells.append(DASH if ends == [DASH, DASH] else " \u2192 ".join(ends))
    share = f"{percent(row['share'])} {bounds(row['interval_95'], 1)} of {row['windows']:,}"
    return [*cells, f"{row['collapsed']} of {len(row['cells'])}", whole(row["promotions"]), share]


def _cell_row(cell: Row) -> list[str]:
    state = f"{cell['state']}: {cell['reason']}" if cell["reason"] else cell["state"]
    name = f"{cell['variant']}, seed {cell['seed']}"
    return [name, state, whole(cell["promotions"]), duration(cell["wall_seconds"])]


def markdown(results: Row) -> str:
    """The tables as Markdown."""
    return fill("study.md", results=results, tables=tables(results))


def page(results: Row) -> str:
    """The HTML page. Every text in it is escaped, and characters that hide or reorder text are made visible."""
    unfinished = sum(cell["state"] != "finished" for cell in results["cells"])
    return render("study.html", {"results": results, "tables": tables(results), "unfinished": unfinished})
