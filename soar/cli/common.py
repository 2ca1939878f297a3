"""What the commands share: the options that name a recipe, the config they make, and a run carried out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from soar.config import RECIPES, Config, ConfigError, flat, load
from soar.report.text import summary_lines
from soar.run.interrupts import StopRequest


def _recipes(incomplete: str) -> list[str]:
    return [path.stem for path in sorted(RECIPES.glob("*.toml")) if path.stem.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    return [f"{key}=" for key in flat(Config().resolved()) if key.startswith(incomplete)]


Recipe = Annotated[
    str | None,
    Argument(
        help="A TOML file, a built-in recipe, or a run folder for its config (default: tiny).", autocompletion=_recipes
    ),
]
Model = Annotated[str | None, Option(help="Folder or hub id of a causal language model (model.path).")]
Problems = Annotated[
    str | None,
    Option(help="Problem file, dataset id, world:NAME or reasoning_gym:NAME (problems.source)."),
]
Verifier = Annotated[str | None, Option(help="A built-in one, or file.py:function (problems.verifier).")]
Sets = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override a config key; may be repeated.", autocompletion=_keys),
]
Workers = Annotated[
    str | None,
    Option(
        metavar="N|ADDRESS",
        help="Share the work among N processes here, or those of a Ray cluster (auto, HOST:PORT, ray://HOST:PORT).",
    ),
]
Resume = Annotated[bool, Option("--resume", help="Continue what was begun in --out.")]
Quiet = Annotated[bool, Option("--quiet", help="Print the result only.")]
AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]
RunFolder = Annotated[Path, Argument(metavar="RUN", help="Run folder.")]


def workers_overrides(workers: str | None) -> list[str]:
    """The config keys that --workers sets. Raises ConfigError for what is neither a number nor an address."""
    if workers is None:
        return []
    if workers.isdecimal():
        return [f"cluster.workers={workers}"]
    if workers != "auto" and ":" not in workers:
        raise ConfigError(
            f"--workers {workers!r}: expected a number of processes, or the address of a Ray cluster: auto, HOST:PORT or "
            "ray://HOST:PORT; how many of them on a cluster says --set cluster.workers=N"
        )
    return [f"cluster.address={json.dumps(workers)}"]


def config_of(
    recipe: str | None, model: str | None, problems: str | None, overrides: list[str], model_named: bool = True
) -> Config:
    """Config of a recipe, by default `small-1gpu` for a model or problems of one's own, else `tiny`. Raises ConfigError."""
    given = {"model.path": model, "problems.source": problems}
    short = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if recipe is None and (model or problems):
        recipe = "small-1gpu"
    return load(recipe, [*short, *overrides], model_named)


def carry_out(context: Context, config: Config, out: Path, resume: bool, quiet: bool) -> None:
    """Carry a run out in the folder `out` and print its summary. context.obj: the command as it was given."""
    from soar.run.pipeline import execute
    from soar.run.progress import Progress

    stop = StopRequest()
    with Progress(quiet=quiet) as progress, stop.on_signals(progress.insist):
        summary = execute(config, out, resume, context.obj, progress, stop)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(summary_lines(summary, width)))
