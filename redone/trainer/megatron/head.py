"""The language-model head: log-probabilities and entropy of the rows that predict a response token.

Only N response rows are projected, never the prompt. The vocabulary is split over the tensor-parallel
ranks; values and gradients are those of the full softmax, and rows that pad the vocabulary are masked. With
sequence parallelism the hidden states are gathered first, and their gradient is reduce-scattered. The
computing is done by redone_kernels: "chunked" (rows), "fused" (Triton, logits never stored), and
`linear_dapo`, which makes the gradient of a token-level loss in the forward. "reference" is autograd over
all rows at once, the definition. All return fp32 whatever the model's dtype.
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
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.linear_logprob import linear_logprob
from torch import Tensor

from redone.trainer.megatron.attention import PackedRow
from redone.trainer.megatron.token_loss import LossRows

Entropy = Literal["none", "value", "grad"]
Backend = Literal["auto", "reference", "chunked", "fused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How to compute; one per trainer."""

    backend: Backend  # auto: fused on CUDA, chunked on CPU
    chunk: int  # rows
    vocab: int  # real rows of the vocabulary, all ranks together
    sequence_parallel: bool
    fuse_loss: bool  # let the head make the gradient where the row carries a token-level loss
    own_wgrad: bool = True  # add the weight's gradient to main_grad itself; else autograd carries it

    def __call__(self, hidden: Tensor, weight: Tensor, row: PackedRow) -> tuple[Tensor, ...]:
        """hidden [T or T / tp, 1, H], weight [V / tp, H] -> log-probabilities [N], entropy [N] or [0].

        Entropy is [0] for row.entropy "none" and carries no gradient for "value". Logits are divided by
        row.temperature. Where row.loss is set and the head makes the gradient, neither carries any, and
        the loss (scalar, with gradient) and its metric vector follow. The weight's gradient is added to
        its fp32 main_grad where Megatron has one (not with overlap_grad_reduce, which waits for autograd).
        """
        assert row.rows is not None and row.targets is not None
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        selected = hidden[:, 0].index_select(0, row.rows)
        if self.backend == "reference":
            if not self.sequence_parallel:
                selected = copy_to_tensor_model_parallel_region(selected)
            first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
            local = Vocab(first=first, real=min(max(self.vocab - first, 0), weight.shape[0]))
            logprobs, value = reference_logprobs(
                selected, weight, row.targets, local, row.temperature, row.entropy
            )
            return logprobs, value if row.entropy == "grad" else value.detach()
        place = self._place(weight, row)
        if row.loss is not None and self.fuse_loss and self.backend != "fused":
            return _with_loss(selected, weight, row.targets, row.loss, place)
        out = linear_logprob(
            selected, weight, row.targets, backend=self.backend,
            entropy="metric" if row.entropy == "value" else row.entropy, **place,
        )  # fmt: skip
        return out.logprob, out.logprob.new_zeros(0) if out.entropy is None else out.entropy

    def _place(self, weight: Tensor, row: PackedRow) -> dict[str, Any]:
        """Arguments that linear_logprob and linear_dapo share."""
        parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
        grad = getattr(weight, "main_grad", None)
        return {
            "vocab_start": parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
            "vocab_size": self.vocab,
            "tp_group": parallel_state.get_tensor_model_parallel_group() if parallel else None,
            "temperature": row.temperature,
            "chunk_tokens": self.chunk,
            # Megatron's hook adds weight.grad, here that of a tied embedding only, to main_grad by itself
            "wgrad_out": grad
            if self.own_wgrad and grad is not None and grad.dtype == torch.float32
            else None,
            "dhidden_reduce": "all_reduce" if parallel and not self.sequence_parallel else "none",
        }


def _with_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss: LossRows, place: dict[str, Any]
) -> tuple[Tensor, ...]:
    out = linear_dapo(
        hidden, weight, targets, loss.old, loss.advantages, loss.mask, loss.denom, loss.cfg,
        ref_logprob=loss.ref, rollout_logprob=loss.rollout, **place,
    )  # fmt: skip
    return out.logprob, out.entropy, out.loss, out.metrics


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
