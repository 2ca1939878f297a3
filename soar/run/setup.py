"""What every command opens by a config; how an adapter is written, and a run's state into a checkpoint and back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor

from soar.backends.base import Backend, begin
from soar.config import Config, ConfigError, explain, resolve_path
from soar.domains.world import get_world
from soar.engine.load import choose_device, load_backbone
from soar.engine.memory import free_bytes
from soar.engine.policy import AdapterStack, Backbone, peft_tensors
from soar.engine.rollouts import Sampler
from soar.engine.sampler import NativeSampler
from soar.files import Row, write_json
from soar.loop.rollout import RolloutEnv
from soar.loop.student import TrainState
from soar.loop.teacher import LoopState
from soar.problems.domain import domain_of
from soar.problems.pool import open_pool
from soar.problems.prompts import turn_end_ids
from soar.run.checkpoint import OLD_SOAR, STATE, Checkpoint, RunFolderError, write_tensors
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
    """Backbone, sampler, prompts and verifiers, closed at the end. Raises ConfigError; too large a model is not loaded."""
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
    if domain.prompts.turns and (turn_ends := turn_end_ids(backbone.tokenizer)):
        backbone.end_ids, backbone.end_id = backbone.end_ids | turn_ends, min(turn_ends)
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
    if not config.problems.world:
        return rows
    world = get_world(config.problems.world)
    solved = [(row, *world.read(row["question"])) for row in rows]
    return [
        {**row, "topic": topic, "well_posed": right is not None, "correct": right == row["answer"]}
        for row, topic, right in solved
    ]


def save_adapter(backbone: Backbone, stack: AdapterStack, folder: Path) -> None:
    """Write a stack of one policy in PEFT's LoRA format, loadable by `PeftModel.from_pretrained(base, folder)`."""
    stack = backbone.local(stack) if isinstance(backbone, Backend) else stack
    weights = peft_tensors(backbone, stack, 0)
    ranks = {name: weights[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in backbone.layers}
    write_tensors(folder / "adapter_model.safetensors", weights)
    rank = max(ranks.values())
    scale, pattern = (stack.scale, {}) if stack.kind == "lora" else (1.0, ranks)
    path = backbone.config.path  # of a folder the whole: from elsewhere a relative one is another, or a hub id
    path = path if path.startswith("builtin:") else resolve_path(path)
    base = {"base_model_name_or_path": path, "revision": backbone.config.revision}
    patterns = {"rank_pattern": pattern, "alpha_pattern": {name: float(r) for name, r in pattern.items()}}
    sizes = {"r": rank, "lora_alpha": scale * rank, **patterns, "target_modules": sorted(backbone.layers)}
    fixed = {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **base, **sizes, **fixed}
    write_json(folder / "adapter_config.json", config)


Stage = Literal["loop", "arms", "evaluate", "done"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class Pending:
    """A promotion on hold. promotion: its event; rows: its questions; the rest is the baseline that a refusal restores."""

    promotion: Row
    rows: list[Row]
    baseline: AdapterStack
    pass_rates: dict[str, float | None]


@with_config(ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
@dataclass
class RunState:
    """What a checkpoint holds: the stage to do next, the loop's state, arms, a promotion on hold, seconds per phase.
    tokens: sampled since screening; arm_tokens: of an arm, by what for; arm_progress: arms amid their training.
    """

    stage: Stage
    loop: LoopState
    arms: dict[str, AdapterStack] = field(default_factory=dict)
    arm_rollouts: dict[str, int] = field(default_factory=dict)
    arm_tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    arm_progress: dict[str, TrainState] = field(default_factory=dict)
    pending: Pending | None = None
    tokens: int = 0

    @property
    def adapters(self) -> dict[str, AdapterStack]:
        """Teacher, promoted student and trained arms, by their folders in the run folder."""
        arms = {f"arms/{name}": stack for name, stack in self.arms.items()}
        return {"teacher": self.loop.teacher, "student": self.loop.best or self.loop.baseline, **arms}

    def checkpoint(self) -> Checkpoint:
        """All of it, its tensors under the path of their fields. Seeds are derived: there is no random state."""
        tensors: dict[str, Tensor] = {}

        def plain(value: Any, place: str) -> Any:
            if isinstance(value, Tensor):
                tensors[place] = value
                return None
            if is_dataclass(value):
                names = (field.name for field in fields(value))
                value = {name: getattr(value, name) for name in names if not name.startswith("_")}  # those are caches
            if isinstance(value, list | tuple):  # there are no tensors in one
                return [plain(item, place) for item in value]
            return {k: plain(v, f"{place}/{k}") for k, v in value.items()} if isinstance(value, dict) else value

        loop: Any = replace(self.loop, optimizer=self.loop.optimizer.state())
        return Checkpoint(self.stage, plain(replace(self, loop=loop), ""), tensors)

    @classmethod
    def read(cls, checkpoint: Checkpoint, backbone: Backbone, config: Config) -> "RunState":
        """Inverse of `checkpoint`, on the backbone's device. Raises RunFolderError for types or shapes of another version."""
        tensors = {k: v.to(backbone.device) if "/tensors/" in k else v for k, v in checkpoint.tensors.items()}
        fresh = None if isinstance(backbone, Backend) else backbone.new_stack(0)  # else tensors say where weights are
        like = {name: (tensor.shape, tensor.dtype) for name, tensor in fresh.tensors.items()} if fresh else {}
        moments = {f"{name}/{key}": of for name, of in like.items() for key in ("exp_avg", "exp_avg_sq")}
        moments |= {f"{name}/step": (torch.Size(), torch.float32) for name in like}

        def whole(value: Any, place: str) -> Any:
            if not isinstance(value, dict):
                return tensors.get(place, value)
            value, name = {k: whole(v, f"{place}/{k}") for k, v in value.items()}, place.rpartition("/")[2]
            found = {k: (getattr(v, "shape", None), getattr(v, "dtype", None)) for k, v in value.items()}
            strange = (name == "tensors" and found != like) or (name == "optimizer" and found not in ({}, moments))
            if fresh and (strange or (isinstance(value.get("tensors"), dict) and value.get("kind") != fresh.kind)):
                raise LookupError(f"{place} is no adapter of this model")
            return value

        try:
            state = TypeAdapter(cls).validate_python(whole(checkpoint.data, ""))
            if others := state.arms.keys() - ({*config.arms.run} & state.arm_tokens.keys() & state.arm_rollouts.keys()):
                raise LookupError(f"arms {others}")  # each names a folder that is written
            optimizer = begin(backbone, state.loop.teacher, config.teacher.optimizer)
            optimizer.restore(state.loop.optimizer)
            state.loop.teacher, state.loop.optimizer = optimizer.stack, optimizer
            return state
        except (ValidationError, LookupError, AttributeError) as error:
            found = explain(error.errors()[0], STATE, []) if isinstance(error, ValidationError) else repr(error)
            raise RunFolderError(f"the checkpoint is not of this version of soar ({found:.200}); {OLD_SOAR}") from error
