"""`soar config-reference` and `soar completion`: what the documentation and the shell need to know."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  soar completion bash > ~/.local/share/bash-completion/completions/soar
  soar completion zsh > ~/.zfunc/_soar            with fpath+=(~/.zfunc) before compinit
  soar completion fish > ~/.config/fish/completions/soar.fish
"""


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    reference = commands.add_parser("config-reference", help="every config key, as Markdown")
    reference.add_argument("--out", type=Path, default=None, help="write it to a file (default: print it)")
    reference.set_defaults(action=_reference)
    completion = commands.add_parser(
        "completion",
        help="completion script for a shell",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(action=_completion)


def _reference(arguments: argparse.Namespace) -> int:
    from soar.files import write_atomic
    from soar.reference import markdown

    if arguments.out is None:
        print(markdown(), end="")
    else:
        write_atomic(arguments.out, markdown().encode())
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    from soar.completion import script

    print(script(arguments.root, arguments.shell), end="")
    return 0
