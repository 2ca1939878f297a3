"""TRL's RLOOTrainer on the work of one student, for benchmarks/engine.py."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from engine_models import device_of, reward_of_text, save_plain


def trl_seconds(
    name: str, questions: list[str], steps: int, prompts: int, attempts: int, new: int, extra: dict[str, Any]
) -> float:
    """Seconds of `steps` optimizer steps, the first one left out and counted as the mean of the others."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    folder = save_plain(name)
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

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
        **extra,
    )
    trainer = RLOOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": question} for question in questions]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1) * steps
