"""RLOO, pure maths on tensors: leave-one-out advantage and the policy loss.

A completion is one action, as in Ahmadian et al. 2024 (arXiv 2402.14740): its log-probability is the sum over its
tokens. KL is a term of the loss (k3 estimator, Schulman 2020), and the sum is divided by ONE constant. So rejection
sampling of teacher texts leaves the gradient unchanged: the advantages sum to zero, and the log of the acceptance
probability, the same in every row, drops out; a per-sequence length average would break that. No importance ratio and
no clipping: every batch is used for exactly one step, so the ratio is 1.
"""

import torch
from torch import Tensor


def leave_one_out(reward_X_N: Tensor, valid_X_N: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Advantage [..., N]: each reward minus the mean of the others of its group (last axis).

    valid: False excludes an entry, whose advantage is 0, as in a group that is `all_equal`. normalize divides by the
    standard deviation of the group's rewards (plus 1e-6); not in the paper.
    """
    valid = torch.ones_like(reward_X_N, dtype=torch.bool) if valid_X_N is None else valid_X_N
    reward = torch.where(valid, reward_X_N, torch.zeros_like(reward_X_N))
    count = valid.sum(-1, keepdim=True)
    total = reward.sum(-1, keepdim=True)
    others = (total - reward) / (count - 1).clamp(min=1)
    # Equal rewards leave a remainder of rounding, which a deviation next to nothing would make a signal.
    advantage = torch.where(valid & ~all_equal(reward, valid)[..., None], reward - others, torch.zeros_like(reward))
    if normalize:
        mean = total / count.clamp(min=1)
        squares = torch.where(valid, (reward - mean) ** 2, torch.zeros_like(reward))
        deviation = (squares.sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        advantage = advantage / (deviation + 1e-6)
    return advantage


def all_equal(reward_X_N: Tensor, valid_X_N: Tensor) -> Tensor:
    """Whether the valid rewards of a group (last axis) are equal, so that it has no signal [...]; True of fewer than two."""
    low = torch.where(valid_X_N, reward_X_N, torch.inf).amin(-1)
    high = torch.where(valid_X_N, reward_X_N, -torch.inf).amax(-1)
    return low >= high


def k3(logprob_B_T: Tensor, reference_B_T: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token, nats, never negative: exp(d) - d - 1, d = reference - policy."""
    difference = reference_B_T - logprob_B_T
    return torch.exp(difference) - difference - 1.0


def policy_loss(
    logprob_B_T: Tensor,
    mask_B_T: Tensor,
    advantage_B: Tensor,
    normaliser: float,
    reference_B_T: Tensor | None = None,
    kl: float = 0.0,
) -> Tensor:
    """Loss [B], to be summed over the rows of a policy.

    Row i: (-advantage_i * sum_t logprob_it + kl * sum_t k3_it) / normaliser, over tokens where mask is 1.
    normaliser: one constant for the whole update (rows * max_tokens), never a row's own length.
    """
    row_B = -advantage_B * (logprob_B_T * mask_B_T).sum(-1)
    if reference_B_T is not None and kl > 0.0:
        # Masked before the exponential: a masked token may be so unlikely that k3 overflows, and inf * 0 is NaN.
        row_B = row_B + kl * k3(logprob_B_T * mask_B_T, reference_B_T * mask_B_T).sum(-1)
    return row_B / normaliser
