"""A run folder that something happened to: every command goes on or says in one message what is wrong; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TINY, events, read_jsonl, run_tiny, tiny_config, without_clock

from soar.cli import main
from soar.files import write_json
from soar.run import folder as record
from soar.run.checkpoint import Checkpoint, CheckpointError
from soar.run.folder import RunFolder, RunFolderError

SETS = [part for override in TINY for part in ("--set", override)]


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint("loop", {"step": step}, {"w": torch.full((3,), float(step))})


def three_steps(path: Path) -> Path:
    """A folder with lines for steps 0, 1, 2 and a checkpoint after each; those of steps 1 and 2 are kept."""
    with RunFolder(path, tiny_config(), ["soar", "run"]) as folder:
        for step in range(3):
            folder.append("metrics.jsonl", [{"event": "outer_step", "step": step}])
            folder.append("questions.jsonl", [{"question": f"q{step}"}])
            folder.save(checkpoint(step))
    return path


def resumed(path: Path) -> tuple[Any, list[str]]:
    """What a resume finds, and what it says."""
    with RunFolder(path, tiny_config(), [], resume=True) as folder:
        return folder.load(), folder.notes


def content(path: Path) -> dict[str, bytes]:
    return {
        p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"
    }


def change(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def test_a_line_that_is_whole_but_changed_is_found_by_its_checksum(tmp_path: Path) -> None:
    three_steps(tmp_path)
    change(tmp_path / "questions.jsonl", b"q2", b"q7")  # the checkpoint before knows nothing of it
    found, notes = resumed(tmp_path)
    assert found.data == {"step": 1}
    assert notes == [
        f"{tmp_path}/questions.jsonl was changed: its lines up to the checkpoint have another checksum than the recorded "
        f"one. Going on from the checkpoint before, {tmp_path}/state/000001"
    ]
    assert read_jsonl(tmp_path / "questions.jsonl") == [{"question": "q0"}, {"question": "q1"}]


def test_a_line_that_every_checkpoint_counts_on_is_not_replaced(tmp_path: Path) -> None:
    three_steps(tmp_path)
    change(tmp_path / "questions.jsonl", b"q0", b"q8")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=r"questions\.jsonl was changed: .*No other checkpoint is left; restore"):
        resumed(tmp_path)
    assert content(tmp_path) == before


def test_lines_that_are_cut_and_written_again_have_a_checksum_of_their_own(tmp_path: Path) -> None:
    three_steps(tmp_path)
    shutil.rmtree(tmp_path / "state" / "000002")
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        assert folder.load() is not None
        folder.append("questions.jsonl", [{"question": "another and longer"}])
        folder.save(checkpoint(5))
        found = folder.load()
    assert found is not None
    assert found.data == {"step": 5}
    assert resumed(tmp_path)[1] == []


@pytest.mark.parametrize("kind", ["missing", "pipe", "dangling", "deep"])
def test_without_its_pointer_the_newest_whole_checkpoint_is_used(tmp_path: Path, kind: str) -> None:
    three_steps(tmp_path)
    pointer = tmp_path / "state" / "latest.json"
    spoil(pointer, kind)
    found, notes = resumed(tmp_path)
    assert found.data == {"step": 2}
    word = "damaged" if kind == "deep" else "missing"
    assert len(notes) == 1
    assert notes[0].startswith(f"{pointer} is {word}")
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_a_first_checkpoint_without_a_pointer_is_used_or_made_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tiny_config(), []) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
        folder.save(checkpoint(0))
    (tmp_path / "state" / "latest.json").unlink()
    found, notes = resumed(tmp_path)
    assert (found.data, notes) == ({"step": 0}, [])
    (tmp_path / "state" / "000000" / "state.json").write_text("{")
    assert resumed(tmp_path) == (None, [])


def test_a_lost_state_folder_does_not_drop_what_is_recorded(tmp_path: Path) -> None:
    three_steps(tmp_path)
    shutil.rmtree(tmp_path / "state")
    before = content(tmp_path)
    for name in ("questions.jsonl", "metrics.jsonl"):
        with pytest.raises(
            RunFolderError, match=r"holds no checkpoint, but the run was past its first: .* restore state/"
        ):
            resumed(tmp_path)
        assert content(tmp_path) == before
        (tmp_path / name).unlink()
        del before[name]
    assert resumed(tmp_path) == (None, [])


def test_checksums_that_name_no_files_are_damage(tmp_path: Path) -> None:
    three_steps(tmp_path)
    for name in ("latest.json", "000002/checksums.json"):
        spoil(tmp_path / "state" / name, "object")
    found, notes = resumed(tmp_path)
    assert found.data == {"step": 1}
    assert any("no checksum of state.json is recorded" in note for note in notes)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "hard/screen.jsonl", "manifest.json"])
def test_what_lies_under_the_name_of_a_file_is_named_and_nothing_waits_for_it(
    tmp_path: Path, name: str, kind: str
) -> None:
    three_steps(tmp_path)
    spoil(tmp_path / name, kind)
    words = {"folder": "a folder", "pipe": "a pipe or a device", "dangling": "a link that leads nowhere"}[kind]
    with impatient(), pytest.raises(RunFolderError, match=rf"{name} is {words}.* restore it from a copy"):
        if name == "manifest.json":
            record.recorded_config(tmp_path)
        resumed(tmp_path)
    assert not (tmp_path / "nowhere").exists()


def test_json_that_is_nested_too_deep_is_damage(tmp_path: Path) -> None:
    three_steps(tmp_path)
    spoil(tmp_path / "state" / "000002" / "checksums.json", "deep")
    spoil(tmp_path / "state" / "latest.json", "deep")
    assert resumed(tmp_path)[0].data == {"step": 1}
    spoil(tmp_path / "manifest.json", "deep")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: .*restore it from a copy"):
        resumed(tmp_path)


@pytest.mark.parametrize("hashes", [None, [], {"model": 3}])
def test_hashes_of_another_form_are_damage(tmp_path: Path, hashes: Any) -> None:
    three_steps(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    write_json(tmp_path / "manifest.json", {**manifest, "hashes": hashes})
    with pytest.raises(RunFolderError, match=r"manifest\.json is damaged: hashes is no object of texts"):
        resumed(tmp_path)


def test_other_versions_are_said(tmp_path: Path) -> None:
    three_steps(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    now = manifest["versions"]["torch"]
    manifest["versions"]["torch"] = "1.0"
    write_json(tmp_path / "manifest.json", manifest)
    assert resumed(tmp_path)[1] == [
        f"begun with other versions (torch 1.0 -> {now}): what follows may differ in rounding from what would have followed"
    ]


def test_what_is_in_the_way_of_a_checkpoint_goes_and_what_is_in_the_way_of_a_file_is_named(tmp_path: Path) -> None:
    three_steps(tmp_path)
    for name in ("000003", "000003.tmp"):
        (tmp_path / "state" / name).write_text("no folder")
    (tmp_path / ".x.tmp").mkdir()
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        folder.load()
        folder.save(checkpoint(3))
        found = folder.load()
    assert found is not None
    assert found.data == {"step": 3}
    pointer = tmp_path / "state" / "latest.json"
    spoil(pointer, "folder")
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        folder.load()
        with pytest.raises(
            record.StorageError,
            match=r"latest\.json cannot be written: Is a directory. Something else lies under that name",
        ):
            folder.save(checkpoint(4))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    with pytest.raises(RunFolderError, match="the name is not UTF-8, which checkpoints need"):
        RunFolder(bad, tiny_config(), [])
    assert not bad.exists()
    with RunFolder(tmp_path / "run", tiny_config(), ["soar", "run", "--problems", str(bad)]) as folder:
        folder.append("questions.jsonl", [{"question": "lone \ud800"}])
        assert folder.rows("questions.jsonl") == [{"question": "lone \ud800"}]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["command"][-1] == str(bad)


def spoil(path: Path, kind: str) -> None:
    """Put something else under the name of a file."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to(path.parent / "nowhere"),
        "deep": lambda: path.write_bytes(b"[" * 100_000),
        "object": lambda: path.write_bytes(b"{}\n"),
        "empty": lambda: path.write_bytes(b""),
        "zeros": lambda: path.write_bytes(b"\0" * 500),
        "no text": lambda: path.write_bytes(b"\xff\xfe{" * 50),
        "numbers": lambda: path.write_bytes(
            b'{"event": 1e999, "step": ' + b"9" * 4000 + b', "reward_G": {"a": []}}\n' * 3
        ),
    }
    makers[kind]()


@contextmanager
def impatient(seconds: int = 60) -> Iterator[None]:
    """Whatever waits, as for the other end of a pipe, is ended with an error."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it waits for ever"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


KINDS = ["missing", "folder", "pipe", "dangling", "deep", "object", "empty", "zeros", "no text", "numbers"]


def look(folder: Path, elsewhere: Path) -> dict[str, int]:
    """Exit codes of every command that looks at a run folder."""
    commands = {
        "doctor": ["doctor", str(folder)],
        "report": ["report", str(folder), "--out", str(elsewhere / "page.html")],
        "watch": ["watch", str(folder), "--once"],
        "review": ["review", str(folder)],
        "questions": ["export", str(folder), "--format", "jsonl", "--out", str(elsewhere / "questions")],
        "adapter": ["export", str(folder), "--format", "peft", "--out", str(elsewhere / "adapter")],
    }
    with impatient():
        return {name: main(command) for name, command in commands.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_commands_that_look_at_a_damaged_folder_end_with_a_message(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """All files but the manifest are spoilt at once."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for name in (*content(folder), "review.json", "paused.json"):
        if name != "manifest.json":
            spoil(folder / name, kind)
    codes = look(folder, tmp_path)
    said = capsys.readouterr()
    assert codes["review"] == codes["questions"] == codes["adapter"] == 1
    assert codes["doctor"] == (kind != "missing")  # a manifest alone is a run that was just begun
    assert codes["report"] == codes["watch"] == 0
    assert [line.startswith("soar: ") for line in said.err.splitlines()] == [
        True
    ] * 3  # one message for each that failed
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize("kind", ["missing", "folder", "deep", "object", "no text"])
def test_commands_on_a_folder_with_a_damaged_manifest(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = content(folder)
    spoil(folder / "manifest.json", kind)
    codes = look(folder, tmp_path)
    assert set(codes.values()) <= {0, 1}
    assert codes["questions"] == 1
    assert main(["run", "--resume", "--quiet", "--out", str(folder)]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "restore it from a copy" in said.err
    assert {name: data for name, data in content(folder).items() if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }


def test_a_finished_run_gets_its_lost_files_again(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    wanted = content(folder)
    for name in ("hard/train.jsonl", "summary.json", "hashes.json", "report.html", "pq_labels.jsonl"):
        (folder / name).unlink(missing_ok=True)
    (folder / "student" / "adapter_model.safetensors").write_bytes(b"half")
    shutil.rmtree(folder / "arms")
    run_tiny(folder, resume=True)
    found = content(folder)
    for name in ("hard/train.jsonl", "student/adapter_model.safetensors", "arms/pq/adapter_model.safetensors"):
        assert found[name] == wanted[name], name
    assert without_clock(json.loads(found["summary.json"])) == without_clock(json.loads(wanted["summary.json"]))
    assert main(["doctor", str(folder)]) == 0


def test_exports_refuse_what_was_changed_after_the_run(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    weights = folder / "student" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (folder / "pq.jsonl").write_bytes((folder / "pq.jsonl").read_bytes()[:-20])
    assert main(["export", str(folder), "--format", "peft", "--out", str(tmp_path / "a")]) == 1
    assert "adapter_model.safetensors was changed after the run" in capsys.readouterr().err
    assert main(["export", str(folder), "--format", "jsonl", "--out", str(tmp_path / "b")]) == 1
    assert "pq.jsonl was changed after the run" in capsys.readouterr().err
    (folder / "hashes.json").unlink()  # as in a run that is not finished
    weights.write_bytes(data[: len(data) // 2])
    change(folder / "pq.jsonl", b"\n", b"\nx\n")
    assert main(["export", str(folder), "--format", "peft", "--out", str(tmp_path / "a")]) == 1
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err
    assert main(["export", str(folder), "--format", "jsonl", "--out", str(tmp_path / "b")]) == 1
    assert "pq.jsonl:2: no JSON" in capsys.readouterr().err


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first block of held-out problems."""
    out = tmp_path_factory.mktemp("runs") / "run"

    def stop(self: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
        real(self, name, rows)
        if name == "state/evaluation.jsonl" and "id" in rows[0]:
            raise KeyboardInterrupt

    real = RunFolder.append
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "append", stop)
        run_tiny(out)
    return out


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("hard/screen.jsonl", b'"successes"', b'"succesess"'),
        ("hard/screen.jsonl", b'"truncated": ', b'"truncated": 9'),
        ("hard/screen.jsonl", b'"evidence"', b'"evidense"'),
        ("state/evaluation.jsonl", b'"correct": [', b'"correct": [9'),
        ("state/evaluation.jsonl", b'"correct": [', b'"correct": [1, '),
        ("state/evaluation.jsonl", b'"arms"', b'"armies"'),
    ],
)
def test_evidence_that_cannot_be_is_made_again(
    evaluated: Path,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    old: bytes,
    new: bytes,
) -> None:
    out = Path(shutil.copytree(evaluated, tmp_path / "run"))
    change(out / name, old, new)
    assert main(["run", "--resume", "--quiet", "--out", str(out)]) == 0
    first = 1 if b"evid" in old or b"arms" in old else 2
    assert f"{out}/{name}:{first} is damaged: what follows is made again" in capsys.readouterr().err
    assert (out / "hard" / "screen.jsonl").read_bytes() == (tiny_run / "hard" / "screen.jsonl").read_bytes()
    assert without_clock(events(out)) == without_clock(events(tiny_run))


def test_a_hard_set_that_became_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A count of the screening changes to another that could be: no line is damaged, but the problems would be others."""
    out = tmp_path / "run"
    sets = [*SETS, "--set", "screen.max_successes=3", "--max-tokens", "1"]
    assert main(["run", "--quiet", "--out", str(out), *sets]) == 3
    screen = out / "hard" / "screen.jsonl"
    screen.write_bytes(screen.read_bytes().replace(b'"successes": 0', b'"successes": 4', 1))
    before = content(out)
    assert main(["run", "--resume", "--quiet", "--out", str(out)]) == 1
    assert "hard_set changed since the run began" in capsys.readouterr().err
    del before["paused.json"]
    assert content(out) == before
