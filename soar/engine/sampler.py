"""Rollouts from a population by the native engine.

A prompt is prefilled once and its cache repeated for its attempts; rows that have ended are retired, so a long tail does not
cost full batches. A token is drawn by the inverse of its cumulative distribution at one uniform number that depends on the
row's seed and the position. On a GPU steps are captured graphs at fixed addresses (graphs.py), on a CPU the cache grows.
"""

import warnings
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from soar.engine.attention import BufferLayer
from soar.engine.graphs import PLACE_STEP, SlotBatch, StaticDecoder, slots_for
from soar.engine.memory import free_bytes, until_it_fits
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Batch, OnTokens, Request, Rollouts, draw, join, live_first, next_logits
from soar.types import no_tick

MAX_ROWS, MAX_ROWS_GPU = 2048, 8192
CACHE_BYTES = 2 << 30  # on a CPU
CALL_SLOTS = 256  # so many slots more cost about as much as another batch
MEMORY_SHARE = 0.7  # of a GPU's free memory, for cache and logits


class NativeSampler:
    """The default engine: one process, one device, any transformers causal LM with standard linear layers.

    max_rows: rows of one batch at most; 0: by memory. static: decode at fixed addresses (graphs.py); None: on a GPU.
    """

    def __init__(self, backbone: Backbone, max_rows: int = 0, static: bool | None = None) -> None:
        self.backbone, self.max_rows = backbone, max_rows
        self.static = backbone.device.type == "cuda" if static is None else static
        self.decoder = StaticDecoder(backbone)
        self.on_tokens: OnTokens = no_tick

    def rows_per_call(self, positions: int) -> int:
        """Rows of one batch: as many as the memory for cache and logits allows at `positions` tokens each."""
        if self.max_rows:
            return self.max_rows
        device, values = self.backbone.device, 0  # that the cache keeps of a token
        for shape in self.backbone.shapes:
            heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
            values += 2 * heads * (getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
        cache = values * positions * self.backbone.dtype.itemsize
        logits = 16 * self.backbone.vocabulary
        most, memory = MAX_ROWS, CACHE_BYTES
        if device.type == "cuda":
            held = sum(tensor.nbytes for tensor in self.decoder.flat)  # the cache that is kept between calls
            most, memory = MAX_ROWS_GPU, int(MEMORY_SHARE * (free_bytes(device) + held))
        return max(1, min(most, memory // (cache + logits)))

    @torch.no_grad()
    def sample(self, stack: AdapterStack | None, request: Request) -> Rollouts:
        """The rows of the request. Raises ValueError as `Request.check`."""
        positions = request.check(stack, self.backbone.context)
        P, Q, attempts = len(request.prompts_P_Q), len(request.prompts_P_Q[0]), request.attempts
        per_call = self.prompts_per_call(P, Q, attempts, positions)
        parts_C, first = list[Rollouts](), 0

        def batch(prompts: int) -> Rollouts:
            part = request.select(slice(first, first + prompts))
            if self.static and not self.backbone.apart and (stack is None or stack.kind == "lora"):
                return SlotBatch(self.backbone, stack, part, self.on_tokens).finish(self.decoder)
            return GrowingBatch(self.backbone, stack, part, self.on_tokens).finish()

        def shrink(prompts: int) -> bool:
            nonlocal per_call
            self.decoder.release()
            if prompts == 1:
                return False
            per_call = prompts // 2
            self.max_rows = per_call * P * attempts
            warnings.warn(f"out of memory: from here on at most {self.max_rows} rows a batch", stacklevel=2)
            return True

        while first < Q:
            parts_C.append(until_it_fits(batch, lambda: per_call, shrink))
            first += parts_C[-1].rows // (P * attempts)
        if len(parts_C) == 1:
            return parts_C[0]
        each = [(part, part.rows // P) for part in parts_C]
        return join([part.select(list(range(p * n, (p + 1) * n))) for p in range(P) for part, n in each])

    def prompts_per_call(self, policies: int, questions: int, attempts: int, positions: int) -> int:
        """Prompts per policy in one batch: of like size over a growing cache, with few empty slots at fixed addresses."""
        if not self.static:
            most = max(1, self.rows_per_call(positions) // (policies * attempts))
            return -(-questions // -(-questions // most))
        limit = self.rows_per_call(-(-positions // PLACE_STEP) * PLACE_STEP)
        sizes = [n for n in range(questions, 0, -1) if policies * slots_for(n * attempts) <= limit]

        def cost(size: int) -> int:
            counts = [size] * (questions // size) + ([questions % size] if questions % size else [])
            return sum(policies * slots_for(n * attempts) + CALL_SLOTS for n in counts)

        return min(sizes, key=cost, default=1)

    def release(self) -> None:
        """Give back the memory that is kept between calls."""
        self.decoder.release()


class GrowingBatch(Batch):
    """A batch over a growing cache: prefill, then one token a step until every row has ended."""

    def finish(self) -> Rollouts:
        row_b = torch.arange(self.rows, device=self.backbone.device)  # live slot -> row of the result
        with self.backbone.use(self.stack):
            cache: Any = DynamicCache(config=self.backbone.model.config)
            if not self.backbone.apart:
                cache.layers = [BufferLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
            logits_U_V, mask_U_S = self.prefill(cache)
            prompt_b = row_b // self.request.attempts
            cache.reorder_cache(prompt_b)
            logits_b_V, mask_b_S = logits_U_V[prompt_b], mask_U_S[prompt_b]
            for step in range(self.sampling.max_tokens):
                uniform_b = None if self.uniform_B_T is None else self.uniform_B_T[row_b, step]
                token_b, logprob_b, bad_b = draw(logits_b_V, uniform_b, self.sampling.temperature, self.sampling.top_p)
                live = ~self.ended_B[row_b]
                rows, token_live = row_b[live], token_b[live]
                self.tokens_B_T[rows, step] = token_live
                self.logprob_B_T[rows, step] = logprob_b[live]
                self.length_B[rows] = step + 1
                self.failed_B[rows] |= bad_b[live]
                self.ended_B[rows] = torch.isin(token_live, self.end_ids) | bad_b[live]
                self.on_tokens(len(token_b))
                if self.stops is not None:
                    for row, _ in self.stops.ends(self.tokens_B_T, self.length_B, step, step + 1):
                        self.ended_B[row] = True
                if step + 1 == self.sampling.max_tokens:
                    break
                live_P_b = ~self.ended_B[row_b].reshape(self.policies, -1)
                most = int(live_P_b.sum(1).max())
                if most == 0:
                    break
                if most <= 0.8 * live_P_b.shape[1]:  # each policy keeps equally many slots, ended rows fill up
                    keep = live_first(live_P_b, most).sort(dim=1).values.reshape(-1)
                    cache.reorder_cache(keep)
                    mask_b_S, token_b, row_b = mask_b_S[keep], token_b[keep], row_b[keep]
                mask_b_S = torch.cat([mask_b_S, mask_b_S.new_ones(len(mask_b_S), 1)], dim=1)
                position_b_1 = mask_b_S.sum(1, keepdim=True) - 1
                logits_b_V = next_logits(self.backbone, token_b[:, None], mask_b_S, position_b_1, cache)
        return self.rollouts()
