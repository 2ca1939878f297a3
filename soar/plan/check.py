"""Whether a run can work: the findings of `soar check`; those without the model begin `soar run --dry-run` too.

Nothing is trained: the teacher's samples are those of the untrained model, as its first outer step will be. Torch is
imported only for the model.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from soar import seeds
from soar.config import FEWEST_HARD, Config
from soar.domains.candidates import HIDDEN, candidates
from soar.files import Row, asset, clipped, scrub, visible
from soar.plan.forecast import forecast
from soar.problems.domain import domain_of
from soar.problems.pool import open_pool
from soar.problems.verify import gold_kind
from soar.report.page import OUTCOMES
from soar.report.text import fill
from soar.types import Problem, Rejection, UserError, Verdict, columns_of

if TYPE_CHECKING:
    from soar.loop.rollout import RolloutEnv

GOLDS = 2000  # gold answers that are checked at most, spread over the file ...
GOLD_SECONDS, GOLD_BATCH = 25.0, 20  # ... and for how long, so that a check of a large file stays under a minute
TEACHER_SECONDS, STUDENT_SECONDS = 30.0, 40.0
ASKED, ATTEMPTS, SHOWN = 24, 4, 5  # problems that the student is asked, how often, attempts that are shown
LISTED = 10
LOW_RATE, ENOUGH = 0.1, 16  # share of accepted teacher texts that is little; texts without a problem that count as a no
HINTS = asset("hints")  # why a teacher text is no problem -> what to do


class Finding(NamedTuple):
    """A line of the report, and what to do. status: ok; warning: worse or dearer than it might be; unknown: no time; FAIL."""

    name: str
    status: str
    message: str
    advice: str = ""
    details: tuple[str, ...] = ()
    counts: Mapping[str, int] = {}  # of attempts, by what came of them

    def lines(self) -> list[str]:
        """As text for a terminal, with no secret in it and nothing that could move the cursor."""
        more = [f"{'':21s}{line}" for text in self.details for line in text.split("\n")]
        more += [f"{'':21s}-> {line}" for line in self.advice.split("\n") if line]
        return [visible(scrub(line)) for line in [f"{self.status:8s} {self.name:11s} {self.message}", *more]]


def status_of(fails: object, warns: object = False) -> str:
    """FAIL, warning or ok."""
    return "FAIL" if fails else "warning" if warns else "ok"


def can_work(findings: Sequence[Finding]) -> bool | None:
    """Whether nothing failed; None where that was not found out."""
    statuses = {finding.status for finding in findings}
    return False if "FAIL" in statuses else None if "unknown" in statuses else True


def summary(findings: Sequence[Finding]) -> str:
    """The last line: yes, no or unknown, and how much there is to mend."""
    names = {status: [f.name for f in findings if f.status == status] for status in ("FAIL", "warning", "unknown")}
    noted = f" (warnings: {', '.join(names['warning'])})" if names["warning"] else ""
    if names["FAIL"]:
        return f"no: mend {', '.join(names['FAIL'])} before a run can work{noted}"
    if names["unknown"]:
        return f"unknown: too little was seen of {' and '.join(names['unknown'])} to say whether a run can work{noted}"
    return f"yes: a run can work{noted}"


def failed(name: str, error: Exception) -> Finding:
    """The finding for an error that a user can mend; its message says how."""
    first, *rest = str(error).split("\n")
    return Finding(name, "FAIL", first, details=tuple(rest))


def check_all(config: Config, samples: int, say: Callable[[str], None], no_model: bool = False) -> Iterator[Finding]:
    """Findings about the data, and of the model unless they fail or no_model; say: told before what takes time."""
    problems = yield from check_data(config)
    if problems and not no_model:
        yield from check_model(config, problems, max(1, samples), say)


def check_data(config: Config) -> Generator[Finding, None, list[Problem]]:
    """Findings about problems, plan, domain and gold answers; returns the problems, none where a finding fails."""
    finding, problems = check_problems(config)
    findings, steps, window = [finding], config.teacher.steps, config.promotion.window
    if 0 < steps < window:
        message = f"promotion.window = {window} is more than teacher.steps = {steps}: no student can ever be promoted"
        findings.append(Finding("plan", "FAIL", message, "raise teacher.steps, or lower promotion.window"))
    yield from findings
    if problems and can_work(findings):
        yield (golds := check_golds(config, problems))
        findings.append(golds)
    return problems if can_work(findings) else []


def check_problems(config: Config) -> tuple[Finding, list[Problem]]:
    """Load the candidates: what was read, which columns, and every row that is left out with file and line."""
    try:
        loaded = candidates(config)
    except UserError as error:
        return failed("problems", error), []
    count, asked = len(loaded.problems), config.reward.questions
    first, *details = loaded.report.lines()
    advice = "mend the rows that are left out, or go on without them" if loaded.report.dropped else ""
    if HIDDEN in loaded.report.notes:
        advice = "let a domain put them in, as examples/multiple_choice.py:DOMAIN does (docs/domains.md)"
    if count < FEWEST_HARD:
        advice = f"a run needs at least {FEWEST_HARD} hard problems: give more"
    elif count < 2 * asked and not advice:
        coarser = f"the training half is smaller than reward.questions = {asked}, so rewards are coarser"
        advice = f"{coarser}: give {2 * asked} hard problems or more, or lower reward.questions"
    return Finding("problems", status_of(count < FEWEST_HARD, advice), first, advice, tuple(details)), loaded.problems


def check_golds(config: Config, problems: Sequence[Problem]) -> Finding:
    """Grade every gold answer against itself: the verifier must find it correct, or no attempt ever will be."""
    asked = problems[:: -(-len(problems) // GOLDS)]
    limit, verdicts = time.monotonic() + GOLD_SECONDS, list[Verdict]()
    try:
        domain = domain_of(config.problems)
        with open_pool(domain, config.problems) as pool:
            for first in range(0, len(asked), GOLD_BATCH):
                if first and time.monotonic() > limit:
                    break
                batch = asked[first : first + GOLD_BATCH]
                verdicts += pool.check_golds([problem.answer for problem in batch], columns_of(batch))
            asked = asked[: len(verdicts)]
            bad = [(problem, verdict) for problem, verdict in zip(asked, verdicts, strict=True) if not verdict.solved]
            faults = pool.faults([problem for problem, _ in bad[:LISTED]])
    except UserError as error:
        return failed("golds", error)
    checked, good = len(asked), len(asked) - len(bad)
    texts = [problem for problem in asked if gold_kind(problem.answer, domain.label) == "text"]
    found: Row = {"good": good, "checked": checked, "bad": bad, "texts": texts, "config": config}
    found |= {"listed": list(zip(bad, faults, strict=False)), "most": LISTED, "domain": domain, "pool": pool}
    message, *details = fill("check/golds.txt", **found).split("\n")
    good -= 0 if config.screen.text_golds else len(texts)
    every = checked == len(problems)
    fails = good * len(problems) < FEWEST_HARD * checked  # as many of all as of those that were checked
    advice = [] if every else ["`soar verify FILE --golds` checks all"]
    if fails:
        advice = ["choose another problems.verifier (number, exact, choice, your own) or domain, or mend the answers"]
    elif bad:
        advice = ["unscorable ones are left out, the others can never be solved: mend them or change the verifier"]
    if bad and not pool.compares:
        advice += ["a function gets them boxed or behind `Answer:`; other marks need a domain (docs/bring.md)"]
        advice += ["where a lower score is right, lower problems.success_at"] if Verdict.WRONG in verdicts else []
    return Finding("golds", status_of(fails, advice), message, "; ".join(advice), tuple(details))


def check_model(
    config: Config, problems: Sequence[Problem], samples: int, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Findings of a config's model, one by one as they are made. say: told before what takes time."""
    say(f"loading torch and {config.model.path}")
    from soar.run.setup import open_env

    name = "model"
    try:
        with open_env(config) as env:
            size, base = sum(p.numel() for p in env.backbone.model.parameters()), env.backbone
            ends = ", ".join(map(repr, base.tokenizer.convert_ids_to_tokens(sorted(base.end_ids))))
            about = f"{size:,} parameters, {str(base.dtype).removeprefix('torch.')} on {base.device}"
            yield Finding("model", "ok", f"{config.model.path}: {about}; completions end at {ends}")
            env.share(problems)
            say(f"asking the model {min(ASKED, len(problems))} problems, {ATTEMPTS} times each")
            name = "student"
            yield student_finding(env, config, problems)
            if config.teacher_writes:
                say(f"asking the teacher for {samples} problems")
                name = "teacher"
                yield teacher_finding(env, config, samples)
            yield Finding("cost", "ok", f"the whole run: {forecast(config).total_line()} (more: soar run --dry-run)")
    except UserError as error:
        yield failed(name, error)


class TimeOver(Exception):
    """A model call that would have lasted too long."""


def in_time(env: "RolloutEnv", seconds: float, wanted: int, call: Callable[[int, int], list[Any]]) -> list[Any]:
    """What call(first, count) returns in doubling waves, until there are `wanted`; the wave of the deadline is dropped."""
    rows, wave, deadline = list[Any](), 1, time.monotonic() + seconds

    def look(*_: object) -> None:
        if time.monotonic() > deadline:
            raise TimeOver

    handle = env.backbone.model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        with suppress(TimeOver):
            while len(rows) < wanted:
                rows += call(len(rows), min(wave, wanted - len(rows)))
                wave *= 2
                look()
    finally:
        handle.remove()
    return rows


def student_finding(env: "RolloutEnv", config: Config, problems: Sequence[Problem]) -> Finding:
    """What the model makes of some of the problems: why attempts earn nothing, and five of them."""
    from soar.loop.rollout import keep
    from soar.run.screen import what_fits

    sampling, seed = config.student.sampling, seeds.derive(config.seed, "check", "student")
    fitting = [problem for problem in problems if env.room(problem, sampling)]
    left_out, context = len(problems) - len(fitting), f"do not fit in the context of {env.backbone.context:,} tokens"
    if len(fitting) < FEWEST_HARD:
        message = f"{left_out:,} of {len(problems):,} problems {context}"
        return Finding("student", "FAIL", message, "lower student.sampling.max_tokens, or take another model")
    asked, before = fitting[:: max(1, len(fitting) // ASKED)][:ASKED], env.tokens

    def attempts(first: int, count: int) -> list[list[Row]]:
        part = asked[first : first + count]
        batch = env.rollout(None, [part], ATTEMPTS, [seed], sampling)
        rows = keep(env, batch, n=len(batch.verdicts))
        return [rows[i : i + ATTEMPTS] for i in range(0, len(rows), ATTEMPTS)]

    rows = in_time(env, STUDENT_SECONDS, len(asked), attempts)
    if not rows:
        message = f"no attempt ended within {STUDENT_SECONDS:.0f} s"
        return Finding("student", "unknown", message, "lower student.sampling.max_tokens, or use a GPU")
    flat = [row[n] for n in range(ATTEMPTS) for row in rows]  # other problems first
    outcomes, count = Counter(row["outcome"] for row in flat), len(flat)
    correct, main = outcomes.pop("right", 0), (outcomes.most_common(1) or [("wrong", 0)])[0][0]
    main = "refused" if outcomes["refused"] else main  # one alone says that the verifier errs
    hopeless = not correct and count >= ENOUGH and (main == "refused" or outcomes[main] > 0.9 * count)
    cause, advice = OUTCOMES[main]
    fits, advice = (what_fits(config, correct / count, count), "") if cause == "difficulty" else ("", advice)
    flat.sort(key=lambda row: (row["outcome"] == "right", row["outcome"] != main))  # first those that earned nothing
    found: Row = {"correct": correct, "count": count, "wanted": ATTEMPTS * len(asked), "seconds": STUDENT_SECONDS}
    found |= {"outcomes": outcomes.most_common(), "sampled": env.tokens - before, "left_out": left_out}
    found |= {"shown": flat[:SHOWN], "context": context, "error": env.verifier.last_error}
    message, *details = fill("check/student.txt", causes=OUTCOMES, clipped=clipped, **found).split("\n")
    counts = {"correct": correct, **outcomes}
    return Finding("student", status_of(advice and hopeless, advice), message, advice or fits, tuple(details), counts)


def teacher_finding(env: "RolloutEnv", config: Config, samples: int) -> Finding:
    """Share of teacher texts that are problems, what an accepted one costs, and why the others are not."""
    from soar.engine.rollouts import Request
    from soar.loop.write import read_pairs, teacher_prompt, vote

    teacher, seed, before = config.teacher, seeds.derive(config.seed, "check", "teacher"), env.tokens
    prompt = teacher_prompt(env, config)

    def pairs(first: int, count: int) -> list[Any]:
        rollouts = env.draw(None, Request([[prompt]], count, [[seeds.skip(seed, first)]], teacher.sampling))
        written = read_pairs(env, config, rollouts.texts(env.backbone), rollouts.ended_B.tolist())
        return vote(env, config, written, seeds.skip(seed, first), {})

    outcomes = in_time(env, TEACHER_SECONDS, samples, pairs)
    rejections = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    sampled, accepted = len(outcomes), len(outcomes) - len(rejections)
    hint = "too slow here to say: lower teacher.sampling.max_tokens, or use a GPU"
    if reasons := Counter(rejection.name for rejection in rejections).most_common():
        name = reasons[0][0]
        hint = HINTS.get(name, f"the domain refuses its problems ({name}): say in the teacher prompt what is asked for")
    found: Row = {"accepted": accepted, "sampled": sampled, "wanted": samples, "seconds": TEACHER_SECONDS}
    found |= {"needed": teacher.datasets * teacher.questions, "tokens": env.tokens - before, "reasons": reasons}
    message, *details = fill("check/teacher.txt", rejections=rejections, **found).split("\n")
    if not accepted:
        status = "unknown" if sampled < min(samples, ENOUGH) else "FAIL"
        return Finding("teacher", status, message, hint, tuple(details))
    written = [outcome for outcome in outcomes if isinstance(outcome, Problem)][:SHOWN]
    asked = () if env.verifier.compares else ([p.answer for p in written], columns_of(written, env.shared))
    if asked and not any(verdict.judged for verdict in env.verifier.check_golds(*asked)):
        hint = f"the verifier judges none of them ({env.verifier.last_error or 'it gives None'}); they have "
        hint += "those columns of the file that are equal in all rows: give the function a default for the others"
        return Finding("teacher", "FAIL", message, hint, tuple(details))
    if (each := sampled / accepted) > teacher.max_tries:
        hint = f"an outer step would end without its pairs (teacher.max_tries = {teacher.max_tries}): {hint}"
    status = status_of(each > teacher.max_tries, accepted / sampled < LOW_RATE)
    return Finding("teacher", status, message, hint if status != "ok" else "", tuple(details))
