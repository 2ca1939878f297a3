"""Completion scripts for bash, zsh and fish, made from the parser itself, so that they know every command and option.

One static script a shell: nothing of soar runs while the user types. Left out: values of config keys after `--set`; the
keys themselves are completed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from soar.config import RECIPES
from soar.reference import parts


@dataclass(frozen=True)
class Command:
    """One command: the words that lead to it, its options with their choices, its commands, its arguments' choices."""

    path: tuple[str, ...]
    help: str
    options: dict[str, list[str] | None]
    inner: list[str]
    words: list[str]


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = (), about: str = "") -> Iterator[Command]:
    """Every command of a parser, the parser itself first. An option maps to its choices; [] takes any value, None none."""
    options: dict[str, list[str] | None] = {}
    inner: dict[str, tuple[argparse.ArgumentParser, str]] = {}
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            inner = {name: (sub, helps.get(name, "")) for name, sub in action.choices.items()}
        elif action.option_strings:
            takes: list[str] | None = [] if action.nargs != 0 else None
            choices = [str(choice) for choice in action.choices] if action.choices else takes
            options |= dict.fromkeys(action.option_strings, choices)
        elif action.choices:
            words += [str(choice) for choice in action.choices]
        elif action.dest == "recipe":
            words += sorted(recipe.stem for recipe in RECIPES.glob("*.toml"))
    if "--set" in options:
        options["--set"] = [f"{key.path}=" for part in parts() for key in part.keys]
    yield Command(path, about, options, list(inner), words)
    for name, (sub, text) in inner.items():
        yield from commands(sub, (*path, name), text)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a shell: bash, zsh or fish."""
    found = list(commands(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](found)


def _bash(found: list[Command]) -> str:
    return _posix(found) + "complete -o bashdefault -o default -o nospace -F _soar soar\n"


def _zsh(found: list[Command]) -> str:
    head = "#compdef soar\nautoload -U +X bashcompinit && bashcompinit\n"
    return head + _posix(found) + "complete -o default -o nospace -F _soar soar\n"


def _posix(found: list[Command]) -> str:
    """A bash function that walks to the command and offers its words, its options, or the choices of the last option."""
    lines = ["_soar() {", '  local word="${COMP_WORDS[COMP_CWORD]}" last="${COMP_WORDS[COMP_CWORD-1]}" place="" i w=""']
    lines.append("  COMPREPLY=()")
    lines.append("  for ((i = 1; i < COMP_CWORD; i++)); do")
    lines.append('    case "$place ${COMP_WORDS[i]}" in')
    for command in found[1:]:
        before, name = " ".join(command.path[:-1]), command.path[-1]
        lines.append(f"      {shlex.quote(f'{before} {name}')}) place={shlex.quote(' '.join(command.path))} ;;")
    lines += ["    esac", "  done", '  case "$place" in']
    for command in found:
        choices = {o: c for o, c in command.options.items() if c is not None}
        lines.append(f"    {shlex.quote(' '.join(command.path))})")
        lines.append('      case "$last" in')
        for option, values in choices.items():
            lines.append(f"        {option}) w={shlex.quote(' '.join(values))} ;;")
        words = [*command.inner, *command.words, *command.options]
        lines.append(f"        *) w={shlex.quote(' '.join(words))} ;;")
        lines += ["      esac", "      ;;"]
    lines += ["  esac", '  COMPREPLY=($(compgen -W "$w" -- "$word"))']
    lines.append('  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} != *= ]]; then COMPREPLY[0]+=" "; fi')
    return "\n".join([*lines, "}", ""])


def _fish(found: list[Command]) -> str:
    lines = ["complete -c soar -f -n __fish_use_subcommand"]
    for command in found:
        if not command.path:
            continue
        parent, name = command.path[:-1], command.path[-1]
        where = f"__fish_seen_subcommand_from {parent[-1]}" if parent else "__fish_use_subcommand"
        lines.append(f"complete -c soar -n {shlex.quote(where)} -a {name} -d {shlex.quote(command.help)}")
        inside = shlex.quote(f"__fish_seen_subcommand_from {name}")
        for word in command.words:
            lines.append(f"complete -c soar -n {inside} -a {shlex.quote(word)}")
        for option, values in command.options.items():
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            value = "" if values is None else f" -x -a {shlex.quote(' '.join(values))}" if values else " -r"
            lines.append(f"complete -c soar -n {inside} {flag}{value}")
    return "\n".join([*lines, ""])
