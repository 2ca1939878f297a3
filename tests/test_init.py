"""Recipes written for the user, and the page of all config keys."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from helpers import ROOT

from soar.cli import main, start
from soar.config import Config, build, flat, load


def write_problems(path: Path, answers: list[str]) -> Path:
    rows = [{"problem": f"question {i}", "solution": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_recipe_loads_and_says_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write_problems(tmp_path / "hard.jsonl", ["1", "2", "x^2"])
    file = tmp_path / "mine.toml"
    assert main(["init", str(file), "--model", "some/model", "--problems", str(problems)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{file}\n"
    assert "question = column 'problem'" in printed.err
    assert "some/model has no config.json here (a hub id, or GGUF): its context and format" in printed.err
    changed = {
        "name": "mine", "model.path": "some/model", "problems.source": str(problems), "problems.verifier": "math",
        "problems.question_column": "problem", "problems.answer_column": "solution",
    }  # fmt: skip
    assert flat(load(str(file)).resolved()) == flat(load("small-1gpu").resolved()) | changed
    lines = file.read_text(encoding="utf-8").splitlines()
    assert 'answer_column = "solution"  # column of the gold answer' in lines
    assert sum("  # " in line for line in lines) >= 20
    assert main(["run", str(file), "--dry-run"]) in (0, 1)  # 1: too few problems for a run


@pytest.mark.parametrize(
    ("answers", "verifier"),
    [
        (["1", "2.5", "-3/4", "1,000"], "number"),
        (["A", "(B)", "C", "D"], "choice"),
        (["1", "2", r"\frac{1}{x}"], "math"),
        (["A"] * 10 + ["7"], "math"),
    ],
)
def test_the_simplest_verifier_that_reads_the_answers(tmp_path: Path, answers: list[str], verifier: str) -> None:
    source = str(write_problems(tmp_path / "p.jsonl", answers))
    columns: dict[str, str | None] = {"question_column": None, "answer_column": None, "domain": None}
    assert start.fit_problems(source, columns, []) == {"verifier": verifier}
    assert columns["answer_column"] == "solution"


def test_a_model_folder_is_looked_at_and_names_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / 'quoted " and \\ # back \u00e9'
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    file = tmp_path / "mine.toml"
    assert main(["init", str(file), "--model", str(folder), "--problems", "world:tiny"]) == 0
    config = load(str(file))
    assert (config.model.path, config.problems.format) == (str(folder), "question_answer")
    assert (config.student.sampling.max_tokens, config.teacher.sampling.max_tokens) == (256, 256)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32768}))
    assert start.fit_model(folder) == ({}, [])


def test_init_does_not_replace_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write_problems(tmp_path / "hard.jsonl", ["1"])
    (tmp_path / "recipe.toml").write_text("mine")
    arguments = ["init", str(tmp_path / "recipe.toml"), "--model", "m", "--problems", str(problems)]
    assert main(arguments) == 1
    assert "give --force to replace it" in capsys.readouterr().err
    assert (tmp_path / "recipe.toml").read_text() == "mine"
    assert main([*arguments, "--force"]) == 0


def test_a_key_that_is_not_given_has_the_default_of_its_place() -> None:
    """A recipe that sets one key of teacher.optimizer must not fall back to the defaults of the optimizer at large."""
    built = build({"teacher": {"optimizer": {"warmup_steps": 5}, "sampling": {"temperature": 0.5}}})
    default = Config()
    assert built.teacher.optimizer == default.teacher.optimizer.model_copy(update={"warmup_steps": 5})
    assert built.teacher.sampling == default.teacher.sampling.model_copy(update={"temperature": 0.5})
    assert (built.teacher.optimizer.schedule, built.teacher.sampling.max_tokens) == ("cosine", 512)


def test_the_reference_page_is_current_and_has_every_key_with_its_default() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "config_page.py"))
    page = made["markdown"]()
    wanted = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert wanted == page, "run: python docs/config_page.py"
    rows = [line.replace("\\|", "/").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    defaults = {row[0].strip("| `"): row[2].strip("` ") for row in rows}
    assert defaults == {key: made["toml"](value) for key, value in flat(Config().resolved()).items()}
    assert defaults["teacher.optimizer.schedule"] != defaults["student.optimizer.schedule"]
    assert "| `screen.attempts` | integer \u2265 0 | `128` | 0: trust the file, screen nothing |" in page
