"""Independent pieces of work, done by threads of this process or by worker processes.

A piece is called as `work(env, tick, *common, *task)`; tick after each step of a longer one. Its draws are seeded by its
arguments, and the cut does not depend on who does the pieces, so threads and any number of workers give the same numbers.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from soar.types import Interrupted, no_tick

if TYPE_CHECKING:  # nothing here needs torch
    from soar.loop.rollout import RolloutEnv

T = TypeVar("T")
FIRST_GUESS = 0.8  # share of teacher texts that are accepted, before the first of a step is seen
Tick = Callable[..., None]  # without arguments, or with the tokens drawn since the last call
Task = tuple[Any, ...]
Parallel = Any  # worker processes, each with an env of its own: `soar.run.ray.RayParallel`


def map_tasks(
    env: "RolloutEnv", work: Callable[..., T], common: Task, tasks: Sequence[Task], tick: Tick = no_tick
) -> Iterator[T]:
    """work(env, tick, *common, *task) of every task, in their order, by the workers or threads of the env.

    What is not begun when the caller stops listening is never done. Raises Interrupted when the workers end too early.
    """
    if env.parallel is not None:
        early, number = dict[int, T](), 0
        for key, value in env.parallel.stream(work, common, deque(enumerate(tasks)), tick):
            early[key] = value
            while number in early:
                yield early.pop(number)
                number += 1
        if number < len(tasks):
            done = f"{number + len(early)} of {len(tasks)} pieces of work ({work.__name__})"
            raise Interrupted(f"the worker processes ended with {done} done; continue with --resume")
        return
    if env.threads <= 1 or len(tasks) == 1:
        yield from (work(env, tick, *common, *task) for task in tasks)
        return
    with ThreadPoolExecutor(env.threads) as pool:  # a run that stops here does not compute what is left
        yield from pool.map(lambda task: work(env, tick, *common, *task), tasks)


def texts_at_once(missing: int, wanted: int, accepted: float = FIRST_GUESS) -> int:
    """Teacher texts of one call, for so many missing pairs of `wanted` when a share `accepted` of the texts holds one."""
    return min(int(missing / accepted * 1.1) + 8, 8 * wanted)
