"""What surrounds a run changes nothing in it: closed output, odd terminals, few file handles, hash seeds, secrets. Those are
hidden by the name of their variable, by their form, and in URLs; ordinary text is left alone. And the laws of the
layout that import-linter does not check."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from helpers import ROOT
from loop_helpers import TINY, outcome, sets
from tables import cases

from soar.cli import main
from soar.files import HIDDEN, scrub
from soar.run.folder import ask_review

SECRETS = {
    "HF_TOKEN": "hf_" + "Secret0" * 4,
    "WANDB_API_KEY": "0badc0ffee0badc0ffee",
    "MY_PASSWORD": "correct-horse-battery",
}
PROGRAM = (ROOT / "tests" / "cases" / "odd_surroundings.txt").read_text(encoding="utf-8")
"""A command of soar and exports of its run, none of which may connect to another machine."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[str]]:
    """Folder, exit code and command of the tiny run in surroundings that are all odd at once.

    Nobody reads stdout and stderr; the locale is not UTF-8; the terminal is narrow and without colour; hashes of text are
    randomised; few files may be open; the environment holds secrets, and one of them stands in the command.
    """
    out = tmp_path_factory.mktemp("odd") / "run"
    words = ["run", "tiny", "--out", str(out), *sets(*TINY, f"name={SECRETS['MY_PASSWORD']}")]
    command = [sys.executable, "-c", PROGRAM, *words]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")}
    odd = {"HOME": str(out.parent), "PYTHONHASHSEED": "12345", "LC_ALL": "C", "NO_COLOR": "1", "COLUMNS": "40"}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, env={**kept, **odd, **SECRETS}, stdout=writing, stderr=writing, timeout=300)
    finally:
        os.close(writing)
    return out, done.returncode, command


def test_surroundings_change_no_number_and_nothing_is_uploaded_or_fetched(odd, tiny_run):
    """The odd run and its exports would have ended at the first connection, and this shows that they would."""
    assert outcome(odd[0]) == outcome(tiny_run)
    assert odd[1] == 0 and (odd[0] / "hashes.json").is_file() and odd[0].with_name("runjsonl").is_dir()
    assert subprocess.run([sys.executable, "-c", PROGRAM, "connect"], stdout=subprocess.DEVNULL).returncode == 77


def test_no_file_of_a_run_holds_a_secret(odd, capsys):
    out, _, command = odd
    assert SECRETS["MY_PASSWORD"] in " ".join(command)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, path
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["name"] == manifest["config"]["name"] == "[hidden]"
    assert "name=[hidden]" in manifest["command"]
    assert main(["doctor", str(out)]) == 0
    assert main(["run", "--resume", "--out", str(out)]) == 1
    assert "holds a secret only as [hidden]; give the recipe" in capsys.readouterr().err


def shell(line: str, **variables: str) -> tuple[int, str, str]:
    """Exit code of the first command of a pipe, standard output and error. `soar` is this checkout's."""
    script = "set -o pipefail; " + line.replace("soar ", f"{shlex.quote(sys.executable)} -m soar.cli ", 1)
    words, environment = ["bash", "-c", script], {**os.environ, **variables}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def held(run: Path) -> Path:
    """A run with a promotion that waits for review."""
    question = {"question": "5 \u00d7 7 \u2264 40, \u8fd0\u884c", "answer": "35"}
    ask_review(run, {"step": 1, "dataset": 0, "repeat": 0, "reward": 0.1}, [question])
    return run


@pytest.mark.parametrize(("command",), cases("run_folders", "output that nobody reads"))
def test_a_reader_that_has_gone_is_no_error(held, command):
    line = f"soar {command.replace('RUN', shlex.quote(str(held)))}"
    code, shown, said = shell(line, COLUMNS="0", PYTHONUNBUFFERED="1" if "watch" in command else "")
    assert (code in (0, 1), shown, said) == (True, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_a_named_error():
    code, _, said = shell("soar run --dry-run > /dev/full")
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("soar: ") and said.endswith("another place\n") and "No space" in said


VALUE = "correct-horse 42 battery"  # no form gives it away
VARIABLES = """HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_READ WANDB_API_KEY OPENAI_APIKEY AWS_SECRET_ACCESS_KEY DB_PASS
AWS_SESSION_TOKEN AZURE_CLIENT_SECRET GITHUB_PAT PGPASSWORD MYSQL_PWD DB_PASSWORD SMTP_PASSWD REDIS_AUTH SSH_PASSPHRASE
GOOGLE_APPLICATION_CREDENTIALS SECRET MY_PRIVATEKEY NPM_CONFIG__AUTHTOKEN SENTRY_DSN hf_token"""
ORDINARY = "KEYBOARD PATH TOKENIZERS_PARALLELISM COMPASS MONKEY AUTHOR KEYS_PER_PAGE PASSENGERS PWD OLDPWD"

FORMS = [  # "{a1B2*9}" stands for a text nine times over: no secret stands in this repository
    re.sub(r"\{([^{}*]+)\*(\d+)\}", lambda part: part[1] * int(part[2]), line).replace("\\n", "\n").split("\t")
    for line in (Path(__file__).parent / "cases" / "secrets.tsv").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("name", VARIABLES.split())
def test_secrets_by_the_name_of_their_variable_at_any_depth(name):
    value = {"command": ["soar", f"a {VALUE} b"], "deep": ({"k": f"{VALUE}-and-more"}, 3)}
    hidden = {"command": ["soar", f"a {HIDDEN} b"], "deep": [{"k": HIDDEN}, 3]}
    assert scrub(value, {name: VALUE, f"MY_{name}": f"{VALUE}-and-more"}) == hidden


@pytest.mark.parametrize("name", ORDINARY.split())
def test_values_of_other_variables_stay(name):
    assert scrub(VALUE, {name: VALUE, "SHORT_KEY": "on"}) == VALUE


@pytest.mark.parametrize(("text", "shown"), FORMS)
def test_secrets_by_their_form(text, shown):
    assert scrub(text, {}) == shown


FILES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "soar").rglob("*.py"))}
WITHOUT_TORCH = (
    "soar", "soar.cli", "soar.problems.pool", "soar.sandbox.run", "soar.domains.code", "soar.report.page",
    "soar.report.watch", "soar.run.folder", "soar.plan.check", "soar.studies.study",
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
    """Nor to help, to verify and to refuse a full folder or no file; what runs a model says what installs it."""
    (tmp_path / "c.jsonl").write_text('{"completion": "1", "gold": "1"}\n')
    commands = (["--help"], ["run", "--help"], ["verify", "c.jsonl", "--verifier", "number"], ["screen", "--out", "."])
    no_file = ([*words, "--problems", "no.csv"] for words in (["screen", "tiny", "--out", "y"], ["eval", "tiny"]))
    program = f"""
import sys, {", ".join(WITHOUT_TORCH)}
assert [soar.cli.main(words) for words in {[*commands, *no_file]}] == [0, 0, 0, 1, 1, 1]
assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
sys.modules["torch"] = None
sys.exit(soar.cli.main(["run", "--quiet", "--out", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    wanted = "soar: . is not empty and holds no run; give another --out\n"
    wanted += 2 * f"soar: no.csv: cannot be read: no such file (from {tmp_path})\n"
    wanted += "soar: this command runs a model and needs torch, which is not installed: pip install 'soar-rl[train]'\n"
    assert (done.returncode, done.stderr, [path.name for path in tmp_path.iterdir()]) == (1, wanted, ["c.jsonl"])


def test_the_outer_loop_can_be_read_in_an_afternoon():
    """soar/loop/teacher.py with all it imports, also within a function or only for types."""
    names = grimp.build_graph("soar", cache_dir=None).find_upstream_modules("soar.loop.teacher") | {"soar.loop.teacher"}
    places = {ROOT / name.replace(".", "/") for name in names}
    texts = [FILES.get(place.with_suffix(".py")) or FILES[place / "__init__.py"] for place in places]
    assert sum(text.count("\n") for text in texts) <= 4500
