"""The language-model head: log-probabilities and entropy of the rows that predict a response token.

Only N response rows are projected, never the prompt. The vocabulary is split over the tensor-parallel
ranks; sums over it are all-reduced, so values and gradients are those of the full softmax. Rows that pad
the vocabulary are masked. With sequence parallelism the hidden states are gathered first, and their
gradient is reduce-scattered. Backend "reference" is autograd over all rows at once; "chunked" keeps the
logits of `chunk` rows alive at a time and recomputes them in the backward. Both return fp32 whatever the
model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

Entropy = Literal["none", "value", "grad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How to compute; one per trainer."""

    backend: Literal["reference", "chunked"]
    chunk: int  # rows
    vocab: int  # real rows of the vocabulary, all ranks together
    sequence_parallel: bool

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: Entropy,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [T or T / tp, 1, H], weight [V / tp, H], rows and targets [N] -> log-probabilities, entropy.

        Entropy is None for "none" and carries no gradient for "value". Logits are divided by `temperature`.
        """
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        selected = hidden[:, 0].index_select(0, rows)
        first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
        local = Vocab(first=first, real=min(max(self.vocab - first, 0), weight.shape[0]))
        if self.backend == "chunked":
            logprobs, value = ChunkedLogprobs.apply(
                selected, weight, targets, local, temperature, entropy, self.chunk
            )
        else:
            logprobs, value = reference_logprobs(selected, weight, targets, local, temperature, entropy)
        if entropy == "none":
            return logprobs, None
        return logprobs, value if entropy == "grad" else value.detach()


@dataclass(frozen=True, slots=True)
class Vocab:
    """This rank's slice of the vocabulary: ids [first, first + real); further weight rows are padding."""

    first: int
    real: int


def _logits(hidden: Tensor, weight: Tensor, local: Vocab, temperature: float) -> Tensor:
    """[n, V / tp] fp32, padding at -inf."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    if temperature != 1.0:
        logits = logits / temperature
    if local.real < weight.shape[0]:
        padding = torch.arange(weight.shape[0], device=logits.device) >= local.real
        logits = logits.masked_fill(padding, -torch.inf)
    return logits


def _own_target(targets: Tensor, local: Vocab) -> tuple[Tensor, Tensor]:
    """(column clamped into this rank's slice, whether the target is in it), both [n]."""
    column = targets - local.first
    own = (column >= 0) & (column < local.real)
    return column.clamp(0, max(local.real - 1, 0)), own


def _all_max(x: Tensor) -> Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return x


def _all_sum(x: Tensor) -> Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
    return x


def reference_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, local: Vocab, temperature: float, entropy: Entropy
) -> tuple[Tensor, Tensor]:
    """The definition, differentiated by autograd: log softmax(x)[target] and H = lse - sum(p x)."""
    x = _logits(hidden, weight, local, temperature)
    top = _all_max(x.detach().amax(-1))
    lse = top + reduce_from_tensor_model_parallel_region((x - top[:, None]).exp().sum(-1)).log()
    column, own = _own_target(targets, local)
    picked = x.gather(1, column[:, None])[:, 0].masked_fill(~own, 0.0)
    logprobs = reduce_from_tensor_model_parallel_region(picked) - lse
    if entropy == "none":
        return logprobs, logprobs.new_zeros(0)
    # Each rank sees only its slice's share of the gradient that flows through p into lse: sum them.
    p = (x - copy_to_tensor_model_parallel_region(lse)[:, None]).exp()
    mean = reduce_from_tensor_model_parallel_region((p * x.masked_fill(p == 0, 0.0)).sum(-1))
    return logprobs, lse - mean


class ChunkedLogprobs(torch.autograd.Function):
    """`reference_logprobs` in O(chunk * V / tp) memory.

    d logprob / dx = onehot - p;  d H / dx = -p (x - lse + H)   (from H = -sum p log p, log p = x - lse).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        local: Vocab,
        temperature: float,
        entropy: Entropy,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        lse = hidden.new_empty(n, dtype=torch.float32)
        picked, mean = torch.zeros_like(lse), torch.zeros_like(lse)
        for i in range(0, n, chunk):
            part = slice(i, min(i + chunk, n))
            x = _logits(hidden[part], weight, local, temperature)
            top = _all_max(x.amax(-1))
            column, own = _own_target(targets[part], local)
            picked[part] = _all_sum(x.gather(1, column[:, None])[:, 0].masked_fill_(~own, 0.0))
            p = (x - top[:, None]).exp_()
            total = _all_sum(p.sum(-1))
            lse[part] = top + total.log()
            if entropy != "none":
                mean[part] = _all_sum(p.mul_(x.masked_fill_(p == 0, 0.0)).sum(-1)) / total
        value = lse - mean if entropy != "none" else lse.new_zeros(0)
        ctx.save_for_backward(hidden, weight, targets, lse, value)
        ctx.local, ctx.temperature, ctx.entropy, ctx.chunk = local, temperature, entropy, chunk
        return picked - lse, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, value = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for i in range(0, hidden.shape[0], ctx.chunk):
            part = slice(i, min(i + ctx.chunk, hidden.shape[0]))
            x = _logits(hidden[part], weight, ctx.local, ctx.temperature)
            log_p = x.sub_(lse[part][:, None])
            p = log_p.exp()
            g = grad_logprobs[part][:, None]
            column, own = _own_target(targets[part], ctx.local)
            if ctx.entropy == "grad":
                h = log_p.masked_fill_(p == 0, 0.0).add_(value[part][:, None])
                dx = p.mul_(h.mul_(grad_entropy[part][:, None]).add_(g)).neg_()
            else:
                dx = p.mul_(-g)
            dx.scatter_add_(1, column[:, None], torch.where(own, g[:, 0], 0.0)[:, None])
            dx = dx.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = dx @ weight
            grad_weight.addmm_(dx.T, hidden[part])
        return grad_hidden, grad_weight, None, None, None, None, None
