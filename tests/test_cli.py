"""The command line: exit codes, messages instead of tracebacks, and what is imported for what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import house
import pytest
from loop_helpers import TINY, run_tiny

import soar
from soar import cli_common, cli_run
from soar.cli import main
from soar.config import RECIPES, ConfigError, load

SETS = [part for override in TINY for part in ("--set", override)]


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`soar ...` in a process of its own, followed by the heavy modules that it imported."""
    script = (
        "import sys, atexit\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        "from soar.cli import main\n"
        "sys.exit(main())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(house.ROOT), "COLUMNS": "100"},
    )


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["run", "--help"], 0), (["--version"], 0), ([], 1)])
def test_help_needs_no_torch(arguments: list[str], code: int) -> None:
    done = shell(*arguments)
    assert done.returncode == code
    assert done.stdout.endswith("HEAVY []\n")
    assert done.stderr == ""
    shown = f"soar {soar.__version__}" if "--version" in arguments else "usage: soar"
    assert shown in done.stdout


def test_report_needs_no_torch(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    done = shell("report", str(tmp_path))
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 'report.html'}\nHEAVY []\n"
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_dry_run_needs_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    done = shell("run", "--dry-run", "--out", str(tmp_path / "run"), "--set", "seed=5", *SETS)
    assert done.returncode == 0
    assert done.stdout.endswith("HEAVY []\n")
    assert list(tmp_path.iterdir()) == []
    config, end = json.JSONDecoder().raw_decode(done.stdout)
    assert config == load(None, ["seed=5", *TINY]).resolved()
    plan, _, costs = done.stdout[end:].strip().partition("\nmemory per device\n")
    first, *rest = plan.splitlines()
    assert first == "plan"
    assert [line.split()[0] for line in rest] == ["screening", "outer", "144", "hard_only", "pq", "evaluation"]
    assert "\nforecast\n" in costs and "it rests on" in costs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--set", "teacher.stps=3"], "unknown key 'teacher.stps'; did you mean 'steps'?"),
        (["run", "--set", "teacher.steps=-1"], "teacher.steps = -1: Input should be greater than or equal to 0"),
        (["run", "--set", "teacher.steps=many"], "teacher.steps = 'many': Input should be a valid integer"),
        (["run", "--set", "teacher.steps"], "--set 'teacher.steps': expected key=value"),
        (["run", "--set", "evaluate.ks=[64]"], "evaluate.ks asks for pass@64 from evaluate.attempts = 32"),
        (["run", "nowhere"], "no recipe 'nowhere': expected a TOML file or one of: "),
        (["run", "--problems", "absent.jsonl"], "absent.jsonl"),
        (["run", "--model", "builtin:absent"], "model.path = 'builtin:absent': no such embedded model"),
        (["report", "absent"], "absent: no run folder: it has neither manifest.json nor metrics.jsonl"),
        (["run", "--resume"], "holds no run to resume (no manifest.json); leave out --resume to start one"),
    ],
)
def test_refusals_are_one_message_and_exit_code_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "soar: " in printed.err
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_wrong_argument_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--sett", "a=1", "b", "c"])
    assert caught.value.code == 2
    assert "usage: soar" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("soar.run.pipeline.execute", stop)
    assert main(["run", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "soar: interrupted; continue with --resume\n"


def test_an_error_nobody_foresaw_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **named: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("soar.run.pipeline.execute", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["run", "--out", str(tmp_path / "run")])


def test_a_run_prints_its_table_and_records_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["run", "--out", str(out), "--quiet", *SETS, "--set", "evaluate.ks=[2,4]", "--set", "teacher.steps=1"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((out / "summary.json").read_text())
    assert lines[0].split() == ["arm", "rollouts", "pass@2", "pass@4"]
    for line, (arm, row) in zip(lines[1:5], summary["arms"].items(), strict=True):
        low, high = row["interval_95"]["2"]
        assert line.split()[:2] == [arm, f"{row['student_rollouts']:,}"]
        assert f"{row['pass_at']['2']:.4f} [{low:.4f}, {high:.4f}]" in line
    difference = summary["paired"]["ps - hard_only"]["2"]["difference"]
    assert (
        lines[5]
        == f"pq: the loop that found its questions took {summary['arms']['ps']['student_rollouts']:,} rollouts more"
    )
    assert lines[6].startswith(f"ps - hard_only: pass@2 difference {difference:+.4f} [")
    assert lines[-2:] == ["promotions: 1 in 1 outer steps", f"report: {out / 'report.html'}"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == ["soar", *arguments]
    assert main(arguments) == 1
    assert "give --resume to continue the run in it, or another --out" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


def test_the_table_keeps_to_a_terminal(tiny_run: Path) -> None:
    row = {"pass_at": {}, "interval_95": {}, "student_rollouts": 1_234_567, "search_rollouts": 89_000}
    for k in ("1", "4", "32"):
        row["pass_at"][k], row["interval_95"][k] = 0.25, [0.125, 0.375]  # type: ignore[index]
    summary = {"arms": {"pq": row}, "paired": {}, "promotions": 1, "outer_steps": 2, "wall_seconds": {}}
    wide, narrow = cli_run.summary_lines(summary, None), cli_run.summary_lines(summary, 80)
    assert [re.findall(r"pass@\d+", lines[0]) for lines in (wide, narrow)] == [
        ["pass@1", "pass@4", "pass@32"],
        ["pass@1", "pass@32"],
    ]
    assert narrow[1] == "pq                1,234,567  0.2500 [0.1250, 0.3750]  0.2500 [0.1250, 0.3750]"
    assert narrow[2] == "pq: the loop that found its questions took 89,000 rollouts more"
    assert max(map(len, narrow)) <= 80


def test_resume_with_another_config_names_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_tiny(tmp_path / "run", "teacher.steps=1", "arms.run=[]")
    arguments = ["run", "--out", str(tmp_path / "run"), "--resume", *SETS, "--set", "teacher.steps=4"]
    assert main([*arguments, "--set", "arms.run=[]"]) == 1
    assert "teacher.steps: 1 -> 4" in capsys.readouterr().err


def test_model_and_problems_are_shorthands_that_set_can_refine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = 'a "quoted" \\ name'
    assert main(["run", "--dry-run", "--model", name, "--problems", "x.jsonl", "--set", "seed=3"]) == 0
    config, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert (config["model"]["path"], config["problems"]["source"], config["seed"]) == (name, "x.jsonl", 3)


def test_every_recipe_that_the_command_line_names_exists() -> None:
    names = set(re.findall(r"soar run ([a-z][\w-]*)", cli_run.EXAMPLES)) | {"tiny"}
    source = Path(str(cli_common.__file__)).read_text(encoding="utf-8")
    names |= set(re.findall(r'recipe = "([\w-]+)"', source))
    assert len(names) > 1
    assert names <= {path.stem for path in RECIPES.glob("*.toml")}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_recipe_loads_and_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(name).name == name
    assert main(["run", name, "--dry-run"]) == 0
    assert "\nplan\n" in capsys.readouterr().out


def test_world_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["world", "build", "--out", str(tmp_path / "model"), "--steps", "1"]) == 0
    assert f"world model written to {tmp_path / 'model'} (1 steps)" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}


def test_a_missing_torch_is_named_with_what_installs_it(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom soar.cli import main\nsys.exit(main(['run', '--out', 'x']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(house.ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "soar: this command runs a model and needs torch, which is not installed: pip install 'soar-rl[train]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_running_totals_are_compared_as_text() -> None:
    message = r'problems\.format = "totals" compares .*; expected problems\.verifier = "exact", found \'math\''
    with pytest.raises(ConfigError, match=message):
        load("small-1gpu", ["problems.format=totals"])
    assert load("small-1gpu", ["problems.format=totals", "problems.verifier=exact"]).problems.format == "totals"
    assert load("small-1gpu", ["problems.format=totals", "problems.domain=science"]).problems.verifier == "math"


def test_an_empty_text_takes_an_optional_key_away() -> None:
    assert load("smollm2-sums", []).model.gguf_file is not None
    for text in ("model.gguf_file=", 'model.gguf_file=""'):
        assert load("smollm2-sums", [text]).model.gguf_file is None
    config = load("smollm2-sums", ['teacher.subject=""', 'model.revision=""'])
    assert config.teacher.subject == "" and config.model.revision is None
    with pytest.raises(ConfigError, match=r"teacher\.steps"):
        load("smollm2-sums", ['teacher.steps=""'])
