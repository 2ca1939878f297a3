"""pass@k by brute force, intervals over seeds by hand and by formula, counts that do not depend on how the work is split;
questions whose figures are known, and alarms."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from helpers import random_stack
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_helpers import easy_problems, tiny_config
from scipy.stats import f_oneway
from tables import cases

from soar.config import EvaluateConfig
from soar.loop import evaluate
from soar.loop.evaluate import bootstrap_interval, clopper_pearson, count_correct, over_seeds, told_apart
from soar.loop.parallel import no_tick
from soar.report import alarms
from soar.report.alarms import hashed_ngrams, step_vendi, vendi_score


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
        share = sum(map(any, subsets)) / len(subsets)
        assert evaluate.pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12)
    for correct, k in ((-1, 1), (samples + 1, 1), (0, 0), (0, samples + 1)):
        with pytest.raises(ValueError, match=f"pass@{k} from {correct} correct of {samples} samples is not defined"):
            evaluate.pass_at_k(samples, correct, k)


def test_paired_differences_pair_problems():
    config, a, b = EvaluateConfig(attempts=4, ks=(1,), bootstrap=500), [4, 0, 2, 3], [3, 0, 1, 2]
    entry: dict[str, Any] = evaluate.paired_differences(a, b, config, seed=0)["1"]
    assert entry["difference"] == pytest.approx(3 / 16)
    assert entry["interval_95"] == list(bootstrap_interval([0.25, 0.0, 0.25, 0.25], 0, 500, floor=-1.0))
    shifted = evaluate.paired_differences([4, 1, 2, 3, 1, 1], [3, 0, 1, 2, 0, 0], config, seed=0)["1"]
    assert shifted["interval_95"] == list(evaluate.nothing_varies(0.25, 6, floor=-1.0))
    with pytest.raises(ValueError, match="zip"):
        evaluate.paired_differences([1], [1, 2], config, seed=0)
    config = EvaluateConfig(attempts=4, ks=(1, 2), bootstrap=100)
    found = evaluate.summarize([0, 1, 4], config, seed=0)
    assert found["pass_at"] == {"1": pytest.approx((0 + 1 / 4 + 1) / 3), "2": pytest.approx((0 + 1 / 2 + 1) / 3)}
    assert found["interval_95"]["1"] == list(bootstrap_interval([0.0, 0.25, 1.0], 0, 100))


def test_counts_do_not_depend_on_workers_and_blocks(env, monkeypatch):
    config, problems, blocks = tiny_config("evaluate.attempts=4"), easy_problems(10), list[int]()
    stack = random_stack(env.backbone, 2, size=0.01)
    one = count_correct(env, stack, problems, config, 7, no_tick)
    again = count_correct(env, stack, problems, config, 8, no_tick)
    base, *_ = count_correct(env, None, problems, config, 7, no_tick)
    cold = tiny_config("evaluate.attempts=4", "evaluate.temperature=0.001")
    greedy = count_correct(env, None, problems, cold, 7, no_tick)
    twins = count_correct(env, stack.select([1, 1]), problems, config, 7, no_tick)
    monkeypatch.setattr(env, "threads", 3)
    monkeypatch.setattr(evaluate, "BLOCK", 3)
    other = count_correct(env, stack, problems, config, 7, blocks.append)
    assert blocks == [3, 3, 3, 1]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.shape == (2, 10) and (mine == theirs).all()
    assert (one[0] != again[0]).any() and (one[0].sum(1) > 0).all()
    assert (twins[:, 0] == one[:, 1]).all() and (twins[:, 1] == one[:, 1]).all(), "all policies draw with one seed"
    assert {*greedy[0].flatten()} == {0, 4} < {*base.flatten()} and base.shape == (1, 10)


def by_place(*rows: list[float]) -> list[dict[str, float]]:
    """Seeds with problems of their own."""
    return [{f"{s}-{i}": value for i, value in enumerate(row)} for s, row in enumerate(rows)]


@pytest.mark.parametrize("shared", [False, True])
def test_pigeonhole_width_by_its_formula(shared):
    """Owen 2007, theorem 4: what belongs to seeds or to shared problems counts once, other noise up to three times."""
    rng = np.random.default_rng(0)
    S, H = 40, 25
    problems = rng.normal(0, 0.3, H)
    values = [rng.normal(0.5, 0.1) + (problems if shared else rng.normal(0, 0.3, H)) for _ in range(S)]
    names = [[i if shared else (s, i) for i in range(H)] for s in range(S)]
    seeds = [dict(zip(n, v, strict=True)) for n, v in zip(names, values, strict=True)]
    low, high = evaluate.pigeonhole_interval(seeds, 1, 4000)
    between, within = np.var([v.mean() for v in values]), np.mean([np.var(v) for v in values])
    variance = between / S + (within / H if shared else (2 - 1 / S) * within / (S * H))
    assert high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.08)


def test_intervals_by_hand():
    # Mean 2, sd 1, three seeds: 4.303 / sqrt(3) on each side.
    assert evaluate.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    # 0 of 10: 1 - 0.025^(1/10); 5 of 10 as in tables.
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert clopper_pearson(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert clopper_pearson(0, 0) == (0.0, 1.0) and evaluate.t_interval([1.0]) is None
    zero, every = ([value] * 96 for value in (0.0, 1.0))
    assert bootstrap_interval(every, 0, 100) == pytest.approx(clopper_pearson(96, 96))
    assert bootstrap_interval(zero, 0, 100) == evaluate.nothing_varies(0.0, 96) == pytest.approx(clopper_pearson(0, 96))
    assert bootstrap_interval(zero, 0, 100, floor=-1.0) == pytest.approx((-0.0377, 0.0377), abs=1e-4)
    nobody = over_seeds(by_place([0.0] * 10, [0.0] * 10), 0, 100)
    assert nobody["interval_95"] == nobody["bootstrap_95"] == pytest.approx(list(clopper_pearson(0, 20)))
    # 3 x 0.01, 2 x 0.03, then never less than one before it.
    assert evaluate.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert evaluate.holm([0.9, 0.8]) == [1.0, 1.0] and evaluate.holm([]) == []
    # Six of twelve: at most 3 of 12 draws meet one of them with 7.3 %, 2 with 1.9 %. One of three: all draws with 3.7 %.
    assert bootstrap_interval([1.0, 0.0] * 6, 0, 4000) == pytest.approx((3 / 12, 9 / 12))
    assert bootstrap_interval([1.0, 0.0, 0.0], 0, 4000) == (0.0, 1.0)
    # Where few are solved Clopper-Pearson's: resampling alone gives one of 96 a lower upper end than none of 96.
    few = [[*[1.0] * n, *[0.0] * (96 - n)] for n in range(7)]
    highest = [bootstrap_interval(row, 0, 500)[1] for row in few[:6]]
    failures = [1 - bootstrap_interval([1 - value for value in row], 0, 500)[0] for row in few[:6]]
    assert highest == pytest.approx([clopper_pearson(n, 96)[1] for n in range(6)]) == failures
    lowest = [bootstrap_interval(row, 0, 500, floor=-1.0)[0] for row in (*few, *([1.0] * n for n in range(1, 7)))]
    assert [low > 0 for low in lowest] == [False] * 6 + [True] + [False] * 5 + [True], "five signs have p = 2 / 2^5"
    spread = over_seeds(by_place([0.4, 0.6], [0.5, 0.5], [0.6, 0.6]), 0, 200)
    assert spread["per_seed"] == pytest.approx([0.5, 0.5, 0.6]) and spread["mean"] == pytest.approx(1.6 / 3)
    assert spread["interval_95"] == pytest.approx([1.6 / 3 - 0.1434, 1.6 / 3 + 0.1434], abs=1e-4), "t leads"
    assert over_seeds(by_place([0.0, 1.0], [0.5, 0.5], [1.0, 1.0]), 0, 200)["interval_95"] == [0.0, 1.0]
    alike = over_seeds(by_place([0.25, 0.75], [0.75, 0.25]), 0, 200)
    assert alike["interval_95"] == alike["bootstrap_95"] and alike["interval_95"][0] < 0.5 < alike["interval_95"][1]
    found = evaluate.paired_over_seeds(by_place([1.0, 0.5], [0.75, 0.75]), by_place([0.5, 0.5], [0.25, 0.75]), 0, 200)
    assert (found["per_seed"], found["difference"], found["p_seeds"]) == ([0.25, 0.25], 0.25, 0.5)  # 2 of 4 signs
    for a, b, *ends in ((every, every, -0.0377, 0.0377), (few[4], zero, -0.02623, 0.10326)):  # may be negative
        assert evaluate.paired_over_seeds(by_place(a), by_place(b), 0, 100)["interval_95"] == pytest.approx(ends, 1e-3)
    for pair in (({"a": 1.0}, {"a": 1.0, "b": 0.0}), ({"a": 1.0, "b": 0.0}, {"a": 1.0})):
        with pytest.raises(KeyError):
            evaluate.paired_over_seeds(pair[:1], pair[1:], 0, 100)
    values = by_place([1.0] * 3, [0.0] * 300)
    assert evaluate.pigeonhole_interval(values, 5, 2000) == evaluate.pigeonhole_interval(values, 5, 2000) == (0.0, 1.0)
    assert evaluate.pigeonhole_interval(by_place([1.0], [1.0]), 5, 2000) == (1.0, 1.0), "not drawn"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=2, max_size=7))
def test_sign_flips_are_all_counted(values):
    flips = [np.dot(signs, values) for signs in itertools.product((1, -1), repeat=len(values))]
    wanted = sum(abs(flip) >= abs(sum(values)) for flip in flips) / len(flips)
    assert evaluate.sign_flip_p([float(v) for v in values]) == pytest.approx(wanted)


def test_vendi_score_counts_kinds():
    # Three of one kind and one of another: exp of the entropy of (3/4, 1/4), however many axes the vectors have.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert vendi_score(np.repeat(np.eye(2), [300, 100], axis=0)) == pytest.approx(math.exp(entropy))
    # Two texts with similarity c: eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = 0.6
    pair = np.array([[1.0, 0.0], [c, math.sqrt(1 - c * c)]])
    assert vendi_score(pair) == pytest.approx(math.exp(-sum(x * math.log(x) for x in ((1 + c) / 2, (1 - c) / 2))))
    near = hashed_ngrams(["What is 3 + 4?", "what is 3 + 4?", "What is 3 + 5?", "Name a prime above ninety.", ""])
    near = near @ near.T
    assert near[0, 1] == pytest.approx(near[4, 4]) == 1 and 0.5 < near[0, 2] < 0.99 and abs(near[0, 3]) < 0.3
    assert step_vendi(["a b c"] * 5) == step_vendi(["", ""]) == 1.0
    assert step_vendi(["x" * 1_000, "\ud800\x00\u202e"]) == pytest.approx(2.0, abs=0.1)
    assert step_vendi(["x" * 4_000, "x" * 4_000 + "y" * 1_000_000]) == 1.0, "so much of a text is read"


def step(number: int = 5, clipped=0.1, student_gap: float | None = 0.001, lost=0.0, **changes: Any) -> dict[str, Any]:
    """The event of a healthy step, with changes; `clipped`, `student_gap` and `lost` are of its students."""
    event = {"event": "outer_step", "step": number, "reward_G": [0.1, 0.2, None], "reward_mean": 0.15, "vendi": 12.0}
    event |= {"distinct_share": 0.9, "sampled": 20, "rejected": {"truncated": 2}, "teacher_logprob_gap": 0.001}
    students = {"completions/clipped_ratio": clipped, "logprob_gap": student_gap, "not_judged": lost}
    return {**event, "teacher_grad_norm": 0.5, "student_last": students, **changes}


def kinds(*arguments: Any, **named: Any) -> list[str]:
    return [row["kind"] for row in alarms.step_alarms(*arguments, **named)]


@pytest.mark.parametrize(("kind", "ill", "well"), cases("report", "alarm"))
def test_an_alarm_is_raised_beyond_its_limit_once_while_it_lasts(kind, ill, well):
    first = step(0)
    assert kinds(step(**well), [], [first]) == []
    (alarm,) = alarms.step_alarms(step(7, **ill), [], [first, step(6, **well)])
    assert (alarm["event"], alarm["kind"], alarm["step"]) == ("alarm", kind, 7)
    assert kinds(step(8, **ill), [], [first, step(6, **well), step(7, **ill)]) == []
    assert kinds(step(9, **ill), [], [first, step(7, **ill), step(8, **well)]) == [kind]


def test_a_teacher_without_gradient_for_some_steps():
    nothing = {"teacher_logprob_gap": None, "teacher_grad_norm": None, "student_gap": None, "rejected": {}}
    assert alarms.step_alarms(step(**nothing, vendi=None), [], [step(4)]) == []
    still = [step(i, reward_G=[0.25, 0.25, None]) for i in range(6)]
    zero = [step(i, teacher_grad_norm=0.0) for i in range(6)]
    for rows in (still, zero, [still[0], zero[1], still[2], zero[3], zero[4]]):
        raised = [kinds(row, [], rows[:i]) for i, row in enumerate(rows)]
        begun = alarms.STILL_STEPS - 1
        assert raised == [[]] * begun + [["no teacher gradient"]] + [[]] * (len(rows) - 1 - begun)
    broken = [still[0], still[1], step(2), still[3], still[4]]
    assert [kinds(row, [], broken[:i]) for i, row in enumerate(broken)] == [[]] * 5
    paid = [step(i, reward_G=[0.25, 0.25, None], teacher_reward_G=[0.0, 1.0, None]) for i in range(3)]
    assert kinds(paid[2], [], paid[:2]) == [], "what the teacher was paid decides"
    assert kinds(still[2], [], still[:2], learns=False) == []  # teacher.reward = "none" is no accident


def test_screening_that_is_cut_off():
    assert alarms.screen_alarms({"truncated_share": 0.5}) == alarms.screen_alarms({"truncated_share": None}) == []
    (alarm,) = alarms.screen_alarms({"truncated_share": 0.75})
    assert (alarm["kind"], alarm["step"]) == ("truncation", None)
    assert alarm["message"].startswith("75% of the attempts in screening hit the token budget")

    def rows(correct: int) -> list[dict[str, Any]]:
        return [{"question": "q", "correct": i < correct} for i in range(20)]

    limit = int(alarms.CORRECT_SHARE * 20)
    (alarm,) = alarms.step_alarms(step(), rows(limit - 1), [])
    assert alarm["kind"] == "reward without correctness"
    assert "mean reward +0.1500 though only 1 of 20 answers of the teacher are correct" in alarm["message"]
    for event, questions in ((step(), rows(limit)), (step(reward_mean=0.0), rows(0)), (step(), [{"question": "q"}])):
        assert kinds(event, questions, []) == []


def test_whether_rewards_tell_the_sets_of_a_step_apart():
    """One step: scipy's analysis of variance. Two: sums of both, never across steps (the second one's level is far off)."""
    rng = np.random.default_rng(0)
    gains = rng.normal(size=(2, 5, 3)) + np.array([[[0.0]], [[100.0]]])
    steps = [list(zip(g.mean(1), g.std(1, ddof=1) / 3**0.5, strict=True)) for g in gains]
    assert told_apart(steps[:1], 3) == pytest.approx(tuple(f_oneway(*gains[0])))
    both = told_apart(steps, 3)
    between, within = gains.mean(2).var(1, ddof=1).mean(), gains.var(2, ddof=1).mean()
    assert both is not None and both[0] == pytest.approx(between / (within / 3))
    apart = told_apart([[(mean + 5 * i, error) for i, (mean, error) in enumerate(step)] for step in steps], 3)
    assert apart is not None and apart[1] < 1e-6 < 0.05 < both[1]
    nothing: list[Any] = [([], 3), ([[(1.0, 0.5)]], 3), (steps, 1), ([[(1.0, 0.0), (2.0, 0.0)]], 3)]
    assert [told_apart(*given) for given in nothing] == [None] * 4


def test_an_arm_that_ends_below_its_best_reading_by_more_than_chance_is_named():
    """16 problems x 4 attempts: 8 problems lose 2 right answers each, or one loses all 4; the best of ten readings."""
    low, best, end = (
        {"arm": "pq", "attempts": 4, "total_tokens": at, "correct": [2] * n + [0] * (16 - n)}
        for n, at in ((1, 1000), (8, 2000), (0, 3000))
    )
    (alarm,) = alarms.lost_alarms([low, best], end)
    assert (alarm["kind"], alarm["arm"]) == ("arm fell", "pq")
    assert "fell from 25.00% at 2,000 tokens to 0.00% at 3,000 tokens" in alarm["message"]
    one, six = ({**best, "correct": [right] * n + [0] * (16 - n)} for right, n in ((4, 1), (1, 6)))  # six: p = 2 / 2^6
    still = ([low, one], end), ([], end), ([low, end], best), ([six, *[low] * 9], end)
    assert alarms.lost_alarms([six], end) and not any(alarms.lost_alarms(*given) for given in still)
