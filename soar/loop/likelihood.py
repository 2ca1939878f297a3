"""A dense reward that needs no verifier: the probability of the gold answer behind a student's own reasoning."""

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from soar.backends.base import score
from soar.config import DENSE, Config, ConfigError
from soar.engine.policy import AdapterStack
from soar.engine.rollouts import rollouts_of
from soar.loop.rollout import RolloutBatch, RolloutEnv


def answer_marks(fmt: Any) -> tuple[str, str]:
    """What stands before and behind an answer in a completion. Raises ConfigError for a format without a mark."""
    if fmt.answer_style == "boxed":
        return "\\boxed{", "}"
    if not fmt.answer_marks:
        need = "need prompts whose answer stands behind one mark (boxed or marker)"
        raise ConfigError(f"the arm likelihood and reward.mode = likelihood or forced {need}")
    return fmt.answer_marks[-1], ""


def likelihood(
    env: RolloutEnv, stack: AdapterStack, batch: RolloutBatch, policies: Sequence[int] = (), forced: bool = False
) -> Tensor:
    """Mean probability [len(policies), Q, N] of the gold answer's tokens behind a student's own reasoning, on the CPU.

    The completion is cut behind its last answer mark, the gold answer put there, and read by the student itself (VeriFree,
    arXiv 2505.21493; the mean over tokens is RLPR's, arXiv 2506.18254). Where there is no mark: 0, who never answers earns
    nothing; forced: one is put behind the text, so that finishing alone earns nothing (budget forcing, arXiv 2501.19393).
    policies: those of the batch that it is asked of; none given: all.
    """
    policies = policies or range(stack.policies)
    N = batch.reward_P_Q_N.shape[2]
    rows_per_policy = len(batch.problems_P_Q[0]) * N
    chosen = batch.rollouts.select([p * rows_per_policy + row for p in policies for row in range(rows_per_policy)])
    golds = [problem.answer for p in policies for problem in batch.problems_P_Q[p] for _ in range(N)]
    rows = zip(chosen.prompts, chosen.texts(env.backbone), golds, strict=True)
    answered = [with_gold(env, prompt, text, gold, forced) for prompt, text, gold in rows]
    asked = rollouts_of(chosen.prompts, [(ids, [0.0] * len(ids), True) for ids, _ in answered], env.backbone.pad_id)
    share_B_T = score(env.backbone, stack.select(list(policies)), asked, batch.temperature).exp()
    share_B = torch.zeros(len(answered))
    for row, (ids, answer) in enumerate(answered):
        if ids:
            share_B[row] = share_B_T[row, len(ids) - answer : len(ids)].mean()
    return share_B.view(len(policies), -1, N)


def with_gold(env: RolloutEnv, prompt: Sequence[int], text: str, gold: str, forced: bool) -> tuple[list[int], int]:
    """Tokens of a completion with the gold answer behind its last mark, and how many of them are the answer's.

    ([], 0) where it has no mark, unless forced, or where the context has no room.
    """
    before, behind = answer_marks(env.fmt)
    if forced and before not in text:
        text = f"{text}\n{before}"
    if before not in text:
        return [], 0
    encode = partial(env.backbone.tokenizer.encode, add_special_tokens=False)
    reasoning = text[: text.rfind(before) + len(before)]
    space = "" if before.endswith("{") else " "
    ids = encode(f"{reasoning}{space}{gold}{behind}")
    # One token may hold the end of the reasoning and the beginning of the answer: it is the answer's.
    common = takewhile(lambda pair: pair[0] == pair[1], zip(encode(reasoning), ids, strict=False))
    start = sum(1 for _ in common)
    ids += [] if behind else [env.backbone.end_id]
    return (ids, len(ids) - start) if len(prompt) + len(ids) <= env.backbone.context else ([], 0)


def gold_shares(env: RolloutEnv, stack: AdapterStack, batch: RolloutBatch, config: Config) -> Tensor | None:
    """How likely the policies are to give the gold answers [P, Q, N], where reward.mode says so; else None."""
    mode = config.reward.mode
    return likelihood(env, stack, batch, forced=mode == "forced") if mode in DENSE else None
