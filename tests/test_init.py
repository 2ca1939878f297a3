"""Recipes written for the user, and the page of all config keys."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from soar.cli import main, reference, start
from soar.config import Config, build, flat, load
from soar.types import Problem


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
    assert "some/model is no folder with a config.json, so it is taken as a hub id" in printed.err
    changed = {
        "name": "mine", "model.path": "some/model", "problems.source": str(problems), "problems.verifier": "math",
        "problems.question_column": "problem", "problems.answer_column": "solution",
    }  # fmt: skip
    assert flat(load(str(file)).resolved()) == flat(load("small-1gpu").resolved()) | changed
    lines = file.read_text(encoding="utf-8").splitlines()
    assert 'answer_column = "solution"  # column of the gold answer' in lines
    assert sum("  # " in line for line in lines) >= 20
    assert main(["run", str(file), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("answers", "verifier"),
    [
        (["1", "2.5", "-3/4", "1,000"], "number"),
        (["A", "(B)", "C", "D"], "choice"),
        (["1", "2", r"\frac{1}{x}"], "math"),
        (["A"] * 10 + ["7"], "math"),
    ],
)
def test_the_simplest_verifier_that_reads_the_answers(answers: list[str], verifier: str) -> None:
    problems = [Problem(str(i), "q", answer) for i, answer in enumerate(answers)]
    assert start.choose_verifier(problems)[0] == verifier


def test_a_model_folder_is_looked_at(tmp_path: Path) -> None:
    def keys() -> dict[str, object]:
        draft = start.Draft({})
        draft.look_at_model(str(tmp_path))
        return draft.keys

    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    budgets = {"student.sampling.max_tokens": 256, "teacher.sampling.max_tokens": 256}
    assert keys() == {"model.path": str(tmp_path), "problems.format": "question_answer", **budgets}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 32768}))
    assert keys() == {"model.path": str(tmp_path)}


def test_text_that_toml_must_quote_survives() -> None:
    name = 'quoted " and \\ back # no comment\u00e9'
    text = start.recipe_text({"model.path": name, "problems.verifier": "exact"})
    assert tomllib.loads(text)["model"]["path"] == name


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


def test_the_reference_page_is_current_and_has_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-reference"]) == 0
    page = capsys.readouterr().out
    wanted = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert wanted == page, "run: soar config-reference --out docs/config.md"
    rows = [line.replace("\\|", "/").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    defaults = {row[0].strip("| `"): row[2].strip("` ") for row in rows}
    assert defaults == {key: reference.toml(value) for key, value in flat(Config().resolved()).items()}
    assert defaults["teacher.optimizer.schedule"] != defaults["student.optimizer.schedule"]
    assert "| `screen.attempts` | integer \u2265 0 | `128` | 0: trust the file, screen nothing |" in page
    assert "| `problems.test_share` | number > 0, < 1 | `0.5` |" in page
    assert "| `arms.run` | list of `base`, `ps`, `hard_only`, " in page
