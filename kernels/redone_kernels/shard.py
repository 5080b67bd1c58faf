"""A tensor-parallel shard of the vocabulary, and the collectives a head needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SPLITS = 8  # of the whole vocabulary: 1, 2, 4 or 8 ranks hold whole splits, which merge to the same bits


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's rows of the head: global ids [start, start + real); rows beyond `real` are padding."""

    start: int
    real: int
    width: int  # rows of the weight here
    split: int  # columns that are reduced as one part
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls, weight: Tensor, start: int, vocab_size: int | None, group: dist.ProcessGroup | None, splits: int
    ) -> Shard:
        """The shard of weight [V_local, H]; the vocabulary is cut in `splits` parts of equal width."""
        width = weight.shape[0]
        ranks = 1 if group is None else dist.get_world_size(group)
        real = width if vocab_size is None else min(max(vocab_size - start, 0), width)
        return cls(start, real, width, max(-(-width * ranks // splits), 1), group)

    def gather(self, parts: Tensor) -> Tensor:
        """[S, 4, N] of this rank -> [ranks * S, 4, N] in vocabulary order, the same on every rank."""
        if self.group is None:
            return parts
        ranks = dist.get_world_size(self.group)
        out = [torch.empty_like(parts) for _ in range(ranks)]
        dist.all_gather(out, parts.contiguous(), group=self.group)
        return torch.cat(out)

    def reduce(self, partial: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial
