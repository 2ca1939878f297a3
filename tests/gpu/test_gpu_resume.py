"""On a GPU: killed and resumed runs against one that was neither, and against its repetition. Skipped without one."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TINY, events, read_jsonl, sets, without_clock
from safetensors.torch import load_file
from test_kill import CHANGES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SETS = sets(*TINY, *CHANGES, "model.device=cuda")
POINTS = [("soar.loop.teacher", 1), ("soar.loop.student", 6)]
"""Amid the second outer step (before the teacher learns), and amid the students of a later one."""

# Ends the process by SIGKILL at the n-th call of the update of the named file.
KILLED = """
import importlib, os, signal, sys
room, calls = importlib.import_module(sys.argv[1]), [int(sys.argv[2])]
real = room.update

def update(*arguments, **named):
    calls[0] -= 1
    if calls[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)

room.update = update
from soar.cli import main
sys.exit(main(sys.argv[3:]))
"""


def run(out: Path, *more: str, killed: tuple[str, int] | None = None) -> int:
    start = ["-m", "soar.cli"] if killed is None else ["-c", KILLED, killed[0], str(killed[1])]
    words = [sys.executable, *start, "run", "--quiet", "--out", str(out), *more]
    return subprocess.run(words, timeout=300).returncode


def result(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the run wrote, and its adapters."""
    names = ("questions.jsonl", "pq.jsonl", "hard/train.jsonl", "hard/test.jsonl")
    folders = ("teacher", "student", "arms/hard_only", "arms/pq")
    weights = {f: load_file(out / f / "adapter_model.safetensors") for f in folders}
    named = {f"{f}/{key}": tensor for f, tensors in weights.items() for key, tensor in tensors.items()}
    return {"metrics": without_clock(events(out)), **{name: read_jsonl(out / name) for name in names}}, named


def test_killed_and_resumed_runs_are_as_near_as_a_repeated_one(tmp_path):
    assert run(tmp_path / "straight", *SETS) == run(tmp_path / "again", *SETS) == 0
    (wanted, weights), (repeated, weights_2) = result(tmp_path / "straight"), result(tmp_path / "again")
    apart = max((weights[key] - weights_2[key]).abs().max().item() for key in weights)
    for point in POINTS:
        out = tmp_path / point[0]
        assert run(out, *SETS, killed=point) == -signal.SIGKILL and not (out / "summary.json").exists()
        assert run(out, "--resume") == 0
        found, resumed = result(out)
        gap = max((weights[key] - resumed[key]).abs().max().item() for key in weights)
        print(f"{point[0]}: resumed = straight: {found == wanted}, weights differ by {gap:.2e}; repeated = straight: "
              f"{repeated == wanted}, by {apart:.2e}")  # fmt: skip
        assert (
            len(found["metrics"]) == len(wanted["metrics"]) and found["hard/train.jsonl"] == wanted["hard/train.jsonl"]
        )
        if repeated == wanted:  # else kernels add in an order of their own
            assert found == wanted and gap <= apart
