"""What only a GPU can show: captured graphs, the kernels on the device, bfloat16; killed and resumed runs against one that
was neither, and against its repetition. Skipped without one."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, EOS, random_rollouts, random_stack, rows_of, some_prompts, tiny_model, tiny_tokenizer
from loop_helpers import TINY, events, read_jsonl, sets, without_clock
from safetensors.torch import load_file
from test_kill import CHANGES

from soar.config import ModelConfig, OptimizerConfig, SamplingConfig
from soar.engine import graphs, kernels
from soar.engine.attention import Packed
from soar.engine.load import fuse
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Request, Rollouts
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ENDS = [EOS, 7, 20]
STEPS = 40


def backbone_on(device: str, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: int) -> Backbone:
    model = tiny_model(name, dtype=dtype, **changes).to(device)
    backbone = Backbone(model, tiny_tokenizer(), ModelConfig(lora_rank=4, lora_alpha=6.0), fuse(model))
    backbone.end_ids = frozenset(ENDS)
    return backbone


def draw(backbone: Backbone, stack: AdapterStack, static: bool) -> Rollouts:
    prompts, sampler = some_prompts(6, seed=3), NativeSampler(backbone, static=static)
    sampling = SamplingConfig(max_tokens=STEPS, temperature=0.8)
    found = sampler.sample(stack, Request([prompts[:3], prompts[3:]], 6, [[1, 2, 3], [4, 5, 6]], sampling))
    if static:
        captured = [program.graph for program in sampler.decoder.programs.values() if program.graph is not None]
        assert captured and all(captured)  # every program that stepped was captured
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captured_steps_draw_the_tokens_of_the_cpu(name):
    """float32: the tokens of the growing cache on the same GPU and of a CPU, but for ties of rounding."""
    gpu, cpu = backbone_on("cuda", name), backbone_on("cpu", name)
    stack_cpu = random_stack(cpu, 2)
    stack_gpu = stack_cpu.to("cuda")
    fixed, growing = draw(gpu, stack_gpu, static=True), draw(gpu, stack_gpu, static=False)
    plain = draw(cpu, stack_cpu, static=False)
    pairs = list(zip(rows_of(fixed), rows_of(growing), rows_of(plain), strict=True))
    assert sum(a == b for a, b, _ in pairs) >= 0.9 * len(pairs)
    assert sum(a == c for a, _, c in pairs) >= 0.9 * len(pairs)
    print(f"{name}: {sum(a == b == c for a, b, c in pairs)} of {len(pairs)} rows equal on all three ways")


def test_captured_lanes_draw_the_tokens_of_a_growing_cache(monkeypatch):
    """As narrow and as often as can be, so that policies take several lanes, one, and none."""
    monkeypatch.setattr(graphs, "NARROWEST", 1)
    monkeypatch.setattr(graphs, "SPARED", 1)
    gpu, stack = backbone_on("cuda"), random_stack(backbone_on("cpu"), 2).to("cuda")
    pairs = list(zip(rows_of(draw(gpu, stack, True)), rows_of(draw(gpu, stack, False)), strict=True))
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)


def test_neighbours_change_few_rows_in_bfloat16():
    """How far a row depends on its batch on a GPU: counted, not hidden."""
    backbone = backbone_on("cuda", dtype=torch.bfloat16)
    stack = random_stack(backbone_on("cpu"), 1).to("cuda")
    sampling = SamplingConfig(max_tokens=STEPS, temperature=0.8)
    prompts = some_prompts(8, seed=3)
    together = rows_of(NativeSampler(backbone).sample(stack, Request([prompts], 4, [list(range(8))], sampling)))
    alone = []
    for i, prompt in enumerate(prompts):
        alone += rows_of(NativeSampler(backbone).sample(stack, Request([[prompt]], 4, [[i]], sampling)))
    equal = sum(a == b for a, b in zip(together, alone, strict=True))
    print(f"bfloat16: {equal} of {len(alone)} rows equal alone and in company")
    assert equal >= len(alone) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 64, 80, 128])
def test_attention_kernel(dtype, width):
    torch.manual_seed(0)
    B, H, K, S = 7, 12, 4, 300
    query = torch.randn(B, 1, H, width, device="cuda", dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(B, K, S, width, device="cuda", dtype=dtype) for _ in range(2))
    start = torch.tensor([0, 3, 64, 70, 99, 120, 200], dtype=torch.int32, device="cuda")
    filled = torch.tensor([201], dtype=torch.int32, device="cuda")
    place = torch.arange(S, device="cuda")
    for window, cap in ((None, None), (20, None), (None, 5.0)):
        found = kernels.decode_attention(query, key, value, start, filled, width**-0.5, cap, window)
        scores = query.float() @ key.float().repeat_interleave(H // K, 1).transpose(2, 3) * width**-0.5
        scores = torch.tanh(scores / cap) * cap if cap else scores
        first = start if window is None else torch.maximum(start, filled - window)
        seen = (place[None] >= first[:, None]) & (place[None] < filled)
        weight = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        wanted = (weight @ value.float().repeat_interleave(H // K, 1)).transpose(1, 2)
        assert (found.float() - wanted).abs().max() < (1e-4 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("policies", [1, 3])
def test_flash_attention_of_packed_rows_is_the_padded_one(policies):
    """Values and gradients in bfloat16, with padding behind prompts and completions, and empty completions."""
    torch.manual_seed(0)
    prompts, split = [(0, 0, 20), (0, 20, 33), (1, 0, 60), (2, 0, 60)], 60
    completions = [(0, 60, 9), (0, 69, 0), (0, 69, 30), (1, 99, 50), (2, 60, 40), (2, 100, 60), (3, 60, 0)]
    count = sum(prompt[0] < policies for prompt in prompts)
    completions = [completion for completion in completions if completion[0] < count]
    view = Packed((policies, 160), split, prompts[:count], completions, "cuda")
    states = [torch.randn(policies, heads, 160, 64, device="cuda", dtype=torch.bfloat16) for heads in (6, 2, 2)]
    live = torch.ones(policies, 160, 1, 1, device="cuda", dtype=torch.bfloat16)
    live[0, 53:60] = live[0, 149:] = live[2:, 60:] = 0
    slope = torch.randn(policies, 160, 6, 64, device="cuda", dtype=torch.bfloat16) * live
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (state.to(dtype).requires_grad_() for state in (s.clone() for s in states))
        out = view.attend(q, k, v, 0.125, None, None)
        out.backward(slope.to(dtype))
        found.append([(out * live).detach(), *(x.grad for x in (q, k, v))])
    for flash, padded in zip(*found, strict=True):
        assert (flash.float() - padded).abs().max() < 0.02 * padded.abs().max()


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize(("taught", "kl"), [(slice(None), 0.01), ([1, 3, 5, 7], 0.0)])
def test_update_on_the_gpu_is_the_update_on_the_cpu(recomputing, taught, kl):
    """What is computed again in autograd's own thread goes through the same adapters. Of few rows each is a lane."""
    rollouts, advantage_B, found = random_rollouts(12), torch.zeros(12), []
    advantage_B[taught] = torch.linspace(-1, 1, 12)[taught]
    for device in ("cpu", "cuda"):
        backbone = backbone_on(device)
        assert device == "cpu" or not recomputing or backbone.recompute()
        assert any(layer.behind for layer in backbone.layers.values()) == (device == "cuda"), "joined on a GPU alone"
        stack = random_stack(backbone_on("cpu"), 2).to(device)
        optimizer, sampling = StackOptimizer(stack, OptimizerConfig(kl=kl)), SamplingConfig(max_tokens=9)
        stats = update(backbone, optimizer, rollouts, advantage_B, 1e-2, sampling)
        found.append((stats.gradient_norm_P, {k: t.detach().cpu() for k, t in stack.tensors.items()}))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-3)
    for key in found[0][1]:
        assert torch.allclose(found[0][1][key], found[1][1][key], atol=2e-3)


START = ["tiny", *sets(*TINY, *CHANGES, "model.device=cuda")]
POINTS = [("soar.loop.teacher", 1), ("soar.loop.student", 2)]
"""Amid the second outer step (before the teacher learns), and amid the students of a later one."""

# Ends the process by SIGKILL at the n-th call of the update of the named file.
KILLED = (Path(__file__).parent.parent / "cases" / "killed_update.txt").read_text(encoding="utf-8")


def run(out: Path, *more: str, killed: tuple[str, int] | None = None) -> int:
    start = ["-m", "soar.cli"] if killed is None else ["-c", KILLED, killed[0], str(killed[1])]
    words = [sys.executable, *start, "run", "--quiet", "--out", str(out), *more]
    return subprocess.run(words, timeout=300).returncode


def result(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the run wrote, and its adapters."""
    names = ("questions.jsonl", "pq.jsonl", "hard/train.jsonl", "hard/test.jsonl")
    folders = ("teacher", "student", "arms/hard_only", "arms/pq")
    weights = {f: load_file(out / f / "adapter_model.safetensors") for f in folders}
    named = {f"{f}/{key}": tensor for f, tensors in weights.items() for key, tensor in tensors.items()}
    return {"metrics": without_clock(events(out)), **{name: read_jsonl(out / name) for name in names}}, named


def test_killed_and_resumed_runs_are_as_near_as_a_repeated_one(tmp_path):
    assert run(tmp_path / "straight", *START) == run(tmp_path / "again", *START) == 0
    (wanted, weights), (repeated, weights_2) = result(tmp_path / "straight"), result(tmp_path / "again")
    apart = max((weights[key] - weights_2[key]).abs().max().item() for key in weights)
    for point in POINTS:
        out = tmp_path / point[0]
        assert run(out, *START, killed=point) == -signal.SIGKILL and not (out / "summary.json").exists()
        assert run(out, "--resume") == 0
        found, resumed = result(out)
        gap = max((weights[key] - resumed[key]).abs().max().item() for key in weights)
        print(f"{point[0]}: resumed = straight: {found == wanted}, weights differ by {gap:.2e}; repeated = straight: "
              f"{repeated == wanted}, by {apart:.2e}")  # fmt: skip
        assert len(found["metrics"]) == len(wanted["metrics"])
        assert found["hard/train.jsonl"] == wanted["hard/train.jsonl"]
        if repeated == wanted:  # else kernels add in an order of their own
            assert found == wanted and gap <= apart
