"""Screening: what its event counts, that it goes on where it stopped, what its evidence is tied to; `soar screen`, and that a
run uses its evidence."""

import json
import os
import re
import resource
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import ROOT, some_problems, tiny_backbone, tiny_examiner
from loop_helpers import TINY, easy_problems, events, hard_problems, read_jsonl, sets, tiny_config
from tables import cases, write_jsonl

from soar.cli import main
from soar.config import ConfigError
from soar.domains.world import get_world
from soar.problems import domain
from soar.problems.load import DataError
from soar.run import screen as screening
from soar.run.folder import EVIDENCE, RunFolder
from soar.run.interrupts import Stopped
from soar.run.screen import screen, screen_event, table_lines, what_fits
from soar.types import Interrupted, Problem, Screening


def test_screen_event_by_hand():
    config = tiny_config("student.attempts=2", "screen.attempts=100", "screen.max_successes=2")
    counts = {"a": 0, "b": 0, "c": 1, "d": 2, "e": 3, "f": 30, "g": 99, "h": 100}
    found = {name: Screening(successes, 100, truncated=5) for name, successes in counts.items()}
    event = screen_event(found, config)
    histogram = {"0": 2, "<= 2 %": 2, "2-10 %": 1, "10-50 %": 1, "50-100 %": 1, "all": 1}
    assert (event["candidates"], event["hard"], event["attempts"], event["histogram"]) == (8, 4, 100, histogram)
    assert list(event["histogram"]) == list(histogram)
    assert event["pass_rate"] == pytest.approx(235 / 800)
    assert event["truncated_share"] == pytest.approx(0.05)
    rates = [count / 100 for count in counts.values()]
    assert event["frac_all_wrong"] == pytest.approx(sum((1 - p) ** 2 for p in rates) / 8)
    assert event["frac_all_right"] == pytest.approx(sum(p**2 for p in rates) / 8)
    assert event["frac_mixed"] == pytest.approx(sum(2 * p * (1 - p) for p in rates) / 8)


class Attempted:
    """An env whose attempt n at problem hard-i is correct when n >= 100 - i, and truncated when n is odd. asked, seeds: of
    every call."""

    def __init__(self, break_at: str = "") -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.seeds: list[Any] = []
        self.break_at = break_at
        self.threads, self.parallel = 1, None
        model = torch.nn.Linear(1, 1)
        self.backbone, self.sampler = SimpleNamespace(device=torch.device("cpu"), model=model), SimpleNamespace()

    def rollout(
        self, stack: Any, problems_P_Q: list[list[Problem]], attempts: int, seed_P: Any, sampling: Any, first: int = 0
    ) -> Any:
        (problems,) = problems_P_Q
        if self.break_at in [problem.id for problem in problems]:
            raise KeyboardInterrupt
        self.asked += [(problem.id, first, attempts) for problem in problems]
        self.seeds.append(seed_P)
        self.temperature = sampling.temperature
        number_N = torch.arange(first, first + attempts)
        solved_Q_N = torch.stack([number_N >= 100 - int(p.id.removeprefix("hard-")) for p in problems])
        ended_B = (number_N % 2 == 0).repeat(len(problems))
        valid_P_Q_N, rollouts = torch.ones_like(solved_Q_N)[None], SimpleNamespace(ended_B=ended_B)
        return SimpleNamespace(solved_P_Q_N=solved_Q_N[None], valid_P_Q_N=valid_P_Q_N, rollouts=rollouts)


def screened(
    path: Path, env: Any, problems: list[Problem], *overrides: str, resume: bool = False, told: Any = None
) -> Any:
    """(found, rows of the file, items told to the progress, which is another one where `told` is given) of a screening."""
    keys = ("screen.attempts=100", "screen.max_successes=0", "screen.temperature=0.7")
    config, done = tiny_config(*keys, *overrides), []
    with RunFolder(path, config, [], resume) as folder:
        found = screen(env, problems, config, folder, {"model": "m"}, told or (lambda *items: done.append(items)))
        return found, folder.rows("hard/screen.jsonl"), done


def test_screening_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Calls of at most 64 rows; the last line of an id counts. What lacks in a call is attempted beside what is there."""
    monkeypatch.setattr(screening, "ROWS_CPU", (64, 64))
    problems = hard_problems(20)
    counts, rows, done = screened(tmp_path / "straight", Attempted(), problems)
    assert counts == {f"hard-{i}": Screening(i, 100, 50) for i in range(20)}
    assert rows[0] == {"evidence": {"model": "m"}}
    last = {row["id"]: row for row in rows[1:]}
    assert last["hard-7"] == {"id": "hard-7", "successes": 7, "attempts": 100, "truncated": 50}
    assert [row["attempts"] for row in rows[1:] if row["id"] == "hard-7"] == [8, 32, 64, 96, 100]
    assert done[0] == (0, 2000) and done[-1] == (2000, 2000) and done == sorted(done)
    with pytest.raises(KeyboardInterrupt):
        screened(tmp_path / "cut", Attempted(break_at="hard-17"), problems)
    file = tmp_path / "cut" / "hard" / "screen.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 15  # two calls of seven, and the third of six was not whole
    file.write_bytes(b"".join(lines[:12]) + lines[12][:9])
    resumed = Attempted()
    again, rows_again, done = screened(tmp_path / "cut", resumed, problems, resume=True)
    assert (again, rows_again, resumed.temperature) == (counts, rows, 0.7)
    assert file.read_bytes() == (tmp_path / "straight" / "hard" / "screen.jsonl").read_bytes()
    assert [name for name, *_ in resumed.asked][:13] == [f"hard-{i}" for i in range(7, 20)]
    assert done[0] == (11 * 8, 2000)


def test_a_stop_is_heard_in_the_middle_of_a_call_and_what_was_sampled_is_kept(tmp_path, monkeypatch):
    """With the sampler's own steps between two looks, and progress that moves inside a call."""
    monkeypatch.setattr(screening, "ROWS_CPU", (16, 16))
    env, problems = tiny_examiner(tiny_backbone()), some_problems(4)
    keys = ("screen.attempts=20", "student.sampling.max_tokens=6")
    seen, calls, real = list[tuple[int, int]](), list[int](), env.sampler.sample

    def told(done: int, total: int) -> None:
        seen.append((done, total))
        if len(calls) == 2 and done > 16:  # the second call is on its way
            raise Stopped("enough", "")

    monkeypatch.setattr(env.sampler, "sample", lambda *given: calls.append(len(seen)) or real(*given))
    with pytest.raises(Stopped):
        screened(tmp_path / "cut", env, problems, *keys, told=told)
    assert len(calls) == 2 and len(seen) == calls[1] + 1, "the stop came with the first token of the second call"
    assert len({done for done, _ in seen if 0 < done < 16}) > 2, "progress moved inside of the first call"
    assert len(read_jsonl(tmp_path / "cut" / EVIDENCE)) == 3  # the header and the first call
    resumed, *_ = screened(tmp_path / "cut", env, problems, *keys, resume=True)
    monkeypatch.setattr(screening, "ROWS_CPU", (512, 512))
    large, *_ = screened(tmp_path / "large", env, problems, *keys)
    assert large == resumed, "the counts do not depend on the size of the calls"


def test_a_screening_of_the_same_problems_is_used_again_whatever_its_seed(tmp_path):
    env: Any = Attempted()
    problems, limit = hard_problems(12), resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(name: str, seed: int, problems: list[Problem], source: str = "", prompt: str = "p") -> Any:
        config = tiny_config("screen.attempts=100", f"seed={seed}")
        evidence = {"model": name, "prompt": prompt, "seed": seed}
        with RunFolder(tmp_path / name, config, []) as folder:
            folder.note_hashes(problems="same")
            if source:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))  # it ends in the first line, as a kill may
                with pytest.raises(Interrupted):
                    screening.copy_screening(folder, tmp_path / source, "same")
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
                screening.copy_screening(folder, tmp_path / source, "same")
                screening.copy_screening(folder, tmp_path / "gone", "same")  # is not asked again
            return screen(env, problems, config, folder, evidence, print)

    first = run("first", 3, problems[:8])
    found = run("second", 4, problems, "first")
    assert found == first | {f"hard-{i}": Screening(i, 100, 50) for i in range(8, 12)}
    assert len(env.seeds) == 10
    assert env.seeds[0] == env.seeds[-1]  # the rest is drawn with the seed of what is there
    rows = read_jsonl(tmp_path / "second" / "hard" / "screen.jsonl")
    assert rows[0] == {"evidence": {"model": "first", "prompt": "p", "seed": 3}}
    with pytest.raises(DataError, match="screened with 'p', this run uses 'q'"):
        run("of another prompt", 4, problems, "first", "q")
    other = pytest.raises(ConfigError, match=r"screen\.from_run = .*: it screened other problems")
    with RunFolder(tmp_path / "third", tiny_config(), []) as folder, other:
        screening.copy_screening(folder, tmp_path / "first", "other")
    assert not (tmp_path / "third" / "hard").exists()


def test_early_stopping_attempts_in_waves_and_leaves_solved_problems(tmp_path):
    names = (0, 1, 75, 99, 100)  # first success at attempt: never, 99, 25, 1, 0
    problems = [hard_problems(101)[i] for i in names]
    env = Attempted()
    _, rows, _ = screened(tmp_path / "a", env, problems, "screen.early_stop=true")
    last = {row["id"]: (row["successes"], row["attempts"]) for row in rows[1:]}
    assert list(last.values()) == [(0, 100), (1, 100), (7, 32), (7, 8), (8, 8)]
    assert [first for name, first, _ in env.asked if name == "hard-0"] == [0, 8, 32, 64, 96]
    assert [count for name, _, count in env.asked if name == "hard-0"] == [8, 24, 32, 32, 4]
    full, *_ = screened(tmp_path / "b", Attempted(), problems)
    for most in (0, 1):
        hard = {name for name, row in full.items() if row.successes <= most}
        keys = ("screen.early_stop=true", f"screen.max_successes={most}")
        early, *_ = screened(tmp_path / str(most), Attempted(), problems, *keys)
        assert {name for name, row in early.items() if row.successes <= most} == hard
        assert all(early[name] == full[name] for name in hard)


def test_the_rate_of_the_hard_set_by_hand():
    """Good-Turing: problems solved once tell how often those never solved would be."""
    plain = ("screen.attempts=100", "screen.max_successes=0", "arms.steps=50", "student.attempts=8")

    def event(counts: list[int], *overrides: str, attempts: int = 100) -> dict[str, Any]:
        rows = {str(i): Screening(count, attempts) for i, count in enumerate(counts)}
        return screen_event(rows, tiny_config(*(overrides or plain)))

    known = event([0] * 10 + [1] * 3 + [40])
    assert known["hard_rate"] == pytest.approx(3 / (100 * 10))
    assert known["planned_rollouts"] == 50 * 2 * 8
    assert event([0] * 10, "arms.steps=0")["planned_rollouts"] == 2 * 3 * 2 * 2 * 2 * 4, "what the outer loop takes"
    budget = event([0] * 10 + [1], "arms.tokens=4800", "student.sampling.max_tokens=48")
    assert budget["planned_rollouts"] == 4800 / 24
    assert known["expected_successes"] == pytest.approx(2.4)
    assert event([0] * 10 + [7])["expected_successes"] is None
    # At most one success is hard: (1 * n(1) + 2 * n(2)) of 100 attempts at 13 problems.
    wide = event([0] * 10 + [1] * 3 + [2], "screen.attempts=100", "screen.max_successes=1")
    assert wide["hard_rate"] == pytest.approx((3 + 2) / (100 * 13))
    # Stopped early, the one success of a problem is seen among all 128 attempts only if it came in the last 32.
    waves = ("screen.attempts=128", "screen.early_stop=true", "screen.max_successes=0")
    early = event([0] * 10 + [1], *waves, attempts=128)
    assert early["hard_rate"] == pytest.approx(1 / (32 / 128) / (128 * 10))
    rows = {"left": Screening(1, 8), **{str(i): Screening(int(i == 10), 128) for i in range(11)}}
    some = screen_event(rows, tiny_config(*waves))
    assert (some["hard_rate"], some["pass_rate"], some["frac_mixed"]) == (early["hard_rate"], None, None)


OWN = ("problems.limit", "screen.")
SETS = sets(*(override for override in TINY if not override.startswith(OWN)))
HARD_ONLY = ["--set", "screen.max_successes=0"]
FILES = ("hard.jsonl", "hard.jsonl.evidence.json", "hard/screen.jsonl", "screen.json", "table.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of problems of which the embedded model solves some and others not."""
    problems = [*easy_problems(12), *get_world("tiny").problems("hard", 8, 0)]
    rows = [{"uid": p.id, "task": p.question, "gold": p.answer, "Body": str(i)} for i, p in enumerate(problems)]
    return write_jsonl(tmp_path_factory.mktemp("source") / "p.jsonl", rows)


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    names = sets("problems.question_column=task", "problems.answer_column=gold")
    words = ["screen", "--problems", str(source), "--out", str(out), "--attempts", "40"]
    return [*words, *SETS, *names, *HARD_ONLY, *more]


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished screening. Change nothing in it."""
    out = tmp_path_factory.mktemp("screened") / "out"
    assert main([*arguments(source, out), "tiny", "--quiet"]) == 0
    return out


def test_files_and_table(source, finished, capsys):
    rows = read_jsonl(finished / "hard" / "screen.jsonl")
    assert rows[0]["evidence"]["attempts"] == 40 and len(rows) == 1 + 3 * 20
    last = {row["id"]: row for row in rows[1:]}  # of three waves
    hard = read_jsonl(finished / "hard.jsonl")
    assert [row["id"] for row in hard] == [name for name, row in last.items() if row["successes"] == 0]
    assert 8 <= len(hard) < 20 and {row["attempts"] for row in hard} == {40}
    assert {"Body", "question", "answer"} < set(hard[0])
    assert json.loads((finished / "hard.jsonl.evidence.json").read_text()) == rows[0]["evidence"]
    event = json.loads((finished / "screen.json").read_text())
    assert (event["candidates"], event["hard"]) == (20, len(hard))
    table = (finished / "table.txt").read_text().splitlines()
    assert table[0] == "20 problems, 40 attempts each (temperature 1.0, at most 48 tokens)"
    assert main([*arguments(source, finished, "--resume"), "tiny"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(table)] == table
    command = shlex.split(printed[-1].removeprefix("next: "))
    assert command[:3] == ["soar", "run", "tiny"] and "problems.question_column=task" not in command
    assert {"screen.attempts=40", "screen.max_successes=0", str(finished / "hard.jsonl")} < set(command)
    assert main(["report", str(finished), "--out", f"{finished}.html"]) == 0
    text = Path(f"{finished}.html").read_text()
    assert ">finished<" in text and "The screening is finished, and its table in table.txt" in text
    assert "unfinished<" not in text and "metrics.jsonl is missing" not in text


def test_an_interrupted_screening_ends_like_a_straight_one(source, finished, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", screening.screen_call

    def interrupted(*given: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(screening, "screen_call", interrupted)
        assert main([*arguments(source, out), "tiny", "--quiet"]) == 128 + signal.SIGTERM
    command = shlex.join(["soar", *arguments(source, out), "tiny", "--quiet", "--resume"])
    assert f"soar: stopped by SIGTERM; everything is saved. Continue with: {command}\n" in capsys.readouterr().err
    assert not (out / "table.txt").exists()
    with open(out / "hard" / "screen.jsonl", "a") as file:
        file.write("{}\n")
    assert main([*arguments(source, out, "--resume"), "tiny", "--quiet"]) == 0
    assert "screen.jsonl:2 is damaged: what follows is made again" in capsys.readouterr().err
    for name in FILES:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_uses_the_evidence(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "screen", lambda *given: pytest.fail("screened again"))
    words = ["run", "tiny", "--quiet", "--problems", str(finished / "hard.jsonl"), "--out", str(tmp_path / "run")]
    short = ["teacher.steps=1", "arms.run=[]", "screen.attempts=40", "problems.question_column=task", "seed=3"]
    short += ["screen.early_stop=true"]  # which leaves the hard set as it is
    assert main([*words, *SETS, *HARD_ONLY, *sets(*short)]) == 0
    assert main([*words[:-1], str(tmp_path / "warm"), *SETS, *HARD_ONLY, *sets(*short, "screen.temperature=0.5")]) == 1
    (event,) = events(tmp_path / "run", "screen")
    hard = read_jsonl(finished / "hard.jsonl")
    assert (event["hard"], event["candidates"], event["frac_all_wrong"]) == (len(hard), len(hard), 1.0)
    rows = [row for half in ("train", "test") for row in read_jsonl(tmp_path / "run" / "hard" / f"{half}.jsonl")]
    assert {(r["id"], r["question"], r["attempts"]) for r in rows} == {(r["id"], r["question"], 40) for r in hard}
    copied = (tmp_path / "run" / "hard" / "train.jsonl.evidence.json").read_bytes()
    assert copied == (finished / "hard.jsonl.evidence.json").read_bytes()


def test_evidence_is_tied_to_the_text_of_a_reward_function(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(domain, "sha256_of", reader := Mock(wraps=domain.sha256_of))
    own = tmp_path / "own.py"
    own.write_text("def grade(completions, **_):\n    return [0.0] * len(completions)\n")
    words = [*arguments(source, tmp_path / "out"), "tiny", "--quiet", "--set", f'problems.verifier="{own}:grade"']
    assert main(words) == 0
    assert reader.call_count == 2, "for the candidates, and for what grades them"
    own.write_text(own.read_text().replace("0.0", "1.0"))
    hard = ["--problems", str(tmp_path / "out" / "hard.jsonl"), "--out", str(tmp_path / "run")]
    hard += sets("screen.attempts=40", f'problems.verifier="{own}:grade"')
    assert main(["run", "tiny", *hard, *SETS, *HARD_ONLY]) == 1
    assert "the verifier's file (sha256): screened with" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 1
    assert "verifier changed since the run began" in capsys.readouterr().err


@pytest.mark.parametrize("key", [key for (key,) in cases("screening", "drawn")])
def test_evidence_says_how_attempts_were_drawn(env, key):
    assert screening.evidence_key(tiny_config(key), env) != screening.evidence_key(tiny_config(), env)


def test_words_for_what_plain_rl_sees():
    def words(counts: list[int], **event: float) -> str:
        config = tiny_config("screen.attempts=100", "screen.max_successes=0", "student.attempts=4")
        rows = {str(i): Screening(count, 100) for i, count in enumerate(counts)}
        return "\n".join(table_lines({**screen_event(rows, config), **event}, config))

    assert "no learning signal: nearly every group is all wrong" in words([0] * 99 + [1])
    assert "no learning signal: nearly every group is all right, the problems are solved" in words([100] * 10)
    assert "43.8% with a learning signal" in words([50] * 5 + [0] * 5)
    assert "raise student.sampling.max_tokens (now 48)" in words([0] * 10, truncated_share=0.6)
    plateau = words([0] * 10)
    assert "at most 0.048 of 16 attempts correct, 0.024 a step (none of 1,000 was)" in plateau
    assert "try first: easier problems if you have some (arm real); with 4 million tokens of MATH" in plateau
    assert "try first: the candidates" in words([0] * 10 + [50] * 32)
    assert "try first: the candidates" not in words([0] * 10 + [50] * 31 + [100, 70]), "solvable takes neither"


@pytest.mark.parametrize(("rate", "tried", "easier", "lines"), cases("check", "fits"))
def test_what_to_train_first_and_where_that_was_measured(rate, tried, easier, lines):
    config = tiny_config("student.prompts_per_step=8", "student.attempts=32", "arms.steps=1000")
    assert what_fits(config, rate, tried, easier).split("\n") == lines
    assert all((ROOT / page).is_file() for page in re.findall(r"docs/\S+\.md", "".join(lines)))


def test_golds_that_are_no_values_are_left_out_counted_and_named(tmp_path, capsys):
    golds = ["7", "1/2", "x+1", "(1, 2)", "isosceles triangle", "Monday", "proof"]
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": g, "question": f"q {g}", "answer": g} for g in golds])
    words = ["screen", "tiny", "--problems", str(path), "--verifier", "math", "--attempts", "1", *SETS]
    for kept, more in ((4, []), (6, ["--set", "screen.text_golds=true"])):
        assert main([*words, *more, "--out", str(tmp_path / str(kept))]) == 0
        event, shown = json.loads((tmp_path / str(kept) / "screen.json").read_text()), capsys.readouterr()
        assert (event["candidates"], event["text_golds"], event["ungradable"]) == (kept, 0 if more else 2, 1)
        assert "the gold answer of Monday can only be compared as text: 'Monday'" in shown.err
        assert "the gold answer of proof cannot be graded: 'proof'" in shown.err
        assert ("2 whose gold answer can only be compared as text" in shown.out) == (not more)
