"""Whether a run can work (`soar check`): problems and their gold answers, then, with the model, what it makes of them.

Every check ends in a `Finding`; nothing here raises for what a user can mend. Nothing is trained: the teacher's samples
are those of the untrained model, so its first outer step will look like them. Torch is imported only for the model.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from soar import seeds
from soar.config import Config
from soar.domains.candidates import candidates
from soar.files import visible
from soar.problems.domain import domain_of
from soar.problems.load import fits_budget
from soar.problems.pool import open_pool
from soar.problems.prompts import PromptFormat, control_texts, leaked_controls
from soar.problems.verify import NAMES, gold_kind
from soar.types import Problem, Reason, Rejection, UserError, Verdict, columns_of

if TYPE_CHECKING:
    from soar.loop.rollout import RolloutEnv

GOLD_SECONDS = 25.0  # time for gold answers, so that a check of a large file stays under a minute
GOLD_BATCH = 500
TEACHER_SECONDS, STUDENT_SECONDS = 30.0, 40.0  # samples are taken in growing waves; a wave that lasts longer is dropped
FIRST_WAVE = 4
ASKED, ATTEMPTS = 24, 4  # problems that the student is asked, and how often
SHOWN = 5  # of its completions
LISTED = 10
FEWEST = 4  # hard problems that a run needs
QUESTIONS = 500  # questions that are encoded to look for control tokens
LOW_RATE = 0.1
ENOUGH = 16  # teacher texts without a problem among them that count as a no

HINTS = {
    Reason.NO_QUESTION: "it does not keep to the asked form: try another problems.format or an instruction-tuned model",
    Reason.NO_ANSWER: "it does not mark its answer: try another problems.format or an instruction-tuned model",
    Reason.TRUNCATED: "its texts do not end within the budget: raise teacher.sampling.max_tokens",
    Reason.UNPARSABLE_ANSWER: "its answers are no values for this problems.verifier: try another verifier or teacher.subject",
    Reason.TOO_LONG: "its questions leave no room for an answer: lower student.sampling.max_tokens",
    Reason.TWO_PROBLEMS: "it goes on after its first problem: try another problems.format",
    Reason.PLACEHOLDER: "it copies the example of the prompt: raise teacher.sampling.temperature or take a stronger model",
    Reason.EMPTY: "it writes nothing: check that model and tokenizer belong together",
    Reason.READER_FAILED: "the domain's own read_problem raised or took too long: mend it",
    Reason.DUPLICATE: "it writes one question over and over: raise teacher.sampling.temperature",
}
HINT_OF = {reason.value: text for reason, text in HINTS.items()}


CAUSES = {
    "verifier": "the verifier could not decide: see what `soar verify` says of them, or choose another problems.verifier",
    "stop": "it goes on after its answer, and only the end counts: set student.sampling.stop to what begins its next turn",
    "truncation": "it is cut off before an answer: raise student.sampling.max_tokens",
    "format": "it ends without an answer where it is looked for: try another problems.format or an instruction-tuned model",
    "difficulty": "its answers are read, and wrong",
}
"""Why an attempt earned nothing, and what to do."""


class Status(str, Enum):
    """OK; WARNING: a run can work, but worse or dearer than it might; UNKNOWN: there was no time to say; FAIL: it cannot."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report. fail: what to do where a run cannot work, None where it can; warning: where it could do better.

    unknown: whether a run can work was not found out. details: further lines. facts: its numbers.
    """

    name: str
    message: str
    fail: str | None = None
    warning: str = ""
    details: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    unknown: bool = False

    @property
    def status(self) -> Status:
        if self.fail is None and self.unknown:
            return Status.UNKNOWN
        return Status.FAIL if self.fail is not None else Status.WARNING if self.warning else Status.OK

    @property
    def advice(self) -> str:
        return self.fail or self.warning

    def lines(self) -> list[str]:
        """As text for a terminal, with nothing in it that could move the cursor."""
        indent = " " * 21
        more = [f"{indent}{line}" for text in self.details for line in text.split("\n")]
        more += [f"{indent}-> {self.advice}"] if self.advice else []
        return [visible(line) for line in [f"{self.status.value:8s} {self.name:11s} {self.message}", *more]]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        shown = {"name": self.name, "status": self.status.value, "message": self.message, "advice": self.advice}
        return {**shown, "details": list(self.details), "facts": dict(self.facts)}


def can_work(findings: Sequence[Finding]) -> bool | None:
    """Whether nothing failed; None where that was not found out."""
    if any(finding.fail is not None for finding in findings):
        return False
    return None if any(finding.unknown for finding in findings) else True


def summary(findings: Sequence[Finding]) -> str:
    """The last line: yes, no or unknown, and how much there is to mend."""
    count = Counter(finding.status for finding in findings)
    fails, warnings = count[Status.FAIL], count[Status.WARNING]
    noted = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
    if fails:
        return f"no: {fails} thing{'s' * (fails != 1)} to mend before a run can work{noted}"
    unknown = [finding.name for finding in findings if finding.unknown]
    if unknown:
        return f"unknown: too little was seen of {' and '.join(unknown)} to say whether a run can work{noted}"
    return f"yes: a run can work{noted}"


class TimeOver(Exception):
    """A model call that would have lasted too long."""


@contextmanager
def until(env: RolloutEnv, deadline: float) -> Iterator[None]:
    """Ends sampling at a time, in the middle of a batch: TimeOver is raised from the next step of the model."""

    def look(*_: object) -> None:
        if time.monotonic() > deadline:
            raise TimeOver

    handle = env.backbone.model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def failed(name: str, error: Exception) -> Finding:
    """The finding for an error that a user can mend; its message says how."""
    first, *rest = str(error).split("\n")
    return Finding(name, first, fail="", details=tuple(rest))


def check_all(config: Config, samples: int, say: Callable[[str], None], no_model: bool = False) -> Iterator[Finding]:
    """Findings about problems, plan and, unless no_model, the model; say: told before what takes time."""
    finding, problems = check_problems(config)
    yield finding
    yield from (Finding("plan", doubt, "raise teacher.steps, or lower promotion.window") for doubt in config.doubts())
    if problems:
        yield check_golds(config, problems)
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing and not no_model:
        said = f"not checked: {', '.join(missing)} not installed"
        yield Finding("model", said, warning="pip install 'soar-rl[train]', or give --no-model")
    elif not no_model:
        yield from check_model(config, problems, max(1, samples), say)


def check_problems(config: Config) -> tuple[Finding, list[Problem]]:
    """Load the candidates: what was read, which columns, and every row that is left out with file and line."""
    try:
        loaded = candidates(config)
    except UserError as error:
        return failed("problems", error), []
    report, count, wanted = loaded.report, len(loaded.problems), 2 * config.reward.questions
    first, *details = report.lines()
    facts = {"problems": count, "rows": report.rows, "dropped": len(report.dropped), "columns": report.columns}
    facts |= {"notes": dict(report.notes), "revision": report.revision, "sha256": loaded.digest}
    fail = f"a run needs at least {FEWEST} hard problems: give more" if count < FEWEST else None
    warning = "mend the rows that are left out, or go on without them" if report.dropped else ""
    if count < wanted and not warning:
        warning = (
            f"the training half is smaller than reward.questions = {config.reward.questions}, so rewards are coarser: "
            f"give {wanted} hard problems or more, or lower reward.questions"
        )
    return Finding("problems", first, fail, warning, tuple(details), facts), loaded.problems


def check_golds(config: Config, problems: Sequence[Problem]) -> Finding:
    """Grade every gold answer against itself: the verifier must find it correct, or no attempt ever will be."""
    limit = time.monotonic() + GOLD_SECONDS
    try:
        domain = domain_of(config.problems)
    except UserError as error:
        return failed("domain", error)
    groups: dict[str, list[Problem]] = {}  # problems with one verdict; a function may look at their other columns
    for problem in problems:
        groups.setdefault(problem.answer if domain.label in NAMES else problem.id, []).append(problem)
    first_of, verdicts = [group[0] for group in groups.values()], list[Verdict]()
    try:
        with open_pool(domain, config.problems) as pool:
            for first in range(0, len(first_of), GOLD_BATCH):
                if first and time.monotonic() > limit:
                    break
                batch = first_of[first : first + GOLD_BATCH]
                verdicts += pool.check_golds([problem.answer for problem in batch], columns_of(batch))
            listed = [p for p, v in zip(first_of, verdicts, strict=False) if not v.solved][:LISTED]
            faults = pool.faults(listed)
    except UserError as error:
        return failed("golds", error)
    groups_judged = zip(groups.values(), verdicts, strict=False)  # the time may be over before the last
    judged = [(problem, verdict) for group, verdict in groups_judged for problem in group]
    why = {problem.id: f" ({fault})" for problem, fault in zip(listed, faults, strict=True) if fault}
    checked, left = len(judged), len(problems) - len(judged)
    bad = [(problem, verdict) for problem, verdict in judged if not verdict.solved]
    good = checked - len(bad)
    message = (
        f"{good:,} of {checked:,} gold answers grade as correct by {domain.label!r} ({good / max(1, checked):.2%})"
    )
    if texts := [p for p, _ in judged if domain.label in NAMES and gold_kind(p.answer, domain.label) == "text"]:
        message += f"; {len(texts):,} of them ({len(texts) / checked:.2%}) can only be compared as text"
    message += f"; {left:,} more were not checked in {GOLD_SECONDS:.0f} s" if left else ""
    details = [f"{p.id}: {verdict.value}{why.get(p.id, '')}: {p.answer[:100]!r}" for p, verdict in bad[:LISTED]]
    details += [f"... and {len(bad) - LISTED:,} more"] if len(bad) > LISTED else []
    details += [f"the last check that failed: {pool.last_error[:300]}"] if pool.last_error else []
    wrong = [{"id": p.id, "answer": p.answer, "verdict": verdict.value} for p, verdict in bad]
    fail = "choose another problems.verifier (number, exact, choice, your own) or domain, or mend the answers"
    warning = "check all with `soar verify FILE --golds`" if left else ""
    if bad:
        warning = (
            "unscorable ones are left out of a run, the others can never be solved: mend them or change the verifier"
        )
    facts = {"checked": checked, "correct": good, "not_correct": wrong}
    few = not good or good + left < FEWEST
    return Finding("golds", message, fail if few else None, warning, tuple(details), facts)


def check_model(
    config: Config, problems: Sequence[Problem], samples: int, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Findings of a config's model, one by one as they are made. say: told before what takes time."""
    from soar.run.setup import choose_threads, open_env

    say(f"loading {config.model.path}")
    try:
        with open_env(config) as env:
            choose_threads(env.backbone, config.threads)
            facts = {
                "path": config.model.path,
                "parameters": sum(p.numel() for p in env.backbone.model.parameters()),
                "device": str(env.backbone.device),
                "dtype": str(env.backbone.dtype).removeprefix("torch."),
                "context": env.backbone.context,
            }
            message = "{path}: {parameters:,} parameters, {dtype} on {device}, context {context:,} tokens"
            yield Finding("model", message.format(**facts), facts=facts)
            yield tokenizer_finding(env, problems)
            if problems:
                yield context_finding(env, config, problems)
            yield from _evidence_finding(env, config)
            if problems:
                say(f"asking the model {min(ASKED, len(problems))} problems, {ATTEMPTS} times each")
                yield student_finding(env, config, problems)
            say(f"asking the teacher for {samples} problems")
            yield teacher_finding(env, config, samples)
    except UserError as error:
        yield failed("model", error)


def tokenizer_finding(env: RolloutEnv, problems: Sequence[Problem]) -> Finding:
    """One BOS or none, the chat template, and that no text of a question becomes a control token."""
    tokenizer, fmt = env.backbone.tokenizer, cast(PromptFormat, env.fmt)
    ids, bos = fmt.student_ids(tokenizer, "x"), getattr(tokenizer, "bos_token_id", None)
    adds = bos is not None and list(tokenizer.encode("a"))[:1] == [bos]
    leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    texts = control_texts(tokenizer, fmt)
    asked = ["What is 1 + 1? " + " ".join(texts), *(problem.question for problem in problems[:QUESTIONS])]
    leaks = {text: leaked for text in asked if (leaked := leaked_controls(tokenizer, fmt, text))}
    template = bool(getattr(tokenizer, "chat_template", None))
    turns = "chat template" if template else "no chat template, User:/Assistant: instead"
    facts = {"bos": leading, "bos_expected": int(adds), "chat_template": template, "leaks": len(leaks)}
    if leaks:
        details = [f"{text[:80]!r}: {', '.join(leaked)}" for text, leaked in list(leaks.items())[:LISTED]]
        message = f"{len(leaks)} questions change the control tokens of the prompt"
        return Finding("tokenizer", message, "report this tokenizer; use another model", "", tuple(details), facts)
    if leading > 1 or (adds and leading != 1):
        message = f"{leading} BOS at the start of a prompt, expected {int(adds)}"
        return Finding("tokenizer", message, "mend the chat template of the tokenizer", facts=facts)
    ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(env.backbone.end_ids))))
    message = f"{leading} BOS at the start, {turns if fmt.turns else 'no turns'}; completions end at {ends}"
    return Finding("tokenizer", f"{message}; {len(texts)} control texts stay plain text in a question", facts=facts)


def context_finding(env: RolloutEnv, config: Config, problems: Sequence[Problem]) -> Finding:
    """Whether prompts and completion budgets fit in the context."""
    context, budget = env.backbone.context, config.student.sampling.max_tokens
    lengths = {problem.id: len(env.prompt(problem)) for problem in problems}
    dropped = fits_budget(problems, lambda problem: lengths[problem.id], context, budget)[1]
    longest = max(lengths.values())
    message = f"longest prompt {longest:,} + {budget:,} new tokens, context {context:,}"
    facts = {"longest_prompt": longest, "max_tokens": budget, "context": context, "too_long": len(dropped)}
    if not dropped:
        return Finding("context", message, facts=facts)
    advice = "they are left out of a run: lower student.sampling.max_tokens, or take a model with a longer context"
    message += f"; {len(dropped):,} of {len(problems):,} problems do not fit"
    fail = advice if len(problems) - len(dropped) < FEWEST else None
    return Finding("context", message, fail, advice, tuple(map(str, dropped[:LISTED])), facts)


def _evidence_finding(env: RolloutEnv, config: Config) -> Iterator[Finding]:
    """Whether the screening beside the problem file holds for this model and these settings; none without one."""
    from soar.run.screen import evidence_key, known_hard, use_evidence

    try:
        evidence = known_hard(config) if config.screen.attempts else None
        if evidence is not None:
            use_evidence(evidence, evidence_key(config, env.backbone, env.fmt, env.backbone.base_digest()))
            yield Finding("evidence", f"{evidence.where}: holds for this model and these settings")
    except UserError as error:
        yield failed("evidence", error)


def student_finding(env: RolloutEnv, config: Config, problems: Sequence[Problem]) -> Finding:
    """What the model makes of some of the problems: why attempts earn nothing, five of them, and which arm fits."""
    from soar.plan.forecast import forecast

    sampling, seed = config.student.sampling, seeds.derive(config.seed, "check", "student")
    fitting = [problem for problem in problems if env.room(problem, sampling)]
    asked = fitting[:: max(1, len(fitting) // ASKED)][:ASKED]
    rows, tokens, deadline, wave = list[tuple[str, str]](), 0, time.monotonic() + STUDENT_SECONDS, 2
    with suppress(TimeOver), until(env, deadline):
        while len(rows) < len(asked) * ATTEMPTS:
            first = len(rows) // ATTEMPTS
            part, wave = asked[first : first + wave], 2 * wave
            batch = env.rollout(None, [part], ATTEMPTS, [seed], sampling)
            tokens += batch.tokens
            texts, ended = batch.rollouts.texts(env.backbone), batch.rollouts.ended_B.tolist()
            each = [problem for problem in part for _ in range(ATTEMPTS)]
            for row in zip(each, texts, batch.verdicts, ended, env.verifier.read_answers(texts), strict=True):
                rows.append(_attempt(*row))
    causes = Counter(cause for cause, _ in rows)
    correct, count = causes.pop("", 0), len(rows)
    facts: dict[str, Any] = {
        "attempts": count,
        "correct": correct,
        "tokens": tokens,
        "causes": dict(causes.most_common()),
    }
    if not rows:
        why = f"no attempt ended within {STUDENT_SECONDS:.0f} s" if asked else "no problem leaves room for an answer"
        return Finding("student", why, None, "lower student.sampling.max_tokens, or use a GPU", (), facts, True)
    message = f"{correct} of {count} attempts are correct, {tokens / count:,.0f} tokens each"
    message += "".join(f"; {cause} {number}" for cause, number in facts["causes"].items())
    message += (
        f" ({STUDENT_SECONDS:.0f} s were over before {ATTEMPTS * len(asked)})" if count < ATTEMPTS * len(asked) else ""
    )
    kinds = [[text for name, text in rows if name == cause] for cause in (*facts["causes"], "")]
    spread = [[text for i in range(ATTEMPTS) for text in texts[i::ATTEMPTS]] for texts in kinds]  # other problems first
    shown = [texts[i] for i in range(SHOWN) for texts in spread if i < len(texts)][:SHOWN]
    main = next(iter(facts["causes"]), "difficulty")
    advice = "" if main == "difficulty" else CAUSES[main]
    fits = f"nothing yet: mend the {main} and check again" if advice and not correct else _arm(correct / count, config)
    details = [*shown, f"take: {fits}", f"cost of soar run: {forecast(config).total_line().strip()}"]
    if main == "stop":
        ends = sorted(env.backbone.tokenizer.decode([token]) for token in env.backbone.end_ids)
        advice += f" (end tokens: {', '.join(map(repr, ends))})"
    hopeless = not correct and advice and count >= ENOUGH and causes[main] > 0.9 * count
    return Finding("student", message, advice if hopeless else None, advice, tuple(details), facts)


def _attempt(problem: Problem, text: str, verdict: Verdict, ended: bool, answer: str | None) -> tuple[str, str]:
    """Why an attempt earned nothing ("": it is correct), and the attempt in a line."""
    cause = "" if verdict.solved else "difficulty"
    if verdict in (Verdict.UNSCORABLE, Verdict.TIMEOUT, Verdict.CRASHED):
        cause = "verifier"
    elif cause and not ended:
        cause = "truncation" if answer is None else "stop"
    elif cause and answer is None:
        cause = "format"
    short = text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"
    read = "no answer" if answer is None else repr(answer[:60])
    return cause, f"{cause or 'correct'}: {problem.id}, gold {problem.answer[:60]!r}, read {read}: {short!r}"


def _arm(rate: float, config: Config) -> str:
    """What fits problems of which the base model solves this share."""
    n = config.student.attempts
    mixed = 1 - rate**n - (1 - rate) ** n
    if rate > 0.5:
        return "harder problems: most attempts are correct; soar screen finds those that are never solved"
    if mixed > 0.5:
        return f"hard_only (soar student --train hard): {mixed:.0%} of the groups of {n} attempts are right and wrong"
    return (
        f"pq and ps beside hard_only (soar run): {1 - mixed:.0%} of the groups of {n} attempts teach plain RL nothing"
    )


def teacher_finding(env: RolloutEnv, config: Config, samples: int) -> Finding:
    """Share of teacher texts that are problems, what an accepted one costs, and why the others are not."""
    from soar.loop.write import read_pairs, teacher_prompt

    try:
        prompt = teacher_prompt(env, config)
    except UserError as error:
        return failed("teacher", error)
    seed, sampling = seeds.derive(config.seed, "check", "teacher"), config.teacher.sampling
    reasons, last = Counter[str](), list[str]()
    sampled = tokens = 0
    started, count = time.monotonic(), min(FIRST_WAVE, samples)
    while count > 0:
        try:
            with until(env, started + TEACHER_SECONDS):
                rollouts = env.sampler.sample(None, [[prompt]], count, [[seeds.skip(seed, sampled)]], sampling)
        except TimeOver:
            break
        tokens += int(rollouts.length_B.sum())
        outcomes = read_pairs(env, config, rollouts.texts(env.backbone), rollouts.ended_B.tolist(), None)
        rejections = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
        reasons.update(rejection.name for rejection in rejections)
        last = [*last, *(rejection.text for rejection in rejections)][-5:]
        sampled += len(outcomes)
        taken = max(time.monotonic() - started, 1e-9)
        count = min(2 * count, samples - sampled, int((TEACHER_SECONDS - taken) * sampled / taken))
    accepted = sampled - reasons.total()
    facts: dict[str, Any] = {
        "sampled": sampled,
        "accepted": accepted,
        "tokens": tokens,
        "rejected": dict(reasons.most_common()),
    }
    teacher = config.teacher
    message = f"{accepted} of {sampled} samples are problems"
    message += f" ({TEACHER_SECONDS:.0f} s were over before {samples})" if sampled < samples else ""
    details, hint = list[str](), "too slow here to say: lower teacher.sampling.max_tokens, or use a GPU"
    if facts["rejected"]:
        name = next(iter(facts["rejected"]))  # the most frequent
        details = ["rejected: " + ", ".join(f"{reason} {count}" for reason, count in facts["rejected"].items())]
        unknown = f"the domain refuses its problems ({name}): say in the teacher prompt what is asked for"
        hint = HINT_OF.get(name, unknown)
    if not accepted:
        details += ["its last outputs:", *(f"  {text[:300]!r}" for text in last)]
        few = sampled < min(samples, ENOUGH)
        message += "; too few to say whether it can" if few else ""
        return Finding("teacher", message, None if few else hint, hint, tuple(details), facts, unknown=few)
    pairs = teacher.datasets * teacher.questions
    each, spent = sampled / accepted, tokens / accepted
    facts |= {"samples_per_pair": each, "tokens_per_pair": spent}
    message += f"; an accepted pair costs {each:.1f} samples, {spent:,.0f} tokens"
    details.append(f"an outer step needs {pairs} pairs: about {each * pairs:,.0f} samples, {spent * pairs:,.0f} tokens")
    advice = f"an outer step would end without its pairs (teacher.max_tries = {teacher.max_tries}): {hint}"
    low, dear = accepted / sampled < LOW_RATE, each > teacher.max_tries
    return Finding("teacher", message, advice if dear else None, hint if low else "", tuple(details), facts)
