"""The report page: what it says, what it refuses to be fooled by, and what it survives."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import run_folders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soar.studies.compare import write_comparison

from soar.report import changes, figures, runs, sections
from soar.report import page as report
from soar.report import text as wording
from soar.report.page import write_report
from soar.report.runs import ReportError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """The elements of a page with their attributes, the visible text, and the tags that were closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folders.write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def make_run(arms: dict[str, Any] | None = None, finished: bool = True, **summary: Any) -> runs.Run:
    """A run in memory with this summary and three outer steps, one of them promoted."""
    steps = [{"event": "outer_step", "step": i, "reward_G": [0.1, 0.2]} for i in (1, 2, 3)]
    events: dict[str, list[runs.Row]] = {"outer_step": steps, "promotion": [{"step": 2}]}
    if not finished:
        events["evaluation"] = [{"arm": name, **row} for name, row in (arms or {}).items()]
    content = {"arms": arms or {}, "promotions": 1, **summary} if finished else {}
    return runs.Run(path=Path("runs/x"), summary=content, events=events)


def arm(share: float, low: float, high: float, rollouts: int = 1000, k: int = 1) -> dict[str, Any]:
    return {"pass_at": {str(k): share}, "interval_95": {str(k): [low, high]}, "student_rollouts": rollouts}


PS, HARD = arm(0.123, 0.091, 0.155), arm(0.021, 0.01, 0.034)


def said(run: runs.Run) -> str:
    return wording.headline(run).replace("\u00a0", " ")


def paired(difference: float, low: float, high: float) -> dict[str, Any]:
    return {"ps - hard_only": {"1": {"difference": difference, "interval_95": [low, high]}}}


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (
            make_run({"ps": PS, "hard_only": HARD}, paired=paired(0.102, 0.07, 0.134)),
            "Held-out pass@1: SOAR's promoted student 12.3 % [9.1, 15.5] against 2.1 % [1.0, 3.4] for Hard-Only at the "
            "same student budget: +10.2 percentage points [7.0, 13.4], so SOAR is ahead in this run.",
        ),
        (
            make_run({"ps": PS, "hard_only": HARD}, paired=paired(-0.102, -0.134, -0.07)),
            "Held-out pass@1: SOAR's promoted student 12.3 % [9.1, 15.5] against 2.1 % [1.0, 3.4] for Hard-Only at the "
            "same student budget: \u221210.2 percentage points [\u221213.4, \u22127.0], so SOAR is behind in this run.",
        ),
        (
            make_run({"ps": PS, "hard_only": HARD}, paired=paired(0.003, -0.01, 0.02)),
            "Held-out pass@1: SOAR's promoted student 12.3 % [9.1, 15.5] against 2.1 % [1.0, 3.4] for Hard-Only at the "
            "same student budget: +0.30 percentage points [\u22121.00, 2.00], so this run does not show a difference.",
        ),
        (
            make_run({"ps": PS, "hard_only": arm(0.021, 0.01, 0.034, 700)}),
            "Held-out pass@1: SOAR's promoted student 12.3 % [9.1, 15.5] against 2.1 % [1.0, 3.4] for Hard-Only "
            "(student rollouts: 1,000 against 700): the 95 % intervals do not overlap, so SOAR is ahead in this run, but "
            "with 1.4 times the student rollouts, which may be why.",
        ),
        (
            make_run({"pq": {**PS, "search_rollouts": 500}, "hard_only": arm(0.021, 0.01, 0.034, 1000)}),
            "Held-out pass@1: a fresh student on SOAR's promotion questions (PQ) 12.3 % [9.1, 15.5] against 2.1 % [1.0, 3.4] "
            "for Hard-Only (student rollouts: 1,500 with the search against 1,000): the 95 % intervals do not overlap, so "
            "SOAR is ahead in this run, but with 1.5 times the student rollouts, which may be why.",
        ),
        (
            make_run({"ps": HARD, "hard_only": PS}),
            "Held-out pass@1: SOAR's promoted student 2.1 % [1.0, 3.4] against 12.3 % [9.1, 15.5] for Hard-Only at the "
            "same student budget: the 95 % intervals do not overlap, so SOAR is behind in this run.",
        ),
        (
            make_run({"ps": PS, "hard_only": arm(0.1, 0.07, 0.13)}),
            "Held-out pass@1: SOAR's promoted student 12.3 % [9.1, 15.5] against 10.0 % [7.0, 13.0] for Hard-Only at "
            "the same student budget: the 95 % intervals overlap, so this run does not show a difference.",
        ),
        (
            make_run({"pq": PS, "base": arm(0.0006, 0.0, 0.001, 0)}),
            "Held-out pass@1: a fresh student on SOAR's promotion questions (PQ) 12.3 % [9.1, 15.5] against "
            "0.06 % [0.00, 0.10] for Base: the 95 % intervals do not overlap, so SOAR is above the untrained model in this "
            "run.",
        ),
        (
            make_run({"ps": {"pass_at": {"1": 0.5}}, "hard_only": {"pass_at": {"1": 0.1}}}),
            "Held-out pass@1: SOAR's promoted student 50.0 % against 10.0 % for Hard-Only: "
            "without intervals nothing can be said about the difference.",
        ),
        (
            make_run({"ps": PS}),
            "Held-out pass@1: SOAR's promoted student 12.3 % [9.1, 15.5]; there is no other arm to compare it with.",
        ),
        (
            make_run({"base": arm(0.0, 0.0, 0.002, 0), "hard_only": HARD}),
            "Held-out pass@1: Base 0.00 % [0.00, 0.20], Hard-Only 2.1 % [1.0, 3.4]; "
            "no arm of SOAR (PS, PQ) was measured.",
        ),
        (
            make_run({"ps": PS, "hard_only": arm(0.5, 0.4, 0.6, k=8)}),
            "Held-out: the arms have no pass@k in common, so they cannot be compared.",
        ),
        (make_run(finished=True), "The run is finished, but nothing was measured on the held-out problems."),
        (
            make_run(finished=False),
            "Unfinished: 3 outer steps and 1 promotion so far; nothing has been measured on the held-out problems yet.",
        ),
        (
            make_run({"ps": PS}, finished=False),
            "Unfinished (3 outer steps so far). Held-out pass@1: SOAR's promoted student 12.3 % [9.1, 15.5]; "
            "there is no other arm to compare it with.",
        ),
    ],
)
def test_headline_says_what_was_found(run: runs.Run, sentence: str) -> None:
    assert said(run) == sentence


def test_what_was_asked_is_said_as_far_as_it_is_known() -> None:
    config: dict[str, Any] = {
        "model": {"path": "M"},
        "problems": {"source": "P"},
        "screen": {"attempts": 128, "max_successes": 0},
    }
    hard: list[runs.Row] = [{}, {}]
    whole = runs.Run(path=Path(), manifest={"config": config}, hard_test=hard)
    assert wording.asked(whole) == (
        "Asked: can M learn to solve 2 held-out problems of P, none of which it solved in 128 attempts at each, from "
        "practice questions that it writes itself?"
    )
    config["screen"]["max_successes"] = 2
    assert ", none of which it solved more than 2 times in 128 attempts, from" in wording.asked(whole)
    assert wording.asked(runs.Run(path=Path())) == (
        "Asked: can the model learn to solve held-out problems from practice questions that it writes itself?"
    )


def test_an_interval_of_zero_width_is_explained() -> None:
    nothing, something = arm(0.0, 0.0, 0.0), arm(0.0, 0.0, 0.01)
    words = "An arm that solved no problem at all gets the interval [0, 0]"
    assert any(line.startswith(words) for line in wording.remarks(make_run({"ps": HARD, "hard_only": nothing})))
    assert not any(line.startswith(words) for line in wording.remarks(make_run({"ps": HARD, "hard_only": something})))


def test_without_a_promotion_no_difference_is_credited_to_soar() -> None:
    better = make_run({"ps": PS, "hard_only": arm(0.0, 0.0, 0.0, 100)}, promotions=0, paired=paired(0.123, 0.09, 0.15))
    assert said(better) == (
        "Held-out pass@1: PS, the base model since no student was promoted, 12.3 % [9.1, 15.5] against 0.0 % [0.0, 0.0] "
        "for Hard-Only: +12.3 percentage points [9.0, 15.0], so Hard-Only is below the untrained model in this run."
    )
    worse = make_run({"ps": HARD, "hard_only": PS}, promotions=0, paired=paired(-0.102, -0.134, -0.07))
    assert "so Hard-Only is above the untrained model" in said(worse)
    assert not any("SOAR is" in line for run in (better, worse) for line in (said(run), *wording.remarks(run)))


def test_remarks_name_what_the_figures_do_not_show() -> None:
    lines = wording.remarks(make_run({"ps": PS, "base": arm(0.01, 0.0, 0.02, 0)}, promotions=0))
    assert "No student was promoted, so PS is the base model itself." in lines
    assert "Hard-Only was not measured, so nothing here tells SOAR from ordinary training." in lines
    assert any("one run with one seed" in line for line in lines)
    lines = wording.remarks(make_run({"ps": PS, "hard_only": HARD, "pq": {**PS, "search_rollouts": 5000}}))
    assert not any("No student was promoted" in line or "Hard-Only was not" in line for line in lines)
    assert sum(line.startswith("PQ at pass@1: 12.3") for line in lines) == 1
    assert not any(line.startswith("PS at pass@1:") for line in lines), "the headline says it already"
    assert any(
        "took 1,000 student rollouts. The loop that found its questions took 5,000 more" in line for line in lines
    )


@pytest.mark.parametrize(
    ("own", "reference", "ahead", "words"),
    [
        (1040, 1000, True, ""),
        (1400, 1000, True, ", but with 1.4 times the student rollouts, which may be why"),
        (700, 1000, True, ", with 0.7 times the student rollouts"),
        (700, 1000, False, ", but with 0.7 times the student rollouts, which may be why"),
        (24_600, 1000, False, ", with 25 times the student rollouts"),
        (None, 1000, True, ", but the student budgets are not recorded, and they may be why"),
    ],
)
def test_budgets_that_differ_are_said(own: int | None, reference: int, ahead: bool, words: str) -> None:
    one, other = (runs.Arm(n, {1: 0.5}, {}, student_rollouts=b) for n, b in (("ps", own), ("hard_only", reference)))
    assert wording.budget_caveat(wording.budget_ratio(one, other), ahead) == words


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.percent(0.123), "12.3 %"),
        (wording.percent(0.0061), "0.61 %"),
        (wording.percent(0.0), "0.0 %"),
        (wording.percent(None), "\u2013"),
        (wording.duration(3.25), "3.2 s"),
        (wording.duration(59.6), "1 min 00 s"),
        (wording.duration(200), "3 min 20 s"),
        (wording.duration(7500), "2 h 05 min"),
        (wording.duration("soon"), "\u2013"),
        (wording.decimal(-0.00001), "0.0000"),
        (wording.decimal(-0.5), "\u22120.5000"),
        (wording.decimal(53.4499, 1), "53.4"),
        (wording.decimal("many", 1), wording.DASH),
        (wording.whole(1234567), "1,234,567"),
        (wording.whole(True), "\u2013"),
        (wording.moment("2026-01-31T09:30:00+00:00"), "2026-01-31 09:30 UTC"),
        (wording.moment("yesterday"), "yesterday"),
    ],
)
def test_figures_as_text(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected


def test_page_is_whole_and_loads_nothing(html: str, page: Page) -> None:
    assert page.wrong == []
    assert html.lstrip().startswith("<!doctype html>")
    sources = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "action")]
    assert sources and all(str(value).startswith("#") for value in sources)
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {str(v)[1:] for v in sources} <= targets
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    assert "url(" not in html and "@import" not in html
    assert not any(key.startswith("on") or key == "style" for _, attributes in page.elements for key in attributes)


def test_page_shows_the_figures_of_the_summary(folder: Path, page: Page) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    text = page.text.replace("\u00a0", " ")
    for name, row in summary["arms"].items():
        for k, share in row["pass_at"].items():
            digits = 2 if share < 0.01 else 1
            low, high = (f"{100 * x:.{digits}f}" for x in row["interval_95"][k])
            assert f"{100 * share:.{digits}f} % [{low}, {high}]" in text, (name, k)
    for words in (
        "18",
        "3 min 16 s",
        "6 min 31 s",
        "138,240",
        "645 candidates were tried 128 times each; 192 were hard",
    ):
        assert words in text
    assert "soar run --out runs/demo --set 'name=my demo'" in text
    assert '"tau": 0.01' in text and '"torch": "2.13.0"' in text and '"prompts": "77ab01ce"' in text
    assert "failed_student , step 7: student (7, 2, 0) diverged" in text


def test_hostile_text_is_shown_and_does_nothing(html: str, page: Page) -> None:
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1
    assert page.all("img") == []
    for shown in (
        "<script>document.title='owned'</script>",
        "{{7*7}} {% raw %} ${7*7}",
        "safe \u27e8U+202E\u27e9gnp.exe\u27e8U+202C\u27e9 end",
        "\u27e8U+001B\u27e9[31mred\u27e8U+001B\u27e9[0m bell\u27e8U+0007\u27e9",
        "zero\u27e8U+0000\u27e9byte",
        '"><img src=x onerror=alert(1)>',
        "</td></table></style></script><!--",
        "lone \u27e8U+D800\u27e9 surrogate",
        "\u27e8U+200B\u27e9zero-width \u27e8U+FEFF\u27e9mark",
        "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    ):
        assert page.texts.count(shown) + sum(shown in text for text in page.texts if text != shown) >= 2, shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", html)


def test_hostile_text_in_every_other_place(tmp_path: Path) -> None:
    bad = "<b onclick=x>\x1b\u202e{{7*7}}"
    run_folders.write_json(
        tmp_path / "manifest.json",
        {"name": bad, "command": [bad], "config": {bad: bad, "model": {"path": bad}}, "seed": bad, "started_at": bad},
    )
    counts = {"pass_at": {"1": 0.5}, "interval_95": {"1": [0.4, 0.6]}}
    run_folders.write_json(tmp_path / "summary.json", {"arms": {bad: counts}, "wall_seconds": {bad: 1.0}})
    step = {"event": "outer_step", "step": 1, "reward_G": [0.1, 0.2], "promoted": True, "reason": bad, "sampled": 3}
    metrics: list[dict[str, Any]] = [
        {"event": "screen", "histogram": {bad: 3}, "candidates": bad, "hard": 1, "attempts": 4},
        {**step, "accepted": 2, "rejected": {bad: 1}},
        {"event": "arm_step", "arm": bad, "step": 1, "frac_mixed": 0.5},
        {"event": "alarm", "kind": bad, "message": bad, "step": bad},
    ]
    run_folders.write_jsonl(tmp_path / "metrics.jsonl", metrics)
    question = {"step": 1, "dataset": bad, "question": bad, "answer": bad, "topic": bad, "reward": bad, "correct": bad}
    run_folders.write_jsonl(tmp_path / "questions.jsonl", [question, question | {"topic": "b"}])
    run_folders.write_jsonl(tmp_path / "pq.jsonl", [question])
    run_folders.write_jsonl(tmp_path / "hard" / "train.jsonl", [{"id": bad, "question": bad, "answer": bad}])
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert page.wrong == [] and page.all("b") == []
    assert "\x1b" not in html and "\u202e" not in html and "49" not in page.text
    assert page.text.count("<b onclick=x>\u27e8U+001B\u27e9\u27e8U+202E\u27e9{{7*7}}") >= 20


def test_page_is_usable_without_eyes_and_mouse(page: Page, html: str) -> None:
    assert page.all("html") == [{"lang": "en"}]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    charts = page.all("svg")
    assert len(charts) == 9
    for chart in charts:
        names = str(chart["aria-labelledby"]).split()
        assert chart["role"] == "img" and len(names) == 2 and set(names) <= set(ids)
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert all("tabindex" in a and a.get("aria-label") for _, a in page.elements if a.get("role") == "region")
    headings = [re.sub("<[^>]*>", "", text) for text in re.findall(r"<h2 [^>]*>(.*?)</h2>", html)]
    regions = [str(a["aria-label"]) for _, a in page.elements if a.get("role") == "region"]
    assert len({*headings, *regions}) == len(headings) + len(regions) > 20, "each is listed by its name"
    order = [name for name, _ in page.elements]
    for i, name in enumerate(order):
        if name in ("input", "select"):
            assert order[i - 1] == "label"
    levels = [int(name[1]) for name in order if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    a, b = sorted((luminance(one), luminance(other)), reverse=True)
    return (a + 0.05) / (b + 0.05)


def mixed(one: str, other: str, share: float) -> str:
    """CSS color-mix(in srgb, one share, other)."""
    pairs = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def test_colours_have_contrast_in_both_themes() -> None:
    assert round(contrast("#000000", "#ffffff"), 2) == 21.0
    style = (report.TEMPLATES / "report.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{.*?\}", style, re.S)
    )
    assert len(light) == len(dark) == 17
    mix = re.search(r"tr\.promoted > \* \{ background: color-mix\(in srgb, var\(--c3\) (\d+)%, var\(--card\)\)", style)
    assert mix is not None
    for theme in (light, dark):
        for text in ("--ink", "--quiet", "--accent"):
            assert min(contrast(theme[text], theme[ground]) for ground in ("--page", "--card")) >= 4.5, text
        assert contrast(theme["--warn"], theme["--warn-page"]) >= 4.5
        promoted = mixed(theme["--c3"], theme["--card"], int(mix.group(1)) / 100)
        assert min(contrast(theme[text], promoted) for text in ("--ink", "--quiet")) >= 4.5
        assert min(contrast(theme[f"--c{i}"], theme["--card"]) for i in range(8)) >= 3


def test_page_says_what_it_leaves_out(tmp_path: Path) -> None:
    run_folders.write_run(tmp_path, steps=3, datasets=4, per_dataset=80)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "This page holds 600 of 960 questions, the same number from the front of every dataset." in page.text
    rows = [a for a in page.all("tr") if "data-step" in a]
    assert len(rows) == 600
    assert [sum(a["data-step"] == str(step) for a in rows) for step in (1, 2, 3)] == [200, 200, 200]


def test_the_page_says_how_many_of_the_hard_problems_were_taken() -> None:
    half: list[runs.Row] = [{"id": "a"}, {"id": "b"}]
    for hard, taken in ((9, 4), (4, None), ("many", None)):
        events: dict[str, list[runs.Row]] = {"screen": [{"event": "screen", "hard": hard}]}
        run = runs.Run(path=Path(), events=events, hard_train=half, hard_test=half)
        assert sections.screening_section(run)["taken"] == taken


def test_no_two_arms_of_a_page_look_alike() -> None:
    arm = {"pass_at": {"1": 0.1}, "interval_95": {"1": [0.0, 0.2]}}
    summary = {"arms": dict.fromkeys(("teacher_t", "ps", "pq", "my_own"), arm)}
    steps = [{"event": "arm_step", "arm": name, "step": 0} for name in ("teacher_t", "pq", "real", "hard_only")]
    styles = sections.arm_styles(runs.Run(path=Path(), summary=summary, events={"arm_step": steps}))
    assert set(styles) == {"teacher_t", "ps", "pq", "real", "hard_only", "my_own"}
    assert len(set(styles.values())) == 6
    known = list(wording.ARM_NAMES)
    assert all(styles[name] == known.index(name) for name in ("hard_only", "ps", "pq"))


def test_evenly_takes_the_same_number_of_every_dataset() -> None:
    rows = [{"step": s, "dataset": d, "i": i} for s in (1, 2) for d in (0, 1) for i in range(5)]
    kept = sections.evenly(rows, 11)
    assert [(r["step"], r["dataset"], r["i"]) for r in kept] == [
        (s, d, i) for s in (1, 2) for d in (0, 1) for i in (0, 1)
    ]
    assert sections.evenly(rows, 20) == rows
    assert [(r["step"], r["dataset"], r["i"]) for r in sections.evenly(rows, 2)] == [(1, 0, 0), (2, 0, 0)]


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    run_folders.write_run(tmp_path, steps=1, hostile=False)
    run_folders.write_jsonl(
        tmp_path / "questions.jsonl", [{"step": 1, "dataset": 0, "question": "x" * 5000, "answer": ""}]
    )
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "x" * 1000 + " \u2026 (4,000 more characters)" in html
    assert "x" * 1001 not in html


def test_standard_error_by_hand() -> None:
    assert sections.standard_error([0.1]) is None
    # deviations -1, 0, 1: variance 1, over three values
    assert sections.standard_error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)


def test_step_rows_by_hand() -> None:
    event = {
        "event": "outer_step",
        "step": 4,
        "reward_G": [0.0, None, 0.2],
        "reward_se_G": [0.1, None, 0.3],
        "teacher_kl": "NaN",
    }
    (row,) = sections.step_rows(runs.Run(path=Path(), events={"outer_step": [event]}))
    found = {key: row[key] for key in ("step", "mean", "error", "best", "worst", "repeat_error", "kl", "promoted")}
    assert found == {
        "step": 4,
        "mean": pytest.approx(0.1),
        "error": pytest.approx(0.1),
        "best": 0.2,
        "worst": 0.0,
        "repeat_error": pytest.approx(0.2),
        "kl": None,
        "promoted": False,
    }


def test_histogram_keeps_every_problem() -> None:
    def bars(histogram: dict[str, int]) -> list[tuple[str, int]]:
        event = {"event": "screen", "histogram": histogram}
        section = sections.screening_section(runs.Run(path=Path(), events={"screen": [event]}))
        return [(b["name"], b["problems"]) for b in section["bins"]]

    assert bars({"0": 5, "2": 1, "3": 4}) == [("0", 5), ("1", 0), ("2", 1), ("3", 4)]
    wide = bars({str(i): 1 for i in range(129)})
    assert wide[:2] == [("0", 1), ("1\u201312", 12)] and wide[-1] == ("121\u2013128", 8)
    assert sum(n for _, n in wide) == 129 and len(wide) == 12
    assert bars({"0": 3, "<= 2 %": 2, "all": 1}) == [("0", 3), ("<= 2 %", 2), ("all", 1)]
    assert bars({"0": 1, "999999999": 1})[-1][1] == 1


def test_recorded_diversity_is_in_the_table() -> None:
    steps = [{"event": "outer_step", "step": i, "vendi": v} for i, v in ((1, 30.0), (2, None))]
    rows = [{"step": 1, "question": "q"}, {"step": 2, "question": "r"}]
    section = changes.change_section(runs.Run(path=Path(), questions=rows, events={"outer_step": steps}))
    assert [row["vendi_all"] for row in section["rows"]] == [30.0, None]


def test_topics_by_hand() -> None:
    rows = [{"step": 1, "question": "q", "topic": t} for t in ("a", "a", "b", None)] + [
        {"step": 2, "question": "four", "topic": "b", "well_posed": True, "correct": False}
    ]
    section = changes.change_section(runs.Run(path=Path(), questions=rows))
    assert section["topic_rows"] == [("a", [pytest.approx(2 / 3), 0.0]), ("b", [pytest.approx(1 / 3), 1.0])]
    first, second = section["rows"]
    assert (first["questions"], first["length"], first["well_posed"]) == (4, 1.0, None)
    assert (second["length"], second["well_posed"], second["correct"]) == (4.0, 1.0, 0.0)
    many = [{"step": s, "question": "q", "topic": f"t{s % 9}"} for s in range(1, 101)]
    section = changes.change_section(runs.Run(path=Path(), questions=many))
    assert (
        len(section["rows"]) == 12 and section["rows"][0]["name"] == "1\u20139" and section["rows"][-1]["name"] == "100"
    )
    assert len(section["topic_rows"]) == 8 and section["topic_rows"][-1][0] == "all other"
    for i in range(12):
        assert sum(shares[i] for _, shares in section["topic_rows"]) == pytest.approx(1)


def test_length_and_diversity_by_hand() -> None:
    """Lengths 0 to 10 have 1 and 9 as their tenths; equal texts have Vendi score 1, unrelated ones their number."""
    words = ("alpha", "brick", "cloud", "dwarf", "epoch", "fjord", "gummy", "hinge")
    rows: list[dict[str, Any]] = [{"step": 0, "question": "x" * n} for n in range(11)]
    rows += [{"step": 1, "question": "the same"} for _ in range(9)] + [{"step": 2, "question": w} for w in words]
    rows += [{"step": 3, "question": "too few for a score"}]
    section = changes.change_section(runs.Run(path=Path(), questions=rows))
    first, same, unlike, few = section["rows"]
    assert (first["shortest"], first["length"], first["longest"]) == (1, 5, 9)
    assert section["vendi_of"] == 8, "every score is of as many questions as the smallest group has"
    assert same["vendi"] == pytest.approx(1) and same["vendi_share"] == pytest.approx(1 / 8)
    assert 7.5 < unlike["vendi"] <= 8 and few["vendi"] is None
    assert section["length"].count("<polygon") > 0 and section["diversity"].count("<polyline") == 1
    nothing = changes.change_section(runs.Run(path=Path()))
    assert nothing["rows"] == [] and nothing["length"] == nothing["diversity"] == ""


def test_difficulty_is_the_pass_rate_on_the_questions(tiny_run: Path) -> None:
    run = runs.read_run(tiny_run)
    chart = changes.change_section(run)["difficulty"]
    assert chart.count("<polyline") == 2 and "last training step" in chart
    top = max(event[part]["pass_rate"] for event in run.steps for part in ("student_first", "student_last"))
    assert top > 0
    empty = runs.Run(path=Path(), events={"outer_step": [{"step": 1, "student_first": 3, "student_last": {}}]})
    assert changes.change_section(empty)["difficulty"] == ""
    page = Page(report.render(run))
    sampled, rollouts = sum(e["sampled"] for e in run.steps), run.steps[-1]["student_rollouts"]
    assert (
        f"The loop sampled {rollouts:,} completions by students and judged {sampled:,} texts of the teacher"
        in page.text
    )
    arms = run.summary["arms"]
    spent = (arms["hard_only"]["student_rollouts"], arms["pq"]["student_rollouts"])
    assert "training Hard-Only took {:,}, PQ took {:,}.".format(*spent) in page.text


def test_nice_ticks_by_hand() -> None:
    assert figures.nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert figures.nice_ticks(-0.03, 0.07) == [-0.04, -0.02, 0, 0.02, 0.04, 0.06, 0.08]
    assert figures.nice_ticks(0, 0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert figures.tick_text(-0.05, False) == "\u22120.05" and figures.tick_text(0.4, True) == "40\u00a0%"


@given(st.floats(-1e15, 1e15), st.floats(-1e15, 1e15))
def test_ticks_cover_the_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = figures.nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-200)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= 12


def test_line_chart_puts_points_where_they_belong() -> None:
    axes = figures.Axes(key="k", title="<T>", description="D", x_label="x", y_label="y", log2=True, x_ticks=(1, 4, 16))
    chart = figures.line_chart(axes, [figures.Series("s", [1, 4, 16], [0.0, 0.5, 1.0], notes=["a", "b", "<c>"])])
    points = re.search(r'<polyline class="c0 line" points="([^"]*)"', chart)
    assert points is not None
    xy = [tuple(map(float, pair.split(","))) for pair in points.group(1).split()]
    assert xy == [(56.0, 244.0), (221.0, 137.0), (386.0, 30.0)], "log2 makes 4 the middle of 1 and 16"
    assert '<title id="k-t">&lt;T&gt;</title><desc id="k-d">D</desc>' in chart and "<title>&lt;c&gt;</title>" in chart
    assert Page(chart).wrong == []


def test_stacked_bars_add_up() -> None:
    axes = figures.Axes(key="k", title="T", description="D", x_label="x", y_label="y")
    stacks = [figures.Series("a", range(2), [1.0, 3.0]), figures.Series("b", range(2), [3.0, 0.0], style=1)]
    chart = figures.bar_chart(axes, ["p", "q"], stacks)
    bars = re.findall(
        r'<rect class="c(\d) fill" x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"><title>', chart
    )
    assert [b[0] for b in bars] == ["0", "1", "0"], "a bar of height zero is not drawn"
    (_, x0, y0, h0), (_, x1, y1, h1), (_, _, y2, h2) = ((b[0], *map(float, b[1:])) for b in bars)
    assert (
        x0 == x1
        and y1 + h1 == pytest.approx(y0)
        and h1 == pytest.approx(3 * h0, abs=0.2)
        and h2 == pytest.approx(3 * h0, abs=0.2)
    )
    assert y0 + h0 == pytest.approx(y2 + h2) == pytest.approx(244)


def test_empty_charts_are_no_markup() -> None:
    axes = figures.Axes(key="k", title="T", description="D", x_label="x", y_label="y")
    assert figures.line_chart(axes, [figures.Series("s", [], [])]) == ""
    assert figures.bar_chart(axes, [], []) == ""


@pytest.mark.parametrize(("name", "event"), [("pq.jsonl", "promotion"), ("questions.jsonl", "outer_step")])
def test_a_file_is_missed_only_after_the_event_it_begins_with(tmp_path: Path, name: str, event: str) -> None:
    run_folders.write_run(tmp_path, steps=7)
    (tmp_path / name).unlink()
    assert f"{name} is missing" in str(runs.read_run(tmp_path).notes)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["event"] != event))
    assert runs.read_run(tmp_path).notes == []


def test_unfinished_run_with_half_a_line(tmp_path: Path) -> None:
    run_folders.write_run(tmp_path, steps=7)
    for name in ("summary.json", "pq.jsonl", "hard/test.jsonl"):
        (tmp_path / name).unlink()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"screen"' in line or '"outer_step"' in line or '"promotion"' in line]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*kept, '{"event": "outer_step", "st']))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Unfinished: 7 outer steps and 1 promotion so far; nothing has been measured" in page.text
    assert f"metrics.jsonl:{len(kept) + 1}: the last line is not complete" in page.text
    assert "pq.jsonl is missing" in page.text and "hard/test.jsonl is missing" in page.text
    assert len([a for a in page.all("svg") if a["aria-labelledby"] == "reward-t reward-d"]) == 1
    assert page.wrong == []


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    rows = [{"event": "outer_step", "step": s, "reward_mean": r} for s, r in ((1, 0.1), (2, 0.2), (2, 0.3))]
    run_folders.write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert [(r["step"], r["reward_mean"]) for r in runs.read_run(tmp_path).steps] == [(1, 0.1), (2, 0.3)]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[1, 2]")
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"event": "alarm"}\n\n[1]\n{"a": \xff}\nnot json\n' + b"[" * 100_000 + b"\n3\n"
    )
    run = runs.read_run(tmp_path)
    assert run.events == {"alarm": [{"event": "alarm"}]} and not run.finished
    notes = "\n".join(run.notes)
    for words in (
        "manifest.json holds list, expected a JSON object",
        "summary.json cannot be read: ",
        "metrics.jsonl:3: holds list, expected a JSON object",
        "metrics.jsonl:4: no JSON: ",
        "metrics.jsonl: 2 more lines were left out",
    ):
        assert words in notes
    assert Page(write_report(tmp_path).read_text(encoding="utf-8")).wrong == []


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"neither manifest\.json nor metrics\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_report_is_replaced_in_one_step_and_is_the_same_twice(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    (folder / "report.html").write_text("old")
    assert write_report(folder).read_bytes() == first
    assert [p.name for p in folder.iterdir() if "report" in p.name] == ["report.html"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("1") | st.just(1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("1"), inner, max_size=3),
    max_leaves=6,
)
EVENT_KEYS = re.findall(
    r"\w+",
    "step arm reward_G reward_mean reward_se_G window_mean promoted reason accepted sampled rejected kl seconds "
    "attempts student_rollouts histogram candidates frac_mixed pass_at interval_95 kind message baseline_pass_rate",
)
ROW_KEYS = re.findall(r"\w+", "step dataset question answer reward topic well_posed correct id successes attempts")
EVENTS = ("screen", "outer_step", "promotion", "arm_step", "evaluation", "alarm")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    metrics=st.lists(
        st.fixed_dictionaries({"event": st.sampled_from(EVENTS)}, optional=dict.fromkeys(EVENT_KEYS, JSON)), max_size=5
    ),
    rows=st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(ROW_KEYS, JSON)), max_size=4),
    manifest=st.dictionaries(
        st.sampled_from(["name", "command", "config", "versions", "hashes", "seed", "started_at"]), JSON
    ),
    summary=st.dictionaries(st.sampled_from(["arms", "promotions", "outer_steps", "wall_seconds", "paired"]), JSON),
)
def test_no_content_of_the_files_stops_the_report(
    tmp_path: Path, metrics: list[Any], rows: list[Any], manifest: dict[str, Any], summary: dict[str, Any]
) -> None:
    run_folders.write_json(tmp_path / "manifest.json", manifest)
    run_folders.write_json(tmp_path / "summary.json", summary)
    run_folders.write_jsonl(tmp_path / "metrics.jsonl", metrics)
    for name in ("questions.jsonl", "pq.jsonl", "hard/train.jsonl", "hard/test.jsonl"):
        run_folders.write_jsonl(tmp_path / name, rows)
    assert Page(write_report(tmp_path).read_text(encoding="utf-8")).wrong == []


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran in a headless browser, and the browser's console messages."""
    options = "--headless=new --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=2000 "
    options += "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [str(BROWSER), *options.split(), f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    messages = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode("utf-8", errors="replace"), messages


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_page_in_a_browser(folder: Path, tmp_path: Path) -> None:
    document, messages = browse(write_report(folder), tmp_path / "profile")
    assert messages == []
    assert "576 of 576 match" in document and "48 of 48 match" in document
    assert "Asked: can builtin:tiny learn to solve 96 held-out problems from practice questions" in document
    assert "<title>SOAR run tiny</title>" in document


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_comparison_in_a_browser(folder: Path, tmp_path: Path) -> None:
    other = run_folders.write_run(tmp_path / "<script>document.title='owned'<!--", seed=1)
    document, messages = browse(write_comparison([folder, other], tmp_path / "both.html"), tmp_path / "profile")
    assert messages == []
    assert "<title>2 SOAR runs</title>" in document and document.count('class="chart"') == 4


DRIVE = """
const part = document.querySelector("[data-browser]"), said = [];
const count = () => part.querySelector("[data-shown]").textContent;
const visible = () => [...part.querySelectorAll("tbody tr")].filter((r) => !r.hidden);
const [text, step, topic, posed, correct] = part.querySelectorAll("[data-filter]");
const place = () => part.querySelector("[data-place]").textContent;
const [back, next] = part.querySelectorAll("[data-turn]");
const set = (field, value, kind) => { field.value = value; field.dispatchEvent(new Event(kind)); };
set(text, "{{7*7}}", "input"); said.push(count(), visible()[0].dataset.step);
set(text, "", "input"); set(step, "2", "change"); said.push(count(), visible().every((r) => r.dataset.step === "2"));
set(topic, "counter", "change"); said.push(visible().every((r) => r.dataset.topic === "counter"), visible().length > 0);
set(step, "", "change"); set(topic, "", "change");
const button = part.querySelector("[data-sort=reward]");
const rewards = () => visible().map((r) => Number(r.dataset.reward));
const sorted = (list, sign) => list.every((v, i) => i === 0 || sign * (list[i - 1] - v) >= 0);
button.click(); said.push(button.closest("th").ariaSort, sorted(rewards(), 1));
button.click(); said.push(button.closest("th").ariaSort, sorted(rewards(), -1));
set(text, "", "input"); said.push(visible().length, place(), back.disabled);
const before = visible()[0]; next.click(); said.push(place(), visible().length, visible().includes(before), back.disabled);
back.click(); said.push(visible()[0] === before);
set(correct, "no", "change"); said.push(visible().every((r) => r.dataset.correct === "no"), place().slice(0, 2));
set(posed, "yes", "change"); said.push(visible().every((r) => r.textContent.includes("yes")));
set(text, "nothing has this", "input"); said.push(count(), place(), next.disabled);
document.body.dataset.said = JSON.stringify(said);
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_filters_and_sorting_in_a_browser(html: str, tmp_path: Path) -> None:
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    driven = tmp_path / "driven.html"
    driven.write_text(open_page.replace("</body>", f"<script>{DRIVE}</script></body>"), encoding="utf-8")
    document, messages = browse(driven, tmp_path / "profile")
    assert messages == []
    said = re.search(r'<body data-said="([^"]*)"', document)
    assert said is not None
    found = json.loads(said.group(1).replace("&quot;", '"'))
    filters = ["1 of 576 match", "1", "32 of 576 match", True, True, True, "descending", True, "ascending", True]
    pages = [25, "1\u201325", True, "26\u201350", 25, False, False, True, True, "1\u2013", True]
    assert found == [*filters, *pages, "0 of 576 match", "none", True]
