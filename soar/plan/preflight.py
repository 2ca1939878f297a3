"""Whether a run can work with its model: tokenizer, room in the context, completion budget, and what the teacher writes.

Nothing is trained. The teacher's samples are those of the untrained model, so its first outer step will look like them.

Whether a run can work, as far as that can be told without a model: the problems and their gold answers.

Every check ends in a `Finding`; nothing here raises for what a user can mend. `check_model.py` has the checks that need
the model. Needs no torch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from soar import seeds
from soar.config import Config
from soar.domains.candidates import candidates
from soar.files import visible
from soar.loop.rollout import RolloutEnv
from soar.loop.write import read_pairs, teacher_prompt
from soar.problems.domain import domain_of
from soar.problems.load import fits_budget
from soar.problems.pool import open_pool
from soar.problems.prompts import control_texts, leaked_controls
from soar.problems.verify import NAMES, columns_of
from soar.run.screen import evidence_key, known_hard, use_evidence
from soar.run.setup import choose_threads, open_env
from soar.types import Problem, Reason, Rejection, UserError, Verdict

TEACHER_SECONDS = 30.0  # samples are taken in growing waves until this would be over: a check stays under a minute
FIRST_WAVE = 4
QUESTIONS = 500  # questions that are encoded to look for control tokens
BOX_TOKENS = 10  # what stands around an answer: a box or a mark, and the end token
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


def _hint(name: str) -> str:
    known = {reason.value: text for reason, text in HINTS.items()}
    return known.get(name, f"the domain refuses its problems ({name}): say in the teacher prompt what is asked for")


def check_model(
    config: Config, problems: Sequence[Problem], samples: int, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Findings of a config's model, one by one as they are made. say: told before what takes time."""
    say(f"loading {config.model.path}")
    try:
        with open_env(config) as env:
            yield _model_finding(env, config)
            yield from _examine(env, config, problems, samples, say)
    except UserError as error:
        yield failed("model", error)


def _examine(
    env: RolloutEnv, config: Config, problems: Sequence[Problem], samples: int, say: Callable[[str], None]
) -> Iterator[Finding]:
    yield tokenizer_finding(env, problems)
    if problems:
        yield context_finding(env, config, problems)
        if domain_of(config.problems).gold_is_answer:
            yield budget_finding(env, config, problems)
    evidence = _evidence_finding(env, config)
    if evidence is not None:
        yield evidence
    say(f"asking the teacher for {samples} problems")
    yield teacher_finding(env, config, samples)


def _model_finding(env: RolloutEnv, config: Config) -> Finding:
    backbone = env.backbone
    choose_threads(backbone, config.threads)
    parameters = sum(p.numel() for p in backbone.model.parameters())
    facts = {
        "path": config.model.path,
        "parameters": parameters,
        "device": str(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "context": backbone.context,
    }
    message = (
        f"{config.model.path}: {parameters:,} parameters, {facts['dtype']} on {facts['device']}, context "
        f"{backbone.context:,} tokens"
    )
    return Finding("model", Status.OK, message, facts=facts)


def tokenizer_finding(env: RolloutEnv, problems: Sequence[Problem]) -> Finding:
    """One BOS or none, the chat template, and that no text of a question becomes a control token."""
    tokenizer, fmt = env.backbone.tokenizer, env.fmt
    ids = env.fmt.student_ids(tokenizer, "x")
    bos = getattr(tokenizer, "bos_token_id", None)
    adds = bos is not None and list(tokenizer.encode("a"))[:1] == [bos]
    leading = 0
    while leading < len(ids) and ids[leading] == bos:
        leading += 1
    texts = control_texts(tokenizer, fmt)
    hostile = "What is 1 + 1? " + " ".join(texts)
    asked = [problem.question for problem in problems[:QUESTIONS]]
    leaks = {text: leaked for text in [hostile, *asked] if (leaked := leaked_controls(tokenizer, fmt, text))}
    template = bool(getattr(tokenizer, "chat_template", None))
    turns = (
        "no turns" if not fmt.turns else "chat template" if template else "no chat template, User:/Assistant: instead"
    )
    message = f"{leading} BOS at the start, {turns}; {len(texts)} control texts stay plain text in a question"
    facts = {"bos": leading, "bos_expected": int(adds), "chat_template": template, "leaks": len(leaks)}
    if leaks:
        details = tuple(f"{text[:80]!r}: {', '.join(found)}" for text, found in list(leaks.items())[:LISTED])
        message = f"{len(leaks)} questions change the control tokens of the prompt"
        return Finding("tokenizer", Status.FAIL, message, "report this tokenizer; use another model", details, facts)
    if leading > 1 or (adds and leading != 1):
        message = f"{leading} BOS at the start of a prompt, expected {int(adds)}"
        return Finding("tokenizer", Status.FAIL, message, "mend the chat template of the tokenizer", (), facts)
    return Finding("tokenizer", Status.OK, message, facts=facts)


def context_finding(env: RolloutEnv, config: Config, problems: Sequence[Problem]) -> Finding:
    """Whether prompts and completion budgets fit in the context."""
    context, budget = env.backbone.context, config.student.sampling.max_tokens
    lengths = {problem.id: len(env.prompt(problem)) for problem in problems}
    kept, dropped = fits_budget(problems, lambda problem: lengths[problem.id], context, budget)
    longest = max(lengths.values())
    message = f"longest prompt {longest:,} + {budget:,} new tokens, context {context:,}"
    details = tuple(str(row) for row in dropped[:LISTED])
    facts = {"longest_prompt": longest, "max_tokens": budget, "context": context, "too_long": len(dropped)}
    if not dropped:
        return Finding("context", Status.OK, message, facts=facts)
    status = Status.WARNING if len(kept) >= FEWEST else Status.FAIL
    message += f"; {len(dropped):,} of {len(problems):,} problems do not fit"
    advice = "they are left out of a run: lower student.sampling.max_tokens, or take a model with a longer context"
    return Finding("context", status, message, advice, details, facts)


def budget_finding(env: RolloutEnv, config: Config, problems: Sequence[Problem]) -> Finding:
    """Whether the gold answers can be written within the completion budget, reasoning aside."""
    budget, tokenizer = config.student.sampling.max_tokens, env.backbone.tokenizer
    lengths = [len(tokenizer.encode(p.answer, add_special_tokens=False)) + BOX_TOKENS for p in problems]
    longest = max(lengths)
    over = [p for p, length in zip(problems, lengths, strict=True) if length > budget]
    message = f"longest gold answer {longest - BOX_TOKENS:,} tokens, student.sampling.max_tokens = {budget:,}"
    facts = {"longest_gold": longest - BOX_TOKENS, "max_tokens": budget, "over": len(over)}
    if not over:
        return Finding("budget", Status.OK, message, facts=facts)
    status = Status.FAIL if len(problems) - len(over) < FEWEST else Status.WARNING
    message += f"; {len(over):,} of {len(problems):,} answers cannot be written in it"
    advice = f"raise student.sampling.max_tokens above {longest}, and further for the reasoning"
    return Finding("budget", status, message, advice, tuple(p.id for p in over[:LISTED]), facts)


def _evidence_finding(env: RolloutEnv, config: Config) -> Finding | None:
    """Whether the screening beside the problem file holds for this model and these settings."""
    try:
        known = known_hard(config) if config.screen.attempts else None
        if known is None:
            return None
        wanted = evidence_key(config, env.backbone, env.fmt, env.backbone.base_digest())
        use_evidence(known, wanted)
    except UserError as error:
        return failed("evidence", error)
    return Finding("evidence", Status.OK, f"{known.where}: holds for this model and these settings")


def teacher_finding(env: RolloutEnv, config: Config, samples: int) -> Finding:
    """Chunk of teacher texts that are problems, what an accepted one costs, and why the others are not."""
    try:
        prompt = teacher_prompt(env, config)
    except UserError as error:
        return failed("teacher", error)
    seed, sampling = seeds.derive(config.seed, "check", "teacher"), config.teacher.sampling
    reasons: Counter[str] = Counter()
    last: list[str] = []
    sampled = accepted = tokens = 0
    started = time.monotonic()
    count = min(FIRST_WAVE, samples)
    while count > 0:
        rollouts = env.sampler.sample(None, [[prompt]], count, [[seeds.skip(seed, sampled)]], sampling)
        tokens += int(rollouts.length_B.sum())
        texts = rollouts.texts(env.backbone)
        for outcome in read_pairs(env, config, texts, rollouts.ended_B.tolist(), None):
            sampled += 1
            if isinstance(outcome, Rejection):
                reasons[outcome.name] += 1
                last = [*last[-4:], outcome.text]
            else:
                accepted += 1
        affordable = (TEACHER_SECONDS - (time.monotonic() - started)) * sampled / max(time.monotonic() - started, 1e-9)
        count = min(2 * count, samples - sampled, int(affordable))
    facts: dict[str, Any] = {
        "sampled": sampled,
        "accepted": accepted,
        "tokens": tokens,
        "rejected": dict(reasons.most_common()),
    }
    return _teacher_report(config, samples, facts, reasons, last)


def _teacher_report(
    config: Config, samples: int, facts: dict[str, Any], reasons: Counter[str], last: list[str]
) -> Finding:
    sampled, accepted, teacher = facts["sampled"], facts["accepted"], config.teacher
    message = f"{accepted} of {sampled} samples are problems"
    message += f" ({TEACHER_SECONDS:.0f} s were over before {samples})" if sampled < samples else ""
    rejected = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    details = [f"rejected: {rejected}"] if rejected else []
    hint = _hint(reasons.most_common(1)[0][0]) if reasons else ""
    if not accepted:
        details += ["its last outputs:", *(f"  {text[:300]!r}" for text in last)]
        if sampled < min(samples, ENOUGH):
            message += "; too few to say whether it can"
            return Finding("teacher", Status.WARNING, message, hint, tuple(details), facts)
        return Finding("teacher", Status.FAIL, message, hint, tuple(details), facts)
    pairs = teacher.datasets * teacher.questions
    each, tokens = sampled / accepted, facts["tokens"] / accepted
    facts |= {"samples_per_pair": each, "tokens_per_pair": tokens}
    message += f"; an accepted pair costs {each:.1f} samples, {tokens:,.0f} tokens"
    details.append(
        f"an outer step needs {pairs} pairs: about {each * pairs:,.0f} samples, {tokens * pairs:,.0f} tokens"
    )
    if each > teacher.max_tries:
        advice = f"an outer step would end without its pairs (teacher.max_tries = {teacher.max_tries}): {hint}"
        return Finding("teacher", Status.FAIL, message, advice, tuple(details), facts)
    low = accepted / sampled < LOW_RATE
    return Finding("teacher", Status.WARNING if low else Status.OK, message, hint * low, tuple(details), facts)


GOLD_SECONDS = 25.0  # time for gold answers, so that a check of a large file stays under a minute
GOLD_BATCH = 500
LISTED = 10
FEWEST = 4  # hard problems that a run needs


class Status(str, Enum):
    """OK; WARNING: a run can work, but worse or dearer than it might; FAIL: it cannot."""

    OK = "ok"
    WARNING = "warning"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report. details: further lines. advice: what to do, empty when all is well. facts: its numbers."""

    name: str
    status: Status
    message: str
    advice: str = ""
    details: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """As text for a terminal, with nothing in it that could move the cursor."""
        indent = " " * 21
        more = [f"{indent}{line}" for text in self.details for line in text.split("\n")]
        more += [f"{indent}-> {self.advice}"] if self.advice else []
        return [visible(line) for line in [f"{self.status.value:8s} {self.name:11s} {self.message}", *more]]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "status": self.status.value, "details": list(self.details)}


def can_work(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.status is not Status.FAIL for finding in findings)


def failed(name: str, error: Exception) -> Finding:
    """The finding for an error that a user can mend; its message says how."""
    first, *rest = str(error).split("\n")
    return Finding(name, Status.FAIL, first, details=tuple(rest))


def check_problems(config: Config) -> tuple[Finding, list[Problem]]:
    """Load the candidates: what was read, which columns, and every row that is left out with file and line."""
    try:
        loaded = candidates(config)
    except UserError as error:
        return failed("problems", error), []
    report, count = loaded.report, len(loaded.problems)
    first, *details = report.lines()
    facts = {
        "problems": count,
        "rows": report.rows,
        "dropped": len(report.dropped),
        "columns": report.columns,
        "notes": dict(report.notes),
        "revision": report.revision,
        "sha256": loaded.digest,
    }
    status, advice = Status.OK, ""
    wanted = 2 * config.reward.questions
    if count < FEWEST:
        status, advice = Status.FAIL, f"a run needs at least {FEWEST} hard problems: give more"
    elif report.dropped:
        status, advice = Status.WARNING, "mend the rows that are left out, or go on without them"
    elif count < wanted:
        status = Status.WARNING
        advice = (
            f"the training half is smaller than reward.questions = {config.reward.questions}, so rewards are coarser: "
            f"give {wanted} hard problems or more, or lower reward.questions"
        )
    return Finding("problems", status, first, advice, tuple(details), facts), loaded.problems


def check_domain(config: Config) -> list[Finding]:
    """What the domain says about this machine: one finding, or none for a domain that needs nothing of it."""
    try:
        domain = domain_of(config.problems)
        return [Finding("domain", Status.OK, domain.describe())] if domain.describe else []
    except UserError as error:
        return [failed("domain", error)]


def check_golds(config: Config, problems: Sequence[Problem]) -> Finding:
    """Grade every gold answer against itself: the verifier must find it correct, or no attempt ever will be."""
    limit = time.monotonic() + GOLD_SECONDS
    groups: dict[str, list[Problem]] = {}  # problems with one verdict; a function may look at their other columns
    try:
        domain = domain_of(config.problems)
    except UserError as error:
        return failed("domain", error)
    name = domain.label
    for problem in problems:
        groups.setdefault(problem.answer if name in NAMES else problem.id, []).append(problem)
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
    judged = [
        (problem, verdict)
        for group, verdict in zip(groups.values(), verdicts, strict=False)  # the time may be over before the last
        for problem in group
    ]
    named = {problem.id: f" ({fault})" for problem, fault in zip(listed, faults, strict=True) if fault}
    return _gold_finding(name, judged, len(problems), pool.last_error, named)


def _gold_finding(
    name: str, judged: list[tuple[Problem, Verdict]], total: int, error: str | None, named: dict[str, str]
) -> Finding:
    checked, bad = len(judged), [(problem, verdict) for problem, verdict in judged if not verdict.solved]
    good = checked - len(bad)
    message = f"{good:,} of {checked:,} gold answers grade as correct by {name!r} ({good / max(1, checked):.2%})"
    details = [f"{p.id}: {verdict.value}{named.get(p.id, '')}: {p.answer[:100]!r}" for p, verdict in bad[:LISTED]]
    details += [f"... and {len(bad) - LISTED:,} more"] if len(bad) > LISTED else []
    details += [f"the last check that failed: {error[:300]}"] if error else []
    facts = {
        "checked": checked,
        "correct": good,
        "not_correct": [{"id": p.id, "answer": p.answer, "verdict": verdict.value} for p, verdict in bad],
    }
    status, advice = Status.OK, ""
    if checked < total:
        status = Status.WARNING
        message += f"; {total - checked:,} more were not checked in {GOLD_SECONDS:.0f} s"
        advice = "check all with `soar verify FILE --golds`"
    if not good or good + total - checked < FEWEST:
        status = Status.FAIL
        advice = "choose another problems.verifier (number, exact, choice, your own) or domain, or mend the answers"
    elif bad:
        status = Status.WARNING
        advice = (
            "unscorable ones are left out of a run, the others can never be solved: mend them or change the verifier"
        )
    return Finding("golds", status, message, advice, tuple(details), facts)


def summary(findings: Sequence[Finding]) -> str:
    """The last line: yes or no, and how much there is to mend."""
    fails = sum(finding.status is Status.FAIL for finding in findings)
    warnings = sum(finding.status is Status.WARNING for finding in findings)
    noted = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
    if fails:
        return f"no: {fails} thing{'s' * (fails != 1)} to mend before a run can work{noted}"
    return f"yes: a run can work{noted}"
