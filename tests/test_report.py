"""The report page: what it says, what it refuses to be fooled by, and what it survives; the charts; the end of a run."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loop_helpers import read_jsonl
from tables import cases, change, write_json, write_jsonl

from soar.files import visible
from soar.report import page as report
from soar.report import runs
from soar.report import text as wording
from soar.report.alarms import screen_alarms
from soar.report.page import Chart, Series, write_report
from soar.report.runs import ReportError

IMAGE = Chart.image
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


@pytest.fixture(scope="module", autouse=True)
def drawn() -> Iterator[None]:
    """Charts as they are, which other files do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chart, "image", IMAGE)
        yield


HOSTILE = [text for (text,) in cases("run_folders", "hostile")]


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with hostile questions, in which no arm and no step has the figures of another."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "tiny"))
    change(folder / "manifest.json", b'"--quiet"', b'"name=my demo"')
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for n, entry in enumerate(summary["arms"].values(), 1):
        low, share, high = 0.001 * n, 0.004 * n, 0.02 * n
        entry["pass_at"] = {"1": share, "4": 10 * share}
        entry["interval_95"] = {"1": [low, high], "4": [10 * low, 10 * high]}
    summary["wall_seconds"] = {"screen": 41.2, "loop": 196.4, "arms": 119.3, "evaluate": 33.9}
    write_json(folder / "summary.json", summary)
    rows = {name: read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "questions", "pq")}
    for n, step in enumerate((row for row in rows["metrics"] if row["event"] == "outer_step"), 1):
        step |= {"reward_mean": 0.1 * n, "best_pass_rate": 0.2 * n, "student_rollouts": 69_120 * n, "promoted": n == 1}
    for name in ("questions", "pq"):
        for row, text in zip(rows[name], HOSTILE, strict=False):
            row["question"], row["answer"] = text, text
    for name, written in rows.items():
        write_jsonl(folder / f"{name}.jsonl", written)
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def make_run(arms: dict[str, Any] | None = None, finished: bool = True, **summary: Any) -> runs.Run:
    """A run in memory with this summary and three outer steps, one of them promoted."""
    steps = [{"event": "outer_step", "step": i, "reward_G": [0.1, 0.2]} for i in (1, 2, 3)]
    content = {"arms": arms or {}, "promotions": 1, **summary} if finished else {}
    return runs.Run(Path("runs/x"), summary=content, events={"outer_step": steps, "promotion": [{"step": 2}]})


def arm(share: float, low: float, high: float, rollouts: int = 1000, k: int = 1) -> dict[str, Any]:
    return {"pass_at": {str(k): share}, "interval_95": {str(k): [low, high]}, "student_rollouts": rollouts}


PS, HARD = arm(0.123, 0.091, 0.155), arm(0.021, 0.01, 0.034)


def paired(difference: float, low: float, high: float) -> dict[str, Any]:
    return {"ps - hard_only": {"1": {"difference": difference, "interval_95": [low, high]}}}


@pytest.mark.parametrize(("run", "sentence"), cases("report", "headline"))
def test_headline_says_what_was_found(run, sentence):
    """The best output leads, against the best arm without the search; what is not SOAR's is not credited to it."""
    assert wording.headline(make_run(**run)).replace("\u00a0", " ") == sentence


def test_a_null_run_says_why_and_only_a_null_run():
    """What stood at the bottom, 93 % cut off, is the first that a reader has to know."""
    run = make_run({"ps": HARD, "hard_only": HARD}, promotions=0)
    events: dict[str, list[runs.Row]] = {
        "alarm": [
            *screen_alarms({"truncated_share": 0.93}),
            *({"step": step, "kind": "truncation", "message": f"in step {step} students"} for step in (1, 2)),
            *({"step": None, "arm": arm, "kind": "arm fell", "message": f"{arm} fell"} for arm in ("ps", "pq")),
        ],
        "outer_step": [{"step": step, "window_mean": mean} for step, mean in ((1, 0.0), (2, -0.01))],
        "arm_step": [
            {"arm": arm, "frac_mixed": 0.0, "frac_reward_zero_std": share}
            for arm, share in (("hard_only", 1.0), ("pq", 0.9), ("pq", 1.0), ("likelihood", 0.25))
        ],
    }
    config = {"promotion": {"tau": 0.01}}
    assert wording.why_nothing(runs.Run(Path("x"), {"config": config}, run.summary, events)) == [
        "93% of the attempts in screening hit the token budget; raise student.sampling.max_tokens, or expect low pass rates.",
        *("In step 1 students.", "Ps fell.", "Pq fell."),
        "No student was promoted: the mean reward of a window was +0.0000 at best, and a promotion takes more than "
        "tau = 0.01.",
        "Hard-Only never saw a group with unequal rewards, so there was nothing to learn from.",
    ]
    ahead = {**make_run({"ps": PS, "hard_only": HARD}).summary, "paired": paired(0.102, 0.07, 0.134)}
    equal = {**ahead, "paired": paired(0.01, 0.0, 0.02)}
    events["promotion"] = [{"step": 1}]
    told = [wording.why_nothing(runs.Run(Path("x"), {"config": config}, end, events)) for end in (ahead, equal)]
    assert list(map(len, told)) == [0, 5]
    remarks = [wording.remarks(make_run({name: PS}))[0] for name in ("ps", "base")]
    assert [text.startswith("Hard-Only was not measured, so nothing here tells") for text in remarks] == [True, False]


@pytest.mark.parametrize(("low", "high", "worth"), cases("report", "worth"))
def test_what_the_training_of_the_teacher_was_worth(low, high, worth):
    difference = {"teacher_t - base_t": {"1": {"difference": (low + high) / 2, "interval_95": [low, high]}}}
    run = make_run({"teacher_t": PS, "base_t": HARD, "hard_only": HARD}, paired=difference)
    remark, intervals = wording.remarks(run)
    assert remark.startswith("What the teacher's training was worth: pass@1 ") and remark.endswith(worth)
    assert intervals.endswith("not that of the seed and of each side's best arm.")


@pytest.mark.parametrize(("filter_name", "given", "text"), cases("report", "figure"))
def test_figures_as_text(filter_name, given, text):
    assert getattr(wording, filter_name)(*given).replace("\u00a0", " ") == text


def test_page_is_whole_usable_without_eyes_and_loads_nothing(html, page):
    assert page.wrong == []
    sources = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("href", "action")]
    assert sources and {str(v) for v in sources} <= {f"#{attributes.get('id')}" for _, attributes in page.elements}
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    assert "url(" not in html and "@import" not in html
    assert not any(key.startswith("on") or key == "style" for _, attributes in page.elements for key in attributes)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) and page.all("html") == [{"lang": "en"}]
    assert len(page.all("img")) == 7 and all(a["alt"] for a in page.all("img"))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert all("tabindex" in a and a.get("aria-label") for _, a in page.elements if a.get("role") == "region")


def test_page_shows_the_figures_of_the_summary(folder, page):
    summary = json.loads((folder / "summary.json").read_text())
    text = page.text.replace("\u00a0", " ")
    for name, row in summary["arms"].items():
        for k, share in row["pass_at"].items():
            digits = 2 if share < 0.01 else 1
            low, high = (f"{100 * x:.{digits}f}" for x in row["interval_95"][k])
            assert f"{100 * share:.{digits}f} % [{low}, {high}]" in text, (name, k)
    manifest = json.loads((folder / "manifest.json").read_text())
    for words in ("0:03:16", "0:06:31", "138,240", "12 candidates were tried 4 times each; 12 were hard"):
        assert words in text
    assert f"--out {shlex.quote(manifest['command'][4])} 'name=my demo' --set" in text
    assert '"tau": -2' in text and f'"prompts": "{manifest["hashes"]["prompts"]}"' in text


def test_page_says_what_votes_trust_and_practice_were(run):
    """Answers by vote are not the teacher's own, problems that nobody screened were not tried, and practice comes first."""
    for name, old, new in cases("report", "votes and practice"):
        change(run / name, old.encode(), new.encode())
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "with the answer that most of 8 attempts of the base model give, which nobody checks" in text
    assert "12 problems were taken as hard, untried (screen.attempts = 0)" in text and "Correct attempts" not in text
    assert "practises on its questions alone in its first 1,000 RLOO steps" in text


def test_hostile_text_is_shown_and_does_nothing(html, page):
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1
    assert all(str(a["src"]).startswith("data:image/svg+xml;base64,") and "onerror" not in a for a in page.all("img"))
    for text in HOSTILE:
        assert sum(visible(text) in shown for shown in page.texts) >= 2, text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", html)


def test_hostile_text_in_every_other_place(tmp_path):
    bad = "<b onclick=x>\x1b\u202e{{7*7}}"
    config = {bad: bad, "model": {"path": bad}}
    manifest = dict.fromkeys(("name", "seed"), bad) | {"command": [bad], "config": config}
    write_json(tmp_path / "manifest.json", manifest)
    write_json(tmp_path / "summary.json", {"arms": {bad: arm(0.5, 0.4, 0.6)}, "wall_seconds": {bad: 1.0}})
    step = {"event": "outer_step", "step": 1, "reward_G": [0.1, 0.2], "promoted": True, "reason": bad, "sampled": 3}
    metrics: list[dict[str, Any]] = [
        {"event": "screen", "histogram": {bad: 3}, "candidates": bad, "hard": 1, "attempts": 4},
        {**step, "accepted": 2, "rejected": {bad: 1}},
        {"event": "alarm", "kind": bad, "message": bad, "step": bad},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", metrics)
    question = dict.fromkeys(("dataset", "question", "answer", "topic", "reward", "correct", "id"), bad) | {"step": 1}
    for name in ("questions.jsonl", "pq.jsonl", "hard/train.jsonl"):
        write_jsonl(tmp_path / name, [question, question | {"topic": "b"}])
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert page.wrong == [] and page.all("b") == []
    assert "\x1b" not in html and "\u202e" not in html and "49" not in page.text
    assert page.text.count("<b onclick=x>\u27e8U+001B\u27e9\u27e8U+202E\u27e9{{7*7}}") >= 15


def test_every_chart_is_what_the_events_say(folder):
    run = runs.read_run(folder)
    outer = report.loop_section(run)
    reward, rates, quality, vendi = outer["charts"]
    assert list(reward.series[0].y) == [event["reward_mean"] for event in run.steps]
    error = report.standard_error(run.steps[0]["reward_G"])
    assert reward.series[0].high[0] - reward.series[0].y[0] == pytest.approx(error) != 0
    assert reward.marks == [event["step"] for event in run.steps if event["promoted"]]
    assert list(rates.series[1].y) == [event["best_pass_rate"] for event in run.steps]
    assert rates.y_label == "mean likelihood" and outer["likelihood"]
    run.config["reward"]["mode"] = "sampled"
    assert report.loop_section(run)["charts"][1].y_label == "solved"
    assert list(vendi.series[0].y) == [event["vendi"] for event in run.steps]
    first = [row["correct"] for row in run.questions if row["step"] == run.steps[0]["step"]]
    assert quality.series[2].y[0] == pytest.approx(sum(first) / len(first))
    assert report.content(run)["rollouts"] == run.steps[-1]["student_rollouts"]
    steps = report.arms_section(run)["steps"]
    assert steps == 1 + max(event["step"] for event in run.events["arm_step"])
    text = "here none took more, so none met the hard problems"
    for alone in (steps, steps - 1):
        run.config["arms"]["curriculum_steps"] = alone
        page = report.render("report.html", report.content(run))
        assert (text in " ".join(page.split())) == (alone == steps)
    run.steps[0]["reward_se_G"] = []
    for told in ([[1.0, 2.0], [0.1, 0.1]], [[1.0, 2.0], 7], [[1.0, None], [0.1, 0.1]], [["<b>", 2.0], [0.1, "<b>"]]):
        run.steps[1].update(zip(("reward_G", "reward_se_G"), told, strict=True))
        run.config["student"]["repeats"] = 2
        page = " ".join(report.render("report.html", report.content(run)).split())
        assert ("of one dataset's students" in page) == (told == [[1.0, 2.0], [0.1, 0.1]])
        assert "With one student a dataset" not in page
    base = run.arms["base"]
    assert f"> {base.evaluation_tokens // (base.problems * base.attempts)} an attempt<" in page.replace('">', "> ")
    sections = report.arms_section(run), report.loop_section(run)
    assert all("data:image/svg+xml" in chart.image() for section in sections for chart in section["charts"])


def test_a_chart_is_an_image_with_its_points_where_they_belong():
    chart = Chart("k", "<T>", "x", 'y"', [Series("_a_1 <b>", [1, 4, 16], [0.0, 0.5, 1.0])], True, (1, 4, 16))
    (image,) = Page(chart.image()).all("img")
    assert str(image["alt"]).startswith('<T>: y" against x; ') and chart.image() == chart.image()
    text = base64.b64decode(str(image["src"]).removeprefix("data:image/svg+xml;base64,")).decode()
    assert "_a_1 &lt;b&gt;<" in text, "a name that matplotlib would hide"
    path = re.search(r'd="M ([^"]+)"( clip-path="[^"]*")? style="fill: none; stroke: #7a828c; stroke-width: 1.5', text)
    assert path is not None
    points = re.findall(r"([\d.]+) ([\d.]+)", path[1])
    (x0, y0), (x1, y1), (x2, y2) = ([float(v) for v in point] for point in points)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01), "log2 makes 4 the middle of 1 and 16"
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.01) and y0 > y2
    one = Chart("k", "t", "outer step", "y", [Series("a", [0], [0.5])]).figure().axes[0]
    assert [tick for tick in one.get_xticks() if tick <= one.get_xlim()[1]] == [0], "no step 0.008"


def test_tokens_of_an_arm_on_its_way():
    """pass@k against all tokens: on its way, then its result, where there is one; arms without tokens are left out."""
    ((events,),) = cases("report", "arms on their way")
    charts = report.arms_section(runs.Run(path=Path(), events=events))["charts"]
    points = [[(s.label, s.x, s.y) for s in c.series if s.x] for c in charts[:2]]
    assert points == [[("Hard-Only", [2], [0.1]), ("PQ", [2, 4], [0.1, 0.3])], [("PQ", [4], [0.5])]]
    assert [{s.style for s in chart.series if s.label == "PQ"} for chart in charts] == [{2}] * 3, "one colour"


def test_a_small_file_makes_no_large_table_and_no_long_work(monkeypatch):
    arms = {f"a{i}": {"pass_at": {str(2 * i + 1): 0.5, str(2 * i + 2): 0.5}} for i in range(100)}
    section = report.arms_section(runs.Run(Path(), summary={"arms": arms}))
    assert (len(section["rows"]), len(section["ks"]), section["of"]) == (60, 60, (100, 120))
    monkeypatch.setattr(report, "mean", counted := Mock(return_value=0.5))
    report.step_rows(runs.Run(Path(), questions=[{"step": 1}], events={"outer_step": [{"step": 1}] * 9}))
    assert counted.call_count == 2, "a label is counted once a step"


def test_what_the_teacher_wrote_and_what_changed():
    """Best and worst dataset of a step with its own questions; shares of topics in the first and the last step by hand."""
    rows = [
        {"step": step, "dataset": k, "question": f"q{step}{k}{i}", "answer": "1", "reward": k / 10, "topic": topic}
        for step, topics in ((0, "aabb"), (1, "abbb")) for k in (0, 1) for i, topic in enumerate(topics)
    ]  # fmt: skip
    steps = [{"step": step, "distinct_share": share} for step, share in ((0, 1.0), (1, 0.5))]
    run = runs.Run(Path("x"), questions=rows, events={"outer_step": steps})
    assert [(step, [(name, reward, [q["question"] for q in some]) for name, reward, some in ends]) for step, ends in
            report.written_section(run)] == [
        (0, [("best", 0.1, ["q010", "q011", "q012"]), ("worst", 0.0, ["q000", "q001", "q002"])]),
        (1, [("best", 0.1, ["q110", "q111", "q112"]), ("worst", 0.0, ["q100", "q101", "q102"])]),
    ]  # fmt: skip
    assert [name for name, *_ in wording.extremes([{**row, "reward": 0.1} for row in rows])] == ["alike"]
    near = runs.Run(Path("x"), questions=[{**row, "reward": row["reward"] / 1e4} for row in rows])
    assert "best, reward 0.00001000<" in report.render("report.html", report.content(near)), "and the worst 0"
    changed = report.loop_section(run)["changes"].replace("\u00a0", " ")
    assert changed == "From step 0 to step 1: different from each other 100.0 % → 50.0 %."
    assert len(report.questions_section(rows * 100)["rows"]) == 534, "every third of 1,600"


def test_damaged_files_are_named(tiny_run, tmp_path):
    (tmp_path / "manifest.json").write_text("[1, 2]")
    (tmp_path / "summary.json").write_text("{")
    lines = b'{"event": "alarm"}\n\n[1]\n{"a": \xff}\nnot json\n' + b"[" * 100_000 + b"\n3\n"
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    run = runs.read_run(tmp_path)
    assert run.events == {"alarm": [{"event": "alarm"}]} and not run.finished
    notes = "\n".join(run.notes)
    for words in ("manifest.json cannot be read: it holds list", "summary.json cannot be read: ", ":3: no JSON: it"):
        assert words in notes
    assert "metrics.jsonl:4: no JSON: " in notes and "metrics.jsonl: 2 more lines were left out" in notes
    assert Page(write_report(tmp_path).read_text(encoding="utf-8")).wrong == []
    with pytest.raises(ReportError, match=r"neither manifest\.json nor metrics\.jsonl"):
        write_report(tmp_path / "nothing")
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    write_json(tmp_path / "run" / "now.json", {"task": "<b>loop", "done": 7, "total": 9, "left": 61})
    kept = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:5]  # the second promotion is not there
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*kept, '{"event": "outer_step", "st']))
    text = Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text
    assert "Stopped: no process holds the folder any more." in text and "Now:" not in text
    (tmp_path / "run" / ".lock").unlink()
    os.mkfifo(tmp_path / "run" / ".lock")  # nobody knows, and a pipe is not waited for
    text = Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text
    assert "Now: <b>loop: 7 of 9, about 0:01:01 left." in text and "Stopped:" not in text
    assert "Unfinished: 2 outer steps and 1 promotion so far; nothing was measured" in text
    assert "metrics.jsonl:6: the last line is not complete" in text
    pq = runs.read_arm("pq", {"pass_at": {"1": None, "01": 0.5, "4": 1}, "interval_95": {"1": [0, 1, 2]}})
    assert wording.held_out(pq).replace("\u00a0", " ") == "PQ: pass@1 50.0 %, pass@4 100.0 %", "1 stands twice"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("1") | st.just(1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("1"), inner, max_size=3),
    max_leaves=6,
)
EVENTS = "screen outer_step promotion arm_step curve evaluation alarm"
EVENT_KEYS = """step arm reward_G reward_mean window_mean promoted reason accepted sampled rejected seconds attempts message
  student_last student_rollouts histogram candidates frac_mixed pass_at interval_95 kind baseline_pass_rate total_tokens"""
ROW_KEYS = "step dataset question answer reward topic well_posed correct id successes attempts"


def some(keys: str, **fixed: Any) -> Any:
    return st.fixed_dictionaries(fixed, optional=dict.fromkeys(keys.split(), JSON))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(some(EVENT_KEYS, event=st.sampled_from(EVENTS.split())), max_size=5),
    st.lists(some(ROW_KEYS), max_size=4),
    some("name command config versions hashes seed"),
    some("arms promotions outer_steps wall_seconds paired"),
)
def test_no_content_of_the_files_stops_the_report(tmp_path, metrics, rows, manifest, summary):
    write_json(tmp_path / "manifest.json", manifest)
    write_json(tmp_path / "summary.json", summary)
    write_jsonl(tmp_path / "metrics.jsonl", metrics)
    for name in ("questions.jsonl", "pq.jsonl", "hard/train.jsonl", "hard/test.jsonl"):
        write_jsonl(tmp_path / name, rows)
    assert Page(write_report(tmp_path).read_text(encoding="utf-8")).wrong == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_script_runs_under_the_pages_own_policy(folder, tmp_path):
    options = "--headless=new --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=2000 "
    options += "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    options += f" --user-data-dir={tmp_path} --dump-dom {write_report(folder).as_uri()}"
    command = [str(BROWSER), *options.split()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert b"CONSOLE" not in done.stderr, "neither an error nor anything against the policy"
    assert "24 of 24 match" in done.stdout.decode("utf-8", errors="replace")


def test_a_run_ends_without_its_page_but_not_with_a_full_disk(folder, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(report, "render", Mock(side_effect=TypeError("'dict object' has no attribute 'taken'")))
    report.report_at_the_end(folder, told.append)
    assert "report.html could not be made (TypeError: 'dict object' has no attribute 'taken')" in told[0]
    assert f"soar report {folder}" in told[0]
    monkeypatch.setattr(report, "render", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        report.report_at_the_end(folder, told.append)
