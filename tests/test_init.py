"""Recipes written for the user, the config reference, and shell completion."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import house
import pytest

from soar import cli, completion, config, recipe, reference
from soar.cli import main
from soar.config import Config, load
from soar.types import Problem

DOCS = house.ROOT / "docs"


def write_problems(path: Path, answers: list[str]) -> Path:
    rows = [{"problem": f"question {i}", "solution": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_recipe_loads_and_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write_problems(tmp_path / "hard.jsonl", ["1", "2", "x^2"])
    file = tmp_path / "mine.toml"
    assert main(["init", str(file), "--model", "some/model", "--problems", str(problems)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{file}\n"
    assert "question = column 'problem'" in printed.err
    assert "some/model is no folder with a config.json, so it is taken as a hub id" in printed.err
    found, base = load(str(file)).resolved(), load("small-1gpu").resolved()
    changed = {
        "name": "mine",
        "model": {"path": "some/model"},
        "problems": {"source": str(problems), "question_column": "problem", "answer_column": "solution", "verifier": "math"},
    }  # fmt: skip
    assert found == config._merge(base, changed)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert 'question_column = "problem"  # column of the question' in lines
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
    assert recipe.choose_verifier(problems)[0] == verifier


def test_a_model_folder_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    draft = recipe.look_at_model(str(tmp_path))
    assert draft.keys == {
        "model.path": str(tmp_path),
        "problems.format": "question_answer",
        "student.sampling.max_tokens": 256,
        "teacher.sampling.max_tokens": 256,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 32768}))
    assert recipe.look_at_model(str(tmp_path)).keys == {"model.path": str(tmp_path)}


def test_text_that_toml_must_quote_survives(tmp_path: Path) -> None:
    name = 'quoted " and \\ back # no comment\u00e9'
    text = recipe.recipe_text(recipe.Draft({"model.path": name, "problems.verifier": "exact"}))
    assert tomllib.loads(text)["model"]["path"] == name


def test_init_does_not_replace_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write_problems(tmp_path / "hard.jsonl", ["1"])
    (tmp_path / "recipe.toml").write_text("mine")
    arguments = ["init", str(tmp_path / "recipe.toml"), "--model", "m", "--problems", str(problems)]
    assert main(arguments) == 1
    assert "give --force to replace it" in capsys.readouterr().err
    assert (tmp_path / "recipe.toml").read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert main([*arguments[:-1], str(tmp_path / "absent.jsonl"), "--force"]) == 1
    assert "absent.jsonl" in capsys.readouterr().err


def test_a_key_that_is_not_given_has_the_default_of_its_place() -> None:
    """A recipe that sets one key of teacher.optimizer must not fall back to the defaults of the optimizer at large."""
    built = config.build({"teacher": {"optimizer": {"warmup_steps": 5}, "sampling": {"temperature": 0.5}}})
    default = Config()
    assert built.teacher.optimizer == default.teacher.optimizer.model_copy(update={"warmup_steps": 5})
    assert built.teacher.sampling == default.teacher.sampling.model_copy(update={"temperature": 0.5})
    assert (built.teacher.optimizer.schedule, built.teacher.sampling.max_tokens) == ("cosine", 512)
    assert load("small-1gpu").teacher.optimizer.schedule == "cosine"


def test_the_reference_page_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-reference"]) == 0
    page = capsys.readouterr().out
    assert (DOCS / "config.md").read_text(encoding="utf-8") == page, "run: soar config-reference --out docs/config.md"
    assert main(["config-reference", "--out", str(tmp_path / "x.md")]) == 0
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == page


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def test_the_reference_has_every_key_with_its_default() -> None:
    keys = {key.path: key for part in reference.parts() for key in part.keys}
    defaults = flat(Config().resolved())
    assert set(keys) == set(defaults)
    for path, key in keys.items():
        value = tomllib.loads(f"value = {key.default}")["value"] if key.default else None
        assert value == defaults[path], path
    assert keys["teacher.optimizer.schedule"].default == '"cosine"'
    assert keys["student.optimizer.schedule"].default == '"constant"'
    assert keys["screen.attempts"].meaning == "0: trust the file, screen nothing"
    assert keys["problems.test_share"].kind == "number, 0 < x < 1"
    assert keys["model.lora_rank"].kind == "integer \u2265 1"
    assert keys["arms.run"].kind.startswith("list from `base`, `ps`, `hard_only`, ")
    assert keys["arms.learning_rates"].kind.startswith("table of number > 0, by `hard_only`, ")
    assert keys["log.sinks"].kind == "list from `tensorboard`, `wandb`, `trackio`"
    assert keys["model.target_modules"].meaning.startswith("name endings; all-linear")


def complete(script: str, line: str) -> list[str]:
    """What bash offers at the end of a command line."""
    words = line.split(" ")
    program = (
        f"{script}\nCOMP_WORDS=({' '.join(repr(word) for word in words)})\nCOMP_CWORD={len(words) - 1}\n_soar\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_options_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert {"run ", "report ", "watch "} <= {f"{word.strip()} " for word in complete(script, "soar ")}
    assert complete(script, "soar wat") == ["watch "]
    assert complete(script, "soar run sma") == ["small-1gpu "]
    assert complete(script, "soar run --resu") == ["--resume "]
    assert complete(script, "soar run --set teacher.optimizer.warm") == ["teacher.optimizer.warmup_steps="]
    assert complete(script, "soar run --out x --set promotion.t") == ["promotion.tau="]
    assert set(complete(script, "soar export r --format ")) == set(cli.cli_export.FORMATS)
    assert complete(script, "soar world bu") == ["build "]
    assert complete(script, "soar world build --st") == ["--steps "]
    assert complete(script, "soar report --res") == [""], "an option of another command is not offered"


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
def test_fish_completes_commands_options_and_values(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion.script(cli._parser(), "fish"))

    def offered(line: str) -> list[str]:
        program = f"source {tmp_path / 'script'}; complete -C {shlex.quote(line)}"
        done = subprocess.run(["fish", "--no-config", "-c", program], capture_output=True, text=True, check=True)
        return [found.partition("\t")[0] for found in done.stdout.splitlines()]

    assert offered("soar wat") == ["watch"]
    assert offered("soar run --resu") == ["--resume"]
    assert offered("soar run --set promotion.t") == ["promotion.tau="]
    assert set(offered("soar export r --format ")) == set(cli.cli_export.FORMATS), "and no files"
    assert offered("soar report --res") == []


def test_every_command_is_completed_in_every_shell() -> None:
    found = list(completion.commands(cli._parser()))
    names = {command.path[0] for command in found if command.path}
    assert {"init", "run", "report", "watch", "export", "completion"} <= names
    for shell in ("bash", "zsh", "fish"):
        script = completion.script(cli._parser(), shell)
        for name in names:
            assert name in script
    assert completion.script(cli._parser(), "zsh").startswith("#compdef soar\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_valid_where_the_shell_is_there(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    file = tmp_path / "script"
    file.write_text(completion.script(cli._parser(), shell))
    assert subprocess.run([shell, "-n", str(file)], capture_output=True).returncode == 0
