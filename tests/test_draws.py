"""Tokens are drawn from the right distribution, and the random numbers behind them are what they claim."""

import numpy as np
import pytest
import torch
from helpers import WORDS, tiny_backbone, tiny_model
from scipy import stats
from torch import Tensor

from soar import seeds
from soar.config import SamplingConfig
from soar.engine.rollouts import Request, inverse_cdf
from soar.engine.sampler import NativeSampler

PROMPT = [1, 9, 12, 20]


def chance_of(counts_V: Tensor, chance_V: Tensor) -> float:
    """p of a chi-square test of the draws, rare tokens in one cell; 0 when an impossible token was drawn."""
    expected_V = chance_V.double() * counts_V.sum()
    if counts_V[expected_V == 0].any():
        return 0.0
    cells = [[*x[expected_V >= 5].tolist(), x[expected_V < 5].sum().item()] for x in (counts_V, expected_V)]
    seen, expected = (np.array(cell) + 1e-9 for cell in cells)
    return float(stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)


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
    sampling = SamplingConfig(temperature=temperature, top_p=top_p, max_tokens=1)
    found = NativeSampler(tiny_backbone()).sample(None, Request([[PROMPT]], 6000, [[3]], sampling))
    counts_V = torch.bincount(found.tokens_B_T[:, 0], minlength=len(WORDS))
    assert chance_of(counts_V, chances(temperature, top_p)) > 1e-4
    for wrong in (chances(temperature * 1.5, top_p), chances(temperature, top_p * 0.6)):
        assert chance_of(counts_V, wrong) < 1e-9


PROBS = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3])


def test_inverse_cdf_and_that_the_nucleus_is_the_smallest_sufficient_set():
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
