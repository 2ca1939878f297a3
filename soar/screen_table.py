"""What a screening found, on one page: success rates, the hard set, and whether plain RL would have a signal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from soar.config import Config
from soar.types import Screening

SHARES = ("pass_rate", "truncated_share", "frac_all_wrong", "frac_all_right", "frac_mixed")
BUCKETS = ((0.02, "<= 2 %"), (0.1, "2-10 %"), (0.5, "10-50 %"), (0.999999, "50-100 %"), (1.0, "all"))
FEW_MIXED = 0.02  # share of groups with a signal under which plain RL is as good as without one


def screen_event(found: Mapping[str, Screening], config: Config) -> dict[str, Any]:
    """The `screen` event: counts, histogram of success rates, and what a plain RL group would see.

    Rates and shares are None where nothing was attempted (screen.attempts = 0), and where attempts ended early: success
    rates of problems that were left at their first success are too high.
    """
    rows = list(found.values())
    histogram: Counter[str] = Counter()
    for row in rows:
        if row.successes == 0:
            histogram["0"] += 1
        else:
            histogram[next(label for limit, label in BUCKETS if row.pass_rate <= limit)] += 1
    group = config.student.attempts
    attempts = sum(row.attempts for row in rows)
    shares: dict[str, float | None] = dict.fromkeys(SHARES)
    if attempts:
        shares["truncated_share"] = sum(row.truncated for row in rows) / attempts
    if attempts and not any(row.attempts < config.screen.attempts for row in rows):
        wrong = sum((1 - row.pass_rate) ** group for row in rows) / len(rows)
        right = sum(row.pass_rate**group for row in rows) / len(rows)
        correct = sum(row.successes for row in rows) / attempts
        shares |= {"pass_rate": correct, "frac_all_wrong": wrong, "frac_all_right": right}
        shares["frac_mixed"] = 1 - wrong - right
    if not attempts:
        histogram.clear()
    return {
        "event": "screen",
        "candidates": len(rows),
        "hard": sum(row.successes <= config.screen.max_successes for row in rows),
        "attempts": config.screen.attempts,
        "histogram": {label: histogram[label] for label in ["0", *(name for _, name in BUCKETS)]},
        **shares,
    }


def table_lines(screenings: Sequence[Screening], event: dict[str, Any], config: Config) -> list[str]:
    """The page as text lines. event: of `screen_event`, with what was left out before."""
    attempts, most = config.screen.attempts, config.screen.max_successes
    early = config.screen.early_stop
    lines = [
        f"{len(screenings)} problems, {'up to ' if early else ''}{attempts} attempts each "
        f"(temperature {config.screen.temperature}, at most {config.student.sampling.max_tokens} tokens)",
        "",
        "  correct attempts           problems    share",
    ]
    for label, count in _rows(screenings, attempts, early, most):
        lines.append(f"  {label:26s} {count:8,d}  {count / max(1, len(screenings)):6.1%}")
    allowed = f"at most {most} of {attempts} attempts correct" if most else f"none of {attempts} attempts correct"
    lines += ["", f"hard: {event['hard']} problems ({allowed})"]
    if event["pass_rate"] is not None:
        lines.append(f"correct attempts of all: {event['pass_rate']:.2%}")
    if event["truncated_share"] is not None:
        lines.append(f"attempts that hit the token budget: {event['truncated_share']:.1%}")
    left_out = [f"{event[key]} {text}" for key, text in LEFT_OUT.items() if event.get(key)]
    lines += [f"left out before: {', '.join(left_out)}"] if left_out else []
    return [*lines, "", *signal_lines(event, config)]


LEFT_OUT = {"too_long": "too long for the context", "ungradable": "whose gold answer cannot be graded"}


def _rows(screenings: Sequence[Screening], attempts: int, early: bool, most: int) -> list[tuple[str, int]]:
    """(label, problems) of each line of the histogram."""
    counts = [row.successes for row in screenings]
    if early:
        solved = sum(count > most for count in counts)
        rows = [("0", counts.count(0)), (f"1 to {most}", sum(0 < count <= most for count in counts))]
        return [*(rows if most else rows[:1]), (f"{most + 1} or more (then stopped)", solved)]
    tenth, half = attempts * 0.1, attempts * 0.5
    return [
        ("0", counts.count(0)),
        ("1", sum(count == 1 < attempts for count in counts)),
        ("2 or more, up to 10 %", sum(2 <= count <= tenth for count in counts)),
        ("10 to 50 %", sum(max(2, tenth) <= count <= half and count > tenth for count in counts)),
        ("50 % to all but one", sum(max(1, half) < count < attempts for count in counts)),
        ("all", counts.count(attempts)),
    ]


def signal_lines(event: dict[str, Any], config: Config) -> list[str]:
    """What a plain RLVR run with groups of student.attempts would see, in words, and what to do next."""
    group, hard, total = config.student.attempts, event["hard"], event["candidates"]
    lines = []
    if event["frac_mixed"] is not None:
        lines = [
            f"Plain RL with groups of {group} attempts at these problems would see",
            f"  all wrong (all rewards are zero)  {event['frac_all_wrong']:6.1%}",
            f"  all right (all rewards are equal) {event['frac_all_right']:6.1%}",
            f"  mixed (a learning signal)         {event['frac_mixed']:6.1%}",
        ]
    if total and event["histogram"]["0"] == total:
        lines += [
            "no learning signal: all rewards are zero. No attempt at any problem was correct, so every advantage is zero "
            "and plain RL stalls."
        ]
    elif event["frac_mixed"] is not None and event["frac_mixed"] < FEW_MIXED:
        wrong = event["frac_all_wrong"] >= event["frac_all_right"]
        what = "all rewards are zero" if wrong else "all rewards are equal, the problems are solved"
        lines += [f"no learning signal: {what} in nearly every group. Plain RL stalls."]
    elif event["frac_mixed"] is not None:
        lines += [f"Plain RL has a learning signal in {event['frac_mixed']:.0%} of these groups, none on the hard set."]
    return [*lines, *_advice(event, config, hard)]


def _advice(event: dict[str, Any], config: Config, hard: int) -> list[str]:
    lines = []
    truncated = event["truncated_share"] or 0.0
    if truncated > 0.5:
        lines.append(
            f"{truncated:.0%} of the attempts hit the token budget: a problem may be hard only because the answer comes too "
            f"late. Raise student.sampling.max_tokens (now {config.student.sampling.max_tokens}) and screen again."
        )
    if hard >= 4:
        return lines
    return [
        *lines,
        f"{hard} hard problems are too few for a run (at least 4): give harder problems, or count problems as hard that "
        f"are solved now and then (--set screen.max_successes={config.screen.max_successes + 1}).",
    ]
