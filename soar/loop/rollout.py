"""Rollouts of policies on problems: prompt, sample, verify, reward."""

import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from soar import seeds
from soar.config import SamplingConfig
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Request, Rollouts, Sampler, join
from soar.files import Row, clipped
from soar.loop.parallel import Parallel
from soar.types import Problem, Verdict, columns_of, shared_columns

Scheme = Literal["binary", "paper"]


@dataclass(frozen=True)
class RolloutBatch:
    """N attempts of each policy at each of its problems, rows in the order (policy, question, attempt).

    temperature: of the draws. reward_P_Q_N: student reward (points). valid_P_Q_N: False where the verdict is unscorable
    (left out of pass rates and advantages, never solved). failed_P: the policy gave NaN or inf. texts: as they were judged.
    """

    problems_P_Q: list[list[Problem]]
    temperature: float
    rollouts: Rollouts
    verdicts: list[Verdict]
    reward_P_Q_N: Tensor
    solved_P_Q_N: Tensor
    valid_P_Q_N: Tensor
    failed_P: Tensor
    texts: list[str] = field(default_factory=list)

    def pass_rate_P_Q(self) -> Tensor:
        """Share of the scorable attempts at each question that are right [P, Q], float64; NaN where none can be scored."""
        return self.solved_P_Q_N.sum(2).double() / self.valid_P_Q_N.sum(2)

    def pass_rate_P(self) -> Tensor:
        """Their mean over the questions where there is one [P], float32; 0 where there is none."""
        return self.pass_rate_P_Q().float().nanmean(1).nan_to_num()


class RolloutEnv:
    """Puts problems to policies: prompt, sample, check, score. Safe to call from several threads.

    fmt, verifier: `problems.prompts.PromptFormat`, `problems.pool.VerifierPool`. scheme: student reward, `binary` or `paper`
    (see `student_reward`); under `binary` the scores of a reward function are rewards as they are. threads: of this process,
    among which work is shared out where there are no worker processes (parallel). tokens: drawn so far, by those too.
    """

    parallel: Parallel | None = None

    def __init__(
        self, backbone: Backbone, sampler: Sampler, fmt: Any, verifier: Any, scheme: Scheme = "binary", threads: int = 1
    ) -> None:
        self.backbone, self.sampler, self.fmt, self.verifier, self.threads = backbone, sampler, fmt, verifier, threads
        self.scheme: Scheme = scheme
        self.tokens = 0
        self.shared: dict[str, Any] = {}  # columns, see `share`
        self._prompts: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def share(self, problems: Sequence[Problem]) -> None:
        """Give a reward function with every problem what all rows of the source say alike."""
        self.shared = {} if self.verifier.compares else shared_columns([problem.extra for problem in problems])

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of the student prompt for a problem (kept between calls)."""
        with self._lock:
            if problem.question not in self._prompts:
                self._prompts[problem.question] = self.fmt.student_ids(self.backbone.tokenizer, problem.question)
            return self._prompts[problem.question]

    def room(self, problem: Problem, sampling: SamplingConfig) -> bool:
        """Whether prompt and completion budget fit in the model's context."""
        return len(self.prompt(problem)) + sampling.max_tokens <= self.backbone.context

    def release(self) -> None:
        """Give a GPU's memory that is not in use to other processes: the sampler's cache and torch's blocks."""
        if self.backbone.device.type == "cuda":
            self.sampler.release()
            torch.cuda.empty_cache()  # without gc, which takes 0.3 s: work that ended well leaves no cycles

    def draw(self, stack: AdapterStack | None, request: Request) -> Rollouts:
        """What the sampler draws, counted."""
        rollouts = self.sampler.sample(stack, request)
        with self._lock:
            self.tokens += int(rollouts.length_B.sum())
        return rollouts

    def request(
        self, problems_P_Q: list[list[Problem]], attempts: int, seed_P: list[int], sampling: SamplingConfig, first: int
    ) -> Request:
        """N attempts of policy p at problems_P_Q[p] (equally many problems each). first: n of the first attempt.

        A rollout draws from (seed_P[p], problem id, how often the problem came before in the list, n) alone.
        """
        prompts_P_Q = [[self.prompt(problem) for problem in problems] for problems in problems_P_Q]
        seed_P_Q: list[list[int]] = []
        for seed, problems in zip(seed_P, problems_P_Q, strict=True):
            before: Counter[str] = Counter()
            seed_P_Q.append([])
            for problem in problems:
                seed_P_Q[-1].append(seeds.skip(seeds.derive(seed, problem.id, before[problem.id]), first))
                before[problem.id] += 1
        return Request(prompts_P_Q, attempts, seed_P_Q, sampling)

    def sample(self, stack: AdapterStack | None, request: Request, threads: int = 1) -> tuple[Rollouts, list[str]]:
        """What is drawn, and its texts. threads: share out the problems of a single policy."""
        P, Q = len(request.prompts_P_Q), len(request.prompts_P_Q[0])

        def draw(part: slice) -> Rollouts:  # every prompt has its own seed, so the draws are the same in any parts
            return self.draw(stack, request.select(part))

        if P == 1 and threads > 1:
            size = -(-Q // threads)
            with ThreadPoolExecutor(threads) as pool:
                rollouts = join(list(pool.map(draw, [slice(first, first + size) for first in range(0, Q, size)])))
        else:
            rollouts = draw(slice(None))
        texts = rollouts.texts(self.backbone)
        if opens_thinking(self.backbone.tokenizer, request.prompts_P_Q[0][0]):
            texts = [f"<think>{text}" for text in texts]  # so that an unfinished block is seen, which holds no answer
        return rollouts, texts

    def rollout(
        self,
        stack: AdapterStack | None,
        problems_P_Q: list[list[Problem]],
        attempts: int,
        seed_P: list[int],
        sampling: SamplingConfig,
        threads: int = 1,
        first: int = 0,
    ) -> RolloutBatch:
        """What `sample` gives for a `request`, verified and rewarded."""
        rollouts, texts = self.sample(stack, self.request(problems_P_Q, attempts, seed_P, sampling, first), threads)
        asked = [problem for problems in problems_P_Q for problem in problems for _ in range(attempts)]
        with self._lock:
            columns = columns_of(asked, self.shared)
            if not getattr(self.verifier, "compares", True):  # a reward function may look at the tokens
                pairs = zip(rollouts.tokens_B_T.tolist(), rollouts.length_B.tolist(), strict=True)
                columns["completion_ids"] = [tokens_T[:length] for tokens_T, length in pairs]
            verdicts = self.verifier.check(texts, [problem.answer for problem in asked], columns)
        scores = getattr(verdicts, "scores", ()) if self.scheme == "binary" else ()
        judged = zip(verdicts, texts, asked, strict=True)
        scores = scores or [student_reward(verdict, text, p.answer, self.scheme) for verdict, text, p in judged]
        shape, temperature = (len(problems_P_Q), len(problems_P_Q[0]), attempts), sampling.temperature
        reward_P_Q_N = torch.tensor(scores, dtype=torch.float32).view(shape)
        solved_P_Q_N = torch.tensor([v.solved for v in verdicts]).view(shape)
        valid_P_Q_N = torch.tensor([v is not Verdict.UNSCORABLE for v in verdicts]).view(shape)
        failed_P = rollouts.failed_B.view(len(problems_P_Q), -1).any(1)
        figures = (reward_P_Q_N, solved_P_Q_N, valid_P_Q_N, failed_P)
        return RolloutBatch(problems_P_Q, temperature, rollouts, verdicts, *figures, texts)


def opens_thinking(tokenizer: Any, prompt_ids: list[int]) -> bool:
    """Whether the chat template has begun a think block that the completion has to end."""
    return bool(tokenizer.decode(prompt_ids[-8:], skip_special_tokens=False).rstrip().endswith("<think>"))


WORD = re.compile(r"\\?[A-Za-z]+|\d+(?:[.,]\d+)*|\S")


def masked(text: str, gold: str) -> str:
    """The text with every run of tokens that is the gold answer replaced by `...` (`42` is not in `142`)."""
    wanted, parts, last = WORD.findall(gold), list[str](), 0
    if not wanted or wanted[0] not in text:
        return text
    spans, size = list(WORD.finditer(text)), len(wanted)
    words = [span.group() for span in spans]
    for i in range(len(words) - size + 1):
        if words[i : i + size] == wanted and spans[i].start() >= last:
            parts += [text[last : spans[i].start()], "..."]
            last = spans[i + size - 1].end()
    return "".join([*parts, text[last:]])


def mentions(completion: str, gold: str) -> bool:
    """Whether the gold answer occurs in the text as a run of tokens."""
    return masked(completion, gold) != completion


KEPT, HEAD, TAIL = 8, 1000, 3000  # completions kept of one batch, and characters of each


def keep(env: RolloutEnv, batch: RolloutBatch, p: int = 0, n: int = KEPT) -> list[Row]:
    """At most n attempts of policy p, evenly spaced in its batch, with the answer read and what came of them.

    near miss: wrong, but the gold answer occurs in the text, or a graded reward is not 0. Others: `VerifierPool.outcomes`.
    """
    if not batch.texts:
        return []
    (Q, N), kept = batch.reward_P_Q_N.shape[1:], []
    rows = sorted({p * Q * N + i * Q * N // n for i in range(n)})
    texts, asked = [batch.texts[row] for row in rows], [batch.problems_P_Q[p][row // N % Q] for row in rows]
    verdicts, ended = [batch.verdicts[row] for row in rows], batch.rollouts.ended_B[rows].tolist()
    outcomes = env.verifier.outcomes(texts, verdicts, ended, [problem.answer for problem in asked])
    for row, problem, text, (outcome, read) in zip(rows, asked, texts, outcomes, strict=True):
        verdict, reward = batch.verdicts[row].value, float(batch.reward_P_Q_N.flatten()[row])
        near = mentions(text, problem.answer) or (env.scheme == "binary" and reward > 0)
        outcome = "near miss" if outcome == "wrong" and near else outcome
        shown = {"question": problem.question, "answer": problem.answer, "completion": text, "read": read}
        shown = {key: value and clipped(value, HEAD, TAIL) for key, value in shown.items()}
        kept.append({"id": problem.id, **shown, "outcome": outcome, "verdict": verdict, "reward": reward})
    return kept


FULL = {"binary": 1.0, "paper": 120.0}  # points of a right answer


def student_reward(verdict: Verdict, completion: str, gold: str, scheme: Scheme) -> float:
    """Reward of one student attempt.

    `binary`: 1 correct, 0 else. `paper` (its experimental setup): 120 correct; 20 answered, wrong, but the gold answer occurs
    in the text; 10 answered otherwise, also where the check timed out or crashed; 0 no answer, or unscorable.
    """
    if scheme == "binary" or verdict.solved:
        return FULL[scheme] if verdict.solved else 0.0
    if verdict in (Verdict.NO_ANSWER, Verdict.UNSCORABLE):
        return 0.0
    return 20.0 if mentions(completion, gold) else 10.0
