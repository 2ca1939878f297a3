"""Fused norm, rotary and gated-product kernels from liger-kernel, where it is installed and the model is on a GPU.

A decoder layer of transformers launches dozens of small kernels, most of them in its norms and rotary embedding; liger
has one for each, with gradients, for the usual model types. The given model's own modules get the fused forward
functions. Liger also changes names in transformers' module of that model type; those are put back, but for the rotary
function, which then chooses by the device of its input, so that other models in the process are as they were.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

from soar.config import ConfigError

CHECKED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
)  # model types whose tokens were compared on a GPU (tests/gpu)
ROTARY = "apply_rotary_pos_emb"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def _apply_to_this_model(model: Any, apply: Any) -> None:
    """Liger's patch of the instance, with the names that it changed in the module of the class put back."""
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    apply(model, cross_entropy=False, fused_linear_cross_entropy=False)
    for name, old in before.items():
        new = getattr(module, name)
        if new is old:
            continue
        setattr(module, name, _by_device(old, new) if name == ROTARY else old)


def _by_device(plain: Any, fused: Any) -> Any:
    """The fused rotary function on a GPU, the plain one elsewhere."""
    if hasattr(plain, "fused"):
        return plain

    def rotary(q: Any, k: Any, *rest: Any, **more: Any) -> Any:
        return (fused if q.is_cuda else plain)(q, k, *rest, **more)

    rotary.fused = fused  # type: ignore[attr-defined]
    return rotary


def probe_ids(vocabulary: int) -> torch.Tensor:
    """32 fixed token ids from all over the vocabulary.

    Not its first ones: a vocabulary begins with special tokens, and on a row of those, which no text has, a bfloat16 model
    of 30 layers amplifies any rounding without end (SmolLM2-135M: 34 of 36 logits, here 1.3).
    """
    return torch.randint(vocabulary, (32,), generator=torch.Generator().manual_seed(0))


def fuse(model: Any, wanted: str) -> bool:
    """Use liger's kernels in `model`; False where they do not apply (no GPU, not installed, unknown type, `off`).

    Logits of a short text are compared before and after; raises ConfigError when they differ by more than rounding.
    """
    weight = next(model.parameters())
    if wanted == "off" or not weight.is_cuda or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type not in CHECKED or model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    ids = probe_ids(model.config.get_text_config().vocab_size).to(weight.device)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits.float()
        _apply_to_this_model(model, _apply_liger_kernel_to_instance)
        after = model(input_ids=ids, use_cache=False).logits.float()
    gap = (before - after).abs().max().item()
    limit = TOLERANCE.get(weight.dtype, 0.05) * max(1.0, before.abs().max().item())
    if not gap <= limit:
        raise ConfigError(
            f"liger-kernel changes the logits of this {model.config.model_type} model by {gap:.3g} (at most {limit:.3g} is "
            'rounding); set model.fused_kernels = "off"'
        )
    return True
