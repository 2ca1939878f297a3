"""`soar verify`: grade a file of completions, or check that its gold answers can be graded at all."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXAMPLES = """examples:
  soar verify completions.jsonl                          columns completion and gold (or their usual names)
  soar verify completions.jsonl --verifier number --answer-style marker
  soar verify problems.jsonl --golds                     every gold answer against itself; exit code 1 if one fails
  soar verify completions.jsonl --domain my.py:DOMAIN    as the domain reads and checks them
  soar verify completions.jsonl --label-column correct   where the verifier and your own labels differ
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    verify = commands.add_parser(
        "verify",
        help="grade a file of completions against its gold answers",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("file", help="JSONL, JSON, CSV or parquet file")
    verify.add_argument(
        "--verifier", default="math", help="math, number, exact, choice, module:function or file.py:function"
    )
    verify.add_argument("--domain", default="", help="a built-in domain, file.py:NAME or module:NAME, in place of both")
    verify.add_argument("--golds", action="store_true", help="check every gold answer against itself")
    verify.add_argument(
        "--answer-style", choices=("boxed", "marker", "line", "totals"), default="boxed", help="how completions answer"
    )
    verify.add_argument("--completion-column", metavar="NAME")
    verify.add_argument("--gold-column", metavar="NAME")
    verify.add_argument("--label-column", metavar="NAME", help="the file's own verdicts; list where they differ")
    verify.add_argument("--show", type=int, default=10, metavar="N", help="rows listed (default: 10)")
    verify.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds for one check (default: 5)")
    verify.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(action=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from soar.files import visible
    from soar.problems.domain import load_domain
    from soar.problems.grading import DomainPool
    from soar.problems.verify import VerifierPool
    from soar.types import Verdict
    from soar.verify_file import grade_file, table_lines

    asked = {kind: getattr(arguments, f"{kind}_column") for kind in ("completion", "gold", "label")}
    limits = {"timeout_s": arguments.timeout, "workers": max(0, arguments.workers)}
    if arguments.domain:
        opened: VerifierPool = DomainPool(load_domain(arguments.domain), **limits)
    else:
        opened = VerifierPool(arguments.verifier, answer_style=arguments.answer_style, **limits)
    with opened as pool:
        grades = grade_file(arguments.file, pool, asked, arguments.golds, max(0, arguments.show))
        problem = pool.last_error
    if arguments.json:
        print(json.dumps({**grades.as_json(), "last_error": problem}, indent=2))
    else:
        print("\n".join(visible(line) for line in table_lines(grades, arguments.golds)))
        if problem is not None:
            print(visible(f"the last check that failed: {problem}"))
    return 1 if arguments.golds and grades.counts[Verdict.CORRECT] < grades.rows else 0
