"""Configuration: every key with its type, default and meaning, and how a recipe becomes a config.

Defaults are the paper's setting (arXiv 2601.18778, experimental setup) unless the comment behind a key says otherwise;
docs/config.md is made from those comments.
"""

import difflib
import json
import math
import os
import re
import tomllib
from contextlib import suppress
from contextvars import ContextVar
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ValidationInfo

from soar.types import UserError, parse_json

TeacherReward = Literal["grounded", "shuffled", "learnability", "none"]
TrainedArm = Literal[
    "hard_only", "hard_only_128", "likelihood", "hinted", "solvable", "variants", "pq", "pq_sample",
    "pq_well_posed", "pq_correct", "base_t", "teacher_t", "real",
]  # fmt: skip
HARD_ARMS: tuple[TrainedArm, ...] = ("hard_only", "hard_only_128", "likelihood", "hinted")  # without questions
WRITTEN_BY_TEACHER = {"base_t", "teacher_t", "variants"}  # arms whose questions a model writes first
HINT_TRIES, VARIANT_ATTEMPTS = 8, 10  # hints for a problem; attempts that say how hard a variant is, without votes
DENSE = ("likelihood", "forced")  # values of reward.mode that need no verifier
FEWEST_HARD = 4  # hard problems that a run needs, to train on and to hold out
TOO_EASY = 0.9  # share of the votes for one answer above which a question has nothing to teach
# Trained on as many promotion questions as the smaller of the well-posed and the correctly answered ones (finding 3).
ORACLE_ARMS = {"pq_sample", "pq_well_posed", "pq_correct"}
Format = Literal["tiny", "tags", "question_answer"]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_texts(cls, value: Any, info: ValidationInfo) -> Any:
        """TOML has no null, so `--set model.gguf_file=""` stands for it; `--set evaluate.ks=1,4` is [1, 4], `=4` is [4]."""
        field, items = cls.model_fields[str(info.field_name)], value if isinstance(value, list | tuple) else [value]
        if re.search(r"\b(int|float)\b", str(field.annotation)) and any(isinstance(item, bool) for item in items):
            raise ValueError("true and false are for switches; expected a number")
        if field.default in (None, {}) and value == "":  # a table would be added to the one that is there
            return field.default
        if isinstance(field.default, tuple) and isinstance(value, str | int) and not isinstance(value, bool):
            return [part.strip() or part for part in str(value).strip("[]").split(",") if part]
        return value

    @classmethod
    def read(cls, data: Any, where: str) -> Self:
        """The section that the data say. Raises ConfigError with a line for each key that is wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            known = [*(flat(Config().resolved()) if cls is Config else ()), *cls.model_fields]
            parts = {item["loc"][:-1] for item in error.errors()}  # of a list, what is wrong with its items says more
            items = (item for item in error.errors() if not item["loc"] or item["loc"] not in parts)
            raise ConfigError("\n".join(explain(item, where, known) for item in items)) from error


class ModelConfig(Section):
    """The one frozen base model, shared by teacher and students, and the kind of adapter stacked on it."""

    path: str = "builtin:tiny"  # folder, GGUF file, hub id, or builtin:tiny (the embedded world's model)
    gguf_file: str | None = None  # name of a GGUF file inside `path`
    revision: str | None = None  # hub revision; pinned in the manifest
    trust_remote_code: bool = False  # run code that comes with the model; off unless you have read it
    template_options: dict[str, Any] = {}  # of its chat template, as {enable_thinking = false}
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU that has it, else float32
    adapter: Literal["lora", "full"] = "lora"  # full: stacked full weight deltas, for tiny models
    lora_rank: int = Field(16, ge=1)  # rank of every adapter
    lora_alpha: float = Field(32.0, gt=0)  # scale is lora_alpha / lora_rank
    target_modules: tuple[str, ...] = ("all-linear",)  # name endings; all-linear: all but the output (and most routers)
    sampler: Literal["native", "vllm"] = "native"  # vllm: completions by vLLM (extra `vllm`), for adapter = "lora"
    vllm_memory: float = Field(0.4, gt=0, lt=1)  # share of a GPU's memory for vLLM with its own base weights
    chunk: int = Field(0, ge=0)  # policies trained at once; 0: by device (`population.choose_chunk`)
    micro_batch_tokens: int = Field(0, ge=0)  # tokens per forward of the update; 0: by device

    @model_validator(mode="before")
    @classmethod
    def _gguf(cls, data: Any) -> Any:
        """A path that is a GGUF file, or a folder with one and no config.json, says what gguf_file is."""
        path = Path(os.path.expanduser(str(data.get("path", "")))) if isinstance(data, dict) else Path()
        if path.suffix == ".gguf":
            return {**data, "path": str(path.parent), "gguf_file": path.name}
        files = list(path.glob("*.gguf")) if path != Path() and not (path / "config.json").is_file() else []
        return {**data, "gguf_file": files[0].name} if len(files) == 1 and not data.get("gguf_file") else data


class ProblemsConfig(Section):
    """Where the hard problems come from and how they are put to the model."""

    source: str = "world:tiny"  # file, hub id, world:NAME, reasoning_gym:NAME or verifiers:NAME
    options: dict[str, Any] = {}  # settings of a reasoning_gym family or a verifiers taskset; others do not read it
    revision: str | None = None  # of a hub dataset; the commit is pinned in the manifest
    split: str = "train"  # of a hub dataset
    domain: str = ""  # built-in, file.py:NAME or module:NAME, with prompts and verifier; "": the next two
    format: Format = "tags"  # prompts: tags (boxed answer, instruct models), question_answer (small base models), ...
    verifier: str = "math"  # math | number | exact | choice | module:function | file.py:function | verifiers:NAME
    success_at: float = 1.0  # score of a reward function from which on a text is solved
    test_share: float = Field(0.5, gt=0, lt=1)
    limit: int = Field(0, ge=0)  # candidate problems screened at most; 0: all (1,000 of a source without an end)
    max_hard: int = Field(0, ge=0)  # hard problems kept at most; 0: all
    question_column: str | None = None  # column of the question; unset: the first with a usual name
    answer_column: str | None = None  # column of the gold answer
    skip_bad_rows: bool = False  # leave out unreadable rows and conflicting duplicates instead of refusing the file
    verify_timeout_s: float = Field(5.0, gt=0)
    verify_workers: int = Field(0, ge=0)  # 0: one per core, at most 8
    verify_memory_mb: int | None = Field(None, ge=0)  # of a worker; unset: 8,192; 0: no limit

    @property
    def world(self) -> str:
        """NAME of a source `world:NAME`; "" for any other."""
        return self.source.removeprefix("world:") if self.source.startswith("world:") else ""


class ScreenConfig(Section):
    """fail@K: a problem is hard when at most `max_successes` of `attempts` rollouts of the base are correct."""

    attempts: int = Field(128, ge=0)  # 0: trust the file, screen nothing
    max_successes: int = Field(0, ge=0)  # a problem is hard when at most so many attempts are correct
    temperature: float = Field(1.0, gt=0)
    text_golds: bool = False  # keep problems whose gold answer `math` can only compare as text
    from_run: str = ""  # run folder whose screening of the same problems is used again, if made in the same way
    early_stop: bool = False  # no more attempts at a problem that is not hard any more; the hard set is the same


class SamplingConfig(Section):
    """How completions are drawn."""

    temperature: float = Field(1.0, gt=0)  # logits are divided by it
    top_p: float = Field(1.0, gt=0, le=1)  # draws are of the likeliest tokens of this probability; the loss is over all
    max_tokens: int = Field(1024, ge=1)  # room for a completion; a longer one is cut and counts as truncated
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # a completion ends where its text holds one


class OptimizerConfig(Section):
    """AdamW; one optimizer state per policy, gradients clipped per policy."""

    lr: float = Field(1e-5, gt=0)  # peak learning rate
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)  # decoupled, towards the base model
    clip: float = Field(1.0, gt=0)  # largest norm of a policy's gradient
    kl: float = Field(0.001, ge=0)  # k3 estimator against the base model, in the loss
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: to zero at the last step
    warmup_steps: int = Field(0, ge=0)  # linear, before the schedule
    normalize_advantages: bool = False  # divide by the standard deviation (not in the paper)


class TeacherConfig(Section):
    """Outer loop (method: the loop). g datasets of n questions a step."""

    steps: int = Field(200, ge=0)  # outer steps: the first number to raise; 0: no outer loop, only arms
    datasets: int = Field(4, ge=2)  # g, question sets in an outer step; a set is what earns a reward
    questions: int = Field(64, ge=1)  # n, questions in a set
    sampling: SamplingConfig = SamplingConfig(max_tokens=512)
    optimizer: OptimizerConfig = OptimizerConfig(schedule="cosine", warmup_steps=20)
    reward: TeacherReward = "grounded"  # what the teacher learns from (`rewards`); none: it is never updated
    loss_on: Literal["text", "question"] = "text"  # what it learns from of its texts; question: not from the answers
    votes: int = Field(0, ge=0)  # base model's attempts whose commonest answer replaces the written one; 0: as written
    agreement: float = Field(0.3, ge=0, le=1)  # least share of the votes for it; above 0.9 a question is too easy
    subject: str = ""  # the field in the teacher prompt; "": that of the format
    max_tries: int = Field(50, ge=1)  # at most max_tries * g * n teacher samples a step


class StudentConfig(Section):
    """Inner loop: RLOO from the baseline student on one dataset."""

    repeats: int = Field(4, ge=1)  # r, students trained on each set: more make its reward less noisy
    steps: int = Field(10, ge=1)  # RLOO steps of one inner loop
    extra_steps_per_promotion: int = Field(5, ge=0)  # added to `steps` after each promotion
    max_steps: int = Field(20, ge=1)  # up to which promotions add to `steps`
    prompts_per_step: int = Field(8, ge=1)  # questions in one RLOO step
    attempts: int = Field(32, ge=2)  # at each question in a training step: the group of RLOO
    sampling: SamplingConfig = SamplingConfig(max_tokens=1024)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_decay_per_promotion: float = Field(1.0, gt=0, le=1)  # factor on the learning rate
    reward: Literal["binary", "paper"] = "paper"  # paper: 120 / 20 / 10 / 0


class RewardConfig(Section):
    """How a student's improvement on hard problems is measured (Q_R)."""

    questions: int = Field(64, ge=1)  # M, hard problems on which improvement is measured
    mode: Literal["greedy", "sampled", "likelihood", "forced"] = "greedy"  # the last two: mean p(gold answer)
    attempts: int = Field(1, ge=1)  # per reward question, when sampled
    baseline_attempts: int = Field(4, ge=1)  # the same for the baseline, once while it stands


class IntrinsicConfig(Section):
    """How teacher.reward = "learnability" is measured; every question earns its own reward."""

    attempts: int = Field(8, ge=2)  # of the baseline student at every written question


class PromotionConfig(Section):
    """When a student becomes the new baseline: mean reward of the last `window` steps above tau (method, step 3)."""

    tau: float = 0.01  # mean improvement above which a student becomes the new baseline
    window: int = Field(3, ge=1)  # outer steps in that mean
    review: bool = False  # hold every promotion until a person accepts it (`soar review`)


class ArmsConfig(Section):
    """What is trained and measured after the loop (docs/concepts.md)."""

    run: tuple[Literal["base", "ps", TrainedArm], ...] = ("base", "hard_only", "ps", "pq")
    curriculum_steps: int = Field(0, ge=0)  # RLOO steps on questions before the hard problems; 0: both mixed
    steps: int = Field(0, ge=0)  # RLOO steps of Hard-Only; 0: as many student rollouts as the outer loop spent
    tokens: int = Field(0, ge=0)  # generated for an arm in all: search, half of the rest at most to prepare; 0: steps
    pq_steps: int = Field(0, ge=0)  # RLOO steps of every other arm; 0: the same as Hard-Only
    prompts_per_step: int = Field(0, ge=0)  # in one RLOO step of an arm; 0: the student's
    learning_rate: float = Field(0.0, ge=0)  # 0: the student's
    questions: int = Field(128, ge=1)  # N of base_t, teacher_t and real; at most so many of variants
    hint_tokens: int = Field(256, ge=1)  # of a hint of the arm hinted, which the base model writes
    real: str = ""  # file of easier problems for the arm real; "": the embedded world's own
    pq_from: str = ""  # run folder (same seed) or file of promotion questions, their search in no total; "": this run's
    teacher_from: str = ""  # run or adapter folder of the teacher of teacher_t, as pq_from; "": this run's
    save_steps: int = Field(10, ge=1)  # RLOO steps from one checkpoint to the next


class EvaluateConfig(Section):
    """pass@k on the held-out half, from `attempts` samples a problem."""

    attempts: int = Field(32, ge=1)  # at each held-out problem; the largest k of pass@k
    ks: tuple[PositiveInt, ...] = Field((1, 4, 8, 16, 32), min_length=1)
    temperature: float = Field(1.0, gt=0)
    bootstrap: int = Field(2000, ge=100)
    every: int = Field(0, ge=0)  # RLOO steps of an arm from one measurement on its way to the next; 0: none


class LogConfig(Section):
    """Completions that are kept, and where they and the numbers of metrics.jsonl are sent as well."""

    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # each is an extra of the same name
    project: str = "soar"  # of wandb and trackio
    rollouts_mb: float = Field(16.0, ge=0)  # megabytes of rollouts.jsonl at most, shared out evenly; 0: none are kept


class LimitsConfig(Section):
    """Where a run pauses or its loop ends; 0: nowhere."""

    max_hours: float = Field(0.0, ge=0)  # wall time of one process; the run pauses and can be resumed
    max_tokens: int = Field(0, ge=0)  # sampled after screening, all processes together; the run pauses
    max_promotions: int = Field(0, ge=0)  # the outer loop ends, arms and evaluation follow


class ClusterConfig(Section):
    """Worker processes that share the work (docs/scaling.md). Needs the extra `ray`; the numbers do not depend on it."""

    workers: int = Field(0, ge=0)  # processes; 0: none, or with an address one for each GPU (else core) of the cluster
    address: str = ""  # of a running Ray cluster: auto, HOST:PORT or ray://HOST:PORT; "": Ray is started here
    gpus: float | None = Field(None, ge=0)  # that a worker asks for; unset: 1 where the run is on a GPU, else 0
    retries: int = Field(3, ge=0)  # how often a worker may be lost and started again before the run stops


class BackendConfig(Section):
    """Who computes: this process, a service with Tinker's protocol, or for students a trainer by files (docs/scaling.md)."""

    kind: Literal["native", "tinker", "files"] = "native"  # files: as `soar student --emit` sets it
    service: Literal["tinker", "skyrl"] = "tinker"  # Thinking Machines', or SkyRL's own server (its JAX engine)
    base_url: str = ""  # of a server of your own; "": Thinking Machines'
    model: str = ""  # base model by the service's name; "": model.path, whose tokenizer and config alone are read here
    clients: int = Field(8, ge=2)  # training clients alive at once: the teacher's, the others train students
    timeout_s: float = Field(600.0, gt=0)  # a request without an answer for so long ends the run, which can be resumed


BUILTIN = Path(__file__).parent / "assets"
RECIPES = Path(__file__).parent / "recipes"
# A resumed run may change these: they say where, how fast and how long the run computes, not what.
HARMLESS = (
    "name", "threads", "model.device", "model.chunk", "model.micro_batch_tokens", "problems.verify_workers",
    "screen.from_run", "arms.save_steps", "limits.max_hours", "limits.max_tokens", "log.rollouts_mb", "log.sinks",
    "log.project", "cluster.workers", "cluster.address", "cluster.gpus", "cluster.retries",
    "backend.base_url", "backend.clients", "backend.timeout_s",
)  # fmt: skip

# Instead of what a run's config says, where its policies are measured on other problems, which need none of its arms.
ELSEWHERE = {
    "problems.question_column": "", "problems.answer_column": "", "problems.revision": "", "problems.split": "train",
    "problems.options": "", "problems.limit": 0, "arms.run": [],
}  # fmt: skip


class ConfigError(UserError, ValueError):
    """A recipe, override or combination of keys that cannot be used; the message says where and what to do."""


class Config(Section):
    """The whole run. `resolved()` is what the manifest records."""

    name: str = "soar"  # names the run folder, runs/NAME
    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)  # CPU threads, of torch or of workers for a small model; 0: all cores that it may use
    model: ModelConfig = ModelConfig()
    problems: ProblemsConfig = ProblemsConfig()
    screen: ScreenConfig = ScreenConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    reward: RewardConfig = RewardConfig()
    intrinsic: IntrinsicConfig = IntrinsicConfig()
    promotion: PromotionConfig = PromotionConfig()
    arms: ArmsConfig = ArmsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()
    limits: LimitsConfig = LimitsConfig()
    cluster: ClusterConfig = ClusterConfig()
    backend: BackendConfig = BackendConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """What single keys cannot say: the first pair that does not go together is refused."""
        problems, ks, votes, least = self.problems, self.evaluate.ks, self.teacher.votes, self.teacher.agreement
        prompts, attempts = self.arm_prompts, self.student.attempts
        trained = [arm for arm in self.arms.run if arm not in ("base", "ps")]
        if self.name in ("", ".", "..") or not self.name.isprintable() or set(self.name) & set("/\\"):
            expected = "it cannot be empty or hold /, \\ or what cannot be printed; a run is put elsewhere by --out"
            raise ValueError(f"name = {self.name!r} is the name of a folder under runs/: {expected}")
        if max(ks) > self.evaluate.attempts:
            found = f"evaluate.ks asks for pass@{max(ks)} from evaluate.attempts = {self.evaluate.attempts} samples"
            raise ValueError(f"{found}; raise evaluate.attempts or drop the larger k")
        if trained and not (self.teacher.steps or self.arms.steps or self.arms.tokens):
            found = "arms.steps = 0 gives an arm the budget of the outer loop, but teacher.steps = 0: there is none"
            raise ValueError(f"{found}; set arms.steps or arms.tokens for the arm {trained[0]}")
        if "hard_only_128" in trained and (128 % attempts or prompts * attempts % 128):
            wanted = "student.attempts that divide it and, times arms.prompts_per_step (or student's), are a multiple"
            raise ValueError(f"the arm hard_only_128 makes groups of 128 from {wanted}; found {prompts} * {attempts}")
        if ORACLE_ARMS & set(trained) and not (problems.world or problems.domain):
            found = f"{', '.join(sorted(ORACLE_ARMS))} need an exact oracle, not problems.source = {problems.source!r}"
            raise ValueError(f"arms.run: {found}; expected world:NAME, a domain that can solve, or none of them")
        if votes and not any(least <= k / votes <= TOO_EASY for k in range(1, votes)):
            found = f"no number of {votes} votes is that share or more and at most {TOO_EASY}"
            advice = "above which a question is too easy; raise teacher.votes or lower teacher.agreement"
            raise ValueError(f"teacher.votes = {votes}, teacher.agreement = {least:g}: {found}, {advice}")
        return self

    @property
    def arm_prompts(self) -> int:
        """Prompts of one RLOO step of an arm."""
        return self.arms.prompts_per_step or self.student.prompts_per_step

    @property
    def teacher_writes(self) -> bool:
        """Whether a teacher is asked for anything, in the outer loop or for an arm."""
        return bool(self.teacher.steps or WRITTEN_BY_TEACHER & {*self.arms.run})

    def arm_steps(self, arm: str, spent: float) -> int:
        """RLOO steps of an arm, in a run whose outer loop `spent` so many student rollouts."""
        per_step = self.arm_prompts * self.student.attempts
        if self.arms.tokens:
            return 1 + self.arms.tokens // per_step  # more than it can need
        own = 0 if arm.startswith("hard_only") else self.arms.pq_steps
        return own or self.arms.steps or max(1, math.ceil(spent / per_step))

    def uses_search(self, arm: str) -> bool:
        """Whether an arm builds on what the outer loop of this run found, so that its total holds the search."""
        if arm.startswith("pq"):
            return not self.arms.pq_from
        return arm == "ps" or (arm == "teacher_t" and not self.arms.teacher_from)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, JSON-ready."""
        return self.model_dump(mode="json")


def explain(item: ErrorDetails, where: str, known: list[str]) -> str:
    """What pydantic has against a key of a file, in one line. known: the keys that there are."""
    key = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        found = "" if item["type"] == "missing" else f" = {item['input']!r:.300}"
        given = f"{key}{found}: " if key else ""
        said = re.sub(r"valid dictionary( or instance of \w+)?", "table, as {name = false}", item["msg"])
        said = said.removeprefix("Value error, ")
        never = '; SOAR with a teacher that is never trained is no arm: set teacher.reward = "none"'
        said += never if item["input"] == "select_only" else ""
        return f"{where}: {given}{said}"
    same_end = [other for other in known if other.endswith(f".{item['loc'][-1]}")]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8) or same_end[:4]
    all_of_them = f"known keys: {', '.join(known)}" if len(known) < 20 else "docs/config.md lists all keys"
    hint = f"did you mean {' or '.join(near)}?" if near else all_of_them
    return f"{where}: unknown key {key!r}; {hint}"


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds, or the config of a manifest.json. Raises ConfigError."""
    manifest = path.name == "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
        return {**parse_json(text)["config"]} if manifest else _toml(text)
    except (ValueError, LookupError, TypeError) as error:  # also of what is not UTF-8
        what = "the manifest of a run" if manifest else "a TOML file"
        hint = "" if manifest or path.suffix == ".toml" else "; a file of problems is given by --problems"
        raise ConfigError(f"{path}: not {what}: {error}{hint}") from error


def _toml(text: str) -> dict[str, Any]:
    """What TOML says. Raises ValueError where it is none, or nested deeper than a manifest may be (`parse_json`)."""
    with suppress(RecursionError):
        parse_json(json.dumps({"config": (data := tomllib.loads(text))}, default=str))  # as in a manifest
        return data
    raise ValueError("lists and tables lie too deep in each other")


def _merge(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` -> {"a": {"b": value}}: the value as TOML where possible, else as text. Raises ConfigError."""
    key, equals, raw = text.partition("=")
    for value in (raw, json.dumps(raw.strip(), ensure_ascii=False)):
        try:
            return _toml(f"{key} {equals} {value}".replace("\x7f", r"\u007f"))  # which JSON leaves as it is
        except tomllib.TOMLDecodeError:
            continue
        except ValueError as error:
            raise ConfigError(f"--set {key}: {error}") from error
    raise ConfigError(f"--set {text!r}: expected key=value, for example --set teacher.steps=10")


def find_recipe(recipe: str, folder: Path = RECIPES, what: str = "recipe") -> Path:
    """Path of a recipe: built-in name (of `folder`), TOML file, or run folder (its manifest's config). Raises ConfigError."""
    run = [Path(recipe) / "manifest.json"] if what == "recipe" else []
    own = [*run, Path(recipe)]  # ./tiny is never the built-in one
    for path in own if os.sep in recipe else (folder / f"{recipe}.toml", *own):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in folder.glob("*.toml"))) + "; or a run folder" * (what == "recipe")
    raise ConfigError(f"no {what} {recipe!r}: expected a TOML file or one of: {names}")


TRUSTED: ContextVar[bool] = ContextVar("TRUSTED", default=False)  # --trust-run: may code that a run folder names run?


def named_code(config: object) -> list[str]:
    """Lines `key = value` of what in a run folder's config would run its author's code, or send or spend where he says."""
    # A key "problems.domain" beside the sections is none, and does not stand for the one that is loaded.
    values = flat({name: config[name] for name in Config.model_fields if isinstance(config, dict) and name in config})
    code = [key for key in ("problems.domain", "problems.verifier") if ":" in str(values.get(key, ""))]
    code += [key for key in ("problems.source", "arms.real") if str(values.get(key, "")).startswith("verifiers:")]
    code += [key for key in ("model.trust_remote_code", "cluster.address", "backend.base_url") if values.get(key)]
    code += ["backend.kind"] if values.get("backend.kind") == "tinker" else []  # the problems leave, and it costs
    return [f"{key} = {json.dumps(values[key]):.100}" for key in code]


def refuse_code(path: Path, config: object) -> None:
    """Raises ConfigError when the config in the run folder `path` names code or a service and nobody said --trust-run."""
    if (named := named_code(config)) and not TRUSTED.get():
        advice = "Give --trust-run if the folder or what it names is yours, or else a recipe of your own"
        whose = "its config names code or a server of whoever made the folder, or a service that costs"
        raise ConfigError(f"{path}: {whose}: {', '.join(named)}. {advice}")


def load(recipe: str | None = None, overrides: list[str] | None = None, model_named: bool = False) -> Config:
    """Config of a recipe (None: `tiny`) and `--set`; model_named: they have to say model and problems. Raises ConfigError."""
    path = find_recipe(recipe or "tiny")
    data = reduce(_merge, map(parse_override, overrides or []), read_toml(path))
    if model_named and isinstance(model := data.get("model", {}), dict) and "path" not in model:
        some = "--set model.path=, with a folder, a GGUF file or a hub id (builtin:tiny: the demo's, of 168,000 parameters)"
        raise ConfigError(f"no --model given: the recipe {path.stem!r} leaves it to you; add --model, or {some}")
    if model_named and isinstance(problems := data.get("problems", {}), dict) and "source" not in problems:
        raise ConfigError(f"no --problems given: the recipe {path.stem!r} leaves them to you; add --problems")
    if path.name == "manifest.json":
        refuse_code(path.parent, data)
    return build(data, f"{path} with --set" if overrides else str(path))


def build(data: dict[str, Any], where: str = "config") -> Config:
    """A Config of a plain dict; a key not in it has its default in a whole Config, not of its class. Raises ConfigError."""
    return Config.read(_merge(Config().resolved(), data), where)


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a resolved config; an empty table is a value."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        inner = isinstance(value, dict) and value
        values |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return values


def resolve_path(path: str) -> str:
    """`builtin:NAME` -> its folder, `~` -> home, a folder -> its whole path; a hub id as it is. Raises ConfigError."""
    if not path.startswith("builtin:"):
        place = os.path.expanduser(path)
        return os.path.abspath(place) if os.path.isdir(place) else place
    folder = BUILTIN / path.removeprefix("builtin:")
    if not (folder / "config.json").is_file():
        known = sorted(p.parent.name for p in BUILTIN.glob("*/config.json"))
        raise ConfigError(f"model.path = '{path}': no such embedded model; known: {', '.join(known)}")
    return str(folder)
