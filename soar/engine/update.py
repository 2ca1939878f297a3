"""One optimizer step for every policy of a stack; the same function trains the teacher and the students.

Each policy has its own gradient, clipping and AdamW state: the first axis of every tensor. Rows without a gradient are
skipped, the rest packed into micro-batches (`logprobs.pack`); when memory runs out the whole step begins anew with smaller
ones, which changes no number but the last bits.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from soar.config import OptimizerConfig, SamplingConfig
from soar.engine.attention import sent
from soar.engine.logprobs import Pack, pack, token_logprobs
from soar.engine.memory import T, free_bytes, until_it_fits
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rloo import k3, policy_loss
from soar.engine.rollouts import Rollouts

CPU_LOGIT_BYTES = 1 << 29
SMALLEST_MICRO_BATCH = 1024
MEMORY_SHARE = 0.5  # of a GPU's free memory, for the activations of one pass
Lane = tuple[int, list[int]]  # a policy and some of its rows


@dataclass(frozen=True)
class UpdateStats:
    """Per-policy figures of one step, on the CPU.

    gradient_norm_P before clipping; kl_P mean k3 per trained token (nan without a KL term);
    gap_P mean absolute difference between sampler and trainer log-probabilities per token (nats); failed_P loss or
    gradient was NaN or inf: that policy was not changed.
    """

    gradient_norm_P: Tensor
    kl_P: Tensor
    gap_P: Tensor
    failed_P: Tensor


def update(
    backbone: Backbone,
    optimizer: "StackOptimizer",
    rollouts: Rollouts,
    advantage_B: Tensor,
    lr: float,
    sampling: SamplingConfig,
) -> UpdateStats:
    """One RLOO step of the optimizer's stack on rollouts of all its policies (rows policy-major, equally many each).

    The loss of a policy is the sum over its rows of `rloo.policy_loss` with normaliser rows_per_policy * sampling.max_tokens.
    A policy whose loss or gradient is not finite keeps its weights and is reported as failed; the others are not touched
    by it. A policy without a gradient still takes its AdamW step. Raises ValueError when the rows do not divide.
    """
    config, stack, temperature = optimizer.config, optimizer.stack, sampling.temperature
    kept_P = rows_that_count(rollouts, advantage_B, stack.policies, config)
    normaliser = float(rollouts.rows // stack.policies * sampling.max_tokens)

    def accumulate(limit: int) -> Tensor:
        """Gradients of the whole loss, from zero; returns sums [3, P] on the CPU: log-probability gap, k3, tokens."""
        sums_3_B = torch.zeros(3, rollouts.rows, device=backbone.device)
        advantages_B = advantage_B.to(backbone.device)
        optimizer.zero()
        for lane_L, packed in micro_batches(backbone, rollouts, kept_P, limit):  # only backward waits for the device
            live, leaves = optimizer.live(backbone, lane_L)
            logprob_R_T = token_logprobs(backbone, live, packed, temperature)
            reference_R_T = None
            if config.kl > 0.0:
                with torch.no_grad():
                    reference_R_T = token_logprobs(backbone, None, packed, temperature)
            mask_R_T, row_R = packed.mask_R_T.float(), packed.row_R
            loss_R = policy_loss(logprob_R_T, mask_R_T, advantages_B[row_R], normaliser, reference_R_T, config.kl)
            loss_R.sum().backward()
            optimizer.collect(lane_L, leaves)
            with torch.no_grad():
                sums_3_B[0, row_R] = ((logprob_R_T - packed.sampled_R_T).abs() * mask_R_T).sum(1)
                if reference_R_T is not None:
                    sums_3_B[1, row_R] = k3(logprob_R_T * mask_R_T, reference_R_T * mask_R_T).sum(1)
                sums_3_B[2, row_R] = mask_R_T.sum(1)
            del live, leaves, logprob_R_T, loss_R  # the graph holds the lanes' adapters and gradients
        return sums_3_B.view(3, stack.policies, -1).sum(2).cpu()

    gap_P, kl_P, tokens_P = in_micro_batches(backbone, accumulate)
    norm_P, failed_P = optimizer.step(lr)
    count_P = tokens_P.clamp(min=1)
    kl_mean_P = kl_P / count_P if config.kl > 0.0 else torch.full_like(kl_P, math.nan)
    return UpdateStats(norm_P, kl_mean_P, gap_P / count_P, failed_P)


def rows_that_count(rollouts: Rollouts, advantage_B: Tensor, policies: int, config: OptimizerConfig) -> list[list[int]]:
    """Numbers of the rows of each policy that carry a gradient. Raises ValueError as `update` says."""
    if rollouts.rows % policies or advantage_B.shape != (rollouts.rows,):
        found = f"{rollouts.rows} rollouts with advantages {list(advantage_B.shape)} for {policies} policies"
        raise ValueError(f"{found}; give every policy equally many rollouts and every rollout one advantage")
    counts_P_B = (((advantage_B != 0.0) | (config.kl > 0.0)) & (rollouts.length_B > 0)).view(policies, -1)
    first_P = range(0, rollouts.rows, counts_P_B.shape[1])
    return [(row.nonzero()[:, 0] + first).tolist() for row, first in zip(counts_P_B, first_P, strict=True)]


def in_micro_batches(backbone: Backbone, work: Callable[[int], T]) -> T:
    """work(tokens of a micro-batch); when memory runs out, half as many, then, from the first setting on, recomputing."""
    first = backbone.micro_batch_tokens

    def shrink(limit: int) -> bool:
        if limit > SMALLEST_MICRO_BATCH:
            backbone.micro_batch_tokens = max(SMALLEST_MICRO_BATCH, limit // 2)
            how = f"micro-batches of {backbone.micro_batch_tokens} tokens"
        elif torch.is_grad_enabled() and backbone.recompute():
            backbone.micro_batch_tokens = first
            how = "with gradient checkpointing"
        else:
            return False
        warnings.warn(f"out of memory: from here on {how}", stacklevel=2)
        return True

    return until_it_fits(work, lambda: micro_batch_limit(backbone), shrink)


def micro_batch_limit(backbone: Backbone) -> int:
    """Tokens of one forward and backward pass: `backbone.micro_batch_tokens`, or by memory: on a CPU that of the logits
    (three float copies), on a GPU a share of what is free, for what the backward pass keeps (half with liger-kernel).
    """
    if backbone.micro_batch_tokens:
        return backbone.micro_batch_tokens
    if backbone.device.type != "cuda":
        return max(256, min(16384, CPU_LOGIT_BYTES // (12 * backbone.vocabulary)))
    config, thrift = backbone.model.config.get_text_config(), 2 if backbone.fused else 1
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = int(np.max([getattr(shape, "intermediate_size", None) or 4 * hidden for shape in backbone.shapes]))
    layer = (24 * hidden + 6 * inner) // thrift  # values that the backward pass keeps of a token
    values = layers * hidden + layer if backbone.recomputing else layers * layer
    free = int(MEMORY_SHARE * free_bytes(backbone.device))
    return max(1024, min(1 << 17, free // (values * backbone.dtype.itemsize)))


def micro_batches(
    backbone: Backbone, rollouts: Rollouts, kept_P: list[list[int]], limit: int
) -> Iterator[tuple[list[int], Pack]]:
    """Rows packed batch by batch, some `limit` tokens each, with the policy of each lane of the batch.

    A batch is as wide as its fullest lane, and a prompt may be in several. Of two plans the one with fewer places. Of rows
    that stand apart each counts as much as the longest.
    """
    lengths, prompts, apart = rollouts.length_B.tolist(), rollouts.prompts, backbone.apart
    number = {prompt: i for i, prompt in enumerate(sorted({*prompts}))}
    prompt_B = [number[prompt] for prompt in prompts]
    longest = max((len(prompts[row]) + lengths[row] for kept in kept_P for row in kept), default=0)
    by_prompt = prompt_B.__getitem__
    groups_P = [[[*rows] for _, rows in groupby(sorted(kept, key=by_prompt), by_prompt)] for kept in kept_P]

    def size(rows: list[int]) -> int:
        once = {prompt_B[row]: len(prompts[row]) for row in rows}
        return len(rows) * longest if apart else sum(once.values()) + sum(lengths[row] for row in rows)

    # One plan: every policy has a lane in each batch, over which its tokens are spread evenly.
    totals = [max(1, size(kept)) for kept in kept_P]
    count = -(-max(totals) * len(kept_P) // limit) if longest else 0
    batches: list[list[Lane]] = [[(p, []) for p in range(len(kept_P))] for _ in range(count)]
    for p, (groups, total) in enumerate(zip(groups_P, totals, strict=True)):
        start = 0
        for rows in groups:
            for row in rows:
                batches[start * count // total][p][1].append(row)
                start += longest if apart else lengths[row] + (len(prompts[row]) if row == rows[0] else 0)
    # The other: every prompt with its rows is a lane, beside others of its length.
    if backbone.lanes and len(kept_P) > 1:
        lanes, others = list[Lane](), list[list[Lane]]()
        for p, rows in ((p, rows) for p, groups in enumerate(groups_P) for rows in groups):
            parts = min(len(rows), -(-size(rows) // limit))
            lanes += [(p, rows[i::parts]) for i in range(parts)]
        lanes.sort(key=lambda lane: -size(lane[1]))
        while lanes:
            fit = max(1, min(limit // size(lanes[0][1]), 4 * len(kept_P)))  # room beside the longest, and for adapters
            others.append(lanes[:fit])
            lanes = lanes[fit:]
        plans = batches, others
        batches = min(plans, key=lambda plan: sum(len(batch) * max(size(rows) for _, rows in batch) for batch in plan))
    for batch in batches:
        if any(rows for _, rows in batch):
            yield [p for p, _ in batch], pack(backbone, rollouts, [rows for _, rows in batch])


class StackOptimizer:
    """AdamW over the tensors of one stack, fresh at construction.

    The gradients of all tensors lie in one buffer, those of one shape beside each other: a model has hundreds of
    adapters, and a launch for each of them, several times an update, costs a small model more than the arithmetic.
    """

    def __init__(self, stack: AdapterStack, config: OptimizerConfig) -> None:
        self.stack, self.config, self.names = stack.trainable(), config, sorted(stack.tensors)
        tensors = [stack.tensors[name] for name in self.names]
        betas, fused = (config.beta1, config.beta2), all(tensor.is_cuda for tensor in tensors) or None
        self.adamw = torch.optim.AdamW(tensors, config.lr, betas, config.eps, config.weight_decay, fused=fused)
        shapes = dict.fromkeys(tensor.shape for tensor in tensors)
        self._members = [[i for i, tensor in enumerate(tensors) if tensor.shape == shape] for shape in shapes]
        sizes = [len(members) * shape.numel() for members, shape in zip(self._members, shapes, strict=True)]
        self._flat = tensors[0].new_zeros(sum(sizes), requires_grad=False)
        self._blocks = [part.view(-1, *of) for part, of in zip(self._flat.split(sizes), shapes, strict=True)]
        self._order = np.argsort([i for members in self._members for i in members])  # of the names, in the blocks
        self._gradients = [gradient for block in self._blocks for gradient in block]

    def zero(self) -> None:
        """Zero gradients, and not None: AdamW counts the step, whether or not a neighbour in the stack has a gradient."""
        for name, i in zip(self.names, self._order, strict=True):
            self.stack.tensors[name].grad = self._gradients[i]
        self._flat.zero_()

    def live(self, backbone: Backbone, lane_L: list[int]) -> tuple[AdapterStack, list[Tensor]]:
        """What a pass goes through: the stack, or each lane's adapters in the compute type and, by shape, their leaves."""
        if not backbone.lanes:
            return self.stack, []
        lanes, tensors = sent(torch.tensor(lane_L), backbone.device), [self.stack.tensors[name] for name in self.names]
        with torch.no_grad():
            blocks = (torch.stack([tensors[i] for i in members]) for members in self._members)
            leaves = [block.index_select(1, lanes).to(backbone.dtype).requires_grad_() for block in blocks]
        flat = [tensor for leaf in leaves for tensor in leaf.unbind()]
        of_name = {name: flat[i] for name, i in zip(self.names, self._order, strict=True)}
        return AdapterStack(self.stack.kind, of_name, self.stack.scale), leaves

    @torch.no_grad()
    def collect(self, lane_L: list[int], leaves: list[Tensor]) -> None:
        """Add the gradients of a pass's lanes to those of their policies, lane after lane: in an order that is fixed."""
        for total, leaf in zip(self._blocks, leaves, strict=False):
            for lane, p in enumerate(lane_L):
                if leaf.grad is not None:
                    total[:, p] += leaf.grad[:, lane]

    @torch.no_grad()
    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clip each policy's gradient by its own norm, step the finite ones; returns (norm_P, failed_P), on the CPU."""
        squares_N_P = torch.cat([block.flatten(2).pow(2).sum(2) for block in self._blocks]).cpu().numpy()
        # One after another in the order of the names, for a sum that does not depend on the number of policies.
        norm_P = torch.from_numpy(np.add.accumulate(squares_N_P[self._order], axis=0)[-1].copy()).sqrt()
        failed_P = ~torch.isfinite(norm_P)
        failed = failed_P.nonzero()[:, 0].tolist()
        scale_P = (self.config.clip / (norm_P + 1e-12)).clamp(max=1.0).masked_fill(failed_P, 0.0)
        if failed:
            self._flat.nan_to_num_(0.0, 0.0, 0.0)
        if (scale_P != 1.0).any():
            for block in self._blocks:
                block.mul_(scale_P.to(block.device).view(1, -1, 1, 1))
        before = {name: tensor.detach()[failed].clone() for name, tensor in self.stack.tensors.items() if failed}
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        for name, weights in before.items():
            self.stack.tensors[name][failed] = weights
        return norm_P, failed_P

    def state(self) -> dict[str, Tensor]:
        """Flat tensors for a checkpoint: `<name>/exp_avg`, `<name>/exp_avg_sq`, `<name>/step`; {} before the first step."""
        states = self.adamw.state_dict()["state"].items()
        return {f"{self.names[i]}/{key}": value.clone() for i, state in states for key, value in state.items()}

    def restore(self, flat: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        of_name = {name: dict[str, Tensor]() for name in self.names}
        for place, value in flat.items():
            name, _, key = place.rpartition("/")
            of_name[name][key] = value.clone()
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": dict(enumerate(of_name.values()))})
