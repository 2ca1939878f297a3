"""Programs that try to leave the sandbox, to pass without solving the task, or to stop the run; they stand in `attacks.txt`.

Each is handed in as a solution of one task, `answer(x)` = x squared, whose tests it is not told; those with `a bit` in their
name leave one for the next program. A program that gets what it wants from the system says so with the value `"escaped"`;
it may lie, it must not be right. `{port}`, `{secret!r}` and the like are things outside that the test watches. A program
marked `inside` is the body of the function.
"""

import platform
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

SQUARES = "assert answer(3) == 9\nassert answer(4) == 16\nassert answer(12) == 144"

NUMBERS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).get(platform.machine(), {})
"""System calls that have no function in Python's library."""
SYSCALL = (Path(__file__).parent / "cases" / "syscall.txt").read_text()
HEADING = re.compile(r"^=== (\w+)( \(inside(, with system calls)?\))?: (.+)\n", re.MULTILINE)


class Attack(NamedTuple):
    """name: what is tried. group: escape, forge or exhaust. source: the program."""

    name: str
    group: str
    source: str


def body(lines: str, before: str = "") -> str:
    """A program whose function runs `lines`, and returns the name of what stopped it."""
    inside = "\n".join("        " + line for line in lines.strip().split("\n"))
    return (
        f"{before}\ndef answer(x):\n    try:\n{inside}\n"
        "    except Exception as error:\n        return type(error).__name__ + ': ' + str(error)[:200]\n"
    )


def read_attacks() -> list[Attack]:
    """Those of attacks.txt, in order."""
    text = (Path(__file__).parent / "attacks.txt").read_text(encoding="utf-8")
    marks = list(HEADING.finditer(text))
    attacks = []
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)], strict=True):
        source = text[mark.end() : end].strip("\n") + "\n"
        attacks.append(Attack(mark[4], mark[1], body(source, SYSCALL if mark[3] else "") if mark[2] else source))
    return attacks


ARGUMENTS = {"clone": "17, 0, 0, 0, 0", "personality": "0xffffffff", "memfd_create": "b'x', 0"}
CALLS = {name: f"return call({number}, {ARGUMENTS.get(name, '0, 0, 0, 0, 0')})" for name, number in NUMBERS.items()}
ATTACKS = [
    *read_attacks(),
    *(Attack(f"system call {name}", "escape", body(line, SYSCALL)) for name, line in CALLS.items()),
    Attack("source nested too deeply", "exhaust", "a = " + "(" * 5000 + ")" * 5000 + "\n"),
    Attack("long chain of operators", "exhaust", "a = " + "+".join(["1"] * 20000) + "\n"),
]
if platform.machine() != "x86_64":
    ATTACKS = [attack for attack in ATTACKS if "32-bit" not in attack.name and "x32" not in attack.name]


def fill(source: str, outside: dict[str, object]) -> str:
    """A program with the things outside that it is after."""
    for name, value in outside.items():
        source = source.replace("{" + name + "}", str(value)).replace("{" + name + "!r}", repr(value))
    return source
