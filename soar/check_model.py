"""Whether a run can work with its model: tokenizer, room in the context, completion budget, and what the teacher writes.

Nothing is trained. The teacher's samples are those of the untrained model, so its first outer step will look like them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from soar import seeds
from soar.check import FEWEST, LISTED, Finding, Status, failed
from soar.config import Config, by_set
from soar.data import fits_budget
from soar.domains import domain_of
from soar.hardset import known_hard, use_evidence
from soar.lessons import read_pairs, teacher_prompt
from soar.prompts import control_texts, leaked_controls
from soar.rollout import Examiner
from soar.screening import evidence_key
from soar.types import Problem, Reason, Rejection, UserError
from soar.workbench import choose_workers, open_examiner

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
        with open_examiner(config) as examiner:
            yield _model_finding(examiner, config)
            yield from _examine(examiner, config, problems, samples, say)
    except UserError as error:
        yield failed("model", error)


def _examine(
    examiner: Examiner, config: Config, problems: Sequence[Problem], samples: int, say: Callable[[str], None]
) -> Iterator[Finding]:
    yield tokenizer_finding(examiner, problems)
    if problems:
        yield context_finding(examiner, config, problems)
        sets = {name for name, own in by_set(config).items() if domain_of(own.problems).gold_is_answer}
        written = [problem for problem in problems if "" in sets or problem.set in sets]
        if written:
            yield budget_finding(examiner, config, written)
    evidence = _evidence_finding(examiner, config)
    if evidence is not None:
        yield evidence
    for name, own in by_set(config).items():
        say(f"asking the teacher for {samples} problems" + (f" of {name}" if name else ""))
        yield teacher_finding(examiner.of_set(name), own, samples)


def _model_finding(examiner: Examiner, config: Config) -> Finding:
    backbone = examiner.backbone
    choose_workers(backbone, config.threads)
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


def tokenizer_finding(examiner: Examiner, problems: Sequence[Problem]) -> Finding:
    """One BOS or none, the chat template, and that no text of a question becomes a control token."""
    tokenizer, fmt = examiner.backbone.tokenizer, examiner.fmt
    ids = examiner.fmt.student_ids(tokenizer, "x")
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


def context_finding(examiner: Examiner, config: Config, problems: Sequence[Problem]) -> Finding:
    """Whether prompts and completion budgets fit in the context."""
    context, budget = examiner.backbone.context, config.student.sampling.max_tokens
    lengths = {problem.id: len(examiner.prompt(problem)) for problem in problems}
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


def budget_finding(examiner: Examiner, config: Config, problems: Sequence[Problem]) -> Finding:
    """Whether the gold answers can be written within the completion budget, reasoning aside."""
    budget, tokenizer = config.student.sampling.max_tokens, examiner.backbone.tokenizer
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


def _evidence_finding(examiner: Examiner, config: Config) -> Finding | None:
    """Whether the screening beside the problem file holds for this model and these settings."""
    try:
        known = known_hard(config) if config.screen.attempts else None
        if known is None:
            return None
        wanted = evidence_key(config, examiner.backbone, examiner.fmt, examiner.backbone.base_digest())
        use_evidence(known, wanted)
    except UserError as error:
        return failed("evidence", error)
    return Finding("evidence", Status.OK, f"{known.where}: holds for this model and these settings")


def teacher_finding(examiner: Examiner, config: Config, samples: int) -> Finding:
    """Share of teacher texts that are problems, what an accepted one costs, and why the others are not."""
    try:
        prompt = teacher_prompt(examiner, config)
    except UserError as error:
        return failed("teacher", error)
    seed, sampling = seeds.derive(config.seed, "check", "teacher"), config.teacher.sampling
    reasons: Counter[str] = Counter()
    last: list[str] = []
    sampled = accepted = tokens = 0
    started = time.monotonic()
    count = min(FIRST_WAVE, samples)
    while count > 0:
        rollouts = examiner.sampler.sample(None, [[prompt]], count, [[seeds.skip(seed, sampled)]], sampling)
        tokens += int(rollouts.length_B.sum())
        texts = rollouts.texts(examiner.backbone)
        for outcome in read_pairs(examiner, config, texts, rollouts.ended_B.tolist(), None):
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
