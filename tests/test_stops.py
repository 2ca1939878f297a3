"""A completion ends with the token that completes a stop string, on both decoding paths, whenever it is looked for."""

from __future__ import annotations

import pytest
import torch
from helpers import random_stack, some_prompts, tiny_backbone

from soar.config import SamplingConfig
from soar.engine import graphs as decode
from soar.engine.policy import Backbone
from soar.engine.sampler import NativeSampler, Rollouts


def sampled(backbone: Backbone, stop: tuple[str, ...], static: bool) -> Rollouts:
    prompts = some_prompts(6, seed=3)
    sampling = SamplingConfig(max_tokens=30, stop=stop)
    sampler = NativeSampler(backbone, static=static)
    return sampler.sample(random_stack(backbone, 2), [prompts[:3], prompts[3:]], 6, [[1, 2, 3], [4, 5, 6]], sampling)


def a_stop(backbone: Backbone, free: Rollouts) -> str:
    """Two words that stand beside each other in the middle of some completion, cut within the second."""
    row = max(range(free.rows), key=lambda r: int(free.length_B[r]))
    words = free.texts(backbone)[row].split(" ")
    return f"{words[4]} {words[5]}"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("interval", [1, 3, 8])
def test_rows_end_where_the_stop_string_is_complete(
    static: bool, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CHECK", interval)
    backbone = tiny_backbone("llama")
    free = sampled(backbone, (), static)
    stop = a_stop(backbone, free)
    found = sampled(backbone, (stop, "never written"), static)
    stopped = 0
    for row, text in enumerate(found.texts(backbone)):
        n, whole = int(found.length_B[row]), free.tokens_B_T[row].tolist()
        assert found.tokens_B_T[row, :n].tolist() == whole[:n]  # what is drawn does not change
        assert found.logprob_B_T[row, n:].abs().sum() == 0
        if stop in free.texts(backbone)[row]:
            stopped += 1
            assert text.endswith(stop) and text.count(stop) == 1 and found.ended_B[row] and not found.failed_B[row]
            assert stop not in backbone.tokenizer.decode(whole[: n - 1])
        else:
            assert n == free.length_B[row] and found.ended_B[row] == free.ended_B[row]
    assert 0 < stopped < found.rows


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        SamplingConfig(stop=("",))


def test_both_paths_stop_alike() -> None:
    backbone = tiny_backbone("qwen2")
    stop = a_stop(backbone, sampled(backbone, (), False))
    growing, fixed = sampled(backbone, (stop,), False), sampled(backbone, (stop,), True)
    assert torch.equal(growing.length_B, fixed.length_B) and torch.equal(growing.ended_B, fixed.ended_B)
    assert growing.texts(backbone) == fixed.texts(backbone)
