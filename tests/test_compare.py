"""The comparison of several runs, and charts as files."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import run_folders
from test_report import BROWSER, Page, browse

from soar.cli import main
from soar.report import figures, pictures, runs
from soar.report.runs import ReportError
from soar.studies import compare

CHARTS = ("pass-at-k", "reward", "rates", "screening", "signal", "quality", "length", "diversity", "topics")


def seeded(tmp_path: Path, ps: list[float], seeds: list[int] | None = None, **changes: Any) -> list[Path]:
    """Finished runs whose PS arm has these pass@1, Hard-Only 0.1 everywhere."""
    folders = []
    for i, share in enumerate(ps):
        folder = run_folders.write_run(tmp_path / f"run-{i}-{len(changes)}", seed=i, steps=3, hostile=False)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["seed"] = manifest["config"]["seed"] = (seeds or list(range(len(ps))))[i]
        manifest["config"] |= {"threads": i, **changes}
        run_folders.write_json(folder / "manifest.json", manifest)
        summary = json.loads((folder / "summary.json").read_text())
        summary["arms"]["ps"]["pass_at"]["1"] = share
        summary["arms"]["hard_only"]["pass_at"]["1"] = 0.1
        run_folders.write_json(folder / "summary.json", summary)
        folders.append(folder)
    return folders


def said(folders: list[Path]) -> list[str]:
    found = compare.entries([runs.read_run(folder) for folder in folders])
    return [line.replace("\u00a0", " ") for line in compare.verdicts(found)]


@pytest.mark.parametrize(
    ("ps", "words"),
    [
        ([0.2, 0.21, 0.19], "mean of 3 runs +10.0 percentage points [7.5, 12.5] {over}: SOAR is ahead."),
        ([0.0, 0.01], "mean of 2 runs \u22129.5 percentage points [\u221215.9, \u22123.1] {over}: SOAR is behind."),
        ([0.05, 0.4], "mean of 2 runs +12.5 percentage points [\u2212209.9, 234.9] {over}: no difference is shown."),
        ([0.3], "+20.0 percentage points in one run, which says nothing about other seeds."),
    ],
)  # fmt: skip
def test_what_is_said_over_seeds(tmp_path: Path, ps: list[float], words: str) -> None:
    (line,) = said(seeded(tmp_path, ps))
    start = f"A: {len(ps)} run{'s' if len(ps) > 1 else ''} (seed {', '.join(map(str, range(len(ps))))}): "
    assert line == start + "PS minus Hard-Only at pass@1, " + words.format(over="(95 % t interval over runs)")


def test_budgets_that_differ_are_said_over_seeds(tmp_path: Path) -> None:
    folders = seeded(tmp_path, [0.2, 0.21, 0.19])
    summary = json.loads((folders[1] / "summary.json").read_text())
    summary["arms"]["ps"]["student_rollouts"] = 3 * summary["arms"]["hard_only"]["student_rollouts"]
    run_folders.write_json(folders[1] / "summary.json", summary)
    words = (
        "SOAR is ahead, but with 3 times the student rollouts, which may be why (in the run where they differ most)."
    )
    assert said(folders)[0].endswith(words)


def test_runs_are_pooled_only_with_equal_configs(tmp_path: Path) -> None:
    folders = seeded(tmp_path, [0.2, 0.3]) + seeded(tmp_path, [0.1], promotion={"tau": 0.05, "window": 3})
    found = compare.entries([runs.read_run(folder) for folder in folders])
    assert [entry.group for entry in found] == ["A", "A", "B"]
    assert ("promotion.tau", ["0.01", "0.01", "0.05"]) in compare.differences(found)
    assert "seed" not in dict(compare.differences(found))
    tables = compare.result_tables(found)
    assert [table["k"] for table in tables] == [1, 32]
    means = [row for row in tables[0]["rows"] if row["mean"]]
    assert [row["label"] for row in means] == ["mean of A"]
    assert means[0]["cells"][2][0].replace("\u00a0", " ") == "25.0 %"


def test_a_seed_twice_is_no_evidence(tmp_path: Path) -> None:
    lines = said(seeded(tmp_path, [0.2, 0.3], seeds=[4, 4]))
    assert lines[1] == "A holds a seed more than once: those runs are no independent evidence."


def test_unmeasured_runs_and_equal_names(tmp_path: Path, tiny_run: Path) -> None:
    run_folders.write_jsonl(tmp_path / "x" / "same" / "metrics.jsonl", [{"event": "screen"}])
    run_folders.write_jsonl(tmp_path / "y" / "same" / "metrics.jsonl", [{"event": "screen"}])
    folders = [tmp_path / "x" / "same", tmp_path / "y" / "same"]
    found = compare.entries([runs.read_run(folder) for folder in folders])
    assert [entry.label for entry in found] == [str(folder) for folder in folders]
    assert said(folders)[0].endswith("PS and Hard-Only have not both been measured.")
    with pytest.raises(ReportError, match="no run folder"):
        compare.write_comparison([tiny_run, tmp_path], tmp_path / "page.html")


def test_the_page_is_whole_and_escapes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "<b onclick=x>\x1b\u202e{{7*7}}"
    folders = seeded(tmp_path, [0.2, 0.3]) + seeded(tmp_path, [0.4], note=bad)
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    run_folders.write_json(folders[0] / "manifest.json", manifest | {"seed": bad})
    summary = json.loads((folders[1] / "summary.json").read_text())
    summary["arms"][bad] = summary["arms"]["ps"]
    run_folders.write_json(folders[1] / "summary.json", summary)
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, folders), "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "page.html\n"
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.wrong == [] and page.all("b") == []
    assert "\x1b" not in html and "\u202e" not in html and "49" not in page.text
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert len(page.all("svg")) == 4
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    out = compare.write_comparison(seeded(tmp_path, [0.2, 0.3]), tmp_path / "page.html")
    document, messages = browse(out, tmp_path / "profile")
    assert messages == []
    assert "<title>2 SOAR runs</title>" in document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run_folders.write_run(tmp_path / "run", steps=6)


def test_charts_as_svg_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--figures", str(tmp_path / "out")]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert names == {f"{n}.svg" for n in CHARTS}
    for name in names:
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        root = xml.etree.ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text
    style = pictures.chart_style()
    light = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", (pictures.TEMPLATES / "report.css").read_text()[:400]))
    assert f".c2.line, .c2.bar {{ stroke: {light['--c2']}; }}" in style


def test_charts_as_png_files(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    files = pictures.write_pictures(folder, tmp_path / "out", png=True)
    reward = (tmp_path / "out" / "reward.png").read_bytes()
    assert reward[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(reward[16:20], "big") == figures.WIDTH * pictures.PNG_ZOOM
    assert len(files) == 2 * len(CHARTS)


def test_png_without_its_library_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert main(["report", str(folder), "--figures", str(tmp_path / "out"), "--png"]) == 1
    assert "pip install 'soar-rl[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
