"""The command line: exit codes, messages, imports, arguments; `soar student` and `soar eval` agree with a run."""

import builtins
import json
import re
import runpy
import shlex
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from helpers import ROOT, random_stack
from loop_helpers import BRIEF, TINY, easy_problems, events, sets, tiny_config, write_problems
from tables import cases

import soar
from soar import seeds
from soar.cli import main
from soar.cli.commands import student_config
from soar.config import RECIPES, Config, ConfigError, build, flat, load
from soar.files import write_json
from soar.loop.evaluate import count_correct
from soar.loop.parallel import no_tick
from soar.run.setup import save_adapter
from soar.types import UserError


def dry_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The config that `soar run ...` would use."""
    main([*arguments, "--dry-run"])  # 1 where the problem file is made up
    config, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    return dict(config)


def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--help"]) == 0
    shown, said = capsys.readouterr()
    panels = re.split(r"─ (Start|Look|Take) ─", shown)[1:]
    commands = {name: re.findall(r"│ (\w+) ", text) for name, text in zip(panels[::2], panels[1::2], strict=True)}
    words = re.sub(r"\s+", " ", shown)
    assert "Recipes: code-1gpu, " in words and "Studies: embedded, eps, " in words and not said
    assert commands == dict(cases("cli", "panel"))


@pytest.mark.parametrize(("kind", "given", "code", "message"), cases("cli", "error"))
def test_errors_of_a_run(tmp_path, monkeypatch, capsys, kind, given, code, message):
    error = (UserError if kind == "UserError" else vars(builtins)[kind])(*given)
    monkeypatch.setattr("soar.run.pipeline.execute", Mock(side_effect=error))
    arguments = ["run", "--quiet", "--out", str(tmp_path / "run")]
    if code is None:  # an error nobody foresaw keeps its traceback
        with pytest.raises(type(error), match=str(error)):
            main(arguments)
    else:
        assert main(arguments) == code
        assert capsys.readouterr().err == message


def test_a_run_prints_its_table_and_records_its_command(tiny_run, run, capsys):
    """The table of a finished run is printed again."""
    assert main(["run", "--resume", "--out", str(run), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((run / "summary.json").read_text())
    assert lines[0].split() == ["arm", "rollouts", "pass@1", "pass@4"]
    for line, (arm, row) in zip(lines[1:5], summary["arms"].items(), strict=True):
        low, high = row["interval_95"]["4"]
        assert line.split()[:2] == [arm, f"{row['student_rollouts'] + row.get('search_rollouts', 0):,}"]
        assert f"{row['pass_at']['4']:.4f} [{low:.4f}, {high:.4f}]" in line
    assert lines[-2:] == ["promotions: 2 in 2 outer steps", f"report: {run / 'report.html'}"]
    command = ["soar", "run", "tiny", "--out", str(tiny_run), "--quiet", *sets(*TINY)]
    assert json.loads((run / "manifest.json").read_text())["command"] == command


def test_shorthands_that_set_can_refine(capsys):
    name = 'a "quoted" \\ name \U0001f600 \x7f'
    words = ["run", "--model", name, "--problems", "x.jsonl", "--max-hours", "2", "--review", "--set", "seed=3"]
    config = dry_config([*words, "--workers", "3", "--verifier", "exact"], capsys)
    assert (config["cluster"]["workers"], config["problems"]["verifier"]) == (3, "exact")
    assert (config["model"]["path"], config["problems"]["source"], config["seed"]) == (name, "x.jsonl", 3)
    assert (config["limits"]["max_hours"], config["promotion"]["review"]) == (2, True)
    for words in (["--version"], ["--trust-run", "--version"], ["--version", "run", "--dry-run"]):
        assert main(words) == 0 and capsys.readouterr().out == f"soar {soar.__version__}\n"
    assert load(None, ["evaluate.ks=1,4", "model.target_modules=[q_proj, v_proj]"]).evaluate.ks == (1, 4)
    assert load(None, ['student.sampling.stop="\\n"']).student.sampling.stop == ("\n",)
    for text in ("model.gguf_file=", 'model.gguf_file=""'):
        assert load("tiny", ["model.gguf_file=a.gguf", text]).model.gguf_file is None
    no_switches = [key for key, value in flat(Config().resolved()).items() if not isinstance(value, bool | dict)]
    for key, text in [("teacher.steps", '""'), *product(no_switches, ("true", "[true]"))]:
        with pytest.raises(ConfigError, match=f"tiny.toml with --set: {re.escape(key)}"):
            load("tiny", [f"{key}={text}"])


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_recipe_loads_and_can_be_planned(name, tmp_path, monkeypatch, capsys):
    changes = ["model.path=m", "problems.source=x.jsonl"]
    wanted = load(name, changes).resolved()
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / name / "manifest.json", {"config": {}})  # a run folder of that name is not meant
    assert dry_config(["run", name, *sets(*changes)], capsys) == wanted


def test_the_commands_of_the_cluster_files_are_understood(capsys):
    files = [(ROOT / "examples" / "cluster" / name).read_text(encoding="utf-8") for name in ("slurm.sh", "rayjob.yaml")]
    commands = re.findall(r"soar run ([^;]+?)(?: &\n|;)", "\n".join(files).replace("\\\n", " "))
    assert len(commands) == 3
    values = {'"${again[@]}"': "--model m --problems world:tiny", "$out": "x", "$address:$port": "10.0.0.1:6379"}
    values |= {"$workers": "15", "--resume": ""}
    for command in commands:
        for name, value in values.items():
            command = command.replace(name, value)
        cluster = dry_config(["run", *shlex.split(command)], capsys)["cluster"]
        assert cluster["workers"] and cluster["address"] in ("auto", "10.0.0.1:6379"), command


def asked(train: str, *overrides: str, recipe: str | None = "tiny", steps: int | None = 5) -> Config:
    return student_config(train, recipe, None, None, list(overrides), steps)


def test_training_sets_become_arms(tiny_run):
    assert asked("hard_only").arms.run == ("base", "hard_only")
    assert asked("pq_correct:runs/demo").arms.run == ("base", "pq_correct")
    config = asked(f"pq:{tiny_run}")
    assert (config.arms.run, config.arms.pq_from, config.screen.from_run) == (("base", "pq"), str(tiny_run), "")
    assert (config.teacher.steps, config.arms.steps, config.arms.pq_steps) == (0, 5, 0)
    assert asked("real:easy.jsonl").arms.real == "easy.jsonl"
    # Without a recipe the run's own config and screening are used.
    config = asked(f"teacher_t:{tiny_run}", recipe=None)
    assert (config.student.attempts, config.problems.limit, config.screen.from_run) == (4, 12, str(tiny_run))
    assert config.arms.teacher_from == str(tiny_run)
    assert asked("hard_only", "arms.steps=9").arms.steps == 9


def test_a_student_on_a_runs_questions(tiny_run, tmp_path, capsys):
    out = tmp_path / "student"
    arguments = ["student", "--train", f"pq:{tiny_run}", "--steps", "2", "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pq " in printed and f"adapter: {out / 'arms' / 'pq'}; report" in printed
    assert (out / "arms" / "pq" / "adapter_config.json").is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == ["base", "pq"]
    mine, theirs = ({e["arm"]: e["correct"] for e in events(f, "evaluation")} for f in (out, tiny_run))
    assert mine["base"] == theirs["base"]
    assert mine["pq"] == theirs["pq"]  # two steps on the same questions with the same seeds
    assert main(arguments) == 1
    assert main([*arguments, "--resume"]) == 0
    capsys.readouterr()
    words = ["--train", "solvable", "--steps", "1", "--quiet", "--out", str(tmp_path / "none")]
    assert main(["student", str(tiny_run), *words]) == 1
    out, err = capsys.readouterr()
    assert "adapter:" not in out and err.startswith("soar: the arm solvable is left out: screening found no problem")


def test_eval_gives_each_adapter_the_counts_that_it_has_alone(run, env, tmp_path, monkeypatch, capsys):
    """On a problem file, of adapters that differ from each other."""
    for name, value in (("run.progress.PLAIN_SECONDS", 0), ("run.progress.PATIENCE", 0), ("loop.evaluate.BLOCK", 2)):
        monkeypatch.setattr(f"soar.{name}", value)  # a line for every block of problems
    out = tmp_path / "eval.json"
    adapters, asked = [str(run / name) for name in ("student", "arms/pq")], easy_problems(6)
    problems, stack = str(write_problems(tmp_path / "easy.jsonl", asked)), random_stack(env.backbone, 2, size=0.02)
    for p, adapter in enumerate(adapters):
        save_adapter(env.backbone, stack.select([p]), Path(adapter))
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    assert main(["eval", *options, "--problems", problems, "--out", str(out), *sets(*BRIEF)]) == 0
    found = json.loads(out.read_text())
    assert list(found["policies"]) == ["base", *adapters]
    for policy, given in zip(found["policies"].values(), (None, stack.select([0]), stack.select([1])), strict=True):
        counts, cut, _ = count_correct(env, given, asked, tiny_config(*BRIEF), seeds.derive(0, "evaluate"), no_tick)
        assert policy["correct"] == counts[0].tolist()
        assert [policy["pass_at"]["1"], policy["truncated_share"]] == pytest.approx([counts.sum() / 24, cut.sum() / 24])
        assert list(policy["pass_at"]) == ["1", "2", "3", "4"] and len(policy["interval_95"]["4"]) == 2
    assert len({tuple(policy["correct"]) for policy in found["policies"].values()}) == 3
    assert set(found["paired"]) == {f"{name} - base" for name in adapters}
    assert found["problems"]["ids"] == [problem.id for problem in asked]
    shown, said = capsys.readouterr()
    assert {"2", "4"} <= set(re.findall(r"^evaluation: (\d)/6", said, re.MULTILINE)), said
    assert shown.startswith("6 problems, 4 attempts each\npolicy")
    assert re.findall(r"pass@\d(?= |$)", shown.split("\n")[1]) == [f"pass@{k}" for k in tiny_config().evaluate.ks]
    assert f"result: {out}" in shown
    (own := tmp_path / "own.py").write_text("def grade(completions, **_):\n    return [1.0] * len(completions)\n")
    assert main(["eval", "tiny", "--problems", problems, "--verifier", f"{own}:grade", "--out", str(out)]) == 0
    assert set(json.loads(out.read_text())["policies"]["base"]["pass_at"].values()) == {1.0}


def test_init_writes_a_commented_recipe(tmp_path, capsys):
    model, file = 'quoted " and \\ # back \\1 \u00e9 \x7f\x01\n\\', tmp_path / "mine.toml"
    words = ["init", str(file), "--model", model, "--problems", "my hard.jsonl", "--verifier", "number"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{file}\nnext: soar check {file}\n"
    changed = {"name": "mine", "model.path": model, "problems.source": "my hard.jsonl", "problems.verifier": "number"}
    assert flat(load(str(file)).resolved()) == flat(load("small-1gpu").resolved()) | changed
    lines = file.read_text(encoding="utf-8").splitlines()
    assert 'source = "my hard.jsonl"  # file, hub id, world:NAME, reasoning_gym:NAME or verifiers:NAME' in lines
    assert sum("  # " in line for line in lines) >= 20


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
