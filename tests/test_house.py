"""The repository keeps its house rules, and every rule catches a small breach of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import house
import pytest

PACKAGE = sorted((house.ROOT / "soar").glob("*.py"))
SIZED = PACKAGE + sorted((house.ROOT / "benchmarks").glob("*.py")) + sorted((house.ROOT / "examples").glob("*.py"))
PAGES = sorted(p for p in house.repository_files() if p.suffix == ".md")

IMPORT_WITHOUT_TORCH = """
import importlib, json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
failures = {}
for room in sys.argv[1:]:
    try:
        importlib.import_module(room)
    except Exception as error:
        failures[room] = f"{type(error).__name__}: {error}"
print(json.dumps(failures))
"""


def import_failures(rooms: list[str], path: Path) -> dict[str, str]:
    """The rooms that cannot be imported with torch, transformers and peft blocked, and the error of each."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *rooms],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def own_name(path: Path) -> str:
    return str(path.relative_to(house.ROOT))


@pytest.mark.parametrize("path", [p for p in PACKAGE if not p.stem.startswith("__")], ids=lambda p: p.stem)
def test_imports_go_upward(path: Path) -> None:
    assert house.import_order(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SIZED, ids=own_name)
def test_files_and_functions_are_small(path: Path) -> None:
    assert house.sizes(own_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PACKAGE, ids=own_name)
def test_public_names_have_docstrings(path: Path) -> None:
    assert house.docstrings(own_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.stem != house.RUNS_PROGRAMS], ids=own_name)
def test_nothing_is_evaluated_or_unpickled(path: Path) -> None:
    assert house.unsafe_calls(own_name(path), path.read_text(encoding="utf-8")) == []


def test_light_rooms_import_without_torch() -> None:
    assert import_failures([f"soar.{room}" for room in house.TORCH_FREE], house.ROOT) == {}


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    complaints = []
    for path in house.repository_files():
        text = house.text_of(path)
        complaints += house.machine_words(own_name(path), text) if text is not None else []
    assert complaints == []


@pytest.mark.parametrize("page", PAGES, ids=own_name)
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    assert house.broken_links(page) == []


@pytest.mark.parametrize(
    "source",
    [
        "import soar.report.page",
        "from soar.report.page import write_report",
        "from soar import report",
        "from .report import write_report",
        "from . import report",
        "def late():\n    from soar.report.page import write_report",
        "from soar.problems.load import load",
        "import soar.unheard_of",
    ],
)
def test_import_order_catches(source: str) -> None:
    assert len(house.import_order("data", source)) == 1


def test_import_order_allows_what_stands_above_and_the_version() -> None:
    source = "import numpy\nimport soar.types\nfrom soar.config import Config\nfrom soar import __version__, types\n"
    assert house.import_order("data", source) == []


def test_a_file_without_a_place_in_the_order_is_caught() -> None:
    assert house.import_order("unheard_of", "") == ["soar/unheard_of.py has no place in ORDER (tests/house.py)"]


def test_sizes_catch_long_files_and_long_functions() -> None:
    body = "    x = 1\n"
    assert house.sizes("a.py", "def f():\n" + body * 59) == []
    assert house.sizes("a.py", "def f():\n" + body * 60) == ["a.py:1 f: 61 lines, at most 60"]
    assert house.sizes("a.py", "class C:\n  async def f(self):\n" + body * 60) == ["a.py:2 f: 61 lines, at most 60"]
    assert house.sizes("a.py", "x = 1\n" * 400) == []
    assert house.sizes("a.py", "x = 1\n" * 401) == ["a.py: 401 lines, at most 400"]


def test_docstrings_catch_public_names_only() -> None:
    source = (
        'def _inner():\n    pass\n\ndef shown():\n    pass\n\nclass Shown:\n    pass\n\ndef good():\n    """Good."""\n'
    )
    assert house.docstrings("a.py", source) == [
        "a.py: the module has no docstring",
        "a.py:4 shown has no docstring",
        "a.py:7 Shown has no docstring",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "from torch import load",
        "import pickle",
        "import dill.source",
        "from joblib import load",
        "np.load(path, allow_pickle=True)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "def f():\n    import pickle",
    ],
)
def test_unsafe_calls_catch(source: str) -> None:
    assert len(house.unsafe_calls("a.py", source)) == 1


def test_unsafe_calls_allow_module_eval_and_words() -> None:
    source = "model.eval()\n# never eval( or exec( text\nname = 'pickle'\nnp.load(path, allow_pickle=False)\n"
    assert house.unsafe_calls("a.py", source) == []


@pytest.mark.parametrize("path", ["/w" + "ork/main", "/r" + "oot/x", "/home/" + "ann/x", "/t" + "mp/venv/bin"])
def test_machine_words_catch(path: str) -> None:
    assert len(house.machine_words("a.md", f"first line\nsee {path}/here")) == 1


def test_machine_words_allow_ordinary_paths() -> None:
    assert house.machine_words("a.md", "docs/work/x, runs/demo, https://example.org/home/page and a framework/") == []


def test_machine_words_do_not_catch_their_own_source() -> None:
    assert house.machine_words("house.py", Path(house.__file__).read_text(encoding="utf-8")) == []


def test_broken_links_catch_files_and_headings(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `thing`: here\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](other.md) [b](other.md#one-thing-here) [c](#top) [d](https://example.org/x) [e](other.md#twice-1)\n"
        "[f](missing.md) [g](other.md#no-heading) [h](#nowhere) ![i](missing.png) [j](../outside.md)\n"
        "`[k](in-code.md)`\n```\n[l](in-code.md)\n```\n[m]: gone.md\n"
    )
    assert house.broken_links(page, tmp_path) == [
        "page.md: link to 'missing.md': no such file",
        "page.md: link to 'other.md#no-heading': no such heading",
        "page.md: link to '#nowhere': no such heading",
        "page.md: link to 'missing.png': no such file",
        "page.md: link to '../outside.md': no such file",
        "page.md: link to 'gone.md': no such file",
    ]


def test_a_torch_import_is_caught(tmp_path: Path) -> None:
    (tmp_path / "heavy_room.py").write_text("import torch\n")
    (tmp_path / "light_room.py").write_text("def late():\n    import torch\n")
    failures = import_failures(["heavy_room", "light_room"], tmp_path)
    assert failures == {"heavy_room": "ImportError: torch is blocked"}
