"""The sampler of model.sampler = "vllm": one vLLM engine, the policies as LoRA adapters of its requests.

Adapters are files in PEFT's format: every content gets an id that is never used again, so no cached prefix of an older one is
taken for it. Draws are vLLM's own; log-probabilities below top_p = 1 are larger by at most -log(top_p).
"""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from soar.config import Config, ConfigError, SamplingConfig, resolve_path
from soar.engine.policy import AdapterStack, Backbone, peft_tensors
from soar.engine.rollouts import Completion, OnTokens, Request, Rollouts, rollouts_of
from soar.types import import_extra, no_tick

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has memory layouts for
PROMPT_ROOM = 8192  # tokens of a prompt, where the model's context has so many
GRAPHS = {  # by default vLLM captures one for every batch size and number of adapters, which takes minutes
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_specialize_lora": False,
    "cudagraph_capture_sizes": [64, 256, 512, 1024],
}
MEMORY_FILES = "/dev/shm"


class VllmSampler:
    """Draws completions for a population: of policy p by slice p of the stack, or by the base model.

    slots: adapters that vLLM holds at once, at least as many as policies of a call. context: tokens of prompt and completion.
    memory: share of the GPU that vLLM takes for weights and cache.
    """

    def __init__(self, backbone: Backbone, slots: int, context: int, memory: float) -> None:
        self.backbone, self.slots, self.context = backbone, slots, context
        self.on_tokens: OnTokens = no_tick  # vLLM says nothing until it is done
        self.files = tempfile.TemporaryDirectory(dir=MEMORY_FILES if os.access(MEMORY_FILES, os.W_OK) else None)
        self.written: dict[str, str] = {}  # digest of an adapter -> its folder, the least recently used first
        self._last = 0
        self._lock = threading.Lock()  # an engine takes one call at a time
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        advice = 'install it with pip install "soar-rl[train,vllm]", or set model.sampler = "native"'
        missing = f'model.sampler = "vllm": vLLM cannot be imported ({{error}}); {advice}'
        vllm = import_extra("vllm", ConfigError, missing)
        config = backbone.config
        how: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        how |= {"dtype": str(backbone.dtype).removeprefix("torch."), "max_model_len": context}
        how |= {"enable_lora": True, "max_loras": slots, "gpu_memory_utilization": memory}
        how |= {"max_lora_rank": next(size for size in RANKS if size >= config.lora_rank)}
        how |= {"logprobs_mode": "processed_logprobs", "disable_log_stats": True}
        how |= {"compilation_config": GRAPHS, "max_num_seqs": 1024} if torch.cuda.is_available() else {}
        try:
            self.llm = vllm.LLM(resolve_path(config.path), **how)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f'model.sampler = "vllm": vLLM does not start: {error}') from error

    def sample(self, stack: AdapterStack | None, request: Request) -> Rollouts:
        """As the native engine's."""
        request.check(stack, self.context)
        prompts_B, seed_B = request.prompts_B, (request.seed_B & np.uint64((1 << 63) - 1)).tolist()
        with self._lock:
            folders_P = [""] * len(request.prompts_P_Q) if stack is None else self.adapters(stack)
            folders_B = np.repeat(folders_P, len(prompts_B) // len(folders_P)).tolist()
            completions = self.generate(list(zip(prompts_B, folders_B, seed_B, strict=True)), request.sampling)
        return rollouts_of(prompts_B, completions, self.backbone.pad_id)

    def release(self) -> None:
        """vLLM keeps its memory."""

    def adapters(self, stack: AdapterStack) -> list[str]:
        """Folders of the slices as they are now; what is new is written, and what was not used for longest makes room."""
        digests = [stack.digest(p) for p in range(stack.policies)]
        for p, digest in enumerate(digests):
            self.written[digest] = self.written.pop(digest, "") or self._write(stack, p)
        while len(self.written) > self.slots:
            shutil.rmtree(self.written.pop(next(iter(self.written))))
        return [self.written[digest] for digest in digests]

    def _write(self, stack: AdapterStack, policy: int) -> str:
        """One slice as PEFT's files, in a folder whose name is its id."""
        self._last += 1
        rank, folder = self.backbone.config.lora_rank, Path(self.files.name, str(self._last))
        folder.mkdir()
        save_file(peft_tensors(self.backbone, stack, policy), folder / "adapter_model.safetensors")
        names = sorted({name.rpartition(".")[2] for name in self.backbone.layers})
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": stack.scale * rank, "target_modules": names}
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return str(folder)

    def generate(self, rows: Sequence[tuple[Sequence[int], str, int]], sampling: SamplingConfig) -> list[Completion]:
        """One completion a row, all in one call: its prompt, folder of an adapter ("": the base model), and seed of its own.

        Raises ConfigError for a layer that vLLM puts no adapter on.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        same: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "logprobs": 0}
        same |= {"top_p": sampling.top_p if sampling.temperature else 1.0, "stop": list(sampling.stop) or None}
        same |= {"include_stop_str_in_output": True, "skip_special_tokens": False, "detokenize": bool(sampling.stop)}
        # the end tokens are those of stop_token_ids, as in the native engine
        same |= {"stop_token_ids": sorted(self.backbone.end_ids), "ignore_eos": True}
        parameters = [SamplingParams(**same, seed=seed) for _, _, seed in rows]
        prompts = [{"prompt_token_ids": list(prompt)} for prompt, _, _ in rows]
        adapters = [LoRARequest(folder, int(Path(folder).name), folder) if folder else None for _, folder, _ in rows]
        try:
            outputs = self.llm.generate(prompts, parameters, lora_request=adapters, use_tqdm=False)
        except ValueError as error:
            raise ConfigError(f'model.sampler = "vllm": {error}') from error
        completions: list[Completion] = []
        for row in (output.outputs[0] for output in outputs):
            logprobs = [step[token].logprob for token, step in zip(row.token_ids, row.logprobs, strict=True)]
            completions.append((row.token_ids, logprobs, row.finish_reason == "stop"))
        return completions


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
    return VllmSampler(backbone, slots, context, model.vllm_memory)
