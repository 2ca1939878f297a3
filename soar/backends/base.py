"""The seam between the loop and what computes: soar.engine for a plain `Backbone`, else a `Backend`. The loop never looks
into an `AdapterStack`: a `Backend`'s tensors say where its weights are. A `Sampler` completes.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from soar.config import OptimizerConfig, SamplingConfig
from soar.engine import update as native
from soar.engine.logprobs import token_logprobs
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts


@runtime_checkable
class Backend(Protocol):
    """A backbone whose weights are elsewhere."""

    def begin(self, stack: AdapterStack, config: OptimizerConfig) -> Any:
        """As `begin` below."""

    def step(self, stack: Any, rollouts: Rollouts, advantage_B: Tensor, lr: float, tokens: int) -> native.UpdateStats:
        """As `update` below, of what `begin` gave. tokens: the most that a completion may have."""

    def score(self, stack: AdapterStack, rollouts: Rollouts) -> Tensor:
        """As `score` below, at temperature 1."""

    def local(self, stack: AdapterStack) -> AdapterStack:
        """The stack, of one slice, with its weights here, to be written into a file."""


def begin(backbone: Backbone, stack: AdapterStack, config: OptimizerConfig) -> Any:
    """A fresh AdamW over every slice of a stack: its `stack` is the one that is trained from here on, its `state` gives, and
    its `restore` takes, flat tensors with the policies on the first axis.
    """
    return backbone.begin(stack, config) if isinstance(backbone, Backend) else native.StackOptimizer(stack, config)


def update(
    backbone: Backbone, optimizer: Any, rollouts: Rollouts, advantage_B: Tensor, lr: float, sampling: SamplingConfig
) -> native.UpdateStats:
    """One RLOO step of every policy of the optimizer's stack, as `engine.update.update` documents it."""
    if isinstance(backbone, Backend):
        return backbone.step(optimizer, rollouts, advantage_B, lr, sampling.max_tokens)
    return native.update(backbone, optimizer, rollouts, advantage_B, lr, sampling)


def score(backbone: Backbone, stack: AdapterStack, rollouts: Rollouts, temperature: float) -> Tensor:
    """Log-probability [B, T] of every token of the rollouts under their policies, on the CPU; what is not there is 0."""
    if isinstance(backbone, Backend):
        return backbone.score(stack, rollouts)
    kept_P = native.rows_that_count(rollouts, torch.ones(rollouts.rows), stack.policies, OptimizerConfig())

    def scores(limit: int) -> Tensor:
        logprob_B_T = torch.zeros(rollouts.tokens_B_T.shape)
        for lane_L, packed in native.micro_batches(backbone, rollouts, kept_P, limit):
            lanes = stack.select(lane_L) if backbone.lanes else stack
            logprob_R_T = token_logprobs(backbone, lanes, packed, temperature).cpu()
            logprob_B_T[packed.row_R.cpu(), : logprob_R_T.shape[1]] = logprob_R_T
        return logprob_B_T

    with torch.no_grad():
        return native.in_micro_batches(backbone, scores)
