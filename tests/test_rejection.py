"""Rejection sampling leaves the RLOO gradient unchanged, by exact enumeration on a small policy.

The teacher's texts are redrawn until they parse, so a kept text y has the log-probability log p(y) - log Z, where Z is
the chance that a text is kept. The update uses log p(y). That is right only if the weights of a batch sum to zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from soar.engine.rloo import leave_one_out, policy_loss

Text = tuple[int, ...]

TOKENS, LONGEST, GROUP = 3, 3, 3  # token 0 ends a text
TEXTS = [(*body, 0) for length in range(LONGEST) for body in itertools.product(range(1, TOKENS), repeat=length)]
KEPT = [text for text in TEXTS if len(text) != 1 and text[0] != 2] + [(2, 0)]
REWARD = {text: 1.0 + 3.0 * i for i, text in enumerate(KEPT)}


class Policy:
    """One row of logits for each prefix; texts of the greatest length end by themselves."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.logits = torch.randn(TOKENS ** (LONGEST - 1) + TOKENS, TOKENS, dtype=torch.float64).requires_grad_(True)

    def tokens(self, text: Text) -> Tensor:
        """Log-probabilities [LONGEST] of the tokens of a text, 0 behind its end."""
        parts = []
        for t, token in enumerate(text):
            prefix = sum(word * TOKENS**i for i, word in enumerate(text[:t])) + (t > 0)
            allowed = self.logits[prefix] if t < LONGEST - 1 else self.logits[prefix][:1]
            parts.append(torch.log_softmax(allowed, 0)[token])
        return torch.stack([*parts, *[torch.zeros((), dtype=torch.float64)] * (LONGEST - len(text))])

    def log_kept(self) -> Tensor:
        """log Z."""
        return torch.stack([self.tokens(text).sum() for text in KEPT]).logsumexp(0)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logits)[0]


Gradient = Callable[[Policy, tuple[Text, ...], bool], Tensor]


def batch(policy: Policy, texts: tuple[Text, ...], kept: bool) -> tuple[Tensor, Tensor]:
    """Token log-probabilities and mask; kept: of the rejection sampler, -log Z put on the first token."""
    logprob = torch.stack([policy.tokens(text) for text in texts])
    mask = torch.tensor([[1.0] * len(text) + [0.0] * (LONGEST - len(text)) for text in texts], dtype=torch.float64)
    if kept:
        first = torch.zeros(LONGEST, dtype=torch.float64)
        first[0] = 1.0
        logprob = logprob - first * policy.log_kept()
    return logprob, mask


def rloo(policy: Policy, texts: tuple[Text, ...], kept: bool) -> Tensor:
    advantage = leave_one_out(torch.tensor([REWARD[text] for text in texts], dtype=torch.float64))
    return policy.gradient(policy_loss(*batch(policy, texts, kept), advantage, len(texts) * LONGEST).sum())


def reinforce(policy: Policy, texts: tuple[Text, ...], kept: bool) -> Tensor:
    reward = torch.tensor([REWARD[text] for text in texts], dtype=torch.float64)
    return policy.gradient(policy_loss(*batch(policy, texts, kept), reward, len(texts) * LONGEST).sum())


def length_averaged(policy: Policy, texts: tuple[Text, ...], kept: bool) -> Tensor:
    """RLOO with each row divided by its own length."""
    advantage = leave_one_out(torch.tensor([REWARD[text] for text in texts], dtype=torch.float64))
    logprob, mask = batch(policy, texts, kept)
    return policy.gradient((-advantage * (logprob * mask).sum(1) / mask.sum(1)).sum() / len(texts))


def groups() -> list[tuple[Text, ...]]:
    return list(itertools.product(KEPT, repeat=GROUP))


def test_the_policy_is_a_distribution() -> None:
    policy = Policy(0)
    total = torch.stack([policy.tokens(text).sum().exp() for text in TEXTS]).sum().item()
    kept = policy.log_kept().exp().item()
    assert total == pytest.approx(1.0)
    assert 0.05 < kept < 0.95
    assert len({len(text) for text in KEPT}) > 1


@pytest.mark.parametrize("seed", [0, 1])
def test_every_rloo_gradient_is_that_of_the_rejection_sampler(seed: int) -> None:
    policy = Policy(seed)
    for texts in groups():
        torch.testing.assert_close(rloo(policy, texts, False), rloo(policy, texts, True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("other", [reinforce, length_averaged])
def test_other_losses_do_not_have_this(other: Gradient) -> None:
    policy = Policy(0)
    gaps = [(other(policy, texts, False) - other(policy, texts, True)).abs().max().item() for texts in groups()]
    assert max(gaps) > 1e-2


def expected(policy: Policy, gradient: Gradient) -> Tensor:
    """Mean gradient of a loss over all groups that the rejection sampler can draw."""
    mean = torch.zeros_like(policy.logits)
    with torch.no_grad():
        chance = {text: (policy.tokens(text).sum() - policy.log_kept()).exp().item() for text in KEPT}
    for texts in groups():
        weight = torch.tensor([chance[text] for text in texts]).prod().item()
        mean += weight * gradient(policy, texts, False)
    return mean.detach()


def test_expected_gradient_is_that_of_the_mean_reward() -> None:
    """RLOO's mean over all groups is -grad E[reward | kept] / LONGEST; REINFORCE's has a part along grad log Z."""
    policy = Policy(0)
    chance_K = torch.stack([policy.tokens(text).sum() for text in KEPT]).softmax(0)
    mean_reward = (chance_K * torch.tensor([REWARD[text] for text in KEPT], dtype=torch.float64)).sum()
    wanted = -policy.gradient(mean_reward) / LONGEST
    torch.testing.assert_close(expected(policy, rloo), wanted, rtol=1e-6, atol=1e-8)
    bias = -mean_reward.item() * policy.gradient(policy.log_kept()) / LONGEST
    torch.testing.assert_close(expected(policy, reinforce), wanted + bias, rtol=1e-6, atol=1e-8)
    assert bias.abs().max() > 0.1
    averaged = expected(policy, length_averaged)
    assert torch.cosine_similarity(averaged.flatten(), wanted.flatten(), dim=0) < 0.999


@pytest.mark.parametrize(("sizes", "unchanged"), [((2, 2, 2), True), ((1, 2, 3), False)])
def test_dataset_level_rewards_need_datasets_of_equal_size(sizes: tuple[int, ...], unchanged: bool) -> None:
    """Every text of a dataset carries its dataset's advantage; the weights sum to zero only for equal sizes."""
    policy = Policy(2)
    advantage_G = leave_one_out(torch.tensor([0.1, 0.0, 0.5], dtype=torch.float64))
    advantage = advantage_G.repeat_interleave(torch.tensor(sizes))
    texts = tuple(KEPT[i % len(KEPT)] for i in range(sum(sizes)))
    found = [
        policy.gradient(policy_loss(*batch(policy, texts, kept), advantage, len(texts) * LONGEST).sum())
        for kept in (False, True)
    ]
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12) is unchanged
