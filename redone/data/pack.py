"""Plan an optimizer step and pack its micro-batches. Pure numpy: the driver runs it, the ranks obey.

The unit is a piece: samples of one group that share a copy of their prompt; it costs P + sum(R) tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redone.data.balance import Bin, Cost, Units, fill, make_units
from redone.errors import TrainerError
from redone.types import (
    Batch,
    FloatArray,
    IntArray,
    Microbatch,
    Piece,
    RouteArray,
    Segment,
    Shard,
    StepPlan,
    TrainGroup,
    Trajectory,
)


def plan_step(
    batch: Batch, dp: int, max_tokens: int, prefix_sharing: bool, cost: Cost | None = None
) -> StepPlan:
    """Place every sample exactly once, at most `max_tokens` tokens per micro-batch (padding not counted).

    With `prefix_sharing` a group stays together as far as budget and balance allow, unless sharing does not
    pay (balance.SHARING_PAYS); without it every sample carries its own prompt. All ranks get the same number
    of micro-batches, and those that run at the same time cost nearly the same. Deterministic. Raises
    TrainerError when one prompt and response alone exceed the budget.
    """
    cost = cost or Cost()
    prompts = [len(group.prompt_ids) for group in batch.groups]
    lengths = [[len(t.token_ids) for t in group.trajectories] for group in batch.groups]
    for group, prompt, own in zip(batch.groups, prompts, lengths, strict=True):
        longest = max(own, default=0)
        if prompt + longest > max_tokens:
            raise TrainerError(
                f"trainer.max_token_len_per_rank={max_tokens} is less than prompt + response of"
                f" {group.prompt_id} ({prompt} + {longest} tokens); raise it to at least {prompt + longest}"
            )
    units = make_units(prompts, lengths, prefix_sharing, cost)
    slots = fill(units, dp, max_tokens, cost)
    return StepPlan(slots=tuple(tuple(_pieces(units, b) for b in slot) for slot in slots))


def _pieces(units: Units, content: Bin) -> tuple[Piece, ...]:
    """In the order of groups; of equal groups, by sample."""
    return tuple(
        Piece(group=units.group[u], samples=_samples(units.samples[u], part))
        for u, part in sorted(content.parts.items())
    )


def _samples(samples: tuple[int, ...], part: tuple[int, ...]) -> tuple[int, ...]:
    return samples if len(part) == len(samples) else tuple(samples[k] for k in sorted(part))


def token_ratio(batch: Batch, plan: StepPlan) -> float:
    """Tokens of the unshared batch per token that the plan computes (metric prefix/token_ratio)."""
    unshared = computed = 0
    for piece in (p for slot in plan.slots for pieces in slot for p in pieces):
        group = batch.groups[piece.group]
        prompt = len(group.prompt_ids)
        responses = sum(len(group.trajectories[i].token_ids) for i in piece.samples)
        unshared += prompt * len(piece.samples) + responses
        computed += prompt + responses
    return unshared / max(1, computed)


def build_shards(batch: Batch, plan: StepPlan, pad_multiple: int) -> list[Shard]:
    """shards[d]: the micro-batches of data-parallel rank d, rows padded to a multiple of `pad_multiple`."""
    dp = len(plan.slots[0])
    return [
        Shard(
            microbatches=tuple(pack(batch, row[d], pad_multiple) for row in plan.slots),
            num_loss_tokens=batch.num_loss_tokens,
            num_sequences=batch.num_sequences,
        )
        for d in range(dp)
    ]


def pack(batch: Batch, pieces: Sequence[Piece], pad_multiple: int) -> Microbatch:
    """One row: [prompt | r_1 | ... | r_n] per piece, then padding. No pieces: a row of padding only."""
    samples = [(batch.groups[p.group], p) for p in pieces]
    segments, start = [], 0
    ids: list[IntArray] = []
    positions: list[IntArray] = []
    weights: list[FloatArray] = []
    rows: list[IntArray] = []
    for group, piece in samples:
        segment, start = _append_piece(group, piece, start, ids, positions, weights, rows)
        segments.append(segment)
    padding = -start % pad_multiple if start else pad_multiple
    if padding:
        segments.append(Segment(start=start, length=padding, responses=()))
        ids.append(np.zeros(padding, np.int32))
        positions.append(np.arange(padding, dtype=np.int32))
        weights.append(np.zeros(padding, np.float32))
    trajectories = [group.trajectories[i] for group, piece in samples for i in piece.samples]
    lengths = [len(t.token_ids) for t in trajectories]
    return Microbatch(
        token_ids=np.concatenate(ids),
        positions=np.concatenate(positions),
        token_weight=np.concatenate(weights),
        segments=tuple(segments),
        rows=_join(rows, np.int32),
        targets=_join([t.token_ids for t in trajectories], np.int32),
        sequence_ids=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        loss_mask=_join([t.loss_mask for t in trajectories], np.bool_),
        advantages=_join([t.advantages for t in trajectories], np.float32),
        engine_logprobs=_join([t.engine_logprobs for t in trajectories], np.float32),
        old_logprobs=_optional(trajectories, lambda t: t.old_logprobs),
        ref_logprobs=_optional(trajectories, lambda t: t.ref_logprobs),
        pieces=tuple(pieces),
        routes=_routes(samples, padding),
    )


def _routes(samples: Sequence[tuple[TrainGroup, Piece]], padding: int) -> RouteArray | None:
    """[T, L, K] choices of the row's tokens; None when no group carries any. Some with and some without is a
    bug upstream."""
    parts: list[RouteArray | None] = []
    for group, piece in samples:
        parts.append(group.prompt_routes)
        parts += [group.trajectories[i].routes for i in piece.samples]
    present = [p for p in parts if p is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise TrainerError(f"{len(parts) - len(present)} of {len(parts)} prompts and responses lack routes")
    joined: RouteArray = np.concatenate([*present, _any_routes(padding, *present[0].shape[1:])])
    return joined


def empty_microbatch(tokens: int) -> Microbatch:
    """A row of `tokens` padding tokens."""
    return pack(Batch(groups=(), num_loss_tokens=0, num_sequences=0), (), tokens)


def pad_row(microbatch: Microbatch, tokens: int) -> Microbatch:
    """The row with padding behind it, `tokens` long; unchanged when it is that long already."""
    length = len(microbatch.token_ids)
    padding = tokens - length
    if padding <= 0:
        return microbatch
    routes = microbatch.routes
    if routes is not None:
        routes = np.concatenate([routes, _any_routes(padding, *routes.shape[1:])])
    return dataclasses.replace(
        microbatch,
        token_ids=np.pad(microbatch.token_ids, (0, padding)),
        positions=np.concatenate([microbatch.positions, np.arange(padding, dtype=np.int32)]),
        token_weight=np.pad(microbatch.token_weight, (0, padding)),
        segments=(*microbatch.segments, Segment(start=length, length=padding, responses=())),
        routes=routes,
    )


def _any_routes(tokens: int, layers: int, choices: int) -> RouteArray:
    """For tokens whose choice does not matter; the choices of one token must differ."""
    return np.broadcast_to(np.arange(choices, dtype=np.int16), (tokens, layers, choices))


def _append_piece(
    group: TrainGroup,
    piece: Piece,
    start: int,
    ids: list[IntArray],
    positions: list[IntArray],
    weights: list[FloatArray],
    rows: list[IntArray],
) -> tuple[Segment, int]:
    """Append one piece at `start`; returns its segment and where the next piece starts.

    The first token of every response is predicted by the prompt's last row, token j > 0 by the
    response's row j - 1.
    """
    prompt = len(group.prompt_ids)
    ids.append(group.prompt_ids)
    positions.append(np.arange(prompt, dtype=np.int32))
    weights.append(np.full(prompt, len(piece.samples), np.float32))
    at, responses = start + prompt, []
    for i in piece.samples:
        tokens = group.trajectories[i].token_ids
        ids.append(tokens)
        positions.append(np.arange(prompt, prompt + len(tokens), dtype=np.int32))
        weights.append(np.ones(len(tokens), np.float32))
        row = np.arange(at - 1, at + len(tokens) - 1, dtype=np.int32)
        row[:1] = start + prompt - 1
        rows.append(row)
        responses.append((at, len(tokens)))
        at += len(tokens)
    return Segment(start=start, length=prompt, responses=tuple(responses)), at


def _join(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _optional(
    trajectories: Sequence[Trajectory], get: Callable[[Trajectory], FloatArray | None]
) -> FloatArray | None:
    """Concatenated field, or None when no trajectory has it. Some with and some without is a bug upstream."""
    values = [get(t) for t in trajectories]
    present = [v for v in values if v is not None]
    if not present:
        return None
    if len(present) != len(values):
        raise TrainerError(
            f"{len(values) - len(present)} of {len(values)} trajectories lack log-probabilities"
        )
    return _join(present, np.float32)


def scatter_rows(
    batch: Batch, plan: StepPlan, rows: Sequence[Sequence[FloatArray]]
) -> list[list[FloatArray]]:
    """rows[d][m]: [N] of micro-batch m on rank d -> result[g][i]: [R] of trajectory i of group g."""
    result: list[list[FloatArray | None]] = [[None] * len(g.trajectories) for g in batch.groups]
    for m, slot in enumerate(plan.slots):
        for d, pieces in enumerate(slot):
            values, at = rows[d][m], 0
            for piece in pieces:
                for i in piece.samples:
                    length = len(batch.groups[piece.group].trajectories[i].token_ids)
                    result[piece.group][i] = values[at : at + length]
                    at += length
            if at != len(values):
                raise TrainerError(
                    f"rank {d} returned {len(values)} rows for micro-batch {m}; the plan has {at}"
                )
    return [[_placed(v) for v in group] for group in result]


def scatter_routes(batch: Batch, plan: StepPlan, routes: Sequence[Sequence[RouteArray]]) -> Batch:
    """routes[d][m]: [T, L, K] of micro-batch m on rank d -> the batch with every token's choices.

    Where a group was split, its prompt's routes are those of the first piece.
    """
    groups = list(batch.groups)
    for m, slot in enumerate(plan.slots):
        for d, pieces in enumerate(slot):
            at = 0
            for piece in pieces:
                group = groups[piece.group]
                trajectories = list(group.trajectories)
                end = at + len(group.prompt_ids)
                prompt = routes[d][m][at:end] if group.prompt_routes is None else group.prompt_routes
                for i in piece.samples:
                    at, end = end, end + len(trajectories[i].token_ids)
                    trajectories[i] = dataclasses.replace(trajectories[i], routes=routes[d][m][at:end])
                at = end
                groups[piece.group] = dataclasses.replace(
                    group, prompt_routes=prompt, trajectories=tuple(trajectories)
                )
    return dataclasses.replace(batch, groups=tuple(groups))


def _placed(value: FloatArray | None) -> FloatArray:
    if value is None:
        raise TrainerError("a trajectory was not placed by the step plan")
    return value
