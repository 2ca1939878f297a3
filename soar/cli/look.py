"""Commands that look at something: watch, report, doctor, verify."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from soar.cli.common import AsJson, RunFolder
from soar.files import visible


def watch(
    run: RunFolder,
    once: Annotated[bool, Option("--once", help="Show the run as it is now and end.")] = False,
    every: Annotated[float, Option(metavar="SECONDS", help="Look this often.")] = 2.0,
) -> None:
    """A running or finished run, from any terminal.

    examples:
      soar watch runs/mine              a live view until the run is finished or paused
      soar watch runs/mine --once       the view once, for a script or a finished run
      soar watch runs/mine > view.txt   elsewhere than on a terminal: the view now and at the end
    """
    from rich.console import Console

    from soar.report.watch import follow

    class Quiet(Console):
        """Ends without a word when its reader went away."""

        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0)

    try:
        follow(run, Quiet(highlight=False), max(0.1, every), once)
    except KeyboardInterrupt:
        return  # the run goes on; only the looking ends


def report(
    run: RunFolder,
    out: Annotated[Path | None, Option(help="File (default: report.html in the run).")] = None,
    figures: Annotated[Path | None, Option(metavar="FOLDER", help="Write the charts alone, as SVG.")] = None,
) -> None:
    """One HTML page about a run, or its charts as files.

    Several runs of one question are a study: soar study.

    examples:
      soar report runs/mine                                   writes runs/mine/report.html
      soar report runs/mine --figures figures                 every chart as SVG
    """
    if figures is None:
        from soar.report.page import write_report

        print(write_report(run, out))
        return
    from soar.report.page import write_pictures

    print("\n".join(map(str, write_pictures(run, figures))))


def doctor(
    run: Annotated[Path, Argument(metavar="FOLDER", help="Folder of run, screen, student or study.")],
) -> int:
    """Is a folder what its run left: hashes of all files, config, adapters, and the summary recomputed from the events.

    Exit code 0: all is well; 1: something is not.

    examples:
      soar doctor runs/mine             one line a check
      soar doctor studies/finding1      of soar study, with all its runs
    """
    from soar.run.doctor import BLIND, examine

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
    answer_style: Annotated[Literal["boxed", "marker", "line", "totals"], Option(help="How they answer.")] = "boxed",
    completion_column: Annotated[str | None, Option(metavar="NAME")] = None,
    gold_column: Annotated[str | None, Option(metavar="NAME")] = None,
    label_column: Annotated[str | None, Option(metavar="NAME", help="The file's own verdicts.")] = None,
    show: Annotated[int, Option(metavar="N", help="Rows listed.")] = 10,
    timeout: Annotated[float, Option(metavar="S", help="Seconds for one check.")] = 5.0,
    workers: Annotated[int, Option(metavar="N", help="Processes (0: one per core).")] = 0,
    as_json: AsJson = False,
) -> int:
    """Grade a file of completions against its gold answers.

    examples:
      soar verify completions.jsonl                          columns completion and gold (or their usual names)
      soar verify completions.jsonl --verifier number --answer-style marker
      soar verify problems.jsonl --golds                     every gold answer against itself; exit code 1 if one fails
      soar verify completions.jsonl --domain my.py:DOMAIN    as the domain reads and checks them
      soar verify completions.jsonl --label-column correct   where the verifier and your own labels differ
    """
    from soar.cli.grade import grade_file
    from soar.problems.domain import load_domain
    from soar.problems.pool import VerifierPool
    from soar.types import Verdict

    columns = {"completion": completion_column, "gold": gold_column, "label": label_column}
    grader = load_domain(domain) if domain else verifier
    with VerifierPool(grader, answer_style=answer_style, timeout_s=timeout, workers=max(0, workers)) as pool:
        grades = grade_file(file, pool, columns, golds, max(0, show))
        problem = pool.last_error
    if as_json:
        print(json.dumps({**grades.as_json(), "last_error": problem}, indent=2))
    else:
        print("\n".join(map(visible, grades.lines(golds))))
        if problem is not None:
            print(visible(f"the last check that failed: {problem}"))
    return 1 if golds and grades.counts[Verdict.CORRECT] < grades.rows else 0
