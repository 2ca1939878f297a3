"""Outer steps of `soar run` on random weights, with one and with two worker processes, or of a large shape on one card.

    python benchmarks/two_workers.py --out two.json                       0.5B on two GPUs: one worker, two, their ratio
    python benchmarks/two_workers.py --steps 10 --outer-steps 2 --out ten.json    the same with the paper's ten inner steps
    python benchmarks/two_workers.py --workers 2 --kill-one --out kill.json        two, and again with one of them killed
    python benchmarks/two_workers.py --shape 7b --workers 0 --outer-steps 1 --repeats 2 --out 7b.json   7B on one GPU
    python benchmarks/two_workers.py --shape toy --kill-one --datasets 2 --repeats 2 --questions 2 --attempts 4 --measured 4

By the rates of one H200 the first takes about seven minutes with two outer steps, half as much again with three (the
default); --steps and --repeats make it shorter. A worker is killed in the last outer step, by the seconds of the one before.
The last line is a toy on a CPU. Nothing is downloaded: the model is drawn on the device and written to --folder (0.5B: 1 GB,
7B: 15 GB in bfloat16), since every worker loads it for itself; one token in --mean ends a completion. Each run is a real one
(`soar.run.pipeline.execute`) in a process of its own: the teacher writes, students train by RLOO with the KL term and are
measured, the teacher learns. The first outer step of a run pays once for kernels and plans; `seconds` is the mean of the
others where there are any. The JSON is printed, and written anew after each run.

**The ratio** depends on --steps. What a second worker does not shorten (the teacher writes and learns, adapters travel, a
GPU's graphs are captured) comes once an outer step, and weighs five times as much at two RLOO steps as at the paper's ten:
for a fair ratio take `--steps 10 --outer-steps 2`, some four times as long a step. The default is the strict case. Where the
seconds go: `stages_s` has the stages of every outer step, as the run's process waits for them, and `pieces_s` the longest
piece of work of every stream, by its worker's clock. What teach takes beyond train_chunk, and measure beyond measure_chunk,
goes by on the way and in the run's process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SHAPES = {  # of Qwen2.5-0.5B and -7B, without biases: vocabulary, width, of the MLP, layers, heads, key heads, tied
    "0.5b": (151_936, 896, 4864, 24, 14, 2, True),
    "7b": (152_064, 3584, 18_944, 28, 28, 4, False),
    "toy": (512, 32, 48, 2, 4, 2, True),
}
KEYS = {
    "outer_steps": "teacher.steps", "datasets": "teacher.datasets", "repeats": "student.repeats",
    "questions": "teacher.questions", "steps": "student.steps", "prompts": "student.prompts_per_step",
    "attempts": "student.attempts", "max_tokens": "student.sampling.max_tokens", "measured": "reward.questions",
}  # fmt: skip
LOOP_ONLY = (
    "screen.attempts=0", 'arms.run=["base"]', "evaluate.attempts=1", "evaluate.ks=[1]", "threads=1", "promotion.tau=9",
)  # fmt: skip


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="0: this process alone, without Ray")
    parser.add_argument("--kill-one", action="store_true", help="one run more, in which a worker is killed")
    numbers = (3, 4, 4, 16, 2, 8, 32, 320, 64)
    for name, value in zip(KEYS, numbers, strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=KEYS[name])
    parser.add_argument("--mean", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="for model and runs (default: a new one, removed at the end)")
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.kill_one and arguments.outer_steps < 2:
        parser.error(
            "--kill-one kills in the last outer step by the seconds of the one before: --outer-steps 2 or more"
        )
    return arguments


def write_model(shape: str, folder: Path, mean: int) -> dict[str, Any]:
    """A random Llama of the shape with a tokenizer of as many words (w5 is token 5), as `from_pretrained` reads them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    vocabulary, hidden, inner, layers, heads, key_heads, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    began = time.perf_counter()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.02)
    model.generation_config.eos_token_id = list(range(4, vocabulary, mean))
    model.save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
            "gpus": torch.cuda.device_count(), "written_s": round(time.perf_counter() - began, 1)}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file that another process may be writing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def kill_amid(out: Path, last: int) -> None:
    """Kill a worker when two fifths of outer step number `last` have passed, by the seconds of the one before it."""
    while len(done := [row for row in rows_of(out / "metrics.jsonl") if row["event"] == "outer_step"]) < last:
        time.sleep(0.05)
    time.sleep(0.4 * done[-1]["seconds"])
    for title in Path("/proc").glob("[0-9]*/cmdline"):
        if title.read_bytes().startswith(b"ray::Worker"):  # as Ray names the processes of that class
            os.kill(int(title.parent.name), signal.SIGKILL)
            return print(f"killed a worker, process {title.parent.name}", flush=True)


def clocked(stages: dict[str, list[float]], pieces: dict[str, list[float]]) -> None:
    """From here on in this process the seconds of stages and pieces (module text) are written down."""
    from soar.loop.teacher import OuterLoop
    from soar.run.ray import RayParallel

    def timed(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def timed_stage(*given: Any) -> Any:
            began = time.perf_counter()
            done = stage(*given)
            stages.setdefault(name, []).append(round(time.perf_counter() - began, 3))
            return done

        return timed_stage

    for name in ("write", "teach", "measure", "learn"):
        setattr(OuterLoop, name, timed(name, getattr(OuterLoop, name)))
    stream = RayParallel.stream

    def timed_stream(self: RayParallel, work: Callable[..., Any], *given: Any) -> Iterator[tuple[Any, Any]]:
        self._longest.pop(work.__name__, None)
        yield from stream(self, work, *given)
        if work.__name__ in self._longest:  # there was a piece
            pieces.setdefault(work.__name__, []).append(round(self._longest[work.__name__], 3))

    RayParallel.stream = timed_stream  # type: ignore[method-assign]


def one_run(out: Path, overrides: list[str], kill: bool) -> dict[str, Any]:
    """A run in this process, its seconds, how often a worker was lost, and torch's peak memory here."""
    import torch

    from soar.config import load
    from soar.run.folder import RunFolder
    from soar.run.pipeline import execute
    from soar.run.progress import Progress

    config = load("paper-math", overrides)
    if kill:
        threading.Thread(target=kill_amid, args=(out, config.teacher.steps - 1), daemon=True).start()
    stages, pieces, said = dict[str, list[float]](), dict[str, list[float]](), list[str]()
    clocked(stages, pieces)
    progress = Progress(quiet=True)
    progress.say = said.append  # type: ignore[method-assign]
    began = time.perf_counter()
    with RunFolder(out, config, ["two_workers.py"]) as folder:
        execute(folder, config, progress)
    seconds = time.perf_counter() - began
    steps = [row for row in rows_of(out / "metrics.jsonl") if row["event"] == "outer_step"]
    timed = [row["seconds"] for row in steps]
    return {
        "seconds": sum(timed[1:]) / len(timed[1:]) if timed[1:] else timed[0],
        "outer_step_s": timed,
        "stages_s": stages,
        "pieces_s": pieces,
        "tokens": steps[-1]["tokens"],
        "whole_run_s": round(seconds, 1),
        "lost": sum("was lost and started again" in line for line in said),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None,
        "rewards": [row["reward_G"] for row in steps],
    }


def main(arguments: argparse.Namespace) -> None:
    """Write the model, make the runs, print the figures."""
    from random_domain import QUESTION_WORDS, words

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"question": f"{words(QUESTION_WORDS, i)} w{200 + i}", "answer": "1"} for i in range(2 * arguments.measured)
        ]
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {key: value for key, value in vars(arguments).items() if key not in ("folder", "out")}
        figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "settings": settings, "runs": []}
        with alone() as pool:
            figures |= pool.submit(write_model, arguments.shape, folder / "model", arguments.mean).result()
        domain = f"{Path(__file__).parent / 'random_domain.py'}:RANDOM"
        overrides = [f'model.path="{folder / "model"}"', f'problems.source="{folder / "problems.jsonl"}"', *LOOP_ONLY]
        overrides += [f'problems.domain="{domain}"', f"teacher.sampling.max_tokens={arguments.max_tokens}"]
        overrides += [f"{key}={getattr(arguments, name)}" for name, key in KEYS.items()] + arguments.sets
        kills = [(max(arguments.workers), True)] if arguments.kill_one else []
        for number, (workers, kill) in enumerate([(workers, False) for workers in arguments.workers] + kills):
            out = folder / f"run-{number}-{time.time_ns()}"
            with alone() as pool:
                done = pool.submit(one_run, out, [*overrides, f"cluster.workers={workers}"], kill).result()
            figures["runs"].append({"workers": workers, "killed": kill, **done})
            figures["ratio"] = figures["runs"][0]["seconds"] / figures["runs"][min(1, number)]["seconds"]
            if kill:  # against the same number of workers, all of whom lived
                figures["same_rewards"] = figures["runs"][-1]["rewards"] == figures["runs"][-2]["rewards"]
            text = json.dumps(figures, indent=1)
            print(text, flush=True)
            if arguments.out is not None:
                arguments.out.write_text(text + "\n", encoding="utf-8")


def alone() -> ProcessPoolExecutor:
    """A process of its own, with whose end a GPU's memory is free again."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


if __name__ == "__main__":  # worker processes import this file
    main(parsed())
