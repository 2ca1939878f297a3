"""The sampler of model.sampler = "vllm": one vLLM engine, the policies as LoRA adapters of its requests.

An adapter is loaded from tensors, without a file, whenever its weights are new to the engine: every content gets an id that
is never used again, so no cached prefix of an older version can be taken for it. Sampling means what it means to the native
engine, but the draws are vLLM's own, and log-probabilities below top_p = 1 are those of the truncated distribution, larger by
at most -log(top_p). vLLM keeps its own copy of the base weights.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soar import seeds
from soar.config import Config, ConfigError, SamplingConfig
from soar.engine.load import resolve_path
from soar.engine.policy import AdapterStack, Backbone, peft_tensors
from soar.engine.rollouts import OnTokens, Rollouts, StopStrings, check_prompts, unheard

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has memory layouts for
PROMPT_ROOM = 8192  # tokens of a prompt, where the model's context has so many


class Completion(NamedTuple):
    """tokens with the end token, logprobs one a token, ended: by an end token and not by the budget."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    ended: bool


class VllmSampler:
    """Draws completions for a population; `sampler.NativeSampler.sample` documents the arguments.

    slots: adapters that the engine holds at once, at least as many as policies of a call.
    """

    def __init__(self, backbone: Backbone, engine: VllmEngine, slots: int, context: int | None = None) -> None:
        self.backbone, self.engine, self.slots = backbone, engine, slots
        self.context = min(backbone.context, context or backbone.context)
        self.on_tokens: OnTokens = unheard  # vLLM says nothing until it is done
        self.loaded: dict[str, int] = {}  # digest -> adapter id, the least recently used first
        self._last = 0
        self._lock = threading.Lock()  # an engine takes one call at a time

    def sample(
        self,
        stack: AdapterStack | None,
        prompts_P_Q: list[list[list[int]]],
        attempts: int,
        seed_P_Q: list[list[int]],
        sampling: SamplingConfig,
        greedy: bool = False,
    ) -> Rollouts:
        """As the native engine's, rows in the order (p, q, n)."""
        check_prompts(stack, prompts_P_Q, sampling.max_tokens, self.context)
        with self._lock:
            adapters = [0] * len(prompts_P_Q) if stack is None else self._adapters(stack)
            rows = [
                (prompt, adapter, int(row_seed) & ((1 << 63) - 1))
                for adapter, prompts, seed_Q in zip(adapters, prompts_P_Q, seed_P_Q, strict=True)
                for prompt, seed in zip(prompts, seed_Q, strict=True)
                for row_seed in seeds.row_seeds(seed, attempts)
            ]
            completions = self.engine.generate(rows, sampling, greedy, tuple(sorted(self.backbone.end_ids)))
        return rollouts_of(tuple(tuple(prompt) for prompt, _, _ in rows), completions, self.backbone.pad_id)

    def release(self) -> None:
        """vLLM keeps its memory."""

    def _adapters(self, stack: AdapterStack) -> list[int]:
        """Ids of the slices as they are now; what is new is loaded, what was not used for longest makes room."""
        digests = [stack.digest(p) for p in range(stack.policies)]
        for p, digest in enumerate(digests):
            if digest in self.loaded:
                self.loaded[digest] = self.loaded.pop(digest)
                continue
            while len(self.loaded) >= self.slots:
                oldest = next(digest for digest in self.loaded if digest not in digests)
                self.engine.drop(self.loaded.pop(oldest))
            self._last += 1
            rank = self.backbone.config.lora_rank
            self.engine.load(self._last, peft_tensors(self.backbone, stack, p), rank, stack.scale * rank)
            self.loaded[digest] = self._last
        return [self.loaded[digest] for digest in digests]


def rollouts_of(prompts: tuple[tuple[int, ...], ...], completions: list[Completion], pad: int) -> Rollouts:
    """Completions as one record. A row with a log-probability that is no number has failed, and ends there."""
    longest = max((len(row.tokens) for row in completions), default=0)
    tokens_B_T = torch.full((len(completions), max(1, longest)), pad, dtype=torch.long)
    logprob_B_T = torch.zeros(tokens_B_T.shape)
    for row, completion in enumerate(completions):
        tokens_B_T[row, : len(completion.tokens)] = torch.tensor(list(completion.tokens), dtype=torch.long)
        logprob_B_T[row, : len(completion.logprobs)] = torch.tensor(list(completion.logprobs))
    failed_B = ~torch.isfinite(logprob_B_T).all(dim=1)
    return Rollouts(
        prompts,
        tokens_B_T,
        torch.tensor([len(row.tokens) for row in completions]),
        logprob_B_T.nan_to_num(0.0, 0.0, 0.0),
        torch.tensor([row.ended for row in completions]) | failed_B,
        failed_B,
    )


def cut_at_stops(rollouts: Rollouts, stops: StopStrings) -> Rollouts:
    """The same rows, each ended by the token that completes its first stop string."""
    device, steps = stops.can_end_V.device, rollouts.tokens_B_T.shape[1]
    length_B, ended_B = rollouts.length_B.clone(), rollouts.ended_B.clone()
    for row, length in stops.ends(rollouts.tokens_B_T.to(device), rollouts.length_B.to(device), 0, steps):
        length_B[row], ended_B[row] = length, True
    inside_B_T = torch.arange(steps) < length_B[:, None]
    logprob_B_T = rollouts.logprob_B_T * inside_B_T
    return replace(rollouts, length_B=length_B, ended_B=ended_B, logprob_B_T=logprob_B_T)


class VllmEngine:
    """vLLM in this process. rank, slots: largest adapter and how many at once. context: tokens of prompt and completion.

    memory: share of the GPU that vLLM takes for weights and cache.
    """

    def __init__(self, backbone: Backbone, rank: int, slots: int, context: int, memory: float) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f'model.sampler = "vllm": vLLM cannot be imported ({error}); install it with '
                'pip install "soar-rl[train,vllm]", or set model.sampler = "native"'
            ) from error
        self.vllm, config = vllm, backbone.config
        try:
            self.llm = vllm.LLM(
                resolve_path(config.path),
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=str(backbone.dtype).removeprefix("torch."),
                enable_lora=True,
                max_lora_rank=next(size for size in RANKS if size >= rank),
                max_loras=slots,
                max_model_len=context,
                gpu_memory_utilization=memory,
                logprobs_mode="processed_logprobs",
                worker_extension_cls="soar.engine.vllm.AdapterExtension",
                disable_log_stats=True,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f'model.sampler = "vllm": vLLM does not start: {error}') from error

    def load(self, adapter: int, tensors: dict[str, Tensor], rank: int, alpha: float) -> None:
        """Into every worker, under a new id. Raises ConfigError for a layer that vLLM puts no adapter on."""
        try:
            held = self.llm.collective_rpc("soar_load", args=(adapter, tensors, rank, alpha))
        except ValueError as error:
            raise ConfigError(f'model.sampler = "vllm": {error}') from error
        if not all(held):
            raise RuntimeError(f"vLLM did not keep adapter {adapter}; this version of vLLM may not fit")

    def drop(self, adapter: int) -> None:
        """From every worker."""
        self.llm.collective_rpc("soar_drop", args=(adapter,))

    def generate(
        self, rows: list[tuple[list[int], int, int]], sampling: SamplingConfig, greedy: bool, end_ids: tuple[int, ...]
    ) -> list[Completion]:
        """One completion a row, all in one call; vLLM batches them as they come.

        rows: prompt, id of a loaded adapter (0: the base model), and the seed of this row alone.
        """
        from vllm.lora.request import LoRARequest

        prompts = [{"prompt_token_ids": list(prompt)} for prompt, _, _ in rows]
        adapters = [LoRARequest(f"soar-{i}", i, "in memory") if i else None for _, i, _ in rows]
        parameters = [
            self.vllm.SamplingParams(
                temperature=0.0 if greedy else sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,
                stop_token_ids=list(end_ids),
                ignore_eos=True,  # the end tokens are those of stop_token_ids, as in the native engine
                logprobs=0,
                stop=list(sampling.stop) or None,
                include_stop_str_in_output=True,
                skip_special_tokens=False,
                detokenize=bool(sampling.stop),
            )
            for _, _, seed in rows
        ]
        completions = []
        for output in self.llm.generate(prompts, parameters, lora_request=adapters, use_tqdm=False):
            row = output.outputs[0]
            logprobs = [step[token].logprob for token, step in zip(row.token_ids, row.logprobs, strict=True)]
            completions.append(Completion(tuple(row.token_ids), logprobs, row.finish_reason == "stop"))
        return completions


class AdapterExtension:
    """What `VllmEngine` calls by name in every worker of vLLM, which adds this class to its own (`worker_extension_cls`)."""

    def soar_load(self, adapter_id: int, tensors: dict[str, Any], rank: int, alpha: float) -> bool:
        """Add an adapter under a new id. tensors: PEFT names -> A [rank, in] and B [out, rank]."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        inner = manager._adapter_manager
        mapper = getattr(inner.model, "hf_to_vllm_mapper", None)
        lora = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper(r=rank, lora_alpha=alpha, target_modules="all-linear"),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
        # Names that the layers of the original model have: vLLM packs query, key and value into one.
        packed, modules = inner.packed_modules_mapping, inner.supported_lora_modules
        taken = {name for module in modules for name in (*packed.get(module, ()), module)}
        if strange := sorted({name.rsplit(".", 1)[-1] for name in lora.loras} - taken):
            raise ValueError(f"vLLM puts no adapter on {', '.join(strange)}; name other model.target_modules")
        inner.add_adapter(lora)
        return adapter_id in manager.list_adapters()

    def soar_drop(self, adapter_id: int) -> bool:
        """Forget an adapter."""
        return bool(self.model_runner.lora_manager.remove_adapter(adapter_id))  # type: ignore[attr-defined]


def open_vllm(backbone: Backbone, config: Config) -> VllmSampler:
    """The sampler of a config. Raises ConfigError where vLLM cannot serve it, with what to set instead."""
    model = config.model
    for wrong, said in (
        (model.adapter != "lora", 'serves LoRA adapters; set model.adapter = "lora"'),
        (model.gguf_file, "reads no model.gguf_file; convert the model"),
        (model.lora_rank > RANKS[-1], f"serves model.lora_rank of at most {RANKS[-1]}; lower it"),
    ):
        if wrong:
            raise ConfigError(f'model.sampler = "vllm" {said}, or set model.sampler = "native"')
    slots = max(config.teacher.datasets * config.student.repeats, len(config.arms.run), 1)
    budget = max(config.student.sampling.max_tokens, config.teacher.sampling.max_tokens)
    context = min(backbone.context, budget + PROMPT_ROOM)
    engine = VllmEngine(backbone, model.lora_rank, slots, context, model.vllm_memory)
    return VllmSampler(backbone, engine, slots, context)
