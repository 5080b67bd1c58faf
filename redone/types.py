"""Values that flow between the parts: frozen, closed, plain numpy; shapes and dtypes stand at each field.

Arrays are numpy, not torch, because every value here crosses a process border (Ray passes numpy uncopied)
and the driver must not need a device. Nothing here does more than derive one value from another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
RouteArray = NDArray[np.int16]

Finish = Literal["stop", "length", "abort"]
Policy = Literal["actor", "reference"]
ScoreStatus = Literal["ok", "error", "timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str  # "system" | "user" | "assistant"
    content: str
    trained: bool = True  # of an assistant turn: supervised training imitates it, or it is context only


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    id: str  # stable over epochs and restarts: the ledger, the seeds and the resume rely on it
    task: str
    domain: str  # "sns" | "general"
    data_source: str
    messages: tuple[Message, ...]
    token_ids: IntArray  # [P] int32, chat template applied, ready for the engine
    reference: Any  # the ground truth as the data holds it
    reward: str  # key of config.rewards
    extra: Mapping[str, Any] = field(default_factory=dict)  # the user's extra_info
    max_tokens: int | None = None  # longest response of its task; None: data.max_response_length


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled under weight version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of one request. temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: off
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    lengths: tuple[int, ...] = ()  # one per seed: exactly so many tokens (fixed workloads), with ignore_eos
    routes: bool = False  # Completion's expert choices as well; config.replay.replays_engine

    def within(self, limit: int | None) -> Sampling:
        """The same with at most `limit` tokens (Prompt.max_tokens)."""
        return dataclasses.replace(self, max_tokens=min(limit or self.max_tokens, self.max_tokens))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    token_ids: IntArray  # [R] int32, the stop token included when one was sampled
    text: str  # decoded once, special tokens stripped
    logprobs: FloatArray  # [R] fp32, engine's, of the distribution sampled from (after temperature, top-p)
    finish: Finish
    versions: tuple[VersionSpan, ...]
    prompt_experts: RouteArray | None = None  # [P, L, K] expert ids; one array for all that share the prompt
    routed_experts: RouteArray | None = None  # [R - 1, L, K] of the response; its last token was never routed


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    raw: float  # in [0, 1], unshaped: dynamic sampling and diagnosis read this one
    value: float  # what the advantage sees (shaped, may be negative)
    correct: bool  # raw >= the task's threshold
    parts: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    status: ScoreStatus = "ok"  # anything else: the rollout is dropped and counted, never scored 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    prompt: Prompt
    completion: Completion
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """The G rollouts of one prompt."""

    prompt: Prompt
    epoch: int
    rollouts: tuple[Rollout, ...]

    def informative(self, eps: float) -> bool:
        """True iff the raw rewards differ by more than eps: only then the group carries a gradient."""
        raw = [r.score.raw for r in self.rollouts]
        return len(raw) > 1 and max(raw) - min(raw) > eps


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One response, once text and rewards are gone. All arrays have length R."""

    token_ids: IntArray  # [R] int32
    loss_mask: NDArray[np.bool_]  # [R] tokens that enter the loss
    advantages: FloatArray  # [R] fp32
    engine_logprobs: FloatArray  # [R] fp32, rollout engine's
    old_logprobs: FloatArray | None = None  # [R] fp32, trainer's, at the start of the step
    ref_logprobs: FloatArray | None = None  # [R] fp32, reference policy's (KL only)
    version: int = 0  # oldest weight version that any token was sampled under
    routes: RouteArray | None = None  # [R, L, K] expert of every token, MoE layer and choice (replay)

    @staticmethod
    def unscored(token_ids: IntArray) -> Trajectory:
        """A response that is only to be scored: no advantage, no engine."""
        zeros = np.zeros(len(token_ids), np.float32)
        return Trajectory(
            token_ids=token_ids,
            loss_mask=np.ones(len(token_ids), np.bool_),
            advantages=zeros,
            engine_logprobs=zeros,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainGroup:
    """A prompt, once, and the responses that share it."""

    prompt_id: str
    prompt_ids: IntArray  # [P] int32, P >= 1
    trajectories: tuple[Trajectory, ...]
    prompt_routes: RouteArray | None = None  # [P, L, K]; a shared prompt has one route per token


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Data of one or more optimizer steps; `num_loss_tokens` is THE denominator of a token-level loss."""

    groups: tuple[TrainGroup, ...]
    num_loss_tokens: int  # sum of all loss masks
    num_sequences: int  # responses with at least one loss token: denominator of sequence-level losses

    @staticmethod
    def of(groups: Sequence[TrainGroup]) -> Batch:
        masks = [t.loss_mask for g in groups for t in g.trajectories]
        return Batch(
            groups=tuple(groups),
            num_loss_tokens=int(sum(int(m.sum()) for m in masks)),
            num_sequences=sum(bool(m.any()) for m in masks),
        )

    def split(self, parts: int) -> tuple[Batch, ...]:
        """Cut by prompt into `parts` optimizer steps of nearly equal size, each with its own denominators."""
        if not 1 <= parts <= len(self.groups):
            raise ValueError(f"cannot cut {len(self.groups)} groups into {parts} optimizer steps")
        edges = [round(i * len(self.groups) / parts) for i in range(parts + 1)]
        return tuple(Batch.of(self.groups[a:b]) for a, b in pairwise(edges))

    @property
    def has_routes(self) -> bool:
        """Whether the batch carries expert choices: all of it does, or none."""
        return any(g.prompt_routes is not None for g in self.groups)

    def without_routes(self) -> Batch:
        """The same batch, with every choice left to the router."""
        if not self.has_routes:
            return self
        groups = []
        for group in self.groups:
            bare = tuple(dataclasses.replace(t, routes=None) for t in group.trajectories)
            groups.append(dataclasses.replace(group, trajectories=bare, prompt_routes=None))
        return dataclasses.replace(self, groups=tuple(groups))

    def with_logprobs(
        self, name: Literal["old_logprobs", "ref_logprobs"], values: Sequence[Sequence[FloatArray]]
    ) -> Batch:
        """values[g][i]: [R] fp32 of trajectory i of group g."""
        groups = []
        for group, per_group in zip(self.groups, values, strict=True):
            filled = []
            for trajectory, logprobs in zip(group.trajectories, per_group, strict=True):
                if logprobs.shape != trajectory.token_ids.shape:
                    raise ValueError(
                        f"{name} of {group.prompt_id}: {logprobs.shape} for {trajectory.token_ids.shape}"
                    )
                filled.append(
                    dataclasses.replace(trajectory, old_logprobs=logprobs)
                    if name == "old_logprobs"
                    else dataclasses.replace(trajectory, ref_logprobs=logprobs)
                )
            groups.append(dataclasses.replace(group, trajectories=tuple(filled)))
        return dataclasses.replace(self, groups=tuple(groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Samples of one group that share a copy of its prompt in one micro-batch."""

    group: int  # index into Batch.groups
    samples: tuple[int, ...]  # indices into TrainGroup.trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """slots[m][d]: the pieces of micro-batch m on data-parallel rank d. Every rank has the same number of
    micro-batches, every sample is placed exactly once; an empty slot runs one padding token."""

    slots: tuple[tuple[tuple[Piece, ...], ...], ...]

    @property
    def num_microbatches(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Where a piece lies in the packed row: prompt at [start, start + length), its responses right behind."""

    start: int
    length: int
    responses: tuple[tuple[int, int], ...]  # (start, length) each, contiguous, in order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """One packed row of T tokens: [prompt | r_1 | ... | r_n] per piece, then padding (own segment, weight 0).

    N = number of response tokens. rows[j] is the position in [0, T) whose hidden state predicts targets[j].
    """

    token_ids: IntArray  # [T]
    positions: IntArray  # [T] rotary positions; every response continues its prompt's positions
    token_weight: FloatArray  # [T] how often the token would stand in the unshared batch (0 on padding)
    segments: tuple[Segment, ...]
    rows: IntArray  # [N]
    targets: IntArray  # [N]
    sequence_ids: IntArray  # [N] index of the response within this micro-batch
    loss_mask: NDArray[np.bool_]  # [N]
    advantages: FloatArray  # [N]
    engine_logprobs: FloatArray  # [N]
    old_logprobs: FloatArray | None  # [N]
    ref_logprobs: FloatArray | None  # [N]
    pieces: tuple[Piece, ...]  # which samples the rows belong to, in row order
    routes: RouteArray | None = None  # [T, L, K] expert choices to repeat; None: the router chooses


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shard:
    """What one data-parallel rank gets for one pass: micro-batches, and the whole step's denominators."""

    microbatches: tuple[Microbatch, ...]
    num_loss_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One optimizer step. `metrics` carries verl's names (actor/pg_loss, actor/pg_clipfrac, ...)."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool  # the optimizer refused the step (non-finite gradients)
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CanaryReading:
    """What one engine says about the canary's tokens, at temperature 1."""

    scores: tuple[FloatArray, ...]  # per sequence [len - 1], computed from scratch
    probe_ids: IntArray  # [k] what it wrote behind the probe prompt, whose prefix it may have cached
    probe_logprobs: FloatArray  # [k]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """A Hugging Face tensor in the flat weight space."""

    name: str
    dtype: str  # torch dtype name: "float32", "bfloat16", ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the weight space, 64-byte aligned
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """Which tensor lies where. Computed once from HF names and shapes on both sides; hashes must agree."""

    tensors: tuple[TensorMeta, ...]
    buckets: tuple[tuple[int, int], ...]  # [first, last) tensor index of each bucket
    total_bytes: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """One published bucket: where its bytes are and what they hash to."""

    version: int
    index: int
    location: (
        str  # channel's address, e.g. the path of a shared-memory file that holds the whole weight space
    )
    digests: tuple[int, ...]  # xxh3_64 of each tensor's bytes, in plan order
    # Delta updates: an engine that holds version `base` completely may leave out the tensors `unchanged`
    # (indices within the bucket); their bytes are there all the same. None: load everything.
    base: int | None = None
    unchanged: tuple[int, ...] = ()
    written: int = 0  # bytes that this publication wrote for the bucket
    gathered: int = 0  # bytes that rank 0 received from other ranks for it
