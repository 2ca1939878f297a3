"""`soar eval`: measure adapters on any problem file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from soar.cli_common import config_of, recipe_arguments, workers_argument, workers_overrides
from soar.config import Config, ConfigError

EXAMPLES = """examples:
  soar eval --adapter runs/demo/student --problems runs/demo/hard/test.jsonl --out eval.json
  soar eval --adapter runs/a/student runs/a/arms/pq --problems olympiad.jsonl --set evaluate.attempts=64
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    evaluate = commands.add_parser(
        "eval",
        help="pass@k of adapters on a problem file (transfer)",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe_arguments(evaluate)
    evaluate.add_argument(
        "--adapter", type=Path, nargs="+", default=[], help="adapter folders; without any, the base model alone"
    )
    workers_argument(evaluate)
    evaluate.add_argument("--out", type=Path, help="JSON file for the result")
    evaluate.add_argument("--quiet", action="store_true", help="print the result only")
    evaluate.set_defaults(action=_evaluate)


def evaluation_config(arguments: argparse.Namespace) -> Config:
    """Config of the measurement: that of the run which the first adapter lies in, unless a recipe is named.

    The run's problem columns and limit are about its own problems, so they are not used. Raises ConfigError.
    """
    if arguments.problems is None:
        raise ConfigError("--problems: expected the problem file to measure on, for example RUN/hard/test.jsonl")
    for folder in arguments.adapter:
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"--adapter {folder}: no adapter there (adapter_config.json), for example RUN/student")
    if arguments.recipe is None and arguments.adapter:
        around = [place for place in arguments.adapter[0].resolve().parents[:2] if (place / "manifest.json").is_file()]
        if around:
            arguments.recipe = str(around[0])
    own = [text for text in arguments.overrides if text.startswith("problems.")]
    config = config_of(arguments)
    unset: dict[str, Any] = {"question_column": None, "answer_column": None, "limit": 0}
    kept = {key: value for key, value in unset.items() if not any(o.startswith(f"problems.{key}") for o in own)}
    return config.model_copy(update={"problems": config.problems.model_copy(update=kept)})


def _evaluate(arguments: argparse.Namespace) -> int:
    arguments.overrides += workers_overrides(arguments.workers)
    config = evaluation_config(arguments)
    from soar.files import write_json
    from soar.run.measure import measure
    from soar.run.progress import Progress

    adapters = {str(folder): folder for folder in arguments.adapter}
    with Progress(quiet=arguments.quiet) as progress, progress.task("evaluation", 1) as task:
        found = measure(config, adapters, progress.say, task.set)
    print("\n".join(result_lines(found, config.evaluate.ks)))
    if arguments.out is not None:
        write_json(arguments.out, found)
        print(f"result: {arguments.out}")
    return 0


def result_lines(found: dict[str, Any], ks: tuple[int, ...]) -> list[str]:
    """pass@k of every policy as a small table; differences from the base model below."""
    width = max(len(name) for name in found["policies"])
    lines = [f"{found['problems']['count']} problems, {found['attempts']} attempts each"]
    lines.append(f"{'policy':{width}s}  " + "  ".join(f"{'pass@' + str(k):>23}" for k in ks))
    for name, row in found["policies"].items():
        cells = []
        for k in map(str, ks):
            low, high = row["interval_95"][k]
            cells.append(f"{row['pass_at'][k]:6.4f} [{low:.4f}, {high:.4f}]")
        lines.append(f"{name:{width}s}  " + "  ".join(cells))
    for name, by_k in found["paired"].items():
        gap = by_k[str(ks[0])]
        low, high = gap["interval_95"]
        lines.append(f"{name}: pass@{ks[0]} difference {gap['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
    return lines
