"""`soar check`: what each finding says, its advice, and the exit code."""

import sys
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scaling
import sizes
import torch
from helpers import ROOT, tiny_backbone
from loop_helpers import BRIEF, TINY, events, read_jsonl, run_tiny, sets, tiny_config, write_problems
from tables import cases

from soar.cli import main
from soar.config import load
from soar.engine.rollouts import Request
from soar.engine.sampler import NativeSampler
from soar.loop.rollout import RolloutEnv
from soar.plan import check, forecast
from soar.plan.check import Finding, check_golds, check_problems, student_finding, teacher_finding
from soar.problems.domain import Domain
from soar.problems.pool import VerifierPool
from soar.problems.prompts import FORMATS
from soar.types import Problem

GOOD, NO_ANSWER = " a b c\nAnswer: 7", " only a question"
NUMBERS = [Problem(f"p{i}", f"last 5{i}", str(i)) for i in range(8)]


def config_for(path: Path, *overrides: str) -> Any:
    return tiny_config(f'problems.source="{path}"', "problems.limit=0", *overrides)


@pytest.mark.parametrize(("count", "status", "advice"), cases("check", "count"))
def test_too_few_problems(tmp_path, count, status, advice):
    finding, _ = check_problems(config_for(write_problems(tmp_path / "p.jsonl", NUMBERS[:count])))
    assert finding.status == status and advice in finding.advice


@pytest.mark.parametrize(("overrides", "golds", "status", "message", "details"), cases("check", "golds"))
def test_golds_that_do_not_grade_are_listed(overrides, golds, status, message, details):
    problems = [Problem(f"p{i}", f"q{i}", gold) for i, gold in enumerate(golds)]
    finding = check_golds(tiny_config(*overrides), problems)
    assert (finding.status, list(finding.details)) == (status, details) and message in finding.message


def test_golds_are_checked_with_their_columns_and_for_a_while(tmp_path, monkeypatch):
    text = "def grade(completions, level, **_):\n    return [{'easy': 1, 'none': None}.get(level[0], 0)]\n"
    (function := tmp_path / "by_level.py").write_text(text)
    assert check.GOLD_BATCH * tiny_config().problems.verify_timeout_s / 2 < 60, "two workers, every check too late"
    levels = [Problem(str(i), "q", "1", {"level": level}) for i, level in enumerate(["easy"] * 4 + ["hard", "none"])]
    by_level = check_golds(tiny_config(f"problems.verifier={function}:grade", "student.reward=paper"), levels)
    under = "4: wrong (a score under problems.success_at = 1.0): '1'"
    assert by_level.details == (under, "5: unscorable (the function gave None or NaN): '1'")
    assert "; reward function of the shape TRL, texts; its scores count as right or wrong" in by_level.message
    marks = "boxed or behind `Answer:`; other marks need a domain (docs/bring.md)"
    assert by_level.advice.endswith(f"{marks}; where a lower score is right, lower problems.success_at")
    monkeypatch.setattr(check, "GOLD_SECONDS", -1.0)
    monkeypatch.setattr(check, "GOLD_BATCH", 4)
    bad = [Problem(f"b{i}", "q", "ba") for i in range(2)]
    finding = check_golds(tiny_config("problems.verifier=number"), [*bad, *NUMBERS[:6]])
    assert finding.message.startswith("2 of 4 gold answers") and finding.status == "warning"
    whole = check_golds(tiny_config("problems.verifier=number"), NUMBERS)
    assert whole.message.startswith("4 of 4") and whole.advice == "`soar verify FILE --golds` checks all"


def test_the_memory_limit_of_a_worker_is_a_config_key(tmp_path):
    greedy = tmp_path / "greedy.py"
    greedy.write_text("def grade(completions, **_):\n    return [1.0 if bytearray(300 * 2**20) else 0.0]\n")
    verifier = f"problems.verifier={greedy}:grade"
    error = f"the last check that failed: {greedy}:grade, line 2: MemoryError: "
    for limit, details in ((250, ("p0: crashed: '0'", error)), (0, ())):
        config = tiny_config(verifier, f"problems.verify_memory_mb={limit}", "problems.verify_workers=1")
        assert check_golds(config, NUMBERS[:1]).details == details


def test_a_finding_cannot_move_the_cursor_or_show_a_secret():
    lines = Finding("x", "FAIL", "a\x1b[2Jb https://me:secret@host", "do\u202e", ("one\ntwo",)).lines()
    assert lines[0] == "FAIL     x           a\u27e8U+001B\u27e9[2Jb https://[hidden]@host"
    assert [line.strip() for line in lines[1:]] == ["one", "two", "-> do\u27e8U+202E\u27e9"]


class Speaker:
    """A sampler that says the given texts one after another; those with `...` at the end are cut off."""

    def __init__(self, texts: list[str]) -> None:
        self.said, self.calls = cycle(texts), [0]

    def sample(self, stack: Any, request: Request) -> Any:
        said = list(islice(self.said, len(request.prompts_B)))
        self.calls.append(self.calls[-1] + len(said))
        ended = torch.tensor([not text.endswith("...") for text in said])
        tokens, rows = torch.zeros(len(said), 10).long(), {"ended_B": ended, "failed_B": ended & False}
        return SimpleNamespace(tokens_B_T=tokens, length_B=(tokens + 1).sum(1), texts=lambda backbone: said, **rows)


def examiner_of(texts: list[str]) -> RolloutEnv:
    sampler: Any = Speaker(texts)
    fmt = replace(FORMATS["question_answer"], answer_style="boxed", pair_style="labels")
    return RolloutEnv(tiny_backbone(), sampler, fmt, VerifierPool(Domain("mine", fmt, "number")))


def teacher_config(*overrides: str) -> Any:
    return tiny_config("student.sampling.max_tokens=20", "teacher.sampling.max_tokens=20", *overrides)


def test_the_cost_of_an_accepted_pair():
    env = examiner_of([GOOD, NO_ANSWER, NO_ANSWER, NO_ANSWER])
    finding = teacher_finding(env, teacher_config(), 64)
    cost = "the 12 pairs of an outer step cost about 48 samples, 480 tokens"
    assert finding.message == f"16 of 64 samples are problems; {cost}"
    assert (finding.status, finding.details) == ("ok", ("rejected: no_answer 48",))
    assert env.sampler.calls == [0, 1, 3, 7, 15, 31, 63, 64]  # type: ignore[attr-defined]
    rare = teacher_finding(examiner_of([GOOD, *[NO_ANSWER] * 15]), teacher_config(), 32)
    assert rare.status == "warning" and rare.advice.startswith("it does not mark its answer")
    hopeless = teacher_finding(examiner_of([GOOD, *[NO_ANSWER] * 15]), teacher_config("teacher.max_tries=10"), 32)
    assert hopeless.status == "FAIL" and "teacher.max_tries = 10" in hopeless.advice


def test_a_batch_ends_when_the_time_is_over_and_unknown_is_an_answer(monkeypatch):
    monkeypatch.setattr(check, "TEACHER_SECONDS", -1.0)
    monkeypatch.setattr(check, "STUDENT_SECONDS", -1.0)
    env = examiner_of([])
    env.sampler, steps = NativeSampler(env.backbone), list[int]()
    env.backbone.model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    findings = [teacher_finding(env, teacher_config(), 64), student_finding(env, teacher_config(), NUMBERS)]
    assert [finding.status for finding in findings] == ["unknown"] * 2 and steps == []
    assert check.can_work(findings) is None
    assert check.summary(findings).startswith("unknown: too little was seen of teacher and student to say")
    assert check.can_work([*findings, Finding("x", "FAIL", "y")]) is False


@pytest.mark.parametrize(("texts", "cause", "status", "advice"), cases("check", "reward 0"))
def test_why_rewards_are_0(texts, cause, status, advice):
    finding = student_finding(examiner_of(texts), teacher_config(), NUMBERS)
    assert finding.status == status and advice in finding.advice
    assert finding.message.startswith(f"0 of 32 attempts are correct, 10 tokens each; {cause} ")
    assert len(finding.details) == 5
    assert finding.details[0].startswith(f"{cause.partition(' (')[0]}: p0, gold '0', read ")
    assert len({line.split(",")[0] for line in finding.details}) == 5, "of five problems"


@pytest.mark.parametrize(("body", "said", "status", "why", "errors"), cases("check", "own"))
def test_an_own_reward_that_errs_is_named(tmp_path, body, said, status, why, errors):
    """It refuses an answer that is read and equals the gold answer; or it raises, which is told once."""
    (tmp_path / "own.py").write_text(f"def grade(completion, answer):\n    return {body}\n")
    env = examiner_of([r"\boxed{0}"])
    env.verifier = VerifierPool(Domain("mine", env.fmt, f"{tmp_path}/own.py:grade"), workers=1)
    finding = student_finding(env, teacher_config(), NUMBERS)
    assert finding.message.startswith(f"0 of 32 attempts are correct, 10 tokens each; {said}")
    assert finding.status == status and why in finding.advice
    assert finding.details[0].startswith("verifier: p0, gold '0', read '0': ")
    assert sum("ZeroDivisionError" in line for line in finding.details) == errors
    env.sampler = Speaker([GOOD])  # type: ignore[assignment]
    taught = teacher_finding(env, teacher_config(), 4)
    assert taught.message.startswith("4 of 4 samples are problems") and (taught.status == "FAIL") == bool(errors)
    assert ("line 2: ZeroDiv" in taught.advice and "a default for the others" in taught.advice) == bool(errors)


def test_problems_that_do_not_fit_in_the_context():
    env = examiner_of([r"\boxed{7}"])
    problems = [Problem(str(i), "a " * 10 * i, "7") for i in range(1, 9)]
    fits = tiny_config(f"student.sampling.max_tokens={env.backbone.context - len(env.prompt(problems[5]))}")
    said = f"2 problems do not fit in the context of {env.backbone.context} tokens"
    assert said in student_finding(env, fits, problems).message
    finding = student_finding(env, fits, problems[3:])
    assert finding.status == "FAIL" and finding.message.startswith("2 of 5 problems do not fit")


def test_the_command_says_yes(tmp_path, capsys):
    source = write_problems(tmp_path / "p.jsonl", NUMBERS)
    words = ["check", "tiny", *sets(*TINY, "problems.limit=0"), "--problems", str(source), "--samples", "8"]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in printed if line.startswith(("ok", "warning"))]
    assert names == ["problems", "golds", "model", "student", "teacher", "cost"]
    assert printed[-1] == "yes: a run can work" and "try first: harder problems" in "".join(printed)


FIGURES = {
    "candidates": 40.0, "hard_share": 0.5, "teacher_tokens": 20.0, "question_tokens": 15.0, "hard_tokens": 30.0,
}  # fmt: skip


def works(*changes: str, **values: float) -> dict[str, forecast.Work]:
    config = tiny_config("arms.curriculum_steps=0", *changes)
    return {w.name: w for w in forecast.workload(config, forecast.assumed(config, FIGURES | values))}


def test_counts_by_hand():
    # 40 candidates x 4 attempts; 20 hard, 10 to train. 2 steps of 3 x 4 pairs and 6 students of 2 steps x 2 x 4 rollouts;
    # 4 reward questions x 2 for each, the baseline 3 at each of 8 questions asked; 4 arms x 10 held out x 4.
    measured, share = 12 * 4 * 2 + 3 * 8, 4 / 14  # of the steps of pq: 4 promotion questions beside 10 hard ones
    tokens = 48 * (share * 15 + (1 - share) * 30)
    counts = works("arms.steps=10", "arms.pq_steps=6")
    assert {name: (w.rollouts, w.sampled, w.trained) for name, w in counts.items()} == {
        "screening": (160, 160 * 30, 0),
        "teacher writes": (48, 48 * 20, 0),
        "students train": (192, 192 * 15, 192 * (forecast.PROMPT + 15)),
        "students measured": (measured, measured * 30, 0),
        "teacher learns": (0, 0, 24 * 270),
        "hard_only": (80, 80 * 30, 80 * (forecast.PROMPT + 30)),
        "pq": (48, pytest.approx(tokens), pytest.approx(tokens + 48 * forecast.PROMPT)),
        "evaluation": (160, 160 * 30, 0),
    }
    # Hard-Only spends what the loop's students did (192 + 120 rollouts), in whole steps of 8.
    assert works("arms.steps=0")["hard_only"].rollouts == 312
    assert works("teacher.reward=learnability", "intrinsic.attempts=5")["students measured"].rollouts == 120 + 24 * 5
    # With votes twice the 24 pairs: 1.5 texts and 8 attempts for each of 48; for arms.questions = 10 of an arm 30 and 160.
    voted = works("teacher.votes=8", 'arms.run=["base","base_t","variants"]', "arms.tokens=9000", "arms.questions=10")
    assert voted["teacher writes"][2:4] == (72 + 48 * 8, 72 * 20 + 48 * 8 * 15)
    assert voted["base_t"].sampled == 9000 and voted["variants"]._replace(name="base_t") == voted["base_t"]
    voted = works("teacher.votes=8", 'arms.run=["base_t","variants"]', "arms.tokens=3000", "arms.questions=10")
    assert voted["base_t"].rollouts == voted["variants"].rollouts == pytest.approx(1500 / 22.5)
    assert works("reward.mode=greedy")["students measured"].rollouts == 12 * 4 + 8
    assert works("teacher.reward=none")["teacher learns"].trained == 0
    assert works("screen.attempts=0")["screening"].rollouts == works("screen.from_run=r")["screening"].rollouts == 0
    assert works("problems.max_hard=4")["evaluation"].rollouts == 4 * 2 * 4
    own = ('arms.run=["base_t","variants","hinted"]', "arms.questions=10", "arms.hint_tokens=6")
    empty = works("teacher.steps=0", "arms.steps=3", *own)  # before it 15 texts; 30, and 200 attempts; 80 hints
    assert empty["students train"].rollouts == empty["students measured"].rollouts == 0
    sampled = {"base_t": 540 + 15 * 20, "variants": 540 + 30 * 20 + 200 * 15, "hinted": 720 + 80 * 3}
    assert {arm: empty[arm][2:4] for arm in sampled} == {arm: (24, tokens) for arm, tokens in sampled.items()}
    # A budget of tokens: all of it for hard_only, for pq what the loop left of it (48 x 20 + 192 x 15 + 120 x 30).
    budget = works("arms.tokens=9000", "arms.steps=0", "arms.pq_steps=0")
    assert (budget["hard_only"].rollouts, budget["pq"].sampled) == (300, 9000 - 960 - 2880 - 3600)


def test_seconds_by_hand():
    rows = [forecast.Work("loop", "a", 1.0, 500.0, 300.0), forecast.Work("arms", "b", 1.0, 100.0, 300.0, kl=True)]
    expected = forecast.Forecast(rows, {"x": 0.25}, forecast.Rates(1.0, 50.0, 30.0, "by hand"))
    assert expected.hours() == pytest.approx((20.0 + 2.0 + 10.0 * forecast.KL_FACTOR) / 3600)
    assert expected.total_line() == "2 rollouts, 600 tokens sampled; 0.01 device-hours (by hand)"
    assert "in all" in "\n".join(expected.lines()) and expected.lines()[-1].endswith("0.25")
    unpaid = forecast.Forecast([*rows, forecast.Work("arms", "pq", 0.0, 0.0)], {}, None)
    advice = "raise arms.tokens, or lower teacher.steps"
    assert f"size of the model is not known; such lengths leave nothing for pq: {advice}" in unpaid.total_line()
    eight = forecast.table_rates(8.03e9)
    assert (eight.decode, eight.train) == pytest.approx((42_344 * 3.213 / 8.03, 46_755 * 3.213 / 8.03))
    assert "(two CPU cores)" in (demo := forecast.forecast(load("demo")).total_line()) and "nothing" not in demo
    page = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
    assert all(line in page for line in sizes.table())


def test_what_is_known_beforehand(tmp_path):
    problems = write_problems(tmp_path / "p.jsonl", [Problem(str(i), f"{i} + 1?", str(i + 1)) for i in range(7)])
    config = tiny_config(f"problems.source={problems}", "problems.limit=0")
    counted = forecast.assumed(config)
    assert (counted["candidates"], counted["hard_share"]) == (7, 0.3)
    (tmp_path / "p.jsonl.evidence.json").write_text("{}")
    assert forecast.assumed(config)["hard_share"] == 1.0 and forecast.workload(config, counted)[0].rollouts == 0
    away = forecast.assumed(load("paper-math", ["problems.source=someone/somewhere", "problems.limit=77"]))
    assert (away["candidates"], away["question_tokens"]) == (77, 512)


def test_dry_run_prints_everything(tmp_path, capsys):
    problems = write_problems(tmp_path / "p.jsonl", [Problem(str(i), f"{i} + 1?", str(i + 1)) for i in range(8)])
    assert main(["run", "--dry-run", "--model", "x/M-3B", "--problems", str(problems)]) == 0
    out = capsys.readouterr().out
    wanted = ("8 of 8 gold answers", "memory per device", "the size in the model's name")
    assert [text for text in (*wanted, "device-hours") if text not in out] == []
    assert '"steps":' in out and "question_tokens                 512\n" in out


def test_a_forecast_says_what_a_run_then_spends(tmp_path):
    """Every question of the training half is a reward question and nothing is promoted: the same number, exactly."""
    learnability = ("teacher.reward=learnability", "intrinsic.attempts=5")
    changes = (*learnability, *BRIEF, "reward.questions=6", "promotion.tau=2", "arms.run=[]")
    run_tiny(tmp_path / "run", *changes)
    hard = sum(len(read_jsonl(tmp_path / "run" / "hard" / f"{half}.jsonl")) for half in ("train", "test"))
    counts = works(*changes, candidates=float(hard), hard_share=1.0)
    spent = events(tmp_path / "run", "outer_step")[-1]["student_rollouts"]
    assert counts[forecast.TRAIN].rollouts + counts[forecast.MEASURE].rollouts == spent


def test_the_model_gives_what_was_measured():
    assert scaling.measured_decode() == pytest.approx(forecast.TABLE[3].decode, rel=0.01)
    tokens = scaling.train_seconds(scaling.Setting("3B"), 1, forecast.TABLE[3].train)
    assert tokens == pytest.approx(scaling.KL_FACTOR, rel=1e-3)


@pytest.mark.parametrize(("gpus", "change"), [(8, {}), (48, {"split": True}), (48, {"per_node": True, "datasets": 8})])
def test_every_gpu_second_is_accounted_for(gpus, change):
    result = scaling.simulate(scaling.Setting(**{"model": "3B", "gpus": gpus, **change}))
    left = gpus * result.seconds - sum(result.spent.values())
    assert left == pytest.approx(0.0, abs=0.02 * gpus * result.seconds)
    assert all(value >= 0 for value in result.spent.values())


def test_the_page_quotes_the_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    monkeypatch.delitem(scaling.LLAMA, "8B")  # which is not quoted
    scaling.main()
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = [block.split("\n") for block in page.split("```")[1::2] if "speed-up" in block]
    quoted = [line.rstrip() for block in blocks for line in block[1:] if line.strip()]
    assert len(quoted) == 9
    assert [line for line in quoted if line not in printed] == []
