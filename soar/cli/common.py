"""What the commands share: the options that name a recipe, the config they make, and a run carried out."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from soar.config import Config, ConfigError, load
from soar.plan.forecast import announce
from soar.report.text import summary_lines
from soar.run.interrupts import StopRequest
from soar.run.progress import Progress

_RECIPE = "A TOML file, a built-in recipe, or a run folder for its config (default: tiny, of soar run: demo)."
_SET = "Override a config key; may be repeated."
_PROBLEMS = "Problem file, dataset id, world:NAME, reasoning_gym:NAME or verifiers:NAME (problems.source)."
_WORKERS = "Share the work among N processes here, or those of a Ray cluster (auto, HOST:PORT, ray://HOST:PORT)."
Recipe = Annotated[str | None, Argument(help=_RECIPE)]
Sets = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help=_SET)]
Model = Annotated[str | None, Option(help="Folder or hub id of a causal language model (model.path).")]
Problems = Annotated[str | None, Option(help=_PROBLEMS)]
Verifier = Annotated[str | None, Option(help="A built-in one, or file.py:function (problems.verifier).")]
Workers = Annotated[str | None, Option(metavar="N|ADDRESS", help=_WORKERS)]
Resume = Annotated[bool, Option("--resume", help="Continue what was begun in --out.")]
Quiet = Annotated[bool, Option("--quiet", help="Print the result only.")]
RunFolder = Annotated[Path, Argument(metavar="RUN", help="Run folder.")]


def overrides(sets: list[str] | None, workers: str | None, **values: Any) -> list[str]:
    """`KEY=VALUE` of every option given (neither None nor False; `section__key` is its key), then those of --set. Raises
    ConfigError for --workers that are neither a number nor an address."""
    if workers is not None and not workers.isdecimal() and workers != "auto" and ":" not in workers:
        forms = "the address of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT"
        more = "how many of them on a cluster says --set cluster.workers=N"
        raise ConfigError(f"--workers {workers!r}: expected a number of processes, or {forms}; {more}")
    if workers is not None:
        values |= {"cluster__workers": int(workers)} if workers.isdecimal() else {"cluster__address": workers}
    given = {key.replace("__", "."): value for key, value in values.items() if value is not None and value is not False}
    return [*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()), *(sets or [])]


def config_of(
    recipe: str | None, model: str | None, problems: str | None, overrides_: list[str], model_named: bool = True
) -> Config:
    """Config of a recipe, by default `small-1gpu` for a model or problems of one's own, else `tiny`. Raises ConfigError."""
    if recipe is None and (model or problems):
        recipe = "small-1gpu"
    return load(recipe, overrides(overrides_, None, model__path=model, problems__source=problems), model_named)


def screening(recipe: str | None) -> str | None:
    """The run folder given as a recipe, when it holds a screening."""
    return recipe if recipe and (Path(recipe) / "hard" / "screen.jsonl").is_file() else None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what is done where that takes longer than a few seconds."""
    with Progress() as progress:
        progress.now(what, tell=False)
        yield


def carry_out(context: Context, config: Config, out: Path, resume: bool, quiet: bool) -> None:
    """Carry a run out in the folder `out` and print its summary. context.obj: the command as it was given."""
    stop = StopRequest()
    with Progress(quiet=quiet) as progress, stop.on_signals(progress.insist):
        announce(progress, config)
        from soar.run.pipeline import execute

        summary = execute(config, out, resume, context.obj, progress, stop)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(summary_lines(summary, width)))
