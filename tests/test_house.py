"""The laws of the layout that import-linter does not check: sizes, and what works without torch."""

import ast
import subprocess
import sys

import grimp
from helpers import ROOT

FILES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "soar").rglob("*.py"))}
WITHOUT_TORCH = (
    "soar", "soar.cli", "soar.problems.pool", "soar.sandbox.run", "soar.domains.code", "soar.report.page",
    "soar.report.watch", "soar.run.folder", "soar.plan.forecast", "soar.studies.study",
)  # fmt: skip


def test_files_functions_and_folders_are_small():
    long_files = {str(path): text.count("\n") for path, text in FILES.items() if text.count("\n") > 520}
    long_functions = {
        f"{path}:{node.name}"
        for path, text in FILES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 70
    }
    folders = {folder: sum(path.parent == folder for path in FILES) for folder in {path.parent for path in FILES}}
    full = {str(f): count for f, count in folders.items() if count > (8 if f == ROOT / "soar" else 13)}
    assert (long_files, long_functions, full) == ({}, set(), {})


def test_no_torch_is_needed_to_read_check_and_report(tmp_path):
    """Nor to help and to verify; what runs a model says what installs it."""
    (tmp_path / "c.jsonl").write_text('{"completion": "1", "gold": "1"}\n')
    commands = (["--help"], ["run", "--help"], ["verify", "c.jsonl", "--verifier", "number"])
    program = f"""
import sys, {", ".join(WITHOUT_TORCH)}
assert [soar.cli.main(words) for words in {commands}] == [0, 0, 0]
assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
sys.modules["torch"] = None
sys.exit(soar.cli.main(["run", "--quiet", "--out", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    wanted = "soar: this command runs a model and needs torch, which is not installed: pip install 'soar-rl[train]'\n"
    assert (done.returncode, done.stderr, [path.name for path in tmp_path.iterdir()]) == (1, wanted, ["c.jsonl"])


def test_the_outer_loop_can_be_read_in_an_afternoon():
    """soar/loop/teacher.py with all it imports, also within a function or only for types."""
    names = grimp.build_graph("soar", cache_dir=None).find_upstream_modules("soar.loop.teacher") | {"soar.loop.teacher"}
    places = {ROOT / name.replace(".", "/") for name in names}
    texts = [FILES.get(place.with_suffix(".py")) or FILES[place / "__init__.py"] for place in places]
    assert sum(text.count("\n") for text in texts) <= 4500
