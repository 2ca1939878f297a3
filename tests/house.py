"""The house rules that a machine can check, as functions from source text to a list of complaints.

`test_house.py` applies them to the repository, and to small bad snippets that each must be caught.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ORDER = (
    "types",
    "files",
    "seeds",
    "statistics",
    "settings",
    "config",
    "scrub",
    "streams",
    "stopping",
    "faults",
    "ledger",
    "alarms",
    "reference",
    "completion",
    "answers",
    "sketches",
    "verifiers",
    "exercises",
    "code_exercises",
    "sources",
    "data",
    "recipe",
    "worlds",
    "pretrain",
    "prompts",
    "kernels",
    "layer_kernels",
    "products",
    "gradient_kernels",
    "adapted",
    "groups",
    "attention",
    "fused",
    "devices",
    "quantize",
    "policy",
    "rollouts",
    "stops",
    "lean",
    "programs",
    "decode",
    "sampler",
    "vllm_worker",
    "vllm_sampler",
    "logprobs",
    "symbolic",
    "workers",
    "seccomp",
    "boxes",
    "sandbox",
    "assertions",
    "verify",
    "rewards",
    "domains",
    "coding",
    "code_lines",
    "grading",
    "candidates",
    "workload",
    "memory",
    "plan",
    "quantities",
    "choices",
    "science",
    "procedural",
    "rollout",
    "crew",
    "rloo",
    "recompute",
    "update",
    "student",
    "promotion",
    "analysis",
    "lessons",
    "signals",
    "teacher",
    "evaluate",
    "summary",
    "workbench",
    "runs",
    "forecast",
    "judges",
    "training_sets",
    "arms",
    "checkpoints",
    "record",
    "state",
    "ray_cluster",
    "ray_worker",
    "ray_crew",
    "held_out",
    "screening",
    "screen_table",
    "progress",
    "hardset",
    "wording",
    "figures",
    "sections",
    "changes",
    "mixed_tables",
    "report",
    "verify_file",
    "check",
    "check_model",
    "compare",
    "pictures",
    "watched",
    "watch",
    "export",
    "review",
    "checks",
    "doctor",
    "weights",
    "loggers",
    "probe",
    "calibrate",
    "pipeline",
    "measure",
    "studies",
    "study_results",
    "study_page",
    "study",
    "audits",
    "api",
    "cli_common",
    "cli_run",
    "cli_watch",
    "cli_report",
    "cli_init",
    "cli_reference",
    "cli_export",
    "cli_student",
    "cli_eval",
    "cli_study",
    "cli_screen",
    "cli_check",
    "cli_verify",
    "cli_review",
    "cli_doctor",
    "cli",
    "jail",
)
"""The package from top to bottom: a file imports only files above it. This is the one place where the order stands.
`jail` is last, so that nothing imports it."""

TORCH_FREE = (
    "types",
    "crew",
    "ray_cluster",
    "statistics",
    "files",
    "settings",
    "config",
    "reference",
    "completion",
    "scrub",
    "streams",
    "stopping",
    "faults",
    "ledger",
    "alarms",
    "data",
    "recipe",
    "prompts",
    "seccomp",
    "boxes",
    "sandbox",
    "assertions",
    "verify",
    "rewards",
    "domains",
    "coding",
    "code_lines",
    "grading",
    "exercises",
    "code_exercises",
    "quantities",
    "choices",
    "science",
    "procedural",
    "promotion",
    "runs",
    "wording",
    "figures",
    "sections",
    "changes",
    "mixed_tables",
    "report",
    "compare",
    "pictures",
    "watched",
    "watch",
    "export",
    "loggers",
    "analysis",
    "studies",
    "study_results",
    "study_page",
    "study",
    "evaluate",
    "summary",
    "review",
    "checks",
    "doctor",
    "audits",
    "cli_common",
    "cli_run",
    "cli_watch",
    "cli_report",
    "cli_init",
    "cli_reference",
    "cli_export",
    "cli_student",
    "cli_eval",
    "cli_study",
    "cli_screen",
    "cli_check",
    "cli_verify",
    "verify_file",
    "check",
    "screen_table",
    "candidates",
    "workload",
    "memory",
    "plan",
    "forecast",
    "cli_review",
    "cli_doctor",
    "cli",
)
"""Files that import without torch and transformers, so that checking and reading a run works on any laptop."""

RUNS_PROGRAMS = "jail"
"""The one file that executes text written by a model. It is started as a process of its own, inside the sandbox."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Written so that no pattern matches its own source line.
MACHINE_WORDS = re.compile(
    r"(?<![\w.])/(?:[w]ork|[r]oot|home/\w+|Users/\w+|[t]mp/\w+|[o]pt/(?:wheels|pypi))/|[w]orkplace|[c]o-authored-by",
    re.IGNORECASE,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def imported_rooms(source: str, rooms: tuple[str, ...] = ORDER) -> Iterator[tuple[str, int]]:
    """Each file of the package that `source` imports, at module level or inside functions, with the line number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "soar" and len(parts) > 1:
                    yield parts[1], node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            inside = module[1:] if module[0] == "soar" else module if node.level else None
            if inside is None:
                continue
            if inside and inside[0]:
                yield inside[0], node.lineno
            else:
                yield from ((alias.name, node.lineno) for alias in node.names if alias.name in rooms)


def import_order(name: str, source: str, order: tuple[str, ...] = ORDER) -> list[str]:
    """Imports of `soar/{name}.py` that do not go upward in `order`."""
    if name not in order:
        return [f"soar/{name}.py has no place in ORDER (tests/house.py)"]
    own = order.index(name)
    return [
        f"soar/{name}.py:{line} imports {room}, which does not stand above it"
        for room, line in imported_rooms(source, order)
        if room not in order or order.index(room) >= own
    ]


def sizes(name: str, source: str) -> list[str]:
    """The file and its functions that are longer than allowed. A nested function counts in its parent too."""
    complaints = []
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        complaints.append(f"{name}: {lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                complaints.append(f"{name}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION_LINES}")
    return complaints


def docstrings(name: str, source: str) -> list[str]:
    """The module, public functions and public classes without a docstring."""
    tree = ast.parse(source)
    public = [n for n in tree.body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]
    complaints = [f"{name}:{n.lineno} {n.name} has no docstring" for n in public if not ast.get_docstring(n)]
    return complaints if ast.get_docstring(tree) else [f"{name}: the module has no docstring", *complaints]


def unsafe_calls(name: str, source: str) -> list[str]:
    """Calls and imports that could run or unpickle text which a model or a data file brought in."""
    complaints = []
    unpicklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(source)):
        found = None
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "torch.load", "os.system", "builtins.eval", "builtins.exec"}:
                found = called
            elif any(k.arg in {"allow_pickle", "shell"} and ast.unparse(k.value) != "False" for k in node.keywords):
                found = f"{called} with allow_pickle or shell"
        elif isinstance(node, ast.Import):
            found = next((a.name for a in node.names if a.name.split(".")[0] in unpicklers), None)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = (node.module or "").split(".")[0]
            names = {alias.name for alias in node.names}
            found = node.module if module in unpicklers or (module == "torch" and "load" in names) else None
        if found:
            complaints.append(f"{name}:{getattr(node, 'lineno', 0)} {found} is not allowed in the package")
    return complaints


def machine_words(name: str, text: str) -> list[str]:
    """Lines that name a path or a thing of the machine where they were written."""
    return [
        f"{name}:{number} speaks of the machine it was written on: {match.group()!r}"
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := MACHINE_WORDS.search(line))
    ]


def _without_code(markdown: str) -> str:
    fenced = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`", fenced)


def anchors(markdown: str) -> set[str]:
    """The link targets that the headings of a page make, in GitHub's spelling."""
    found: dict[str, int] = {}
    targets = set()
    text = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        targets.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return targets


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """Relative links of a Markdown page whose file, or heading in that file, does not exist."""
    complaints = []
    text = _without_code(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target, flags=re.IGNORECASE):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page.resolve()
        name = page.relative_to(root)
        if not goal.is_relative_to(root.resolve()) or not goal.exists():
            complaints.append(f"{name}: link to {target!r}: no such file")
        elif anchor and goal.suffix == ".md" and anchor not in anchors(goal.read_text(encoding="utf-8")):
            complaints.append(f"{name}: link to {target!r}: no such heading")
    return complaints


def repository_files(root: Path = ROOT) -> list[Path]:
    """Files of the repository that git does not ignore; every file when this is no git checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True
    )
    if listing.returncode:
        return [p for p in sorted(root.rglob("*")) if p.is_file() and not {".venv", ".git"} & set(p.parts)]
    names = sorted({name for name in listing.stdout.decode().split("\0") if name})
    return [root / name for name in names if (root / name).is_file()]


def text_of(path: Path) -> str | None:
    """The file's text, or None for a binary file."""
    data = path.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
