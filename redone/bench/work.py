"""The work that is measured: synthetic or observed lengths, prompts of random tokens or of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from redone.config.schema import Config
from redone.planner.lengths import SIGMA, Lengths, from_file, truncated_lognormal
from redone.record.flops import model_flops, parameter_count
from redone.types import Batch, Message, Prompt, TrainGroup, Trajectory

RESERVED_IDS = 16  # low token ids are special in most vocabularies


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOptions:
    """What the configuration does not say. None: half of the configuration's longest."""

    prompts: Literal["synthetic", "data"] = "synthetic"
    prompt_tokens: int | None = None  # of a synthetic prompt
    response_tokens: float | None = None  # mean
    sigma: float = SIGMA  # of log response lengths; 0: all equal
    lengths_file: str | None = None  # observed response lengths, one a line


def group_lengths(cfg: Config, options: WorkOptions) -> tuple[int, ...]:
    """rollout.n response lengths that every group gets: even quantiles of the distribution, longest last.

    rollout.forced_lengths wins. Raises ConfigError when the mean exceeds data.max_response_length.
    """
    if cfg.rollout.forced_lengths:
        forced = cfg.rollout.forced_lengths
        return tuple(sorted(forced[i % len(forced)] for i in range(cfg.rollout.n)))
    cap = cfg.data.max_response_length
    lengths: Lengths
    if options.lengths_file:
        lengths = from_file(options.lengths_file, cap)
    else:
        mean = options.response_tokens or max(1.0, cap / 2)
        lengths = truncated_lognormal(mean, cap, options.sigma) if options.sigma else (mean,)
    places = (np.arange(cfg.rollout.n) + 0.5) / cfg.rollout.n * len(lengths)
    return tuple(max(1, round(lengths[int(place)])) for place in places)


def synthetic_prompts(cfg: Config, options: WorkOptions, vocab: int, count: int, seed: int) -> list[Prompt]:
    """`count` prompts of random token ids; no two calls with different seeds share a prefix."""
    tokens = options.prompt_tokens or max(1, cfg.data.max_prompt_length // 2)
    rng = np.random.default_rng([cfg.run.seed, seed, 0xBE])
    reward = next(iter(cfg.rewards))
    return [
        Prompt(
            id=f"synthetic-{seed}-{i}",
            task="synthetic",
            domain="general",
            data_source="synthetic",
            messages=(Message(role="user", content=f"synthetic {seed} {i}"),),
            token_ids=rng.integers(min(RESERVED_IDS, vocab - 1), vocab, tokens).astype(np.int32),
            reference="a",
            reward=reward,
        )
        for i in range(count)
    ]


def training_batch(cfg: Config, prompts: Sequence[Prompt], lengths: Sequence[int], vocab: int) -> Batch:
    """One rollout batch of random responses: half of each group with advantage 1, half with -1."""
    rng = np.random.default_rng([cfg.run.seed, len(prompts), 0xBA])

    def trajectory(length: int, sign: float) -> Trajectory:
        return Trajectory(
            token_ids=rng.integers(min(RESERVED_IDS, vocab - 1), vocab, length).astype(np.int32),
            loss_mask=np.ones(length, np.bool_),
            advantages=np.full(length, sign, np.float32),
            engine_logprobs=np.full(length, -2.0, np.float32),
        )

    return Batch.of(
        [
            TrainGroup(
                prompt_id=prompt.id,
                prompt_ids=prompt.token_ids,
                trajectories=tuple(trajectory(n, 1.0 if i % 2 else -1.0) for i, n in enumerate(lengths)),
            )
            for prompt in prompts
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What a batch holds and costs at least."""

    tokens: int  # prompt and response tokens of every sample, as verl counts
    computed: int  # with every prompt once per group
    responses: int  # response tokens
    forward_flops: float  # of `computed` tokens, head on response rows only


def amounts(prompts: Sequence[int], groups: Sequence[Sequence[int]], hf: Mapping[str, Any]) -> Amounts:
    """`prompts[g]`: tokens of prompt g, `groups[g]`: its responses' lengths; `hf`: config.json."""
    flops = model_flops(hf)
    tokens = computed = responses = 0
    total = 0.0
    for prompt, lengths in zip(prompts, groups, strict=True):
        answered = sum(lengths)
        tokens += prompt * len(lengths) + answered
        computed += prompt + answered
        responses += answered
        total += flops.sequence(prompt, 0)
        for n in lengths:
            total += flops.sequence(prompt, n) - flops.sequence(prompt, 0)
    return Amounts(tokens=tokens, computed=computed, responses=responses, forward_flops=total)


def batch_amounts(batch: Batch, hf: Mapping[str, Any]) -> Amounts:
    lengths = [[len(t.token_ids) for t in group.trajectories] for group in batch.groups]
    return amounts([len(group.prompt_ids) for group in batch.groups], lengths, hf)


def weight_bytes(hf: Mapping[str, Any], dtype: str) -> float:
    """Bytes of all weights that a decode step with many sequences reads (an input embedding is looked up)."""
    count = parameter_count(hf)
    if not hf.get("tie_word_embeddings"):
        count -= int(hf["hidden_size"]) * int(hf["vocab_size"])
    return count * (4.0 if dtype == "float32" else 2.0)
