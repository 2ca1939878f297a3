"""The Python interface does what the command line does, and takes functions where it says so."""

from __future__ import annotations

import functools
import json
import linecache
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from helpers import ROOT, tiny_model, tiny_tokenizer
from loop_helpers import TINY, easy_problems, events, read_jsonl, tiny_config

import soar
from soar import api
from soar.config import ConfigError
from soar.domains.candidates import candidates
from soar.engine.load import load_backbone

EXAMPLES = ROOT / "examples"
EXAMPLES_HERE = ("python_api", "custom_teacher_reward", "custom_verifier")
SETTINGS: dict[str, Any] = {}
for override in TINY:
    key, _, text = override.partition("=")
    SETTINGS[key] = json.loads(text) if text[0] in "[-0123456789" else text


def test_settings_are_those_of_the_command_line() -> None:
    with api._config(None, None, None, None, None, None, SETTINGS) as config:
        assert config == tiny_config()
    mine = {"name": 'q"', "evaluate.ks": (1, 2)}
    with api._config("a/model", None, Path("x.jsonl"), None, None, "number", mine) as config:
        pass
    assert (config.model.path, config.problems.source, config.problems.verifier) == ("a/model", "x.jsonl", "number")
    assert (config.name, config.evaluate.ks) == ('q"', (1, 2))
    with pytest.raises(ConfigError, match=r"did you mean teacher\.steps"):
        soar.check(settings={"teacher.stps": 3})


def test_train_is_the_run_of_the_command_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, said = soar.train(out=tmp_path / "run", settings=SETTINGS), capsys.readouterr().err
    assert said.index("what comes: screening") < said.index("held out, PS: pass@1") and "damaged" not in said
    figures = run.plot()
    assert figures.charts[0].title == "Pass rate against total tokens" and len(figures) == 7
    assert run._repr_html_().count("<img") == 7 and all(figure.axes[0].lines for figure in figures)
    wanted = json.loads((tiny_run / "summary.json").read_text())
    assert run.summary["arms"] == wanted["arms"]
    assert run.pass_at("ps", 4) == wanted["arms"]["ps"]["pass_at"]["4"]
    assert run.run.pq == read_jsonl(tiny_run / "pq.jsonl")
    assert run.report.is_file() and (run.student / "adapter_config.json").is_file()
    assert json.loads((run.path / "manifest.json").read_text())["command"] == ["soar.train"]
    assert soar.train(out=run.path, settings=SETTINGS, resume=True).summary["arms"] == wanted["arms"]


def test_arms_without_an_outer_loop(tiny_run: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"arms.pq_from": str(tiny_run), "screen.from_run": str(tiny_run)}
    run = soar.arms(out=tmp_path / "run", names=["pq"], settings=settings, quiet=True)
    assert list(run.summary["arms"]) == ["base", "pq"] and run.summary["outer_steps"] == 0


def test_evaluate_gives_the_counts_of_the_run(tiny_run: Path) -> None:
    settings = SETTINGS | {"problems.format": "tiny", "problems.verifier": "exact"}
    adapters = {"ps": tiny_run / "student", "pq": tiny_run / "arms" / "pq"}
    found = soar.evaluate("builtin:tiny", tiny_run / "hard" / "test.jsonl", adapters, recipe="tiny", settings=settings)
    recorded = {event["arm"]: event for event in events(tiny_run, "evaluation")}
    assert list(found) == ["base", "ps", "pq"] and len(found.plot()[0].axes[0].lines) == 3
    for name, result in found.items():
        assert result.correct == recorded[name]["correct"], name
        assert {str(k): v for k, v in result.pass_at.items()} == recorded[name]["pass_at"]
        assert {str(k): list(v) for k, v in result.interval_95.items()} == recorded[name]["interval_95"]


def test_a_teacher_reward_of_ones_own(tiny_run: Path, tmp_path: Path) -> None:
    seen: list[soar.QuestionSet] = []

    def by_number(question_set: soar.QuestionSet) -> float | None:
        seen.append(question_set)
        return None if question_set.dataset == 2 else float(question_set.dataset)

    run = soar.train(out=tmp_path / "run", settings=SETTINGS, teacher_reward=functools.partial(by_number))
    steps, plain = events(run.path, "outer_step"), events(tiny_run, "outer_step")
    assert [step["teacher_reward_G"] for step in steps] == [[0.0, 1.0, None]] * 2
    assert steps[0]["reward_G"] == plain[0]["reward_G"], "what is measured does not change"
    assert [step["promoted"] for step in steps] == [step["promoted"] for step in plain]
    assert steps[0]["teacher_grad_norm"] > 0
    assert [(one.step, one.dataset) for one in seen] == [(s, k) for s in (0, 1) for k in (0, 1, 2)]
    assert [one.grounded for one in seen[:3]] == steps[0]["reward_G"]
    assert {(len(one.questions), len(one.improvement)) for one in seen} == {(4, 2)}


@pytest.mark.parametrize(("value", "shown"), [("high", "'high'"), (float("nan"), "nan")])
def test_teacher_rewards_that_are_refused(tmp_path: Path, value: Any, shown: str) -> None:
    with pytest.raises(
        ConfigError, match=f"teacher_reward returned {shown} for dataset 0 of step 0: expected a number"
    ):
        soar.train(out=tmp_path / "run", settings=SETTINGS, teacher_reward=lambda question_set: value)


def test_a_verifier_function_is_named_by_file(tmp_path: Path) -> None:
    name = api.verifier_name(easy_problems, tmp_path)
    assert name == f"{ROOT / 'tests' / 'loop_helpers.py'}:easy_problems"
    assert api.verifier_name("exact", tmp_path) == "exact"
    for bad in (lambda completions: [], Path.exists, len, functools.partial(easy_problems, 3)):
        with pytest.raises(ConfigError, match="expected a function at the top level of a file"):
            api.verifier_name(bad, tmp_path)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("helper = html.unescape", ""),
        ("helper = str.strip", "helper = <method 'strip'"),
        ("helper = functools.partial(int, base=2)", "helper = functools.partial"),
        ("helper = [].append", "helper = <built-in method append"),
        ("helper = object()", "malformed node|invalid syntax"),
    ],
)
def test_a_function_of_a_notebook_is_written_down_or_named(tmp_path: Path, line: str, error: str) -> None:
    text = "def grade(completion, answer):\n    return float(helper(completion) == answer) + KEYS['plus']\n"
    name = f"<cell {line}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    cell = types.ModuleType("notebook_cell")
    exec(f"import functools, html\nKEYS = {{'plus': 0.5}}\n{line}", cell.__dict__)
    exec(compile(text, name, "exec"), cell.__dict__)
    if error:
        with pytest.raises(ConfigError, match=f"grade: it uses what cannot be written(?s:.*)({error})"):
            api.verifier_name(cell.grade, tmp_path)
        return
    file, _, function = api.verifier_name(cell.grade, tmp_path).rpartition(":")
    assert runpy.run_path(file)[function]("7", "7") == 1.5


def test_problems_of_any_kind() -> None:
    rows = [{"question": "last 57", "answer": "7", "level": 1.0}, {"question": "last 31", "answer": "1", "level": None}]
    problems = [soar.Problem(str(i), r["question"], r["answer"], {"level": r["level"]}) for i, r in enumerate(rows)]
    for given in (rows, pandas.DataFrame(rows), datasets.Dataset.from_list(rows), problems):
        with api._config("builtin:tiny", None, given, None, "tiny", None, {}) as config:
            read = candidates(config).problems
        assert [(p.question, p.answer, p.extra["level"]) for p in read] == [
            ("last 57", "7", 1.0),
            ("last 31", "1", None),
        ]
    with pytest.raises(ConfigError, match="found a row 'x'"), api._config(None, None, ["x"], None, None, None, None):
        pass


def test_a_loaded_model_with_its_tokenizer() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with api._config(model, tokenizer, None, None, "tiny", None, {"model.device": "cpu"}) as config:
        backbone = load_backbone(config.model)
    assert torch.equal(backbone.model.lm_head.weight, model.lm_head.weight)
    assert backbone.tokenizer.encode("a b") == tokenizer.encode("a b")
    with pytest.raises(ConfigError, match="a loaded LlamaForCausalLM without tokenizer="):
        soar.check(model, [])


def test_check_returns_what_it_prints() -> None:
    found = soar.check(
        "builtin:tiny", easy_problems(8), recipe="tiny", settings=SETTINGS | {"problems.limit": 0}, samples=4
    )
    assert [finding.name for finding in found.findings][:2] == ["problems", "golds"]
    assert {"student", "teacher"} < {finding.name for finding in found.findings}
    assert found.works in (True, None) and str(found).startswith("ok       problems ")
    (bars,) = found.plot()
    assert sum(bar.get_height() for bar in bars.axes[0].patches) > 0 and found._repr_html_().startswith("<pre>ok ")


def test_a_screening_counts_goes_on_and_names_rows_that_are_too_long(tiny_run: Path, tmp_path: Path) -> None:
    rows = [row for row in read_jsonl(tiny_run / "hard" / "screen.jsonl") if "id" in row]
    first = soar.screen(out=tmp_path / "screen", settings=SETTINGS)
    assert str(first).startswith("12 problems, 4 attempts each") and len(first.hard) == 12
    assert sum(bar.get_height() for bar in first.plot()[0].axes[0].patches) == 12
    assert [(p.id, s.successes, s.truncated) for p, s in first] == [
        (row["id"], row["successes"], row["truncated"]) for row in rows
    ]
    assert list(soar.screen(out=tmp_path / "screen", settings=SETTINGS, resume=True)) == list(first)
    with pytest.raises(ConfigError, match="no problem can be used"):
        soar.screen(settings=SETTINGS | {"student.sampling.max_tokens": 10_000}, quiet=True)


def test_the_package_loads_without_torch_and_evaluate_stays_a_function() -> None:
    script = "import sys, soar; soar.Problem('a', 'b', 'c'); assert 'torch' not in sys.modules\n"
    script += "import soar.loop.evaluate; assert soar.evaluate is soar.api.evaluate"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
    with pytest.raises(AttributeError, match="public names: Problem, QuestionSet, "):
        soar.trian  # noqa: B018


@pytest.mark.parametrize("name", EXAMPLES_HERE)
def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path / "run")])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    wanted = {
        "python_api": r"problems are never solved(?s:.*)promotion questions, report in(?s:.*)student: pass@1 ",
        "custom_teacher_reward": r"step 0: measured \[(?s:.*)step 1: measured \[",
        "custom_verifier": r"last_digit: [1-9].*\nexact: ",
    }
    assert re.search(wanted[name], said), said
