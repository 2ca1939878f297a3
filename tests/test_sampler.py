"""The native sampler against transformers' `generate`, and the independence of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    CONTEXT,
    EOS,
    PAD,
    handmade_rollouts,
    random_stack,
    some_prompts,
    tiny_backbone,
    tiny_model,
)

from soar.config import SamplingConfig
from soar.engine.logprobs import pack, token_logprobs
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts, join
from soar.engine.sampler import NativeSampler
from soar.seeds import skip

ENDS = [EOS, 7, 20]  # several, so that random models do end
STEPS = 24  # past the first growth of the cache
SAMPLING = SamplingConfig(max_tokens=STEPS)


def ending_backbone(name: str = "llama", **settings: Any) -> Backbone:
    backbone = tiny_backbone(name, **settings)
    backbone.end_ids = frozenset(ENDS)
    return backbone


def rows_of(rollouts: Rollouts) -> list[list[int]]:
    return [row[:n] for row, n in zip(rollouts.tokens_B_T.tolist(), rollouts.length_B.tolist(), strict=True)]


def with_slice(model: Any, stack: AdapterStack, policy: int) -> Any:
    """The plain model with one slice of a lora stack merged into its weights."""
    for name in {name.rpartition(".")[0] for name in stack.tensors}:
        a_I_r, b_r_O = stack.tensors[f"{name}.A"][policy], stack.tensors[f"{name}.B"][policy]
        model.get_submodule(name).weight.data += stack.scale * (a_I_r @ b_r_O).T
    return model


def generated(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Completions by `generate`, left-padded in one batch, cut behind the first end token."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=STEPS, eos_token_id=ENDS, pad_token_id=PAD
    )
    rows = []
    for tokens in out[:, width:].tolist():
        stop = next((i for i, token in enumerate(tokens) if token in ENDS), STEPS - 1)
        rows.append(tokens[: stop + 1])
    return rows


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_greedy_equals_generate_token_for_token(name: str) -> None:
    prompts = some_prompts(10)
    assert len({len(prompt) for prompt in prompts}) > 4
    found = NativeSampler(ending_backbone(name)).sample(None, [prompts], 1, [[0] * 10], SAMPLING, greedy=True)
    expected = generated(tiny_model(name), prompts)
    assert rows_of(found) == expected
    assert found.ended_B.tolist() == [row[-1] in ENDS for row in expected]
    assert {len(row) < STEPS for row in expected} == {True, False}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_every_policy_samples_with_its_own_adapter(name: str) -> None:
    """Greedy rows of slice p are those of a model with adapter p merged; swapped or ignored slices would show."""
    backbone = ending_backbone(name)
    stack = random_stack(backbone, 3)
    prompts_P = [some_prompts(5, seed=p) for p in range(3)]
    found = rows_of(NativeSampler(backbone).sample(stack, prompts_P, 1, [[0] * 5] * 3, SAMPLING, greedy=True))
    for p in range(3):
        assert found[p * 5 : p * 5 + 5] == generated(with_slice(tiny_model(name), stack, p), prompts_P[p])
        for wrong in {0, 1, 2} - {p}:
            assert found[p * 5 : p * 5 + 5] != generated(with_slice(tiny_model(name), stack, wrong), prompts_P[p])
        assert found[p * 5 : p * 5 + 5] != generated(tiny_model(name), prompts_P[p])


def test_rows_do_not_depend_on_what_shares_the_batch() -> None:
    backbone = ending_backbone()
    stack = random_stack(backbone, 2)
    prompts, seeds, attempts = some_prompts(6), [11, 12, 13, 14, 15, 16], 5

    def sample(policies: list[int], order: list[int], max_rows: int = 0) -> dict[tuple[int, int, int], list[int]]:
        rollouts = NativeSampler(backbone, max_rows).sample(
            stack.select(policies),
            [[prompts[q] for q in order]] * len(policies),
            attempts,
            [[seeds[q] + 100 * p for q in order] for p in policies],
            SAMPLING,
        )
        assert rollouts.prompts == tuple(tuple(prompts[q]) for _ in policies for q in order for _ in range(attempts))
        keys = [(p, q, n) for p in policies for q in order for n in range(attempts)]
        return dict(zip(keys, rows_of(rollouts), strict=True))

    whole = sample([0, 1], list(range(6)))
    assert len({tuple(row) for row in whole.values()}) > 50
    assert len({len(row) for row in whole.values()}) > 8  # rows retire at different times
    variants = [
        sample([0, 1], [5, 2, 0, 1, 4, 3]),
        sample([1, 0], list(range(6))),
        sample([1], [3]),
        sample([0], [0, 1, 4]),
        sample([0, 1], list(range(6)), max_rows=1),
        sample([0, 1], list(range(6)), max_rows=27),
        sample([0, 1], list(range(6)), max_rows=10_000),
    ]
    for variant in variants:
        assert variant == {key: whole[key] for key in variant}


@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_is_read_once_for_all_its_attempts_and_that_changes_nothing(static: bool) -> None:
    backbone = ending_backbone()
    stack = random_stack(backbone, 2)
    prompts = some_prompts(4)
    prompts_P_Q, seeds_P_Q = [prompts[:2], prompts[2:]], [[1, 2], [3, 4]]
    read: list[int] = []  # rows of every pass over more than one token
    backbone.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, given: read.append(given[0].shape[0]) if given[0].shape[1] > 1 else None
    )
    shared = NativeSampler(backbone, static=static).sample(stack, prompts_P_Q, 5, seeds_P_Q, SAMPLING)
    assert read == [4]
    read.clear()
    repeated_P_Q = [[ids for ids in prompts for _ in range(5)] for prompts in prompts_P_Q]
    skipped_P_Q = [[skip(seed, n) for seed in seeds for n in range(5)] for seeds in seeds_P_Q]
    apart = NativeSampler(backbone, static=static).sample(stack, repeated_P_Q, 1, skipped_P_Q, SAMPLING)
    assert read == [20]  # every row its own prompt
    assert rows_of(apart) == rows_of(shared)


def test_ended_rows_are_retired_and_the_rest_stays_in_order() -> None:
    backbone = ending_backbone()
    widths: list[int] = []
    backbone.model.register_forward_pre_hook(lambda _, a, kw: widths.append(len(kw["input_ids"])), with_kwargs=True)
    found = NativeSampler(backbone).sample(random_stack(backbone, 2), [some_prompts(5)] * 2, 4, [[1] * 5] * 2, SAMPLING)
    assert widths[0] == 10  # every prompt is run once, whatever the number of attempts
    assert 40 == widths[1] > widths[12] > widths[-1]
    assert all(width % 2 == 0 for width in widths)  # equally many rows of both policies
    for step, width in enumerate(widths[1:], start=1):
        live_P = (found.length_B.view(2, 20) > step).sum(1)
        assert 2 * int(live_P.max()) <= width <= 40


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_sampler_and_trainer_agree(name: str, adapter: str) -> None:
    """The gap that the loop logs: decoding with a cache against one pass over the whole text."""
    backbone = ending_backbone(name, adapter=adapter)
    stack = random_stack(backbone, 2, size=0.1)
    sampling = SamplingConfig(max_tokens=STEPS, temperature=0.9)
    rollouts = NativeSampler(backbone).sample(stack, [some_prompts(4)] * 2, 3, [[1, 2, 3, 4], [5, 6, 7, 8]], sampling)
    with torch.no_grad(), backbone.use(stack):
        packed = pack(backbone, rollouts, [list(range(12)), list(range(12, 24))])
        trainer_B_T = token_logprobs(backbone, packed, 0.9)
    assert packed.row_R.tolist() == list(range(24))  # the attempts of a prompt stand together already
    assert trainer_B_T.shape == rollouts.logprob_B_T.shape
    gap_B_T = (trainer_B_T - rollouts.logprob_B_T).abs()
    assert gap_B_T.max() < 1e-4
    assert rollouts.logprob_B_T.min() < -0.5


@pytest.mark.parametrize("greedy", [False, True])
def test_a_policy_with_nan_fails_alone(greedy: bool) -> None:
    backbone = ending_backbone()
    stack = random_stack(backbone, 3)
    ill = stack.select([0, 1, 2])
    ill.tensors["model.layers.1.mlp.up_proj.A"][1, 3] = torch.nan
    prompts, seeds = [some_prompts(4)] * 3, [[1, 2, 3, 4]] * 3
    well = NativeSampler(backbone).sample(stack, prompts, 2, seeds, SAMPLING, greedy)
    found = NativeSampler(backbone).sample(ill, prompts, 2, seeds, SAMPLING, greedy)
    assert found.failed_B.view(3, 8).tolist() == [[False] * 8, [True] * 8, [False] * 8]
    assert found.length_B.view(3, 8)[1].tolist() == [1] * 8
    assert found.ended_B.view(3, 8)[1].all()
    assert torch.isfinite(found.logprob_B_T).all()
    rows, expected = rows_of(found), rows_of(well)
    assert rows[:8] + rows[16:] == expected[:8] + expected[16:]


def test_join_keeps_rows_and_select_picks_them() -> None:
    parts = [handmade_rollouts([[1, 5]], [[5, EOS]]), handmade_rollouts([[1], [1, 6]], [[8], [4, 4, 4, EOS]])]
    joined = join(parts)
    assert joined.rows == 3
    assert rows_of(joined) == [[5, EOS], [8], [4, 4, 4, EOS]]
    assert joined.prompts == ((1, 5), (1,), (1, 6))
    picked = joined.select([2, 0, 0])
    assert rows_of(picked) == [[4, 4, 4, EOS], [5, EOS], [5, EOS]]
    assert picked.ended_B.tolist() == [True, True, True] and joined.ended_B.tolist() == [True, False, True]


def test_wrong_calls_are_errors() -> None:
    backbone = ending_backbone()
    sampler = NativeSampler(backbone)
    with pytest.raises(ValueError, match="same number of prompts"):
        sampler.sample(random_stack(backbone, 2), [[[1]], [[1], [1]]], 1, [[0], [0, 0]], SAMPLING)
    with pytest.raises(ValueError, match="same number of prompts"):
        sampler.sample(random_stack(backbone, 3), [[[1]], [[1]]], 1, [[0], [0]], SAMPLING)
    long = [1] * (CONTEXT - STEPS + 1)
    with pytest.raises(ValueError, match=f"prompt of {len(long)} tokens .* context of {CONTEXT}"):
        sampler.sample(None, [[long]], 1, [[0]], SAMPLING)
    assert sampler.sample(None, [[long[1:]]], 1, [[0]], SAMPLING).rows == 1


def test_rows_per_call_follow_the_cache_size() -> None:
    sampler = NativeSampler(tiny_backbone("llama"))
    assert sampler.rows_per_call(100) == 2048
    per_row = 2 * 2 * 2 * 4 * 4 * 1_000_000  # layers, keys and values, kv heads, head size, bytes, positions
    assert sampler.rows_per_call(1_000_000) == (2 << 30) // (per_row + 16 * sampler.backbone.vocabulary)
    assert sampler.rows_per_call(10**9) == 1
    assert NativeSampler(tiny_backbone("llama"), max_rows=7).rows_per_call(10**9) == 7
