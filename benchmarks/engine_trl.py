"""TRL's RLOOTrainer on the work of one student, for benchmarks/engine.py, in a process of its own that prints every step.

python benchmarks/engine_trl.py NAME STEPS PROMPTS ATTEMPTS NEW_TOKENS [--continuous]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import torch
from engine_models import dataset, device_of, reward_of_text, save_plain


def trl_seconds(
    name: str, steps: int, prompts: int, attempts: int, new: int, continuous: bool, limit: float = 150.0
) -> tuple[float, int]:
    """(seconds of one optimizer step, steps measured) within `limit` seconds; the first step is warm-up.

    Raises RuntimeError with the last output when no second step ended.
    """
    words = [sys.executable, __file__, *map(str, (name, steps, prompts, attempts, new))]
    child = subprocess.Popen(
        words + ["--continuous"] * continuous, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(limit, child.kill)
    timer.start()
    stamps, lines = [], []
    assert child.stdout is not None
    for line in child.stdout:
        lines.append(line.rstrip())
        if line.startswith("TRL step"):
            stamps.append(float(line.split()[-1]))
            print(line.rstrip(), flush=True)
    child.wait()
    timer.cancel()
    if len(stamps) < 2:
        raise RuntimeError("TRL did not finish two steps; its last output:\n" + "\n".join(lines[-25:]))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1), len(stamps) - 1


def bench_trl(toy: bool, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's trainer for one student: two steps measured after one of warm-up, times all steps and students.

    before: the rows of section `inner`, if it has run.
    """

    students, steps, prompts, attempts, new = (2, 2, 2, 4, 8) if toy else (16, 10, 8, 32, 160)
    found: list[dict[str, Any]] = []
    for way in ("generate", "continuous batching"):
        print(f"TRL, {way}:", flush=True)
        try:
            one, count = trl_seconds("toy" if toy else "135m", 3, prompts, attempts, new, way != "generate", 100.0)
        except RuntimeError as error:
            print(f"TRL with {way}: {error}", flush=True)
            continue
        row: dict[str, Any] = {
            "section": "trl",
            "what": f"TRL RLOOTrainer ({way}), {count} steps of one student measured, x {students} x {steps}",
            "seconds": students * steps * one,
            "seconds_a_step": one,
        }
        for ours in (each for each in before if each["section"] == "inner"):
            row["soar_ratio"] = row["seconds"] / ours["seconds"]
        found.append(row)
    return found


def train(name: str, steps: int, prompts: int, attempts: int, new: int, continuous: bool) -> None:
    """Run the trainer, printing when each step ended."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    folder = save_plain(name)
    count = 0

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            nonlocal count
            count += 1
            print(f"TRL step {count} ended at {time.perf_counter():.3f}", flush=True)

    def reward(completions: list[str], **more: Any) -> list[float]:
        return [reward_of_text(text) for text in completions]

    cuda = device_of().type == "cuda"
    config = RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=prompts * attempts,
        num_generations=attempts,
        max_completion_length=new,
        max_steps=steps,
        learning_rate=1e-5,
        beta=0.0,
        temperature=1.0,
        generation_kwargs={"min_new_tokens": new},
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if cuda else "float32"},
        use_transformers_continuous_batching=continuous,
    )
    trainer = RLOOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": question} for question in dataset(prompts * steps)]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    for number in ("steps", "prompts", "attempts", "new"):
        parser.add_argument(number, type=int)
    parser.add_argument("--continuous", action="store_true")
    train(**vars(parser.parse_args()))
