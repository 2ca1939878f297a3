"""Configuration: one TOML file at most one screen long, everything else defaulted and named in `settings.py`.

An unknown key is an error that names the nearest known one.
`load` merges, in this order: defaults, the recipe (a file or the name of a built-in one), `--set a.b=value` overrides.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from soar.settings import (
    ArmsConfig,
    ClusterConfig,
    EvaluateConfig,
    IntrinsicConfig,
    JudgeConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    ProblemsConfig,
    PromotionConfig,
    RewardConfig,
    ScreenConfig,
    Section,
    StudentConfig,
    TeacherConfig,
)
from soar.types import UserError

RECIPES = Path(__file__).parent / "recipes"
# A resumed run may change these: they say where, how fast and how long the run computes, not what.
HARMLESS = (
    "name", "threads", "model.device", "model.chunk", "model.micro_batch_tokens", "model.gradient_checkpointing",
    "problems.verify_workers",
    "screen.from_run", "arms.save_steps", "limits.max_hours", "limits.max_tokens", "log.sinks", "log.project",
    "cluster.workers", "cluster.address", "cluster.cpus", "cluster.gpus", "cluster.start_s", "cluster.silence_s",
    "cluster.retries", "cluster.store_mb",
)  # fmt: skip


MIXED_ARMS = ("base", "hard_only", "ps", "ps_hard", "pq", "pq_mixed", "pq_curriculum")


class ConfigError(UserError, ValueError):
    """A recipe, override or combination of keys that cannot be used; the message says where and what to do."""


class Config(Section):
    """The whole run. `resolved()` is what the manifest records."""

    name: str = "soar"
    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)  # CPU threads of torch; 0: torch's own choice
    model: ModelConfig = ModelConfig()
    problems: ProblemsConfig = ProblemsConfig()
    screen: ScreenConfig = ScreenConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    reward: RewardConfig = RewardConfig()
    intrinsic: IntrinsicConfig = IntrinsicConfig()
    promotion: PromotionConfig = PromotionConfig()
    arms: ArmsConfig = ArmsConfig()
    judge: JudgeConfig = JudgeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    limits: LimitsConfig = LimitsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.name in ("", ".", "..") or not self.name.isprintable() or set(self.name) & set("/\\"):
            raise ValueError(
                f"name = {self.name!r} is the name of a folder under runs/: it cannot be empty or hold / or \\; "
                "a run is put elsewhere by --out"
            )
        if max(self.evaluate.ks) > self.evaluate.attempts:
            raise ValueError(
                f"evaluate.ks asks for pass@{max(self.evaluate.ks)} from evaluate.attempts = {self.evaluate.attempts} "
                "samples; raise evaluate.attempts or drop the larger k"
            )
        if self.reward.mode == "greedy" and self.reward.attempts != 1:
            raise ValueError('reward.attempts is for reward.mode = "sampled"; a greedy answer never changes, set 1')
        if self.model.quantization != "none" and (self.model.adapter == "full" or self.model.sampler == "vllm"):
            raise ValueError(
                f'model.quantization = {self.model.quantization!r} is for model.adapter = "lora" and model.sampler = '
                '"native": full adapters need the full weights, and vLLM would sample from another base model'
            )
        trained = [arm for arm in self.arms.run if arm not in ("base", "ps")]
        if trained and self.teacher.steps == 0 and self.arms.steps == 0:
            raise ValueError(
                "arms.steps = 0 gives an arm the budget of the outer loop, but teacher.steps = 0: there is none; "
                f"set arms.steps for the arm {trained[0]}"
            )
        if self.teacher.reward == "shuffled" and self.teacher.questions < 2:
            raise ValueError(
                'teacher.reward = "shuffled" permutes answers within a dataset; with teacher.questions = 1 nothing '
                "changes, set 2 or more"
            )
        self._consistent_totals()
        self._consistent_sets()
        return self

    def _consistent_totals(self) -> None:
        for name, part in by_set(self).items():
            where, own = f"problems.sets.{name}" if name else "problems", part.problems
            if own.format == "totals" and own.verifier != "exact" and not own.domain:
                raise ValueError(
                    f'{where}.format = "totals" compares lists of numbers (`12, 20`) as text; expected {where}.verifier = '
                    f'"exact", found {own.verifier!r}'
                )

    def _consistent_sets(self) -> None:
        sets = self.problems.sets
        bad = [name for name in sets if not name.isidentifier()]
        if bad or len(sets) == 1:
            found = repr(bad[0]) if bad else "one set"
            raise ValueError(f"problems.sets: found {found}; expected two sets or more, each named by one word")
        others = [arm for arm in self.arms.run if arm not in MIXED_ARMS]
        if sets and others:
            raise ValueError(f"arms.run: {others[0]} cannot be trained with problems.sets; use {', '.join(MIXED_ARMS)}")
        if sets and self.teacher.reward == "uncertainty":
            raise ValueError('teacher.reward = "uncertainty" counts votes, which problems.sets does not; use another')

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, JSON-ready."""
        return self.model_dump(mode="json")


def _known_keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Names allowed in the section that `path` (without its last part) leads to."""
    for part in path[:-1]:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _explain(error: ValidationError, where: str) -> ConfigError:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(whole config)"
        if item["type"] == "extra_forbidden":
            known = _known_keys(Config, item["loc"])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
            lines.append(f"{where}: unknown key {key!r}; {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {key} = {item['input']!r}: {message}" if item["loc"] else f"{where}: {message}")
    return ConfigError("\n".join(lines))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _without_none(section: dict[str, Any]) -> dict[str, Any]:
    """A resolved config as a recipe would say it: keys without a value are left to their default."""
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in section.items() if v is not None}


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` -> {"a": {"b": value}}. The value is read as TOML where possible, else as text.

    Raises ConfigError when there is no `=` or the key is empty.
    """
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {text!r}: expected key=value, for example --set teacher.steps=10")
    try:
        value: Any = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    for part in reversed(parts):
        value = {part: value}
    return value


def find_recipe(recipe: str) -> Path:
    """Path of a recipe: a TOML file, a built-in name, or a run folder, whose manifest holds its config.

    Raises ConfigError with the built-in names.
    """
    path = Path(recipe)
    if (path / "manifest.json").is_file():
        return path / "manifest.json"
    if path.is_file():
        return path
    builtin = RECIPES / f"{recipe}.toml"
    if builtin.is_file():
        return builtin
    names = sorted(p.stem for p in RECIPES.glob("*.toml"))
    raise ConfigError(f"no recipe {recipe!r}: expected a TOML file or one of: {', '.join(names)}; or a run folder")


def load(recipe: str | None = None, overrides: list[str] | None = None) -> Config:
    """Config from a recipe (None: built-in `tiny`) and `--set` overrides.

    Raises ConfigError naming file or override, key, what was found and what is expected.
    """
    path = find_recipe(recipe or "tiny")
    try:
        text = path.read_text(encoding="utf-8")
        data = _without_none(json.loads(text)["config"]) if path.name == "manifest.json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not the manifest of a run: {error}") from error
    where = str(path)
    for text in overrides or []:
        data = _merge(data, parse_override(text))
        where = f"{path} with --set"
    return build(data, where)


def override(config: Config, overrides: list[str]) -> Config:
    """The config with `--set` overrides on top. Raises ConfigError."""
    data = config.resolved()
    for text in overrides:
        data = _merge(data, parse_override(text))
    return build(data, "--set")


def build(data: dict[str, Any], where: str = "config") -> Config:
    """Validate a plain dict into a Config; a key that is not in it has the default of its place. Raises ConfigError.

    A section may have other defaults in one place than in another (`teacher.optimizer`, `student.optimizer`), so the
    defaults are those of a whole Config, not those of the section's class.
    """
    try:
        return Config.model_validate(_merge(Config().resolved(), data) if isinstance(data, dict) else data)
    except ValidationError as error:
        raise _explain(error, where) from error


def by_set(config: Config) -> dict[str, Config]:
    """The hard sets of a config, by name, each as a config of its own; {"": config} where there is only one."""
    found = {}
    for name, own in config.problems.sets.items():
        given = {key: value for key in type(own).model_fields if (value := getattr(own, key)) is not None}
        subject = given.pop("subject", config.teacher.subject)
        parts = {
            "problems": config.problems.model_copy(update={**given, "sets": {}}),
            "teacher": config.teacher.model_copy(update={"subject": subject}),
        }
        found[name] = config.model_copy(update=parts)
    return found or {"": config}


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every key that differs between two resolved configs."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines
