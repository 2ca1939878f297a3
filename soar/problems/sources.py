"""Rows of a problem file, folder or dataset, streamed, each with its place. Nothing is unpickled or run."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from soar.types import UserError

MAX_FIELD = 10_000_000
COMMIT = re.compile(r"[0-9a-f]{40}")
PREFIX = "verifiers:"


class DataError(UserError, ValueError):
    """Problems that cannot be used; the message says where, what was found, what was expected, and what to do."""


@dataclass(frozen=True)
class Row:
    """One row of a source. where: `file:line`. fields: its columns. error: why it is no row (then fields is empty)."""

    where: str
    fields: dict[str, Any]
    error: str | None = None


def split_source(source: str) -> tuple[str, str]:
    """(`world` | `reasoning_gym` | `file` | `hub`, name); a path that exists or ends like a data file is a file.

    Raises DataError for an empty source and for an unknown prefix."""
    prefix, colon, name = source.partition(":")
    if colon and prefix in ("world", "reasoning_gym", "verifiers", "hub") and name:
        return prefix, name
    path = Path(source)
    if source.strip() and (path.exists() or path.suffix.lower() in READERS or source.startswith((".", "/", "~"))):
        return "file", source
    if source.count("/") == 1 and (not colon or "/" in prefix):
        return "hub", source
    raise DataError(
        f"problems.source = {source!r}: no such file, and not a dataset id of the form owner/name; expected a file "
        f"({', '.join(READERS)}), a folder of them, owner/name, hub:ID, world:NAME, reasoning_gym:NAME or verifiers:NAME"
    )


def file_rows(source: str) -> Iterator[Row]:
    """Rows of a local file, by its ending, or of all such files in a folder. Raises DataError for what cannot be read."""
    path = Path(source).expanduser()
    inside = (
        sorted(file for file in path.rglob("*") if not file.name.endswith(".evidence.json"))
        if path.is_dir()
        else [path]
    )
    files = [file for file in inside if file.suffix.lower() in READERS]
    if not files:
        kind = (
            "a folder without files that end in"
            if path.is_dir()
            else f"unknown ending {path.suffix!r}; expected one of"
        )
        raise DataError(f"{path}: {kind} {', '.join(READERS)}")
    try:
        with files[0].open("rb") as stream:
            if not stream.read(1):
                raise DataError(f"{files[0]}: the file is empty")
    except OSError as error:
        reason = f"no such file (from {Path.cwd()})" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{path}: cannot be read: {reason}") from error
    return chain.from_iterable(READERS[file.suffix.lower()](file) for file in files)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends. Raises DataError naming the line of what is no such text."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte 0x{raw[error.start]:02x} is not UTF-8 (is the file Latin-1, Windows-1252 or "
                    "UTF-16?); convert it, for example with iconv -f LATIN1 -t UTF-8"
                ) from error
            if number == 1 and "\0" in text[:2]:
                raise DataError(f"{path}:{number}: a zero byte: the file is binary or UTF-16; convert it")
            yield text


def _row(where: str, fields: Any) -> Row:
    wrong = f"a {type(fields).__name__}, expected an object with question and answer"
    return Row(where, fields) if isinstance(fields, dict) else Row(where, {}, wrong)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, text in enumerate(_lines(path), start=1):
        if text.strip():
            try:
                row = _row(f"{path}:{number}", json.loads(text))
            except (ValueError, RecursionError) as error:
                row = Row(f"{path}:{number}", {}, f"not JSON ({error})")
            yield row


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of objects, an object with one such list in it, or one problem."""
    text = "".join(_lines(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); a file with one object a line must end in .jsonl") from error
    if isinstance(content, dict):
        (only, *others) = content.values() or [None]
        content = only if not others and isinstance(only, list) and only and isinstance(only[0], dict) else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: a JSON {type(content).__name__}, expected a list of objects")
    for number, item in enumerate(content, start=1):
        yield _row(f"{path}:row {number}", item)


def _csv_rows(path: Path) -> Iterator[Row]:
    """The delimiter is the one of comma, semicolon and tab that the header has most of."""
    csv.field_size_limit(MAX_FIELD)
    lines = _lines(path)
    header = next(lines, "")
    reader = csv.DictReader(chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    start = 2
    try:
        for fields in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if None in fields or None in fields.values():
                columns = len(reader.fieldnames or [])
                yield Row(where, {}, f"another number of fields than the {columns} of the header (unquoted comma?)")
            else:
                yield Row(where, dict(fields))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'soar-rl[parquet]'") from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for number, fields in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
            yield Row(f"{path}:row {number}", fields)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error


READERS = {
    ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}  # fmt: skip


def hub_rows(name: str, split: str, revision: str | None) -> tuple[Iterator[Row], str]:
    """Rows of a Hugging Face dataset (`owner/name` or `owner/name:config`), and their commit.

    Where the hub does not answer, the copy in the cache of `datasets` serves. Dataset scripts are not run. Raises DataError
    with the hub's reason.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"problems.source = {name!r} needs `datasets`: pip install 'soar-rl[hub]'") from error
    identifier, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(identifier, config or None, split=split, revision=revision)
    except Exception as error:  # the errors of the hub's HTTP client have no root of their own
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise DataError(
            f"problems.source = {name!r}, split {split!r}, revision {revision or 'main'!r}: {type(error).__name__}: {reason}"
            ". Check the id, your access and the network, or download the file and name it"
        ) from error
    commit = Path(table.cache_files[0]["filename"]).parent.name
    if revision and COMMIT.fullmatch(revision) and commit != revision:
        raise DataError(
            f"problems.source = {name!r}: the cache has commit {commit}, not {revision}; connect, or change the key"
        )
    return (Row(f"{name}[{split}]:row {number}", dict(row)) for number, row in enumerate(table, start=1)), commit


def gym_rows(name: str, count: int, seed: int, options: dict[str, Any]) -> Iterator[Row]:
    """`count` (0: 1,000) generated rows of a reasoning-gym family, with its metadata. options: its settings.

    Columns: question, answer, family, metadata (JSON, for the family's own scorer). Raises DataError.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f"reasoning_gym:{name}: {error} (pip install 'soar-rl[procedural]')") from error
    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(name, DATASETS, n=3))
        raise DataError(f"problems.source = 'reasoning_gym:{name}': no such family; the nearest: {near or 'none'}")
    try:
        tasks = reasoning_gym.create_dataset(name, size=count or 1000, seed=seed, **options)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        settings = ", ".join(sorted(set(DATASETS[name][1].__dataclass_fields__) - {"size", "seed"}))
        raise DataError(f"problems.options = {options}: {error}; {name} knows {settings or 'none'}") from error
    for number, task in enumerate(tasks, start=1):
        metadata = json.dumps(task.get("metadata", {}), default=str)
        fields = {"question": task["question"], "answer": task["answer"], "family": name, "metadata": metadata}
        yield Row(f"reasoning_gym:{name}:row {number}", fields)
