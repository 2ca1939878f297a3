"""Our RLOO against TRL's `RLOOTrainer` on the same rollouts: its own advantage and loss code runs here.

TRL 1.16, `trl/trainer/rloo_trainer.py`: advantages in `_generate_and_score_completions` (lines 1682 to 1699), loss in
`_compute_loss` (lines 1822 to 1833). TRL averages over rows; here the sum is divided by rows * max_tokens, so TRL's
gradient is ours times max_tokens. TRL's ratio to the old log-probabilities is 1 here, with the same gradient.
"""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EOS, handmade_rollouts, tiny_backbone, tiny_model, tiny_tokenizer

from soar.config import OptimizerConfig, SamplingConfig
from soar.engine.rloo import leave_one_out
from soar.engine.update import StackOptimizer, update

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ATTEMPTS, MAX_TOKENS, TEMPERATURE = 4, 6, 0.7
PROMPTS = ([1, 9, 12, 20], [1, 7])
COMPLETIONS = [[5, 6, EOS], [8], [9, EOS], [4, 4, 7, 21, 3, 30], [EOS], [11, 12], [13, EOS], [14, 15, 16, EOS]]
REWARDS = [120.0, 0.0, 10.0, 20.0, None, 10.0, 10.0, 120.0]


def trl_trainer(folder: Path, model: Any) -> Any:
    """A trainer that samples nothing: completions and rewards are the ones above."""
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


def test_same_advantages_and_same_gradient_of_every_layer(tmp_path):
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
    assert (advantage_B[0].item(), advantage_B[4].item()) == (pytest.approx(120 - 10), 0.0)
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
