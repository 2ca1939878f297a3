"""A single-turn environment of verifiers (v1) in a file: sums without an end, one exact reward and one for short replies.

soar check --problems verifiers:examples/sums_environment.py --set problems.limit=100
"""

import itertools
from collections.abc import Iterator

import verifiers.v1 as vf


class Data(vf.TaskData):
    answer: int
    level: str = "easy"


class Task(vf.Task[Data]):
    @vf.reward
    async def exact(self, trace: vf.Trace) -> float:
        assert trace.messages[0].role == "system" or self.data.system_prompt is None  # a teacher's question has none
        return float(trace.last_reply.rpartition("=")[2].strip() == str(self.data.answer))

    @vf.reward(weight=0.5)
    async def short(self, task: Data, trace: vf.Trace) -> float:
        return float(task.level == "hard" and trace.num_turns == 1 and len(trace.last_reply) < 9)


class Config(vf.TasksetConfig):
    system: str = "Do."


class Taskset(vf.Taskset[Task, Config]):
    INFINITE = True

    def load(self) -> Iterator[Task]:
        for i in itertools.count():
            turns, level = [vf.UserMessage(content=f"What is {i} + {i}?")], "hard" if i else "easy"
            yield Task(
                Data(prompt=turns, answer=2 * i, level=level, system_prompt=self.config.system), self.config.task
            )


__all__ = ["Taskset"]
