"""The scaling study: its model against the measured rates, its bookkeeping, what it finds, and the page that quotes it."""

import importlib
import sys
from pathlib import Path

import pytest

from soar.plan.forecast import TABLE

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
scaling = importlib.import_module("scaling")


def test_the_model_gives_what_was_measured():
    assert scaling.measured_decode() == pytest.approx(TABLE[3].decode, rel=0.01)
    tokens = scaling.train_seconds(scaling.Setting("3B"), 1, TABLE[3].train)
    assert tokens == pytest.approx(scaling.KL_FACTOR, rel=1e-3)


@pytest.mark.parametrize(("gpus", "change"), [(8, {}), (48, {"split": True}), (48, {"per_node": True, "datasets": 8})])
def test_every_gpu_second_is_accounted_for(gpus, change):
    result = scaling.simulate(scaling.Setting(**{"model": "3B", "gpus": gpus, **change}))
    left = gpus * result.seconds - sum(result.spent.values())
    assert left == pytest.approx(0.0, abs=0.02 * gpus * result.seconds)
    assert all(value >= 0 for value in result.spent.values())


def test_the_page_quotes_the_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    scaling.main()
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = [block.split("\n") for block in page.split("```")[1::2] if "speed-up" in block]
    quoted = [line.rstrip() for block in blocks for line in block[1:] if line.strip()]
    assert len(quoted) == 9
    assert [line for line in quoted if line not in printed] == []
