"""What every command opens: base model, sampler, prompts and verifier of a config; and how an adapter is written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from soar.backends.base import Backend
from soar.config import Config, ConfigError
from soar.domains.world import get_world
from soar.engine.load import choose_device, load_backbone
from soar.engine.memory import free_bytes
from soar.engine.policy import AdapterStack, Backbone, peft_tensors
from soar.engine.rollouts import Sampler
from soar.engine.sampler import NativeSampler
from soar.files import write_json
from soar.loop.rollout import RolloutEnv
from soar.problems.domain import domain_of
from soar.problems.pool import open_pool
from soar.problems.prompts import turn_end_ids
from soar.run.checkpoint import write_tensors
from soar.run.sizes import check_fits

SMALL_MODEL = 5_000_000  # parameters under which worker threads beat threads inside one operation on a CPU


def cores_of(threads: int) -> int:
    """`threads`, or the cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return threads or usable or 1


def choose_threads(backbone: Backbone, threads: int) -> int:
    """CPU worker threads, torch's own set to match: for a small model many of one operation thread each, else one."""
    if backbone.device.type != "cpu" or next(backbone.model.parameters()).is_meta:  # a service computes
        return 1
    small = sum(p.numel() for p in backbone.model.parameters()) < SMALL_MODEL
    torch.set_num_threads(1 if small else cores_of(threads))
    return cores_of(threads) if small else 1


@contextmanager
def open_env(config: Config) -> Iterator[RolloutEnv]:
    """Backbone, sampler, prompts and verifier pool of a config, closed at the end. Raises ConfigError,
    for a model that does not fit its device before anything is loaded."""
    if __doc__ is None:
        raise ConfigError("transformers reads docstrings, which python -OO (PYTHONOPTIMIZE=2) takes away: leave it out")
    domain = domain_of(config.problems)  # before the model, which takes minutes
    backbone: Backbone
    sampler: Sampler
    if config.backend.kind == "tinker":
        from soar.backends.tinker import open_tinker

        backbone, sampler = open_tinker(config)
    else:
        device = choose_device(config.model.device)
        check_fits(config, free_bytes(device), str(device))
        backbone = load_backbone(config.model)
        sampler = NativeSampler(backbone)
    backbone.end_ids |= turn_end_ids(backbone.tokenizer) if domain.prompts.turns else frozenset()
    with open_pool(domain, config.problems) as verifier:
        if config.model.sampler == "vllm":
            from soar.engine.vllm import open_vllm

            sampler = open_vllm(backbone, config)
        try:
            threads = choose_threads(backbone, config.threads)
            yield RolloutEnv(backbone, sampler, domain.prompts, verifier, config.student.reward, threads)
        finally:
            sampler.release()


def labelled(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with topic, well_posed and correct where the problem source has an exact oracle (for the record only)."""
    kind, _, name = config.problems.source.partition("world:")
    if kind or not name:
        return rows
    world = get_world(name)
    solved = [(row, *world.read(row["question"])) for row in rows]
    return [
        {**row, "topic": topic, "well_posed": right is not None, "correct": right == row["answer"]}
        for row, topic, right in solved
    ]


def save_adapter(backbone: Backbone, stack: AdapterStack, folder: Path, policy: int = 0) -> None:
    """Write one slice in PEFT's LoRA format, loadable by `PeftModel.from_pretrained(base, folder)`."""
    stack = backbone.local(stack) if isinstance(backbone, Backend) else stack
    weights = peft_tensors(backbone, stack, policy)
    ranks = {name: weights[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in backbone.layers}
    write_tensors(folder / "adapter_model.safetensors", weights)
    rank = max(ranks.values())
    scale, pattern = (stack.scale, {}) if stack.kind == "lora" else (1.0, ranks)
    base = {"base_model_name_or_path": backbone.config.path, "revision": backbone.config.revision}
    patterns = {"rank_pattern": pattern, "alpha_pattern": {name: float(r) for name, r in pattern.items()}}
    sizes = {"r": rank, "lora_alpha": scale * rank, **patterns, "target_modules": sorted(backbone.layers)}
    fixed = {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **base, **sizes, **fixed}
    write_json(folder / "adapter_config.json", config)
