"""Pretrains the embedded world's small language model and writes it as a standard model folder.

    python examples/pretrain.py OUT_DIR [--world tiny] [--seed 0] [--steps N] [--threads 1]

The result is an ordinary Llama-config model with a fast tokenizer: `AutoModelForCausalLM.from_pretrained(OUT_DIR)` and
`AutoTokenizer.from_pretrained(OUT_DIR)` load it, so nothing in the loop knows that it is small. Plain next-token
prediction on the documents of `world_text.py`; what a full pretraining has and this leaves out: validation text, mixed
precision. The same seed, thread count and torch build give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world_text import ANSWER_MARK, DIGITS, START, STUDENT_TEMPLATE, TEACHER_PROMPT, VERBS, Shares, WorldText

from soar.domains import world as worlds

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN)
IGNORED = -100  # label of positions without a loss (torch's convention)

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Recipe:
    """Size of the model and course of the pretraining.

    steps: optimizer steps of `rows` packed rows of `row` tokens.
    learning_rate: its highest value, after a linear warm-up and before a cosine to a hundredth.
    """

    steps: int = Shares.steps
    rows: int = 32
    row: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    beta2: float = 0.98
    weight_decay: float = 0.0
    clip: float = 1.0
    width: int = 64
    layers: int = 3
    heads: int = 4
    hidden: int = 176
    positions: int = 128


def vocabulary() -> list[str]:
    """Every token of the world `tiny`, in id order.

    A token carries the space before it, so that decoding is plain concatenation: ` 6` starts a number or word, `6` goes
    on with one. A step (`c+8`) and the label of its reading (`c=`) are one token each, which keeps texts short and lets
    a small model find the addend of a step by looking up one token.
    """
    words = [f"{label}+{digit}" for label in worlds.LABELS for digit in range(1, 10)]
    words += [f"{label}=" for label in (START, *worlds.LABELS)]
    words += [*VERBS, *DIGITS, *worlds.LETTERS, "<work>", ANSWER_MARK]
    starts = [TEACHER_PROMPT, STUDENT_TEMPLATE.split()[0]]
    return [*SPECIAL, *starts, *words, *(f" {word}" for word in words)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the world `tiny`: exact round trip on its text; encoding puts one <bos> in front."""
    words = vocabulary()
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    labels, verbs = worlds.LABELS, "|".join(VERBS)
    pattern = rf" ?<[a-z]+>| ?[{labels}]\+[1-9]| ?(?:{START}|[{labels}])=| ?(?:{verbs})| ?[^ ]| "
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=Recipe.positions,
    )


def model_config(recipe: Recipe, tokens: PreTrainedTokenizerFast) -> LlamaConfig:
    """The Llama configuration of a recipe, for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    config.dtype = torch.float32
    return config


@dataclass(frozen=True)
class Batch:
    """Documents packed into rows of equal length.

    A position attends only to earlier positions of its own document, and positions count from the document's start.
    """

    tokens_B_T: torch.Tensor
    labels_B_T: torch.Tensor  # the next token; IGNORED in prompts and padding
    positions_B_T: torch.Tensor
    visible_B_1_T_T: torch.Tensor


def _pack(rows: list[list[tuple[int, list[int]]]], recipe: Recipe, pad: int) -> Batch:
    """Tensors of packed rows; a document is (length of its prompt, ids of the whole)."""
    shape = (len(rows), recipe.row)
    tokens_B_T = torch.full(shape, pad)
    labels_B_T = torch.full(shape, IGNORED)
    positions_B_T = torch.zeros(shape, dtype=torch.long)
    documents_B_T = torch.full(shape, -1)
    for index, row in enumerate(rows):
        at = 0
        for number, (prompt, ids) in enumerate(row):
            end = at + len(ids) - 1
            tokens_B_T[index, at:end] = torch.tensor(ids[:-1])
            labels_B_T[index, at + prompt - 1 : end] = torch.tensor(ids[prompt:])
            positions_B_T[index, at:end] = torch.arange(end - at)
            documents_B_T[index, at:end] = number
            at = end
    same_B_T_T = documents_B_T[:, :, None] == documents_B_T[:, None, :]
    return Batch(tokens_B_T, labels_B_T, positions_B_T, torch.tril(same_B_T_T)[:, None])


def _batches(text: WorldText, tokens: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Iterator[Batch]:
    """Endless batches; the prompt of a document (in the student's role: with the question) carries no loss."""
    rng = random.Random(f"pretraining {seed}")
    encode = tokens.backend_tokenizer.encode_batch
    waiting: list[tuple[int, list[int]]] = []
    for step in itertools.count():
        rows: list[list[tuple[int, list[int]]]] = [[]]
        room = recipe.row
        while True:
            if not waiting:
                texts = [text.document(rng, min(1.0, step / recipe.steps)) for _ in range(256)]
                prompts = [len(encoding.ids) for encoding in encode([prompt for prompt, _ in texts])]
                wholes = [[*encoding.ids, tokens.eos_token_id] for encoding in encode([a + b for a, b in texts])]
                waiting = list(zip(prompts, wholes, strict=True))
            length = len(waiting[-1][1]) - 1
            if length > room:
                if len(rows) == recipe.rows:
                    break
                rows.append([])
                room = recipe.row
            rows[-1].append(waiting.pop())
            room -= length
        yield _pack(rows, recipe, tokens.pad_token_id)


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Factor on the learning rate: linear warm-up, cosine to 0.01."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def train(
    text: WorldText, recipe: Recipe, seed: int, progress: Progress | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Pretrain from scratch. Returns the model, its tokenizer and the loss of every step (nats per counted token)."""
    tokens = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(recipe, tokens))
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, recipe))
    losses: list[float] = []
    for step, batch in enumerate(_batches(text, tokens, recipe, seed)):
        if step == recipe.steps:
            break
        logits_B_T_V = model(
            input_ids=batch.tokens_B_T,
            attention_mask=batch.visible_B_1_T_T,
            position_ids=batch.positions_B_T,
            use_cache=False,
        ).logits
        loss = functional.cross_entropy(logits_B_T_V.flatten(0, 1), batch.labels_B_T.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, recipe.steps, losses[-1])
    return model.eval(), tokens, losses


def save(model: LlamaForCausalLM, tokens: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write the standard model folder; it appears at `out_dir` only when it is complete."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        model.generation_config = GenerationConfig(
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            do_sample=True,
            temperature=1.0,
        )
        model.save_pretrained(scratch)
        tokens.save_pretrained(scratch)
        for path in (scratch, *scratch.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary names start out private
        if out_dir.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
            out_dir.rename(old / out_dir.name)
            scratch.rename(out_dir)
            shutil.rmtree(old)
        else:
            scratch.rename(out_dir)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def build(
    out_dir: str | Path,
    seed: int = 0,
    world: str = "tiny",
    progress: Progress | None = None,
    **recipe: Any,
) -> list[float]:
    """Pretrain the model of a world and write its folder. Returns the losses.

    recipe: fields of `Recipe`, for example steps=100, which is by default the world's own. Raises ValueError for an unknown
    world, TypeError for an unknown field. Threads: torch's own setting (`torch.set_num_threads`), which the caller chooses.
    """
    text = WorldText(world)
    model, tokens, losses = train(text, Recipe(**{"steps": text.shares.steps, **recipe}), seed, progress)
    save(model, tokens, Path(out_dir))
    return losses


def print_progress() -> Progress:
    """A progress function that prints the mean loss and the time left every 100 steps."""
    start = time.monotonic()
    recent: list[float] = []

    def progress(step: int, steps: int, loss: float) -> None:
        recent.append(loss)
        if step % 100 == 0 or step == steps:
            spent = time.monotonic() - start
            mean = sum(recent) / len(recent)
            left = spent / step * (steps - step)
            print(f"step {step}/{steps}  loss {mean:.4f}  {spent:.0f} s, about {left:.0f} s left", flush=True)
            recent.clear()

    return progress


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain the language model of an embedded world.")
    parser.add_argument("out", help="new model folder")
    parser.add_argument("--world", default="tiny", choices=worlds.NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the world's own")
    parser.add_argument("--threads", type=int, default=1, help="the same number gives the same bytes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    steps = {} if given.steps is None else {"steps": given.steps}
    build(given.out, given.seed, given.world, print_progress(), **steps)


if __name__ == "__main__":
    main()
