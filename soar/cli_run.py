"""`soar run` and `soar world build`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from soar.cli_common import config_of, recipe_arguments, workers_argument, workers_overrides
from soar.config import Config, ConfigError, override
from soar.plan.forecast import Assumptions, assumed, memory_lines, plan_lines, table_forecast
from soar.run.interrupts import StopRequest

EXAMPLES = """examples:
  soar run                                        the embedded world, on two CPU cores
  soar run --out runs/mine --set teacher.steps=40 --set seed=1
  soar run small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --out runs/qwen
  soar run --out runs/mine --resume               continue an interrupted run
  soar run --out runs/mine --max-hours 8          pause in time; --resume continues
  soar run --out runs/mine --workers 2            share the work among two processes (docs/cluster.md)
"""

BUILD_EXAMPLES = """examples:
  soar world build --out worlds/again               the language model of the embedded world, from its recipe
  soar world build --out worlds/short --steps 200   a short one, to try a change
"""


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    run = commands.add_parser(
        "run",
        help="screen, outer loop, arms, evaluation, report",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe_arguments(run)
    run.add_argument("--out", type=Path, default=None, help="run folder (default: runs/<name of the recipe>)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out")
    run.add_argument("--review", action="store_true", help="hold every promotion until it is accepted (soar review)")
    workers_argument(run)
    limits = run.add_argument_group("limits", "the run is saved when it stops; 0: no limit")
    limits.add_argument("--max-hours", type=float, metavar="H", help="pause after so many hours of this process")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="pause after so many sampled tokens in all")
    limits.add_argument("--max-promotions", type=int, metavar="N", help="end the outer loop after so many promotions")
    run.add_argument("--dry-run", action="store_true", help="print config, plan, memory and forecast, run nothing")
    run.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption of the forecast"
    )
    run.add_argument("--quiet", action="store_true", help="print the summary only")
    run.set_defaults(action=_run)


def _run_config(arguments: argparse.Namespace) -> Config:
    """Config of the arguments; --resume without a recipe takes the one that the run was begun with."""
    keys = {"max_hours": "limits", "max_tokens": "limits", "max_promotions": "limits"}
    given = {f"{section}.{key}": getattr(arguments, key) for key, section in keys.items()}
    arguments.overrides += [f"{key}={value}" for key, value in given.items() if value is not None]
    arguments.overrides += workers_overrides(arguments.workers)
    if arguments.review:
        arguments.overrides.append("promotion.review=true")
    if not arguments.resume or arguments.recipe or arguments.model or arguments.problems:
        return config_of(arguments)
    from soar.run.folder import recorded_config

    return override(recorded_config(arguments.out or Path("runs") / config_of(arguments).name), arguments.overrides)


def _run(arguments: argparse.Namespace) -> int:
    config = _run_config(arguments)
    if arguments.dry_run:
        return _dry_run(config, _assumptions(config, arguments.assume))
    from soar.run.pipeline import execute
    from soar.run.progress import Progress

    out = arguments.out or Path("runs") / config.name
    stop = StopRequest()
    with Progress(quiet=arguments.quiet) as progress, stop.on_signals(progress.insist):
        summary = execute(config, out, arguments.resume, arguments.command, progress, stop)
    print("\n".join(summary_lines(summary, columns())))
    print(f"report: {out / 'report.html'}")
    return 0


def _assumptions(config: Config, given: list[str]) -> Assumptions:
    """Those of the config with what --assume replaces."""
    values = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--assume {text}: expected NAME=NUMBER") from error
    return assumed(config).with_values(values, "given")


def _dry_run(config: Config, given: Assumptions) -> int:
    """Print what a run would do and cost."""
    print(json.dumps(config.resolved(), indent=2))
    print("\n".join(plan_lines(config)), flush=True)
    expected = table_forecast(config, given)
    print("\n".join([*memory_lines(config, expected.assumptions), *expected.lines()]))
    return 0


def columns() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def summary_lines(summary: dict[str, Any], width: int | None = None) -> list[str]:
    """The arms of a summary as a small table; the smallest and the largest k alone where `width` has no room for all."""
    ks = sorted({int(k) for arm in summary["arms"].values() for k in arm["pass_at"]})
    if width is not None and 27 + 25 * len(ks) > width:
        ks = sorted({*ks[:1], *ks[-1:]})
    lines = [f"{'arm':14s} {'rollouts':>12s}  " + "  ".join(f"{'pass@' + str(k):>23}" for k in ks)]
    for arm, row in summary["arms"].items():
        cells = []
        for k in ks:
            low, high = row["interval_95"][str(k)]
            cells.append(f"{row['pass_at'][str(k)]:6.4f} [{low:.4f}, {high:.4f}]")
        lines.append(f"{arm:14s} {row['student_rollouts']:12,d}  " + "  ".join(cells))
    for arm, row in summary["arms"].items():
        if row.get("search_rollouts"):
            what = "the student it starts from" if arm == "ps_hard" else "its questions"
            lines.append(f"{arm}: the loop that found {what} took {row['search_rollouts']:,} rollouts more")
    for name, by_k in summary["paired"].items():
        k = min(by_k, key=int)
        low, high = by_k[k]["interval_95"]
        lines.append(f"{name}: pass@{k} difference {by_k[k]['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
    lines.append(f"promotions: {summary['promotions']} in {summary['outer_steps']} outer steps")
    return lines
