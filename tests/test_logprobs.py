"""Chunked log-probabilities and their gradients against autograd over all logits at once."""

from __future__ import annotations

import pytest
import torch
from helpers import ARCHITECTURES, plain_logprobs, random_rollouts, random_stack, tiny_backbone, tiny_model

from soar.engine import logprobs
from soar.engine.logprobs import token_logprobs


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
            value_B_T = token_logprobs(backbone, rollouts, 0.7)
        (value_B_T * weight_B_T).sum().backward()
        found.append((value_B_T.detach(), {n: t.grad for n, t in stack.tensors.items()}))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for name_of in found[0][1]:
        one, other = found[0][1][name_of], found[1][1][name_of]
        assert one is not None and other is not None
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
        assert one.abs().max() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_the_chunked_way_and_is_right(name: str) -> None:
    backbone, rollouts = tiny_backbone(name), random_rollouts(4)
    with torch.no_grad(), backbone.use(None):
        found_B_T = token_logprobs(backbone, rollouts, 1.0)
    assert logprobs._heads[backbone] is not None
    for row, (prompt, n) in enumerate(zip(rollouts.prompts, rollouts.length_B.tolist(), strict=True)):
        wanted_T = plain_logprobs(tiny_model(name), prompt, rollouts.tokens_B_T[row, :n].tolist())
        assert torch.allclose(found_B_T[row, :n], wanted_T.detach(), atol=1e-4)
        assert (found_B_T[row, n:] == 0).all()


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
        found_B_T = token_logprobs(backbone, rollouts, 1.0)
    assert logprobs._heads[backbone] is None
    wanted_T = plain_logprobs(tiny_model(), rollouts.prompts[0], rollouts.tokens_B_T[0, :1].tolist(), temperature=4.0)
    assert torch.allclose(found_B_T[0, :1], wanted_T.detach(), atol=1e-4)
