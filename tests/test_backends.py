"""backend.kind = "tinker": against a service of the native engine in this process, and against SkyRL's server on a CPU.

    SKYRL_PYTHON=skyrl/bin/python pytest -n 0 tests/test_backends.py -k skyrl

starts that server (examples/cluster/skyrl_server.py says how to install it), which compiles for some minutes; it is skipped
without the variable or the extra `tinker`. The sampler for vLLM: against one that answers its calls with the native one; and
itself on a tiny random model, where vLLM is installed (with -k vllm_is -s it prints the figures of docs/results/vllm.md).
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from fake_tinker import Service
from helpers import PAD, ROOT, random_stack, rows_of, some_prompts, tiny_backbone, tiny_model, tiny_tokenizer
from loop_helpers import events, outcome, run_tiny, tiny_config
from tables import cases
from test_record import content

from soar.backends import base
from soar.backends.tinker import TinkerBackbone, open_tinker
from soar.config import Config, ConfigError, ModelConfig, OptimizerConfig, SamplingConfig, resolve_path
from soar.engine.load import load_backbone
from soar.engine.policy import AdapterStack, Backbone, load_adapter
from soar.engine.rollouts import Completion, Request, Rollouts, rollouts_of
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer, update
from soar.engine.vllm import VllmSampler, open_vllm
from soar.types import Interrupted

KEY = "tml-secret-4711"
REMOTE = ("model.adapter=lora", "model.lora_rank=4", "backend.kind=tinker", "backend.clients=3", "student.reward=paper")
SKYRL = (*REMOTE, "backend.service=skyrl", "backend.base_url=http://127.0.0.1:1")
SMALL = (
    "problems.limit=4", "screen.attempts=2", "teacher.questions=2", "reward.questions=2", "reward.mode=sampled",
    "student.steps=1", "student.sampling.max_tokens=8", "teacher.datasets=2", "student.repeats=1", 'arms.run=["hard_only"]',
)  # fmt: skip
LORA = ModelConfig(adapter="lora", lora_rank=4)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 1.0, -0.5, 0.3])
NORM_RTOL, WEIGHT_STEPS = 1e-3, 0.02  # stated in docs/scaling.md: of a gradient's norm; of a weight, in learning rates


@pytest.fixture(params=[False, True], ids=["tinker", "skyrl"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Service:
    fake = Service(load_backbone(LORA), mean=request.param)
    fake.keys = SKYRL if request.param else REMOTE
    monkeypatch.setitem(sys.modules, "tinker", fake.module())
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setattr(urllib.request, "urlopen", fake.urlopen)
    return fake


def difference(left: AdapterStack, right: AdapterStack) -> float:
    """Largest of a weight."""
    return max(float((left.tensors[n] - tensor.detach()).abs().max()) for n, tensor in right.tensors.items())


def check_steps(native: Backbone, remote: TinkerBackbone, config: OptimizerConfig, steps: int) -> None:
    """The same rollouts into both: the same gradient and step of two policies, also of forks and after a resume."""
    lr, fresh = 1e-3, remote.new_stack(7)
    here, there = remote.local(fresh).select([0, 0]), AdapterStack(fresh.kind, fresh.select([0, 0]).tensors)
    prompts, sampling, seed = [[[1, 20, 21], [1, 22, 23, 24]]] * 2, SamplingConfig(max_tokens=12), 0
    advantage_B = torch.cat([ADVANTAGES, -2 * ADVANTAGES])
    for _fork in range(2):
        mine, theirs = base.begin(native, here.select([0, 1]), config), base.begin(remote, there, config)
        for step in range(steps):
            seed += 1
            request = Request(prompts, 4, [[seed, 100 + seed]] * 2, sampling)
            rollouts = NativeSampler(native).sample(mine.stack, request)
            if step == 1:  # as a checkpoint has it
                copy, flat = theirs.stack.select([0, 1]), theirs.state()
                theirs = base.begin(remote, copy, config)
                theirs.restore(flat)
            want = base.update(native, mine, rollouts, advantage_B, lr, sampling)
            got = base.update(remote, theirs, rollouts, advantage_B, lr, sampling)
            assert torch.allclose(got.gradient_norm_P, want.gradient_norm_P, rtol=NORM_RTOL)
            assert torch.allclose(got.kl_P, want.kl_P, rtol=1e-3, atol=1e-6)
            assert float(got.gap_P.max()) < 1e-4 and not got.failed_P.any()
        scored = (base.score(native, mine.stack, rollouts, 1.0) - base.score(remote, theirs.stack, rollouts, 1.0)).abs()
        assert float(scored.max()) < 1e-3
        here, there = mine.stack.select([1, 1]), theirs.stack.select([1, 1])
        gap = difference(remote.local(there.select([0])), here.select([0]))
        print("largest difference of a weight, in learning rates:", gap / lr)
        assert gap < WEIGHT_STEPS * lr
        assert difference(here.select([0]), remote.local(fresh)) > lr


def test_the_same_rollouts_give_the_same_gradient_and_step(service):
    remote, _ = open_tinker(tiny_config(*service.keys))
    clip = 1e9 if service.mean else 0.5  # no clipping
    check_steps(service.backbone, remote, OptimizerConfig(kl=0.05, eps=1e-4, clip=clip), steps=3)
    assert service.most <= 3 or not service.mean


GONE = Mock(side_effect=ConnectionError(f"connection refused, key {KEY}"))
UNKNOWN = Mock(side_effect=ValueError("unknown loss_fn importance_sampling"))
TROUBLE = [
    ("get_server_capabilities", GONE, r"opening it: ConnectionError: .*key \*\*\*"),
    ("broken", UNKNOWN, r"a gradient: ValueError: unknown loss_fn importance_sampling.*--resume goes on"),
]


@pytest.mark.parametrize("service", [True], indirect=True, ids=["skyrl"])  # which has more to keep
def test_trouble_with_the_service_is_named_and_a_resumed_run_equals_one_without(service, monkeypatch, tmp_path):
    service.broken = passed = Mock()
    run_tiny(tmp_path / "whole", *service.keys, *SMALL)
    service.broken = Mock(side_effect=[*[None] * (passed.call_count // 2 - 1), GONE.side_effect])
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted, match=r"a gradient: ConnectionError: connection refused, key \*\*\*.*--resume"):
        run_tiny(cut, *service.keys, *SMALL)
    assert events(cut, "outer_step")
    saved = content(cut / "state")
    service.broken = Mock()
    for call, trouble, message in TROUBLE:
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match=message):
            patch.setattr(service, call, trouble)
            run_tiny(cut, *service.keys, *SMALL, resume=True)
        assert content(cut / "state") == saved, call
    run_tiny(cut, *service.keys, *SMALL, resume=True)
    assert outcome(cut, "student") == outcome(tmp_path / "whole", "student")  # which is the name of a checkpoint
    texts = [path.read_bytes() for path in cut.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in text for text in texts)


@pytest.mark.parametrize(("override", "message"), cases("backends", "refused"))
@pytest.mark.parametrize("service", [False], indirect=True, ids=["tinker"])
def test_what_the_service_cannot_do_is_refused_with_the_key(service, monkeypatch, override, message):
    if override == "name=no-key":
        monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(ConfigError, match=message):
        open_tinker(tiny_config(*REMOTE, override))


@pytest.mark.parametrize("service", [False], indirect=True, ids=["tinker"])
def test_a_rank_that_the_server_does_not_take_and_a_silent_server_are_named(service):
    remote, _ = open_tinker(tiny_config(*service.keys, "model.lora_rank=64", "backend.timeout_s=0.2"))
    with pytest.raises(Interrupted, match=r"lora_rank = 64\): RuntimeError: LoRA rank 64 must be between 1 and 16"):
        remote.new_stack(0)
    with pytest.raises(Interrupted, match=r"no answer within 0.2 s; is it running\?"):
        remote.ask("waiting", lambda: time.sleep(1))
    with pytest.raises(ConfigError, match="no adapter from a file"):
        remote.slots_of(service.backbone.new_stack(0))


@pytest.fixture(scope="module")
def skyrl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """SkyRL's server with the embedded model on the CPU, and the config of a client of it."""
    pytest.importorskip("tinker")
    if not (python := os.environ.get("SKYRL_PYTHON")):
        pytest.skip("SKYRL_PYTHON names no interpreter with skyrl")
    folder, model = tmp_path_factory.mktemp("skyrl"), resolve_path("builtin:tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = {"max_lora_adapters": 9, "sample_max_num_sequences": 16, "train_micro_batch_size": 8}
    command = [python, "examples/cluster/skyrl_server.py", "--base-model", model, "--port", str(port)]
    command += ["--checkpoints-base", str(folder / "saved"), "--database-url", f"sqlite:///{folder}/tinker.db"]
    command += ["--backend", "jax", "--backend-config", json.dumps(engine)]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    log = (folder / "log").open("w")
    server = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        time.sleep(1)
        try:
            urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None, (folder / "log").read_text()
    yield tiny_config(*SKYRL, f"backend.base_url={url}", f"backend.model={model}")
    server.terminate()
    server.wait(20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_skyrl_gives_the_native_step_and_a_run_to_its_report_killed_and_resumed(skyrl, monkeypatch, tmp_path):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    remote, sampler = open_tinker(skyrl)
    check_steps(load_backbone(LORA), remote, OptimizerConfig(kl=0.05, eps=1e-4, clip=1e9), steps=2)
    sampler.release()
    assert not remote.alive
    keys = (*SKYRL, f"backend.base_url={skyrl.backend.base_url}", f"backend.model={skyrl.backend.model}")
    run_tiny(tmp_path / "whole", *keys)
    assert (tmp_path / "whole" / "report.html").is_file()
    program, cut = "import sys; sys.path[:0] = ['tests', 'examples']; from loop_helpers import *; ", tmp_path / "cut"
    child = subprocess.Popen([sys.executable, "-c", f"{program}run_tiny(Path({str(cut)!r}), *{keys!r})"], cwd=ROOT)
    while child.poll() is None and not ((cut / "metrics.jsonl").is_file() and events(cut, "outer_step")):
        time.sleep(0.5)
    time.sleep(2)
    child.kill()
    child.wait()
    run_tiny(cut, *keys, resume=True)
    assert outcome(cut, "student") == outcome(tmp_path / "whole", "student")


GREEDY = SamplingConfig(max_tokens=12).model_copy(update={"temperature": 0.0})
Row = tuple[Sequence[int], str, int]  # prompt, folder of the adapter, seed


class Native(VllmSampler):
    """Answers with the native sampler and the adapters that lie in the files."""

    def __init__(self, *given: Any) -> None:
        with patch.dict(sys.modules, vllm=Mock()):
            super().__init__(*given)
        self.asked: list[Row] = []

    def generate(self, rows: list[Row], sampling: SamplingConfig) -> list[Completion]:
        self.asked += rows
        found: dict[int, Completion] = {}
        for folder in dict.fromkeys(folder for _, folder, _ in rows):
            mine = [i for i, row in enumerate(rows) if row[1] == folder]
            stack = load_adapter(self.backbone, Path(folder)) if folder else None
            request = Request([[list(rows[i][0]) for i in mine]], 1, [[rows[i][2] for i in mine]], sampling)
            rollouts = NativeSampler(self.backbone).sample(stack, request)
            for row, i in enumerate(mine):
                length = int(rollouts.length_B[row])
                tokens, logprobs = rollouts.tokens_B_T[row, :length], rollouts.logprob_B_T[row, :length]
                found[i] = (tokens.tolist(), logprobs.tolist(), bool(rollouts.ended_B[row]))
        return [found[i] for i in range(len(rows))]


@pytest.mark.parametrize("stop", [(), ("5 ", "a")])
def test_greedy_rows_are_those_of_the_native_engine(stop):
    backbone = tiny_backbone()
    sampler = Native(backbone, 4, 128, 0.5)
    stack = random_stack(backbone, 3)
    prompts = [some_prompts(2, seed=p) for p in range(3)]
    seeds = [[10 * p + q for q in range(2)] for p in range(3)]
    request = Request(prompts, 2, seeds, GREEDY.model_copy(update={"stop": stop}))
    wanted, found = NativeSampler(backbone).sample(stack, request), sampler.sample(stack, request)
    assert found.prompts == wanted.prompts
    assert torch.equal(found.length_B, wanted.length_B) and torch.equal(found.ended_B, wanted.ended_B)
    inside = torch.arange(found.tokens_B_T.shape[1])[None] < found.length_B[:, None]
    assert torch.equal(found.tokens_B_T[inside], wanted.tokens_B_T[inside])
    torch.testing.assert_close(found.logprob_B_T, wanted.logprob_B_T, rtol=1e-4, atol=1e-5)
    assert len({folder for _, folder, _ in sampler.asked}) == 3


def test_a_changed_adapter_is_loaded_anew_and_the_oldest_makes_room():
    backbone = tiny_backbone()
    sampler = Native(backbone, 2, 128, 0.5)
    stack, prompts = random_stack(backbone, 2), [some_prompts(3), some_prompts(3)]
    ask = Request(prompts, 1, [[1, 2, 3]] * 2, GREEDY)
    first = sampler.sample(stack, ask)
    again = sampler.sample(stack, ask)
    folders = list(sampler.written.values())
    assert [Path(folder).name for folder in folders] == ["1", "2"] and torch.equal(first.tokens_B_T, again.tokens_B_T)
    with torch.no_grad():
        for tensor in stack.tensors.values():
            tensor[1] += 0.5  # in place, as an optimizer step
    changed = sampler.sample(stack, ask)
    assert [Path(folder).name for folder in sampler.written.values()] == ["1", "3"] and not Path(folders[1]).exists()
    assert changed.select([0, 1, 2]).tokens_B_T[:, :4].equal(first.select([0, 1, 2]).tokens_B_T[:, :4])
    assert not torch.equal(changed.logprob_B_T[3:], first.logprob_B_T[3:])


def test_configs_that_vllm_cannot_serve_are_refused(monkeypatch):
    backbone = tiny_backbone()
    for change, said in cases("backends", "vllm"):
        with pytest.raises(ConfigError, match=said):
            open_vllm(backbone, tiny_config("model.adapter=lora", change))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install .*vllm"):
        open_vllm(backbone, tiny_config("model.adapter=lora"))
    rows = [((5, 6), (-0.5, float("nan")), False), ((7,), (-0.25,), False)]
    found = rollouts_of(((1,), (1, 2)), rows, PAD)
    assert found.failed_B.tolist() == [True, False] and found.ended_B.tolist() == [True, False]
    assert found.tokens_B_T.tolist() == [[5, 6], [7, PAD]] and found.logprob_B_T.tolist() == [[-0.5, 0.0], [-0.25, 0.0]]


def test_a_whole_run_goes_through_it(tmp_path, monkeypatch):
    made: list[Native] = []
    monkeypatch.setattr("soar.engine.vllm.VllmSampler", lambda *given: made.append(Native(*given)) or made[0])
    model = ("model.adapter=lora", "model.sampler=vllm")
    run_tiny(tmp_path / "run", *model, "teacher.steps=1", "problems.limit=8", 'arms.run=["base","ps"]')
    (sampler,) = made
    assert len({folder for _, folder, _ in sampler.asked}) >= 5
    (step,) = events(tmp_path / "run", "outer_step")
    assert step["student_last"]["logprob_gap"] < 1e-3
    assert sampler.asked[0][1] == ""  # screening asks the base model


def common(a: Rollouts, b: Rollouts) -> tuple[int, float]:
    """Rows with equal tokens, and the largest difference of log-probabilities in them."""
    equal = [row for row, (one, other) in enumerate(zip(rows_of(a), rows_of(b), strict=True)) if one == other]
    width = min(a.logprob_B_T.shape[1], b.logprob_B_T.shape[1])  # behind a row's end both are 0
    gap_B_T = (a.logprob_B_T[equal, :width] - b.logprob_B_T[equal, :width]).abs()
    return len(equal), max(gap_B_T.flatten().tolist(), default=0.0)


def test_vllm_is_the_native_engine(tmp_path):
    """Greedy tokens are equal; log-probabilities of drawn ones are the trainer's, unless its weights moved on."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    pytest.importorskip("vllm")
    P, Q, N = 3, 8, 2
    seeds, prompts = [[100 * p + q for q in range(Q)] for p in range(P)], [some_prompts(Q, seed=p) for p in range(P)]
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=32, num_attention_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.dim() > 1 else 1.0)  # in logits of a hundred float32 itself is coarse
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), lora_rank=4, lora_alpha=6.0, device="cpu", dtype="float32")
    backbone = Backbone(model, tiny_tokenizer(), config)
    sampler, stack, stale = VllmSampler(backbone, P, 128, 0.4), *(random_stack(backbone, P, s, 0.1) for s in (3, 4))
    for name, given in (("base model", None), (f"{P} adapters in one batch", stack)):
        ask = (given, Request(prompts, N, seeds, GREEDY.model_copy(update={"max_tokens": 24})))
        drawn, wanted = sampler.sample(*ask), NativeSampler(backbone).sample(*ask)
        equal, gap = common(drawn, wanted)
        print(f"\ngreedy, {name}: {equal} of {wanted.rows} rows equal, log-probabilities within {gap:.1e}")
        assert equal == wanted.rows and gap < 1e-3 and torch.equal(drawn.ended_B, wanted.ended_B)
    for temperature in (1.0, 0.7):
        sampling = SamplingConfig(max_tokens=24, temperature=temperature)
        drawn, again, other = (
            sampler.sample(stack, Request(prompts, N, [[s + more for s in row] for row in seeds], sampling))
            for more in (0, 0, 1)
        )
        assert common(drawn, again)[0] == drawn.rows > common(drawn, other)[0]
        gaps = []
        for trained in (stack.select([0, 1, 2]), stale.select([0, 1, 2])):
            optimizer, advantage_B = StackOptimizer(trained, OptimizerConfig(kl=0.0)), torch.tensor([1.0, -1.0] * P * Q)
            stats = update(backbone, optimizer, drawn, advantage_B, 1e-6, sampling)
            gaps.append(stats.gap_P.max().item())
        print(f"\ntemperature {temperature}: gap {gaps[0]:.1e} nats a token, with stale weights {gaps[1]:.2f}")
        assert gaps[0] < 1e-3 and gaps[1] > 0.1
