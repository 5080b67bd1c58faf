"""`redone plan`: one configuration on N nodes of a GPU as a plan, and the gate before a launch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redone.config.schema import Config
from redone.errors import ConfigError
from redone.layout import ModelShape, check_layout
from redone.planner.hardware import DEFAULT, Constants, Gpu, gpu
from redone.planner.job import Job, Layout, Workload
from redone.planner.layouts import MARGIN, Candidate, assess, fastest, fitting, legal_layouts, nearest
from redone.planner.lengths import SIGMA, Lengths, from_file, moments, truncated_lognormal
from redone.planner.memory import TrainerRanks
from redone.planner.models import planned
from redone.planner.phases import Sizes, cache_margin
from redone.record.flops import model_flops

GB = 1e9
# How much slower the trainer may be than counted: published packed runs with context parallelism.
CONTEXT_SCATTER = (1, 5, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the configuration does not say. None: assumed, and the report says so."""

    nodes: int
    gpu: str | Gpu  # a name of the table, or a row of its own
    prompt_tokens: float | None = None  # mean
    response_tokens: float | None = None  # mean
    sigma: float = SIGMA  # of log response lengths
    lengths_file: str | None = None  # observed response lengths
    host_memory: float | None = None  # bytes per node
    trainer_sleeps: bool = False
    cpu_optimizer: bool = False
    rollout_nodes: int = 0  # > 0: asynchronous, engines on nodes of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A prediction. `refused`: what cannot be predicted, and why; the seconds then mean nothing."""

    name: str
    chosen: Candidate
    refused: tuple[str, ...]
    sensitivity: tuple[tuple[str, float], ...]  # (if, step seconds) over what is not known, when refused
    near: tuple[Candidate, ...]
    best: tuple[Candidate, ...]
    band: float  # P10-P90 as a factor
    tokens: float  # per step
    update_mfu: float
    step_mfu: float
    assumed: tuple[str, ...]


def make_plan(cfg: Config, hf: Mapping[str, Any], options: Options, c: Constants = DEFAULT) -> Plan:
    """Plan `cfg` with the model of config.json `hf`. Raises ConfigError when the layout is not legal
    there."""
    try:
        shape = ModelShape.from_hf(hf)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"model.path={cfg.model.path}: {error}; the planner needs its sizes") from error
    job, assumed = describe_job(cfg, shape, options)
    if problems := check_layout(cfg.trainer.parallel, job.layout.train_gpus, shape):
        raise ConfigError("; ".join(problems))
    sizes = _sizes(cfg, shape, options, job)
    chosen = assess(job, sizes, c)
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    offload = job.layout.cpu_optimizer
    candidates = fitting(job, sizes, legal_layouts(job, longest=longest, offload=offload), c)
    refused = tuple(_refusals(job, c))
    update_mfu, step_mfu = _mfu(job, hf, chosen)
    return Plan(
        name=cfg.run.name,
        chosen=chosen,
        refused=refused,
        sensitivity=tuple(_sensitivity(chosen, c)) if refused else (),
        near=tuple(nearest(candidates, job.layout)) if not chosen.fits else (),
        best=tuple(fastest(candidates)),
        band=c.band_far,
        tokens=job.work.tokens,
        update_mfu=update_mfu,
        step_mfu=step_mfu,
        assumed=tuple(assumed),
    )


def describe_job(cfg: Config, shape: ModelShape, options: Options) -> tuple[Job, list[str]]:
    """The configuration's step and layout, and what had to be assumed."""
    _check_options(cfg, options)
    a, r = cfg.algorithm, cfg.rollout
    machine = options.gpu if isinstance(options.gpu, Gpu) else gpu(options.gpu)
    if not 0 <= options.rollout_nodes < options.nodes:
        raise ConfigError(
            f"--rollout-nodes {options.rollout_nodes}: use 0 (colocated) .. {options.nodes - 1}"
        )
    if r.gpus_per_node:
        raise ConfigError(
            f"rollout.gpus_per_node={r.gpus_per_node}: the planner knows engines on trainers' GPUs and on "
            "nodes of their own (--rollout-nodes), not on other GPUs of the same nodes"
        )
    lengths, prompt, assumed = _lengths(cfg, options)
    engines = options.rollout_nodes or options.nodes
    gpus = engines * machine.per_node
    if gpus % r.tensor_model_parallel_size:
        raise ConfigError(
            f"rollout.tensor_model_parallel_size={r.tensor_model_parallel_size} does not divide {gpus} GPUs"
        )
    if options.rollout_nodes:
        assumed.append("engines on all GPUs of nodes of their own: redone does not run so on GPUs yet")
    else:
        assumed.append("engines on all GPUs of the cluster")
    assumed.append("trainer as fast as NeMo RL's on this GPU: redone has not been measured there")
    p = cfg.trainer.parallel
    layout = Layout(
        gpu=machine,
        train_gpus=(options.nodes - options.rollout_nodes) * machine.per_node,
        rollout_gpus=gpus,
        mode="async" if options.rollout_nodes else "sync",
        tensor=p.tensor,
        pipeline=p.pipeline,
        context=p.context,
        expert=p.expert,
        expert_tensor=p.expert_tensor,
        rollout_tensor=r.tensor_model_parallel_size,
        budget=cfg.trainer.max_token_len_per_rank,
        recompute=cfg.trainer.recompute == "full",
        shared_prefix=cfg.trainer.prefix_sharing,
        utilization=r.gpu_memory_utilization,
        max_sequences=r.engine.max_num_seqs,
        cpu_optimizer=options.cpu_optimizer or cfg.trainer.optim.cpu_offload == 1,
        trainer_sleeps=options.trainer_sleeps or cfg.trainer.offload,
    )
    updates = max(1, a.train_batch_size // a.ppo_mini_batch_size) * a.ppo_epochs
    work = Workload(
        prompts=a.train_batch_size,
        samples=r.n,
        update_sequences=a.ppo_mini_batch_size * r.n,
        updates=updates,
        prompt_tokens=prompt,
        lengths=lengths,
        # as pipeline.step: with one update the old log-probabilities are the update's own
        forward_passes=(updates > 1 or a.importance.level != "off") + (a.kl.coef > 0),
        ahead=max(1, r.max_staleness),
    )
    return Job(model=planned(shape), work=work, layout=layout), assumed


def _check_options(cfg: Config, options: Options) -> None:
    """Raises ConfigError for a number that no run can have."""
    if options.nodes < 1:
        raise ConfigError(f"--nodes {options.nodes}: use 1 or more")
    longest = cfg.data.max_prompt_length
    if options.prompt_tokens is not None and not 1 <= options.prompt_tokens <= longest:
        raise ConfigError(
            f"--prompt-tokens {options.prompt_tokens:g} lies outside 1 .. {longest} (data.max_prompt_length)"
        )
    if not 0 < options.sigma <= 5:
        raise ConfigError(f"--sigma {options.sigma:g} lies outside 0 .. 5 (0 excluded); usual are 0.3 to 1.2")
    if options.host_memory is not None and not 1e9 <= options.host_memory < 1e15:
        raise ConfigError(
            f"--host-memory {options.host_memory:g} is no size of a node's RAM; give bytes, e.g. 2e12"
        )


def _lengths(cfg: Config, options: Options) -> tuple[Lengths, float, list[str]]:
    """(response lengths, mean prompt tokens, assumptions)."""
    cap, assumed = cfg.data.max_response_length, []
    prompt = options.prompt_tokens
    if prompt is None:
        prompt = cfg.data.max_prompt_length / 2
        assumed.append(f"mean prompt {prompt:g} tokens (half of data.max_prompt_length; --prompt-tokens)")
    if cfg.rollout.forced_lengths:
        assumed.append("response lengths as rollout.forced_lengths says, whatever the command line says")
        return tuple(sorted(map(float, cfg.rollout.forced_lengths))), prompt, assumed
    if options.lengths_file:
        return from_file(options.lengths_file, cap), prompt, assumed
    mean = options.response_tokens
    if mean is None:
        mean = cap / 2
        assumed.append(f"mean response {mean:g} tokens (half of data.max_response_length; --response-tokens)")
    assumed.append(f"responses log-normal, sigma {options.sigma:g}, cut at {cap} tokens (--lengths, --sigma)")
    return truncated_lognormal(mean, cap, options.sigma), prompt, assumed


def _sizes(cfg: Config, shape: ModelShape, options: Options, job: Job) -> Sizes:
    mean = moments(job.work.lengths)[0]
    prompt = job.work.prompt_tokens / (job.work.samples if job.layout.shared_prefix else 1)
    chunked = cfg.trainer.head.backend != "reference"
    ranks = TrainerRanks(
        shape=shape,
        world=job.layout.train_gpus,
        tokens=job.layout.budget,
        bytes_per_value=4 if cfg.model.dtype == "float32" else 2,
        loss_share=mean / (mean + prompt),
        head_chunk=cfg.trainer.head.chunk_tokens if chunked else None,
        logit_bytes=21.0,
    )
    return Sizes(
        ranks=ranks,
        bucket_bytes=float(cfg.weights.bucket_bytes),
        keeps_reference=cfg.algorithm.kl.coef > 0,
        replays_routes=cfg.trainer.moe.routing_replay != "off",
        host_memory=options.host_memory or 0.0,
    )


def _refusals(job: Job, c: Constants) -> Iterator[str]:
    margin = cache_margin(job, c)
    if margin < MARGIN:
        yield (
            f"rollout seconds: an engine's KV cache is {max(margin, 0.0):.2f} x what its sequences want;"
            f" below {MARGIN} x small errors move the step a lot. Raise rollout.gpu_memory_utilization or"
            " rollout.tensor_model_parallel_size"
        )
    if job.layout.context > 1:
        yield "trainer seconds: context parallelism on packed rows (published runs scatter by 5-9 x)"


def _sensitivity(chosen: Candidate, c: Constants) -> Iterator[tuple[str, float]]:
    """The step over the range of what makes it unpredictable, everything else as predicted."""
    lay, seconds = chosen.job.layout, chosen.seconds
    if cache_margin(chosen.job, c) < MARGIN:
        for delta in (-0.05, 0.0, 0.05, 0.1):
            share = lay.utilization + delta
            if 0 < share <= 0.98:
                other = replace(chosen.job, layout=replace(lay, utilization=share))
                yield f"{share:.2f} of GPU memory for the engine", assess(other, chosen.sizes, c).seconds.step
    if lay.context > 1:
        for slow in CONTEXT_SCATTER:
            more = (slow - 1) * (seconds.logprobs + seconds.update)
            yield f"trainer {slow} x as slow as counted", seconds.step + more


def _mfu(job: Job, hf: Mapping[str, Any], chosen: Candidate) -> tuple[float, float]:
    """Useful FLOPs (forward and backward once, every prompt with every response) / peak: of the updates, of
    the step."""
    flops, work = model_flops(hf), job.work
    mean, square = moments(work.lengths)
    tokens = work.prompt_tokens + mean
    attended = (work.prompt_tokens**2 + 2 * work.prompt_tokens * mean + square) / 2
    one = flops.matmul * tokens + flops.head * mean + flops.per_context * attended
    total = 3 * one * work.update_sequences * work.updates
    peak = job.layout.gpu.flops
    return (
        total / (chosen.seconds.update * job.layout.train_gpus * peak),
        total / (chosen.seconds.step * job.layout.gpus * peak),
    )


def gate(plan: Plan) -> list[str]:
    """Why this must not be queued: memory that does not fit. Time never blocks. Empty: go."""
    problems = []
    for phase in plan.chosen.memory:
        if phase.colour == "red":
            problems.append(
                f"{phase.rank}, {phase.phase}: needs {phase.total / GB:.1f} GB of {phase.limit / GB:.1f} GB;"
                f" {phase.binds} is the largest part ({dict(phase.parts)[phase.binds] / GB:.1f} GB)"
            )
    if problems:
        fits = "; ".join(x.job.layout.name() for x in plan.near)
        problems.append(f"nearest layouts that fit: {fits}" if fits else "no legal layout fits these GPUs")
    return problems


def warnings(plan: Plan) -> list[str]:
    """What does not block: amber memory, what cannot be predicted, a better layout."""
    found = [
        f"{p.rank}, {p.phase}: {p.total / GB:.1f} of {p.limit / GB:.1f} GB; it fits unless activations are"
        " 20 % larger than counted"
        for p in plan.chosen.memory
        if p.colour == "amber"
    ]
    found += [f"not predicted: {reason}" for reason in plan.refused]
    if plan.best and plan.best[0].seconds.step * plan.band < plan.chosen.seconds.step:
        found.append(f"{plan.best[0].job.layout.name()} is predicted to be faster beyond the band")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run's first steps against its plan."""

    measured: float  # seconds, median
    inside: bool  # of the plan's band
    multiplier: float  # that later predictions of this configuration take
    band: float  # around measured-corrected predictions


def compare(plan: Plan, step_seconds: Sequence[float], c: Constants = DEFAULT) -> Comparison:
    """After at least three real steps: was the band right, and the one multiplier that re-fits it.

    Raises ConfigError with fewer steps.
    """
    if len(step_seconds) < 3:
        raise ConfigError(f"{len(step_seconds)} steps measured; the plan is compared after 3 or more")
    ordered = sorted(step_seconds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else math.sqrt(ordered[middle - 1] * ordered[middle])
    ratio = median / plan.chosen.seconds.step
    return Comparison(
        measured=median,
        inside=1 / plan.band <= ratio <= plan.band,
        multiplier=ratio,
        band=c.band_near,
    )
