"""A baseline student whose attempts at written questions are given."""

from types import SimpleNamespace
from typing import Any

import torch

from soar.loop.rollout import RolloutBatch
from soar.problems.pool import VerifierPool
from soar.types import Problem, Verdict

ANSWERS = {
    # question -> what four attempts of the baseline say; the written answer is always 1.
    "never": ["2", "2", "3", "4"],
    "always": ["1", "1", "1", "1"],
    "half": ["1", "1", "2", "2"],
    "once": ["1", None, "3", "4"],
    "silent": [None, None, None, None],
    "unscorable": ["1", "1", "1", "1"],
}


class Recited:
    """An env whose attempts are recited from ANSWERS; `asked` holds the calls."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.backbone, self.verifier = None, VerifierPool("exact", answer_style="marker")

    def rollout(
        self, stack: Any, problems_P_Q: list[list[Problem]], attempts: int, seed_P: Any, sampling: Any, **more: Any
    ) -> Any:
        (problems,) = problems_P_Q
        self.asked.append(
            {"stack": stack, "attempts": attempts, "seeds": seed_P, "questions": [p.question for p in problems]}
        )
        said = [answer for p in problems for answer in ANSWERS[p.question]]
        golds = [p.answer for p in problems for _ in range(attempts)]
        names = [p.question for p in problems for _ in range(attempts)]
        checked = zip(self.verifier.check_answers(said, golds), names, strict=True)
        verdicts = [Verdict.UNSCORABLE if name == "unscorable" else verdict for verdict, name in checked]
        texts = ["thinking" if answer is None else f"so <ans> {answer}" for answer in said]
        shape = (1, len(problems), attempts)
        solved = torch.tensor([v.solved for v in verdicts]).view(shape)
        valid = torch.tensor([v is not Verdict.UNSCORABLE for v in verdicts]).view(shape)
        rollouts: Any = SimpleNamespace(texts=lambda backbone: texts, length_B=torch.ones(len(texts)))
        return RolloutBatch(rollouts, verdicts, solved.float(), solved, valid, torch.zeros(1, dtype=torch.bool))
