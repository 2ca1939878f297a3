"""The command line: exit codes, messages instead of tracebacks, what is imported for what, and what arguments become."""

import json
import re
import shlex
from typing import Any
from unittest.mock import Mock

import pytest
from helpers import ROOT
from loop_helpers import TINY, sets

import soar
from soar.cli import main
from soar.config import RECIPES, ConfigError, load
from soar.types import UserError


def dry_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The config that `soar run ...` would use."""
    main([*arguments, "--dry-run"])  # 1 where the problem file is made up
    config, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    return dict(config)


def test_help_names_every_command_and_keeps_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--help"]) == 0
    shown, said = capsys.readouterr()
    panels = re.split(r"─ (Start|Look|Take) ─", shown)[1:]
    commands = {name: re.findall(r"│ (\w+) ", text) for name, text in zip(panels[::2], panels[1::2], strict=True)}
    words = re.sub(r"\s+", " ", shown)
    assert "Recipes: code-1gpu, " in words and "Studies: embedded, eps, " in words and not said
    assert commands == {
        "Start": ["init", "check", "screen", "run"],
        "Look": ["watch", "report", "doctor", "verify"],
        "Take": ["export", "eval", "student", "measure", "study", "review"],
    }
    assert main(["run", "--help"]) == 0
    assert "\n   soar run --out runs/mine --max-hours 8          pause in time" in capsys.readouterr().out, (
        "lines stay lines"
    )


INTERRUPTED = "soar: interrupted; continue with --resume (where nothing was saved yet, with the same command)\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, INTERRUPTED),
        (MemoryError(), 1, "soar: out of memory; free memory, then continue with --resume\n"),
        (OSError(28, "No space left on device", "x"), 1, "soar: x: No space left on device\n"),
        (UserError("https://a:b@hub \x1b[2J\n  two"), 1, "soar: https://[hidden]@hub \u27e8U+001B\u27e9[2J\n  two\n"),
        (BrokenPipeError("a worker is gone"), None, ""),
    ],
)
def test_errors_of_a_run(tmp_path, monkeypatch, capsys, error, code, message):
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
    for words in (["--steps", "3"], ["--train", "hard_only"], ["--train", "hard_only", "--out", "y"]):
        assert main(["student", "tiny", "--emit", "x", *words]) == 2
        assert "expected --train ARM and --out DIR, or --emit DIR" in " ".join(capsys.readouterr().err.split())
    assert load(None, ["evaluate.ks=1,4", "model.target_modules=[q_proj, v_proj]"]).evaluate.ks == (1, 4)
    assert load(None, ['student.sampling.stop="\\n"']).student.sampling.stop == ("\n",)
    for text in ("model.gguf_file=", 'model.gguf_file=""'):
        assert load("tiny", ["model.gguf_file=a.gguf", text]).model.gguf_file is None
    with pytest.raises(ConfigError, match=r"teacher\.steps"):
        load("tiny", ['teacher.steps=""'])


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_recipe_loads_and_can_be_planned(name, capsys):
    sets = ["model.path=m", "problems.source=x.jsonl"]
    words = [part for text in sets for part in ("--set", text)]
    assert dry_config(["run", name, *words], capsys) == load(name, sets).resolved()


def test_the_commands_of_the_cluster_files_are_understood(capsys):
    files = [(ROOT / "examples" / "cluster" / name).read_text(encoding="utf-8") for name in ("slurm.sh", "rayjob.yaml")]
    commands = re.findall(r"soar run ([^;]+?)(?: &\n|;)", "\n".join(files).replace("\\\n", " "))
    assert len(commands) == 3
    values = {'"${again[@]}"': "--model m", "$out": "x", "$address:$port": "10.0.0.1:6379"}
    values |= {"$workers": "15", "--resume": ""}
    for command in commands:
        for name, value in values.items():
            command = command.replace(name, value)
        cluster = dry_config(["run", *shlex.split(command)], capsys)["cluster"]
        assert cluster["workers"] and cluster["address"] in ("auto", "10.0.0.1:6379"), command
