"""The report's part on a mixed run: every hard set with its screening, the arms' pass@k, and the step rewards on it."""

from __future__ import annotations

from typing import Any

from soar.report import text as wording
from soar.report.runs import Arm, Row, Run, count, numbers, read_arm
from soar.report.sections import mean

MAX_SETS = 50


def mixed_section(run: Run) -> dict[str, Any]:
    """Table rows of every set; no rows for an unmixed run. Values that are missing or damaged become dashes."""
    arms: dict[str, Row] = {}
    for row in run.events.get("evaluation", []):
        arms[str(row.get("arm"))] = _parts(row)
    screened = run.events.get("screen", [])
    counts = _parts(screened[-1]) if screened else {}
    steps = [(row.get("set_G"), _parts(row), row.get("reward_G")) for row in run.steps]
    names = list(dict.fromkeys(name for parts in (counts, *arms.values(), *(s[1] for s in steps)) for name in parts))
    known = [arm for arm in wording.ARM_NAMES if arm in arms] + [arm for arm in arms if arm not in wording.ARM_NAMES]
    results = [
        (name, read_arm(arm, arms[arm][name])) for name in names[:MAX_SETS] for arm in known if name in arms[arm]
    ]
    ks = sorted({k for _, arm in results for k in arm.pass_at})
    rows = [{"set": name, "arm": arm, "cells": _cells(arm, ks)} for name, arm in results]
    found = [_of_set(name, counts.get(name, {}), steps) for name in names[:MAX_SETS]]
    return {"sets": found, "rows": rows, "ks": ks}


def _parts(row: Row) -> dict[str, Row]:
    """The field `sets` of an event: name -> its numbers; nothing for anything else."""
    parts = row.get("sets")
    return {str(k): v for k, v in parts.items() if isinstance(v, dict)} if isinstance(parts, dict) else {}


def _cells(arm: Arm, ks: list[int]) -> list[tuple[str, str, str]]:
    """pass@k and interval for every k, in the parts that the page sets apart."""
    cells = [wording.with_interval(arm, k) if k in arm.pass_at else wording.DASH for k in ks]
    return [cell.partition(" [") for cell in cells]


def _of_set(name: str, counts: Row, steps: list[tuple[Any, dict[str, Row], Any]]) -> Row:
    """Candidates, hard problems, datasets written for the set, and mean rewards of all datasets and of its own on it."""
    rewards, own, written = [], [], 0
    for sets_G, parts, _ in steps:
        reward_G = parts.get(name, {}).get("reward_G")
        rewards += numbers(reward_G)
        if isinstance(sets_G, list) and isinstance(reward_G, list):
            own += numbers([reward for reward, wanted in zip(reward_G, sets_G, strict=False) if wanted == name])
            written += sum(wanted == name for wanted in sets_G)
    return {
        "name": name,
        "candidates": count(counts.get("candidates")),
        "hard": count(counts.get("hard")),
        "datasets": written,
        "reward": mean(rewards),
        "own": mean(own),
    }
