"""Promotion, a pure function: rewards of the window -> keep the baseline or promote one student (method step 3).

Where the paper leaves room: the mean is over a full window, the window restarts after a promotion (else rewards measured
against a weaker baseline would promote twice), the median of an even number of repeats is the lower one.
"""

from collections.abc import Sequence
from statistics import median_low

from soar.types import Decision, Trial


def decide(
    window: Sequence[float], reward_G: Sequence[float | None], trials: Sequence[Trial], tau: float, size: int
) -> Decision:
    """The promotion rule after one outer step.

    window: mean reward of each step since the last promotion, this step's last; only the last `size` count, and their mean
    must exceed tau. reward_G: None where every repeat failed. Promotes the dataset with the largest reward (ties: the lowest
    number) and its repeat with the lower median pass rate among those that did not fail.
    """
    if len(window) < size:
        return Decision(False, f"window holds {len(window)} of {size} steps")
    mean = sum(window[-size:]) / size
    if mean <= tau:
        return Decision(False, f"window mean {mean:.4f} does not exceed tau {tau:g}", mean)
    rated = {k: reward for k, reward in enumerate(reward_G) if reward is not None}
    if not rated:
        return Decision(False, "every student of this step failed", mean)
    best = max(rated, key=rated.__getitem__)
    _, median = median_low((t.pass_rate, t.repeat) for t in trials if t.dataset == best and not t.failed)
    return Decision(True, f"window mean {mean:.4f} exceeds tau {tau:g}", mean, best, median)
