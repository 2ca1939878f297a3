"""The table of docs/sizes.md: memory and time by model size, by the forecast that `soar run RECIPE --dry-run` prints.

    python benchmarks/sizes.py

128 screened problems, all arms with 32 million generated tokens each, and ASSUMED in place of what the command
assumes. The rates are measured ones (`soar.plan.forecast.TABLE`).
"""

from soar.config import load
from soar.engine.memory import GIB
from soar.plan.forecast import forecast
from soar.run.sizes import size_of

CELL, TOKENS = 8e6, 32e6
SETS = ["screen.attempts=0", f"arms.tokens={TOKENS:.0f}"]
ASSUMED = {"candidates": 128, "teacher_tokens": 200, "question_tokens": 300, "hard_tokens": 500}
MODELS = {  # recipe -> model, values that the cache keeps of a token (layers x key-value heads x head size x 2)
    "qwen-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", 6_144),
    "maths-qwen": ("Qwen/Qwen2.5-1.5B-Instruct", 14_336),
    "qwen-3b": ("Qwen/Qwen2.5-3B-Instruct", 18_432),
    "qwen-7b": ("Qwen/Qwen2.5-7B-Instruct", 28_672),
}


def table() -> list[str]:
    """Lines of the table."""
    lines = [
        "| recipe, model | weights, cache of a step's rows | 8 M tokens of one arm | one outer step | all arms |",
        "|---|---|---|---|---|",
    ]
    for recipe, (model, values) in MODELS.items():
        config = load(recipe, [f"model.path={model}", "problems.source=someone/problems", *SETS])
        expected, size, student = forecast(config, ASSUMED), size_of(config.model), config.student
        assert expected.rates is not None and size is not None
        rows = config.teacher.datasets * student.repeats * student.prompts_per_step * student.attempts
        cache = 2 * values * rows * (student.sampling.max_tokens + 150) / GIB
        minutes = {work.name: expected.rates.seconds(work) / 60 for work in expected.works}
        search = [work for work in expected.works if work.stage == "loop"]
        step = sum(map(expected.rates.seconds, search)) / 60 / config.teacher.steps
        tokens = sum(work.sampled for work in search) / config.teacher.steps / 1e6
        lines.append(
            f"| `{recipe}`, {model.removeprefix('Qwen/')} | {2 * size.parameters / GIB:.1f} + {cache:.0f} GiB "
            f"| {minutes['hard_only'] * CELL / TOKENS:.1f} min | {step:.1f} min, {tokens:.2f} M tokens "
            f"| {expected.hours():.2f} device-hours |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
