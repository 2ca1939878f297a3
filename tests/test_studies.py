"""Studies: what their files may say, their cells, and what comes out of a toy study, also of a failed or resumed one."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loop_helpers import TINY, read_jsonl, tiny_config
from tables import cases, ends, write_json, write_jsonl
from test_inputs import prepare

from soar.cli import main
from soar.config import ConfigError
from soar.files import digest
from soar.loop.evaluate import clopper_pearson
from soar.report.alarms import step_vendi
from soar.report.text import fill
from soar.run.interrupts import StopRequest
from soar.studies import study as study_room
from soar.studies.study import STUDIES, Cell, Study, cells, collect, read_study, run_study, tables

TOY = (Path(__file__).parent / "cases" / "toy.toml").read_text(encoding="utf-8")


def toy(tmp_path: Path, text: str = TOY) -> Study:
    path = tmp_path / "toy.toml"
    path.write_text(text, encoding="utf-8")
    return read_study(str(path))


class Copies:
    """Cells that are copies of one finished run. ran: names of cells; fails: names of cells that fail."""

    def __init__(self, run: Path, fails: tuple[str, ...] = ()) -> None:
        self.run, self.fails, self.ran = run, fails, list[str]()

    def __call__(self, stop: StopRequest, trusted: bool, cell: Cell, threads: int) -> str | None:
        self.ran.append(cell.name)
        if cell.name in self.fails:
            return "exit code 1: no luck\x1b"
        shutil.copytree(self.run, cell.folder, dirs_exist_ok=True)
        return None


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """A toy study of 2 variants x 2 seeds, one cell of which failed at first and was done by a resume."""
    folder = tmp_path_factory.mktemp("study")
    study, run_cell = toy(folder), Copies(tiny_run, fails=("learnability-seed1",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_room, "run_in_process", run_cell)
        first = run_study(study, folder / "out", list(TINY))
        run_cell.fails = ()
        (folder / "out/cells/grounded-seed1/hashes.json").unlink()  # as if killed before its last file
        results = run_study(study, folder / "out", list(TINY), resume=True)
    states = {(c["variant"], c["seed"]): (c["state"], c["reason"]) for c in first["cells"]}
    assert states.pop(("learnability", 1)) == ("failed", "exit code 1: no luck\x1b")
    assert set(states.values()) == {("finished", None)}
    once = ["grounded-seed0", "grounded-seed1", "learnability-seed0", "learnability-seed1"]
    assert run_cell.ran == [*once, "grounded-seed1", "learnability-seed1"], "of these two something is to be done"
    assert json.loads((folder / "out" / "study.json").read_text()) == json.loads(json.dumps(results))
    return folder, results, tiny_run


def test_comparisons_pair_the_same_problems_and_name_the_primary_one(finished):
    folder, results, _ = finished
    named = {(row["a"], row["b"]): row for row in results["comparisons"]}
    pairs = itertools.product(("grounded", "learnability"), ("ps", "pq"))
    assert list(named) == [(f"{variant}:{arm}", f"{variant}:hard_only") for variant, arm in pairs]
    assert all((row["seeds"], row["left_out"]) == ([0, 1], 0) for row in named.values())
    entries = [(a, k, entry) for (a, _), row in named.items() for k, entry in row["pass_at"].items()]
    assert [(a, k) for a, k, entry in entries if entry["primary"]] == [("grounded:ps", "4")]
    page = (folder / "out" / "study.html").read_text(encoding="utf-8")
    assert "grounded: PS - grounded: Hard-Only at pass@4" in page and results["definition_sha256"][:12] in page
    defined = {k: v for k, v in results["definition"].items() if k not in study_room.MAY_CHANGE}
    assert digest(defined) == results["definition_sha256"]


def cell_of(folder: Path, seed: int, attempts: int, correct: list[Any], tokens: int | None = None) -> Cell:
    """A finished cell made by hand, with one problem a count: PS, whose search took 900 rollouts, and Hard-Only at 0."""
    cell = Cell("a", seed, folder / f"a-seed{seed}", "tiny", (), tiny_config(), None)
    arms = {
        "pq": (correct, 100, {"search_rollouts": 900, "total_tokens": tokens, "evaluation_tokens": 640}),
        "hard_only": ([0] * len(correct), 1000, {}),
    }
    summary: dict[str, Any] = {"arms": {}}
    events_of = []
    for arm, (counts, spent, more) in arms.items():
        entry = {"pass_at": {"1": 0.5}, "attempts": attempts, "student_rollouts": spent}
        summary["arms"][arm] = {**entry, **more}
        events_of.append({"event": "evaluation", "arm": arm, "correct": counts, **entry})
    write_json(cell.folder / "manifest.json", {})
    write_json(cell.folder / "summary.json", summary)
    write_jsonl(cell.folder / "metrics.jsonl", events_of)
    write_jsonl(cell.folder / "hard" / "test.jsonl", [{"id": str(i)} for i in range(len(correct))])
    return cell


def test_every_seed_counts_by_its_own_attempts_and_with_its_search(tmp_path, monkeypatch):
    """2 of 4 and 2 of 8 attempts are 0.5 and 0.25, so 0.375 (it was 0.50, from 2 of 4 twice); of 4 there is no pass@8."""
    study = Study.model_validate({"name": "x", "variants": {"a": {}}, "seeds": [0, 1], "ks": [1, 8]})
    both = [cell_of(tmp_path, 0, 4, [2] * 6), cell_of(tmp_path, 1, 8, [2] * 6, 5000)]
    results = collect(study, both, {}, study.model_dump(mode="json"))
    pq, hard = results["arms"]
    assert (pq["pass_at"]["1"]["per_seed"], pq["pass_at"]["1"]["mean"]) == ([0.5, 0.25], 0.375)
    assert (pq["student_rollouts"], hard["student_rollouts"], pq["total_tokens"]) == (1000, 1000, 5000)
    assert hard["pass_at"]["1"]["interval_95"] == pytest.approx([0, 1 - 0.025 ** (1 / 6)]), "no [0, 0] for 0 of 6"
    (entry,) = [row["pass_at"]["1"] for row in results["comparisons"]]
    assert entry["difference"] == 0.375
    text = fill("study.md", results=results, tables=tables(results))
    for words in ("| PQ | 2 | 37.5 % [", "No primary comparison", "| 5,000 | 640 | 1,000 |", "| 2 of 2 [16, 100] |"):
        assert words in text
    named = study.model_copy(update={"primary": ("a:pq", "a:hard_only", 1), "ks": (1, 2)})
    monkeypatch.setattr(study_room, "holm", lambda values: [value + 9 for value in values])
    (row,) = collect(named, both, {}, named.model_dump(mode="json"))["comparisons"]
    assert [row["pass_at"][k]["p_adjusted"] for k in "12"] == [0.5, 9.5], "the primary one stands as it is"
    family = list[float]()
    monkeypatch.setattr(study_room, "holm", lambda values: family.extend(values) or values)
    alone = collect(study, both[:1], {}, study.model_dump(mode="json"))
    text = fill("study.md", results=alone, tables=tables(alone))
    assert family == [], "one seed is in no family"
    assert re.search(r"PQ - Hard-Only \| 1 \| 1 \| .* \| \u2013 \| \u2013 \|", text), "one seed has no p"
    assert [(row["pass_at"]["1"]["climbed"], *row["pass_at"]["1"]["climbed_95"]) for row in (pq, hard)] == [
        (2, pytest.approx(0.025**0.5), 1.0),
        (0, 0.0, pytest.approx(1 - 0.025**0.5)),
    ]


def test_teachers_and_promotions(finished):
    folder, results, _ = finished
    grounded = results["loops"][0]
    cell = folder / "out" / "cells" / "grounded-seed0"
    first = [r["question"] for r in read_jsonl(cell / "questions.jsonl") if r["step"] == 0]
    assert grounded["cells"][0]["first"]["vendi"] == pytest.approx(step_vendi(first), abs=1e-5)
    # tau -2, window 1: every one of two steps promotes, in both seeds.
    assert (grounded["windows"], grounded["promotions"], grounded["share"]) == (4, 4, 1.0)
    assert grounded["interval_95"] == pytest.approx([0.025**0.25, 1.0])


def test_a_teacher_that_collapsed(tmp_path):
    """One of its figures fell below half of its start; means of the first and the last three steps, by hand."""
    cell = cell_of(tmp_path, 0, 4, [2])._replace(config=tiny_config("promotion.window=2"))
    shares = (1.0, 0.8, 0.6, 0.5, 0.5, 0.3, 0.1)
    steps = [
        {"event": "outer_step", "step": i, "distinct_share": share, "vendi": 9.0, "accepted": 3, "sampled": 4}
        | {"window_mean": 0.1 if i else None, "promoted": i > 2}
        for i, share in enumerate(shares)
    ]
    write_jsonl(cell.folder / "metrics.jsonl", steps)
    study = Study.model_validate({"name": "x", "variants": {"a": {}}, "seeds": [0]})
    (teacher,) = collect(study, [cell], {}, study.model_dump(mode="json"))["loops"]
    (entry,) = teacher["cells"]
    assert (entry["first"]["distinct_share"], entry["last"]["distinct_share"]) == pytest.approx((0.8, 0.3))
    assert (entry["last"]["vendi"], entry["last"]["accepted_share"], entry["last"]["correct"]) == (9.0, 0.75, None)
    assert (entry["collapsed"], teacher["collapsed"]) == (["distinct_share"], 1)
    assert (entry["windows"], entry["promotions"]) == (6, 4), "of 6 / 2 trials of their own, so 4 at least"
    assert teacher["interval_95"] == list(clopper_pearson(4 / 6 * 4, 4))


def test_page_and_table_hold_every_figure_and_no_markup(finished):
    folder, results, _ = finished
    page = (folder / "out" / "study.html").read_text(encoding="utf-8")
    assert "Is &lt;b&gt;this&lt;/b&gt; shown \u27e8U+202E\u27e9as it is?" in page
    text = (folder / "out" / "study.md").read_text(encoding="utf-8")
    assert "<script" not in page and "\u202e" not in text and "\x1b" not in page + text
    for table in tables(results):
        assert f"## {table['title']}" in text
        for row in table["rows"]:
            assert len(row) == len(table["header"])
            plain = " | ".join(" ".join(cell.replace("\u00a0", " ").split()) for cell in row)
            assert f"| {plain} |" in text


def test_another_study_is_refused_and_more_seeds_are_added(finished, tmp_path, monkeypatch):
    folder, _, run = finished
    out, extra = folder / "out", list(TINY)
    nothing = Copies(run, fails=("grounded-seed2", "learnability-seed2"))
    monkeypatch.setattr(study_room, "run_in_process", nothing)

    def refused(out: Path, message: str, text: str = TOY, *more: str, resume: bool = True) -> None:
        with pytest.raises(study_room.RunFolderError, match=message):
            run_study(toy(tmp_path, text), out, [*extra, *more], resume=resume)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    refused(tmp_path / "other", "not empty and holds no study", resume=False)
    refused(out, "holds a study; give --resume", resume=False)
    refused(out, r"begun as another study:\n  extra", TOY, "teacher.steps=3")
    refused(out, r"begun as another study:\n  primary", TOY.replace('only", 4]', 'only", 1]'))
    refused(out, r"seeds: \[1\] left out", TOY.replace("[0, 1]", "[0]"))
    for seeds in ("5", '[null, "x", [1]]'):
        shutil.copytree(out, tmp_path / seeds)
        (tmp_path / seeds / "definition.json").write_text(f'{{"seeds": {seeds}}}')
        refused(tmp_path / seeds, r"seeds: \[.*\] left out")
    with monkeypatch.context() as patch:
        patch.setattr(study_room, "sha256_of", lambda recipe: "another file")
        refused(out, r"begun as another study:\n  recipe_sha256")
    assert nothing.ran == []
    more, written = toy(tmp_path, TOY.replace("[0, 1]", "[0, 1, 2]")), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(write=written.append))
        results = run_study(more, out, extra, resume=True)
    said = [text.removesuffix("\n") for text in written if text]
    assert len(said) == 4 and all(map(str.isprintable, said)), "a line is one write, which no other thread can split"
    assert nothing.ran == ["grounded-seed2", "learnability-seed2"]
    assert [cell["state"] for cell in results["cells"]].count("failed") == 2
    assert results["arms"][0]["seeds"] == [0, 1]


def test_counts_that_cannot_be_are_left_out(tmp_path):
    study = Study.model_validate({"name": "x", "variants": {"a": {}}, "seeds": [0, 1], "ks": [1]})
    for bad in ("two", 5, -1, None, True):
        both = [cell_of(tmp_path, 0, 4, [2] * 6), cell_of(tmp_path, 1, 4, [2, bad, 0, 0, 0, 0])]
        arms = collect(study, both, {}, study.model_dump(mode="json"))["arms"]
        assert [row["seeds"] for row in arms] == [[0], [0, 1]], bad
    others = [cell_of(tmp_path / "b", seed, 4, [1] * n)._replace(variant="b") for seed, n in ((0, 6), (1, 5))]
    pair = study.model_copy(update={"variants": {"a": {}, "b": {}}, "compare": (("a:hard_only", "b:pq"),)})
    (row,) = collect(pair, [*both, *others], {}, pair.model_dump(mode="json"))["comparisons"]
    assert (row["seeds"], row["left_out"]) == ([0], 1), "of one seed the held-out problems differ"
    (both[1].folder / "summary.json").unlink()
    arms = collect(study, both, {}, study.model_dump(mode="json"))["arms"]
    assert [row["seeds"] for row in arms] == [[0], [0]], "an unfinished cell has no results"
    with (both[0].folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "alarm", "kind": "arm left out", "message": "the arm ps is left out: too dear"}\n')
    study = study.model_copy(update={"primary": ("a:ps", "a:hard_only", 1)})
    results = collect(study, both, {}, study.model_dump(mode="json"))
    page = fill("study.md", results=results, tables=tables(results))
    assert "| finished: the arm ps is left out: too dear |" in page and "There is none yet: an arm of it" in page
    (both[0].folder / "hard" / "test.jsonl").unlink()
    assert collect(study, both, {}, study.model_dump(mode="json"))["arms"] == [], "not as many problems as counts"


@pytest.mark.parametrize(("change", "message"), cases("studies", "file"))
def test_study_files_that_cannot_be_used(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        toy(tmp_path, TOY.replace(*change))


def test_cells_fill_in_their_seed_and_share_a_screening_only_where_it_is_the_same(tmp_path):
    given = ('screen.from_run="before-{seed}"', "screen.attempts=0")
    own, untried = (cells(toy(tmp_path), tmp_path / "out", [key]) for key in given)
    assert [cell.shares for cell in own + untried] == [None] * 8
    assert {cell.config.screen.from_run for cell in own} == {"before-0", "before-1"}
    for key in ("screen.attempts=7", "student.sampling.max_tokens=9"):
        other = toy(tmp_path, TOY.replace("teacher.reward=learnability", key))
        assert [cell.shares for cell in cells(other, tmp_path / "out", [])] == [None] * 4
    page = (Path(__file__).parent.parent / "docs" / "quickstart.md").read_text(encoding="utf-8")
    text = page.partition("```toml\n")[2].partition("```")[0].replace("recipe.toml", "tiny")
    every = cells(toy(tmp_path, text), tmp_path / "out", [])
    found = [(cell.name, cell.config.arms.run[-1]) for cell in every[2:4]]
    assert found == [("plain-seed2", "base_t"), ("soar-seed0", "pq")]
    shared, leaders = cells(toy(tmp_path), tmp_path / "\U0001f600", []), [None, None]
    leaders += [tmp_path / "\U0001f600" / "cells" / f"grounded-seed{s}" for s in (0, 1)]
    assert [cell.shares for cell in shared] == leaders
    assert [cell.config.screen.from_run for cell in shared] == ["" if x is None else str(x) for x in leaders]
    unnamed = r"no --model given: the recipe 'small-1gpu' leaves it to you; .* --set model\.path="
    with pytest.raises(ConfigError, match=unnamed):
        cells(toy(tmp_path, 'recipe = "small-1gpu"\n' + TOY), tmp_path / "out", [])
    with pytest.raises(ConfigError, match=r"teacher\.reward = 'luck'"):
        run_study(toy(tmp_path, TOY.replace("=learnability", "=luck")), tmp_path / "bad", list(TINY))
    assert not (tmp_path / "bad").exists(), "refused before anything runs"
    study = Study.model_validate({"name": "x", "variants": {"a": {}, "b": {}}})
    results = [("a", "base"), ("a", "hard_only"), ("a", "ps"), ("b", "ps")]
    reference = ("a", "hard_only")
    assert study_room.comparisons(study, results) == [(("a", "ps"), reference), (("b", "ps"), reference)]
    assert study_room.comparisons(study, [*results, ("b", "hard_only")])[1] == (("b", "ps"), ("b", "hard_only"))
    assert study_room.comparisons(study, [("b", "ps")]) == []


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda p: p.stem)
def test_built_in_studies_are_valid(path):
    study = read_study(f"studies/{path.stem}")
    assert study.name == path.stem
    every = cells(study, Path("out"), ["model.path=x", "problems.source=world:tiny"])  # maths leaves both open
    assert len(every) == len(study.variants) * len(study.seeds)
    has = {(cell.variant, arm) for cell in every for arm in cell.config.arms.run}
    for name in (name for pair in (*study.compare, study.primary[:2] if study.primary else ()) for name in pair):
        variant, _, arm = name.partition(":")
        assert (variant, arm) in has, name


def test_the_command_runs_cells_in_processes(tmp_path, capsys):
    """A cell is the run of its config; of one that fails its error is told and the log kept; the exit code says so."""
    sets = [*TINY, 'arms.run=["base"]', "teacher.steps=0", "screen.attempts=1", "threads=1"]
    (tmp_path / "one.toml").write_text(f'name = "one"\nseeds = [3]\nset = {json.dumps(sets)}\n[variants.a]\n')
    arguments = ["study", str(tmp_path / "one.toml"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    shown = r"a-seed3: .*seed=3.*\n  [\d,]+ rollouts, [\d,]+ tokens sampled; (.*hours).*\nin all: 1 cells, (.*)\n"
    assert len({*re.search(shown, capsys.readouterr().out).groups()}) == 1  # type: ignore[union-attr]
    own = "evaluate.bootstrap=101"  # which --collect finds in the folder
    assert main([*arguments, "--set", own]) == 0 and "a, seed 3 | finished" in capsys.readouterr().out
    (cell,) = cells(read_study(str(tmp_path / "one.toml")), tmp_path / "out", [own])
    assert json.loads((cell.folder / "manifest.json").read_text())["config"] == cell.config.resolved()
    failed = study_room.run_in_process(StopRequest(), False, cell._replace(overrides=(*cell.overrides, "seed=4")), 1)
    why = f"soar: {cell.folder} was begun with another config; these keys decide results and cannot change on --resume:"
    assert failed is not None and failed.startswith(f"exit code 1: {why}   seed: 3 -> 4 (see ")
    assert f"{why}\n  seed: 3 -> 4" in (tmp_path / "out" / "cells" / "a-seed3.log").read_text()
    silent: Any = SimpleNamespace(start=lambda *_, **__: SimpleNamespace(wait=lambda: -9))
    assert "exit code -9: no output (see " in str(study_room.run_in_process(silent, False, cell, 1))
    (cell.folder / "summary.json").unlink()
    assert main([*arguments, "--collect"]) == 1 and "a, seed 3 | unfinished" in capsys.readouterr().out


CELL = (Path(__file__).parent / "cases" / "cell.txt").read_text(encoding="utf-8").replace("PYTHON", sys.executable)
STUDY = "import sys; from soar.cli import main; sys.executable = './cell'; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(("sent", "seconds", "code"), cases("studies", "signals"))
def test_a_study_that_ends_ends_its_cells(run, tmp_path, monkeypatch, capsys, sent, seconds, code):
    """A signal reaches the cell, which saves, and no other cell begins; a second one ends it and its workers at once. The
    cell is a program that waits for a signal. Trust is passed on."""
    monkeypatch.chdir(tmp_path)
    Path("cell").write_text(CELL.replace("SECONDS", str(seconds)))
    Path("cell").chmod(0o755)
    os.mkfifo("ready")
    Path("one.toml").write_text('name = "one"\nrecipe = "run"\nseeds = [0, 1]\n[variants.a]\n')
    prepare("set", "problems.verifier", "evil.py:grade")
    words = ["--trust-run", "study", "one.toml", "--out", "out"]
    assert main(words[1:]) == 1
    assert "run: its config names code or a server" in capsys.readouterr().err
    study = subprocess.Popen([sys.executable, "-c", STUDY, *words], stderr=subprocess.PIPE, text=True)
    *processes, command = Path("ready").read_text().split(maxsplit=2)
    assert command.startswith("-P -m soar.cli --trust-run run run --out")
    for name in sent:
        study.send_signal(getattr(signal, name))
        study.stderr.readline()  # that it was heard, or the end
    assert study.wait(30) == code and all(map(ends, map(int, processes)))
    assert Path("saved").is_file() == (len(sent) == 1)
    assert [path.name for path in Path("out/cells").iterdir()] == ["a-seed0.log"]
