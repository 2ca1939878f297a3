"""The part of the tinker SDK that soar/backends/tinker.py calls, on the native engine: a service inside this process."""

import io
import json
import tarfile
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from helpers import handmade_rollouts, logprobs_of
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from soar.config import OptimizerConfig, SamplingConfig
from soar.engine.policy import AdapterStack, Backbone, peft_tensors
from soar.engine.rollouts import Request, Rollouts
from soar.engine.sampler import NativeSampler
from soar.engine.update import StackOptimizer


def done(value: Any) -> Any:
    """An answer of the service that is there at once."""
    return SimpleNamespace(result=lambda: value)


def rows_of(data: list[Any]) -> tuple[Rollouts, Tensor, Tensor]:
    """Everything behind the first token as one completion; given log-probabilities and advantages [B, T]."""
    inputs = [d.loss_fn_inputs for d in data]
    rows = handmade_rollouts([d.model_input[:1] for d in data], [list(given["target_tokens"]) for given in inputs])
    given_B_T = pad_sequence([torch.tensor(given["logprobs"]) for given in inputs], batch_first=True)
    advantage_B_T = pad_sequence([torch.tensor(given["advantages"]) for given in inputs], batch_first=True)
    return rows, given_B_T, advantage_B_T


class Training:
    """A training client. mean: it reduces, counts and forgets as SkyRL's server does."""

    def __init__(self, service: "Service", stack: AdapterStack, flat: dict[str, Tensor] | None = None) -> None:
        self.service, self.model_id = service, f"model-{service.opened}"
        service.opened += 1
        service.alive.add(self.model_id)
        service.most = max(service.most, len(service.alive))
        self.optimizer = StackOptimizer(stack.select([0]), OptimizerConfig())
        self.optimizer.restore(flat or {})
        self.stack, self.rows = self.optimizer.stack, 0
        self.optimizer.zero()

    def forward(self, data: list[Any], loss: str) -> Any:
        self.service.passed(self, loss)
        with torch.no_grad():
            logprob_B_T = logprobs_of(self.service.backbone, self.stack, rows_of(data)[0])
        counts = [len(d.model_input) for d in data]
        outputs = [{"logprobs": row_T[:n]} for row_T, n in zip(logprob_B_T, counts, strict=True)]
        return done(SimpleNamespace(loss_fn_outputs=outputs))

    def forward_backward(self, data: list[Any], loss: str) -> Any:
        rows, given_B_T, advantage_B_T = rows_of(data)
        logprob_B_T = logprobs_of(self.service.backbone, self.stack, rows)
        loss_B = -((logprob_B_T - given_B_T).exp() * advantage_B_T).sum(1)
        (loss_B / rows.length_B if self.service.mean else loss_B).sum().backward()
        self.rows += rows.rows
        return self.forward(data, loss)

    def optim_step(self, given: Any) -> Any:
        gradients = [tensor.grad for tensor in self.stack.tensors.values() if tensor.grad is not None]
        if self.service.mean:
            torch._foreach_mul_(gradients, 1.0 / max(1, self.rows))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        json.dumps(vars(given), allow_nan=False)  # as it would be sent
        if (clip := getattr(given, "grad_clip_norm", 0.0)) and not self.service.mean:
            torch._foreach_mul_(gradients, min(1.0, clip / (norm.item() + 1e-12)))
        for group in self.optimizer.adamw.param_groups:
            group |= {"lr": given.learning_rate, "betas": (given.beta1, given.beta2), "eps": given.eps}
        self.optimizer.adamw.step()
        self.optimizer.zero()
        self.rows = 0
        return done(SimpleNamespace(metrics={"fake/grad_norm": norm.item()}))

    def save_state(self, name: str) -> Any:
        path = f"tinker://{self.model_id}/weights/{name}"
        self.service.saved[path] = (self.stack.select([0]), self.optimizer.state())
        return done(SimpleNamespace(path=path))

    def save_weights_and_get_sampling_client(self) -> Any:
        return Sampling(self.service, self.stack.select([0]))

    def save_weights_for_sampler(self, name: str) -> Any:
        self.service.archives[f"http://fake/{self.model_id}/{name}"] = self.stack.select([0])
        return done(None)


class Sampling:
    """A sampling client: a snapshot, or the base model."""

    def __init__(self, service: "Service", stack: AdapterStack | None) -> None:
        self.service, self.stack = service, stack

    def sample(self, prompt: list[int], attempts: int, given: Any) -> Any:
        drawn = {"max_tokens": given.max_tokens, "temperature": given.temperature, "top_p": given.top_p}
        request = Request([[prompt]], attempts, [[given.seed]], SamplingConfig().model_copy(update=drawn))
        rollouts = NativeSampler(self.service.backbone).sample(self.stack, request)
        sequences = []
        for i, n in enumerate(rollouts.length_B.tolist()):
            tokens, logprobs = (of_B_T[i, :n].tolist() for of_B_T in (rollouts.tokens_B_T, rollouts.logprob_B_T))
            reason = "stop" if rollouts.ended_B[i] else "length"
            sequences.append(SimpleNamespace(tokens=tokens, logprobs=logprobs, stop_reason=reason))
        return done(SimpleNamespace(sequences=sequences))

    def compute_logprobs(self, prompt: list[int]) -> Any:
        rows = handmade_rollouts([prompt[:1]], [prompt[1:]])
        with torch.no_grad():
            return done([None, *logprobs_of(self.service.backbone, self.stack, rows)[0].tolist()])


class Service:
    """tinker.ServiceClient. keys: of its config. alive: training clients that were not unloaded; most: of them at once.

    broken(): called before every pass; may raise. rank: the largest it takes. mean: see `Training`.
    """

    def __init__(self, backbone: Backbone, mean: bool = False) -> None:
        self.backbone, self.mean, self.name = backbone, mean, backbone.model.name_or_path
        self.saved: dict[str, tuple[AdapterStack, dict[str, Tensor]]] = {}
        self.archives: dict[str, AdapterStack] = {}
        self.alive: set[str] = set()
        self.opened, self.most, self.rank = 0, 0, 16
        self.keys: tuple[str, ...] = ()
        self.broken: Callable[[], None] = lambda: None

    def passed(self, client: Training, loss: str) -> None:
        self.broken()
        assert client.model_id in self.alive and loss == "importance_sampling"

    def get_server_capabilities(self) -> Any:
        return SimpleNamespace(supported_models=[SimpleNamespace(model_name=self.name)])

    def create_lora_training_client(self, base_model: str, rank: int, seed: int, train_unembed: bool) -> Training:
        if rank > self.rank:
            raise RuntimeError(f"LoRA rank {rank} must be between 1 and {self.rank}")
        return Training(self, self.backbone.new_stack(seed))

    def create_training_client_from_state(self, path: str) -> Training:
        return Training(self, self.saved[path][0], self.saved[path][1] if self.mean else None)

    def create_training_client_from_state_with_optimizer(self, path: str) -> Training:
        return Training(self, *self.saved[path])

    def create_sampling_client(self, base_model: str) -> Sampling:
        return Sampling(self, None)

    def create_rest_client(self) -> Any:
        def url(model: str, name: str) -> Any:
            return done(SimpleNamespace(url=f"http://fake/{model}/{name.split('/')[-1]}"))

        return SimpleNamespace(get_checkpoint_archive_url=url)

    def urlopen(self, request: Any, timeout: float) -> io.BytesIO:
        """In place of urllib's: the archives, and SkyRL's unload."""
        if not isinstance(request, str):
            self.alive.discard(json.loads(request.data)["model_id"])
            return io.BytesIO()
        data, archive = save(peft_tensors(self.backbone, self.archives[request], 0)), io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as files:
            member = tarfile.TarInfo("folder/adapter_model.safetensors")
            member.size = len(data)
            files.addfile(member, io.BytesIO(data))
        return io.BytesIO(archive.getvalue())

    def module(self) -> ModuleType:
        """What `import tinker` gives."""
        module: Any = ModuleType("tinker")
        module.ServiceClient = lambda base_url, api_key: self
        for name in ("AdamParams", "Datum", "SamplingParams"):
            setattr(module, name, SimpleNamespace)
        module.ModelInput = SimpleNamespace(from_ints=list)
        return module
