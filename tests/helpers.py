"""Tiny random models of several architectures, a word-level tokenizer, rollouts made by hand, an env for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tables import cases
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from soar.config import ModelConfig
from soar.engine.logprobs import pack, token_logprobs
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts
from soar.engine.sampler import NativeSampler
from soar.loop.rollout import RolloutEnv
from soar.problems.prompts import PromptFormat
from soar.types import Problem, Verdict

torch.set_num_threads(1)  # the models are so small that more threads only wait for each other

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
PAD, BOS, EOS = 0, 1, 2
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", *(str(i) for i in range(10)), *"abcdefghijklmnop")
CONTEXT = 128

COMMON: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
ARCHITECTURES: dict[str, list[Any]] = {name: more for name, *more in cases("load", "architecture")}
"""name -> class and config of transformers, settings: grouped heads, biases, tied output, logit capping, short windows."""


def tiny_tokenizer(words: Sequence[str] = WORDS) -> transformers.PreTrainedTokenizerFast:
    """Splits at spaces; every word of `words` is one token, anything else <unk>. Adds no control tokens."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tiny_model(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of the named architecture; the same arguments give the same weights.

    Weights, biases and norms are drawn wide, so that next-token distributions are far from uniform and no parameter is
    at a value (0 or 1) where leaving it out would go unnoticed.
    """
    of_model, of_config, settings = ARCHITECTURES[name]
    model_class, config_class = (getattr(transformers, n) for n in (f"{of_model}ForCausalLM", f"{of_config}Config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**COMMON, **settings, **changes}))
        for path, parameter in model.named_parameters():
            parameter.data.normal_(0.0, 0.35 if "embed" in path or "lm_head" in path else 0.6)
            if parameter.dim() == 1:
                parameter.data.add_(0.8)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return model.to(dtype).eval()


def tiny_backbone(
    name: str = "llama", adapter: str = "lora", seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Backbone:
    """`tiny_model` wrapped; further keywords are keys of `ModelConfig` or of the model's own config."""
    changes = {key: value for key, value in config.items() if key not in ModelConfig.model_fields}
    settings = {key: value for key, value in config.items() if key in ModelConfig.model_fields}
    settings = {"adapter": adapter, "lora_rank": 4, "lora_alpha": 6.0, "device": "cpu", **settings}
    return Backbone(tiny_model(name, seed, dtype, **changes), tiny_tokenizer(), ModelConfig(**settings))


def random_stack(backbone: Backbone, policies: int, seed: int = 0, size: float = 0.2) -> AdapterStack:
    """A stack whose slices all differ from each other and from the base model."""
    stack = backbone.new_stack(seed, policies)
    generator = torch.Generator().manual_seed(seed + 1)
    for name in sorted(stack.tensors):
        noise = torch.randn(stack.tensors[name].shape, generator=generator) * size
        stack.tensors[name] = stack.tensors[name] + noise
    return stack


def some_prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    """Prompts of different lengths (1 to `longest`) that begin with <bos>, without control tokens after it."""
    generator, prompts = torch.Generator().manual_seed(seed), []
    for i in range(count):
        words = torch.randint(4, len(WORDS), (1 + (5 * i + seed) % longest,), generator=generator).tolist()
        prompts.append([BOS, *words[1:]])
    return prompts


def handmade_rollouts(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Rollouts:
    """Rollouts with the given completions and sampler log-probabilities 0."""
    length_B = torch.tensor([len(tokens) for tokens in completions])
    tokens_B_T = torch.full((len(completions), max(1, int(length_B.max()))), PAD)
    for row, tokens in enumerate(completions):
        tokens_B_T[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    ended_B = torch.tensor([bool(tokens) and tokens[-1] == EOS for tokens in completions])
    given, no_B = tuple(map(tuple, prompts)), torch.zeros(len(completions), dtype=torch.bool)
    return Rollouts(given, tokens_B_T, length_B, torch.zeros(tokens_B_T.shape), ended_B, no_B)


def random_rollouts(rows: int, seed: int = 0, longest: int = 6) -> Rollouts:
    """Rollouts with random completions of 1 to `longest` tokens; some end with <eos>."""
    generator, completions = torch.Generator().manual_seed(seed), []
    for i in range(rows):
        tokens = torch.randint(4, len(WORDS), (1 + (3 * i + seed) % longest,), generator=generator).tolist()
        completions.append([*tokens[:-1], EOS] if i % 2 else tokens)
    return handmade_rollouts(some_prompts(rows, seed), completions)


def plain_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probability [T] of each completion token, from one unpadded forward pass of a transformers model."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def logprobs_of(
    backbone: Backbone, stack: AdapterStack | None, rollouts: Rollouts, rows_P: Any = None, temperature: float = 1.0
) -> Tensor:
    """Log-probability [B, T] of every token, with its graph. rows_P: rows of each policy; None: of one, all of them."""
    torch.set_num_threads(1)  # this may be another thread
    packed = pack(backbone, rollouts, rows_P or [list(range(rollouts.rows))])
    return token_logprobs(backbone, stack, packed, temperature)[packed.row_R.argsort()]


def logits_of(backbone: Backbone, stack: AdapterStack | None, ids: Tensor) -> Tensor:
    with backbone.use(stack):
        logits: Tensor = backbone.model(input_ids=ids, use_cache=False).logits
        return logits


def rows_of(rollouts: Rollouts) -> list[list[int]]:
    """Completions without padding."""
    return [row[:n] for row, n in zip(rollouts.tokens_B_T.tolist(), rollouts.length_B.tolist(), strict=True)]


def same_stacks(one: AdapterStack, other: AdapterStack, policy: int | None = None) -> bool:
    """Whether all weights (of one slice, or of all) are equal bit for bit."""
    pick = slice(None) if policy is None else policy
    return all(torch.equal(one.tensors[name][pick], other.tensors[name][pick]) for name in one.tensors)


BARE = PromptFormat("bare", "marker", teacher_template="", student_template="{question}", turns=False)
"""The question and nothing else."""


class WordChecker:
    """Verifier for random models: correct when the gold answer is a word of the completion, NO_ANSWER for an empty one.

    A gold answer `?` cannot be scored. Deterministic, and often right on random text.
    """

    def check(self, texts: Sequence[str], golds: Sequence[str], columns: dict[str, Any] | None = None) -> list[Verdict]:
        return [self.verdict(text, gold) for text, gold in zip(texts, golds, strict=True)]

    def outcomes(self, texts: Sequence[str], verdicts: Sequence[Verdict], *more: Any) -> list[tuple[str, str]]:
        return [(verdict.value, text) for verdict, text in zip(verdicts, texts, strict=True)]

    @staticmethod
    def verdict(text: str, gold: str) -> Verdict:
        if gold == "?" or not text:
            return Verdict.UNSCORABLE if gold == "?" else Verdict.NO_ANSWER
        return Verdict.CORRECT if gold in text.split() else Verdict.WRONG


def tiny_examiner(backbone: Backbone, scheme: Any = "binary") -> RolloutEnv:
    return RolloutEnv(backbone, NativeSampler(backbone), BARE, WordChecker(), scheme)  # type: ignore[arg-type]


def some_problems(count: int, first: int = 0) -> list[Problem]:
    """Problems of one to four words with a one-letter answer; different `first` give different problems."""
    letters = "abcdefghijklmnop"
    problems = []
    for i in range(first, first + count):
        question = " ".join(letters[(i * 7 + 3 * j) % 16] for j in range(1 + i % 4))
        problems.append(Problem(f"problem-{i}", question, letters[i % 16]))
    return problems
