"""Decoding at fixed addresses, for a GPU: one captured graph a step, whatever the length.

A step (forward pass for one new token of every row, draw, bookkeeping) works in buffers that stay where they are, so it is
captured as a CUDA graph once for a shape and replayed. Rows are slots, in lanes of equally many that belong to one policy;
when the live rows fit in fewer, they move to a program of fewer or narrower lanes, of which a policy that still has many rows
takes several. Without a GPU the same step runs uncaptured, for tests.
Left out: paged blocks, full-weight stacks, admission of waiting rows into free slots.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from soar.config import SamplingConfig
from soar.engine import kernels
from soar.engine.attention import StaticLayer, Window
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Batch, Rollouts, draw, next_logits

OF_SLOTS = ("token_R_1", "position_R_1", "length_R", "ended_R", "failed_R")
"""What a step changes of every slot, cache and outputs aside."""


class Program:
    """The step of one shape: its state in fixed buffers, and its captured graph on a GPU."""

    def __init__(
        self, decoder: "StaticDecoder", stack: AdapterStack | None, sampling: SamplingConfig, rows: int, places: int
    ) -> None:
        self.backbone = backbone = decoder.backbone
        self.stack, self.sampling, self.pool = stack, sampling, decoder.pool
        self.filled_1, self.place_1, self.step_1 = decoder.counters
        device, steps = backbone.device, sampling.max_tokens
        self.token_R_1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position_R_1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.start_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self.uniform_T_R = torch.zeros(steps, rows, device=device)
        self.tokens_T_R = torch.zeros(steps, rows, dtype=torch.long, device=device)
        self.logprob_T_R = torch.zeros(steps, rows, device=device)
        self.length_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended_R = torch.ones(rows, dtype=torch.bool, device=device)
        self.failed_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self.end_ids = torch.tensor(sorted(backbone.end_ids), device=device)
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # four axes: the model takes it as it is
        views = [x[: rows * places].view(rows, x.shape[1], places, x.shape[2]) for x in decoder.flat]
        self.cache = DynamicCache(config=backbone.model.config)
        self.cache.layers = [StaticLayer(*pair, self.place_1) for pair in zip(views[::2], views[1::2], strict=True)]
        self.graph: Any = None

    def body(self) -> None:
        """One step: forward the last token of every slot, then draw and note the next."""
        with self.backbone.use(self.stack, Window(self.start_R, self.filled_1)):
            self.note(next_logits(self.backbone, self.token_R_1, self.mask, self.position_R_1, self.cache))

    def note(self, logits_R_V: Tensor) -> None:
        """Draw a token for every slot, write it down for the live ones, and move one place on."""
        sampling = self.sampling
        uniform_R = self.uniform_T_R.index_select(0, self.step_1)[0] if sampling.temperature else None
        if kernels.available(logits_R_V) and sampling.top_p == 1.0:
            token_R, logprob_R, bad_R = kernels.draw(logits_R_V, uniform_R, sampling.temperature)
        else:
            token_R, logprob_R, bad_R = draw(logits_R_V, uniform_R, sampling.temperature, sampling.top_p)
        live_R = ~self.ended_R
        self.tokens_T_R.index_copy_(0, self.step_1, torch.where(live_R, token_R, self.backbone.pad_id)[None])
        self.logprob_T_R.index_copy_(0, self.step_1, torch.where(live_R, logprob_R, 0.0)[None])
        self.length_R += live_R
        self.failed_R |= live_R & bad_R
        # Not isin: with many end tokens it sorts, which no graph can capture.
        self.ended_R |= bad_R | (token_R[:, None] == self.end_ids).any(1)
        self.token_R_1.copy_(token_R[:, None])
        torch._foreach_add_([self.position_R_1, self.place_1, self.step_1], 1)
        self.filled_1 += 1

    def step(self) -> None:
        """Run `body` once, captured where the device can. Capturing keeps the state as it was."""
        if self.graph is None and self.backbone.device.type == "cuda":
            self.graph = self._capture()
        if self.graph:
            self.graph.replay()
        else:
            self.body()

    def _capture(self) -> Any:
        """The CUDA graph of `body`, or False when the model cannot be captured (said once)."""
        state = [self.filled_1, self.place_1, self.step_1, *(getattr(self, name) for name in OF_SLOTS)]
        before = [tensor.clone() for tensor in state]
        graph: Any = torch.cuda.CUDAGraph()
        try:
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
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        return graph


CHECK = 8  # steps between looks at which rows have ended; each look waits for the device
KEPT_PROGRAMS = 64
SPARED = 64  # slots by which a program has to be narrower, or half as wide, for a move and a capture to pay
SAVED = 0.8  # of the slots that one lane a policy takes, by which other lanes have to do
NARROWEST, MOST_LANES = 16, 8  # slots of a lane, and lanes, or twice the policies: each holds its policy's adapter anew
PLACE_STEP = 64  # cache capacity is rounded up to this, so that calls of like lengths share a program


def slots_for(rows: int) -> int:
    """Slots per policy for so many rows: the next number of at most three significant bits, so that few programs exist."""
    unit = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // unit) * unit


def lanes_for(live_P: list[int]) -> tuple[int, list[int]]:
    """Slots of a lane, and each lane's policy, for so many live rows of each policy.

    A lane for each, or several for one with many more rows than others, where that pays for a new program to capture.
    """
    most, policies = max(live_P), len(live_P)
    best, slots = (slots_for(most), list(range(policies))), SAVED * slots_for(most) * policies
    for width in (NARROWEST << i for i in reversed(range(most.bit_length()))):
        of_L = [p for p, live in enumerate(live_P) for _ in range(-(-live // width))]
        if width * len(of_L) < slots and len(of_L) <= max(MOST_LANES, 2 * policies):
            best, slots = (width, of_L), width * len(of_L)
    return best


class StaticDecoder:
    """Keeps the fixed buffers and programs of one backbone between calls. One call at a time."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.programs: dict[tuple[Any, ...], Program] = {}  # by what their captured step depends on
        self.lanes: AdapterStack | None = None  # as many as ever there may be: a program views the first of them
        # Memory [tokens, heads, width] of keys, of values of the first layer, of the next, ...: a program views it its way.
        self.flat: list[Tensor] = []
        self.pool: Any = None
        # filled_1, place_1 and step_1 of whichever program runs.
        self.counters = [torch.zeros(1, dtype=t, device=backbone.device) for t in (torch.int32, torch.long, torch.long)]

    def release(self) -> None:
        """Give all memory back."""
        self.programs.clear()
        self.lanes = None
        self.flat.clear()
        torch.cuda.empty_cache()

    def hold(self, stack: AdapterStack | None, of_L: list[int]) -> AdapterStack | None:
        """The stack's policies of_L, one a lane, in the compute type, at addresses that stay."""
        if stack is None:
            return None
        most, lanes = max(MOST_LANES, 2 * stack.policies), self.lanes
        if lanes is None or lanes.policies < most or lanes.scale != stack.scale:  # shapes are the backbone's
            made = {n: t.new_empty(most, *t.shape[1:], dtype=self.backbone.dtype) for n, t in stack.tensors.items()}
            self.programs.clear()
            lanes = self.lanes = AdapterStack(stack.kind, made, stack.scale)
        held = {name: tensor[: len(of_L)] for name, tensor in lanes.tensors.items()}
        given = [stack.tensors[name].detach() for name in held]
        if of_L == list(range(stack.policies)):  # at the beginning of every batch: in few launches
            torch._foreach_copy_(list(held.values()), given)
        else:
            index_L = torch.tensor(of_L, device=self.backbone.device)
            for tensor, values in zip(held.values(), given, strict=True):
                tensor.copy_(values.index_select(0, index_L))
        return AdapterStack(stack.kind, held, stack.scale)

    def reserve(self, tokens: int, states: list[Tensor]) -> None:
        """Room for rows * places cached tokens like these keys and values, at new addresses where there is too little."""
        if not self.flat or tokens > len(self.flat[0]):
            self.programs.clear()  # first: their views would keep the old memory beside the new
            self.flat.clear()
            self.flat += [state.new_zeros(tokens, state.shape[1], state.shape[3]) for state in states]

    def program(self, stack: AdapterStack | None, sampling: SamplingConfig, rows: int, places: int) -> Program:
        """The program of a shape, made when it is new; the least recently used ones are dropped."""
        shape = (0 if stack is None else stack.policies, sampling, rows, places)
        program = self.programs.pop(shape, None)
        if program is None:
            if not self.programs and self.backbone.device.type == "cuda":
                self.pool = torch.cuda.graph_pool_handle()  # torch ends one with its last graph
            program = Program(self, stack, sampling, rows, places)
        self.programs[shape] = program
        while len(self.programs) > KEPT_PROGRAMS:
            del self.programs[next(iter(self.programs))]
        return program


class SlotBatch(Batch):
    """A batch in slots: prefill, place, step, move to narrower programs, collect."""

    def _begin(self, decoder: StaticDecoder) -> None:
        """Prefill, and put every row into its slot of the first program."""
        self.decoder = decoder
        longest, each = self.longest, self.rows // self.policies
        width, places = slots_for(each), -(-(longest + self.sampling.max_tokens) // PLACE_STEP) * PLACE_STEP
        slots, self.places, self.of_L = self.policies * width, places, list(range(self.policies))
        self.first = 0  # the step from which notes are not collected yet
        cache: Any = DynamicCache()  # not the config's: sliding layers keep their places as well
        logits_U_V, mask_U_S = self.prefill(cache)
        decoder.reserve(slots * places, [x for layer in cache.layers for x in (layer.keys, layer.values)])
        program = self.program = decoder.program(decoder.hold(self.stack, self.of_L), self.sampling, slots, places)
        slot_R = torch.arange(slots, device=self.backbone.device)
        inside_R = slot_R % width < each
        # Slots beyond the rows hold a copy of the policy's last row and are ended from the start.
        row_R = slot_R // width * each + (slot_R % width).clamp(max=each - 1)
        self.row_R, self.inside_R = row_R, inside_R
        prompt_R = row_R // self.request.attempts
        for layer, old in zip(program.cache.layers, cache.layers, strict=True):
            layer.keys[:, :, :longest] = old.keys.index_select(0, prompt_R)
            layer.values[:, :, :longest] = old.values.index_select(0, prompt_R)
            old.keys = old.values = None
        lengths_U = mask_U_S.sum(1)
        program.position_R_1.copy_(lengths_U[prompt_R][:, None] - 1)
        program.start_R.copy_(longest - lengths_U[prompt_R])
        program.filled_1.fill_(longest)
        program.place_1.fill_(longest - 1)
        program.step_1.zero_()
        if self.uniform_B_T is not None:
            program.uniform_T_R.copy_(self.uniform_B_T[row_R].T)
        program.length_R.zero_()
        program.ended_R.copy_(~inside_R)
        program.failed_R.zero_()
        program.note(logits_U_V[prompt_R])

    def finish(self, decoder: StaticDecoder) -> Rollouts:
        """Step until every row has ended or the budget is spent."""
        with self.backbone.use(self.stack):
            self._begin(decoder)
        steps = self.sampling.max_tokens
        for step in range(1, steps):
            if step % CHECK == 0 or step == 1:
                self._stop(step)
                live_L_w = ~self.program.ended_R.view(len(self.of_L), -1).cpu().numpy()
                live_P = np.bincount(self.of_L, live_L_w.sum(1), self.policies).astype(int).tolist()
                if not any(live_P):
                    break
                self.on_tokens(sum(live_P) * min(step, CHECK))
                (width, of_L), slots = lanes_for(live_P), live_L_w.size
                if width * len(of_L) * 2 <= slots or slots - width * len(of_L) >= SPARED:
                    self._narrow(live_L_w, width, of_L, step)
            self.program.step()
        self._stop(steps)
        self._collect(steps)
        if self.stops is not None:  # rows ran on behind their stop string until somebody looked
            self.logprob_B_T *= torch.arange(steps, device=self.length_B.device) < self.length_B[:, None]
        return self.rollouts()

    def _collect(self, upto: int) -> None:
        """Take what the current program noted in the steps before `upto`."""
        program, inside_R = self.program, self.inside_R
        rows = self.row_R[inside_R]
        self.tokens_B_T[rows, self.first : upto] = program.tokens_T_R[self.first : upto, inside_R].T
        self.logprob_B_T[rows, self.first : upto] = program.logprob_T_R[self.first : upto, inside_R].T
        for name in ("length", "ended", "failed"):
            getattr(self, f"{name}_B")[rows] = getattr(program, f"{name}_R")[inside_R]
        self.first = upto

    def _stop(self, upto: int) -> None:
        """End the rows whose text holds a stop string, at the token that completed it."""
        if self.stops is None:
            return
        first = self.first
        self._collect(upto)
        for row, length in self.stops.ends(self.tokens_B_T, self.length_B, first, upto):
            slot_R = (self.row_R == row) & self.inside_R
            for name, value in (("length", length), ("ended", True), ("failed", False)):
                getattr(self, f"{name}_B")[row] = value
                getattr(self.program, f"{name}_R").masked_fill_(slot_R, value)

    def _narrow(self, live_L_w: np.ndarray, width: int, of_L: list[int], step: int) -> None:
        """Move the live rows to lanes of `width` slots that belong to the policies of_L; an ended row fills up."""
        self._collect(step)
        live_R, of_R = live_L_w.reshape(-1), np.repeat(self.of_L, live_L_w.shape[1])
        keep_R = np.full(width * len(of_L), np.argmin(live_R))
        for policy in {*of_L}:
            slots, first = np.flatnonzero(live_R & (of_R == policy)), of_L.index(policy) * width
            keep_R[first : first + len(slots)] = slots
        keep = torch.from_numpy(keep_R).to(self.length_B.device)
        stack = self.program.stack if of_L == self.of_L else self.decoder.hold(self.stack, of_L)
        old, new = self.program, self.decoder.program(stack, self.sampling, len(keep), self.places)
        for before, after in zip(old.cache.layers, new.cache.layers, strict=True):
            # The new view lies over the old one in memory, so the rows are gathered aside first.
            after.keys.copy_(before.keys.index_select(0, keep))
            after.values.copy_(before.values.index_select(0, keep))
        for name in ("start_R", *OF_SLOTS):
            getattr(new, name).copy_(getattr(old, name)[keep])
        new.uniform_T_R.copy_(old.uniform_T_R[:, keep])
        self.row_R, self.inside_R = self.row_R[keep], self.inside_R[keep]
        self.program, self.of_L = new, of_L
