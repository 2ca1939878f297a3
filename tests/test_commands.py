"""Every command in README and docs: run where it can be, else checked as far as it goes without GPU, hub and installing.

Commands stand in fenced `console` blocks. Those of soar that only read a run, or write beside it, are run; runs are asked
for their plan (`--dry-run`); the rest has to be accepted by the parser.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import house
import pytest

from soar import cli, completion
from soar.cli import main

PAGES = [house.ROOT / "README.md", house.ROOT / "CONTRIBUTING.md", *sorted((house.ROOT / "docs").rglob("*.md"))]
RUN = {"report", "watch", "export", "init", "doctor", "config-reference", "completion"}
PROJECT = tomllib.loads((house.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def commands(text: str) -> list[str]:
    """Command lines of a page's console blocks, comments removed, lines that end in a backslash joined."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                found.append(re.sub(r"\s+#.*$", "", line).strip())
    return found


def all_commands() -> list[tuple[str, str]]:
    found = {line: page.name for page in reversed(PAGES) for line in commands(page.read_text(encoding="utf-8"))}
    return sorted((page, line) for line, page in found.items())


def examples_of_help() -> list[tuple[str, str]]:
    """The example lines in the help of every command."""
    found = []
    for name, module in ((m.__name__, m) for m in cli.COMMANDS):
        for line in (getattr(module, "EXAMPLES", "") + getattr(module, "BUILD_EXAMPLES", "")).splitlines():
            match = re.match(r"  (soar .*?)(?:\s{2,}.*)?$", line)
            if match:
                found.append((name, re.sub(r"\s*[>|].*$", "", match.group(1))))
    return found


@pytest.fixture
def place(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages assume: finished runs, a problem file, a recipe."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "mine", ignore=shutil.ignore_patterns("state"))
    for name in ("demo", "seed0", "seed1", "seed2"):
        (tmp_path / "runs" / name).symlink_to(tiny_run)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("hard.jsonl", "problems.jsonl"):
        (tmp_path / name).write_text(text)
    (tmp_path / "mine.csv").write_text("task,result\nWhat is 1 + 1?,2\n")
    example = re.search(
        r"```python\n(.*?)^```", (house.ROOT / "docs" / "domains.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert example is not None
    (tmp_path / "roman.py").write_text(example[1])
    (tmp_path / "sums.jsonl").write_text('{"question": "What is 9 plus 5?", "answer": "XIV"}\n')
    (tmp_path / "recipe.toml").write_text('name = "recipe"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_soar(words: list[str]) -> None:
    """Run or parse the arguments of a soar command."""
    arguments = cli._parser().parse_args(words)
    assert hasattr(arguments, "action") or words == []
    if words[0] == "run":
        words = [word for word in words if word not in ("--resume", "--calibrate")]
        assert main([*words, *([] if "--dry-run" in words else ["--dry-run"])]) == 0
    elif words[0] == "doctor" and not Path(words[1]).exists():
        return  # a screening or a measurement, which test_doctor.py and others make
    elif words[:2] == ["export", "runs/warm"]:
        return  # made by the command before it on its page, with a GPU
    elif words[0] in RUN or "--no-model" in words or "--golds" in words:
        force = ["--force"] if words[0] == "init" else []
        assert main([*words, *force]) == 0


def check(line: str) -> None:
    """Check one command line of a page. Raises AssertionError."""
    program, *words = shlex.split(line)
    if program == "soar":
        check_soar(words)
    elif program == "make":
        targets = [word for word in words if "=" not in word]
        assert subprocess.run(["make", "-n", *targets], cwd=house.ROOT, capture_output=True).returncode == 0, line
    elif program in ("python", "python3"):
        assert (house.ROOT / words[0]).is_file(), line
    elif program == "pytest":
        assert (house.ROOT / words[-1]).exists(), line
    elif program == "pip":
        assert words[0] == "install"
        extras = [extra for word in words for extra in re.findall(r"\[([\w,-]+)\]", word)]
        assert {name for extra in extras for name in extra.split(",")} <= PROJECT["optional-dependencies"].keys(), line
        for file in (words[i + 1] for i, word in enumerate(words) if word == "-c"):
            assert (house.ROOT / file).is_file(), line
    else:
        raise AssertionError(f"no rule for {line!r}; teach it to tests/test_commands.py")


@pytest.mark.parametrize(("page", "line"), all_commands())
def test_command_of_a_page(place: Path, page: str, line: str) -> None:
    check(line)


@pytest.mark.parametrize(("room", "line"), examples_of_help())
def test_example_of_a_help_text(place: Path, room: str, line: str) -> None:
    check(line)


def spans(text: str) -> list[str]:
    """Commands inside the sentences of a page: code spans and indented lines, outside fenced blocks."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"(?:`|^    (?:\.venv/bin/)?)((?:soar|python|make) [^`]+?)(?:`|$)", outside, flags=re.MULTILINE)


@functools.cache
def options_by_command() -> dict[str, set[str]]:
    """`world build` -> its options."""
    return {" ".join(command.path): set(command.options) for command in completion.commands(cli._parser())}


def check_span(line: str) -> None:
    """A command of the text by name: its command, options, file or target exist. Raises AssertionError."""
    program, *words = line.split()
    if program == "make":
        check(line)
    elif program == "python":
        assert words[0].startswith("-") or (house.ROOT / words[0]).is_file(), line
    else:
        known = options_by_command()
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert name in known and options <= known[name], line


def test_commands_inside_the_text_exist() -> None:
    found = [line for page in PAGES for line in spans(page.read_text(encoding="utf-8"))]
    assert len(found) > 40
    for line in found:
        check_span(line)
    for bad in ("soar reprot X", "soar run --resum", "python benchmarks/none.py", "make nothing"):
        with pytest.raises(AssertionError):
            check_span(bad)


def test_commands_are_found_and_wrong_ones_are_caught(place: Path) -> None:
    text = (
        "x\n```console\nsoar run a \\\n  --set b=1   # why\n\n# only words\nmake demo\n```\n```python\nsoar no\n```\n"
    )
    assert [" ".join(line.split()) for line in commands(text)] == ["soar run a --set b=1", "make demo"]
    assert len(all_commands()) > 15
    for bad in ("make nothing", "pip install 'x[absent]'", "python absent.py", "rm -r x"):
        with pytest.raises(AssertionError):
            check(bad)
    for bad in ("soar run --dry-runn", "soar reprot x"):
        with pytest.raises(SystemExit):
            check(bad)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        compile(block, page.name, "exec")


def test_every_command_has_help_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {line.split()[1] for _, line in examples_of_help()}
    for module in cli.COMMANDS:
        assert "examples:" in getattr(module, "EXAMPLES", ""), module.__name__
    assert {"run", "watch", "report", "export", "init", "doctor", "review", "completion"} <= shown


def test_every_page_is_reached_from_the_readme() -> None:
    seen, todo = set(), [house.ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            goal = (page.parent / target).resolve()
            if goal not in seen and goal.is_file():
                todo.append(goal)
    assert {page.name for page in PAGES} <= {page.name for page in seen}


def test_the_wheel_works_in_a_fresh_environment(tiny_run: Path, tmp_path: Path) -> None:
    """Only the wheel's files are there; the libraries are those of this environment."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for path in house.repository_files():
        if path.relative_to(house.ROOT).parts[0] in ("soar", "pyproject.toml", "README.md", "LICENSE"):
            target = source / path.relative_to(house.ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(source)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(build, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    (packages,) = fresh.glob("lib/python*/site-packages")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, env=environment)
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "libraries.pth").write_text(f"{libraries}\n")

    def soar(*words: str) -> str:
        command = [str(fresh / "bin" / "soar"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [str(python), "-c", "import soar; print(soar.__file__)"]
    assert str(fresh) in subprocess.run(where, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    shutil.copytree(tiny_run, tmp_path / "run")
    assert soar("--version").startswith("soar ")
    assert soar("report", "run", "--out", "page.html") == "page.html\n"
    assert soar("export", "run", "--format", "verifiers", "--out", "out").count("\n") == 5
    assert '"name": "tiny"' in soar("run", "tiny", "--dry-run")
    assert (packages / "soar" / "py.typed").is_file()
    assert (packages / "soar" / "assets" / "tiny" / "model.safetensors").is_file()
