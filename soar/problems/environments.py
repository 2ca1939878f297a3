"""Environments of the package `verifiers` (v1): the tasks of a single-turn one are problems, its rewards their verifier.

What needs more than one completion, or a machine to run things on, is refused by name: its rewards read text here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from inspect import getattr_static, signature
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from soar.problems.sources import PREFIX, DataError, Row

GOLD = ("answer", "solution", "ground_truth", "expected_answer", "target", "gold", "label", "reference", "expected")


def with_options(source: str, options: Mapping[str, Any] | None) -> str:
    """The reference of an environment with the settings of its config."""
    return source + (json.dumps(options) if options else "")


class Environment:
    """The taskset of `verifiers:NAME` or `verifiers:file.py`, its config as JSON behind the name; called, its rubric."""

    def __init__(self, reference: str) -> None:
        """Raises DataError."""
        name, brace, options = reference.removeprefix(PREFIX).partition("{")
        file = Path(name)
        name = file.stem if file.suffix == ".py" else name
        sys.path[:] = dict.fromkeys([str(file.parent.resolve()), *sys.path])
        try:
            import verifiers.v1 as vf

            config = vf.taskset_config_type(name).model_validate({"id": name, **json.loads(brace + options or "{}")})
            self.taskset = vf.load_taskset(config)
            alone = vf.environment_class(name) is vf.SingleAgentEnv and vf.default_harness_id(name) != name
        except Exception as error:  # a user's module may raise anything when it is imported
            hint = "" if "verifiers.v1" in sys.modules else "; pip install 'soar-rl[environments]'"
            raise DataError(f"{reference} cannot be loaded: {type(error).__name__}: {error}{hint}") from error
        self.vf, self.reference, self.task_type = vf, reference, self.taskset.task_type()
        self.data_type, task = self.task_type.data_type(), self.task_type
        self.gold = next((key for key in GOLD if key in self.data_type.model_fields), "")
        fields = [key for key, field in self.data_type.model_fields.items() if field.is_required() and key != self.gold]
        changed = {key: getattr_static(task, key) is not getattr_static(vf.Task, key) for key in ("setup", "finalize")}
        tools = getattr_static(self.taskset.__class__, "toolsets") is not getattr_static(vf.Taskset, "toolsets")
        self._refuse(
            ("several turns or agents (an Env or Harness of its own)", not alone),
            ("tools", tools or getattr_static(task, "toolsets") is not getattr_static(vf.Task, "toolsets")),
            ("a machine", task.NEEDS_CONTAINER or any(changed.values())),
            (f"a gold answer in {self.data_type.__name__} ({', '.join(GOLD)})", not self.gold),
            (f"{', '.join(fields)} in a task, where the teacher writes only question and answer", fields),
        )

    def _refuse(self, *needs: tuple[str, Any]) -> None:
        if missing := [what for what, needed in needs if needed]:
            only = "only single-turn environments can be used whose rewards read a text"
            raise DataError(f"{self.reference} needs {'; '.join(missing)}: {only}")

    @cached_property
    def first(self) -> Any:
        """The first task. Raises DataError where there is none that can be used."""
        try:
            task = next(iter(self.taskset))
        except Exception as error:  # the code that makes tasks is a user's
            raise DataError(f"{self.reference} makes no task: {type(error).__name__}: {error}") from error
        graders = [*task.hooks("reward"), *task.hooks("metric")]
        self._refuse(
            ("a user who begins", task.data.prompt is None),
            ("a machine", any("runtime" in signature(grader).parameters for grader in graders)),
            ("a judge", task.config.judges),
        )
        return task

    def rows(self, limit: int) -> Iterator[Row]:
        """The tasks as rows of a problem file, `limit` (0: 1,000) of a taskset without an end; `task_data` is the task."""
        system, most = self.first.data.system_prompt, None if self.taskset.bounded else limit or 1_000
        for number, task in enumerate(islice(self.taskset, most), start=1):
            data, where = task.data, f"{self.reference}:task {number}"
            prompt = data.prompt if isinstance(data.prompt, str) else [turn.model_dump() for turn in data.prompt or []]
            told = data.model_dump_json(exclude_none=True)
            fields = {"id": data.id, "question": prompt, "answer": str(getattr(data, self.gold)), "task_data": told}
            yield Row(
                where, fields, None if data.system_prompt == system else "another system prompt than the first task"
            )

    async def __call__(self, prompt: str, completion: str, answer: str, **row: Any) -> float | None:
        """The sum of the weighted rewards; None for an answer that can be none here (the teacher wrote it)."""
        from verifiers.v1.trace import TraceTask

        vf = self.vf
        try:
            told = row.get("task_data") or json.dumps({"prompt": prompt, self.gold: answer})
            data = self.data_type.model_validate_json(told)
        except ValidationError:
            return None
        said = [vf.SystemMessage(content=data.system_prompt)] if data.system_prompt else []
        said += [vf.UserMessage(content=prompt), vf.AssistantMessage(content=completion)]
        nodes = [vf.MessageNode(parent=i - 1 if i else None, message=turn) for i, turn in enumerate(said)]
        nodes[-1].sampled = True
        agent, recorded = vf.AgentInfo(config=vf.AgentConfig()), TraceTask(type=self.task_type.__name__, data=data)
        trace = vf.Trace(task=recorded, agent=agent, nodes=nodes, is_completed=True, ok=True)
        await self.task_type(data, self.taskset.config.task).score(trace)
        return float(trace.reward)


environment = lru_cache(maxsize=4)(Environment)
