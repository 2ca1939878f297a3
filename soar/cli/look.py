"""Commands that look at something: watch, report, doctor, verify."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from typer import Argument, Option

from soar.cli import common
from soar.cli.grade import grade_file
from soar.files import visible
from soar.problems.domain import load_domain
from soar.problems.pool import VerifierPool
from soar.report.page import write_report
from soar.report.watch import follow, web_server
from soar.run.folder import BLIND, examine
from soar.types import Verdict


def watch(
    run: common.RunFolder,
    once: Annotated[bool, Option("--once", help="Show the run as it is now and end.")] = False,
    web: Annotated[bool, Option("--web", help="Serve its page to a browser on this machine.")] = False,
    port: Annotated[int, Option(metavar="N", help="Of --web (0: a free one).")] = 0,
) -> None:
    """A running or finished run, from any terminal: live, or into a file the view now and at the end.

    example:
      soar watch runs/mine --web     the report as it grows; from elsewhere: ssh -L PORT:127.0.0.1:PORT
    """
    with suppress(KeyboardInterrupt):  # the run goes on; only the looking ends
        if web:
            server, address = web_server(run, port)
            print(f"{address}\nCtrl-C ends it; the run goes on", flush=True)
            server.serve_forever()
        follow(run, Console(highlight=False), 2.0, once)


def report(
    run: common.RunFolder,
    out: Annotated[Path | None, Option(help="File (default: report.html in the run).")] = None,
) -> None:
    """One HTML page about a run."""
    with common.waiting(f"drawing the page of {run}"):
        page = write_report(run, out)
    print(page)


def doctor(
    run: Annotated[Path, Argument(metavar="FOLDER", help="Folder of run, screen, student or study.")],
) -> int:
    """Is a folder what its run left: hashes of all files, config, adapters, and the summary recomputed from the events.

    One line a check; exit code 0: all is well; 1: something is not.
    """
    with common.waiting(f"reading every file of {run}"):
        checks = examine(run)
    for what, complaints in checks:
        print(f"{'BAD' if complaints else 'ok '}  {what}", *(f"     {visible(text)}" for text in complaints), sep="\n")
    bad = sum(bool(complaints) for _, complaints in checks)
    print(f"{bad} of {len(checks)} checks found something" if bad else f"all {len(checks)} checks are well")
    print(BLIND)
    return 1 if bad else 0


def verify(
    file: Annotated[str, Argument(help="JSONL, JSON, CSV or parquet file.")],
    verifier: Annotated[str, Option(help="math, number, exact, choice, module:function or file.py:function.")] = "math",
    domain: Annotated[str, Option(help="A built-in domain, file.py:NAME or module:NAME, in place of both.")] = "",
    golds: Annotated[bool, Option("--golds", help="Check every gold answer against itself.")] = False,
    answer_style: Annotated[Literal["boxed", "marker"], Option(help="How they answer.")] = "boxed",
    completion_column: Annotated[str | None, Option(metavar="NAME")] = None,
    gold_column: Annotated[str | None, Option(metavar="NAME")] = None,
    label_column: Annotated[str | None, Option(metavar="NAME", help="The file's own verdicts.")] = None,
    show: Annotated[int, Option(metavar="N", help="Rows listed.")] = 10,
    timeout: Annotated[float, Option(metavar="S", help="Seconds for one check.")] = 5.0,
    workers: Annotated[int, Option(metavar="N", help="Processes (0: one per core).")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Grade a file of completions against its gold answers.

    examples:
      soar verify completions.jsonl                          columns completion and gold (or their usual names)
      soar verify problems.jsonl --golds                     every gold answer against itself; exit code 1 if one fails
      soar verify completions.jsonl --label-column correct   where the verifier and your own labels differ
      soar verify completions.jsonl --domain my.py:DOMAIN    as the domain reads and checks them
    """
    columns = {"completion": completion_column, "gold": gold_column, "label": label_column}
    grader = load_domain(domain) if domain else verifier
    pool = VerifierPool(grader, answer_style=answer_style, timeout_s=timeout, workers=max(0, workers))
    with common.waiting(f"grading {file}"), pool:
        grades = grade_file(file, pool, columns, golds, max(0, show))
        problem = pool.last_error
    if as_json:
        counts = {verdict.value: grades.counts[verdict] for verdict in Verdict}
        shares = {name: count / grades.rows for name, count in counts.items()}
        more = {"rows": grades.rows, "counts": counts, "shares": shares, "last_error": problem}
        print(json.dumps({**vars(grades), **more}, indent=2))
    else:
        print("\n".join(map(visible, grades.lines(golds))))
        if problem is not None:
            print(visible(f"the last check that failed: {problem}"))
    return 1 if golds and grades.counts[Verdict.CORRECT] < grades.rows else 0
