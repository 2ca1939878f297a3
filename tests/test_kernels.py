"""The Triton kernels against PyTorch, in Triton's interpreter (no GPU); skipped where Triton is not installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from soar.engine import kernels

torch.manual_seed(0)
B, H, K, S = 5, 9, 3, 150
start = torch.tensor([0, 3, 70, 99, 120], dtype=torch.int32)
filled = torch.tensor([121], dtype=torch.int32)
for D in (16, 48):
    query = torch.randn(B, 1, H, D).transpose(1, 2)
    key, value = torch.randn(B, K, S, D), torch.randn(B, K, S, D)
    key[:, :, 121:] = float("nan")  # places that are not filled yet must not be read
    for window, cap in ((None, None), (20, None), (None, 5.0)):
        found = kernels.decode_attention(query, key, value, start, filled, D**-0.5, cap, window)
        scores = query @ key.repeat_interleave(H // K, 1).transpose(2, 3) * D**-0.5
        if cap:
            scores = torch.tanh(scores / cap) * cap
        place = torch.arange(S)
        first = start if window is None else torch.maximum(start, filled - window)
        seen = (place[None] >= first[:, None]) & (place[None] < filled)
        weight = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        wanted = (weight @ value.repeat_interleave(H // K, 1)).transpose(1, 2)
        assert (found - wanted).abs().max() < 1e-5, (D, window, cap)

for words in (50, 9000):
    logits, uniform = torch.randn(64, words) * 3, torch.rand(64)
    logits[4, 7] = float("nan")
    logits[5, 8] = float("inf")
    good = [row for row in range(64) if row not in (4, 5)]
    logprob = torch.log_softmax(logits / 0.7, -1)
    cdf = logprob.exp().cumsum(-1)
    wanted = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    token, chosen, bad = kernels.draw(logits, uniform, 0.7)
    assert bad.nonzero()[:, 0].tolist() == [4, 5]
    assert (token[good] == wanted[good]).all()
    assert (chosen[good] - logprob.gather(1, token[:, None])[good, 0]).abs().max() < 1e-4
    token, chosen, _ = kernels.draw(logits, None, 0.7)
    assert (token[good] == logits.argmax(-1)[good]).all()

logits, target, gradient = torch.randn(9, 9000) * 3, torch.randint(0, 9000, (9,)), torch.randn(9)
leaf = logits.clone().requires_grad_(True)
wanted = torch.log_softmax(leaf / 0.7, -1).gather(1, target[:, None])[:, 0]
(wanted * gradient).sum().backward()
chosen, total = kernels.choose(logits, target, 0.7)
assert (chosen - wanted).abs().max() < 1e-4
assert (total - (logits / 0.7).logsumexp(-1)).abs().max() < 1e-4
assert (kernels.slope_(logits.clone(), target, total, gradient, 0.7) - leaf.grad).abs().max() < 1e-5
print("kernels agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_agree_with_pytorch():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels agree" in done.stdout
