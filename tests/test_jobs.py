"""File mode: the training sets of an outer step go out, adapters or pass rates come back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import random_stack
from loop_helpers import BRIEF, events, read_jsonl, run_tiny, without_clock
from safetensors.torch import load_file
from tables import change
from test_record import content

from soar.cli import main
from soar.config import ModelConfig
from soar.engine.load import load_backbone
from soar.loop.population import Population
from soar.loop.teacher import OuterLoop
from soar.run.interrupts import Stopped
from soar.run.setup import save_adapter
from soar.types import UserError

SETS = ["0-0", "0-1", "1-0", "1-1"]
LOOP = (
    "model.adapter=lora", "model.lora_rank=4", "student.repeats=2", "teacher.datasets=2", 'arms.run=["base","ps"]',
    "student.optimizer.lr=0.01", *BRIEF,
)  # fmt: skip
FILES = (*LOOP, "backend.kind=files")


def give(place: Path, name: str, file: str = "", **result: Any) -> None:
    (place / "results" / f"{file or name}.json").write_text(json.dumps({"set": name, **result}))


def begun(out: Path) -> Path:
    """A run that waits for its first students; returns the folder of the sets."""
    with pytest.raises(Stopped, match=r"outer step 0 waits for students of the 4 training sets .* soar measure"):
        run_tiny(out, *FILES)
    return out / "sets" / "0000"


def test_the_students_of_a_native_run_given_back_make_that_run(tmp_path, monkeypatch):
    plain = OuterLoop.teach

    def teach(self: OuterLoop, question_sets: Any) -> Population:
        population = plain(self, question_sets)
        for p, name in enumerate(SETS):
            save_adapter(self.env.backbone, population.stack.select([p]), tmp_path / f"{self.state.step}" / name)
        return population

    monkeypatch.setattr(OuterLoop, "teach", teach)
    run_tiny(tmp_path / "native", *LOOP)
    monkeypatch.undo()
    spent = [row["tokens"]["students"] for row in events(tmp_path / "native", "outer_step")]
    begun(tmp_path / "files")
    for step, tokens in enumerate(spent):
        place = tmp_path / "files" / "sets" / f"{step:04d}"
        for name in SETS:
            written = {row["answer"] for row in read_jsonl(tmp_path / "native/questions.jsonl") if row["step"] == step}
            rows = read_jsonl(place / name / "train.jsonl")
            assert len(rows) == (4, 6)[step] and {row["answer"] for row in rows} <= written
            generated = {"tokens": tokens - sum(spent[:step][-1:])} if name == SETS[1] else {}
            give(place, name, adapter=f"{tmp_path}/{step}/{name}", **generated)
        if step < len(spent) - 1:
            with pytest.raises(Stopped, match=f"outer step {step + 1} waits"):
                run_tiny(tmp_path / "files", *FILES, resume=True)
    run_tiny(tmp_path / "files", *FILES, resume=True)

    def told(folder: Path) -> Any:
        left_out = ("student_first", "student_last")
        rows = [{k: v for k, v in row.items() if k not in left_out} for row in without_clock(events(folder))]
        weights = (f"{name}/adapter_model.safetensors" for name in ("teacher", "student"))
        return rows, [(folder / name).read_bytes() for name in (*weights, "questions.jsonl", "pq.jsonl")]

    assert events(tmp_path / "native", "promotion")
    assert told(tmp_path / "files") == told(tmp_path / "native")


def other_rank(place: Path) -> None:
    wide = load_backbone(ModelConfig(adapter="lora", lora_rank=8))
    save_adapter(wide, random_stack(wide, 1), place / "wide")
    give(place, "1-1", adapter="../wide")


def half_the_weights(place: Path) -> None:
    shutil.copytree(place / "start", place / "half")
    os.truncate(place / "half" / "adapter_model.safetensors", 500)
    give(place, "1-1", adapter="../half")


UNUSABLE: tuple[tuple[Callable[[Path], object], str], ...] = (
    (lambda place: (place / "results" / "0-1.json").unlink(), "no result of the set 0-1"),
    (lambda place: give(place, "0-1", pass_rate=1.5), r"0-1.json: pass_rate = 1.5: .* less than or equal to 1"),
    (lambda place: give(place, "0-1", pass_rate=float("nan")), r"0-1.json: pass_rate = nan"),
    (lambda place: give(place, "0-1", "again", pass_rate=0.5), "set 0-1 has another result"),
    (lambda place: give(place, "7-0", pass_rate=0.5), "set = '7-0': expected one of 0-0, 0-1, 1-0, 1-1"),
    (lambda place: give(place, "0-1"), "expected pass_rate"),
    (lambda place: give(place, "0-1", accuracy=0.5), "unknown key 'accuracy'; known keys: set, pass_rate"),
    (lambda place: (place / "results" / "0-1.json").write_text("{"), "0-1.json cannot be read: .*; give the result of"),
    (lambda place: give(place, "0-1", adapter="../none"), "adapter of set 0-1: .*none"),
    (other_rank, "adapter of set 1-1: .*rank 8, expected model.lora_rank = 4.*; give it again"),
    (half_the_weights, "adapter of set 1-1: .*; give it again"),
    (lambda place: None, r"set \d-\d is promoted.* add its adapter"),
)


def test_to_go_on_with_code_of_ones_own_takes_trust(tmp_path):
    (own := tmp_path / "own.py").write_text("def grade(completions, **_):\n    return [0.0] * len(completions)\n")
    with pytest.raises(Stopped, match=r"continue with: soar measure \S+ --trust-run$"):
        run_tiny(tmp_path / "run", *FILES, f'problems.verifier="{own}:grade"')
    assert " --trust-run`." in (tmp_path / "run" / "sets" / "0000" / "README.md").read_text()


def test_a_result_that_cannot_be_used_is_named_and_changes_nothing(tmp_path, waiting, capsys):
    run = shutil.copytree(waiting, tmp_path / "run")
    place = run / "sets" / "0000"
    state = content(run / "state")

    def anew(**result: Any) -> None:
        shutil.rmtree(place / "results")
        (place / "results").mkdir()
        for name in SETS:
            give(place, name, **result)

    for spoil, message in UNUSABLE:
        anew(pass_rate=0.5)
        spoil(place)
        with pytest.raises(UserError, match=message):
            run_tiny(run, *FILES, resume=True)
        assert content(run / "state") == state
    anew(pass_rate=0.25, adapter="../start")
    change(place / "start" / "adapter_config.json", b'"builtin:tiny"', b'"other"')
    with pytest.raises(Stopped, match="outer step 1 waits"):
        run_tiny(run, *FILES, resume=True)
    assert "start was trained on other, but is used on builtin:tiny" in capsys.readouterr().err
    assert [step["best_pass_rate"] for step in events(run, "outer_step")] == [0.25]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun(tmp_path_factory.mktemp("files") / "run").parent.parent


def test_trl_trains_the_sets_of_an_outer_step(tmp_path, monkeypatch, waiting):
    pytest.importorskip("trl")
    import train_sets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run, screened = tmp_path / "run", "hard/screen.jsonl"
    words = ["student", str(waiting), "--quiet", "--emit", str(run), "--set", "student.repeats=1"]
    assert main(words) == 3  # by the config and screening of a run
    assert (run / screened).read_bytes() == (waiting / screened).read_bytes()
    place = run / "sets" / "0000"
    train_sets.main(run)
    start = load_file(place / "start" / "adapter_model.safetensors")
    trained = load_file(place / "0-0" / "adapter" / "adapter_model.safetensors")
    assert start.keys() == trained.keys() and any(not start[key].equal(trained[key]) for key in start)
    assert main(["measure", str(run), "--quiet"]) == 3
    assert events(run, "outer_step")[0]["tokens"]["students"] > 0
    assert len(events(run, "outer_step")) == 1 and (run / "sets" / "0001" / "jobs.json").is_file()
