"""The teacher writes: rejection sampling of its texts until every dataset is full."""

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from soar import seeds
from soar.config import TOO_EASY, Config, ConfigError
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Request, Rollouts, join
from soar.files import Row, clipped
from soar.loop.parallel import FIRST_GUESS, texts_at_once
from soar.loop.rollout import HEAD, TAIL, RolloutEnv
from soar.types import Problem, Reason, Rejection, UserError, columns_of

SHOWN = 2
Outcome = Problem | Rejection
T = TypeVar("T")


@dataclass(eq=False)
class Bound:
    """Of what is generated before an arm trains. until: the most that env.tokens may become. full: it cut something off."""

    until: int = sys.maxsize
    full: bool = False

    def pieces(self, env: RolloutEnv, items: Sequence[T], each: int, most: int = sys.maxsize) -> Iterator[Sequence[T]]:
        """The items, as many at once (`most`) as surely fit where one takes `each` tokens at most, as long as one does."""
        while items and (room := (self.until - env.tokens) // each) > 0:
            piece = items[: min(room, most)]
            yield piece
            items = items[len(piece) :]
        self.full = bool(items)  # not where the caller had enough


class TeacherError(UserError):
    """The teacher wrote too few acceptable pairs; the message holds the reasons and its last outputs."""


@dataclass(frozen=True)
class QuestionSets:
    """One step's accepted pairs: problems_G_Q, their teacher rollouts (rows in the same order), and the bookkeeping."""

    problems_G_Q: list[list[Problem]]
    rollouts: Rollouts
    sampled: int
    rejected: dict[str, int]
    kept: list[Row] = field(default_factory=list)  # the first SHOWN texts of each outcome


def teacher_prompt(env: RolloutEnv, config: Config) -> list[int]:
    """Token ids of the teacher prompt. Raises ConfigError where there is no room for a text, or no vote on answers."""
    if config.teacher.votes and not can_vote(env):
        key = "domain" if config.problems.domain else "verifier"
        found = f"problems.{key} = {getattr(config.problems, key)!r} does not compare answers with each other"
        why = "it reads whole completions, or gold answers are tests"
        raise ConfigError(f"teacher.votes = {config.teacher.votes}: {found} ({why}); set teacher.votes to 0")
    prompt = env.fmt.teacher_ids(env.backbone.tokenizer, config.teacher.subject)
    tokens = config.teacher.sampling.max_tokens
    if len(prompt) + tokens > env.backbone.context:
        over = f"with the teacher prompt of {len(prompt)} tokens it exceeds the model's context"
        mend = "lower it" if len(prompt) < env.backbone.context else "take another problems.format, domain or model"
        raise ConfigError(f"teacher.sampling.max_tokens = {tokens}: {over} of {env.backbone.context}; {mend}")
    return prompt


def write_questions(
    env: RolloutEnv, teacher: AdapterStack | None, prompt: list[int], run: Config, step: int, bound: Bound | None = None
) -> QuestionSets:
    """g * n accepted pairs of one outer step by rejection sampling (method: the loop, step 1).

    teacher: a stack of one policy, or None for the base model. bound: of texts and votes, which leaves fewer pairs where
    it cuts them off. Raises TeacherError where it leaves none, or teacher.max_tries is spent.
    """
    config, bound = run.teacher, bound or Bound()
    each = config.sampling.max_tokens + config.votes * run.student.sampling.max_tokens
    wanted = config.datasets * config.questions
    accepted, kept, last, shown = list[Problem](), list[Rollouts](), list[str](), list[Row]()
    rejected, labels = Counter[str](), dict[str, Outcome]()
    sampled = attempt = 0
    while len(accepted) < wanted and not bound.full and sampled < config.max_tries * wanted:
        rate = max(len(accepted) / sampled, 1 / 16) if sampled else FIRST_GUESS
        count = min(texts_at_once(wanted - len(accepted), wanted, rate), config.max_tries * wanted - sampled)
        seed = seeds.derive(run.seed, "teacher", step, attempt)
        attempt += 1
        for part in bound.pieces(env, range(count), each):
            rollouts = env.draw(teacher, Request([[prompt]], len(part), [[seeds.skip(seed, part[0])]], config.sampling))
            texts, ended = rollouts.texts(env.backbone), rollouts.ended_B.tolist()
            rows = []
            for row, outcome in enumerate(vote(env, run, read_pairs(env, run, texts, ended), seed, labels)):
                if len(accepted) == wanted:
                    break
                sampled += 1
                name = outcome.name if isinstance(outcome, Rejection) else "accepted"
                if sum(other["outcome"] == name for other in shown) < SHOWN:
                    shown.append({"completion": clipped(texts[row], HEAD, TAIL), "outcome": name})
                if isinstance(outcome, Rejection):
                    rejected[outcome.name] += 1
                    last = [*last[-4:], outcome.text]
                else:
                    accepted.append(outcome)
                    rows.append(row)
            if rows:
                kept.append(rollouts.select(rows))
            if len(accepted) == wanted:
                break
    if len(accepted) < (1 if bound.full else wanted):
        raise TeacherError(_no_pairs(len(accepted), wanted, sampled, rejected, last))
    sets = [accepted[first : first + config.questions] for first in range(0, len(accepted), config.questions)]
    return QuestionSets(sets, join(kept), sampled, dict(rejected), shown)


def up_to_questions(backbone: Backbone, sets: QuestionSets) -> Rollouts:
    """The teacher's rollouts up to the token behind each question, which ends it: no gradient for what answers it.

    Whole where a text does not hold its question as it is, since a domain made another of it.
    """
    whole, problems = sets.rollouts, (problem for problems in sets.problems_G_Q for problem in problems)
    rollouts = replace(whole, length_B=whole.length_B.clone(), logprob_B_T=whole.logprob_B_T.clone())
    rows = zip(problems, whole.tokens_B_T.tolist(), whole.length_B.tolist(), strict=True)
    for row, (problem, tokens, length) in enumerate(rows):
        end = min(_tokens_for(backbone, tokens[:length], problem.question) + 1, length)
        rollouts.length_B[row] = end
        rollouts.logprob_B_T[row, end:] = 0.0  # padding from here on
    return rollouts


def _tokens_for(backbone: Backbone, tokens: list[int], text: str) -> int:
    """How many of the tokens say the text; all of them where only all do, or none of their beginnings."""
    decode = partial(backbone.tokenizer.decode, clean_up_tokenization_spaces=False)
    return bisect_left(range(len(tokens)), True, key=lambda count: text in decode(tokens[:count]))


def read_pairs(env: RolloutEnv, config: Config, texts: list[str], ended: list[bool]) -> list[Outcome]:
    """Problems or reasons, in order; a question that leaves no room for the student's answer is too long."""
    outcomes = env.verifier.read_problems(texts, [not e for e in ended])
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, Problem) and not env.room(outcome, config.student.sampling):
            outcomes[i] = Rejection(Reason.TOO_LONG, texts[i])
    return outcomes


def can_vote(env: RolloutEnv) -> bool:
    """Whether an answer can be a gold answer: no for a reward function, and for a domain whose examples have other golds."""
    if not env.verifier.compares:
        return False
    examples = env.verifier.domain.examples
    golds = [problem.answer for problem in examples]
    return not golds or any(v.solved for v in env.verifier.check_answers(golds, golds, columns_of(examples)))


def vote(
    env: RolloutEnv, config: Config, outcomes: list[Outcome], seed: int, labels: dict[str, Outcome]
) -> list[Outcome]:
    """The pairs by `majority`; without teacher.votes as they are. labels: of the step's questions so far, and added to."""
    if not config.teacher.votes:
        return outcomes
    fresh = {o.question: o for o in outcomes if isinstance(o, Problem) and o.question not in labels}
    if fresh:
        labels |= zip(fresh, majority(env, config, list(fresh.values()), seed), strict=True)
    return [labels[o.question] if isinstance(o, Problem) else o for o in outcomes]


def majority(env: RolloutEnv, config: Config, problems: list[Problem], seed: int) -> list[Outcome]:
    """Each problem with the answer that most of its votes give, or why they do not make it one.

    The commonest spelling is the label, what equals it agrees. Left out where less than teacher.agreement of them do, or more
    than TOO_EASY, or where it would not be accepted from a teacher. Labels and window as in R-Zero (arXiv 2508.05004).
    """
    votes, place, sampling = config.teacher.votes, seeds.derive(seed, "votes"), config.student.sampling
    _, texts = env.sample(None, env.request([problems], votes, [place], sampling, 0), env.threads)
    answers, voted = env.verifier.read_answers(texts), list[Problem]()
    for k, problem in enumerate(problems):
        given = Counter(filter(None, answers[k * votes : (k + 1) * votes]))
        voted.append(replace(problem, answer=max(given, key=given.__getitem__, default="")))
    against = [problem for problem in voted for _ in range(votes)]
    verdicts = env.verifier.check_answers(answers, [problem.answer for problem in against], columns_of(against))
    shares = [sum(v.solved for v in verdicts[k * votes : (k + 1) * votes]) / votes for k in range(len(voted))]
    judged = zip(voted, shares, env.verifier.usable(voted), strict=True)
    return [_window(config, problem, share, usable) for problem, share, usable in judged]


def _window(config: Config, problem: Problem, share: float, usable: bool) -> Outcome:
    """The problem, or why its votes do not make it one."""
    if not problem.answer or share < config.teacher.agreement:
        return Rejection(Reason.NO_AGREEMENT, problem.question)
    if share > TOO_EASY:
        return Rejection(Reason.TOO_EASY, problem.question)
    return replace(problem, agreement=share) if usable else Rejection(Reason.UNPARSABLE_ANSWER, problem.question)


def row_of(problem: Problem) -> Row:
    """Question and answer as the run's files have them, with the share of the votes where there were any."""
    share = {} if problem.agreement is None else {"agreement": problem.agreement}
    return {"question": problem.question, "answer": problem.answer, **share}


def _no_pairs(accepted: int, wanted: int, sampled: int, rejected: Counter[str], last: list[str]) -> str:
    reasons = ", ".join(f"{name} {count}" for name, count in rejected.most_common()) or "none"
    shown = "\n".join(f"  {text[:300]!r}" for text in last)
    return (
        f"the teacher wrote {accepted} acceptable pairs of {wanted} in {sampled} samples (rejected: {reasons}).\n"
        f"Its last outputs:\n{shown}\n"
        "Try another problems.format or domain, a lower teacher.sampling.temperature, more teacher.sampling.max_tokens, or a "
        "stronger model; lower teacher.agreement where no_agreement is common; raise teacher.max_tries if the share is small "
        "but not zero, arms.tokens where preparing an arm was cut off."
    )
