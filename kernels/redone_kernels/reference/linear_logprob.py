"""Log-probability and entropy of a language-model head, from whole logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    logprobs: Tensor  # [N] fp32 (fp64 for fp64 inputs)
    entropy: Tensor  # [N] same dtype


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """Log-probability of `targets` and entropy under softmax(hidden @ weight.T / temperature).

    hidden [N, H], weight [V, H] any floating dtype; targets [N] integer in [0, vocab_size); rows of
    `weight` from `vocab_size` on are padding and take no part. The logits are formed in the inputs' dtype
    and everything after them in fp32 (fp64 for fp64 inputs).
    """
    logits = hidden @ weight[:vocab_size].T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_probs = torch.log_softmax(logits, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return TokenLogprobs(
        logprobs=log_probs.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1), entropy=entropy
    )
