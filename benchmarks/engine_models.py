"""Random models in known shapes, with a tokenizer of as many words, for benchmarks/engine.py."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soar.config import ModelConfig
from soar.engine.load import fuse
from soar.engine.policy import AdapterStack, Backbone

SHAPES: dict[str, dict[str, int]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "toy": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


def commit() -> str:
    """The commit measured: SOAR_COMMIT, or git's."""
    given = os.environ.get("SOAR_COMMIT")
    if given:
        return given
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def surroundings() -> dict[str, Any]:
    """Versions of what takes part, and the host: its cores, and what else computed on them (load average)."""
    found: dict[str, Any] = {}
    for name in ("transformers", "triton", "liger_kernel", "trl", "peft", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {"versions": found, "cpu_count": os.cpu_count(), "load_average": os.getloadavg()[0]}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], warm: int = 1, runs: int = 3) -> float:
    """Seconds of the fastest of `runs` runs after `warm` more."""
    found = []
    for run in range(warm + runs):
        wait()
        began = time.perf_counter()
        work()
        wait()
        if run >= warm:
            found.append(time.perf_counter() - began)
    return min(found)


def clocked(spent: dict[str, float], stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its seconds added to spent[stage]."""

    def run(*given: Any, **named: Any) -> Any:
        wait()
        began = time.perf_counter()
        result = work(*given, **named)
        wait()
        spent[stage] += time.perf_counter() - began
        return result

    return run


def step_bytes_and_flops(
    config: LlamaConfig, rows: int, places: float, policies: int, rank: int
) -> tuple[float, float]:
    """Bytes moved and FLOPs of one decoding step with `places` cached tokens a row (bf16)."""
    kv_width = config.num_key_value_heads * config.head_dim
    q_width = config.num_attention_heads * config.head_dim
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linear = layers * (hidden * (2 * q_width + 2 * kv_width) + 3 * hidden * inner)
    head = config.vocab_size * hidden
    ends = layers * (4 * hidden + 2 * q_width + 2 * kv_width + 3 * (hidden + inner))
    adapters = rank * ends
    cache = rows * places * layers * 2 * kv_width
    size = 2 * (linear + head + policies * adapters + cache) + 3 * 2 * rows * config.vocab_size
    flops = 2 * rows * (linear + head + adapters) + 4 * rows * places * layers * q_width
    return size, flops


def prompts_of(backbone: Backbone, policies: int, per_policy: int, length: int) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, backbone.vocabulary, (policies, per_policy, length), generator=generator).tolist()


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base_model(name: str, device: torch.device) -> Any:
    """A random Llama of the shape, bf16 on a GPU."""
    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=4096)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    torch.manual_seed(0)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return LlamaForCausalLM(config).to(kind).eval()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One word per token: w5 is token 5."""
    count = SHAPES[name]["vocab_size"]
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, count))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def backbone_of(name: str) -> Backbone:
    """The shape wrapped for stacked adapters of rank 16; no token ends a completion."""
    model = base_model(name, device_of())
    backbone = Backbone(model, tokenizer_of(name), ModelConfig(lora_rank=16), fuse(model))
    backbone.end_ids = frozenset((-1,))
    return backbone


def random_stack(backbone: Backbone, policies: int) -> AdapterStack:
    """Adapters that all differ, so that none can be left out unnoticed."""
    stack = backbone.new_stack(0, policies)
    for name, tensor in stack.tensors.items():
        if name.endswith(".B"):
            tensor.normal_(0.0, 0.01)
    return stack


def save_plain(name: str) -> Path:
    """Model and tokenizer in a folder that `from_pretrained` reads."""
    folder = Path(tempfile.mkdtemp()) / name
    base_model(name, device_of()).save_pretrained(folder)
    tokenizer_of(name).save_pretrained(folder)
    return folder


def dataset(count: int, words: int = 90) -> list[str]:
    """Prompts of so many words."""
    return [" ".join(f"w{5 + (31 * i + 7 * j) % 400}" for j in range(words)) for i in range(count)]


def reward_of_text(text: str) -> float:
    """A reward that costs nothing and splits every group: whether the text has an even number of the digit 1."""
    return float(text.count("1") % 2 == 0)
