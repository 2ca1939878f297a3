"""The command line: exit codes, messages instead of tracebacks, what is imported for what, and what arguments become."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from loop_helpers import TINY

import soar
from soar.cli import main
from soar.config import HARMLESS, RECIPES, ClusterConfig, ConfigError, load
from soar.report.text import summary_lines
from soar.types import UserError

SETS = [part for override in TINY for part in ("--set", override)]


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def dry_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The config that `soar run ...` would use."""
    assert main([*arguments, "--dry-run"]) == 0
    config, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    return dict(config)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], []])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    done = shell(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("HEAVY []\n")
    if arguments == ["--help"]:
        panels = re.split(r"─ (Start|Look|Take) ─", done.stdout)[1:]
        commands = {name: re.findall(r"│ (\w+) ", text) for name, text in zip(panels[::2], panels[1::2], strict=True)}
        words = re.sub(r"\s+", " ", done.stdout)
        assert "Recipes: code-1gpu, paper-math, " in words and "Studies: embedded, finding1, " in words
        assert commands == {
            "Start": ["init", "check", "screen", "run"],
            "Look": ["watch", "report", "doctor", "verify"],
            "Take": ["export", "eval", "student", "study", "review"],
        }
    if arguments == ["run", "--help"]:
        assert "\n   soar run --out runs/mine --max-hours 8          pause in time" in done.stdout, "lines stay lines"
    if arguments == ["--version"]:
        assert f"soar {soar.__version__}\n" in done.stdout


def test_report_and_dry_run_need_no_torch_and_dry_runs_write_nothing(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    done = shell("report", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'report.html'}\nHEAVY []\n")
    done = shell("run", "--dry-run", "--out", str(tmp_path / "run"), "--set", "seed=5", *SETS)
    assert (done.returncode, done.stdout[-9:], (tmp_path / "run").exists()) == (0, "HEAVY []\n", False)
    config, end = json.JSONDecoder().raw_decode(done.stdout)
    assert config == load(None, ["seed=5", *TINY]).resolved()
    assert done.stdout[end:].strip().startswith("memory per device\n") and "\nforecast\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--set", "teacher.stps=3"], "unknown key 'teacher.stps'; did you mean teacher.steps?"),
        (["run", "--set", "steps=3"], "'steps'; did you mean teacher.steps or student.steps or arms.steps?"),
        (["run", "--problems", "x.jsonl"], "no --model given: the recipe 'small-1gpu' leaves it to you"),
        (["check", "--problems", "x.jsonl"], "no --model given"),
        (["screen", "code-1gpu", "--out", "x"], "no --model given"),
        (["run", "--set", "evaluate.ks=1,x"], "evaluate.ks.1 = 'x': Input should be a valid integer"),
        (["run", "--set", "teacher.steps=-1"], "teacher.steps = -1: Input should be greater than or equal to 0"),
        (["run", "--set", "teacher.steps=many"], "teacher.steps = 'many': Input should be a valid integer"),
        (["run", "--set", "teacher.steps"], "--set 'teacher.steps': expected key=value"),
        (["run", "--set", "evaluate.ks=[64]"], "evaluate.ks asks for pass@64 from evaluate.attempts = 32"),
        (
            ["run", "small-1gpu", "--model", "m", "--set", "problems.format=totals"],
            '"totals" compares lists of numbers (`12, 20`) as text',
        ),
        (["run", "--workers", "many"], "--workers 'many': expected a number of processes, or the address"),
        (["run", "--assume", "x=y"], "--assume x=y: expected NAME=NUMBER"),
        (["run", "nowhere"], "no recipe 'nowhere': expected a TOML file or one of: "),
        (["run", "--model", "builtin:tiny", "--problems", "absent.jsonl"], "absent.jsonl"),
        (["run", "--model", "builtin:absent"], "model.path = 'builtin:absent': no such embedded model"),
        (["report", "absent"], "absent: no run folder: it has neither manifest.json nor metrics.jsonl"),
        (["run", "--resume"], "holds no run to resume (no manifest.json); leave out --resume to start one"),
        (["screen", "--attempts", "0", "--out", "x"], "screen.attempts = 0: a screening needs at least one attempt"),
        (["eval"], "--problems: expected the problem file"),
        (["eval", "--adapter", "nowhere", "--problems", "x.jsonl"], "--adapter nowhere: no adapter there"),
        (["student", "--train", "all", "--out", "x"], "--train 'all': expected one of hard, pq"),
        (["student", "--train", "pq:", "--out", "x"], "--train 'pq:': expected pq:PATH"),
        (["student", "--train", "hard:x", "--out", "x"], "--train 'hard:x': expected hard"),
        (["student", "tiny", "--train", "hard", "--out", "x"], "set arms.steps or arms.tokens for the arm hard_only"),
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
    more = ["--dry-run"] if "--assume" in arguments else []
    assert main([*arguments, *more]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("soar: ") or "\nsoar: " in printed.err
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--sett", "a=1"], "No such option: --sett"),
        (["run", "a", "b"], "unexpected extra argument"),
        (["walk"], "No such command"),
        (["export", "x", "--format", "csv", "--out", "y"], "'csv'"),
        (["review", "x", "--accept", "--reject"], "--accept and --reject exclude each other"),
        (["student", "--out", "x"], "--train"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


INTERRUPTED = "soar: interrupted; continue with --resume (where nothing was saved yet, with the same command)\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            KeyboardInterrupt(),
            130,
            INTERRUPTED,
        ),
        (MemoryError(), 1, "soar: out of memory; free memory, then continue with --resume\n"),
        (OSError(28, "No space left on device", "x"), 1, "soar: x: No space left on device\n"),
        (
            UserError("cannot reach https://ann:pw123456@hub with only-here-secret \x1b[2J"),
            1,
            "soar: cannot reach https://[hidden]@hub with [hidden] \u27e8U+001B\u27e9[2J\n",
        ),
        (
            UserError("one\n  two, of many words" + 20 * " word"),
            1,
            "soar: one\n  two, of many words" + 20 * " word" + "\n",
        ),
        (ZeroDivisionError("a bug"), None, ""),
        (BrokenPipeError("a worker is gone"), None, ""),
    ],
)
def test_errors_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: BaseException, code: int | None, message: str,
) -> None:  # fmt: skip
    def fail(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setenv("HUB_TOKEN", "only-here-secret")
    monkeypatch.setattr("soar.run.pipeline.execute", fail)
    arguments = ["run", "--out", str(tmp_path / "run")]
    if code is None:  # an error nobody foresaw keeps its traceback
        with pytest.raises(type(error), match=str(error)):
            main(arguments)
    else:
        assert main(arguments) == code
        assert capsys.readouterr().err == message


def test_a_missing_torch_is_named_with_what_installs_it(tmp_path: Path) -> None:
    done = shell("run", "--out", "x", without=("torch",), cwd=tmp_path)
    assert done.returncode == 1
    wanted = "soar: this command runs a model and needs torch, which is not installed: pip install 'soar-rl[train]'\n"
    assert done.stderr == wanted
    assert list(tmp_path.iterdir()) == []


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
    rollouts = summary["arms"]["ps"]["student_rollouts"]
    assert lines[5] == f"pq: the loop that found its questions took {rollouts:,} rollouts more"
    difference = summary["paired"]["ps - hard_only"]["2"]["difference"]
    assert lines[6].startswith(f"ps - hard_only: pass@2 difference {difference:+.4f} [")
    assert lines[-2:] == ["promotions: 1 in 1 outer steps", f"report: {out / 'report.html'}"]
    assert json.loads((out / "manifest.json").read_text())["command"] == ["soar", *arguments]
    assert main(arguments) == 1
    assert "give --resume to continue the run in it, or another --out" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


def test_the_table_keeps_to_a_terminal() -> None:
    ks = ("1", "4", "32")
    row = {
        "pass_at": dict.fromkeys(ks, 0.25),
        "interval_95": {k: [0.125, 0.375] for k in ks},
        "student_rollouts": 12345,
    }
    summary = {"arms": {"pq": row}, "paired": {}, "promotions": 1, "outer_steps": 2}
    wide, narrow = (summary_lines(summary, width) for width in (None, 80))
    assert [re.findall(r"pass@\d+", lines[0]) for lines in (wide, narrow)] == [
        ["pass@1", "pass@4", "pass@32"],
        ["pass@1", "pass@32"],
    ]
    assert narrow[1] == "pq                   12,345  0.2500 [0.1250, 0.3750]  0.2500 [0.1250, 0.3750]"


def test_shorthands_that_set_can_refine(capsys: pytest.CaptureFixture[str]) -> None:
    name = 'a "quoted" \\ name'
    words = ["run", "--model", name, "--problems", "x.jsonl", "--max-hours", "2", "--review", "--set", "seed=3"]
    config = dry_config(words, capsys)
    assert (config["model"]["path"], config["problems"]["source"], config["seed"]) == (name, "x.jsonl", 3)
    assert (config["limits"]["max_hours"], config["promotion"]["review"]) == (2, True)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_recipe_loads_and_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["model.path=m", "problems.source=x.jsonl"]
    assert (
        dry_config(["run", name, *(part for text in sets for part in ("--set", text))], capsys)
        == load(name, sets).resolved()
    )


def test_a_list_may_be_typed_with_commas() -> None:
    assert load(None, ["evaluate.ks=1,4", "model.target_modules=[q_proj, v_proj]"]).evaluate.ks == (1, 4)
    assert load(None, ['student.sampling.stop="\\n"']).student.sampling.stop == ("\n",)


def test_a_window_that_cannot_fill_is_named_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--set", "teacher.steps=2", "--set", "promotion.window=3"]
    assert main(["run", *few, "--dry-run"]) == 0
    assert "\npromotion.window = 3 is more than teacher.steps = 2: no student can ever" in capsys.readouterr().out
    assert main(["check", *few, "--no-model"]) == 1
    assert "FAIL     plan        promotion.window = 3" in capsys.readouterr().out


def test_an_empty_text_takes_an_optional_key_away() -> None:
    assert load("smollm2-sums", []).model.gguf_file is not None
    for text in ("model.gguf_file=", 'model.gguf_file=""'):
        assert load("smollm2-sums", [text]).model.gguf_file is None
    with pytest.raises(ConfigError, match=r"teacher\.steps"):
        load("smollm2-sums", ['teacher.steps=""'])


@pytest.mark.parametrize(
    ("word", "workers", "address"),
    [("3", 3, ""), ("auto", 0, "auto"), ("ray://head:10001", 0, "ray://head:10001"), ("0", 0, "")],
)
def test_workers_are_a_number_or_an_address(
    word: str, workers: int, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = dry_config(["run", "--workers", word], capsys)["cluster"]
    assert (cluster["workers"], cluster["address"]) == (workers, address)
    assert {key for key in HARMLESS if key.startswith("cluster.")} == {
        f"cluster.{k}" for k in ClusterConfig.model_fields
    }


def test_the_commands_of_the_cluster_files_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    files = ROOT / "examples" / "cluster"
    assert subprocess.run(["bash", "-n", str(files / "slurm.sh")], capture_output=True, text=True).stderr == ""
    script = (files / "slurm.sh").read_text(encoding="utf-8")
    (command,) = re.findall(r"soar run (.+?) &$", script.replace("\\\n", " "), re.MULTILINE)
    values = {
        '"${again[@]}"': "small-1gpu --model m",
        "$out": "runs/x",
        "$address:$port": "10.0.0.1:6379",
        "$workers": "15",
    }
    for name, value in values.items():
        command = command.replace(name, value)
    cluster = dry_config(["run", *shlex.split(command)], capsys)["cluster"]
    assert (cluster["workers"], cluster["address"], cluster["cpus"]) == (15, "10.0.0.1:6379", 7)
    job = yaml.safe_load((files / "rayjob.yaml").read_text(encoding="utf-8"))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    commands = re.findall(r"exec soar ([^;]+);", shlex.split(job["spec"]["entrypoint"])[2])
    assert len(commands) == 2
    for words in map(shlex.split, commands):
        cluster = dry_config([word for word in words if word != "--resume"], capsys)["cluster"]
        assert (cluster["workers"], cluster["address"]) == (group["replicas"], "auto")


def test_bash_completes_commands_options_and_keys() -> None:
    def offered(line: str) -> set[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "_SOAR_COMPLETE": "complete_bash", "COMP_WORDS": line}
        environment["COMP_CWORD"] = str(len(line.split(" ")) - 1)
        done = subprocess.run([sys.executable, "-m", "soar.cli"], env=environment, capture_output=True, text=True)
        return set(done.stdout.split())

    assert offered("soar wat") == {"watch"}
    assert offered("soar run --resu") == {"--resume"}
    assert {"trl", "merged"} < offered("soar export r --format ")
