"""Files replaced whole, JSON read with notes on what is wrong with it, and texts made safe to write and to show.

A reader sees the old content of a file or the new, never half of it, also after a loss of power. `scrub` takes secrets out,
but for those in problem files and in a model's text, which are data.
"""

import errno
import hashlib
import json
import math
import os
import re
import shlex
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from soar.types import Interrupted, parse_json

T = TypeVar("T")

Row = dict[str, Any]


def asset(name: str) -> Row:
    """What `assets/NAME.toml` holds."""
    return tomllib.loads((Path(__file__).parent / "assets" / f"{name}.toml").read_text(encoding="utf-8"))


MAX_NOTES_PER_FILE = 3
HIDDEN = "[hidden]"
SHORTEST = 8  # a shorter value could be an ordinary word, and hiding it would garble what is shown
SECRETS = asset("secrets")
NAMES, FORMS = re.compile("|".join(SECRETS["names"]), re.IGNORECASE), re.compile("|".join(SECRETS["forms"]))
LEADS = [re.compile(lead) for lead in SECRETS["leads"]]


def scrub(value: T, environment: Mapping[str, str] = os.environ) -> T:
    """The value with every secret in its texts, at any depth, as `[hidden]`: by the name of its variable or by its form."""
    secrets = {text for name, text in environment.items() if NAMES.search(name) and len(text) >= SHORTEST}

    def scrubbed(leaf: Any) -> Any:
        if not isinstance(leaf, str):
            return leaf
        for secret in sorted(secrets, key=len, reverse=True):
            leaf = leaf.replace(secret, HIDDEN)
        for lead in LEADS:
            leaf = lead.sub(rf"\1{HIDDEN}", leaf)
        return FORMS.sub(HIDDEN, leaf)

    return _each_leaf(value, scrubbed)


def _each_leaf(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with everything in it changed that is no list, tuple or dict; a tuple becomes a list."""
    if isinstance(value, dict):
        return {key: _each_leaf(item, change) for key, item in value.items()}
    return [_each_leaf(item, change) for item in value] if isinstance(value, list | tuple) else change(value)


IN_THE_WAY = frozenset({errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP})
STORAGE_ERRNOS = IN_THE_WAY | {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
    errno.EMFILE, errno.ENFILE,
}  # fmt: skip
"""What a disk, or what lies on it under a name that is wanted, can say."""


@contextmanager
def storage_errors(folder: Path, advice: str) -> Iterator[None]:
    """Within the block, an OSError that the disk is to blame for becomes an Interrupted; what was there before is intact."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        where = error.filename2 or error.filename or folder
        if error.errno in IN_THE_WAY:
            advice = f"Something else lies under that name: move it away. {advice}"
        raise Interrupted(f"{where} cannot be written: {error.strerror}. {advice}") from error


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON value, written with sorted keys and without spaces."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def no_file(path: Path) -> str | None:
    """Why there is no file under a name, in words; None when there is one."""
    if path.is_file():
        return None
    return "no file but a folder, a pipe or a broken link" if os.path.lexists(path) else "missing"


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, last through a loss of power. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


DEVICES = (Path("/dev"), Path("/dev/fd"))  # --out /dev/stdout, --out >(jq): root could replace even a device


def check_place(path: Path) -> None:
    """Raises Interrupted where `write_atomic` could not write a file: before long work, not after it."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is there")
        if path.parent not in DEVICES:
            (probe := folder / f".{path.name}.{os.getpid()}.tmp").touch()
            probe.unlink()
    except OSError as error:
        raise Interrupted(f"{path} cannot be written: {error.strerror}; choose another place") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file whole: the old content stays until the new is on disk. Raises OSError."""
    if path.parent in DEVICES:
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process, or a link that somebody laid there
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A line of JSON as UTF-8, a lone surrogate (of a file name) as its escape. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON document. Raises ValueError for NaN and infinity."""
    write_atomic(path, json_bytes(value, indent=2))


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None: JSON has neither."""
    return _each_leaf(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def read_object(path: Path) -> tuple[Row, list[str]]:
    """The JSON object in a file, and notes on what is wrong with it. A missing file is an empty object."""
    if (why := no_file(path)) is not None:
        return {}, [f"{path.name} is {why}"]
    try:
        return parse_json(path.read_text(encoding="utf-8", errors="surrogateescape"), dict), []
    except (OSError, ValueError) as error:
        return {}, [f"{path.name} cannot be read: {error}"]


def read_jsonl(path: Path, name: str | None = None) -> tuple[list[Row], list[str]]:
    """The JSON objects of a file, one a line, and notes on lines left out; the last is half there while a run is writing."""
    name = name or path.name
    if (why := no_file(path)) is not None:
        return [], [f"{name} is {why}"]
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        return [], [f"{name} cannot be read: {error}"]
    rows, notes = list[Row](), list[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line.decode("utf-8", errors="surrogateescape"), dict))
        except ValueError as error:
            half = number == len(lines) and isinstance(error, json.JSONDecodeError)
            fault = "the last line is not complete" if half else f"no JSON: {error}"
            notes.append(f"{name}:{number}: {fault}")
    if len(notes) > MAX_NOTES_PER_FILE:
        notes = [*notes[:MAX_NOTES_PER_FILE], f"{name}: {len(notes) - MAX_NOTES_PER_FILE} more lines were left out"]
    return rows, notes


def clipped(text: str, head: int, tail: int) -> str:
    """The first `head` and the last `tail` characters of a text, and between them how many were left out."""
    left_out = len(text) - head - tail
    return text if left_out <= 0 else f"{text[:head]} [... {left_out:,} characters ...] {text[len(text) - tail :]}"


SHOWN = {"\n", "\t", "\u200c", "\u200d"}  # the joiners are needed by Persian and by emoji, and harmless


def shell_words(*words: object) -> str:
    """Words of a command for a shell (bash, zsh), on one line whatever is in them."""
    return shlex.join(map(str, words)).replace("\n", "'$'\\n''")  # where it stands in quotes


def visible(text: str) -> str:
    """`text` with what could hide or reorder it as code points in U+27E8 and U+27E9: `U+202E`. Line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    hidden = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
    return "".join(
        f"\u27e8U+{ord(c):04X}\u27e9" if c not in SHOWN and unicodedata.category(c) in hidden else c for c in text
    )
