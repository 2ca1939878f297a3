"""The native sampler against transformers' `generate`, independence of rows, and both ways of decoding: at fixed addresses
(captured as graphs on a GPU) and over a growing cache; tokens are drawn from the right distribution."""

from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, PAD, random_stack, rows_of, some_prompts, tiny_backbone, tiny_model, tiny_tokenizer
from torch import Tensor

from soar import seeds
from soar.config import ModelConfig, SamplingConfig
from soar.engine import graphs
from soar.engine.logprobs import pack, token_logprobs
from soar.engine.policy import Backbone
from soar.engine.rollouts import Request, Rollouts, draw, inverse_cdf, rollouts_of
from soar.engine.sampler import NativeSampler

ENDS = [2, 7, 20]  # <eos> and more, so that random models do end
STEPS = 24  # past the first growth of the cache
SAMPLING, FREE = SamplingConfig(max_tokens=STEPS), SamplingConfig(max_tokens=40, temperature=0.8)
GREEDY = SAMPLING.model_copy(update={"temperature": 0.0})


def ending_backbone(name: str = "llama", **settings: Any) -> Backbone:
    backbone = tiny_backbone(name, **settings)
    backbone.end_ids = frozenset(ENDS)
    return backbone


def same(one: Rollouts, other: Rollouts) -> bool:
    width = min(one.logprob_B_T.shape[1], other.logprob_B_T.shape[1])
    flags = torch.equal(one.ended_B, other.ended_B) and torch.equal(one.failed_B, other.failed_B)
    equal = one.prompts == other.prompts and rows_of(one) == rows_of(other) and flags
    return equal and torch.allclose(one.logprob_B_T[:, :width], other.logprob_B_T[:, :width], atol=1e-5)


def generated(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Completions by `generate`, left-padded in one batch, cut behind the first end token."""
    given = tiny_tokenizer().pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    out = model.generate(**given, do_sample=False, max_new_tokens=STEPS, eos_token_id=ENDS, pad_token_id=PAD)
    rows = out[:, given["input_ids"].shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(tokens) if token in ENDS), STEPS) for tokens in rows]
    return [tokens[: end + 1] for tokens, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_greedy_equals_generate_token_for_token(name, monkeypatch):
    prompts = some_prompts(10)
    assert len({len(prompt) for prompt in prompts}) > 4
    expected = generated(model := tiny_model(name), prompts)
    plain = type(model).forward
    for forward in (plain, lambda self, cache, **given: plain(self, past_key_values=cache, **given)):  # from 5.24 on
        monkeypatch.setattr(type(model), "forward", forward)
        found = NativeSampler(ending_backbone(name)).sample(None, Request([prompts], 1, [[0] * 10], GREEDY))
        assert rows_of(found) == expected
    assert found.ended_B.tolist() == [row[-1] in ENDS for row in expected]
    assert {len(row) < STEPS for row in expected} == {True, False}


def test_rows_do_not_depend_on_what_shares_the_batch():
    backbone = ending_backbone()
    stack = random_stack(backbone, 2)
    prompts, seeds, attempts = some_prompts(6), [11, 12, 13, 14, 15, 16], 5

    def sample(policies: list[int], order: list[int], max_rows: int = 0) -> dict[tuple[int, int, int], list[int]]:
        asked, seed_P_Q = [[prompts[q] for q in order]], [[seeds[q] + 100 * p for q in order] for p in policies]
        request = Request(asked * len(policies), attempts, seed_P_Q, SAMPLING)
        rollouts = NativeSampler(backbone, max_rows).sample(stack.select(policies), request)
        assert rollouts.prompts == tuple(tuple(prompts[q]) for _ in policies for q in order for _ in range(attempts))
        keys = [(p, q, n) for p in policies for q in order for n in range(attempts)]
        return dict(zip(keys, rows_of(rollouts), strict=True))

    whole = sample([0, 1], list(range(6)))
    assert len({tuple(row) for row in whole.values()}) > 50
    assert len({len(row) for row in whole.values()}) > 8  # rows retire at different times
    variants = [sample([1, 0], [5, 2, 0, 1, 4, 3]), sample([1], [3]), sample([0], [0, 1, 4])]
    variants += [sample([0, 1], list(range(6)), max_rows=most) for most in (1, 27)]
    for variant in variants:
        assert variant == {key: whole[key] for key in variant}


@pytest.mark.parametrize(("name", "adapter"), [*((name, "lora") for name in ARCHITECTURES), ("llama", "full")])
def test_sampler_and_trainer_agree(name, adapter):
    """The gap that the loop logs: decoding with a cache against one pass over the whole text, which goes through the
    adapters of PEFT (test_policy.py); swapped or ignored slices would show."""
    backbone = ending_backbone(name, adapter=adapter)
    stack = random_stack(backbone, 2, size=0.1)
    sampling = SamplingConfig(max_tokens=STEPS, temperature=0.9)
    request = Request([some_prompts(4)] * 2, 3, [[1, 2, 3, 4], [5, 6, 7, 8]], sampling)
    rollouts = NativeSampler(backbone).sample(stack, request)
    packed = pack(backbone, rollouts, [list(range(12)), list(range(12, 24))])
    with torch.no_grad():
        trainer_B_T = token_logprobs(backbone, stack, packed, 0.9)
    assert packed.row_R.tolist() == list(range(24))  # the attempts of a prompt stand together already
    assert trainer_B_T.shape == rollouts.logprob_B_T.shape
    assert (trainer_B_T - rollouts.logprob_B_T).abs().max() < 1e-4
    assert rollouts.logprob_B_T.min() < -0.5


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY])
def test_a_policy_with_nan_fails_alone(sampling):
    backbone = ending_backbone()
    stack = random_stack(backbone, 3)
    ill = stack.select([0, 1, 2])
    ill.tensors["model.layers.1.mlp.up_proj.A"][1, 3] = torch.nan
    request = Request([some_prompts(4)] * 3, 2, [[1, 2, 3, 4]] * 3, sampling)
    well, found = NativeSampler(backbone).sample(stack, request), NativeSampler(backbone).sample(ill, request)
    assert found.failed_B.view(3, 8).tolist() == [[False] * 8, [True] * 8, [False] * 8]
    assert found.length_B.view(3, 8)[1].tolist() == [1] * 8
    assert found.ended_B.view(3, 8)[1].all()
    assert torch.isfinite(found.logprob_B_T).all()
    rows, expected = rows_of(found), rows_of(well)
    assert rows[:8] + rows[16:] == expected[:8] + expected[16:]


def test_wrong_calls_are_errors():
    sampler = NativeSampler(backbone := ending_backbone())
    with pytest.raises(ValueError, match="same number of prompts"):
        sampler.sample(random_stack(backbone, 2), Request([[[1]], [[1], [1]]], 1, [[0], [0, 0]], SAMPLING))
    with pytest.raises(ValueError, match="same number of prompts"):
        sampler.sample(random_stack(backbone, 3), Request([[[1]], [[1]]], 1, [[0], [0]], SAMPLING))
    long = [1] * (backbone.context - STEPS + 1)
    with pytest.raises(ValueError, match=f"prompt of {len(long)} tokens .* context of 128"):
        sampler.sample(None, Request([[long]], 1, [[0]], SAMPLING))
    assert sampler.sample(None, Request([[long[1:]]], 1, [[0]], SAMPLING)).rows == 1


def test_texts_are_transformers_own_without_the_end_token():
    backbone = ending_backbone()
    ids = [[5, 1, 8, ENDS[0]], [PAD, 6, 9, 10]]  # <bos> and <pad> within stay visible
    rollouts = rollouts_of(((1,), (1,)), [(row, [0.0] * 4, False) for row in ids], PAD)
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    assert rollouts.texts(backbone) == backbone.tokenizer.batch_decode([ids[0][:3], ids[1]], **plain)


@pytest.mark.parametrize(("name", "greedy"), [*((name, False) for name in ARCHITECTURES), ("llama", True)])
def test_fixed_addresses_change_nothing(name, greedy, monkeypatch):
    backbone = ending_backbone(name)
    prompts = some_prompts(6, seed=3)
    cold = {"temperature": 0.0} if greedy else {}
    ask = Request([prompts[:2], prompts[2:4], prompts[4:]], 5, [[1, 2], [3, 4], [5, 6]], FREE.model_copy(update=cold))
    stack = random_stack(backbone, 3)
    fixed, growing = NativeSampler(backbone, static=True), NativeSampler(backbone, static=False)
    assert same(fixed.sample(stack, ask), growing.sample(stack, ask))
    if name == "llama" and not greedy:
        assert len({rows for _, _, rows, _ in fixed.decoder.programs}) > 1  # rows did move to narrower programs
        monkeypatch.setattr(graphs, "SPARED", 1)
        monkeypatch.setattr(graphs, "NARROWEST", 1)
        eager = NativeSampler(backbone, static=True)
        assert same(eager.sample(stack, ask), growing.sample(stack, ask))
        lanes = [lanes for lanes, *_ in eager.decoder.programs]
        assert min(lanes) < 3 < max(lanes)  # some policy took several, and one that had ended none
        orders = cycle([[2, 1, 0], [1, 0, 2]])
        monkeypatch.setattr(graphs, "lanes_for", lambda live: (max(live), next(orders)))
        assert same(NativeSampler(backbone, static=True).sample(stack, ask), growing.sample(stack, ask))
    quieter = random_stack(backbone, 3, seed=5)  # with everything there: other weights and scale, or none
    quieter.scale *= 0.5
    assert same(fixed.sample(quieter, ask), growing.sample(quieter, ask))
    alone = Request([prompts], 3, [[1, 2, 3, 4, 5, 6]], SamplingConfig(max_tokens=60).model_copy(update=cold))
    assert same(fixed.sample(None, alone), growing.sample(None, alone))


def test_a_policy_with_many_more_rows_takes_several_lanes():
    assert graphs.lanes_for([154, 150, 60, 20, 0]) == (64, [0, 0, 0, 1, 1, 1, 2, 3])
    assert graphs.lanes_for([112, 80, 64]) == (112, [0, 1, 2])  # five of 64 would save too little
    assert graphs.lanes_for([100] + [20] * 15) == (32, [0] * 4 + list(range(1, 16)))
    assert graphs.lanes_for([0, 3]) == (3, [0, 1])


def test_out_of_memory_halves_the_batch_and_says_so(monkeypatch):
    backbone, real = ending_backbone(), graphs.Program.body
    ask = Request([some_prompts(4, seed=3)], 2, [[1, 2, 3, 4]], SamplingConfig(max_tokens=9))
    wanted = NativeSampler(backbone, static=True).sample(None, ask)
    most = [4]

    def body(self: graphs.Program) -> None:
        if len(self.token_R_1) > most[0]:
            raise torch.cuda.OutOfMemoryError("no room")
        real(self)

    monkeypatch.setattr(graphs.Program, "body", body)
    sampler = NativeSampler(backbone, static=True)
    with pytest.warns(UserWarning, match="out of memory: from here on at most 4 rows a batch"):
        assert same(sampler.sample(None, ask), wanted)
    most[0] = 0
    with pytest.raises(torch.cuda.OutOfMemoryError), pytest.warns(UserWarning):
        sampler.sample(None, ask)
    assert not sampler.decoder.flat  # what one who goes on would miss


@pytest.mark.parametrize(("static", "interval"), [(False, 8), (True, 1), (True, 8)])
def test_rows_end_where_the_stop_string_is_complete(static, interval, monkeypatch):
    monkeypatch.setattr(graphs, "CHECK", interval)
    backbone, prompts = tiny_backbone("llama"), some_prompts(6, seed=3)

    def sampled(*stop: str) -> Rollouts:
        sampling, stack = SamplingConfig(max_tokens=30, stop=stop), random_stack(backbone, 2)
        seeds, sampler = [[1, 2, 3], [4, 5, 6]], NativeSampler(backbone, static=static)
        return sampler.sample(stack, Request([prompts[:3], prompts[3:]], 6, seeds, sampling))

    free = sampled()
    words = free.texts(backbone)[int(free.length_B.argmax())].split(" ")
    stop = f"{words[4]} {words[5]}"
    found = sampled(stop, "never written")
    stopped = 0
    for row, (text, whole_text) in enumerate(zip(found.texts(backbone), free.texts(backbone), strict=True)):
        n, whole = int(found.length_B[row]), free.tokens_B_T[row].tolist()
        assert found.tokens_B_T[row, :n].tolist() == whole[:n]  # what is drawn does not change
        assert found.logprob_B_T[row, n:].abs().sum() == 0
        if stop in whole_text:
            stopped += 1
            assert text.endswith(stop) and text.count(stop) == 1 and found.ended_B[row] and not found.failed_B[row]
            assert stop not in backbone.tokenizer.decode(whole[: n - 1])
        else:
            assert n == free.length_B[row] and found.ended_B[row] == free.ended_B[row]
    assert 0 < stopped < found.rows
    spaced = [text.partition(f"{stop} ") for text in sampled(f"{stop} ").texts(backbone)]  # the next word has the space
    assert any(word for _, _, word in spaced) and not any(" " in word for _, _, word in spaced)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_padding_needs_no_token_of_its_own(pad):
    """A missing padding token, or one that is the end token, changes no sampled token."""
    pads, rows = [], []
    for token in ("<pad>", pad):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = token
        backbone = Backbone(tiny_model(), tokenizer, ModelConfig(lora_rank=4, device="cpu"))
        ask = Request([some_prompts(5)], 4, [list(range(5))], SamplingConfig(max_tokens=12))
        pads.append(backbone.pad_id)
        rows.append(rows_of(NativeSampler(backbone).sample(None, ask)))
    assert pads[0] == PAD != pads[1] and rows[0] == rows[1] and len({len(row) for row in rows[0]}) > 1


PROMPT = [1, 9, 12, 20]


def chances(temperature: float = 1.0, top_p: float = 1.0, prompt: list[int] = PROMPT) -> Tensor:
    """Next-token distribution of the plain model; nucleus written as a loop."""
    with torch.no_grad():
        chance_V = torch.softmax(tiny_model()(torch.tensor([prompt])).logits[0, -1].double() / temperature, 0)
    kept, mass = torch.zeros_like(chance_V), 0.0
    for token in chance_V.argsort(descending=True).tolist():
        if mass < top_p:
            kept[token] = chance_V[token]
        mass += chance_V[token].item()
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (0.8, 0.3)])
def test_first_tokens_follow_the_softmax(temperature, top_p):
    count, sampling = 6000, SamplingConfig(temperature=temperature, top_p=top_p, max_tokens=1)
    found = NativeSampler(backbone := tiny_backbone()).sample(None, Request([[PROMPT]], count, [[3]], sampling))
    counts_V = torch.bincount(found.tokens_B_T[:, 0], minlength=backbone.vocabulary)

    def deviations(chance_V: Tensor) -> float:
        """The largest of a count from what it should be, in standard deviations; inf for a token without a chance."""
        deviation_V = (count * chance_V * (1 - chance_V)).sqrt()
        return float(((counts_V - count * chance_V).abs() / deviation_V).nan_to_num(0).max())

    assert deviations(chances(temperature, top_p)) < 5
    for wrong in (chances(temperature * 1.5, top_p), chances(temperature, top_p * 0.6)):
        assert deviations(wrong) > 10


PROBS = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3])


def test_inverse_cdf_and_that_the_nucleus_is_the_smallest_sufficient_set(monkeypatch):
    uniform_B = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.6999, 0.7001, 1 - 2**-24])
    for scale in (1.0, 0.999):
        assert inverse_cdf(PROBS.expand(8, 5) * scale, uniform_B).tolist() == [0, 0, 2, 2, 3, 3, 4, 4]
    uniforms = torch.linspace(0, 1 - 1e-6, 2001)
    sets = [0, 2, 3, 4], [0, 2, 3, 4], [2, 3, 4], [2, 4], [2], [2]
    for top_p, kept in zip((1.0, 0.95, 0.89, 0.65, 0.39, 0.01), sets, strict=True):
        tokens = inverse_cdf(PROBS.expand(2001, 5), uniforms, top_p)
        assert sorted(set(tokens.tolist())) == kept
        wanted = torch.zeros(5)
        wanted[kept] = PROBS[kept] / PROBS[kept].sum()
        torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 2001, wanted, rtol=0, atol=2e-3)
    logits = torch.randn(8, 5).bfloat16()
    whole = [*draw(logits, None, 0.7, 0.6), *draw(logits, uniform_B, 0.7, 0.6)]
    monkeypatch.setattr("soar.engine.rollouts.CHUNK", 10)  # in parts of two rows
    assert all(map(torch.equal, whole, [*draw(logits, None, 0.7, 0.6), *draw(logits, uniform_B, 0.7, 0.6)]))


def test_derived_seeds_do_not_change_between_versions():
    """A run that is resumed later must draw the same numbers: these values are a contract."""
    assert seeds.derive(0, "student", 3, 1, 2) == 378874639474825313
    assert seeds.row_seeds(7, 2).tolist() == [1346066267577507604, 7191089600892374487]
    assert seeds.uniforms(np.array([1], dtype=np.uint64), 2).tolist() == [[0.3681895136833191, 0.9435641765594482]]
    rows = np.array([5, 6, 7], dtype=np.uint64)
    whole = seeds.uniforms(rows, 40)
    assert whole.dtype == np.float32 and whole.shape == (3, 40)
    assert np.array_equal(seeds.uniforms(rows[::-1].copy(), 40), whole[::-1])
    assert np.array_equal(seeds.uniforms(rows[1:2], 7), whole[1:2, :7])
