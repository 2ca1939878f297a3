"""What the commands share: the arguments that name a recipe, and the config they make."""

from __future__ import annotations

import argparse
import json

from soar.config import Config, load


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
