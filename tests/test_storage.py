"""Full, read-only and broken disks: a named error, what was saved intact, and a resume that ends as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from loop_helpers import TINY, events, run_tiny, tiny_config, without_clock

from soar.cli import main
from soar.config import ConfigError
from soar.files import StorageError, storage_errors
from soar.run.checkpoint import Checkpoint
from soar.run.folder import RunFolder, RunFolderError

CHANGES = ("teacher.steps=2", 'arms.run=["base","ps"]')
SETS = [part for override in (*TINY, *CHANGES) for part in ("--set", override)]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint("loop", {"step": step}, {"w": torch.full((300_000,), float(step))})


def test_a_disk_that_is_full_while_tensors_are_written_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tiny_config(), []) as folder:
        folder.save(checkpoint(0))
        with file_size_limit(500_000), pytest.raises(StorageError) as caught:
            folder.save(checkpoint(1))
        assert "cannot be written" in str(caught.value)
        assert "What was saved before is intact: free space or permit writing, then continue with --resume" in str(
            caught.value
        )
        assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["000000", "latest.json"]
        found = folder.load()
        assert found is not None
        assert found.data == {"step": 0}
        folder.save(checkpoint(1))
        found = folder.load()
        assert found is not None
        assert torch.equal(found.tensors["w"], torch.full((300_000,), 1.0))


def test_a_disk_that_is_full_while_lines_are_written(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tiny_config(), []) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
        folder.save(checkpoint(0))
        with (
            file_size_limit(100),
            pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: File too large"),
        ):
            folder.append("metrics.jsonl", [{"event": "x" * 500}])
    with RunFolder(tmp_path, tiny_config(), [], resume=True) as folder:
        folder.load()
        assert folder.rows("metrics.jsonl") == [{"event": "screen"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], int]:
    """Metrics of an undisturbed run, and how often it calls fsync."""
    calls = [0]
    real = os.fsync

    def count(descriptor: Any) -> None:
        calls[0] += 1
        real(descriptor)

    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", count)
        run_tiny(out, *CHANGES)
    return without_clock(events(out)), calls[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_a_disk_that_fails_anywhere_in_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: tuple[list[Any], int],
    code: int,
    share: float,
) -> None:
    """The first, a middle or one of the last writes fails: of the manifest, of a checkpoint, of the final files."""
    metrics, calls = whole
    left = [int(share * calls)]
    real = os.fsync

    def fail(descriptor: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert main(["run", "--quiet", "--out", str(out), *SETS]) == 1
    said = capsys.readouterr().err
    assert f"cannot be written: {os.strerror(code)}" in said
    assert "Traceback" not in said
    assert main(["run", "--quiet", "--out", str(out), *SETS, "--resume"]) == 0
    assert without_clock(events(out)) == metrics


def test_only_what_the_disk_is_to_blame_for_is_renamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path, "advice"):
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")
    words = r"x\.json cannot be written: No space left on device\. advice"
    with pytest.raises(StorageError, match=words), storage_errors(tmp_path, "advice"):
        raise OSError(errno.ENOSPC, "No space left on device", "x.json")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Any, *args: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr("soar.run.pipeline.open_env", refuse)
    assert main(["run", "--out", str(tmp_path / "run"), *SETS]) == 1
    said = capsys.readouterr().err
    assert said == (
        f"soar: {tmp_path}/run cannot be written: Read-only file system. Choose another --out, or permit writing there\n"
    )


def test_everything_is_on_disk_before_the_pointer_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power would need: files, then their folder, then the rename, then its folder, then the pointer."""
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        order.append(f"-> {Path(target).relative_to(tmp_path).as_posix()}")
        real_replace(source, target)

    with RunFolder(tmp_path, tiny_config(), []) as folder:
        folder.append("metrics.jsonl", [{"event": "screen"}])
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        folder.save(checkpoint(0))
    places = [
        order.index(name)
        for name in (
            "metrics.jsonl",
            "state/000000.tmp/tensors.safetensors",
            "-> state/000000.tmp/state.json",
            "-> state/000000.tmp/checksums.json",
            "-> state/000000",
            "-> state/latest.json",
        )
    ]
    assert places == sorted(places)
    renamed = order.index("-> state/000000")
    assert order[renamed - 1] == "state/000000.tmp"
    assert order[renamed + 1] == "state"
    pointer = order.index("-> state/latest.json")
    assert order[pointer - 1].startswith("state/.latest.json")
    assert order[pointer + 1] == "state"


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom soar.config import Config\n"
        "from soar.run.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]), Config(), [])\n"
        "print('held', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("held\n", -signal.SIGKILL)
    assert (tmp_path / "run" / ".lock").exists()
    from soar.config import Config

    RunFolder(tmp_path / "run", Config(), [], resume=True).__exit__(None, None, None)


def test_what_a_process_leaves_that_died_before_its_manifest_is_no_obstacle(tmp_path: Path) -> None:
    for number, resume in enumerate((False, True)):
        out = tmp_path / str(number)
        out.mkdir()
        (out / ".lock").touch()
        (out / ".manifest.json.123.tmp").write_text("{")
        with RunFolder(out, tiny_config(), ["soar"], resume=resume) as folder:
            assert folder.load() is None
            assert folder.manifest["command"] == ["soar"]
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        RunFolder(tmp_path / "typo", tiny_config(), [], resume=True)
    assert not (tmp_path / "typo").exists()


def test_half_written_files_of_a_killed_process_are_cleared_on_resume(tmp_path: Path) -> None:
    RunFolder(tmp_path, tiny_config(), []).__exit__(None, None, None)
    (tmp_path / "hard").mkdir()
    for name in (".summary.json.77.tmp", "hard/.train.jsonl.77.tmp"):
        (tmp_path / name).write_text("half")
    RunFolder(tmp_path, tiny_config(), [], resume=True).__exit__(None, None, None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "hard", "manifest.json"]


@pytest.mark.parametrize("name", ["with space", "ünïcode-运行", "link"])
def test_odd_paths_work(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "link":
        (tmp_path / "goal").mkdir()
        path.symlink_to(tmp_path / "goal")
    with RunFolder(path, tiny_config(), []) as folder:
        folder.save(checkpoint(3))
    with RunFolder(path, tiny_config(), [], resume=True) as folder:
        found = folder.load()
    assert found is not None
    assert found.data == {"step": 3}


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", "", "back\\slash", "new\nline"])
def test_a_run_name_cannot_lead_out_of_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="is the name of a folder under runs/"):
        tiny_config(f"name={json.dumps(name)}")
