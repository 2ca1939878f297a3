"""A run in words: figures as text, and what can honestly be said about its result, worded in one place. Needs no torch."""

import json
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from soar.files import Row, asset, visible
from soar.report.runs import Arm, Run, count, mapping, number, numbers

TEMPLATES = Path(__file__).parent.parent / "templates"
NBSP = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"
MAX_TEXT, MAX_LINE = 1000, 300  # characters of one question or answer, on a page and on a line of a terminal
OURS = ("ps", "pq", "teacher_t")  # what a run of SOAR gives

ARMS: dict[str, list[str]] = asset("arms")
"""Name -> as the paper or its source writes it, and what it is, in the order of tables and charts."""
ARM_MEANINGS = {name: meaning for name, (_, meaning) in ARMS.items()}


def templates() -> Environment:
    """The templates, which fail on a value that is not there. What could hide or reorder text is made visible, and in pages
    everything is escaped. Filters: functions of this file, `json` and `pretty` (JSON text), and `form`, Python's format.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default_for_string=False),
        finalize=lambda v: visible(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    every = (arm_name, count, decimal, duration, number, one_line, percent, shorten, signed, tokens, visible, whole)
    own = {"form": format, "json": json.dumps, "pretty": partial(json.dumps, indent=2, ensure_ascii=False)}
    environment.filters |= {function.__name__: function for function in (*every, repr, with_interval)} | own
    return environment


def fill(template: str, /, **values: Any) -> str:
    """A text from `templates/TEMPLATE`, without a last line end."""
    return templates().get_template(template).render(values).removesuffix("\n")


def shorten(text: object) -> str:
    """At most MAX_TEXT characters of a text, and how many were left out."""
    shown = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    left_out = len(shown) - MAX_TEXT
    return shown if left_out <= 0 else f"{shown[:MAX_TEXT]} \u2026 ({left_out:,} more characters)"


def one_line(text: object, limit: int = MAX_LINE) -> str:
    """Text that a model wrote, on one line, at most `limit` characters."""
    shown = " ".join(str(text)[: 4 * limit].split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}\u2026"


def signed(value: object) -> str:
    """`+0.0123`; a dash for what is no number."""
    size = number(value)
    return DASH if size is None else f"{size:+.4f}"


def arm_name(name: str) -> str:
    """The arm's name as the paper writes it; an arm that it does not have keeps its own."""
    return ARMS.get(name, (name, ""))[0]


def percent(share: float | None, digits: int | None = None) -> str:
    """0.123 -> `12.3 %`. Shares below one per cent get a second digit. None is a dash."""
    if share is None:
        return DASH
    digits = percent_digits(share) if digits is None else digits
    return f"{100 * share:z.{digits}f}{NBSP}%".replace("-", MINUS)


def percent_digits(share: float, interval: Sequence[float] = ()) -> int:
    """Decimals of a share shown in per cent: two when it, or the upper end of a 0 %'s interval, is below 1 %."""
    size = abs(share) or max(map(abs, interval), default=0.0)
    return 2 if 0 < size < 0.01 else 1


def bounds(interval: Sequence[float], digits: int) -> str:
    """(0.091, 0.155) -> `[9.1, 15.5]`."""
    return "[{:z.{d}f},\u00a0{:z.{d}f}]".format(*(100 * x for x in interval), d=digits).replace("-", MINUS)


def share_within(share: float, interval: Sequence[float]) -> str:
    """`12.3 % [9.1, 15.5]`; the share alone where there is no interval."""
    digits = percent_digits(share, interval)
    return f"{percent(share, digits)} {bounds(interval, digits)}" if interval else percent(share, digits)


def with_interval(arm: Arm, k: int) -> str:
    """`12.3 % [9.1, 15.5]` for one arm's pass@k; a dash where it has none."""
    return share_within(arm.pass_at[k], arm.interval.get(k, ())) if k in arm.pass_at else DASH


def held_out(arm: Arm) -> str:
    """An arm's pass@k at the smallest and the largest k."""
    ends = dict.fromkeys([min(arm.pass_at), max(arm.pass_at)] if arm.pass_at else [])
    return f"{arm_name(arm.name)}: " + ", ".join(f"pass@{k} {with_interval(arm, k)}" for k in ends)


def whole(value: object) -> str:
    """A count with thousands separators; a dash for anything that is no number."""
    result = count(value)
    return DASH if result is None else f"{result:,}"


def decimal(value: object, digits: int = 4) -> str:
    """A number with so many decimals; a dash for anything that is no number."""
    result = number(value)
    return DASH if result is None else f"{result:z.{digits}f}".replace("-", MINUS)


def duration(seconds: object) -> str:
    """Seconds as `0:03:20`, fewer than a minute as `42.0 s`; a dash for anything that is no number."""
    value = number(seconds)
    if value is None:
        return DASH
    return f"{value:.1f}{NBSP}s" if value < 60 else str(timedelta(seconds=round(min(value, 1e12))))


def tokens(value: object) -> str:
    """Tokens as `12.3 M`, fewer than a million in full; a dash for anything that is no number."""
    many = count(value)
    return whole(value) if many is None or many < 1e6 else f"{many / 1e6:,.1f}{NBSP}M"


def plural(n: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def gap(run: Run, arm: Arm, other: Arm, k: int) -> tuple[str, float, float]:
    """(words, low, high) of pass@k of `arm` minus `other`: the paired difference, else the gap between their intervals."""
    by_k = mapping(mapping(run.summary.get("paired")).get(f"{arm.name} - {other.name}"))
    entry = mapping(by_k.get(str(k)))
    difference, interval = number(entry.get("difference")), numbers(entry.get("interval_95"))
    if difference is not None and len(interval) == 2:
        digits = percent_digits(difference)
        points = f"{100 * difference:+.{digits}f} percentage points {bounds(interval, digits)}"
        return points.replace("-", MINUS), interval[0], interval[1]
    if k not in arm.interval or k not in other.interval:
        return "there are no intervals", 0.0, 0.0
    low, high = arm.interval[k][0] - other.interval[k][1], arm.interval[k][1] - other.interval[k][0]
    return f"the 95{NBSP}% intervals {'do not overlap' if low > 0 or high < 0 else 'overlap'}", low, high


def said(gap: tuple[str, float, float], better: str, worse: str) -> str:
    """What can be said of a `gap`."""
    words, low, high = gap
    return f"{words}, so {better if low > 0 else worse if high < 0 else 'this run does not show a difference'}"


def rivals(run: Run) -> tuple[Arm | None, Arm | None, int]:
    """SOAR's best measured output (OURS), the best arm without its search, and the smallest k that all these have."""
    nothing = count(run.summary.get("promotions")) == 0  # so PS is the base model: nothing of SOAR is in it
    ours = [arm for arm in run.arms.values() if arm.name in OURS and not (nothing and arm.name == "ps")]
    others = [arm for arm in run.arms.values() if not arm.name.startswith(OURS)]  # pq_sample is no rival of pq
    others = [arm for arm in others if arm.name != "base"] or others
    measured = [set(arm.pass_at) for arm in ours + others]
    k = min(set.intersection(*measured) or set.union(*measured)) if measured else 1
    with_k = ([arm for arm in some if k in arm.pass_at] for some in (ours, others))
    best, best_other = (max(some, key=lambda arm: arm.pass_at[k], default=None) for some in with_k)
    return best, best_other, k


def _about(arm: Arm, k: int, meaning: bool = False) -> str:
    """`52.1 % [45.0, 60.2] for PQ (12.3 M generated tokens)`."""
    cost = plural(arm.rollouts, "student rollout") if arm.rollouts else ""  # with the search for it
    cost = f"{tokens(arm.total_tokens)} generated tokens" if arm.total_tokens else cost
    shown = "; ".join(filter(None, [ARM_MEANINGS.get(arm.name, "") if meaning else "", cost]))
    return f"{with_interval(arm, k)} for {arm_name(arm.name)}{f' ({shown})' if shown else ''}"


def headline(run: Run) -> str:
    """The result of the run in one sentence: SOAR's best output against the best arm without it, whatever it is."""
    arms, steps = run.arms, plural(len(run.steps), "outer step")
    if not arms:
        done = f"Unfinished: {steps} and {plural(len(run.promotions), 'promotion')} so far"
        done = "The screening is finished, and its table in table.txt" if run.state == "finished" else done
        return f"{'The run is finished' if run.finished else done}; nothing was measured on the held-out problems."
    ours, other, k = rivals(run)
    start = f"{'' if run.finished else f'Unfinished ({steps} so far). '}Held-out pass@{k}: "
    if ours is None:
        shares = ", ".join(f"{arm_name(a.name)} {with_interval(a, k)}" for a in arms.values() if k in a.pass_at)
        why = "no student was promoted, so PS is the base model" if "ps" in arms else "no arm of SOAR was measured"
        return f"{start}{shares}; {why}."
    if other is None:
        return f"{start}{_about(ours, k, True)}; there is no other arm to compare it with."
    times = ours.total_tokens / other.total_tokens if ours.total_tokens and other.total_tokens else 1.0
    more = f", with {times:.1f} times the tokens" if times >= 1.1 else ""
    verdict = said(gap(run, ours, other, k), f"SOAR is ahead in this run{more}", "SOAR is behind in this run")
    return f"{start}{_about(ours, k, True)} against {_about(other, k)}: {verdict}."


def remarks(run: Run) -> list[str]:
    """Sentences below the headline: what the figures do not show."""
    arms, lines = run.arms, list[str]()
    if any(name in arms for name in OURS) and "hard_only" not in arms:
        lines.append("Hard-Only was not measured, so nothing here tells SOAR from ordinary training.")
    if "teacher_t" in arms and "base_t" in arms:
        k = rivals(run)[2]
        about = " against ".join(_about(arms[name], k) for name in ("teacher_t", "base_t"))
        worth = said(gap(run, arms["teacher_t"], arms["base_t"], k), "it paid", "it cost more than it brought")
        lines.append(f"What the teacher's training was worth: pass@{k} {about}: {worth}.")
    if any(arm.interval for arm in arms.values()):
        what = "the choice of held-out problems, not that of the seed and of each side's best arm"
        lines.append(f"Intervals are 95{NBSP}% and cover {what}.")
    return lines


def why_nothing(run: Run) -> list[str]:
    """Why SOAR is not ahead in this run, as far as its alarms and events say; nothing for a run where it is."""
    ours, other, k = rivals(run)
    if ours is not None and other is not None and gap(run, ours, other, k)[1] > 0:
        return []
    alarms: dict[object, str] = {}  # the first of each kind, in screening and later, and of each arm
    for row in run.events.get("alarm", []):
        alarms.setdefault((str(row.get("kind")), row.get("step") is None, str(row.get("arm"))), str(row.get("message")))
    lines = [f"{message[:1].upper()}{message[1:300]}." for message in [*alarms.values()][:8]]
    windows, tau = numbers([step.get("window_mean") for step in run.steps]), run.setting("promotion", "tau")
    if windows and tau is not None and not run.promotions:
        best = f"the mean reward of a window was {max(windows):+.4f} at best"
        lines.append(f"No student was promoted: {best}, and a promotion takes more than tau = {tau:g}.")
    signals = dict[str, set[bool]]()
    for row in run.events.get("arm_step", []):
        signals.setdefault(str(row.get("arm")), set()).add(number(row.get("frac_reward_zero_std")) != 1.0)
    if still := ", ".join(arm_name(name) for name, seen in signals.items() if not any(seen)):
        lines.append(f"{still} never saw a group with unequal rewards, so there was nothing to learn from.")
    return lines


def now_line(run: Run) -> str:
    """What a run at work is doing and how long that still takes, as it noted itself; else nothing."""
    if run.state != "at work" or not run.now:
        return ""
    line = f"{run.now.get('task')}: {whole(run.now.get('done'))} of {whole(run.now.get('total'))}"
    return line if number(run.now.get("left")) is None else f"{line}, about {duration(run.now['left'])} left"


def extremes(rows: Sequence[Row]) -> list[tuple[str, float, list[Row]]]:
    """(`best` or `worst`, reward, its rows) of the datasets that earned most and least; one where all earned alike."""
    rewarded = [row for row in rows if number(row.get("reward")) is not None]
    ends = [pick(rewarded, key=lambda row: row["reward"]) for pick in (max, min) if rewarded]
    names = ("best", "worst") if ends and ends[0]["reward"] > ends[1]["reward"] else ("alike",)
    same = [[row for row in rewarded if count(row.get("dataset")) == count(end.get("dataset"))] for end in ends]
    return [(name, end["reward"], some) for name, end, some in zip(names, ends, same, strict=False)]


def changes(steps: Sequence[Row]) -> str:
    """How the questions of the last outer step (of `page.step_rows`) differ from those of the first; nothing of one step."""
    if len(steps) < 2:
        return ""
    first, last = steps[0], steps[-1]
    named = {"distinct_share": "different from each other", "well_posed": "well-posed", "correct": "answered correctly"}
    both = [key for key in named if None not in (first[key], last[key])]
    parts = [f"{named[key]} {percent(first[key])} \u2192 {percent(last[key])}" for key in both]
    if first["vendi"] and last["vendi"]:
        parts.append(f"as diverse as {first['vendi']:.1f} \u2192 {last['vendi']:.1f} unrelated questions")
    return f"From step {first['step']} to step {last['step']}: {', '.join(parts)}." if parts else ""


def result_table(result: Row, width: int | None = None, asked: Sequence[int] = ()) -> str:
    """The arms of a summary with its promotions, or what `soar eval` measured: pass@k with its interval, differences below.

    Rollouts with those of the search, differences at the smallest k. asked: the k to show (none: all). Where `width` has no
    room for them, the smallest and the largest alone.
    """
    rows = result["arms"] if "arms" in result else result["policies"]
    ks, names = sorted(asked or {int(k) for row in rows.values() for k in row["pass_at"]}), max([14, *map(len, rows)])
    if width is not None and names + 14 + 25 * len(ks) > width:
        ks = sorted({*ks[:1], *ks[-1:]})
    return fill("table.txt", result=result, rows=rows, names=f"{names}s", ks=list(map(str, ks)))
