"""One rank of the memory tests: what torch's profiler sees of a real trainer, `python memory_worker.py JOB
RANK`."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from redone.config.schema import Config
from redone.data.pack import build_shards
from redone.trainer import build_trainer
from redone.trainer.megatron.optim import inner_optimizers
from redone.types import Batch, Piece, StepPlan, TrainGroup, Trajectory

PROMPT, GROUP = 32, 4
FOLDER = Path()


def make_config(path: str, layout: list[int], tokens: int, **options: Any) -> Config:
    tensor, pipeline, expert, expert_tensor = layout
    return Config.model_validate(
        {
            "model": {"path": path, "dtype": options.get("dtype", "float32")},
            "data": {"train": ["unused"]},
            "rewards": {},
            "algorithm": {"train_batch_size": 1, "ppo_mini_batch_size": 1},
            "trainer": {
                "parallel": dict(
                    tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor
                ),
                "max_token_len_per_rank": tokens,
                "self_check": False,
                "recompute": options.get("recompute", "none"),
                "head": {
                    "backend": options.get("head", "chunked"),
                    "chunk_tokens": options.get("chunk", 128),
                },
                "timeout_s": 120.0,
            },
            "cluster": {"gpus_per_node": dist.get_world_size()},
        }
    )


def make_batch(tokens: int, count: int, vocab: int) -> Batch:
    """`count` groups that fill a micro-batch of `tokens` tokens each."""
    rng, length = np.random.default_rng(0), (tokens - PROMPT) // GROUP

    def trajectory() -> Trajectory:
        return Trajectory(
            token_ids=rng.integers(3, vocab, length).astype(np.int32),
            loss_mask=np.ones(length, bool),
            advantages=np.full(length, rng.standard_normal(), np.float32),
            engine_logprobs=-np.ones(length, np.float32),
        )

    return Batch.of(
        [
            TrainGroup(
                prompt_id=f"p{i}",
                prompt_ids=rng.integers(3, vocab, PROMPT).astype(np.int32),
                trajectories=tuple(trajectory() for _ in range(GROUP)),
            )
            for i in range(count)
        ]
    )


def live_bytes(prof: profile) -> np.ndarray:
    """Bytes allocated since the profiler's start, after every allocation and release, in order of time."""
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return np.cumsum([0, *(e.nbytes() for e in events)])


def peak_bytes(prof: profile, trace: Path) -> float:
    """Largest sum of live allocations made in the profile, of those whose release it saw.

    gloo releases its copies in threads of which the profiler does not know; they would count for ever.
    """
    prof.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    trace.unlink()
    events.sort(key=lambda e: e["ts"])
    changes, live = np.zeros(len(events)), {}
    for i, event in enumerate(events):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = i
        elif (start := live.pop(address, None)) is not None:
            changes[start], changes[i] = size * -1.0, float(size)
    return float(changes.cumsum().max())


def count_routed(trainer: Any) -> list[int]:
    """Grows by the tokens that reach this rank's experts, once a layer and pass."""
    found: list[int] = []
    for layer in trainer.modules[0].decoder.layers:
        if experts := getattr(layer.mlp, "experts", None):
            experts.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[0]))
    return found


def profile_first_steps(trainer: Any) -> list[float]:
    """Grows by the bytes that each of torch's optimizers allocates for good in its first step.

    Apart from the rest, because gloo frees its buffers in threads of which the profiler does not know.
    """
    found: list[float] = []
    for chained in inner_optimizers(trainer.optimizer):
        inner = chained.optimizer

        def step(*args: Any, plain: Any = inner.step, owner: Any = inner, **kwargs: Any) -> Any:
            owner.step = plain
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                result = plain(*args, **kwargs)
            found.append(float(live_bytes(prof)[-1]))
            return result

        inner.step = step
    return found


def measure(path: str, layout: list[int], tokens: int, **options: Any) -> list[dict[str, float]]:
    """Per rank, in bytes: what the build left (`built`), what the first optimizer step added (`moments`),
    and the `peak` of a third update above them."""
    micro = options.pop("microbatches", 2)
    cfg = make_config(path, layout, tokens, **options)
    while gc.collect():  # the trainer before is garbage in cycles, freed in rounds; that must not count here
        pass
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as build:
        trainer = build_trainer(cfg, dist.get_rank(), dist.get_world_size(), "unused")
        gc.collect()  # what the build left in cycles is no state
    info = trainer.describe()
    dp = info["dp_size"]
    batch = make_batch(tokens, micro * dp, trainer.shape.vocab)
    slots = [
        [(Piece(group=i + d, samples=tuple(range(GROUP))),) for d in range(dp)]
        for i in range(0, micro * dp, dp)
    ]
    plan = StepPlan(slots=tuple(map(tuple, slots)))  # a group is a micro-batch: the planner may cut otherwise
    shard = build_shards(batch, plan, layout[0])[info["dp_rank"]]
    moments = profile_first_steps(trainer)
    for _ in range(2):
        trainer.update(shard, cfg.algorithm)
    gc.collect()
    routed = count_routed(trainer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as step:
        trainer.update(shard, cfg.algorithm)
    found = {
        **info,
        "built": float(live_bytes(build)[-1]),
        "moments": sum(moments),
        "peak": peak_bytes(step, FOLDER / f"trace{dist.get_rank()}.json"),
        "routed": float(np.mean(routed)) / trainer.shape.experts_per_token if routed else 0.0,
        "microbatches": plan.num_microbatches,
    }
    trainer.close()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone


def main() -> None:
    global FOLDER
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    FOLDER = Path(job["folder"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{job['port']}", rank=rank, world_size=job["world"]
    )
    results = {name: globals()[function](**arguments) for name, function, arguments in job["cases"]}
    if rank == 0:
        Path(job["result"]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
