"""The run folder: who may write where, what a resume accepts, what survives a crash, what damage is found."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from loop_helpers import read_jsonl, tiny_config

from soar.config import Config
from soar.files import finite, write_atomic, write_json
from soar.run import checkpoint as checkpoints
from soar.run import folder as record
from soar.run.checkpoint import Checkpoint, CheckpointError
from soar.run.folder import RunFolder, RunFolderError


def begin(path: Path, config: Config | None = None) -> RunFolder:
    return RunFolder(path, config or tiny_config(), ["soar", "run"])


def checkpoint(step: int) -> Checkpoint:
    tensors = {"teacher/a": torch.full((2, 3), float(step)), "b": torch.arange(4).float()[::2]}
    return Checkpoint("loop", {"step": step, "window": [0.1, step / 3]}, tensors)


def test_manifest(tmp_path: Path) -> None:
    config = tiny_config("name=mine", "seed=7")
    with RunFolder(tmp_path / "deep" / "run", config, ["soar", "run", "--set", "seed=7"]):
        pass
    manifest = json.loads((tmp_path / "deep" / "run" / "manifest.json").read_text())
    assert manifest["schema"] == record.SCHEMA
    assert (manifest["name"], manifest["seed"]) == ("mine", 7)
    assert manifest["command"] == ["soar", "run", "--set", "seed=7"]
    assert manifest["config"] == config.resolved()
    assert manifest["hashes"] == {}
    assert set(manifest["versions"]) == {"soar", "python", "platform", *record.PACKAGES}
    assert manifest["versions"]["torch"] == torch.__version__


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    begin(tmp_path).__exit__(None, None, None)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RunFolderError, match="is not empty; give --resume to continue the run in it, or another --out"):
        begin(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not empty and holds no run; give another --out"):
        begin(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds no run to resume \(no manifest.json\)"):
        RunFolder(tmp_path, tiny_config(), [], resume=True)
    with pytest.raises(RunFolderError, match="is a file, expected a folder"):
        begin(tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    with pytest.raises(RunFolderError, match="in use by another process"):
        RunFolder(tmp_path, tiny_config(), [], resume=True)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from soar.config import Config\n"
        "from soar.run.folder import RunFolder, RunFolderError\n"
        "try:\n    RunFolder(Path(sys.argv[2]), Config(), [], resume=True)\n"
        "except RunFolderError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "in use by another process; wait for it or choose another --out" in done.stdout
    folder.__exit__(None, None, None)
    RunFolder(tmp_path, tiny_config(), [], resume=True).__exit__(None, None, None)


def test_the_lock_is_released_when_a_resume_is_refused(tmp_path: Path) -> None:
    begin(tmp_path).__exit__(None, None, None)
    with pytest.raises(RunFolderError, match=r"teacher\.steps: 2 -> 3"):
        RunFolder(tmp_path, tiny_config("teacher.steps=3"), [], resume=True)
    RunFolder(tmp_path, tiny_config(), [], resume=True).__exit__(None, None, None)


def test_resume_names_the_keys_that_cannot_change(tmp_path: Path) -> None:
    begin(tmp_path).__exit__(None, None, None)
    manifest = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path, tiny_config("student.optimizer.lr=0.5", "seed=1", "threads=2"), [], resume=True)
    lines = str(caught.value).split("\n  ")
    assert lines[0].endswith("these keys decide results and cannot change on --resume:")
    assert lines[1] == "seed: 0 -> 1"
    assert lines[2].startswith("student.optimizer.lr: ")
    assert lines[2].endswith(" -> 0.5")
    assert len(lines) == 3  # threads is not among them
    assert (tmp_path / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    "change",
    [
        "name=other",
        "threads=2",
        "model.device=cpu",
        "model.chunk=3",
        "model.micro_batch_tokens=512",
        "problems.verify_workers=1",
        "arms.save_steps=3",
        "limits.max_hours=1.5",
        "limits.max_tokens=9",
    ],
)
def test_where_and_how_fast_may_change_on_resume(tmp_path: Path, change: str) -> None:
    begin(tmp_path).__exit__(None, None, None)
    with RunFolder(tmp_path, tiny_config(change), [], resume=True) as folder:
        assert folder.manifest["config"] == tiny_config().resolved()


def test_every_harmless_key_is_a_key() -> None:
    def keys(section: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in section.items():
            found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
        return found

    assert set(record.HARMLESS) <= keys(Config().resolved())


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (1, "written by soar 0.1; resume with that version"),
        (2, "written by soar 0.1; resume with that version"),
        (99, r"of schema 99, this version reads \d+; resume with that version"),
        ("x", "of schema 'x'"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, schema: int | str, said: str) -> None:
    begin(tmp_path).__exit__(None, None, None)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    write_json(tmp_path / "manifest.json", {**manifest, "schema": schema})
    with pytest.raises(RunFolderError, match=rf"manifest\.json is {said}"):
        RunFolder(tmp_path, tiny_config(), [], resume=True)
    assert json.loads((tmp_path / "manifest.json").read_text())["schema"] == schema


def test_changed_model_or_data_is_refused(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.note_hashes(model="a" * 64, problems="b" * 64)
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        folder.note_hashes(model="a" * 64)
        with pytest.raises(
            RunFolderError, match=r"problems changed since the run began \(bbbbbbbbbbbb then, c{12} now"
        ):
            folder.note_hashes(model="a" * 64, problems="c" * 64)
        assert folder.manifest["hashes"] == {"model": "a" * 64, "problems": "b" * 64}


def test_checkpoints_come_back_exactly(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        assert folder.load() is None
        (tmp_path / "state" / "notes").mkdir(parents=True)  # a person's own
        for step in range(4):
            folder.save(checkpoint(step))
        found = folder.load()
        kept = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert found is not None
    assert (found.stage, found.data) == ("loop", {"step": 3, "window": [0.1, 1.0]})
    assert set(found.tensors) == {"teacher/a", "b"}
    assert torch.equal(found.tensors["teacher/a"], torch.full((2, 3), 3.0))
    assert torch.equal(found.tensors["b"], torch.tensor([0.0, 2.0]))
    assert kept == ["000002", "000003", "latest.json", "notes"]


def test_jsonl_files_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
        folder.save(checkpoint(0))
        folder.append("metrics.jsonl", [{"event": "outer_step", "step": 0}])
        folder.append("pq.jsonl", [{"question": "q"}])
        folder.append("hard/screen.jsonl", [{"id": "x"}])
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        folder.load()
        assert folder.rows("metrics.jsonl") == [{"event": "screen"}]
        assert folder.rows("pq.jsonl") == []
        assert folder.rows("hard/screen.jsonl") == [{"id": "x"}]  # evidence is kept: it depends on no checkpoint


def test_without_a_checkpoint_everything_is_cut(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        assert folder.load() is None
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_lost_lines_are_found(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
        folder.append("questions.jsonl", [{"step": 0}, {"step": 1}])
        folder.save(checkpoint(0))
        folder.append("metrics.jsonl", [{"event": "outer_step"}])
        os.truncate(tmp_path / "questions.jsonl", 5)
        metrics = (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises(CheckpointError, match=r"questions\.jsonl has 5 bytes, but had 24 at the checkpoint"):
            folder.load()
        assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
        (tmp_path / "questions.jsonl").unlink()
        with pytest.raises(CheckpointError, match=r"questions\.jsonl has 0 bytes"):
            folder.load()


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    with begin(tmp_path) as folder:
        folder.save(checkpoint(0))
        path = tmp_path / "state" / "000000" / name
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged: its checksum is not the recorded one"):
            folder.load()
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
            folder.load()


DAMAGE: dict[str, tuple[str, bytes | None]] = {
    "bit flip in the tensors": ("state/000002/tensors.safetensors", b"flip"),
    "truncated tensors": ("state/000002/tensors.safetensors", b"half"),
    "no tensors": ("state/000002/tensors.safetensors", None),
    "bit flip in the state": ("state/000002/state.json", b"flip"),
    "empty state": ("state/000002/state.json", b""),
    "pointer is no JSON": ("state/latest.json", b"{"),
    "pointer is a list": ("state/latest.json", b"[]"),
    "pointer without a number": ("state/latest.json", b"{}"),
    "lost lines": ("metrics.jsonl", b"half"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used_and_that_is_said(tmp_path: Path, kind: str) -> None:
    name, content = DAMAGE[kind]
    with begin(tmp_path) as folder:
        for step in range(3):
            folder.append("metrics.jsonl", [{"event": "outer_step", "step": step}])
            folder.save(checkpoint(step))
    path = tmp_path / name
    old = path.read_bytes()
    if content is None:
        path.unlink()
    elif content == b"half":
        os.truncate(path, len(old) // 2 if name != "metrics.jsonl" else len(old) - 1)
    else:
        path.write_bytes(old[:-2] + bytes([old[-2] ^ 1]) + old[-1:] if content == b"flip" else content)
    pointer_only = name == "state/latest.json"  # then the newest checkpoint is still whole
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        found = folder.load()
        assert found is not None
        assert found.data["step"] == (2 if pointer_only else 1)
        assert torch.equal(found.tensors["teacher/a"], torch.full((2, 3), float(found.data["step"])))
        assert len(folder.rows("metrics.jsonl")) == found.data["step"] + 1
        assert len(folder.notes) == 1
        assert "damaged" in folder.notes[0] or "lines are lost" in folder.notes[0]
        assert f"Going on from the checkpoint before, {tmp_path}/state/00000" in folder.notes[0]
        folder.append("metrics.jsonl", [{"event": "outer_step", "step": 3}])
        folder.save(checkpoint(3))
        kept = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert kept == ["00000" + ("2" if pointer_only else "1"), "000003", "latest.json"]  # the damaged one went, not this
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        found = folder.load()
        assert found is not None
        assert (found.data["step"], folder.notes) == (3, [])


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    with begin(tmp_path) as folder:
        folder.save(checkpoint(0))
        (tmp_path / "state" / "latest.json").write_text(content)
        shutil.rmtree(tmp_path / "state" / "000000")
        with pytest.raises(CheckpointError, match=r"latest\.json is damaged.*No other checkpoint is left"):
            folder.load()
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        RunFolder(tmp_path, tiny_config(), [], resume=True)


@pytest.mark.parametrize("moment", ["save_file", "write_json", "replace"])
def test_a_crash_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def crash(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with begin(tmp_path) as folder:
        folder.save(checkpoint(0))
        folder.append("metrics.jsonl", [{"event": "outer_step", "step": 0}])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints.os if moment == "replace" else checkpoints, moment, crash)
            folder.save(checkpoint(1))
        found = folder.load()
        assert found is not None
        assert found.data["step"] == 0
        assert folder.rows("metrics.jsonl") == []
        folder.save(checkpoint(1))
        found = folder.load()
        assert found is not None
        assert found.data["step"] == 1


def test_a_half_written_last_line_is_cut_off(tmp_path: Path) -> None:
    with begin(tmp_path) as folder:
        folder.append("metrics.jsonl", [{"a": 1}])
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write('{"text": "no end \u00e4'.encode()[:-1])
        assert folder.rows("metrics.jsonl") == [{"a": 1}]
        folder.append("metrics.jsonl", [{"b": 2}])
        assert folder.rows("metrics.jsonl") == [{"a": 1}, {"b": 2}]
        assert folder.rows("absent.jsonl") == []


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    row = {"kl": math.nan, "deep": [{"x": -math.inf}, (math.inf, 1.5)], "text": "NaN", "n": 3, "yes": True, "no": None}
    with begin(tmp_path) as folder:
        folder.append("metrics.jsonl", [row])
    wanted = {"kl": None, "deep": [{"x": None}, [None, 1.5]], "text": "NaN", "n": 3, "yes": True, "no": None}
    assert read_jsonl(tmp_path / "metrics.jsonl") == [wanted]
    assert finite(row) == wanted
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "summary.json", row)


def test_write_atomic_keeps_the_old_file_until_the_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a" / "file"
    write_atomic(target, b"old")

    def crash(*args: Any) -> None:
        assert target.read_bytes() == b"old"
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(record.os, "fsync", crash)
        write_atomic(target, b"new content")
    assert target.read_bytes() == b"old"
    write_atomic(target, b"new content")
    assert target.read_bytes() == b"new content"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("line", [b"\x00" * 20, b'{"id": "b", "n"', b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_line_of_evidence_is_made_again_and_of_the_metrics_refused(tmp_path: Path, line: bytes) -> None:
    with begin(tmp_path) as folder:
        for name in ("hard/screen.jsonl", "metrics.jsonl"):
            folder.append(name, [{"id": "a"}, {"id": "b"}, {"id": "c"}])
            rows = (tmp_path / name).read_bytes().split(b"\n")
            (tmp_path / name).write_bytes(b"\n".join([rows[0], line, *rows[2:]]))
        assert folder.rows("hard/screen.jsonl") == [{"id": "a"}]
        assert folder.notes == [f"{tmp_path}/hard/screen.jsonl:2 is damaged: what follows is made again"]
        folder.append("hard/screen.jsonl", [{"id": "b"}])
        assert folder.rows("hard/screen.jsonl") == [{"id": "a"}, {"id": "b"}]
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is damaged: .*; restore the line from a copy"):
            folder.rows("metrics.jsonl")
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
