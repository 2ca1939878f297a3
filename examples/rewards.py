"""A reward function of each shape that `problems.verifier` takes, told by its parameters (docs/bring.md).

soar check --set problems.verifier=examples/rewards.py:trl_text
soar verify FILE --verifier examples/rewards.py:plain
"""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, str]]


def trl_text(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """TRL, completions as text."""
    return [float(text.endswith(gold)) for text, gold in zip(completions, answer, strict=True)]


def trl_chat(prompts, completions, solution, level, **columns):  # type: ignore[no-untyped-def]
    """TRL, completions as messages (it mentions `content`); None leaves a completion out."""
    weight = {"easy": 1.0}.get(level[0], 2.0) if prompts[0][-1]["content"] else 0.0
    rights = [reply[0]["content"].endswith(gold) for reply, gold in zip(completions, solution, strict=True)]
    return [weight if right else None for right in rights]


async def trl_async(completions, answer, log_metric, **columns):  # type: ignore[no-untyped-def]
    """TRL, asynchronous, with half marks."""
    log_metric("seen", len(completions))
    return [0.5 if text.endswith(answer[0]) else 0.0 for text in completions]


def tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """TRL, by the tokens of a completion."""
    return [len(ids) / 4 for ids in completion_ids]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):  # type: ignore[no-untyped-def]
    """verl."""
    return {"score": float(solution_str.endswith(ground_truth)), "acc": True} if data_source == "gsm8k" else -1


def rubric(prompt, completion, answer, state, parser):  # type: ignore[no-untyped-def]
    """A rubric function of verifiers, by its parser."""
    right = parser.parse_answer(completion) == state["answer"] == answer
    return 1.0 if right and prompt[-1]["content"] else 0.25


async def rubric_async(completion: Messages, info: dict[str, str], **columns: Any) -> float:
    """A rubric function that reads messages and a column `info`."""
    return float(completion[-1]["content"].endswith(info["target"]))


def plain(response, gold):  # type: ignore[no-untyped-def]
    """Completion and gold answer, under any names."""
    return response.endswith(gold)


class EndsRight:
    """An object that is called."""

    def __call__(self, completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(text.endswith(answer[0])) for text in completions]


ends_right = EndsRight()
