"""Files replaced whole: a reader sees the old content or the new, never half of it.

What is written here has reached the disk, not only the system's memory, before the name points at it; so it also
survives a loss of power. `storage_errors` turns what a full or read-only disk says into an error with advice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soar.types import UserError

STORAGE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}
)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StorageError(UserError):
    """A file cannot be written: disk full, read-only, not permitted, or broken. What was there before is intact."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a loss of power. Nothing where the system cannot (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file last through a loss of power. Raises OSError."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Make everything in a folder last through a loss of power."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)
    sync_folder(folder)
    sync_folder(folder.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file whole: the old content stays until the new is on disk. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON document. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by JSON lines; nothing is written for no rows. Raises ValueError for NaN and infinity."""
    if rows:
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_atomic(path, lines.encode("utf-8", "replace"))


@contextmanager
def storage_errors(folder: Path, advice: str) -> Iterator[None]:
    """Within the block, an OSError that the disk is to blame for becomes a StorageError; any other stays as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        where = error.filename or folder
        raise StorageError(f"{where} cannot be written: {error.strerror}. {advice}") from error
