"""The commands of the README, one after the other in one folder, with the embedded model and small numbers."""

import json
import re
import shlex
from pathlib import Path

from helpers import ROOT
from loop_helpers import TINY, sets

from soar.cli import main
from soar.domains.world import get_world

SMALL = [
    *TINY, "model.adapter=full", "problems.format=tiny", "problems.verifier=exact", "student.sampling.max_tokens=48",
    "teacher.sampling.max_tokens=24", "teacher.optimizer.warmup_steps=0", "reward.mode=sampled",
]  # fmt: skip


def small(line: str) -> list[str]:
    """A command of the page with the embedded model and small numbers in place of its own."""
    words = ["builtin:tiny" if word.startswith("Qwen/") else word for word in shlex.split(line, comments=True)[1:]]
    return words + sets(*SMALL)


def test_the_commands_of_the_readme_work_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": p.question, "answer": p.answer} for p in get_world("tiny").hard_problems(12, 0)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", page.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("soar ")]
    assert [line.split()[1] for line in lines] == ["check", "screen", "run", "run"]
    for line in lines:
        assert main(small(line)) == 0, (line, capsys.readouterr())
    assert set(json.loads(Path("runs/mine/summary.json").read_text())["arms"]) == {"base", "hard_only", "ps", "pq"}
