# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your model on one GPU
#
# Bring a model, problems with short answers, and a function that grades. Three lines below are yours to change; every
# step says what the next one is for. Stop wherever the answer is no: that is the cheapest result.

# %%
import json
import os
import random
import tempfile
from pathlib import Path

import soar

MODEL = os.environ.get("SOAR_NOTEBOOK_MODEL", "Qwen/Qwen2.5-0.5B-Instruct")  # a folder, a hub id, or a loaded model
dice = random.Random(0)
pairs = [(dice.randrange(100, 1000), dice.randrange(100, 1000)) for _ in range(200)]
problems = [{"question": f"What is {a} * {b}?", "answer": str(a * b)} for a, b in pairs]  # or a Dataset, or a file


def grade(completion: str, answer: str) -> float:
    """1 when the last word of the completion is the answer."""
    return float(completion.replace(",", "").rstrip(" .}$\n").endswith(answer))


# %%
settings = json.loads(os.environ.get("SOAR_NOTEBOOK_SETTINGS", "{}"))  # any key of docs/config.md
out = Path(os.environ.get("SOAR_NOTEBOOK_OUT", tempfile.mkdtemp()))
mine = {"recipe": "small-1gpu", "verifier": grade}

# %% [markdown]
# ## 1. Can it work?
# Under two minutes and without training: does the function find the right answers right, do completions end in time, is
# an answer found in them, and are the problems too hard or too easy? The last line says yes, no or unknown.

# %%
checked = soar.check(MODEL, problems, **mine, settings=settings)
print(checked)
checked.plot()

# %% [markdown]
# ## 2. Which problems are out of reach?
# Many attempts at each problem. When most problems are solved now and then, plain RL is enough and cheaper: train on
# them, and leave this notebook.

# %%
screened = soar.screen(MODEL, problems, out / "screen", **mine, settings=settings)
print(screened)
screened.plot()

# %% [markdown]
# ## 3. Plain RL first
# What every other way has to beat: RL on the hard problems alone.

# %%
hard = screened.hard
plain = soar.arms(MODEL, hard, out / "plain", ["hard_only"], **mine, settings={"arms.steps": 100} | settings)
print(plain)

# %% [markdown]
# ## 4. The loop
# Hours on one GPU. The first lines say what comes and how long it takes, and `soar watch --web RUN` shows the report as it
# grows. It can be stopped at any time; `resume=True` goes on.

# %%
run = soar.train(MODEL, hard, out / "run", **mine, settings=settings)
run.plot()

# %% [markdown]
# ## 5. Take it with you
# Adapters in PEFT's format, and the same measurement on any other problems.

# %%
other = [{"question": f"What is {a} * {b}?", "answer": str(a * b)} for a, b in ((123, 456), (314, 159), (271, 828))]
again = soar.evaluate(MODEL, other, {"student": run.student}, **mine, settings=settings)
print(again)
print(f"adapter: {run.student}\nreport: {run.report}")
