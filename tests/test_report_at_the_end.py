"""A page that cannot be made does not take a finished run with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loop_helpers import run_tiny

from soar.cli import main
from soar.report import page as report


def test_a_run_ends_without_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"

    def broken(run: Any) -> str:
        raise TypeError("'dict object' has no attribute 'taken'")

    with monkeypatch.context() as patch:
        patch.setattr(report, "render", broken)
        summary = run_tiny(out, "teacher.steps=0", 'arms.run=["base"]', "screen.attempts=1")
    assert "base" in summary["arms"]
    printed = "".join(capsys.readouterr())
    assert "report.html could not be made (TypeError: 'dict object' has no attribute 'taken')" in printed
    assert f"soar report '{out}'" in printed
    assert not (out / "report.html").exists() and (out / "hashes.json").is_file()
    assert main(["doctor", str(out)]) == 1
    assert "report.html is missing; `soar report` writes it\n2 of 13 checks" in capsys.readouterr().out
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert main(["doctor", str(out)]) == 0


def test_trouble_with_the_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_atomic", full)
    monkeypatch.setattr(report, "read_run", lambda path: None)
    monkeypatch.setattr(report, "render", lambda run: "")
    with pytest.raises(OSError, match="No space"):
        report.report_at_the_end(tmp_path, print)
