"""The Python interface does what the command line does; README, notebooks and examples run at tiny size."""

import functools
import importlib
import json
import linecache
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import code_exercises
import datasets
import jupytext
import pandas
import pytest
import torch
from helpers import ROOT, tiny_model, tiny_tokenizer
from loop_helpers import TINY, easy_problems, events, read_jsonl, sets, tiny_config
from safetensors.torch import load_file, save_file
from tables import cases, write_json
from test_record import content

import soar
from soar import api
from soar.cli import main
from soar.config import Config, ConfigError, load
from soar.domains.candidates import candidates
from soar.domains.code import flaw, read_tests
from soar.domains.world import get_world
from soar.engine.load import load_backbone
from soar.loop.teacher import Measurement
from soar.loop.write import QuestionSets
from soar.problems.pool import VerifierPool
from soar.types import UserError, Verdict

SETTINGS: dict[str, Any] = {key: json.loads(text) for key, text in (override.split("=") for override in TINY)}
NOTEBOOK = (ROOT / "tests" / "cases" / "notebook_cell.txt").read_text(encoding="utf-8")


def config_of(model: Any = None, problems: Any = None, beside: Path | None = None, **options: Any) -> Config:
    """The config that a call of the interface makes."""
    with api._call(model, problems, api.Options(**options), beside) as (config, _):
        return config


def test_settings_are_those_of_the_command_line():
    assert config_of(settings=SETTINGS) == tiny_config()
    mine = {"name": 'q"', "evaluate.ks": (1, 2)}
    config = config_of("a/model", Path("x.jsonl"), verifier="number", settings=mine, recipe=Path("small-1gpu"))
    assert (config.model.path, config.problems.source, config.problems.verifier) == ("a/model", "x.jsonl", "number")
    assert (config.name, config.evaluate.ks, config.teacher.datasets) == ('q"', (1, 2), 16)
    more = {"model.template_options": {"enable_thinking": False}, "model.gguf_file": None, "arms.real": Path("e.jsonl")}
    config = config_of(settings={**mine, **more, "teacher.steps": torch.tensor(3)})
    assert (config.model.template_options, config.model.gguf_file) == ({"enable_thinking": False}, None)
    assert (config.arms.real, config.teacher.steps) == ("e.jsonl", 3)
    importlib.import_module("soar.loop.evaluate")
    assert soar.evaluate is api.evaluate
    with pytest.raises(AttributeError, match="public names: Problem, __version__, "):
        soar.trian  # noqa: B018


@pytest.mark.parametrize(("name", "given", "says"), cases("api", "refused"))
def test_calls_that_are_refused(name, given, says):
    with pytest.raises(ConfigError, match=says):
        getattr(soar, name)(**given)


def test_train_is_the_run_of_the_command_line(tiny_run, tmp_path, capsys):
    run, said = soar.train(out=tmp_path / "run", settings=SETTINGS), capsys.readouterr().err
    assert said.index("what comes: screening") < said.index("held out, PS: pass@1") and "damaged" not in said
    figures = run.plot()
    assert figures.charts[0].title == "Pass rate against total tokens" and len(figures) == 7
    assert all(figure.axes[0].lines for figure in figures)
    wanted = json.loads((tiny_run / "summary.json").read_text())
    assert run.summary["arms"] == wanted["arms"]
    assert run.pass_at("ps", 4) == wanted["arms"]["ps"]["pass_at"]["4"]
    assert run.run.pq == read_jsonl(tiny_run / "pq.jsonl")
    assert run.report.is_file() and (run.student / "adapter_config.json").is_file()
    assert json.loads((run.path / "manifest.json").read_text())["command"] == ["soar.train"]


def test_evaluate_gives_the_counts_of_the_run(run, monkeypatch):
    """By its config, but for what is about its own problems: their columns and number, arms that need a solver."""
    path, adapters = run / "manifest.json", {"ps": run / "student", "pq": run / "arms" / "pq"}
    manifest = json.loads(path.read_text())
    gone = {"question_column": "gone", "answer_column": "gone", "limit": 1}
    gone |= {"revision": "gone", "split": "gone", "options": {"gone": 1}}
    manifest["config"]["problems"] |= {"format": "tiny", "verifier": "exact", **gone}
    manifest["config"]["arms"]["run"] = ["base", "pq_correct"]
    path.write_text(json.dumps(manifest))
    bare = Path(shutil.copy(run / "hard" / "test.jsonl", run / "bare.jsonl"))  # no evidence lies beside it
    monkeypatch.setattr(api, "measure", measured := Mock(wraps=api.measure))
    found = soar.evaluate(None, bare, adapters, recipe=str(run), settings={"arms.run": ["pq_correct"]})
    asked = measured.call_args.args[0].problems
    assert (asked.revision, asked.split, asked.options) == (None, "train", {}) and "pass@2" not in found.table
    recorded = {event["arm"]: event for event in events(run, "evaluation")}
    assert list(found) == ["base", "ps", "pq"] and len(found.plot()[0].axes[0].lines) == 3
    for name, result in found.items():
        assert result["correct"] == recorded[name]["correct"], name
        shown = [{k: result[key][k] for k in ("1", "4")} for key in ("pass_at", "interval_95")]
        assert shown == [recorded[name][key] for key in ("pass_at", "interval_95")]
    assert len(soar.evaluate(None, bare, recipe=str(run), settings={"problems.limit": 2}).problems) == 2
    file = run / "student" / "adapter_model.safetensors"
    save_file({**(tensors := load_file(file)), (name := min(tensors)): tensors[name] + math.inf}, file)
    with pytest.raises(ConfigError, match="the adapter ps holds NaN or infinity"):
        soar.evaluate(None, bare, adapters, recipe=str(run), quiet=True)
    manifest["config"]["problems"]["source"] = str(bare)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="gone"):  # of the run's own problems they stay
        soar.evaluate(recipe=str(run), quiet=True)


def test_a_teacher_reward_of_ones_own(tiny_run, tmp_path):
    seen: list[tuple[int, list[float | None]]] = []

    def by_number(sets: QuestionSets, measured: Measurement, step: int) -> list[float | None]:
        seen.append((step, measured.reward_G))
        return [float(k) if step == 0 else math.nan for k in range(len(sets.problems_G_Q))]

    given, paid = candidates(tiny_config()).problems, functools.wraps(len)(functools.partial(by_number))
    out = tmp_path / "\\\u00a0hf_abcdefghijklmnopqrstuv"  # in the manifest escaped, and hidden
    with pytest.raises(ConfigError, match=r"teacher_reward returned \[nan, nan, nan\]: expected a number or"):
        soar.train(None, given, out, recipe="tiny", settings=SETTINGS, teacher_reward=paid, quiet=True)
    assert Path(f"{out}.problems.jsonl").is_file(), "the run goes on with it"
    (step,), plain = events(out, "outer_step"), events(tiny_run, "outer_step")[0]
    assert step["teacher_reward_G"] == [0.0, 1.0, 2.0] and step["teacher_grad_norm"] > 0
    assert (step["reward_G"], step["promoted"]) == (plain["reward_G"], plain["promoted"]), "what is measured stays"
    assert [number for number, _ in seen] == [0, 1] and seen[0][1] == step["reward_G"]
    for wrong in (lambda sets, measured: [], lambda *_, must: []):
        with pytest.raises(ConfigError, match=r"teacher_reward: found <function .*, expected a function of three "):
            soar.train(recipe="none", teacher_reward=wrong)
    for bad in (0.5, [0.5], [0.5, None, "much"]):
        with pytest.raises(ConfigError, match=r"expected a number or None for each of 3 datasets"):
            api._paid(lambda *_, bad=bad: bad, SimpleNamespace(problems_G_Q=[[], [], []]), None, 0)


def test_a_verifier_function_is_named_by_file(tmp_path):
    assert api.verifier_name(easy_problems, tmp_path, Mock()) == f"{ROOT / 'tests' / 'loop_helpers.py'}:easy_problems"
    assert api.verifier_name("exact", tmp_path, Mock()) == "exact"
    for bad in (lambda completions: [], Path.exists, len, functools.partial(easy_problems, 3)):
        with pytest.raises(ConfigError, match="expected a function at the top level of a file"):
            api.verifier_name(bad, tmp_path, Mock())
    cell, scope = "/tmp/ipykernel_1/123.py", dict[str, Any]({"__name__": "__main__"})
    linecache.cache[cell] = (len(NOTEBOOK), None, NOTEBOOK.splitlines(keepends=True), cell)
    exec(compile(NOTEBOOK, cell, "exec"), scope)
    name = api.verifier_name(scope["mine"], tmp_path / "run", Mock())
    assert name == f"{tmp_path / 'run.mine_verifier.py'}:mine"
    with VerifierPool(name, workers=1) as pool:
        assert pool.check(["1/2 x", "1/3"], ["0.5", "0.5"]) == [Verdict.CORRECT, Verdict.WRONG]
    write_json(tmp_path / "run" / "manifest.json", {})
    (tmp_path / "run.mine_verifier.py").write_text("of the run")
    with pytest.raises(ConfigError, match=r"began with another .*run\.mine_verifier\.py"):
        [config_of(verifier=scope["mine"], beside=tmp_path / out) for out in ("other", "run")]
    for function in ("other", "third"):
        with pytest.raises(ConfigError, match=f"{function}: it uses what cannot be written into a file"):
            api.verifier_name(scope[function], tmp_path, Mock())


def test_problems_and_models_of_any_kind(tmp_path, monkeypatch):
    rows = [{"question": "last 57", "answer": "7", "level": 1.0}, {"question": "last 31", "answer": "1", "level": None}]
    problems = [soar.Problem("\ud83d", r["question"], r["answer"], {"level": r["level"]}) for r in rows]
    for given in (rows, pandas.DataFrame(rows), datasets.Dataset.from_list(rows), problems):
        read = candidates(config_of("builtin:tiny", given, tmp_path / "run", recipe="tiny")).problems
        assert [[p.question, p.answer, p.extra["level"]] for p in read] == [[*row.values()] for row in rows]
    with pytest.raises(UserError, match=r"cannot be written: .*Choose another `out`"):
        soar.screen("builtin:tiny", rows, out=tmp_path / "run.problems.jsonl" / "run", recipe="tiny", quiet=True)
    before = {*tmp_path.rglob("*")}
    for mine, more in (("/no/model", {}), ("builtin:tiny", {"verifier": "nope"}), ("builtin:tiny", {"resume": True})):
        with pytest.raises(UserError):
            soar.train(mine, rows, tmp_path / "runs" / "new", recipe="tiny", quiet=True, **more)
    assert {*tmp_path.rglob("*")} == before, "a refused call leaves nothing"
    model, more = tiny_model(), {"tokenizer": tiny_tokenizer(), "recipe": "tiny"}
    backbone = load_backbone(config_of(model, None, tmp_path / "run", settings={"model.device": "cpu"}, **more).model)
    assert torch.equal(backbone.model.lm_head.weight, model.lm_head.weight)
    assert backbone.tokenizer.encode("a b") == more["tokenizer"].encode("a b")
    write_json(tmp_path / "run" / "manifest.json", {})  # from here on a run needs what lies beside it
    before = content(tmp_path)
    for mine, given in ((tiny_model(seed=1), problems), (model, problems[:1])):
        with pytest.raises(ConfigError, match=r"run holds a run that began with another .*run\.[mp].*; give that one"):
            config_of(mine, given, tmp_path / "run", **more)
    config_of(model, problems, tmp_path / "run", **more)
    assert content(tmp_path) == before
    with pytest.raises(ConfigError, match="a loaded LlamaForCausalLM without tokenizer="):
        soar.check(model, [])
    monkeypatch.chdir(tmp_path / "run")
    assert config_of(None, problems, Path("."), recipe="tiny").problems.source == str(tmp_path / "run.problems.jsonl")


def test_check_returns_what_it_prints():
    settings = SETTINGS | {"problems.limit": 0}
    found = soar.check("builtin:tiny", easy_problems(8), recipe="tiny", settings=settings, samples=4)
    assert [finding.name for finding in found.findings][:2] == ["problems", "golds"]
    assert {"student", "teacher"} < {finding.name for finding in found.findings}
    assert found.works in (True, None) and str(found).startswith("ok       problems ")
    (bars,) = found.plot()
    assert sum(bar.get_height() for bar in bars.axes[0].patches) > 0 and found._repr_html_().startswith("<pre>ok ")


def test_a_screening_counts_and_goes_on(tiny_run, tmp_path):
    rows = [row for row in read_jsonl(tiny_run / "hard" / "screen.jsonl") if "id" in row]
    wanted = [(row["id"], row["successes"], row["truncated"]) for row in rows]
    first = soar.screen(out=tmp_path / "screen", settings=SETTINGS)
    assert str(first).startswith("12 problems, 4 attempts each") and len(first.hard) == 12
    assert sum(bar.get_height() for bar in first.plot()[0].axes[0].patches) == 12
    assert [(p.id, s.successes, s.truncated) for p, s in first] == wanted
    assert list(soar.screen(out=tmp_path / "screen", settings=SETTINGS, resume=True)) == list(first)
    settings = SETTINGS | {"arms.pq_from": str(tiny_run), "screen.from_run": str(tiny_run)}
    with pytest.warns(UserWarning, match=r"the arm solvable is left out: screening found no problem at 0 < p < 0\.7"):
        run = soar.arms(out=tmp_path / "run", names=["pq", "solvable"], settings=settings, quiet=True)
    with pytest.raises(ConfigError, match=r"no pass@1 of an arm 'solvable'; it has base \(k = 1, 4\), pq \(k = "):
        run.pass_at("solvable")
    assert list(run.summary["arms"]) == ["base", "pq"] and run.summary["outer_steps"] == 0


SMALL = (
    *TINY, "model.adapter=full", "problems.format=tiny", "student.sampling.max_tokens=10", "teacher.sampling.max_tokens=32",
)  # fmt: skip


@pytest.mark.parametrize(("name", "wanted"), cases("api", "said"))
def test_a_script_runs_and_a_notebook_is_its_pair(name, wanted, tmp_path, monkeypatch, capsys):
    path = next(path for folder in ("notebooks", "examples") if (path := ROOT / folder / f"{name}.py").is_file())
    text, shown_as = path.read_text(encoding="utf-8"), str(path)
    if path.parent.name == "notebooks":
        cells, twins = (jupytext.read(one)["cells"] for one in (path, path.with_suffix(".ipynb")))
        shown = [[(cell["cell_type"], cell["source"]) for cell in some] for some in (cells, twins)]
        assert shown[0] == shown[1], f"write it anew: jupytext --to ipynb {path}"
        shown_as = f"<cells of {name}>"  # in a notebook no file holds what is typed
        linecache.cache[shown_as] = (len(text), None, text.splitlines(keepends=True), shown_as)
    monkeypatch.setenv("SOAR_NOTEBOOK_MODEL", "builtin:tiny")
    monkeypatch.setattr("soar.api.load", lambda recipe, keys, **more: load(recipe, [*keys, *SMALL], **more))
    monkeypatch.setenv("SOAR_NOTEBOOK_OUT", str(tmp_path))
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "run")])
    exec(compile(text, shown_as, "exec"), {"__name__": "__main__", "__file__": shown_as})
    assert re.search(wanted, said := capsys.readouterr().out, re.DOTALL), said


def test_code_exercises_have_solutions_that_pass(tmp_path):
    path = tmp_path / "a.jsonl"
    code_exercises.main([str(path), "--count", "48", "--levels", *"12345678"])
    rows = read_jsonl(path)
    assert len({row["question"] for row in rows}) == 48
    for row in rows:
        assert flaw(read_tests(row["answer"])) is None
        exec("\n".join([row["solution"], row["answer"]]), {})


def test_the_commands_of_the_readme_work_in_order(tmp_path, monkeypatch, capsys):
    """With the embedded model and small numbers in place of their own."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": p.question, "answer": p.answer} for p in get_world("tiny").problems("hard", 12, 0)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = (ROOT / "README.md").read_text(encoding="utf-8").replace("4000000", "4000")
    blocks = re.findall(r"^```console\n(.*?)^```", page.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("soar ")]
    assert [line.split()[1] for line in lines] == ["check", "screen", "run", "run", "run"]
    room = ("student.sampling.max_tokens=48", "teacher.sampling.max_tokens=24")
    for line in lines:
        words = ["builtin:tiny" if word.startswith("Qwen/") else word for word in shlex.split(line, comments=True)[1:]]
        assert main([*words, *sets(*SMALL, "problems.verifier=exact", *room)]) == 0, (line, capsys.readouterr())
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert [*summary["arms"]] == ["base", "hard_only", "base_t", "ps", "pq"]
