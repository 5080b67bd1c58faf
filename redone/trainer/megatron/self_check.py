"""At start: responses behind a shared and behind their own prompt must get the same log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from redone.data.pack import empty_microbatch, pad_row
from redone.errors import TrainerError
from redone.trainer.megatron.step import forward_logprobs, row_multiple
from redone.types import Microbatch, Segment, Shard

COMPARED = 2  # responses
# (largest, mean) |difference| in nat; bf16 rounds differently in every kernel.
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.5, 0.05)}


def shared_rows(microbatch: Microbatch) -> list[tuple[Segment, tuple[int, int], slice]]:
    """(prompt segment, response span, its rows) of the first responses that share a prompt."""
    found = []
    at = 0
    for segment in microbatch.segments:
        for span in segment.responses:
            if len(segment.responses) > 1 and len(found) < COMPARED:
                found.append((segment, span, slice(at, at + span[1])))
            at += span[1]
    return found


def alone(microbatch: Microbatch, segment: Segment, span: tuple[int, int], multiple: int) -> Microbatch:
    """[prompt | response | padding]: the same response behind its own prompt."""
    start, length = span
    prompt = segment.length
    picked = np.r_[segment.start : segment.start + prompt, start : start + length]
    row = dataclasses.replace(
        empty_microbatch(multiple),
        token_ids=microbatch.token_ids[picked],
        positions=np.arange(len(picked), dtype=np.int32),
        token_weight=np.ones(len(picked), np.float32),
        segments=(Segment(start=0, length=prompt, responses=((prompt, length),)),),
        rows=np.arange(prompt - 1, prompt + length - 1, dtype=np.int32),
        targets=microbatch.token_ids[start : start + length],
        sequence_ids=np.zeros(length, np.int32),
        loss_mask=np.ones(length, np.bool_),
        advantages=np.zeros(length, np.float32),
        engine_logprobs=np.zeros(length, np.float32),
        routes=None if microbatch.routes is None else microbatch.routes[picked],
    )
    return pad_row(row, -(-len(picked) // multiple) * multiple)


def compare(models: Sequence[torch.nn.Module], shard: Shard, temperature: float, dtype: torch.dtype) -> None:
    """One micro-batch of every rank both ways. Collective; raises TrainerError when they differ."""
    multiple = row_multiple(models[0].config)
    first = shard.microbatches[0]
    pairs = shared_rows(first)
    rows = [first, *(alone(first, segment, span, multiple) for segment, span, _ in pairs)]
    rows += [empty_microbatch(multiple)] * (1 + COMPARED - len(rows))
    found = forward_logprobs(models, dataclasses.replace(shard, microbatches=tuple(rows)), temperature)
    worst = mean = 0.0
    if found is not None and pairs:
        ours = np.concatenate([found[0][where] for _, _, where in pairs])
        theirs = np.concatenate(found[1 : 1 + len(pairs)])
        difference = np.nan_to_num(np.abs(ours - theirs), nan=np.inf)
        worst, mean = float(difference.max()), float(difference.mean())
    everyone: list[tuple[float, float]] = [(0.0, 0.0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (worst, mean))
    worst, mean = max(w for w, _ in everyone), max(m for _, m in everyone)
    most, average = TOLERANCE[dtype]
    if worst > most or mean > average:
        raise TrainerError(
            f"prefix sharing changes log-probabilities by up to {worst:.2g} (mean {mean:.2g}); nothing was"
            " updated. Set trainer.prefix_sharing=false and report this"
        )
