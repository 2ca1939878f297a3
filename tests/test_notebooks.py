"""README, notebooks and examples run at tiny size; the two forms of a notebook are the same."""

import json
import linecache
import re
import shlex
import sys
from pathlib import Path

import code_exercises
import jupytext
import pytest
from helpers import ROOT
from loop_helpers import TINY, read_jsonl, sets

from soar.cli import main
from soar.config import load
from soar.domains.code import flaw, read_tests
from soar.domains.world import get_world

SMALL = (
    *TINY, "model.adapter=full", "problems.format=tiny", "student.sampling.max_tokens=16", "teacher.sampling.max_tokens=32",
)  # fmt: skip
SAID = {
    "method": "problems are never solved.*the sets earned.*promotions: 2 in 2 outer steps",
    "your_model": "12 problems, 4 attempts each.*3 problems, 4 attempts each.*adapter: ",
    "custom_teacher_reward": r"step 0: measured \[.*step 1: measured \[",
    "custom_verifier": r"last_digit: [1-9].*\nexact: ",
}


@pytest.mark.parametrize("name", SAID)
def test_a_script_runs_and_a_notebook_is_its_pair(name, tmp_path, monkeypatch, capsys):
    path = next(path for folder in ("notebooks", "examples") if (path := ROOT / folder / f"{name}.py").is_file())
    text, shown_as = path.read_text(encoding="utf-8"), str(path)
    if path.parent.name == "notebooks":
        cells, twins = (jupytext.read(one)["cells"] for one in (path, path.with_suffix(".ipynb")))
        shown = [[(cell["cell_type"], cell["source"]) for cell in some] for some in (cells, twins)]
        assert shown[0] == shown[1], f"write it anew: jupytext --to ipynb {path}"
        shown_as = f"<cells of {name}>"  # in a notebook no file holds what is typed
        linecache.cache[shown_as] = (len(text), None, text.splitlines(keepends=True), shown_as)
    monkeypatch.setenv("SOAR_NOTEBOOK_MODEL", "builtin:tiny")
    monkeypatch.setattr("soar.api.load", lambda recipe, keys, **more: load(recipe, [*keys, *SMALL], **more))
    monkeypatch.setenv("SOAR_NOTEBOOK_OUT", str(tmp_path))
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "run")])
    exec(compile(text, shown_as, "exec"), {"__name__": "__main__", "__file__": shown_as})
    assert re.search(SAID[name], said := capsys.readouterr().out, re.DOTALL), said


def test_code_exercises_have_solutions_that_pass(tmp_path):
    path = tmp_path / "a.jsonl"
    code_exercises.main([str(path), "--count", "48", "--levels", *"12345678"])
    rows = read_jsonl(path)
    assert len({row["question"] for row in rows}) == 48
    for row in rows:
        assert flaw(read_tests(row["answer"])) is None
        exec("\n".join([row["solution"], row["answer"]]), {})


def test_the_commands_of_the_readme_work_in_order(tmp_path, monkeypatch, capsys):
    """With the embedded model and small numbers in place of their own."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": p.question, "answer": p.answer} for p in get_world("tiny").hard_problems(12, 0)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", page.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("soar ")]
    assert [line.split()[1] for line in lines] == ["check", "screen", "run", "run"]
    room = ("student.sampling.max_tokens=48", "teacher.sampling.max_tokens=24")
    for line in lines:
        words = ["builtin:tiny" if word.startswith("Qwen/") else word for word in shlex.split(line, comments=True)[1:]]
        assert main([*words, *sets(*SMALL, "problems.verifier=exact", *room)]) == 0, (line, capsys.readouterr())
    assert set(json.loads(Path("runs/mine/summary.json").read_text())["arms"]) == {"base", "hard_only", "ps", "pq"}
