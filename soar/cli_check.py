"""`soar check`: can this run work? Says so in under a minute, and trains nothing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

from soar.cli_common import config_of, recipe_arguments
from soar.config import Config
from soar.plan.preflight import Finding, Status, can_work, check_domain, check_golds, check_problems, summary

EXAMPLES = """examples:
  soar check small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl
  soar check --problems hard.jsonl --no-model            the problems only; needs no torch
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    check = commands.add_parser(
        "check",
        help="say whether a run can work, without training",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe_arguments(check)
    check.add_argument("--no-model", action="store_true", help="check the problems only")
    check.add_argument("--samples", type=int, default=64, metavar="N", help="teacher samples (default: 64)")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(action=_check)


def _check(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    findings = []
    for finding in _findings(config, arguments):
        findings.append(finding)
        if not arguments.json:
            print("\n".join(finding.lines()), flush=True)
    works = can_work(findings)
    if arguments.json:
        print(json.dumps({"works": works, "findings": [finding.as_json() for finding in findings]}, indent=2))
    else:
        print(summary(findings))
    return 0 if works else 1


def _findings(config: Config, arguments: argparse.Namespace) -> Iterator[Finding]:
    found, problems = check_problems(config)
    yield found
    about = check_domain(config)
    yield from about
    if problems and can_work(about):
        yield check_golds(config, problems)
    if arguments.no_model:
        return
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding(
            "model",
            Status.WARNING,
            f"not checked: {', '.join(missing)} not installed",
            "pip install 'soar-rl[train]', or give --no-model",
        )
        return
    from soar.plan.preflight import check_model

    yield from check_model(config, problems, max(1, arguments.samples), lambda line: print(line, file=sys.stderr))
