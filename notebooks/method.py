# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The method, step by step, in the embedded world
#
# A two-digit counter whose small language model forgets most carries. Everything here runs on two CPU cores. Set
# `STEPS = 12` and drop
# `SMALL` for the whole demo (7 minutes); as it stands it shows every stage in about one.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import soar

STEPS = 2
SMALL = {
    "screen.attempts": 16, "problems.limit": 40, "teacher.datasets": 2, "teacher.questions": 6, "student.repeats": 1,
    "student.steps": 3, "student.prompts_per_step": 4, "student.attempts": 8, "reward.questions": 8, "arms.steps": 4,
    "evaluate.attempts": 8, "evaluate.ks": [1, 8], "teacher.steps": STEPS, "promotion.tau": -1.0, "promotion.window": 1,
}  # fmt: skip
out = Path(os.environ.get("SOAR_NOTEBOOK_OUT", tempfile.mkdtemp())) / "run"

# %% [markdown]
# ## 1. The plateau
# Sixteen attempts at every problem. Where all are wrong, every reward is zero, every advantage is zero, and RL has
# nothing to learn from.

# %%
screened = soar.screen(settings=SMALL)
never = [problem for problem, counts in screened if counts.successes == 0]
print(
    f"{len(never)} of {len(screened)} problems are never solved, for example {never[0].question!r} = {never[0].answer!r}"
)

# %%
figure, axes = plt.subplots(figsize=(6, 2.5))
axes.hist([counts.pass_rate for _, counts in screened], bins=17, range=(0, 1))
axes.set_xlabel("share of attempts that are right")
axes.set_ylabel("problems")
figure.tight_layout()

# %% [markdown]
# ## 2. The outer loop
# The teacher writes datasets of questions; students train on them; each is measured on hard problems; the
# improvement is the teacher's reward.

# %%
trained = soar.train(out=out, settings=SMALL)
steps = trained.run.events["outer_step"]
for step in steps:
    print(f"step {step['step']}: reward of each dataset {step['reward_G']}")

# %% [markdown]
# ## 3. What the teacher wrote
# Question and answer as they came: nobody checks the answer, only the improvement counts.

# %%
for row in trained.run.questions[:8]:
    print(row["question"].strip(), "=", row["answer"])

# %% [markdown]
# ## 4. Held out
# Problems that no part of training has seen: the base, RL on the hard problems alone, and SOAR's two outputs.

# %%
arms = trained.summary["arms"]
figure, axes = plt.subplots(figsize=(6, 2.5))
axes.bar(list(arms), [trained.pass_at(arm) for arm in arms])
axes.set_ylabel("pass@1, held out")
figure.tight_layout()
print(trained.report)
