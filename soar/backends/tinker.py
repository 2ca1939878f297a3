"""backend.kind = "tinker": LoRA policies on a training service, through the SDK of that name.

The service holds the base model and does what touches weights; here are tokenizer, prompts, verdicts and advantages. A stack
is the names of checkpoints on the service, as bytes, so loop, checkpoints and resume treat it as any other. A policy that is
trained or sampled has a client; at most `backend.clients` are alive, the least recently used is saved and unloaded first.

The RLOO step is the service's `importance_sampling` loss, exp(logprob - sampler's) * advantage summed over tokens, with the
constant normaliser in the advantages. The gradient of k3, at the sampler's policy, is that of a token advantage exp(d) - 1,
d = log-probability under the base model minus the policy's, so the KL term needs no loss of its own. Left out: other
temperatures than 1, stop strings, clipping on SkyRL's server, adapters from files, workers.
"""

import io
import json
import math
import os
import re
import secrets
import tarfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from safetensors.torch import load as read_safetensors
from torch import Tensor

from soar import seeds
from soar.config import Config, ConfigError, OptimizerConfig
from soar.engine.load import load_backbone, within
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rloo import k3
from soar.engine.rollouts import Completion, OnTokens, Request, Rollouts, rollouts_of
from soar.engine.update import UpdateStats, rows_that_count
from soar.types import Interrupted, import_extra, no_tick

PATH_BYTES, ALPHA, LOSS, CONNECT_S, KEY = 256, 32.0, "importance_sampling", 30.0, "TINKER_API_KEY"


@dataclass(eq=False)
class Slot:
    """One policy on the service."""

    path: str = ""  # of its last checkpoint; it ends in `-before-steps`
    seed: int = 0  # of a policy that has no checkpoint yet
    steps: int = 0  # of AdamW since the policy was forked
    before: int = 0  # steps that the service counts on top (`client`)
    moved: bool = False  # trained since the checkpoint
    sampler: Any = None  # its sampling client, until it is trained again or closed

    @property
    def counts(self) -> list[int]:
        """[before, steps] at the checkpoint."""
        return [int(n) for n in re.findall(r"-(\d+)-(\d+)$", self.path)[0]]


def stack_of(paths: Sequence[str]) -> AdapterStack:
    """The policies that were saved under these paths of the service."""
    rows = [list(path.encode().ljust(PATH_BYTES, b"\0")) for path in paths]
    return AdapterStack("tinker", {"path": torch.tensor(rows, dtype=torch.uint8)})


class LiveStack(AdapterStack):
    """Policies in training, and their optimizer: the service keeps AdamW's moments with the weights. To look at `tensors`
    saves the policies that moved, so a copy is what they were at that moment.
    """

    def __init__(self, backend: "TinkerBackbone", slots: list[Slot], config: OptimizerConfig) -> None:
        self.kind, self.scale, self._merged, self.stack = "tinker", 1.0, {}, self
        self.backend, self.slots, self.config = backend, slots, config

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Paths [P, PATH_BYTES] of checkpoints of the policies as they are now."""
        return stack_of([self.backend.settled(slot) for slot in self.slots]).tensors

    @property
    def policies(self) -> int:
        """P, without a look at `tensors`, which saves."""
        return len(self.slots)

    def state(self) -> dict[str, Tensor]:
        """Nothing: the checkpoints hold AdamW's moments."""
        return {}

    def restore(self, flat: dict[str, Tensor]) -> None:
        """Read AdamW's step counts from the names of the checkpoints."""
        for slot in self.slots:
            slot.before, slot.steps = slot.counts


class TinkerBackbone(Backbone):
    """Tokenizer and shape of the base model here, its weights on the service: `base.Backend` and `rollouts.Sampler`."""

    def __init__(self, config: Config, sdk: Any, service: Any) -> None:
        vars(self).update(vars(load_backbone(config.model, hollow=True)))
        self.sdk, self.service, self.settings = sdk, service, config.backend
        self.skyrl = config.backend.service == "skyrl"
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = config.model.model_copy(update={"chunk": self.settings.clients - 1})  # and the teacher's client
        self.name = self.settings.model or self.model.name_or_path
        self.alive: dict[Slot, Any] = {}  # policies with their training clients, the least recently used first
        self.on_tokens: OnTokens = no_tick
        self._fresh: dict[int, Slot] = {}
        self._base: Any = None

    def ask(self, what: str, call: Callable[[], Any], seconds: float = 0.0) -> Any:
        """call(), which waits for the service. Raises Interrupted with what was asked in place of what the SDK raises."""
        seconds = seconds or self.settings.timeout_s  # the SDK itself tries again for many minutes
        try:
            return within(seconds, call)
        except TimeoutError:
            reason = f"no answer within {seconds:g} s; is it running? (backend.base_url, backend.timeout_s)"
        except Exception as error:
            key = os.environ.get(KEY) or "\0"
            reason = f"{type(error).__name__}: {str(error)[:600]}".replace(key, "***")
        where = self.settings.base_url or "Thinking Machines' service"
        raise Interrupted(f"{where}, {what}: {reason}. What the run has saved is kept, and --resume goes on from it")

    def new_stack(self, seed: int, policies: int = 1) -> AdapterStack:
        """Fresh adapters that change nothing yet, drawn by the service."""
        return stack_of([self.settled(self._fresh.setdefault(seed, Slot(seed=seed)))] * policies)

    def begin(self, stack: AdapterStack, config: OptimizerConfig) -> LiveStack:
        """Fork every policy of the stack, to train it with a fresh AdamW."""
        return LiveStack(self, [Slot(slot.path) for slot in self.slots_of(stack)], config)

    def slots_of(self, stack: AdapterStack) -> list[Slot]:
        """Slots to read from; a copy of a policy that is alive and has not moved since is that one."""
        if isinstance(stack, LiveStack):
            return stack.slots
        if stack.kind != "tinker":
            found = 'backend.kind = "tinker" takes no adapter from a file'
            raise ConfigError(f'{found}; use backend.kind = "native" for it')
        held = {slot.path: slot for slot in self.alive if not slot.moved}
        paths = [bytes(row).rstrip(b"\0").decode() for row in stack.tensors["path"].tolist()]
        return [held.setdefault(path, Slot(path)) for path in paths]

    def client(self, slot: Slot) -> Any:
        """The policy's training client, opened from its checkpoint or seed where it has none."""
        if slot not in self.alive:
            while len(self.alive) >= self.settings.clients:
                self.close(next(iter(self.alive)))
            service, rank = self.service, self.config.lora_rank
            if slot.path:
                anew = service.create_training_client_from_state
                load = service.create_training_client_from_state_with_optimizer if slot.steps else anew
                what, call = f"loading {slot.path}", partial(load, slot.path)
            else:
                named = {"base_model": self.name, "rank": rank, "seed": slot.seed % (1 << 31), "train_unembed": False}
                what = f"a new adapter (model.lora_rank = {rank})"
                call = partial(service.create_lora_training_client, **named)
            client = self.alive[slot] = self.ask(what, call)
            if self.skyrl and slot.path and not slot.steps and any(slot.counts):  # SkyRL loads AdamW with the weights
                still = self.sdk.AdamParams(learning_rate=0.0, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0)
                self.ask("a step of size 0", lambda: client.optim_step(still).result())  # clears them; see `_adam`
                slot.before = sum(slot.counts) + 1
        self.alive[slot] = self.alive.pop(slot)
        return self.alive[slot]

    def settled(self, slot: Slot) -> str:
        """Path of a checkpoint of the policy as it is now, with its AdamW."""
        if slot.moved or not slot.path:
            client, name = self.client(slot), f"soar-{secrets.token_hex(8)}-{slot.before}-{slot.steps}"
            slot.path = self.ask("saving a policy", lambda: client.save_state(name).result().path)
            slot.moved = False
        return slot.path

    def close(self, slot: Slot, save: bool = True) -> None:
        """Let the service forget the policy's client; it is opened again when it is needed. save: the policy, if it moved."""
        if save:
            self.settled(slot)
        client, slot.moved, slot.sampler = self.alive.pop(slot), False, None
        body, kind = json.dumps({"model_id": client.model_id}).encode(), {"Content-Type": "application/json"}
        with suppress(OSError):  # a server that is gone has forgotten it already
            if self.skyrl:  # it has room for few adapters, and the SDK no call for it; Thinking Machines' needs none
                address = f"{self.settings.base_url}/api/v1/unload_model"
                urllib.request.urlopen(urllib.request.Request(address, body, kind), timeout=CONNECT_S).close()

    def sampler(self, slot: Slot | None) -> Any:
        """A sampling client of the policy as it is now; None: of the base model."""
        if slot is None:
            make = self.service.create_sampling_client
            self._base = self._base or self.ask("the base model", lambda: make(base_model=self.name))
            return self._base
        client = self.client(slot)
        if slot.sampler is None:
            slot.sampler = self.ask("a sampler snapshot", client.save_weights_and_get_sampling_client)
        return slot.sampler

    def step(self, stack: LiveStack, rollouts: Rollouts, advantage_B: Tensor, lr: float, tokens: int) -> UpdateStats:
        """As `engine.update.update`."""
        config, slots = stack.config, stack.slots
        P, per_policy = len(slots), rollouts.rows // len(slots)
        rows_P = rows_that_count(rollouts, advantage_B, P, config)
        kept_P = [rows or [p * per_policy] for p, rows in enumerate(rows_P)]  # a step on a zero gradient is one, too
        kl_B = torch.full((rollouts.rows,), math.nan)
        weight_B_T = advantage_B[:, None].expand(rollouts.logprob_B_T.shape)
        if config.kl > 0.0:
            base, rows = self.sampler(None), [row for rows in kept_P for row in rows]
            asked = [base.compute_logprobs(self.sdk.ModelInput.from_ints(tokens_of(rollouts, row))) for row in rows]
            scores = self.ask("scores of the base model", lambda: [answer.result() for answer in asked])
            reference_B_T = behind_prompts(scores, rollouts, rows)
            weight_B_T = weight_B_T + config.kl * ((reference_B_T - rollouts.logprob_B_T).exp() - 1.0)
            kl_B = k3(rollouts.logprob_B_T, reference_B_T).sum(1)  # both are 0 where no token is
        weight_B_T = weight_B_T / (per_policy * tokens)
        norm_P, gap_P, kl_P = torch.zeros(3, P)
        failed_P = torch.zeros(P, dtype=torch.bool)
        passes = self._passes("forward_backward", slots, rollouts, kept_P, weight_B_T)
        for p, (rows, logprob_B_T) in enumerate(zip(kept_P, passes, strict=True)):
            logprob_R_T, count = logprob_B_T[rows], rollouts.length_B[rows].sum().clamp(min=1)
            gap_P[p] = (logprob_R_T - rollouts.logprob_B_T[rows]).abs().sum() / count
            kl_P[p], failed_P[p] = kl_B[rows].sum() / count, not bool(torch.isfinite(logprob_R_T).all())
        stepping = {p: self._adam(slots[p], config, lr) for p in range(P) if not failed_P[p]}
        for p, step in stepping.items():
            metrics = self.ask("a step", step.result).metrics or {}
            norm_P[p] = next((value for key, value in metrics.items() if key.endswith("grad_norm")), 0.0)
            failed_P[p] = not math.isfinite(norm_P[p])
        for p in failed_P.nonzero()[:, 0].tolist():  # back to its last checkpoint: what it has become must not go on
            self.close(slots[p], save=False)
        return UpdateStats(norm_P, kl_P, gap_P, failed_P)

    def _passes(
        self, kind: str, slots: list[Slot], rollouts: Rollouts, rows_P: list[list[int]], weight_B_T: Tensor
    ) -> Iterator[Tensor]:
        """Log-probabilities [B, T] of each policy's rows, 0 elsewhere; every pass is asked for before the first is read. The
        loss of Thinking Machines' service is a sum over tokens, SkyRL's a mean over rows, and over the tokens of each, prompt
        included; the weights make up for it.
        """
        what, answers = "scores" if kind == "forward" else "a gradient", []
        for slot, rows in zip(slots, rows_P, strict=True):
            data = []
            for row in rows:
                length, ids = int(rollouts.length_B[row]), tokens_of(rollouts, row)
                prompt = [0.0] * (len(rollouts.prompts[row]) - 1)
                weight_T = weight_B_T[row, :length] * ((len(ids) - 1) * len(rows) if self.skyrl else 1)
                columns = {
                    "target_tokens": ids[1:],
                    "logprobs": prompt + rollouts.logprob_B_T[row, :length].tolist(),
                    "advantages": prompt + weight_T.tolist(),
                }
                data.append(self.sdk.Datum(model_input=self.sdk.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=columns))
            answers.append(self.ask(what, partial(getattr(self.client(slot), kind), data, LOSS)))
            if kind != "forward":  # the service holds a gradient of it now
                slot.moved, slot.sampler = True, None
        for rows, answer in zip(rows_P, answers, strict=True):
            outputs = self.ask(what, answer.result).loss_fn_outputs
            yield behind_prompts([output["logprobs"].tolist() for output in outputs], rollouts, rows)

    def _adam(self, slot: Slot, config: OptimizerConfig, lr: float) -> Any:
        """AdamW's step number t. Where the service counts n, rate and eps make its bias correction that of t."""
        slot.steps += 1
        t, n = slot.steps, slot.steps + slot.before
        root = math.sqrt((1 - config.beta2**t) / (1 - config.beta2**n))
        rate = root * (1 - config.beta1**n) / (1 - config.beta1**t)
        named = {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps * root, "grad_clip_norm": config.clip}
        decay = config.weight_decay / rate
        return self.alive[slot].optim_step(self.sdk.AdamParams(learning_rate=lr * rate, weight_decay=decay, **named))

    def score(self, stack: AdapterStack, rollouts: Rollouts) -> Tensor:
        """As `base.score`."""
        slots, logprob_B_T = self.slots_of(stack), torch.zeros(rollouts.tokens_B_T.shape)
        for slot, rows in zip(slots, torch.arange(rollouts.rows).view(len(slots), -1).tolist(), strict=True):
            logprob_B_T += next(self._passes("forward", [slot], rollouts, [rows], torch.zeros_like(logprob_B_T)))
        return logprob_B_T

    def local(self, stack: AdapterStack) -> AdapterStack:
        """As `base.Backend`: from the adapter's archive, of which the safetensors file and nothing else is read."""
        client, name = self.client(*self.slots_of(stack)), f"soar-{secrets.token_hex(8)}"

        def archive() -> bytes:
            client.save_weights_for_sampler(name).result()
            place = name if self.skyrl else f"sampler_weights/{name}"
            url = self.service.create_rest_client().get_checkpoint_archive_url(client.model_id, place).result().url
            if not url.startswith(("https://", "http://")):
                raise ValueError(f"its archive has the address {url}")
            return bytes(urllib.request.urlopen(url, timeout=self.settings.timeout_s).read())

        with tarfile.open(fileobj=io.BytesIO(self.ask("an adapter", archive))) as files:
            file = next(m for m in files if m.isfile() and m.name.split("/")[-1] == "adapter_model.safetensors")
            held = read_safetensors(files.extractfile(file).read())  # type: ignore[union-attr]
        places = {f"{name}.{ab}": f"base_model.model.{name}.lora_{ab}.weight" for name in self.layers for ab in "AB"}
        if missing := sorted(set(places.values()) - held.keys()):
            raise Interrupted(f"the service's adapter has no {missing[0]}; backend.model is not model.path")
        weights = {layer: held[place].float().T.contiguous()[None] for layer, place in places.items()}
        return AdapterStack("lora", weights, ALPHA / self.config.lora_rank)

    def base_digest(self) -> str:
        """Of the base model's name: its weights are not here."""
        return sha256(f"tinker {self.name}".encode()).hexdigest()

    def sample(self, stack: AdapterStack | None, request: Request) -> Rollouts:
        """As `sampler.NativeSampler.sample`. A prompt's attempts are one request with one seed: they depend on it alone, as
        far as the service keeps seeds.
        """
        request.check(stack, self.context)
        slots = [None] * len(request.prompts_P_Q) if stack is None else self.slots_of(stack)
        temperature, max_tokens, stop = request.sampling.temperature, request.sampling.max_tokens, sorted(self.end_ids)
        top_p = request.sampling.top_p if temperature else 1.0
        settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": stop}
        completions: list[Completion] = []
        for first in range(0, len(slots), self.settings.clients):
            asked = []
            for p in range(len(slots))[first : first + self.settings.clients]:
                client = self.sampler(slots[p])
                for prompt, seed in zip(request.prompts_P_Q[p], request.seed_P_Q[p], strict=True):
                    seed_31 = int(seeds.row_seeds(seed, 1)[0]) & ((1 << 31) - 1)
                    params = self.sdk.SamplingParams(seed=seed_31, **settings)
                    asked.append(client.sample(self.sdk.ModelInput.from_ints(prompt), request.attempts, params))
            for answer in asked:
                for row in self.ask("samples", answer.result).sequences:
                    logprobs = row.logprobs or [math.nan] * len(row.tokens)
                    completions.append((row.tokens, logprobs, row.stop_reason == "stop"))
        return rollouts_of(request.prompts_B, completions, self.pad_id)

    def release(self) -> None:
        """Let the service forget every client, at the end of a run; what they hold was saved or is not needed."""
        for slot in list(self.alive):
            self.close(slot, save=False)


def tokens_of(rollouts: Rollouts, row: int) -> list[int]:
    """Prompt and completion."""
    return [*rollouts.prompts[row], *rollouts.tokens_B_T[row, : int(rollouts.length_B[row])].tolist()]


def behind_prompts(scores: Sequence[Sequence[float]], rollouts: Rollouts, rows: list[int]) -> Tensor:
    """Of the scores of these rows' tokens those of their completions [B, T], 0 elsewhere."""
    score_B_T = torch.zeros(rollouts.tokens_B_T.shape)
    for row, score in zip(rows, scores, strict=True):
        length = int(rollouts.length_B[row])
        score_B_T[row, :length] = torch.tensor(score[len(score) - length :])
    return score_B_T


def open_tinker(config: Config) -> tuple[TinkerBackbone, TinkerBackbone]:
    """Backbone and sampler of a config whose server answers. Raises ConfigError and Interrupted."""
    model, backend, drawn = config.model, config.backend, (config.student.sampling, config.teacher.sampling)
    for fits, wanted in (
        (os.environ.get(KEY), f"the key in the environment variable {KEY}"),
        (backend.base_url or backend.service == "tinker", "backend.base_url, where SkyRL's server listens"),
        (model.adapter == "lora" and model.lora_alpha == ALPHA, f'model.adapter = "lora", lora_alpha = {ALPHA:g}'),
        (model.target_modules == ("all-linear",), 'model.target_modules = ["all-linear"]'),
        (not model.gguf_file, "a model of safetensors"),
        (model.sampler == "native", 'model.sampler = "native": the service samples itself'),
        (not config.cluster.workers and not config.cluster.address, "cluster.workers = 0"),
        (all(s.temperature == 1 for s in drawn), "sampling.temperature = 1, which its loss takes"),
        (not any(s.stop for s in drawn), "sampling.stop = []: a completion ends by its tokens"),
    ):
        if not fits:
            raise ConfigError(f'backend.kind = "tinker" needs {wanted}')
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    sdk = import_extra("tinker", ConfigError, 'backend.kind = "tinker": {error}; pip install "soar-rl[train,tinker]"')
    service = sdk.ServiceClient(base_url=backend.base_url or None, api_key=os.environ[KEY])
    backbone = TinkerBackbone(config, sdk, service)
    served = backbone.ask("opening it", service.get_server_capabilities, CONNECT_S).supported_models
    if backbone.name not in (names := [str(model.model_name) for model in served]):
        raise ConfigError(f"backend.model = {backbone.name!r} is not served; served are: {', '.join(names)[:600]}")
    return backbone, backbone
