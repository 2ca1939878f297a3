"""Every command of every page is run, or stands on a list with the reason why not.

test_pages_run.py runs README and quickstart in order; here those of all other pages are run, from console blocks and from
sentences, at tiny sizes: words in capitals are filled in, sizes are those of the tests. A command of `LISTED` is not run, but
its own parser must accept it. A page that gains a command which is neither run nor listed fails, and so does an entry of a
list whose command is on no page any more. `soar NAME`, alone or with one option, names a command and is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import house
import pytest
from loop_helpers import TINY
from test_any_model import SMALL, save_model
from test_coding import needs_sandbox
from test_commands import PAGES, check, commands, options_by_command, spans
from test_pages_run import LEFT_OUT, fill_place, small

from soar import cli
from soar.cli import main

README = "test_pages_run::test_the_commands_of_the_readme_work_in_order"
STUDIES = f"hours: cells of full size; test_studies::test_built_in_studies_are_valid; a small one: {README}"
RAY = "starts Ray; test_ray::test_any_number_of_workers_gives_the_numbers_of_one_process"
INSTALLS = "installs from an index; without one: test_commands::test_the_wheel_works_in_a_fresh_environment"
RECIPES = "a model file and minutes; test_domains::test_the_recipes_of_domains_run_at_toy_size"
ATTACKS = "minutes; test_sandbox::test_no_attack_escapes_and_none_is_graded_correct"
CODE = "a random model writes no tasks; test_coding::test_a_toy_run_of_the_recipe_ends_in_a_report"
SMOLLM2 = "SmolLM2's recipe is fixed in it; the same script is in ADDED"
SPANS = "a pipe of the shell; test_streams::test_a_reader_that_has_gone_is_no_error_for_any_command"
SUITE = "a file of this suite"

WARM = (
    "a model file and a GPU; test_student_eval::test_a_student_on_a_runs_questions, "
    "test_export::test_merged_weights_are_base_plus_adapter"
)
CELLS = "reads that study; test_cells reads a small one"
RARE = "hours on a CPU; test_rare_world::test_the_recipe_runs_and_the_script_says_what_its_teacher_asked"

DOMAIN_RUNS = {  # one of them has three lines of options
    " ".join(line.split())
    for line in commands((house.ROOT / "docs/results/domains.md").read_text())
    if line.startswith("soar run")
}

LISTED = {
    "make demo": f"installs, then `soar run`: {README}",
    "make test": "installs, then this suite",
    'soar run tiny --set \'arms.run=["base", "hard_only", "ps", "ps_hard", "pq"]\'': f"minutes: {README}; "
    "test_arms::test_the_promoted_student_goes_on_with_the_hard_problems",
    "make smollm2": f"installs; {RECIPES}",
    "pip install 'soar-rl[train]'": INSTALLS,
    "pip install 'soar-rl[ray]'": INSTALLS,
    "pip install -c constraints.txt -e '.[train]'": INSTALLS,
    "soar study finding1 --out studies/finding1": STUDIES,
    "soar study embedded --jobs 20 --set threads=1 --out studies/embedded": STUDIES,
    "soar study teachers --jobs 25 --set threads=1 --out studies/teachers": STUDIES,
    "soar study smollm2 --jobs 8 --set model.path=warm --set problems.source=hard.jsonl --set arms.real=easier.jsonl "
    "--out studies/smollm2": STUDIES,
    "soar study smollm2-students --jobs 24 --set model.path=warm --set problems.source=hard.jsonl "
    "--set arms.real=easier.jsonl --out studies/smollm2-students": STUDIES,
    "soar study smollm2 --seeds 0 1 2 3 4 5 --jobs 6 --set model.path=warm --set problems.source=hard.jsonl "
    "--set arms.real=easier.jsonl --set teacher.datasets=4 --set arms.steps=64 --set arms.curriculum_steps=6 "
    "--set arms.learning_rate=3e-4 --out studies/six-seeds": STUDIES,
    "soar student smollm2-warm --model warm --problems hard.jsonl "
    "--train pq_curriculum:studies/six-seeds/cells/soar-seed0 --set screen.attempts=0 --set seed=0 --out OUT": WARM,
    "soar study smollm2 --seeds 0 1 2 --jobs 3 --set model.path=warm --set problems.source=hard.jsonl "
    "--set arms.real=easier.jsonl --set teacher.steps=4 --set limits.max_promotions=0 --set student.sampling.max_tokens=96 "
    "--set student.optimizer.kl=0.01 --set student.optimizer.clip=1 --set reward.questions=64 --set promotion.tau=0.005 "
    "--set arms.curriculum_steps=15 --set arms.learning_rate=3e-4 --set teacher.datasets=4 "
    "--out studies/seven-eight": STUDIES,
    "soar student smollm2-warm --model warm --problems hard.jsonl --train hard --steps 256 --set seed=0 "
    "--out runs/long0": WARM,
    "soar student --train pq_curriculum:PILOT --steps 64 --out OUT": WARM,
    "python benchmarks/cells.py studies/six-seeds --problems hard.jsonl": CELLS,
    "python benchmarks/cells.py studies/smollm2 --problems hard.jsonl": CELLS,
    "python benchmarks/cells.py studies/smollm2-students": CELLS,
    "soar student smollm2-sums --model DIR --problems six.jsonl --train file:short.jsonl --steps 60 "
    "--set arms.curriculum_steps=60 --set student.optimizer.kl=0.01 --set arms.learning_rate=2e-4 --set screen.attempts=0 "
    "--set arms.questions=256 --set student.sampling.max_tokens=64 --set evaluate.attempts=1 "
    '--set "evaluate.ks=[1]" --set seed=3 --out runs/warm': WARM,
    "soar export runs/warm --format merged --policy real --out warm": WARM,
    "soar run smollm2-warm --model warm --problems pilot.jsonl --set arms.real=easier.jsonl --set seed=20": WARM,
    "python benchmarks/ladder.py ladder smollm2-warm --levels 1x3 1x4 1x5 1x6 1x7 1x8 --count 64 --attempts 16 "
    "--teacher-texts 256 --set model.path=warm": WARM,
    "soar run tiny-rare --set seed=20": RARE,
    "soar study subsets": STUDIES,
    "soar study sweep --jobs 2 --set threads=1 --out studies/sweep": STUDIES,
    "soar run tiny-rare --set teacher.steps=0 --set 'arms.run=[\"real\"]' --set arms.real=FILE": RARE,
    "python benchmarks/teacher_drift.py studies/teachers": RARE,
    "soar world build --world tiny-rare --out worlds/rare": "minutes; "
    "test_worlds::test_pretraining_is_reproducible_and_learns",
    "python benchmarks/world.py --model builtin:tiny-rare": "half a minute; "
    "test_rare_world::test_its_untrained_teacher_seldom_asks_a_useful_question",
    "soar study STUDY --out DIR": STUDIES,
    "soar study NAME": STUDIES,
    "soar run --out runs/mine --workers 2": RAY,
    "soar run --out runs/mine --workers auto": RAY,
    "soar run --out runs/mine --workers ray://head:10001 --set cluster.workers=8": RAY,
    "python benchmarks/workers.py": RAY,
    "soar run code-smollm2 --model MODEL --out runs/code": CODE,
    "soar run small-1gpu --set problems.domain=code --problems tasks.jsonl --model MODEL --out runs/mine": CODE,
    "soar review DIR --accept": "needs a promotion that waits; "
    "test_review::test_the_command_shows_questions_and_effect_and_takes_the_decision",
    "soar check science-smollm2 --model DIR --set model.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf --samples 32": RECIPES,
    **dict.fromkeys(DOMAIN_RUNS, RECIPES),
    "python benchmarks/ladder.py FOLDER --levels 1x3 --teacher-texts 48 --set model.path=DIR "
    "--set teacher.sampling.temperature=0.7": SMOLLM2,
    "pytest -n 0 -s tests/test_vllm_real.py": SUITE,
    "python -m pytest tests/test_outside_tools.py": SUITE,
    "python -m pytest -n 0 -s tests/gpu": SUITE,
    "python -m pytest tests/test_report.py": SUITE,
    "soar check ... \\| head": SPANS,
    "python benchmarks/sandbox.py attacks": ATTACKS,
    "python benchmarks/sandbox.py attacks --backend namespaces": ATTACKS,
    "python benchmarks/verify.py bombs": "half a minute; test_verify::test_bombs_are_contained_while_other_checks_go_on",
    "python benchmarks/verify.py throughput DATA": "a timing of 20,000 checks; test_verify::test_math",
    "python benchmarks/world.py": "half a minute; test_worlds::test_shipped_model_knows_its_side_topics",
    "python benchmarks/population.py": "a timing of threads; test_student::test_any_chunk_gives_the_same_students",
    "python benchmarks/engine.py --profile --out FILE": "needs a GPU",
    "python benchmarks/forecast.py --runs 2": "a minute; test_forecast::test_a_calibrated_run_shows_forecast_against_actual",
    "python benchmarks/outer_step.py": "needs a GPU; a toy: "
    "test_outer_step::test_an_outer_step_of_random_weights_is_forecast_done_and_compared",
    "python benchmarks/scaling.py": "test_scaling::test_the_page_quotes_the_script",
    "python benchmarks/families.py --problems 20 --out docs/results/families.md": "needs reasoning-gym; "
    "test_procedural::test_real_families",
    "python tests/kill_points.py FOLDER POINTS LANES SEED": "test_kill::test_every_killed_run_ends_as_the_one_that_was_not",
}
"""Commands that are not run here -> why not; `test_file::test` is the test that does the same or the like of it."""

LEARNS = "--set threads=1 --set student.steps=1"
ASKS = "--candidates 8 --count 4 --attempts 2 --set threads=1 --set student.sampling.max_tokens=4 "
ASKS += "--set problems.format=question_answer --set teacher.sampling.max_tokens=4"
MAKE_SUMS = (
    "short.jsonl --terms 2 3 4 --digits 1 --count 300 --signs + --bare --seed 72",
    "six.jsonl --terms 6 --digits 1 --count 16 --signs + --bare",
    "hard.jsonl --terms 7 8 --digits 1 --count 280 --signs + --bare --totals --seed 1024",
    "easier.jsonl --terms 4 5 6 --digits 1 --count 400 --signs + --bare --totals --seed 1025",
    "hard.jsonl --terms 9 10 --digits 1 --count 280 --signs + --bare --totals --seed 1024",
    "easier.jsonl --terms 4 5 6 7 --digits 1 --count 400 --signs + --bare --totals --seed 1025",
)
ADDED = {
    **{f"python examples/make_sums.py {words}": "" for words in MAKE_SUMS},
    "python benchmarks/quantize.py": "--rows 4",
    "python benchmarks/fuzz.py": "--cases 50",
    "python benchmarks/students.py": f"--lr 1e-3 --share 0.5 --students 1 {LEARNS}",
    "python benchmarks/students.py --lr": f"1e-3 --share 0.5 --students 1 {LEARNS}",
    "python benchmarks/reward_noise.py --easier 140": f"--easier 2 --datasets 2 --repeats 2 --attempts 16 {LEARNS} "
    "--set teacher.questions=4 --set student.prompts_per_step=2 --set student.attempts=4",
    "python benchmarks/ladder.py FOLDER smollm2-sums --set model.path=DIR": f"--levels 1x3 {ASKS} --teacher-texts 4",
    "python benchmarks/ladder.py FOLDER smollm2-sums --levels 1x8 1x9 1x10 1x11 1x12 1x14 --count 256 --attempts 128 "
    "--set model.path=DIR": f"--levels 1x4 {ASKS} --teacher-texts 4",
    "python benchmarks/smollm2.py FOLDER --model DIR --level 10 --stages prompts bounds --texts 256": f"{ASKS} --texts 4 "
    "--temperatures 1 --recipe smollm2-sums --stages prompts",  # bounds wants 256 problems of the teacher
    "python benchmarks/verify.py agreement DATA": "--workers 1",
    "python benchmarks/sandbox.py speed": "--count 4 --workers 1",
}
"""Scripts that are run -> the options that make them small."""


def squeezed(line: str) -> str:
    return " ".join(line.split())


def is_mention(line: str) -> bool:
    """`soar check`, `soar run --resume`: the name of a command, not one to type."""
    words = line.split()
    if words[0] != "soar":
        return False
    rest = words[3:] if " ".join(words[1:3]) in options_by_command() else words[2:]
    return not rest or (len(rest) == 1 and rest[0].startswith("-"))


def commands_of(page: Path) -> list[str]:
    """Those of the console blocks, then those of the sentences."""
    text = page.read_text(encoding="utf-8")
    return [squeezed(line) for line in (*commands(text), *(span for span in spans(text) if not is_mention(span)))]


def name_of(page: Path) -> str:
    return page.relative_to(house.ROOT).as_posix()


def in_order(page: Path, line: str) -> bool:
    """Whether test_pages_run.py runs it."""
    blocks = map(squeezed, commands(page.read_text(encoding="utf-8")))
    pages = ("README.md", "docs/quickstart.md")
    return name_of(page) in pages and line in blocks and line.startswith("soar ") and not line.startswith(LEFT_OUT)


def to_run() -> dict[str, list[str]]:
    """Page -> its commands that are run here; one that is on several pages is run with the first."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for page in PAGES:
        for line in commands_of(page):
            if line not in LISTED and line not in seen and not in_order(page, line):
                found.setdefault(name_of(page), []).append(line)
                seen.add(line)
    return found


def filled(line: str) -> list[str]:
    """Words of a command, those in capitals replaced by what the folder of the test holds."""
    line = re.sub(r"(--model |model\.path=)(DIR|MODEL)\b", r"\1model", line)
    line = re.sub(r"--out (DIR|FILE)\b", "--out runs/new", line)
    line = re.sub(r"\b(RUN|DIR)\b", "runs/demo", line)
    line = re.sub(r"(?<= )(smollm2(-sums)?)(?= |$)", r"\1.toml", line)  # the recipe without its model file
    line = line.replace("FILE --golds", "problems.jsonl --golds")
    for word, value in {
        "RECIPE": "tiny",
        "FILE": "completions.jsonl",
        "N": "2",
        "FOLDER": "work",
        "DATA": "data",
    }.items():
        line = re.sub(rf"(?<= ){word}\b", value, line)
    return shlex.split(line)


def sizes() -> list[str]:
    """Options for a random model that is no embedded one; problems are read as the page says."""
    keep = {key: value for key, value in SMALL.items() if key not in ("problems.format", "problems.verifier")}
    return [part for key, value in keep.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def run_soar(line: str) -> None:
    words = filled(line)[1:]
    if "--resume" not in words:
        for earlier in ("new", "tiny"):
            shutil.rmtree(Path("runs") / earlier, ignore_errors=True)
    if "--dry-run" in words or "--no-model" in words:
        pass
    elif "model" in words and "--set" in options_by_command()[words[0]]:
        words += sizes()
        words += ["--no-model"] if words[0] == "check" else []  # a random model fails a check of models
    elif "--resume" in words:  # the finished run of the fixture, with its config
        words = [word.replace("runs/new", "runs/demo") for word in words]
        words += [part for size in TINY for part in ("--set", size)]
    else:
        words = small(words)
    assert main(words) == 0, line


def run_script(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python FILE ...` does, in this process: torch is loaded already."""
    script, *words = filled(f"{line} {ADDED[line]}")[1:]
    path = house.ROOT / script
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        assert not error.code, line


@pytest.fixture
def place(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages assume: runs, problems, a model, the domain that a page writes."""
    fill_place(tiny_run, tmp_path)
    blocks = re.findall(r"```python\n(.*?)^```", (house.ROOT / "docs/domains.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "roman.py").write_text(blocks[0])
    monkeypatch.setattr(
        "test_any_model.WORDS", ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", "3", "X", "V", "I", "and")
    )
    save_model(tmp_path / "model", "llama", context=600)
    roman = ["II", "IV", "VI", "VIII", "X", "XII", "XIV", "XVI"]
    rows = [{"question": f"What is {n} plus {n}?", "answer": word} for n, word in enumerate(roman, start=1)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(1, 9)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"completion": rf"So \boxed{{{n}}}.", "gold": str(n)} for n in range(8)]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("smollm2.toml", "smollm2-sums.toml"):
        lines = (house.ROOT / "soar" / "recipes" / name).read_text(encoding="utf-8").splitlines()
        (tmp_path / name).write_text("\n".join(line for line in lines if not line.startswith("gguf_file")))
    (tmp_path / "data").mkdir()
    shutil.copyfile(tmp_path / "gsm8k.jsonl", tmp_path / "data" / "p.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", to_run())
def test_the_commands_of_a_page_run(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page != "docs/domains.md":  # only there are sums answered in Roman numerals
        shutil.copyfile("gsm8k.jsonl", "sums.jsonl")
    for line in to_run()[page]:
        print(f"$ {line}")
        if line.startswith("soar "):
            run_soar(line)
        elif not line.startswith("python benchmarks/sandbox.py"):
            run_script(line, monkeypatch)


@needs_sandbox
def test_the_benchmark_of_the_sandbox_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_script("python benchmarks/sandbox.py speed", monkeypatch)
    assert "namespaces" in capsys.readouterr().out


class Accepted(Exception):
    """The arguments of a script were read."""


def accept(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the parser of the command read its arguments, and `--help`; nothing is done. Raises SystemExit."""
    program, *words = shlex.split(line)
    if program == "soar":
        cli._parser().parse_args(words)
    elif program != "python" or words[0] == "-m":
        check(line.removeprefix("python -m "))
    else:
        script = house.ROOT / words[0]
        text = script.read_text(encoding="utf-8")
        if "argparse" not in text:
            assert line in text  # it takes words by place, as its first lines say
            return
        parse = argparse.ArgumentParser.parse_args

        def stop(self: argparse.ArgumentParser, *rest: Any) -> None:
            parse(self, *rest)
            assert self.format_help().startswith("usage: ")
            raise Accepted

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [str(script), *words[1:]])
            patch.setattr(sys, "path", [str(script.parent), *sys.path])
            with pytest.raises(Accepted):
                runpy.run_path(str(script), run_name="__main__")


def test_every_listed_command_is_accepted_by_its_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in LISTED:
        if "families.py" in line and importlib.util.find_spec("reasoning_gym") is None:
            continue
        if "..." not in line:
            print(f"$ {line}")
            accept(line, monkeypatch)
    for bad in ("soar run --no-such", "python benchmarks/world.py --no-such", "python benchmarks/verify.py bomb"):
        with pytest.raises(SystemExit):
            accept(bad, monkeypatch)


def test_every_command_is_run_or_listed() -> None:
    found = {line for page in PAGES for line in commands_of(page)}
    run = {line for lines in to_run().values() for line in lines}
    unknown = [line for line in run if not line.startswith("soar ") and line not in ADDED]
    assert unknown == [], "say in ADDED how to make it small, or in LISTED why it is not run"
    assert [line for line in (*LISTED, *ADDED) if line not in found] == [], "on no page any more"
    for reason in LISTED.values():
        for file, test in re.findall(r"(test_\w+)::(\w+)", reason):
            assert f"def {test}(" in (house.ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), (file, test)


def test_mentions_are_told_from_commands() -> None:
    assert all(map(is_mention, ("soar check", "soar run --resume", "soar world build")))
    assert not any(
        map(is_mention, ("soar doctor DIR", "python benchmarks/world.py", "soar run --set a=1", "make test"))
    )
