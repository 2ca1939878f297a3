"""One optimizer step of a stack against a plain one-model step written out here, with and without gradient checkpointing."""

import math
import weakref
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from helpers import plain_logprobs, random_rollouts, random_stack, same_stacks, tiny_model
from helpers import tiny_backbone as backbone_of
from tables import cases
from torch import Tensor
from torch.func import functional_call

from soar.backends import base
from soar.config import OptimizerConfig, SamplingConfig
from soar.engine import update as update_room
from soar.engine.logprobs import Pack
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts
from soar.engine.update import StackOptimizer, UpdateStats, update
from soar.loop.teacher import learning_rate

POLICIES, ROWS, MAX_TOKENS, TEMPERATURE, LR = 3, 4, 10, 0.8, 0.01
ADVANTAGE = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.0, 0.0, -3.0, 0.0, 0.25, 1.0, -1.0, 0.5])
PLAIN = OptimizerConfig(lr=LR, kl=0.0, clip=1e9, eps=1e-5)


def rollouts() -> Rollouts:
    return random_rollouts(POLICIES * ROWS)


def step(backbone: Backbone, optimizer: Any, given: Any = None, advantage_B: Any = ADVANTAGE) -> UpdateStats:
    sampling = SamplingConfig(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
    return update(backbone, optimizer, given or rollouts(), advantage_B, LR, sampling)


def plain_steps(
    name: str, stack: AdapterStack, policy: int, config: OptimizerConfig, count: int
) -> tuple[Any, Any, Any]:
    """The same steps for one policy: plain model, one row at a time, torch's AdamW. Weights, norms, KL per token."""
    base, leaves = tiny_model(name), {n: t[policy].clone().requires_grad_(True) for n, t in stack.tensors.items()}
    betas, eps, decay = (config.beta1, config.beta2), config.eps, config.weight_decay
    optimizer = torch.optim.AdamW(leaves.values(), lr=LR, betas=betas, eps=eps, weight_decay=decay)
    norms, divergences = [], []
    for _ in range(count):
        weights = {}
        for layer in {n.rpartition(".")[0] for n in leaves}:
            full = stack.kind == "full"
            change = leaves[f"{layer}.delta"] if full else stack.scale * leaves[f"{layer}.A"] @ leaves[f"{layer}.B"]
            weights[f"{layer}.weight"] = base.get_submodule(layer).weight.detach() + change.T

        def model(input_ids: Tensor, weights: dict[str, Tensor] = weights) -> object:
            return functional_call(base, weights, kwargs={"input_ids": input_ids}, tie_weights=False)

        loss, divergence, tokens = torch.zeros(()), 0.0, 0
        for row in range(policy * ROWS, (policy + 1) * ROWS):
            prompt = rollouts().prompts[row]
            completion = rollouts().tokens_B_T[row, : rollouts().length_B[row]].tolist()
            logprob = plain_logprobs(model, prompt, completion, TEMPERATURE)
            with torch.no_grad():
                reference = plain_logprobs(base, prompt, completion, TEMPERATURE)
            k3 = torch.exp(reference - logprob) - (reference - logprob) - 1
            loss = loss + (-ADVANTAGE[row] * logprob.sum() + config.kl * k3.sum()) / (ROWS * MAX_TOKENS)
            divergence, tokens = divergence + k3.sum().item(), tokens + len(completion)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([leaf.grad.norm() for leaf in leaves.values() if leaf.grad is not None]).norm()
        for leaf in leaves.values():
            if leaf.grad is not None:
                leaf.grad *= min(1.0, config.clip / norm.item())
        optimizer.step()
        norms.append(norm.item())
        divergences.append(divergence / tokens)
    return {n: leaf.detach() for n, leaf in leaves.items()}, norms, divergences


@pytest.mark.parametrize(("name", "adapter", "keys"), cases("update", "AdamW"))
def test_steps_equal_a_plain_model_with_torch_adamw(name, adapter, keys):
    backbone, config = backbone_of(name, adapter=adapter), PLAIN.model_copy(update=keys)
    stack = random_stack(backbone, POLICIES)
    start = stack.select(list(range(POLICIES)))
    optimizer = StackOptimizer(stack, config)
    stats = [step(backbone, optimizer) for _ in range(2)]
    assert [s.failed_P.tolist() for s in stats] == [[False] * POLICIES] * 2
    for p in range(POLICIES):
        weights, norms, divergences = plain_steps(name, start, p, config, 2)
        for key, expected in weights.items():
            assert (expected - start.tensors[key][p]).abs().max() > LR / 2
            assert (stack.tensors[key][p] - expected).abs().max() < 0.02 * LR
        for s, norm, divergence in zip(stats, norms, divergences, strict=True):
            assert s.gradient_norm_P[p].item() == pytest.approx(norm, rel=1e-3)
            if config.kl:
                assert s.kl_P[p].item() == pytest.approx(divergence, rel=1e-3)
            else:
                assert s.kl_P[p].isnan()


def gradient_after(tokens: int, kl: float, given: Rollouts | None = None, lanes: bool = False) -> dict[str, Tensor]:
    backbone = backbone_of("qwen2", micro_batch_tokens=tokens)
    backbone.lanes = lanes
    stack = random_stack(backbone, POLICIES)
    optimizer = StackOptimizer(stack, PLAIN.model_copy(update={"kl": kl}))
    step(backbone, optimizer, given)
    return {name: tensor.grad for name, tensor in stack.tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize(("kl", "kept", "limit"), cases("update", "places"))
def test_micro_batches_of_any_size_give_the_same_gradient(kl, kept, limit):
    """With KL every row counts. Lanes save places, by small batches or where few rows count, and keep to the limit."""
    whole, backbone, places = gradient_after(100_000, kl), backbone_of("qwen2"), []
    for tokens, lanes in ((1, False), (45, False), (0, False), (1, True), (45, True), (0, True)):
        for name, gradient in gradient_after(tokens, kl, lanes=lanes).items():
            size = whole[name].abs().max().item()
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-4 * size)
    for backbone.lanes in (False, True):
        packs = update_room.micro_batches(backbone, rollouts(), kept, limit)
        places.append([packed.ids_P_n.numel() for _, packed in packs])
    assert sum(places[1]) < sum(places[0]) and max(places[1]) <= limit


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(monkeypatch):
    whole, real, seen, failing = gradient_after(100_000, 0.0), update_room.token_logprobs, [], [1, 3]

    def short_of_memory(backbone: Backbone, stack: AdapterStack, packed: Pack, temperature: float) -> Tensor:
        assert all(adapters() is None for adapters in seen), "adapters of lanes of a pass before are still held"
        seen.append(weakref.ref(next(iter(stack.tensors.values()))._base))
        if len(seen) in failing:  # once at the start, once with half a gradient there already
            raise torch.cuda.OutOfMemoryError("no room")  # other kinds: test_student
        return real(backbone, stack, packed, temperature)

    monkeypatch.setattr(update_room, "SMALLEST_MICRO_BATCH", 10)
    backbone, tries = backbone_of("qwen2", micro_batch_tokens=90), [torch.cuda.OutOfMemoryError("no room")]
    scores = [base.score(backbone, random_stack(backbone, POLICIES), rollouts(), 1.0)]
    monkeypatch.setattr(base, "token_logprobs", Mock(side_effect=tries + [DEFAULT] * 99, wraps=real))
    with pytest.warns(UserWarning, match="from here on micro-batches of 45 tokens"):
        scores += [base.score(backbone, random_stack(backbone, POLICIES), rollouts(), 1.0)]
    torch.testing.assert_close(*scores)
    monkeypatch.setattr(update_room, "token_logprobs", short_of_memory)
    with pytest.warns(UserWarning, match="from here on micro-batches of 45 tokens"):
        found = gradient_after(90, 0.0, lanes=True)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-4 * whole[name].abs().max().item())
    monkeypatch.setattr(update_room, "SMALLEST_MICRO_BATCH", 90)
    failing += range(1000)
    with pytest.warns(UserWarning, match="gradient checkpointing"), pytest.raises(torch.cuda.OutOfMemoryError):
        gradient_after(90, 0.0, lanes=True)
    monkeypatch.setattr(base, "token_logprobs", Mock(side_effect=tries[0]))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        base.score(backbone, random_stack(backbone, POLICIES), rollouts(), 1.0)
    assert not backbone.recomputing, "without gradients it saves nothing, and every later update would pay for it"


def test_a_gpu_has_room_for_the_widest_layer(monkeypatch):
    monkeypatch.setattr(update_room, "free_bytes", lambda device: 1 << 26)
    backbone, limits = backbone_of(), []
    backbone.device = torch.device("cuda")
    for width in (24, 4096, [24, 4096]):  # a list in Gemma 3n
        vars(backbone.model.config)["intermediate_size"] = width
        limits.append(update_room.micro_batch_limit(backbone))
    assert limits[0] > limits[1] == limits[2] > 0


def test_rows_without_advantage_are_skipped():
    """Whatever they hold: the step is the same bit for bit, and equals the plain one that includes them (above)."""
    garbage = rollouts()
    garbage.tokens_B_T[ADVANTAGE == 0] = 5
    first, second = gradient_after(0, 0.0), gradient_after(0, 0.0, given=garbage)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for kl, count in ((0.0, 8), (0.1, 12)):
        config = PLAIN.model_copy(update={"kl": kl})
        kept_P = update_room.rows_that_count(rollouts(), ADVANTAGE, POLICIES, config)
        assert sum(map(len, kept_P)) == count


def test_a_step_without_signal_counts_the_same_alone_and_in_company():
    """Policy 0 has advantages in every second step. AdamW's bias correction must not depend on whether a neighbour has."""
    backbone = backbone_of()
    stack = random_stack(backbone, POLICIES)
    alone, quiet = stack.select([0]), ADVANTAGE.clone()
    quiet[:ROWS] = 0.0
    one, all_of_them = StackOptimizer(alone, PLAIN), StackOptimizer(stack, PLAIN)
    first_rows = rollouts().select(list(range(ROWS)))
    for advantage_B in (quiet, ADVANTAGE, quiet, ADVANTAGE):
        step(backbone, all_of_them, advantage_B=advantage_B)
        step(backbone, one, first_rows, advantage_B[:ROWS])
    start = random_stack(backbone, 1).tensors
    for name, tensor in alone.tensors.items():
        assert (tensor[0] - start[name][0]).abs().max() > LR / 2
        torch.testing.assert_close(stack.tensors[name][0], tensor[0], rtol=0, atol=0.02 * LR)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize(("ill", "kl"), cases("update", "diverged"))
def test_a_diverged_policy_is_kept_as_it_was_and_leaves_the_others_alone(adapter, ill, kl):
    backbone = backbone_of("llama", adapter, micro_batch_tokens=60)
    config = PLAIN.model_copy(update={"kl": kl, "weight_decay": 0.1})
    runs = []
    for broken in (False, True):
        stack, advantage_B = random_stack(backbone, POLICIES), ADVANTAGE.clone()
        if broken and ill == "weights":
            next(iter(stack.tensors.values()))[1, 0, 0] = torch.nan
        elif broken:
            advantage_B[ROWS + 2] = torch.nan if ill == "advantage" else 1e38
        before = stack.select([0, 1, 2])
        optimizer = StackOptimizer(stack, config)
        stats = step(backbone, optimizer, advantage_B=advantage_B)
        runs.append((stack, optimizer, stats, before))
    (well, well_optimizer, well_stats, _), (found, optimizer, stats, before) = runs
    assert well_stats.failed_P.tolist() == [False] * 3
    assert stats.failed_P.tolist() == [False, True, False]
    assert found.digest(1) == before.digest(1) != well.digest(1)
    for p in (0, 2):
        assert found.digest(p) == well.digest(p) != before.digest(p)
        assert stats.gradient_norm_P[p] == well_stats.gradient_norm_P[p]
        assert stats.gap_P[p] == well_stats.gap_P[p]
    for key, value in optimizer.state().items():
        assert torch.isfinite(value).all()
        if not key.endswith("/step"):
            assert torch.equal(value[[0, 2]], well_optimizer.state()[key][[0, 2]])
    if ill != "weights":
        assert not step(backbone, optimizer).failed_P.any()
        assert found.digest(1) != before.digest(1)


def test_rows_that_do_not_fit_the_policies_are_an_error():
    backbone = backbone_of()
    optimizer = StackOptimizer(random_stack(backbone, POLICIES), PLAIN)
    with pytest.raises(ValueError, match=r"11 rollouts .* for 3 policies"):
        step(backbone, optimizer, random_rollouts(11), ADVANTAGE[:11])
    with pytest.raises(ValueError, match=r"12 rollouts with advantages \[9\]"):
        step(backbone, optimizer, advantage_B=ADVANTAGE[:9])


def test_learning_rate_schedules():
    assert [learning_rate(OptimizerConfig(lr=2.0), step, 5) for step in range(5)] == [2.0] * 5
    warm = OptimizerConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(warm, step, 9) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = OptimizerConfig(lr=2.0, warmup_steps=2, schedule="cosine")
    rates = [learning_rate(cosine, step, 10) for step in range(12)]
    expected = [1.0, 2.0, *(1.0 + math.cos(math.pi * i / 8) for i in range(8)), 0.0, 0.0]
    assert rates == pytest.approx(expected)
    assert learning_rate(cosine, 2, 2) == 2.0


@pytest.mark.parametrize(("name", "adapter"), [("qwen2", "lora"), ("gemma3", "lora"), ("llama", "full")])
def test_gradient_checkpointing_gives_the_step_bit_for_bit(name, adapter):
    stacks, counts = [], []
    for again in (False, True):
        backbone, calls = backbone_of(name, adapter), list[bool]()
        assert not again or (backbone.recompute() and not backbone.recompute())
        for layer in backbone.model.get_decoder().layers:
            layer.mlp.register_forward_pre_hook(lambda *given, calls=calls: calls.append(torch.is_grad_enabled()))
        stacks.append(random_stack(backbone, POLICIES))
        step(backbone, StackOptimizer(stacks[-1], OptimizerConfig(kl=0.1)))
        counts.append(sum(calls))
    assert same_stacks(*stacks)
    layers = backbone.model.config.num_hidden_layers
    assert counts == [layers, 2 * layers]  # the whole forward pass a second time
