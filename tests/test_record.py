"""The run folder: who may write where, what a resume accepts, what survives a crash or a full disk, what damage is found.
Promotions on hold: a person accepts or rejects, and the run does exactly that."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import events, outcome, read_jsonl, run_tiny, tiny_config
from tables import cases

from soar.cli import main
from soar.config import HARMLESS, Config, flat
from soar.files import check_place, write_atomic, write_json
from soar.run import folder as folders
from soar.run.checkpoint import Checkpoint
from soar.run.folder import RunFolder, RunFolderError, examine, recorded_config
from soar.run.interrupts import Stopped
from soar.types import Interrupted, UserError


def checkpoint(step: int, size: int = 6) -> Checkpoint:
    tensors = {"teacher/a": torch.full((2, size), float(step)), "b": torch.arange(4).float()[::2]}
    return Checkpoint("loop", {"step": step, "window": [0.1, step / 3]}, tensors)


def steps(path: Path, count: int = 3) -> Path:
    """A folder with lines for `count` steps and a checkpoint after each; those of the last two are kept."""
    with RunFolder(path, tiny_config(), ["soar", "run"]) as folder:
        folder.append("hard/screen.jsonl", [{"id": "x"}])
        for step in range(count):
            folder.append("metrics.jsonl", [{"event": "outer_step", "step": step}])
            folder.append("questions.jsonl", [{"question": f"q{step}"}])
            folder.save(checkpoint(step))
    return path


def resumed(path: Path, *overrides: str) -> tuple[Any, list[str]]:
    """What a resume finds, and what it says."""
    with RunFolder(path, tiny_config(*overrides), [], True, (notes := []).append) as folder:
        return folder.load(), notes


REFUSED = UserError("a--resume.jsonl: no question column")


@pytest.mark.parametrize("error", [Interrupted("out of memory"), RunFolderError("changed"), MemoryError(), REFUSED])
def test_a_folder_in_which_nothing_was_worked_out_goes_with_a_refusal_alone(tmp_path, error):
    with pytest.raises(type(error)), RunFolder(tmp_path / "new" / "run", tiny_config(), []):
        raise error
    assert (tmp_path / "new" / "run").exists() == (tmp_path / "new").exists() == (error is not REFUSED)


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def spoil(path: Path, kind: str) -> None:
    """Put something else under the name of a file."""
    makers: dict[str, Callable[[bytes], object]] = {
        "missing": lambda old: None,
        "folder": lambda old: path.mkdir(),
        "pipe": lambda old: os.mkfifo(path),
        "dangling": lambda old: path.symlink_to(path.parent / "nowhere"),
        "deep": lambda old: path.write_bytes(b"[" * 100_000),
        "object": lambda old: path.write_bytes(b"{}\n"),
        "zeros": lambda old: path.write_bytes(b"\0" * 500),
        "no text": lambda old: path.write_bytes(b"\xff\xfe{" * 50),
        "flip": lambda old: path.write_bytes(old[:-2] + bytes([old[-2] ^ 1]) + old[-1:]),
        "half": lambda old: path.write_bytes(old[: len(old) // 2]),
        "cut": lambda old: path.write_bytes(old[:-1]),
    }
    old = path.read_bytes() if path.is_file() else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    makers[kind](old)


def test_a_resume_names_the_keys_that_cannot_change_and_frees_the_lock(tmp_path, monkeypatch):
    before = content(steps(tmp_path))
    with pytest.raises(RunFolderError) as caught:
        resumed(tmp_path, "student.optimizer.lr=0.5", "seed=1", "threads=2")
    first, *keys = str(caught.value).split("\n  ")
    assert first.endswith("these keys decide results and cannot change on --resume:")
    assert keys == ["seed: 0 -> 1", f"student.optimizer.lr: {tiny_config().student.optimizer.lr} -> 0.5"]
    assert content(tmp_path) == before
    harmless = ("name=other", "model.device=cpu", "model.chunk=3", "arms.save_steps=3", "limits.max_hours=1.5")
    assert len(resumed(tmp_path, *harmless)[1]) == len(harmless)
    assert set(HARMLESS) <= flat(Config().resolved()).keys()
    with RunFolder(tmp_path / "one", tiny_config(f"problems.source={os.path.relpath(__file__)}"), []) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
    for place in (".", tmp_path):  # where the run began, and elsewhere
        monkeypatch.chdir(place)
        assert resumed(tmp_path / "one", f"problems.source={__file__}") == (None, []), "another way to the same file"
    with pytest.raises(RunFolderError, match=r"problems\.source: "):
        resumed(tmp_path / "one", f"problems.source={Path(__file__).with_name('helpers.py')}")


def test_other_versions_are_said_and_another_model_is_refused(tmp_path):
    with RunFolder(tmp_path, tiny_config(), []) as folder:
        folder.note_hashes(model="a" * 64, problems="b" * 64)
        folder.append("metrics.jsonl", [{"event": "screen"}])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    now, manifest["versions"]["torch"] = manifest["versions"]["torch"], "1.0"
    write_json(tmp_path / "manifest.json", manifest)
    with RunFolder(tmp_path, tiny_config(), [], True, (notes := []).append) as folder:
        assert [f"(torch 1.0 -> {now})" in note for note in notes] == [True]
        assert folder.load() is None, "killed before its first checkpoint, it begins anew"
        with pytest.raises(RunFolderError, match=r"problems changed since the run began \(b{12} then, c{12} now"):
            folder.note_hashes(model="a" * 64, problems="c" * 64)
        assert folder.manifest["hashes"] == {"model": "a" * 64, "problems": "b" * 64}


@pytest.mark.parametrize("name", ["run", "with space", "ünïcode-运行", "link", b"b\xff"])
def test_checkpoints_come_back_exactly_wherever_they_lie(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    if name == "link":
        (tmp_path / "goal").mkdir()
        path.symlink_to(tmp_path / "goal")
    steps(path, 4)
    last, notes = resumed(path)
    assert (last.stage, last.data, notes) == ("loop", {"step": 3, "window": [0.1, 1.0]}, [])
    assert set(last.tensors) == {"teacher/a", "b"}
    assert torch.equal(last.tensors["teacher/a"], torch.full((2, 6), 3.0))
    assert torch.equal(last.tensors["b"], torch.tensor([0.0, 2.0]))
    assert sorted(p.name for p in (path / "state").iterdir()) == ["000002", "000003"]


def test_lines_after_the_checkpoint_are_cut_and_evidence_is_kept(tmp_path):
    steps(tmp_path, 1)
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        for name in ("metrics.jsonl", "pq.jsonl", "hard/screen.jsonl"):
            folder.append(name, [{"event": "screen", "more": 1}])
        (tmp_path / "hard" / ".train.jsonl.77.tmp").write_text("what a killed process was writing")
        write_atomic(tmp_path / "hard" / "screen.jsonl", (tmp_path / "hard" / "screen.jsonl").read_bytes() + b"{")
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        folder.load()
        assert folder.rows("metrics.jsonl") == [{"event": "outer_step", "step": 0}]
        assert folder.rows("pq.jsonl") == [] and len(folder.rows("hard/screen.jsonl")) == 2
        assert (tmp_path / "hard" / "screen.jsonl").read_bytes().endswith(b"}\n")
        folder.append("metrics.jsonl", [{"another": "and longer", "lost": float("inf")}])
        folder.save(checkpoint(5))
    last, notes = resumed(tmp_path)
    assert (last.data["step"], notes, [*tmp_path.rglob("*.tmp")]) == (5, [], [])


@pytest.mark.parametrize(("name", "kind", "words"), cases("record", "damage"))
def test_the_checkpoint_before_a_damaged_one_is_used_and_that_is_said(tmp_path, name, kind, words):
    spoil(steps(tmp_path) / name, kind)
    with RunFolder(tmp_path, tiny_config(), [], True, (notes := []).append) as folder:
        assert folder.load().data["step"] == 1
        assert read_jsonl(tmp_path / "questions.jsonl") == [{"question": "q0"}, {"question": "q1"}]
        (note,) = notes
        assert f"Going on from the checkpoint before, {tmp_path}/state/000001" in note
        assert re.search(words, note)
        folder.append("metrics.jsonl", [{"event": "outer_step", "step": 3}])
        folder.save(checkpoint(3))
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"000001", "000003"}  # the damaged one went, not this
    assert resumed(tmp_path)[0].data["step"] == 3 and resumed(tmp_path)[1] == []


@pytest.mark.parametrize("linked", [False, True])
def test_only_what_the_store_made_is_removed_from_its_folder(tmp_path, linked):
    (tmp_path / "scratch").mkdir()
    with RunFolder(tmp_path / "run", tiny_config(), []) as folder:
        if linked:
            (tmp_path / "run" / "state").symlink_to(tmp_path / "scratch")
        for name in ("backup", "000000 copy", "000000.old", "7", "tmp.tmp"):
            (tmp_path / "run" / "state" / name).mkdir(parents=True)
        (tmp_path / "run" / "state" / "000001").write_text("a file of mine")
        for step in range(4):
            folder.save(checkpoint(step))
    kept = {path.name for path in (tmp_path / "run" / "state").iterdir()}
    assert kept == {"backup", "000000 copy", "000000.old", "7", "tmp.tmp", "000001", "000004", "000005"}


MEDDLING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is gone"),
    "cut": (lambda run: os.truncate(run / "questions.jsonl", 5), r"questions.jsonl has 5 bytes, expected \d+"),
    "lengthened": (lambda run: spoil(run / "metrics.jsonl", "zeros"), r"metrics.jsonl has 500 bytes, expected \d+"),
    "replaced": (lambda run: write_atomic(run / "pq.jsonl", b'{"question": "q"}\n'), "pq.jsonl is another file"),
    "evidence": (lambda run: (run / "hard" / "screen.jsonl").unlink(), "hard/screen.jsonl is gone"),
    "another file": (lambda run: (run / "hard" / "train.jsonl").unlink(), "hard/train.jsonl is gone"),
    "manifest": (lambda run: write_json(run / "manifest.json", {}), r"manifest.json has \d+ bytes, expected \d+"),
    "lock": (lambda run: (run / ".lock").unlink(), ".lock is gone"),
    "second process": (lambda run: ((run / ".lock").unlink(), resumed(run)), ".lock is another file"),
    "moved": (lambda run: run.rename(run.parent / "elsewhere"), ".lock is gone"),
    "emptied": (lambda run: shutil.rmtree(run), ".lock is gone"),
}


@pytest.mark.parametrize("what", MEDDLING)
def test_a_run_whose_files_change_underneath_stops_with_a_named_error(tmp_path, what):
    meddle, words = MEDDLING[what]
    run = steps(tmp_path / "run")
    with RunFolder(run, tiny_config(), [], resume=True) as folder:
        folder.load()
        folder.append("pq.jsonl", [{"question": "q"}])
        write_json(run / "hard" / "train.jsonl", {})
        folder.save(checkpoint(3))
        meddle(run)
        before = content(tmp_path)
        writes = (lambda: folder.append("metrics.jsonl", [{}]), lambda: folder.save(checkpoint(4)))
        for write in (*writes, lambda: folder.rows("metrics.jsonl"), lambda: folder.note_hashes(model="a")):
            with pytest.raises(RunFolderError, match=f"{words}: something else changed the folder.*put back what was"):
                write()
        assert content(tmp_path) == before


@pytest.mark.parametrize("write", ["append", "save"])
def test_a_folder_that_is_moved_in_the_middle_of_a_write_is_not_made_again(tmp_path, monkeypatch, write):
    with RunFolder(steps(tmp_path / "run"), tiny_config(), [], resume=True) as folder:
        folder.load()
        monkeypatch.setattr(folder, "note_hashes", lambda: (tmp_path / "run").rename(tmp_path / "elsewhere"))
        with pytest.raises(RunFolderError, match=r"\.lock is gone: something else changed the folder"):
            folder.append("metrics.jsonl", [{}]) if write == "append" else folder.save(checkpoint(3))
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("line", [b"\x00" * 20, b'{"id": "b", "n"', b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_line_of_evidence_is_made_again_and_of_the_metrics_refused(tmp_path, line):
    for name in ("hard/screen.jsonl", "metrics.jsonl"):
        with RunFolder(tmp_path, tiny_config(), [], resume=name == "metrics.jsonl") as folder:
            folder.append(name, [{"id": "a"}, {"id": "b"}, {"id": "c"}])
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b'{"id": "b"}', line))
    with RunFolder(tmp_path, tiny_config(), [], True, (notes := []).append) as folder:
        assert folder.rows("hard/screen.jsonl") == [{"id": "a"}]
        assert notes == [f"{tmp_path}/hard/screen.jsonl:2 is damaged: what follows is made again"]
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is damaged: .*; restore the line from a copy"):
            folder.rows("metrics.jsonl")
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_device_is_written_and_not_replaced(monkeypatch, capfdbinary):
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail(f"{paths[1]} would be replaced"))
    for path in (Path("/dev/stdout"), Path("/dev/fd/1")):
        check_place(path)
        write_atomic(path, b"page")
        assert capfdbinary.readouterr().out == b"page"


def test_everything_is_on_disk_before_a_checkpoint_gets_its_number(tmp_path, monkeypatch):
    """What a loss of power would need: lines, files, then their folder, then the rename, then its folder."""
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        order.append(re.sub(r"\.\d+\.tmp", "", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        order.append(f"-> {os.path.relpath(target, tmp_path)}")
        real_replace(source, target)

    with RunFolder(tmp_path, tiny_config(), []) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        folder.save(checkpoint(0))
    folder_of = "state/000000.tmp"
    files = [f"{folder_of}/{name}" for name in ("tensors.safetensors", "state.json", "checksums.json")]
    written = [step for name in files for step in (f"{folder_of}/.{Path(name).name}", f"-> {name}", folder_of)]
    assert order == ["metrics.jsonl", ".", *written, "-> state/000000", "state"]


REVIEW, CHANGES = "promotion.review=true", ("teacher.steps=3", "arms.run=[]")


def until_review(out: Path, *changes: str, resume: bool = False) -> None:
    with pytest.raises(Stopped) as caught:
        run_tiny(out, REVIEW, *changes, resume=resume)
    assert caught.value.exit_code == 3
    assert "waits for a person; everything is saved" in str(caught.value)
    assert f"`soar review {out}`" in str(caught.value)


def test_accepting_everything_is_the_run_without_review(tiny_run, tmp_path, monkeypatch):
    out = tmp_path / "held"
    for step in range(2):
        until_review(out, resume=step > 0)
        assert len(events(out, "outer_step")) == step + 1
        assert len(events(out, "promotion")) == step  # not entered before it is accepted
        assert len(read_jsonl(out / "pq.jsonl") if step else []) == 4 * step
        folders.decide_review(out, folders.ACCEPTED, "ann")

    def killed(self: RunFolder, checkpoint: Checkpoint) -> None:
        real_save(self, checkpoint)
        raise KeyboardInterrupt

    real_save = RunFolder.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save", killed)
        run_tiny(out, REVIEW, resume=True)
    assert (out / folders.REVIEW_FILE).exists(), "killed between the checkpoint and the end of the review"
    run_tiny(out, REVIEW, resume=True)
    free, held = (outcome(folder, "decision", "by") for folder in (tiny_run, out))
    held["metrics.jsonl"] = [row for row in held["metrics.jsonl"] if row["event"] != "review"]
    assert held == free
    for kind in ("review", "promotion"):
        decided = [(row["step"], row["decision"], row["by"]) for row in events(out, kind)]
        assert decided == [(step, "accepted", "ann") for step in range(2)]
    assert [row["decision"] for row in events(tiny_run, "promotion")] == ["automatic"] * 2
    assert not (out / folders.REVIEW_FILE).exists()
    assert not any(complaints for _, complaints in examine(out))


def kept_baseline(out: Path) -> dict[str, bytes]:
    """The baseline that a refusal of the promotion on hold restores."""
    with RunFolder(out, recorded_config(out), [], resume=True) as folder:
        checkpoint = folder.load()
    assert checkpoint is not None
    return {k: v.numpy().tobytes() for k, v in checkpoint.tensors.items() if k.startswith("/pending/")}


def test_a_rejected_promotion_leaves_the_baseline_and_its_questions(tmp_path):
    out = tmp_path / "run"
    until_review(out, *CHANGES)
    first = json.loads((out / folders.REVIEW_FILE).read_text())["promotion"]
    fresh = kept_baseline(out)
    folders.decide_review(out, folders.REJECTED, "ann")
    until_review(out, *CHANGES, resume=True)
    assert events(out, "promotion") == [] and kept_baseline(out) == fresh != {}  # of nobody but who stood before
    held = (out / folders.REVIEW_FILE).read_text()
    (out / folders.REVIEW_FILE).write_text(held.replace('"answer": "', '"answer": "1', 1))
    folders.decide_review(out, folders.ACCEPTED, "ann")  # a person who saw other questions than were written
    until_review(out, *CHANGES, resume=True)  # is asked again
    (out / folders.REVIEW_FILE).write_text(held)
    second = json.loads((out / folders.REVIEW_FILE).read_text())["promotion"]
    assert (first["step"], second["step"]) == (0, 1)
    folders.decide_review(out, folders.ACCEPTED, "bob")
    until_review(out, *CHANGES, resume=True)
    folders.decide_review(out, folders.REJECTED, "ann")
    run_tiny(out, REVIEW, *CHANGES, resume=True)
    assert [row["promoted"] for row in events(out, "outer_step")] == [True] * 3
    assert [row["step"] for row in events(out, "promotion")] == [1]
    loop = json.loads(max(out.glob("state/*/state.json")).read_text())["data"]["loop"]
    assert {row["step"] for row in [*read_jsonl(out / "pq.jsonl"), *loop["pq"]]} == {loop["promotions"]} == {1}
    before, after, _ = (row["student_rollouts"] for row in events(out, "outer_step"))
    # no further RLOO step, two questions new to the baseline
    assert after - before == 6 * 2 * 2 * 4 + 6 * 4 * 2 + 2 * 3
    decided = [(row["decision"], row["by"]) for row in events(out, "review")]
    assert decided == [("rejected", "ann"), ("accepted", "bob"), ("rejected", "ann")]
    rates = [row["baseline_pass_rate"] for row in events(out, "outer_step")]
    assert events(out, "promotion")[0]["baseline_pass_rate"] == rates[1]
    assert not any(complaints for _, complaints in examine(out))


def test_the_command_shows_questions_and_effect_and_takes_the_decision(tmp_path, capsys):
    promotion = {"step": 4, "dataset": 2, "repeat": 1, "reward": 0.125, "pass_rate": 0.25, "baseline_pass_rate": 0.125}
    hostile = "two\nlines \x1b[31m\u202e" + "x" * 5000
    rows = [{"question": "3 a+4", "answer": "7", "correct": False}, {"question": hostile}]
    assert folders.ask_review(tmp_path, promotion, rows) is None
    assert main(["review", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "outer step 4: dataset 2, student 1"
    assert lines[1] == "  reward +0.1250: pass rate on the hard reward questions +0.2500, baseline +0.1250"
    assert lines[3:5] == ["    1. 3 a+4", "       answer: 7  (wrong by the world's oracle)"]
    assert lines[-1] == "decision: none yet"
    assert not {*"\x1b\u202e"} & {*shown} and max(map(len, lines)) < 1100
    assert main(["review", str(tmp_path), "--reject", "--by", "ann"]) == 0
    assert "decision: rejected by ann" in capsys.readouterr().out
    for _ in range(2):
        assert folders.ask_review(tmp_path, promotion, rows) == ("rejected", "ann")  # asking again keeps a decision
    folders.decide_review(tmp_path, "reject", "a slip of hers")
    assert folders.ask_review(tmp_path, promotion, rows) is None
    assert main(["review", str(tmp_path), "--accept"]) == 0
    assert folders.ask_review(tmp_path, promotion, rows)[0] == "accepted"  # type: ignore[index]
    assert folders.ask_review(tmp_path, {**promotion, "step": 5}, rows) is None, "it was about another promotion"
