# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The method, step by step
#
# A small language model counts with two digits and forgets most carries. Some problems it never solves, so rewards never
# come and plain RL cannot start. Here the same model learns to write the easier problems that get it going. Two CPU
# cores are enough: about a minute as it stands, and the whole demo of eight minutes with `SMALL = {}`.

# %%
import os
import tempfile
from pathlib import Path

import soar

SMALL = {
    "screen.attempts": 16, "problems.limit": 40, "teacher.datasets": 2, "teacher.questions": 6, "student.repeats": 1,
    "student.steps": 3, "student.prompts_per_step": 4, "student.attempts": 8, "reward.questions": 8, "arms.steps": 4,
    "evaluate.attempts": 8, "evaluate.ks": [1, 8], "teacher.steps": 2, "promotion.tau": -1.0, "promotion.window": 1,
}  # fmt: skip
out = Path(os.environ.get("SOAR_NOTEBOOK_OUT", tempfile.mkdtemp())) / "run"

# %% [markdown]
# ## 1. The plateau
# Sixteen attempts at every problem. Where all of them are wrong, every reward is zero, every advantage is zero, and there
# is nothing to learn from.

# %%
screened = soar.screen(settings=SMALL)
first = screened.hard[0]
print(
    f"{len(screened.hard)} of {len(screened)} problems are never solved, as {first.question!r}, which is {first.answer!r}"
)
screened.plot()

# %% [markdown]
# ## 2. The loop
# The teacher, a copy of the model, writes sets of questions. On each set a student trains, another copy. How much better
# it then does on hard problems is what the teacher is paid. When students have become better for a while, the best of
# them is where the next ones begin: a promotion.

# %%
run = soar.train(out=out, settings=SMALL)
for step in run.run.steps:
    print(f"step {step['step']}: the sets earned {step['reward_G']}")

# %% [markdown]
# ## 3. What the teacher wrote
# Nobody checks these answers. Only the improvement counts, and a wrong answer to a useful question can earn as much.

# %%
for row in run.run.questions[:8]:
    print(row["question"].strip(), "=", row["answer"])

# %% [markdown]
# ## 4. Was it worth it?
# Problems that no training has seen. Four models: the base, RL on the hard problems alone (Hard-Only), the promoted
# student (PS), and a fresh student trained on the questions whose students were promoted (PQ). The fair measure of cost
# is the tokens that each has generated, with the search of the loop counted in.

# %%
run.plot()

# %%
print(run)
