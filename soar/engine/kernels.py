"""Triton kernels for a GPU: attention of one new token, drawing it from the logits, log-probabilities of given tokens.

Attention reads only the places that a row may see (from its start to the filled length, both on the device), and one captured
graph serves every length. Drawing reads the logits twice: normaliser, then the place where the cumulative probability passes
the row's uniform number. Callers have a PyTorch path for a machine without Triton.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

PLACES = 64  # cache places that one program reads at a time
WORDS = 4096  # logits that one program reads at a time


def available(tensor: Tensor) -> bool:
    """Whether the kernels can run on this tensor's device."""
    return triton is not None and tensor.is_cuda


if triton is not None:

    @triton.jit
    def _attend(
        query, key, value, out, start, filled, scale, softcap, window,
        q_row, q_head, kv_row, kv_head, kv_place,
        KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
        CAPPED: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        row, head = tl.cast(program // KV, tl.int64), program % KV
        length = tl.load(filled).to(tl.int32)
        first = tl.load(start + row).to(tl.int32)
        if window > 0:
            first = tl.maximum(first, length - window)
        g, d = tl.arange(0, GP), tl.arange(0, DP)
        heads, wide = (g < G)[:, None], (d < D)[None, :]
        q = tl.load(query + row * q_row + (head * G + g)[:, None] * q_head + d[None, :], mask=heads & wide, other=0.0)
        best = tl.full([GP], float("-inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        base = row * kv_row + head * kv_head
        for s0 in range((first // BLOCK) * BLOCK, length, BLOCK):
            s = s0 + tl.arange(0, BLOCK)
            seen = (s >= first) & (s < length)
            place = base + s[:, None] * kv_place + d[None, :]
            k = tl.load(key + place, mask=seen[:, None] & wide, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                bounded = 2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0  # tanh
                scores = bounded * softcap
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            weight = tl.exp(scores - higher[:, None])
            kept = tl.exp(best - higher)
            v = tl.load(value + place, mask=seen[:, None] & wide, other=0.0)
            total = total * kept + tl.sum(weight, 1)
            acc = acc * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            best = higher
        acc = acc / total[:, None]
        place = out + (row * KV + head) * (G * D) + g[:, None] * D + d[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=heads & wide)

    @triton.jit
    def _draw(
        logits, uniform, token, logprob, bad, row_stride, words, inverse_temperature,
        GREEDY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.cast(tl.program_id(0), tl.int64)
        base = logits + row * row_stride
        best = float("-inf")
        total = 0.0
        chosen = 0
        strange = 0
        for v0 in range(0, words, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            inside = v < words
            x = tl.load(base + v, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            finite = (x == x) & (tl.abs(x) < float("inf"))
            strange += tl.sum((inside & (finite == 0)).to(tl.int32), 0)
            x = tl.where(inside & finite, x, float("-inf"))
            top = tl.max(x, 0)
            if top > best:
                chosen = v0 + tl.argmax(x, 0)
                total = total * tl.exp(best - top)
                best = top
            total += tl.sum(tl.exp(x - best), 0)
        if GREEDY == 0:
            target = tl.load(uniform + row) * total
            passed = 0.0
            found = 0
            v0 = 0
            while (v0 < words) & (found == 0):
                v = v0 + tl.arange(0, BLOCK)
                x = tl.load(base + v, mask=v < words, other=float("-inf")).to(tl.float32) * inverse_temperature
                mass = tl.exp(x - best)
                block = tl.sum(mass, 0)
                if passed + block > target:
                    below = (passed + tl.cumsum(mass, 0) <= target).to(tl.int32)
                    place = v0 + tl.sum(below, 0)
                    if place < words:
                        chosen = place
                    found = 1
                passed += block
                v0 += BLOCK
        x = tl.load(base + chosen).to(tl.float32) * inverse_temperature
        tl.store(token + row, tl.cast(chosen, tl.int64))
        tl.store(logprob + row, x - best - tl.log(total))
        tl.store(bad + row, strange > 0)

    @triton.jit
    def _choose(logits, target, chosen, stride, words, inverse_temperature, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.cast(tl.program_id(0), tl.int64)
        base, wanted = logits + row * stride, tl.load(target + row)
        at_target = tl.load(base + wanted).to(tl.float32) * inverse_temperature
        best = -3e38  # no -inf: a block of those alone would make it NaN
        mass = 0.0
        for v0 in range(0, words, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            x = tl.load(base + v, mask=v < words, other=float("-inf")).to(tl.float32) * inverse_temperature
            higher = tl.maximum(best, tl.max(x, 0))
            mass = mass * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), 0)
            best = higher
        normaliser = best + tl.log(mass)
        tl.store(chosen + row, at_target - normaliser)
        if SLOPE:
            for v0 in range(0, words, BLOCK):
                v = v0 + tl.arange(0, BLOCK)
                x = tl.load(base + v, mask=v < words, other=0.0).to(tl.float32) * inverse_temperature
                slope = ((v == wanted).to(tl.float32) - tl.exp(x - normaliser)) * inverse_temperature
                tl.store(base + v, slope.to(logits.dtype.element_ty), mask=v < words)


def _block(words: int) -> int:
    return min(WORDS, max(16, triton.next_power_of_2(words)))


def choose(logits_N_V: Tensor, target_N: Tensor, temperature: float, slope: bool = False) -> Tensor:
    """log softmax(logits / temperature) at the target [N]; with slope its slope takes the place of the logits."""
    N, V = logits_N_V.shape
    chosen_N = logits_N_V.new_empty(N, dtype=torch.float32)
    sizes = logits_N_V.stride(0), V, 1.0 / temperature
    _choose[(N,)](logits_N_V, target_N, chosen_N, *sizes, SLOPE=slope, BLOCK=_block(V), num_warps=8)
    return chosen_N


def decode_attention(
    query_B_H_1_D: Tensor,
    key_B_K_S_D: Tensor,
    value_B_K_S_D: Tensor,
    start_B: Tensor,
    filled_1: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of one new token a row over the places start_B .. filled_1 - 1 (window: only the last so many).

    K key/value heads serve H query heads in equal groups. start_B, filled_1: int32 on the device. Returns [B, 1, H, D].
    """
    B, H, _, D = query_B_H_1_D.shape
    kv = key_B_K_S_D.shape[1]
    if query_B_H_1_D.stride(-1) != 1:
        query_B_H_1_D = query_B_H_1_D.contiguous()
    out = query_B_H_1_D.new_empty(B, 1, H, D)
    _attend[(B * kv,)](
        query_B_H_1_D, key_B_K_S_D, value_B_K_S_D, out, start_B, filled_1, scale, softcap or 0.0, window or 0,
        query_B_H_1_D.stride(0), query_B_H_1_D.stride(1),
        key_B_K_S_D.stride(0), key_B_K_S_D.stride(1), key_B_K_S_D.stride(2),
        KV=kv, G=H // kv, D=D, GP=max(16, triton.next_power_of_2(H // kv)), DP=max(16, triton.next_power_of_2(D)),
        BLOCK=PLACES, CAPPED=softcap is not None, num_warps=2 if D <= 64 else 4,
    )  # fmt: skip
    return out


def draw(logits_B_V: Tensor, uniform_B: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(token_B, logprob_B, bad_B) by the inverse of the cumulative distribution at uniform_B; None: the most likely.

    logprob_B is under the temperature; bad_B: the row holds NaN or inf (its token means nothing).
    """
    (B, V), greedy = logits_B_V.shape, uniform_B is None
    if logits_B_V.stride(-1) != 1:
        logits_B_V = logits_B_V.contiguous()
    token_B, logprob_B, bad_B = (logits_B_V.new_empty(B, dtype=t) for t in (torch.long, torch.float32, torch.bool))
    _draw[(B,)](
        logits_B_V, logprob_B if uniform_B is None else uniform_B, token_B, logprob_B, bad_B, logits_B_V.stride(0), V,
        1.0 if greedy else 1.0 / temperature, GREEDY=greedy, BLOCK=_block(V), num_warps=8,
    )  # fmt: skip
    return token_B, logprob_B, bad_B
