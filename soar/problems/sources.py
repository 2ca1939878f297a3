"""Rows of a problem file or dataset, one at a time, each with its place. Nothing is unpickled or run.

JSONL, CSV and parquet are streamed. `data.py` turns rows into problems.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar.types import UserError

FILE_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
GENERATED = "world:NAME or reasoning_gym:NAME"
MAX_FIELD = 10_000_000
COMMIT = re.compile(r"[0-9a-f]{40}")


class DataError(UserError, ValueError):
    """Problems that cannot be used; the message says where, what was found, what was expected, and what to do."""


@dataclass(frozen=True)
class Row:
    """One row of a source. where: `file:line`. fields: its columns. error: why it is no row (then fields is empty)."""

    where: str
    fields: dict[str, Any]
    error: str | None = None


def split_source(source: str) -> tuple[str, str]:
    """(`world` | `reasoning_gym` | `file` | `hub`, name).

    A path that exists or ends like a data file is a file. Raises DataError for an empty source and for an unknown prefix.
    """
    prefix, colon, name = source.partition(":")
    if colon and prefix in ("world", "reasoning_gym", "hub") and name:
        return prefix, name
    if not source.strip():
        raise DataError(f"problems.source is empty: expected a file, a dataset id, {GENERATED}")
    path = Path(source)
    if path.exists() or path.suffix.lower() in FILE_KINDS or source.startswith((".", "/", "~")):
        return "file", source
    if colon and "/" not in prefix and "\\" not in name:
        script = f" (write a file with examples/{prefix}_exercises.py)" if prefix in ("science", "code") else ""
        raise DataError(f"problems.source = {source!r}: unknown kind {prefix!r}; expected hub:ID, {GENERATED}{script}")
    if source.count("/") == 1:
        return "hub", source
    raise DataError(
        f"problems.source = {source!r}: no such file, and not a dataset id of the form owner/name; "
        f"expected a file ({', '.join(FILE_KINDS)}), owner/name, {GENERATED}"
    )


def file_rows(source: str) -> Iterator[Row]:
    """Rows of a local file, by its ending. Raises DataError for a file that cannot be read at all."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{path}: is a directory, expected a file; name one of the files in it")
    if not path.exists():
        place = "" if path.is_absolute() else f" in {Path.cwd()}, from where a relative path counts"
        raise DataError(f"{path}: no such file{place}")
    kind = FILE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: unknown ending {path.suffix!r}; expected one of {', '.join(FILE_KINDS)}")
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise DataError(f"{path}: the file is empty")
    if kind == "parquet":
        return _parquet_rows(path)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(head) > 1 and 0 in head[:2]):
        raise DataError(
            f"{path}: looks like UTF-16, expected UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8"
        )
    return {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows}[kind](path)


def _encoding_error(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{path}:{line}: byte 0x{byte:02x} is not UTF-8 (is the file Latin-1 or Windows-1252?); "
        "convert it, for example with iconv -f LATIN1 -t UTF-8"
    )


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            where = f"{path}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _encoding_error(path, number, error) from error
            if text:
                yield _json_row(where, text)


def _json_row(where: str, text: str) -> Row:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Row(where, {}, f"not JSON ({error})")
    if not isinstance(fields, dict):
        return Row(where, {}, f"a JSON {type(fields).__name__}, expected an object with question and answer")
    return Row(where, fields)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _encoding_error(path, error.object[: error.start].count(b"\n") + 1, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); a file with one object a line must end in .jsonl") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError(f"{path}: a JSON {type(content).__name__}, expected a list of objects")
    for number, item in enumerate(content, start=1):
        where = f"{path}:row {number}"
        if isinstance(item, dict):
            yield Row(where, item)
        else:
            yield Row(where, {}, f"a JSON {type(item).__name__}, expected an object with question and answer")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(MAX_FIELD, sys.maxsize))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        start = 2
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise _encoding_error(path, start, error) from error
            except csv.Error as error:
                raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error
            where = f"{path}:{start}"
            start = reader.line_num + 1
            if None in fields or None in fields.values():
                columns = len(reader.fieldnames or [])
                yield Row(where, {}, f"another number of fields than the {columns} of the header (unquoted comma?)")
            else:
                yield Row(where, dict(fields))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'soar-rl[parquet]'") from error
    try:
        table = parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{path}:row {number}", fields)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error


def hub_revision(name: str, revision: str | None) -> str:
    """The commit that a hub dataset and a branch, tag or nothing stand for, so that a run can be repeated.

    A whole commit hash is returned as it is. Raises DataError with the hub's reason.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DataError(_needs_datasets(name)) from error
    try:
        return str(HfApi().dataset_info(name.partition(":")[0], revision=revision).sha)
    except Exception as error:  # the errors of the hub's HTTP client have no root of their own
        raise _hub_error(name, f"revision {revision or 'main'!r}", error) from error


def _needs_datasets(name: str) -> str:
    return f"problems.source = {name!r} is a dataset id: it needs `datasets` (pip install soar-rl[hub])"


def _hub_error(name: str, what: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"problems.source = {name!r}, {what}: {type(error).__name__}: {reason}. "
        "Check the id, your access and the network, or download the file and name it"
    )


def hub_rows(name: str, split: str, revision: str | None) -> Iterator[Row]:
    """Rows of a Hugging Face dataset (`owner/name` or `owner/name:config`), streamed. Dataset scripts are not run.

    Raises DataError with the hub's reason.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(_needs_datasets(name)) from error
    identifier, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(identifier, config or None, split=split, revision=revision, streaming=True)
        for number, fields in enumerate(rows, start=1):
            yield Row(f"{name}[{split}]:row {number}", dict(fields))
    except Exception as error:  # the errors of the hub's HTTP client have no root of their own
        raise _hub_error(name, f"split {split!r}", error) from error


def gym_rows(name: str, count: int, seed: int, options: dict[str, Any]) -> Iterator[Row]:
    """`count` (0: 1,000) generated rows of a reasoning-gym family, with its metadata. options: its settings.

    Columns: question, answer, family, metadata (JSON, for the family's own scorer). Raises DataError with the settings
    that the family knows.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f"reasoning_gym:{name}: {error} (pip install 'soar-rl[procedural]')") from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise DataError(f"problems.source = 'reasoning_gym:{name}': no such family{hint}")
    known = [f.name for f in dataclasses.fields(DATASETS[name][1]) if f.name not in ("size", "seed")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(f"problems.options has {unknown[0]!r}: {name} knows {', '.join(known) or 'none'}")
    try:
        tasks = reasoning_gym.create_dataset(name, size=count or 1000, seed=seed, **options)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"reasoning_gym:{name} with {options}: {error}") from error
    for number, task in enumerate(tasks, start=1):
        metadata = json.dumps(task.get("metadata", {}), default=str)
        fields = {"question": task["question"], "answer": task["answer"], "family": name, "metadata": metadata}
        yield Row(f"reasoning_gym:{name}:row {number}", fields)
