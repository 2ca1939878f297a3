"""Files replaced whole: a reader sees the old content or the new, never half of it.

What is written here has reached the disk, not only the system's memory, before the name points at it; so it also
survives a loss of power. `storage_errors` turns what a full or read-only disk says into an error with advice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soar.types import UserError

STORAGE_ERRNOS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
        errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EMFILE, errno.ENFILE,
    }
)  # fmt: skip
"""What a disk, or what lies on it under a name that is wanted, can say."""
IN_THE_WAY = frozenset({errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP})


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_start(path: Path, size: int) -> str:
    """sha256 of the first `size` bytes of a file."""
    digest, left = hashlib.sha256(), size
    with open(path, "rb") as file:
        while left and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def odd_kind(path: Path) -> str | None:
    """What lies under the name of a file and is none; None for a file, a link to one, and for nothing at all."""
    if path.is_file() or not os.path.lexists(path):
        return None
    if path.is_dir():
        return "a folder"
    return "a link that leads nowhere" if path.is_symlink() and not path.exists() else "a pipe or a device"


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
    write_atomic(path, encoded(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"))


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8; a file name that is not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encoded(document: str) -> bytes:
    """JSON text as UTF-8; a lone surrogate, as a file name that is not UTF-8 holds, is written as its JSON escape."""
    return document.encode("utf-8", "backslashreplace")


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by JSON lines; nothing is written for no rows. Raises ValueError for NaN and infinity."""
    if rows:
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_atomic(path, encoded(lines))


@contextmanager
def tensor_errors(path: Path) -> Iterator[None]:
    """Within the block, what safetensors says of a disk that refuses to write becomes the OSError that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        code = re.search(r"code: (\d+)|os error (\d+)", str(error))
        number = int(code[1] or code[2]) if code else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def storage_errors(folder: Path, advice: str) -> Iterator[None]:
    """Within the block, an OSError that the disk is to blame for becomes a StorageError; any other stays as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        where = error.filename2 or error.filename or folder
        if error.errno in IN_THE_WAY:
            advice = "Something else lies under that name: move it away, then continue with --resume"
        raise StorageError(f"{where} cannot be written: {error.strerror}. {advice}") from error
