"""The command line: exit codes, messages instead of tracebacks, what is imported for what, and what arguments become."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from loop_helpers import TINY, sets

import soar
from soar.cli import main
from soar.config import RECIPES, ConfigError, load
from soar.types import UserError


def shell(*arguments: str, without: tuple[str, ...] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`soar ...` in a process of its own, followed by the heavy modules that it imported."""
    script = (
        "import sys, atexit\n"
        f"sys.modules.update(dict.fromkeys({without!r}))\n"
        "heavy = {'torch', 'transformers', 'peft'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & {n for n, m in sys.modules.items() if m})))\n"
        "from soar.cli import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, cwd=cwd)


def dry_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The config that `soar run ...` would use."""
    main([*arguments, "--dry-run"])  # 1 where the problem file is made up
    config, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    return dict(config)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_needs_no_torch(arguments):
    done = shell(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("HEAVY []\n")
    if arguments == ["--help"]:
        panels = re.split(r"─ (Start|Look|Take) ─", done.stdout)[1:]
        commands = {name: re.findall(r"│ (\w+) ", text) for name, text in zip(panels[::2], panels[1::2], strict=True)}
        words = re.sub(r"\s+", " ", done.stdout)
        assert "Recipes: code-1gpu, " in words and "Studies: embedded, eps, " in words
        assert commands == {
            "Start": ["init", "check", "screen", "run"],
            "Look": ["watch", "report", "doctor", "verify"],
            "Take": ["export", "eval", "student", "measure", "study", "review"],
        }
    else:
        assert "\n   soar run --out runs/mine --max-hours 8          pause in time" in done.stdout, "lines stay lines"


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
    def fail(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("soar.run.pipeline.execute", fail)
    arguments = ["run", "--quiet", "--out", str(tmp_path / "run")]
    if code is None:  # an error nobody foresaw keeps its traceback
        with pytest.raises(type(error), match=str(error)):
            main(arguments)
    else:
        assert main(arguments) == code
        assert capsys.readouterr().err == message


def test_a_missing_torch_is_named_with_what_installs_it(tmp_path):
    done = shell("run", "--out", "x", without=("torch",), cwd=tmp_path)
    wanted = "soar: this command runs a model and needs torch, which is not installed: pip install 'soar-rl[train]'\n"
    assert (done.returncode, list(tmp_path.iterdir())) == (1, []) and done.stderr.endswith(wanted)


def test_a_run_prints_its_table_and_records_its_command(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["run", "tiny", "--out", str(out), "--quiet", *sets(*TINY, "evaluate.ks=[2,4]", "teacher.steps=1")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((out / "summary.json").read_text())
    assert lines[0].split() == ["arm", "rollouts", "pass@2", "pass@4"]
    for line, (arm, row) in zip(lines[1:5], summary["arms"].items(), strict=True):
        low, high = row["interval_95"]["2"]
        assert line.split()[:2] == [arm, f"{row['student_rollouts'] + row.get('search_rollouts', 0):,}"]
        assert f"{row['pass_at']['2']:.4f} [{low:.4f}, {high:.4f}]" in line
    assert lines[-2:] == ["promotions: 1 in 1 outer steps", f"report: {out / 'report.html'}"]
    assert json.loads((out / "manifest.json").read_text())["command"] == ["soar", *arguments]


def test_shorthands_that_set_can_refine(capsys):
    name = 'a "quoted" \\ name \U0001f600'
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
