"""What saturates first from 1 to 64 GPUs: a discrete-event simulation of one outer step, with measured rates.

    python benchmarks/scaling.py                 every table of docs/scaling.md, in seconds, pure Python
    python benchmarks/scaling.py --gpus 16 --model 8B --split --per-node-verifier

One outer step of the paper's setting: the teacher writes on one replica, its adapter's students train in their own replicas
(sample, verify, update, ten times), are measured, and come back; the teacher learns. A replica is the fewest GPUs that hold
the model. Rates are those of one H200 (the table of soar/plan/forecast.py, docs/performance.md) and of the verifier
(docs/reliability.md); other sizes by bytes moved and FLOPs at the same share of the roofline. ASSUMED names what is not
measured.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from soar.plan.forecast import KL_FACTOR, TABLE

TRAINED_BYTES = 16  # an adapter's weight, gradient and two AdamW moments, float32

COPY = 4.234e12  # bytes a second (benchmarks/results/h200-engine.json)
ROOFLINE = 0.491  # share of it at the 3B shape with 16 adapters: 24.2 ms a step (h200-vllm.json)
LAYER_SECONDS = 4.6e-3 / 30  # a decoding step without its attention: 7.2 - 2.6 ms in 30 layers (docs/performance.md)
GPU_BYTES = 141e9
CHECKS = 41_000 / 16.0  # verifier checks per CPU second: 41,000 in 15.8 to 16.2 (docs/reliability.md)
RANK = 16
ASSUMED = {
    "prompt": 150,  # tokens
    "mean": 400,  # tokens of a completion
    "sigma": 0.5,  # of their logarithm
    "budget": 1024,
    "teacher": 256,  # tokens of a teacher text
    "texts": 1.5,  # teacher texts for an accepted pair
    "network": 3.1e9,  # bytes a second into and out of the driver (25 Gbit/s)
    "fabric": 25e9,  # bytes a second between replicas, for gradients of a split student
    "tensor_parallel": 0.85,  # of the sum of rates, for each doubling of the GPUs of a replica
    "jitter": 0.03,  # standard deviation of a replica's speed
    "cache_share": 0.7,  # of the memory that weights and adapters leave, for keys and values (sampler.MEMORY_SHARE)
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped heads and gated products."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        linear = self.layers * self.hidden * (2 * q + 2 * kv + 3 * self.inner)
        return linear + (2 * self.layers + 1) * self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of one adapter of that rank on every linear layer but the output."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return rank * self.layers * (4 * self.hidden + 2 * q + 2 * kv + 3 * (self.hidden + self.inner))

    def cache_bytes(self, tokens: float, bytes_each: float) -> float:
        """Keys and values of one row with so many tokens."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * bytes_each


LLAMA = {
    "3B": ModelShape(28, 3072, 8192, 24, 8, 128, 128256, True),
    "8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, False),
    "70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, False),
}


@dataclass(frozen=True)
class Setting:
    """One simulated machine and method. cores: of the driver's verifier; per_node: instead 8 cores beside every GPU.

    split: a student's rows are divided among replicas once every student has one, gradients summed over the fabric.
    """

    model: str = "3B"
    gpus: int = 1
    datasets: int = 4
    repeats: int = 4
    steps: int = 10
    prompts: int = 8
    attempts: int = 32
    questions: int = 64
    reward_questions: int = 64
    cores: int = 16
    per_node: bool = False
    split: bool = False
    seed: int = 0

    @property
    def shape(self) -> ModelShape:
        return LLAMA[self.model]

    @property
    def students(self) -> int:
        return self.datasets * self.repeats


@dataclass
class Result:
    """Seconds of the step, and GPU seconds by what they went to (they add up to gpus * seconds)."""

    setting: Setting
    replica: int
    used: int
    seconds: float
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def useful(self) -> float:
        """Share of all GPU seconds in which a GPU sampled or trained."""
        return sum(self.spent[name] for name in ("sample", "train")) / (self.setting.gpus * self.seconds)

    @property
    def worst(self) -> str:
        """The largest loss."""
        return max((n for n in self.spent if n not in ("sample", "train")), key=lambda n: self.spent[n])


class TooSmall(Exception):
    """The model does not fit so few GPUs."""


def gpus_of_replica(setting: Setting) -> int:
    """Fewest GPUs (a power of two) that hold weights, the adapters of the students there, and 64 rows of the budget."""
    shape, size = setting.shape, 1
    while size <= setting.gpus:
        if free_bytes(setting, size) * ASSUMED["cache_share"] >= 64 * row_bytes(shape, ASSUMED["budget"]):
            return size
        size *= 2
    raise TooSmall(f"{setting.model} on {setting.gpus} GPU: {shape.parameters * 2 / 1e9:.0f} GB of weights alone")


def free_bytes(setting: Setting, size: int) -> float:
    """Bytes that weights and adapters leave in a replica of `size` GPUs."""
    shape = setting.shape
    here = -(-setting.students // max(1, setting.gpus // size)) + 2
    return size * GPU_BYTES - shape.parameters * 2 - here * shape.adapter_parameters(RANK) * TRAINED_BYTES


def row_bytes(shape: ModelShape, new_tokens: float) -> float:
    return shape.cache_bytes(ASSUMED["prompt"] + new_tokens, 2)


def speed(size: int) -> float:
    """Rate of a replica of `size` GPUs, in GPUs."""
    doublings = size.bit_length() - 1
    return size * ASSUMED["tensor_parallel"] ** doublings


def decode_seconds(setting: Setting, size: int, lengths: list[int], policies: int) -> float:
    """Time to draw completions of these lengths: per step the bytes of weights, adapters, cache and logits, or launches.

    Rows that ended cost nothing more; rows that do not fit in the cache wait for the next wave.
    """
    shape, rate = setting.shape, COPY * ROOFLINE * speed(size)
    mean = sum(lengths) / len(lengths)
    capacity = free_bytes(setting, size) * ASSUMED["cache_share"] / row_bytes(shape, mean)
    waves = max(1, -(-len(lengths) // max(1, int(capacity))))
    total = 0.0
    for wave in range(waves):
        rows = lengths[wave::waves]
        steps = max(rows)
        cache = shape.cache_bytes(sum(rows) * ASSUMED["prompt"] + sum(n * n for n in rows) / 2, 2)
        logits = sum(rows) * 3 * 2 * shape.vocabulary
        fixed = steps * 2 * (shape.parameters + policies * shape.adapter_parameters(RANK))
        total += max((cache + logits + fixed) / rate, steps * shape.layers * LAYER_SECONDS)
    return total


def train_seconds(setting: Setting, size: int, tokens: float) -> float:
    """Update on so many tokens of prompts and completions, KL term included, at the FLOP rate of train-3b."""
    known = TABLE[3]
    return tokens * KL_FACTOR / (known.train * known.parameters / setting.shape.parameters * speed(size))


class Simulation:
    """Events in a heap; servers (verifier, driver's link) take jobs in the order of their coming."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.size = setting, gpus_of_replica(setting)
        self.replicas = max(1, setting.gpus // self.size)
        parts = max(1, self.replicas // setting.students) if setting.split else 1
        self.parts = min(parts, setting.attempts)
        self.used = min(self.replicas, setting.students * self.parts)
        self.random = random.Random(setting.seed)
        self.now, self.count = 0.0, 0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.free: dict[str, float] = {}
        self.spent = dict.fromkeys(
            ("sample", "train", "verifier", "traffic", "stragglers", "teacher", "no student"), 0.0
        )
        self.pace = [max(0.8, self.random.gauss(1.0, ASSUMED["jitter"])) for _ in range(self.used)]
        self.back: list[float] = []
        self.arrived: dict[tuple[int, int], list[tuple[int, float]]] = {}
        self.adapter = setting.shape.adapter_parameters(RANK) * 4.0

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now + delay, self.count, action))

    def serve(self, server: str, seconds: float, then: Callable[[float], None]) -> None:
        """Queue at a server; `then` gets the time from now to the end of the job."""
        end = max(self.now, self.free.get(server, 0.0)) + seconds
        self.free[server] = end
        taken = end - self.now
        self.at(taken, lambda: then(taken))

    def lengths(self, rows: int, mean: float, budget: int) -> list[int]:
        sigma = ASSUMED["sigma"]
        scale = mean / 2.718281828 ** (sigma**2 / 2)
        return [max(1, min(budget, int(scale * self.random.lognormvariate(0.0, sigma)))) for _ in range(rows)]

    def run(self) -> Result:
        """One outer step."""
        setting = self.setting
        pairs = setting.datasets * setting.questions
        rows = self.lengths(int(pairs * ASSUMED["texts"]), ASSUMED["teacher"], 512)
        writing = decode_seconds(setting, self.size, rows, 1)
        parsing = len(rows) / (CHECKS * setting.cores)
        self.at(writing + parsing, self._send)
        while self.heap:
            self.now, _, action = heapq.heappop(self.heap)
            action()
        learning = train_seconds(setting, self.size, pairs * (250 + ASSUMED["teacher"]))
        last = self.now
        seconds = last + learning
        self.spent["sample"] += writing * self.size
        self.spent["train"] += learning * self.size
        self.spent["stragglers"] += sum(last - end for end in self.back) * self.size
        serial = (writing + parsing + learning) * setting.gpus - (writing + learning) * self.size
        self.spent["teacher"] += serial
        idle = setting.gpus - self.used * self.size
        self.spent["no student"] += idle * (last - writing - parsing)
        return Result(setting, self.size, self.used, seconds, self.spent)

    def _send(self) -> None:
        """The baseline's adapter to every replica in use."""
        for index in range(self.used):
            self.serve("link", self.adapter / ASSUMED["network"], lambda taken, i=index: self._begin(i, taken))

    def _begin(self, index: int, waited: float) -> None:
        self.spent["traffic"] += waited * self.size
        self._rollout(index, 0)

    def _share(self, index: int) -> int:
        """Students of a replica (whole ones; with `split` one, of which it has a part)."""
        groups = self.used if self.parts == 1 else self.setting.students
        return len(range(index % groups, self.setting.students, groups))

    def _rollout(self, index: int, step: int) -> None:
        """Sample a step's attempts, or after the last step the reward questions."""
        setting, students = self.setting, self._share(index)
        measuring = step == setting.steps
        each = setting.reward_questions if measuring else setting.prompts * setting.attempts
        rows = self.lengths(max(1, students * each // self.parts), ASSUMED["mean"], ASSUMED["budget"])
        seconds = decode_seconds(setting, self.size, rows, students) * self.pace[index]
        self.spent["sample"] += seconds * self.size
        self.at(seconds, lambda: self._verify(index, step, rows))

    def _verify(self, index: int, step: int, rows: list[int]) -> None:
        setting = self.setting
        cores = 8 * self.size if setting.per_node else setting.cores
        server = f"verifier {index}" if setting.per_node else "verifier"
        self.serve(server, len(rows) / (CHECKS * cores), lambda taken: self._update(index, step, rows, taken))

    def _update(self, index: int, step: int, rows: list[int], waited: float) -> None:
        setting = self.setting
        self.spent["verifier"] += waited * self.size
        if step == setting.steps:
            size = self._share(index) * self.adapter / self.parts
            self.serve("link", size / ASSUMED["network"], lambda taken: self._done(taken))
            return
        tokens = sum(rows) + len(rows) * ASSUMED["prompt"]
        seconds = train_seconds(setting, self.size, tokens) * self.pace[index]
        self.spent["train"] += seconds * self.size
        self.at(seconds, lambda: self._reduce(index, step))

    def _reduce(self, index: int, step: int) -> None:
        """The parts of a student wait for each other and add up their gradients; a whole student just goes on."""
        if self.parts == 1:
            self._rollout(index, step + 1)
            return
        students = self.setting.students
        group = self.arrived.setdefault((index % students, step), [])
        group.append((index, self.now))
        if len(group) < len(range(index % students, self.used, students)):
            return
        reduce = 2 * self.adapter / ASSUMED["fabric"]
        for member, came in group:
            self.spent["stragglers"] += (self.now - came) * self.size
            self.spent["traffic"] += reduce * self.size
            self.at(reduce, lambda member=member: self._rollout(member, step + 1))

    def _done(self, waited: float) -> None:
        self.spent["traffic"] += waited * self.size
        self.back.append(self.now)


def simulate(setting: Setting) -> Result:
    """One outer step. Raises TooSmall when the model does not fit."""
    return Simulation(setting).run()


def measured_decode() -> float:
    """Tokens a second that the model of decoding gives for decode-3b: 1,024 rows, 100 + 520 tokens, 16 adapters."""
    before, ASSUMED["prompt"] = ASSUMED["prompt"], 100
    try:
        return 1024 * 520 / decode_seconds(Setting("3B", 1), 1, [520] * 1024, 16)
    finally:
        ASSUMED["prompt"] = before


def line(result: Result, alone: float | None) -> str:
    setting, total = result.setting, result.setting.gpus * result.seconds
    lost = "  ".join(f"{v / total:10.1%}" for k, v in result.spent.items() if k not in ("sample", "train"))
    speedup = f"{alone / result.seconds:8.1f}" if alone else f"{'-':>8s}"
    return (
        f"{setting.model:>4s} {setting.gpus:5d} {result.replica:8d} {result.used:5d} {result.seconds:10.1f} {speedup} "
        f"{result.useful:7.1%}  {lost}  {result.worst}"
    )


HEAD = (
    f"{'':4s} {'GPUs':>5s} {'/replica':>8s} {'used':>5s} {'seconds':>10s} {'speed-up':>8s} {'useful':>7s}  "
    + "  ".join(f"{name:>10s}" for name in ("verifier", "traffic", "stragglers", "teacher", "no student"))
)


def demand(setting: Setting) -> str:
    """Checks and bytes of a step against one verifier core and the driver's link."""
    result = simulate(setting)
    checks = setting.students * (setting.steps * setting.prompts * setting.attempts + setting.reward_questions)
    traffic = (setting.students + result.used) * setting.shape.adapter_parameters(RANK) * 4
    cores = checks / CHECKS / result.seconds
    return (
        f"{setting.model:>4s} {setting.gpus:5d} GPUs: {checks / result.seconds:7,.0f} checks/s = {cores:.3f} verifier cores; "
        f"{traffic / 1e9:5.1f} GB of adapters a step = {traffic / ASSUMED['network'] / result.seconds:.2%} of the link's time"
    )


def table(title: str, change: Callable[[Setting], Setting]) -> None:
    """A table over sizes and GPUs."""
    print(f"\n{title}\n{HEAD}  largest loss")
    for model in LLAMA:
        alone = None
        for gpus in (1, 2, 8, 64):
            try:
                result = simulate(change(Setting(model, gpus)))
            except TooSmall as error:
                print(f"{model:>4s} {gpus:5d}  {error}")
                continue
            alone = alone or result.seconds * result.replica * result.used
            print(line(result, alone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(LLAMA))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--cores", type=int, default=16, help="of the driver's verifier")
    parser.add_argument("--split", action="store_true", help="divide a student's rows among replicas")
    parser.add_argument("--per-node-verifier", action="store_true", help="8 cores beside every GPU")
    parser.add_argument("--datasets", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.model:
        extra = {"split": arguments.split, "per_node": arguments.per_node_verifier, "datasets": arguments.datasets}
        try:
            print(HEAD, "", "largest loss")
            print(line(simulate(Setting(arguments.model, arguments.gpus, cores=arguments.cores, **extra)), None))
        except TooSmall as error:
            parser.exit(1, f"{error}\n")
        return
    known = TABLE[3].decode
    print(f"decode-3b: model {measured_decode():,.0f}, measured {known:,.0f} tokens/s")
    table("As it is: a student stays on one replica, the driver verifies with 16 cores", lambda s: s)
    table("One verifier core for everything", lambda s: replace(s, cores=1))
    table("A student's rows divided among replicas", lambda s: replace(s, split=True))
    table("Four times the datasets (64 students), not divided", lambda s: replace(s, datasets=16))
    print("\nwhat the driver is asked for, rows divided")
    for model in LLAMA:
        for gpus in (8, 64):
            print(demand(Setting(model, gpus, split=True)))


if __name__ == "__main__":
    main()
