"""A run in words: figures as text, and what can honestly be said about its result. Needs no torch.

Used by the report page and by anything else that has to state the result, so that it is worded in one place.
"""

from __future__ import annotations

from datetime import datetime

from soar.report.runs import Arm, Run, count, number, numbers

NBSP = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"
SAME_BUDGET = 0.05  # two student budgets that differ by less are called the same

ARM_NAMES = {
    "base": "Base",
    "hard_only": "Hard-Only",
    "ps": "PS",
    "ps_hard": "PS + hard",
    "pq": "PQ",
    "pq_mixed": "PQ mixed",
    "pq_curriculum": "PQ curriculum",
    "pq_sample": "PQ sample",
    "pq_well_posed": "PQ well-posed",
    "pq_correct": "PQ correct",
    "base_t": "Base-T",
    "teacher_t": "Teacher-T",
    "self_instruct": "Self-instruct",
    "real": "Real",
}
ARM_MEANINGS = {
    "base": "the model before any training",
    "hard_only": "trained on the hard problems alone",
    "ps": "the promoted student of the SOAR loop",
    "ps_hard": "the promoted student, trained on the hard problems from there",
    "pq": "a fresh student, trained on the promotion questions and the hard problems",
    "pq_mixed": "as PQ, questions and hard problems together",
    "pq_curriculum": "as PQ, first the questions, then the hard problems",
    "pq_sample": "as PQ, with a random part of the questions",
    "pq_well_posed": "as PQ, with as many well-posed questions",
    "pq_correct": "as PQ, with as many correctly answered questions",
    "base_t": "a fresh student, trained on questions of the untrained teacher and the hard problems",
    "teacher_t": "a fresh student, trained on questions of the trained teacher and the hard problems",
    "self_instruct": "as Base-T, with the base model's majority answers",
    "real": "a fresh student, trained on easier real problems and the hard problems",
}


def arm_name(name: str) -> str:
    """The arm's name as the paper writes it; an arm that it does not have keeps its own."""
    return ARM_NAMES.get(name, name)


def percent(share: float | None, digits: int | None = None) -> str:
    """0.123 -> `12.3 %`. Shares below one per cent get a second digit. None is a dash."""
    if share is None:
        return DASH
    digits = percent_digits(share) if digits is None else digits
    return f"{100 * share:z.{digits}f}{NBSP}%".replace("-", MINUS)


def percent_digits(share: float, interval: tuple[float, float] | None = None) -> int:
    """Decimals of a share shown in per cent: two when it, or the upper end of a 0 %'s interval, is below 1 %."""
    size = abs(share) or (max(map(abs, interval)) if interval else 0.0)
    return 2 if 0 < size < 0.01 else 1


def bounds(interval: tuple[float, float] | None, digits: int) -> str:
    """(0.091, 0.155) -> `[9.1, 15.5]`; nothing for None."""
    if interval is None:
        return ""
    return "[{:z.{d}f},\u00a0{:z.{d}f}]".format(*(100 * x for x in interval), d=digits).replace("-", MINUS)


def with_interval(arm: Arm, k: int) -> str:
    """`12.3 % [9.1, 15.5]` for one arm's pass@k."""
    interval = arm.interval.get(k)
    digits = percent_digits(arm.pass_at[k], interval)
    return f"{percent(arm.pass_at[k], digits)} {bounds(interval, digits)}".strip()


def whole(value: object) -> str:
    """A count with thousands separators; a dash for anything that is no number."""
    result = count(value)
    return DASH if result is None else f"{result:,}"


def decimal(value: object, digits: int = 4) -> str:
    """A number with so many decimals; a dash for anything that is no number."""
    result = number(value)
    return DASH if result is None else f"{result:z.{digits}f}".replace("-", MINUS)


def duration(seconds: object) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`; a dash for anything that is no number."""
    value = number(seconds)
    if value is None:
        return DASH
    if value < 59.5:
        return f"{value:.1f}{NBSP}s" if value < 10 else f"{value:.0f}{NBSP}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min{NBSP}{rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h{NBSP}{minutes % 60:02d}{NBSP}min"


def moment(timestamp: object) -> str:
    """An ISO 8601 time as `2026-01-31 09:30 UTC`; anything else as it is."""
    try:
        when = datetime.fromisoformat(str(timestamp))
    except ValueError:
        return str(timestamp)
    return f"{when:%Y-%m-%d %H:%M} {when:%Z}".strip()


def comparison(run: Run, arm: Arm, other: Arm, k: int) -> str:
    """What can be said about `arm` against `other` at pass@k: the paired difference, else whether intervals overlap.

    The paired entry is `summary["paired"]["<arm> - <other>"][k] = {"difference": d, "interval_95": [low, high]}`.
    """
    paired = run.summary.get("paired")
    pair = paired.get(f"{arm.name} - {other.name}") if isinstance(paired, dict) else None
    entry = pair.get(str(k)) if isinstance(pair, dict) else None
    untrained = is_base(run, arm)
    if isinstance(entry, dict):
        difference, interval = number(entry.get("difference")), numbers(entry.get("interval_95"))
        if difference is not None and len(interval) == 2:
            digits = percent_digits(difference)
            points = f"{100 * difference:+.{digits}f} percentage points {bounds((interval[0], interval[1]), digits)}"
            return f"{points.replace('-', MINUS)}, {_verdict(interval[0], interval[1], arm, other, untrained)}"
    if k not in arm.interval or k not in other.interval:
        return "without intervals nothing can be said about the difference"
    low, high = arm.interval[k][0] - other.interval[k][1], arm.interval[k][1] - other.interval[k][0]
    apart = "do not overlap" if low > 0 or high < 0 else "overlap"
    return f"the 95\u00a0% intervals {apart}, {_verdict(low, high, arm, other, untrained)}"


def is_base(run: Run, arm: Arm) -> bool:
    """Whether the arm is PS of a run that promoted no student, which is the base model: nothing of SOAR is in it."""
    return arm.name == "ps" and count(run.summary.get("promotions")) == 0


def _verdict(low: float, high: float, arm: Arm, other: Arm, untrained: bool) -> str:
    """What the ends of a difference's interval say, and whether the student budgets may be why."""
    if low <= 0 <= high:
        return "so this run does not show a difference"
    if untrained:
        return f"so {arm_name(other.name)} is {'below' if low > 0 else 'above'} the untrained model in this run"
    if other.name == "base":
        return f"so SOAR is {'above' if low > 0 else 'below'} the untrained model in this run"
    return (
        f"so SOAR is {'ahead' if low > 0 else 'behind'} in this run{budget_caveat(budget_ratio(arm, other), low > 0)}"
    )


def rollouts(arm: Arm) -> int | None:
    """Student rollouts behind an arm, those included that found the questions it was trained on."""
    return None if arm.student_rollouts is None else arm.student_rollouts + (arm.search_rollouts or 0)


def budget_ratio(arm: Arm, other: Arm) -> float | None:
    """Student rollouts of `arm` over those of `other`, searches included; 1 within SAME_BUDGET, None when unknown."""
    own, reference = rollouts(arm), rollouts(other)
    if own is None or not reference:
        return None
    return 1.0 if abs(own - reference) <= SAME_BUDGET * max(own, reference) else own / reference


def budget_caveat(ratio: float | None, ahead: bool) -> str:
    """What to add to `ahead` or `behind`; nothing at the same budget."""
    if ratio is None:
        return ", but the student budgets are not recorded, and they may be why"
    if ratio == 1:
        return ""
    times = (
        f"with {ratio:,.2g} times the student rollouts"
        if ratio < 10
        else f"with {ratio:,.0f} times the student rollouts"
    )
    return f", but {times}, which may be why" if (ratio > 1) == ahead else f", {times}"


def budget(arm: Arm, other: Arm) -> str:
    """Whether two arms had the same student budget (SAME_BUDGET), else both budgets; nothing when unknown."""
    ratio = budget_ratio(arm, other)
    if other.name == "base" or ratio is None:
        return ""
    if ratio == 1:
        return " at the same student budget"
    search = " with the search" if arm.search_rollouts else ""
    return f" (student rollouts: {rollouts(arm):,}{search} against {rollouts(other):,})"


def asked(run: Run) -> str:
    """What the run set out to find, in one sentence; what its folder does not say is left out."""
    problems, model, screen = (run.config.get(key) for key in ("problems", "model", "screen"))
    who = model.get("path") if isinstance(model, dict) else None
    source = problems.get("source") if isinstance(problems, dict) else None
    of = f" of {source}" if isinstance(source, str) and source else ""
    held_out = plural(len(run.hard_test), "held-out problem") if run.hard_test else "held-out problems"
    attempts = count(screen.get("attempts")) if isinstance(screen, dict) else None
    most = count(screen.get("max_successes")) if isinstance(screen, dict) else None
    evidence = ""
    if attempts and most is not None:
        times = (
            f"in {attempts:,} attempts at each" if most == 0 else f"more than {most:,} times in {attempts:,} attempts"
        )
        evidence = f", none of which it solved {times},"
    what = f"{held_out}{of}{evidence}"
    return f"Asked: can {who or 'the model'} learn to solve {what} from practice questions that it writes itself?"


def paused(run: Run) -> str | None:
    """Why an unfinished run waits, and the command that continues it; None for a run that does not wait."""
    if not run.paused or run.finished:
        return None
    return f"Paused: {run.paused.get('reason')}. Continue with: {run.paused.get('resume')}"


def headline(run: Run) -> str:
    """The result of the run in one sentence, with its interval, whatever it is."""
    arms = run.arms
    soar = arms.get("ps") or arms.get("pq")
    other = arms.get("hard_only") or arms.get("base")
    if not arms:
        progress = f"{plural(len(run.steps), 'outer step')} and {plural(len(run.promotions), 'promotion')} so far"
        if run.finished:
            return "The run is finished, but nothing was measured on the held-out problems."
        return f"Unfinished: {progress}; nothing has been measured on the held-out problems yet."
    start = "Held-out" if run.finished else f"Unfinished ({plural(len(run.steps), 'outer step')} so far). Held-out"
    who = "SOAR's promoted student" if "ps" in arms else "a fresh student on SOAR's promotion questions (PQ)"
    if soar is None:
        found = [f"{arm_name(a.name)} {with_interval(a, min(a.pass_at))}" for a in arms.values()]
        k = min(k for a in arms.values() for k in a.pass_at)
        return f"{start} pass@{k}: {', '.join(found)}; no arm of SOAR (PS, PQ) was measured."
    if other is None:
        k = min(soar.pass_at)
        return f"{start} pass@{k}: {who} {with_interval(soar, k)}; there is no other arm to compare it with."
    shared = sorted(set(soar.pass_at) & set(other.pass_at))
    if not shared:
        return f"{start}: the arms have no pass@k in common, so they cannot be compared."
    k = shared[0]
    if is_base(run, soar):
        who = "PS, the base model since no student was promoted,"
    return (
        f"{start} pass@{k}: {who} {with_interval(soar, k)} against {with_interval(other, k)} for "
        f"{arm_name(other.name)}{'' if is_base(run, soar) else budget(soar, other)}: {comparison(run, soar, other, k)}."
    )


def remarks(run: Run) -> list[str]:
    """Sentences below the headline: the largest k, PQ, and what the figures do not show."""
    arms = run.arms
    lines: list[str] = []
    other = arms.get("hard_only") or arms.get("base")
    for name in ("ps", "pq"):
        arm = arms.get(name)
        shared = sorted(set(arm.pass_at) & set(other.pass_at)) if arm and other else []
        in_headline = name == "ps" or "ps" not in arms
        for k in sorted({*shared[:1], *shared[-1:]} - set(shared[:1] if in_headline else [])):
            assert arm is not None and other is not None
            lines.append(
                f"{arm_name(name)} at pass@{k}: {with_interval(arm, k)} against {with_interval(other, k)} for "
                f"{arm_name(other.name)}{'' if is_base(run, arm) else budget(arm, other)}: "
                f"{comparison(run, arm, other, k)}."
            )
    if "ps" in arms and is_base(run, arms["ps"]):
        lines.append("No student was promoted, so PS is the base model itself.")
    if "pq" in arms and arms["pq"].search_rollouts:
        lines.append(
            f"PQ's own training took {whole(arms['pq'].student_rollouts)} student rollouts. The loop that found its "
            f"questions took {arms['pq'].search_rollouts:,} more; where budgets are compared here, both are counted."
        )
    if ("ps" in arms or "pq" in arms) and "hard_only" not in arms:
        lines.append("Hard-Only was not measured, so nothing here tells SOAR from ordinary training.")
    if any(interval == (0.0, 0.0) for arm in arms.values() for interval in arm.interval.values()):
        lines.append(
            "An arm that solved no problem at all gets the interval [0, 0], because resampling has nothing to vary; "
            "its true share can still be above 0."
        )
    if any(arm.interval for arm in arms.values()):
        lines.append(
            "Intervals are 95\u00a0% and cover the choice of held-out problems. This is one run with one seed: "
            "how much another seed would change the result is not in them."
        )
    return lines


def plural(n: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
