"""Log-probabilities of packed rows against a plain forward pass a row, and their gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    handmade_rollouts,
    plain_logprobs,
    random_rollouts,
    random_stack,
    some_prompts,
    tiny_backbone,
    tiny_model,
)
from torch import Tensor

from soar.engine import logprobs
from soar.engine.logprobs import pack, token_logprobs
from soar.engine.policy import Backbone
from soar.engine.rollouts import Rollouts


def logprobs_of(backbone: Backbone, rollouts: Rollouts, rows_P: list[list[int]], temperature: float = 1.0) -> Tensor:
    """Rows in the order of the rollouts."""
    packed = pack(backbone, rollouts, rows_P)
    value_R_T = token_logprobs(backbone, packed, temperature)
    return value_R_T[torch.tensor(packed.rows).argsort()]


def shared_prompts() -> Rollouts:
    """Two policies; the first has prompts 0, 1, 0, 0, the second 2, 2, 3; completions of 1 to 6 tokens."""
    prompts, plain = some_prompts(4, seed=2), random_rollouts(7, seed=1)
    completions = [plain.tokens_B_T[i, :n].tolist() for i, n in enumerate(plain.length_B.tolist())]
    return handmade_rollouts([prompts[i] for i in (0, 1, 0, 0, 2, 2, 3)], completions)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [1, 70, 1 << 27])
def test_values_and_gradients_are_those_of_the_plain_way(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, rollouts = tiny_backbone(name), random_rollouts(6)
    weight_B_T = torch.randn(rollouts.tokens_B_T.shape, generator=torch.Generator().manual_seed(1))
    found = []
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    for plain in (False, True):
        logprobs._heads[backbone] = None if plain else logprobs._Head(backbone)
        stack = random_stack(backbone, 2)
        stack.trainable()
        with backbone.use(stack):
            value_B_T = logprobs_of(backbone, rollouts, [[0, 1, 2], [3, 4, 5]], 0.7)
        (value_B_T * weight_B_T).sum().backward()
        found.append((value_B_T.detach(), {n: t.grad for n, t in stack.tensors.items()}))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for name_of in found[0][1]:
        one, other = found[0][1][name_of], found[1][1][name_of]
        assert one is not None and other is not None
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
        assert one.abs().max() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_shared_by_its_completions_is_right_for_each(name: str) -> None:
    """Beyond the sliding window, one-token completions among them, the chunked way of every architecture."""
    backbone, rollouts = tiny_backbone(name), shared_prompts()
    with torch.no_grad():
        value_B_T = logprobs_of(backbone, rollouts, [[0, 1, 2, 3], [4, 5, 6]])
    assert logprobs._heads[backbone] is not None
    for row, (prompt, n) in enumerate(zip(rollouts.prompts, rollouts.length_B.tolist(), strict=True)):
        wanted_T = plain_logprobs(tiny_model(name), prompt, rollouts.tokens_B_T[row, :n].tolist())
        assert torch.allclose(value_B_T[row, :n], wanted_T.detach(), atol=1e-4)
        assert (value_B_T[row, n:] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_shared_prompt_gets_the_gradient_of_all_its_completions(name: str) -> None:
    """The gradient of rows that share a prompt is the sum of their gradients when each is a micro-batch of its own."""
    backbone, rollouts = tiny_backbone(name), shared_prompts()
    found = []
    for batches in ([[[0, 1, 2, 3], [4, 5, 6]]], [[[i], []] for i in range(4)] + [[[], [i]] for i in (4, 5, 6)]):
        stack = random_stack(backbone, 2).trainable()
        for rows_P in batches:
            with backbone.use(stack):
                value_R_T = token_logprobs(backbone, pack(backbone, rollouts, rows_P), 0.7)
            (value_R_T**2).sum().backward()
        found.append({key: tensor.grad for key, tensor in stack.tensors.items()})
    for key, gradient in found[0].items():
        assert gradient is not None and found[1][key] is not None
        assert torch.allclose(gradient, found[1][key], rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_a_model_with_another_head_takes_the_plain_way() -> None:
    """A model that scales its logits behind the output layer is noticed by the probe."""
    backbone, rollouts = tiny_backbone(), random_rollouts(3)
    real = backbone.model.forward

    def scaled(*args: object, **more: object) -> object:
        out = real(*args, **more)
        out.logits = out.logits * 0.25
        return out

    backbone.model.forward = scaled
    with torch.no_grad():
        found_B_T = logprobs_of(backbone, rollouts, [[0, 1, 2]])
    assert logprobs._heads[backbone] is None
    wanted_T = plain_logprobs(tiny_model(), rollouts.prompts[0], rollouts.tokens_B_T[0, :1].tolist(), temperature=4.0)
    assert torch.allclose(found_B_T[0, :1], wanted_T.detach(), atol=1e-4)
