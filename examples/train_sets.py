"""Train the students of an outer step that `soar student --emit` wrote with TRL's RLOO trainer, and give them back.

    soar student tiny --set model.adapter=lora --emit runs/mine
    python examples/train_sets.py runs/mine
    soar measure runs/mine                    # pays the teacher, and writes the sets of the next outer step

One student after another in this process; each set is independent, so on a cluster each is a job of its own. TRL averages its
loss over rows where soar divides by rows x max_tokens: AdamW does not see that, clipping and epsilon are scaled to match.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer


def reward_of(place: Path) -> Any:
    """The verifier of the run, from its reward.py."""
    spec = importlib.util.spec_from_file_location("reward", place / "reward.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.accuracy


def train(place: Path, name: str, jobs: dict[str, Any]) -> None:
    """One student: its adapter and its result."""
    student = jobs["student"]
    tokens, rows = student["sampling"]["max_tokens"], student["prompts_per_step"] * student["attempts"]
    settings = RLOOConfig(
        output_dir=str(place / name / "trl"), save_strategy="no", report_to=[], bf16=False,
        seed=1000 * jobs["step"] + jobs["sets"].index(name),
        max_steps=jobs["rloo_steps"], per_device_train_batch_size=rows, num_generations=student["attempts"],
        shuffle_dataset=False, max_completion_length=tokens, temperature=student["sampling"]["temperature"],
        learning_rate=jobs["learning_rate"], lr_scheduler_type="constant", beta=student["optimizer"]["kl"],
        max_grad_norm=student["optimizer"]["clip"] * tokens, adam_epsilon=student["optimizer"]["eps"] * tokens,
    )  # fmt: skip
    lines = (place / name / "train.jsonl").read_text(encoding="utf-8").split("\n")
    base = AutoModelForCausalLM.from_pretrained(jobs["model"])
    accuracy, lengths = reward_of(place), list[int]()

    def counted(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return accuracy(completion_ids=completion_ids, **columns)

    trainer = RLOOTrainer(
        model=PeftModel.from_pretrained(base, str(place / "start"), is_trainable=True),
        reward_funcs=counted,
        args=settings,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines if line]),
        processing_class=AutoTokenizer.from_pretrained(jobs["model"]),
    )
    trainer.train()
    trainer.model.save_pretrained(str(place / name / "adapter"))
    result = {"set": name, "adapter": f"../{name}/adapter", "tokens": sum(lengths)}
    (place / "results" / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def main(run: Path) -> None:
    """All sets of the newest step."""
    place = max((run / "sets").iterdir())
    jobs = json.loads((place / "jobs.json").read_text(encoding="utf-8"))
    for name in jobs["sets"]:
        train(place, name, jobs)


if __name__ == "__main__":  # reward.py starts processes that import this file
    main(Path(sys.argv[1]))
