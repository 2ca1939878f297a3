"""A run in words: figures as text, and what can honestly be said about its result. Needs no torch.

Used by the report page and by anything else that has to state the result, so that it is worded in one place.
"""

from __future__ import annotations

from collections.abc import Sequence

from soar.files import Row
from soar.report.runs import Arm, Run, count, mean, number, numbers

NBSP = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"
SAME_COST = 0.05  # two costs that differ by less are called the same
CUT_OFF = 0.5  # completions cut off above which that is why nothing was learned
OURS = ("ps", "pq")  # what a run of SOAR gives

ARMS = {
    "base": ("Base", "the model before any training"),
    "hard_only": ("Hard-Only", "trained on the hard problems alone"),
    "hard_only_128": ("Hard-Only, groups of 128", "as Hard-Only, 128 attempts at each problem of a step"),
    "likelihood": ("Likelihood", "as Hard-Only, paid by the likelihood of the gold answer after its reasoning"),
    "hinted": ("Hinted", "as Hard-Only, with a hint while a group is all wrong"),
    "solvable": ("Solvable", "trained on candidates that are sometimes solved, then on the hard problems"),
    "ps": ("PS", "the promoted student of the SOAR loop"),
    "ps_hard": ("PS + hard", "the promoted student, trained on the hard problems from there"),
    "pq": ("PQ", "a fresh student, trained on the promotion questions and the hard problems"),
    "pq_sample": ("PQ sample", "as PQ, with a random part of the questions"),
    "pq_well_posed": ("PQ well-posed", "as PQ, with as many well-posed questions"),
    "pq_correct": ("PQ correct", "as PQ, with as many correctly answered questions"),
    "base_t": ("Base-T", "a fresh student, trained on questions of the untrained teacher and the hard problems"),
    "teacher_t": ("Teacher-T", "a fresh student, trained on questions of the trained teacher and the hard problems"),
    "real": ("Real", "a fresh student, trained on easier real problems and the hard problems"),
}
"""Name -> (as the paper or its source writes it, what it is), in the order of tables and charts."""
ARM_MEANINGS = {name: meaning for name, (_, meaning) in ARMS.items()}

GLOSSARY = {
    "pass@k": "share of problems that at least one of k attempts solves",
    "rollout": "one completion by a student: an attempt at a problem",
    "tokens": "all tokens generated for an arm: training, the search for its questions, students that were thrown away",
    "group": "the attempts at one problem in one training step; they are compared with each other",
    "outer step": "the teacher writes datasets, a student is trained on each and measured on hard problems",
    "baseline": "the student that new ones start from and are compared with; at first the base model",
    "promotion": "the best student of a step becomes the baseline, its questions the promotion questions (PQ)",
    "tau": "the threshold that the mean reward of the last steps has to exceed for a promotion",
    "reward": "what a dataset earns: its students' pass rate on hard problems minus the baseline's",
    "KL": "how far the teacher has moved from the base model, in nats per token",
    "Vendi score": "as diverse as so many unrelated questions, by their wording",
}


def arm_name(name: str) -> str:
    """The arm's name as the paper writes it; an arm that it does not have keeps its own."""
    return ARMS.get(name, (name, ""))[0]


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


def tokens(value: object) -> str:
    """Tokens as `12.3 M`, fewer than a million in full; a dash for anything that is no number."""
    many = count(value)
    return whole(value) if many is None or many < 1e6 else f"{many / 1e6:,.1f}{NBSP}M"


def plural(n: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def cost(arm: Arm) -> str:
    """What an arm took, the search for it included: tokens, else rollouts of students; nothing when unknown or nothing."""
    if arm.total_tokens:
        return f"{tokens(arm.total_tokens)} generated tokens"
    return plural(arm.rollouts, "student rollout") if arm.rollouts else ""


def cost_ratio(arm: Arm, other: Arm) -> float | None:
    """Cost of `arm` over that of `other`, searches included; 1 within SAME_COST, None when unknown."""
    pairs = ((arm.total_tokens, other.total_tokens), (arm.rollouts, other.rollouts))
    a, b = next(((a, b) for a, b in pairs if a is not None and b), (None, 0))
    if a is None:
        return None
    return 1.0 if abs(a - b) <= SAME_COST * max(a, b) else a / b


def is_base(run: Run, arm: Arm) -> bool:
    """Whether the arm is PS of a run that promoted no student, which is the base model: nothing of SOAR is in it."""
    return arm.name == "ps" and count(run.summary.get("promotions")) == 0


def gap(run: Run, arm: Arm, other: Arm, k: int) -> tuple[str, float, float] | None:
    """(words, low, high) of pass@k of `arm` minus `other`: the paired difference, else the gap between their intervals.

    The paired entry is `summary["paired"]["<arm> - <other>"][k] = {"difference": d, "interval_95": [low, high]}`.
    """
    entry: object = run.summary.get("paired")
    for key in (f"{arm.name} - {other.name}", str(k)):
        entry = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(entry, dict):
        difference, interval = number(entry.get("difference")), numbers(entry.get("interval_95"))
        if difference is not None and len(interval) == 2:
            digits = percent_digits(difference)
            points = f"{100 * difference:+.{digits}f} percentage points {bounds((interval[0], interval[1]), digits)}"
            return points.replace("-", MINUS), interval[0], interval[1]
    if k not in arm.interval or k not in other.interval:
        return None
    low, high = arm.interval[k][0] - other.interval[k][1], arm.interval[k][1] - other.interval[k][0]
    return f"the 95{NBSP}% intervals {'do not overlap' if low > 0 or high < 0 else 'overlap'}", low, high


def comparison(run: Run, arm: Arm, other: Arm, k: int) -> str:
    """What can be said about `arm` against `other` at pass@k, and at what ratio of costs."""
    between = gap(run, arm, other, k)
    if between is None:
        return "without intervals nothing can be said about the difference"
    words, low, high = between
    if low <= 0 <= high:
        return f"{words}, so this run does not show a difference"
    if is_base(run, arm):
        return (
            f"{words}, so {arm_name(other.name)} is {'below' if low > 0 else 'above'} the untrained model in this run"
        )
    if other.name == "base":
        return f"{words}, so SOAR is {'above' if low > 0 else 'below'} the untrained model in this run"
    ratio = cost_ratio(arm, other)
    times = "" if ratio == 1 else ", at unknown costs" if ratio is None else f", at {ratio:,.2g} times the cost"
    return f"{words}, so SOAR is {'ahead' if low > 0 else 'behind'} in this run{times}"


def rivals(run: Run) -> tuple[Arm | None, Arm | None, int]:
    """SOAR's best measured output (PS or PQ), the best arm without its search, and the smallest k that all these have."""
    arms = run.arms.values()
    ours = [arm for arm in arms if arm.name in OURS]
    others = [arm for arm in arms if not arm.name.startswith((*OURS, "teacher_t", "real"))]
    others = [arm for arm in others if arm.name != "base"] or others
    measured = [set(arm.pass_at) for arm in ours + others]
    k = min(set.intersection(*measured) or set.union(*measured)) if measured else 1
    best = [
        max((a for a in some if k in a.pass_at), key=lambda a: a.pass_at[k], default=None) for some in (ours, others)
    ]
    return best[0], best[1], k


def asked(run: Run) -> str:
    """What the run set out to find, in one sentence; what its folder does not say is left out."""
    problems, model = (s if isinstance(s := run.config.get(key), dict) else {} for key in ("problems", "model"))
    source = f" of {problems['source']}" if isinstance(problems.get("source"), str) and problems["source"] else ""
    held_out = plural(len(run.hard_test), "held-out problem") if run.hard_test else "held-out problems"
    attempts = max((count(row.get("attempts")) or 0 for row in run.hard_test), default=0)
    evidence = f", hardly or never solved in {attempts:,} attempts at each," if attempts else ""
    who = str(model.get("path") or "the model").rstrip("/").rpartition("/")[2]
    return (
        f"Asked: can {who} learn to solve {held_out}{source}{evidence} from practice questions that it writes itself?"
    )


def paused(run: Run) -> str | None:
    """Why an unfinished run waits, and the command that continues it; None for a run that does not wait."""
    if not run.paused or run.finished:
        return None
    return f"Paused: {run.paused.get('reason')}. Continue with: {run.paused.get('resume')}"


def _about(run: Run, arm: Arm, k: int, meaning: bool = False) -> str:
    """`52.1 % [45.0, 60.2] for PQ (12.3 M generated tokens)`."""
    if is_base(run, arm):
        return f"{with_interval(arm, k)} for PS, the base model since no student was promoted,"
    notes = [ARM_MEANINGS.get(arm.name, "") if meaning else "", cost(arm)]
    shown = "; ".join(filter(None, notes))
    return f"{with_interval(arm, k)} for {arm_name(arm.name)}{f' ({shown})' if shown else ''}"


def headline(run: Run) -> str:
    """The result of the run in one sentence: SOAR's best output against the best arm without it, whatever it is."""
    arms = run.arms
    if not arms and run.finished:
        return "The run is finished, but nothing was measured on the held-out problems."
    steps = plural(len(run.steps), "outer step")
    if not arms:
        progress = f"{steps} and {plural(len(run.promotions), 'promotion')} so far"
        return f"Unfinished: {progress}; nothing has been measured on the held-out problems yet."
    ours, other, k = rivals(run)
    start = f"{'' if run.finished else f'Unfinished ({steps} so far). '}Held-out pass@{k}: "
    if ours is None:
        shares = ", ".join(f"{arm_name(a.name)} {with_interval(a, k)}" for a in arms.values() if k in a.pass_at)
        return f"{start}{shares}; no arm of SOAR (PS, PQ) was measured."
    if other is None:
        return f"{start}{_about(run, ours, k, True)}; there is no other arm to compare it with."
    return f"{start}{_about(run, ours, k, True)} against {_about(run, other, k)}: {comparison(run, ours, other, k)}."


def remarks(run: Run) -> list[str]:
    """Sentences below the headline: the other output, the largest k, and what the figures do not show."""
    ours, other, k = rivals(run)
    arms, lines = run.arms, list[str]()
    for arm in (arms[name] for name in OURS if name in arms and other is not None):
        shared = sorted(set(arm.pass_at) & set(other.pass_at)) if other else []
        for at in dict.fromkeys(shared[:1] + shared[-1:]):
            if other and (arm != ours or at != k):
                pair = f"{_about(run, arm, at)} against {_about(run, other, at)}"
                lines.append(f"At pass@{at}: {pair}: {comparison(run, arm, other, at)}.")
    if "ps" in arms and is_base(run, arms["ps"]):
        lines.append("No student was promoted, so PS is the base model itself.")
    if ours is not None and "hard_only" not in arms:
        lines.append("Hard-Only was not measured, so nothing here tells SOAR from ordinary training.")
    if any(arm.interval for arm in arms.values()):
        lines.append(
            f"Intervals are 95{NBSP}% and cover the choice of held-out problems. This is one run with one seed: "
            "how much another seed would change the result is not in them."
        )
    return lines


def _share(events: Sequence[Row], key: str, part: str = "") -> float | None:
    """Mean of a figure over events, or over a part of them such as student_last."""
    rows = [row.get(part) if part else row for row in events]
    return mean(numbers([row.get(key) for row in rows if isinstance(row, dict)]))


def why_nothing(run: Run) -> list[str]:
    """Why SOAR is not ahead in this run, as far as its events say; nothing for a run where it is."""
    ours, other, k = rivals(run)
    between = gap(run, ours, other, k) if ours is not None and other is not None and not is_base(run, ours) else None
    if between is not None and between[1] > 0:
        return []
    lines = []
    arm_steps, steps, clipped = run.events.get("arm_step", []), run.steps, "completions/clipped_ratio"
    shares = {
        "the attempts in screening": _share(run.events.get("screen", []), "truncated_share"),
        "the students' completions": _share(steps, clipped, "student_last"),
        "the completions while the arms were trained": _share(arm_steps, clipped),
    }
    cut = [f"{percent(share)} of {what}" for what, share in shares.items() if share is not None and share > CUT_OFF]
    if cut:
        lines.append(
            f"Cut off by the length limit: {', '.join(cut)}; most answers were never reached. Raise "
            "student.sampling.max_tokens."
        )
    accepted = numbers([step.get("accepted") for step in steps])
    if accepted and not any(accepted):
        lines.append("No text of the teacher was accepted as a question.")
    elif steps and not any(any(numbers(step.get("reward_G"))) for step in steps):
        lines.append(f"In {plural(len(steps), 'outer step')} no dataset earned a reward other than 0.")
    windows, tau = numbers([step.get("window_mean") for step in steps]), run.setting("promotion", "tau")
    if windows and tau is not None and not run.promotions:
        lines.append(
            f"No student was promoted: the mean reward of a window was {max(windows):+.4f} at best, and a promotion takes "
            f"more than tau = {tau:g}."
        )
    still = [
        arm_name(arm)
        for arm in dict.fromkeys(str(event.get("arm")) for event in arm_steps)
        if not any(numbers([event.get("frac_mixed") for event in arm_steps if event.get("arm") == arm]))
    ]
    if still:
        lines.append(
            f"{', '.join(still)} never saw a group with right and wrong attempts, so there was nothing to learn from."
        )
    return lines


def share(row: Row, k: int) -> str:
    """pass@k of an arm with its interval, in 23 columns."""
    low, high = row["interval_95"][str(k)]
    return f"{row['pass_at'][str(k)]:6.4f} [{low:.4f}, {high:.4f}]"


def summary_lines(summary: Row, width: int | None = None) -> list[str]:
    """The arms of a summary as a small table; the smallest and the largest k alone where `width` has no room for all."""
    ks = sorted({int(k) for arm in summary["arms"].values() for k in arm["pass_at"]})
    if width is not None and 27 + 25 * len(ks) > width:
        ks = sorted({*ks[:1], *ks[-1:]})
    lines = [f"{'arm':14s} {'rollouts':>12s}  " + "  ".join(f"{'pass@' + str(k):>23}" for k in ks)]
    for arm, row in summary["arms"].items():
        lines.append(f"{arm:14s} {row['student_rollouts']:12,d}  " + "  ".join(share(row, k) for k in ks))
    for arm, row in summary["arms"].items():
        if row.get("search_rollouts"):
            what = "the student it starts from" if arm == "ps_hard" else "its questions"
            lines.append(f"{arm}: the loop that found {what} took {row['search_rollouts']:,} rollouts more")
    lines += difference_lines(summary["paired"])
    lines.append(f"promotions: {summary['promotions']} in {summary['outer_steps']} outer steps")
    return lines


def difference_lines(paired: Row) -> list[str]:
    """Differences of pass@k between two policies, at the smallest k."""
    lines = []
    for name, by_k in paired.items():
        k = min(by_k, key=int)
        low, high = by_k[k]["interval_95"]
        lines.append(f"{name}: pass@{k} difference {by_k[k]['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
    return lines


def result_lines(result: Row, ks: Sequence[int]) -> list[str]:
    """pass@k of every policy that `soar eval` measured, as a small table; differences from the base model below."""
    width = max(len(name) for name in result["policies"])
    lines = [f"{result['problems']['count']} problems, {result['attempts']} attempts each"]
    lines.append(f"{'policy':{width}s}  " + "  ".join(f"{'pass@' + str(k):>23}" for k in ks))
    for name, row in result["policies"].items():
        lines.append(f"{name:{width}s}  " + "  ".join(share(row, k) for k in ks))
    return [*lines, *difference_lines(result["paired"])]
