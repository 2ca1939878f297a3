"""What transformers' own generation takes for the work of section `decode-135m`: the base model, no row ends early."""

from __future__ import annotations

from typing import Any

import torch
from engine_models import backbone_of, base_model, prompts_of, timed
from torch import Tensor

Row = dict[str, Any]


def _prompts(name: str, rows: int, length: int, attempts: int) -> tuple[Any, Tensor]:
    """(plain model, token ids [rows, length])."""
    backbone = backbone_of(name)
    model = base_model(name, backbone.device)
    ids = torch.tensor(prompts_of(backbone, 1, rows // attempts, length)[0], device=backbone.device)
    return model, ids.repeat_interleave(attempts, 0)


def bench_generate(toy: bool, rows: int, length: int, new: int, attempts: int) -> list[Row]:
    """`generate`, one static batch."""
    model, ids = _prompts("toy" if toy else "135m", rows, length, attempts)
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}

    def work() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **common)

    seconds = timed(work, 1, 1)
    return [
        {
            "section": "decode-135m",
            "what": "transformers generate, base only",
            "tokens_per_second": rows * new / seconds,
            "seconds": seconds,
        }
    ]


def bench_batching(toy: bool) -> list[Row]:
    """`generate_batch`, transformers' continuous batching; its set-up is done in a run before, and not counted."""
    from transformers import GenerationConfig

    rows, length, new, attempts = (32, 12, 8, 4) if toy else (2048, 100, 160, 32)
    model, ids = _prompts("toy" if toy else "135m", rows, length, attempts)
    settings = GenerationConfig(do_sample=True, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    written: list[int] = []

    def work() -> None:
        found = model.generate_batch(
            inputs=ids.tolist(), generation_config=settings, progress_bar=False, persistent_manager=True
        )
        written.append(sum(len(one.generated_tokens) for one in found.values()))

    seconds = timed(work, 1, 1)
    model.destroy_cached_continuous_batching_manager()
    if written[-1] != rows * new:
        raise RuntimeError(f"generate_batch wrote {written[-1]} tokens of {rows * new}: its speed says nothing")
    return [
        {
            "section": "batching",
            "what": "transformers generate_batch (continuous batching), base only",
            "tokens_per_second": rows * new / seconds,
            "seconds": seconds,
        }
    ]
