"""The commands of README and quickstart, run one after the other in one folder, as a reader would.

What is replaced is named in `small`: the model is the embedded one, so nothing is downloaded, and the sizes are those of
`loop_helpers.TINY`. Everything else is the page's: recipes, options, the files that one command leaves for the next. `make`,
`pip` and all other pages are in test_pages_all.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import house
import pytest
from loop_helpers import TINY
from test_commands import commands, options_by_command

from soar.cli import main
from soar.domains.world import get_world

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
SIZES = [
    *TINY,
    "reward.mode=sampled",
    "model.adapter=full",
    "problems.format=tiny",
    "problems.verifier=exact",
    "student.sampling.max_tokens=24",
]
SIZES += ["teacher.sampling.max_tokens=24", "teacher.optimizer.warmup_steps=0", "student.optimizer.warmup_steps=0"]


def small(words: list[str]) -> list[str]:
    """A command of a page with the embedded model and small numbers in place of its own."""
    command = words[0]
    words = ["builtin:tiny" if word == MODEL else word for word in words]
    if "--steps" in words:
        words[words.index("--steps") + 1] = "2"
    if "--set" in options_by_command()[command] and command != "student":  # a student has the config of its run
        words += [part for size in SIZES for part in ("--set", size)]
    if command == "study":
        words += ["--seeds", "0"]
    return words


LEFT_OUT = ("soar study finding1",)  # ten cells of eight arms: test_studies.py


def fill_place(tiny_run: Path, tmp_path: Path) -> None:
    """What the pages assume: problem files, and finished runs named `demo` and `seed0` to `seed2`."""
    rows = [{"question": p.question, "answer": p.answer} for p in get_world("tiny").hard_problems(12, 0)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("problems.jsonl", "hard.jsonl", "other.jsonl"):
        (tmp_path / name).write_text(text)
    (tmp_path / "runs").mkdir()
    for name in ("demo", "seed0", "seed1", "seed2"):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)


@pytest.fixture
def place(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fill_place(tiny_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(name: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Run the soar commands of a page in order; returns them. A command that fails is named."""
    lines = [line for line in commands((house.ROOT / name).read_text(encoding="utf-8")) if line.startswith("soar ")]
    lines = [line for line in lines if not line.startswith(leave_out or ("-",))]
    for line in lines:
        print(f"$ {line}")
        assert main(small(shlex.split(line)[1:])) == 0, line
    return lines


def test_the_commands_of_the_readme_work_in_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_page("README.md", leave_out=LEFT_OUT)
    assert {line.split()[1] for line in lines} == {"check", "screen", "run", "study", "student", "eval"}
    summary = json.loads((place / "runs" / "mine" / "summary.json").read_text())
    assert set(summary["arms"]) == {"base", "hard_only", "ps", "pq"}
    evidence = json.loads((place / "runs" / "mine" / "hard" / "train.jsonl").read_text().splitlines()[0])
    assert evidence["attempts"] == 4, "taken from the screening before"
    for made in (
        "runs/screen/hard.jsonl",
        "runs/mine/report.html",
        "runs/mine/student/adapter_config.json",
        "eval.json",
    ):
        assert (place / made).is_file(), made
    assert "| shuffled, seed 0 | finished |" in (place / "studies" / "null" / "study.md").read_text()


def test_the_commands_of_the_quickstart_work_in_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_page("docs/quickstart.md")
    assert len(lines) > 15
    for made in ("recipe.toml", "runs/mine/report.html", "seeds.html", "figures/pass-at-k.svg", "my-model/config.json"):
        assert (place / made).is_file(), made
    for form in ("trl", "verl", "verifiers", "hub"):
        assert (place / f"questions-{form}" / "README.md").is_file(), form
    assert os.path.getsize(place / "my-adapter" / "adapter_model.safetensors") > 0
