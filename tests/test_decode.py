"""Decoding at fixed addresses gives what decoding over a growing cache gives, bit for bit on a CPU; stop strings in both."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, EOS, random_stack, some_prompts, tiny_backbone

from soar.config import SamplingConfig
from soar.engine import graphs as programs
from soar.engine.graphs import slots_for
from soar.engine.policy import Backbone
from soar.engine.rollouts import Rollouts
from soar.engine.sampler import NativeSampler

STEPS = 40


def ending_backbone(name: str = "llama") -> Backbone:
    backbone = tiny_backbone(name)
    backbone.end_ids = frozenset((EOS, 7, 20))
    return backbone


def prompts_of(policies: int, questions: int) -> list[list[list[int]]]:
    every = some_prompts(policies * questions, seed=3)
    return [every[p * questions : (p + 1) * questions] for p in range(policies)]


def rows_of(rollouts: Rollouts) -> list[list[int]]:
    return [row[:n] for row, n in zip(rollouts.tokens_B_T.tolist(), rollouts.length_B.tolist(), strict=True)]


def same(one: Rollouts, other: Rollouts) -> bool:
    width = min(one.logprob_B_T.shape[1], other.logprob_B_T.shape[1])
    return (
        one.prompts == other.prompts
        and rows_of(one) == rows_of(other)
        and torch.equal(one.ended_B, other.ended_B)
        and torch.equal(one.failed_B, other.failed_B)
        and torch.allclose(one.logprob_B_T[:, :width], other.logprob_B_T[:, :width], atol=1e-5)
    )


def test_slots_are_few_sizes_that_never_fall_short() -> None:
    sizes = {slots_for(rows) for rows in range(1, 513)}
    assert sizes == {2**n for n in range(10)} | {3 * 2**n for n in range(8)}
    for rows in range(1, 513):
        assert rows <= slots_for(rows) < max(2, 1.5 * rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("greedy", [False, True])
def test_fixed_addresses_change_nothing(name: str, greedy: bool) -> None:
    backbone = ending_backbone(name)
    stack = random_stack(backbone, 3)
    prompts, seeds = prompts_of(3, 2), [[1, 2], [3, 4], [5, 6]]
    sampling = SamplingConfig(max_tokens=STEPS, temperature=0.8)
    growing = NativeSampler(backbone, static=False).sample(stack, prompts, 5, seeds, sampling, greedy)
    fixed = NativeSampler(backbone, static=True)
    assert same(fixed.sample(stack, prompts, 5, seeds, sampling, greedy), growing)
    if name == "llama" and not greedy:
        assert len({shape.rows for shape in fixed.decoder.programs}) > 1  # rows did move to narrower programs
    assert same(fixed.sample(stack, prompts, 5, seeds, sampling, greedy), growing)  # with everything there already


def test_each_call_uses_its_own_adapters() -> None:
    """The right student's adapter reaches the sampler: slices swapped, changed in place, replaced, left out."""
    backbone = ending_backbone()
    fixed = NativeSampler(backbone, static=True)
    sampling, prompts = SamplingConfig(max_tokens=STEPS), prompts_of(2, 2)
    prompts = [prompts[0], prompts[0]]

    def greedy(stack: object) -> list[list[int]]:
        found = fixed.sample(stack, prompts, 1, [[1, 2], [1, 2]], sampling, greedy=True)  # type: ignore[arg-type]
        alone = NativeSampler(backbone, static=False).sample(
            stack,  # type: ignore[arg-type]
            prompts,
            1,
            [[1, 2], [1, 2]],
            sampling,
            greedy=True,
        )
        assert same(found, alone)
        return [found.tokens_B_T[row, :n].tolist() for row, n in enumerate(found.length_B.tolist())]

    stack = random_stack(backbone, 2)
    first = greedy(stack)
    assert first[:2] != first[2:]  # two policies, the same prompts, other answers
    assert greedy(stack.select([1, 0])) == first[2:] + first[:2]
    for name in stack.tensors:
        stack.tensors[name] = stack.tensors[name] + 0.3
    moved = greedy(stack)
    assert moved != first
    louder = stack.select([0, 1])
    louder.scale = stack.scale * 3
    assert greedy(louder) != moved
    plain = fixed.sample(None, [prompts[0]], 1, [[1, 2]], sampling, greedy=True)
    growing = NativeSampler(backbone, static=False).sample(None, [prompts[0]], 1, [[1, 2]], sampling, greedy=True)
    assert same(plain, growing)


def test_a_longer_call_after_a_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache memory grows, and programs of the old addresses are gone before: their views would keep it in memory."""
    backbone = ending_backbone()
    real, grown = programs.Storage.renew, []
    old: list[Any] = []

    def renew(self: programs.Storage, tokens: int) -> None:
        assert all(program() is None for program in old)
        grown.append(tokens)
        real(self, tokens)

    monkeypatch.setattr(programs.Storage, "renew", renew)
    fixed, growing = NativeSampler(backbone, static=True), NativeSampler(backbone, static=False)
    for questions, steps in ((1, 10), (6, 60), (1, 10), (3, 30)):
        prompts, sampling = prompts_of(1, questions), SamplingConfig(max_tokens=steps)
        seeds = [list(range(questions))]
        assert same(
            fixed.sample(None, prompts, 3, seeds, sampling), growing.sample(None, prompts, 3, seeds, sampling)
        ), (questions, steps)
        old = [weakref.ref(program) for program in fixed.decoder.programs.values()]
    assert len(grown) == 2 and old


def test_out_of_memory_halves_the_batch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = ending_backbone()
    wanted = NativeSampler(backbone, static=True).sample(
        None, prompts_of(1, 4), 2, [[1, 2, 3, 4]], SamplingConfig(max_tokens=9)
    )
    real = programs.Program.body

    def body(self: programs.Program) -> None:
        if self.shape.rows > 4:
            raise torch.cuda.OutOfMemoryError("no room")
        real(self)

    monkeypatch.setattr(programs.Program, "body", body)
    sampler = NativeSampler(backbone, static=True)
    with pytest.warns(UserWarning, match="out of memory: from here on at most 4 rows a batch"):
        found = sampler.sample(None, prompts_of(1, 4), 2, [[1, 2, 3, 4]], SamplingConfig(max_tokens=9))
    assert same(found, wanted)
    monkeypatch.setattr(programs.Program, "body", lambda self: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("no")))
    with pytest.raises(torch.cuda.OutOfMemoryError), pytest.warns(UserWarning):
        sampler.sample(None, prompts_of(1, 4), 2, [[1, 2, 3, 4]], SamplingConfig(max_tokens=9))


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
    monkeypatch.setattr(programs, "CHECK", interval)
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


def test_both_paths_stop_alike() -> None:
    backbone = tiny_backbone("qwen2")
    stop = a_stop(backbone, sampled(backbone, (), False))
    growing, fixed = sampled(backbone, (stop,), False), sampled(backbone, (stop,), True)
    assert torch.equal(growing.length_B, fixed.length_B) and torch.equal(growing.ended_B, fixed.ended_B)
    assert growing.texts(backbone) == fixed.texts(backbone)
