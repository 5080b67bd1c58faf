"""Predicted seconds of every phase of a step. Structure and evidence: docs/planner.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redone.planner.hardware import DEFAULT, Constants
from redone.planner.job import Job, stack_factor
from redone.planner.lengths import microbatches, moments, survival

Values = float | NDArray[np.float64]

GRID = 48  # points over the longest response at which the decoding set is evaluated
CPU_OPTIMIZER_BYTES = (
    28  # read and written per parameter by Adam on the host: fp32 p, m, v twice and the gradient
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Seconds of one step. `tail` is the part of `rollout` that a never-draining batch would not need."""

    rollout: float
    tail: float
    logprobs: float
    update: float
    sync: float
    fixed: float
    step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTime:
    """Seconds of all updates of a step, and of one forward pass over its tokens."""

    updates: float
    forward: float
    microbatches: int  # per rank and update
    tokens: float  # of a mean micro-batch


def stage_seconds(job: Job, tokens: float, context: float, c: Constants, *, train: bool) -> float:
    """One micro-batch of `tokens` tokens through one pipeline stage: forward, or forward and backward."""
    model, lay = job.model, job.layout
    passes = (4 if lay.recompute else 3) if train else 1
    shards = lay.tensor * lay.context * lay.pipeline
    rate = lay.gpu.flops * (c.fp8_gain if lay.fp8 else 1.0)
    expert = 2 * tokens * model.active_expert / shards
    dense = 2 * tokens * (model.active - model.active_expert) / shards
    attention = 4 * model.attention_width * model.layers * context * tokens / shards
    busy = dense / (rate * c.gemm_dense) + expert / (rate * c.gemm_expert)
    busy = passes * (busy + attention / (lay.gpu.flops * c.gemm_dense))
    moe = model.moe_layers / model.layers
    floor = passes * model.layers / lay.pipeline * (c.layer_floor + moe * c.moe_floor) * 1e-3
    exchanges = (3 if lay.recompute else 2) if train else 1
    moved = _dispatch_seconds(job, tokens, c) + _tensor_seconds(job, tokens)
    return math.hypot(busy, floor) + exchanges * moved


def _dispatch_seconds(job: Job, tokens: float, c: Constants) -> float:
    """Expert all-to-all of one forward through a stage: there and back, inside and between nodes."""
    model, lay = job.model, job.layout
    if not model.moe_layers or lay.expert == 1:
        return 0.0
    size, node = lay.expert, lay.gpu.domain
    row = tokens / lay.context / lay.tensor * model.hidden * 2
    copies = min(model.top_k, size)
    per_node = lay.stack in ("bridge", "tuned")  # HybridEP sends one copy to a node
    far = max(0.0, 1 - node / size) * (min(size / node, copies) if per_node else copies)
    near = copies * (min(size, node) - 1) / size
    seconds = near / (c.dispatch * lay.gpu.link) + far / (c.network * 1e9)
    return 2 * model.moe_layers / lay.pipeline * row * seconds


def _tensor_seconds(job: Job, tokens: float) -> float:
    """Sequence-parallel gathers and scatters of one forward through a stage at NVLink's rate."""
    model, lay = job.model, job.layout
    if lay.tensor == 1:
        return 0.0
    sent = 4 * tokens / lay.context * model.hidden * 2 * (lay.tensor - 1) / lay.tensor
    return model.layers / lay.pipeline * sent / lay.gpu.link


def optimizer_seconds(job: Job, c: Constants) -> float:
    """Gradient reduction, parameter gathering, and Adam on the host where the optimizer lives there."""
    lay = job.layout
    local = job.model.local(lay.tensor, lay.pipeline, lay.expert, lay.expert_tensor)
    across = lay.train_gpus > lay.gpu.domain
    seconds = 6 * local / (c.network * 1e9 if across else c.dispatch * lay.gpu.link) if lay.data > 1 else 0.0
    if lay.cpu_optimizer:
        nodes = max(1, lay.train_gpus // lay.gpu.per_node)
        seconds += CPU_OPTIMIZER_BYTES * job.model.total / nodes / (c.cpu_optimizer * 1e9)
    return seconds


def train_time(job: Job, c: Constants) -> TrainTime:
    """Every rank runs the same number of micro-batches; the pipeline adds its bubble."""
    lay, work = job.layout, job.work
    count, tokens = microbatches(
        work.lengths, work.prompt_tokens, work.samples or 1, work.update_sequences, lay.budget, lay.data,
        lay.shared_prefix,
    )  # fmt: skip
    factor, bubble = stack_factor(lay, c), (lay.pipeline - 1) / lay.virtual
    context = mean_context(job)
    forward_backward = stage_seconds(job, tokens / count, context, c, train=True) * factor
    update = forward_backward * (count + bubble) + optimizer_seconds(job, c)
    joined = max(1.0, count / lay.logprob_batches)
    forward = stage_seconds(job, tokens / joined, context, c, train=False) * factor * (joined + bubble)
    return TrainTime(
        updates=work.updates * update,
        forward=_forward_steps(job) * forward,
        microbatches=count,
        tokens=tokens / count,
    )


def _forward_steps(job: Job) -> float:
    """Updates' worth of sequences in one pass over the whole batch."""
    return max(1.0, job.work.sequences / job.work.update_sequences) if job.work.sequences else 1.0


def mean_context(job: Job) -> float:
    """Tokens that a mean token of a training row attends to."""
    prompt, (mean, square) = job.work.prompt_tokens, moments(job.work.lengths)
    if not job.layout.shared_prefix:
        return (prompt**2 + 2 * prompt * mean + square) / (prompt + mean) / 2
    group = job.work.samples
    attended = prompt**2 / 2 + group * (prompt * mean + square / 2)
    return attended / (prompt + group * mean)


def decode_seconds(job: Job, sequences: Values, context: Values, c: Constants) -> NDArray[np.float64]:
    """One decode step of one engine with `sequences` sequences of mean context `context` (scalars or
    arrays)."""
    model, lay = job.model, job.layout
    ranks = lay.rollout_tensor
    touched = 1 - (1 - model.top_k / model.experts) ** np.asarray(sequences) if model.experts else 0.0
    weights = (2 * (model.dense - model.hidden * model.vocab) + 2 * model.expert * touched) * (
        0.5 if lay.fp8 else 1.0
    )
    cache = sequences * context * model.kv_bytes / min(ranks, model.kv_shards)
    memory = (weights / ranks + cache) / (lay.gpu.hbm * c.decode_hbm)
    compute = sequences * 2 * model.active / ranks / (lay.gpu.flops * c.gemm_dense)
    host = c.decode_step * 1e-3 + (model.layers * c.decode_layer + model.moe_layers * c.decode_moe) * 1e-6
    reduce = 2 * model.layers * c.allreduce * 1e-6 * math.log2(ranks) if ranks > 1 else 0.0
    return np.asarray(np.maximum(memory, compute) + host + reduce)


def kv_tokens(job: Job, c: Constants) -> float:
    """Tokens of KV cache that one engine holds; may be negative when its weights do not fit."""
    model, lay = job.model, job.layout
    ranks = lay.rollout_tensor
    room = ranks * (lay.gpu.memory * lay.utilization - c.reserve * 1e9) - 2 * model.total * (
        0.5 if lay.fp8 else 1.0
    )
    return room / (model.kv_bytes * max(1.0, ranks / model.kv_shards))


def kv_need(job: Job, c: Constants) -> tuple[float, float]:
    """(tokens of KV cache that the requests of one engine want, tokens per sequence)."""
    work, lay = job.work, job.layout
    engines = max(1, lay.rollout_gpus // lay.rollout_tensor)
    per_sequence = work.prompt_tokens / work.samples + c.kv_share * moments(work.lengths)[0]
    return work.sequences / engines * per_sequence, per_sequence


def rollout_seconds(job: Job, c: Constants) -> tuple[float, float]:
    """(seconds until the last response is complete, seconds at constant concurrency)."""
    model, lay, work = job.model, job.layout, job.work
    engines = max(1, lay.rollout_gpus // lay.rollout_tensor)
    each = work.sequences / engines
    prompts = max(work.prompts / engines, min(1.0, each))
    prefill = (
        prompts * work.prompt_tokens * 2 * model.active / lay.rollout_tensor / (lay.gpu.flops * c.gemm_dense)
    )
    mean, square = moments(work.lengths)
    flight = each * (work.ahead if lay.mode == "async" else 1)
    slots = max(1.0, min(flight, kv_tokens(job, c) / kv_need(job, c)[1], lay.max_sequences))
    busy = float(decode_seconds(job, slots, work.prompt_tokens + square / mean / 2, c))
    steady = prefill + each * mean / slots * busy
    if lay.mode == "async":
        return steady, steady
    reached, alive, width = survival(work.lengths, GRID)
    steps = decode_seconds(job, np.maximum(1.0, slots * alive), work.prompt_tokens + reached, c)
    waves = max(0.0, each / slots - 1) * mean * busy
    return prefill + width * float(steps.sum()) + waves, steady


def sync_seconds(job: Job, c: Constants) -> float:
    """Weights to the engines, with sleep and wake of both sides."""
    return 2 * job.model.total / (c.transition * 1e9 * math.sqrt(max(1.0, job.layout.gpus / 8)))


def predict(job: Job, c: Constants = DEFAULT) -> Phases:
    """Seconds of one step, each phase separately."""
    trained = train_time(job, c)
    rollout, steady = rollout_seconds(job, c)
    sync, logprobs = sync_seconds(job, c), job.work.forward_passes * trained.forward
    if job.layout.mode == "sync":
        step = rollout + logprobs + trained.updates + sync + c.fixed
    else:
        trainer = logprobs + trained.updates + c.fixed
        step = max(trainer, rollout) + c.overlap * min(trainer, rollout) + sync / 2
    return Phases(
        rollout=rollout,
        tail=max(0.0, rollout - steady),
        logprobs=logprobs,
        update=trained.updates,
        sync=sync,
        fixed=c.fixed,
        step=step,
    )
