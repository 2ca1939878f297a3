"""Recipes written for the user, and the page of all config keys."""

import runpy

from helpers import ROOT

from soar.cli import main
from soar.config import Config, build, flat, load


def test_init_writes_a_commented_recipe_once(tmp_path, capsys):
    model, file = 'quoted " and \\ # back \\1 \u00e9', tmp_path / "mine.toml"
    words = ["init", str(file), "--model", model, "--problems", "my hard.jsonl", "--verifier", "number"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{file}\nnext: soar check {file}\n"
    changed = {"name": "mine", "model.path": model, "problems.source": "my hard.jsonl", "problems.verifier": "number"}
    assert flat(load(str(file)).resolved()) == flat(load("small-1gpu").resolved()) | changed
    lines = file.read_text(encoding="utf-8").splitlines()
    assert 'source = "my hard.jsonl"  # file, hub id, world:NAME, reasoning_gym:NAME or verifiers:NAME' in lines
    assert sum("  # " in line for line in lines) >= 20
    assert main(words) == 1 and "mine.toml exists; name another file" in capsys.readouterr().err


def test_a_key_that_is_not_given_has_the_default_of_its_place():
    """A recipe that sets one key of teacher.optimizer must not fall back to the defaults of the optimizer at large."""
    built = build({"teacher": {"optimizer": {"warmup_steps": 5}, "sampling": {"temperature": 0.5}}})
    default = Config()
    assert built.teacher.optimizer == default.teacher.optimizer.model_copy(update={"warmup_steps": 5})
    assert built.teacher.sampling == default.teacher.sampling.model_copy(update={"temperature": 0.5})
    assert (built.teacher.optimizer.schedule, built.teacher.sampling.max_tokens) == ("cosine", 512)


def test_the_reference_page_is_current_and_has_every_key_with_its_default():
    made = runpy.run_path(str(ROOT / "docs" / "config_page.py"))
    page = made["markdown"]()
    wanted = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert wanted == page, "run: python docs/config_page.py"
    rows = [line.replace("\\|", "/").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    defaults = {row[0].strip("| `"): row[2].strip("` ") for row in rows}
    assert defaults == {key: made["toml"](value) for key, value in flat(Config().resolved()).items()}
    assert defaults["teacher.optimizer.schedule"] != defaults["student.optimizer.schedule"]
    assert "| `screen.attempts` | integer \u2265 0 | `128` | 0: trust the file, screen nothing |" in page
