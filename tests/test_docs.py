"""The pages say what the code does: every logged field is explained, every named function and test exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import house
import pytest
import run_folders
from loop_helpers import events, read_jsonl, tiny_config

from soar.report import text as wording
from soar.run import folder as record

DOCS = house.ROOT / "docs"
ONLY_SOMETIMES = {"alarm", "review", "forecast"}  # kinds of events that a plain run without trouble does not write


def sections(page: str) -> dict[str, list[list[str]]]:
    """Heading -> rows of the tables under it, as cells without their markup."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
            found[heading] = []
        elif line.startswith("|") and not re.match(r"^\|[-|]+\|$", line):
            found[heading].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def fields(heading: str) -> set[str]:
    """Field names in the table of metrics.md under a heading."""
    header, *rows = sections("metrics.md")[heading]
    assert header == ["field", "unit", "meaning", "source"]
    return {row[0].strip("`") for row in rows}


def keys(rows: list[dict[str, Any]]) -> set[str]:
    return {key for row in rows for key in row}


@pytest.mark.parametrize("kind", ["screen", "outer_step", "promotion", "evaluation"])
def test_every_field_of_an_event_is_explained(tiny_run: Path, kind: str) -> None:
    rows = events(tiny_run, kind)
    assert rows
    assert all(set(row) == fields(kind) for row in rows)


def test_every_inner_statistic_is_explained(tiny_run: Path) -> None:
    inner = fields("Inner statistics")
    for row in events(tiny_run, "outer_step"):
        assert set(row["student_first"]) == set(row["student_last"]) == inner
    for row in events(tiny_run, "arm_step"):
        assert set(row) == fields("arm_step") | inner


def test_every_kind_of_event_has_a_section(tiny_run: Path) -> None:
    written = {row["event"] for row in events(tiny_run)}
    named = {heading for heading in sections("metrics.md") if re.fullmatch(r"[a-z_]+", heading)}
    assert named == written | ONLY_SOMETIMES


def test_alarms_are_explained() -> None:
    """Alarms are made in three places; their keys, and their kinds in two more, are read from the source."""
    made: list[tuple[set[str], str]] = []
    for room in ("alarms", "arms"):
        tree = ast.parse((house.ROOT / "soar" / f"{room}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                found = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}
                if isinstance(found.get("event"), ast.Constant) and found["event"].value == "alarm":
                    made.append(({str(k) for k in found}, ast.unparse(found["kind"])))
    assert len(made) == 3
    assert {key for names, _ in made for key in names} == fields("alarm")
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert {kind for _, kind in made} == {"kind", "'arm failed'", "'arm left out'"}
    sources = [(house.ROOT / "soar" / f"{room}.py").read_text(encoding="utf-8") for room in ("alarms", "teacher")]
    kinds = {kind for source in sources for kind in re.findall(r'(?:alarm\(|yield )"([a-z ]+)"', source)}
    assert len(kinds) == 6
    named = {"arm failed", "arm left out", "log-prob gap of the teacher", "log-prob gap of the students"}
    for kind in kinds | named:
        assert f"`{kind}`" in page


@pytest.mark.parametrize("name", ["questions.jsonl", "pq.jsonl"])
def test_every_field_of_a_question_is_explained(tiny_run: Path, name: str) -> None:
    assert keys(read_jsonl(tiny_run / name)) == fields(name)


def test_every_field_of_a_hard_problem_is_explained(tiny_run: Path) -> None:
    wanted = fields("hard/train.jsonl and hard/test.jsonl")
    for half in ("train", "test"):
        assert keys(read_jsonl(tiny_run / "hard" / f"{half}.jsonl")) == wanted


def test_every_field_of_the_summary_is_explained(tiny_run: Path) -> None:
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert set(summary) == fields("summary.json")
    assert keys(list(summary["arms"].values())) == fields("Entry of an arm")
    paired = [entry for by_k in summary["paired"].values() for entry in by_k.values()]
    assert keys(paired) == fields("Entry of a paired difference")
    phases = next(row for row in sections("metrics.md")["summary.json"] if row[0] == "`wall_seconds`")[2]
    assert all(f"`{phase}`" in phases for phase in summary["wall_seconds"])


def test_the_run_folder_page_names_every_file(tiny_run: Path) -> None:
    page = (DOCS / "run_folder.md").read_text(encoding="utf-8")
    for path in tiny_run.rglob("*"):
        name = str(path.relative_to(tiny_run)) + ("/" if path.is_dir() else "")
        inside = name.startswith("state/") or re.match(r"(teacher|student|arms/\w+)/.", name)
        if not inside and name not in ("hard/", "arms/"):
            name = re.sub(r"hard/(train|test)\.jsonl\.evidence", "hard/*.jsonl.evidence", name)
            assert f"`{name}`" in page, name
    for key in record.HARMLESS:
        assert f"`{key}`" in page
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    assert all(f"`{key}`" in page for key in [*manifest, *manifest["hashes"]])
    evidence = json.loads((tiny_run / "hard" / "train.jsonl.evidence.json").read_text())
    assert all(f"`{key}`" in page for key in evidence)


def code_names(page: str) -> set[str]:
    """`room.function` and `room.Class.method` in a page's tables."""
    rooms = "|".join(house.ORDER)
    cells = [cell for rows in sections(page).values() for row in rows for cell in row]
    return {name for cell in cells for name in re.findall(rf"`((?:{rooms})(?:\.\w+)+)`", cell)}


@pytest.mark.parametrize("page", ["method.md", "metrics.md"])
def test_named_functions_exist(page: str) -> None:
    config_keys = flat(tiny_config().resolved())
    names = code_names(page) - config_keys
    assert len(names) > 20
    for name in names:
        room, *path = name.split(".")
        found = importlib.import_module(f"soar.{room}")
        for part in path:
            assert hasattr(found, part), name
            found = getattr(found, part)


def flat(section: dict[str, Any], prefix: str = "") -> set[str]:
    """Every key of a resolved config, dotted."""
    found: set[str] = set()
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return found


def test_named_tests_exist() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)::(test_\w+)`", text))
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((house.ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body), f"{file}::{name}"


def test_every_row_of_the_method_names_code_and_a_test() -> None:
    for heading, (header, *rows) in ((h, rows) for h, rows in sections("method.md").items() if rows):
        for row in rows:
            assert len(row) == len(header), f"{heading}: {row[0]}"
            assert "::" in row[-1], f"{heading}: {row[0]}"
            assert "`" in row[-2], f"{heading}: {row[0]}"


def test_named_config_keys_exist() -> None:
    known = flat(tiny_config().resolved())
    (rows,) = [rows for heading, rows in sections("method.md").items() if heading == "Where the paper leaves room"]
    named = [key for row in rows[1:] for key in re.findall(r"`([\w.]+)`", row[2])]
    assert len(named) > 8
    assert set(named) <= known


def test_the_made_up_runs_of_the_report_tests_use_real_fields(tiny_run: Path, tmp_path: Path) -> None:
    folder = run_folders.write_run(tmp_path / "run", steps=6)
    for kind in ("screen", "outer_step", "promotion", "evaluation"):
        assert keys(events(folder, kind)) <= fields(kind) | {"search_rollouts"}, kind
    assert keys(events(folder, "arm_step")) <= fields("arm_step") | fields("Inner statistics")
    assert keys(events(folder, "alarm")) <= fields("alarm")
    for name in ("questions.jsonl", "pq.jsonl"):
        assert keys(read_jsonl(folder / name)) <= fields(name)


def test_the_picture_of_the_readme_shows_its_table() -> None:
    readme = (house.ROOT / "README.md").read_text(encoding="utf-8")
    picture = (DOCS / "figures" / "demo-pass-at-k.svg").read_text(encoding="utf-8").replace("\u00a0", " ")
    table = readme[readme.index("| arm | student rollouts |") :].split("\n\n")[0].splitlines()
    ks = re.findall(r"pass@(\d+)", table[0])
    assert len(table) == 6 and ks == ["1", "8", "32"]
    for row in table[2:]:
        name, _, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for k, cell in zip(ks, cells, strict=True):
            share, low, high = (100 * float(number) for number in re.findall(r"[\d.]+", cell))
            note = re.search(rf"{wording.arm_name(name)}, pass@{k}: ([\d.]+) % \[([\d.]+), ([\d.]+)\]", picture)
            assert note is not None, (name, k)
            assert [float(n) for n in note.groups()] == pytest.approx([share, low, high], abs=0.101)
