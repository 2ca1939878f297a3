"""Out of memory is recognised, halved and said; a lost device is named; a failed student touches nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import events, run_tiny

from soar.engine.memory import DeviceLost, MemoryShortage, halving, is_device_lost, saved_run
from soar.run import pipeline

SHORTAGES = [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_halving_goes_down_until_it_fits_and_tells(error: BaseException) -> None:
    tried, told = list[int](), list[int]()

    def work(size: int) -> str:
        tried.append(size)
        if size > 13:
            raise error
        return f"done with {size}"

    assert halving(work, 100, told.append) == ("done with 12", 12)
    assert (tried, told) == ([100, 50, 25, 12], [50, 25, 12])
    with pytest.raises(type(error)):  # the last shortage
        halving(work, 100, told.append, smallest=30)


OTHERS = [
    (RuntimeError("shape mismatch"), False),
    (ValueError("out of memory"), False),
    (RuntimeError("CUDA error: an illegal memory access"), True),
    (RuntimeError("NCCL communicator was aborted"), True),
    (ValueError("CUDA error: an illegal memory access"), False),
]


@pytest.mark.parametrize(("error", "lost"), OTHERS)
def test_other_errors_are_let_through_and_a_lost_device_is_recognised(error: Exception, lost: bool) -> None:
    def work(size: int) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        halving(work, 10, lambda size: pytest.fail("it tries again"))
    assert is_device_lost(error) is lost


FAULTS: list[tuple[RuntimeError, type[Exception], str]] = [
    (torch.cuda.OutOfMemoryError("no"), MemoryShortage, "lower model.chunk and model.micro_batch_tokens"),
    (RuntimeError("CUDA error: unspecified launch failure"), DeviceLost, "the accelerator failed: CUDA error"),
]


@pytest.mark.parametrize(("fault", "named", "words"), FAULTS, ids=["memory", "device"])
def test_a_fault_in_a_run_is_named(fault: RuntimeError, named: type[Exception], words: str) -> None:
    with pytest.raises(named) as caught, saved_run("soar run --out DIR --resume"):
        raise fault
    assert words in str(caught.value) and "soar run --out DIR --resume" in str(caught.value)


def test_all_students_failing_is_a_named_error_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("teacher.steps=2", "arms.run=[]")
    real = pipeline.OuterLoop.teach

    def diverge(self: Any, question_sets: Any) -> Any:
        population = real(self, question_sets)
        population.failed_P[:] = True
        return population

    with monkeypatch.context() as patch, pytest.raises(pipeline.StudentsFailed) as caught:
        patch.setattr(pipeline.OuterLoop, "teach", diverge)
        run_tiny(tmp_path / "run", *changes)
    assert "every student of outer step 0 produced NaN or inf" in str(caught.value)
    first, alarm = events(tmp_path / "run")[1:]
    assert (first["failed_students"], first["reward_mean"], first["teacher_kl"]) == (6, None, None)
    assert alarm["kind"] == "all students failed"
    summary = run_tiny(tmp_path / "run", *changes, resume=True)
    assert summary["outer_steps"] == 2
    assert [row["failed_students"] for row in events(tmp_path / "run", "outer_step")] == [6, 0]
