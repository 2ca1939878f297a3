"""RLOO on numbers worked by hand and against TRL; rejection sampling leaves its gradient unchanged, by enumeration."""

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EOS, handmade_rollouts, tiny_backbone, tiny_model, tiny_tokenizer
from torch import Tensor

from soar.config import OptimizerConfig, SamplingConfig
from soar.engine.rloo import leave_one_out, policy_loss
from soar.engine.update import StackOptimizer, update
from soar.loop.student import group_shares


def close(found: torch.Tensor, expected: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=tolerance, atol=tolerance)


def test_advantage_is_reward_minus_the_mean_of_the_others():
    close(leave_one_out(torch.tensor([1.0, 0.0, 0.0, 2.0])), [1 - 2 / 3, -1.0, -1.0, 2 - 1 / 3])
    reward = torch.tensor([1.0, 0.0, math.nan, 3.0])
    valid = torch.tensor([True, True, False, True])
    close(leave_one_out(reward, valid), [1.0 - 1.5, 0.0 - 2.0, 0.0, 3.0 - 0.5])
    reward = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [4.0, 4.0, 4.0]])
    valid = torch.tensor([[False, True, False], [False, False, False], [True, True, True]])
    for normalize in (False, True):
        assert torch.equal(leave_one_out(reward, valid, normalize), torch.zeros(3, 3))
        assert torch.equal(leave_one_out(torch.full((8,), 0.1), None, normalize), torch.zeros(8))  # not -7e-9, -7e-3
    assert torch.equal(leave_one_out(torch.tensor([[7.0]])), torch.zeros(1, 1))


def test_normalize_divides_by_the_deviation_of_the_valid_rewards():
    reward = torch.tensor([[2.0, 4.0, 9.0], [2.0, 4.0, 1000.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    first = math.sqrt((9 + 1 + 16) / 2) + 1e-6  # rewards 2, 4, 9 around 5
    second = math.sqrt((1 + 1) / 1) + 1e-6  # rewards 2, 4 around 3
    expected = [[-4.5 / first, -1.5 / first, 6.0 / first], [-2.0 / second, 2.0 / second, 0.0]]
    close(leave_one_out(reward, valid, normalize=True), expected)


def test_loss_with_divergence_on_hand_worked_numbers():
    logprob = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -1.0]])
    loss = policy_loss(logprob, torch.ones(1, 2), torch.tensor([1.0]), 4.0, reference, kl=0.5)
    close(loss.detach(), [(3.0 + 0.5 * (math.exp(-1) + math.e - 2.0)) / 4])
    loss.sum().backward()
    # d k3 / d logprob = 1 - exp(reference - logprob)
    close(logprob.grad, [[(-1 + 0.5 * (1 - math.exp(-1))) / 4, (-1 + 0.5 * (1 - math.e)) / 4]])
    # exp(500) is inf: a masked token must not turn loss or gradient into NaN.
    logprob = torch.tensor([[-1.0, -500.0]], requires_grad=True)
    mask, reference = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    loss = policy_loss(logprob, mask, torch.tensor([1.0]), 2.0, reference, kl=0.1)
    loss.sum().backward()
    close(loss.detach(), [0.5])
    close(logprob.grad, [[-0.5, 0.0]])


def test_group_shares():
    solved = torch.tensor([[[0, 0], [1, 1]], [[0, 1], [0, 0]]]).bool()
    shares = {"frac_all_wrong": 0.5, "frac_all_right": 0.25, "frac_mixed": 0.25, "frac_reward_zero_std": 0.75}
    assert group_shares(solved, solved.float(), solved | True) == shares
    points = torch.tensor([[[0.0, 20.0], [120.0, 120.0]], [[10.0, 120.0], [10.0, 20.0]]])  # wrong attempts are paid too
    assert group_shares(solved, points, points != 120.0) == shares | {"frac_reward_zero_std": 0.5}


# The teacher's texts are redrawn until they parse, so a kept text y has the log-probability log p(y) - log Z, where Z is the
# chance that a text is kept. The update uses log p(y). That is right only if the weights of a batch sum to zero.
Text = tuple[int, ...]

TOKENS, LONGEST, GROUP = 3, 3, 3  # token 0 ends a text
TEXTS = [(*body, 0) for length in range(LONGEST) for body in itertools.product(range(1, TOKENS), repeat=length)]
KEPT = [text for text in TEXTS if len(text) != 1 and text[0] != 2] + [(2, 0)]
REWARD = {text: 1.0 + 3.0 * i for i, text in enumerate(KEPT)}
GROUPS = list(itertools.product(KEPT, repeat=GROUP))


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

    def update(self, texts: tuple[Text, ...], weights: Tensor, kept: bool) -> Tensor:
        """Gradient of the policy loss. kept: of the rejection sampler, -log Z put on the first token."""
        logprob = torch.stack([self.tokens(text) for text in texts])
        mask = torch.tensor([[1.0] * len(text) + [0.0] * (LONGEST - len(text)) for text in texts], dtype=torch.float64)
        if kept:
            logprob = logprob - torch.eye(LONGEST, dtype=torch.float64)[0] * self.log_kept()
        return self.gradient(policy_loss(logprob, mask, weights, len(texts) * LONGEST).sum())


def rewards(texts: tuple[Text, ...]) -> Tensor:
    return torch.tensor([REWARD[text] for text in texts], dtype=torch.float64)


def gap(policy: Policy, texts: tuple[Text, ...], weights: Tensor) -> float:
    """How far the gradient with these weights is from that of the rejection sampler."""
    one, two = (policy.update(texts, weights, kept) for kept in (False, True))
    return (one - two).abs().max().item()


def test_only_the_rloo_gradient_is_that_of_the_rejection_sampler():
    """Not that of REINFORCE without a baseline."""
    policy = Policy(0)
    advantages = {texts: leave_one_out(rewards(texts)) for texts in GROUPS}
    assert max(gap(policy, texts, advantage) for texts, advantage in advantages.items()) <= 1e-12
    assert max(gap(policy, texts, rewards(texts)) for texts in GROUPS) > 1e-2


ATTEMPTS, MAX_TOKENS, TEMPERATURE = 4, 6, 0.7
PROMPTS = ([1, 9, 12, 20], [1, 7])
COMPLETIONS = [[5, 6, EOS], [8], [9, EOS], [4, 4, 7, 21, 3, 30], [EOS], [11, 12], [13, EOS], [14, 15, 16, EOS]]
REWARDS = [120.0, 0.0, 10.0, 20.0, None, 10.0, 10.0, 120.0]


def trl_trainer(folder: Path, model: Any) -> Any:
    """A trainer that samples nothing: completions and rewards are the ones above."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class Given(trl.RLOOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
            return COMPLETIONS

    words = tiny_tokenizer()
    config = trl.RLOOConfig(
        str(folder), per_device_train_batch_size=len(COMPLETIONS), num_generations=ATTEMPTS, beta=0.0, bf16=False,
        max_completion_length=MAX_TOKENS, temperature=TEMPERATURE, use_cpu=True, report_to=[],
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": words.decode(prompt)} for prompt in PROMPTS])
    return Given(model, reward_funcs=lambda **_: REWARDS, args=config, train_dataset=rows, processing_class=words)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_same_advantages_and_same_gradient_of_every_layer(tmp_path):
    """Our RLOO against TRL's `RLOOTrainer` on the same rollouts: its own advantage and loss code runs here.

    TRL 1.16, `trl/trainer/rloo_trainer.py`: advantages in `_generate_and_score_completions` (lines 1682 to 1699), loss in
    `_compute_loss` (lines 1822 to 1833). TRL averages over rows; here the sum is divided by rows * max_tokens, so TRL's
    gradient is ours times max_tokens. TRL's ratio to the old log-probabilities is 1 here, with the same gradient.
    """
    logging.disable(logging.WARNING)
    model, words = tiny_model("llama"), tiny_tokenizer()
    trainer = trl_trainer(tmp_path, model)
    given = [{"prompt": words.decode(prompt)} for prompt in PROMPTS for _ in range(ATTEMPTS)]
    batch = trainer._generate_and_score_completions(given)
    trainer._compute_loss(trainer.model, batch).backward()
    logging.disable(logging.NOTSET)
    reward = torch.tensor([[math.nan if r is None else r for r in REWARDS]]).view(2, ATTEMPTS)
    advantage_B = leave_one_out(reward, ~reward.isnan()).reshape(-1)
    torch.testing.assert_close(advantage_B, batch["advantages"])
    backbone = tiny_backbone("llama", adapter="full")
    stack = backbone.new_stack(0)
    rollouts = handmade_rollouts([prompt for prompt in PROMPTS for _ in range(ATTEMPTS)], COMPLETIONS)
    optimizer = StackOptimizer(stack, OptimizerConfig(kl=0.0, clip=1e9))  # no clipping
    sampling = SamplingConfig(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
    update(backbone, optimizer, rollouts, advantage_B, 1e-3, sampling)
    assert len(backbone.layers) == 14
    for name in backbone.layers:
        theirs = model.get_submodule(name).weight.grad.T
        ours = stack.tensors[f"{name}.delta"].grad
        assert ours is not None and theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours[0] * MAX_TOKENS, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
