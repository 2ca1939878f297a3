"""What is asked of a sampler, and sampled completions, as records; a batch on its way, the draw of a token, stop strings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from soar import seeds
from soar.config import SamplingConfig
from soar.engine.policy import AdapterStack, Backbone

CHUNK = 1 << 27  # logits held at once
Completion = tuple[Sequence[int], Sequence[float], bool]
"""Tokens with the end token, a log-probability each, and whether an end token (not the budget) ended it."""


@dataclass(frozen=True)
class Request:
    """`attempts` completions of each prompt, for each policy: rows in the order (policy, prompt, attempt).

    prompts_P_Q: token ids, equally many prompts per policy; policy p's prompts are answered by slice p of a stack (None: the
    base model; then P may be anything). seed_P_Q: one seed per prompt; its attempt n draws from (seed, n) alone, whatever
    shares the batch. sampling: at temperature 0 the most likely token, with its log-probability at temperature 1.
    """

    prompts_P_Q: list[list[list[int]]]
    attempts: int
    seed_P_Q: list[list[int]]
    sampling: SamplingConfig

    @property
    def prompts_B(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(ids) for prompts in self.prompts_P_Q for ids in prompts for _ in range(self.attempts))

    @property
    def seed_B(self) -> np.ndarray:
        return np.concatenate([seeds.row_seeds(seed, self.attempts) for seed_Q in self.seed_P_Q for seed in seed_Q])

    def select(self, questions: slice) -> "Request":
        """The same of some of every policy's prompts."""
        prompts_P_Q, seed_P_Q = [row[questions] for row in self.prompts_P_Q], [row[questions] for row in self.seed_P_Q]
        return Request(prompts_P_Q, self.attempts, seed_P_Q, self.sampling)

    def check(self, stack: AdapterStack | None, context: int) -> int:
        """Tokens of the longest row. Raises ValueError if policies differ in prompts, or one leaves the context no room."""
        policies = len(self.prompts_P_Q) if stack is None else stack.policies
        if len({len(prompts) for prompts in self.prompts_P_Q}) != 1 or policies != len(self.prompts_P_Q):
            raise ValueError("give every policy of the stack the same number of prompts")
        longest, room = max(len(ids) for prompts in self.prompts_P_Q for ids in prompts), self.sampling.max_tokens
        if longest + room > context:
            over = f"a prompt of {longest} tokens and max_tokens = {room} exceed the context of {context}"
            raise ValueError(f"{over}; shorten the prompt or lower max_tokens")
        return longest + room


@dataclass(frozen=True)
class Rollouts:
    """Sampled completions, rows policy-major.

    prompts: token ids of each row's prompt. tokens_B_T: completion ids, end token included; what stands behind length_B
    means nothing. logprob_B_T: log-probability (nats) of each sampled token under the sampling temperature, 0 on padding.
    ended_B: the row wrote an end token or a stop string (which stays in its text), or failed; else it was truncated at
    max_tokens. failed_B: the model produced NaN or inf, which ended the row. All on the CPU.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens_B_T: Tensor
    length_B: Tensor
    logprob_B_T: Tensor
    ended_B: Tensor
    failed_B: Tensor

    @property
    def rows(self) -> int:
        return len(self.prompts)

    def select(self, rows: list[int]) -> "Rollouts":
        """The named rows, in that order."""
        index = torch.tensor(rows, dtype=torch.long)
        prompts, *tensors = vars(self).values()
        return Rollouts(tuple(prompts[i] for i in rows), *(tensor[index] for tensor in tensors))

    def texts(self, backbone: Backbone) -> list[str]:
        """Completions as text, without the end token; other special tokens stay visible."""
        ids = []
        columns = (tensor.tolist() for tensor in (self.tokens_B_T, self.length_B, self.failed_B))
        for tokens_T, length, failed in zip(*columns, strict=True):
            cut = failed or (length > 0 and tokens_T[length - 1] in backbone.end_ids)
            ids.append(tokens_T[: length - cut])
        if rust := getattr(backbone.tokenizer, "backend_tokenizer", None):  # all cores; transformers looks at every id
            return list(rust.decode_batch(ids, skip_special_tokens=False))
        return backbone.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


OnTokens = Callable[[int], None]
"""Called in the middle of a batch with the tokens drawn since the last call, in the thread that samples; may raise."""


class Sampler(Protocol):
    """Draws completions for a population: of policy p by slice p of the stack, or by the base model."""

    on_tokens: OnTokens

    def sample(self, stack: AdapterStack | None, request: Request) -> Rollouts: ...

    def release(self) -> None: ...


def join(parts: list[Rollouts]) -> Rollouts:
    """Rollouts one after another; completions padded to the longest."""
    longest = max(part.tokens_B_T.shape[1] for part in parts)

    def wide(tensor: Tensor) -> Tensor:
        return functional.pad(tensor, (0, longest - tensor.shape[1])) if tensor.dim() > 1 else tensor

    prompts, *columns = zip(*(vars(part).values() for part in parts), strict=True)
    joined = tuple(prompt for part in prompts for prompt in part)
    return Rollouts(joined, *(torch.cat([wide(tensor) for tensor in column]) for column in columns))


def rollouts_of(prompts: tuple[tuple[int, ...], ...], completions: list[Completion], pad: int) -> Rollouts:
    """Completions as one record. A row with a log-probability that is no number has failed, and ends there."""
    tokens, logprobs, ended = zip(*completions, strict=True)
    tokens_B_T, logprob_B_T = (
        pad_sequence([torch.tensor(list(row), dtype=kind) for row in rows], batch_first=True, padding_value=value)
        for rows, kind, value in ((tokens, torch.long, pad), (logprobs, torch.float32, 0))
    )
    length_B, ended_B = torch.tensor([len(row) for row in tokens]), torch.tensor(ended)
    failed_B = ~torch.isfinite(logprob_B_T).all(dim=1)
    return Rollouts(prompts, tokens_B_T, length_B, logprob_B_T.nan_to_num(0.0, 0.0, 0.0), ended_B | failed_B, failed_B)


def draw(
    logits_B_V: Tensor, uniform_B: Tensor | None, temperature: float, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_B, logprob_B under the temperature, bad_B) in float32, CHUNK logits at a time; uniform_B None: the likeliest.

    bad_B: the row holds NaN or inf; its token means nothing.
    """
    if len(logits_B_V) > (most := max(1, CHUNK // logits_B_V.shape[1])):
        uniforms = [None] * len(logits_B_V) if uniform_B is None else uniform_B.split(most)
        parts = [draw(*pair, temperature, top_p) for pair in zip(logits_B_V.split(most), uniforms, strict=False)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]
    logits_B_V = logits_B_V.float()
    bad_B = ~torch.isfinite(logits_B_V).all(dim=1)
    logits_B_V = torch.where(bad_B[:, None], torch.zeros_like(logits_B_V), logits_B_V)
    if uniform_B is not None:
        logits_B_V = logits_B_V / temperature
    logprob_B_V = torch.log_softmax(logits_B_V, dim=-1)
    token_B = logits_B_V.argmax(dim=-1) if uniform_B is None else inverse_cdf(logprob_B_V.exp(), uniform_B, top_p)
    return token_B, logprob_B_V.gather(1, token_B[:, None])[:, 0], bad_B


def inverse_cdf(probs_B_V: Tensor, uniform_B: Tensor, top_p: float = 1.0) -> Tensor:
    """Token [B] whose cumulative interval holds the uniform number.

    top_p < 1 keeps the smallest set of most likely tokens whose mass reaches top_p (nucleus sampling), renormalised.
    """
    if top_p < 1.0:
        sorted_B_V, order_B_V = probs_B_V.sort(dim=-1, descending=True)
        outside_B_V = sorted_B_V.cumsum(-1) - sorted_B_V >= top_p
        kept_B_V = sorted_B_V.masked_fill(outside_B_V, 0.0)
        return order_B_V.gather(1, inverse_cdf(kept_B_V, uniform_B)[:, None])[:, 0]
    cdf_B_V = probs_B_V.cumsum(-1)
    target_B_1 = uniform_B[:, None] * cdf_B_V[:, -1:]
    token_B = torch.searchsorted(cdf_B_V, target_B_1, right=True)[:, 0]
    return token_B.clamp(max=probs_B_V.shape[1] - 1)


class StopStrings:
    """The stop strings of one sampling: a row ends with the first token that completes one, tokens behind it are cut.

    Only a token whose own text holds the last letter of a stop string, or is no whole letter, can complete one, and any one
    that ends with a space; others are passed over undecoded. (transformers' StopStringCriteria fails with words as tokens.)
    """

    def __init__(self, backbone: Backbone, strings: tuple[str, ...]) -> None:
        self.tokenizer, self.strings = backbone.tokenizer, strings
        words = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))], skip_special_tokens=False)
        last = {text[-1] for text in strings}
        # A space alone, or before a word, may decode to nothing, and a part of a letter to the replacement character.
        can = [not word.strip() or "\ufffd" in word or bool(last & {" ", *word}) for word in words]
        can += [False] * (backbone.vocabulary - len(can))
        self.can_end_V = torch.tensor(can, device=backbone.device)
        self.reach = max(len(text.encode()) for text in strings) + 8  # tokens that a stop string can be spread over

    def ends(self, tokens_B_T: Tensor, length_B: Tensor, first: int, upto: int) -> Iterator[tuple[int, int]]:
        """(row, length with the stop string) of rows that one of the tokens first .. upto - 1 ends."""
        place_t = torch.arange(first, upto, device=length_B.device)
        can_B_t = self.can_end_V[tokens_B_T[:, first:upto]] & (place_t < length_B[:, None])
        rows = can_B_t.any(1).nonzero()[:, 0]
        lengths, can = length_B[rows].tolist(), can_B_t[rows].tolist()
        for row, ids, length, can_t in zip(rows.tolist(), tokens_B_T[rows, :upto].tolist(), lengths, can, strict=True):
            if not self._in(ids[max(0, first - self.reach) : min(length, upto)]):
                continue
            for n in (first + i + 1 for i, possible in enumerate(can_t) if possible):
                if self._in(ids[:n]):
                    yield row, n
                    break

    def _in(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.strings)


@dataclass(eq=False)
class Batch:
    """One batch of completions on its way: what is asked for, and what is written down so far, on the device."""

    backbone: Backbone
    stack: AdapterStack | None
    request: Request
    on_tokens: OnTokens

    def __post_init__(self) -> None:
        self.policies = self.stack.policies if self.stack is not None else 1
        self.prompts_B, self.sampling = self.request.prompts_B, self.request.sampling
        self.rows, self.longest = len(self.prompts_B), max(map(len, self.prompts_B))
        device, steps, backbone = self.backbone.device, self.sampling.max_tokens, self.backbone
        self.uniform_B_T: Tensor | None = None
        if self.sampling.temperature:
            self.uniform_B_T = torch.from_numpy(seeds.uniforms(self.request.seed_B, steps)).to(device)
        self.tokens_B_T = torch.full((self.rows, steps), backbone.pad_id, dtype=torch.long, device=device)
        self.logprob_B_T = torch.zeros(self.rows, steps, device=device)
        self.length_B = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.ended_B = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self.failed_B = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self.end_ids = torch.tensor(sorted(backbone.end_ids), device=device)
        self.stops = StopStrings(backbone, self.sampling.stop) if self.sampling.stop else None

    def prefill(self, cache: Any) -> tuple[Tensor, Tensor]:
        """Run every prompt once, padded on the left: (logits of the next token [U, V], mask [U, S])."""
        pad, device = partial(pad_sequence, batch_first=True, padding_side="left"), self.backbone.device
        ids_U = [torch.tensor(ids, dtype=torch.long) for ids in self.prompts_B[:: self.request.attempts]]
        ids_U_S = pad(ids_U, padding_value=self.backbone.pad_id).to(device)
        mask_U_S = pad([torch.ones_like(ids) for ids in ids_U]).to(device)
        position_U_S = (mask_U_S.cumsum(1) - 1).clamp(min=0)
        return next_logits(self.backbone, ids_U_S, mask_U_S, position_U_S, cache), mask_U_S

    def rollouts(self) -> Rollouts:
        """What was written down, on the CPU."""
        longest = int(self.length_B.max())  # one wait for the device
        tokens_B_T, logprob_B_T = self.tokens_B_T[:, :longest], self.logprob_B_T[:, :longest]
        written = (tokens_B_T, self.length_B, logprob_B_T, self.ended_B, self.failed_B)
        return Rollouts(self.prompts_B, *(tensor.cpu() for tensor in written))


def next_logits(backbone: Backbone, ids: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Tensor:
    """Logits [rows, V] behind the last of these tokens; the cache takes their keys and values."""
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": position, backbone.cache_name: cache}
    return backbone.model(**given, use_cache=True, logits_to_keep=1).logits[:, -1]


def live_first(live_P_w: Tensor, count: int) -> Tensor:
    """Numbers [P, count] of slots, w for each policy, the live ones before the ended ones."""
    order_P_w = live_P_w.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return order_P_w + torch.arange(len(live_P_w), device=order_P_w.device)[:, None] * live_P_w.shape[1]
