"""Sampling in plain torch: one token per row that depends on the row's distribution, seed and position only.

For engines whose own sampler knows no seed per request.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), as signed
# numbers: torch's int64 products wrap like unsigned ones.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """[n] fp64 in [0, 1) of [n] int64 seeds and positions; the same on every device."""
    return _shifted(_mixed(_mixed(seeds.long()) + positions.long() * _GAMMA), 11).double() * 2.0**-53


def restricted(logprobs: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """[n, vocabulary] log-probabilities of the top-k and the smallest set that holds top-p of the mass (both
    cuts taken from the same distribution), renormalised; -inf outside.

    Args:
        logprobs: [n, vocabulary] fp32, normalised.
        top_ks: [n] integer; the vocabulary or more: off.
        top_ps: [n] fp32; 1: off.
    """
    ordered, index = logprobs.sort(dim=-1, descending=True)
    probs = ordered.exp()
    before = probs.cumsum(-1) - probs
    rank = torch.arange(logprobs.shape[-1], device=logprobs.device)
    # The first one stays, whatever rounding makes of top_p.
    cut = (before >= top_ps[:, None]) & (top_ps[:, None] < 1) & (rank > 0)
    cut |= rank >= top_ks[:, None]
    kept = ordered.masked_fill(cut, float("-inf"))
    return torch.full_like(logprobs, float("-inf")).scatter_(-1, index, kept).log_softmax(-1)


def draw(logprobs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """[n] int64: a token per row of [n, vocabulary] log-probabilities, by inverting its cumulative mass."""
    mass = logprobs.double().exp().cumsum(-1)
    target = uniform(seeds, positions)[:, None] * mass[:, -1:]
    # right=True: never a token of no mass, whose cumulative mass equals its predecessor's.
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)
