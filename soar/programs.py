"""The decoding step of one shape, in buffers that stay where they are, captured as a CUDA graph on a GPU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soar import kernels
from soar.attention import StaticLayer, Window, decoding, static_cache
from soar.lean import LeanModel
from soar.policy import AdapterStack, Backbone
from soar.rollouts import draw


@dataclass(frozen=True)
class Shape:
    """What a captured step depends on."""

    policies: int  # 0: the base model
    rows: int
    places: int
    steps: int
    greedy: bool
    temperature: float
    top_p: float


class Storage:
    """Flat key and value memory of every layer, viewed in the shape of whichever program runs."""

    def __init__(self, layers: list[tuple[tuple[int, int], tuple[int, int]]], dtype: torch.dtype, device: Any) -> None:
        self.layers, self.dtype, self.device = layers, dtype, device  # ((heads, width) of keys, of values) a layer
        self.flat: list[tuple[Tensor, Tensor]] = []
        self.tokens = 0
        self.pool: Any = None
        self.renew_pool()

    def renew_pool(self) -> None:
        """Memory for the graphs to come. torch ends a pool with its last graph, and cannot capture into it again."""
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def reserve(self, tokens: int) -> bool:
        """Make room for rows * places cached tokens; True when the addresses changed."""
        if tokens <= self.tokens:
            return False
        self.flat = []
        self.flat = [
            tuple(torch.zeros(tokens * heads * width, dtype=self.dtype, device=self.device) for heads, width in layer)  # type: ignore[misc]
            for layer in self.layers
        ]
        self.tokens = tokens
        return True

    def view(self, rows: int, places: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [rows, heads, places, width] of every layer."""
        return [
            tuple(
                flat[: rows * heads * places * width].view(rows, heads, places, width)
                for flat, (heads, width) in zip(pair, layer, strict=True)
            )  # type: ignore[misc]
            for pair, layer in zip(self.flat, self.layers, strict=True)
        ]


class Program:
    """The step of one shape: its state in fixed buffers, and its captured graph on a GPU."""

    def __init__(
        self,
        backbone: Backbone,
        stack: AdapterStack | None,
        storage: Storage,
        shape: Shape,
        lean: LeanModel | None = None,
    ) -> None:
        self.backbone, self.stack, self.shape, self.pool = backbone, stack, shape, storage.pool
        self.lean = lean
        device, rows = backbone.device, shape.rows
        self.token_R_1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position_R_1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.start_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self.filled_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.step_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.uniform_T_R = torch.zeros(shape.steps, rows, device=device)
        self.tokens_T_R = torch.zeros(shape.steps, rows, dtype=torch.long, device=device)
        self.logprob_T_R = torch.zeros(shape.steps, rows, device=device)
        self.length_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended_R = torch.ones(rows, dtype=torch.bool, device=device)
        self.failed_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self.end_ids = torch.tensor(sorted(backbone.end_ids), device=device)
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # four axes: the model takes it as it is
        self.layers = [StaticLayer(k, v, self.place_1) for k, v in storage.view(rows, shape.places)]
        self.cache = static_cache(backbone.model.config, self.layers)
        self.graph: Any = None

    def state(self) -> list[Tensor]:
        """Buffers that a step changes, the cache and the outputs aside."""
        moving = [self.token_R_1, self.position_R_1, self.filled_1, self.place_1, self.step_1]
        return [*moving, self.length_R, self.ended_R, self.failed_R]

    def body(self) -> None:
        """One step: forward the last token of every slot, then draw and note the next."""
        window = Window(self.start_R, self.filled_1)
        if self.lean is not None:
            logits_R_V = self.lean.logits(
                self.token_R_1, self.position_R_1, self.layers, window, self.place_1, self.stack
            )
            self.note(logits_R_V)
            return
        with decoding(window):
            out = self.backbone.model(
                input_ids=self.token_R_1,
                attention_mask=self.mask,
                position_ids=self.position_R_1,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.note(out.logits[:, -1])

    def note(self, logits_R_V: Tensor) -> None:
        """Draw a token for every slot, write it down for the live ones, and move one place on."""
        drawn = self._draw(logits_R_V)
        if kernels.available(logits_R_V):
            state = (self.length_R, self.ended_R, self.failed_R, self.token_R_1, self.position_R_1)
            written = (self.tokens_T_R, self.logprob_T_R)
            kernels.note(drawn, self.end_ids, written, state, self.step_1, self.backbone.pad_id)
        else:
            self._write(*drawn)
        self.filled_1 += 1
        torch._foreach_add_([self.place_1, self.step_1], 1)

    def _write(self, token_R: Tensor, logprob_R: Tensor, bad_R: Tensor) -> None:
        """What `kernels.note` does, in PyTorch."""
        live_R = ~self.ended_R
        self.tokens_T_R.index_copy_(0, self.step_1, torch.where(live_R, token_R, self.backbone.pad_id)[None])
        self.logprob_T_R.index_copy_(0, self.step_1, torch.where(live_R, logprob_R, 0.0)[None])
        self.length_R += live_R
        self.failed_R |= live_R & bad_R
        self.ended_R |= bad_R | torch.isin(token_R, self.end_ids)
        self.token_R_1.copy_(token_R[:, None])
        self.position_R_1 += 1

    def _draw(self, logits_R_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        uniform_R = None if shape.greedy else self.uniform_T_R.index_select(0, self.step_1)[0]
        if kernels.available(logits_R_V) and shape.top_p == 1.0:
            return kernels.draw(logits_R_V, uniform_R, shape.temperature)
        return draw(logits_R_V.float(), uniform_R, shape.temperature, shape.top_p)

    def step(self) -> None:
        """Run `body` once, captured where the device can. Capturing keeps the state as it was."""
        if self.graph is None and self.backbone.device.type == "cuda":
            self.graph = self._capture()
        if self.graph:
            self.graph.replay()
        else:
            with self.backbone.use(self.stack):
                self.body()

    def _capture(self) -> Any:
        """The CUDA graph of `body`, or False when the model cannot be captured (said once)."""
        before = [tensor.clone() for tensor in self.state()]
        graph: Any = torch.cuda.CUDAGraph()
        try:
            with self.backbone.use(self.stack):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self.body()
                torch.cuda.current_stream().wait_stream(side)
                with torch.cuda.graph(graph, pool=self.pool):
                    self.body()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"decoding without a CUDA graph, which is slower: {error}", stacklevel=2)
            graph = False
        for tensor, old in zip(self.state(), before, strict=True):
            tensor.copy_(old)
        return graph
