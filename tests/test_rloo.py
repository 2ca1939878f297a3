"""RLOO on numbers worked by hand."""

import math

import torch

from soar.engine.rloo import group_shares, k3, leave_one_out, policy_loss


def close(found: torch.Tensor, expected: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=tolerance, atol=tolerance)


def test_advantage_is_reward_minus_the_mean_of_the_others():
    close(leave_one_out(torch.tensor([1.0, 0.0, 0.0, 2.0])), [1 - 2 / 3, -1.0, -1.0, 2 - 1 / 3])
    close(leave_one_out(torch.tensor([3.0, -5.0])), [8.0, -8.0])
    reward = torch.tensor([1.0, 0.0, math.nan, 3.0])
    valid = torch.tensor([True, True, False, True])
    close(leave_one_out(reward, valid), [1.0 - 1.5, 0.0 - 2.0, 0.0, 3.0 - 0.5])
    reward = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [4.0, 4.0, 4.0]])
    valid = torch.tensor([[False, True, False], [False, False, False], [True, True, True]])
    for normalize in (False, True):
        assert torch.equal(leave_one_out(reward, valid, normalize), torch.zeros(3, 3))
    assert torch.equal(leave_one_out(torch.tensor([[7.0]])), torch.zeros(1, 1))


def test_normalize_divides_by_the_deviation_of_the_valid_rewards():
    reward = torch.tensor([[2.0, 4.0, 9.0], [2.0, 4.0, 1000.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    first = math.sqrt((9 + 1 + 16) / 2)  # rewards 2, 4, 9 around 5
    second = math.sqrt((1 + 1) / 1)  # rewards 2, 4 around 3
    expected = [
        [-4.5 / (first + 1e-6), -1.5 / (first + 1e-6), 6.0 / (first + 1e-6)],
        [-2.0 / (second + 1e-6), 2.0 / (second + 1e-6), 0.0],
    ]
    close(leave_one_out(reward, valid, normalize=True), expected)


def test_k3_on_hand_worked_numbers():
    logprob = torch.tensor([[-1.0, -2.0, -3.0]])
    reference = torch.tensor([[-1.0, -1.0, -5.0]])
    close(k3(logprob, reference), [[0.0, math.e - 2.0, math.exp(-2.0) + 1.0]])


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
    reward = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    assert group_shares(reward) == {
        "frac_all_wrong": 0.5,
        "frac_all_right": 0.25,
        "frac_mixed": 0.25,
        "frac_reward_zero_std": 0.75,
    }
