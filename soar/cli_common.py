"""What the commands share: the arguments that name a recipe, and the config they make."""

from __future__ import annotations

import argparse
import json

from soar.config import Config, ConfigError, load


def recipe_arguments(command: argparse.ArgumentParser) -> None:
    """RECIPE, --model, --problems and --set."""
    command.add_argument(
        "recipe", nargs="?", help="a TOML file, a built-in recipe, or a run folder for its config (default: tiny)"
    )
    command.add_argument("--model", help="folder or hub id of a causal language model (model.path)")
    command.add_argument(
        "--problems", help="problem file, dataset id, world:NAME or reasoning_gym:NAME (problems.source)"
    )
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a config key"
    )


def workers_argument(command: argparse.ArgumentParser) -> None:
    """--workers."""
    command.add_argument(
        "--workers",
        metavar="N|ADDRESS",
        help="share the work among N processes here, or those of a Ray cluster (auto, HOST:PORT, ray://HOST:PORT)",
    )


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


def config_of(arguments: argparse.Namespace) -> Config:
    """Config of the arguments that `recipe_arguments` added. Raises ConfigError."""
    overrides = list(arguments.overrides)
    recipe = arguments.recipe
    if arguments.model is not None:
        overrides.insert(0, f"model.path={json.dumps(arguments.model)}")
    if arguments.problems is not None:
        overrides.insert(0, f"problems.source={json.dumps(arguments.problems)}")
    if recipe is None and (arguments.model or arguments.problems):
        recipe = "small-1gpu"
    return load(recipe, overrides)
