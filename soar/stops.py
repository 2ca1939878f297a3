"""Stop strings: where a completion ends because its text holds one of them.

A row ends with the first token that completes a stop string, whatever the interval at which is looked: tokens behind it
are cut. Only a token whose own text ends in the last letter of a stop string, or is no whole letter, can complete one;
all others are passed over without decoding anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from soar.policy import Backbone


class StopStrings:
    """The stop strings of one sampling, for one tokenizer."""

    def __init__(self, backbone: Backbone, strings: tuple[str, ...]) -> None:
        self.tokenizer, self.strings = backbone.tokenizer, strings
        words = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))], skip_special_tokens=False)
        last = {text[-1] for text in strings}
        can = torch.zeros(backbone.vocabulary, dtype=torch.bool)
        # A space alone may decode to nothing, and a part of a letter to the replacement character.
        can[: len(words)] = torch.tensor(
            [not word.strip() or "\ufffd" in word or bool(last & set(word)) for word in words]
        )
        self.can_end_V = can.to(backbone.device)
        self.reach = max(len(text.encode()) for text in strings) + 8  # tokens that a stop string can be spread over

    def ends(self, tokens_B_T: Tensor, length_B: Tensor, first: int, upto: int) -> Iterator[tuple[int, int]]:
        """(row, length with the stop string) of rows that one of the tokens first .. upto - 1 ends."""
        place_t = torch.arange(first, upto, device=length_B.device)
        can_B_t = self.can_end_V[tokens_B_T[:, first:upto]] & (place_t < length_B[:, None])
        rows = can_B_t.any(1).nonzero()[:, 0]
        if rows.numel() == 0:
            return
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
