"""The shape of a model, read without loading it, and what a run with it needs in memory: every term by arithmetic.

The shape comes from config.json; parameters are counted exactly from the headers of safetensors files where they are at
hand, from the index's total otherwise, else by the shape. Needs no torch and no network: a hub id is looked up in the
local cache only.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar.config import Config
from soar.types import UserError

GIB = 2**30
SIZE = re.compile(r"(?<![\w.])(\d{1,4}(?:\.\d{1,3})?)([bBmM])(?![a-zA-Z0-9])")
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5625}
"""Bytes of a weight. 4bit: four bits, and one float32 scale for 64 weights."""
TRAINED_BYTES = 16  # an adapter's weight, gradient and two AdamW moments, float32
SMALLEST_MICRO_BATCH = 1024  # tokens of one pass of the update, at least
HEADER_LIMIT = 100 << 20


class TooLarge(UserError):
    """A base model that does not fit its device; the message holds the arithmetic."""


@dataclass(frozen=True)
class ModelShape:
    """What memory and speed depend on. parameters: of the whole model; source: where it was read."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    parameters: int
    source: str

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers inside the decoder layers: what quantization makes smaller."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * q + 2 * kv + 3 * self.inner)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of one adapter of that rank on every linear layer but the output."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ends = 4 * self.hidden + 2 * q + 2 * kv + 3 * (self.hidden + self.inner)
        return rank * self.layers * ends

    def full_adapter_parameters(self) -> int:
        """Parameters of one full weight change."""
        return self.linear_parameters

    def cache_bytes(self, tokens: float, bytes_each: float) -> float:
        """Keys and values of one row with so many tokens."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * bytes_each

    def activation_bytes(self, tokens: int, bytes_each: float, recompute: bool = False) -> float:
        """What the backward pass of so many tokens keeps: per layer 24 values of the hidden and 6 of the inner width.

        recompute: with gradient checkpointing that of one layer, and every layer's input.
        """
        layer = 24 * self.hidden + 6 * self.inner
        return tokens * (self.layers * self.hidden + layer if recompute else self.layers * layer) * bytes_each


def counted(
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocabulary: int,
    tied: bool,
    source: str,
) -> ModelShape:
    """A shape of the Llama family with its parameters counted: embeddings, linear layers, norms."""
    q, kv = heads * head_dim, kv_heads * head_dim
    body = layers * (hidden * (2 * q + 2 * kv + 3 * inner) + 2 * hidden) + hidden
    parameters = body + vocabulary * hidden * (1 if tied else 2)
    return ModelShape(layers, hidden, inner, heads, kv_heads, head_dim, vocabulary, tied, parameters, source)


LLAMA = {
    "3B": counted(28, 3072, 8192, 24, 8, 128, 128256, True, "Llama-3.2-3B"),
    "8B": counted(32, 4096, 14336, 32, 8, 128, 128256, False, "Llama-3.1-8B"),
    "70B": counted(80, 8192, 28672, 64, 8, 128, 128256, False, "Llama-3.1-70B"),
}


def named_size(path: str) -> float | None:
    """Parameters by the size in a model's name: `Llama-3.2-3B-Instruct` -> 3e9; None where there is none."""
    match = SIZE.search(path.rstrip("/").rpartition("/")[2])
    return None if match is None else float(match[1]) * {"b": 1e9, "m": 1e6}[match[2].lower()]


def guessed(parameters: float) -> ModelShape:
    """A shape for a size alone: Llama-3.2-3B with depth and widths scaled by the cube root of the size."""
    known = LLAMA["3B"]
    factor = (parameters / known.parameters) ** (1 / 3)
    heads, kv = max(1, round(known.heads * factor)), max(1, round(known.kv_heads * factor))
    layers, hidden, inner = (max(1, round(value * factor)) for value in (known.layers, known.hidden, known.inner))
    source = "guessed from the size in the model's name"
    return ModelShape(layers, hidden, inner, heads, kv, 128, known.vocabulary, True, int(parameters), source)


def model_folder(path: str, revision: str | None = None) -> Path | None:
    """The folder with a model's config.json: a folder, `builtin:NAME`, or a hub id in the local cache; else None."""
    if path.startswith("builtin:"):
        folder = Path(__file__).parent.parent / "assets" / path.removeprefix("builtin:")
        return folder if (folder / "config.json").is_file() else None
    if (Path(path) / "config.json").is_file():
        return Path(path)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except (ImportError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def read_shape(folder: Path) -> ModelShape | None:
    """The shape that a folder's config.json gives, parameters as exactly as its files tell; None when it tells too little."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        shape = counted(
            int(config["num_hidden_layers"]),
            hidden,
            int(config.get("intermediate_size") or 4 * hidden),
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or hidden // heads),
            int(config["vocab_size"]),
            bool(config.get("tie_word_embeddings", True)),
            "config.json",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    exact = _stored_parameters(folder)
    if exact is None:
        return shape
    fields = {**shape.__dict__, "parameters": exact, "source": "config.json and the headers of the weight files"}
    return ModelShape(**fields)


def _stored_parameters(folder: Path) -> int | None:
    """Parameters in the folder's safetensors files, by their headers; None when files are missing or damaged."""
    names = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter"))
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        total = 0
        for name in names:
            with open(folder / name, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > HEADER_LIMIT:
                    return None
                header = json.loads(file.read(length))
            for key, entry in header.items():
                if key != "__metadata__":
                    size = 1
                    for side in entry["shape"]:
                        size *= int(side)
                    total += size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return total or None


def shape_of(config: Config) -> ModelShape | None:
    """The shape of a config's model: its own files, else guessed from the size in its name, else None."""
    folder = model_folder(config.model.path, config.model.revision)
    found = read_shape(folder) if folder is not None else None
    if found is not None:
        return found
    named = named_size(config.model.path)
    return None if named is None else guessed(named)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs on its device.

    weights: of the frozen base. adapters: of `policies` adapters with gradients and moments. cache_row: keys and values of
    one row with `row_tokens` tokens. activations: of the smallest pass of the update, `pass_tokens`. rows: of one
    sampling call of all students.
    """

    shape: ModelShape
    kind: str
    weights: float
    policies: int
    adapters: float
    row_tokens: int
    cache_row: float
    rows: int
    pass_tokens: int
    activations: float

    @property
    def least(self) -> float:
        """With one row sampled at a time and the smallest pass of the update."""
        return self.weights + self.adapters + max(self.cache_row, self.activations)

    def lines(self) -> list[str]:
        """The arithmetic as text."""
        shape, each = self.shape, self.weights / self.shape.parameters
        one = self.adapters / self.policies
        return [
            f"  weights      {self.weights / GIB:8.2f} GiB   {shape.parameters:,} parameters x {each:.3g} bytes "
            f"({self.kind}; {shape.source})",
            f"  adapters     {self.adapters / GIB:8.2f} GiB   {self.policies} policies x {one / TRAINED_BYTES:,.0f} "
            f"parameters x {TRAINED_BYTES} bytes (weight, gradient, two moments in float32)",
            f"  KV cache     {self.cache_row * self.rows / GIB:8.2f} GiB   {self.rows:,} rows x {self.row_tokens:,} tokens x "
            f"{self.cache_row / self.row_tokens:,.0f} bytes; less in smaller batches, {self.cache_row / GIB:.4f} a row",
            f"  activations  {self.activations / GIB:8.2f} GiB   at least: {self.pass_tokens:,} tokens of one pass x "
            f"{self.activations / self.pass_tokens:,.0f} bytes",
            f"  least        {self.least / GIB:8.2f} GiB   weights, adapters, and one row or one smallest pass",
        ]


def memory_of(config: Config, shape: ModelShape, prompt_tokens: int, kind: str = "") -> Memory:
    """What a run needs. kind: type of the weights as loaded; "": by model.dtype and model.device.

    Policies: the students trained at once (model.chunk, or all), teacher and baseline. Quantization covers the linear
    layers of the decoder; embeddings, norms and the output layer keep their type.
    """
    model, student = config.model, config.student
    kind = kind or (model.dtype if model.dtype != "auto" else "float32" if model.device == "cpu" else "bfloat16")
    plain = BYTES[kind]
    weights = shape.parameters * plain
    if model.quantization != "none":
        weights -= shape.linear_parameters * (plain - BYTES[model.quantization])
        kind = f"{model.quantization} in the layers, {kind} elsewhere"
    students = config.teacher.datasets * student.repeats
    policies = (min(students, model.chunk) if model.chunk else students) + 2
    own = shape.full_adapter_parameters() if model.adapter == "full" else shape.adapter_parameters(model.lora_rank)
    tokens = prompt_tokens + max(student.sampling.max_tokens, config.teacher.sampling.max_tokens)
    return Memory(
        shape,
        kind,
        weights,
        policies,
        policies * own * TRAINED_BYTES,
        tokens,
        shape.cache_bytes(tokens, plain),
        students * student.prompts_per_step * student.attempts,
        model.micro_batch_tokens or SMALLEST_MICRO_BATCH,
        shape.activation_bytes(
            model.micro_batch_tokens or SMALLEST_MICRO_BATCH, plain, model.gradient_checkpointing == "on"
        ),
    )


def check_fits(config: Config, available: int | None, device: str) -> None:
    """Refuse a base model that cannot work in so many bytes: with one student trained and one row sampled at a time.

    A shape that the files do not tell, or memory that the system does not tell, is no reason to refuse. Raises TooLarge.
    """
    folder = model_folder(config.model.path, config.model.revision)
    shape = read_shape(folder) if folder is not None else None
    if shape is None or available is None:
        return
    # What the update comes to when memory runs out: one student, gradient checkpointing unless it is off.
    way = "off" if config.model.gradient_checkpointing == "off" else "on"
    least = config.model.model_copy(update={"chunk": 1, "gradient_checkpointing": way})
    alone = config.model_copy(update={"model": least})
    kind = "float32" if device == "cpu" and config.model.dtype == "auto" else ""
    needed = memory_of(alone, shape, 1, kind)
    if needed.least <= available:
        return
    smaller = []
    for name in ("8bit", "4bit"):
        if config.model.quantization == "none" and config.model.adapter == "lora":
            model = alone.model.model_copy(update={"quantization": name})
            needs = memory_of(alone.model_copy(update={"model": model}), shape, 1, kind).least
            smaller.append(f'model.quantization = "{name}" needs {needs / GIB:.1f} GiB')
    raise TooLarge(
        f"model.path = {config.model.path!r} does not fit {device}, which has {available / GIB:.1f} GiB free, even with one "
        f"student trained and one row sampled at a time:\n"
        + "\n".join(needed.lines())
        + "\n".join(["\nTake a larger device, a smaller model or a smaller model.micro_batch_tokens", *smaller])
        + "\nOne process trains on one device: model.vllm_devices divides sampling alone."
    )


def machine_bytes() -> int | None:
    """Memory of this machine, or of the control group that this process is limited to; None where it is not told."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
