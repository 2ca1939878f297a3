"""Rows of a problem file, folder, dataset or environment, streamed, each with its place. Files are neither unpickled nor run.

Of the environments of the package `verifiers` (v1) the tasks of a single-turn one are problems, its rewards their verifier.
What needs more than one completion, or a machine to run things on, is refused by name: its rewards read text here.
"""

import csv
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from inspect import getattr_static, signature
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from soar.types import UserError, import_extra, parse_json, said_by

MAX_FIELD = 10_000_000
NO_ROWS = ("*.evidence.json", "state.json", "dataset_info.json", "cache-*.arrow")  # but for the first of `datasets`
PREFIX = "verifiers:"
GOLD = ("answer", "solution", "ground_truth", "expected_answer", "target", "gold", "label", "reference", "expected")


class DataError(UserError, ValueError):
    """Problems that cannot be used; the message says where, what was found, what was expected, and what to do."""


class Row(NamedTuple):
    """One row of a source. where: `file:line`. fields: its columns. error: why it is no row (then fields is empty)."""

    where: str
    fields: dict[str, Any]
    error: str | None = None


def split_source(source: str, origin: str = "problems.source") -> tuple[str, str]:
    """Kind (`world`, `reasoning_gym`, `verifiers`, `file` or `hub`) and name of a source; origin: the key that holds it.

    A path that exists or ends like a data file is a file. Raises DataError for an empty source and for an unknown prefix.
    """
    prefix, colon, name = source.partition(":")
    if colon and prefix in ("world", "reasoning_gym", "verifiers", "hub") and name:
        return prefix, name
    path = Path(source)
    if source.strip() and (path.exists() or path.suffix.lower() in READERS or source.startswith((".", "/", "~"))):
        return "file", source
    if source.count("/") == 1 and (not colon or "/" in prefix):
        return "hub", source
    found = f"{origin} = {source!r}: no such file, and not a dataset id of the form owner/name"
    forms = "a folder of them, owner/name, hub:ID, world:NAME, reasoning_gym:NAME or verifiers:NAME"
    raise DataError(f"{found}; expected a file ({', '.join(READERS)}), {forms}")


def file_rows(source: str) -> Iterator[Row]:
    """Rows of a local file, by its ending, or of all such files in a folder. Raises DataError for what cannot be read."""
    path = Path(os.path.expanduser(source))
    folder = path.is_dir()
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        raise DataError(f"{path}: a dataset of splits; name the folder of one: {', '.join(splits)}")
    inside = sorted(file for file in path.rglob("*") if not any(map(file.match, NO_ROWS))) if folder else [path]
    files = [file for file in inside if file.suffix.lower() in READERS]
    if not files:
        kind = "a folder without files that end in" if folder else f"unknown ending {path.suffix!r}; expected one of"
        raise DataError(f"{path}: {kind} {', '.join(READERS)}")
    try:
        if not files[0].stat().st_size:
            raise DataError(f"{files[0]}: the file is empty, or no file but a pipe, which would be waited for")
        files[0].open("rb").close()  # may it be read?
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
                code = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
                found = f"byte 0x{raw[error.start]:02x} is not UTF-8 (is the file Latin-1, Windows-1252 or UTF-16?)"
                raise DataError(f"{path}:{number}: {found}; convert it: iconv -f {code} -t UTF-8") from error
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
                yield _row(f"{path}:{number}", parse_json(text))
            except ValueError as error:
                yield Row(f"{path}:{number}", {}, f"not JSON ({error})")


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of objects, an object with one such list, columns (lists of one length, or as pandas writes) or one problem."""
    text = "".join(_lines(path))
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); a file with one object a line must end in .jsonl") from error
    if isinstance(content, dict):
        columns = [[*c.values()] if isinstance(c, dict) and all(map(str.isdigit, c)) else c for c in content.values()]
        lists = all(isinstance(column, list) and column for column in columns)
        objects = sum(isinstance(column[0], dict) for column in columns) if lists else 0
        if objects == len(columns) > 1:
            raise DataError(f"{path}: several lists of rows ({', '.join(content)}); write one of them into a file")
        places = {tuple(c) if isinstance(c, dict) else len(c) for c in content.values()} if lists else ()
        if not objects and len(columns) > 1 and len(places) == 1:
            content = [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
        else:
            content = columns[0] if objects and len(columns) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: a JSON {type(content).__name__}, expected a list of objects")
    for number, item in enumerate(content, start=1):
        yield _row(f"{path}:row {number}", item)


def _csv_rows(path: Path) -> Iterator[Row]:
    """The delimiter is the one of comma, semicolon and tab that the header has most of."""
    csv.field_size_limit(MAX_FIELD)
    lines, ahead = tee(_lines(path))
    comma = max(",;\t", key=next(filter(str.strip, ahead), "").count)  # of the header, behind blank lines
    del ahead  # it would keep all that is read
    reader = csv.reader(lines, delimiter=comma, skipinitialspace=True, strict=True)
    columns, start = list[str](), 1  # line where a row begins
    try:
        for values in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not columns or not values:  # the header; blank lines, which have a number all the same
                columns = columns or values
                if twice := next((name for name in values if name and values.count(name) > 1), ""):
                    raise DataError(f"{where}: the header has the column {twice!r} twice; rename or delete one")
            elif len(values) != len(columns):
                yield Row(where, {}, f"more or fewer fields than the {len(columns)} of the header (unquoted comma?)")
            else:
                yield Row(where, dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet file, or of an Arrow file of `datasets`."""
    kind = "parquet" if path.suffix.lower() == ".parquet" else "streamed Arrow"
    missing = f"{path}: reading {kind} needs pyarrow: pip install 'soar-rl[parquet]'"
    parquet, ipc = (import_extra(f"pyarrow.{name}", DataError, missing) for name in ("parquet", "ipc"))
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024) if kind == "parquet" else ipc.open_stream(path)
        for number, fields in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
            yield Row(f"{path}:row {number}", fields)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a {kind} file ({error})") from error


READERS = {
    ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows,
    ".parquet": _parquet_rows, ".arrow": _parquet_rows,
}  # fmt: skip


def hub_rows(name: str, split: str, revision: str | None, origin: str) -> tuple[Iterator[Row], str]:
    """Rows of a Hugging Face dataset (`owner/name` or `owner/name:config`), and their commit.

    From the cache of `datasets` where the hub does not answer. Dataset scripts are not run. Raises DataError.
    """
    says = f"{origin} = {name!r}"
    datasets = import_extra("datasets", DataError, f"{says} needs `datasets`: pip install 'soar-rl[hub]'")
    identifier, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(identifier, config or None, split=split, revision=revision)
    except Exception as error:  # the errors of the hub's HTTP client have no root of their own
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        where = f"{says}, split {split!r}, revision {revision or 'main'!r}: {type(error).__name__}: {reason}"
        mend = "Check the id, your access and the network, or download the file and name it"
        raise DataError(f"{where}. {mend}") from error
    commit = Path(table.cache_files[0]["filename"]).parent.name
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and commit != revision:
        raise DataError(f"{says}: the cache has commit {commit}, not {revision}; connect, or change the key")
    return (Row(f"{name}[{split}]:row {number}", dict(row)) for number, row in enumerate(table, start=1)), commit


def gym_rows(name: str, count: int, seed: int, options: dict[str, Any], origin: str) -> Iterator[Row]:
    """`count` (0: 1,000) generated rows of a reasoning-gym family, with the settings `options`. Raises DataError.

    Columns: question, answer, family, metadata (JSON, for the family's own scorer).
    """
    missing = f"reasoning_gym:{name}: {{error}} (pip install 'soar-rl[procedural]')"
    gym, factory = (import_extra(module, DataError, missing) for module in ("reasoning_gym", "reasoning_gym.factory"))
    if name not in factory.DATASETS:
        near = ", ".join(difflib.get_close_matches(name, factory.DATASETS, n=3))
        raise DataError(f"{origin} = 'reasoning_gym:{name}': no such family; the nearest: {near or 'none'}")
    try:
        tasks = gym.create_dataset(name, size=count or 1000, seed=seed, **options)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        settings = ", ".join(sorted(set(factory.DATASETS[name][1].__dataclass_fields__) - {"size", "seed"}))
        raise DataError(f"problems.options = {options}: {error}; {name} knows {settings or 'none'}") from error
    for number, task in enumerate(tasks, start=1):
        metadata = json.dumps(task.get("metadata", {}), default=str)
        fields = {"question": task["question"], "answer": task["answer"], "family": name, "metadata": metadata}
        yield Row(f"reasoning_gym:{name}:row {number}", fields)


def with_options(source: str, options: Mapping[str, Any] | None) -> str:
    """The reference of an environment with the settings of its config."""
    return source + (json.dumps(options) if options else "")


class Environment:
    """The taskset of `verifiers:NAME` or `verifiers:file.py`, its config as JSON behind the name; called, its rubric."""

    def __init__(self, reference: str) -> None:
        """Raises DataError."""
        name, brace, options = reference.removeprefix(PREFIX).partition("{")
        file = Path(name)
        name = file.stem if file.suffix == ".py" else name
        sys.path[:] = dict.fromkeys([str(file.parent.resolve()), *sys.path])
        try:
            import verifiers.v1 as vf

            config = vf.taskset_config_type(name).model_validate({"id": name, **json.loads(brace + options or "{}")})
            self.taskset = vf.load_taskset(config)
            alone = vf.environment_class(name) is vf.SingleAgentEnv and vf.default_harness_id(name) != name
        except Exception as error:  # a user's module may raise anything when it is imported
            hint = "" if "verifiers.v1" in sys.modules else "; pip install 'soar-rl[environments]'"
            raise DataError(f"{reference} cannot be loaded: {said_by(error)}{hint}") from error
        self.vf, self.reference, self.task_type = vf, reference, (task := self.taskset.task_type())
        self.data_type = task.data_type()
        self.gold = next((key for key in GOLD if key in self.data_type.model_fields), "")
        fields = [key for key, field in self.data_type.model_fields.items() if field.is_required() and key != self.gold]

        def changes(kind: type, base: type, *names: str) -> bool:
            return any(getattr_static(kind, name) is not getattr_static(base, name) for name in names)

        self._refuse(
            ("several turns or agents (an Env or Harness of its own)", not alone),
            ("tools", changes(type(self.taskset), vf.Taskset, "toolsets") or changes(task, vf.Task, "toolsets")),
            ("a machine", task.NEEDS_CONTAINER or changes(task, vf.Task, "setup", "finalize")),
            (f"a gold answer in {self.data_type.__name__} ({', '.join(GOLD)})", not self.gold),
            (f"{', '.join(fields)} in a task, where the teacher writes only question and answer", fields),
        )

    def _refuse(self, *needs: tuple[str, Any]) -> None:
        if missing := [what for what, needed in needs if needed]:
            only = "only single-turn environments can be used whose rewards read a text"
            raise DataError(f"{self.reference} needs {'; '.join(missing)}: {only}")

    @cached_property
    def first(self) -> Any:
        """The first task. Raises DataError where there is none that can be used."""
        try:
            task = next(iter(self.taskset))
        except Exception as error:  # the code that makes tasks is a user's
            raise DataError(f"{self.reference} makes no task: {said_by(error)}") from error
        graders = [*task.hooks("reward"), *task.hooks("metric")]
        self._refuse(
            ("a user who begins", task.data.prompt is None),
            ("a machine", any("runtime" in signature(grader).parameters for grader in graders)),
            ("a judge", task.config.judges),
        )
        return task

    def rows(self, limit: int) -> Iterator[Row]:
        """The tasks as rows of a problem file, `limit` (0: 1,000) of a taskset without an end; `task_data` is the task."""
        system, most = self.first.data.system_prompt, None if self.taskset.bounded else limit or 1_000
        for number, task in enumerate(islice(self.taskset, most), start=1):
            data, where = task.data, f"{self.reference}:task {number}"
            prompt = data.prompt if isinstance(data.prompt, str) else [turn.model_dump() for turn in data.prompt or []]
            told = data.model_dump_json(exclude_none=True)
            fields = {"id": data.id, "question": prompt, "answer": str(getattr(data, self.gold)), "task_data": told}
            other = None if data.system_prompt == system else "another system prompt than the first task"
            yield Row(where, fields, other)

    async def __call__(self, prompt: str, completion: str, answer: str, **row: Any) -> float | None:
        """The sum of the weighted rewards; None for an answer that can be none here (the teacher wrote it)."""
        from verifiers.v1.trace import TraceTask

        vf = self.vf
        try:
            told = row.get("task_data") or json.dumps({"prompt": prompt, self.gold: answer})
            data = self.data_type.model_validate_json(told)
        except ValidationError:
            return None
        said = [vf.SystemMessage(content=data.system_prompt)] if data.system_prompt else []
        said += [vf.UserMessage(content=prompt), vf.AssistantMessage(content=completion)]
        nodes = [vf.MessageNode(parent=i - 1 if i else None, message=turn) for i, turn in enumerate(said)]
        nodes[-1].sampled = True
        agent, recorded = vf.AgentInfo(config=vf.AgentConfig()), TraceTask(type=self.task_type.__name__, data=data)
        trace = vf.Trace(task=recorded, agent=agent, nodes=nodes, is_completed=True, ok=True)
        await self.task_type(data, self.taskset.config.task).score(trace)
        return float(trace.reward)


environment = lru_cache(maxsize=4)(Environment)
