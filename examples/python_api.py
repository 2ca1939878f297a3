"""Screen, train and evaluate from Python, on the embedded world.

python examples/python_api.py runs/python-api
"""

import sys

from small import SMALL

import soar

out = sys.argv[1]

screened = soar.screen(settings=SMALL)
never = [problem for problem, counts in screened if counts.successes == 0]
print(f"{len(never)} of {len(screened)} problems are never solved, for example {never[0].question!r}")

run = soar.train(out=out, settings=SMALL)
print(f"pass@1 of the promoted student {run.pass_at('ps'):.3f}, of Hard-Only {run.pass_at('hard_only'):.3f}")
print(f"{len(run.run.pq)} promotion questions, report in {run.report}")

found = soar.evaluate(adapters={"student": run.student, "teacher": run.teacher}, settings=SMALL)
for name, result in found.items():
    low, high = result.interval_95[1]
    print(f"{name}: pass@1 {result.pass_at[1]:.3f} [{low:.3f}, {high:.3f}] on {len(result.problems)} problems")
