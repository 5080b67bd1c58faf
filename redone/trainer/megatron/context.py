"""Context parallelism: the tokens of a packed row are cut over the ranks of a group.

The row is cut into 2 * size equal chunks; rank r holds chunks r and 2 * size - 1 - r, so that causal
attention costs every rank nearly the same. A rank computes its own tokens only. A sequence within a chunk
attends to itself as ever; what else its queries see is exchanged: the prompt of a response, and the earlier
part of a sequence that a chunk's edge cuts. Keys and values of exactly these rows are all-gathered, and their
gradient is reduce-scattered; responses that no edge cuts are never sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from redone.types import Microbatch, Segment

Span = tuple[int, int]  # (start, length)
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cross:
    """The queries at own rows [first, last) see every key of `keys`."""

    first: int
    last: int
    keys: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank computes: parts of sequences, which attend to themselves, and what else they see."""

    spans: tuple[Span, ...]  # own rows, in order, all of them
    crosses: tuple[Cross, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Which keys and values travel. The exchanged rows, in row order, are `gathered[order]`."""

    send: Tensor  # [n] own rows to send, n the same on every rank (padded with row 0)
    order: Tensor  # [K] into the [size * n] gathered rows


def place() -> tuple[int, int]:
    """(rank, size) of this process's context group."""
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def _ranges(tokens: int, rank: int, size: int) -> list[Span]:
    """[first, last) ranges of the row that a rank holds, in the order of its own rows."""
    if size == 1:
        return [(0, tokens)]
    if tokens % (2 * size):
        raise ValueError(f"a row of {tokens} tokens cannot be cut into 2 x {size} chunks")
    chunk = tokens // (2 * size)
    if rank == size - 1:  # its two chunks are neighbours
        return [(rank * chunk, (rank + 2) * chunk)]
    late = 2 * size - 1 - rank
    return [(rank * chunk, (rank + 1) * chunk), (late * chunk, (late + 1) * chunk)]


def own_tokens(tokens: int, rank: int, size: int) -> Rows:
    """[T / size] rows of the whole row that `rank` holds, in its own order."""
    return np.concatenate([np.arange(a, b) for a, b in _ranges(tokens, rank, size)])


def _own_sequence_rows(microbatch: Microbatch, rank: int, size: int) -> tuple[Rows, Rows]:
    """(which of the N response rows a rank holds, where they are among its own rows)."""
    tokens = len(microbatch.token_ids)
    inverse = np.full(tokens, -1, np.int64)
    inverse[own_tokens(tokens, rank, size)] = np.arange(tokens // size)
    where = inverse[microbatch.rows]
    mine = np.flatnonzero(where >= 0)
    return mine, where[mine]


def part(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """This rank's tokens and response rows; `segments` and `pieces` stay those of the whole row."""
    if size == 1:
        return microbatch
    tokens = own_tokens(len(microbatch.token_ids), rank, size)
    mine, rows = _own_sequence_rows(microbatch, rank, size)
    old, reference, routes = microbatch.old_logprobs, microbatch.ref_logprobs, microbatch.routes
    return dataclasses.replace(
        microbatch,
        token_ids=microbatch.token_ids[tokens],
        positions=microbatch.positions[tokens],
        token_weight=microbatch.token_weight[tokens],
        rows=rows.astype(np.int32),
        targets=microbatch.targets[mine],
        sequence_ids=microbatch.sequence_ids[mine],
        loss_mask=microbatch.loss_mask[mine],
        advantages=microbatch.advantages[mine],
        engine_logprobs=microbatch.engine_logprobs[mine],
        old_logprobs=None if old is None else old[mine],
        ref_logprobs=None if reference is None else reference[mine],
        routes=None if routes is None else routes[tokens],
    )


def cut(segments: Sequence[Segment], rank: int, size: int) -> Cut:
    """The part of `rank`; keys of its crosses are rows of the whole row."""
    spans: list[Span] = []
    crosses: list[Cross] = []
    at = 0
    for low, high in _ranges(_end(segments), rank, size):
        for keys, first, length in _pieces(segments, low, high):
            own = at + first - low
            spans.append((own, length))
            if not keys:
                continue
            last = crosses[-1] if crosses else None
            if last is not None and last.keys == keys and last.last == own:  # the prompt's next response
                crosses[-1] = Cross(last.first, own + length, keys)
            else:
                crosses.append(Cross(own, own + length, keys))
        at += high - low
    return Cut(tuple(spans), tuple(crosses))


def _end(segments: Sequence[Segment]) -> int:
    last = segments[-1]
    return max(start + length for start, length in ((last.start, last.length), *last.responses))


def _pieces(segments: Sequence[Segment], low: int, high: int) -> Iterator[tuple[tuple[Span, ...], int, int]]:
    """(keys seen before itself, start, length) of every part of a sequence within [low, high)."""
    for segment in segments:
        if segment.start >= high:
            return
        prompt = (segment.start, segment.length)
        for start, length in (prompt, *segment.responses):
            first, last = max(start, low), min(start + length, high)
            if first < last:
                keys = () if start == segment.start else (prompt,)
                yield keys if first == start else (*keys, (start, first - start)), first, last - first


def plan(
    segments: Sequence[Segment], rank: int, size: int, device: torch.device
) -> tuple[Cut, Exchange | None]:
    """The part of `rank`, and what the group exchanges for it (None: nothing).

    With an exchange the keys of crosses are rows of the exchanged tensor, else own rows.
    """
    if size == 1:
        return cut(segments, 0, 1), None
    tokens = _end(segments)
    cuts = [cut(segments, r, size) for r in range(size)]
    needed = np.zeros(tokens, np.bool_)
    for start, length in (span for c in cuts for cross in c.crosses for span in cross.keys):
        needed[start : start + length] = True
    if not needed.any():
        return cuts[rank], None
    place_of = np.cumsum(needed) - 1
    owned = [own_tokens(tokens, r, size) for r in range(size)]
    sent = [np.flatnonzero(needed[own]) for own in owned]
    width = max(len(rows) for rows in sent)
    order = np.empty(int(needed.sum()), np.int64)
    for r, (own, rows) in enumerate(zip(owned, sent, strict=True)):
        order[place_of[own[rows]]] = r * width + np.arange(len(rows))
    send = np.pad(sent[rank], (0, width - len(sent[rank])))
    crosses = tuple(
        dataclasses.replace(c, keys=tuple((int(place_of[start]), length) for start, length in c.keys))
        for c in cuts[rank].crosses
    )
    exchange = Exchange(torch.from_numpy(send).to(device), torch.from_numpy(order).to(device))
    return Cut(cuts[rank].spans, crosses), exchange


def gather_keys(key: Tensor, value: Tensor, exchange: Exchange) -> Tensor:
    """key, value [T / size, kv, d] -> [K, 2, kv, d], of the exchanged rows. Collective, differentiable."""
    sent = torch.stack([key, value], 1).index_select(0, exchange.send)
    group = parallel_state.get_context_parallel_group()
    found: Tensor = gather_from_sequence_parallel_region(sent, group=group)
    return found.index_select(0, exchange.order)


def join_rows(values: Tensor, microbatch: Microbatch) -> Tensor:
    """values [n] of this rank's response rows -> [N] of the whole row. Collective.

    Every rank gets all of them; the gradient that reaches this rank is that of its own values as ITS loss
    sees them: a loss that every rank computes alike is differentiated once, not `size` times.
    """
    _, size = place()
    if size == 1:
        return values
    held = [_own_sequence_rows(microbatch, r, size)[0] for r in range(size)]
    width = max(len(rows) for rows in held)
    if width == 0:
        return values
    order = np.empty(len(microbatch.rows), np.int64)
    for r, rows in enumerate(held):
        order[rows] = r * width + np.arange(len(rows))
    padded = torch.cat([values, values.new_zeros(width - len(values))])
    group = parallel_state.get_context_parallel_group()
    joined: Tensor = gather_from_sequence_parallel_region(
        padded, tensor_parallel_output_grad=False, group=group
    )
    return joined.index_select(0, torch.from_numpy(order).to(values.device))


@torch.no_grad()
def join_tokens(x: Tensor) -> Tensor:
    """[T / size, ...] of this rank's tokens -> [T, ...] in row order. Collective, without gradient."""
    _, size = place()
    if size == 1:
        return x
    joined: Tensor = gather_from_sequence_parallel_region(
        x.contiguous(), group=parallel_state.get_context_parallel_group()
    )
    held = np.concatenate([own_tokens(len(joined), r, size) for r in range(size)])
    return joined.index_select(0, torch.from_numpy(np.argsort(held)).to(x.device))
